"""bcmf::loss in Triton: the algorithm of csrc/device/loss.cuh. Each step is a kernel: what one writes, the next reads.
Nothing synchronises, and no float is added atomically.

Forward: dense (statistics, losses for OHEM, scores for BCL), select (OHEM), bcl, cpg; sums by tile, then in the order
of the tiles. Backward: cpg (what p is pushed by), dense, cpg again (the classes near an edge); then back to logits of
another size (quads).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import check_inputs
from ..ops import SUMMARY
from ..options import OHEM, LossOptions
from . import bcl, cpg, ohem, quads
from .bcl import loss_of, score
from .common import (
    ANY,
    BAD,
    DENOMINATOR,
    DIRECT,
    EDGES,
    IGNORED,
    QUADS,
    SELECTED,
    VALID,
    Labels,
    Map,
    class_at,
    double,
    pixel_at,
)
from .cpg import COMPARE, GRADIENT, SHARES, cpg_tiles
from .geometry import tile_of
from .gradient import gradient_of, pixel_pulls
from .launch import (
    FLAT,
    FLAT_BLOCK,
    PROGRAMS,
    SPARSE,
    Geometry,
    Tile,
    bits_of,
    check_sides,
    multiprocessors,
    on_device,
    power_of_two,
    run,
)
from .logits import group, places_of
from .ohem import key_of, weight_of

GATHER_BLOCK = 256  # logits

# Rows of the table of partial sums: of the dense kernel; then two for each of BCL's steps, and CPG's two.
NUMERATOR, COUNT, HARD, VALID_PIXELS, BAD_LABELS = (tl.constexpr(row) for row in range(5))
DENSE_SUMS = tl.constexpr(5)


@triton.jit(do_not_specialize=["ignore_index", "exceeds"])
def forward(
    logits, labels, size, down, across, weight, stats, nlls, scores, partials, length, pixels, ignore_index, exceeds,
    ACC: tl.constexpr, WEIGHTED: tl.constexpr, OHEM: tl.constexpr, STEPS: tl.constexpr,
    MODE: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """stats, with OHEM ℓ (−1 where ignored), by BCL's steps q, and partial sums."""
    tile = tl.program_id(0)
    n, y, x, inside = tile_of(tile, size, down, across, MODE, ROWS, SPANS, SPAN)
    places = places_of(tile, logits, size, down, across, y, x, MODE, SPANS)
    m = tl.full([ROWS, SPANS, SPAN], float("-inf"), ACC)
    total = tl.zeros([ROWS, SPANS, SPAN], ACC)
    for first in range(0, size.classes, GROUP):
        z = group(logits, n, places, first, size.classes, inside, ACC, MODE, GROUP)
        largest = tl.maximum(m, tl.max(z, 0))  # leaves NaN out
        base = tl.where(largest == float("-inf"), 0.0, largest)  # −inf − −inf would be NaN
        total = total * tl.exp(m - base) + tl.sum(tl.exp(z - base[None]), 0)
        m = largest
    log_sum = tl.log(total)
    pixel = pixel_at(size, n, y, x)
    tl.store(stats + pixel, m, mask=inside)
    tl.store(stats + pixels + pixel, log_sum, mask=inside)

    label = class_at(labels, n, y, x, inside, size.classes, ignore_index)
    nll = loss_of(logits, size, down, across, n, y, x, label, inside, m, log_sum, ACC, MODE)
    nll = tl.where(label == BAD, float("nan"), nll)
    valid = label != IGNORED
    w = weight_of(weight, label, ACC, WEIGHTED)
    to = partials + tile
    tl.store(to + NUMERATOR * length, tl.sum(tl.where(valid, w * nll, 0.0)).to(tl.float64))
    tl.store(to + COUNT * length, tl.sum(tl.where(valid, w, 0.0)).to(tl.float64))
    tl.store(to + VALID_PIXELS * length, tl.sum(valid.to(ACC)).to(tl.float64))
    tl.store(to + BAD_LABELS * length, tl.sum((label == BAD).to(ACC)).to(tl.float64))
    if OHEM:
        tl.store(nlls + pixel, tl.where(valid, nll, -1.0), mask=inside)
        hard = valid & (key_of(nll) >= key_of(double(exceeds).to(ACC)))
        tl.store(to + HARD * length, tl.sum(hard.to(ACC)).to(tl.float64))
    for i in tl.static_range(len(STEPS)):
        q = score(
            logits, labels, size, down, across, n, y, x, label, nll, m, log_sum, ignore_index, STEPS[i], ACC, MODE
        )
        tl.store(scores + i * tl.cast(pixels, tl.int64) + pixel, q, mask=inside)


