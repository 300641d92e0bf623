"""The losses as their papers define them, in plain PyTorch.

This file is the oracle that every other backend is compared with, the baseline of the benchmarks, and the easiest place
to read what a loss is. It imports torch alone. Names and defaults are those of the public functions, without ``impl``.

Shapes throughout: logits ``Z (N, C, h, w)`` in fp16, bf16, fp32 or fp64; target ``Y (N, H, W)``, or (N, 1, H, W), bool
or of any integer dtype, holding ``0..C-1`` or ``ignore_index``. If (h, w) differs from (H, W), the logits are resampled
bilinearly.
Arithmetic is fp32 (fp64 for fp64 logits) whatever the logits' dtype, and so is the result, a scalar on the logits'
device. Where there is nothing to average, a term is 0 with an all-zero gradient, attached to the graph.

Errors: ``TypeError`` for a wrong dtype, ``ValueError`` for a wrong shape, device or option, and for a label that is
neither a class nor ``ignore_index``. On CUDA tensors, and under torch.compile, torch.func and tracing, such a label
makes the loss NaN instead: looking at it would stop the GPU, or cannot be done.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------------------------------------
# Options and results


def whole(name: str, value: Any) -> int:
    """``value`` as an int: NumPy's integers are some, too. TypeError for other numbers, bools and tensors."""
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} is a whole number, not {value!r} ({type(value).__name__}).")


def real(name: str, value: Any) -> float:
    """``value`` as a float. TypeError for what is no number, and for bools, texts and tensors."""
    if not isinstance(value, (bool, str, bytes, Tensor)):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name} is a number, not {value!r} ({type(value).__name__}).")


def whole_label(ignore_index: Any) -> int:
    """``ignore_index`` as an int; TypeError."""
    if ignore_index is None:
        raise TypeError(
            "ignore_index is the label that marks ignored pixels, not None: pass -1 (or another that is no class) "
            "where there are none."
        )
    return whole("ignore_index", ignore_index)


def _set(option: Any, **values: Any) -> None:
    """Fields of a frozen dataclass under construction."""
    for name, value in values.items():
        object.__setattr__(option, name, value)


@dataclass(frozen=True)
class OHEM:
    """Online hard example mining: average the cross-entropy of the hard pixels only (spec section 2).

    threshold: a pixel is hard if the probability of its label is below this, 0 < threshold <= 1.
    min_kept: at least this many pixels of the batch are kept, the hardest ones.
    """

    threshold: float = 0.9
    min_kept: int = 131072

    def __post_init__(self) -> None:
        _set(self, threshold=real("OHEM's threshold", self.threshold), min_kept=whole("OHEM's min_kept", self.min_kept))
        if not 0 < self.threshold <= 1:
            raise ValueError(f"OHEM's threshold is a probability in (0, 1], not {self.threshold}.")
        if self.min_kept < 0:
            raise ValueError(f"OHEM's min_kept is a number of pixels, at least 0, not {self.min_kept}.")


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name}'s weight is a number of at least 0, not {weight}.")


