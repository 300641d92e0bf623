"""A trained network as a function from images to label maps, made quick: see `Predictor`."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .checkpoint import load_checkpoint, load_weights
from .data.pictures import rgb_of
from .data.transforms import of_bytes
from .engine import choose_device, choose_dtype
from .errors import UserError
from .metrics import upsample_argmax
from .models import NETWORKS


class Predictor:
    """Predicts with a checkpoint of the trainer (`best.pt` or `last.pt`).

    >>> predictor = Predictor("runs/demo-bcmfnet/best.pt")
    >>> label = predictor(image)        # (H, W, 3) uint8, RGB -> (H, W) uint8 class indices
    >>> colours = predictor.palette[label]

    The network is the trained one without what training needs: batch norms are folded into the convolutions before
    them, the auxiliary head is gone, weights lie in channels_last and, where the hardware computes in it, in half
    precision (`amp`). On a GPU a size of images that comes a second time is captured as a CUDA graph, and replayed from
    then on; the last eight sizes are kept, each with its memory. Classes are found by one pass over the low-resolution
    logits. Threads may share a predictor.

    Args:
        checkpoint: path of the file, or of a run's folder, for its `best.pt`.
        device: name of a device; the first GPU, or the CPU, when None.
        amp: "auto", "bf16", "fp16" or "off" (fp32); as in training when None.

    Attributes:
        classes: class names by index. palette: (C, 3) uint8, their colours. config: the run's configuration, a dict.
        network: an `InferenceNetwork`. path: the checkpoint, as given. device, align_corners: where the network runs,
        and how its logits are resampled.

    Raises `UserError` if the file is no such checkpoint, or the device is not there.
    """

    def __init__(self, checkpoint: str | Path, device: str | None = None, amp: str | None = None) -> None:
        saved, self.path = read_checkpoint(checkpoint), checkpoint
        self.config, self.classes = saved["config"], tuple(saved["classes"])
        self.palette: np.ndarray = saved["palette"].numpy()
        self.align_corners: bool = saved["align_corners"]
        self.device = choose_device(device)
        dtype, _ = choose_dtype(amp or self.config["amp"], self.device, saved.get("bf16_ratio"))
        network = InferenceNetwork(load_network(saved, checkpoint), saved["mean"], saved["std"], dtype or torch.float32)
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._graphs = Graphs(self.network) if self.device.type == "cuda" else None

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """The network's logits (N, C, h, w) for uint8 RGB images (N, 3, H, W) on any device. Images that come from the
        CPU may be written over as soon as it returns. Raises TypeError for what is no tensor, ValueError for other
        tensors."""
        if not isinstance(images, Tensor):
            raise TypeError(f"images are a uint8 tensor (N, 3, H, W), not a {type(images).__name__}.")
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"Predictor takes uint8 images (N, 3, H, W), not {tuple(images.shape)} {images.dtype}.")
        # The copy is waited for. One that is not would still read pinned memory while the caller writes the next frame
        # there, also where a CUDA graph is replayed: what the graph reads is copied from this copy, on the same stream.
        images = images.to(self.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, enabled=False):  # The network has its own precision.
            return self.network(images) if self._graphs is None else self._graphs(images)

    @torch.inference_mode()
    def labels(self, images: Tensor) -> Tensor:
        """The class of each pixel, (N, H, W) uint8 on the predictor's device, of images as `logits` takes them."""
        return upsample_argmax(self.logits(images), images.shape[2:], self.align_corners)

    def __call__(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """The class of each pixel, (H, W) uint8, of an RGB image, (H, W, 3) uint8, or a PIL picture, which is turned as
        its EXIF orientation says. Raises TypeError and ValueError for anything else, and `UserError` if the
        network computes NaN or infinite logits for it: its class would be 0 there, as if it knew."""
        if isinstance(image, Image.Image):
            image = rgb_of(image)
        if not isinstance(image, np.ndarray):
            raise TypeError(
                f"Predictor takes (H, W, 3) uint8 images, or PIL pictures, not a {type(image).__name__}: "
                "bcmf_ext.data.read_image reads a file."
            )
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"Predictor takes (H, W, 3) uint8 images, not {image.shape} {image.dtype}.")
        pixels = torch.tensor(np.ascontiguousarray(image))  # torch knows no negative strides, as [..., ::-1] has.
        logits = self.logits(pixels.permute(2, 0, 1)[None])
        label = upsample_argmax(logits, image.shape[:2], self.align_corners)[0].cpu().numpy()
        if not logits.isfinite().all():
            raise UserError(not_finite(self.path, "this image"))
        return label


