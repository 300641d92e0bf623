"""bcmf::pool_norm_relu and bcmf::add_norm_relu in Triton, each in one launch (csrc/device/lmfm.cuh).

A program has a few channels of a branch (of the pools, of the map) and all their pixels, so that it finds the
statistics of a batch norm by itself; in eval mode, where there are none to find, the pixels of one image. What is
normalised, and later its gradient, lies in scratch memory of the program's own, (pixels, SIDE channels): maps are
small, and it stays in the cache. Between a store there and a load of another block is a barrier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import INTERPRETED
from ..ops import POOLS, acc_dtype, empty_pools, empty_stats, empty_sums, pool_sizes
from .common import Map, double, ratio
from .launch import bits_of, check_sides, on_device, run
from .logits import mix

WHOLE = tl.constexpr(len(POOLS))  # the pool of the whole map, after 5/2, 9/4 and 17/8


class Norm(NamedTuple):
    """Of a branch's channels. Running statistics are read in eval mode, and moved in training."""

    weight: Any
    bias: Any
    mean: Any
    variance: Any


class Branch(NamedTuple):
    """Of add_norm_relu: relu(norm(·)) of a map (rows, columns) that is resampled, and one that is added; 0 for has_…
    where there is none, and its tensor some other. first: of its channels among all branches'. out: of the backward its
    gradient, which is read."""

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


# --------------------------------------------------------------------------------------------------------------------
# Integers. Triton compiles a kernel anew where one in a tuple is 1, or a multiple of 16: for maps of nearly every size.
# So they are kept in a form that is neither (and outside tuples not specialised). Kernels are told where channels are
# neighbours in memory: ADJACENT.


def keep(*values: int) -> tuple[int, ...]:
    return tuple(16 * value + 3 for value in values)


@triton.jit
def kept(value):
    return tl.cast(value, tl.int64) >> 4


@triton.jit
def size_of(size):
    """Channels (64 bit), height and width, and values of scratch memory of a channel (64 bit)."""
    return kept(size[0]), kept(size[1]).to(tl.int32), kept(size[2]).to(tl.int32), kept(size[3])


# --------------------------------------------------------------------------------------------------------------------
# Pixels, and entries of maps and of scratch memory, in blocks (PIXELS, SIDE)


@triton.jit
def pixels_from(start, PIXELS: tl.constexpr):
    return (start + tl.arange(0, PIXELS))[:, None]


@triton.jit
def entry_of(map, n, c, y, x, ADJACENT: tl.constexpr):
    """Where it lies. In 64 bits, unlike the number of a pixel."""
    offset = tl.cast(n, tl.int64) * kept(map.stride_n) + tl.cast(y, tl.int64) * kept(map.stride_h)
    offset += tl.cast(x, tl.int64) * kept(map.stride_w)
    return map.data + offset + (c if ADJACENT else c * kept(map.stride_c))


@triton.jit
def own(scratch, pixel, SIDE: tl.constexpr):
    return scratch + pixel.to(tl.int64) * SIDE + tl.arange(0, SIDE)[None, :]


@triton.jit
def channels_of(group, SIDE: tl.constexpr):
    return (group * SIDE + tl.arange(0, SIDE)).to(tl.int64)[None, :]


@triton.jit
def square_root(value):
    """Rounded correctly."""
    return tl.sqrt(value) if value.dtype == tl.float64 else tl.sqrt_rn(value)


@triton.jit
def channel_sum(value):
    return tl.sum(value, 0)[None, :]


# --------------------------------------------------------------------------------------------------------------------
# Batch norm and ReLU of what lies in scratch memory: z, `count` pixels


