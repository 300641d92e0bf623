"""What all loss functions share: check the inputs and decide which impl runs; then call bcmf::loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import dispatch, ops
from ..checks import check_inputs, check_labels
from ..options import BCL, CPG, OHEM, flag, whole_label


def prepare(
    op: str, impl: str, logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int
) -> tuple[str, Tensor, int]:
    """The impl that computes a loss, and labels and ignore_index as it takes them. Raises as
    ``check_inputs``, ``whole_label`` and ``dispatch.choose`` do."""
    target, ignore_index = check_inputs(logits, target, weight), whole_label(ignore_index)
    if dispatch.DEBUG and not torch.compiler.is_compiling():
        check_labels(target, logits.shape[1], ignore_index)
    return dispatch.choose(op, impl, logits.device), target, ignore_index


def fused_loss(
    impl: str,
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    align_corners: bool,
    weight: Tensor | None = None,
    ce: bool = True,
    ohem: OHEM | None = None,
    bcl: BCL | None = None,
    bcl_weight: float = 1.0,
    cpg: CPG | None = None,
    cpg_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """total, with these weights of BCL and CPG (not those in their options), and the unweighted terms (3,):
    cross-entropy (or OHEM), BCL, CPG; by the kernels of an impl that can."""
    options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "align_corners": flag("align_corners", align_corners),
        "ce": ce,
    }
    if ohem is not None:
        options |= {"ohem_threshold": ohem.threshold, "ohem_min_kept": ohem.min_kept}
    if bcl is not None:
        options |= {
            "bcl_weight": bcl_weight,
            "bcl_steps": bcl.steps,
            "bcl_flipped": (bcl.alpha, bcl.beta) if bcl.supervise == "flipped" else (),
            "bcl_threshold": bcl.threshold,
            "bcl_nms_size": bcl.nms_size,
        }
    if cpg is not None:
        options |= {
            "cpg_weight": cpg_weight,
            "cpg_kernel_size": cpg.kernel_size,
            "cpg_window": cpg.ignore_mode == "window",
        }
    total, terms, *_ = ops.LOSS[impl](logits, target, weight, *ops.LossOptions(**options))
    return total, terms
