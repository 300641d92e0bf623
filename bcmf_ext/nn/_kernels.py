"""What the context modules share where kernels run them: which impl does, and the ops between two convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import dispatch, ops


def choose_kernels(module: nn.Module, impl: str, x: Tensor) -> FusedNorms | None:
    """What runs a context module's batch norms on ``x`` by kernels; None where PyTorch runs the module: asked for, all
    there is, or, for "auto", where the norms are none that kernels know.

    Raises ValueError for a map of another shape, for an impl asked for by name that cannot run, and in training for
    a single image, of whose globally pooled values there is one per channel.
    """
    name = type(module).__name__
    if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name} takes maps of the shape (N, C, h, w), h, w >= 1, not {tuple(x.shape)}.")
    norms: list[Any] = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    reason = why_not_fused(norms, module.training)
    if reason is None:
        impl = dispatch.choose(name, impl, x.device)
    elif impl not in ("auto", "torch"):
        raise ValueError(f"impl={impl!r} cannot run {name}: {reason}.")
    if reason is not None or impl == "torch":
        return None
    if module.training and x.shape[0] < 2:
        raise ValueError(
            f"{name} cannot train on {x.shape[0]} images: the batch norm after its global pool needs more than one "
            "value per channel."
        )
    return FusedNorms(impl, norms, channels_last=x.stride(1) == 1)


def why_not_fused(norms: Sequence[Any], training: bool) -> str | None:
    """Why kernels cannot stand in for a module's batch norms: they know plain ones, all alike."""
    for norm in norms:
        if type(norm) is not nn.BatchNorm2d:
            return f"its norms are {type(norm).__name__}, not BatchNorm2d"
        if not norm.affine or norm.running_mean is None:
            return "its batch norms have no weight and bias, or no running statistics"
        if norm.momentum is None:
            return "its batch norms have no momentum"
        if norm.training != training:
            return "its batch norms are frozen" if training else "its batch norms train, and it does not"
    if len({(norm.eps, norm.momentum) for norm in norms}) > 1:
        return "its batch norms differ in eps or momentum"
    return None


class FusedNorms:
    """A forward pass through a module's batch norms, in few kernels. channels_last: the layout of what comes out."""

    def __init__(self, impl: str, norms: Sequence[Any], channels_last: bool) -> None:
        self.impl, self.channels_last = impl, channels_last
        self.options = norms[0].training, norms[0].momentum, norms[0].eps
        if norms[0].training:
            torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)

    def pool(self, x: Tensor, norms: Sequence[Any]) -> list[Tensor]:
        """relu(norm(·)) of the pools 5/2, 9/4, 17/8 and the global one of x."""
        *outputs, _ = ops.POOL_NORM_RELU[self.impl](x, *parameters(norms), *self.options)
        return outputs

    def add(
        self,
        resampled: Sequence[Tensor | None],
        added: Sequence[Tensor | None],
        size: Sequence[int],
        norms: Sequence[Any],
        joined: bool = False,
    ) -> list[Tensor]:
        """relu(norm(·)) of each sum of a map that is resampled to ``size``, and another one; as one map if joined."""
        shape = (*size, self.channels_last, joined)
        *outputs, _ = ops.ADD_NORM_RELU[self.impl](resampled, added, *parameters(norms), *shape, *self.options)
        return outputs[:1] if joined else outputs[: len(norms)]

    def join_convolve(self, maps: Sequence[Tensor], units: Sequence[Any]) -> Tensor:
        """Σ A1(·) over units of (BN, ReLU, 1×1 convolution), whose inputs are the maps, joined along the channels: as
        one convolution."""
        maps = [map.to(maps[0].dtype) for map in maps]  # the first ones come from a convolution: autocast's dtype
        nothing = [None] * len(maps)
        (joined,) = self.add(nothing, maps, maps[0].shape[2:], [unit[0] for unit in units], joined=True)
        return F.conv2d(joined, torch.cat([unit[-1].weight for unit in units], dim=1))


def parameters(norms: Sequence[Any]) -> tuple[list[Tensor], ...]:
    """Weights, biases, running means and variances."""
    columns = zip(*((norm.weight, norm.bias, norm.running_mean, norm.running_var) for norm in norms), strict=True)
    return tuple(list(column) for column in columns)
