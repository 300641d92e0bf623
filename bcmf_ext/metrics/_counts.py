"""What all metrics share: integer counts that add up over images and processes, and the check of class ids."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor


class Counts:
    """Pixel counts over a data set, on the tensors' device. ``update`` of a subclass adds to them.

    num_classes: C. ignore_index: pixels with this label are left out, whatever is predicted there.
    device: where the empty counts lie; they follow the tensors of ``update``. Only ``all_reduce`` on a process that
        saw no image depends on it.

    A label other than ignore_index, or a prediction, outside 0..C-1 raises ValueError: on the CPU in ``update``, before
    anything is counted; on other devices, which ``update`` never waits for, when the counts are next read.
    """

    def __init__(
        self, num_classes: int, ignore_index: int, device: torch.device | str | None, shape: tuple[int, ...]
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self._shape = shape
        # At the end the number of pixels out of range.
        self._bins = torch.zeros(math.prod(shape) + 1, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count the pixels of ``prediction`` and ``target``: class ids of any integer dtype on one device, (N, H, W) or
        (H, W); of any one shape for ConfusionMatrix.

        Raises TypeError for floating-point tensors, ValueError for other shapes and (CPU) ids out of range.
        """
        prediction, target, outside = self._read(prediction, target)
        self._add(self._count(prediction, target), outside)

    def _count(self, guess: Tensor, truth: Tensor) -> Tensor:
        """The counts of maps as `_read` gives them, in the counts' shape."""
        raise NotImplementedError

    def scores(self) -> dict[str, Tensor]:
        """Each score by its name: float64 (C,) on the CPU, NaN for a class that has none; a mean leaves these out."""
        raise NotImplementedError

    def reset(self) -> None:
        """Forget all counts."""
        self._bins = torch.zeros_like(self._bins)  # in place would fail on counts made in inference mode

    def all_reduce(self) -> None:
        """Add up the counts of all processes, on each of them: call it once, after the last ``update``.

        Does nothing outside ``torch.distributed``. Exact if no image is given to two processes.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._bins)

    def _read(self, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prediction and target as uint8 (int32 of more than 255 classes) with C where a pixel does not count, and the
        number of pixels out of range."""
        for name, tensor in (("prediction", prediction), ("target", target)):
            if tensor.is_floating_point() or tensor.is_complex():
                raise TypeError(f"{name} holds integer class ids, not {tensor.dtype}: take the arg-max first.")
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape: resample the "
                "logits to the target's size before the arg-max."
            )
        classes = self.num_classes
        prediction, target = (_widened(ids, self.ignore_index, classes) for ids in (prediction, target))
        valid = target != self.ignore_index
        in_range = (target < classes) & (prediction < classes)
        for ids in (target, prediction):
            if ids.dtype != torch.uint8:
                in_range &= ids >= 0
        outside = (valid & ~in_range).count_nonzero()
        if outside.device.type == "cpu" and outside:
            self._raise_out_of_range(prediction, target)
        dtype = torch.uint8 if classes <= 255 else torch.int32
        counted = valid & in_range
        return keep(prediction.to(dtype), counted, classes), keep(target.to(dtype), counted, classes), outside

    def _add(self, counts: Tensor, outside: Tensor) -> None:
        self._bins = self._bins.to(counts.device) + torch.cat([counts.flatten(), outside.view(1)])

    @property
    def _counts(self) -> Tensor:
        """All counts, in their shape."""
        if wrong := int(self._bins[-1]):  # of tensors on a GPU
            raise ValueError(
                f"{wrong} pixels have a label or a prediction outside the classes 0..{self.num_classes - 1}, and only "
                f"the label {self.ignore_index} is ignored: map the labels to class ids first (update on the CPU names "
                "the ids)."
            )
        return self._bins[:-1].view(self._shape)

    def _raise_out_of_range(self, prediction: Tensor, target: Tensor) -> None:
        valid = target.long() != self.ignore_index
        classes = range(self.num_classes)
        found = []
        for name, ids in (("target", target[valid].long()), ("prediction", prediction[valid].long())):
            if wrong := [i for i in ids.unique().tolist() if i not in classes]:
                found.append(f"{name} holds {', '.join(map(str, wrong[:8]))}{', …' if len(wrong) > 8 else ''}")
        raise ValueError(
            f"{' and '.join(found)}, outside the classes 0..{classes[-1]}, and only the label {self.ignore_index} is "
            "ignored: map the labels to class ids first."
        )


def _widened(ids: Tensor, *values: int) -> Tensor:
    """The ids, wider if their dtype does not hold these values: beside uint8 torch takes -1 for 255."""
    limits = torch.iinfo(ids.dtype)
    return ids if all(limits.min <= value <= limits.max for value in values) else ids.long()


def keep(labels: Tensor, mask: Tensor, none: int) -> Tensor:
    """The labels where the mask is true, elsewhere ``none``: torch.where, which takes five times as long on the CPU."""
    return labels * mask + (~mask).to(labels.dtype) * none


def histogram(ids: Tensor, bins: int) -> Tensor:
    """How often each of 0..bins-1 occurs among the ids, int64 (bins,). Never waits for a GPU."""
    ids = ids.flatten()
    if ids.device.type == "cpu":
        return torch.bincount(ids, minlength=bins)
    counts = torch.zeros(bins, dtype=torch.int64, device=ids.device)
    return counts.scatter_add_(0, ids.long(), torch.ones_like(ids, dtype=torch.int64))


def iou(hits: Tensor, truth: Tensor, guess: Tensor) -> Tensor:
    """TP / (TP + FP + FN) from the pixels of both, of truth and of prediction: float64 on the CPU; NaN of none."""
    hits, truth, guess = (count.cpu() for count in (hits, truth, guess))
    return hits.double() / (truth + guess - hits).double()
