"""What the kernels' arguments mean, and how a label is read (csrc/common/args.h).

What belongs together travels in a named tuple. Its integers are packed where a kernel is launched and unpacked where it
begins (see integers.py). Offsets have 64 bits wherever a tensor may have more than 2³¹ entries.
Fields in capitals are known when a kernel is compiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import Sum, Summary
from ..options import TERMS as TERM_NAMES
from .integers import multiple_of, pack, pack_known_one, unpack, unpack_side

# Labels that are no class. The loss over a bad one becomes NaN, because the host never looks at labels.
IGNORED = tl.constexpr(-1)
BAD = tl.constexpr(-2)  # neither a class nor ignore_index

# Reading.MODE: which logits a label pixel is read from.
DIRECT = tl.constexpr(0)  # its own
QUADS = tl.constexpr(1)  # few for many pixels: a tile lies between four neighbouring logits, which are read once
ANY = tl.constexpr(2)  # a map of any other size: each pixel reads the four logits around it


def numbered(entries: Iterable[object]) -> tuple[tl.constexpr, ...]:
    """The numbers of the entries of a tensor, for kernels."""
    return tuple(tl.constexpr(number) for number, _ in enumerate(entries))


# These are the entries of `sums`, each with a row of its own in the table of partial sums, in which how many losses are
# above OHEM's threshold has the last row; those of `summary`, which the backward reads on the device; and of `terms`.
CE_SUM, CE_COUNT, VALID_PIXELS, BAD_LABELS, CPG_SUM, CPG_COUNT, BCL_SUMS = numbered(Sum)
DENOMINATOR, CUTOFF, VALID, EDGES, SELECTED = numbered(Summary)
CE, BCL, CPG = numbered(TERM_NAMES)


# --------------------------------------------------------------------------------------------------------------------
# Tuples that are known when a kernel is compiled


class Reading(NamedTuple):
    """How a kernel reads logits: from where (MODE), and in which dtype it computes."""

    MODE: int
    ACC: Any


class TermFlags(NamedTuple):
    """The terms of a loss, and how they are computed. STEPS are those of BCL; there are none without it."""

    CE: bool
    WEIGHTED: bool
    OHEM: bool
    STEPS: tuple[int, ...]
    FLIPPED: bool
    CPG: bool


def sum_rows(terms: TermFlags) -> int:
    """How many entries of `sums` are asked for; the row of the number of hard losses comes after theirs."""
    return BCL_SUMS.value + 2 * len(terms.STEPS)


class TileShape(NamedTuple):
    """A tile of ROWS × SPANS × SPAN label pixels, and the classes whose logits are read together."""

    ROWS: int
    SPANS: int
    SPAN: int
    GROUP: int


# --------------------------------------------------------------------------------------------------------------------
# Tuples that kernels get


class Map(NamedTuple):
    """Logits or their gradient, (N, C, h, w) of any strides, in entries. Known are the axis along which neighbours are
    `adjacent` in memory (3, 1, or −1 for neither), and what all other strides are a `multiple` of."""

    data: Any
    stride_n: Any
    stride_c: Any
    stride_h: Any
    stride_w: Any
    adjacent: Any
    multiple: Any


def pack_map(tensor: Tensor, by_rows: bool = False) -> Map:
    """A map for a kernel. by_rows: it works on rows of neighbours."""
    strides, width = tensor.stride(), tensor.shape[3]
    in_rows = strides[3] == 1 or (width == 1 and strides[1] != 1)  # an axis of length 1 may have any stride
    adjacent = 3 if in_rows else 1 if strides[1] == 1 else -1
    multiple = multiple_of(by_rows, *(stride for axis, stride in enumerate(strides) if axis != adjacent))
    n, c, h, w = (pack(stride // multiple) for stride in strides)
    return Map(tensor, n, c, h, w, tl.constexpr(adjacent), tl.constexpr(multiple))


@triton.jit
def unpack_map(map):
    """The map with its strides as they are."""
    return Map(
        map.data,
        unpack(map.stride_n, map.multiple),
        1 if map.adjacent == 1 else unpack(map.stride_c, map.multiple),
        unpack(map.stride_h, map.multiple),
        1 if map.adjacent == 3 else unpack(map.stride_w, map.multiple),
        map.adjacent,
        map.multiple,
    )


class Labels(NamedTuple):
    """(N, H, W) of any strides, in entries. Known are whether columns are `adjacent` in memory, and what the other
    strides are a `multiple` of."""

    data: Any
    stride_n: Any
    stride_h: Any
    stride_w: Any
    ignore_index: Any
    adjacent: Any
    multiple: Any


def pack_labels(target: Tensor, ignore_index: int, by_rows: bool) -> Labels:
    """Labels for a kernel. by_rows: it works on rows of neighbours."""
    *others, last = target.stride()
    adjacent = last == 1 or target.shape[2] == 1  # an axis of length 1 may have any stride
    multiple = multiple_of(by_rows and adjacent, *others)
    n, h, w = (pack(stride // multiple) for stride in target.stride())
    return Labels(target, n, h, w, ignore_index, tl.constexpr(adjacent), tl.constexpr(multiple))


def pack_ids(ids: Tensor, by_rows: bool) -> Labels:
    """The ids of labels (see ops.id_dtype) for a kernel, as labels."""
    return pack_labels(ids, IGNORED.value & 255 if ids.dtype == torch.uint8 else IGNORED.value, by_rows)


@triton.jit
def unpack_labels(labels):
    """The labels with their strides and ignore_index as they are."""
    return Labels(
        labels.data,
        unpack(labels.stride_n, labels.multiple),
        unpack(labels.stride_h, labels.multiple),
        1 if labels.adjacent else unpack(labels.stride_w),
        labels.ignore_index,
        labels.adjacent,
        labels.multiple,
    )


class Size(NamedTuple):
    """C, H and W of the labels, h and w of the logits, and N · H · W. Known are what W and N · H · W are a multiple of
    (`width_multiple`), and what w is (`columns_multiple`)."""

    classes: Any
    height: Any
    width: Any
    rows: Any
    columns: Any
    pixels: Any
    width_multiple: Any = 1
    columns_multiple: Any = 1


def pack_size(size: Size, by_rows: bool = False, by_cells: bool = False) -> Size:
    """Sizes for a kernel. by_rows (by_cells): it works on rows of neighbouring pixels (logits)."""
    width, columns = multiple_of(by_rows, size.width, size.pixels), multiple_of(by_cells, size.columns)
    return Size(
        size.classes, pack(size.height), pack(size.width // width), pack(size.rows), pack(size.columns // columns),
        pack(size.pixels // width), tl.constexpr(width), tl.constexpr(columns),
    )  # fmt: skip


@triton.jit
def unpack_size(size):
    """The sizes as they are."""
    return Size(
        size.classes,
        unpack_side(size.height),
        unpack_side(size.width, size.width_multiple),
        unpack_side(size.rows),
        unpack_side(size.columns, size.columns_multiple),
        unpack(size.pixels, size.width_multiple),
        size.width_multiple,
        size.columns_multiple,
    )


class Axis(NamedTuple):
    """Bilinear resampling along an axis: pixel i lies between logits first[i] and, if there is one, the next, of which
    it takes weight[i]. The pixels of quad k, between logits k and k + 1, begin at start[k + 1]; quad −1 lies before the
    first logit. A quad is cut into `parts` pieces of as many pixels as a tile has room for; that there is one is
    known."""

    first: Any
    weight: Any
    start: Any
    parts: Any


def pack_axis(axis: Axis) -> Axis:
    """Packs an axis for a kernel."""
    return axis._replace(parts=pack_known_one(axis.parts))


@triton.jit
def unpack_axis(axis):
    """The axis with the number of its parts as it is."""
    return Axis(axis.first, axis.weight, axis.start, unpack(axis.parts))


class Logits(NamedTuple):
    """A map of logits, and which label pixels it is read for: `size`, and resampling down and across."""

    map: Any
    size: Any
    down: Any
    across: Any


@triton.jit
def unpack_logits(logits):
    """The logits with their map, sizes and axes unpacked."""
    return Logits(
        unpack_map(logits.map), unpack_size(logits.size), unpack_axis(logits.down), unpack_axis(logits.across)
    )


class Partials(NamedTuple):
    """The table of partial sums, fp64: a row for each sum, of `length` entries, one for each tile."""

    data: Any
    length: Any


# --------------------------------------------------------------------------------------------------------------------
# Tuples and functions that kernels share


class Pixels(NamedTuple):
    """Label pixels: their image, row and column, and which of them are `inside`, that is, exist."""

    n: Any
    y: Any
    x: Any
    inside: Any


class Stats(NamedTuple):
    """The logits' largest m, and log Σ exp(z − m)."""

    m: Any
    log_sum: Any


