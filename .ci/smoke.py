"""Are the installed kernels right, on whatever torch, Python and processor run this? ``python smoke.py``

It needs the wheel and what that depends on, no compiler and no checkout, takes half a minute, and compares everything
that the CPU's kernels compute with PyTorch.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import gc
import itertools
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # Threads that wait leave the core to others on a busy machine.

import numpy as np
import torch
from torch import Tensor

import bcmf_ext
from bcmf_ext import BCL, CPG, LMFM, OHEM, dispatch, info, metrics, ops
from bcmf_ext.options import LossOptions

CHECKS: list[tuple[str, Callable[[], None]]] = []
TOLERANCES = {torch.float64: 1e-10, torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
USUAL = LossOptions(255)
MOST = BCL(0.7, (1, 2)), CPG(0.6), OHEM(0.5, 5)


def check(*cases: tuple[Any, ...]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a function to the checks, once for the arguments of each case."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for case in cases or [()]:
            words = " ".join(str(each) for each in (function.__name__, *case) if not callable(each))
            CHECKS.append((words, functools.partial(function, *case)))
        return function

    return add


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Their largest difference, as a share of the largest entry, is at most the tolerance; the same entries are NaN."""
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    difference = torch.where(ours == theirs, 0, ours - theirs).double().nan_to_num(0).abs()
    assert torch.equal(ours.isnan(), theirs.isnan())
    if ours.numel():
        error, scale = difference.max().item(), theirs.double().nan_to_num(0).abs().max().item()
        assert error <= tolerance * max(scale, 1e-30), f"differs by {error:.3g}, where the largest is {scale:.3g}"


def raises(call: Callable[[], Any], *words: str) -> None:
    """The call raises a ValueError with all of these words."""
    said = None
    try:
        call()
    except ValueError as error:
        said = str(error)
    assert said is not None, "raises nothing"
    assert all(word in said for word in words), f"says {said}"


