"""bcmf::loss on every backend: what it promises beyond the suite of test_ops.py, which all ops pass."""

from __future__ import annotations

import math
import shutil
import time
from typing import Any

import pytest
import torch
from harness import emulator
from harness.backends import BACKENDS, KERNELS, Backend, every_backend, every_kernel, on
from harness.cases.losses import (
    LOSSES,
    SIZES,
    LossCase,
    assert_not_less_exact,
    make_case,
    problem,
    record,
    value_and_grad,
)
from harness.cases.pattern import backward_of, runs
from torch import Tensor

import bcmf_ext
from bcmf_ext import BCL, CPG, OHEM, ops
from bcmf_ext.ops import Sum, Summary
from bcmf_ext.options import LossOptions

GPU = tuple(backend for backend in KERNELS if backend.device == "cuda")
EMULATED = tuple(backend for backend in KERNELS if backend.name == "emulated")
WIDE = (
    make_case("segmentation_loss wide", bcl=BCL(0.7), cpg=CPG(0.6)),
    make_case("cross_entropy weighted wide", ohem=OHEM(0.01, 6_000)),
)

# --------------------------------------------------------------------------------------------------------------------
# Values and gradients


@runs(LOSSES, KERNELS)
def test_expanded_logits_get_a_dense_gradient(backend: Backend, case: LossCase) -> None:
    """Protects from writes through stride 0."""
    z, y, w = problem((1, 5, 8, 8), torch.float64, backend.device, logits=case.logits)
    y = y.expand(3, 8, 8)
    expanded = z.expand(3, -1, -1, -1).detach().requires_grad_()
    (grad,) = torch.autograd.grad(case(expanded, y, w, backend.impl), expanded)
    _, expected = value_and_grad(lambda z: case.define(z, y, w), z.repeat(3, 1, 1, 1))
    assert grad.is_contiguous()
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-14)


