"""What the suite of test_ops.py runs: every loss with the options that take other paths through its kernels, and every
backend. A new op adds its cases here, one line each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bcmf_ext
from bcmf_ext import BCL, CPG, OHEM, dispatch, ops, reference
from harness import emulator

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 2, 1, 1), (1, 3, 1, 37), (2, 19, 13, 17), (1, 171, 8, 9), (3, 5, 64, 33), (2, 4, 18, 72))


@dataclass(frozen=True)
class Case:
    """A loss: the public function, its definition in the reference, and options.

    weighted: with class weights. logits: their size for labels (H, W).
    """

    name: str
    function: Callable[..., Any]
    definition: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    weighted: bool = False
    logits: Callable[[int, int], tuple[int, int]] = lambda h, w: (h, w)

    def __call__(self, z: Tensor, y: Tensor, w: Tensor, impl: str, **more: Any) -> Tensor:
        weight = {"weight": w} if self.weighted else {}
        return total_of(self.function(z, y, impl=impl, **weight, **{**self.options, **more}))

    def define(self, z: Tensor, y: Tensor, w: Tensor, **more: Any) -> Tensor:
        """By the reference, in the dtype of z."""
        weight = {"weight": w.to(z.dtype) if z.dtype == torch.float64 else w} if self.weighted else {}
        return total_of(self.definition(z, y, **weight, **{**self.options, **more}))

    @property
    def bcl(self) -> BCL | None:
        """BCL's options, where it is part of the loss."""
        if self.function is bcmf_ext.boundary_corrected_loss:
            return BCL(1.0, **{k: v for k, v in self.options.items() if k != "align_corners"})
        return self.options.get("bcl")


def total_of(loss: Any) -> Tensor:
    return loss.total if isinstance(loss, tuple) else loss


def make_case(name: str, **options: Any) -> Case:
    """The case of a public function, which has the same name in the reference."""
    function, *_ = name.split()
    weighted, logits = "weighted" in name, options.pop("logits", Case.logits)
    return Case(name, getattr(bcmf_ext, function), getattr(reference, function), options, weighted, logits)


def quarter(h: int, w: int) -> tuple[int, int]:
    return (h + 3) // 4, (w + 3) // 4


CASES = (
    make_case("cross_entropy"),
    make_case("cross_entropy weighted"),
    make_case("cross_entropy OHEM by threshold", ohem=OHEM(0.2, 3)),
    make_case("cross_entropy weighted OHEM by min_kept", ohem=OHEM(1e-6, 40)),
    make_case("cross_entropy low-resolution", logits=quarter),
    make_case("boundary_corrected_loss steps", step=(1, 2, 5)),
    make_case("boundary_corrected_loss flipped", supervise="flipped", alpha=0.2, beta=0.3, threshold=0.3, nms_size=5),
    make_case("cpg_loss"),
    make_case("cpg_loss 5 centre", kernel_size=5, ignore_mode="centre"),
    make_case("cpg_loss 7", kernel_size=7),
    make_case("segmentation_loss weighted", bcl=BCL(0.7), cpg=CPG(0.6), ohem=OHEM(0.5, 5)),
    make_case(
        "segmentation_loss flipped", bcl=BCL(0.7, 2, "flipped", alpha=0.2, beta=0.3, threshold=0.9), cpg=CPG(0.6)
    ),
    make_case(
        "segmentation_loss flipped low-resolution",
        bcl=BCL(0.7, (1, 2), "flipped", alpha=0.2, beta=0.3, threshold=0.9),
        cpg=CPG(0.6),
        logits=quarter,
        align_corners=True,
    ),
    make_case("segmentation_loss low-resolution", bcl=BCL(0.7, (1, 2)), cpg=CPG(0.6, 5), logits=quarter),
)
# Between them these run every kernel but the gathering of gradients for nearly as many logits as labels (which SIZES
# has): what an interpreted backend, where an operation takes 50 µs, is tested with where values are tested by all.
MIXES = tuple(
    case
    for case in CASES
    if case.name
    in (
        "cross_entropy weighted OHEM by min_kept",
        "segmentation_loss weighted",
        "segmentation_loss flipped low-resolution",
    )
)
SLOWEST = MIXES[-1]  # by far, in an interpreter
WIDE = make_case("segmentation_loss wide", bcl=BCL(0.7), cpg=CPG(0.6))
WIDE_OHEM = make_case("cross_entropy weighted wide", ohem=OHEM(0.01, 6_000))
SIZES = (  # of logits and labels: every ratio, up and down, and single pixels
    ((12, 17), (12, 17)),
    ((12, 17), (24, 34)),
    ((3, 4), (12, 16)),
    ((3, 2), (24, 16)),
    ((2, 3), (32, 48)),
    ((5, 7), (13, 24)),
    ((1, 1), (9, 11)),
    ((1, 5), (6, 5)),
    ((31, 40), (13, 8)),
    ((6, 3), (4, 20)),
    ((5, 4), (1, 8)),
    ((4, 40), (9, 1)),
    ((5, 2), (1, 1)),
)


