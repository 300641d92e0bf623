"""Batch norm and ReLU of values in a program's scratch memory, which the kernels of LMFM share
(csrc/cuda/lmfm/kernels.cuh).

A program has a few channels of a branch and all their pixels, so that it finds the statistics of a batch norm by
itself; in eval mode, where there are none to find, the pixels of one image. What is normalised, and later its gradient,
lies in scratch memory of the program's own, (pixels, SIDE channels): maps are small, and it stays in the cache. Between
a store there and a load of another block is a barrier. Numbers of pixels have 32 bits; places in maps and scratch
memory have 64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .common import Map, ratio
from .integers import pack, unpack, unpack_side


class Lanes(NamedTuple):
    """The way a program works, known when its kernel is compiled: in the dtype ACC, on blocks (PIXELS, SIDE channels).
    ADJACENT: whether channels are neighbours in the memory of all maps."""

    ACC: Any
    ADJACENT: bool
    SIDE: int
    PIXELS: int


class Norm(NamedTuple):
    """The parameters of a branch's channels. Running statistics are read in eval mode, and moved in training."""

    weight: Any
    bias: Any
    mean: Any
    variance: Any


class Sizes(NamedTuple):
    """Sizes that kernels get, packed: the channels of all branches; height and width; the values of scratch memory that
    a channel needs; the images that a program has, and how many programs share the images."""

    channels: Any
    height: Any
    width: Any
    memory: Any
    images: Any
    parts: Any


@triton.jit
def unpack_sizes(sizes):
    """Channels and memory in 64 bits."""
    return Sizes(
        tl.cast(unpack(sizes.channels), tl.int64), unpack_side(sizes.height), unpack_side(sizes.width),
        tl.cast(unpack(sizes.memory), tl.int64), unpack(sizes.images), unpack(sizes.parts),
    )  # fmt: skip


class Area(NamedTuple):
    """The pixels of `images` images of a map from image `first` on."""

    images: Any
    first: Any
    height: Any
    width: Any


class Channels(NamedTuple):
    """A program's channels (1, SIDE) in 64 bits, and which of them exist."""

    c: Any
    exists: Any


class Table(NamedTuple):
    """(2, channels of all branches), of which those of a branch begin at `first`: statistics (mean, 1/√(variance +
    eps)), or gradients (of weight, of bias)."""

    data: Any
    channels: Any
    first: Any


class Affine(NamedTuple):
    """A norm as it is applied: (z − mean) · scale + bias."""

    mean: Any
    scale: Any
    bias: Any


def strided(tensor: Tensor) -> Map:
    """A map for LMFM's kernels, which are told by Lanes.ADJACENT what they have to know about strides."""
    n, c, h, w = map(pack, tensor.stride())
    return Map(tensor, n, c, h, w, adjacent=tl.constexpr(-1), multiple=tl.constexpr(1))


# --------------------------------------------------------------------------------------------------------------------
# Pixels, and entries of maps and of scratch memory, in blocks (PIXELS, SIDE)


@triton.jit
def pixels_from(start, LANES: tl.constexpr):
    """The numbers of a block of pixels, (PIXELS, 1)."""
    return (start + tl.arange(0, LANES.PIXELS))[:, None]


@triton.jit
def channels_of(group, channels, LANES: tl.constexpr):
    """The channels of a group, of so many."""
    c = (group * LANES.SIDE + tl.arange(0, LANES.SIDE)).to(tl.int64)[None, :]
    return Channels(c, c < channels)


@triton.jit
def entry_of(map, n, c, y, x, LANES: tl.constexpr):
    """Where an entry of a map lies."""
    offset = tl.cast(n, tl.int64) * unpack(map.stride_n) + tl.cast(y, tl.int64) * unpack(map.stride_h)
    offset += tl.cast(x, tl.int64) * unpack(map.stride_w)
    return map.data + offset + (c if LANES.ADJACENT else c * unpack(map.stride_c))


@triton.jit
def own(scratch, pixel, LANES: tl.constexpr):
    """Where a program's pixels lie in scratch memory."""
    return scratch + pixel.to(tl.int64) * LANES.SIDE + tl.arange(0, LANES.SIDE)[None, :]


@triton.jit
def position_of(pixel, height, width):
    """Image, row and column of pixels of maps."""
    return pixel // (height * width), pixel // width % height, pixel % width


@triton.jit
def channel_sum(value):
    """The sum over a block's pixels, (1, channels)."""
    return tl.sum(value, 0)[None, :]


@triton.jit
def square_root(value):
    """Rounded correctly."""
    return tl.sqrt(value) if value.dtype == tl.float64 else tl.sqrt_rn(value)


# --------------------------------------------------------------------------------------------------------------------
# Batch norm and ReLU of z in scratch memory, `count` pixels