@triton.jit
def add_tiles(partials, totals, length, BLOCK: tl.constexpr):
    """Each sum over its tiles, in an order that depends on their number alone."""
    row = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, length, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(partials + tl.cast(row, tl.int64) * length + tile, mask=tile < length, other=0)
    tl.store(totals + row, tl.sum(total, 0))


@triton.jit
def mean_of(totals, row, count, bad):
    """NaN with a bad label."""
    mean = tl.where(count == 0, 0.0, tl.load(totals + row) / tl.where(count == 0, 1.0, count))
    return tl.where(bad > 0, float("nan"), mean)


@triton.jit(do_not_specialize=["bcl_weight", "cpg_weight"])
def finish(
    totals, total, terms, summary, bcl_weight, cpg_weight,
    CE: tl.constexpr, BCL_STEPS: tl.constexpr, FLIPPED: tl.constexpr, CPG: tl.constexpr,
):  # fmt: skip
    """The means, from the totals of all partial sums; what the backward needs of them (summary is 0 but for OHEM's
    cutoff)."""
    acc = total.dtype.element_ty
    bad = tl.load(totals + BAD_LABELS)
    valid = tl.load(totals + VALID_PIXELS)
    tl.store(summary + VALID, valid.to(acc))
    ce = valid * 0
    if CE:
        count = tl.load(totals + COUNT)
        tl.store(summary + DENOMINATOR, count.to(acc))
        ce = mean_of(totals, NUMERATOR, count, bad)
    bcl = valid * 0
    for i in tl.static_range(BCL_STEPS):
        count = tl.load(totals + DENSE_SUMS + 2 * i + 1)
        tl.store(summary + SELECTED + i, count.to(acc))
        bcl += mean_of(totals, DENSE_SUMS + 2 * i, valid if FLIPPED else count, bad) / BCL_STEPS
    cpg = valid * 0
    if CPG:
        count = tl.load(totals + DENSE_SUMS + 2 * BCL_STEPS + 1)
        tl.store(summary + EDGES, count.to(acc))
        cpg = mean_of(totals, DENSE_SUMS + 2 * BCL_STEPS, count, bad)
    tl.store(terms, ce.to(acc))
    tl.store(terms + 1, bcl.to(acc))
    tl.store(terms + 2, cpg.to(acc))
    weighted = ce
    if BCL_STEPS > 0:
        weighted += double(bcl_weight) * bcl
    if CPG:
        weighted += double(cpg_weight) * cpg
    tl.store(total, weighted.to(acc))


