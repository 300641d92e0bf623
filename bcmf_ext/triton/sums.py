"""The kernels of bcmf::add_norm_relu: the sum of a resampled map and another one, and its norm
(csrc/cuda/lmfm/kernels.cuh)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import Map, ratio
from .integers import unpack, unpack_side
from .logits import mix
from .norm import (
    Area,
    Norm,
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


class Branch(NamedTuple):
    """relu(norm(·)) of the sum of a map (rows, columns) that is resampled, and one that is added; 0 for has_… where
    there is none, and its tensor some other. first: of its channels among all branches'. out: the result, or in the
    backward its gradient, which is read."""

    channels: Any
    first: Any
    rows: Any
    columns: Any
    has_resampled: Any
    has_added: Any
    resampled: Any
    added: Any
    out: Any
    grad_resampled: Any
    grad_added: Any
    norm: Any


@triton.jit
def either(take, first, second):
    """One of two tuples of the same kind."""
    chosen = ()
    for i in tl.static_range(len(first)):
        chosen = chosen + (tl.where(take, second[i], first[i]),)  # noqa: RUF005
    return chosen


@triton.jit
def branch_of(branches, group, LANES: tl.constexpr):
    """The branch of a group of channels among those of all branches, its numbers unpacked but for strides; and the
    group among its own."""
    chosen, own_group, start = branches[0], group, tl.cast(group, tl.int64) * 0
    for b in tl.static_range(1, len(branches)):
        start += (unpack(branches[b - 1].channels) + LANES.SIDE - 1) // LANES.SIDE
        later = group >= start
        chosen = Branch(  # type: ignore[call-arg]
            *either(later, chosen[:6], branches[b][:6]),
            Map(*either(later, chosen.resampled, branches[b].resampled)),
            Map(*either(later, chosen.added, branches[b].added)),
            Map(*either(later, chosen.out, branches[b].out)),
            Map(*either(later, chosen.grad_resampled, branches[b].grad_resampled)),
            Map(*either(later, chosen.grad_added, branches[b].grad_added)),
            Norm(*either(later, chosen.norm, branches[b].norm)),
        )
        own_group = tl.where(later, group - start, own_group)
    found = Branch(
        tl.cast(unpack(chosen.channels), tl.int64), tl.cast(unpack(chosen.first), tl.int64), unpack_side(chosen.rows),
        unpack_side(chosen.columns), unpack(chosen.has_resampled), unpack(chosen.has_added), chosen.resampled,
        chosen.added, chosen.out, chosen.grad_resampled, chosen.grad_added, chosen.norm,
    )  # fmt: skip
    return found, own_group


@triton.jit
def tap(i, inside, outside, ACC: tl.constexpr):
    """Bilinear resampling along an axis: pixel i lies between cells `first` and, if its weight is not 0, the next. In
    integers: floating point picks another one where the coordinate is almost one."""
    i = i.to(tl.int64)
    numerator, denominator = tl.maximum((2 * i + 1) * inside - outside, 0), 2 * tl.cast(outside, tl.int64)
    first = numerator // denominator
    rest = tl.where(first + 1 < inside, numerator % denominator, 0)
    return first.to(tl.int32), ratio(rest.to(ACC), (denominator + i * 0).to(ACC))


@triton.jit
def start_of(cell, inside, outside):
    """The first pixel that lies behind a cell; 0 for cell −1, and the number of pixels for the one after the last."""
    least, unit = 2 * cell.to(tl.int64) * outside + outside - inside, 2 * tl.cast(inside, tl.int64)
    start = tl.minimum((tl.maximum(least, 0) + unit - 1) // unit, outside)
    return tl.where(cell <= 0, 0, tl.where(cell < inside, start, outside)).to(tl.int32)


@triton.jit
def find_sum(branch, z, area, channels, LANES: tl.constexpr):
    """Finds the sum of a branch's maps, into scratch memory."""
    count = area.images * area.height * area.width
    for start in range(0, count, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        inside = (pixel < count) & channels.exists
        n, y, x = position_of(pixel, area.height, area.width)
        n += area.first
        total = tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
        if branch.has_added != 0:
            from_ = entry_of(branch.added, n, channels.c, y, x, LANES)
            total += tl.load(from_, mask=inside, other=0).to(LANES.ACC)
        if branch.has_resampled != 0:
            top, down = tap(y, branch.rows, area.height, LANES.ACC)
            left, right = tap(x, branch.columns, area.width, LANES.ACC)
            corner = entry_of(branch.resampled, n, channels.c, top, left, LANES)
            step_y = (down != 0).to(tl.int64) * unpack(branch.resampled.stride_h)
            step_x = (right != 0).to(tl.int64) * unpack(branch.resampled.stride_w)
            above = mix(
                tl.load(corner, mask=inside, other=0).to(LANES.ACC),
                tl.load(corner + step_x, mask=inside, other=0).to(LANES.ACC),
                right,
            )
            corner += step_y
            below = mix(
                tl.load(corner, mask=inside, other=0).to(LANES.ACC),
                tl.load(corner + step_x, mask=inside, other=0).to(LANES.ACC),
                right,
            )
            total += mix(above, below, down)
        tl.store(own(z, pixel, LANES), total, mask=pixel < count)
    tl.debug_barrier()


@triton.jit
def gather(grads, step, cell, inside, outside, most, there, LANES: tl.constexpr):
    """The gradient of a cell, from those of the pixels between its neighbours: `most` of them, `step` apart."""
    begin, middle = start_of(cell - 1, inside, outside), start_of(cell, inside, outside)
    end = start_of(cell + 1, inside, outside)
    total = tl.full([cell.shape[0], LANES.SIDE], 0, LANES.ACC)
    for k in range(most):
        i = begin + k
        _, weight = tap(i, inside, outside, LANES.ACC)
        share = tl.where(i < middle, weight, 1 - weight)
        total += share * tl.load(grads + i.to(tl.int64) * step, mask=there & (i < end), other=0)
    return total


@triton.jit
def gather_resampled(branch, z, area, channels, most_rows, most_columns, LANES: tl.constexpr):
    """The gradient of the map that is resampled, from that of the sum: along y, behind z in scratch memory, then along
    x."""
    images, _, height, width = area
    along_y = z + tl.cast(images * height * width, tl.int64) * LANES.SIDE
    for start in range(0, images * branch.rows * width, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        there = pixel < images * branch.rows * width
        n, cell = pixel // (branch.rows * width), pixel // width % branch.rows
        column = own(z, n * height * width + pixel % width, LANES)
        value = gather(column, width * LANES.SIDE, cell, branch.rows, height, most_rows, there, LANES)
        tl.store(own(along_y, pixel, LANES), value, mask=there)
    tl.debug_barrier()
    for start in range(0, images * branch.rows * branch.columns, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        there = pixel < images * branch.rows * branch.columns
        line, cell = pixel // branch.columns, pixel % branch.columns
        row = own(along_y, line * width, LANES)
        value = gather(row, LANES.SIDE, cell, branch.columns, width, most_columns, there, LANES)
        to = entry_of(branch.grad_resampled, line // branch.rows, channels.c, line % branch.rows, cell, LANES)
        tl.store(to, value.to(branch.grad_resampled.data.dtype.element_ty), mask=there & channels.exists)


@triton.jit
def add_forward(
    branches, stats, scratch, sizes, momentum: tl.float64, eps: tl.float64,
    TRAINING: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """A program has a group of channels, and all images or one of them."""
    sizes = unpack_sizes(sizes)
    branch, group = branch_of(branches, tl.program_id(0) // sizes.parts, LANES)
    area = Area(sizes.images, tl.program_id(0) % sizes.parts, sizes.height, sizes.width)
    channels = channels_of(group, branch.channels, LANES)
    z = scratch + tl.cast(tl.program_id(0), tl.int64) * sizes.memory * LANES.SIDE
    find_sum(branch, z, area, channels, LANES)
    count = area.images * area.height * area.width
    table = Table(stats, sizes.channels, branch.first)
    affine = find_norm(z, count, branch.norm, table, channels, area.first == 0, momentum, eps, TRAINING, LANES)
    write_relu(z, affine, branch.out, area, channels, LANES)


@triton.jit
def add_backward(
    branches, stats, grad_norms, scratch, sizes, training, most_rows, most_columns, LANES: tl.constexpr
):  # fmt: skip
    """A program has a group of channels, and all images."""
    sizes, training = unpack_sizes(sizes), unpack(training)
    branch, group = branch_of(branches, tl.program_id(0), LANES)
    area = Area(sizes.images, 0, sizes.height, sizes.width)
    channels = channels_of(group, branch.channels, LANES)
    z = scratch + tl.cast(tl.program_id(0), tl.int64) * sizes.memory * LANES.SIDE
    find_sum(branch, z, area, channels, LANES)
    table = Table(stats, sizes.channels, branch.first)
    norm_backward(z, branch.norm, table, grad_norms, branch.out, area, channels, training, LANES)
    if branch.has_added != 0:
        count = area.images * area.height * area.width
        for start in range(0, count, LANES.PIXELS):
            pixel = pixels_from(start, LANES)
            n, y, x = position_of(pixel, area.height, area.width)
            to = entry_of(branch.grad_added, n, channels.c, y, x, LANES)
            value = tl.load(own(z, pixel, LANES), mask=pixel < count, other=0)
            tl.store(to, value.to(branch.grad_added.data.dtype.element_ty), mask=(pixel < count) & channels.exists)
    if branch.has_resampled != 0:
        gather_resampled(branch, z, area, channels, unpack(most_rows), unpack(most_columns), LANES)