@every_backend
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("size", "label_size"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_any_size_of_logits(
    backend: Backend, align_corners: bool, size: tuple[int, int], label_size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Protects resampling, up and down, by whole and other ratios: value and gradient of all terms as of
    F.interpolate's logits."""
    options: dict[str, Any] = {"align_corners": align_corners, "logits": lambda *_: size}
    case = make_case("segmentation_loss", bcl=BCL(0.7, (1, 2)), cpg=CPG(0.6, 5), **options)
    z, y, w = problem((2, 4, *label_size), dtype, backend.device, logits=case.logits)
    y = y[:, ::3, ::3].repeat_interleave(3, 1).repeat_interleave(3, 2)[:, : label_size[0], : label_size[1]]  # areas
    for view in (z, z.contiguous(memory_format=torch.channels_last)):
        assert_not_less_exact(case, backend, z, y, w, view)


@every_backend
def test_terms(backend: Backend) -> None:
    """Protects the logged terms: detached, unweighted, those of the definition; None where not asked for."""
    z, y, w = problem((2, 4, 24, 17), torch.float64, backend.device)
    options: dict[str, Any] = {"weight": w.double(), "bcl": BCL(0.7), "cpg": CPG(0.6)}
    ours = bcmf_ext.segmentation_loss(z.requires_grad_(), y, impl=backend.impl, **options)
    theirs = bcmf_ext.reference.segmentation_loss(z, y, **options)
    for name in ours._fields:
        assert (getattr(ours, name) is None) == (getattr(theirs, name) is None)
        if getattr(ours, name) is not None:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-12, atol=0)
            assert getattr(ours, name).requires_grad == (name == "total")


@runs(LOSSES, BACKENDS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [255, -1, -100, 1])
def test_label_dtypes_and_ignore_index(backend: Backend, case: LossCase, dtype: torch.dtype, ignore_index: int) -> None:
    """Protects the widening of labels before any comparison: uint8 with a negative ignore_index ignores nothing."""
    z, y, w = problem((2, 4, 9, 7), torch.float64, backend.device, ignore_index, logits=case.logits)
    if dtype == torch.uint8 and ignore_index < 0:
        y = torch.where(y < 0, 2, y)
    assert_not_less_exact(case, backend, z, y.to(dtype), w, ignore_index=ignore_index)


@runs(LOSSES, BACKENDS)
@pytest.mark.parametrize("empty", ["all ignored", "no image", "no pixel", "zero weights"])
def test_nothing_to_average(backend: Backend, case: LossCase, empty: str) -> None:
    """Protects from NaN on empty crops: 0 with an all-zero gradient, even where the logits are inf or NaN."""
    n, h = (0 if empty == "no image" else 2), (0 if empty == "no pixel" else 4)
    z = torch.full((n, 3, *case.logits(h, 5)), math.inf if empty == "all ignored" else 1.0, device=backend.device)
    y = torch.full((n, h, 5), 0 if empty == "zero weights" else 255, device=backend.device)
    w = torch.full((3,), 0.0 if empty == "zero weights" else 1.0, device=backend.device)
    if empty == "zero weights" and (not case.weighted or "bcl" in case.options):
        pytest.skip("without class weights, or beside terms that they do not act on")
    value, grad = value_and_grad(lambda z: case(z, y, w, backend.impl), z)
    assert value.item() == 0
    assert torch.equal(grad, torch.zeros_like(z))


@runs(LOSSES, BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(backend: Backend, case: LossCase, dtype: torch.dtype) -> None:
    """Protects the tails: ±1e4, and −inf in another class, as the definition in fp64; an ignored pixel's NaN is
    nobody's."""
    z = torch.tensor([[1e4, -1e4, 0], [1e4, 1e4, -1e4], [-math.inf, 3, 4], [math.nan, math.inf, 0], [1e4, 9991, -1e4]])
    z = z.T.reshape(1, 3, 1, 5).to(backend.device, dtype)
    y = torch.tensor([[[0, 1, 2, 255, 0]]], device=backend.device)
    w = torch.tensor([1.0, 2.0, 3.0], device=backend.device)
    value, grad = value_and_grad(lambda z: case(z, y, w, backend.impl), z)
    truth, truth_grad = value_and_grad(lambda z: case.define(z, y, w), z.double())
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(grad.double(), truth_grad, rtol=1e-5, atol=torch.finfo(dtype).eps, equal_nan=True)
    assert (grad[0, :, 0, 3] == 0).all() or case.options.get("ignore_mode") == "centre"


@every_backend
def test_small_losses_keep_their_digits(backend: Backend) -> None:
    """Protects (m − z) + log Σ: lse − z would round the loss of an easy pixel away at large logits."""
    z = torch.tensor([1e4, 9991.0, -1e4], device=backend.device).view(1, 3, 1, 1)
    y = torch.zeros(1, 1, 1, dtype=torch.long, device=backend.device)
    loss = bcmf_ext.cross_entropy(z, y, impl=backend.impl)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-9)), rel=1e-3)


@runs(LOSSES, BACKENDS)
@pytest.mark.parametrize("logit", [math.nan, -math.nan, math.inf])
def test_a_nan_logit_shows(backend: Backend, case: LossCase, logit: float) -> None:
    """Protects from training on: NaN or +inf at a valid pixel makes the loss NaN as in eager, whatever is selected."""
    z, y, w = problem((2, 4, 9, 7), torch.float32, backend.device, logits=case.logits)
    y[1, :4, :4] = 2
    y[1, 0, 1] = 1  # an edge, for CPG
    z[1, 0, 0, 0] = logit
    assert case(z, y, w, backend.impl).isnan()
    assert case.define(z, y, w).isnan()


