"""The confusion matrix, and the arg-max it counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import dispatch, ops, reference
from ..checks import in_torch_func
from ._counts import Counts, Labels, as_labels, count_pairs


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
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits are a tensor, not a {type(logits).__name__}.")
    if logits.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(f"logits are floating point (fp16, bf16, fp32, fp64), not {logits.dtype}.")
    if logits.dim() != 4 or logits.shape[1] < 1:
        raise ValueError(f"logits have the shape (N, C, h, w), not {tuple(logits.shape)}.")


def _impl(logits: Tensor) -> str:
    if not torch.compiler.is_compiling() and in_torch_func():  # torch.func knows PyTorch's own ops alone.
        return "torch"
    return dispatch.choose("upsample_argmax", "auto", logits.device)


class ConfusionMatrix(Counts):
    """Pixel counts by true and predicted class, and the scores that follow from them.

    The mean IoU equals that of Cityscapes' official evaluator: one matrix over the whole data set, at the labels'
    resolution, averaged over the classes that occur in truth or prediction.

    num_classes, ignore_index, device, and ids out of range: see `Counts`.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, device: torch.device | str | None = None) -> None:
        super().__init__(num_classes, ignore_index, device, (num_classes, num_classes))

    def _count(self, guess: Tensor, truth: Tensor) -> Tensor:
        return count_pairs(truth, guess, self.num_classes, self.num_classes)

    def update_from_logits(self, logits: Tensor, target: Labels, align_corners: bool = False) -> Tensor:
        """Count the arg-max of logits (N, C, h, w), resampled to the size of ``target`` (N, H, W), and return it.

        As ``update(upsample_argmax(logits, target.shape[1:]), target)``, but on the CPU in one pass over the pixels.

        Raises TypeError and ValueError as these do, and ValueError where C is not the matrix' number of classes.
        """
        _check_logits(logits)
        target = as_labels("target", target)
        if logits.shape[1] != self.num_classes:
            raise ValueError(f"logits have {logits.shape[1]} classes and the matrix has {self.num_classes}.")
        if target.dim() != 3 or target.shape[0] != logits.shape[0]:
            expected = f"(N, H, W) with the logits' N = {logits.shape[0]}"
            raise ValueError(f"target has the shape {expected}, not {tuple(target.shape)}.")
        if not (_impl(logits) == "cpu" and target.device.type == "cpu"):
            prediction = upsample_argmax(logits, target.shape[1:], align_corners)
            self.update(prediction, target)
            return prediction
        prediction, counts = torch.ops.bcmf.upsample_confusion(
            logits.detach(), target, self.ignore_index, align_corners
        )
        if counts[-2]:
            self._raise_out_of_range(prediction, target)
        self._add(counts[:-2], counts[-2])
        return prediction

    @property
    def matrix(self) -> Tensor:
        """A copy of the pixel counts, int64 (C, C): rows are the truth, columns the prediction."""
        return self._counts.clone()

    def iou(self) -> Tensor:
        """TP / (TP + FP + FN) of each class, float64 (C,) on the CPU; NaN for a class without any such pixel."""
        matrix = self.matrix
        return self._iou(matrix.diagonal(), matrix.sum(1), matrix.sum(0))

    def scores(self) -> dict[str, Tensor]:
        """iou."""
        return {"iou": self.iou()}

    def mean_iou(self) -> float:
        """Mean of ``iou`` over the classes with TP + FP + FN > 0; NaN if nothing was counted."""
        return self.iou().nanmean().item()

    def pixel_accuracy(self) -> float:
        """Share of the valid pixels whose class is right; NaN if nothing was counted."""
        matrix = self.matrix.cpu()
        return (matrix.trace().double() / matrix.sum().double()).item()