def not_finite(checkpoint: str | Path, where: str) -> str:
    """The sentence for NaN or infinite logits: the network's weights are finite, so its arithmetic is not."""
    return (
        f"The network of {checkpoint} computes NaN or infinite logits for {where}: try `amp='off'`, or take a "
        "checkpoint from before."
    )


def read_checkpoint(path: str | Path) -> dict:
    """The content of a `best.pt` or `last.pt`, or of the `best.pt` of a run's folder."""
    path = Path(path)
    return load_checkpoint(path / "best.pt" if os.path.isdir(path) else path)


def load_network(saved: dict[str, Any], path: str | Path, **options: Any) -> nn.Module:
    """The network of a checkpoint, made with these options, with its weights. Raises `UserError` if they do not fit."""
    network = NETWORKS[saved["config"]["model"]](len(saved["classes"]), **options)
    load_weights(network, saved, Path(path))
    return network


class InferenceNetwork(nn.Module):
    """From uint8 images (N, 3, H, W) to logits (N, C, h, w): a trained network behind the normalisation of its images.

    network: a `Network`, which is taken over: in evaluation mode, without auxiliary head, batch norms folded. mean and
    std: RGB in 0..1. dtype: that of its arithmetic, fp32 or a half precision. The norms that remain stay in fp32: each
    is an affine map, of maps in any dtype.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, network: Any, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        network.eval().requires_grad_(False)
        network.drop_auxiliary_head()
        fold_batch_norms(network)
        self.network, self.dtype = network.to(dtype), dtype
        self.register_buffer("shift", of_bytes(mean))
        self.register_buffer("scale", of_bytes(std))
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.float()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C, h, w) of uint8 images (N, 3, H, W)."""
        return self.network(images.float().sub(self.shift).div(self.scale).to(self.dtype))


def fold_batch_norms(network: nn.Module) -> None:
    """Folds each batch norm that directly follows a convolution into it, in place; exact but for roundings.

    Which norm follows which convolution the network says, as `Network` describes. It is in evaluation mode.
    """
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            pairs = [(str(i), str(i + 1)) for i, (a, b) in enumerate(pairwise(module)) if _is_pair(a, b)]
        else:
            pairs = [*getattr(module, "norm_after", {}).items()]
        for conv, norm in pairs:
            setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
            setattr(module, norm, nn.Identity())


def _is_pair(first: nn.Module, second: nn.Module) -> bool:
    return isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d)


@dataclass
class Captured:
    """A CUDA graph, where it reads and writes, and the event behind its last use."""

    graph: Any
    images: Tensor
    logits: Tensor
    used: Any


class Graphs:
    """A network on a GPU, replayed as CUDA graphs: one for each size of images that comes more than once."""

    MOST = 8  # The last sizes are kept; each keeps its memory.

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._captured: OrderedDict[torch.Size, Captured | None] = OrderedDict()
        self._lock = threading.Lock()  # A graph has one place for images, and one for logits.

    def __call__(self, images: Tensor) -> Tensor:
        """The network's logits, of images (N, 3, H, W) on the GPU."""
        with self._lock, torch.cuda.device_of(images):
            size = images.shape
            if size not in self._captured:  # The first time is the warm-up.
                self._captured[size] = None
                if len(self._captured) > self.MOST:
                    _, oldest = self._captured.popitem(last=False)
                    if oldest is not None:
                        oldest.used.synchronize()  # Its memory is given back.
                return self.network(images)
            self._captured.move_to_end(size)
            captured = self._captured[size] = self._captured[size] or self._capture(images)
            captured.used.wait()  # It may be in use on another thread's stream.
            captured.images.copy_(images)
            captured.graph.replay()
            logits = captured.logits.clone()  # The next replay writes there.
            captured.used.record()
            return logits

    def _capture(self, images: Tensor) -> Captured:
        graph, used, given = torch.cuda.CUDAGraph(), torch.cuda.Event(), images.clone()
        # Left to itself torch takes a stream of the device on which it first captured something. Other threads go on.
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
            logits = self.network(given)
        used.record()
        return Captured(graph, given, logits, used)
