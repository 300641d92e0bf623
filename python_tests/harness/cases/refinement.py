"""The cases of what SRM does behind its convolutions: bcmf::srm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from bcmf_ext import ops
from bcmf_ext.nn.srm import refine
from harness.backends import Backend
from harness.cases.losses import quarter
from harness.cases.pattern import Case, Inputs, backward_of, results


@dataclass(frozen=True)
class SrmCase(Case):
    """Its inputs are low, raw and residual. size: that of low for one of residual. wide: raw is in acc_dtype. spread:
    of the offsets, in pixels."""

    size: Callable[[int, int], tuple[int, int]] = quarter
    wide: bool = False
    spread: float = 1.5

    shapes: ClassVar[Sequence[tuple[int, ...]]] = (
        (2, 3, 1, 1), (1, 5, 1, 9), (2, 19, 8, 7), (2, 40, 33, 18), (1, 171, 4, 70), (1, 64, 17, 65),
    )  # fmt: skip

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
        """Offsets are off the kinks of the definition: positions are no integers."""
        n, c, height, width = shape
        g = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=g, dtype=torch.float64)  # noqa: E731
        low, raw, residual = draw(n, c, *self.size(height, width)), draw(n, 11, height, width), draw(*shape)
        raw[:, :2] *= self.spread
        of_raw = ops.acc_dtype(low.to(dtype)) if self.wide else dtype
        return low.to(device, dtype), raw.to(device, of_raw), residual.to(device, dtype)

    def call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        return ops.SRM[backend.impl], inputs

    def backward_call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        low, raw, residual = (each.detach() for each in inputs)
        return backward_of(ops.SRM[backend.impl]), (torch.ones_like(residual), low, raw)

    def run(self, backend: Backend, *inputs: Any) -> tuple[Tensor, ...]:
        op, arguments = self.call_of(backend, *inputs)
        return (op(*arguments),)

    def differentiable(self, inputs: Inputs) -> list[int]:
        return [0, 1, 2]

    def assert_as_defined(self, backend: Backend, inputs: Inputs, views: Inputs | None = None) -> Sequence[Tensor]:
        """Our errors are at most twice those of PyTorch in the same dtype, plus a few roundings; both against fp64."""
        define = lambda *given: (refine(*given),)  # noqa: E731
        truth = results(self, tuple(each.double() for each in inputs), define, inputs[0].dtype)
        eager = results(self, inputs, define)
        ours = results(self, views or inputs, lambda *given: self.run(backend, *given))
        for mine, theirs, true in zip(chain(*ours), chain(*eager), chain(*truth), strict=True):
            assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device)
            if mine.numel() > 0:
                eps = 1e-12 if mine.dtype == torch.float64 else 4 * torch.finfo(mine.dtype).eps
                allowed = 2 * (theirs - true).abs().max() + eps * (1 + true.abs().max())
                assert (mine - true).abs().max() <= allowed
        return ours.grads


SRMS = (
    SrmCase("srm"),
    SrmCase("srm fp32 offsets", lambda h, w: ((h + 7) // 8, (w + 1) // 2), wide=True),
    SrmCase("srm far offsets", lambda h, w: ((h + 1) // 2, w), spread=30),
)
