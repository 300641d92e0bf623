"""torch.ops.bcmf: schemas, fake kernels and autograd. C++ adds the kernels (csrc/ops.cpp).

They are defined in Python so that they exist, and can be traced, without a compiler. An op's kernel for the Autograd
key is a ``torch.autograd.Function`` (not a Function around the op: that would lose the gradient in exported modules).
"""

from __future__ import annotations

from typing import Any

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
# loss: the mean cross-entropy, or OHEM's; BCL and CPG join as further arguments.
#   logits (N, C, H, W), target (N, H, W), weight (C,) or None
#   → total (), differentiable;
#     stats (2, N, H, W): m = max_c Z_c and log Σ_c exp(Z_c − m), kept apart so that small losses keep their digits;
#     summary (2,), which the backward reads on the device: the mean's denominator, and the smallest loss OHEM keeps.

_LOSS_OPTIONS = "int ignore_index, float? ohem_threshold, int ohem_min_kept"
_LOSS = (
    f"(Tensor logits, Tensor target, Tensor? weight, {_LOSS_OPTIONS}) -> (Tensor total, Tensor stats, Tensor summary)"
)
_LOSS_BACKWARD = (
    "(Tensor grad_total, Tensor logits, Tensor target, Tensor? weight, Tensor stats, Tensor summary,"
    f" {_LOSS_OPTIONS}) -> Tensor"
)


def loss_lacks(*, bcl: bool = False, cpg: bool = False) -> str | None:
    """What the kernels of bcmf::loss cannot do yet in this mix, as a reason to run in PyTorch; None if nothing."""
    lacking = [name for name, asked in (("BCL", bcl), ("CPG", cpg)) if asked]
    return f"{' and '.join(lacking)} {'have' if len(lacking) > 1 else 'has'} no kernel yet" if lacking else None


def _loss_fake(logits: Tensor, target: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(logits)
    return (
        logits.new_empty((), dtype=acc),
        logits.new_empty((2, *target.shape), dtype=acc),
        logits.new_empty((2,), dtype=acc),
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
        ) -> tuple[Tensor, Tensor, Tensor]:
            with torch._C._AutoDispatchBelowAutograd():
                total, stats, summary = loss(logits, target, weight, *options)
            ctx.save_for_backward(logits, target, weight, stats, summary)
            ctx.options = options
            ctx.mark_non_differentiable(stats, summary)
            ctx.set_materialize_grads(False)  # no zeros the size of stats
            return total, stats, summary

        @staticmethod
        def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
            grad = None if grad_total is None else loss_backward(grad_total, *ctx.saved_tensors, *ctx.options)
            return grad, None, None, *(None for _ in ctx.options)

    lib.impl(name, Loss.apply, "Autograd")
    return loss


LOSS = {"cpu": define_loss(LIB, "loss"), "triton": define_loss(LIB, "loss_triton")}
"""bcmf::loss by impl."""
LOSS["cuda"] = LOSS["cpu"]  # one op, whose kernel the tensors' device chooses


def _loss_triton(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from .triton import loss  # not before it is needed: importing triton takes a while

    return loss.loss(*arguments)


def _loss_triton_backward(*arguments: Any) -> Tensor:
    from .triton import loss

    return loss.loss_backward(*arguments)


for _device in ("CUDA", "CPU"):  # on the CPU it is interpreted, for tests
    LIB.impl("loss_triton", _loss_triton, _device)
    LIB.impl("loss_triton_backward", _loss_triton_backward, _device)
