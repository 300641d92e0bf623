"""Losses in plain PyTorch, some images at a time, so that nothing of the labels' size outlives its chunk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import acc_dtype

CHUNK = 1 << 21
"""How many numbers are worked on at once: 16 MB of doubles, which a cache holds, and which glibc keeps when they are
freed."""


def sum_over_images(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
    """Σ function(logits, target) over chunks of images, fp64.

    function: a sum over images, of logits (n, C, h, w) in fp32 (fp64) and labels (n, H, W). The gradient is computed
    along with the sum and kept until the backward: it has the size of the logits, and what it is computed from that of
    the labels. So it cannot be differentiated once more.
    """
    return _SumOverImages.apply(function, logits, target)


class _SumOverImages(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Tensor:
        differentiate = ctx.needs_input_grad[1]
        grad = torch.zeros_like(logits, dtype=acc_dtype(logits)) if differentiate else None
        total = torch.zeros((), dtype=torch.float64, device=logits.device)
        images = max(1, CHUNK // max(1, logits.shape[1] * target[:1].numel()))
        for first in range(0, logits.shape[0], images):
            chunk = slice(first, first + images)
            with torch.set_grad_enabled(differentiate):
                own = logits[chunk].detach().to(acc_dtype(logits)).requires_grad_(differentiate)
                part = function(own, target[chunk])
            total += part.detach()
            if grad is not None:
                (grad[chunk],) = torch.autograd.grad(part, own)
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        (grad,) = ctx.saved_tensors
        return None, grad * upstream.to(grad.dtype), None
