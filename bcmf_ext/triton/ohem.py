"""OHEM: the k-th largest of many losses without a sort and without a look from the host, by radix select on their bits
(csrc/device/select.cuh); then the sums over the kept ones."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl

from .common import CUTOFF, class_at, double, pixel_at
from .geometry import tile_of

DIGIT_BITS = 11


def digits(key_bits: int) -> Iterator[tuple[int, int]]:
    """(lowest bit, number of bits) of each level's digit, from the highest bits down."""
    for top in range(key_bits, 0, -DIGIT_BITS):
        yield max(0, top - DIGIT_BITS), min(top, DIGIT_BITS)


@triton.jit
def key_of(nll):
    """The bits of a loss, in whose order losses are, NaN the largest; int64."""
    if nll.dtype == tl.float64:
        key = nll.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = (nll.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
    return key


@triton.jit
def weight_of(weight, label, ACC: tl.constexpr, WEIGHTED: tl.constexpr):
    """Class weights of labels; 1 for one that is no class."""
    w = tl.full(label.shape, 1.0, ACC)
    if WEIGHTED:
        w = tl.load(weight + label, mask=label >= 0, other=1.0)
    return w


@triton.jit(do_not_specialize=["min_kept"])
def begin(totals, min_kept, selection, HARD_ROW: tl.constexpr, VALID_ROW: tl.constexpr):
    """How many of the largest losses to look for (selection: prefix, rank): none if enough are above the threshold."""
    kept = tl.minimum(tl.cast(min_kept, tl.float64), tl.load(totals + VALID_ROW))
    tl.store(selection, 0)
    tl.store(selection + 1, tl.where(tl.load(totals + HARD_ROW) >= kept, 0, kept.to(tl.int64)))


@triton.jit
def count(nlls, selection, histogram, pixels, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the digits of the losses that have the prefix: `BITS` bits from bit `SHIFT` on. Few programs, since each
    adds its counts to those of all."""
    prefix = tl.load(selection)
    bins = tl.arange(0, 1 << BITS)
    counts = tl.zeros([1 << BITS], tl.int64)
    end = tl.where(tl.load(selection + 1) > 0, tl.cast(pixels, tl.int64), 0)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    while first < end:
        index = first + tl.arange(0, BLOCK)
        nll = tl.load(nlls + index, mask=index < end, other=-1)
        key = key_of(nll)
        counted = (nll != -1) & ((key >> SHIFT >> BITS) == (prefix >> SHIFT >> BITS))
        digit = tl.where(counted, (key >> SHIFT) & ((1 << BITS) - 1), 0).to(tl.int32)
        others = tl.sum(tl.where(counted, 0, 1), 0)  # they are counted as digit 0
        counts += (tl.histogram(digit, 1 << BITS) - tl.where(bins == 0, others, 0)).to(tl.int64)
        first += tl.num_programs(0) * BLOCK
    tl.atomic_add(histogram + bins, counts, mask=counts > 0)  # of integers: no order changes the sum


@triton.jit
def choose(selection, histogram, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """Adds the digit in which the loss looked for lies to the prefix."""
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


@triton.jit(do_not_specialize=["ignore_index", "exceeds"])
def sum_kept(
    nlls, labels, size, down, across, weight, selection, summary, partials, length, ignore_index, exceeds,
    ACC: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """With the cutoff known: partial sums of w · ℓ over the kept pixels, and their number, in place of those over
    all."""
    least = key_of(double(exceeds).to(ACC))
    found = tl.load(selection)
    key = tl.where((tl.load(selection + 1) > 0) & (found < least), found, least)
    n, y, x, inside = tile_of(tl.program_id(0), size, down, across, MODE, ROWS, SPANS, SPAN)
    nll = tl.load(nlls + pixel_at(size, n, y, x), mask=inside, other=-1)
    kept = (nll != -1) & (key_of(nll) >= key)
    label = class_at(labels, n, y, x, kept, size.classes, ignore_index)
    total = tl.where(kept, weight_of(weight, label, ACC, WEIGHTED) * nll, 0.0)
    tl.store(partials + tl.program_id(0), tl.sum(total).to(tl.float64))
    tl.store(partials + length + tl.program_id(0), tl.sum(kept.to(ACC)).to(tl.float64))
    if tl.program_id(0) == 0:
        if tl.float64 == ACC:
            tl.store(summary + CUTOFF, key.to(tl.float64, bitcast=True))
        else:
            tl.store(summary + CUTOFF, key.to(tl.int32).to(tl.float32, bitcast=True))
