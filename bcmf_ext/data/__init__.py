"""Data sets, and the augmentation that feeds training.

A data set that joins is a file of its own with a class, and an entry of `DATASETS`; see `SegmentationDataset` for what
the class says.

>>> train = open_dataset("demo", None, "train")
>>> samples = TrainSamples(train, Augmentation(crop=(128, 256), scale=(0.75, 1.5)), seed=0)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from .camvid import CamVid
from .cityscapes import Cityscapes
from .dataset import IGNORE_INDEX, Recipe, SegmentationDataset, Submission
from .demo import Demo
from .folder import Folder
from .pictures import read_image
from .transforms import MEAN, STD, Augmentation, EpochSampler, EvalSamples, TrainSamples, normalise

__all__ = [
    "DATASETS",
    "IGNORE_INDEX",
    "MEAN",
    "STD",
    "Augmentation",
    "CamVid",
    "Cityscapes",
    "Demo",
    "EpochSampler",
    "EvalSamples",
    "Folder",
    "Recipe",
    "SegmentationDataset",
    "Submission",
    "TrainSamples",
    "normalise",
    "open_dataset",
    "read_image",
]

DATASETS: dict[str, type[SegmentationDataset]] = {
    dataset.name: dataset for dataset in (Demo, Cityscapes, CamVid, Folder)
}
"""The data sets that can be trained on, by the names that checkpoints and the commands know them by."""


def open_dataset(name: str, root: str | Path | None, split: str, **options: Any) -> SegmentationDataset:
    """Finds the files of a split and matches images with labels; `SegmentationDataset.check` decodes them too.

    Args:
        name: one of `DATASETS`.
        root: the data root; None for demo, and for cityscapes to take it from the environment: $CITYSCAPES_DATASET.
        split: "train", "val" or "test" (demo has no test).
        options: those of the data set, such as ``ignore_label`` of `Folder`.

    Raises `UserError` where root, folders, images or labels are missing.
    """
    if name not in DATASETS:
        raise UserError(f"There is no data set {name!r}: choose one of {', '.join(DATASETS)}.")
    return DATASETS[name].from_root(root, split, **options)