@dataclass(frozen=True)
class Backend:
    """impl: as a user asks for it. raises: out-of-range labels are a ValueError, otherwise NaN."""

    name: str
    impl: str
    device: str
    raises: bool = False

    @property
    def interpreted(self) -> bool:
        """Whether it is tested with MIXES only, where that is enough."""
        return self.impl == "triton" and self.device == "cpu"

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
            monkeypatch.setitem(ops.LOSS, "cuda", emulator.LOSS)
            for name in ("UPSAMPLE_ARGMAX", "POOL_NORM_RELU", "ADD_NORM_RELU"):
                monkeypatch.setitem(getattr(ops, name), "cuda", getattr(emulator, name))
            monkeypatch.setitem(dispatch.ORDER, "cpu", ("cuda", "torch"))
            monkeypatch.setattr(dispatch, "_NO_CUDA", None)


TRITON_DEVICE = "cpu" if dispatch.INTERPRETED else "cuda"
KERNELS = (
    Backend("cpu", "cpu", "cpu", raises=True),
    Backend("emulated", "cuda", "cpu"),  # the CUDA kernels, on the CPU
    Backend("triton", "triton", TRITON_DEVICE),
    Backend("cuda", "cuda", "cuda"),
)
BACKENDS = (*KERNELS, Backend("torch", "torch", "cpu", raises=True))


