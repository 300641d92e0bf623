"""Cross-entropy with class weights and OHEM (docs/definitions.md, Cross-entropy and OHEM)."""

from __future__ import annotations

from torch import Tensor

from ..options import OHEM, resolve_options
from ._compute import compute_loss


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ohem: OHEM | float | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Mean cross-entropy over the valid pixels, or over the hard ones with ``ohem``. Equals ``F.cross_entropy``.

    ℓ = −log softmax(Z)[Y]; without ohem Σ_V w_Y ℓ / Σ_V w_Y, V the pixels with Y ≠ ignore_index; with ohem Σ_S w_Y ℓ /
    |S|, S the pixels with ℓ > −ln threshold, at least min_kept of them.

    logits: (N, C, h, w), fp16, bf16, fp32 or fp64, any strides; resampled bilinearly to (H, W) if h, w differ.
    target: (N, H, W) or (N, 1, H, W), bool or of any integer dtype, 0..C-1 or ignore_index.
    weight: (C,) floating point, on the logits' device. ohem: an OHEM, or a float for ``OHEM(threshold=…)``.
    Returns a scalar, fp32 (fp64 for fp64 logits); 0 with a zero gradient if there is nothing to average.

    Raises TypeError for a wrong dtype; ValueError for a wrong shape or device, for an impl that cannot run, and on the
    CPU for a label out of range (on CUDA the loss becomes NaN: BCMF_DEBUG=1 turns that into the ValueError).
    Source: docs/definitions.md, Cross-entropy and OHEM; OHEM after HRNet.
    """
    total, _ = compute_loss(
        "cross_entropy",
        logits,
        target,
        resolve_options(ohem),
        weight=weight,
        ignore_index=ignore_index,
        align_corners=align_corners,
        impl=impl,
    )
    return total