@runs(LOSSES, BACKENDS)
@pytest.mark.parametrize("label", [-1, 4, 33, 255, 100_000, 2**32 + 1, 2**32 - 100])
def test_out_of_range_labels(backend: Backend, case: LossCase, label: int) -> None:
    """Protects users from a loss over garbage: a ValueError that names it where looking is free, elsewhere NaN in the
    loss and in that pixel's gradient, and nothing is read out of bounds."""
    z, y, w = problem((2, 4, 9, 7), torch.float32, backend.device, ignore_index=-100, logits=case.logits)
    y[1, 3, 3] = label
    if backend.raises:
        with pytest.raises(ValueError, match=f"target holds {label}, but"):
            case(z, y, w, backend.impl, ignore_index=-100)
        return
    value, grad = value_and_grad(lambda z: case(z, y, w, backend.impl, ignore_index=-100), z)
    assert value.isnan()
    assert grad[1].isnan().any()
    assert grad.shape[2:] != y.shape[1:] or grad[1, :, 3, 3].isnan().all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ohem_at_ties(backend: Backend, dtype: torch.dtype) -> None:
    """Protects OHEM's selection, which forward and backward each make: all ties at the last place are kept, in the
    value and in the gradient; the threshold is strict; min_kept is capped at the number of valid pixels; 0 keeps the
    hard ones only."""
    p = torch.tensor([0.1, 0.2, 0.2, 0.4, 0.5, 0.5], dtype=torch.float64, device=backend.device)
    z = torch.stack([1 - p, p]).log().view(1, 2, 1, 6).to(dtype)
    y = torch.zeros(1, 1, 6, dtype=torch.long, device=backend.device)
    nll = -(1 - p).log()
    tolerance = {"rtol": 1e-12 if dtype == torch.float64 else 1e-6, "atol": 0.0, "check_dtype": False}

    def assert_kept(count: int, threshold: float, min_kept: int) -> None:
        """The last pixels, which have the largest losses, are kept: the loss is their mean, and no other pixel has a
        gradient."""
        ohem = OHEM(threshold, min_kept)
        value, grad = value_and_grad(lambda z: bcmf_ext.cross_entropy(z, y, ohem=ohem, impl=backend.impl), z)
        expected, pulls = torch.zeros_like(nll[0]), torch.zeros_like(p)
        if count > 0:
            expected, pulls[-count:] = nll[-count:].mean(), p[-count:] / count
        torch.testing.assert_close(value, expected, **tolerance)
        torch.testing.assert_close(grad[0, :, 0], torch.stack([-pulls, pulls]), **tolerance)

    assert_kept(0, 0.5, 0)  # ℓ = −ln θ exactly
    assert_kept(2, 0.5, 1)
    assert_kept(3, 0.5, 3)
    assert_kept(5, 0.5, 4)
    assert_kept(5, 0.5, 5)
    assert_kept(6, 0.5, 6)
    assert_kept(6, 0.5, 1000)
    assert_kept(3, 0.7, 0)
    assert_kept(3, 0.7, 3)
    assert_kept(6, 1.0, 0)


@every_kernel
@pytest.mark.parametrize("ohem", [None, OHEM(0.01, 400_000)], ids=["mean", "k-th largest"])
def test_many_tiles(backend: Backend, ohem: OHEM | None) -> None:
    """Protects the second stage of reductions, and of the selection, which starts only with hundreds of tiles."""
    case = make_case("cross_entropy weighted", ohem=ohem)
    assert_not_less_exact(case, backend, *problem((1, 2, 740, 740), torch.float32, backend.device))


@runs(WIDE, KERNELS)
@pytest.mark.parametrize("size", [(12, 1450), (5, 40), (6, 2900)], ids=str)
def test_rows_wider_than_a_tile(backend: Backend, case: LossCase, size: tuple[int, int]) -> None:
    """Protects the seams where a row of labels is cut, and all that is kept from one piece to the next."""
    z, y, w = problem((1, 3, 12, 1450), torch.float32, backend.device, logits=lambda *_: size)
    y = y[:, ::3, ::5].repeat_interleave(3, 1).repeat_interleave(5, 2).contiguous()
    assert_not_less_exact(case, backend, z, y, w)


@runs(LOSSES, BACKENDS)
@pytest.mark.parametrize("scale", [1e4, 1e8, 1e30])
def test_huge_logits(backend: Backend, case: LossCase, scale: float) -> None:
    """Protects differences of resampled logits: rounded in another order, they are far from 0 where logits are huge."""
    z, y, w = problem((2, 5, 20, 24), torch.float32, backend.device, logits=case.logits)
    y = y[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2).contiguous()
    assert_not_less_exact(case, backend, scale * z, y, w)