@dataclass(frozen=True)
class BCL:
    """Boundary Corrected Loss: flip the labels, compare, suppress non-maxima, keep the hard ones (spec section 3).

    weight: λ, the factor of this term in the total. (The spec's 0.4 was worse in the pilot: bench/NOTES.md.)
    step: rows and columns are flipped in groups of this many pixels; a tuple of 1 to 8 steps averages their losses.
    supervise: "original" trains the selected pixels on their own labels; "flipped" on the two flipped ones (eq. 2 of
        the paper read literally), weighted by alpha (rows) and beta (columns).
    threshold: τ, a boundary pixel is kept if its largest of three losses exceeds −ln τ, 0 < threshold <= 1.
    nms_size: the odd edge of the square in which a kept pixel must be the maximum.
    """

    weight: float = 0.1
    step: int | tuple[int, ...] = 2
    supervise: str = "original"
    alpha: float = 0.5
    beta: float = 0.5
    threshold: float = 0.7
    nms_size: int = 3

    def __post_init__(self) -> None:
        if isinstance(self.step, (tuple, list)):
            _set(self, step=tuple(whole("a step of BCL", step) for step in self.step))
        else:
            _set(self, step=whole("BCL's step", self.step))
        for name in ("weight", "alpha", "beta", "threshold"):
            _set(self, **{name: real(f"BCL's {name}", getattr(self, name))})
        _set(self, nms_size=whole("BCL's nms_size", self.nms_size))
        _check_weight("BCL", self.weight)
        if not 1 <= len(self.steps) <= 8 or min(self.steps) < 1:
            raise ValueError(
                f"BCL's step is a positive number of pixels or a tuple of 1 to 8 of them, not {self.step}."
            )
        if self.supervise not in ("original", "flipped"):
            raise ValueError(f'BCL\'s supervise is "original" or "flipped", not {self.supervise!r}.')
        if not 0 < self.threshold <= 1:
            raise ValueError(f"BCL's threshold is a probability in (0, 1], not {self.threshold}.")
        for name, share in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 <= share < math.inf:
                raise ValueError(f"BCL's {name} is a number of at least 0, not {share}.")
        if self.nms_size < 1 or self.nms_size % 2 == 0:
            raise ValueError(f"BCL's nms_size is an odd number of pixels, not {self.nms_size}.")
        if self.supervise == "flipped" and self.weight * (self.alpha + self.beta) >= 1:
            raise ValueError(
                f'BCL(supervise="flipped") with weight·(alpha + beta) = {self.weight * (self.alpha + self.beta):g} '
                "teaches the flipped labels more than the true ones; keep it below 1."
            )

    @property
    def steps(self) -> tuple[int, ...]:
        """``step`` as a tuple."""
        return (self.step,) if isinstance(self.step, int) else self.step


@dataclass(frozen=True)
class CPG:
    """Convolution-based Probability Gradient loss: match the Sobel gradients of p and of the labels (spec section 4).

    weight: λ, the factor of this term in the total; None is 1.0, 0.4, 0.35 for kernel_size 3, 5, 7. (The paper's 1.0,
        8.0, 5.0 belong to a mask that rounding had diluted; with the exact mask they are far too strong.)
    kernel_size: edge of the Sobel kernel, 3, 5 or 7.
    ignore_mode: "window" leaves out pixels with an ignored pixel in their window; "centre" only ignored pixels
        themselves, as the authors' code does.
    """

    weight: float = None  # type: ignore[assignment]  # a float once constructed
    kernel_size: int = 3
    ignore_mode: str = "window"

    def __post_init__(self) -> None:
        _set(self, kernel_size=whole("CPG's kernel_size", self.kernel_size))
        if self.kernel_size not in (3, 5, 7):
            raise ValueError(f"CPG's kernel_size is 3, 5 or 7, not {self.kernel_size}.")
        if self.ignore_mode not in ("window", "centre"):
            raise ValueError(f'CPG\'s ignore_mode is "window" or "centre", not {self.ignore_mode!r}.')
        if self.weight is None:
            _set(self, weight={3: 1.0, 5: 0.4, 7: 0.35}[self.kernel_size])
        _set(self, weight=real("CPG's weight", self.weight))
        _check_weight("CPG", self.weight)


class SegmentationLoss(NamedTuple):
    """total, differentiable, and its terms, detached and unweighted; a term that was not asked for is None."""

    total: Tensor
    ce: Tensor
    bcl: Tensor | None
    cpg: Tensor | None


# --------------------------------------------------------------------------------------------------------------------
# What every loss does first (spec section 1)


