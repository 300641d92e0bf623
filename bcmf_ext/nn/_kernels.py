"""Runs the context modules by kernels: it chooses the impl, and makes the ops between two convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import dispatch, ops


def choose_kernels(module: nn.Module, impl: str, x: Tensor) -> FusedNorms | None:
    """The kernels that run a context module's batch norms on ``x``; None where PyTorch runs the module: asked for, all
    there is, or, for "auto", where kernels would compute something else than the module says (`why_not_fused`,
    `why_not_bypassed`).

    Raises ValueError for a map of another shape, for an impl asked for by name that cannot run, and in training for
    a single image, of whose globally pooled values there is one per channel.
    """
    name = type(module).__name__
    if x.dim() != 4 or x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{name} takes maps of the shape (N, C, h, w), h, w >= 1, not {tuple(x.shape)}.")
    norms: list[Any] = [child for child in module.modules() if isinstance(child, _BatchNorm)]
    reason = why_not_fused(norms, module.training, x) or why_not_bypassed(module)
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


def why_not_fused(norms: Sequence[Any], training: bool, x: Tensor) -> str | None:
    """Why kernels cannot stand in for a module's batch norms: they know plain ones, all alike, in fp32 (fp64)."""
    for norm in norms:
        if type(norm) is not nn.BatchNorm2d:
            return f"its norms are {type(norm).__name__}, not BatchNorm2d"
        if not norm.affine or norm.running_mean is None:
            return "its batch norms have no weight and bias, or no running statistics"
        if norm.momentum is None:
            return "its batch norms have no momentum"
        if norm.training != training:
            return "its batch norms are frozen" if training else "its batch norms train, and it does not"
        if norm.weight.dtype != ops.acc_dtype(x):
            return f"its batch norms are in {norm.weight.dtype} for maps in {x.dtype}, not in {ops.acc_dtype(x)}"
    if len({(norm.eps, norm.momentum) for norm in norms}) > 1:
        return "its batch norms differ in eps or momentum"
    return None


def why_not_bypassed(module: nn.Module) -> str | None:
    """Why kernels cannot stand in for what they bypass, all of a context module's units but most convolutions: somebody
    has changed a part, or hooked onto one."""
    for name, unit in module.named_children():
        if not name.startswith(("scale", "process", *_JOINED)):
            continue  # A subclass has parts of its own.
        bypassed = [*unit.children()][: None if name in _JOINED else -1]
        if [_kind(part) for part in bypassed] != [*_POOLS.get(name, ()), *_NORM_RELU, *_JOINED.get(name, ())]:
            return f"its {name} is not as it was made"
        if any(map(_has_hooks, (unit, *bypassed))):
            return f"its {name} has hooks"
    return None


def _kind(part: Any) -> Any:
    """The computation of a part, but for its weights, to be compared."""
    if type(part) is nn.AvgPool2d:
        sides = part.kernel_size, part.stride, part.padding
        return nn.AvgPool2d, *sides, part.ceil_mode, part.count_include_pad, part.divisor_override
    if type(part) is nn.AdaptiveAvgPool2d:
        return nn.AdaptiveAvgPool2d, part.output_size
    if type(part) is nn.Conv2d:
        return nn.Conv2d, part.kernel_size, part.stride, part.padding, part.groups, part.bias
    return type(part)


def _has_hooks(part: nn.Module) -> bool:
    forward, backward = (part._forward_hooks, part._forward_pre_hooks), (part._backward_hooks, part._backward_pre_hooks)
    return any((*forward, *backward))


# By the names of the units, these are what `_kind` tells of their parts.
_NORM_RELU = (nn.BatchNorm2d, nn.ReLU)
_JOINED = dict.fromkeys(("compression", "shortcut"), ((nn.Conv2d, (1, 1), (1, 1), (0, 0), 1, None),))
_POOLS: dict[str, tuple[Any, ...]] = {
    **{f"scale{i}": ((nn.AvgPool2d, k, s, k // 2, False, True, None),) for i, (k, s) in enumerate(ops.POOLS, 1)},
    "scale4": ((nn.AdaptiveAvgPool2d, 1),),
}


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
        one convolution. The last map is the last unit's."""
        if maps[-1].dtype != maps[0].dtype:  # Under autocast a map may come in fp32, and is normalised in it.
            return self.join_convolve(maps[:-1], units[:-1]) + self.join_convolve(maps[-1:], units[-1:])
        nothing = [None] * len(maps)
        (joined,) = self.add(nothing, maps, maps[0].shape[2:], [unit[0] for unit in units], joined=True)
        return F.conv2d(joined, torch.cat([unit[-1].weight for unit in units], dim=1))


def parameters(norms: Sequence[Any]) -> tuple[list[Tensor], ...]:
    """The norms' weights, biases, running means and running variances."""
    columns = zip(*((norm.weight, norm.bias, norm.running_mean, norm.running_var) for norm in norms), strict=True)
    return tuple(list(column) for column in columns)
