"""What a file of this folder gives bench/kernels.py to measure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bcmf_ext import dispatch


@dataclass(frozen=True)
class Problem:
    """A loss of some logits.

    contenders: from logits to a scalar, by name; the first is the baseline. definition: the same in fp64. work: bytes
    and exponentials that each phase (forward, backward, both) needs at least.
    """

    title: str
    logits: Tensor
    contenders: Mapping[str, Callable[[Tensor], Tensor]]
    definition: Callable[[Tensor], Tensor]
    work: Mapping[str, tuple[float, float]]


def our_impls(device: torch.device, lacks: str | None = None) -> list[str]:
    """Every impl of ours that runs an op on this device, except interpreted ones."""
    candidates = ("cpu", "torch") if device.type == "cpu" else ("cuda", "triton", "torch")
    return [impl for impl in candidates if dispatch.why_not(impl, device.type, lacks) is None]


def random_logits(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(N, classes, H, W) for labels (N, H, W), normally distributed."""
    generator = torch.Generator(labels.device).manual_seed(0)
    shape = (labels.shape[0], classes, *labels.shape[1:])
    return torch.randn(shape, generator=generator, device=labels.device).to(dtype).requires_grad_()
