"""torch.ops.bcmf: schemas, fake kernels and autograd. C++ adds the kernels (csrc/*/*_op.cpp).

They are defined in Python so that they exist, and can be traced, without a compiler. An op's kernel for the Autograd
key is a ``torch.autograd.Function`` (not a Function around the op: that would lose the gradient in exported modules).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.library import Library

from .options import MAX_STEPS, TERMS, LossOptions

LIB = Library("bcmf", "DEF")


def acc_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that is computed in, and that losses are returned in: fp64 for fp64 logits or maps, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _raise_on_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "bcmf_ext's kernels have no second derivative: use impl='torch' where you need a gradient of a gradient."
    )


class _Function(torch.autograd.Function):
    """The base of the ops' own Functions, which have no forward-mode derivative."""

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(
            "bcmf_ext's kernels have no forward-mode derivative: use impl='torch' where you need one."
        )


def _define_one(lib: Library, name: str, schema: str, fake: Any, derivative: Any = None) -> Any:
    """Adds an op to a library: its schema, its fake kernel and, where it has none, a derivative that raises."""
    lib.define(name + schema)
    qualified = f"{lib.ns}::{name}"
    torch.library.register_fake(qualified, fake, lib=lib)
    if derivative is not None:
        nothing = lambda ctx, inputs, output: None  # noqa: E731
        torch.library.register_autograd(qualified, derivative, setup_context=nothing, lib=lib)
    return getattr(getattr(torch.ops, lib.ns), name)


def _define(lib: Library, name: str, schema: str, fake: Any, backward_schema: str, backward_fake: Any) -> Any:
    """Adds an op and its backward, ``{name}_backward``, to a library: schemas, fake kernels, and no second derivative.
    Returns both; the autograd of the first is the caller's."""
    op = _define_one(lib, name, schema, fake)
    return op, _define_one(lib, f"{name}_backward", backward_schema, backward_fake, _raise_on_double_backward)


# --------------------------------------------------------------------------------------------------------------------
# bcmf::loss computes any mix of the terms that options.Terms lists, from logits of any size.
#   It takes logits (N, C, h, w), target (N, H, W), weight (C,) or None, and LossOptions. It returns
#   * total (), differentiable;
#   * terms, unweighted, an entry for each of options.TERMS: 0 for one that was not asked for;
#   * stats (2, N, H, W): m = max_c Z_c and log Σ_c exp(Z_c − m), kept apart so that small losses keep their digits; of
#     logits of the labels' size CUDA's kernels keep one number, (1, N, H, W) (csrc/cuda/kernels/stats.cuh);
#   * selected (N, H, W) uint8, (0, H, W) without BCL: bit s says whether BCL's step s selected the pixel;
#   * marks (bytes,) uint8: what the kernels of GPUs have read of the labels, see _marks_bytes; (0,) of the CPU's;
#   * summary (SUMMARY,), see Summary.
# The backward takes the last four, and the upstream gradient of total.
# It is bcmf::loss_finish of bcmf::loss_sums, between which sums may be added up over several processes:
#   * loss_sums takes the same, and returns sums (SUMS,) in fp64, see Sum; cutoff (), the smallest loss that OHEM keeps
#     in this process, 0 without OHEM; stats; selected; marks. Where bcmf::loss refuses bad labels, it only counts them.
#   * loss_finish takes sums, cutoff and LossOptions, and returns total, terms and summary. A bad label makes them NaN.


class Sum(IntEnum):
    """The entries of bcmf::loss_sums's sums: numerator and denominator of every mean, 0 for a term that was not asked
    for. Where there are bad labels, all others may be anything.

    C++ has the same numbers (csrc/common/args.h); a test holds the two together.
    """

    CE_SUM = 0  # over the valid pixels, or those that OHEM keeps: weight times loss
    CE_COUNT = 1  # the valid pixels' weights, or with OHEM the number of kept pixels
    VALID = 2  # |V|
    BAD_LABELS = 3  # how many labels are neither a class nor ignore_index
    CPG_SUM = 4
    CPG_COUNT = 5  # |M|
    BCL = 6  # of BCL's first step: of the losses that are supervised, and |S|; the other steps' follow


