"""Data sets, and the augmentation that feeds training.

>>> train = open_dataset("demo", None, "train")
>>> samples = TrainSamples(train, Augmentation(crop=(128, 256), scale=(0.75, 1.5)), seed=0)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import UserError
from .camvid import CamVid
from .cityscapes import Cityscapes
from .dataset import IGNORE_INDEX, SegmentationDataset
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
    "SegmentationDataset",
    "TrainSamples",
    "normalise",
    "open_dataset",
    "read_image",
]

DATASETS = ("demo", "cityscapes", "camvid", "folder")


def open_dataset(
    name: str,
    root: str | Path | None,
    split: str,
    *,
    reduce_zero_label: bool = False,
    ignore_label: int | None = None,
    binary_masks: bool = False,
    label_suffix: str | None = None,
) -> SegmentationDataset:
    """Finds the files of a split and matches images with labels; `SegmentationDataset.check` decodes them too.

    Args:
        name: one of `DATASETS`.
        root: the data root; None for demo, and for cityscapes to take it from the environment: $CITYSCAPES_DATASET.
        split: "train", "val" or "test" (demo has no test).
        reduce_zero_label, ignore_label, binary_masks, label_suffix: folder only, see `Folder`.

    Raises `UserError` where root, folders, images or labels are missing.
    """
    if name not in DATASETS:
        raise UserError(f"There is no data set {name!r}: choose one of {', '.join(DATASETS)}.")
    options: dict[str, Any] = {
        "reduce_zero_label": reduce_zero_label,
        "ignore_label": ignore_label,
        "binary_masks": binary_masks,
        "label_suffix": label_suffix,
    }
    given = [option for option, value in options.items() if value is not None and value is not False]
    if given and name != "folder":
        flag = f"--{given[0].replace('_', '-')}"
        raise UserError(f"{flag} is for --dataset folder; the ids and names of {name}'s labels are known.")
    if name == "demo":
        if root is not None:
            raise UserError(
                "--dataset demo draws its scenes and reads no --data-root: choose the data set of that folder."
            )
        return Demo(split)
    if root is None and name == "cityscapes":
        root = os.environ.get("CITYSCAPES_DATASET") or None
    if root is None:
        hint = " (or set CITYSCAPES_DATASET)" if name == "cityscapes" else ""
        raise UserError(f"--dataset {name} needs the folder of the data: pass --data-root DIR{hint}.")
    root = Path(root).expanduser()
    if not os.path.isdir(root):
        raise UserError(
            f"The data root {root} {'is not a folder' if os.path.exists(root) else 'does not exist'}: check the path."
        )
    if name == "cityscapes":
        return Cityscapes(root, split)
    if name == "camvid":
        return CamVid(root, split)
    return Folder(root, split, **options)
