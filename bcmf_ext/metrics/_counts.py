"""All metrics are built on this: integer counts that add up over images and processes, and the check of class ids."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks, dispatch, ops
from ..options import whole, whole_label

if TYPE_CHECKING:  # Metrics take pictures, and do not need Pillow.
    from PIL import Image

Labels: TypeAlias = "Tensor | np.ndarray | Image.Image"
"""The inputs of metrics: class ids as a tensor, a NumPy array or a PIL picture."""


class Counts:
    """Pixel counts over a data set, on the tensors' device. ``update`` of a subclass adds to them.

    num_classes: C. ignore_index: pixels with this label are left out, whatever is predicted there; if it is one of
        the classes 0..C-1, that class has no score, and no mean counts it.
    device: where the empty counts lie; they follow the tensors of ``update``. Only ``all_reduce`` on a process that
        saw no image depends on it.

    A label other than ignore_index, or a prediction, outside 0..C-1 raises ValueError: on the CPU in ``update``, before
    anything is counted; on other devices, which ``update`` never waits for, when the counts are next read.

    Raises ValueError for numbers of classes below 1, and TypeError for an ignore_index that is no integer.
    """

    def __init__(
        self, num_classes: int, ignore_index: int, device: torch.device | str | None, shape: tuple[int, ...]
    ) -> None:
        self.num_classes = whole("num_classes", num_classes)
        self.ignore_index = whole_label(ignore_index)
        if self.num_classes < 1:
            raise ValueError(f"num_classes is a number of classes, at least 1, not {num_classes}.")
        self._shape = shape
        # The last bin is the number of pixels out of range.
        self._bins = torch.zeros(math.prod(shape) + 1, dtype=torch.int64, device=device)

    def update(self, prediction: Labels, target: Labels) -> None:
        """Count the pixels of ``prediction`` and ``target``: class ids, bool or of any integer dtype, (N, H, W), (N, 1,
        H, W) or (H, W), of any one shape for ConfusionMatrix; tensors on one device, NumPy arrays, or PIL pictures.

        Raises TypeError for what holds no integers, ValueError for other shapes, tensors on two devices and (CPU) ids
        out of range.
        """
        prediction, target, outside = self._read(prediction, target)
        self._add(self._count(prediction, target), outside)

    def _count(self, guess: Tensor, truth: Tensor) -> Tensor:
        """The counts of maps as `_read` gives them, in the counts' shape."""
        raise NotImplementedError

    def scores(self) -> dict[str, Tensor]:
        """Each score by its name: float64 (C,) on the CPU, NaN for a class that has none; a mean leaves these out."""
        raise NotImplementedError

    def compute(self) -> dict[str, Tensor]:
        """Returns ``scores()``, under the name that torchmetrics has for it."""
        return self.scores()

    def reset(self) -> None:
        """Forget all counts."""
        self._bins = torch.zeros_like(self._bins)  # In place this would fail on counts made in inference mode.

    def all_reduce(self) -> None:
        """Add up the counts of all processes, on each of them: call it once, after the last ``update``.

        Does nothing outside ``torch.distributed``. Exact if no image is given to two processes.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._bins)

    def _read(self, prediction: Labels, target: Labels) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction and target as uint8 (int32 for more than 255 classes), with C where a pixel does not count, and
        the number of pixels out of range."""
        prediction, target = as_labels("prediction", prediction), as_labels("target", target)
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape: resample the "
                "logits to the target's size before the arg-max."
            )
        if prediction.device != target.device:
            raise ValueError(f"prediction is on {prediction.device} and target on {target.device}: move one of them.")
        guess, truth, outside = read_labels(prediction, target, self.num_classes, self.ignore_index)
        if outside.device.type == "cpu" and outside:
            self._raise_out_of_range(prediction, target)
        return guess, truth, outside

    def _add(self, counts: Tensor, outside: Tensor) -> None:
        # This copies at most once, and without waiting for a GPU.
        bins = self._bins.to(counts.device, non_blocking=True)
        self._bins = bins + torch.cat([counts.flatten(), outside.view(1)])

    @property
    def _counts(self) -> Tensor:
        """All counts, in their shape."""
        if wrong := int(self._bins[-1]):  # Tensors on a GPU are only now looked at.
            raise ValueError(
                f"{wrong} pixels have a label or a prediction outside the classes 0..{self.num_classes - 1}, and only "
                f"the label {self.ignore_index} is ignored: map the labels to class ids first (update on the CPU names "
                "the ids)."
            )
        return self._bins[:-1].view(self._shape)

    def _iou(self, hits: Tensor, truth: Tensor, guess: Tensor) -> Tensor:
        """TP / (TP + FP + FN) of each class, float64 on the CPU, from how many pixels have it in both, in the truth and
        in the prediction."""
        hits, truth, guess = (count.cpu() for count in (hits, truth, guess))
        return self._scored(hits.double() / (truth + guess - hits).double())

    def _scored(self, score: Tensor) -> Tensor:
        """The score, with NaN (as 0 / 0 is) also for a class that is ignored: there would be false positives alone."""
        ignored = torch.arange(self.num_classes) == self.ignore_index
        return score.masked_fill(ignored, math.nan)

    def _raise_out_of_range(self, prediction: Tensor, target: Tensor) -> None:
        valid = target.long() != self.ignore_index
        classes = range(self.num_classes)
        found = []
        for name, ids in (("target", target[valid].long()), ("prediction", prediction[valid].long())):
            if wrong := [i for i in ids.unique().tolist() if i not in classes]:
                found.append(f"{name} holds {', '.join(map(str, wrong[:8]))}{', …' if len(wrong) > 8 else ''}")
        if not found:  # Somebody else writes to them.
            found = ["target or prediction held ids that have changed since"]
        raise ValueError(
            f"{' and '.join(found)}, outside the classes 0..{classes[-1]}, and only the label {self.ignore_index} is "
            "ignored: map the labels to class ids first."
        )


