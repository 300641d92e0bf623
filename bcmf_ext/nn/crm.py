"""CRM, the Contextual Refinement Module (Wang et al., arXiv 2412.08671), as docs/definitions.md, "Context modules", has
it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .upsample import upsample


class CRM(nn.Module):
    """Joins the maps of a backbone's stages at the size of one of them, and weighs channels, then pixels.

    With R_i for resampling to the size of map ``at`` (larger maps: mean pooling of 2×2, 4×4, … pixels; smaller ones:
    bilinear), GAP and GMP for the mean and the maximum over all pixels::

        X = ReLU(BN(Σ_i R_i(1×1 convolution_i(x_i))))
        X = X ⊙ σ(MLP(GAP(X)) + MLP(GMP(X)))                       one MLP, one layer of C / 16 channels, at least 4
        X = X ⊙ σ(7×7 convolution of [mean over channels; maximum over channels])

    The sum equals one 1×1 convolution of all maps' concatenation, which it does without: at 1/4 of an image that has
    960 channels.

    Args:
        in_channels: those of the maps, from the largest map to the smallest.
        out_channels: C.
        at: the index of the map whose size the result has.

    Shapes: (N, C_0, H, W), (N, C_1, ⌈H/2⌉, ⌈W/2⌉), … -> (N, C, size of map ``at``), for any H, W >= 1.
    """

    def __init__(self, in_channels: Sequence[int], out_channels: int, *, at: int = 3) -> None:
        super().__init__()
        if not 0 <= at < len(in_channels):
            raise ValueError(f"A CRM of {len(in_channels)} maps has the size of one of them: at is not {at}.")
        self.at = at
        self.project = nn.ModuleList(nn.Conv2d(channels, out_channels, 1, bias=False) for channels in in_channels)
        self.norm = nn.BatchNorm2d(out_channels)
        hidden = max(out_channels // 16, 4)
        self.channel = nn.Sequential(
            nn.Conv2d(out_channels, hidden, 1), nn.ReLU(inplace=True), nn.Conv2d(hidden, out_channels, 1)
        )
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, *maps: Tensor) -> Tensor:
        """One map, of as many as there are ``in_channels``. Raises ValueError for another number of maps."""
        if len(maps) != len(self.project):
            raise ValueError(f"CRM takes {len(self.project)} maps, as many as it has in_channels, not {len(maps)}.")
        size = maps[self.at].shape[-2:]
        projected = [self._resampled(i, map, size) for i, map in enumerate(maps)]
        x = F.relu(self.norm(sum(projected[1:], projected[0])), inplace=True)
        x = x * (self.channel(x.mean((2, 3), keepdim=True)) + self.channel(x.amax((2, 3), keepdim=True))).sigmoid()
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        return x * self.spatial(pooled).sigmoid()

    def _resampled(self, i: int, map: Tensor, size: Sequence[int]) -> Tensor:
        """Map i with ``out_channels``, at this size. A 1×1 convolution and resampling commute: the convolution works on
        the smaller map."""
        if i < self.at:
            side = 2 ** (self.at - i)
            # Its windows at the border are smaller, so that sizes are rounded up as the backbone's convolutions do.
            map = F.avg_pool2d(map, side, side, ceil_mode=True, count_include_pad=False)
        projected = self.project[i](map)
        return upsample(projected, size) if i > self.at else projected
