"""The way that all loss functions go: inputs are checked, an impl is chosen, and it computes any mix of terms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch, ops, reference
from ..checks import check_inputs, check_labels
from ..options import TERMS, LossOptions, Terms, flag, whole_label


def read_inputs(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: Any, align_corners: Any
) -> tuple[Tensor, int, bool]:
    """The target as `checks.check_inputs` gives it, ignore_index and align_corners; TypeError and ValueError for what
    cannot be, with BCMF_DEBUG=1 for a label out of range on any device."""
    target = check_inputs(logits, target, weight)
    ignore_index, align_corners = whole_label(ignore_index), flag("align_corners", align_corners)
    if dispatch.DEBUG and not torch.compiler.is_compiling():
        check_labels(target, logits.shape[1], ignore_index)
    return target, ignore_index, align_corners


def compute_loss(
    name: str,
    logits: Tensor,
    target: Tensor,
    terms: Terms,
    *,
    weight: Tensor | None = None,
    ignore_index: int,
    align_corners: bool,
    impl: str,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total of the terms that are asked for, each times its weight, and the terms by name, detached and unweighted.

    name: the public function that asks, for messages. weight: the class weights of the cross-entropy. Shapes and dtypes
    are those of the public functions. Raises TypeError and ValueError as they say.
    """
    target, ignore_index, align_corners = read_inputs(logits, target, weight, ignore_index, align_corners)
    impl = dispatch.choose(name, impl, logits.device)
    if impl == "torch":
        return reference.compute_loss(logits, target, terms, weight, ignore_index, align_corners)
    options = LossOptions.of(ignore_index, align_corners, terms)
    total, values, *_ = ops.LOSS[impl](logits, target, weight, *options)
    found = dict(zip(TERMS, values.unbind(), strict=True))
    return total, {term: found[term] for term in terms.names()}