@triton.jit
def find_norm(
    z, count, norm, stats, channels, first, c, exists, writes, momentum, eps,
    TRAINING: tl.constexpr, ACC: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Mean, scale and bias: of the batch, towards which the running statistics move, or of these. Leaves the statistics
    for the backward."""
    if TRAINING:
        total = tl.zeros([PIXELS, SIDE], ACC)
        for start in range(0, count, PIXELS):
            pixel = pixels_from(start, PIXELS)
            total += tl.load(own(z, pixel, SIDE), mask=pixel < count, other=0)
        mean = ratio(channel_sum(total), tl.cast(count, ACC))
        total = tl.zeros([PIXELS, SIDE], ACC)
        for start in range(0, count, PIXELS):
            pixel = pixels_from(start, PIXELS)
            difference = tl.load(own(z, pixel, SIDE), mask=pixel < count, other=0) - mean
            total += tl.where(pixel < count, difference * difference, 0.0)
        squares = channel_sum(total)
        variance = ratio(squares, tl.cast(count, ACC))
        momentum, unbiased = double(momentum).to(ACC), ratio(squares, tl.cast(count - 1, ACC))
        old = tl.load(norm.mean + c, mask=exists, other=0)
        tl.store(norm.mean + c, old + momentum * (mean - old), mask=exists)
        old = tl.load(norm.variance + c, mask=exists, other=0)
        tl.store(norm.variance + c, old + momentum * (unbiased - old), mask=exists)
    else:
        mean = tl.load(norm.mean + c, mask=exists, other=0)
        variance = tl.load(norm.variance + c, mask=exists, other=1)
    inverse_std = ratio(tl.full(variance.shape, 1.0, ACC), square_root(variance + double(eps).to(ACC)))
    if writes:
        tl.store(stats + first + c, mean, mask=exists)
        tl.store(stats + channels + first + c, inverse_std, mask=exists)
    scale = inverse_std * tl.load(norm.weight + c, mask=exists, other=0)
    return mean, scale, tl.load(norm.bias + c, mask=exists, other=0)


@triton.jit
def write_relu(
    z, count, mean, scale, bias, out, first_image, height, width, c, exists, ADJACENT: tl.constexpr, SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    for start in range(0, count, PIXELS):
        pixel = pixels_from(start, PIXELS)
        y = (tl.load(own(z, pixel, SIDE), mask=pixel < count, other=0) - mean) * scale + bias
        n, row, column = first_image + pixel // (height * width), pixel // width % height, pixel % width
        to = entry_of(out, n, c, row, column, ADJACENT)
        tl.store(to, tl.where(y < 0, 0.0, y).to(out.data.dtype.element_ty), mask=(pixel < count) & exists)  # NaN stays


@triton.jit
def norm_backward(
    z, count, norm, stats, grad_norms, channels, first, grad, height, width, c, exists, training,
    ACC: tl.constexpr, ADJACENT: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Puts the gradient of z in its place, and leaves those of weight and bias. grad: that of the output."""
    mean = tl.load(stats + first + c, mask=exists, other=0)
    inverse_std = tl.load(stats + channels + first + c, mask=exists, other=0)
    scale = inverse_std * tl.load(norm.weight + c, mask=exists, other=0)
    bias = tl.load(norm.bias + c, mask=exists, other=0)
    grad_bias, grad_weight = tl.zeros([PIXELS, SIDE], ACC), tl.zeros([PIXELS, SIDE], ACC)
    for start in range(0, count, PIXELS):
        pixel = pixels_from(start, PIXELS)
        centred, passed = passed_relu(
            z, pixel, count, mean, scale, bias, grad, height, width, c, exists, ACC, ADJACENT, SIDE
        )
        grad_bias += passed
        grad_weight += passed * (centred * inverse_std)
    grad_bias, grad_weight = channel_sum(grad_bias), channel_sum(grad_weight)
    tl.store(grad_norms + first + c, grad_weight, mask=exists)
    tl.store(grad_norms + channels + first + c, grad_bias, mask=exists)
    share = tl.where(training != 0, ratio(tl.cast(1, ACC), tl.cast(count, ACC)), 0.0)
    tl.debug_barrier()
    for start in range(0, count, PIXELS):
        pixel = pixels_from(start, PIXELS)
        centred, passed = passed_relu(
            z, pixel, count, mean, scale, bias, grad, height, width, c, exists, ACC, ADJACENT, SIDE
        )
        value = scale * (passed - (grad_bias + centred * inverse_std * grad_weight) * share)
        tl.store(own(z, pixel, SIDE), value, mask=pixel < count)
    tl.debug_barrier()


@triton.jit
def passed_relu(
    z, pixel, count, mean, scale, bias, grad, height, width, c, exists,
    ACC: tl.constexpr, ADJACENT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """z − mean, and what of the output's gradient passes the ReLU."""
    inside = (pixel < count) & exists
    centred = tl.load(own(z, pixel, SIDE), mask=pixel < count, other=0) - mean
    from_ = entry_of(grad, pixel // (height * width), c, pixel // width % height, pixel % width, ADJACENT)
    upstream = tl.load(from_, mask=inside, other=0).to(ACC)
    return centred, tl.where(centred * scale + bias <= 0, 0.0, upstream)


# --------------------------------------------------------------------------------------------------------------------
# Pools: along y, then along x


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
def shape_of(POOL: tl.constexpr, height, width):
    """Rows and columns of a pool."""
    _, _, _, rows = window_of(POOL, height)
    _, _, _, columns = window_of(POOL, width)
    return rows, columns


@triton.jit
def part_of(scratch, images, height, width, POOL: tl.constexpr, SIDE: tl.constexpr):
    """A pool along y, the pool, and what is behind them, in scratch memory."""
    rows, columns = shape_of(POOL, height, width)
    pool = scratch + tl.cast(images, tl.int64) * rows * width * SIDE
    return scratch, pool, pool + tl.cast(images, tl.int64) * rows * columns * SIDE


@triton.jit
def end_window(along_y, image, x, window, value, there, rows, width, SIDE: tl.constexpr):
    tl.store(own(along_y, (image * rows + window) * width + x, SIDE), value, mask=there)


@triton.jit
def sum_down(
    map, scratch, images, first_image, height, width, c, exists,
    ACC: tl.constexpr, ADJACENT: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Sums along y for all pools, each entry read once: a lane goes down a column. A window consists of two blocks as
    long as its pool's stride, the last of which is `here`, and the first entry of the next one."""
    rows_0, _ = shape_of(0, height, width)
    rows_1, _ = shape_of(1, height, width)
    rows_2, _ = shape_of(2, height, width)
    to_0, _, behind = part_of(scratch, images, height, width, 0, SIDE)
    to_1, _, behind = part_of(behind, images, height, width, 1, SIDE)
    to_2, _, behind = part_of(behind, images, height, width, 2, SIDE)
    for start in range(0, images * width, PIXELS):
        column = pixels_from(start, PIXELS)
        there = column < images * width
        image, x = column // width, column % width
        total = tl.zeros([PIXELS, SIDE], ACC)
        before_0, before_1, before_2 = total, total, total
        here_0, here_1, here_2 = total, total, total
        for y in range(height):
            from_ = entry_of(map, first_image + image, c, y, x, ADJACENT)
            value = tl.load(from_, mask=there & exists, other=0).to(ACC)
            if y % 2 == 0:
                if y > 0:
                    end_window(to_0, image, x, y // 2 - 1, before_0 + here_0 + value, there, rows_0, width, SIDE)
                before_0, here_0 = here_0, tl.zeros([PIXELS, SIDE], ACC)
            if y % 4 == 0:
                if y > 0:
                    end_window(to_1, image, x, y // 4 - 1, before_1 + here_1 + value, there, rows_1, width, SIDE)
                before_1, here_1 = here_1, tl.zeros([PIXELS, SIDE], ACC)
            if y % 8 == 0:
                if y > 0:
                    end_window(to_2, image, x, y // 8 - 1, before_2 + here_2 + value, there, rows_2, width, SIDE)
                before_2, here_2 = here_2, tl.zeros([PIXELS, SIDE], ACC)
            here_0 += value
            here_1 += value
            here_2 += value
            total += value
        end_window(to_0, image, x, rows_0 - 1, before_0 + here_0, there, rows_0, width, SIDE)
        end_window(to_1, image, x, rows_1 - 1, before_1 + here_1, there, rows_1, width, SIDE)
        end_window(to_2, image, x, rows_2 - 1, before_2 + here_2, there, rows_2, width, SIDE)
        end_window(behind, image, x, 0, total, there, 1, width, SIDE)
    tl.debug_barrier()


@triton.jit
def pool_across(
    along_y, pool, images, height, width, POOL: tl.constexpr, ACC: tl.constexpr, SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """A pool of its sums along y."""
    size, _, _, rows = window_of(POOL, height)
    across, stride, pad, columns = window_of(POOL, width)
    share = ratio(tl.cast(1, ACC), tl.cast(size * across, ACC))
    for start in range(0, images * rows * columns, PIXELS):
        pixel = pixels_from(start, PIXELS)
        inside = pixel < images * rows * columns
        left = pixel % columns * stride - pad
        total = tl.zeros([PIXELS, SIDE], ACC)
        for k in range(across):
            there = inside & (left + k >= 0) & (left + k < width)
            total += tl.load(own(along_y, pixel // columns * width + left + k, SIDE), mask=there, other=0)
        tl.store(own(pool, pixel, SIDE), total * share, mask=inside)
    tl.debug_barrier()


@triton.jit
def spread_across(
    grad, along_y, images, height, width, POOL: tl.constexpr, ACC: tl.constexpr, SIDE: tl.constexpr,
    PIXELS: tl.constexpr,
):  # fmt: skip
    """The gradient along y, of that of a pool: each entry's windows, three at most, and but one of the whole map."""
    across, stride, pad, columns = window_of(POOL, width)
    size, _, _, rows = window_of(POOL, height)
    share = ratio(tl.cast(1, ACC), tl.cast(size * across, ACC))
    for start in range(0, images * rows * width, PIXELS):
        pixel = pixels_from(start, PIXELS)
        x = pixel % width
        total = tl.zeros([PIXELS, SIDE], ACC)
        for k in tl.static_range(3):
            window = (x + pad) // stride - k
            there = (pixel < images * rows * width) & (window >= 0) & (window < columns)
            there = there & (window * stride - pad + across > x)
            total += tl.load(own(grad, pixel // width * columns + window, SIDE), mask=there, other=0)
        tl.store(own(along_y, pixel, SIDE), total * share, mask=pixel < images * rows * width)


@triton.jit
def spread_down(along_y, n, y, x, inside, height, width, POOL: tl.constexpr, ACC: tl.constexpr, SIDE: tl.constexpr):
    """What a map's pixels get of a pool's gradient along y."""
    size, stride, pad, rows = window_of(POOL, height)
    total = tl.zeros([inside.shape[0], SIDE], ACC)
    for k in tl.static_range(3):
        window = (y + pad) // stride - k
        there = inside & (window >= 0) & (window < rows) & (window * stride - pad + size > y)
        total += tl.load(own(along_y, (n * rows + window) * width + x, SIDE), mask=there, other=0)
    return total


@triton.jit(do_not_specialize=["images", "parts", "momentum", "eps"])
def pool_forward(
    x, outs, norms, stats, scratch, size, images, parts, momentum, eps, TRAINING: tl.constexpr,
    ACC: tl.constexpr, ADJACENT: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program has all images, or one of them."""
    channels, height, width, values = size_of(size)
    first_image = tl.program_id(0) % parts
    c = channels_of(tl.program_id(0) // parts, SIDE)
    exists = c < channels
    behind = scratch + tl.cast(tl.program_id(0), tl.int64) * values * SIDE
    sum_down(x, behind, images, first_image, height, width, c, exists, ACC, ADJACENT, SIDE, PIXELS)
    for POOL in tl.static_range(WHOLE + 1):
        along_y, z, behind = part_of(behind, images, height, width, POOL, SIDE)
        pool_across(along_y, z, images, height, width, POOL, ACC, SIDE, PIXELS)
        rows, columns = shape_of(POOL, height, width)
        count = images * rows * columns
        mean, scale, bias = find_norm(
            z, count, norms[POOL], stats, (WHOLE + 1) * channels, POOL * channels, c, exists, first_image == 0,
            momentum, eps, TRAINING, ACC, SIDE, PIXELS,
        )  # fmt: skip
        write_relu(
            z, count, mean, scale, bias, outs[POOL], first_image, rows, columns, c, exists, ADJACENT, SIDE, PIXELS
        )


@triton.jit(do_not_specialize=["images", "training"])
def pool_backward(
    x, grads, norms, stats, grad_norms, grad_x, scratch, size, images, training,
    ACC: tl.constexpr, ADJACENT: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    channels, height, width, values = size_of(size)
    c = channels_of(tl.program_id(0), SIDE)
    exists = c < channels
    begin = scratch + tl.cast(tl.program_id(0), tl.int64) * values * SIDE
    behind = begin
    sum_down(x, begin, images, 0, height, width, c, exists, ACC, ADJACENT, SIDE, PIXELS)
    for POOL in tl.static_range(WHOLE + 1):
        along_y, z, behind = part_of(behind, images, height, width, POOL, SIDE)
        pool_across(along_y, z, images, height, width, POOL, ACC, SIDE, PIXELS)
        rows, columns = shape_of(POOL, height, width)
        norm_backward(
            z, images * rows * columns, norms[POOL], stats, grad_norms, (WHOLE + 1) * channels, POOL * channels,
            grads[POOL], rows, columns, c, exists, training, ACC, ADJACENT, SIDE, PIXELS,
        )  # fmt: skip
        spread_across(z, along_y, images, height, width, POOL, ACC, SIDE, PIXELS)
    tl.debug_barrier()
    for start in range(0, images * height * width, PIXELS):
        pixel = pixels_from(start, PIXELS)
        inside = (pixel < images * height * width) & exists
        n, y, x_ = pixel // (height * width), pixel // width % height, pixel % width
        total = tl.zeros([PIXELS, SIDE], ACC)
        behind = begin
        for POOL in tl.static_range(WHOLE + 1):
            along_y, z, behind = part_of(behind, images, height, width, POOL, SIDE)
            total += spread_down(along_y, n, y, x_, inside, height, width, POOL, ACC, SIDE)
        to = entry_of(grad_x, n, c, y, x_, ADJACENT)
        tl.store(to, total.to(grad_x.data.dtype.element_ty), mask=inside)


# --------------------------------------------------------------------------------------------------------------------
# Sums of a resampled map and another one


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
    """The first pixel that lies behind a cell; 0 of cell −1, and all of the one after the last."""
    least, unit = 2 * cell.to(tl.int64) * outside + outside - inside, 2 * tl.cast(inside, tl.int64)
    start = tl.minimum((tl.maximum(least, 0) + unit - 1) // unit, outside)
    return tl.where(cell <= 0, 0, tl.where(cell < inside, start, outside)).to(tl.int32)


@triton.jit
def find_sum(
    branch, z, images, first_image, height, width, c, exists,
    ACC: tl.constexpr, ADJACENT: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The sum of a branch's maps, to scratch memory."""
    count = images * height * width
    for start in range(0, count, PIXELS):
        pixel = pixels_from(start, PIXELS)
        inside = (pixel < count) & exists
        n, y, x = first_image + pixel // (height * width), pixel // width % height, pixel % width
        total = tl.zeros([PIXELS, SIDE], ACC)
        if branch.has_added != 0:
            total += tl.load(entry_of(branch.added, n, c, y, x, ADJACENT), mask=inside, other=0).to(ACC)
        if branch.has_resampled != 0:
            top, down = tap(y, branch.rows, height, ACC)
            left, right = tap(x, branch.columns, width, ACC)
            below, beside = (down != 0).to(tl.int64), (right != 0).to(tl.int64)
            corner = entry_of(branch.resampled, n, c, top, left, ADJACENT)
            step_y, step_x = below * kept(branch.resampled.stride_h), beside * kept(branch.resampled.stride_w)
            above = mix(
                tl.load(corner, mask=inside, other=0).to(ACC), tl.load(corner + step_x, mask=inside, other=0).to(ACC),
                right,
            )  # fmt: skip
            corner += step_y
            beneath = mix(
                tl.load(corner, mask=inside, other=0).to(ACC), tl.load(corner + step_x, mask=inside, other=0).to(ACC),
                right,
            )  # fmt: skip
            total += mix(above, beneath, down)
        tl.store(own(z, pixel, SIDE), total, mask=pixel < count)
    tl.debug_barrier()


@triton.jit
def gather(grads, step, cell, inside, outside, most, there, ACC: tl.constexpr, SIDE: tl.constexpr):
    """The gradient of a cell, of those of the pixels between its neighbours: `most` of them, `step` apart."""
    begin, middle = start_of(cell - 1, inside, outside), start_of(cell, inside, outside)
    end = start_of(cell + 1, inside, outside)
    total = tl.zeros([cell.shape[0], SIDE], ACC)
    for k in range(most):
        i = begin + k
        _, weight = tap(i, inside, outside, ACC)
        share = tl.where(i < middle, weight, 1 - weight)
        total += share * tl.load(grads + i.to(tl.int64) * step, mask=there & (i < end), other=0)
    return total


@triton.jit
def either(take, first, second):
    """One of two tuples of the same kind."""
    chosen = ()
    for i in tl.static_range(len(first)):
        chosen = chosen + (tl.where(take, second[i], first[i]),)  # noqa: RUF005
    return chosen


@triton.jit
def branch_of(branches, group, SIDE: tl.constexpr):
    """The branch of a group of channels among those of all branches, its numbers as they are; and the group among its
    own."""
    chosen, own_group, start = branches[0], group, tl.cast(group, tl.int64) * 0
    for b in tl.static_range(1, len(branches)):
        start += (kept(branches[b - 1].channels) + SIDE - 1) // SIDE
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
        kept(chosen.channels), kept(chosen.first), kept(chosen.rows).to(tl.int32), kept(chosen.columns).to(tl.int32),
        kept(chosen.has_resampled), kept(chosen.has_added), chosen.resampled, chosen.added, chosen.out,
        chosen.grad_resampled, chosen.grad_added, chosen.norm,
    )  # fmt: skip
    return found, own_group


@triton.jit(do_not_specialize=["images", "parts", "momentum", "eps"])
def add_forward(
    branches, stats, scratch, size, images, parts, momentum, eps,
    TRAINING: tl.constexpr, ACC: tl.constexpr, ADJACENT: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """A program has all images, or one of them."""
    channels, height, width, values = size_of(size)
    branch, group = branch_of(branches, tl.program_id(0) // parts, SIDE)
    first_image = tl.program_id(0) % parts
    c = channels_of(group, SIDE)
    exists = c < branch.channels
    z = scratch + tl.cast(tl.program_id(0), tl.int64) * values * SIDE
    find_sum(branch, z, images, first_image, height, width, c, exists, ACC, ADJACENT, SIDE, PIXELS)
    count = images * height * width
    mean, scale, bias = find_norm(
        z, count, branch.norm, stats, channels, branch.first, c, exists, first_image == 0, momentum, eps,
        TRAINING, ACC, SIDE, PIXELS,
    )  # fmt: skip
    write_relu(z, count, mean, scale, bias, branch.out, first_image, height, width, c, exists, ADJACENT, SIDE, PIXELS)


@triton.jit(do_not_specialize=["images", "training", "most_rows", "most_columns"])
def add_backward(
    branches, stats, grad_norms, scratch, size, images, training, most_rows, most_columns,
    ACC: tl.constexpr, ADJACENT: tl.constexpr, SIDE: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    channels, height, width, values = size_of(size)
    branch, group = branch_of(branches, tl.program_id(0), SIDE)
    c = channels_of(group, SIDE)
    exists = c < branch.channels
    z = scratch + tl.cast(tl.program_id(0), tl.int64) * values * SIDE
    find_sum(branch, z, images, 0, height, width, c, exists, ACC, ADJACENT, SIDE, PIXELS)
    count = images * height * width
    norm_backward(
        z, count, branch.norm, stats, grad_norms, channels, branch.first, branch.out, height, width, c, exists,
        training, ACC, ADJACENT, SIDE, PIXELS,
    )  # fmt: skip
    if branch.has_added != 0:
        for start in range(0, count, PIXELS):
            pixel = pixels_from(start, PIXELS)
            n, y, x = pixel // (height * width), pixel // width % height, pixel % width
            to = entry_of(branch.grad_added, n, c, y, x, ADJACENT)
            value = tl.load(own(z, pixel, SIDE), mask=pixel < count, other=0)
            tl.store(to, value.to(branch.grad_added.data.dtype.element_ty), mask=(pixel < count) & exists)
    if branch.has_resampled != 0:
        along_y = z + tl.cast(count, tl.int64) * SIDE
        for start in range(0, images * branch.rows * width, PIXELS):
            pixel = pixels_from(start, PIXELS)
            there = pixel < images * branch.rows * width
            n, cell = pixel // (branch.rows * width), pixel // width % branch.rows
            column = own(z, n * height * width + pixel % width, SIDE)
            value = gather(column, width * SIDE, cell, branch.rows, height, most_rows, there, ACC, SIDE)
            tl.store(own(along_y, pixel, SIDE), value, mask=there)
        tl.debug_barrier()
        for start in range(0, images * branch.rows * branch.columns, PIXELS):
            pixel = pixels_from(start, PIXELS)
            there = pixel < images * branch.rows * branch.columns
            row, cell = pixel // branch.columns, pixel % branch.columns
            value = gather(
                own(along_y, row * width, SIDE), SIDE, cell, branch.columns, width, most_columns, there, ACC, SIDE
            )
            to = entry_of(branch.grad_resampled, row // branch.rows, c, row % branch.rows, cell, ADJACENT)
            tl.store(to, value.to(branch.grad_resampled.data.dtype.element_ty), mask=there & exists)


# --------------------------------------------------------------------------------------------------------------------
# Calls


def map_of(tensor: Tensor) -> Map:
    return Map(tensor, *keep(*tensor.stride()))


class Lanes(NamedTuple):
    """Channels of a program, and pixels that are worked on together."""

    SIDE: int
    PIXELS: int


# By whether channels are neighbours in memory. A long line takes the interpreter as long as a short one.
LANES_ON_GPUS = {True: Lanes(4, 128), False: Lanes(1, 512)}
LANES = {True: Lanes(16, 1024), False: Lanes(32, 512)} if INTERPRETED else LANES_ON_GPUS


def lanes_for(*maps: Tensor) -> dict[str, int]:
    adjacent = all(map.stride(1) == 1 for map in maps)
    return {"ADJACENT": adjacent, **LANES[adjacent]._asdict()}


def check_map(map: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    if map.shape != torch.Size(shape):
        raise ValueError(f"maps of one branch go together, but one is {tuple(map.shape)} instead of {tuple(shape)}.")
    if map.dtype != like.dtype:
        raise TypeError(f"maps are of one dtype, not of {map.dtype} and {like.dtype}.")
    if map.device != like.device:
        raise ValueError(f"maps are on one device, not on {map.device} and {like.device}.")


def check_sizes(images: int, *sides: int) -> None:
    check_sides(*sides)
    if min(sides) < 1:
        raise ValueError("maps have at least one row and one column.")
    for height, width in zip(sides[::2], sides[1::2], strict=True):
        if images * height * width >= 2**31 - 2**10:  # counted in 32 bits, in whole blocks
            raise ValueError("maps of a batch have less than 2^31 pixels.")


def split_norms(parameters: Sequence[Sequence[Tensor]], channels: Sequence[int], like: Tensor) -> list[Norm]:
    """Each branch's part of the norms, of which one may span several. Without running statistics weights take their
    place."""
    acc, columns = acc_dtype(like), []
    for column in parameters:
        if any(p.dim() != 1 or p.dtype != acc or p.device != like.device or not p.is_contiguous() for p in column):
            raise ValueError(f"norms' parameters are contiguous, (C,) {acc} and on {like.device}.")
        parts, sizes = [], iter(channels)
        for parameter in column:
            start = 0
            while start < parameter.shape[0]:
                size = next(sizes, 0)
                if size == 0 or start + size > parameter.shape[0]:
                    raise ValueError("norms' parameters do not fit the maps' channels.")
                parts.append(parameter[start : start + size])
                start += size
        if len(parts) != len(channels):
            raise ValueError("norms' parameters do not fit the maps' channels.")
        columns.append(parts)
    columns += columns[: 4 - len(columns)]
    return [Norm(*parts) for parts in zip(*columns, strict=True)]


def check_stats(stats: Tensor, channels: int, like: Tensor) -> Tensor:
    if stats.shape != (2, channels) or stats.dtype != acc_dtype(like) or stats.device != like.device:
        raise ValueError("the backward takes stats as the forward returned them.")
    return stats.contiguous()


def acc_of(map: Tensor) -> Any:
    if not map.is_floating_point():
        raise TypeError(f"maps are floating point (fp16, bf16, fp32, fp64), not {map.dtype}.")
    return tl.float64 if map.dtype == torch.float64 else tl.float32


def check_pool_input(x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"x has the shape (N, C, h, w), not {tuple(x.shape)}.")
    check_sizes(x.shape[0], *x.shape[2:])


def pool_values(x: Tensor) -> int:
    """Of scratch memory, for a channel of an image: pools along y, and pools."""
    return sum(rows * (columns + x.shape[3]) for rows, columns in pool_sizes(*x.shape[2:]))


def pool_norm_relu(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """The kernel of bcmf::pool_norm_relu_triton."""
    acc = acc_of(x)
    check_pool_input(x)
    outs, stats = empty_pools(x), empty_stats(x, weights)
    lanes = lanes_for(x, *outs)
    images, channels, height, width = x.shape
    norms = split_norms((weights, biases, means, variances), [channels] * len(outs), x)
    parts = 1 if training else images
    programs = triton.cdiv(channels, lanes["SIDE"]) * parts
    together = images if training else min(images, 1)
    values = together * pool_values(x)
    with on_device(x):
        run(
            pool_forward, programs if images else 0, lanes,
            x=map_of(x), outs=tuple(map(map_of, outs)), norms=tuple(norms), stats=stats,
            scratch=x.new_empty(programs * values * lanes["SIDE"], dtype=acc_dtype(x)),
            size=keep(channels, height, width, values), images=together, parts=parts,
            momentum=bits_of(momentum), eps=bits_of(eps), TRAINING=training, ACC=acc,
        )  # fmt: skip
    return *outs, stats


def pool_norm_relu_backward(
    grads: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stats: Tensor,
    training: bool,
) -> tuple[list[Tensor], Tensor]:
    """The kernel of bcmf::pool_norm_relu_triton_backward."""
    acc = acc_of(x)
    check_pool_input(x)
    images, channels, height, width = x.shape
    sizes = pool_sizes(height, width)
    if len(grads) != len(sizes):
        raise ValueError(f"there is a gradient of each of the {len(sizes)} pools.")
    for grad, size in zip(grads, sizes, strict=True):
        check_map(grad, x, (images, channels, *size))
    norms = split_norms((weights, biases), [channels] * len(sizes), x)
    stats, lanes = check_stats(stats, len(sizes) * channels, x), lanes_for(x, *grads)
    grad_x, grad_norms = torch.empty_like(x, memory_format=torch.preserve_format), torch.empty_like(stats)
    if images == 0:
        return [grad_x], grad_norms.zero_()
    programs, values = triton.cdiv(channels, lanes["SIDE"]), images * pool_values(x)
    with on_device(x):
        run(
            pool_backward, programs, lanes,
            x=map_of(x), grads=tuple(map(map_of, grads)), norms=tuple(norms), stats=stats, grad_norms=grad_norms,
            grad_x=map_of(grad_x), scratch=x.new_empty(programs * values * lanes["SIDE"], dtype=acc_dtype(x)),
            size=keep(channels, height, width, values), images=images, training=int(training), ACC=acc,
        )  # fmt: skip
    return [grad_x], grad_norms


Maps = Sequence[Tensor | None]


class AddCall:
    """Checked arguments of add_norm_relu, forward or backward, and what they have in common."""

    def __init__(self, resampled: Maps, added: Maps, height: int, width: int, joined: bool) -> None:
        maps = [map for map in (*resampled, *added) if map is not None]
        if len(resampled) != len(added) or not maps or any(map.dim() != 4 for map in maps):
            raise ValueError("each branch has a resampled and an added map (N, C, h, w), or one of them.")
        if not joined and len(added) > 2:
            raise ValueError("more than two maps come joined.")
        self.like, self.acc, self.images = maps[0], acc_of(maps[0]), maps[0].shape[0]
        self.height, self.width, self.pairs = height, width, list(zip(resampled, added, strict=True))
        self.channels = []
        for low, map in self.pairs:
            some = map if low is None else low
            if some is None:
                raise ValueError("a branch has no map.")
            self.channels.append(some.shape[1])
            rows, columns = (height, width) if low is None else low.shape[2:]
            check_sizes(self.images, height, width, rows, columns)
            for given, sides in ((low, (rows, columns)), (map, (height, width))):
                if given is not None:
                    check_map(given, self.like, (self.images, self.channels[-1], *sides))

    def branches(self, outs: Sequence[Tensor], grads: Sequence[Maps], norms: Sequence[Norm]) -> tuple[Branch, ...]:
        """For the kernels. grads: of resampled maps and of added ones, in the backward."""
        found, first = [], 0
        for b, ((low, map), channels) in enumerate(zip(self.pairs, self.channels, strict=True)):
            rows, columns = (1, 1) if low is None else low.shape[2:]
            maps = [low, map, outs[b], *(of_maps[b] for of_maps in grads)]
            views = [map_of(outs[b] if given is None else given) for given in maps]
            views += [views[2]] * (5 - len(views))
            has = int(low is not None), int(map is not None)
            numbers = keep(channels, first, rows, columns, *has)
            found.append(Branch(*numbers, *views, norms[b]))  # type: ignore[call-arg]
            first += channels
        return tuple(found)

    def run(self, kernel: Any, layout: Tensor, parts: int, backward: bool, **arguments: Any) -> None:
        maps = [map for pair in self.pairs for map in pair if map is not None]
        lanes, images = lanes_for(layout, *maps), self.images // max(parts, 1)
        programs = sum(triton.cdiv(channels, lanes["SIDE"]) for channels in self.channels) * parts
        rows = max(0 if low is None else low.shape[2] for low, _ in self.pairs) if backward else 0
        values = images * (self.height + rows) * self.width
        scratch = layout.new_empty(programs * values * lanes["SIDE"], dtype=acc_dtype(layout))
        size = keep(sum(self.channels), self.height, self.width, values)
        with on_device(layout):
            run(
                kernel,
                programs,
                lanes,
                **arguments,
                scratch=scratch,
                size=size,
                images=images,
                parts=parts,
                ACC=self.acc,
            )

    def most(self, axis: int, outside: int) -> int:
        """Pixels between a cell's neighbours, at most: of the second cell, whose first neighbour has those up to the
        border, too, two and a half cells' width."""
        return max(0 if low is None else triton.cdiv(5 * outside, 2 * low.shape[axis]) + 1 for low, _ in self.pairs)


def split_joined(outs: Sequence[Tensor], channels: Sequence[int], joined: bool) -> Sequence[Tensor]:
    return outs[0].split(list(channels), 1) if joined else outs


def add_norm_relu(
    resampled: Maps,
    added: Maps,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    means: Sequence[Tensor],
    variances: Sequence[Tensor],
    height: int,
    width: int,
    channels_last: bool,
    joined: bool,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """The kernel of bcmf::add_norm_relu_triton."""
    call = AddCall(resampled, added, height, width, joined)
    norms = split_norms((weights, biases, means, variances), call.channels, call.like)
    outs = empty_sums(resampled, added, height, width, channels_last, joined)
    stats = empty_stats(call.like, weights)
    call.run(
        add_forward, outs[0], 1 if training and call.images else call.images, False,
        branches=call.branches(split_joined(outs, call.channels, joined), (), norms), stats=stats,
        momentum=bits_of(momentum), eps=bits_of(eps), TRAINING=training,
    )  # fmt: skip
    return *outs, stats


def add_norm_relu_backward(
    grads: Sequence[Tensor],
    resampled: Maps,
    added: Maps,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    stats: Tensor,
    height: int,
    width: int,
    channels_last: bool,
    joined: bool,
    training: bool,
) -> tuple[list[Tensor], Tensor]:
    """The kernel of bcmf::add_norm_relu_triton_backward."""
    call = AddCall(resampled, added, height, width, joined)
    if len(grads) != 2:
        raise ValueError("there is a gradient of each output.")
    for grad, channels in zip(grads, [sum(call.channels)] if joined else call.channels, strict=False):
        check_map(grad, call.like, (call.images, channels, height, width))
    norms = split_norms((weights, biases), call.channels, call.like)
    stats = check_stats(stats, sum(call.channels), call.like)
    grad_maps = [
        [None if map is None else torch.empty_like(map, memory_format=torch.preserve_format) for map in maps]
        for maps in (resampled, added)
    ]
    grad_norms = torch.empty_like(stats)
    if call.images == 0:
        grad_norms.zero_()
    call.run(
        add_backward, grads[0], min(call.images, 1), True,
        branches=call.branches(split_joined(grads, call.channels, joined), grad_maps, norms), stats=stats,
        grad_norms=grad_norms, training=int(training),
        most_rows=call.most(2, height), most_columns=call.most(3, width),
    )  # fmt: skip
    return [grad for grads in grad_maps for grad in grads if grad is not None], grad_norms