def problem(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    ignore_index: int = 255,
    logits: Callable[[int, int], tuple[int, int]] = Case.logits,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and labels for labels of this shape (N, C, H, W), a tenth of which is ignored, and class weights."""
    n, c, h, w = shape
    g = torch.Generator().manual_seed(0)
    z = (3 * torch.randn((n, c, *logits(h, w)), generator=g, dtype=torch.float64)).to(dtype)
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
    aligned = z.new_full((n, c, h, w // 8 * 8 + 8), math.nan)
    aligned[..., :w] = z
    return {
        "nchw": z,
        "channels_last": z.contiguous(memory_format=torch.channels_last),
        "slice": big[:, 2:-1, 1:-1, 1::2],
        "rows cut": big[:, 2:-1, 1:-1, 1::2].contiguous()[..., :w],
        "cut from aligned rows": aligned[..., :w],
        "transposed": z.transpose(2, 3).contiguous().transpose(2, 3),
    }


def assert_not_less_exact(
    case: Case, backend: Backend, z: Tensor, y: Tensor, w: Tensor, view: Tensor | None = None, **options: Any
) -> None:
    """The tolerance rule: our error is at most that of the eager definition in the same dtype, plus a few roundings of
    the dtype the result has; both against the definition in fp64. view: the same logits in another layout."""
    view = z if view is None else view
    with same_selection(case, backend, view, y, w, options):
        truth, truth_grad = value_and_grad(lambda z: case.define(z, y, w, **options), z.double(), 3.0)
        eager, eager_grad = value_and_grad(lambda z: case.define(z, y, w, **options), z, 3.0)
        scale = magnitude(lambda z: case.define(z, y, w, **options), z.double(), y.numel(), 3.0)
    ours, grad = value_and_grad(lambda z: case(z, y, w, backend.impl, **options), view, 3.0)
    acc = torch.float64 if z.dtype == torch.float64 else torch.float32
    assert (ours.dtype, ours.shape, ours.device) == (acc, (), z.device)
    assert grad.dtype == z.dtype
    assert grad.stride() == torch.empty_like(view).stride() or backend.impl == "torch"
    # In fp64 eager is the truth itself, and the order of summation is all that differs.
    double = z.dtype == torch.float64
    value_eps = 1e-12 if double else 4 * torch.finfo(torch.float32).eps
    # Half precision is rounded once, to nearest: half a unit; fp32 sums have roundings of their own.
    grad_eps = {torch.float64: 1e-12, torch.float32: 2 * torch.finfo(torch.float32).eps}.get(
        z.dtype, 0.5 * torch.finfo(z.dtype).eps
    )
    # Resampled logits are rounded at their own size, which moves the loss along its gradient.
    finite = z.double().masked_fill(~z.isfinite(), 0).abs()
    shift = 2 * torch.finfo(acc).eps * float(finite.max()) if z.shape[2:] != y.shape[1:] and z.numel() else 0.0
    # + 1: a pixel's Σ exp is at least 1, and its rounding is all that a small loss has of error.
    slack = value_eps * (truth.abs() + 1) + shift * truth_grad.abs().sum()
    assert (ours - truth).abs() <= (eager - truth).abs() + slack
    if grad.numel() > 0:
        grad_slack = grad_eps * truth_grad.abs().max() + torch.finfo(z.dtype).smallest_normal
        grad_slack += (4 * torch.finfo(acc).eps + shift) * scale
        assert (grad - truth_grad).abs().max() <= (eager_grad - truth_grad).abs().max() + grad_slack


def magnitude(loss: Callable[[Tensor], Tensor], z: Tensor, pixels: int, upstream: float) -> float:
    """What a logit's gradient is a small difference of: where all pixels are easy, p − onehot is rounded at the size of
    1, which is more than there is left. The largest Σ_c |∂L/∂log p| of a pixel, times the pixels that share a logit."""
    log_softmax, seen = reference._log_softmax, []

    def remember(*arguments: Tensor) -> Tensor:
        seen.append(log_softmax(*arguments))
        seen[-1].retain_grad()
        return seen[-1]

    with mock.patch.multiple(reference, _log_softmax=remember, _cpg_sparse=reference._cpg):
        (upstream * loss(z.detach().requires_grad_())).backward()
    sums = [log_p.grad.abs().sum(1) for log_p in seen if log_p.grad is not None]
    shared = 4 * math.ceil(pixels * z.shape[1] / z.numel()) if z.numel() != pixels * z.shape[1] else 1
    return shared * sum(float(s.max()) for s in sums if s.numel())


# --------------------------------------------------------------------------------------------------------------------
# BCL selects pixels: two backends may differ where scores are almost equal, and nowhere else


class Recorder:
    """Stands in for an op and keeps the arguments and the results of its last call."""

    def __init__(self, op: Any) -> None:
        self.op = op

    def __call__(self, *arguments: Any) -> Any:
        self.arguments, self.results = arguments, self.op(*arguments)
        return self.results


def record(case: Case, backend: Backend, z: Tensor, y: Tensor, w: Tensor, **options: Any) -> Recorder:
    """The op behind a public call, with its arguments and results."""
    recorder = Recorder(ops.LOSS[backend.impl])
    with mock.patch.dict(ops.LOSS, {backend.impl: recorder}):
        case(z, y, w, backend.impl, **options)
    return recorder


@contextmanager
def same_selection(
    case: Case, backend: Backend, z: Tensor, y: Tensor, w: Tensor, options: Mapping[str, Any]
) -> Iterator[None]:
    """Lets the definition take the backend's S, after it was compared with its own."""
    if case.bcl is None or backend.impl == "torch":
        yield
        return
    *_, selected, _ = record(case, backend, z, y, w, **options).results
    scores: list[tuple[Tensor, Tensor]] = []

    def remember(q: Tensor, valid3: Tensor, bcl: BCL) -> Tensor:
        scores.append((q, valid3))
        return select(q, valid3, bcl)

    select = reference.bcl_select
    with mock.patch.object(reference, "bcl_select", remember):
        case.define(z.double(), y, w, **options)
    for step, (q, valid3) in enumerate(scores):
        ours, theirs = selected >> step & 1 == 1, select(q, valid3, case.bcl)
        assert not ((ours != theirs) & ~ambiguous(q, valid3, case.bcl)).any()
        # Where scores are almost equal they may keep the one or the other, but have to keep one of them.
        for one, other in ((ours, theirs), (theirs, ours)):
            assert not (one & ~near(other, case.bcl) & ~near_threshold(q, case.bcl)).any()
    masks = itertools.cycle([selected >> step & 1 == 1 for step in range(len(scores))])
    with mock.patch.object(reference, "bcl_select", side_effect=masks):
        yield


def ambiguous(q: Tensor, valid3: Tensor, bcl: BCL) -> Tensor:
    """Pixels whose score is within 1e-4, relative, of the threshold or of the largest of their neighbourhood: rounding
    may move them in or out of S (spec section 3); near 0 it is absolute, of Σ exp at 1. bool (N, H, W)."""
    if q.numel() == 0:
        return valid3
    q = torch.where(valid3, q, 0.0)
    radius = bcl.nms_size // 2
    windows = F.unfold(F.pad(q.unsqueeze(1), [radius] * 4), bcl.nms_size).view(len(q), -1, *q.shape[1:])
    windows[:, bcl.nms_size**2 // 2] = 0
    largest = windows.amax(1)
    return ((q - largest).abs() <= 1e-4 * q.abs() + 1e-6) | near_threshold(q, bcl)


def near_threshold(q: Tensor, bcl: BCL) -> Tensor:
    return (q + math.log(bcl.threshold)).abs() <= 1e-4 * q.abs() + 1e-6


def near(selected: Tensor, bcl: BCL) -> Tensor:
    """Pixels with a selected one within three neighbourhoods: almost equal scores may pass the choice on."""
    reach = 3 * (bcl.nms_size // 2)
    if selected.numel() == 0:
        return selected
    return F.max_pool2d(selected.unsqueeze(1).float(), 2 * reach + 1, 1, reach).squeeze(1) > 0