@triton.jit(do_not_specialize=["ignore_index", "bcl_weight", "alpha", "beta"])
def backward(
    logits, labels, size, down, across, weight, stats, selected, summary, grad_total, shares, grad, pixels,
    ignore_index, bcl_weight, alpha, beta,
    ACC: tl.constexpr, CE: tl.constexpr, WEIGHTED: tl.constexpr, OHEM: tl.constexpr, STEPS: tl.constexpr,
    FLIPPED: tl.constexpr, CPG: tl.constexpr,
    MODE: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The gradient by logits of the labels' size, but for p_c g_c of CPG; of quads, summed up for their corners."""
    tile = tl.program_id(0)
    n, y, x, inside = tile_of(tile, size, down, across, MODE, ROWS, SPANS, SPAN)
    places = places_of(tile, logits, size, down, across, y, x, MODE, SPANS)
    pixel = pixel_at(size, n, y, x)
    m = tl.load(stats + pixel, mask=inside, other=0)
    log_sum = tl.load(stats + pixels + pixel, mask=inside, other=0)
    label, chosen, pull, factor = pixel_pulls(
        logits, labels, size, down, across, weight, stats, selected, summary, grad_total, shares, pixels, ignore_index,
        bcl_weight, alpha, beta, n, y, x, inside, ACC, MODE, CE, WEIGHTED, OHEM, STEPS, FLIPPED, CPG,
    )  # fmt: skip
    if MODE == QUADS:
        lower_weight, right_weight = quads.corner_weights(tile, size, down, across, y, x, SPANS)
    for first in range(0, size.classes, GROUP):
        z = group(logits, n, places, first, size.classes, inside, ACC, MODE, GROUP)
        c = first + tl.arange(0, GROUP)[:, None, None, None]
        p = tl.exp((z - m[None]) - log_sum[None])
        value = gradient_of(
            c, p, factor[None], label[None], chosen[None], pull[None], labels, size, n, y[None], x[None],
            grad_total, summary, bcl_weight, alpha, beta, ignore_index, ACC, STEPS, FLIPPED,
        )  # fmt: skip
        if MODE == QUADS:
            quads.add_to_quads(
                grad, tile, size, down, across, first + tl.arange(0, GROUP)[:, None],
                tl.where(inside[None], value, 0.0), lower_weight, right_weight, SPANS, False,
            )  # fmt: skip
        else:
            to = grad.data + tl.cast(n, tl.int64) * grad.stride_n + c.to(tl.int64) * grad.stride_c
            to += (y.to(tl.int64) * grad.stride_h + x.to(tl.int64) * grad.stride_w)[None]
            tl.store(to, value.to(grad.data.dtype.element_ty), mask=inside[None] & (c < size.classes))


# --------------------------------------------------------------------------------------------------------------------
# The op


def check(logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
    """The public functions have checked all this; it keeps a direct call of the op memory-safe."""
    check_inputs(logits, target, weight)
    check_sides(*logits.shape[1:], *target.shape[1:])
    if options.ohem_threshold is not None:
        OHEM(options.ohem_threshold)
    steps = list(options.bcl_steps)
    if steps:
        if len(steps) > 8 or min(steps) < 1:
            raise ValueError(f"BCL takes 1 to 8 steps of at least one pixel, not {steps}.")
        if len(options.bcl_flipped) not in (0, 2):
            raise ValueError("BCL's flipped labels have two weights.")
        if options.bcl_nms_size < 1 or options.bcl_nms_size % 2 == 0:
            raise ValueError(f"BCL's nms_size is an odd number of pixels, not {options.bcl_nms_size}.")
        if not 0 < options.bcl_threshold <= 1:
            raise ValueError(f"BCL's threshold is a probability in (0, 1], not {options.bcl_threshold}.")
    if options.cpg_kernel_size not in (0, 3, 5, 7):
        raise ValueError(f"CPG's kernel_size is 3, 5 or 7, not {options.cpg_kernel_size}.")


class Call:
    """A call of the op: its geometry, and the arguments that its kernels share, by name."""

    def __init__(self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
        check(logits, target, weight, options)
        self.options, self.target = options, target
        self.geometry = geometry = Geometry(logits, target.shape[1], target.shape[2], options.align_corners)
        self.new, self.acc = logits.new_empty, geometry.acc
        self.steps = tuple(min(step, 2**30) for step in options.bcl_steps)  # no image is as large
        self.ohem = options.ohem_threshold is not None
        self.cpg = options.cpg_kernel_size > 0
        alpha, beta = options.bcl_flipped or (0.0, 0.0)
        self.arguments = {
            **geometry.arguments,
            "labels": Labels(target, *target.stride()),
            "ignore_index": options.ignore_index,
            "weight": logits if weight is None else weight.to(self.acc).contiguous(),
            "bcl_weight": bits_of(options.bcl_weight),
            "alpha": bits_of(alpha),
            "beta": bits_of(beta),
            "cpg_weight": bits_of(options.cpg_weight),
            "CE": options.ce,
            "WEIGHTED": weight is not None,
            "OHEM": self.ohem,
            "STEPS": self.steps,
            "FLIPPED": len(options.bcl_flipped) > 0,
            "CPG": self.cpg,
        }

    def run(self, kernel: Any, programs: int, **more: Any) -> None:
        run(kernel, programs, self.arguments, **more)

    def run_dense(self, kernel: Any, **more: Any) -> None:
        """A kernel for all label pixels that reads their logits."""
        self.run(kernel, self.geometry.dense_tiles, **self.geometry.tile._asdict(), **more)

    def run_cpg(self, phase: tl.constexpr, **more: Any) -> None:
        mode, tile, tiles = self.sparse_tiles(phase)
        radius = self.options.cpg_kernel_size // 2
        margin = radius if phase is COMPARE else 2 * radius
        count = (tile.ROWS + 2 * margin) * (tile.SPANS * tile.SPAN + 2 * margin)
        programs = min(tiles, PROGRAMS * multiprocessors(self.target.device))
        names = ("selected", "summary", "grad_total", "shares", "partials")
        unused = {**dict.fromkeys(names, self.target), "grad": self.arguments["logits"], "length": 1}  # by this phase
        run(
            cpg_tiles, programs, {**unused, **self.arguments}, **more, **tile._asdict(),
            integers=self.new(programs * cpg.ARRAYS.value * count, dtype=torch.int32),
            numbers=self.new(programs * cpg.ARRAYS.value * count, dtype=self.acc),
            tiles=tiles, MODE=mode, PHASE=phase.value, WINDOW=self.options.cpg_window, RADIUS=radius, MARGIN=margin,
            LANES=power_of_two(count), BLOCK=SPARSE.block,
            PART_ROWS=min(SPARSE.window_rows, power_of_two(2 * radius + 1)),
        )  # fmt: skip

    def sparse_tiles(self, phase: tl.constexpr) -> tuple[int, Tile, int]:
        """Mode and tile of CPG's kernel, and how many of these there are."""
        mode, tile = self.geometry.mode, SPARSE.tile
        if mode == QUADS.value and phase is GRADIENT:  # those of the dense kernel, but fewer columns
            dense = self.geometry.tile
            tile = dense._replace(SPANS=max(1, tile.SPANS * tile.SPAN // dense.SPAN))
        elif mode == QUADS.value:
            mode = ANY.value
        return mode, tile, self.geometry.tiles(tile, mode)


def loss(
    logits: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel of bcmf::loss_triton; arguments: LossOptions."""
    options = LossOptions(*arguments)
    with on_device(logits):
        call = Call(logits, target, weight, options)
        shape, steps, new, acc = target.shape, len(call.steps), call.new, call.acc
        total, terms, summary = new((), dtype=acc), new(3, dtype=acc), new(SUMMARY, dtype=acc).zero_()
        stats = new((2, *shape), dtype=acc)
        selected = new((shape[0] if steps else 0, *shape[1:]), dtype=torch.uint8)
        nlls = new(shape, dtype=acc) if call.ohem else stats
        scores = new((steps, *shape), dtype=acc)

        flat_tiles = call.geometry.tiles(FLAT, DIRECT.value)
        length = max(1, call.geometry.dense_tiles, flat_tiles, call.sparse_tiles(COMPARE)[-1])
        sums = DENSE_SUMS.value + 2 * steps + 2 * call.cpg
        partials, totals = new((sums, length), dtype=torch.float64).zero_(), new(sums, dtype=torch.float64)
        call.arguments |= {
            "stats": stats, "nlls": nlls, "scores": scores, "totals": totals, "length": length, "total": total,
            "terms": terms, "exceeds": bits_of(least_hard_loss(options, acc)), "BLOCK": FLAT_BLOCK,
        }  # fmt: skip
        if call.geometry.pixels > 0:
            call.run_dense(forward, partials=partials)
            if call.ohem:
                run_ohem(call, nlls, summary, partials)
            if steps:
                call.run(
                    bcl.select_maxima, flat_tiles, **FLAT._asdict(), selected=selected,
                    partials=partials[DENSE_SUMS.value :], nms_radius=min(options.bcl_nms_size // 2, 2**30),
                    least_score=bits_of(-math.log(options.bcl_threshold)),
                )  # fmt: skip
            if call.cpg:
                call.run_cpg(COMPARE, partials=partials[sums - 2 :])
        call.run(add_tiles, sums, partials=partials)
        call.run(finish, 1, summary=summary, BCL_STEPS=steps)
        return total, terms, stats, selected, summary


def least_hard_loss(options: LossOptions, acc: torch.dtype) -> float:
    """The smallest number of this dtype that exceeds OHEM's threshold. On the CPU: no copy waits for the GPU."""
    if options.ohem_threshold is None:
        return 0.0
    return (
        torch.tensor(-math.log(options.ohem_threshold), dtype=acc).nextafter(torch.tensor(math.inf, dtype=acc)).item()
    )


def run_ohem(call: Call, nlls: Tensor, summary: Tensor, partials: Tensor) -> None:
    """Finds the smallest loss that is kept, and sums up the kept ones. Every level is always launched: whether it is
    needed only the device knows."""
    selection = nlls.new_empty(2, dtype=torch.int64)
    levels = list(ohem.digits(8 * nlls.element_size()))
    histograms = nlls.new_zeros((len(levels), 1 << ohem.DIGIT_BITS), dtype=torch.int64)
    call.run(add_tiles, DENSE_SUMS.value, partials=partials)
    call.run(
        ohem.begin, 1, min_kept=call.options.ohem_min_kept, selection=selection,
        HARD_ROW=HARD.value, VALID_ROW=VALID_PIXELS.value,
    )  # fmt: skip
    programs = min(256, triton.cdiv(call.geometry.pixels, FLAT_BLOCK))
    for (shift, bits), histogram in zip(levels, histograms, strict=True):
        level = {"selection": selection, "histogram": histogram, "SHIFT": shift, "BITS": bits}
        call.run(ohem.count, programs, **level)
        call.run(ohem.choose, 1, **level)
    call.run_dense(ohem.sum_kept, selection=selection, summary=summary, partials=partials)


def loss_backward(
    grad_total: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    selected: Tensor,
    summary: Tensor,
    *arguments: Any,
) -> Tensor:
    """The kernel of bcmf::loss_triton_backward; arguments: LossOptions."""
    options = LossOptions(*arguments)
    with on_device(logits):
        call = Call(logits, target, weight, options)
        geometry, new, acc = call.geometry, call.new, call.acc
        check_kept(call, grad_total, stats, selected, summary)
        grad = torch.empty_like(logits, memory_format=torch.preserve_format)
        if geometry.pixels == 0:
            return grad.zero_()
        sink = make_sink(call, grad)
        call.arguments |= {
            "grad_total": grad_total.to(acc).contiguous(),
            "stats": stats.contiguous(),
            "selected": selected.contiguous(),
            "summary": summary.contiguous(),
            "shares": new(target.shape, dtype=acc).zero_() if call.cpg else stats,
            "grad": Map(sink, *sink.stride()[:4]),
        }
        if call.cpg:
            call.run_cpg(SHARES)
        call.run_dense(backward)
        if call.cpg:
            call.run_cpg(GRADIENT)
        if sink is not grad:
            to = {"sums": call.arguments["grad"], "grad": Map(grad, *grad.stride()), "count": grad.numel()}
            rows, columns = (2 * most for most in geometry.most)
            gather = quads.join_quads if geometry.mode == QUADS.value else quads.gather_pixels
            programs = triton.cdiv(grad.numel(), GATHER_BLOCK)
            call.run(gather, programs, **to, most_rows=rows, most_columns=columns, BLOCK=GATHER_BLOCK)
        return grad


def make_sink(call: Call, grad: Tensor) -> Tensor:
    """Where gradients go first: to their tensor, or on the way back to logits of another size."""
    geometry, planes = call.geometry, grad.shape[:2]
    if geometry.mode == DIRECT.value:
        return grad
    if geometry.mode == ANY.value:
        return call.new((*planes, *call.target.shape[1:]), dtype=call.acc)
    down = (geometry.size.rows + 1) * geometry.down.parts
    return call.new((*planes, 4, down, (geometry.size.columns + 1) * geometry.across.parts), dtype=call.acc)


def check_kept(call: Call, grad_total: Tensor, stats: Tensor, selected: Tensor, summary: Tensor) -> None:
    """What the backward gets of the forward."""
    shape, device = call.target.shape, call.target.device
    kept = (stats.shape, stats.dtype), (summary.shape, summary.dtype), (selected.shape, selected.dtype)
    images = shape[0] if call.steps else 0
    if kept != (((2, *shape), call.acc), ((SUMMARY,), call.acc), ((images, *shape[1:]), torch.uint8)):
        raise ValueError("bcmf::loss_triton_backward takes stats, selected and summary as bcmf::loss returned them.")
    if grad_total.numel() != 1 or any(t.device != device for t in (grad_total, stats, selected, summary)):
        raise ValueError("bcmf::loss_triton_backward takes one upstream gradient, and all tensors on one device.")