def problem(classes: int = 19, size: tuple[int, int] = (24, 36), ratio: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in fp64, labels, a tenth of which is ignored, and class weights."""
    g = torch.Generator().manual_seed(0)
    z = 3 * torch.randn(2, classes, *(side // ratio for side in size), generator=g, dtype=torch.float64)
    y = torch.randint(0, classes, (2, *size), generator=g)
    y[torch.rand(y.shape, generator=g) < 0.1] = 255
    return z, y, 0.1 + torch.rand(classes, generator=g)


def without_kernels() -> contextlib.AbstractContextManager[Any]:
    """A context in which PyTorch runs everything."""
    return mock.patch.object(dispatch, "_NO_EXTENSION", "it is compared")


# ----------------------------------------------------------------------------------------------------------------------
# What runs


@check()
def kernels_are_loaded() -> None:
    assert dispatch.EXTENSION is not None, dispatch.why_not("cpu", "cpu")
    assert dispatch.choose("loss", "auto", torch.device("cpu")) == "cpu"


@check()
def auto_runs_the_kernels() -> None:
    z, y, _ = problem()
    loss = bcmf_ext.cross_entropy(z.requires_grad_(), y)
    assert loss.grad_fn is not None
    assert loss.grad_fn.name() == "LossBackward"
    assert "LossBackward" not in bcmf_ext.cross_entropy(z, y, impl="torch").grad_fn.name()


# ----------------------------------------------------------------------------------------------------------------------
# The losses

LOSSES: dict[str, Callable[..., Any]] = {
    "cross_entropy": lambda z, y, w, **kw: bcmf_ext.cross_entropy(z, y, **kw),
    "weighted": lambda z, y, w, **kw: bcmf_ext.cross_entropy(z, y, weight=w, **kw),
    "OHEM": lambda z, y, w, **kw: bcmf_ext.cross_entropy(z, y, ohem=OHEM(0.2, 3), **kw),
    "OHEM-min_kept": lambda z, y, w, **kw: bcmf_ext.cross_entropy(z, y, weight=w, ohem=OHEM(1e-6, 40), **kw),
    "BCL": lambda z, y, w, **kw: bcmf_ext.boundary_corrected_loss(z, y, step=(1, 2, 5), **kw),
    "BCL-flipped": lambda z, y, w, **kw: bcmf_ext.boundary_corrected_loss(
        z, y, supervise="flipped", alpha=0.2, beta=0.3, threshold=0.3, nms_size=5, **kw
    ),
    "CPG": lambda z, y, w, **kw: bcmf_ext.cpg_loss(z, y, **kw),
    "CPG-5-centre": lambda z, y, w, **kw: bcmf_ext.cpg_loss(z, y, kernel_size=5, ignore_mode="centre", **kw),
    "CPG-7": lambda z, y, w, **kw: bcmf_ext.cpg_loss(z, y, kernel_size=7, **kw),
    "all": lambda z, y, w, **kw: bcmf_ext.segmentation_loss(
        z, y, weight=w, bcl=MOST[0], cpg=MOST[1], ohem=MOST[2], **kw
    ),
    "all-flipped": lambda z, y, w, **kw: bcmf_ext.segmentation_loss(
        z, y, bcl=BCL(0.7, 2, "flipped", alpha=0.2, beta=0.3), cpg=CPG(0.6, 5), **kw
    ),
    "binary": lambda z, y, w, **kw: bcmf_ext.segmentation_loss(z, y, first="bce", cpg=CPG(0.6), **kw),
    "criterion": lambda z, y, w, impl, **kw: bcmf_ext.SegmentationCriterion(w, impl=impl, **kw)((z, z), y),
}
LAYOUTS = {
    "same-size": (1, False, torch.contiguous_format),
    "channels_last": (1, False, torch.channels_last),
    "quarter": (4, False, torch.channels_last),
    "quarter-corners": (4, True, torch.contiguous_format),
}


@check(*itertools.product(LOSSES, TOLERANCES, LAYOUTS))
def loss(name: str, dtype: torch.dtype, layout: str) -> None:
    """Values, terms and the gradient, which has the strides of its logits."""
    ratio, align_corners, memory_format = LAYOUTS[layout]
    z, y, w = problem(ratio=ratio)
    z = z.to(dtype, memory_format=memory_format).requires_grad_()
    found = []
    for impl in ("cpu", "torch"):
        result = LOSSES[name](z, y, w, impl=impl, align_corners=align_corners)
        values = [each for each in result if each is not None] if isinstance(result, tuple) else [result]
        (grad,) = torch.autograd.grad(values[0] * y.numel(), z)  # which is large enough for fp16
        assert grad.stride() == z.stride() or impl == "torch"
        found.append((*values, grad))
    *ours, our_grad = found[0]
    *theirs, their_grad = found[1]
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, TOLERANCES[mine.dtype])
    assert_close(our_grad, their_grad, TOLERANCES[dtype])


@check((torch.uint8,), (torch.int16,), (torch.int32,), (torch.bool,))
def labels_of_other_dtypes(dtype: torch.dtype) -> None:
    z, y, _ = problem(2)
    y = y.clamp(max=1)
    expected = bcmf_ext.segmentation_loss(z, y, bcl=0.1, cpg=1.0)
    for ours, theirs in zip(bcmf_ext.segmentation_loss(z, y.to(dtype), bcl=0.1, cpg=1.0), expected, strict=True):
        assert torch.equal(ours, theirs)


@check((False,), (True,))
def halves_make_the_whole(with_ohem: bool) -> None:
    """bcmf::loss is loss_finish of loss_sums; without OHEM, sums of both images add up to those of the batch."""
    terms = bcmf_ext.options.resolve_options(MOST[2] if with_ohem else None, *MOST[:2])
    options = LossOptions.of(255, False, terms)
    z, y, w = problem(ratio=4)
    sums_op, finish_op = ops.LOSS_HALVES["cpu"]
    total, values, *of_pixels, summary = ops.LOSS["cpu"](z, y, w, *options)
    sums, cutoff, *kept = sums_op(z, y, w, *options)
    finished = finish_op(sums, cutoff, *options)
    for ours, theirs in zip((*finished, *kept), (total, values, summary, *of_pixels), strict=True):
        assert torch.equal(ours, theirs)
    if not with_ohem:
        parts = [sums_op(z[i : i + 1], y[i : i + 1], w, *options)[0] for i in range(2)]
        assert_close(finish_op(parts[0] + parts[1], cutoff, *options)[0], total, 1e-12)


@check()
def operator_is_as_torch_wants_it() -> None:
    """Schema, autograd and fake kernel, as torch tests them."""
    z, y, _ = problem()
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.bcmf.loss.default, (z.requires_grad_(), y, None, *USUAL), test_utils=tests)


# ----------------------------------------------------------------------------------------------------------------------
# Networks' modules, and metrics


@check(*itertools.product(("LMFM", "DAPPM"), (True, False), (torch.float64, torch.float32), (False, True)))
def module(name: str, training: bool, dtype: torch.dtype, channels_last: bool) -> None:
    """Maps, gradients and running statistics."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(3, 24, 17, 26, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    ours = getattr(bcmf_ext, name)(24, 16, 12, impl="cpu").to(dtype, memory_format=layout).train(training)
    theirs = copy.deepcopy(ours)
    theirs.impl = "torch"
    found = []
    for each in (ours, theirs):
        result = each(x)
        grads = torch.autograd.grad((result * result).sum(), [x, *each.parameters()])
        found.append([result, *grads, *(buffer for buffer in each.buffers() if buffer.is_floating_point())])
    for mine, other in zip(*found, strict=True):
        assert_close(mine, other, 30 * TOLERANCES[dtype])  # of convolutions of what differs by roundings


@check(*itertools.product((19, 300), (1, 4), (torch.float64, torch.float32)))
def upsample_argmax(classes: int, ratio: int, dtype: torch.dtype) -> None:
    z, y, _ = problem(classes, ratio=ratio)
    ours = metrics.upsample_argmax(z.to(dtype), y.shape[1:])
    with without_kernels():
        assert torch.equal(ours, metrics.upsample_argmax(z.to(dtype), y.shape[1:]))


@check((torch.bfloat16,), (torch.float16,))
def upsample_argmax_reads_halves_as_they_are(dtype: torch.dtype) -> None:
    z, y, _ = problem(ratio=4)
    ours = metrics.upsample_argmax(z.to(dtype), y.shape[1:])
    assert torch.equal(ours, metrics.upsample_argmax(z.to(dtype).float(), y.shape[1:]))


METRICS = ("ConfusionMatrix", "BoundaryIoU", "BoundaryFScore", "TrimapIoU")


@check(*itertools.product(METRICS, ((5, 255), (300, -1))))
def metric(name: str, numbers: tuple[int, int]) -> None:
    """Scores of blocks of labels, a tenth of which are predicted wrong pixel by pixel; bytes, and 32 bits."""
    classes, ignore_index = numbers
    g = torch.Generator().manual_seed(1)
    truth = torch.randint(0, classes, (2, 6, 8), generator=g).repeat_interleave(9, 1).repeat_interleave(9, 2)
    other = torch.randint(0, classes, truth.shape, generator=g)
    guess = torch.where(torch.rand(truth.shape, generator=g) < 0.9, truth, other)
    truth[:, :4] = ignore_index
    found = []
    for context in (contextlib.nullcontext(), without_kernels()):
        with context:
            score = getattr(metrics, name)(classes, ignore_index)
            score.update(guess, truth)
            score.update(guess.numpy().astype(np.int32), truth.short())
            found.append(score.scores())
    assert found[0].keys() == found[1].keys()
    for key, ours in found[0].items():
        assert_close(ours, found[1][key], 0)


@check((1,), (4,))
def confusion_of_logits(ratio: int) -> None:
    z, y, _ = problem(ratio=ratio)
    ours, theirs = metrics.ConfusionMatrix(19), metrics.ConfusionMatrix(19)
    prediction = ours.update_from_logits(z, y)
    with without_kernels():
        assert torch.equal(prediction, theirs.update_from_logits(z, y))
    assert torch.equal(ours.matrix, theirs.matrix)
    assert ours.matrix.sum() == (y != 255).sum()


# ----------------------------------------------------------------------------------------------------------------------
# Errors: exceptions of C++, which pass through torch's C interface


@check(*((name,) for name in LOSSES))
def bad_labels(name: str) -> None:
    z, y, w = problem()
    y[1, 3, 4] = 33
    for impl in ("cpu", "torch"):
        if (name, impl) != ("binary", "torch"):
            raises(lambda impl=impl: LOSSES[name](z, y, w, impl=impl), "33", "0..18")


@check()
def bad_ids_of_metrics() -> None:
    z, y, _ = problem()
    y[1, 3, 4] = 33
    raises(lambda: metrics.ConfusionMatrix(19).update_from_logits(z, y), "33", "0..18")
    raises(lambda: metrics.BoundaryIoU(19).update(y, y), "33", "0..18")


def wrong_calls() -> Iterable[tuple[str, Callable[[], Any]]]:
    """Direct calls of ops that must not read memory that is not theirs."""
    z, y, w = problem()
    op, (sums_op, finish_op) = ops.LOSS["cpu"], ops.LOSS_HALVES["cpu"]
    backward, one = torch.ops.bcmf.loss_backward, torch.ones((), dtype=z.dtype)
    with torch.no_grad():
        _, _, *kept = op(z, y, w, *USUAL)
    norms = [[torch.ones(19)] * 4 for _ in range(4)]
    b = torch.ops.bcmf
    # A call with a tensor on "meta" would go to the fake kernel, as one with a tensor on a GPU does not.
    as_cpu = functools.partial(op.default.redispatch, torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))
    yield "logits", lambda: op(z[0], y, None, *USUAL)
    yield "one-class", lambda: op(z[:, :1], y, None, *USUAL)
    yield "batch", lambda: op(z, y[:1], w, *USUAL)
    yield "weights", lambda: op(z, y, w[:3], *USUAL)
    yield "empty", lambda: op(z[:, :, :0], y, w, *USUAL)
    yield "labels-dtype", lambda: op(z, y.float(), w, *USUAL)
    yield "logits-dtype", lambda: op(z.long(), y, w, *USUAL)
    yield "labels-device", lambda: as_cpu(z, y.to("meta"), w, *USUAL)
    yield "weights-device", lambda: as_cpu(z, y, w.to("meta"), *USUAL)
    yield "steps", lambda: op(z, y, w, *USUAL._replace(bcl_steps=[0]))
    yield "kernel_size", lambda: op(z, y, w, *USUAL._replace(cpg_kernel_size=4))
    yield "sums", lambda: sums_op(z, y[:1], w, *USUAL)
    yield "sums-finish", lambda: finish_op(torch.zeros(3, dtype=torch.float64), one, *USUAL)
    yield "sums-dtype", lambda: finish_op(torch.zeros(ops.SUMS), one, *USUAL)
    yield "stats", lambda: backward(one, z, y, w, kept[0][:, :1], *kept[1:], *USUAL)
    yield "summary", lambda: backward(one, z, y, w, *kept[:-1], kept[-1][:2], *USUAL)
    yield "argmax-size", lambda: b.upsample_argmax(z, 0, -3, False)
    yield "argmax-dtype", lambda: b.upsample_argmax(z.int(), 4, 4, False)
    yield "confusion", lambda: b.upsample_confusion(z, y[:1], 255, False)
    yield "pairs", lambda: b.count_pairs(y.byte(), y[:1].byte(), 19, 19)
    yield "pairs-dtype", lambda: b.count_pairs(y.float(), y.byte(), 19, 19)
    yield "read_labels", lambda: b.read_labels(y, y[:1], 19, 255)
    yield "match", lambda: b.match_within(y.byte(), y[:1].byte(), 19, [1, 3])
    yield "pool", lambda: b.pool_norm_relu(z.float(), *(each[:3] for each in norms), True, 0.1, 1e-5)
    yield "pool-channels", lambda: b.pool_norm_relu(z[:, :3].float(), *norms, True, 0.1, 1e-5)
    yield "pool-dtype", lambda: b.pool_norm_relu(z.int(), *norms, True, 0.1, 1e-5)
    yield (
        "add",
        lambda: b.add_norm_relu(
            [None], [z.float()], *(each[:1] for each in norms), 5, 5, False, False, True, 0.1, 1e-5
        ),
    )
    yield (
        "add-nothing",
        lambda: b.add_norm_relu([None], [None], *(each[:1] for each in norms), 5, 5, False, False, True, 0.1, 1e-5),
    )


