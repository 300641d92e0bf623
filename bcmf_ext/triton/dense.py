"""The steps that read all logits: `dense_forward` and `dense_backward` (csrc/cuda/kernels/dense.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from .bcl import loss_of, score_of
from .common import (
    BAD,
    BCL_SUMS,
    CE_COUNT,
    CE_SUM,
    IGNORED,
    QUADS,
    VALID_PIXELS,
    Partials,
    Pixels,
    Stats,
    class_at,
    place_of,
    stats_at,
    store_counts,
    store_partial,
    unpack_labels,
    unpack_logits,
    unpack_map,
)
from .geometry import tile_of
from .gradient import Asked, TermWeights, asked_of, gradient_of, store_gradient
from .integers import unpack
from .logits import group, places_of
from .low_gather import add_to_quads, corner_weights
from .ohem import key_of, weight_of


@triton.jit
def dense_forward(
    logits, labels, weight, ids, stats, nll, scores, partials, exceeds: tl.float64,
    READ: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The ids of labels, which all later kernels read instead of them; `stats`; with OHEM the losses, −1 where ignored;
    the scores of each of BCL's steps; and partial sums."""
    tile = tl.program_id(0)
    logits, labels = unpack_logits(logits), unpack_labels(labels)
    partials = Partials(partials.data, unpack(partials.length))
    size = logits.size
    pixels = tile_of(tile, logits, READ.MODE, TILE)
    places = places_of(tile, logits, pixels, READ, TILE)
    m = tl.full([TILE.ROWS, TILE.SPANS, TILE.SPAN], float("-inf"), READ.ACC)
    total = tl.full([TILE.ROWS, TILE.SPANS, TILE.SPAN], 0, READ.ACC)
    for first in range(0, size.classes, TILE.GROUP):
        z = group(logits, pixels, places, first, READ, TILE)
        largest = tl.maximum(m, tl.max(z, 0))  # leaves NaN out
        base = tl.where(largest == float("-inf"), 0.0, largest)  # −inf − −inf would be NaN
        total = total * tl.exp(m - base) + tl.sum(tl.exp(z - base[None]), 0)
        m = largest
    log_sum = tl.log(total)
    place = place_of(size, pixels)
    tl.store(stats + place, m, mask=pixels.inside)
    tl.store(stats + size.pixels + place, log_sum, mask=pixels.inside)

    own = Stats(m, log_sum)
    label = class_at(labels, pixels, size.classes)
    tl.store(ids + place, label.to(ids.dtype.element_ty), mask=pixels.inside)
    loss = loss_of(logits, pixels, own, label, pixels.inside, READ)
    loss = tl.where(label == BAD, float("nan"), loss)
    valid = label != IGNORED
    w = weight_of(weight, label, READ.ACC, TERMS)
    if TERMS.CE:
        store_partial(partials, CE_SUM, tile, tl.where(valid, w * loss, 0.0))
        store_partial(partials, CE_COUNT, tile, tl.where(valid, w, 0.0))
    store_counts(partials, VALID_PIXELS, tile, valid, label == BAD)
    if TERMS.OHEM:
        tl.store(nll + place, tl.where(valid, loss, -1.0), mask=pixels.inside)
        hard = valid & (key_of(loss) >= key_of(tl.full((), exceeds, READ.ACC)))
        store_partial(partials, BCL_SUMS + 2 * len(TERMS.STEPS), tile, hard.to(READ.ACC))
    for i in tl.static_range(len(TERMS.STEPS)):
        q = score_of(logits, labels, pixels, own, label, loss, TERMS.STEPS[i], READ)
        tl.store(scores + i * tl.cast(size.pixels, tl.int64) + place, q, mask=pixels.inside)


@triton.jit
def dense_backward(
    logits, labels, upstream, grad, bcl_weight: tl.float64, alpha: tl.float64, beta: tl.float64,
    READ: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The gradient by logits of the labels' size, but for what `sparse_backward` adds; in mode QUADS, summed up for the
    corners of quads."""
    tile = tl.program_id(0)
    logits, labels, grad = unpack_logits(logits), unpack_labels(labels), unpack_map(grad)
    weights, size = TermWeights(bcl_weight, alpha, beta), logits.size
    pixels = tile_of(tile, logits, READ.MODE, TILE)
    places = places_of(tile, logits, pixels, READ, TILE)
    own = stats_at(upstream.stats, size, pixels)
    asked = asked_of(logits, labels, pixels, upstream, weights, READ, TERMS)
    # The same, with an axis of classes before the others.
    asked = Asked(asked.label[None], asked.selected[None], asked.pull[None], asked.factor[None])
    of_classes = Pixels(pixels.n, pixels.y[None], pixels.x[None], pixels.inside[None])
    if READ.MODE == QUADS:
        corners = corner_weights(tile, logits, pixels, TILE)
    for first in range(0, size.classes, TILE.GROUP):
        z = group(logits, pixels, places, first, READ, TILE)
        c = first + tl.arange(0, TILE.GROUP)[:, None, None, None]
        p = tl.exp((z - own.m[None]) - own.log_sum[None])
        value = gradient_of(c, p, asked, labels, size, of_classes, upstream, weights, READ.ACC, TERMS)
        if READ.MODE == QUADS:
            value = tl.where(of_classes.inside, value, 0.0)
            add_to_quads(grad, tile, logits, first + tl.arange(0, TILE.GROUP)[:, None], value, corners, TILE, False)
        else:
            store_gradient(grad, of_classes, c, value, of_classes.inside & (c < size.classes))
