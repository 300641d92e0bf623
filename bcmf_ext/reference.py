"""The losses as their papers define them, in plain PyTorch.

This file is the oracle that every other backend is compared with, the baseline of the benchmarks, and the easiest place
to read what a loss is; docs/definitions.md has the same in formulas, under the same headings. It needs torch alone.
Names and defaults are those of the public functions, without ``impl``.

Shapes throughout: logits ``Z (N, C, h, w)`` in fp16, bf16, fp32 or fp64; target ``Y (N, H, W)``, or (N, 1, H, W), bool
or of any integer dtype, holding ``0..C-1`` or ``ignore_index``. If (h, w) differs from (H, W), the logits are resampled
bilinearly.
Arithmetic is fp32 (fp64 for fp64 logits) whatever the logits' dtype, and so is the result, a scalar on the logits'
device. Where there is nothing to average, a term is 0 with an all-zero gradient, attached to the graph.

Errors: ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape, device or option, and for a label that is
neither a class nor ``ignore_index``. On CUDA tensors, and under torch.compile, torch.func and tracing, such a label
makes the loss NaN instead: looking at it would stop the GPU, or cannot be done.

In private functions logits are fp32 (fp64) of the labels' size, labels (N, H, W) int64 with 0 at ignored pixels, and
``valid`` (N, H, W) says which pixels are not ignored (`_widen`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_inputs, check_labels, is_traced, without_autocast
from .options import BCL, CPG, OHEM, RMI, SegmentationLoss, Terms, check_not_built, resolve_options, whole_label

# --------------------------------------------------------------------------------------------------------------------
# Conventions and resampling


def resample(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """Logits (N, C, h, w) resampled bilinearly, up or down, to ``size`` (H, W); in fp32 (fp64).

    What F.interpolate would compute without rounding: positions and weights come from integers, beyond the last centre
    lie copies of the border, so that equal logits stay equal (BCL's selection depends on it), and an entry of weight 0
    is not read, whatever it holds.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    for axis in (3, 2):  # Along rows first: the map is small then, and a row's entries lie together.
        if logits.shape[axis] != size[axis - 2]:
            logits = _resample_axis(logits, axis, size[axis - 2], align_corners)
    return logits


def _resample_axis(logits: Tensor, axis: int, length: int, align_corners: bool) -> Tensor:
    """Resamples one axis: (1 − weight) · logits[first] + weight · logits[first + 1]."""
    given = logits.shape[axis]
    i = torch.arange(length, device=logits.device)
    if align_corners:
        numerator, denominator = i * (given - 1), max(length - 1, 1)
    else:
        numerator, denominator = ((2 * i + 1) * given - length).clamp(min=0), 2 * length
    first = numerator // denominator
    weight = (numerator - first * denominator).to(logits.dtype) / denominator
    weight = torch.where(first == given - 1, 0.0, weight)
    second = torch.where(
        weight == 0, given, first + 1
    )  # An entry of weight 0 is one of the zeros that follow the last one.
    padded = F.pad(logits, [0, 0] * (3 - axis) + [0, 1])
    weight = weight.view([-1 if a == axis else 1 for a in range(4)])
    # The products are made in place, because the maps are large; the backward needs the weights alone.
    return _take(padded, axis, first).mul_(1 - weight).add_(_take(padded, axis, second).mul_(weight))


def _take(logits: Tensor, axis: int, index: Tensor) -> Tensor:
    """Entries along an axis: index_select, or on GPUs an indexing, whose backward adds in a fixed order there."""
    return logits[(slice(None),) * axis + (index,)] if logits.is_cuda else logits.index_select(axis, index)


def _widen(logits: Tensor, target: Tensor, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 (fp64) logits at the target's size, labels (N, H, W) int64 with 0 at ignored pixels, and valid (N, H, W)."""
    logits = resample(logits, target.shape[1:], align_corners)
    labels = target.long()
    valid = labels != whole_label(ignore_index)
    bad = valid & ((labels < 0) | (labels >= logits.shape[1]))
    if logits.device.type == "cpu" and not torch.compiler.is_compiling() and not is_traced(logits):
        check_labels(target, logits.shape[1], ignore_index)
    else:
        logits = logits + torch.where(bad, math.nan, 0.0).to(logits.dtype).unsqueeze(1)
    return logits, torch.where(valid & ~bad, labels, 0), valid


def _log_softmax(logits: Tensor, used: Tensor) -> Tensor:
    """log p (N, C, H, W); where ``used (N, H, W)`` is false the logits count as 0, so that an inf or NaN there
    (padding, ignored pixels) can reach neither the value nor, as 0·NaN, the gradient."""
    return torch.where(used.unsqueeze(1), logits, 0.0).log_softmax(dim=1)


def _nll(log_p: Tensor, labels: Tensor) -> Tensor:
    """ℓ[y] = −log p[y] for labels (N, H, W)."""
    return -log_p.gather(1, labels.unsqueeze(1)).squeeze(1)


def _one_hot(logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The one-hot map of the labels, shape and dtype of the logits, 0 at ignored pixels."""
    classes = torch.arange(logits.shape[1], device=labels.device).view(-1, 1, 1)
    return ((labels.unsqueeze(1) == classes) & valid.unsqueeze(1)).to(logits.dtype)


def _mean(values: Tensor, selected: Tensor, denominator: Tensor | None = None) -> Tensor:
    """Σ values[selected] / denominator (default: the number selected); 0 where the denominator is 0."""
    total = torch.where(selected, values, 0.0).sum()
    denominator = (selected.sum() if denominator is None else denominator).to(total.dtype)
    return torch.where(denominator != 0, total, 0.0) / torch.where(denominator != 0, denominator, 1.0)


# --------------------------------------------------------------------------------------------------------------------
# Cross-entropy and OHEM


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ohem: OHEM | float | None = None,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """Mean cross-entropy Σ_V w_Y ℓ / Σ_V w_Y over the valid pixels V, or with ``ohem`` the mean over the hard ones.

    weight: class weights (C,). ohem: an OHEM, or a float for ``OHEM(threshold=…)``.
    OHEM keeps S = {ℓ > −ln θ}, or the min_kept largest ℓ with all ties at the last one if those are more, and returns
    Σ_S w_Y ℓ / |S|.
    """
    terms = resolve_options(ohem)
    target = check_inputs(logits, target, weight)
    return compute_loss(logits, target, terms, weight, ignore_index, align_corners)[0]


def _cross_entropy(logits: Tensor, labels: Tensor, valid: Tensor, weight: Tensor | None, ohem: OHEM | None) -> Tensor:
    if weight is not None:
        # A pixel of weight 0 pulls at nothing, not even by 0·NaN. (The NaN of its logits stays in the value.)
        logits = torch.where((weight[labels] != 0).unsqueeze(1), logits, logits.detach())
    nll = _nll(_log_softmax(logits, valid), labels)
    selected = valid if ohem is None else ohem_select(nll.detach(), valid, ohem)
    if weight is None:  # Weights of 1 would do, but inductor then loses the gradient at a graph break.
        return _mean(nll, selected)
    w = weight.to(nll.dtype)[labels]
    return _mean(w * nll, selected, torch.where(valid, w, 0.0).sum() if ohem is None else None)


def ohem_select(nll: Tensor, valid: Tensor, ohem: OHEM) -> Tensor:
    """S of OHEM, from the losses ℓ⁰: p would saturate into ties. Comparisons are negated so that a NaN counts as
    hard."""
    hard = valid & ~(nll <= -math.log(ohem.threshold))
    kept = valid.sum().clamp(max=ohem.min_kept)
    enough = hard.sum() >= kept
    if nll.numel() == 0 or (not is_traced(nll) and bool(enough)):
        return hard
    losses = torch.where(valid, nll, -math.inf).flatten()
    largest = losses.topk(min(max(ohem.min_kept, 1), len(losses))).values
    kth_largest = largest.gather(0, (kept - 1).clamp(min=0).view(1))
    return torch.where(enough, hard, valid & ~(nll < kth_largest))


# --------------------------------------------------------------------------------------------------------------------
# Binary cross-entropy


def compute_bce(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, align_corners: bool
) -> Tensor:
    """(1/|V|) Σ_V Σ_c w_c · BCEWithLogits(Z_c, [Y = c]) of inputs as `check_inputs` gives them."""
    return sum_bce(logits, target, weight, ignore_index, align_corners) / count_valid(target, ignore_index)


def count_valid(target: Tensor, ignore_index: int) -> Tensor:
    """|V|, but at least 1: how many labels are not ignored."""
    return (target.long() != whole_label(ignore_index)).sum().clamp(min=1)


def sum_bce(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, align_corners: bool) -> Tensor:
    """The sum over pixels and classes."""
    logits, labels, valid = _widen(logits, target, ignore_index, align_corners)
    one_hot, valid = _one_hot(logits, labels, valid).bool(), valid.unsqueeze(1)
    # log σ(−Z) = log(1 − σ(Z)). Not F.binary_cross_entropy_with_logits: it gives NaN for a class of −∞.
    logits = torch.where(valid, logits, 0.0)
    log_p = F.logsigmoid(torch.where(one_hot, logits, -logits))
    log_p = log_p if weight is None else log_p * weight.to(logits.dtype).view(-1, 1, 1)
    return -torch.where(valid, log_p, 0.0).sum()


# --------------------------------------------------------------------------------------------------------------------
# Boundary Corrected Loss


def flip_index(length: int, step: int, device: torch.device | None = None) -> Tensor:
    """π_s: the permutation of 0..length-1 that swaps neighbouring groups of ``step``; an index whose partner would be
    outside stays. ``labels[:, flip_index(H, s)]`` is Yʳ, ``labels[:, :, flip_index(W, s)]`` is Yᶜ."""
    i = torch.arange(length, device=device)
    partner = torch.where((i // step) % 2 == 0, i + step, i - step)
    return torch.where(partner < length, partner, i)


def boundary_corrected_loss(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, align_corners: bool = False, **options: Any
) -> Tensor:
    """The BCL term of BCMFNet, without the cross-entropy that stands beside it and without λ.

    The labels flipped by rows, Yʳ, and by columns, Yᶜ, are compared with the labels Y: q = max(ℓ[Y], ℓ[Yʳ], ℓ[Yᶜ])
    where all three are valid (V₃). S = {q is the maximum of its nms_size² neighbourhood, and q > −ln threshold}.
    supervise="original": (1/|S|) Σ_S ℓ[Y]. supervise="flipped": (1/|V|) Σ_S (α ℓ[Yʳ] + β ℓ[Yᶜ]).
    options: the fields of BCL, but for the weight.
    """
    terms = Terms(ce=False, bcl=BCL(1.0, **options))
    target = check_inputs(logits, target)
    return compute_loss(logits, target, terms, None, ignore_index, align_corners)[0]


def _bcl(logits: Tensor, labels: Tensor, valid: Tensor, bcl: BCL) -> Tensor:
    return torch.stack([_bcl_of_one_step(logits, labels, valid, step, bcl) for step in bcl.steps]).mean()


def _bcl_of_one_step(logits: Tensor, labels: Tensor, valid: Tensor, step: int, bcl: BCL) -> Tensor:
    rows = flip_index(labels.shape[1], step, labels.device)
    columns = flip_index(labels.shape[2], step, labels.device)
    valid3 = valid & valid[:, rows] & valid[:, :, columns]

    log_p = _log_softmax(logits, valid3)
    nll, nll_rows, nll_columns = (_nll(log_p, y) for y in (labels, labels[:, rows], labels[:, :, columns]))
    q = torch.maximum(torch.maximum(nll, nll_rows), nll_columns).detach()
    selected = bcl_select(q, valid3, bcl)
    if bcl.supervise == "original":
        return _mean(nll, selected)
    return _mean(bcl.alpha * nll_rows + bcl.beta * nll_columns, selected, valid.sum())


def bcl_select(q: Tensor, valid3: Tensor, bcl: BCL) -> Tensor:
    """S: where the scores q (N, H, W) are maxima of their neighbourhood and exceed the threshold, bool (N, H, W). A NaN
    score is never left out silently."""
    q = torch.where(valid3, q, 0.0)
    radius = min(bcl.nms_size // 2, max(q.shape[1:]))
    pooled = F.max_pool2d(q, 2 * radius + 1, stride=1, padding=radius) if q.numel() else q
    return valid3 & ((q == pooled) & (q > -math.log(bcl.threshold)) | q.isnan())


# --------------------------------------------------------------------------------------------------------------------
# CPG loss, the Convolution-based Probability Gradient loss


def sobel_taps(kernel_size: int) -> tuple[Tensor, int]:
    """Integer taps (2, k, k), x then y, and their common denominator: K_x[u, v] = v / (u² + v²), K_y[u, v] = u / (u² +
    v²), 0 at the centre, u the row offset. As integers, so that G ≠ 0 is decided exactly (k = 3 is Sobel × 0.5)."""
    radius, denominator = kernel_size // 2, {3: 2, 5: 20, 7: 780}[kernel_size]
    u, v = torch.meshgrid(*[torch.arange(-radius, radius + 1)] * 2, indexing="ij")
    squared = (u * u + v * v).clamp(min=1)
    return torch.stack([denominator * v // squared, denominator * u // squared]), denominator


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """The pixels with a true pixel in their (2·radius + 1)² window, clipped at the border. mask: bool (N, H, W)."""
    if mask.numel() == 0:
        return mask
    return F.max_pool2d(mask.float().unsqueeze(1), 2 * radius + 1, stride=1, padding=radius).squeeze(1) > 0


def cpg_loss(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, align_corners: bool = False, **options: Any
) -> Tensor:
    """CPG as the paper defines it: mean of (G − Ĝ)² over M, G and Ĝ the Sobel gradients of the one-hot labels and of p.

    M holds the (image, class, direction, pixel) with G ≠ 0, decided exactly, and no ignored pixel in the window
    (``ignore_mode="centre"``: whose own pixel is not ignored). Ignored pixels are the zero vector in the one-hot map;
    borders are replicated. options: the fields of CPG, but for the weight. For speed see cpg_loss_sparse.
    """
    cpg = CPG(1.0, **options)
    target = check_inputs(logits, target)
    return _cpg(*_widen(logits, target, ignore_index, align_corners), cpg)


def _cpg(logits: Tensor, labels: Tensor, valid: Tensor, cpg: CPG) -> Tensor:
    if labels.numel() == 0:
        return _mean(logits.sum(1), valid)
    radius = cpg.kernel_size // 2
    taps, denominator = sobel_taps(cpg.kernel_size)

    def gradients(maps: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, 2, H, W), times the denominator
        n, c, h, w = maps.shape
        padded = F.pad(maps.reshape(n * c, 1, h, w), [radius] * 4, mode="replicate")
        with without_autocast(maps):
            return F.conv2d(padded, taps.unsqueeze(1).to(maps)).view(n, c, 2, h, w)

    truth = gradients(_one_hot(logits, labels, valid))  # These are integers, and exact.
    usable = ~_dilate(~valid, radius) if cpg.ignore_mode == "window" else valid
    mask = (truth != 0) & usable[:, None, None]

    read = _dilate(mask.flatten(1, 2).any(1), radius)
    residual = (truth - gradients(_log_softmax(logits, read).exp())) / denominator
    return _mean(residual.square(), mask)


def cpg_loss_sparse(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, align_corners: bool = False, **options: Any
) -> Tensor:
    """cpg_loss, computed at the edge pixels only: the fastest eager form we know. Equal to cpg_loss up to rounding.

    G is zero wherever a window holds a single label, which is nine pixels of ten. So softmax is taken only of the R
    pixels in the windows of the E edge pixels, and the Sobel taps are summed one after the other over those rows (with
    its backward, faster than embedding_bag, a sparse product or one gather of all windows).
    """
    terms = Terms(ce=False, cpg=CPG(1.0, **options))
    target = check_inputs(logits, target)
    return compute_loss(logits, target, terms, None, ignore_index, align_corners)[0]


def _cpg_sparse(logits: Tensor, labels: Tensor, valid: Tensor, cpg: CPG) -> Tensor:
    if is_traced(logits):  # Where edges are depends on values.
        return _cpg(logits, labels, valid, cpg)
    if labels.numel() == 0:
        return _mean(logits.sum(1), valid)
    kernel_size = cpg.kernel_size
    num_classes, (height, width), radius = logits.shape[1], labels.shape[1:], kernel_size // 2
    taps, denominator = sobel_taps(kernel_size)
    taps = taps.flatten(1).to(logits)  # (2, k²)

    ids = torch.where(valid, labels, num_classes).contiguous()  # Ignored pixels are a class of their own.
    highest = F.max_pool2d(ids.float(), kernel_size, stride=1, padding=radius)
    lowest = -F.max_pool2d(-ids.float(), kernel_size, stride=1, padding=radius)
    usable = highest < num_classes if cpg.ignore_mode == "window" else valid
    n, y, x = ((highest != lowest) & usable).nonzero(as_tuple=True)  # the edge pixels, (E,) each

    offset = torch.arange(-radius, radius + 1, device=ids.device)
    rows = (y[:, None] + offset).clamp(0, height - 1)
    columns = (x[:, None] + offset).clamp(0, width - 1)
    pixels = ((n[:, None] * height + rows)[:, :, None] * width + columns[:, None, :]).flatten(1)  # (E, k²)

    truth = taps.new_zeros(2, len(n), num_classes + 1)
    truth.scatter_add_(2, ids.view(-1)[pixels].expand(2, -1, -1), taps[:, None, :].expand(-1, len(n), -1))
    truth = truth[:, :, :num_classes]
    mask = truth != 0

    read = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device).index_fill_(0, pixels.view(-1), True)
    rows_of_p = (read.cumsum(0) - 1)[pixels]  # (E, k²)
    p = logits.movedim(1, -1)[read.view_as(ids)].softmax(dim=1)  # (R, C)
    estimate = taps.new_zeros(2, len(n), num_classes)
    for tap in range(kernel_size**2):
        if tap != kernel_size**2 // 2:  # Both taps are 0 at the centre.
            estimate = estimate + taps[:, tap].view(2, 1, 1) * p.index_select(0, rows_of_p[:, tap])
    return _mean(((truth - estimate) / denominator).square(), mask)


# --------------------------------------------------------------------------------------------------------------------
# RMI loss, the Region Mutual Information


def rmi_loss(
    logits: Tensor, target: Tensor, *, ignore_index: int = 255, align_corners: bool = False, **options: Any
) -> Tensor:
    """RMI: mean_images Σ_classes ½ log det(M + αI) / radius², M the labels' covariance that p does not explain.

    p = activation(Z) · [Y valid] + 10⁻⁶ and y = onehot(Y), 0 at ignored pixels, are averaged over pool × pool pixels; Y
    and P (radius² × m) are their regions, centred; M = YYᵀ − YPᵀ (PPᵀ + αI)⁻¹ PYᵀ. The determinant is taken in fp64,
    and as det [[PPᵀ + αI, PYᵀ], [YPᵀ, YYᵀ + αI]] / det(PPᵀ + αI), which is the same and needs no inverse of a matrix
    that is nearly singular. Images without a valid pixel, or below radius × radius when pooled, leave the mean.
    options: the fields of RMI.
    """
    target = check_inputs(logits, target)
    return compute_rmi(logits, target, RMI(**options), ignore_index, align_corners)


def compute_rmi(logits: Tensor, target: Tensor, rmi: RMI, ignore_index: int, align_corners: bool) -> Tensor:
    """rmi_loss of inputs as `check_inputs` gives them."""
    y, p = (_regions(map, rmi.radius) for map in rmi_maps(logits, target, rmi, ignore_index, align_corners))
    joint, entries = torch.cat([p, y], dim=1), rmi.radius**2
    gram = joint @ joint.mT + rmi.alpha * torch.eye(2 * entries, dtype=p.dtype, device=p.device)
    information = (torch.logdet(gram) - torch.logdet(gram[:, :entries, :entries])) / 2
    compared = any_valid(target, ignore_index) & (joint.shape[2] > 0)
    loss = _mean(information.view(logits.shape[:2]).sum(1), compared) / entries
    return loss.to(logits.dtype if logits.dtype == torch.float64 else torch.float32)


def any_valid(target: Tensor, ignore_index: int) -> Tensor:
    """Which images have a label that is not ignored: bool (N,)."""
    return (target.long() != whole_label(ignore_index)).flatten(1).any(1)


def rmi_maps(logits: Tensor, target: Tensor, rmi: RMI, ignore_index: int, align_corners: bool) -> tuple[Tensor, Tensor]:
    """y and p of RMI, (N, C, h, w) fp64, averaged."""
    logits, labels, valid = _widen(logits, target, ignore_index, align_corners)
    y, valid = _one_hot(logits, labels, valid), valid.unsqueeze(1)
    logits = torch.where(valid, logits, 0.0)
    p = (logits.sigmoid() if rmi.activation == "sigmoid" else logits.softmax(dim=1)) * valid + 1e-6
    if rmi.pool > 1 and labels.numel() > 0:  # Zeros of the border are counted, as the authors' code does.
        y, p = (F.avg_pool2d(map, rmi.pool, padding=rmi.pool // 2) for map in (y, p))
    return y.double(), p.double()


def _regions(map: Tensor, radius: int) -> Tensor:
    """(N, C, h, w) → (N · C, radius², m): for each place in a region its values in all m regions, less their mean."""
    map = map.flatten(0, 1).unsqueeze(1)
    if min(map.shape) == 0 or min(map.shape[2:]) < radius:
        return map.flatten(1)[:, None, :0].expand(-1, radius**2, -1)  # There is no region.
    regions = F.unfold(map, radius)
    return regions - regions.mean(2, keepdim=True)


# --------------------------------------------------------------------------------------------------------------------
# Totals


def segmentation_loss(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ohem: OHEM | float | None = None,
    bcl: BCL | float | None = None,
    cpg: CPG | float | None = None,
    first: str = "ce",
    ignore_index: int = 255,
    align_corners: bool = False,
    group: Any = None,
) -> SegmentationLoss:
    """total = CE (or OHEM, or BCE) + λ_bcl · BCL + λ_cpg · CPG, and the terms; ``ce`` is the first, whichever it is.

    ohem, bcl, cpg: their options, or a float for OHEM's threshold, BCL's and CPG's weight; None leaves the term out.
    first: "ce", or "bce" for binary cross-entropies.
    """
    terms = resolve_options(ohem, bcl, cpg, first)
    check_not_built(group)
    target = check_inputs(logits, target, weight)
    if first == "ce":
        return SegmentationLoss.of(*compute_loss(logits, target, terms, weight, ignore_index, align_corners))
    total = compute_bce(logits, target, weight, ignore_index, align_corners)
    found = {"ce": total.detach()}
    if terms.names():
        others, values = compute_loss(logits, target, terms, None, ignore_index, align_corners)
        total, found = total + others, found | values
    return SegmentationLoss.of(total, found)


def compute_loss(
    logits: Tensor, target: Tensor, terms: Terms, weight: Tensor | None, ignore_index: int, align_corners: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The total of the terms that are asked for, each times its weight, and the terms by name, detached and unweighted.

    The inputs are taken as `check_inputs` gives them. This is what ``impl="torch"`` runs.
    """
    widened = _widen(logits, target, ignore_index, align_corners)  # once for all terms
    found: dict[str, tuple[float, Tensor]] = {}
    if terms.ce:
        found["ce"] = 1.0, _cross_entropy(*widened, weight, terms.ohem)
    if terms.bcl is not None:
        found["bcl"] = terms.bcl.weight, _bcl(*widened, terms.bcl)
    if terms.cpg is not None:
        found["cpg"] = terms.cpg.weight, _cpg_sparse(*widened, terms.cpg)
    total, *others = (term if factor == 1.0 else factor * term for factor, term in found.values())
    for other in others:
        total = total + other
    return total, {name: term.detach() for name, (_, term) in found.items()}
