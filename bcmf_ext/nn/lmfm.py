"""LMFM, the Low-resolution Multi-scale Fusion Module of BCMFNet (Jiang et al., arXiv 2203.00436), as
docs/definitions.md, "Context modules", has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._kernels import FusedNorms, choose_kernels
from .dappm import norm_relu_conv
from .upsample import upsample


class LMFM(nn.Module):
    """Context of four widths; interval links carry the two widest to the two narrowest.

    With U for ``upsample`` to the map's own size and A_k for ``norm_relu_conv``, each with its own weights::

        ui = U(A1(pool_i(x)))                   pool_1..3: average 5/2, 9/4, 17/8 (size/stride); pool_4: global
        y4 = A3(u4)   y3 = A3(u3)   y2 = A3(u2 + y4)   y1 = A3(u1 + y3)
        out = A1(concat[y1, y2, y3, y4]) + A1(x)

    Shapes: (N, in_channels, h, w) -> (N, out_channels, h, w), any h, w >= 1. 990,208 parameters with the defaults.
    In training, N = 1 leaves the batch norm after the global pool a single value per channel, and PyTorch raises.

    The names are DAPPM's, by branch: ``scale<i>`` makes ui and ``process<i>`` makes yi, as there. So DAPPM's weights
    load into what has the same task: scale1..4 and shortcut see the same input, process1..4 the same ui with another
    summand or none. Only ``compression`` (four maps instead of five) has another shape, and scale0 no counterpart.
    """

    def __init__(
        self, in_channels: int = 512, mid_channels: int = 128, out_channels: int = 128, *, impl: str = "auto"
    ) -> None:
        super().__init__()
        self.impl = impl
        self.scale1 = nn.Sequential(nn.AvgPool2d(5, 2, 2), *norm_relu_conv(in_channels, mid_channels, 1))
        self.scale2 = nn.Sequential(nn.AvgPool2d(9, 4, 4), *norm_relu_conv(in_channels, mid_channels, 1))
        self.scale3 = nn.Sequential(nn.AvgPool2d(17, 8, 8), *norm_relu_conv(in_channels, mid_channels, 1))
        self.scale4 = nn.Sequential(nn.AdaptiveAvgPool2d(1), *norm_relu_conv(in_channels, mid_channels, 1))
        self.process1 = nn.Sequential(*norm_relu_conv(mid_channels, mid_channels, 3))
        self.process2 = nn.Sequential(*norm_relu_conv(mid_channels, mid_channels, 3))
        self.process3 = nn.Sequential(*norm_relu_conv(mid_channels, mid_channels, 3))
        self.process4 = nn.Sequential(*norm_relu_conv(mid_channels, mid_channels, 3))
        self.compression = nn.Sequential(*norm_relu_conv(4 * mid_channels, out_channels, 1))
        self.shortcut = nn.Sequential(*norm_relu_conv(in_channels, out_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, h, w) → (N, out_channels, h, w). Raises ValueError for maps or an impl that cannot be."""
        norms = choose_kernels(self, self.impl, x)
        return self._by_pytorch(x) if norms is None else self._by_kernels(x, norms)

    def _by_pytorch(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        u1, u2 = upsample(self.scale1(x), size), upsample(self.scale2(x), size)
        u3, u4 = upsample(self.scale3(x), size), upsample(self.scale4(x), size)
        y4 = self.process4(u4)
        y3 = self.process3(u3)
        y2 = self.process2(u2 + y4)
        y1 = self.process1(u1 + y3)
        return self.compression(torch.cat([y1, y2, y3, y4], dim=1)) + self.shortcut(x)

    def _by_kernels(self, x: Tensor, norms: FusedNorms) -> Tensor:
        size = x.shape[-2:]
        scales = (self.scale1, self.scale2, self.scale3, self.scale4)
        pooled = norms.pool(x, [scale[1] for scale in scales])
        # These are the ui before U.
        v1, v2, v3, v4 = (scale[-1](map) for scale, map in zip(scales, pooled, strict=True))
        a3, a4 = norms.add((v3, v4), (None, None), size, (self.process3[0], self.process4[0]))
        y3, y4 = self.process3[-1](a3), self.process4[-1](a4)
        a1, a2 = norms.add((v1, v2), (y3, y4), size, (self.process1[0], self.process2[0]))
        y1, y2 = self.process1[-1](a1), self.process2[-1](a2)
        return norms.join_convolve((y1, y2, y3, y4, x), (self.compression, self.shortcut))
