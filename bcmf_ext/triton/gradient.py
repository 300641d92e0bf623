"""What the cross-entropy and BCL ask of a pixel, and a logit's gradient: shared by the dense and the sparse kernel of
the backward (csrc/device/loss.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from .bcl import bcl_scale, flipped, loss_of
from .common import BAD, CUTOFF, DENOMINATOR, SELECTED, VALID, class_at, double, pixel_at, ratio
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
def pixel_pulls(
    logits, labels, size, down, across, weight, stats, selected, summary, grad_total, shares, pixels, ignore_index,
    bcl_weight, alpha, beta, n, y, x, inside,
    ACC: tl.constexpr, MODE: tl.constexpr, CE: tl.constexpr, WEIGHTED: tl.constexpr, OHEM: tl.constexpr,
    STEPS: tl.constexpr, FLIPPED: tl.constexpr, CPG: tl.constexpr,
):  # fmt: skip
    """What the gradients of a pixel's logits are made of: label, selection, its pull, and the factor of p."""
    pixel = pixel_at(size, n, y, x)
    label = class_at(labels, n, y, x, inside, size.classes, ignore_index)
    chosen = tl.zeros(label.shape, tl.int32)
    if len(STEPS) > 0:
        chosen = tl.load(selected + pixel, mask=inside, other=0).to(tl.int32)
    nll = tl.zeros(label.shape, ACC)
    if OHEM:
        m = tl.load(stats + pixel, mask=inside, other=0)
        log_sum = tl.load(stats + pixels + pixel, mask=inside, other=0)
        nll = loss_of(logits, size, down, across, n, y, x, label, inside, m, log_sum, ACC, MODE)
    pull = pull_of(label, nll, chosen, grad_total, summary, weight, bcl_weight, ACC, CE, WEIGHTED, OHEM, STEPS, FLIPPED)
    factor = pull
    if CPG:
        factor -= tl.load(shares + pixel, mask=inside, other=0)
    if FLIPPED:
        both = double(alpha).to(ACC) + double(beta).to(ACC)
        factor += flipped_pull(chosen, grad_total, summary, bcl_weight, both, ACC, STEPS)
    return label, chosen, pull, factor


@triton.jit
def gradient_of(
    c, p, factor, label, chosen, pull, labels, size, n, y, x, grad_total, summary, bcl_weight, alpha, beta,
    ignore_index, ACC: tl.constexpr, STEPS: tl.constexpr, FLIPPED: tl.constexpr,
):  # fmt: skip
    """p · factor − what class c is pulled by; an ignored pixel's NaN stays where it is."""
    product = tl.where(factor == 0, 0.0, factor * p)
    value = tl.where(label == c, product - pull, product)
    if FLIPPED:
        value -= flipped_pull_of(
            c, chosen, labels, size, n, y, x, grad_total, summary, bcl_weight,
            double(alpha).to(ACC), double(beta).to(ACC), ignore_index, ACC, STEPS,
        )  # fmt: skip
    return value
