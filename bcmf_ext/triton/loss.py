"""bcmf::loss in Triton: the algorithm of csrc/device/loss.cuh, a program for a tile of pixels.

Each step is a kernel: what one writes, the next reads. Nothing synchronises, no float is added atomically.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ops import SUMMARY, LossOptions, acc_dtype
from ..reference import OHEM, check_inputs

BLOCK = 512  # pixels of a tile
FINISH_BLOCK = 1024
DIGIT_BITS = 11  # of the radix select, see csrc/device/select.cuh

# Arguments whose values 1 and multiples of 16 are nothing special: each would double the number of kernels to compile.
UNSPECIAL = (
    "pixels", "classes", "height", "tiles", "min_kept", "ignore_index",
    "stride_n", "target_stride_n", "target_stride_h", "target_stride_w", "grad_stride_n",
)  # fmt: skip


@triton.jit
def _offsets(index, height, width, stride_n, stride_h, stride_w):
    """Where pixel `index` of the batch lies in a tensor with these strides."""
    row = index // width
    return (row // height) * stride_n + (row % height) * stride_h + (index % width) * stride_w


@triton.jit
def _labels(target, index, inside, classes, height, width, stride_n, stride_h, stride_w, ignore_index):
    """Labels in int64, 0 where there is none to use; where they are usable; where they are bad."""
    offsets = _offsets(index, height, width, stride_n, stride_h, stride_w)
    label = tl.load(target + offsets, mask=inside, other=0).to(tl.int64)
    counted = inside & (label != ignore_index)
    usable = counted & (label >= 0) & (label < classes)
    return tl.where(usable, label, 0), usable, counted & (~usable)


@triton.jit
def _key(nll):
    """The bits of a loss, in whose order losses are, NaN the largest."""
    if nll.dtype == tl.float64:
        key = nll.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = nll.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return key


@triton.jit(do_not_specialize=UNSPECIAL)
def _forward(
    logits, target, weight, stats, nlls, exceeds, partials,
    pixels, classes, height, width,
    stride_n, stride_c, stride_h, stride_w,
    target_stride_n, target_stride_h, target_stride_w,
    ignore_index,
    ACC: tl.constexpr, WEIGHTED: tl.constexpr, OHEM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """stats, and partial sums of w · ℓ and w; with OHEM ℓ, and partial counts of hard and of valid pixels."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels
    z = logits + _offsets(index, height, width, stride_n, stride_h, stride_w)
    label, usable, bad = _labels(
        target, index, inside, classes, height, width,
        target_stride_n, target_stride_h, target_stride_w, ignore_index,
    )  # fmt: skip

    m = tl.load(z, mask=inside, other=0).to(ACC)
    stride = tl.full((), stride_c, tl.int64)  # small ones arrive as int32, and C·stride can pass 2³¹
    for c in range(1, classes):
        value = tl.load(z + c * stride, mask=inside, other=0).to(ACC)
        m = tl.where(value > m, value, m)
    total = tl.zeros([BLOCK], ACC)
    for c in range(classes):
        total += tl.exp(tl.load(z + c * stride, mask=inside, other=0).to(ACC) - m)
    log_sum = tl.log(total)
    tl.store(stats + index, m, mask=inside)
    tl.store(stats + pixels + index, log_sum, mask=inside)

    nll = (m - tl.load(z + label * stride_c, mask=usable, other=0).to(ACC)) + log_sum
    nll = tl.where(bad, float("nan"), nll)  # no look from the host: the loss says it
    counted = usable | bad
    if OHEM:
        tl.store(nlls + index, tl.where(counted, nll, -1.0), mask=inside)
        first = tl.where(counted & (_key(nll) >= _key(tl.load(exceeds))), 1.0, 0.0).to(tl.float64)
        second = tl.where(counted, 1.0, 0.0).to(tl.float64)
    else:
        w = tl.full([BLOCK], 1.0, ACC)
        if WEIGHTED:
            w = tl.load(weight + label, mask=usable, other=1)
        first = tl.where(counted, w * nll, 0.0).to(tl.float64)
        second = tl.where(counted, w, 0.0).to(tl.float64)
    tl.store(partials + tl.program_id(0), tl.sum(first, 0))
    tl.store(partials + tl.num_programs(0) + tl.program_id(0), tl.sum(second, 0))


