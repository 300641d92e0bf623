"""Options of the losses: OHEM, BCL and CPG, their totals, the result, and the numbers that users pass.

Options are frozen: a bad one raises when it is made, TypeError for what is of another kind, ValueError for a value that
cannot be. What depends on several of them is checked where a total is formed (`resolve_options`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor


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
        except OverflowError:
            raise ValueError(f"{name} is an endless number.") from None
        except (TypeError, ValueError):
            pass
    raise TypeError(f"{name} is a number, not {value!r} ({type(value).__name__}).")


def whole_label(ignore_index: Any) -> int:
    """``ignore_index`` as an int. TypeError for None and for what is no whole number, ValueError beyond 64 bits."""
    if ignore_index is None:
        raise TypeError(
            "ignore_index is the label that marks ignored pixels, not None: pass -1 (or another that is no class) "
            "where there are none."
        )
    label = whole("ignore_index", ignore_index)
    if not -(2**63) <= label < 2**63:
        raise ValueError("ignore_index is a label, and no label has more than 64 bits.")
    return label


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool: True, False, or a number 0 or 1 of any kind. TypeError for anything else."""
    if isinstance(value, (str, bytes, Tensor)) or value not in (False, True):
        raise TypeError(f"{name} is True or False, not {value!r}.")
    return bool(value)


def _set(option: Any, **values: Any) -> None:
    """Sets fields of a frozen dataclass under construction."""
    for name, value in values.items():
        object.__setattr__(option, name, value)


@dataclass(frozen=True)
class OHEM:
    """Online hard example mining: average the cross-entropy of the hard pixels only (docs/definitions.md,
    Cross-entropy and OHEM).

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

    @property
    def words(self) -> str:
        """What a report calls it."""
        return f"OHEM (p < {self.threshold:g}, at least {self.min_kept:,} pixels)"


MAX_STEPS = 8  # A selection is kept as a byte for each pixel, with a bit for each of BCL's steps.


def _check_weight(name: str, weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name}'s weight is a number of at least 0, not {weight}.")


@dataclass(frozen=True)
class BCL:
    """Boundary Corrected Loss: flip the labels, compare, suppress non-maxima, keep the hard ones
    (docs/definitions.md, Boundary Corrected Loss).

    weight: λ, the factor of this term in the total. (0.4 was worse in every score of the pilot: bench/NOTES.md.)
    step: rows and columns are flipped in groups of this many pixels; a tuple of 1 to 8 steps averages their losses.
    supervise: "original" trains the selected pixels on their own labels; "flipped" on the two flipped ones (eq. 2 of
        the paper read literally), weighted by alpha (rows) and beta (columns).
    threshold: τ, a boundary pixel is kept if its largest of three losses exceeds −ln τ, 0 < threshold <= 1.
    nms_size: the odd edge of the square in which a kept pixel must be the maximum.
    """

    label: ClassVar = "BCL"

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
        if not 1 <= len(self.steps) <= MAX_STEPS or min(self.steps) < 1:
            raise ValueError(
                f"BCL's step is a positive number of pixels or a tuple of 1 to {MAX_STEPS} of them, not {self.step}."
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

    @property
    def steps(self) -> tuple[int, ...]:
        """``step`` as a tuple."""
        return (self.step,) if isinstance(self.step, int) else self.step

    @property
    def words(self) -> str:
        """What a report calls it."""
        return f"{self.weight:g} {self.label}"


CPG_WEIGHTS = {3: 1.0, 5: 0.4, 7: 0.35}
"""CPG's kernel sizes, and the weight of each where none is given."""


