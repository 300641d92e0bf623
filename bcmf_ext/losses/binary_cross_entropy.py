"""Binary cross-entropy as a first term (docs/definitions.md, Binary cross-entropy)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, reference
from ..checks import is_traced, without_autocast
from ..ops import acc_dtype
from ._chunks import sum_over_images
from ._compute import read_inputs


def binary_cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None, ignore_index: int, align_corners: bool, impl: str
) -> Tensor:
    """Each class against the others: (1/|V|) Σ_V Σ_c w_c · BCEWithLogits(Z_c, [Y = c]), in plain PyTorch.

    Arguments, result and errors are those of `cross_entropy`; every impl computes the same. The gradient is computed
    along with the loss, some images at a time, so that nothing of the labels' size is kept for the backward; a second
    derivative is only the reference's.
    """
    target, ignore_index, align_corners = read_inputs(logits, target, weight, ignore_index, align_corners)
    dispatch.choose("segmentation_loss", impl, logits.device)
    if torch.compiler.is_compiling() or is_traced(logits):
        return reference.compute_bce(logits, target, weight, ignore_index, align_corners)
    with without_autocast(logits):
        total = sum_over_images(
            lambda z, y: reference.sum_bce(z, y, weight, ignore_index, align_corners), logits, target
        )
    return (total / reference.count_valid(target, ignore_index)).to(acc_dtype(logits))