# Dtypes of labels that kernels read where they are, and what the others are converted to.
_READ_AS = {torch.bool: torch.uint8, torch.int8: torch.int16, torch.uint16: torch.int32}
_READ_AS |= {torch.uint32: torch.int64, torch.uint64: torch.int64}
LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def read_labels(target: Tensor) -> Tensor:
    """Labels as all that follows takes them: (N, H, W), also of (N, 1, H, W), in one of LABEL_DTYPES."""
    if target.dim() == 4 and target.shape[1] == 1:
        target = target.squeeze(1)
    return target.to(_READ_AS.get(target.dtype, target.dtype))


def check_inputs(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The target as `read_labels` gives it. Raises TypeError or ValueError unless shapes, dtypes and devices are those
    of the module's docstring."""
    if not isinstance(logits, Tensor):
        of_heads = isinstance(logits, (tuple, list, Mapping))
        hint = ": of the outputs of several heads, SegmentationCriterion makes one loss" * of_heads
        raise TypeError(f"logits are a tensor, not a {type(logits).__name__}{hint}.")
    for name, tensor in (("target is", target), ("class weights are", weight)):
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} a tensor, not a {type(tensor).__name__}.")
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"logits are floating point (fp16, bf16, fp32, fp64), not {logits.dtype}.")
    shape, target = tuple(target.shape), read_labels(target)
    if target.dtype not in LABEL_DTYPES:
        raise TypeError(f"target holds class ids, bool or of an integer dtype, not {target.dtype}.")
    if logits.dim() != 4 or logits.shape[1] < 2:
        raise ValueError(f"logits have the shape (N, C, h, w) with C >= 2, not {tuple(logits.shape)}.")
    if target.dim() != 3 or target.shape[0] != logits.shape[0]:
        raise ValueError(
            f"target has the shape (N, H, W), or (N, 1, H, W), with the logits' N = {logits.shape[0]}, not {shape}."
        )
    if target.numel() > 0 and logits.numel() == 0:
        raise ValueError(f"logits of the shape {tuple(logits.shape)} cannot be resampled to {tuple(target.shape)}.")
    if target.device != logits.device:
        raise ValueError(f"logits are on {logits.device} and target on {target.device}: move one of them.")
    if weight is not None:
        if not weight.is_floating_point():
            raise TypeError(f"class weights are floating point, not {weight.dtype}.")
        if weight.shape != logits.shape[1:2]:
            raise ValueError(
                f"class weights have one entry for each of the {logits.shape[1]} classes, not {tuple(weight.shape)}."
            )
        if weight.requires_grad:
            raise ValueError("class weights get no gradient: pass weight.detach().")
        if weight.device != logits.device:
            raise ValueError(f"logits are on {logits.device} and class weights on {weight.device}: move one of them.")
    return target


def describe_bad_labels(target: Tensor, num_classes: int, ignore_index: int) -> str:
    """The sentence for labels that are neither a class nor ignore_index."""
    values = torch.unique(target.long())
    bad = [v for v in values.tolist() if v != ignore_index and not 0 <= v < num_classes]
    if not bad:  # somebody else writes to it
        return "target held ids that are neither a class nor ignore_index; it has changed since."
    shown = ", ".join(map(str, bad[:8])) + (", …" if len(bad) > 8 else "")
    sentence = (
        f"target holds {shown}, but the logits have classes 0..{num_classes - 1} and ignore_index is {ignore_index}"
    )
    if num_classes == 19 and max(bad) <= 33 and min(bad) >= -1:
        sentence += "; these look like Cityscapes label ids: map them to train ids"
    elif bad == [255]:
        sentence += "; if 255 marks ignored pixels, pass ignore_index=255"
    return sentence + "."


def is_traced(tensor: Tensor) -> bool:
    """Whether what is computed must not depend on values: under torch.func, torch.jit.trace and an ONNX export, and of
    meta tensors, which have none."""
    if torch.compiler.is_compiling():  # which breaks the graph where a value is asked for
        return False
    return tensor.is_meta or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export() or in_torch_func()


