"""bcmf::upsample_argmax in Triton: the class of each label pixel, the lowest of those with the largest logit; NaN is
larger than all, as in torch.argmax (csrc/cuda/kernels/argmax.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import argmax_dtype
from .common import place_of, unpack_logits
from .geometry import tile_of
from .launch import Geometry, check_sides, on_device, run_dense
from .logits import group, places_of


@triton.jit
def argmax(logits, classes, READ: tl.constexpr, TILE: tl.constexpr):
    """Writes the class of each pixel of a tile."""
    tile = tl.program_id(0)
    logits = unpack_logits(logits)
    pixels = tile_of(tile, logits, READ.MODE, TILE)
    places = places_of(tile, logits, pixels, READ, TILE)
    best = tl.full([TILE.ROWS, TILE.SPANS, TILE.SPAN], float("-inf"), READ.ACC)
    found = tl.full([TILE.ROWS, TILE.SPANS, TILE.SPAN], 0, tl.int32)
    for first in range(0, logits.size.classes, TILE.GROUP):
        z = group(logits, pixels, places, first, READ, TILE)
        c = first + tl.arange(0, TILE.GROUP)[:, None, None, None]
        has_nan = tl.max((z != z).to(tl.int32), 0) > 0
        largest = tl.max(tl.where(z != z, float("-inf"), z), 0)
        is_largest = tl.where(has_nan[None], z != z, z == largest[None])
        lowest = tl.min(tl.where(is_largest, c, logits.size.classes), 0)
        better = (best == best) & (has_nan | (largest > best))
        found = tl.where(better, lowest, found)
        best = tl.where(better, tl.where(has_nan, float("nan"), largest), best)
    place = place_of(logits.size, pixels)
    tl.store(classes + place, found.to(classes.dtype.element_ty), mask=pixels.inside)


def upsample_argmax(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """The kernel of bcmf::upsample_argmax_triton.

    Args:
        logits: (N, C, h, w), C ≥ 1, floating point, of any strides.
        height, width: of the labels, in pixels.
        align_corners: how logits are resampled (docs/definitions.md, Resampling).

    Returns:
        (N, height, width), uint8, or int32 for more than 256 classes.

    Raises:
        ValueError: for another number of axes, a negative size, or pixels without any logit to read.
    """
    if logits.dim() != 4 or logits.shape[1] < 1 or min(height, width) < 0:
        raise ValueError(f"logits have the shape (N, C, h, w), not {tuple(logits.shape)}.")
    if logits.numel() == 0 and logits.shape[0] * height * width > 0:
        raise ValueError(f"logits of the size {tuple(logits.shape)} cannot be resampled to {height}x{width}.")
    check_sides(*logits.shape[1:], height, width)
    classes = logits.new_empty((logits.shape[0], height, width), dtype=argmax_dtype(logits))
    if classes.numel() == 0:
        return classes
    with on_device(logits):
        geometry = Geometry(logits, height, width, align_corners)
        run_dense(argmax, geometry, logits=geometry.logits(geometry.by_rows), classes=classes)
    return classes