@every_kernel
def test_strided_class_weights_and_statistics(backend: Backend) -> None:
    """Protects from reading every second entry: weights with a stride, and what the backward gets of the forward."""
    z, y, w = problem((2, 5, 6, 7), torch.float32, backend.device)
    strided = torch.stack([w, torch.full_like(w, math.nan)], 1)[:, 0]
    assert torch.equal(
        bcmf_ext.cross_entropy(z, y, weight=strided, impl=backend.impl),
        bcmf_ext.cross_entropy(z, y, weight=w, impl=backend.impl),
    )
    recorder = record(make_case("cross_entropy weighted"), backend, z, y, w)
    stats, *others = recorder.results[2:]
    backward, options = backward_of(recorder.op), recorder.arguments[3:]
    one = torch.ones((), device=backend.device)
    spread = torch.stack([stats, torch.full_like(stats, math.nan)], -1)[..., 0]
    assert torch.equal(
        backward(one, z, y, w, spread, *others, *options), backward(one, z, y, w, stats, *others, *options)
    )
    recorder = record(make_case("segmentation_loss", bcl=BCL(0.7)), backend, z, y, w)
    stats, selected, marks, summary = recorder.results[2:]
    arguments = recorder.arguments[3:]
    spread = [torch.stack([t, torch.full_like(t, 255)], -1)[..., 0] for t in (selected, marks)]
    assert torch.equal(
        backward(one, z, y, None, stats, *spread, summary, *arguments),
        backward(one, z, y, None, stats, selected, marks, summary, *arguments),
    )


@every_kernel
@pytest.mark.parametrize("classes", [5, 300])
def test_kept_tensors_at_odd_places(backend: Backend, classes: int) -> None:
    """Protects from a crash where somebody hands back what the forward has kept from one large buffer, as offloading
    does: kernels that read several entries at once need them at multiples of their size."""
    z, y, w = problem((2, classes, 6, 8), torch.float32, backend.device)
    recorder = record(make_case("segmentation_loss", bcl=BCL(0.7), cpg=CPG()), backend, z, y, w)
    kept, arguments = recorder.results[2:], recorder.arguments[3:]
    moved = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in kept]
    backward, one = backward_of(recorder.op), torch.ones((), device=backend.device)
    assert torch.equal(backward(one, z, y, None, *moved, *arguments), backward(one, z, y, None, *kept, *arguments))


@every_kernel
@pytest.mark.parametrize(
    ("dtype", "classes"), [(torch.float32, range(20, 27)), (torch.bfloat16, range(42, 52))], ids=["fp32", "bf16"]
)
def test_as_many_classes_as_shared_memory_holds(backend: Backend, dtype: torch.dtype, classes: range) -> None:
    """Protects launches in channels_last around the number of classes that CUDA's blocks have just no room for."""
    for count in classes:
        z, y, _ = problem((1, count, 16, 64), dtype, backend.device)
        z = z.contiguous(memory_format=torch.channels_last)
        bcl = value_and_grad(lambda z, y=y: bcmf_ext.segmentation_loss(z, y, bcl=BCL(), impl=backend.impl).total, z)
        assert bcl[0].isfinite()