@triton.jit
def batch_statistics(z, count, LANES: tl.constexpr):
    """Mean, and the sum of squared differences from it."""
    total = tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
    for start in range(0, count, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        total += tl.load(own(z, pixel, LANES), mask=pixel < count, other=0)
    mean = ratio(channel_sum(total), tl.cast(count, LANES.ACC))
    total = tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
    for start in range(0, count, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        difference = tl.load(own(z, pixel, LANES), mask=pixel < count, other=0) - mean
        total += tl.where(pixel < count, difference * difference, 0.0)
    return mean, channel_sum(total)


@triton.jit
def move(running, value, momentum, channels, ACC: tl.constexpr):
    """Moves running statistics towards those of the batch."""
    old = tl.load(running + channels.c, mask=channels.exists, other=0)
    tl.store(running + channels.c, old + tl.full((), momentum, ACC) * (value - old), mask=channels.exists)


@triton.jit
def find_norm(
    z, count, norm, stats, channels, writes, momentum, eps, TRAINING: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """The norm by the statistics of the batch, towards which the running ones move, or by these. The program that
    `writes` leaves the statistics for the backward."""
    c, exists = channels
    if TRAINING:
        mean, squares = batch_statistics(z, count, LANES)
        variance = ratio(squares, tl.cast(count, LANES.ACC))
        move(norm.mean, mean, momentum, channels, LANES.ACC)
        move(norm.variance, ratio(squares, tl.cast(count - 1, LANES.ACC)), momentum, channels, LANES.ACC)
    else:
        mean = tl.load(norm.mean + c, mask=exists, other=0)
        variance = tl.load(norm.variance + c, mask=exists, other=1)
    std = square_root(variance + tl.full((), eps, LANES.ACC))
    inverse_std = ratio(tl.full(variance.shape, 1.0, LANES.ACC), std)
    if writes:
        tl.store(stats.data + stats.first + c, mean, mask=exists)
        tl.store(stats.data + stats.channels + stats.first + c, inverse_std, mask=exists)
    scale = inverse_std * tl.load(norm.weight + c, mask=exists, other=0)
    return Affine(mean, scale, tl.load(norm.bias + c, mask=exists, other=0))


@triton.jit
def write_relu(z, affine, out, area, channels, LANES: tl.constexpr):
    """Writes the ReLU of the normalised z to a map."""
    count = area.images * area.height * area.width
    for start in range(0, count, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        y = (tl.load(own(z, pixel, LANES), mask=pixel < count, other=0) - affine.mean) * affine.scale + affine.bias
        n, row, column = position_of(pixel, area.height, area.width)
        to = entry_of(out, area.first + n, channels.c, row, column, LANES)
        value = tl.where(y < 0, 0.0, y)  # NaN stays
        tl.store(to, value.to(out.data.dtype.element_ty), mask=(pixel < count) & channels.exists)


@triton.jit
def norm_backward(z, norm, stats, grad_norms, grad, area, channels, training, LANES: tl.constexpr):
    """Puts the gradient of z in its place, and leaves those of weight and bias. grad: that of the output."""
    c, exists = channels
    count = area.images * area.height * area.width
    mean = tl.load(stats.data + stats.first + c, mask=exists, other=0)
    inverse_std = tl.load(stats.data + stats.channels + stats.first + c, mask=exists, other=0)
    scale = inverse_std * tl.load(norm.weight + c, mask=exists, other=0)
    affine = Affine(mean, scale, tl.load(norm.bias + c, mask=exists, other=0))
    grad_bias = tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
    grad_weight = tl.full([LANES.PIXELS, LANES.SIDE], 0, LANES.ACC)
    for start in range(0, count, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        centred, passed = passed_relu(z, pixel, affine, grad, area, channels, LANES)
        grad_bias += passed
        grad_weight += passed * (centred * inverse_std)
    grad_bias, grad_weight = channel_sum(grad_bias), channel_sum(grad_weight)
    tl.store(grad_norms + stats.first + c, grad_weight, mask=exists)
    tl.store(grad_norms + stats.channels + stats.first + c, grad_bias, mask=exists)
    share = tl.where(training != 0, ratio(tl.cast(1, LANES.ACC), tl.cast(count, LANES.ACC)), 0.0)
    tl.debug_barrier()
    for start in range(0, count, LANES.PIXELS):
        pixel = pixels_from(start, LANES)
        centred, passed = passed_relu(z, pixel, affine, grad, area, channels, LANES)
        value = scale * (passed - (grad_bias + centred * inverse_std * grad_weight) * share)
        tl.store(own(z, pixel, LANES), value, mask=pixel < count)
    tl.debug_barrier()


@triton.jit
def passed_relu(z, pixel, affine, grad, area, channels, LANES: tl.constexpr):
    """z − mean, and what of the output's gradient passes the ReLU."""
    exists = pixel < area.images * area.height * area.width
    centred = tl.load(own(z, pixel, LANES), mask=exists, other=0) - affine.mean
    n, row, column = position_of(pixel, area.height, area.width)
    from_ = entry_of(grad, n, channels.c, row, column, LANES)
    upstream = tl.load(from_, mask=exists & channels.exists, other=0).to(LANES.ACC)
    return centred, tl.where(centred * affine.scale + affine.bias <= 0, 0.0, upstream)
