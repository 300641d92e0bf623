"""The cases of what context modules do between convolutions: bcmf::pool_norm_relu and bcmf::add_norm_relu."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmf_ext import ops
from harness.backends import Backend
from harness.cases.losses import quarter
from harness.cases.pattern import Case, Inputs, backward_of, results

MOMENTUM = 0.3
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class NormCase(Case):
    """An op with the maps and norms of a call. Its inputs are the maps, the norms' weights, biases, running means and
    running variances, (C,) each, and the size of what comes out, H and W (which pool_norm_relu has no use for).

    maps: their shapes (C, h, w) for a size (H, W), None for a map that is missing; the first half of add_norm_relu's
    is resampled. norms: how many channels each has. joined: whether add_norm_relu makes one map of all.
    """

    maps: Callable[[int, int], Sequence[Shape | None]] = lambda h, w: ()
    norms: Sequence[int] = ()
    joined: bool = False
    training: bool = True
    eps: float = 0.02

    shapes: ClassVar[Sequence[tuple[int, ...]]] = tuple(
        (3, 0, *size) for size in ((1, 1), (1, 5), (6, 8), (16, 17), (33, 18))
    )
    smallest: ClassVar[tuple[int, ...]] = (2, 0, 5, 6)

    @property
    def pools(self) -> bool:
        """Whether the op is pool_norm_relu."""
        return self.name.startswith("pool_norm_relu")

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
        """No two channels' norms are alike. The number of channels asked for does not matter."""
        n, _, *size = shape
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
        maps = [None if each is None else draw(n, *each).to(device, dtype) for each in self.maps(*size)]
        norms = [draw(channels) for _ in range(3) for channels in self.norms]
        norms += [0.5 + 1.5 * torch.rand(channels, generator=g, dtype=torch.float64) for channels in self.norms]
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        return *maps, *(each.to(device, acc) for each in norms), *size

    def apart(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """The maps, weights, biases, running means and running variances, a list of each, and the size."""
        *tensors, height, width = inputs
        count = len(self.norms)
        maps = len(tensors) - 4 * count
        return tensors[:maps], *(tensors[i : i + count] for i in range(maps, len(tensors), count)), (height, width)

    def call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        maps, *norms, size = self.apart(inputs)
        norm_options = (self.training, MOMENTUM, self.eps)
        if self.pools:
            return ops.POOL_NORM_RELU[backend.impl], (*maps, *norms, *norm_options)
        half = len(maps) // 2
        options = (*size, in_channels_last(maps), self.joined, *norm_options)
        return ops.ADD_NORM_RELU[backend.impl], (maps[:half], maps[half:], *norms, *options)

    def backward_call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        op, arguments = self.call_of(backend, *inputs)
        *outputs, stats = (output.detach() for output in op(*detached(arguments)))
        given = 1 if self.pools else 2  # arguments that hold maps; weights and biases follow
        options = arguments[given + 4 : -2]
        return backward_of(op), (outputs, *detached(arguments[: given + 2]), stats, *options)

    def run(self, backend: Backend, *inputs: Any) -> tuple[Tensor, ...]:
        op, arguments = self.call_of(backend, *inputs)
        *outputs, _ = op(*arguments)
        return tuple(outputs[: 4 if self.pools else 1 if self.joined else len(self.norms)])

    def define(self, *inputs: Any) -> tuple[Tensor, ...]:
        """By PyTorch, in the dtype of the maps."""
        maps, *norms, size = self.apart(inputs)

        def norm_relu(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
            return F.relu(F.batch_norm(x, mean, variance, weight, bias, self.training, MOMENTUM, self.eps))

        if self.pools:
            (x,) = maps
            sums = [F.avg_pool2d(x, k, s, p) for k, s, p in ((5, 2, 2), (9, 4, 4), (17, 8, 8))]
            sums.append(F.adaptive_avg_pool2d(x, 1))
        else:
            half, sums = len(maps) // 2, []
            for low, added in zip(maps[:half], maps[half:], strict=True):
                up = None if low is None else F.interpolate(low, size=size, mode="bilinear", align_corners=False)
                sums.append(up if added is None else added if up is None else up + added)
        if self.joined:
            parts = torch.cat(sums, 1).split(list(self.norms), 1)
            return (torch.cat([norm_relu(*each) for each in zip(parts, *norms, strict=True)], 1),)
        return tuple(norm_relu(*each) for each in zip(sums, *norms, strict=True))

    def differentiable(self, inputs: Inputs) -> list[int]:
        first_statistic = len(inputs) - 2 - 2 * len(self.norms)
        return [i for i, each in enumerate(inputs[:first_statistic]) if each is not None]

    def written(self, inputs: Inputs) -> list[int]:
        end = len(inputs) - 2
        return list(range(end - 2 * len(self.norms), end)) if self.training else []

    def assert_as_defined(self, backend: Backend, inputs: Inputs, views: Inputs | None = None) -> Sequence[Tensor]:
        """Our errors are at most twice those of PyTorch in the same dtype, plus a few roundings; both against fp64."""
        x = next(each for each in inputs if each is not None)
        wide = tuple(each.double() if isinstance(each, Tensor) else each for each in inputs)
        truth = results(self, wide, self.define, x.dtype)
        eager = results(self, inputs, self.define)
        ours = results(self, views or inputs, lambda *given: self.run(backend, *given))
        acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        sums = 8 * torch.finfo(acc).eps * math.sqrt(len(x) * math.prod(inputs[-2:]))  # of terms of both signs
        for mine, theirs, true in zip(chain(*ours), chain(*eager), chain(*truth), strict=True):
            assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device)
            if mine.numel() == 0:
                continue
            # In fp64 eager is the truth itself, and the order of sums is all that differs.
            roundings = 8 if mine.dim() == 1 else 2  # sums over all pixels, whose partial sums are as large as they are
            eps = 1e-11 if mine.dtype == torch.float64 else roundings * torch.finfo(mine.dtype).eps
            allowed = 2 * (theirs - true).abs().max() + eps * (1 + true.abs().max()) + sums
            assert (mine - true).abs().max() <= allowed
        return ours.grads


def in_channels_last(maps: Sequence[Tensor | None]) -> bool:
    """Whether the largest map is: a single pixel looks like either layout. (torch.compile knows no max with a key.)"""
    pixels, found = 0, False
    for each in maps:
        if each is not None and each.shape[2] * each.shape[3] > pixels:
            pixels, found = each.shape[2] * each.shape[3], each.stride(1) == 1
    return found


def detached(argument: Any) -> Any:
    """The arguments of an op without their history."""
    if isinstance(argument, (list, tuple)):
        return [detached(each) for each in argument]
    return argument.detach() if isinstance(argument, Tensor) else argument


def both_modes(
    name: str, maps: Callable[[int, int], Sequence[Shape | None]], norms: Sequence[int], joined: bool = False
) -> Iterator[NormCase]:
    for training in (True, False):
        yield NormCase(f"{name} {'training' if training else 'eval'}", maps, norms, joined, training)


NORMS = (
    *both_modes("pool_norm_relu", lambda h, w: [(5, h, w)], (5, 5, 5, 5)),
    *both_modes("add_norm_relu level", lambda h, w: [(3, *quarter(h, w)), (17, 1, 1), (3, h, w), (17, h, w)], (3, 17)),
    *both_modes(
        "add_norm_relu first level", lambda h, w: [(3, h + 2, (w + 1) // 2), (2, *quarter(h, w)), None, None], (3, 2)
    ),
    *both_modes("add_norm_relu alone", lambda h, w: [None, (3, h, w)], (3,)),
    # A norm may span several branches.
    *both_modes(
        "add_norm_relu joined",
        lambda h, w: [None, None, (2, 1, w), None, (2, h, w), (3, h, w), None, (17, h, w)],
        (5, 2, 17),
        True,
    ),
)