@dataclass(frozen=True)
class CPG:
    """Convolution-based Probability Gradient loss: match the Sobel gradients of p and of the labels
    (docs/definitions.md, CPG loss).

    weight: λ, the factor of this term in the total; None is 1.0, 0.4, 0.35 for kernel_size 3, 5, 7. (The paper's 1.0,
        8.0, 5.0 belong to a mask that rounding had diluted; with the exact mask they are far too strong.)
    kernel_size: edge of the Sobel kernel, 3, 5 or 7.
    ignore_mode: "window" leaves out pixels with an ignored pixel in their window; "centre" only ignored pixels
        themselves, as the authors' code does.
    """

    label: ClassVar = "CPG"

    weight: float = None  # type: ignore[assignment]  # a float once constructed
    kernel_size: int = 3
    ignore_mode: str = "window"

    def __post_init__(self) -> None:
        _set(self, kernel_size=whole("CPG's kernel_size", self.kernel_size))
        if self.kernel_size not in CPG_WEIGHTS:
            raise ValueError(f"CPG's kernel_size is 3, 5 or 7, not {self.kernel_size}.")
        if self.ignore_mode not in ("window", "centre"):
            raise ValueError(f'CPG\'s ignore_mode is "window" or "centre", not {self.ignore_mode!r}.')
        if self.weight is None:
            _set(self, weight=CPG_WEIGHTS[self.kernel_size])
        _set(self, weight=real("CPG's weight", self.weight))
        _check_weight("CPG", self.weight)

    @property
    def words(self) -> str:
        """What a report calls it."""
        return f"{self.weight:g} {self.label}{self.kernel_size}"


MAX_EDGE = 16  # The matrices of RMI have 2 · radius² rows.


