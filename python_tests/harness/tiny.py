"""What the tests of the trainer train on: a few small images, and a network that is quick to run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

CLASSES = ("floor", "wall", "red box")
STEPS = 4  # The training split of `write_folder` has so many batches of 2, and one image left over.


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """For the module that imports it: on a busy machine two threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_folder(root: Path, train: int = 2 * STEPS + 1, val: int = 3) -> Path:
    """A dataset of the folder layout: 72×96 images of a floor, a wall and a box; the top row is ignored."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            label = np.zeros((72, 96), np.uint8)
            label[: rng.integers(20, 50)] = 1
            y, x = rng.integers(8, 40), rng.integers(0, 60)
            label[y : y + 24, x : x + 24] = 2
            colours = np.array([(90, 90, 90), (60, 120, 180), (200, 40, 40)], np.int64)
            image = np.clip(colours[label] + rng.integers(-30, 30, (72, 96, 3)), 0, 255).astype(np.uint8)
            label[0] = 255
            Image.fromarray(image).save(root / "images" / split / f"{split}{index}.png")
            Image.fromarray(label).save(root / "labels" / split / f"{split}{index}.png")
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


class TinyNet(nn.Module):
    """A `Network` of two convolutions, whose weights have the names of a DDRNet's heads."""

    def __init__(self, num_classes: int, aux_head: bool = True, impl: str = "auto") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 9, stride=8, padding=4), nn.BatchNorm2d(8), nn.ReLU())
        self.final_layer = nn.Conv2d(8, num_classes, 1)
        self.seghead_extra = nn.Conv2d(8, num_classes, 1) if aux_head else None

    @property
    def auxiliary_head(self) -> nn.Module | None:
        return self.seghead_extra

    def drop_auxiliary_head(self) -> None:
        self.seghead_extra = None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.body(images)
        logits = self.final_layer(F.relu(x))
        return (logits, self.seghead_extra(x)) if self.training and self.seghead_extra is not None else logits
