"""torch.ops.bcmf: schemas, fake kernels and autograd. C++ adds the kernels (csrc/ops.cpp).

They are defined in Python so that they exist, and can be traced, without a compiler. An op's kernel for the Autograd
key is a ``torch.autograd.Function`` (not a Function around the op: that would lose the gradient in exported modules).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import Library

LIB = Library("bcmf", "DEF")


def acc_dtype(logits: Tensor) -> torch.dtype:
    """What losses are computed and returned in: fp64 for fp64 logits, else fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _raise_on_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "bcmf_ext's losses have no second derivative: use impl='torch' where you need a gradient of a gradient."
    )


def _define(lib: Library, name: str, schema: str, fake: Any, backward_schema: str, backward_fake: Any) -> Any:
    """Adds an op and its backward, ``{name}_backward``, to a library: schemas, fake kernels, and no second derivative.
    Returns both; the autograd of the first is the caller's."""
    for op, op_schema, op_fake in ((name, schema, fake), (f"{name}_backward", backward_schema, backward_fake)):
        lib.define(op + op_schema)
        torch.library.register_fake(f"{lib.ns}::{op}", op_fake, lib=lib)
    torch.library.register_autograd(
        f"{lib.ns}::{name}_backward",
        _raise_on_double_backward,
        setup_context=lambda ctx, inputs, output: None,
        lib=lib,
    )
    namespace = getattr(torch.ops, lib.ns)
    return getattr(namespace, name), getattr(namespace, f"{name}_backward")


# --------------------------------------------------------------------------------------------------------------------
# loss: any mix of cross-entropy or OHEM, BCL and CPG, of logits of any size.
#   logits (N, C, h, w), target (N, H, W), weight (C,) or None, and LossOptions
#   → total (), differentiable;
#     terms (3,), unweighted: cross-entropy, BCL, CPG, 0 for one that was not asked for;
#     stats (2, N, H, W): m = max_c Z_c and log Σ_c exp(Z_c − m), kept apart so that small losses keep their digits;
#     selected (N, H, W) uint8, (0, H, W) without BCL: bit s says whether BCL's step s selected the pixel;
#     summary (SUMMARY,), which the backward reads on the device: what each mean is taken over, and the smallest loss
#     that OHEM keeps (csrc/device/common.cuh).

SUMMARY = 12


class LossOptions(NamedTuple):
    """What is asked of bcmf::loss, in the order of its schema. bcl_steps empty: without BCL; cpg_kernel_size 0: without
    CPG; bcl_flipped: empty, or α and β of the flipped labels."""

    ignore_index: int
    align_corners: bool = False
    ce: bool = True
    ohem_threshold: float | None = None
    ohem_min_kept: int = 0
    bcl_weight: float = 0.0
    bcl_steps: Sequence[int] = ()
    bcl_flipped: Sequence[float] = ()
    bcl_threshold: float = 1.0
    bcl_nms_size: int = 1
    cpg_weight: float = 0.0
    cpg_kernel_size: int = 0
    cpg_window: bool = True


_LOSS_OPTIONS = (
    "int ignore_index, bool align_corners, bool ce, float? ohem_threshold, int ohem_min_kept, float bcl_weight,"
    " int[] bcl_steps, float[] bcl_flipped, float bcl_threshold, int bcl_nms_size, float cpg_weight,"
    " int cpg_kernel_size, bool cpg_window"
)
_LOSS = (
    f"(Tensor logits, Tensor target, Tensor? weight, {_LOSS_OPTIONS})"
    " -> (Tensor total, Tensor terms, Tensor stats, Tensor selected, Tensor summary)"
)
_LOSS_BACKWARD = (
    "(Tensor grad_total, Tensor logits, Tensor target, Tensor? weight, Tensor stats, Tensor selected, Tensor summary,"
    f" {_LOSS_OPTIONS}) -> Tensor"
)


def _loss_fake(logits: Tensor, target: Tensor, weight: Tensor | None, *options: Any) -> tuple[Tensor, ...]:
    acc = acc_dtype(logits)
    images = target.shape[0] if LossOptions(*options).bcl_steps else 0
    return (
        logits.new_empty((), dtype=acc),
        logits.new_empty((3,), dtype=acc),
        logits.new_empty((2, *target.shape), dtype=acc),
        logits.new_empty((images, *target.shape[1:]), dtype=torch.uint8),
        logits.new_empty((SUMMARY,), dtype=acc),
    )


def _loss_backward_fake(grad_total: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.preserve_format)


def define_loss(lib: Library, name: str) -> Any:
    """Adds bcmf::loss to a library under this name, and returns it. Kernels for devices are the caller's."""
    loss, loss_backward = _define(lib, name, _LOSS, _loss_fake, _LOSS_BACKWARD, _loss_backward_fake)

    class Loss(torch.autograd.Function):
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
            ctx.set_materialize_grads(False)  # no zeros the size of stats
            return total, *others

        @staticmethod
        def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            grad = None if grad_total is None else loss_backward(grad_total, *ctx.saved_tensors, *ctx.options)
            return grad, None, None, *(None for _ in ctx.options)

    lib.impl(name, Loss.apply, "Autograd")
    return loss


LOSS = {"cpu": define_loss(LIB, "loss"), "triton": define_loss(LIB, "loss_triton")}
"""bcmf::loss by impl."""
LOSS["cuda"] = LOSS["cpu"]  # one op, whose kernel the tensors' device chooses


# --------------------------------------------------------------------------------------------------------------------
# upsample_argmax: logits (N, C, h, w) → the class of each pixel, (N, height, width), uint8 or, of C > 256, int32.
# upsample_confusion: the same at the size of target (N, H, W), and bins (C² + 2,) int64: how many pixels have which
#   label and class, by label · C + class; how many a label that is neither a class nor ignored; how many are ignored.


def argmax_dtype(logits: Tensor) -> torch.dtype:
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
    lib.define(f"{name}(Tensor logits, int height, int width, bool align_corners) -> Tensor")
    torch.library.register_fake(f"{lib.ns}::{name}", _upsample_argmax_fake, lib=lib)
    return getattr(getattr(torch.ops, lib.ns), name)


UPSAMPLE_ARGMAX = {
    "cpu": define_upsample_argmax(LIB, "upsample_argmax"),
    "triton": define_upsample_argmax(LIB, "upsample_argmax_triton"),
}
"""bcmf::upsample_argmax by impl."""
UPSAMPLE_ARGMAX["cuda"] = UPSAMPLE_ARGMAX["cpu"]
LIB.define(
    "upsample_confusion(Tensor logits, Tensor target, int ignore_index, bool align_corners)"
    " -> (Tensor classes, Tensor bins)"
)
torch.library.register_fake("bcmf::upsample_confusion", _upsample_confusion_fake, lib=LIB)


# --------------------------------------------------------------------------------------------------------------------
# Triton's kernels. Importing triton takes a while: not before they are needed.


def _triton_kernel(module: str, name: str) -> Any:
    def kernel(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"bcmf_ext.triton.{module}"), name)(*arguments)

    return kernel


for _device in ("CUDA", "CPU"):  # on the CPU they are interpreted, for tests
    LIB.impl("loss_triton", _triton_kernel("loss", "loss"), _device)
    LIB.impl("loss_triton_backward", _triton_kernel("loss", "loss_backward"), _device)
    LIB.impl("upsample_argmax_triton", _triton_kernel("argmax", "upsample_argmax"), _device)
