"""A trained network as a function from images to label maps, made quick: see `Predictor`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from .checkpoint import load_checkpoint
from .config import NETWORKS
from .data.transforms import of_bytes
from .engine import choose_device, choose_dtype
from .metrics import upsample_argmax


class Predictor:
    """Predicts with a checkpoint of the trainer (`best.pt` or `last.pt`).

    >>> predictor = Predictor("runs/demo-bcmfnet/best.pt")
    >>> label = predictor(image)        # (H, W, 3) uint8, RGB -> (H, W) uint8 class indices
    >>> colours = predictor.palette[label]

    The network is the trained one without what training needs: batch norms are folded into the convolutions before
    them, the auxiliary head is gone, weights lie in channels_last and, where the hardware computes in it, in half
    precision (`amp`). On a GPU a size of images that comes a second time is captured as a CUDA graph, and replayed from
    then on. Classes are found by one pass over the low-resolution logits.

    Args:
        checkpoint: path of the file, or of a run's folder, for its `best.pt`.
        device: name of a device; the first GPU, or the CPU, when None.
        amp: "auto", "bf16", "fp16" or "off" (fp32); as in training when None.

    Attributes:
        classes: class names by index. palette: (C, 3) uint8, their colours. config: the run's configuration, a dict.
        network: an `InferenceNetwork`. device, align_corners: where it runs, and how its logits are resampled.

    Raises `UserError` if the file is no such checkpoint, or the device is not there.
    """

    def __init__(self, checkpoint: str | Path, device: str | None = None, amp: str | None = None) -> None:
        saved = read_checkpoint(checkpoint)
        self.config, self.classes = saved["config"], tuple(saved["classes"])
        self.palette: np.ndarray = saved["palette"].numpy()
        self.align_corners: bool = saved["align_corners"]
        self.device = choose_device(device)
        dtype, _ = choose_dtype(amp or self.config["amp"], self.device)
        model = NETWORKS[self.config["model"]](len(self.classes))
        model.load_state_dict(saved["model"])
        network = InferenceNetwork(model, saved["mean"], saved["std"], dtype or torch.float32)
        self.network = network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._graphs = Graphs(self.network) if self.device.type == "cuda" else None

    @torch.inference_mode()
    def logits(self, images: Tensor) -> Tensor:
        """The network's logits (N, C, h, w) for uint8 images (N, 3, H, W), RGB, on any device."""
        images = images.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last)
        return self.network(images) if self._graphs is None else self._graphs(images)

    @torch.inference_mode()
    def labels(self, images: Tensor) -> Tensor:
        """The class of each pixel, (N, H, W) uint8 on the predictor's device, of such images."""
        return upsample_argmax(self.logits(images), images.shape[2:], self.align_corners)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """The class of each pixel, (H, W) uint8, of an RGB image, (H, W, 3) uint8."""
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(f"Predictor takes (H, W, 3) uint8 images, not {image.shape} {image.dtype}.")
        return self.labels(torch.tensor(image).permute(2, 0, 1)[None])[0].cpu().numpy()


def read_checkpoint(path: str | Path) -> dict:
    """The content of a `best.pt` or `last.pt`, or of the `best.pt` of a run's folder."""
    path = Path(path)
    return load_checkpoint(path / "best.pt" if path.is_dir() else path)


class InferenceNetwork(nn.Module):
    """From uint8 images (N, 3, H, W) to logits (N, C, h, w): a trained network behind the normalisation of its images.

    Takes the network over: in evaluation mode, without auxiliary head, batch norms folded. dtype: of its arithmetic,
    fp32 or a half precision. The norms that remain stay in fp32: they are an affine map each, of maps in any dtype.
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self, network: nn.Module, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        network.eval().requires_grad_(False)
        setattr(network, "seghead_extra", None)  # noqa: B010
        fold_batch_norms(network)
        self.network, self.dtype = network.to(dtype), dtype
        self.register_buffer("shift", of_bytes(mean))
        self.register_buffer("scale", of_bytes(std))
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.float()

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images.float().sub(self.shift).div(self.scale).to(self.dtype))


def fold_batch_norms(network: nn.Module) -> None:
    """Folds each batch norm that directly follows a convolution into it, in place; exact but for roundings.

    Which norm follows which convolution a `Sequential` says by its order, and a block by its `norm_after`. The network
    is in evaluation mode.
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


class Graphs:
    """A network on a GPU, replayed as CUDA graphs: one for each size of images that comes more than once."""

    MOST = 8  # sizes, the last ones: each keeps its memory

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._captured: OrderedDict[torch.Size, tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None] = OrderedDict()

    def __call__(self, images: Tensor) -> Tensor:
        size = images.shape
        if size not in self._captured:  # the first time is the warm-up
            self._captured[size] = None
            while len(self._captured) > self.MOST:
                self._captured.popitem(last=False)
            return self.network(images)
        self._captured.move_to_end(size)
        captured = self._captured[size] = self._captured[size] or self._capture(images)
        graph, given, logits = captured
        given.copy_(images)
        graph.replay()
        return logits.clone()  # the next replay writes there

    def _capture(self, images: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given, graph = images.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.device(images.device), torch.cuda.graph(graph):
            logits = self.network(given)
        return graph, given, logits
