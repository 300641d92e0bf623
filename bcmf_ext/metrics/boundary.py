"""Scores how well boundaries are met: Boundary IoU, boundary F-score and trimap IoU, per class, as docs/definitions.md,
"Metrics", defines them.

All work on binary masks of one class each; a mask holds neither ignored pixels nor, of course, what lies outside the
image. No mask is made, though: masks of a label map do not overlap, so one map of labels stands for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import real, whole
from ._counts import Counts, by_kernels, count_pairs, differ, keep

WIDTHS = (1, 3, 5, 9, 12)  # These pixels are those of docs/definitions.md, "Metrics".
MOST = 128  # A width of so many pixels, squared, has to fit into 16 bits of the kernels.


class BoundaryIoU(Counts):
    """IoU of the masks' inner bands: what lies within d pixels of a mask's contour.

    d = max(1, round(ratio · image diagonal)), and a band is the mask without what d erosions by 3×3 pixels leave of it;
    beyond the image there is no mask. Intersections and unions are summed over the data set. (Cheng et al., Boundary
    IoU, CVPR 2021: there for instances, with a ratio of 0.005 for Cityscapes' sizes, and of 0.02 for COCO's.)

    ratio: the bands' width d, as a share of the image's diagonal, from 0 to 1.
    num_classes, ignore_index, device, and ids out of range: see `Counts`.
    """

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        device: torch.device | str | None = None,
        ratio: float = 0.005,
    ) -> None:
        super().__init__(num_classes, ignore_index, device, (3, num_classes))
        self.ratio = real("ratio", ratio)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio is a share of the image's diagonal, from 0 to 1, not {ratio}.")

    def _count(self, guess: Tensor, truth: Tensor) -> Tensor:
        guess, truth = _with_batch(guess), _with_batch(truth)
        distance, classes = max(1, round(self.ratio * math.hypot(*truth.shape[1:]))), self.num_classes
        truth, guess = (_only_band(labels, distance, classes) for labels in (truth, guess))
        pairs = count_pairs(truth, guess, classes + 1, classes + 1)  # The last row and column count what is in no band.
        return torch.stack([pairs.diagonal(), pairs.sum(1), pairs.sum(0)])[:, :-1]

    def iou(self) -> Tensor:
        """The IoU of each class, float64 (C,) on the CPU; NaN for a class that is in neither truth nor prediction."""
        return self._iou(*self._counts)

    def scores(self) -> dict[str, Tensor]:
        """The score by its name, boundary_iou."""
        return {"boundary_iou": self.iou()}

    def mean_iou(self) -> float:
        """Mean of ``iou`` over the classes in truth or prediction; NaN if there are none."""
        return self.iou().nanmean().item()


class _ByWidth(Counts):
    """Counts for several widths in pixels, each of the pixels that no smaller one reaches; and of those that none does.

    Raises TypeError for widths that are no whole numbers, ValueError unless they ascend from at least 1 to at most 128.
    """

    _kinds: int

    def __init__(
        self,
        num_classes: int,
        ignore_index: int = 255,
        device: torch.device | str | None = None,
        widths: Sequence[int] = WIDTHS,
    ) -> None:
        if not isinstance(widths, (tuple, list)):
            raise TypeError(f"widths are a tuple of whole numbers of pixels, such as (1, 3), not {widths!r}.")
        self.widths = tuple(whole("a width", width) for width in widths)
        if not self.widths or any(a >= b for a, b in pairwise((0, *self.widths, MOST + 1))):
            raise ValueError(
                f"widths are ascending whole numbers of pixels from 1 to {MOST}, such as (1, 3), not {widths}."
            )
        super().__init__(num_classes, ignore_index, device, (self._kinds, len(widths) + 1, num_classes))

    def _by_width(self, labels: Tensor, index: Tensor) -> Tensor:
        """How many pixels have which index of a width (`match_within`) and which label: (widths + 1, C)."""
        return count_pairs(index, labels, len(self.widths) + 1, self.num_classes)


class BoundaryFScore(_ByWidth):
    """Harmonic mean of the boundaries' precision and recall, for each of several widths in pixels.

    A mask's boundary are its pixels with one outside the mask among their four neighbours; what is ignored, or beyond
    the image, is no neighbour. A boundary pixel is matched if the other map's boundary of the same class has a pixel
    within the width (Euclidean distance). Matched pixels and all are summed over the data set.

    widths: whole numbers of pixels, ascending, from 1 to 128.
    num_classes, ignore_index, device, and ids out of range: see `Counts`.
    """

    _kinds = 2  # Counts are kept of the true boundary, and of the predicted one.

    def _count(self, guess: Tensor, truth: Tensor) -> Tensor:
        classes, maps = self.num_classes, map(_with_batch, (truth, guess))
        truth, guess = (keep(labels, _boundary(labels, classes), classes) for labels in maps)
        return torch.stack(
            [
                self._by_width(ours, match_within(ours, others, classes, self.widths))
                for ours, others in ((truth, guess), (guess, truth))
            ]
        )

    def precision(self) -> Tensor:
        """Share of the predicted boundary that is matched: float64 (widths, C) on the CPU; NaN where there is none."""
        return self._matched()[1]

    def recall(self) -> Tensor:
        """Share of the true boundary that is matched: float64 (widths, C) on the CPU; NaN where there is none."""
        return self._matched()[0]

    def f_score(self) -> Tensor:
        """The score by width and class, float64 (widths, C) on the CPU; NaN for a class without a boundary in the
        truth."""
        recall, precision = self._matched()
        score = 2 * precision * recall / (precision + recall)
        return score.nan_to_num(0).where(~recall.isnan(), math.nan)

    def scores(self) -> dict[str, Tensor]:
        """The scores by their names, boundary_f_1px and so on."""
        return {f"boundary_f_{width}px": score for width, score in zip(self.widths, self.f_score(), strict=True)}

    def mean_f_score(self) -> list[float]:
        """Mean of ``f_score`` over the classes with a boundary in the truth, by width; NaN if there are none."""
        return self.f_score().nanmean(1).tolist()

    def _matched(self) -> Tensor:
        counts = self._counts.cpu().double()
        return self._scored(counts.cumsum(1)[:, :-1] / counts.sum(1, keepdim=True))


class TrimapIoU(_ByWidth):
    """IoU of the pixels near a true boundary, for each of several widths in pixels.

    Near are valid pixels within the width (Euclidean distance) of a pixel that has one of another class among its four
    neighbours in the truth.

    widths: whole numbers of pixels, ascending, from 1 to 128.
    num_classes, ignore_index, device, and ids out of range: see `Counts`.
    """

    _kinds = 3  # Counts are kept of pixels where both are the same, of the truth and of the prediction.

    def _count(self, guess: Tensor, truth: Tensor) -> Tensor:
        guess, truth, classes = _with_batch(guess), _with_batch(truth), self.num_classes
        no_edge = differ(_boundary(truth, classes), 1)  # Here an edge is label 0, and nothing else is a label.
        near = match_within(torch.zeros_like(truth), no_edge, 1, self.widths)
        same = keep(truth, 1 - differ(truth, guess), classes)
        return torch.stack([self._by_width(ids, near) for ids in (same, truth, guess)])

    def iou(self) -> Tensor:
        """The IoU by width and class, float64 (widths, C) on the CPU; NaN for a class in neither truth nor prediction
        there."""
        return self._iou(*self._counts.cumsum(1)[:, :-1])

    def scores(self) -> dict[str, Tensor]:
        """The scores by their names, trimap_iou_1px and so on."""
        return {f"trimap_iou_{width}px": iou for width, iou in zip(self.widths, self.iou(), strict=True)}

    def mean_iou(self) -> list[float]:
        """Mean of ``iou`` over the classes in truth or prediction near a boundary, by width; NaN if there are none."""
        return self.iou().nanmean(1).tolist()


def match_within(queries: Tensor, sites: Tensor, num_classes: int, radii: Sequence[int]) -> Tensor:
    """Which of the ascending radii reaches from a pixel of ``queries`` to the nearest one of ``sites`` of its label.

    queries, sites: labels (N, H, W), uint8 or int32; num_classes and above is none.
    Returns (N, H, W) uint8: the first radius that is at least the Euclidean distance, as an index, or len(radii).
    """
    if by_kernels(queries):
        return torch.ops.bcmf.match_within(queries, sites, num_classes, radii)
    return _match_within(queries, sites, num_classes, radii)


def _match_within(queries: Tensor, sites: Tensor, num_classes: int, radii: Sequence[int]) -> Tensor:
    """Computes `match_within` in PyTorch: each class is a bit, and a disc is a pile of rows, so that all classes are
    dilated at once."""
    height, width = queries.shape[1:]
    most = radii[-1]
    found = torch.full_like(queries, len(radii), dtype=torch.uint8)
    for first in range(0, num_classes, 31):
        last = min(first + 31, num_classes)
        bits = (1 << (sites.int() - first).clamp(0, 30)).where((sites >= first) & (sites < last), 0)
        bits = F.pad(bits, (most, most, most, most))
        rows = [bits[..., most : most + width]]  # Entry n is dilated along x by n.
        for x in range(1, most + 1):
            rows.append(rows[-1] | bits[..., most - x :][..., :width] | bits[..., most + x :][..., :width])
        asked, ours = (queries.int() - first).clamp(0, 30), (queries >= first) & (queries < last)
        for index, radius in reversed(list(enumerate(radii))):
            reached = torch.zeros_like(asked)
            for y in range(-radius, radius + 1):
                reached |= rows[math.isqrt(radius**2 - y**2)][:, most + y :][:, :height]
            found = found.masked_fill(ours & ((reached >> asked) & 1).bool(), index)
    return found


def _boundary(labels: Tensor, none: int) -> Tensor:
    """A map that is 1 for pixels that have one of another label among their four neighbours, neither ``none``; else
    0."""
    edge, some = torch.zeros_like(labels), differ(labels, none)
    for dim in (1, 2):
        pairs = max(0, labels.shape[dim] - 1)
        here, there = ((0, pairs), (labels.shape[dim] - pairs, pairs))
        found = differ(labels.narrow(dim, *here), labels.narrow(dim, *there))
        found.mul_(some.narrow(dim, *here)).mul_(some.narrow(dim, *there))
        edge.narrow(dim, *here).bitwise_or_(found)
        edge.narrow(dim, *there).bitwise_or_(found)
    return edge


def _only_band(labels: Tensor, distance: int, none: int) -> Tensor:
    """The labels, with ``none`` where all of a square of distance pixels to each side is of the same label."""
    padded = F.pad(labels, (distance,) * 4, value=none)
    least, most = (
        _windows(_windows(padded, reduce, distance, 1), reduce, distance, 2)
        for reduce in (torch.minimum, torch.maximum)
    )
    return keep(labels, differ(least, most), none)


def _windows(x: Tensor, reduce: Callable[[Tensor, Tensor], Tensor], distance: int, dim: int) -> Tensor:
    """``reduce`` over all windows of 2 distance + 1 entries, in log2 steps: a window is two halves that may overlap."""
    size, done = 2 * distance + 1, 1
    while done < size:
        step = min(done, size - done)
        left = x.shape[dim] - step
        x, done = reduce(x.narrow(dim, 0, left), x.narrow(dim, step, left)), done + step
    return x


def _with_batch(labels: Tensor) -> Tensor:
    """The labels as (N, H, W), also where they are (H, W)."""
    if labels.dim() not in (2, 3):
        raise ValueError(f"prediction and target have the shape (N, H, W) or (H, W), not {tuple(labels.shape)}.")
    return labels[(None,) * (3 - labels.dim())]
