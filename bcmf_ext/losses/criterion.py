"""Cross-entropy (or OHEM), BCL and CPG as one loss (docs/definitions.md, The criterion)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..checks import read_labels, without_autocast
from ..dispatch import check_impl
from ..ops import acc_dtype
from ..options import (
    BCL,
    CPG,
    FIRST_TERMS,
    OHEM,
    TERMS,
    WEIGHTED,
    SegmentationLoss,
    Terms,
    check_not_built,
    flag,
    real,
    resolve_options,
    whole_label,
)
from ._compute import compute_loss
from ._module import LossModule
from .binary_cross_entropy import binary_cross_entropy


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
    impl: str = "auto",
    group: Any = None,
) -> SegmentationLoss:
    """total = CE (or OHEM, or BCE) + λ_bcl · BCL + λ_cpg · CPG, and the terms for logging.

    logits: (N, C, h, w), fp16, bf16, fp32 or fp64, any strides; resampled bilinearly to (H, W) if h, w differ.
    target: (N, H, W) or (N, 1, H, W), bool or of any integer dtype, 0..C-1 or ignore_index.
    weight: class weights (C,) of the first term. ohem, bcl, cpg: their options, or a float for OHEM's threshold and for
    the weight λ of BCL or CPG; None leaves the term out. first: "ce", or "bce": the mean over the valid pixels of the
    sum over classes of w_c · BCEWithLogits(Z_c, [Y = c]), in plain PyTorch. group: None is all there is so far.
    Returns SegmentationLoss(total, ce, bcl, cpg): scalars, fp32 (fp64 for fp64 logits); the terms are detached and
    unweighted, None if not asked for; ``ce`` is the first term, whichever it is. Register the named tuple for
    ``torch.export``.

    Raises as cross_entropy, boundary_corrected_loss and cpg_loss do, and ValueError for OHEM beside
    BCL(supervise="flipped") or first="bce".
    """
    check_not_built(group)
    terms = resolve_options(ohem, bcl, cpg, first)
    common: dict[str, Any] = {"ignore_index": ignore_index, "align_corners": align_corners}
    if first == "ce":
        return SegmentationLoss.of(
            *compute_loss("segmentation_loss", logits, target, terms, weight=weight, impl=impl, **common)
        )
    total = binary_cross_entropy(logits, target, weight=weight, impl=impl, **common)
    found = {"ce": total.detach()}
    if terms.names():
        others, values = compute_loss("segmentation_loss", logits, target, terms, impl=impl, **common)
        total, found = total + others, found | values
    return SegmentationLoss.of(total, found)


ExtraLoss = Callable[[Tensor, Tensor], Tensor]
Outputs = Tensor | Sequence[Tensor] | Mapping[str, Any]


class SegmentationCriterion(nn.Module):
    """The loss of a network's outputs, a scalar as PyTorch's losses are: segmentation_loss of the main logits, plus
    aux_weight times the first term (CE, OHEM or BCE) of the auxiliary logits, plus the losses in ``extra``.

    outputs: main logits (N, C, h, w); (main, auxiliary) logits; or a mapping with "out" or "logits", and "aux", as the
        networks of torchvision and Transformers return. The two heads may differ in size.
    target: labels (N, H, W), as segmentation_loss takes them. ramp: how much of their weights the terms beside the
        first and the extra losses have; a trainer that warms them up passes it with each step. (Under torch.compile
        each value of it is compiled anew: compile the network, and leave the criterion as it is.)
    ``criterion(outputs, target, ramp)`` is ``criterion.terms(outputs, target, ramp)["total"]``.

    weight, ohem, bcl, cpg, first, ignore_index, align_corners, impl, group: as in segmentation_loss; BCL and CPG are on
        by default.
    extra: {name: (weight, function)}, any ``function(logits, target) -> scalar`` in plain PyTorch. It gets the main
        logits resampled to the labels' size, fp32 (fp64), and int64 labels (N, H, W) of its own with ignore_index in
        them. The loss modules of this package resample for themselves and get both as they are.

    Raises TypeError and ValueError as segmentation_loss does; ValueError where BCL(supervise="flipped") would outweigh
    the class weights, λ (α + β) · max w / min{w > 0} ≥ 1, for extra losses under names of our own terms, and for loss
    modules among them with another ignore_index or align_corners.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        ohem: OHEM | float | None = None,
        bcl: BCL | float | None = BCL(),  # noqa: B008 (frozen)
        cpg: CPG | float | None = CPG(),  # noqa: B008 (frozen)
        first: str = "ce",
        extra: Mapping[str, tuple[float, ExtraLoss]] | None = None,
        aux_weight: float = 0.4,
        ignore_index: int = 255,
        align_corners: bool = False,
        impl: str = "auto",
        group: Any = None,
    ) -> None:
        super().__init__()
        if weight is not None and not isinstance(weight, Tensor):
            raise TypeError(f"class weights are a tensor, not a {type(weight).__name__}.")
        ce, self.ohem, self.bcl, self.cpg = resolve_options(ohem, bcl, cpg, first)
        check_not_built(group)
        if ce and self.bcl is not None and self.bcl.supervise == "flipped" and weight is not None:
            _check_flipped_against_weights(self.bcl, weight)
        self.register_buffer("weight", weight)
        if not isinstance(extra, (Mapping, type(None))):
            raise TypeError(f"extra is a mapping of names to (weight, function), not a {type(extra).__name__}.")
        self.extra = {name: _check_extra(name, entry) for name, entry in (extra or {}).items()}
        self.extra_modules = nn.ModuleList([f for _, f in self.extra.values() if isinstance(f, nn.Module)])
        self.aux_weight = real("aux_weight", aux_weight)
        if not 0 <= self.aux_weight < math.inf:
            raise ValueError(f"aux_weight is a number of at least 0, not {aux_weight}.")
        self.ignore_index = whole_label(ignore_index)
        self.align_corners, self.impl = flag("align_corners", align_corners), check_impl(impl)
        self.first, self.group = first, group
        for name, (_, function) in self.extra.items():
            if isinstance(function, LossModule):
                _check_same_reading(name, function, self._reading)

    def forward(self, outputs: Outputs, target: Tensor, ramp: float = 1.0) -> Tensor:
        """The loss, a scalar: `terms` without its parts."""
        return self.terms(outputs, target, ramp)["total"]

    def terms(self, outputs: Outputs, target: Tensor, ramp: float = 1.0) -> dict[str, Tensor]:
        """The loss and what it is made of, scalars: "total", differentiable; and detached, without their weights, those
        that are on: "ce" or "bce", "bcl", "cpg", "aux", and the names in ``extra``."""
        main, auxiliary = main_and_auxiliary(outputs)
        weighted = {name: _ramped(getattr(self, name), ramp) for name in WEIGHTED}
        loss = segmentation_loss(main, target, **weighted, **self._first_term, **self._common)
        named = {"total": loss.total, self.first: loss.ce, **{name: getattr(loss, name) for name in WEIGHTED}}
        total, terms = loss.total, {name: term for name, term in named.items() if term is not None}
        if auxiliary is not None:
            aux = segmentation_loss(auxiliary, target, **self._first_term, **self._common).total
            total, terms["aux"] = total + self.aux_weight * aux, aux.detach()
        for name, value in self._extra_terms(main, target).items():
            total, terms[name] = total + ramp * self.extra[name][0] * value, value.detach()
        return {**terms, "total": total}

    def _extra_terms(self, main: Tensor, target: Tensor) -> dict[str, Tensor]:
        if not self.extra:
            return {}
        labels = read_labels(target).long()
        functions = {name: function for name, (_, function) in self.extra.items()}
        with without_autocast(main):
            logits = main
            if not all(isinstance(function, LossModule) for function in functions.values()):
                logits = reference.resample(main, labels.shape[1:], self.align_corners)  # once for all of them
                logits = logits.clone() if logits is main else logits  # What they do in place must not reach main.
            found = {
                name: function(main, target) if isinstance(function, LossModule) else function(logits, labels.clone())
                for name, function in functions.items()
            }
        for name, value in found.items():
            if isinstance(value, Tensor) and value.numel() == 0:  # Some Lovász losses do so where all is ignored.
                found[name] = value = value.sum()
            if not isinstance(value, Tensor) or value.dim() != 0:
                what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"The extra loss {name!r} returns a scalar tensor, not {what}: take the mean.")
        return found

    @torch.enable_grad()
    def gradient_shares(self, outputs: Outputs, target: Tensor, ramp: float = 1.0) -> dict[str, Tensor]:
        """How much each term pulls at the main logits Z: λ‖∂L/∂Z‖ of our terms and the extra losses, over the sum of
        these; scalars.

        The arguments are forward's. It takes one forward and backward of the loss for each term, and none of the
        network. The auxiliary head's loss has no part in it."""
        main, _ = main_and_auxiliary(outputs)
        main = main.detach().to(acc_dtype(main)).requires_grad_()  # Gradients of means are too small for fp16.
        terms = {self.first: (1.0, segmentation_loss(main, target, **self._first_term, **self._common).total)}
        for name in WEIGHTED:
            if (option := getattr(self, name)) is not None:
                alone: dict[str, Any] = {name: replace(option, weight=1.0)}
                name_in_errors = f"{name}'s gradient share"
                term, _ = compute_loss(name_in_errors, main, target, Terms(ce=False, **alone), **self._common)
                terms[name] = ramp * option.weight, term
        for name, value in self._extra_terms(main, target).items():
            terms[name] = ramp * self.extra[name][0], value
        pulls = {}
        for name, (weight, term) in terms.items():
            grad = None  # That is so for an extra loss that only measures, or has parameters alone.
            if term.requires_grad:
                # The terms share a graph, which has to stay.
                (grad,) = torch.autograd.grad(term, main, retain_graph=True, allow_unused=True)
            pulls[name] = torch.zeros_like(term) if grad is None else weight * grad.norm()
        total = torch.stack([*pulls.values()]).sum()
        total = total.clamp(min=torch.finfo(total.dtype).tiny)  # Where all is ignored, all shares are 0.
        return {name: pull / total for name, pull in pulls.items()}

    def extra_repr(self) -> str:
        """The arguments, as they would be passed."""
        names = "ohem", "bcl", "cpg", "first", "extra", "aux_weight", "ignore_index", "align_corners", "impl", "group"
        weight = None if self.weight is None else self.weight.tolist()
        return ", ".join(
            f"{name}={value!r}" for name, value in [("weight", weight), *((n, getattr(self, n)) for n in names)]
        )

    @property
    def _first_term(self) -> dict[str, Any]:
        return {"first": self.first, "weight": self.weight, "ohem": self.ohem}

    @property
    def _reading(self) -> dict[str, Any]:
        return {"ignore_index": self.ignore_index, "align_corners": self.align_corners}

    @property
    def _common(self) -> dict[str, Any]:
        return {**self._reading, "impl": self.impl}