@every_kernel
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("classes", "low", "high"), [(40, (8, 8), (33, 33)), (150, (4, 4), (32, 32))], ids=str)
def test_logits_that_only_ignored_pixels_read(
    backend: Backend, classes: int, low: tuple[int, int], high: tuple[int, int], bad: float
) -> None:
    """Protects all other gradients, those of classes too that kernels read at another time than the bad logit's."""
    z, y, _ = problem((1, classes, *high), torch.float32, backend.device, logits=lambda *_: low)
    z[0, 0, -1, -1] = bad
    y[:, high[0] // 2 :, high[1] // 2 :] = 255
    value, grad = value_and_grad(lambda z: bcmf_ext.cross_entropy(z, y, impl=backend.impl), z)
    assert value.isfinite()
    assert grad.isfinite().all()


@every_kernel
@pytest.mark.parametrize(("low", "high"), [((4, 4), (31, 31)), ((12, 6), (95, 48)), ((5, 3), (41, 9))], ids=str)
def test_equal_logits_have_equal_bits(backend: Backend, low: tuple[int, int], high: tuple[int, int]) -> None:
    """Protects ties: rows beyond the centre of the last logits are copies of each other, and so are their statistics.
    BCL would select by rounding errors there."""
    z, y, w = problem((2, 21, *high), torch.float32, backend.device, logits=lambda *_: low)
    *_, stats, _, _, _ = record(make_case("cross_entropy"), backend, z, y, w).results
    copies = high[0] // (2 * low[0])
    assert torch.equal(stats[:, :, -copies:], stats[:, :, -1:].expand(-1, -1, copies, -1))


@every_backend
def test_windows_larger_than_the_image(backend: Backend) -> None:
    """Protects from loops over what is not there: an nms_size beyond the image is that of the image."""
    z, y, _ = problem((1, 4, 6, 9), torch.float32, backend.device)
    losses = [
        value_and_grad(lambda z, size=size: bcmf_ext.boundary_corrected_loss(z, y, nms_size=size, impl=backend.impl), z)
        for size in (19, 2**31 - 1, 2**62 + 1)
    ]
    for value, grad in losses[1:]:
        assert torch.equal(value, losses[0][0])
        assert torch.equal(grad, losses[0][1])


@on(EMULATED)
@pytest.mark.parametrize("size", [9, 41, 151])
def test_windows_larger_than_a_tile(backend: Backend, size: int) -> None:
    """Protects maxima that several tiles, of 64 by 16 pixels in CUDA, decide on together."""
    z, y, _ = problem((1, 3, 37, 150), torch.float64, backend.device)
    (value, grad), (expected, expected_grad) = (
        value_and_grad(lambda z, impl=impl: bcmf_ext.boundary_corrected_loss(z, y, nms_size=size, impl=impl), z)
        for impl in (backend.impl, "torch")
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-14)


@on(EMULATED)
def test_a_gpu_with_little_shared_memory(backend: Backend) -> None:
    """Protects a T4 (64 KiB a block) from launches that fail: whatever has room there runs, and where CPG's gradient in
    fp64 has none, a sentence says so and what to do."""
    classes = 16  # channels_last logits of so many lie in shared memory, but in fp32 not on a T4
    y = problem((1, classes, 33, 41), torch.float32, backend.device)[1]

    def gradient(dtype: torch.dtype, cpg: int, low: bool) -> Tensor:
        z, _, _ = problem((1, classes, *((9, 11) if low else (33, 41))), dtype, backend.device)
        z = z.contiguous(memory_format=torch.channels_last).detach().requires_grad_()
        bcmf_ext.segmentation_loss(z, y, bcl=BCL(), cpg=CPG(kernel_size=cpg), impl=backend.impl).total.backward()
        assert z.grad is not None
        return z.grad

    runs = [(dtype, cpg, low) for dtype in (torch.bfloat16, torch.float32) for cpg in (3, 7) for low in (False, True)]
    runs += [(torch.float64, 3, False), (torch.float64, 3, True)]
    expected = [gradient(*run) for run in runs]
    try:
        emulator.set_shared_memory(64)
        for run, grad in zip(runs, expected, strict=True):
            torch.testing.assert_close(gradient(*run), grad)
        for cpg, low in ((5, False), (5, True), (7, False), (7, True)):
            with pytest.raises(
                ValueError, match=f"kernel_size={cpg} for fp64 logits takes more shared memory than this"
            ):
                gradient(torch.float64, cpg, low)
    finally:
        emulator.set_shared_memory(99)


@every_kernel
def test_no_pixel_of_long_sides(backend: Backend) -> None:
    """Protects from work that no pixel asked for: without one, neither sides nor options of any size take time or
    memory."""
    began = time.monotonic()
    z = torch.zeros(4, 2, 1, 1, device=backend.device, requires_grad=True)
    y = torch.zeros(4, 2**25, 0, dtype=torch.uint8, device=backend.device)
    for labels in (y, y.transpose(1, 2)):
        loss = bcmf_ext.segmentation_loss(z, labels, bcl=BCL(0.1, 2**20), cpg=CPG(), impl=backend.impl).total
        assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))
    size = 2**28, 0
    assert ops.UPSAMPLE_ARGMAX[backend.impl](z.detach(), *size, False).shape == (4, *size)
    assert time.monotonic() - began < (30 if backend.interpreted else 3)


# --------------------------------------------------------------------------------------------------------------------
# A well-behaved op


@every_kernel
def test_compile_with_inductor(backend: Backend) -> None:
    """Protects torch.compile as users call it: code is generated around the op, whose gradient comes channels_last."""
    if backend.device == "cpu" and shutil.which("c++") is None:
        pytest.skip("inductor needs a C++ compiler")
    z, y, w = problem((2, 5, 6, 7), torch.float32, backend.device)
    z = z.contiguous(memory_format=torch.channels_last)

    def loss(z: Tensor) -> Tensor:
        return bcmf_ext.segmentation_loss(2 * z, y, weight=w, ohem=0.7, impl=backend.impl).total

    torch.compiler.reset()
    for ours, expected in zip(
        value_and_grad(torch.compile(loss, fullgraph=True), z), value_and_grad(loss, z), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-8)


