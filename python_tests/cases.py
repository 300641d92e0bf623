"""What the suite of test_ops.py runs: every loss with the options that take other paths through its kernels, and every
backend. A new op adds its cases here, one line each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import emulator
import pytest
import torch
from torch import Tensor

import bcmf_ext
from bcmf_ext import OHEM, dispatch, ops, reference

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 2, 1, 1), (1, 3, 1, 37), (2, 19, 13, 17), (1, 171, 8, 9), (3, 5, 64, 33))


@dataclass(frozen=True)
class Case:
    """A loss: the public function, its definition in the reference, and options. weighted: with class weights."""

    name: str
    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    options: Mapping[str, Any] = field(default_factory=dict)
    weighted: bool = False

    def __call__(self, z: Tensor, y: Tensor, w: Tensor, impl: str, **more: Any) -> Tensor:
        weight = {"weight": w} if self.weighted else {}
        return self.function(z, y, impl=impl, **weight, **{**self.options, **more})

    def define(self, z: Tensor, y: Tensor, w: Tensor, **more: Any) -> Tensor:
        """By the reference, in the dtype of z."""
        weight = {"weight": w.to(z.dtype) if z.dtype == torch.float64 else w} if self.weighted else {}
        return self.definition(z, y, **weight, **{**self.options, **more})


CASES = (
    Case("cross_entropy", bcmf_ext.cross_entropy, reference.cross_entropy),
    Case("cross_entropy weighted", bcmf_ext.cross_entropy, reference.cross_entropy, weighted=True),
    Case("ohem by threshold", bcmf_ext.cross_entropy, reference.cross_entropy, {"ohem": OHEM(0.2, 3)}),
    Case("ohem by min_kept", bcmf_ext.cross_entropy, reference.cross_entropy, {"ohem": OHEM(1e-6, 40)}, weighted=True),
)


@dataclass(frozen=True)
class Backend:
    """impl: as a user asks for it. raises: out-of-range labels are a ValueError, otherwise NaN."""

    name: str
    impl: str
    device: str
    raises: bool = False

    def why_not(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.name == "emulated":
            return emulator.why_not()
        return dispatch.why_not(self.impl, self.device)

    def load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.name == "emulated":
            emulator.load()
            monkeypatch.setitem(ops.LOSS, "cpu", emulator.LOSS)
            monkeypatch.setattr(dispatch, "_NO_EXTENSION", None)


TRITON_DEVICE = "cpu" if dispatch.INTERPRETED else "cuda"
KERNELS = (
    Backend("cpu", "cpu", "cpu", raises=True),
    Backend("emulated", "cpu", "cpu"),  # the CUDA kernels, on the CPU
    Backend("triton", "triton", TRITON_DEVICE),
    Backend("cuda", "cuda", "cuda"),
)
BACKENDS = (*KERNELS, Backend("torch", "torch", "cpu", raises=True))


def problem(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu", ignore_index: int = 255
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with a tenth of the pixels ignored, and class weights."""
    n, c, h, w = shape
    g = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    y = torch.randint(0, c, (n, h, w), generator=g)
    y[torch.rand(n, h, w, generator=g) < 0.1] = ignore_index
    return z.to(device), y.to(device), (0.1 + torch.rand(c, generator=g)).to(device)


def value_and_grad(loss: Callable[[Tensor], Tensor], z: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z)
    (grad,) = torch.autograd.grad(upstream * value, z)
    return value.detach(), grad


def layouts(z: Tensor) -> dict[str, Tensor]:
    """The same logits as NCHW, channels_last, a strided slice, a view with an offset, and transposed storage."""
    n, c, h, w = z.shape
    big = z.new_full((n, c + 3, h + 2, 2 * w + 1), math.nan)
    big[:, 2:-1, 1:-1, 1::2] = z
    return {
        "nchw": z,
        "channels_last": z.contiguous(memory_format=torch.channels_last),
        "slice": big[:, 2:-1, 1:-1, 1::2],
        "rows cut": big[:, 2:-1, 1:-1, 1::2].contiguous()[..., :w],
        "transposed": z.transpose(2, 3).contiguous().transpose(2, 3),
    }


def assert_not_less_exact(
    case: Case, backend: Backend, z: Tensor, y: Tensor, w: Tensor, view: Tensor | None = None, **options: Any
) -> None:
    """The tolerance rule: our error is at most that of the eager definition in the same dtype, plus a few roundings of
    the dtype the result has; both against the definition in fp64. view: the same logits in another layout."""
    truth, truth_grad = value_and_grad(lambda z: case.define(z, y, w, **options), z.double(), 3.0)
    eager, eager_grad = value_and_grad(lambda z: case.define(z, y, w, **options), z, 3.0)
    view = z if view is None else view
    ours, grad = value_and_grad(lambda z: case(z, y, w, backend.impl, **options), view, 3.0)
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    assert (ours.dtype, ours.shape, ours.device) == (acc, (), z.device)
    assert grad.dtype == z.dtype
    assert grad.stride() == torch.empty_like(view).stride() or backend.impl == "torch"
    # In fp64 eager is the truth itself, and the order of summation is all that differs.
    double = z.dtype == torch.float64
    value_eps = 1e-12 if double else 4 * torch.finfo(torch.float32).eps
    grad_eps = 1e-12 if double else 2 * torch.finfo(z.dtype).eps
    # + 1: a pixel's Σ exp is at least 1, and its rounding is all that a small loss has of error.
    assert (ours - truth).abs() <= (eager - truth).abs() + value_eps * (truth.abs() + 1)
    if grad.numel() > 0:
        grad_slack = grad_eps * truth_grad.abs().max() + torch.finfo(z.dtype).smallest_normal
        grad_slack += 4 * torch.finfo(acc).eps * largest_coefficient(case, y, w, truth_grad, 3.0)
        assert (grad - truth_grad).abs().max() <= (eager_grad - truth_grad).abs().max() + grad_slack


def largest_coefficient(case: Case, y: Tensor, w: Tensor, truth_grad: Tensor, upstream: float) -> float:
    """The largest derivative of the loss by a pixel's ℓ. A gradient is that times p − onehot, and so rounded at the
    size of p, however small the difference: where all pixels are easy, the rounding is larger than the gradient."""
    counted = (truth_grad != 0).any(1)
    if not counted.any():
        return 0.0
    weights = w[y[counted].long()] if case.weighted else torch.ones(int(counted.sum()))
    return float(upstream * weights.max() / min(weights.sum(), len(weights)))
