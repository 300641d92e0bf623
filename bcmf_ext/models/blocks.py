"""What networks are made of, under the names of the public checkpoints, and the check of what they are given."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def check_images(images: Tensor) -> None:
    """Raises ValueError for images of another shape than (N, 3, H, W), TypeError for images of integers."""
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"The network takes images of the shape (N, 3, H, W), not {tuple(images.shape)}: "
            "colour channels come second, and a single image needs a batch dimension, image[None]."
        )
    if not images.is_floating_point():
        raise TypeError(
            f"The network takes normalised floating-point images, not {images.dtype}: "
            "divide by 255, subtract the mean and divide by the standard deviation first."
        )


def conv_norm(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Sequential:
    """k×k convolution without bias, output size ceil(size / stride), and batch norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False),
        nn.BatchNorm2d(out_channels),
    )


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The residual path of a block: the identity where shapes allow it, else a 1×1 convolution with batch norm."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    return conv_norm(in_channels, out_channels, 1, stride)


class BasicBlock(nn.Module):
    """Residual block of two 3×3 convolutions; ``relu=False`` returns the sum before its ReLU."""

    norm_after = {"conv1": "bn1", "conv2": "bn2"}  # noqa: RUF012 - see `Network`

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, *, relu: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_channels, out_channels, 3, stride)
        self.conv2, self.bn2 = conv_norm(out_channels, out_channels, 3)
        self.downsample = projection(in_channels, out_channels, stride)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) → (N, out_channels, h / stride, w / stride), rounded up."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y)) + self.downsample(x)
        return F.relu(y, inplace=True) if self.relu else y


class Bottleneck(nn.Module):
    """Residual block of 1×1, 3×3 and 1×1 convolutions; returns the sum, twice ``channels`` wide, before its ReLU."""

    norm_after = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}  # noqa: RUF012

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_norm(in_channels, channels, 1)
        self.conv2, self.bn2 = conv_norm(channels, channels, 3, stride)
        self.conv3, self.bn3 = conv_norm(channels, 2 * channels, 1)
        self.downsample = projection(in_channels, 2 * channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) → (N, 2 · channels, h / stride, w / stride), rounded up."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return self.bn3(self.conv3(y)) + self.downsample(x)


class SegmentationHead(nn.Module):
    """Logits from features: BN, ReLU, 3×3 convolution, BN, ReLU, 1×1 convolution with bias; keeps the size."""

    norm_after = {"conv1": "bn2"}  # noqa: RUF012

    def __init__(self, in_channels: int, mid_channels: int, num_classes: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, mid_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(mid_channels)
        self.conv2 = nn.Conv2d(mid_channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) → (N, num_classes, h, w)."""
        x = self.conv1(F.relu(self.bn1(x), inplace=True))
        return self.conv2(F.relu(self.bn2(x), inplace=True))
