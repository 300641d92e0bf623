"""The way that all loss functions go: inputs are checked, an impl is chosen, and it computes any mix of terms."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, ops, reference
from ..checks import check_inputs, check_labels
from ..options import BCL, CPG, OHEM, TERMS, LossOptions, flag, whole_label


def compute_loss(
    name: str,
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    align_corners: bool,
    impl: str,
    weight: Tensor | None = None,
    ce: bool = True,
    ohem: OHEM | None = None,
    bcl: BCL | None = None,
    cpg: CPG | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total of the terms that are asked for, each times its weight, and the terms by name, detached and unweighted.

    name: the public function that asks, for messages. ce: the cross-entropy, or OHEM where ``ohem`` is given, with the
    class weights ``weight``. Shapes and dtypes are those of the public functions.
    Raises TypeError and ValueError as they say.
    """
    target = check_inputs(logits, target, weight)
    ignore_index, align_corners = whole_label(ignore_index), flag("align_corners", align_corners)
    if dispatch.DEBUG and not torch.compiler.is_compiling():
        check_labels(target, logits.shape[1], ignore_index)
    impl = dispatch.choose(name, impl, logits.device)
    if impl == "torch":
        return reference.compute_loss(logits, target, weight, ignore_index, align_corners, ce, ohem, bcl, cpg)
    options = LossOptions.of(ignore_index, align_corners, ce, ohem, bcl, cpg)
    total, terms, *_ = ops.LOSS[impl](logits, target, weight, *options)
    asked = ce, bcl is not None, cpg is not None
    return total, {term: value for term, value, is_asked in zip(TERMS, terms.unbind(), asked, strict=True) if is_asked}
