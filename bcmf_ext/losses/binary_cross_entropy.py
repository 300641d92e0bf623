"""Binary cross-entropy as a first term (docs/definitions.md, Binary cross-entropy)."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_inputs, is_traced, without_autocast
from ..ops import acc_dtype
from ..options import flag, whole_label
from ._chunks import sum_over_images


def binary_cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None, ignore_index: int, align_corners: bool
) -> Tensor:
    """Each class against the others: (1/|V|) Σ_V Σ_c w_c · BCEWithLogits(Z_c, [Y = c]), in plain PyTorch.

    Arguments, result and errors are those of `cross_entropy`. The gradient is computed along with the loss, some images
    at a time, so that nothing of the labels' size is kept for the backward, and it cannot be differentiated once more.
    """
    target = check_inputs(logits, target, weight)
    ignore_index, align_corners = whole_label(ignore_index), flag("align_corners", align_corners)
    if torch.compiler.is_compiling() or is_traced(logits):
        return reference.compute_bce(logits, target, weight, ignore_index, align_corners)
    with without_autocast(logits):
        total = sum_over_images(
            lambda z, y: reference.sum_bce(z, y, weight, ignore_index, align_corners), logits, target
        )
    return (total / (target != ignore_index).sum().clamp(min=1)).to(acc_dtype(logits))
