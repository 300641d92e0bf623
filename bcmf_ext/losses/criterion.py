"""Cross-entropy (or OHEM), BCL and CPG as one loss (spec section 5)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import reference
from ..reference import BCL, CPG, OHEM, SegmentationLoss, resolve_options
from ._kernels import fused_loss, resolve_impl
from .cross_entropy import cross_entropy


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ohem: OHEM | float | None = None,
    bcl: BCL | float | None = None,
    cpg: CPG | float | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    impl: str = "auto",
) -> SegmentationLoss:
    """total = CE (or OHEM) + λ_bcl · BCL + λ_cpg · CPG, and the terms for logging.

    logits: (N, C, h, w), fp16, bf16, fp32 or fp64, any strides; resampled bilinearly to (H, W) if h, w differ.
    target: (N, H, W), uint8, int16, int32 or int64, 0..C-1 or ignore_index.
    weight: class weights (C,) of the first term. ohem, bcl, cpg: their options, or a float for OHEM's threshold and for
    the weight λ of BCL or CPG; None leaves the term out.
    Returns SegmentationLoss(total, ce, bcl, cpg): scalars, fp32 (fp64 for fp64 logits); the terms are detached and
    unweighted, None if not asked for. Register the named tuple for ``torch.export``.

    Raises as cross_entropy, boundary_corrected_loss and cpg_loss do, and ValueError for OHEM beside
    BCL(supervise="flipped").
    """
    ohem, bcl, cpg = resolve_options(ohem, bcl, cpg)
    impl = resolve_impl("segmentation_loss", impl, logits, target, weight, ignore_index)
    common: dict[str, Any] = {
        "weight": weight,
        "ohem": ohem,
        "bcl": bcl,
        "cpg": cpg,
        "ignore_index": ignore_index,
        "align_corners": align_corners,
    }
    if impl == "torch":
        return reference.segmentation_loss(logits, target, **common)
    weights = bcl.weight if bcl else 0.0, cpg.weight if cpg else 0.0
    total, terms = fused_loss(impl, logits, target, bcl_weight=weights[0], cpg_weight=weights[1], **common)
    ce, bcl_term, cpg_term = terms.unbind()
    return SegmentationLoss(total, ce, bcl_term if bcl else None, cpg_term if cpg else None)


class CriterionLoss(NamedTuple):
    """What SegmentationCriterion returns: SegmentationLoss and ``aux``, the first term of the auxiliary head (or
    None)."""

    total: Tensor
    ce: Tensor
    bcl: Tensor | None
    cpg: Tensor | None
    aux: Tensor | None


class SegmentationCriterion(nn.Module):
    """segmentation_loss of the main logits, plus aux_weight times the first term (CE or OHEM) of the auxiliary logits.

    The constructor takes segmentation_loss's keywords; BCL and CPG are on by default.
    Raises ValueError where BCL(supervise="flipped") would outweigh the class weights: λ (α + β) · max w / min{w > 0} ≥
    1.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ohem: OHEM | float | None = None,
        bcl: BCL | float | None = BCL(),  # noqa: B008 (frozen)
        cpg: CPG | float | None = CPG(),  # noqa: B008 (frozen)
        aux_weight: float = 0.4,
        ignore_index: int = 255,
        align_corners: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"class weights are a tensor, not a {type(weight).__name__}.")
        if not 0 <= aux_weight < math.inf:
            raise ValueError(f"aux_weight is a number of at least 0, not {aux_weight}.")
        self.ohem, self.bcl, self.cpg = resolve_options(ohem, bcl, cpg)
        if self.bcl is not None and self.bcl.supervise == "flipped" and weight is not None:
            _check_flipped_against_weights(self.bcl, weight)
        self.register_buffer("weight", weight)
        self.aux_weight = aux_weight
        self.ignore_index, self.align_corners, self.impl = ignore_index, align_corners, impl

    def forward(self, logits: Tensor | tuple[Tensor, Tensor], target: Tensor) -> CriterionLoss:
        """logits (N, C, h, w), or (main, auxiliary) logits; target (N, H, W)."""
        if isinstance(logits, (tuple, list)) and len(logits) != 2:
            raise TypeError(f"logits are a tensor, or (main, auxiliary) logits, not {len(logits)} of them.")
        main, auxiliary = logits if isinstance(logits, (tuple, list)) else (logits, None)
        common: dict[str, Any] = {
            "weight": self.weight,
            "ohem": self.ohem,
            "ignore_index": self.ignore_index,
            "align_corners": self.align_corners,
            "impl": self.impl,
        }
        loss = segmentation_loss(main, target, bcl=self.bcl, cpg=self.cpg, **common)
        if auxiliary is None:
            return CriterionLoss(*loss, aux=None)
        aux = cross_entropy(auxiliary, target, **common)
        return CriterionLoss(loss.total + self.aux_weight * aux, *loss[1:], aux=aux.detach())


def _check_flipped_against_weights(bcl: BCL, weight: Tensor) -> None:
    positive = weight[weight > 0]
    if positive.numel() == 0:
        return
    ratio = float(bcl.weight * (bcl.alpha + bcl.beta) * positive.max() / positive.min())
    if ratio >= 1:
        raise ValueError(
            f'BCL(supervise="flipped") outweighs the class weights: weight·(alpha + beta)·max w / min w = {ratio:g}; '
            'keep it below 1, or use supervise="original".'
        )
