"""The kernels of bcmf::pool_norm_relu: average pools along y, then along x, and their norms
(csrc/cuda/lmfm/kernels.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from ..ops import POOLS
from .common import ratio
from .integers import unpack
from .norm import (
    Area,
    Table,
    channels_of,
    entry_of,
    find_norm,
    norm_backward,
    own,
    pixels_from,
    position_of,
    unpack_sizes,
    write_relu,
)

WHOLE = tl.constexpr(len(POOLS))  # the pool of the whole map, after 5/2, 9/4 and 17/8


@triton.jit
def window_of(POOL: tl.constexpr, length):
    """Size, stride and padding of a pool along an axis, and how many outputs it has."""
    if POOL == WHOLE:
        size, stride, pad, outputs = length, length, 0, 1
    else:
        stride = 2 << POOL
        size, pad, outputs = 2 * stride + 1, stride, (length - 1) // stride + 1
    return size, stride, pad, outputs


@triton.jit
def shape_of(POOL: tl.constexpr, area):
    """Rows and columns of a pool."""
    _, _, _, rows = window_of(POOL, area.height)
    _, _, _, columns = window_of(POOL, area.width)
    return rows, columns


@triton.jit
def part_of(scratch, area, POOL: tl.constexpr, LANES: tl.constexpr):
    """A pool along y, the pool, and what is behind them, in scratch memory."""
    rows, columns = shape_of(POOL, area)
    pool = scratch + tl.cast(area.images, tl.int64) * rows * area.width * LANES.SIDE
    return scratch, pool, pool + tl.cast(area.images, tl.int64) * rows * columns * LANES.SIDE


@triton.jit
def end_window(along_y, image, x, window, value, there, rows, width, LANES: tl.constexpr):
    """Stores the sum of a window that ends, in the pool along y, which has so many rows."""
    tl.store(own(along_y, (image * rows + window) * width + x, LANES), value, mask=there)


@triton.jit
def sum_down(map, scratch, area, channels, LANES: tl.constexpr):
    """Sums along y for all pools, each entry read once: a lane goes down a column. A window consists of two blocks as
    long as its pool's stride, the last of which is `here`, and the first entry of the next one."""
    images, first_image, height, width = area
    rows_0, _ = shape_of(0, area)
    rows_1, _ = shape_of(1, area)
    rows_2, _ = shape_of(2, area)
    to_0, _, behind = part_of(scratch, area, 0, LANES)
    to_1, _, behind = part_of(behind, area, 1, LANES)
    to_2, _, behind = part_of(behind, area, 2, LANES)
    for start in range(0, images * width, LANES.PIXELS):
        column = pixels_from(start, LANES)
        there = column < images * width
        image, x = column // width, column % width
        total = tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
        before_0, before_1, before_2 = total, total, total
        here_0, here_1, here_2 = total, total, total
        for y in range(height):
            from_ = entry_of(map, first_image + image, channels.c, y, x, LANES)
            value = tl.load(from_, mask=there & channels.exists, other=0).to(LANES.ACC)
            if y % 2 == 0:
                if y > 0:
                    end_window(to_0, image, x, y // 2 - 1, before_0 + here_0 + value, there, rows_0, width, LANES)
                before_0, here_0 = here_0, tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
            if y % 4 == 0:
                if y > 0:
                    end_window(to_1, image, x, y // 4 - 1, before_1 + here_1 + value, there, rows_1, width, LANES)
                before_1, here_1 = here_1, tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
            if y % 8 == 0:
                if y > 0:
                    end_window(to_2, image, x, y // 8 - 1, before_2 + here_2 + value, there, rows_2, width, LANES)
                before_2, here_2 = here_2, tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
            here_0 += value
            here_1 += value
            here_2 += value
            total += value
        end_window(to_0, image, x, rows_0 - 1, before_0 + here_0, there, rows_0, width, LANES)
        end_window(to_1, image, x, rows_1 - 1, before_1 + here_1, there, rows_1, width, LANES)
        end_window(to_2, image, x, rows_2 - 1, before_2 + here_2, there, rows_2, width, LANES)
        end_window(behind, image, x, 0, total, there, 1, width, LANES)
    tl.debug_barrier()


@triton.jit
def pool_across(along_y, pool, area, POOL: tl.constexpr, LANES: tl.constexpr):
    """Finds a pool by its sums along y."""
    size, _, _, rows = window_of(POOL, area.height)
    across, stride, pad, columns = window_of(POOL, area.width)
    share = ratio(tl.cast(1, LANES.ACC), tl.cast(size * across, LANES.ACC))
    count = area.images * rows * columns
    for start in range(0, count, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        left = pixel % columns * stride - pad
        total = tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
        for k in range(across):
            there = (pixel < count) & (left + k >= 0) & (left + k < area.width)
            total += tl.load(own(along_y, pixel // columns * area.width + left + k, LANES), mask=there, other=0)
        tl.store(own(pool, pixel, LANES), total * share, mask=pixel < count)
    tl.debug_barrier()


@triton.jit
def spread_across(grad, along_y, area, POOL: tl.constexpr, LANES: tl.constexpr):
    """The gradient along y from that of a pool: an entry lies in three windows at most, and in one of the whole map."""
    across, stride, pad, columns = window_of(POOL, area.width)
    size, _, _, rows = window_of(POOL, area.height)
    share = ratio(tl.cast(1, LANES.ACC), tl.cast(size * across, LANES.ACC))
    count = area.images * rows * area.width
    for start in range(0, count, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        x = pixel % area.width
        total = tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
        for k in tl.static_range(3):
            window = (x + pad) // stride - k
            there = (pixel < count) & (window >= 0) & (window < columns)
            there = there & (window * stride - pad + across > x)
            total += tl.load(own(grad, pixel // area.width * columns + window, LANES), mask=there, other=0)
        tl.store(own(along_y, pixel, LANES), total * share, mask=pixel < count)


@triton.jit
def spread_down(along_y, n, y, x, inside, area, POOL: tl.constexpr, LANES: tl.constexpr):
    """The part of a map's gradient that comes from a pool, by its gradient along y."""
    size, stride, pad, rows = window_of(POOL, area.height)
    total = tl.full([inside.shape[0], LANES.SIDE], 0, LANES.ACC)
    for k in tl.static_range(3):
        window = (y + pad) // stride - k
        there = inside & (window >= 0) & (window < rows) & (window * stride - pad + size > y)
        total += tl.load(own(along_y, (n * rows + window) * area.width + x, LANES), mask=there, other=0)
    return total


@triton.jit
def pool_forward(
    x, outs, norms, stats, scratch, sizes, momentum: tl.float64, eps: tl.float64,
    TRAINING: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program has a group of channels, and all images or one of them."""
    sizes = unpack_sizes(sizes)
    area = Area(sizes.images, tl.program_id(0) % sizes.parts, sizes.height, sizes.width)
    channels = channels_of(tl.program_id(0) // sizes.parts, sizes.channels, LANES)
    behind = scratch + tl.cast(tl.program_id(0), tl.int64) * sizes.memory * LANES.SIDE
    sum_down(x, behind, area, channels, LANES)
    for POOL in tl.static_range(WHOLE + 1):
        along_y, z, behind = part_of(behind, area, POOL, LANES)
        pool_across(along_y, z, area, POOL, LANES)
        rows, columns = shape_of(POOL, area)
        pool = Area(area.images, area.first, rows, columns)
        table = Table(stats, (WHOLE + 1) * sizes.channels, POOL * sizes.channels)
        count = area.images * rows * columns
        affine = find_norm(z, count, norms[POOL], table, channels, area.first == 0, momentum, eps, TRAINING, LANES)
        write_relu(z, affine, outs[POOL], pool, channels, LANES)


@triton.jit
def pool_backward(x, grads, norms, stats, grad_norms, grad_x, scratch, sizes, training, LANES: tl.constexpr):
    """A program has a group of channels, and all images."""
    sizes, training = unpack_sizes(sizes), unpack(training)
    area = Area(sizes.images, 0, sizes.height, sizes.width)
    channels = channels_of(tl.program_id(0), sizes.channels, LANES)
    begin = scratch + tl.cast(tl.program_id(0), tl.int64) * sizes.memory * LANES.SIDE
    behind = begin
    sum_down(x, begin, area, channels, LANES)
    for POOL in tl.static_range(WHOLE + 1):
        along_y, z, behind = part_of(behind, area, POOL, LANES)
        pool_across(along_y, z, area, POOL, LANES)
        rows, columns = shape_of(POOL, area)
        pool = Area(area.images, 0, rows, columns)
        table = Table(stats, (WHOLE + 1) * sizes.channels, POOL * sizes.channels)
        norm_backward(z, norms[POOL], table, grad_norms, grads[POOL], pool, channels, training, LANES)
        spread_across(z, along_y, area, POOL, LANES)
    tl.debug_barrier()
    count = area.images * area.height * area.width
    for start in range(0, count, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        inside = (pixel < count) & channels.exists
        n, row, column = position_of(pixel, area.height, area.width)
        total = tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
        behind = begin
        for POOL in tl.static_range(WHOLE + 1):
            along_y, z, behind = part_of(behind, area, POOL, LANES)
            total += spread_down(along_y, n, row, column, inside, area, POOL, LANES)
        to = entry_of(grad_x, n, channels.c, row, column, LANES)
        tl.store(to, total.to(grad_x.data.dtype.element_ty), mask=inside)
