"""torch.ops.bcmf: schemas, fake kernels and autograd. C++ adds the kernels (csrc/ops.cpp).

They are defined in Python so that they exist, and can be traced, without a compiler. An op's kernel for the Autograd
key is a ``torch.autograd.Function`` (not a Function around the op: that would lose the gradient in exported modules).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LIB = torch.library.Library("bcmf", "DEF")


def acc_dtype(logits: Tensor) -> torch.dtype:
    """What losses are computed and returned in: fp64 for fp64 logits, else fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


# --------------------------------------------------------------------------------------------------------------------
# loss: the mean cross-entropy so far; OHEM, BCL and CPG join as further arguments.
#   logits (N, C, H, W), target (N, H, W), weight (C,) or None
#   → total (), differentiable;
#     stats (2, N, H, W): m = max_c Z_c and log Σ_c exp(Z_c − m), kept apart so that small losses keep their digits;
#     denominator (): Σ_V w_Y, read by the backward on the device.

LIB.define(
    "loss(Tensor logits, Tensor target, Tensor? weight, int ignore_index)"
    " -> (Tensor total, Tensor stats, Tensor denominator)"
)
LIB.define(
    "loss_backward(Tensor grad_total, Tensor logits, Tensor target, Tensor? weight, Tensor stats, Tensor denominator,"
    " int ignore_index) -> Tensor"
)


def loss_lacks(*, ohem: bool = False, bcl: bool = False, cpg: bool = False) -> str | None:
    """What the kernels of bcmf::loss cannot do yet in this mix, as a reason to run in PyTorch; None if nothing."""
    lacking = [name for name, asked in (("OHEM", ohem), ("BCL", bcl), ("CPG", cpg)) if asked]
    return f"{' and '.join(lacking)} {'have' if len(lacking) > 1 else 'has'} no kernel yet" if lacking else None


@torch.library.register_fake("bcmf::loss", lib=LIB)
def _loss_fake(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(logits)
    return (
        logits.new_empty((), dtype=acc),
        logits.new_empty((2, *target.shape), dtype=acc),
        logits.new_empty((), dtype=acc),
    )


@torch.library.register_fake("bcmf::loss_backward", lib=LIB)
def _loss_backward_fake(grad_total: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.preserve_format)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            total, stats, denominator = torch.ops.bcmf.loss(logits, target, weight, ignore_index)
        ctx.save_for_backward(logits, target, weight, stats, denominator)
        ctx.ignore_index = ignore_index
        ctx.mark_non_differentiable(stats, denominator)
        ctx.set_materialize_grads(False)  # no zeros the size of stats
        return total, stats, denominator

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, *_: Any) -> tuple[Tensor | None, None, None, None]:
        if grad_total is None:
            return None, None, None, None
        logits, target, weight, stats, denominator = ctx.saved_tensors
        grad = torch.ops.bcmf.loss_backward(grad_total, logits, target, weight, stats, denominator, ctx.ignore_index)
        return grad, None, None, None


LIB.impl("loss", _Loss.apply, "Autograd")


def _raise_on_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "bcmf_ext's losses have no second derivative: use impl='torch' where you need a gradient of a gradient."
    )


torch.library.register_autograd(
    "bcmf::loss_backward",
    _raise_on_double_backward,
    setup_context=lambda ctx, inputs, output: None,
    lib=LIB,
)
