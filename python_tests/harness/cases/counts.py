"""The cases of the ops that give integers: the arg-max of resampled logits, and what the metrics count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from unittest import mock

import torch
from torch import Tensor

from bcmf_ext import ops, reference
from bcmf_ext.metrics import _counts, boundary
from harness.backends import KERNELS, Backend
from harness.cases.losses import problem, quarter, same
from harness.cases.pattern import Case, Inputs

CPU = KERNELS[:1]


@dataclass(frozen=True)
class ArgmaxCase(Case):
    """bcmf::upsample_argmax. Its inputs are logits (N, C, h, w) and the size of what comes out, H and W.

    logits: the size of the logits for a size (H, W).
    """

    logits: Callable[[int, int], tuple[int, int]] = same
    align_corners: bool = False

    shapes: ClassVar[Sequence[tuple[int, ...]]] = ((1, 2, 1, 1), (2, 5, 9, 11), (1, 19, 13, 70), (1, 300, 8, 9))

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
        z, *_ = problem(shape, dtype, device, logits=self.logits)
        return z, *shape[2:]

    def call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        return ops.UPSAMPLE_ARGMAX[backend.impl], (*inputs, self.align_corners)

    def run(self, backend: Backend, *inputs: Any) -> tuple[Tensor, ...]:
        op, arguments = self.call_of(backend, *inputs)
        return (op(*arguments),)

    def assert_as_defined(self, backend: Backend, inputs: Inputs, views: Inputs | None = None) -> Sequence[Tensor]:
        (classes,) = self.run(backend, *(views or inputs))
        assert_largest(classes, *inputs, self.align_corners)
        return []


def assert_largest(classes: Tensor, z: Tensor, height: int, width: int, align_corners: bool) -> None:
    """Each pixel's class has the largest logit; it may be another one only where two logits are almost equal."""
    assert (classes.shape, classes.dtype) == ((len(z), height, width), ops.argmax_dtype(z))
    exact = reference.resample(z.double(), (height, width), align_corners)
    chosen = exact.gather(1, classes[:, None].long())[:, 0]
    assert (exact.amax(1) - chosen <= (1e-12 if z.dtype == torch.float64 else 1e-5)).all()


@dataclass(frozen=True)
class ConfusionCase(Case):
    """bcmf::upsample_confusion. Its inputs are logits (N, C, h, w) and labels (N, H, W)."""

    logits: Callable[[int, int], tuple[int, int]] = quarter
    align_corners: bool = False

    backends: ClassVar[Sequence[Backend]] = CPU
    shapes: ClassVar[Sequence[tuple[int, ...]]] = ArgmaxCase.shapes

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
        z, y, _ = problem(shape, dtype, device, logits=self.logits)
        return z, y

    def call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        return torch.ops.bcmf.upsample_confusion, (*inputs, 255, self.align_corners)

    def run(self, backend: Backend, *inputs: Any) -> tuple[Tensor, ...]:
        op, arguments = self.call_of(backend, *inputs)
        return op(*arguments)

    def assert_as_defined(self, backend: Backend, inputs: Inputs, views: Inputs | None = None) -> Sequence[Tensor]:
        z, y = inputs
        classes, bins = self.run(backend, *(views or inputs))
        assert_largest(classes, z, *y.shape[1:], self.align_corners)
        number = z.shape[1]
        pairs = torch.bincount(y[y != 255] * number + classes[y != 255].long(), minlength=number**2)
        assert torch.equal(bins, torch.cat([pairs, torch.tensor([0, (y == 255).sum()])]))
        return []


@dataclass(frozen=True)
class LabelCase(Case):
    """An op that takes two maps of labels (N, H, W). definition: the same in PyTorch; both get the options."""

    op: Any = None
    definition: Callable[..., Any] = _counts.read_labels
    options: Sequence[Any] = ()

    backends: ClassVar[Sequence[Backend]] = CPU
    dtypes: ClassVar[Sequence[torch.dtype]] = (torch.int32, torch.uint8)
    shapes: ClassVar[Sequence[tuple[int, ...]]] = ((1, 2, 1, 1), (1, 3, 1, 37), (2, 4, 9, 11), (1, 5, 70, 53))

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.uint8, device: str = "cpu") -> Inputs:
        n, c, h, w = shape
        g = torch.Generator().manual_seed(0)
        return tuple(torch.randint(0, c + 1, (2, n, h, w), generator=g).to(device, dtype))

    def call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        return self.op, (*inputs, *self.options)

    def run(self, backend: Backend, *inputs: Any) -> tuple[Tensor, ...]:
        found = self.op(*inputs, *self.options)
        return (found,) if isinstance(found, Tensor) else found

    def assert_as_defined(self, backend: Backend, inputs: Inputs, views: Inputs | None = None) -> Sequence[Tensor]:
        with mock.patch.object(_counts, "by_kernels", return_value=False):
            expected = self.definition(*inputs, *self.options)
        expected = (expected,) if isinstance(expected, Tensor) else expected
        for ours, theirs in zip(self.run(backend, *(views or inputs)), expected, strict=True):
            assert ours.dtype == theirs.dtype
            assert torch.equal(ours, theirs)
        return []


COUNTS = (
    ArgmaxCase("upsample_argmax"),
    ArgmaxCase("upsample_argmax low-resolution", quarter),
    ArgmaxCase("upsample_argmax low-resolution aligned", quarter, True),
    ConfusionCase("upsample_confusion"),
    ConfusionCase("upsample_confusion aligned", align_corners=True),
    LabelCase("read_labels", torch.ops.bcmf.read_labels, _counts.read_labels, (3, 1)),
    LabelCase("count_pairs", torch.ops.bcmf.count_pairs, _counts.count_pairs, (2, 3)),
    LabelCase("match_within", torch.ops.bcmf.match_within, boundary._match_within, (3, (1, 4))),
)