@check(*wrong_calls())
def wrong_call(name: str, call: Callable[[], Any]) -> None:
    raises(call)


# ----------------------------------------------------------------------------------------------------------------------
# Memory and threads: what C++ hands to torch through the C interface is owned by hand


def resident() -> float:
    """How many MiB of memory this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def allocated() -> float:
    """How many MiB malloc has given and not got back: exact, where what a process has goes up and down by some MiB."""
    gc.collect()
    libc = ctypes.CDLL(None)
    name, kind = ("mallinfo2", ctypes.c_size_t) if hasattr(libc, "mallinfo2") else ("mallinfo", ctypes.c_int)
    counts = kind * 10  # arena, ordblks, smblks, hblks, hblkhd, usmblks, fsmblks, uordblks, fordblks, keepcost
    ask = getattr(libc, name)
    ask.restype = type("Counts", (ctypes.Structure,), {"_fields_": [("counts", counts)]})
    found = ask().counts
    return (found[4] + found[7]) / 2**20


def step_of_all() -> Callable[[], None]:
    """A function that calls every op and its backward, and such as fail."""
    z, y, w = problem(8, (32, 32))
    z = z.requires_grad_()
    bad = y.clone().fill_(99)
    network = LMFM(8, 8, 8, impl="cpu").double()
    options = LossOptions.of(255, False, bcmf_ext.options.resolve_options(MOST[2], *MOST[:2]))
    ids = y.clamp(max=7).byte()

    def step() -> None:
        bcmf_ext.segmentation_loss(z, y, weight=w, bcl=MOST[0], cpg=MOST[1], ohem=MOST[2]).total.backward()
        z.grad = None
        with torch.no_grad():
            sums, cutoff, *_ = ops.LOSS_HALVES["cpu"][0](z, y, w, *options)
            ops.LOSS_HALVES["cpu"][1](sums, cutoff, *options)
        network(z).sum().backward()
        network.zero_grad()
        z.grad = None
        torch.ops.bcmf.upsample_argmax(z.detach(), 64, 64, False)
        torch.ops.bcmf.upsample_confusion(z.detach(), y, 255, False)
        guess, truth, _ = torch.ops.bcmf.read_labels(y, y, 8, 255)
        torch.ops.bcmf.count_pairs(guess, truth, 64, 64)
        torch.ops.bcmf.match_within(ids, ids, 8, [1, 3])
        raises(lambda: bcmf_ext.cross_entropy(z, bad), "99")
        raises(lambda: torch.ops.bcmf.loss(z.detach(), y[:1], w, *options))

    return step


@check()
def memory_stays_flat() -> None:
    """Over some thousand calls of all ops, a tenth of a KiB a step: the smallest tensor has a whole one."""
    step = step_of_all()
    for _ in range(50):
        step()
    before = allocated()
    for _ in range(400):
        step()
    grown = (allocated() - before) * 2**20 / 400
    assert grown < 100, f"{grown:.0f} bytes more after each step"


@check((torch.contiguous_format,), (torch.channels_last,))
def large_gradients(layout: torch.memory_format) -> None:
    """From 32 MiB on, a gradient lies in memory of ours, which comes back when torch frees it, in whatever thread."""
    z = torch.randn(1, 19, 768, 768).contiguous(memory_format=layout).requires_grad_()
    y = torch.randint(0, 19, (1, 768, 768))
    dispatch.release_kept_memory()
    (expected,) = torch.autograd.grad(bcmf_ext.cross_entropy(z, y, impl="torch"), z)
    grads, resident_after = [], []
    for _ in range(12):
        grads[:] = torch.autograd.grad(bcmf_ext.cross_entropy(z, y), z)
        resident_after.append(resident())
    assert resident_after[-1] - resident_after[3] < 42, f"{resident_after} MiB: a gradient of 43 was not freed"
    assert grads[0].stride() == z.stride()
    assert_close(grads[0], expected, TOLERANCES[torch.float32])
    thread = threading.Thread(target=grads.clear)
    thread.start()
    thread.join()
    kept = resident()
    bcmf_ext.release_kept_memory()
    freed = kept - resident()
    assert freed > 32, f"{freed:.1f} MiB"
    bcmf_ext.release_kept_memory()  # also where there is nothing


@check()
def threads_do_not_meet() -> None:
    """Two threads of Python, each with problems of its own."""
    problems = [problem(classes) for classes in (5, 19)]

    def run(z: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        z = z.clone().requires_grad_()
        result = bcmf_ext.segmentation_loss(z, y, weight=w, bcl=MOST[0], cpg=MOST[1], ohem=MOST[2])
        return (*result, *torch.autograd.grad(result.total, z))

    expected = [run(*each) for each in problems]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            found = run(*problems[i])
            if not all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected[i], strict=True)):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, f"{len(wrong)} of 400 results differ"


@check()
def a_process_ends_well() -> None:
    """Protects programs that end while they hold a large gradient, which is freed late, or never."""
    code = (
        "import torch, bcmf_ext\n"
        "z = torch.randn(1, 19, 512, 1024, requires_grad=True)\n"
        "bcmf_ext.cross_entropy(z, torch.zeros(1, 512, 1024, dtype=torch.uint8)).backward()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def main() -> None:
    start = time.monotonic()
    print(info.versions(), info.build(), f"library    {dispatch.EXTENSION and dispatch.EXTENSION.file}", sep="\n")
    failed = 0
    for name, run in CHECKS:
        try:
            run()
        except Exception:
            failed += 1
            print(f"\n{name} failed:\n{traceback.format_exc()}", flush=True)
    print(
        f"{len(CHECKS) - failed} passed" + f", {failed} failed" * bool(failed), f"in {time.monotonic() - start:.0f} s"
    )
    sys.stdout.flush()
    # Python does not clean up: torch 2.12 then aborts at times, where two threads have had backwards (also without us).
    os._exit(failed > 0)


if __name__ == "__main__":
    main()
