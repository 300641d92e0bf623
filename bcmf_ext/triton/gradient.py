"""What the cross-entropy and BCL ask of a pixel, and a logit's gradient: shared by the dense and the sparse kernel of
the backward (csrc/device/loss.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from .bcl import bcl_scale, flipped
from .common import BAD, CUTOFF, DENOMINATOR, SELECTED, VALID, ratio
from .ohem import key_of, weight_of


@triton.jit
def pull_of(
    label, nll, selected, grad_total, summary, weight, bcl_weight,
    ACC: tl.constexpr, CE: tl.constexpr, WEIGHTED: tl.constexpr, OHEM: tl.constexpr,
    STEPS: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """The pull of p towards the one-hot label; exactly 0 where nothing is asked."""
    pull = tl.zeros(label.shape, ACC)
    if CE:
        pull += ratio(tl.load(grad_total), tl.load(summary + DENOMINATOR)) * weight_of(weight, label, ACC, WEIGHTED)
    if OHEM:  # the forward's own arithmetic, so that the same pixels are kept
        pull = tl.where(key_of(nll) >= key_of(tl.load(summary + CUTOFF)), pull, 0.0)
    if not FLIPPED:
        for i in tl.static_range(len(STEPS)):
            share = bcl_scale(grad_total, tl.load(summary + SELECTED + i), bcl_weight, ACC, STEPS)
            pull += tl.where((selected >> i) & 1 == 1, share, 0.0)
    pull = tl.where(label >= 0, pull, 0.0)
    return tl.where(label == BAD, float("nan"), pull)


@triton.jit
def flipped_pull(
    selected, grad_total, summary, bcl_weight, alpha_beta, ACC: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    """What the flipped labels of a pixel ask of p altogether."""
    share = bcl_scale(grad_total, tl.load(summary + VALID), bcl_weight, ACC, STEPS)
    times = tl.zeros(selected.shape, ACC)
    for i in tl.static_range(len(STEPS)):
        times += ((selected >> i) & 1).to(ACC)
    return times * (share * alpha_beta)


@triton.jit
def flipped_pull_of(
    c, selected, labels, size, n, y, x, grad_total, summary, bcl_weight, alpha, beta, ignore_index,
    ACC: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The part of it that is for class c."""
    share = bcl_scale(grad_total, tl.load(summary + VALID), bcl_weight, ACC, STEPS)
    pull = tl.zeros(selected.shape, ACC)
    for i in tl.static_range(len(STEPS)):
        chosen = (selected >> i) & 1 == 1
        by_rows, by_columns = flipped(labels, size, n, y, x, chosen, ignore_index, STEPS[i])
        pull += tl.where(chosen & (by_rows == c), share * alpha, 0.0)
        pull += tl.where(chosen & (by_columns == c), share * beta, 0.0)
    return pull


@triton.jit
def gradient_of(p, factor, is_label, pull):
    """p · factor − pull at the label; an ignored pixel's NaN stays where it is."""
    product = tl.where(factor == 0, 0.0, factor * p)
    return tl.where(is_label, product - pull, product)
