"""Makes training crops of images and labels: scale, crop, flip and colour jitter on the CPU in uint8, then tensors.

Augmentation is a pure function of (seed, epoch, index): the same crops come out with any number of workers, and after a
resume. Pixels stay uint8 until they are on the device, where `normalise` makes floats of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler

from ..errors import UserError, counted
from .dataset import IGNORE_INDEX, SegmentationDataset

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean colour, RGB in 0..1."""
STD = (0.229, 0.224, 0.225)
"""ImageNet's standard deviation, RGB in 0..1."""

_MEAN_COLOUR = tuple(round(255 * m) for m in MEAN)
_LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Augmentation:
    """Random scale, crop, flip and colours, for image and label alike.

    Attributes:
        crop: (height, width) of what comes out. Where the scaled image is smaller, it lies at a random place on the
            mean colour, with label 255 around it.
        scale: the image is scaled by a factor drawn uniformly from this range.
        flip: mirror left to right, one time in two.
        colour_jitter: brightness, contrast and saturation are multiplied by factors drawn from 1 ± this; 0 for none.
    """

    crop: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    flip: bool = True
    colour_jitter: float = 0.1

    def __call__(self, image: np.ndarray, label: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Makes an image (crop height, crop width, 3) and its label of an image (H, W, 3) and its label (H, W), all
        uint8. Only the pixels of the crop are resized."""
        scale = rng.uniform(*self.scale)
        rows = _draw_span(image.shape[0], self.crop[0], scale, rng)
        columns = _draw_span(image.shape[1], self.crop[1], scale, rng)
        mirrored = self.flip and rng.random() < 0.5
        factors = rng.uniform(1 - self.colour_jitter, 1 + self.colour_jitter, 3)

        picture = _resize(image, rows, columns, Image.Resampling.BILINEAR)
        if self.colour_jitter > 0:
            picture = picture.convert("RGB", _colour_matrix(*factors))
        classes = _resize(label, rows, columns, Image.Resampling.NEAREST)
        height, width = self.crop
        out = []
        for part, fill in ((picture, _MEAN_COLOUR), (classes, IGNORE_INDEX)):
            canvas = Image.new(part.mode, (width, height), fill)
            canvas.paste(part, (columns.place, rows.place))
            out.append(np.array(canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else canvas))
        return out[0], out[1]


class _Span(NamedTuple):
    """One axis of a crop: source pixels `start` to `start + length` (fractional) become `size` pixels at `place`."""

    start: float
    length: float
    size: int
    place: int


def _draw_span(source: int, crop: int, scale: float, rng: np.random.Generator) -> _Span:
    size = min(crop, max(1, round(source * scale)))
    length = min(size / scale, source)
    return _Span(rng.uniform(0, source - length), length, size, int(rng.integers(0, crop - size, endpoint=True)))


def _resize(pixels: np.ndarray, rows: _Span, columns: _Span, resampling: Image.Resampling) -> Image.Image:
    """The spans of `pixels`, resized as if the whole array were resized first and cropped then.

    Pixel centres are at half-integers for every `resampling`, so that an image and its label stay aligned. Bilinear
    resampling to a smaller size averages over all the pixels that an output pixel covers.
    """
    (top, bottom), (left, right) = (_needed(s, n) for s, n in zip((rows, columns), pixels.shape, strict=False))
    x, y = columns.start - left, rows.start - top
    part = Image.fromarray(pixels[top:bottom, left:right])
    return part.resize((columns.size, rows.size), resampling, (x, y, x + columns.length, y + rows.length))


def _needed(span: _Span, source: int) -> tuple[int, int]:
    """First and last + 1 source pixel that the span's output depends on: the filter reaches beyond the span."""
    reach = ceil(max(1.0, span.length / span.size)) + 1
    return max(0, floor(span.start) - reach), min(source, ceil(span.start + span.length) + reach)


def _colour_matrix(brightness: float, contrast: float, saturation: float) -> tuple[float, ...]:
    """The three factors as one affine map for `Image.convert`: contrast turns about mid-grey, saturation about the
    luma."""
    mix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * _LUMA)
    offset = brightness * (1 - contrast) * float(_LUMA @ _MEAN_COLOUR)
    return tuple(np.column_stack([mix, np.full(3, offset)]).ravel().tolist())


class TrainSamples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Augmented crops: `samples[epoch, index]` is an image (3, h, w) and its label (h, w), both uint8.

    Takes the (epoch, index) pairs of `EpochSampler`, so that worker processes can live through all epochs.
    """

    def __init__(self, dataset: SegmentationDataset, augmentation: Augmentation, seed: int) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index = key
        rng = np.random.default_rng((self.seed, epoch, index))
        return _to_tensors(*self.augmentation(*self.dataset.pair(index), rng))


class EvalSamples(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Whole images: `samples[index]` is an image (3, H, W) and its label (H, W), both uint8.

    Raises `UserError` for a split without labels.
    """

    def __init__(self, dataset: SegmentationDataset) -> None:
        if not dataset.has_labels:
            raise UserError(f"{dataset.name} {dataset.split} has no labels to compare with: it can only be predicted.")
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _to_tensors(*self.dataset.pair(index))


def _to_tensors(image: np.ndarray, label: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))), torch.from_numpy(label)


class EpochSampler(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) in an order drawn from (seed, epoch); a short last batch is left out.

    Raises `UserError` where there are fewer images than one batch takes.
    """

    def __init__(self, length: int, batch_size: int, seed: int) -> None:
        if length < batch_size:
            advice = f"pass `batch_size={length}` or less" if length >= 2 else "add more"
            raise UserError(
                f"The training set holds {counted(length, 'image')}, fewer than one batch of {batch_size}: {advice}."
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """The next pass is that of `epoch`, without its first `start` batches: how an interrupted epoch goes on."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch = self.epoch
        order = np.random.default_rng((self.seed, epoch)).permutation(self.length).tolist()
        for batch in range(self.start, len(self)):
            first = batch * self.batch_size
            yield [(epoch, index) for index in order[first : first + self.batch_size]]


def normalise(images: torch.Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> torch.Tensor:
    """The images (N, 3, H, W), uint8, as float32 with mean 0 and deviation 1 per channel, on their device, in their
    layout.

    `mean`, `std`: RGB in 0..1.
    """
    # Without non_blocking the copy of even three numbers makes a GPU finish its work first, at every step.
    shift, scale = (of_bytes(v).to(images.device, non_blocking=True) for v in (mean, std))
    return images.float().sub_(shift).div_(scale)


def of_bytes(values: Sequence[float]) -> torch.Tensor:
    """A mean or deviation as a tensor (3, 1, 1) for images whose values are 0..255."""
    return torch.tensor(values).view(-1, 1, 1).mul(255)
