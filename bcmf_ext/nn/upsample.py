"""The resampling that the modules and networks do inside."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resampling of ``x (N, C, h, w)`` to ``size`` (H, W), align_corners=False."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
