"""The losses' cases: each public function with the options that take other paths through the kernels of bcmf::loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

import bcmf_ext
from bcmf_ext import BCL, CPG, OHEM, ops, reference
from harness.backends import BACKENDS, Backend
from harness.cases.pattern import Case, Inputs, backward_of


def same(h: int, w: int) -> tuple[int, int]:
    return h, w


def quarter(h: int, w: int) -> tuple[int, int]:
    return (h + 3) // 4, (w + 3) // 4


@dataclass(frozen=True)
class LossCase(Case):
    """A loss: the public function, its definition in the reference, and options. Its inputs are logits (N, C, h, w),
    labels (N, H, W) and class weights (C,).

    weighted: whether it takes the class weights. logits: the size of the logits for labels (H, W).
    """

    function: Callable[..., Any] = bcmf_ext.segmentation_loss
    definition: Callable[..., Any] = reference.segmentation_loss
    options: Mapping[str, Any] = field(default_factory=dict)
    weighted: bool = False
    logits: Callable[[int, int], tuple[int, int]] = same

    backends: ClassVar[Sequence[Backend]] = BACKENDS
    shapes: ClassVar[Sequence[tuple[int, ...]]] = (
        (1, 2, 1, 1),
        (1, 3, 1, 37),
        (2, 19, 13, 17),
        (1, 171, 8, 9),
        (3, 5, 64, 33),
        (2, 4, 18, 72),
    )

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

    @property
    def smallest(self) -> tuple[int, ...]:  # a quarter of each side has two logits
        return (1, 3, 3, 4) if self.logits is same else (1, 3, 5, 8)

    def inputs(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, device: str = "cpu") -> Inputs:
        return problem(shape, dtype, device, logits=self.logits)

    def run(self, backend: Backend, *inputs: Any) -> tuple[Tensor, ...]:
        return (self(*inputs, backend.impl),)

    def call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        recorder = record(self, backend, *inputs)
        return recorder.op, recorder.arguments

    def backward_call_of(self, backend: Backend, *inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        recorder = record(self, backend, *inputs)
        total, _, *kept = (result.detach() for result in recorder.results)
        z, y, w, *options = recorder.arguments
        return backward_of(recorder.op), (torch.ones_like(total), z.detach(), y, w, *kept, *options)

    def differentiable(self, inputs: Inputs) -> list[int]:
        return [0]

    def assert_as_defined(self, backend: Backend, inputs: Inputs, views: Inputs | None = None) -> Sequence[Tensor]:
        """The tolerance rule: see `assert_not_less_exact`."""
        z, _, w = inputs
        view, y, _ = views or inputs
        return [assert_not_less_exact(self, backend, z, y, w, view)]


def total_of(loss: Any) -> Tensor:
    return loss.total if isinstance(loss, tuple) else loss


def make_case(name: str, **options: Any) -> LossCase:
    """The case of a public function, which has the same name in the reference."""
    function, *_ = name.split()
    weighted, logits = "weighted" in name, options.pop("logits", same)
    return LossCase(name, getattr(bcmf_ext, function), getattr(reference, function), options, weighted, logits)


LOSSES = (
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
    make_case(
        "segmentation_loss weighted OHEM low-resolution",
        bcl=BCL(0.7),
        cpg=CPG(0.6),
        ohem=OHEM(1e-6, 40),
        logits=quarter,
    ),
    make_case("segmentation_loss low-resolution", bcl=BCL(0.7, (1, 2)), cpg=CPG(0.6, 5), logits=quarter),
)
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


def problem(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    ignore_index: int = 255,
    logits: Callable[[int, int], tuple[int, int]] = same,
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


def assert_not_less_exact(
    case: LossCase, backend: Backend, z: Tensor, y: Tensor, w: Tensor, view: Tensor | None = None, **options: Any
) -> Tensor:
    """The tolerance rule: our error is at most that of the eager definition in the same dtype, plus a few roundings of
    the dtype the result has; both against the definition in fp64. view: the same logits in another layout.

    Returns our gradient."""
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
    return grad


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


def record(case: LossCase, backend: Backend, z: Tensor, y: Tensor, w: Tensor, **options: Any) -> Recorder:
    """The op behind a public call, with its arguments and results."""
    recorder = Recorder(ops.LOSS[backend.impl])
    with mock.patch.dict(ops.LOSS, {backend.impl: recorder}):
        case(z, y, w, backend.impl, **options)
    return recorder


@contextmanager
def same_selection(
    case: LossCase, backend: Backend, z: Tensor, y: Tensor, w: Tensor, options: Mapping[str, Any]
) -> Iterator[None]:
    """Lets the definition take the backend's S, after it was compared with its own."""
    if case.bcl is None or backend.impl == "torch":
        yield
        return
    *_, selected, _, _ = record(case, backend, z, y, w, **options).results
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
    may move them in or out of S (docs/definitions.md, Boundary Corrected Loss); near 0 it is absolute, of Σ exp at 1.
    bool (N, H, W)."""
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