SUMS = Sum.BCL + 2 * MAX_STEPS
"""How many entries sums have."""


class Summary(IntEnum):
    """The entries of bcmf::loss's summary: what the backward needs to know of the whole batch, and reads on the device.

    C++ has the same numbers (csrc/common/args.h); a test holds the two together.
    """

    DENOMINATOR = 0  # what the cross-entropy is divided by: the valid pixels' weights, or with OHEM the kept pixels
    CUTOFF = 1  # the smallest loss that OHEM keeps
    VALID = 2  # |V|
    EDGES = 3  # |M| of CPG
    SELECTED = 4  # |S| of BCL's first step; the others' follow


SUMMARY = Summary.SELECTED + MAX_STEPS
"""How many entries a summary has."""

_SCHEMA_TYPES = {
    int: "int",
    bool: "bool",
    float: "float",
    float | None: "float?",
    Sequence[int]: "int[]",
    Sequence[float]: "float[]",
}
_OPTIONS = [f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(LossOptions).items()]
_LOSS_OPTIONS = ", ".join(_OPTIONS)

CONTRACT = {
    "SUMS": [entry.name.lower() for entry in Sum],
    "SUMMARY": [entry.name.lower() for entry in Summary],
    "TERMS": list(TERMS),
    "MAX_STEPS": MAX_STEPS,
    "LOSS_OPTIONS": _OPTIONS,
}
"""What the compiled kernels have to agree with: torch itself only counts an op's arguments."""

_LOSS = (
    f"(Tensor logits, Tensor target, Tensor? weight, {_LOSS_OPTIONS})"
    " -> (Tensor total, Tensor terms, Tensor stats, Tensor selected, Tensor marks, Tensor summary)"
)
_LOSS_BACKWARD = (
    "(Tensor grad_total, Tensor logits, Tensor target, Tensor? weight, Tensor stats, Tensor selected, Tensor marks,"
    f" Tensor summary, {_LOSS_OPTIONS}) -> Tensor"
)
_LOSS_SUMS = (
    f"(Tensor logits, Tensor target, Tensor? weight, {_LOSS_OPTIONS})"
    " -> (Tensor sums, Tensor cutoff, Tensor stats, Tensor selected, Tensor marks)"
)
_LOSS_FINISH = f"(Tensor sums, Tensor cutoff, {_LOSS_OPTIONS}) -> (Tensor total, Tensor terms, Tensor summary)"


KernelsOf = Callable[[Tensor], str]
"""Tells whose kernels take these logits: "cpu", "cuda" or "triton"."""


def id_dtype(classes: int) -> torch.dtype:
    """The dtype of labels' ids in marks: classes, and −1 and −2 for ignored and bad labels, as uint8 255 and 254."""
    return torch.uint8 if classes <= 254 else torch.int32


