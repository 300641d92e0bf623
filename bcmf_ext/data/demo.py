"""Street scenes drawn by code (`street.py`): the data set that is always there."""

from __future__ import annotations

import numpy as np

from .dataset import Recipe, SegmentationDataset
from .street import CLASSES, HEIGHT, WIDTH, draw_scene

SCENES = {"train": 400, "val": 60}

PALETTE = np.array(
    [
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (107, 142, 35),
        (70, 130, 180),
        (0, 0, 142),
        (220, 20, 60),
        (153, 153, 153),
        (220, 220, 0),
    ],
    np.uint8,
)


class Demo(SegmentationDataset):
    """Street scenes of 9 classes. A scene is drawn when first asked for and then kept. There is no test split."""

    name = "demo"
    # The crop is the images' own size; epochs and rate are what converges in two minutes on two cores.
    recipe = Recipe(crop_size=(HEIGHT, WIDTH), scale_range=(0.75, 1.5), batch_size=8, epochs=8, lr=0.05)
    splits = tuple(SCENES)
    classes = CLASSES
    palette = PALETTE
    ids = np.arange(len(CLASSES), dtype=np.uint8)

    def __init__(self, split: str) -> None:
        self._check_split(split)
        self.split = split
        self.protocol = (
            f"demo {split}: {len(self)} drawn street scenes of {WIDTH}×{HEIGHT} pixels, {len(CLASSES)} classes, "
            "litter bins and the own car's bonnet ignored"
        )
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def __len__(self) -> int:
        return SCENES[self.split]

    def stem(self, index: int) -> str:
        """Such as demo_val_0003."""
        return f"demo_{self.split}_{index:04}"

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, RGB, drawn."""
        return self._scene(index)[0].copy()

    def label(self, index: int) -> np.ndarray:
        """(H, W) uint8, the classes of what was drawn."""
        return self._scene(index)[1].copy()

    def _scene(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        if index not in self._drawn:
            self._drawn[index] = draw_scene(f"{self.split} {range(len(self))[index]}")
        return self._drawn[index]
