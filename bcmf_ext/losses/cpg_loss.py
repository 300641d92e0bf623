"""Convolution-based Probability Gradient loss (arXiv 2404.06704; docs/definitions.md, CPG loss)."""

from __future__ import annotations

from torch import Tensor

from ..options import CPG, Terms
from ._compute import compute_loss
from ._module import LossModule


def cpg_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kernel_size: int = CPG.kernel_size,
    ignore_mode: str = CPG.ignore_mode,
    ignore_index: int = 255,
    align_corners: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Mean squared difference, at label edges, of the Sobel gradients of one-hot labels and of probabilities.

    K_x[u, v] = v / (u² + v²), K_y[u, v] = u / (u² + v²), 0 at the centre; G_d = K_d * onehot(Y), Ĝ_d = K_d *
    softmax(Z), with replicated borders, d ∈ {x, y}. M are the (image, class, direction, pixel) with G ≠ 0, decided
    exactly, and no ignored pixel in the k×k window; the loss is (1/|M|) Σ_M (G − Ĝ)².

    logits: (N, C, h, w), fp16, bf16, fp32 or fp64, any strides; resampled bilinearly to (H, W) if h, w differ.
    target: (N, H, W) or (N, 1, H, W), bool or of any integer dtype, 0..C-1 or ignore_index.
    kernel_size: 3, 5 or 7 pixels. Weights beside a cross-entropy: 1.0, 0.4, 0.35 (the paper's 1.0, 8.0, 5.0 belong to a
    mask that rounding had diluted). ignore_mode: "window" as above, or "centre": only the pixel itself must be valid,
    as in the authors' code, where an ignored neighbour makes an edge.
    Returns a scalar, fp32 (fp64 for fp64 logits); 0 with a zero gradient if there is no edge.

    Raises TypeError for a wrong dtype; ValueError for a wrong shape, device or option, for an impl that cannot run, and
    on the CPU for a label out of range (on CUDA the loss becomes NaN: BCMF_DEBUG=1 turns that into the ValueError).
    """
    total, _ = compute_loss(
        "cpg_loss",
        logits,
        target,
        Terms(ce=False, cpg=CPG(1.0, kernel_size, ignore_mode)),
        ignore_index=ignore_index,
        align_corners=align_corners,
        impl=impl,
    )
    return total


class CPGLoss(LossModule):
    """cpg_loss as a module: the constructor takes its keywords, ``forward(logits, target)`` its tensors."""

    def __init__(
        self,
        *,
        kernel_size: int = CPG.kernel_size,
        ignore_mode: str = CPG.ignore_mode,
        ignore_index: int = 255,
        align_corners: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(cpg_loss, CPG(1.0, kernel_size, ignore_mode), ignore_index, align_corners, impl)
