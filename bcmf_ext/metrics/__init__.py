"""Metrics over a data set, computed where the tensors are. docs/definitions.md, "Metrics", defines them.

Each has ``update(prediction, target)``, ``all_reduce()`` and ``reset()``; what it scores has methods of its own.
"""

from ._counts import Counts
from .boundary import BoundaryFScore, BoundaryIoU, TrimapIoU
from .confusion_matrix import ConfusionMatrix, upsample_argmax

__all__ = ["BoundaryFScore", "BoundaryIoU", "ConfusionMatrix", "Counts", "TrimapIoU", "upsample_argmax"]