def _ramped(option: Any, ramp: float) -> Any:
    if not torch.compiler.is_compiling() and not 0 <= real("ramp", ramp) < math.inf:
        raise ValueError(f"ramp is a share of the weights, a number of at least 0, not {ramp}.")
    return option if option is None or ramp == 1 else replace(option, weight=ramp * option.weight)


def main_and_auxiliary(outputs: Outputs) -> tuple[Tensor, Tensor | None]:
    """The logits of the main and the auxiliary head (or None), from whatever a network returns; TypeError for outputs
    that are of no kind that is known."""
    if isinstance(outputs, Mapping):
        main = outputs.get("out", outputs.get("logits"))
        if main is None:
            raise TypeError(f'outputs hold logits as "out" or "logits", but these have {", ".join(map(str, outputs))}.')
        return main, outputs.get("aux")
    if isinstance(outputs, (tuple, list)):
        if len(outputs) != 2:
            raise TypeError(f"outputs are logits, or (main, auxiliary) logits, not {len(outputs)} of them.")
        return outputs[0], outputs[1]
    return outputs, None  # type: ignore[return-value]  # what is no tensor segmentation_loss refuses


def _check_extra(name: str, entry: Any) -> tuple[float, ExtraLoss]:
    if not isinstance(name, str) or not name:
        raise TypeError(f"The name of an extra loss is a text, not {name!r}.")
    if name in ("total", *TERMS, *FIRST_TERMS, "aux"):
        raise ValueError(f"The extra loss {name!r} has the name of a term of ours: choose another.")
    if not isinstance(entry, (tuple, list)) or len(entry) != 2 or not callable(entry[1]):
        raise TypeError(f"The extra loss {name!r} is (weight, function), not {entry!r}.")
    weight = real(f"the weight of the extra loss {name!r}", entry[0])
    if not 0 <= weight < math.inf:
        raise ValueError(f"The weight of the extra loss {name!r} is a number of at least 0, not {weight}.")
    return weight, entry[1]


def _check_same_reading(name: str, function: LossModule, reading: Mapping[str, Any]) -> None:
    for keyword, value in reading.items():
        if function.options[keyword] != value:
            raise ValueError(
                f"The extra loss {name!r} has {keyword}={function.options[keyword]}, and the criterion {value}: give "
                "both the same."
            )


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
