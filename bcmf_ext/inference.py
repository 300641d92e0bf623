"""A trained network as a function from images to label maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from .checkpoint import load_checkpoint
from .config import NETWORKS
from .engine import Compute, choose_device, choose_dtype


class Predictor:
    """Predicts with a checkpoint of the trainer (`best.pt` or `last.pt`).

    >>> predictor = Predictor("runs/demo-bcmfnet/best.pt")
    >>> label = predictor(image)        # (H, W, 3) uint8, RGB -> (H, W) uint8 class indices
    >>> colours = predictor.palette[label]

    Args:
        checkpoint: path of the file, or of a run's folder, for its `best.pt`.
        device: name of a device; the first GPU, or the CPU, when None.
        amp: "auto", "bf16", "fp16" or "off"; as in training when None.

    Attributes:
        classes: class names by index. palette: (C, 3) uint8, their colours. config: the run's configuration, a dict.
        model: the network, in evaluation mode. compute: where and how it runs.

    Raises `UserError` if the file is no such checkpoint, or the device is not there.
    """

    def __init__(self, checkpoint: str | Path, device: str | None = None, amp: str | None = None) -> None:
        path = Path(checkpoint)
        saved = load_checkpoint(path / "best.pt" if path.is_dir() else path)
        self.config, self.classes = saved["config"], tuple(saved["classes"])
        self.palette: np.ndarray = saved["palette"].numpy()
        place = choose_device(device)
        dtype, _ = choose_dtype(amp or self.config["amp"], place)
        self.compute = Compute(
            place, dtype, self.config["channels_last"], saved["mean"], saved["std"], saved["align_corners"]
        )
        self.model = NETWORKS[self.config["model"]](len(self.classes))
        self.model.load_state_dict(saved["model"])
        self.compute.place(self.model.eval())

    @torch.inference_mode()
    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The class of each pixel, (H, W) uint8, of an RGB image, (H, W, 3) uint8."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"Predictor takes (H, W, 3) uint8 images, not {image.shape} {image.dtype}.")
        images = torch.tensor(image).permute(2, 0, 1)[None]
        return self.compute.predict(self.model, images, image.shape[:2])[0].to("cpu", torch.uint8).numpy()
