"""ResNet-18 with the refinement modules of Wang et al. (*Semantic and Contextual Refinements*, arXiv 2412.08671).

See docs/definitions.md, "Networks and their training".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import CRM, SRM
from .blocks import BasicBlock, SegmentationHead, check_images, conv_norm

WIDTH = 128  # channels of the maps that are refined


class SCRResNet18(nn.Module):
    """A ResNet-18, a CRM of its four stages at 1/32, and three SRMs that bring its map up to 1/4, each followed by a
    3×3 convolution.

    Names of the trunk are torchvision's, whose ImageNet weights load by name. ``forward(images)`` takes normalised
    floating-point images (N, 3, H, W) of any size. It returns logits (N, num_classes, ⌈H/4⌉, ⌈W/4⌉); in training mode,
    with the auxiliary head, a pair of them: (main, auxiliary), of which the second lie at 1/16.

    Raises TypeError for images of integers, and ValueError for images of another shape.
    """

    norm_after = {"conv1": "bn1"}  # noqa: RUF012 - see `Network`
    untrained = (
        "others report a mIoU of 73 on Cityscapes for a ResNet-18 so (SFNet), and of 79 from ImageNet weights,\n"
        "as torchvision's resnet18-f37072fd.pth"
    )

    def __init__(self, num_classes: int = 19, *, aux_head: bool = True, impl: str = "auto") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = stage(64, 64)
        self.layer2 = stage(64, 128, stride=2)
        self.layer3 = stage(128, 256, stride=2)
        self.layer4 = stage(256, 512, stride=2)
        self.crm = CRM((64, 128, 256, 512), WIDTH)
        self.srm3, self.smooth3 = SRM(256, WIDTH, impl=impl), smooth()
        self.srm2, self.smooth2 = SRM(128, WIDTH, impl=impl), smooth()
        self.srm1, self.smooth1 = SRM(64, WIDTH, impl=impl), smooth()
        self.seghead_extra = SegmentationHead(256, 64, num_classes) if aux_head else None
        self.final_layer = SegmentationHead(WIDTH, 64, num_classes)

    @property
    def auxiliary_head(self) -> nn.Module | None:
        """See `Network`."""
        return self.seghead_extra

    def drop_auxiliary_head(self) -> None:
        """See `Network`."""
        self.seghead_extra = None

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or in training (main, auxiliary) logits, as the class describes."""
        check_images(images)
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        x1 = self.layer1(F.max_pool2d(x, 3, stride=2, padding=1))  # at 1/4
        x2 = self.layer2(x1)
        x3 = self.layer3(x2)
        x4 = self.layer4(x3)  # at 1/32

        refined = self.crm(x1, x2, x3, x4)
        refined = self.smooth3(self.srm3(x3, refined))
        refined = self.smooth2(self.srm2(x2, refined))
        refined = self.smooth1(self.srm1(x1, refined))
        logits = self.final_layer(refined)
        if self.training and self.seghead_extra is not None:
            return logits, self.seghead_extra(x3)
        return logits


def stage(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    """Two basic blocks."""
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels))


def smooth() -> nn.Sequential:
    """3×3 convolution, batch norm, ReLU."""
    return nn.Sequential(*conv_norm(WIDTH, WIDTH, 3), nn.ReLU(inplace=True))


def scr_resnet18(num_classes: int = 19, *, aux_head: bool = True, impl: str = "auto") -> SCRResNet18:
    """ResNet-18 with a CRM and three SRMs. impl: the implementation of the SRMs.

    11,970,206 parameters without the auxiliary head (19 classes), 116.59 GMACs at 1×3×1024×2048.
    """
    return SCRResNet18(num_classes, aux_head=aux_head, impl=impl)
