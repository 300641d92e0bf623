"""Cross-entropy (or OHEM), BCL and CPG as one loss (spec section 5)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import reference
from ..ops import acc_dtype
from ..reference import BCL, CPG, OHEM, SegmentationLoss, resolve_options
from ._kernels import fused_loss, resolve_impl
from .boundary_corrected_loss import boundary_corrected_loss
from .cpg_loss import cpg_loss
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

    The constructor takes segmentation_loss's keywords; BCL and CPG are on by default. ``ramp``, an attribute, scales
    their weights: a trainer that warms them up sets it before each step.
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
        self.ramp = 1.0

    def forward(self, logits: Tensor | tuple[Tensor, Tensor], target: Tensor) -> CriterionLoss:
        """logits (N, C, h, w), or (main, auxiliary) logits; target (N, H, W)."""
        main, auxiliary = _main_and_auxiliary(logits)
        bcl, cpg = self._ramped(self.bcl), self._ramped(self.cpg)
        loss = segmentation_loss(main, target, bcl=bcl, cpg=cpg, **self._first_term, **self._common)
        if auxiliary is None:
            return CriterionLoss(*loss, aux=None)
        aux = cross_entropy(auxiliary, target, **self._first_term, **self._common)
        return CriterionLoss(loss.total + self.aux_weight * aux, *loss[1:], aux=aux.detach())

    @torch.enable_grad()
    def gradient_shares(self, logits: Tensor | tuple[Tensor, Tensor], target: Tensor) -> dict[str, Tensor]:
        """How much each term pulls at the main logits Z: λ‖∂L/∂Z‖ of ce, bcl and cpg, over the sum of these; scalars.

        As forward takes them; one forward and backward of the loss for each term, and none of the network. The
        auxiliary head's loss has no part in it.
        """
        main, _ = _main_and_auxiliary(logits)
        main = main.detach().to(acc_dtype(main)).requires_grad_()  # gradients of means are too small for fp16
        terms = {"ce": cross_entropy(main, target, **self._first_term, **self._common)}
        if self.bcl is not None:
            options = {name: value for name, value in vars(self.bcl).items() if name != "weight"}
            terms["bcl"] = boundary_corrected_loss(main, target, **options, **self._common)
        if self.cpg is not None:
            options = {name: value for name, value in vars(self.cpg).items() if name != "weight"}
            terms["cpg"] = cpg_loss(main, target, **options, **self._common)
        weights = {"bcl": self.bcl, "cpg": self.cpg}
        pulls = {}
        for name, term in terms.items():
            (grad,) = torch.autograd.grad(term, main)
            option = self._ramped(weights.get(name))
            pulls[name] = (1.0 if option is None else option.weight) * grad.norm()
        total = torch.stack([*pulls.values()]).sum()
        total = total.clamp(min=torch.finfo(total.dtype).tiny)  # where all is ignored, all shares are 0
        return {name: pull / total for name, pull in pulls.items()}

    def _ramped(self, option: Any) -> Any:
        return option if option is None or self.ramp == 1 else replace(option, weight=self.ramp * option.weight)

    @property
    def _first_term(self) -> dict[str, Any]:
        return {"weight": self.weight, "ohem": self.ohem}

    @property
    def _common(self) -> dict[str, Any]:
        return {"ignore_index": self.ignore_index, "align_corners": self.align_corners, "impl": self.impl}


def _main_and_auxiliary(logits: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    if isinstance(logits, (tuple, list)) and len(logits) != 2:
        raise TypeError(f"logits are a tensor, or (main, auxiliary) logits, not {len(logits)} of them.")
    return logits if isinstance(logits, (tuple, list)) else (logits, None)


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
