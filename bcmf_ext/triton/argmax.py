"""bcmf::upsample_argmax in Triton: the class of each label pixel, the lowest of those with the largest logit; NaN is
larger than all, as in torch.argmax (csrc/device/argmax.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..ops import argmax_dtype
from .common import pixel_at
from .geometry import tile_of
from .launch import Geometry, check_sides, on_device, run
from .logits import group, places_of


@triton.jit
def argmax(
    logits, size, down, across, classes,
    ACC: tl.constexpr, MODE: tl.constexpr,
    ROWS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    n, y, x, inside = tile_of(tile, size, down, across, MODE, ROWS, SPANS, SPAN)
    places = places_of(tile, logits, size, down, across, y, x, MODE, SPANS)
    best = tl.full([ROWS, SPANS, SPAN], float("-inf"), ACC)
    found = tl.zeros([ROWS, SPANS, SPAN], tl.int32)
    for first in range(0, size.classes, GROUP):
        z = group(logits, n, places, first, size.classes, inside, ACC, MODE, GROUP)
        c = first + tl.arange(0, GROUP)[:, None, None, None]
        has_nan = tl.max((z != z).to(tl.int32), 0) > 0
        largest = tl.max(tl.where(z != z, float("-inf"), z), 0)
        is_largest = tl.where(has_nan[None], z != z, z == largest[None])
        lowest = tl.min(tl.where(is_largest, c, size.classes), 0)
        better = (best == best) & (has_nan | (largest > best))
        found = tl.where(better, lowest, found)
        best = tl.where(better, tl.where(has_nan, float("nan"), largest), best)
    tl.store(classes + pixel_at(size, n, y, x), found.to(classes.dtype.element_ty), mask=inside)


def upsample_argmax(logits: Tensor, height: int, width: int, align_corners: bool) -> Tensor:
    """The kernel of bcmf::upsample_argmax_triton."""
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
        run(argmax, geometry.dense_tiles, geometry.arguments, **geometry.tile._asdict(), classes=classes)
    return classes
