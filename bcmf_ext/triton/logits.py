"""How logits are read: one by one, or for a tile and some classes at once; directly, or resampled bilinearly
(csrc/cuda/kernels/logits.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import DIRECT, QUADS
from .geometry import pieces_of


@triton.jit
def mix(a, b, weight):
    """(1 − weight) · a + weight · b, and nothing of b where its weight is 0. Which product is rounded is said here, and
    kernels are compiled without fusing others, so that a logit has the same bits wherever it is looked at."""
    return tl.where(weight == 0, a, tl.fma(weight, b, (1 - weight) * a))


@triton.jit
def entry(logits, pixels, c, READ: tl.constexpr):
    """Single logits, of class c; 0 for a pixel that does not exist."""
    map, size, inside = logits.map, logits.size, pixels.inside
    base = map.data + tl.cast(pixels.n, tl.int64) * map.stride_n + tl.cast(c, tl.int64) * map.stride_c
    if READ.MODE == DIRECT:
        at = base + pixels.y.to(tl.int64) * map.stride_h + pixels.x.to(tl.int64) * map.stride_w
        z = tl.load(at, mask=inside, other=0).to(READ.ACC)
    else:
        upper = tl.load(logits.down.first + pixels.y, mask=inside, other=0)
        left = tl.load(logits.across.first + pixels.x, mask=inside, other=0)
        above = base + upper.to(tl.int64) * map.stride_h
        below = base + tl.minimum(upper + 1, size.rows - 1).to(tl.int64) * map.stride_h
        right = tl.minimum(left + 1, size.columns - 1).to(tl.int64) * map.stride_w
        left = left.to(tl.int64) * map.stride_w
        weight = tl.load(logits.across.weight + pixels.x, mask=inside, other=0)
        z = mix(
            mix(
                tl.load(above + left, mask=inside, other=0).to(READ.ACC),
                tl.load(above + right, mask=inside, other=0).to(READ.ACC),
                weight,
            ),
            mix(
                tl.load(below + left, mask=inside, other=0).to(READ.ACC),
                tl.load(below + right, mask=inside, other=0).to(READ.ACC),
                weight,
            ),
            tl.load(logits.down.weight + pixels.y, mask=inside, other=0),
        )
    return z


@triton.jit
def places_of(tile, logits, pixels, READ: tl.constexpr, TILE: tl.constexpr):
    """Where the logits of a tile lie, as offsets into an image's class: `group` takes this.

    In mode DIRECT there are (ROWS, SPANS, SPAN) of them. Otherwise they are those of the row above and below, of the
    column to the left and to the right, and the weights of the latter of each.
    """
    map, size, down, across = logits
    if READ.MODE == DIRECT:
        places = (pixels.y.to(tl.int64) * map.stride_h + pixels.x.to(tl.int64) * map.stride_w,)
    else:
        if READ.MODE == QUADS:
            _, piece, first_piece = pieces_of(tile, logits, TILE)
            pieces = first_piece + tl.arange(0, TILE.SPANS)[None, :, None]
            upper = tl.maximum(piece // down.parts - 1, 0)
            left = tl.minimum(tl.maximum(pieces // across.parts - 1, 0), size.columns - 1)
        else:
            upper = tl.load(down.first + pixels.y, mask=pixels.y < size.height, other=0)
            left = tl.load(across.first + pixels.x, mask=pixels.x < size.width, other=0)
        lower = tl.minimum(upper + 1, size.rows - 1)
        right = tl.minimum(left + 1, size.columns - 1)
        places = (  # type: ignore[assignment]  # Triton's types are others
            upper.to(tl.int64) * map.stride_h,
            lower.to(tl.int64) * map.stride_h,
            left.to(tl.int64) * map.stride_w,
            right.to(tl.int64) * map.stride_w,
            tl.load(down.weight + pixels.y, mask=pixels.y < size.height, other=0),
            tl.load(across.weight + pixels.x, mask=pixels.x < size.width, other=0),
        )
    return places


@triton.jit
def group(logits, pixels, places, first, READ: tl.constexpr, TILE: tl.constexpr):
    """Logits (GROUP, ROWS, SPANS, SPAN) of the classes from `first` on, −inf for one that does not exist."""
    map = logits.map
    c = first + tl.arange(0, TILE.GROUP)[:, None, None, None]
    exists = c < logits.size.classes
    base = map.data + tl.cast(pixels.n, tl.int64) * map.stride_n + c.to(tl.int64) * map.stride_c
    if READ.MODE == DIRECT:
        z = tl.load(base + places[0][None], mask=exists & pixels.inside[None], other=0).to(READ.ACC)
    else:
        upper, lower, left, right, down_weight, across_weight = places
        above = mix(
            tl.load(base + (upper + left)[None], mask=exists, other=0).to(READ.ACC),
            tl.load(base + (upper + right)[None], mask=exists, other=0).to(READ.ACC),
            across_weight[None],
        )
        below = mix(
            tl.load(base + (lower + left)[None], mask=exists, other=0).to(READ.ACC),
            tl.load(base + (lower + right)[None], mask=exists, other=0).to(READ.ACC),
            across_weight[None],
        )
        z = mix(above, below, down_weight[None])
    return tl.where(exists, z, float("-inf"))