def in_torch_func() -> bool:
    """Whether a transform of torch.func is at work: grad, vmap, jvp, …"""
    return torch._C._functorch.peek_interpreter_stack() is not None


def check_labels(target: Tensor, num_classes: int, ignore_index: int) -> None:
    """Raise ValueError if a label is neither a class nor ignore_index. Synchronises on CUDA."""
    labels = target.long()
    if ((labels != ignore_index) & ((labels < 0) | (labels >= num_classes))).any():
        raise ValueError(describe_bad_labels(target, num_classes, ignore_index))


def resample(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """fp32 (fp64) logits (N, C, H, W) of ``size`` (H, W): bilinear, up or down.

    What F.interpolate would compute without rounding: positions and weights come from integers, beyond the last centre
    lie copies of the border, so that equal logits stay equal (BCL's selection depends on it), and an entry of weight 0
    is not read, whatever it holds.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    for axis in (3, 2):  # columns first: the map is small then, and its rows lie together
        if logits.shape[axis] != size[axis - 2]:
            logits = _resample_axis(logits, axis, size[axis - 2], align_corners)
    return logits


def _resample_axis(logits: Tensor, axis: int, length: int, align_corners: bool) -> Tensor:
    """One axis of it: (1 − weight) · logits[first] + weight · logits[first + 1]."""
    given = logits.shape[axis]
    i = torch.arange(length, device=logits.device)
    if align_corners:
        numerator, denominator = i * (given - 1), max(length - 1, 1)
    else:
        numerator, denominator = ((2 * i + 1) * given - length).clamp(min=0), 2 * length
    first = numerator // denominator
    weight = (numerator - first * denominator).to(logits.dtype) / denominator
    weight = torch.where(first == given - 1, 0.0, weight)
    second = torch.where(weight == 0, given, first + 1)  # of weight 0: zeros that follow the last entry
    padded = F.pad(logits, [0, 0] * (3 - axis) + [0, 1])
    weight = weight.view([-1 if a == axis else 1 for a in range(4)])
    # In place: the maps are large. Their backward needs the weights alone.
    return _take(padded, axis, first).mul_(1 - weight).add_(_take(padded, axis, second).mul_(weight))


def _take(logits: Tensor, axis: int, index: Tensor) -> Tensor:
    """index_select; on GPUs by an indexing whose backward adds in a fixed order."""
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


def _mean(values: Tensor, selected: Tensor, denominator: Tensor | None = None) -> Tensor:
    """Σ values[selected] / denominator (default: the number selected); 0 where the denominator is 0."""
    total = torch.where(selected, values, 0.0).sum()
    denominator = (selected.sum() if denominator is None else denominator).to(total.dtype)
    return torch.where(denominator != 0, total, 0.0) / torch.where(denominator != 0, denominator, 1.0)


# --------------------------------------------------------------------------------------------------------------------
# Cross-entropy and OHEM (spec section 2)


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
    target = check_inputs(logits, target, weight)
    hard_examples: OHEM | None = _option(ohem, OHEM, "ohem", "threshold")
    logits, labels, valid = _widen(logits, target, ignore_index, align_corners)
    if weight is not None:
        # A pixel of weight 0 pulls at nothing, not even by 0·NaN. (The NaN of its logits stays in the value.)
        logits = torch.where((weight[labels] != 0).unsqueeze(1), logits, logits.detach())
    nll = _nll(_log_softmax(logits, valid), labels)
    selected = valid if hard_examples is None else _hard_pixels(nll.detach(), valid, hard_examples)
    if weight is None:  # not weights of 1: inductor multiplies them away, and then loses the gradient at a graph break
        return _mean(nll, selected)
    w = weight.to(nll.dtype)[labels]
    return _mean(w * nll, selected, torch.where(valid, w, 0.0).sum() if hard_examples is None else None)


def _hard_pixels(nll: Tensor, valid: Tensor, ohem: OHEM) -> Tensor:
    """S of OHEM. Comparisons are negated so that a NaN counts as hard. Chosen on ℓ, not on p: p saturates into ties."""
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
# Boundary Corrected Loss (spec section 3)


def flip_index(length: int, step: int, device: torch.device | None = None) -> Tensor:
    """π_s: the permutation of 0..length-1 that swaps neighbouring groups of ``step``; an index whose partner would be
    outside stays. ``labels[:, flip_index(H, s)]`` is Yʳ, ``labels[:, :, flip_index(W, s)]`` is Yᶜ."""
    i = torch.arange(length, device=device)
    partner = torch.where((i // step) % 2 == 0, i + step, i - step)
    return torch.where(partner < length, partner, i)


def boundary_corrected_loss(
    logits: Tensor,
    target: Tensor,
    *,
    step: int | tuple[int, ...] = 2,
    supervise: str = "original",
    alpha: float = 0.5,
    beta: float = 0.5,
    threshold: float = 0.7,
    nms_size: int = 3,
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """The BCL term of BCMFNet, without the cross-entropy that stands beside it and without λ.

    The labels flipped by rows, Yʳ, and by columns, Yᶜ, are compared with the labels Y: q = max(ℓ[Y], ℓ[Yʳ], ℓ[Yᶜ])
    where all three are valid (V₃). S = {q is the maximum of its nms_size² neighbourhood, and q > −ln threshold}.
    supervise="original": (1/|S|) Σ_S ℓ[Y]. supervise="flipped": (1/|V|) Σ_S (α ℓ[Yʳ] + β ℓ[Yᶜ]). Arguments: see BCL.
    """
    options = BCL(0.0, step, supervise, alpha, beta, threshold, nms_size)
    target = check_inputs(logits, target)
    logits, labels, valid = _widen(logits, target, ignore_index, align_corners)
    losses = [_bcl_of_one_step(logits, labels, valid, step, options) for step in options.steps]
    return torch.stack(losses).mean()


def _bcl_of_one_step(logits: Tensor, labels: Tensor, valid: Tensor, step: int, options: BCL) -> Tensor:
    rows = flip_index(labels.shape[1], step, labels.device)
    columns = flip_index(labels.shape[2], step, labels.device)
    valid3 = valid & valid[:, rows] & valid[:, :, columns]

    log_p = _log_softmax(logits, valid3)
    nll, nll_rows, nll_columns = (_nll(log_p, y) for y in (labels, labels[:, rows], labels[:, :, columns]))
    q = torch.maximum(torch.maximum(nll, nll_rows), nll_columns).detach()
    selected = select_maxima(q, valid3, options)
    if options.supervise == "original":
        return _mean(nll, selected)
    return _mean(options.alpha * nll_rows + options.beta * nll_columns, selected, valid.sum())


def select_maxima(q: Tensor, valid3: Tensor, options: BCL) -> Tensor:
    """S: where the scores q (N, H, W) are maxima of their neighbourhood and exceed the threshold, bool (N, H, W). A NaN
    score is never left out silently."""
    q = torch.where(valid3, q, 0.0)
    radius = min(options.nms_size // 2, max(q.shape[1:]))
    pooled = F.max_pool2d(q, 2 * radius + 1, stride=1, padding=radius) if q.numel() else q
    return valid3 & ((q == pooled) & (q > -math.log(options.threshold)) | q.isnan())


# --------------------------------------------------------------------------------------------------------------------
# Convolution-based Probability Gradient loss (spec section 4)


def sobel_taps(kernel_size: int) -> tuple[Tensor, int]:
    """Integer taps (2, k, k), x then y, and their common denominator: K_x[u, v] = v / (u² + v²), K_y[u, v] = u / (u² +
    v²), 0 at the centre, u the row offset. As integers, so that G ≠ 0 is decided exactly (k = 3 is Sobel × 0.5)."""
    radius, denominator = kernel_size // 2, {3: 2, 5: 20, 7: 780}[kernel_size]
    u, v = torch.meshgrid(*[torch.arange(-radius, radius + 1)] * 2, indexing="ij")
    squared = (u * u + v * v).clamp(min=1)
    return torch.stack([denominator * v // squared, denominator * u // squared]), denominator


def _dilate(mask: Tensor, radius: int) -> Tensor:
    """Pixels with a true pixel in their (2·radius + 1)² window, clipped at the border. mask: bool (N, H, W)."""
    if mask.numel() == 0:
        return mask
    return F.max_pool2d(mask.float().unsqueeze(1), 2 * radius + 1, stride=1, padding=radius).squeeze(1) > 0


def cpg_loss(
    logits: Tensor,
    target: Tensor,
    *,
    kernel_size: int = 3,
    ignore_mode: str = "window",
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """CPG as the paper defines it: mean of (G − Ĝ)² over M, G and Ĝ the Sobel gradients of the one-hot labels and of p.

    M holds the (image, class, direction, pixel) with G ≠ 0, decided exactly, and no ignored pixel in the window
    (``ignore_mode="centre"``: whose own pixel is not ignored). Ignored pixels are the zero vector in the one-hot map;
    borders are replicated. For speed see cpg_loss_sparse.
    """
    kernel_size = CPG(0.0, kernel_size, ignore_mode).kernel_size
    target = check_inputs(logits, target)
    logits, labels, valid = _widen(logits, target, ignore_index, align_corners)
    if labels.numel() == 0:
        return _mean(logits.sum(1), valid)
    radius = kernel_size // 2
    taps, denominator = sobel_taps(kernel_size)

    def gradients(maps: Tensor) -> Tensor:  # (N, C, H, W) → (N, C, 2, H, W), times the denominator
        n, c, h, w = maps.shape
        padded = F.pad(maps.reshape(n * c, 1, h, w), [radius] * 4, mode="replicate")
        return F.conv2d(padded, taps.unsqueeze(1).to(maps)).view(n, c, 2, h, w)

    one_hot = (torch.arange(logits.shape[1], device=labels.device).view(-1, 1, 1) == labels.unsqueeze(1)) & valid[
        :, None
    ]
    truth = gradients(one_hot.to(logits.dtype))  # integers: exact
    usable = ~_dilate(~valid, radius) if ignore_mode == "window" else valid
    mask = (truth != 0) & usable[:, None, None]

    read = _dilate(mask.flatten(1, 2).any(1), radius)
    residual = (truth - gradients(_log_softmax(logits, read).exp())) / denominator
    return _mean(residual.square(), mask)


def cpg_loss_sparse(
    logits: Tensor,
    target: Tensor,
    *,
    kernel_size: int = 3,
    ignore_mode: str = "window",
    ignore_index: int = 255,
    align_corners: bool = False,
) -> Tensor:
    """cpg_loss, computed at the edge pixels only: the fastest eager form we know. Equal to cpg_loss up to rounding.

    G is zero wherever a window holds a single label, which is nine pixels of ten. So softmax is taken only of the R
    pixels in the windows of the E edge pixels, and the Sobel taps are summed one after the other over those rows (with
    its backward, faster than embedding_bag, a sparse product or one gather of all windows).
    """
    kernel_size = CPG(0.0, kernel_size, ignore_mode).kernel_size
    target = check_inputs(logits, target)
    if is_traced(logits):  # which pixels are edge pixels is a question of values
        options: dict[str, Any] = {"ignore_index": ignore_index, "align_corners": align_corners}
        return cpg_loss(logits, target, kernel_size=kernel_size, ignore_mode=ignore_mode, **options)
    logits, labels, valid = _widen(logits, target, ignore_index, align_corners)
    if labels.numel() == 0:
        return _mean(logits.sum(1), valid)
    num_classes, (height, width), radius = logits.shape[1], labels.shape[1:], kernel_size // 2
    taps, denominator = sobel_taps(kernel_size)
    taps = taps.flatten(1).to(logits)  # (2, k²)

    ids = torch.where(valid, labels, num_classes).contiguous()  # ignored pixels are a class of their own
    highest = F.max_pool2d(ids.float(), kernel_size, stride=1, padding=radius)
    lowest = -F.max_pool2d(-ids.float(), kernel_size, stride=1, padding=radius)
    usable = highest < num_classes if ignore_mode == "window" else valid
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
        if tap != kernel_size**2 // 2:  # both are 0 at the centre
            estimate = estimate + taps[:, tap].view(2, 1, 1) * p.index_select(0, rows_of_p[:, tap])
    return _mean(((truth - estimate) / denominator).square(), mask)


# --------------------------------------------------------------------------------------------------------------------
# The criterion (spec section 5)


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
    """total = CE (or OHEM) + λ_bcl · BCL + λ_cpg · CPG, and the terms.

    ohem, bcl, cpg: their options, or a float for OHEM's threshold, BCL's and CPG's weight; None leaves the term out.
    """
    ohem, bcl, cpg = resolve_options(ohem, bcl, cpg)
    check_not_built(first, group)
    target = check_inputs(logits, target, weight)
    logits = resample(logits, target.shape[1:], align_corners)  # once for all terms
    common: dict[str, Any] = {"ignore_index": ignore_index}
    ce = cross_entropy(logits, target, weight=weight, ohem=ohem, **common)
    total = ce
    bcl_term: Tensor | None = None
    cpg_term: Tensor | None = None
    if bcl is not None:
        bcl_term = boundary_corrected_loss(
            logits,
            target,
            step=bcl.step,
            supervise=bcl.supervise,
            alpha=bcl.alpha,
            beta=bcl.beta,
            threshold=bcl.threshold,
            nms_size=bcl.nms_size,
            **common,
        )
        total = total + bcl.weight * bcl_term
    if cpg is not None:
        cpg_term = cpg_loss_sparse(logits, target, kernel_size=cpg.kernel_size, ignore_mode=cpg.ignore_mode, **common)
        total = total + cpg.weight * cpg_term
    return SegmentationLoss(
        total,
        ce.detach(),
        None if bcl_term is None else bcl_term.detach(),
        None if cpg_term is None else cpg_term.detach(),
    )


def _option(value: Any, kind: Any, keyword: str, field: str) -> Any:
    """What was passed as ``keyword``: None, a ``kind``, or a number, which stands for ``kind(field=number)``."""
    if value is None or isinstance(value, kind):
        return value
    try:
        number = real(keyword, value)
    except TypeError:
        raise TypeError(f"{keyword} is None, a number or {kind.__name__}(…), not {value!r}.") from None
    return kind(**{field: number})


def check_not_built(first: str, group: object) -> None:
    """ValueError for what the losses' signatures have room for and nothing computes yet."""
    if first != "ce":
        raise ValueError(f'The first term is "ce", the cross-entropy (or OHEM), not {first!r}: no other is built yet.')
    if group is not None:
        raise ValueError("group is None: means over the pixels of several processes are not built yet.")


def resolve_options(
    ohem: OHEM | float | None, bcl: BCL | float | None, cpg: CPG | float | None
) -> tuple[OHEM | None, BCL | None, CPG | None]:
    """Floats to options; TypeError for what is neither, ValueError if OHEM stands beside a BCL that supervises the
    flipped labels."""
    chosen: tuple[OHEM | None, BCL | None, CPG | None] = (
        _option(ohem, OHEM, "ohem", "threshold"),
        _option(bcl, BCL, "bcl", "weight"),
        _option(cpg, CPG, "cpg", "weight"),
    )
    if chosen[0] is not None and chosen[1] is not None and chosen[1].supervise == "flipped":
        raise ValueError(
            'BCL(supervise="flipped") keeps the arg-max right only beside a plain mean cross-entropy: leave ohem out.'
        )
    return chosen
