"""BCL: the score of a pixel, which scores are maxima, and the scale of the selected pixels' gradients
(csrc/cuda/kernels/bcl.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    BCL_SUMS,
    DIRECT,
    IGNORED,
    Partials,
    Pixels,
    class_at,
    place_of,
    ratio,
    stats_at,
    store_partial,
    unpack_labels,
    unpack_logits,
)
from .geometry import flip, tile_of
from .integers import unpack
from .logits import entry


@triton.jit
def flipped_labels(labels, size, pixels, asked, STEP: tl.constexpr):
    """The classes that the two flips of a step bring to pixels: rows swapped, columns swapped."""
    n, y, x, _ = pixels
    by_rows = class_at(labels, Pixels(n, flip(y, STEP, size.height), x, asked), size.classes)
    by_columns = class_at(labels, Pixels(n, y, flip(x, STEP, size.width), asked), size.classes)
    return by_rows, by_columns


@triton.jit
def loss_of(logits, pixels, stats, c, asked, READ: tl.constexpr):
    """ℓ[c] of pixels, 0 of those that are not asked for."""
    known = asked & (c >= 0)
    z = entry(logits, Pixels(pixels.n, pixels.y, pixels.x, known), tl.where(known, c, 0), READ)
    return tl.where(known, (stats.m - z) + stats.log_sum, 0.0)


@triton.jit
def score_of(logits, labels, pixels, stats, label, nll, STEP: tl.constexpr, READ: tl.constexpr):
    """q: the largest of a pixel's three losses; −1 where one of the labels is ignored."""
    by_rows, by_columns = flipped_labels(labels, logits.size, pixels, label >= 0, STEP)
    q = nll
    loss = loss_of(logits, pixels, stats, by_rows, by_rows != label, READ)
    q = tl.where(loss > q, loss, q)
    loss = loss_of(logits, pixels, stats, by_columns, by_columns != label, READ)
    q = tl.where(loss > q, loss, q)
    return tl.where((label < 0) | (by_rows == IGNORED) | (by_columns == IGNORED), -1.0, q)


@triton.jit
def bcl_select(
    logits, labels, stats, scores, selected, partials, nms_radius, least_score: tl.float64, alpha: tl.float64,
    beta: tl.float64, READ: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A bit per step in `selected`; and by step partial sums of what is supervised, and of pixels."""
    tile = tl.program_id(0)
    logits, labels = unpack_logits(logits), unpack_labels(labels)
    partials = Partials(partials.data, unpack(partials.length))
    nms_radius = unpack(nms_radius)
    size = logits.size
    pixels = tile_of(tile, logits, DIRECT, TILE)
    _, y, x, inside = pixels
    place = place_of(size, pixels)
    own = stats_at(stats, size, pixels)
    down_reach = tl.minimum(nms_radius, size.height - 1)
    across_reach = tl.minimum(nms_radius, size.width - 1)
    bits = tl.full([TILE.ROWS, TILE.SPANS, TILE.SPAN], 0, tl.int32)
    for i in tl.static_range(len(TERMS.STEPS)):
        image = scores + i * tl.cast(size.pixels, tl.int64) + place
        q = tl.load(image, mask=inside, other=-1)
        found = (q > tl.full((), least_score, READ.ACC)) | (q != q)
        sums = tl.full([TILE.ROWS, TILE.SPANS, TILE.SPAN], 0, READ.ACC)
        if tl.max(found.to(tl.int32)) > 0:
            pooled = q
            for v in range(-down_reach, down_reach + 1):
                for u in range(-across_reach, across_reach + 1):
                    there = found & (y + v >= 0) & (y + v < size.height) & (x + u >= 0) & (x + u < size.width)
                    near = tl.load(image + (tl.cast(v, tl.int64) * size.width + u), mask=there, other=-1)
                    pooled = tl.where((near > pooled) | (near != near), near, pooled)  # NaN is larger than all
            found = found & ((q == pooled) | (q != q))
            if TERMS.FLIPPED:
                by_rows, by_columns = flipped_labels(labels, size, pixels, found, TERMS.STEPS[i])
                by_rows_loss = loss_of(logits, pixels, own, by_rows, found, READ)
                by_columns_loss = loss_of(logits, pixels, own, by_columns, found, READ)
                sums = tl.full((), alpha, READ.ACC) * by_rows_loss + tl.full((), beta, READ.ACC) * by_columns_loss
            else:
                label = class_at(labels, Pixels(pixels.n, y, x, found), size.classes)
                sums = loss_of(logits, pixels, own, label, found, READ)
        bits |= found.to(tl.int32) << i
        store_partial(partials, BCL_SUMS + 2 * i, tile, sums)
        store_partial(partials, BCL_SUMS + 2 * i + 1, tile, found.to(READ.ACC))
    tl.store(selected + place, bits.to(tl.uint8), mask=inside)


@triton.jit
def bcl_scale(upstream, counted, bcl_weight, ACC: tl.constexpr, TERMS: tl.constexpr):
    """Derivative of the total by a selected pixel's loss; `counted` is what its step is averaged over."""
    share = ratio(tl.full((), bcl_weight, ACC), tl.full((), len(TERMS.STEPS), ACC))
    return ratio(tl.load(upstream.grad_total) * share, counted)
