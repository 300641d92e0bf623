"""Gives the examples drawn street scenes to train on, and checks that the loss fell."""

import math

import numpy as np
import torch
from torch import Tensor

from bcmf_ext.data import normalise, open_dataset

STEPS, BATCH = 20, 4
DEMO = open_dataset("demo", None, "train")
NUM_CLASSES = len(DEMO.classes)


def pictures() -> list[tuple[np.ndarray, np.ndarray]]:
    """(image, label) pairs, uint8: RGB (128, 256, 3), and classes (128, 256), 255 where a pixel is ignored."""
    return [DEMO.pair(i) for i in range(STEPS * BATCH)]


def tensors() -> list[tuple[Tensor, Tensor]]:
    """The same as tensors: (3, 128, 256), normalised, and (128, 256), uint8 still."""
    return [
        (normalise(torch.from_numpy(image).permute(2, 0, 1)), torch.from_numpy(label)) for image, label in pictures()
    ]


def report(losses: list[float]) -> None:
    """Prints the first and the last loss, and fails if any is not finite or they did not fall."""
    print(f"loss {losses[0]:.3f} at step 1, {losses[-1]:.3f} at step {len(losses)}")
    assert len(losses) == STEPS, losses
    assert all(map(math.isfinite, losses)), losses
    assert sum(losses[-5:]) < sum(losses[:5]), losses
