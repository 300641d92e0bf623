"""From partial sums to the total: `add_tiles` and `loss_finish` (csrc/cuda/kernels/finish.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from ..options import MAX_STEPS
from .common import (
    BAD_LABELS,
    BCL,
    BCL_SUMS,
    CE,
    CE_COUNT,
    CE_SUM,
    CPG,
    CPG_COUNT,
    CPG_SUM,
    CUTOFF,
    DENOMINATOR,
    EDGES,
    SELECTED,
    VALID,
    VALID_PIXELS,
)
from .integers import unpack

MOST_STEPS = tl.constexpr(MAX_STEPS)


@triton.jit
def add_tiles(partials, sums, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Each row's sum over its tiles, in an order that depends on their number alone; 0 where there is no row."""
    row = tl.program_id(0)
    length = unpack(partials.length)
    total = tl.full([BLOCK], 0, tl.float64)
    end = tl.where(row < ROWS, length, 0)
    for start in range(0, end, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        total += tl.load(partials.data + tl.cast(row, tl.int64) * length + tile, mask=tile < length, other=0)
    tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def mean_of(sums, entry, count, bad):
    """0 of nothing; NaN with a bad label."""
    mean = tl.where(count == 0, 0.0, tl.load(sums + entry) / tl.where(count == 0, 1.0, count))
    return tl.where(bad > 0, float("nan"), mean)


@triton.jit
def loss_finish(
    sums, cutoff, total, terms, summary, bcl_weight: tl.float64, cpg_weight: tl.float64, TERMS: tl.constexpr
):  # fmt: skip
    """The means of the sums, and what the backward needs of them."""
    acc = total.dtype.element_ty
    STEPS: tl.constexpr = len(TERMS.STEPS)
    bad = tl.load(sums + BAD_LABELS)
    valid = tl.load(sums + VALID_PIXELS)
    none = tl.zeros_like(valid)
    denominator, smallest, edges, ce, bcl, cpg = none, none.to(acc), none, none, none, none
    if TERMS.CE:
        denominator = tl.load(sums + CE_COUNT)
        ce = mean_of(sums, CE_SUM, denominator, bad)
        if TERMS.OHEM:
            smallest = tl.where(valid > 0, tl.load(cutoff), smallest)
    for i in tl.static_range(MOST_STEPS):
        count = none
        if i < STEPS:
            count = tl.load(sums + BCL_SUMS + 2 * i + 1)
            bcl += mean_of(sums, BCL_SUMS + 2 * i, valid if TERMS.FLIPPED else count, bad) / STEPS
        tl.store(summary + SELECTED + i, count.to(acc))
    if TERMS.CPG:
        edges = tl.load(sums + CPG_COUNT)
        cpg = mean_of(sums, CPG_SUM, edges, bad)
    tl.store(summary + DENOMINATOR, denominator.to(acc))
    tl.store(summary + CUTOFF, smallest)
    tl.store(summary + VALID, valid.to(acc))
    tl.store(summary + EDGES, edges.to(acc))
    tl.store(terms + CE, ce.to(acc))
    tl.store(terms + BCL, bcl.to(acc))
    tl.store(terms + CPG, cpg.to(acc))
    weighted = ce
    if STEPS > 0:
        weighted += tl.full((), bcl_weight, tl.float64) * bcl
    if TERMS.CPG:
        weighted += tl.full((), cpg_weight, tl.float64) * cpg
    tl.store(total, weighted.to(acc))