def test_options_are_those_of_the_schema() -> None:
    """Protects the order in which LossOptions are handed to the op."""
    names = [argument.name for argument in torch.ops.bcmf.loss.default._schema.arguments]
    assert names == ["logits", "target", "weight", *LossOptions._fields]


@every_kernel
def test_direct_calls_are_memory_safe(backend: Backend) -> None:
    """Protects torch.ops from arguments that would be read out of bounds."""
    z, y, w = problem((2, 5, 6, 7), torch.float32, backend.device)
    op = ops.LOSS[backend.impl]
    options = LossOptions(255, bcl_steps=[1])
    _, _, *kept = op(z, y, w, *options)
    one = torch.ones((), device=backend.device)
    wrong = [(z, y[:1], w), (z, y, w[:3]), (z[0], y, None), (z[:, :, :0], y, w)]
    for arguments in wrong:
        with pytest.raises(ValueError, match=r"shape|size|classes"):
            op(*arguments, *options)
    for i, part in enumerate([(slice(None), slice(1)), (slice(None), slice(2)), slice(1), slice(5)]):
        if kept[i].numel() == 0:  # marks, which the kernels of CPUs do not make
            continue
        with pytest.raises(ValueError, match=r"as bcmf::loss(_triton)? returned them"):
            backward_of(op)(one, z, y, w, *kept[:i], kept[i][part], *kept[i + 1 :], *options)
    with pytest.raises(ValueError, match=f"a side of {2**30} is too long"):  # sides are counted in 32 bits
        op(z[:1], y[:1, :1, :1].expand(1, 1, 2**30), None, *options)
    with pytest.raises((TypeError, ValueError), match="class ids"):
        op(z, y.float(), w, *options)
    for bad in ({"ohem_threshold": 0.0}, {"bcl_steps": [0]}, {"bcl_steps": [1] * 9}, {"cpg_kernel_size": 4}):
        with pytest.raises(ValueError, match=r"threshold|BCL's step is|1 to 8 steps|kernel_size"):
            op(z, y, w, *options._replace(**bad))
    bad = torch.full_like(y, 99)
    if backend.impl != "cpu":  # The kernels of GPUs do not read the labels again.
        _, _, *kept = op(z, bad, w, *options)
    grad = backward_of(op)(one, z, bad, w, *kept, *options)
    assert grad.isnan().all()


