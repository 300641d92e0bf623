"""The first lines of every loss function: check the inputs, then decide which impl runs."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import dispatch, ops, reference


def resolve_impl(
    op: str,
    impl: str,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    *,
    bcl: bool = False,
    cpg: bool = False,
) -> str:
    """The impl that computes this mix of terms. Raises as ``reference.check_inputs`` and ``dispatch.choose`` do."""
    reference.check_inputs(logits, target, weight)
    if dispatch.DEBUG and not torch.compiler.is_compiling():
        reference.check_labels(target, logits.shape[1], ignore_index)
    return dispatch.choose(op, impl, logits.device, ops.loss_lacks(bcl=bcl, cpg=cpg))
