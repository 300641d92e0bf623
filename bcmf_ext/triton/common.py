"""What all kernels share: their arguments' meaning, and how labels are read (csrc/device/common.cuh).

Tensors come as tuples with their strides. All is 64 bit where they may have more than 2³¹ entries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Labels that are no class. The loss over a bad one becomes NaN: nobody looks from the host.
IGNORED = tl.constexpr(-1)
BAD = tl.constexpr(-2)  # neither a class nor ignore_index

# MODE: where logits come from.
DIRECT = tl.constexpr(0)  # one for each label pixel
QUADS = tl.constexpr(1)  # few for many: a tile consists of the pixels between four neighbours, which are read once
ANY = tl.constexpr(2)  # of any other size: each pixel reads the four around it

MIXED = tl.constexpr(0x5A5A5A5A5A5A5A5A)  # see launch.bits_of

# Entries of `summary`: what the means are taken over, and the smallest loss that OHEM keeps.
DENOMINATOR, CUTOFF, VALID, EDGES, SELECTED = (tl.constexpr(entry) for entry in range(5))


class Map(NamedTuple):
    """(N, C, h, w) of any strides; of gradients, too."""

    data: Any
    stride_n: Any
    stride_c: Any
    stride_h: Any
    stride_w: Any


class Labels(NamedTuple):
    """(N, H, W) of any strides."""

    data: Any
    stride_n: Any
    stride_h: Any
    stride_w: Any


class Size(NamedTuple):
    """C, H and W of the labels, h and w of the logits."""

    classes: Any
    height: Any
    width: Any
    rows: Any
    columns: Any


class Axis(NamedTuple):
    """Bilinear resampling along an axis: pixel i lies between logits first[i] and, if there is one, the next, of which
    it takes weight[i]. The pixels of quad k, between logits k and k + 1, begin at start[k + 1]; quad −1 lies before the
    first logit. A quad is cut into `parts` pieces of as many pixels as a tile has room for."""

    first: Any
    weight: Any
    start: Any
    parts: Any


@triton.jit
def double(bits):
    """The fp64 number that came as an integer, because Triton makes fp32 of float arguments."""
    return (bits.to(tl.int64) ^ MIXED).to(tl.float64, bitcast=True)


@triton.jit
def ratio(numerator, denominator):
    """Their quotient, rounded correctly; 0 where the denominator is."""
    safe = tl.where(denominator == 0, 1.0, denominator)
    quotient = numerator / safe if numerator.dtype == tl.float64 else tl.div_rn(numerator, safe)
    return tl.where(denominator == 0, 0.0, quotient)


@triton.jit
def class_at(labels, n, y, x, inside, classes, ignore_index):
    """Classes in int32, or IGNORED or BAD. Widened to 64 bit before any comparison."""
    offsets = tl.cast(n, tl.int64) * labels.stride_n + y.to(tl.int64) * labels.stride_h
    label = tl.load(labels.data + offsets + x.to(tl.int64) * labels.stride_w, mask=inside, other=0).to(tl.int64)
    found = tl.where((label >= 0) & (label < classes), label, BAD).to(tl.int32)
    return tl.where(inside & (label != ignore_index), found, IGNORED)


@triton.jit
def pixel_at(size, n, y, x):
    """Where a pixel lies in a contiguous map (N, H, W)."""
    return (tl.cast(n, tl.int64) * size.height + y) * size.width + x
