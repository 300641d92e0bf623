"""SRM, the Semantic Refinement Module (Wang et al., arXiv 2412.08671), as docs/definitions.md, "Context modules", has
it."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dispatch, ops
from .upsample import upsample


class SRM(nn.Module):
    """Upsamples a low-resolution map so that it fits a high-resolution one: each pixel is read from where a small
    network that sees both maps says, instead of from its own place.

    With width c = low_channels / 2, A1 a 1×1 convolution to c channels with batch norm and ReLU, and U for ``upsample``
    to H×W::

        E = concat[A1(high), U(A1(low))]
        Δ₀, a = 3×3 convolution of E: two offsets in pixels of H×W, (x, y); nine logits, of which a is the softmax
        Δ(p) = Σ_q a_q(p) Δ₀(q)                       over the 3×3 neighbours q of p, the border replicated
        out(p) = U(low)(p + Δ(p)) + residual(p)       sampled bilinearly, positions clamped to the map

    The residual is a 1×1 convolution of ``high``, or a map that is given. Offsets start as zero: a new module computes
    U(low) + residual. Δ, a and positions are computed in fp32 whatever the maps are in, for fp64 in fp64: in half
    precision a position would be off by up to half a pixel.

    Args:
        high_channels: C_h.
        low_channels: C_l, even.
        project: whether the module has the 1×1 convolution for the residual; without it each call gives a residual.
        impl: what computes all behind the 3×3 convolution, in one pass by kernels: "auto", "cpu", "cuda", "triton" or
            "torch".

    Shapes: (N, C_h, H, W), (N, C_l, h, w) -> (N, C_l, H, W), for any H >= h >= 1 and W >= w >= 1.
    """

    def __init__(self, high_channels: int, low_channels: int, *, project: bool = True, impl: str = "auto") -> None:
        super().__init__()
        self.impl = impl
        if low_channels < 2 or low_channels % 2:
            raise ValueError(f"An SRM's low_channels are even, and at least 2, not {low_channels}.")
        width = low_channels // 2
        self.high = conv_norm_relu(high_channels, width)
        self.low = conv_norm_relu(low_channels, width)
        self.offset = nn.Conv2d(2 * width, 2 + 9, 3, padding=1)
        with torch.no_grad():
            self.offset.weight[:2] = 0
            self.offset.bias[:2] = 0  # type: ignore[index]  # It has one.
        self.lateral = nn.Conv2d(high_channels, low_channels, 1) if project else None

    def forward(self, high: Tensor, low: Tensor, residual: Tensor | None = None) -> Tensor:
        """(N, C_h, H, W), (N, C_l, h, w) → (N, C_l, H, W). residual: in the place of the projection of ``high``, (N,
        C_l, H, W). Raises ValueError if ``high`` is smaller than ``low``, if there is no residual, or one of another
        shape, or for an impl that cannot run."""
        size = high.shape[-2:]
        if size[0] < low.shape[-2] or size[1] < low.shape[-1]:
            raise ValueError(
                f"SRM upsamples: its second map, {tuple(low.shape)}, may not be larger than its first, "
                f"{tuple(high.shape)}."
            )
        if residual is None:
            if self.lateral is None:
                raise ValueError("An SRM with project=False needs a residual at each call.")
            residual = self.lateral(high)
        elif residual.shape != (expected := (*low.shape[:2], *size)):
            raise ValueError(
                f"The residual of an SRM has the shape of its result, {expected}, not {tuple(residual.shape)}."
            )
        raw = self.offset(torch.cat([self.high(high), upsample(self.low(low), size)], dim=1))
        impl = dispatch.choose("SRM", self.impl, low.device)
        return refine(low, raw, residual) if impl == "torch" else by_kernels(impl, low, raw, residual)


def conv_norm_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """1×1 convolution without bias, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
    )


def refine(low: Tensor, raw: Tensor, residual: Tensor) -> Tensor:
    """U(low)(p + Δ(p)) + residual(p), by PyTorch. raw: what the 3×3 convolution gives, (N, 11, H, W)."""
    offsets = mix_offsets(raw)
    if torch.is_grad_enabled():
        low, offsets = show_nan(low, offsets)
    # In this order: the sum has the layout of its first operand, and on a CPU grid_sample loses channels_last.
    return residual + sample(upsample(low, raw.shape[-2:]), offsets)


def by_kernels(impl: str, low: Tensor, raw: Tensor, residual: Tensor) -> Tensor:
    """The same by bcmf::srm, which takes maps of one dtype. Autocast may have left them in two."""
    dtype = torch.promote_types(low.dtype, residual.dtype)
    low, residual = low.to(dtype), residual.to(dtype)
    if raw.dtype != dtype:
        raw = raw.to(ops.acc_dtype(low))
    return cast(Tensor, ops.SRM[impl](low, raw, residual))


def mix_offsets(raw: Tensor) -> Tensor:
    """Δ (N, 2, H, W) of the 3×3 convolution's results (N, 11, H, W), in fp32 (fp64)."""
    raw = raw if raw.dtype == torch.float64 else raw.float()
    height, width = raw.shape[-2:]
    own, weights = raw[:, :2], raw[:, 2:].softmax(1)
    # Not F.pad(mode="replicate"): with it, compiled training in channels_last stops with an assertion (torch 2.13).
    rows = torch.cat([own[:, :, :1], own, own[:, :, -1:]], 2)
    padded = torch.cat([rows[..., :1], rows, rows[..., -1:]], 3)
    neighbours = (padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3))
    mixed = torch.zeros_like(own)
    for weight, neighbour in zip(weights.split(1, dim=1), neighbours, strict=True):
        mixed = mixed + weight * neighbour
    return mixed


def show_nan(low: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The map and the offsets, but with NaN in the whole map of an image that has such an offset, and 0 in its place.

    grid_sample hides a NaN in the forward, and in its backward on a CPU, torch 2.13 reads outside of the map."""
    lost = offsets.isnan().flatten(1).any(1).view(-1, 1, 1, 1)
    return low + torch.where(lost, torch.nan, 0.0).to(low.dtype), offsets.nan_to_num(0.0)


def sample(map: Tensor, offsets: Tensor) -> Tensor:
    """The map (N, C, H, W) at each pixel's place plus its offset (x, y), bilinear, clamped at the border."""
    height, width = map.shape[-2:]
    x = torch.arange(width, device=map.device, dtype=offsets.dtype) + offsets[:, 0]
    y = torch.arange(height, device=map.device, dtype=offsets.dtype)[:, None] + offsets[:, 1]
    # In the convention without aligned corners, which is defined for an axis of one pixel, too.
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    sampled = F.grid_sample(map.to(grid.dtype), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.to(map.dtype)
