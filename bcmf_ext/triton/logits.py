"""How logits are read: one by one, or for a tile and some classes at once; directly, or resampled bilinearly."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import DIRECT, QUADS
from .geometry import quads_of


@triton.jit
def mix(a, b, weight):
    """(1 − weight) · a + weight · b, and nothing of b where its weight is 0. Which product is rounded is said here, and
    kernels are compiled without fusing others, so that a logit has the same bits wherever it is looked at."""
    return tl.where(weight == 0, a, tl.fma(weight, b, (1 - weight) * a))


@triton.jit
def entry(logits, size, down, across, n, y, x, c, inside, ACC: tl.constexpr, MODE: tl.constexpr):
    """Single logits, of class c at pixel (y, x) of image n."""
    base = logits.data + tl.cast(n, tl.int64) * logits.stride_n + tl.cast(c, tl.int64) * logits.stride_c
    if MODE == DIRECT:
        at = base + y.to(tl.int64) * logits.stride_h + x.to(tl.int64) * logits.stride_w
        z = tl.load(at, mask=inside, other=0).to(ACC)
    else:
        upper = tl.load(down.first + y, mask=inside, other=0)
        left = tl.load(across.first + x, mask=inside, other=0)
        above = base + upper.to(tl.int64) * logits.stride_h
        below = base + tl.minimum(upper + 1, size.rows - 1).to(tl.int64) * logits.stride_h
        right = tl.minimum(left + 1, size.columns - 1).to(tl.int64) * logits.stride_w
        left = left.to(tl.int64) * logits.stride_w
        weight = tl.load(across.weight + x, mask=inside, other=0)
        z = mix(
            mix(
                tl.load(above + left, mask=inside, other=0).to(ACC),
                tl.load(above + right, mask=inside, other=0).to(ACC),
                weight,
            ),
            mix(
                tl.load(below + left, mask=inside, other=0).to(ACC),
                tl.load(below + right, mask=inside, other=0).to(ACC),
                weight,
            ),
            tl.load(down.weight + y, mask=inside, other=0),
        )
    return z


@triton.jit
def places_of(tile, logits, size, down, across, y, x, MODE: tl.constexpr, SPANS: tl.constexpr):
    """Where the logits of a tile lie, as offsets into an image's class: `group` takes this.

    DIRECT: (ROWS, SPANS, SPAN) of them. Otherwise those of the row above and below, of the column to the left and to
    the right, and the weights of the latter of each.
    """
    if MODE == DIRECT:
        places = (y.to(tl.int64) * logits.stride_h + x.to(tl.int64) * logits.stride_w,)
    else:
        if MODE == QUADS:
            _, piece, first_piece = quads_of(tile, size, down, across, SPANS)
            pieces = first_piece + tl.arange(0, SPANS)[None, :, None]
            upper = tl.maximum(piece // down.parts - 1, 0)
            left = tl.minimum(tl.maximum(pieces // across.parts - 1, 0), size.columns - 1)
        else:
            upper = tl.load(down.first + y, mask=y < size.height, other=0)
            left = tl.load(across.first + x, mask=x < size.width, other=0)
        lower = tl.minimum(upper + 1, size.rows - 1)
        right = tl.minimum(left + 1, size.columns - 1)
        places = (  # type: ignore[assignment]  # Triton's types are others
            upper.to(tl.int64) * logits.stride_h,
            lower.to(tl.int64) * logits.stride_h,
            left.to(tl.int64) * logits.stride_w,
            right.to(tl.int64) * logits.stride_w,
            tl.load(down.weight + y, mask=y < size.height, other=0),
            tl.load(across.weight + x, mask=x < size.width, other=0),
        )
    return places


@triton.jit
def group(
    logits, n, places, first, classes, inside,
    ACC: tl.constexpr, MODE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Logits (GROUP, ROWS, SPANS, SPAN) of the classes from `first` on, −inf for one that does not exist."""
    c = first + tl.arange(0, GROUP)[:, None, None, None]
    exists = c < classes
    base = logits.data + tl.cast(n, tl.int64) * logits.stride_n + c.to(tl.int64) * logits.stride_c
    if MODE == DIRECT:
        z = tl.load(base + places[0][None], mask=exists & inside[None], other=0).to(ACC)
    else:
        upper, lower, left, right, down_weight, across_weight = places
        above = mix(
            tl.load(base + (upper + left)[None], mask=exists, other=0).to(ACC),
            tl.load(base + (upper + right)[None], mask=exists, other=0).to(ACC),
            across_weight[None],
        )
        below = mix(
            tl.load(base + (lower + left)[None], mask=exists, other=0).to(ACC),
            tl.load(base + (lower + right)[None], mask=exists, other=0).to(ACC),
            across_weight[None],
        )
        z = mix(above, below, down_weight[None])
    return tl.where(exists, z, float("-inf"))
