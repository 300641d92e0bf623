"""RMI loss, the Region Mutual Information of labels and probabilities (docs/definitions.md, RMI loss)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from ..checks import is_traced, without_autocast
from ..ops import acc_dtype
from ..options import RMI
from ._chunks import chunk_length, sum_over_images
from ._compute import read_inputs
from ._module import LossModule


def rmi_loss(
    logits: Tensor,
    target: Tensor,
    *,
    radius: int = RMI.radius,
    pool: int = RMI.pool,
    alpha: float = RMI.alpha,
    activation: str = RMI.activation,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """A lower bound of what labels tell about probabilities, over the radius² pixels of each region: for each class the
    log-determinant of the labels' covariance that the probabilities leave unexplained.

    p = activation(Z) · [Y valid] + 10⁻⁶ and y = onehot(Y), 0 at ignored pixels, are averaged over pool × pool pixels; Y
    and P (radius² × m) hold their regions, centred. M = YYᵀ − YPᵀ (PPᵀ + αI)⁻¹ PYᵀ, and the loss is
    mean_images Σ_classes ½ log det(M + αI) / radius², where images without a valid pixel leave the mean.

    logits: (N, C, h, w), fp16, bf16, fp32 or fp64, any strides; resampled bilinearly to (H, W) if h, w differ.
    target: (N, H, W) or (N, 1, H, W), bool or of any integer dtype, 0..C-1 or ignore_index.
    radius: the edge of a region. pool: pixels along each axis that are averaged, 1 for none. alpha: α > 0. activation:
    "sigmoid", as in the authors' code, or "softmax".
    Returns a scalar, fp32 (fp64 for fp64 logits), which may be negative: a class that an image has none of adds
    ½ log α. It is 0 where no image is left, or all are below radius × radius when pooled. It stands beside a main loss,
    with a weight of 0.5. The gradient is computed along with the loss, so that only `reference.rmi_loss` has a second
    derivative.

    Raises TypeError for a wrong dtype; ValueError for a wrong shape, device or option, and on the CPU for a label out
    of range (on CUDA the loss becomes NaN); NotImplementedError for a second derivative.
    Source: Zhao et al., arXiv 1910.12037; docs/definitions.md, RMI loss.
    """
    options = RMI(radius, pool, alpha, activation)
    target, ignore_index, align_corners = read_inputs(logits, target, None, ignore_index, align_corners)
    if torch.compiler.is_compiling() or is_traced(logits):
        return reference.compute_rmi(logits, target, options, ignore_index, align_corners)

    def information(z: Tensor, y: Tensor) -> Tensor:
        maps = reference.rmi_maps(z, y, options, ignore_index, align_corners)
        return _Information.apply(*maps, reference.any_valid(y, ignore_index), options)

    with without_autocast(logits):
        total = sum_over_images(information, logits, target)
    images = reference.any_valid(target, ignore_index).sum().clamp(min=1)
    return (total / (images * radius**2)).to(acc_dtype(logits))


class _Information(torch.autograd.Function):
    """Σ ½ log det(M + αI) over the maps y and p, (N, C, h, w) fp64, of the images that are ``compared``, bool (N,).

    det(M + αI) is that of [[PPᵀ + αI, PYᵀ], [YPᵀ, YYᵀ + αI]] over that of PPᵀ + αI. Both are Gram matrices of regions
    Z, and ∂ log det(ZZᵀ + αI)/∂Z = 2 (ZZᵀ + αI)⁻¹ Z. The gradient is computed at once, while the regions are there.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, p: Tensor, compared: Tensor, options: RMI) -> Tensor:
        side, entries = p.shape[-2:], options.radius**2
        if min(side) < options.radius:  # There is no region.
            ctx.save_for_backward(torch.zeros_like(p))
            return p.new_zeros(())
        total, pulls = p.new_zeros(()), []
        pairs = torch.stack([p.flatten(0, 1), y.flatten(0, 1)], dim=1)
        chunk = chunk_length(2 * entries * side.numel(), p.device)
        for some, counted in zip(pairs.split(chunk), compared.repeat_interleave(p.shape[1]).split(chunk), strict=True):
            regions = F.unfold(some, options.radius)  # (maps, 2 · radius², m), p's first
            regions -= regions.mean(2, keepdim=True)
            gram = regions @ regions.mT + options.alpha * torch.eye(2 * entries, dtype=p.dtype, device=p.device)
            own = gram[:, :entries, :entries]
            total += torch.where(counted, torch.logdet(gram) - torch.logdet(own), 0.0).sum() / 2
            if ctx.needs_input_grad[1]:
                pull = torch.linalg.inv_ex(gram).inverse[:, :entries]
                pull[:, :, :entries] -= torch.linalg.inv_ex(own).inverse
                pulls.append(F.fold(pull @ regions, side, options.radius))
        if pulls:
            ctx.save_for_backward(torch.cat(pulls).view_as(p))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:
        (pull,) = ctx.saved_tensors  # An image that is not compared has only ignored pixels, which pass on none of it.
        return None, upstream * pull, None, None


class RMILoss(LossModule):
    """rmi_loss as a module: the constructor takes its keywords, ``forward(logits, target)`` its tensors."""

    def __init__(
        self,
        *,
        radius: int = RMI.radius,
        pool: int = RMI.pool,
        alpha: float = RMI.alpha,
        activation: str = RMI.activation,
        ignore_index: int = 255,
        align_corners: bool = False,
    ) -> None:
        super().__init__(rmi_loss, RMI(radius, pool, alpha, activation), ignore_index, align_corners)
