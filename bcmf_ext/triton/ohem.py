"""OHEM: the k-th largest of many losses without a sort and without a look from the host, by radix select on their bits
(csrc/cuda/kernels/ohem.cuh); then the sums over the kept ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import triton
import triton.language as tl

from .common import (
    CE_COUNT,
    CE_SUM,
    VALID_PIXELS,
    Partials,
    Pixels,
    class_at,
    place_of,
    store_partial,
    unpack_labels,
    unpack_logits,
    unpack_size,
)
from .geometry import tile_of
from .integers import unpack

DIGIT_BITS = 11


class Digit(NamedTuple):
    """The BITS bits of a key from bit SHIFT on."""

    SHIFT: int
    BITS: int


def digits(key_bits: int) -> Iterator[Digit]:
    """Each level's digit, from the highest bits down."""
    for top in range(key_bits, 0, -DIGIT_BITS):
        yield Digit(max(0, top - DIGIT_BITS), min(top, DIGIT_BITS))


@triton.jit
def key_of(nll):
    """The bits of a loss, in whose order losses are, NaN the largest; int64."""
    if nll.dtype == tl.float64:
        key = nll.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = (nll.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    return key


@triton.jit
def weight_of(weight, label, ACC: tl.constexpr, TERMS: tl.constexpr):
    """Class weights of labels; 1 for one that is no class."""
    w = tl.full(label.shape, 1.0, ACC)
    if TERMS.WEIGHTED:
        w = tl.load(weight + label, mask=label >= 0, other=1.0)
    return w


@triton.jit
def ohem_begin(totals, min_kept, selection, HARD_ROW: tl.constexpr):
    """How many of the largest losses to look for (selection: prefix, rank): none if enough are above the threshold."""
    kept = tl.minimum(tl.cast(unpack(min_kept), tl.float64), tl.load(totals + VALID_PIXELS))
    tl.store(selection, 0)
    tl.store(selection + 1, tl.where(tl.load(totals + HARD_ROW) >= kept, 0, kept.to(tl.int64)))


@triton.jit
def ohem_count(nll, selection, histogram, size, DIGIT: tl.constexpr, BLOCK: tl.constexpr):
    """Counts a digit of the losses that have the prefix. Few programs do, since each adds its counts to those of
    all."""
    SHIFT: tl.constexpr = DIGIT.SHIFT
    BITS: tl.constexpr = DIGIT.BITS
    prefix = tl.load(selection)
    bins = tl.arange(0, 1 << BITS)
    counts = tl.full([1 << BITS], 0, tl.int64)
    end = tl.where(tl.load(selection + 1) > 0, tl.cast(unpack_size(size).pixels, tl.int64), 0)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    while first < end:
        index = first + tl.arange(0, BLOCK)
        loss = tl.load(nll + index, mask=index < end, other=-1)
        key = key_of(loss)
        counted = (loss != -1) & ((key >> SHIFT >> BITS) == (prefix >> SHIFT >> BITS))
        digit = tl.where(counted, (key >> SHIFT) & ((1 << BITS) - 1), 0).to(tl.int32)
        others = tl.sum(tl.where(counted, 0, 1), 0)  # they are counted as digit 0
        counts += (tl.histogram(digit, 1 << BITS) - tl.where(bins == 0, others, 0)).to(tl.int64)
        first += tl.num_programs(0) * BLOCK
    tl.atomic_add(histogram + bins, counts, mask=counts > 0)  # of integers: no order changes the sum


@triton.jit
def ohem_choose(selection, histogram, DIGIT: tl.constexpr):
    """Adds the digit in which the loss looked for lies to the prefix."""
    SHIFT: tl.constexpr = DIGIT.SHIFT
    BITS: tl.constexpr = DIGIT.BITS
    prefix = tl.load(selection)
    rank = tl.load(selection + 1)
    bins = tl.arange(0, 1 << BITS)
    counts = tl.load(histogram + bins)
    at_least = tl.cumsum(counts, 0, reverse=True)
    digit = tl.sum((at_least >= rank).to(tl.int64), 0) - 1
    larger = tl.sum(tl.where(bins == digit, at_least - counts, 0), 0)
    if rank > 0:
        tl.store(selection, prefix | (digit << SHIFT))
        tl.store(selection + 1, rank - larger)


@triton.jit
def ohem_sum(
    logits, labels, weight, nll, selection, cutoff, partials, exceeds: tl.float64,
    READ: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """With the cutoff known: partial sums of w · ℓ over the kept pixels, and their number, in place of those over
    all."""
    tile = tl.program_id(0)
    logits, labels = unpack_logits(logits), unpack_labels(labels)
    partials = Partials(partials.data, unpack(partials.length))
    least = key_of(tl.full((), exceeds, READ.ACC))
    found = tl.load(selection)
    key = tl.where((tl.load(selection + 1) > 0) & (found < least), found, least)
    pixels = tile_of(tile, logits, READ.MODE, TILE)
    loss = tl.load(nll + place_of(logits.size, pixels), mask=pixels.inside, other=-1)
    kept = (loss != -1) & (key_of(loss) >= key)
    label = class_at(labels, Pixels(pixels.n, pixels.y, pixels.x, kept), logits.size.classes)
    store_partial(partials, CE_SUM, tile, tl.where(kept, weight_of(weight, label, READ.ACC, TERMS) * loss, 0.0))
    store_partial(partials, CE_COUNT, tile, kept.to(READ.ACC))
    if tile == 0:
        if tl.float64 == READ.ACC:
            tl.store(cutoff, key.to(tl.float64, bitcast=True))
        else:
            tl.store(cutoff, key.to(tl.int32).to(tl.float32, bitcast=True))
