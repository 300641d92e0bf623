"""Boundary Corrected Loss of BCMFNet (arXiv 2203.00436, eq. 2; docs/definitions.md, Boundary Corrected Loss)."""

from __future__ import annotations

from torch import Tensor

from ..options import BCL, Terms
from ._compute import compute_loss
from ._module import LossModule


def boundary_corrected_loss(
    logits: Tensor,
    target: Tensor,
    *,
    step: int | tuple[int, ...] = BCL.step,
    supervise: str = BCL.supervise,
    alpha: float = BCL.alpha,
    beta: float = BCL.beta,
    threshold: float = BCL.threshold,
    nms_size: int = BCL.nms_size,
    ignore_index: int = 255,
    align_corners: bool = False,
    impl: str = "auto",
) -> Tensor:
    """The boundary term of BCMFNet, to be added to a cross-entropy with a weight λ (0.1).

    Yʳ and Yᶜ are the labels with neighbouring groups of ``step`` rows, or columns, swapped; the logits are never
    flipped. A pixel's score is q = max(ℓ[Y], ℓ[Yʳ], ℓ[Yᶜ]), ℓ[y] = −log p[y], where all three labels are valid. S are
    the pixels whose q is the maximum of its nms_size² neighbourhood (ties kept) and exceeds −ln threshold.
    ``supervise="original"``: (1/|S|) Σ_S ℓ[Y]. ``supervise="flipped"`` (eq. 2 to the letter): (1/|V|) Σ_S (α ℓ[Yʳ] + β
    ℓ[Yᶜ]), V the valid pixels.

    logits: (N, C, h, w), fp16, bf16, fp32 or fp64, any strides; resampled bilinearly to (H, W) if h, w differ.
    target: (N, H, W) or (N, 1, H, W), bool or of any integer dtype, 0..C-1 or ignore_index.
    step: pixels, or a tuple of 1 to 8 steps, whose losses are averaged. An edge on a multiple of 2·step is invisible to
    it.
    Returns a scalar, fp32 (fp64 for fp64 logits); 0 with a zero gradient if S is empty.

    Raises TypeError for a wrong dtype; ValueError for a wrong shape, device or option, for an impl that cannot run, and
    on the CPU for a label out of range (on CUDA the loss becomes NaN: BCMF_DEBUG=1 turns that into the ValueError).
    """
    total, _ = compute_loss(
        "boundary_corrected_loss",
        logits,
        target,
        Terms(ce=False, bcl=BCL(1.0, step, supervise, alpha, beta, threshold, nms_size)),
        ignore_index=ignore_index,
        align_corners=align_corners,
        impl=impl,
    )
    return total


class BoundaryCorrectedLoss(LossModule):
    """boundary_corrected_loss as a module: the constructor takes its keywords, ``forward(logits, target)`` its
    tensors."""

    def __init__(
        self,
        *,
        step: int | tuple[int, ...] = BCL.step,
        supervise: str = BCL.supervise,
        alpha: float = BCL.alpha,
        beta: float = BCL.beta,
        threshold: float = BCL.threshold,
        nms_size: int = BCL.nms_size,
        ignore_index: int = 255,
        align_corners: bool = False,
        impl: str = "auto",
    ) -> None:
        bcl = BCL(1.0, step, supervise, alpha, beta, threshold, nms_size)
        super().__init__(boundary_corrected_loss, bcl, ignore_index, align_corners, impl)