def as_labels(name: str, ids: Labels) -> Tensor:
    """Class ids as a tensor that the kernels read; TypeError for what holds no integers."""
    if _is_picture(ids) and len(ids.getbands()) > 1:
        raise TypeError(f"{name} is a picture of one channel with the class ids, not of mode {ids.mode}.")
    if not isinstance(ids, Tensor):
        if not isinstance(ids, np.ndarray) and not _is_picture(ids):
            raise TypeError(
                f"{name} is a tensor, a NumPy array or a PIL picture of class ids, not a {type(ids).__name__}."
            )
        array = np.ascontiguousarray(ids)  # torch knows no negative strides, and only the machine's order of bytes.
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        ids = torch.tensor(array) if array.dtype.kind in "biuf" else array.dtype  # type: ignore[assignment]
    if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.is_complex():
        dtype = ids.dtype if isinstance(ids, Tensor) else ids
        raise TypeError(f"{name} holds integer class ids, not {dtype}: take the arg-max first.")
    return checks.read_labels(ids)


def _is_picture(ids: Any) -> TypeGuard[Image.Image]:
    """Whether ids are a PIL picture: nothing is one where Pillow has not been imported."""
    pillow = sys.modules.get("PIL.Image")
    return pillow is not None and isinstance(ids, pillow.Image)


def by_kernels(labels: Tensor) -> bool:
    """Whether the CPU's kernels count these labels; PyTorch does otherwise."""
    return labels.device.type == "cpu" and dispatch.why_not("cpu", "cpu") is None


def read_labels(
    prediction: Tensor, target: Tensor, num_classes: int, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Both maps as uint8 (int32 for more than 255 classes), with num_classes where a pixel does not count, because it
    is ignored or out of range; and how many are out of range, () int64. Never waits for a GPU."""
    if by_kernels(target):
        return torch.ops.bcmf.read_labels(prediction, target, num_classes, ignore_index)
    prediction, target = prediction.long(), target.long()
    valid = target != ignore_index
    right = (target >= 0) & (target < num_classes) & (prediction >= 0) & (prediction < num_classes)
    dtype = ops.label_dtype(num_classes)
    guess, truth = (ids.where(valid & right, num_classes).to(dtype) for ids in (prediction, target))
    return guess, truth, (valid & ~right).count_nonzero()


def count_pairs(a: Tensor, b: Tensor, rows: int, columns: int) -> Tensor:
    """How many pixels of two maps, uint8 or int32, have which values, (rows, columns) int64; pixels with others are
    left out. Never waits for a GPU."""
    if by_kernels(a):
        return torch.ops.bcmf.count_pairs(a, b, rows, columns)
    # It is widened before the clamp, since torch takes bounds of the tensor's type alone.
    ids = a.long().clamp(max=rows) * (columns + 1) + b.long().clamp(max=columns)
    counts = torch.zeros((rows + 1) * (columns + 1), dtype=torch.int64, device=a.device)
    counts.scatter_add_(0, ids.flatten(), torch.ones_like(ids).flatten())
    return counts.view(rows + 1, columns + 1)[:-1, :-1]


def differ(a: Tensor, b: Tensor | int) -> Tensor:
    """A map that is 1 where two label maps differ, else 0, in their dtype: on a CPU a comparison to bool takes five
    times as long."""
    return (a ^ b).clamp_(max=1)


def keep(labels: Tensor, mask: Tensor, none: int) -> Tensor:
    """The labels where the mask, 0 or 1 in their dtype, is 1, elsewhere ``none``."""
    return (labels - none).mul_(mask).add_(none)
