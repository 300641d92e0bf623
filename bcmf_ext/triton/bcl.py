"""BCL: the score of a pixel, which scores are maxima, and what the selected pixels add to the gradient
(csrc/device/bcl.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import DIRECT, IGNORED, class_at, double, pixel_at, ratio
from .geometry import flip, tile_of
from .logits import entry


@triton.jit
def flipped(labels, size, n, y, x, inside, ignore_index, STEP: tl.constexpr):
    """The classes that the two flips of a step bring to pixels: rows swapped, columns swapped."""
    by_rows = class_at(labels, n, flip(y, STEP, size.height), x, inside, size.classes, ignore_index)
    by_columns = class_at(labels, n, y, flip(x, STEP, size.width), inside, size.classes, ignore_index)
    return by_rows, by_columns


@triton.jit
def loss_of(
    logits, size, down, across, n, y, x, c, inside, m, log_sum, ACC: tl.constexpr, MODE: tl.constexpr
):  # fmt: skip
    """ℓ[c] of pixels, 0 where not inside."""
    known = inside & (c >= 0)
    z = entry(logits, size, down, across, n, y, x, tl.where(known, c, 0), known, ACC, MODE)
    return tl.where(known, (m - z) + log_sum, 0.0)


@triton.jit
def score(
    logits, labels, size, down, across, n, y, x, label, nll, m, log_sum, ignore_index,
    STEP: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """q: the largest of a pixel's three losses; −1 where one of the labels is ignored."""
    by_rows, by_columns = flipped(labels, size, n, y, x, label >= 0, ignore_index, STEP)
    q = nll
    loss = loss_of(logits, size, down, across, n, y, x, by_rows, by_rows != label, m, log_sum, ACC, MODE)
    q = tl.where(loss > q, loss, q)
    loss = loss_of(logits, size, down, across, n, y, x, by_columns, by_columns != label, m, log_sum, ACC, MODE)
    q = tl.where(loss > q, loss, q)
    return tl.where((label < 0) | (by_rows == IGNORED) | (by_columns == IGNORED), -1.0, q)


@triton.jit(do_not_specialize=["ignore_index", "least_score", "alpha", "beta"])
def select_maxima(
    logits, labels, size, down, across, stats, scores, selected, partials, length, pixels,
    ignore_index, nms_radius, least_score, alpha, beta,
    ACC: tl.constexpr, MODE: tl.constexpr, STEPS: tl.constexpr, FLIPPED: tl.constexpr,
    ROWS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A bit per step in `selected`; and by step partial sums of what is supervised, and of pixels."""
    n, y, x, inside = tile_of(tl.program_id(0), size, down, across, DIRECT, ROWS, SPANS, SPAN)
    pixel = pixel_at(size, n, y, x)
    m = tl.load(stats + pixel, mask=inside, other=0)
    log_sum = tl.load(stats + pixels + pixel, mask=inside, other=0)
    down_reach = tl.minimum(nms_radius, size.height - 1)
    across_reach = tl.minimum(nms_radius, size.width - 1)
    bits = tl.zeros([ROWS, SPANS, SPAN], tl.int32)
    for i in tl.static_range(len(STEPS)):
        image = scores + i * tl.cast(pixels, tl.int64) + pixel
        q = tl.load(image, mask=inside, other=-1)
        found = (q > double(least_score).to(ACC)) | (q != q)
        sums = tl.zeros([ROWS, SPANS, SPAN], ACC)
        if tl.max(found.to(tl.int32)) > 0:
            pooled = q
            for v in range(-down_reach, down_reach + 1):
                for u in range(-across_reach, across_reach + 1):
                    there = found & (y + v >= 0) & (y + v < size.height) & (x + u >= 0) & (x + u < size.width)
                    near = tl.load(image + (tl.cast(v, tl.int64) * size.width + u), mask=there, other=-1)
                    pooled = tl.where((near > pooled) | (near != near), near, pooled)  # NaN is larger than all
            found = found & ((q == pooled) | (q != q))
            if FLIPPED:
                by_rows, by_columns = flipped(labels, size, n, y, x, found, ignore_index, STEPS[i])
                sums = double(alpha).to(ACC) * loss_of(
                    logits, size, down, across, n, y, x, by_rows, found, m, log_sum, ACC, MODE
                ) + double(beta).to(ACC) * loss_of(
                    logits, size, down, across, n, y, x, by_columns, found, m, log_sum, ACC, MODE
                )
            else:
                label = class_at(labels, n, y, x, found, size.classes, ignore_index)
                sums = loss_of(logits, size, down, across, n, y, x, label, found, m, log_sum, ACC, MODE)
        bits |= found.to(tl.int32) << i
        tl.store(partials + 2 * i * length + tl.program_id(0), tl.sum(sums).to(tl.float64))
        tl.store(partials + (2 * i + 1) * length + tl.program_id(0), tl.sum(found.to(ACC)).to(tl.float64))
    tl.store(selected + pixel, bits.to(tl.uint8), mask=inside)


@triton.jit
def bcl_scale(grad_total, counted, bcl_weight, ACC: tl.constexpr, STEPS: tl.constexpr):
    """Derivative of the total by a selected pixel's loss; `counted` is what its step is averaged over."""
    share = ratio(double(bcl_weight).to(ACC), tl.full((), len(STEPS), ACC))
    return ratio(tl.load(grad_total) * share, counted)
