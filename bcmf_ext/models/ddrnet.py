"""DDRNet-23-slim (Hong et al., *Deep Dual-resolution Networks*, arXiv 2101.06085), the trunk of BCMFNet.

Attribute names, and so the keys of the state dict and their order, are those of the public checkpoints. A feature map
leaves a stage *before* its last ReLU: fusion adds such maps, and whoever reads one next applies the ReLU.
"""

from __future__ import annotations

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import DAPPM, LMFM
from ..nn.upsample import upsample
from .blocks import BasicBlock, Bottleneck, SegmentationHead, check_images, conv_norm


def basic_stage(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Two basic blocks; the result is before its ReLU."""
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels, relu=False)
    )


class DDRNet(nn.Module):
    """DDRNet-23-slim around a context module: one branch stays at 1/8, one goes down to 1/64, and they fuse twice.

    context: maps (N, 512, h, w) to (N, 128, h, w); DAPPM makes DDRNet-23-slim, LMFM makes BCMFNet.

    ``forward(images)`` takes normalised floating-point images (N, 3, H, W) of any size; below 64 pixels the low branch
    is a single cell. It returns logits (N, num_classes, ceil(H/8), ceil(W/8)); in training mode, with the auxiliary
    head, a pair of them: (main, auxiliary). Neither is upsampled.

    Weights start as PyTorch initialises them, not kaiming-normal by fan-out as in the public code: there the context
    module's sum of convolutions, which no norm follows, drowns the high-resolution branch, and the first logits are
    large. On CamVid from scratch that costs a third of the mIoU after six epochs (bench/NOTES.md).

    Raises TypeError for images of integers, ValueError for images of another shape, and in training for a batch of one
    image, whose globally pooled features are a single value per channel, from which batch norm can compute no variance.
    Frozen batch norm (in eval mode) and SyncBatchNorm over several processes train with one image each.
    """

    def __init__(self, context: DAPPM | LMFM, num_classes: int = 19, *, aux_head: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
        )
        self.layer1 = basic_stage(32, 32)
        self.layer2 = basic_stage(32, 64, stride=2)
        # The low-resolution branch, and the links between the branches.
        self.layer3 = basic_stage(64, 128, stride=2)
        self.layer4 = basic_stage(128, 256, stride=2)
        self.compression3 = conv_norm(128, 64, 1)
        self.compression4 = conv_norm(256, 64, 1)
        self.down3 = conv_norm(64, 128, 3, stride=2)
        self.down4 = nn.Sequential(
            *conv_norm(64, 128, 3, stride=2), nn.ReLU(inplace=True), *conv_norm(128, 256, 3, stride=2)
        )
        # The high-resolution branch, at 1/8 throughout.
        self.layer3_ = basic_stage(64, 64)
        self.layer4_ = basic_stage(64, 64)
        self.layer5_ = nn.Sequential(Bottleneck(64, 64))

        self.layer5 = nn.Sequential(Bottleneck(256, 256, stride=2))
        self.spp = context
        self.seghead_extra = SegmentationHead(64, 64, num_classes) if aux_head else None
        self.final_layer = SegmentationHead(128, 64, num_classes)

    @property
    def auxiliary_head(self) -> nn.Module | None:
        """See `Network`."""
        return self.seghead_extra

    def drop_auxiliary_head(self) -> None:
        """See `Network`."""
        self.seghead_extra = None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or in training (main, auxiliary) logits, as the class describes."""
        self._check(images)
        x = F.relu(self.layer2(F.relu(self.layer1(self.conv1(images)))))  # at 1/8
        size = x.shape[-2:]

        low, high = self.layer3(x), self.layer3_(x)  # at 1/16 and 1/8
        low, high = (
            low + self.down3(F.relu(high)),
            high + upsample(self.compression3(F.relu(low)), size),
        )
        first_fusion = high

        low3 = F.relu(low)
        low, high = self.layer4(low3), self.layer4_(F.relu(high))  # at 1/32 and 1/8
        low, high = (
            low + self.down4(F.relu(high)),
            high + upsample(self.compression4(F.relu(low)), size),
        )

        high, low4 = F.relu(high), F.relu(low)
        context = self.spp(self.layer5(low4))  # at 1/64
        logits = self.final_layer(self.fuse(high, low3, low4, context))
        if self.training and self.seghead_extra is not None:
            return logits, self.seghead_extra(first_fusion)
        return logits

    def fuse(self, high: Tensor, low3: Tensor, low4: Tensor, context: Tensor) -> Tensor:
        """(N, 128, ⌈H/8⌉, ⌈W/8⌉) for the head, of the branches' last maps at 1/8, 1/16, 1/32 and, behind the context
        module, 1/64."""
        return upsample(context, high.shape[-2:]) + self.layer5_(high)

    def _check(self, images: Tensor) -> None:
        check_images(images)
        if self.training and images.shape[0] == 1 and not self._batch_norm_copes_with_one_image():
            raise ValueError(
                "Training needs at least two images per device and step, but this batch holds one, which leaves the "
                "batch norm after global pooling a single value per channel: raise the batch size, and drop a short "
                "last batch."
            )

    def _batch_norm_copes_with_one_image(self) -> bool:
        """Whether the batch norm after the global pooling is frozen, or shares its statistics with other processes."""
        norm = self.spp.scale4[1]
        if not norm.training:
            return True
        if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_available() or not dist.is_initialized():
            return False
        return dist.get_world_size(norm.process_group) > 1


def ddrnet_s(num_classes: int = 19, *, aux_head: bool = True, impl: str = "auto") -> DDRNet:
    """DDRNet-23-slim. impl: the implementation of DAPPM.

    5,695,987 parameters without the auxiliary head (19 classes), 36.28 GMACs at 1×3×1024×2048.
    """
    return DDRNet(DAPPM(impl=impl), num_classes, aux_head=aux_head)
