"""How kernels are launched: which tiles for which logits, and Triton's options."""

from __future__ import annotations

import contextlib
import functools
import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import INTERPRETED
from ..ops import acc_dtype
from .common import (
    ANY,
    DIRECT,
    QUADS,
    Axis,
    Logits,
    Reading,
    Size,
    TileShape,
    pack_axis,
    pack_map,
    pack_size,
)
from .geometry import fill_axes

# Both products of a mix and a sum would be rounded or not as each kernel's compilation falls: see logits.mix.
OPTIONS = {"enable_fp_fusion": False}
# Instead of the table of configurations: for those who have the time.
AUTOTUNE = os.environ.get("BCMF_TRITON_AUTOTUNE") == "1"


def tile_shape(classes: int, dtype: torch.dtype, mode: int, classes_adjacent: bool, most: tuple[int, int]) -> TileShape:
    """The table of configurations. classes_adjacent: in memory (channels_last). most: pixels of a
    quad at most, down and across. Chosen by counting instructions of sm_90, not measured on a GPU yet: a thread has 8
    pixels, so that half precision is read in 16 bytes and no sum over classes is shared, and 32 logits; half as many in
    fp64, and where each has an address of its own."""
    half = 2 if dtype == torch.float64 else 1
    group = max(1, min(4, power_of_two(classes)) // half)
    if mode == QUADS.value:
        rows, span = min(MOST_ROWS, power_of_two(most[0])), min(MOST_SPAN, power_of_two(most[1]))
        return TileShape(rows, 128 // span, span, group)
    rows = 4 if mode == DIRECT.value and classes_adjacent else 8
    return TileShape(rows, 16 // half, 8, group)


MOST_ROWS, MOST_SPAN = 8, 32  # of a piece of a quad
FLAT = TileShape(4, 16, 8, 1)  # for maps at label size
FLAT_BLOCK = 1024  # entries of a map that is read as one row


class Sparse(NamedTuple):
    """CPG's tiles, of few pixels, so that many have no edge; the pixels that are looked at together; and the rows of
    their windows that are."""

    tile: TileShape
    block: int
    window_rows: int


SPARSE_ON_GPUS = Sparse(TileShape(8, 4, 8, 1), 128, 1)
# The interpreter takes as long for a long line as for a short one.
SPARSE = Sparse(TileShape(32, 8, 8, 1), 512, 8) if INTERPRETED else SPARSE_ON_GPUS
PROGRAMS = 8  # of CPG, on a multiprocessor


def power_of_two(n: int) -> int:
    """The power of two that is at least n and 1."""
    return triton.next_power_of_2(max(1, n))


def run(kernel: Any, programs: int, **arguments: Any) -> None:
    """Launches a kernel, whose arguments are named, unless there is nothing to do."""
    if programs > 0:
        kernel[(programs,)](**arguments, **OPTIONS)


def run_dense(kernel: Any, geometry: Geometry, **arguments: Any) -> None:
    """Launches a kernel for all label pixels that reads their logits; it takes READ and TILE."""
    if AUTOTUNE and geometry.dense_tiles > 0:
        kernel = tuned(kernel, geometry.tile, geometry.size, geometry.dtype)
        kernel[(geometry.dense_tiles,)](**arguments, READ=geometry.read, **OPTIONS)
    else:
        run(kernel, geometry.dense_tiles, **arguments, READ=geometry.read, TILE=geometry.tile)


@functools.cache
def tuned(kernel: Any, tile: TileShape, size: Size, dtype: torch.dtype) -> Any:
    """The kernel, which takes the fastest of a few groups of classes and numbers of warps: tried with each new size and
    set of options, of each dtype, which takes a while and synchronises. (CPG's kernels add to what is there: they
    cannot be tried.)"""
    groups = sorted({max(1, tile.GROUP // 2), tile.GROUP, 2 * tile.GROUP})
    configs = [
        triton.Config({"TILE": tile._replace(GROUP=group)}, num_warps=warps) for group in groups for warps in (2, 4, 8)
    ]
    return triton.autotune(configs, [name for name in ("READ", "TERMS") if name in kernel.arg_names])(kernel)


def check_sides(*sides: int) -> None:
    """Tensors may have more than 2³¹ entries, but kernels count rows, columns and classes in 32 bits."""
    for side in sides:
        if side >= 2**30:
            raise ValueError(f"a side of {side} is too long: it has to be below 2^30.")


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which kernels are launched on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has; 1 where kernels are interpreted."""
    if device.type != "cuda":
        return 1  # interpreted
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Geometry:
    """Logits and the label pixels that they are read for: the tiles, and what all kernels get of it."""

    def __init__(self, logits: Tensor, height: int, width: int, align_corners: bool) -> None:
        images, classes, rows, columns = logits.shape
        self.map, self.dtype, self.images, self.pixels = logits, logits.dtype, images, images * height * width
        self.size = Size(classes, height, width, rows, columns, self.pixels)
        self.acc = acc_dtype(logits)
        self.mode, self.most = self._choose_mode(align_corners)
        self.read = Reading(self.mode, tl.float64 if self.acc == torch.float64 else tl.float32)
        self.tile = tile_shape(classes, logits.dtype, self.mode, logits.stride(1) < logits.stride(3), self.most)
        self.by_rows = self.mode != QUADS.value  # whether dense kernels work on rows of pixels
        self.down = self.across = Axis(logits, logits, logits, 1)  # not read in mode DIRECT
        if self.mode != DIRECT.value and self.pixels > 0:
            self._fill_axes(logits, align_corners)

    def logits(self, by_rows: bool = False, by_cells: bool = False) -> Logits:
        """The logits for a kernel. by_rows (by_cells): it works on rows of neighbouring pixels (logits)."""
        return Logits(
            pack_map(self.map, by_rows and self.mode == DIRECT.value), pack_size(self.size, by_rows, by_cells),
            pack_axis(self.down), pack_axis(self.across),
        )  # fmt: skip

    def _choose_mode(self, align_corners: bool) -> tuple[int, tuple[int, int]]:
        """The mode, and the pixels of a quad at most, down and across."""
        _, height, width, rows, columns, *_ = self.size
        most = most_pixels(rows, height, align_corners), most_pixels(columns, width, align_corners)
        if (rows, columns) == (height, width):
            return DIRECT.value, most
        pieces = (rows + 1) * triton.cdiv(most[0], MOST_ROWS) * (columns + 1) * triton.cdiv(most[1], MOST_SPAN)
        # Sums for four corners of each piece take about as much memory as the pixels' own gradients at a ratio of 2.
        return (QUADS.value if 3.5 * pieces <= height * width else ANY.value), most

    def _fill_axes(self, logits: Tensor, align_corners: bool) -> None:
        def make(inside: int, outside: int, pixels: int, limit: int) -> Axis:
            # Each is an allocation of its own, so that its address does not depend on the size.
            first, start = (logits.new_empty(entries, dtype=torch.int32) for entries in (outside, inside + 2))
            return Axis(first, logits.new_empty(outside, dtype=self.acc), start, triton.cdiv(pixels, limit))

        _, height, width, rows, columns, *_ = self.size
        self.down = make(rows, height, self.most[0], self.tile.ROWS)
        self.across = make(columns, width, self.most[1], self.tile.SPAN)
        entries = max(height, width, rows + 2, columns + 2)
        run(
            fill_axes, triton.cdiv(entries, FLAT_BLOCK), size=pack_size(self.size),
            down=pack_axis(self.down), across=pack_axis(self.across), ALIGN=align_corners, BLOCK=FLAT_BLOCK,
        )  # fmt: skip

    @property
    def dense_tiles(self) -> int:
        """How many tiles kernels have that read the logits of all label pixels."""
        return self.tiles(self.tile, self.mode)

    def tiles(self, tile: TileShape, mode: int) -> int:
        """How many tiles there are in all."""
        if mode == QUADS.value:
            down = (self.size.rows + 1) * self.down.parts
            across = triton.cdiv((self.size.columns + 1) * self.across.parts, tile.SPANS)
        else:
            down = triton.cdiv(self.size.height, tile.ROWS)
            across = triton.cdiv(self.size.width, tile.SPANS * tile.SPAN)
        return self.images * down * across


def most_pixels(inside: int, outside: int, align_corners: bool) -> int:
    """Label pixels between two neighbouring logits, at most."""
    if align_corners:
        return triton.cdiv(outside - 1, inside - 1) if min(inside, outside) > 1 else outside
    return triton.cdiv(outside, max(1, inside))
