"""DAPPM, the Deep Aggregation Pyramid Pooling Module of DDRNet (Hong et al., arXiv 2101.06085)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._kernels import FusedNorms, choose_kernels
from .upsample import upsample


def norm_relu_conv(in_channels: int, out_channels: int, kernel_size: int) -> tuple[nn.Module, ...]:
    """A_k of docs/definitions.md, "Context modules": batch norm, ReLU, k×k convolution without bias that keeps the
    size."""
    return (
        nn.BatchNorm2d(in_channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
    )


class DAPPM(nn.Module):
    """Context of five widths, from a pixel to the whole map, each added to the next wider one.

    With U for ``upsample`` to the map's own size and A_k for ``norm_relu_conv``::

        y0 = A1(x)
        yi = A3(U(A1(pool_i(x))) + y(i-1))      pool_1..3: average 5/2, 9/4, 17/8 (size/stride); pool_4: global
        out = A1(concat[y0, y1, y2, y3, y4]) + A1(x)

    Shapes: (N, in_channels, h, w) -> (N, out_channels, h, w), any h, w >= 1. 1,073,408 parameters with the defaults.
    In training, N = 1 leaves the batch norm after the global pool a single value per channel, and PyTorch raises.
    """

    def __init__(
        self, in_channels: int = 512, mid_channels: int = 128, out_channels: int = 128, *, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.impl = impl
        # Names and order are those of the public checkpoints.
        self.scale1 = nn.Sequential(nn.AvgPool2d(5, 2, 2), *norm_relu_conv(in_channels, mid_channels, 1))
        self.scale2 = nn.Sequential(nn.AvgPool2d(9, 4, 4), *norm_relu_conv(in_channels, mid_channels, 1))
        self.scale3 = nn.Sequential(nn.AvgPool2d(17, 8, 8), *norm_relu_conv(in_channels, mid_channels, 1))
        self.scale4 = nn.Sequential(nn.AdaptiveAvgPool2d(1), *norm_relu_conv(in_channels, mid_channels, 1))
        self.scale0 = nn.Sequential(*norm_relu_conv(in_channels, mid_channels, 1))
        self.process1 = nn.Sequential(*norm_relu_conv(mid_channels, mid_channels, 3))
        self.process2 = nn.Sequential(*norm_relu_conv(mid_channels, mid_channels, 3))
        self.process3 = nn.Sequential(*norm_relu_conv(mid_channels, mid_channels, 3))
        self.process4 = nn.Sequential(*norm_relu_conv(mid_channels, mid_channels, 3))
        self.compression = nn.Sequential(*norm_relu_conv(5 * mid_channels, out_channels, 1))
        self.shortcut = nn.Sequential(*norm_relu_conv(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) → (N, out_channels, h, w). Raises ValueError for maps or an impl that cannot be."""
        norms = choose_kernels(self, self.impl, x)
        return self._by_pytorch(x) if norms is None else self._by_kernels(x, norms)

    def _by_pytorch(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        y0 = self.scale0(x)
        y1 = self.process1(upsample(self.scale1(x), size) + y0)
        y2 = self.process2(upsample(self.scale2(x), size) + y1)
        y3 = self.process3(upsample(self.scale3(x), size) + y2)
        y4 = self.process4(upsample(self.scale4(x), size) + y3)
        return self.compression(torch.cat([y0, y1, y2, y3, y4], dim=1)) + self.shortcut(x)

    def _by_kernels(self, x: Tensor, norms: FusedNorms) -> Tensor:
        size = x.shape[-2:]
        (a0,) = norms.add((None,), (x,), size, (self.scale0[0],))
        scales = (self.scale1, self.scale2, self.scale3, self.scale4)
        pooled = norms.pool(x, [scale[1] for scale in scales])
        maps = [self.scale0[-1](a0)]
        processes = (self.process1, self.process2, self.process3, self.process4)
        for scale, process, map in zip(scales, processes, pooled, strict=True):
            (a,) = norms.add((scale[-1](map),), (maps[-1],), size, (process[0],))
            maps.append(process[-1](a))
        return norms.join_convolve((*maps, x), (self.compression, self.shortcut))