def _marks_bytes(kernels: str, target: Tensor, classes: int, cpg: bool) -> int:
    """Triton's kernels leave each label's id. CUDA's (csrc/cuda/kernels/marks.cuh) leave 8 bytes for each patch of 4 by
    32 pixels before them, to a multiple of 16, and with CPG 16 more."""
    if kernels == "cpu":
        return 0
    n, height, width = target.shape
    patches = n * ((height + 3) // 4) * ((width + 31) // 32) if kernels == "cuda" else 0
    return 16 * ((patches + 1) // 2 + cpg * patches) + id_dtype(classes).itemsize * target.numel()


def _fakes(kernels_of: KernelsOf) -> tuple[Callable[..., tuple[Tensor, ...]], ...]:
    """The fake kernels of bcmf::loss and of bcmf::loss_sums."""

    def loss_sums(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        acc = acc_dtype(logits)
        given = LossOptions(*options)
        images = target.shape[0] if given.bcl_steps else 0
        kernels = kernels_of(logits)
        marks = _marks_bytes(kernels, target, logits.shape[1], given.cpg_kernel_size > 0)
        maps = 1 if kernels == "cuda" and logits.shape[2:] == target.shape[1:] else 2
        return (
            logits.new_empty((SUMS,), dtype=torch.float64),
            logits.new_empty((), dtype=acc),
            logits.new_empty((maps, *target.shape), dtype=acc),
            logits.new_empty((images, *target.shape[1:]), dtype=torch.uint8),
            logits.new_empty(marks, dtype=torch.uint8),
        )

    def loss(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
        sums, cutoff, *kept = loss_sums(logits, target, weight, *options)
        total, terms, summary = _loss_finish_fake(sums, cutoff)
        return total, terms, *kept, summary

    return loss, loss_sums


def _loss_finish_fake(sums: Tensor, cutoff: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return cutoff.new_empty(()), cutoff.new_empty((len(TERMS),)), cutoff.new_empty((SUMMARY,))


def _loss_backward_fake(grad_total: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.preserve_format)


def define_loss(lib: Library, name: str, kernels_of: KernelsOf) -> Any:
    """Adds bcmf::loss to a library under this name, and returns it. Kernels for devices are the caller's."""
    fake, _ = _fakes(kernels_of)
    loss, loss_backward = _define(lib, name, _LOSS, fake, _LOSS_BACKWARD, _loss_backward_fake)

    class Loss(_Function):
        @staticmethod
        def forward(
            ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any
        ) -> tuple[Tensor, ...]:
            with torch._C._AutoDispatchBelowAutograd():
                total, *others = loss(logits, target, weight, *options)
            _, *kept = others
            ctx.save_for_backward(logits, target, weight, *kept)
            ctx.options = options
            ctx.mark_non_differentiable(*others)
            ctx.set_materialize_grads(False)  # Otherwise zeros of the size of stats would be made.
            return total, *others

        @staticmethod
        def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            grad = None if grad_total is None else loss_backward(grad_total, *ctx.saved_tensors, *ctx.options)
            return grad, None, None, *(None for _ in ctx.options)

    lib.impl(name, Loss.apply, "Autograd")
    return loss


def _raise_on_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "bcmf::loss_sums and bcmf::loss_finish have no derivative: bcmf::loss_backward finds that of both together."
    )


def define_loss_halves(lib: Library, kernels_of: KernelsOf, suffix: str = "") -> tuple[Any, Any]:
    """Adds bcmf::loss_sums and bcmf::loss_finish to a library, their names followed by suffix, and returns both."""
    _, fake = _fakes(kernels_of)
    sums = _define_one(lib, f"loss_sums{suffix}", _LOSS_SUMS, fake, _raise_on_backward)
    return sums, _define_one(lib, f"loss_finish{suffix}", _LOSS_FINISH, _loss_finish_fake, _raise_on_backward)


def _by_device(logits: Tensor) -> str:
    return "cuda" if logits.device.type == "cuda" else "cpu"


def _always_triton(_: Tensor) -> str:
    return "triton"


LOSS = {"cpu": define_loss(LIB, "loss", _by_device), "triton": define_loss(LIB, "loss_triton", _always_triton)}
"""The op that each impl calls."""
LOSS_HALVES = {
    "cpu": define_loss_halves(LIB, _by_device),
    "triton": define_loss_halves(LIB, _always_triton, "_triton"),
}
"""loss_sums and loss_finish of each impl."""
LOSS["cuda"], LOSS_HALVES["cuda"] = LOSS["cpu"], LOSS_HALVES["cpu"]  # One op has both kernels; the device chooses.


# --------------------------------------------------------------------------------------------------------------------
# bcmf::upsample_argmax resamples logits (N, C, h, w) to (height, width) and returns the class of each pixel, (N,
# height, width), uint8, or int32 where C > 256.
# bcmf::upsample_confusion does that at the size of target (N, H, W), and also returns bins (C² + 2,) int64: bin label ·
# C + class counts the pixels that have this label and class, the last but one those whose label is neither a class nor
# ignored, and the last one those that are ignored.


def argmax_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of label maps with a class of each pixel."""
    return torch.uint8 if logits.shape[1] <= 256 else torch.int32


def _upsample_argmax_fake(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    return logits.new_empty((logits.shape[0], height, width), dtype=argmax_dtype(logits))


def _upsample_confusion_fake(
    logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool
) -> tuple[Tensor, Tensor]:
    bins = logits.new_empty((logits.shape[1] ** 2 + 2,), dtype=torch.int64)
    return logits.new_empty(target.shape, dtype=argmax_dtype(logits)), bins


def define_upsample_argmax(lib: Library, name: str) -> Any:
    """Adds bcmf::upsample_argmax to a library under this name, and returns it."""
    schema = "(Tensor logits, SymInt height, SymInt width, bool align_corners) -> Tensor"
    return _define_one(lib, name, schema, _upsample_argmax_fake)


UPSAMPLE_ARGMAX = {
    "cpu": define_upsample_argmax(LIB, "upsample_argmax"),
    "triton": define_upsample_argmax(LIB, "upsample_argmax_triton"),
}
"""The op that each impl calls."""
UPSAMPLE_ARGMAX["cuda"] = UPSAMPLE_ARGMAX["cpu"]
LIB.define(
    "upsample_confusion(Tensor logits, Tensor target, int ignore_index, bool align_corners)"
    " -> (Tensor classes, Tensor bins)"
)
torch.library.register_fake("bcmf::upsample_confusion", _upsample_confusion_fake, lib=LIB)


# --------------------------------------------------------------------------------------------------------------------
# These ops count for the metrics, on the CPU.
# bcmf::read_labels takes prediction and target of any one shape, and returns both as uint8 (int32 where there are more
# than 255 classes), with num_classes where a pixel does not count, because it is ignored or out of range; and the
# number of pixels that are out of range, () int64.
# bcmf::count_pairs takes a and b, uint8 or int32, and returns (rows, columns) int64: how many pixels have which a and
# b. Pixels with other values are left out.
# bcmf::match_within is described at bcmf_ext.metrics.boundary.match_within.


def label_dtype(num_classes: int) -> torch.dtype:
    """The dtype of label maps that may hold num_classes, too, for pixels that do not count."""
    return torch.uint8 if num_classes <= 255 else torch.int32


def _read_labels_fake(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = label_dtype(num_classes)
    guess, truth = (ids.new_empty(ids.shape, dtype=dtype) for ids in (prediction, target))
    return guess, truth, target.new_empty((), dtype=torch.int64)


for _schema, _fake in (
    (
        "read_labels(Tensor prediction, Tensor target, int num_classes, int ignore_index) -> (Tensor, Tensor, Tensor)",
        _read_labels_fake,
    ),
    (
        "count_pairs(Tensor a, Tensor b, int rows, int columns) -> Tensor",
        lambda a, b, rows, columns: a.new_empty((rows, columns), dtype=torch.int64),
    ),
    (
        "match_within(Tensor queries, Tensor sites, int num_classes, int[] radii) -> Tensor",
        lambda queries, *_: queries.new_empty(queries.shape, dtype=torch.uint8),
    ),
):
    LIB.define(_schema)
    torch.library.register_fake(f"bcmf::{_schema.split('(')[0]}", _fake, lib=LIB)


# --------------------------------------------------------------------------------------------------------------------
# These ops do what LMFM and DAPPM need between convolutions: relu(norm(·)) of several maps at once.
# bcmf::pool_norm_relu does it for the average pools 5/2, 9/4 and 17/8 (size/stride; centred; padding counts) and the
# global pool of x (N, C, h, w), which is read once. It returns four maps.
# bcmf::add_norm_relu does it for each branch's sum of two maps, one that is resampled bilinearly to (height, width) and
# one of that size; either may be missing. It returns the maps of one or two branches (an empty one in the place of a
# second) or, joined, one map of all branches' channels. Their number is fixed, because an op that writes to arguments
# must not return a list.
# Both take the norms' weights, biases, running means and running variances, (C,) in acc_dtype, in the order of the
# branches' channels; a norm may span several branches. In training the statistics are those of the batch, and the
# running ones move towards them.
# Outputs have the maps' dtype. They are in channels_last if x is, or as asked: single pixels look like either layout.
# Both also return stats (2, channels of all branches): mean and 1/√(variance + eps).

POOLS = ((5, 2), (9, 4), (17, 8))
"""The sizes and strides of the average pools."""


def empty_map(like: Tensor, channels: int, height: int, width: int, channels_last: bool) -> Tensor:
    """An empty map (N, channels, height, width), whose N, dtype and device are like's."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (like.shape[0], channels, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def pool_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """The sizes of the pools of a map, the global one last."""
    return [*(((height - 1) // stride + 1, (width - 1) // stride + 1) for _, stride in POOLS), (1, 1)]


def empty_pools(x: Tensor) -> list[Tensor]:
    """Empty maps for the pools of x."""
    return [empty_map(x, x.shape[1], *size, x.stride(1) == 1) for size in pool_sizes(*x.shape[2:])]


def empty_sums(
    resampled: Sequence[Tensor | None],
    added: Sequence[Tensor | None],
    height: int,
    width: int,
    channels_last: bool,
    joined: bool,
) -> list[Tensor]:
    """Empty maps for the outputs of bcmf::add_norm_relu."""
    maps = [next(map for map in pair if map is not None) for pair in zip(resampled, added, strict=True)]
    channels = [map.shape[1] for map in maps]
    sizes = [sum(channels)] if joined else channels
    outputs = [empty_map(maps[0], size, height, width, channels_last) for size in sizes]
    return outputs if len(outputs) > 1 else [*outputs, maps[0].new_empty(0)]


def empty_stats(like: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """A tensor (2, channels) for the norms' statistics, or for gradients of their weights and biases."""
    return like.new_empty((2, sum(weight.shape[0] for weight in weights)), dtype=acc_dtype(like))


def _pool_norm_relu_fake(x: Tensor, weights: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    return *empty_pools(x), empty_stats(x, weights)


def _pool_norm_relu_backward_fake(
    grads: Sequence[Tensor], x: Tensor, weights: Sequence[Tensor], *_: Any
) -> tuple[list[Tensor], Tensor]:
    return [torch.empty_like(x, memory_format=torch.preserve_format)], empty_stats(x, weights)


def _add_norm_relu_fake(
    resampled: Sequence[Tensor | None], added: Sequence[Tensor | None], weights: Sequence[Tensor], *options: Any
) -> tuple[Tensor, ...]:
    outputs = empty_sums(resampled, added, *options[3:7])
    return *outputs, empty_stats(outputs[0], weights)


def _add_norm_relu_backward_fake(
    grads: Sequence[Tensor],
    resampled: Sequence[Tensor | None],
    added: Sequence[Tensor | None],
    weights: Sequence[Tensor],
    *_: Any,
) -> tuple[list[Tensor], Tensor]:
    maps = [map for map in (*resampled, *added) if map is not None]
    return [torch.empty_like(map, memory_format=torch.preserve_format) for map in maps], empty_stats(maps[0], weights)


def _define_norm_relu(
    lib: Library, name: str, maps: str, size: str, outputs: int, fake: Any, backward_fake: Any
) -> tuple[Any, Any]:
    """Adds one of the two ops; maps and size are the parts of their schemas that differ, outputs the number of maps."""
    given = f"{maps}, Tensor[] weights, Tensor[] biases"
    running = "Tensor(a!)[] means, Tensor(b!)[] variances"
    return _define(
        lib,
        name,
        f"({given}, {running}, {size}bool training, float momentum, float eps) -> ({'Tensor, ' * outputs}Tensor stats)",
        fake,
        f"(Tensor[] grads, {given}, Tensor stats, {size}bool training) -> (Tensor[] grad_maps, Tensor grad_norms)",
        backward_fake,
    )


def _split_norms(grad_norms: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Takes a tensor of the norms' gradients apart: the gradients of all weights, then those of all biases."""
    sizes = [weight.shape[0] for weight in weights]
    return [*grad_norms[0].split(sizes), *grad_norms[1].split(sizes)]


def _check_lengths(what: str, *lists: Sequence[Any]) -> None:
    """ValueError for lists of different lengths. Functions take them apart by the length of the first, so that entries
    of one would be taken for those of the next."""
    if len({len(entries) for entries in lists}) > 1:
        raise ValueError(f"{what} are lists of one length, not of {', '.join(str(len(entries)) for entries in lists)}.")


def define_pool_norm_relu(lib: Library, name: str) -> Any:
    """Adds bcmf::pool_norm_relu to a library under this name, and returns it."""
    fakes = _pool_norm_relu_fake, _pool_norm_relu_backward_fake
    op, op_backward = _define_norm_relu(lib, name, "Tensor x", "", len(POOLS) + 1, *fakes)

    class PoolNormRelu(_Function):
        """Gets the entries of lists as arguments of their own, since autograd does not look into lists."""

        @staticmethod
        def forward(ctx: Any, norms: int, training: bool, momentum: float, eps: float, x: Tensor, *rest: Tensor) -> Any:
            weights, biases, means, variances = (rest[i * norms : (i + 1) * norms] for i in range(4))
            with torch._C._AutoDispatchBelowAutograd():
                *outputs, stats = op(x, weights, biases, means, variances, training, momentum, eps)
            ctx.save_for_backward(x, *weights, *biases, stats)
            ctx.norms, ctx.training = norms, training
            ctx.mark_non_differentiable(stats)
            return *outputs, stats

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            x, *parameters, stats = ctx.saved_tensors
            weights, biases = parameters[: ctx.norms], parameters[ctx.norms :]
            (grad,), grad_norms = op_backward(grads[:-1], x, weights, biases, stats, ctx.training)
            return None, None, None, None, grad, *_split_norms(grad_norms, weights), *[None] * (2 * ctx.norms)

    def autograd(x: Tensor, weights: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, ...]:
        biases, means, variances, *options = arguments
        _check_lengths("weights, biases, means and variances", weights, biases, means, variances)
        return PoolNormRelu.apply(len(weights), *options, x, *weights, *biases, *means, *variances)

    lib.impl(name, autograd, "Autograd")
    return op


def define_add_norm_relu(lib: Library, name: str) -> Any:
    """Adds bcmf::add_norm_relu to a library under this name, and returns it."""
    maps = "Tensor?[] resampled, Tensor?[] added"
    fakes = _add_norm_relu_fake, _add_norm_relu_backward_fake
    size = "SymInt height, SymInt width, bool channels_last, bool joined, "
    op, op_backward = _define_norm_relu(lib, name, maps, size, 2, *fakes)

    class AddNormRelu(_Function):
        @staticmethod
        def forward(ctx: Any, branches: int, norms: int, options: Sequence[Any], *rest: Tensor | None) -> Any:
            resampled, added = rest[:branches], rest[branches : 2 * branches]
            starts = range(2 * branches, len(rest), norms)
            weights, biases, means, variances = (rest[start : start + norms] for start in starts)
            with torch._C._AutoDispatchBelowAutograd():
                *outputs, stats = op(resampled, added, weights, biases, means, variances, *options)
            ctx.save_for_backward(*resampled, *added, *weights, *biases, stats)
            ctx.branches, ctx.norms, ctx.options = branches, norms, options[:-2]
            ctx.mark_non_differentiable(stats)
            return *outputs, stats

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            *maps, stats = ctx.saved_tensors
            parameters = maps[2 * ctx.branches :]
            resampled, added = maps[: ctx.branches], maps[ctx.branches : 2 * ctx.branches]
            weights, biases = parameters[: ctx.norms], parameters[ctx.norms :]
            grad_maps, grad_norms = op_backward(grads[:-1], resampled, added, weights, biases, stats, *ctx.options)
            of_maps = iter(grad_maps)
            found = [None if map is None else next(of_maps) for map in (*resampled, *added)]
            return None, None, None, *found, *_split_norms(grad_norms, weights), *[None] * (2 * ctx.norms)

    def autograd(
        resampled: Sequence[Tensor | None], added: Sequence[Tensor | None], weights: Sequence[Tensor], *arguments: Any
    ) -> tuple[Tensor, ...]:
        biases, means, variances, *options = arguments
        _check_lengths("weights, biases, means and variances", weights, biases, means, variances)
        _check_lengths("maps that are resampled and added", resampled, added)
        tensors = (*resampled, *added, *weights, *biases, *means, *variances)
        return AddNormRelu.apply(len(added), len(weights), tuple(options), *tensors)

    lib.impl(name, autograd, "Autograd")
    return op


POOL_NORM_RELU = {
    "cpu": define_pool_norm_relu(LIB, "pool_norm_relu"),
    "triton": define_pool_norm_relu(LIB, "pool_norm_relu_triton"),
}
ADD_NORM_RELU = {
    "cpu": define_add_norm_relu(LIB, "add_norm_relu"),
    "triton": define_add_norm_relu(LIB, "add_norm_relu_triton"),
}
POOL_NORM_RELU["cuda"], ADD_NORM_RELU["cuda"] = POOL_NORM_RELU["cpu"], ADD_NORM_RELU["cpu"]


# --------------------------------------------------------------------------------------------------------------------
# bcmf::srm does what SRM needs behind its convolutions (docs/definitions.md, Context modules). It takes low (N, C, h,
# w), raw (N, 11, H, W), H >= h, W >= w: the two channels of Δ₀ and the nine logits of a, in low's dtype or in
# acc_dtype, and residual (N, C, H, W) in low's dtype. It returns low, upsampled and read at each pixel's place plus Δ,
# plus residual (N, C, H, W), in residual's layout. The backward takes the upstream gradient of that, and low and raw,
# whose gradients it returns. All is fastest in channels_last; other layouts are copied. A NaN among the offsets and
# logits that a pixel's position is mixed from makes the pixel NaN.


def _srm_fake(low: Tensor, raw: Tensor, residual: Tensor) -> Tensor:
    return torch.empty_like(residual)


def _srm_backward_fake(grad: Tensor, low: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(low), torch.empty_like(raw)


def define_srm(lib: Library, name: str) -> Any:
    """Adds bcmf::srm to a library under this name, and returns it."""
    op, op_backward = _define(
        lib,
        name,
        "(Tensor low, Tensor raw, Tensor residual) -> Tensor",
        _srm_fake,
        "(Tensor grad, Tensor low, Tensor raw) -> (Tensor grad_low, Tensor grad_raw)",
        _srm_backward_fake,
    )

    class Srm(_Function):
        @staticmethod
        def forward(ctx: Any, low: Tensor, raw: Tensor, residual: Tensor) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                out = op(low, raw, residual)
            ctx.save_for_backward(low, raw)
            return out

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            return *op_backward(grad, *ctx.saved_tensors), grad

    lib.impl(name, Srm.apply, "Autograd")
    return op


SRM = {"cpu": define_srm(LIB, "srm"), "triton": define_srm(LIB, "srm_triton")}
"""The op that each impl calls."""
SRM["cuda"] = SRM["cpu"]


# --------------------------------------------------------------------------------------------------------------------
# Triton's kernels are imported when they are first needed, because importing triton takes a while.


def _triton_kernel(module: str, name: str) -> Any:
    def kernel(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"bcmf_ext.triton.{module}"), name)(*arguments)

    return kernel


for _device in ("CUDA", "CPU"):  # On the CPU they are interpreted, for tests.
    LIB.impl("loss_triton", _triton_kernel("loss", "loss"), _device)
    LIB.impl("loss_triton_backward", _triton_kernel("loss", "loss_backward"), _device)
    LIB.impl("loss_sums_triton", _triton_kernel("loss", "loss_sums"), _device)
    LIB.impl("loss_finish_triton", _triton_kernel("loss", "loss_finish"), _device)
    LIB.impl("upsample_argmax_triton", _triton_kernel("argmax", "upsample_argmax"), _device)
    LIB.impl("srm_triton", _triton_kernel("srm", "srm"), _device)
    LIB.impl("srm_triton_backward", _triton_kernel("srm", "srm_backward"), _device)
    for _op in ("pool_norm_relu", "add_norm_relu"):
        LIB.impl(f"{_op}_triton", _triton_kernel("lmfm", _op), _device)
        LIB.impl(f"{_op}_triton_backward", _triton_kernel("lmfm", f"{_op}_backward"), _device)