@triton.jit
def ratio(numerator, denominator):
    """Their quotient, rounded correctly; 0 where the denominator is 0."""
    safe = tl.where(denominator == 0, 1.0, denominator)
    quotient = numerator / safe if numerator.dtype == tl.float64 else tl.div_rn(numerator, safe)
    return tl.where(denominator == 0, 0.0, quotient)


@triton.jit
def class_at(labels, pixels, classes):
    """The classes of pixels in int32, or IGNORED or BAD. Labels are widened to 64 bits before any comparison."""
    offsets = tl.cast(pixels.n, tl.int64) * labels.stride_n + pixels.y.to(tl.int64) * labels.stride_h
    offsets += pixels.x.to(tl.int64) * labels.stride_w
    label = tl.load(labels.data + offsets, mask=pixels.inside, other=0).to(tl.int64)
    found = tl.where((label >= 0) & (label < classes), label, BAD).to(tl.int32)
    return tl.where(pixels.inside & (label != labels.ignore_index), found, IGNORED)


@triton.jit
def place_of(size, pixels):
    """The indices of pixels in a contiguous map (N, H, W)."""
    return (tl.cast(pixels.n, tl.int64) * size.height + pixels.y) * size.width + pixels.x


@triton.jit
def stats_at(stats, size, pixels):
    """Reads what `dense_forward` found for pixels; 0 for one that is not inside."""
    place = place_of(size, pixels)
    m = tl.load(stats + place, mask=pixels.inside, other=0)
    return Stats(m, tl.load(stats + size.pixels + place, mask=pixels.inside, other=0))


@triton.jit
def store_partial(partials, row, tile, values):
    """Stores the sum of a tile's values in a row of the table."""
    tl.store(partials.data + row * partials.length + tile, tl.sum(values).to(tl.float64))


@triton.jit
def store_counts(partials, row, tile, some, others):
    """Stores how many values of a tile are true in a row of the table, and those of the others in the next row. Both
    are found by one sum: a tile has fewer than 2^16 pixels."""
    counts = tl.sum(some.to(tl.int32) + (others.to(tl.int32) << 16))
    to = partials.data + row * partials.length + tile
    tl.store(to, (counts & 0xFFFF).to(tl.float64))
    tl.store(to + partials.length, (counts >> 16).to(tl.float64))
