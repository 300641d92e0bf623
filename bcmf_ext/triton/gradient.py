"""The pulls and factors of pixels, and a logit's gradient (docs/definitions.md, Gradients): `dense_backward` and
`sparse_backward` share them (csrc/cuda/kernels/dense.cuh)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .bcl import bcl_scale, flipped_labels, loss_of
from .common import BAD, CUTOFF, DENOMINATOR, SELECTED, VALID, class_at, place_of, ratio, stats_at
from .ohem import key_of, weight_of


class Upstream(NamedTuple):
    """Tensors that the backward gets beside logits and labels: class weights, the gradient of the total, the results of
    the forward (see ops.py), and the shares of CPG, (N, H, W)."""

    weight: Any
    grad_total: Any
    stats: Any
    selected: Any
    summary: Any
    shares: Any


class TermWeights(NamedTuple):
    """The weights in the total of the terms that `dense_backward` differentiates, and those of BCL's flipped labels,
    all fp64. A kernel gets them one by one, because only its own arguments can be declared fp64."""

    bcl: Any
    alpha: Any
    beta: Any


class Asked(NamedTuple):
    """A pixel's label, a bit for each of BCL's steps that selected it, the pull towards the label, and the factor of
    p."""

    label: Any
    selected: Any
    pull: Any
    factor: Any


@triton.jit
def pull_of(label, nll, selected, upstream, weights, ACC: tl.constexpr, TERMS: tl.constexpr):
    """The pull of p towards the one-hot label; exactly 0 where nothing is asked."""
    summary = upstream.summary
    pull = tl.zeros(label.shape, ACC)
    if TERMS.CE:
        scale = ratio(tl.load(upstream.grad_total), tl.load(summary + DENOMINATOR))
        pull += scale * weight_of(upstream.weight, label, ACC, TERMS)
    if TERMS.OHEM:  # the loss has the forward's bits, so that the same pixels are kept
        pull = tl.where(key_of(nll) >= key_of(tl.load(summary + CUTOFF)), pull, 0.0)
    if not TERMS.FLIPPED:
        for i in tl.static_range(len(TERMS.STEPS)):
            share = bcl_scale(upstream, tl.load(summary + SELECTED + i), weights.bcl, ACC, TERMS)
            pull += tl.where((selected >> i) & 1 == 1, share, 0.0)
    pull = tl.where(label >= 0, pull, 0.0)
    return tl.where(label == BAD, float("nan"), pull)


@triton.jit
def flipped_factor(selected, upstream, weights, ACC: tl.constexpr, TERMS: tl.constexpr):
    """The part of the factor of p that a pixel's flipped labels ask for."""
    share = bcl_scale(upstream, tl.load(upstream.summary + VALID), weights.bcl, ACC, TERMS)
    times = tl.zeros(selected.shape, ACC)
    for i in tl.static_range(len(TERMS.STEPS)):
        times += ((selected >> i) & 1).to(ACC)
    return times * (share * (tl.full((), weights.alpha, ACC) + tl.full((), weights.beta, ACC)))


@triton.jit
def flipped_pull(c, selected, labels, size, pixels, upstream, weights, ACC: tl.constexpr, TERMS: tl.constexpr):
    """The pull of a pixel's flipped labels towards class c."""
    share = bcl_scale(upstream, tl.load(upstream.summary + VALID), weights.bcl, ACC, TERMS)
    pull = tl.zeros(selected.shape, ACC)
    for i in tl.static_range(len(TERMS.STEPS)):
        chosen = (selected >> i) & 1 == 1
        by_rows, by_columns = flipped_labels(labels, size, pixels, chosen, TERMS.STEPS[i])
        pull += tl.where(chosen & (by_rows == c), share * tl.full((), weights.alpha, ACC), 0.0)
        pull += tl.where(chosen & (by_columns == c), share * tl.full((), weights.beta, ACC), 0.0)
    return pull


@triton.jit
def asked_of(logits, labels, pixels, upstream, weights, READ: tl.constexpr, TERMS: tl.constexpr):
    """Finds all that the gradients of a pixel's logits have in common."""
    size, inside = logits.size, pixels.inside
    place = place_of(size, pixels)
    label = class_at(labels, pixels, size.classes)
    selected = tl.zeros(label.shape, tl.int32)
    if len(TERMS.STEPS) > 0:
        selected = tl.load(upstream.selected + place, mask=inside, other=0).to(tl.int32)
    nll = tl.zeros(label.shape, READ.ACC)
    if TERMS.OHEM:
        nll = loss_of(logits, pixels, stats_at(upstream.stats, size, pixels), label, inside, READ)
    pull = pull_of(label, nll, selected, upstream, weights, READ.ACC, TERMS)
    factor = pull
    if TERMS.CPG:
        factor -= tl.load(upstream.shares + place, mask=inside, other=0)
    if TERMS.FLIPPED:
        factor += flipped_factor(selected, upstream, weights, READ.ACC, TERMS)
    return Asked(label, selected, pull, factor)


@triton.jit
def gradient_of(c, p, asked, labels, size, pixels, upstream, weights, ACC: tl.constexpr, TERMS: tl.constexpr):
    """p · factor − what class c is pulled by; an ignored pixel's NaN stays where it is."""
    product = tl.where(asked.factor == 0, 0.0, asked.factor * p)
    value = tl.where(asked.label == c, product - asked.pull, product)
    if TERMS.FLIPPED:
        value -= flipped_pull(c, asked.selected, labels, size, pixels, upstream, weights, ACC, TERMS)
    return value


@triton.jit
def store_gradient(grad, pixels, c, value, inside):
    """Stores gradients of class c in a map of the labels' size."""
    to = grad.data + tl.cast(pixels.n, tl.int64) * grad.stride_n + tl.cast(c, tl.int64) * grad.stride_c
    to += pixels.y.to(tl.int64) * grad.stride_h + pixels.x.to(tl.int64) * grad.stride_w
    tl.store(to, value.to(grad.data.dtype.element_ty), mask=inside)
