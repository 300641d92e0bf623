"""Cityscapes in its official layout: https://github.com/mcordts/cityscapesScripts.

    ROOT/leftImg8bit/{train,val,test}/<city>/<city>_<seq>_<frame>_leftImg8bit.png
    ROOT/gtFine/{train,val}/<city>/<city>_<seq>_<frame>_gtFine_labelIds.png      (or …_gtFine_labelTrainIds.png)

The label ids of the download are mapped to the 19 train ids while loading: no preprocessing. The test split's public
labels are blank, so it is treated as having none.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ..errors import UserError, counted
from .dataset import IGNORE_INDEX, FileDataset, Recipe, Submission
from .listing import Files, find_files, match_files

# These are the label id, name and colour of each train id, from cityscapesscripts/helpers/labels.py.
_LABELS: tuple[tuple[int, str, tuple[int, int, int]], ...] = (
    (7, "road", (128, 64, 128)),
    (8, "sidewalk", (244, 35, 232)),
    (11, "building", (70, 70, 70)),
    (12, "wall", (102, 102, 156)),
    (13, "fence", (190, 153, 153)),
    (17, "pole", (153, 153, 153)),
    (19, "traffic light", (250, 170, 30)),
    (20, "traffic sign", (220, 220, 0)),
    (21, "vegetation", (107, 142, 35)),
    (22, "terrain", (152, 251, 152)),
    (23, "sky", (70, 130, 180)),
    (24, "person", (220, 20, 60)),
    (25, "rider", (255, 0, 0)),
    (26, "car", (0, 0, 142)),
    (27, "truck", (0, 0, 70)),
    (28, "bus", (0, 60, 100)),
    (31, "train", (0, 80, 100)),
    (32, "motorcycle", (0, 0, 230)),
    (33, "bicycle", (119, 11, 32)),
)
CLASSES = tuple(name for _, name, _ in _LABELS)
PALETTE = np.array([colour for _, _, colour in _LABELS], np.uint8)

TRAIN_ID_TO_LABEL_ID = np.zeros(256, np.uint8)
"""(256,) uint8: `TRAIN_ID_TO_LABEL_ID[prediction]` is what the official evaluator reads; 0 (unlabeled) beyond 18."""
TRAIN_ID_TO_LABEL_ID[: len(_LABELS)] = [label_id for label_id, _, _ in _LABELS]

_LABEL_ID_TO_TRAIN_ID = dict.fromkeys(range(34), IGNORE_INDEX) | {label[0]: i for i, label in enumerate(_LABELS)}


class Cityscapes(FileDataset):
    """19 classes; `stem` is the image's file name, as the official evaluator wants predictions to begin.

    Raises `UserError` if a folder is missing, a split is empty or an image has no label.
    """

    name = "cityscapes"
    recipe = Recipe(crop_size=(1024, 1024), scale_range=(0.5, 2.0), batch_size=8, epochs=484, lr=0.01)
    layout = "leftImg8bit/ and gtFine/"
    root_variable = "CITYSCAPES_DATASET"
    submission = Submission(
        names="<city>_<sequence>_<frame>_leftImg8bit",
        pattern=r"[a-z-]+_\d{6}_\d{6}_leftImg8bit",
        ids=TRAIN_ID_TO_LABEL_ID,
    )
    classes = CLASSES
    palette = PALETTE

    def __init__(self, root: Path, split: str) -> None:
        self._check_split(split)
        self.split = split
        folder = root / "leftImg8bit" / split
        if not os.path.isdir(folder):
            raise UserError(
                f"{folder} does not exist: the data root must hold {self.layout} "
                "(unpack leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip there)."
            )
        images = find_files(folder, ("_leftImg8bit.png",))
        if not images:
            raise UserError(f"{folder} holds no <city>/*_leftImg8bit.png: unpack leftImg8bit_trainvaltest.zip again.")
        if split == "test":
            files = [Files(key, path, None) for key, path in images.items()]
            self._kind, about = "none", "no public labels"
        else:
            files = self._find_labels(images, root / "gtFine" / split)
            about = f"{self._kind} files, 19 train ids, all else ignored"
        train_ids = {i: i for i in range(len(CLASSES))}
        colours = {i: colour for i, (_, _, colour) in enumerate(_LABELS)}
        label_ids = _LABEL_ID_TO_TRAIN_ID if self._kind == "labelIds" else train_ids
        super().__init__(files, label_ids, colours, [root / "leftImg8bit", root / "gtFine"])
        self.ids = TRAIN_ID_TO_LABEL_ID[: len(CLASSES)]  # The official evaluator takes these, whatever was read.
        self.protocol = f"Cityscapes {split}: {counted(len(self), 'image')}, gtFine, {about}"

    def _find_labels(self, images: dict[str, Path], folder: Path) -> list[Files]:
        """labelIds where the split has any, otherwise labelTrainIds: never a mixture."""
        self._kind = "labelIds"
        labels = find_files(folder, (f"_gtFine_{self._kind}.png",))
        if not labels:
            train_ids = find_files(folder, ("_gtFine_labelTrainIds.png",))
            if train_ids:
                self._kind, labels = "labelTrainIds", train_ids
        return match_files(images, labels, folder, f"_gtFine_{self._kind}.png")

    def stem(self, index: int) -> str:
        """The image's name, <city>_<sequence>_<frame>_leftImg8bit, which is unique."""
        return self.files[index].image.stem

    def _likely_cause(self, ids: set[int], wrong: set[int]) -> str:
        if self._kind == "labelTrainIds" and max(wrong) < 34:
            return "these look like Cityscapes label ids, not train ids; the file name should end in _labelIds.png"
        last = "33, the label ids" if self._kind == "labelIds" else "18, the train ids"
        return f"a …_{self._kind}.png holds 0 to {last}, and 255; create it again with cityscapesScripts"