@runs(LOSSES, KERNELS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_the_backward_believes_nothing(backend: Backend, case: LossCase, dtype: torch.dtype) -> None:
    """Protects memory that is not the op's: labels that a loader has refilled since the forward, statistics and
    selections that anybody may have written, give some gradient of the right form. (What is done out of bounds shows
    under AddressSanitizer, in test_hostile.py.)"""
    z, y, w = problem((2, 5, 9, 11), torch.float32, backend.device, logits=case.logits)
    recorder = record(case, backend, z, y.to(dtype), w)
    _, labels, weight, *options = recorder.arguments
    total, _, stats, selected, marks, summary = recorder.results
    selected.fill_(255)  # also the bits of steps that there are not
    for id in (255, -1, torch.iinfo(dtype).max, torch.iinfo(dtype).min):  # as uint8 some are the same
        labels.random_(0, 5).masked_fill_(
            torch.rand(labels.shape, device=labels.device) < 0.5, id & 255 if id < 0 else id
        )
        for odd in (math.nan, math.inf, -1e38, 0.0):
            marks.random_()
            grad = backward_of(recorder.op)(
                total, z, labels, weight, stats.fill_(odd), selected, marks, summary.fill_(odd), *options
            )
            assert (grad.shape, grad.dtype) == (z.shape, z.dtype)


# --------------------------------------------------------------------------------------------------------------------
# The halves of the op, between which sums can be added up over processes

# OHEM that looks for the k-th largest loss does so in each part by itself.
OF_PARTS = tuple(case for case in LOSSES if case.options.get("ohem", OHEM(1.0)).threshold > 1e-3)


@runs(LOSSES, KERNELS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_loss_is_both_halves(backend: Backend, case: LossCase, dtype: torch.dtype) -> None:
    """Protects what many processes compute: bcmf::loss is loss_finish of loss_sums, to the last bit."""
    recorder = record(case, backend, *problem((2, 5, 18, 24), dtype, backend.device, logits=case.logits))
    total, terms, *kept, summary = recorder.results
    sum_up, finish = ops.LOSS_HALVES[backend.impl]
    inputs, options = recorder.arguments[:3], recorder.arguments[3:]
    sums, cutoff, *kept_of_sums = sum_up(*inputs, *options)
    for ours, expected in zip(
        (*finish(sums, cutoff, *options), *kept_of_sums), (total, terms, summary, *kept), strict=True
    ):
        assert torch.equal(ours, expected)
    assert (sums.dtype, cutoff) == (torch.float64, summary[Summary.CUTOFF])


@runs(OF_PARTS, KERNELS)
def test_sums_of_parts_are_those_of_the_batch(backend: Backend, case: LossCase) -> None:
    """Protects the sums' being numerators and denominators of the means: those of two images, added up, give the loss
    over both; nothing is rounded to fp32 on the way, and an image without valid pixels adds nothing."""
    z, y, w = problem((3, 5, 18, 24), torch.float64, backend.device, logits=case.logits)
    y[2] = 255
    recorder = record(case, backend, z, y, w)
    sum_up, finish = ops.LOSS_HALVES[backend.impl]
    logits, target, weight, *options = recorder.arguments
    parts = [sum_up(logits[i : i + 1], target[i : i + 1], weight, *options) for i in range(3)]
    total, terms, summary = finish(sum(part[0] for part in parts), parts[0][1], *options)
    for ours, expected in zip((total, terms), recorder.results[:2], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(summary[Summary.VALID :], recorder.results[-1][Summary.VALID :])


@every_kernel
def test_sums_count_bad_labels(backend: Backend) -> None:
    """Protects the other processes from waiting for one that raises: its sums tell how many labels are bad, and with
    them every mean is NaN. Terms that are not asked for have sums of 0."""
    z, y, w = problem((2, 5, 6, 7), torch.float32, backend.device)
    y[0, 0, :3] = 99
    sum_up, finish = ops.LOSS_HALVES[backend.impl]
    for options in (
        LossOptions(255),
        LossOptions(255, ce=False, bcl_steps=[1]),
        LossOptions(255, cpg_kernel_size=3),
        LossOptions(255, ohem_threshold=0.9, ohem_min_kept=5, bcl_steps=[1, 2]),
    ):
        sums, cutoff, *_ = sum_up(z, y, w, *options)
        assert sums[Sum.BAD_LABELS] == 3
        total, *_ = finish(sums, cutoff, *options)
        assert total.isnan()
        asked = {Sum.CE_SUM: options.ce, Sum.CPG_SUM: options.cpg_kernel_size, Sum.BCL: options.bcl_steps}
        assert all(sums[entry] == 0 for entry, terms in asked.items() if not terms)
        assert not sums[Sum.BCL + 2 * len(options.bcl_steps) :].any()


@every_kernel
def test_the_halves_of_nothing(backend: Backend) -> None:
    """Protects a process without a pixel: its sums are 0, whatever lay in memory before, and so is the loss."""
    sum_up, finish = ops.LOSS_HALVES[backend.impl]
    options = LossOptions(255, bcl_steps=[1], cpg_kernel_size=3)
    for shape in ((0, 5, 4, 4), (2, 5, 0, 4)):
        z, y, w = problem(shape, torch.float32, backend.device)
        garbage = [torch.full((size,), math.nan, device=backend.device) for size in (1, 44, 1, 44)]
        del garbage
        sums, cutoff, *_ = sum_up(z, y, w, *options)
        assert not sums.any()
        assert cutoff == 0
        assert finish(sums, cutoff, *options)[0] == 0


@every_kernel
def test_the_halves_keep_torchs_rules(backend: Backend) -> None:
    """Protects compiling and exporting what many processes compute (opcheck), and sums that are a view of a larger
    tensor: those of both heads travel in one."""
    z, y, w = problem((2, 5, 6, 7), torch.float64, backend.device)
    sum_up, finish = ops.LOSS_HALVES[backend.impl]
    options = LossOptions(255, bcl_steps=[1], cpg_kernel_size=3)
    sums, cutoff, *_ = sum_up(z, y, w, *options)
    heads = torch.stack([sums, torch.full_like(sums, math.nan)], 1)
    for ours, expected in zip(finish(heads[:, 0], cutoff, *options), finish(sums, cutoff, *options), strict=True):
        assert torch.equal(ours, expected)
    for dtype in (torch.float64, torch.bfloat16):
        torch.library.opcheck(sum_up, (z.to(dtype), y, w, *options))
    torch.library.opcheck(finish, (sums, cutoff, *options))


@every_kernel
def test_the_halves_refuse_what_is_not_theirs(backend: Backend) -> None:
    """Protects direct calls from reading out of bounds, and users from a loss without a gradient."""
    z, y, w = problem((2, 5, 6, 7), torch.float32, backend.device)
    sum_up, finish = ops.LOSS_HALVES[backend.impl]
    options = LossOptions(255, bcl_steps=[1])
    sums, cutoff, *_ = sum_up(z, y, w, *options)
    for wrong in ((sums[:5], cutoff), (sums.float(), cutoff), (sums, sums), (sums, cutoff.half())):
        with pytest.raises(ValueError, match=r"sums and cutoff as bcmf::loss_sums|one cutoff"):
            finish(*wrong, *options)
    with pytest.raises(ValueError, match=r"1 to 8 steps|BCL's step is"):
        finish(sums, cutoff, *options._replace(bcl_steps=[1] * 9))
    with pytest.raises(NotImplementedError, match="loss_backward finds that of both together"):
        sum_up(z.requires_grad_(), y, w, *options)[2].sum().backward()


# --------------------------------------------------------------------------------------------------------------------
# What only a GPU can show


@runs(LOSSES, GPU)
def test_graph_replay_with_other_values(backend: Backend, case: LossCase) -> None:
    """Protects CUDA graphs: no host sync, nothing of the captured values is baked in."""
    z, y, w = problem((2, 19, 64, 64), torch.float32, "cuda", logits=case.logits)
    static = z.clone().requires_grad_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(case(static, y, w, backend.impl), static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = case(static, y, w, backend.impl)
        (grad,) = torch.autograd.grad(value, static)
    for scale in (1.0, 0.3, 2.0):
        with torch.no_grad():
            static.copy_(scale * z)
            y[:, : int(10 * scale)] = 255
            w.mul_(1 + scale * torch.rand_like(w))
        graph.replay()
        expected, expected_grad = value_and_grad(lambda z: case(z, y, w, backend.impl), scale * z)
        assert torch.equal(value, expected)
        assert torch.equal(grad, expected_grad)


@runs(LOSSES, GPU)
@pytest.mark.parametrize("shape", [(3, 256, 2048, 2048), (1, 160, 4096, 4096)], ids=["batch", "image"])
def test_more_than_two_billion_elements(backend: Backend, case: LossCase, shape: tuple[int, ...]) -> None:
    """Protects 64-bit offsets, over the batch and within one image: of logits that are all alike but for the last
    pixels, only these are counted, and give the value and gradient of the same pixels cut out."""
    n, c, h, w = shape
    if torch.cuda.mem_get_info()[0] < 3 * n * c * h * w * 2:
        pytest.skip("too little GPU memory")
    last, y_last, weight = problem((1, c, 2, 3), torch.bfloat16, "cuda", ignore_index=-1, logits=case.logits)
    y_last[:] = torch.tensor([[0, c - 1, 1], [c - 2, 5, c - 1]])
    z = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    z[-1:, :, -2:, -3:] = last
    y = torch.full((n, h, w), -1, dtype=torch.int16, device="cuda")
    y[-1:, -2:, -3:] = y_last
    value, grad = value_and_grad(lambda z: case(z, y, weight, backend.impl, ignore_index=-1), z)
    expected, expected_grad = value_and_grad(lambda z: case.define(z, y_last, weight, ignore_index=-1), last)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[-1:, :, -2:, -3:], expected_grad, rtol=2e-2, atol=1e-6)
    assert grad[0, :, 0, :5].count_nonzero() == 0