@triton.jit
def _sum_partials(partials, tiles, BLOCK: tl.constexpr):
    """Both sums over all tiles, in an order that depends on their number alone."""
    first = tl.zeros([BLOCK], tl.float64)
    second = tl.zeros([BLOCK], tl.float64)
    for start in range(0, tiles, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        first += tl.load(partials + tile, mask=tile < tiles, other=0)
        second += tl.load(partials + tiles + tile, mask=tile < tiles, other=0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit(do_not_specialize=UNSPECIAL)
def _finish(partials, tiles, total, terms, summary, BLOCK: tl.constexpr):
    numerator, denominator = _sum_partials(partials, tiles, BLOCK)
    empty = denominator == 0
    mean = tl.where(empty, 0.0, numerator / tl.where(empty, 1.0, denominator))
    tl.store(summary, denominator)
    tl.store(terms, mean)
    tl.store(total, mean)


@triton.jit(do_not_specialize=UNSPECIAL)
def _ohem_begin(partials, tiles, min_kept, selection, BLOCK: tl.constexpr):
    """How many of the largest losses to look for (selection: prefix, rank): none if enough are above the threshold."""
    hard, valid = _sum_partials(partials, tiles, BLOCK)
    kept = tl.minimum(tl.cast(min_kept, tl.float64), valid)
    tl.store(selection, 0)
    tl.store(selection + 1, tl.where(hard >= kept, 0, kept.to(tl.int64)))


@triton.jit(do_not_specialize=UNSPECIAL)
def _ohem_count(nlls, selection, histogram, pixels, SHIFT: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Counts the digits of the tile's losses that have the prefix: `BITS` bits from bit `SHIFT` on."""
    prefix = tl.load(selection)
    rank = tl.load(selection + 1)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    nll = tl.load(nlls + index, mask=index < tl.where(rank > 0, pixels, 0), other=-1)
    key = _key(nll).to(tl.int64)
    counted = (nll != -1) & ((key >> SHIFT >> BITS) == (prefix >> SHIFT >> BITS))
    digit = tl.where(counted, (key >> SHIFT) & ((1 << BITS) - 1), 0).to(tl.int32)
    bins = tl.arange(0, 1 << BITS)
    others = tl.sum(tl.where(counted, 0, 1), 0)  # they were counted as digit 0
    counts = tl.histogram(digit, 1 << BITS) - tl.where(bins == 0, others, 0)
    tl.atomic_add(histogram + bins, counts.to(tl.int64), mask=counts > 0)


@triton.jit
def _ohem_choose(selection, histogram, SHIFT: tl.constexpr, BITS: tl.constexpr):
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


@triton.jit(do_not_specialize=UNSPECIAL)
def _ohem_sum(
    nlls, target, weight, exceeds, selection, summary, partials,
    pixels, classes, height, width,
    target_stride_n, target_stride_h, target_stride_w,
    ignore_index,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With the cutoff known: partial sums of w · ℓ over the kept pixels, and their number."""
    least = tl.load(exceeds)
    found = tl.load(selection)
    key = tl.where((tl.load(selection + 1) > 0) & (found < _key(least)), found, _key(least))
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    nll = tl.load(nlls + index, mask=index < pixels, other=-1)
    kept = (nll != -1) & (_key(nll) >= key)
    w = tl.full([BLOCK], 1.0, nll.dtype)
    if WEIGHTED:
        label, usable, _ = _labels(
            target, index, index < pixels, classes, height, width,
            target_stride_n, target_stride_h, target_stride_w, ignore_index,
        )  # fmt: skip
        w = tl.load(weight + label, mask=usable, other=1)
    tl.store(partials + tl.program_id(0), tl.sum(tl.where(kept, w * nll, 0.0).to(tl.float64), 0))
    tl.store(partials + tl.num_programs(0) + tl.program_id(0), tl.sum(tl.where(kept, 1.0, 0.0).to(tl.float64), 0))
    if tl.program_id(0) == 0:
        if nll.dtype == tl.float64:
            tl.store(summary + 1, key.to(tl.float64, bitcast=True))
        else:
            tl.store(summary + 1, key.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit(do_not_specialize=UNSPECIAL)
def _backward(
    grad_total, logits, target, weight, stats, summary, grad,
    pixels, classes, height, width,
    stride_n, stride_c, stride_h, stride_w,
    target_stride_n, target_stride_h, target_stride_w,
    grad_stride_n, grad_stride_c, grad_stride_h, grad_stride_w,
    ignore_index,
    ACC: tl.constexpr, WEIGHTED: tl.constexpr, OHEM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels
    z = logits + _offsets(index, height, width, stride_n, stride_h, stride_w)
    to = grad + _offsets(index, height, width, grad_stride_n, grad_stride_h, grad_stride_w)
    label, usable, bad = _labels(
        target, index, inside, classes, height, width,
        target_stride_n, target_stride_h, target_stride_w, ignore_index,
    )  # fmt: skip
    m = tl.load(stats + index, mask=inside, other=0)
    log_sum = tl.load(stats + pixels + index, mask=inside, other=0)

    denominator = tl.load(summary)
    scale = tl.where(denominator == 0, 0.0, tl.load(grad_total) / tl.where(denominator == 0, 1.0, denominator))
    coefficient = tl.where(usable, scale, 0.0)
    if WEIGHTED:
        coefficient *= tl.load(weight + label, mask=usable, other=0)
    if OHEM:  # the forward's own arithmetic, so that the same pixels are kept
        nll = (m - tl.load(z + label * stride_c, mask=usable, other=0).to(ACC)) + log_sum
        coefficient = tl.where(_key(nll) >= _key(tl.load(summary + 1)), coefficient, 0.0)
    coefficient = tl.where(bad, float("nan"), coefficient)
    stride = tl.full((), stride_c, tl.int64)
    grad_stride = tl.full((), grad_stride_c, tl.int64)
    for c in range(classes):
        p = tl.exp((tl.load(z + c * stride, mask=inside, other=0).to(ACC) - m) - log_sum)
        value = coefficient * (p - tl.where(usable & (label == c), 1.0, 0.0))
        value = tl.where(coefficient == 0, 0.0, value)  # an ignored pixel's NaN stays where it is
        tl.store(to + c * grad_stride, value.to(grad.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------------------
# The op


def _on(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _check(logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions) -> None:
    """The public functions have checked all this; it keeps a direct call of the op memory-safe."""
    check_inputs(logits, target, weight)
    if options.bcl_steps or options.cpg_kernel_size or not options.ce:
        raise ValueError("bcmf::loss_triton computes the cross-entropy only.")
    if logits.shape[2:] != target.shape[1:]:
        raise ValueError(
            f"bcmf::loss_triton reads logits of the target's size, not {tuple(logits.shape)} for {tuple(target.shape)}."
        )
    if options.ohem_threshold is not None:
        OHEM(options.ohem_threshold)


def _common(logits: Tensor, target: Tensor, weight: Tensor | None, ohem_threshold: float | None) -> dict[str, Any]:
    """The arguments that forward and backward share, by name."""
    n, classes, height, width = logits.shape
    return {
        "logits": logits,
        "target": target,
        "weight": logits if weight is None else weight.to(acc_dtype(logits)).contiguous(),
        "pixels": n * height * width,
        "classes": classes,
        "height": height,
        "width": width,
        **dict(zip(("stride_n", "stride_c", "stride_h", "stride_w"), logits.stride(), strict=True)),
        **_target_strides(target),
        "ACC": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        "WEIGHTED": weight is not None,
        "OHEM": ohem_threshold is not None,
        "BLOCK": BLOCK,
    }


def _target_strides(target: Tensor) -> dict[str, int]:
    return dict(zip(("target_stride_n", "target_stride_h", "target_stride_w"), target.stride(), strict=True))


def loss(
    logits: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel of bcmf::loss_triton; arguments: LossOptions."""
    options = LossOptions(*arguments)
    ignore_index, ohem_threshold = options.ignore_index, options.ohem_threshold
    _check(logits, target, weight, options)
    acc = acc_dtype(logits)
    total, summary = logits.new_empty((), dtype=acc), logits.new_zeros(SUMMARY, dtype=acc)
    terms = logits.new_zeros(3, dtype=acc)
    selected = logits.new_empty((0, *target.shape[1:]), dtype=torch.uint8)  # of BCL
    stats = logits.new_empty((2, *target.shape), dtype=acc)
    common = _common(logits, target, weight, ohem_threshold)
    tiles = triton.cdiv(common["pixels"], BLOCK)
    partials = logits.new_empty(2 * tiles, dtype=torch.float64)
    nlls = exceeds = stats  # not read without OHEM
    if ohem_threshold is not None:
        nlls = logits.new_empty(target.shape, dtype=acc)
        least = torch.tensor(-math.log(ohem_threshold), dtype=acc).nextafter(torch.tensor(math.inf, dtype=acc))
        exceeds = logits.new_full((1,), least.item(), dtype=acc)  # on the CPU until here: no copy waits for the GPU
    with _on(logits):
        if tiles > 0:
            _forward[(tiles,)](
                **common, stats=stats, nlls=nlls, exceeds=exceeds, partials=partials, ignore_index=ignore_index
            )
            if ohem_threshold is not None:
                _ohem(common, nlls, exceeds, summary, partials, ignore_index, options.ohem_min_kept)
        _finish[(1,)](partials, tiles, total, terms, summary, FINISH_BLOCK)
    return total, terms, stats, selected, summary


def digits(key_bits: int) -> Iterator[tuple[int, int]]:
    """(lowest bit, number of bits) of each level's digit, from the highest bits down."""
    for top in range(key_bits, 0, -DIGIT_BITS):
        yield max(0, top - DIGIT_BITS), min(top, DIGIT_BITS)


def _ohem(
    common: dict[str, Any],
    nlls: Tensor,
    exceeds: Tensor,
    summary: Tensor,
    partials: Tensor,
    ignore_index: int,
    min_kept: int,
) -> None:
    """Finds the smallest loss that is kept, and sums up the kept ones."""
    pixels, tiles = common["pixels"], len(partials) // 2
    selection = nlls.new_empty(2, dtype=torch.int64)
    levels = list(digits(8 * nlls.element_size()))
    histograms = nlls.new_zeros((len(levels), 1 << DIGIT_BITS), dtype=torch.int64)
    _ohem_begin[(1,)](partials, tiles, min_kept, selection, FINISH_BLOCK)
    for (shift, bits), histogram in zip(levels, histograms, strict=True):
        _ohem_count[(tiles,)](nlls, selection, histogram, pixels, shift, bits, BLOCK)
        _ohem_choose[(1,)](selection, histogram, shift, bits)
    shared = {
        name: common[name] for name in ("target", "weight", "pixels", "classes", "height", "width", "WEIGHTED", "BLOCK")
    }
    _ohem_sum[(tiles,)](
        **shared, **_target_strides(common["target"]), nlls=nlls, exceeds=exceeds, selection=selection,
        summary=summary, partials=partials, ignore_index=ignore_index,
    )  # fmt: skip


def loss_backward(
    grad_total: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    selected: Tensor,
    summary: Tensor,
    *arguments: Any,
) -> Tensor:
    """The kernel of bcmf::loss_triton_backward; arguments: LossOptions."""
    options = LossOptions(*arguments)
    ignore_index, ohem_threshold = options.ignore_index, options.ohem_threshold
    _check(logits, target, weight, options)
    acc = acc_dtype(logits)
    if (stats.shape, stats.dtype, summary.shape, summary.dtype) != ((2, *target.shape), acc, (SUMMARY,), acc):
        raise ValueError("bcmf::loss_triton_backward takes stats, selected and summary as bcmf::loss returned them.")
    if grad_total.numel() != 1 or not grad_total.device == stats.device == summary.device == logits.device:
        raise ValueError("bcmf::loss_triton_backward takes one upstream gradient, and all tensors on one device.")
    stats, summary = stats.contiguous(), summary.contiguous()
    grad = torch.empty_like(logits, memory_format=torch.preserve_format)
    common = _common(logits, target, weight, ohem_threshold)
    if common["pixels"] == 0:
        return grad
    strides = dict(
        zip(("grad_stride_n", "grad_stride_c", "grad_stride_h", "grad_stride_w"), grad.stride(), strict=True)
    )
    with _on(logits):
        _backward[(triton.cdiv(common["pixels"], BLOCK),)](
            **common, **strides, grad_total=grad_total.to(stats.dtype), stats=stats, summary=summary, grad=grad,
            ignore_index=ignore_index,
        )  # fmt: skip
    return grad