@dataclass(frozen=True)
class RMI:
    """Region Mutual Information loss (docs/definitions.md, RMI loss).

    radius: the edge of a region, in pixels of the averaged maps. pool: so many pixels along each axis are averaged
    first, 1 for none. alpha: what is added to the covariances' diagonals, above 0. activation: how logits become
    probabilities, "sigmoid" or "softmax".
    """

    label: ClassVar = "RMI"

    radius: int = 3
    pool: int = 2
    alpha: float = 5e-4
    activation: str = "sigmoid"

    def __post_init__(self) -> None:
        _set(self, radius=whole("RMI's radius", self.radius), pool=whole("RMI's pool", self.pool))
        _set(self, alpha=real("RMI's alpha", self.alpha))
        for name, value in (("radius", self.radius), ("pool", self.pool)):
            if not 1 <= value <= MAX_EDGE:
                raise ValueError(f"RMI's {name} is a number of pixels from 1 to {MAX_EDGE}, not {value}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"RMI's alpha is a number above 0, not {self.alpha}.")
        if self.activation not in ("sigmoid", "softmax"):
            raise ValueError(f'RMI\'s activation is "sigmoid" or "softmax", not {self.activation!r}.')


class SegmentationLoss(NamedTuple):
    """total, differentiable, and its terms, detached and unweighted; a term that was not asked for is None. ce is the
    first term, whichever it is: CE, OHEM or BCE."""

    total: Tensor
    ce: Tensor | None
    bcl: Tensor | None
    cpg: Tensor | None

    @classmethod
    def of(cls, total: Tensor, found: Mapping[str, Tensor]) -> SegmentationLoss:
        """The result of a total and of the terms that were asked for, by name."""
        return cls(total, *map(found.get, cls._fields[1:]))


FIRST_TERMS = ("ce", "bce")
"""What can be the first term: cross-entropy (or OHEM), or binary cross-entropies."""

TERMS = ("ce", "bcl", "cpg")
"""The terms of the fused operator, in the order in which kernels return them."""

WEIGHTED: dict[str, type[BCL] | type[CPG]] = {"bcl": BCL, "cpg": CPG}
"""Of these terms those that stand beside the first, each times a weight, and their options."""


class Terms(NamedTuple):
    """The terms of a total with their options; one that is None, or False, is left out. ce: the cross-entropy, or
    OHEM's where ohem is given."""

    ce: bool = True
    ohem: OHEM | None = None
    bcl: BCL | None = None
    cpg: CPG | None = None

    def names(self) -> list[str]:
        """The names of the terms that are asked for, in the order of TERMS."""
        return [name for name in TERMS if getattr(self, name) is not None and getattr(self, name) is not False]


class LossOptions(NamedTuple):
    """The options of bcmf::loss, flat: the op's schema is made from these names and annotations, in this order.

    A term is off where one of its options is empty, None or 0; that is never its weight, which may be 0 while it grows.
    bcl_steps: empty without BCL. bcl_flipped: α and β, empty where BCL supervises the true labels. cpg_kernel_size: 0
    without CPG. cpg_window: whether an ignored pixel takes all windows that it lies in out of the mean.
    """

    ignore_index: int
    align_corners: bool = False
    ce: bool = True
    ohem_threshold: float | None = None
    ohem_min_kept: int = 0
    bcl_weight: float = 0.0
    bcl_steps: Sequence[int] = ()
    bcl_flipped: Sequence[float] = ()
    bcl_threshold: float = 1.0
    bcl_nms_size: int = 1
    cpg_weight: float = 0.0
    cpg_kernel_size: int = 0
    cpg_window: bool = True

    @classmethod
    def of(cls, ignore_index: int, align_corners: bool, terms: Terms) -> LossOptions:
        """The flat form of the terms' options."""
        ce, ohem, bcl, cpg = terms
        options: dict[str, Any] = {}
        if ohem is not None:
            options |= {"ohem_threshold": ohem.threshold, "ohem_min_kept": ohem.min_kept}
        if bcl is not None:
            options |= {
                "bcl_weight": bcl.weight,
                "bcl_steps": bcl.steps,
                "bcl_flipped": (bcl.alpha, bcl.beta) if bcl.supervise == "flipped" else (),
                "bcl_threshold": bcl.threshold,
                "bcl_nms_size": bcl.nms_size,
            }
        if cpg is not None:
            options |= {
                "cpg_weight": cpg.weight,
                "cpg_kernel_size": cpg.kernel_size,
                "cpg_window": cpg.ignore_mode == "window",
            }
        return cls(ignore_index, align_corners, ce, **options)


def _option(value: Any, kind: Any, keyword: str, field: str) -> Any:
    """The value of ``keyword`` as a ``kind`` or None: a number stands for ``kind(field=number)``. TypeError for
    others."""
    if value is None or isinstance(value, kind):
        return value
    try:
        number = real(keyword, value)
    except TypeError:
        raise TypeError(f"{keyword} is None, a number or {kind.__name__}(…), not {value!r}.") from None
    return kind(**{field: number})


def check_not_built(group: object) -> None:
    """ValueError for what the losses' signatures have room for and nothing computes yet."""
    if group is not None:
        raise ValueError("group is None: means over the pixels of several processes are not built yet.")


def resolve_options(
    ohem: OHEM | float | None = None,
    bcl: BCL | float | None = None,
    cpg: CPG | float | None = None,
    first: str = "ce",
) -> Terms:
    """The terms of a total that the fused operator computes, numbers turned into options. Raises TypeError for what is
    neither, and ValueError for a first term that is not there, and for options that cannot stand beside each other (see
    `check_flipped`)."""
    if first not in FIRST_TERMS:
        raise ValueError(f'first is "ce", the cross-entropy (or OHEM), or "bce", binary ones, not {first!r}.')
    if first == "bce" and ohem is not None:
        raise ValueError('OHEM averages the cross-entropy over hard pixels: beside first="bce" leave ohem out.')
    terms = Terms(
        ce=first == "ce",
        ohem=_option(ohem, OHEM, "ohem", "threshold"),
        bcl=_option(bcl, BCL, "bcl", "weight"),
        cpg=_option(cpg, CPG, "cpg", "weight"),
    )
    if terms.ce and terms.bcl is not None and terms.bcl.supervise == "flipped":
        check_flipped(terms.bcl, terms.ohem)
    return terms


def check_flipped(bcl: BCL, ohem: OHEM | None) -> None:
    """ValueError where flipped labels could outweigh the true ones: the arg-max stays right only beside a plain mean
    cross-entropy, and while λ (α + β) < 1 (docs/definitions.md, Boundary Corrected Loss)."""
    if ohem is not None:
        raise ValueError(
            'BCL(supervise="flipped") keeps the arg-max right only beside a plain mean cross-entropy: leave ohem out.'
        )
    strength = bcl.weight * (bcl.alpha + bcl.beta)
    if strength >= 1:
        raise ValueError(
            f'BCL(supervise="flipped") with weight·(alpha + beta) = {strength:g} teaches the flipped labels more than '
            "the true ones; keep it below 1."
        )
