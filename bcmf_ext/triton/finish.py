"""From partial sums to the total: `add_tiles` and `loss_finish` (csrc/device/loss.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    BAD_LABELS,
    BCL,
    BCL_ROWS,
    CE,
    COUNT,
    CPG,
    DENOMINATOR,
    EDGES,
    NUMERATOR,
    SELECTED,
    VALID,
    VALID_PIXELS,
)
from .integers import unpack


@triton.jit
def add_tiles(partials, totals, BLOCK: tl.constexpr):
    """Each sum over its tiles, in an order that depends on their number alone."""
    row = tl.program_id(0)
    length = unpack(partials.length)
    total = tl.full([BLOCK], 0, tl.float64)
    for start in range(0, length, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(partials.data + tl.cast(row, tl.int64) * length + tile, mask=tile < length, other=0)
    tl.store(totals + row, tl.sum(total, 0))


@triton.jit
def mean_of(totals, row, count, bad):
    """0 of nothing; NaN with a bad label."""
    mean = tl.where(count == 0, 0.0, tl.load(totals + row) / tl.where(count == 0, 1.0, count))
    return tl.where(bad > 0, float("nan"), mean)


@triton.jit
def loss_finish(totals, total, terms, summary, bcl_weight: tl.float64, cpg_weight: tl.float64, TERMS: tl.constexpr):
    """The means, from the totals of all partial sums; what the backward needs of them (summary is 0 but for OHEM's
    cutoff)."""
    acc = total.dtype.element_ty
    STEPS: tl.constexpr = len(TERMS.STEPS)
    bad = tl.load(totals + BAD_LABELS)
    valid = tl.load(totals + VALID_PIXELS)
    tl.store(summary + VALID, valid.to(acc))
    ce = valid * 0
    if TERMS.CE:
        count = tl.load(totals + COUNT)
        tl.store(summary + DENOMINATOR, count.to(acc))
        ce = mean_of(totals, NUMERATOR, count, bad)
    bcl = valid * 0
    for i in tl.static_range(STEPS):
        count = tl.load(totals + BCL_ROWS + 2 * i + 1)
        tl.store(summary + SELECTED + i, count.to(acc))
        bcl += mean_of(totals, BCL_ROWS + 2 * i, valid if TERMS.FLIPPED else count, bad) / STEPS
    cpg = valid * 0
    if TERMS.CPG:
        count = tl.load(totals + BCL_ROWS + 2 * STEPS + 1)
        tl.store(summary + EDGES, count.to(acc))
        cpg = mean_of(totals, BCL_ROWS + 2 * STEPS, count, bad)
    tl.store(terms + CE, ce.to(acc))
    tl.store(terms + BCL, bcl.to(acc))
    tl.store(terms + CPG, cpg.to(acc))
    weighted = ce
    if STEPS > 0:
        weighted += tl.full((), bcl_weight, tl.float64) * bcl
    if TERMS.CPG:
        weighted += tl.full((), cpg_weight, tl.float64) * cpg
    tl.store(total, weighted.to(acc))
