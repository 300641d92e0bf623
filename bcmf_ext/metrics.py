"""Metrics over a data set, computed where the tensors are (spec section 10)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from . import dispatch, ops, reference

_LABEL_DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)  # that the kernels read


def upsample_argmax(logits: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """The class of each pixel: arg-max of logits (N, C, h, w), resampled bilinearly to ``size`` (H, W) in fp32 (fp64).

    Returns (N, H, W), uint8, or int32 for C > 256: the lowest class where several have the largest logit. By our
    kernels in one pass, without a tensor of resampled logits; by PyTorch where there are none.

    Raises TypeError for logits that are not floating point, ValueError for another shape.
    """
    _check_logits(logits)
    impl = _impl(logits)
    if impl != "torch":
        return ops.UPSAMPLE_ARGMAX[impl](logits.detach(), *size, align_corners)
    return reference.resample(logits, size, align_corners).argmax(1).to(ops.argmax_dtype(logits))


def _check_logits(logits: Tensor) -> None:
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"logits are floating point (fp16, bf16, fp32, fp64), not {logits.dtype}.")
    if logits.dim() != 4 or logits.shape[1] < 1:
        raise ValueError(f"logits have the shape (N, C, h, w), not {tuple(logits.shape)}.")


def _impl(logits: Tensor) -> str:
    return dispatch.choose("upsample_argmax", "auto", logits.device)


class ConfusionMatrix:
    """Pixel counts by true and predicted class, and the scores that follow from them.

    The mean IoU equals that of Cityscapes' official evaluator: one matrix over the whole data set, at the labels'
    resolution, averaged over the classes that occur in truth or prediction.

    num_classes: C. ignore_index: pixels with this label are left out, whatever is predicted there.
    device: where the empty counts lie; they follow the tensors of ``update``. Only ``all_reduce`` on a process that
        saw no image depends on it.

    A label other than ignore_index, or a prediction, outside 0..C-1 raises ValueError: on the CPU in ``update``, before
    anything is counted; on other devices, which ``update`` never waits for, when the counts are next read.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str | None = None) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        # C² cells, row by row; then the pixels out of range and the ignored ones, so that every pixel has a bin.
        self._bins = torch.zeros(num_classes**2 + 2, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Count the pixels of ``prediction`` and ``target``: class ids of any integer dtype, any one shape, one device.

        Raises TypeError for floating-point tensors, ValueError for different shapes and (CPU) ids out of range.
        """
        for name, tensor in (("prediction", prediction), ("target", target)):
            if tensor.is_floating_point() or tensor.is_complex():
                raise TypeError(f"{name} holds integer class ids, not {tensor.dtype}: take the arg-max first.")
        if prediction.shape != target.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape: resample the "
                "logits to the target's size before the arg-max."
            )
        classes = self.num_classes
        truth, guess = target.reshape(-1).long(), prediction.reshape(-1).long()
        valid = truth != self.ignore_index
        in_range = (truth >= 0) & (truth < classes) & (guess >= 0) & (guess < classes)
        bins = torch.where(in_range, truth * classes + guess, classes**2).where(valid, classes**2 + 1)

        counts = torch.zeros(classes**2 + 2, dtype=torch.int64, device=bins.device)
        counts.scatter_add_(0, bins, torch.ones_like(bins))  # not bincount, which waits for a GPU
        self._add(counts, prediction, target)

    def update_from_logits(self, logits: Tensor, target: Tensor, align_corners: bool = False) -> Tensor:
        """Count the arg-max of logits (N, C, h, w), resampled to the size of ``target`` (N, H, W), and return it.

        As ``update(upsample_argmax(logits, target.shape[1:]), target)``, but on the CPU in one pass over the pixels.

        Raises TypeError and ValueError as these do, and ValueError where C is not the matrix' number of classes.
        """
        _check_logits(logits)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"logits have {logits.shape[1]} classes and the matrix has {self.num_classes}.")
        if target.dim() != 3 or target.shape[0] != logits.shape[0]:
            expected = f"(N, H, W) with the logits' N = {logits.shape[0]}"
            raise ValueError(f"target has the shape {expected}, not {tuple(target.shape)}.")
        if not (_impl(logits) == "cpu" and target.device.type == "cpu" and target.dtype in _LABEL_DTYPES):
            prediction = upsample_argmax(logits, target.shape[1:], align_corners)
            self.update(prediction, target)
            return prediction
        prediction, counts = torch.ops.bcmf.upsample_confusion(
            logits.detach(), target, self.ignore_index, align_corners
        )
        self._add(counts, prediction, target)
        return prediction

    def _add(self, counts: Tensor, prediction: Tensor, target: Tensor) -> None:
        if counts.device.type == "cpu" and counts[-2]:
            self._raise_out_of_range(target, prediction)
        self._bins = self._bins.to(counts.device) + counts

    def _raise_out_of_range(self, target: Tensor, prediction: Tensor) -> None:
        valid = target.long() != self.ignore_index
        truth, guess = target[valid].long(), prediction[valid].long()
        classes = range(self.num_classes)
        found = []
        for name, ids in (("target", truth), ("prediction", guess)):
            if wrong := [i for i in ids.unique().tolist() if i not in classes]:
                found.append(f"{name} holds {', '.join(map(str, wrong[:8]))}{', …' if len(wrong) > 8 else ''}")
        raise ValueError(
            f"{' and '.join(found)}, outside the classes 0..{classes[-1]}, and only the label {self.ignore_index} is "
            "ignored: map the labels to class ids first."
        )

    @property
    def matrix(self) -> Tensor:
        """Pixel counts, int64 (C, C): rows are the truth, columns the prediction."""
        if wrong := int(self._bins[-2]):  # of tensors on a GPU
            raise ValueError(
                f"{wrong} pixels have a label or a prediction outside the classes 0..{self.num_classes - 1}, and only "
                f"the label {self.ignore_index} is ignored: map the labels to class ids first (update on the CPU names "
                "the ids)."
            )
        return self._bins[:-2].view(self.num_classes, self.num_classes)

    def iou(self) -> Tensor:
        """TP / (TP + FP + FN) of each class, float64 (C,) on the CPU; NaN for a class without any such pixel."""
        matrix = self.matrix.cpu()
        hits = matrix.diagonal()
        return hits.double() / (matrix.sum(0) + matrix.sum(1) - hits).double()

    def mean_iou(self) -> float:
        """Mean of ``iou`` over the classes with TP + FP + FN > 0; NaN if nothing was counted."""
        return self.iou().nanmean().item()

    def pixel_accuracy(self) -> float:
        """Share of the valid pixels whose class is right; NaN if nothing was counted."""
        matrix = self.matrix.cpu()
        return (matrix.trace().double() / matrix.sum().double()).item()

    def reset(self) -> None:
        """Forget all counts."""
        self._bins = torch.zeros_like(self._bins)  # in place would fail on counts made in inference mode

    def all_reduce(self) -> None:
        """Add up the counts of all processes, on each of them: call it once, after the last ``update``.

        Does nothing outside ``torch.distributed``. Exact if no image is given to two processes.
        """
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self._bins)
