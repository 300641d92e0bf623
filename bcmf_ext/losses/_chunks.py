"""Losses in plain PyTorch, some images at a time, so that nothing of the labels' size outlives its chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..ops import acc_dtype

CHUNK_ON_CPU = 1 << 21
"""How many numbers are worked on at once: 16 MB of doubles, which a cache holds, and which glibc keeps when they are
freed."""

CHUNK_ON_GPU = 1 << 25
"""The same: 256 MB of doubles, in which each kernel has enough to do."""


def chunk_length(numbers: int, device: torch.device) -> int:
    """How many pieces of so many numbers each make a chunk; at least one."""
    return max(1, (CHUNK_ON_CPU if device.type == "cpu" else CHUNK_ON_GPU) // max(1, numbers))


def sum_over_images(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
    """Σ function(logits, target) over chunks of images, fp64.

    function: a sum over images, of logits (n, C, h, w) in fp32 (fp64) and labels (n, H, W). The gradient is computed
    along with the sum and kept until the backward: it has the size of the logits, and what it is computed from that of
    the labels. So it cannot be differentiated once more; who tries is told.
    """
    return _SumOverImages.apply(function, logits, target, torch.is_grad_enabled() and logits.requires_grad)


class _SumOverImages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor, differentiate: bool
    ) -> Tensor:
        grad = torch.zeros_like(logits, dtype=acc_dtype(logits)) if differentiate else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        images = chunk_length(logits.shape[1] * target[:1].numel(), logits.device)
        for first in range(0, logits.shape[0], images):
            chunk = slice(first, first + images)
            with torch.set_grad_enabled(differentiate):
                own = logits[chunk].detach().to(acc_dtype(logits)).requires_grad_(differentiate)
                part = function(own, target[chunk])
            total += part.detach()
            if grad is not None:
                (grad[chunk],) = torch.autograd.grad(part, own)
        if grad is not None:
            ctx.save_for_backward(logits, grad)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:
        return None, _Gradient.apply(*ctx.saved_tensors, upstream), None, None


class _Gradient(torch.autograd.Function):
    """The gradient, times what comes in. It depends on the logits, so that a second derivative ends here."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, grad: Tensor, upstream: Tensor) -> Tensor:
        return grad * upstream.to(grad.dtype)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> NoReturn:
        raise NotImplementedError(
            "This loss computes its gradient along with its value, and has no second derivative: use that of "
            "bcmf_ext.reference where you need a gradient of a gradient."
        )
