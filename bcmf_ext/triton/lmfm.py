"""bcmf::pool_norm_relu and bcmf::add_norm_relu in Triton, each in one launch: checks and launches. The kernels stand in
pools.py and sums.py, and what they share in norm.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import INTERPRETED
from ..ops import acc_dtype, empty_pools, empty_stats, empty_sums, pool_sizes
from .integers import pack
from .launch import check_sides, on_device, run
from .norm import Lanes, Norm, Sizes, strided
from .pools import pool_backward, pool_forward
from .sums import Branch, add_backward, add_forward


class Block(NamedTuple):
    """Channels of a program, and pixels that are worked on together."""

    SIDE: int
    PIXELS: int


# By whether channels are neighbours in memory. A long line takes the interpreter as long as a short one.
BLOCKS_ON_GPUS = {True: Block(4, 128), False: Block(1, 512)}
BLOCKS = {True: Block(16, 1024), False: Block(32, 512)} if INTERPRETED else BLOCKS_ON_GPUS


def lanes_for(acc: tl.dtype, *maps: Tensor) -> Lanes:
    """The lanes of kernels that read and write these maps."""
    adjacent = all(map.stride(1) == 1 for map in maps)
    return Lanes(acc, adjacent, *BLOCKS[adjacent])


def check_map(map: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    """Raises ValueError or TypeError for a map of another shape, dtype or device."""
    if map.shape != torch.Size(shape):
        raise ValueError(f"maps of one branch go together, but one is {tuple(map.shape)} instead of {tuple(shape)}.")
    if map.dtype != like.dtype:
        raise TypeError(f"maps are of one dtype, not of {map.dtype} and {like.dtype}.")
    if map.device != like.device:
        raise ValueError(f"maps are on one device, not on {map.device} and {like.device}.")


def check_sizes(images: int, *sides: int) -> None:
    """Raises ValueError for sides that no kernel counts, or that are 0. sides: height and width of each map."""
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
    """The statistics that the forward returned, contiguous. Raises ValueError for others."""
    if stats.shape != (2, channels) or stats.dtype != acc_dtype(like) or stats.device != like.device:
        raise ValueError("the backward takes stats as the forward returned them.")
    return stats.contiguous()


def acc_of(map: Tensor) -> Any:
    """The dtype that kernels compute in. Raises TypeError for maps that are not floating point."""
    if not map.is_floating_point():
        raise TypeError(f"maps are floating point (fp16, bf16, fp32, fp64), not {map.dtype}.")
    return tl.float64 if map.dtype == torch.float64 else tl.float32


def check_pool_input(x: Tensor) -> None:
    """Raises ValueError for what is no map."""
    if x.dim() != 4:
        raise ValueError(f"x has the shape (N, C, h, w), not {tuple(x.shape)}.")
    check_sizes(x.shape[0], *x.shape[2:])


def pool_values(x: Tensor) -> int:
    """Values of scratch memory that a channel of an image needs: for the pools along y, and for the pools."""
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
    lanes = lanes_for(acc, x, *outs)
    images, channels, height, width = x.shape
    norms = split_norms((weights, biases, means, variances), [channels] * len(outs), x)
    parts = 1 if training else images
    programs = triton.cdiv(channels, lanes.SIDE) * parts
    together = images if training else min(images, 1)
    values = together * pool_values(x)
    with on_device(x):
        run(
            pool_forward, programs if images else 0,
            x=strided(x), outs=tuple(map(strided, outs)), norms=tuple(norms), stats=stats,
            scratch=x.new_empty(programs * values * lanes.SIDE, dtype=acc_dtype(x)),
            sizes=Sizes(*map(pack, (channels, height, width, values, together, parts))),
            momentum=momentum, eps=eps, TRAINING=training, LANES=lanes,
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
    stats, lanes = check_stats(stats, len(sizes) * channels, x), lanes_for(acc, x, *grads)
    grad_x, grad_norms = torch.empty_like(x, memory_format=torch.preserve_format), torch.empty_like(stats)
    if images == 0:
        return [grad_x], grad_norms.zero_()
    programs, values = triton.cdiv(channels, lanes.SIDE), images * pool_values(x)
    with on_device(x):
        run(
            pool_backward, programs,
            x=strided(x), grads=tuple(map(strided, grads)), norms=tuple(norms), stats=stats, grad_norms=grad_norms,
            grad_x=strided(grad_x), scratch=x.new_empty(programs * values * lanes.SIDE, dtype=acc_dtype(x)),
            sizes=Sizes(*map(pack, (channels, height, width, values, images, 1))), training=pack(training), LANES=lanes,
        )  # fmt: skip
    return [grad_x], grad_norms


Maps = Sequence[Tensor | None]


class Branches:
    """The maps of add_norm_relu, checked, forward or backward."""

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

    def packed(self, outs: Sequence[Tensor], grads: Sequence[Maps], norms: Sequence[Norm]) -> tuple[Branch, ...]:
        """The branches for a kernel. grads: in the backward, those of resampled maps and of added ones."""
        found, first = [], 0
        for b, ((low, map), channels) in enumerate(zip(self.pairs, self.channels, strict=True)):
            rows, columns = (1, 1) if low is None else low.shape[2:]
            maps = [low, map, outs[b], *(of_maps[b] for of_maps in grads)]
            views = [strided(outs[b] if given is None else given) for given in maps]
            views += [views[2]] * (5 - len(views))
            has = int(low is not None), int(map is not None)
            numbers = [pack(number) for number in (channels, first, rows, columns, *has)]
            found.append(Branch(*numbers, *views, norms[b]))  # type: ignore[call-arg]
            first += channels
        return tuple(found)

    def run(self, kernel: Any, layout: Tensor, parts: int, backward: bool, **arguments: Any) -> None:
        """layout: a map at the output's size. parts: programs that share the images of a group of channels."""
        maps = [map for pair in self.pairs for map in pair if map is not None]
        lanes, images = lanes_for(self.acc, layout, *maps), self.images // max(parts, 1)
        programs = sum(triton.cdiv(channels, lanes.SIDE) for channels in self.channels) * parts
        rows = max(0 if low is None else low.shape[2] for low, _ in self.pairs) if backward else 0
        values = images * (self.height + rows) * self.width
        scratch = layout.new_empty(programs * values * lanes.SIDE, dtype=acc_dtype(layout))
        sizes = Sizes(*map(pack, (sum(self.channels), self.height, self.width, values, images, parts)))
        with on_device(layout):
            run(kernel, programs, **arguments, scratch=scratch, sizes=sizes, LANES=lanes)

    def most(self, axis: int, outside: int) -> int:
        """Pixels between a cell's neighbours, at most: of the second cell, whose first neighbour has those up to the
        border, too, two and a half cells' width."""
        return max(0 if low is None else triton.cdiv(5 * outside, 2 * low.shape[axis]) + 1 for low, _ in self.pairs)


def split_joined(outs: Sequence[Tensor], channels: Sequence[int], joined: bool) -> Sequence[Tensor]:
    """The branches' parts of a joined map."""
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
    given = Branches(resampled, added, height, width, joined)
    norms = split_norms((weights, biases, means, variances), given.channels, given.like)
    outs = empty_sums(resampled, added, height, width, channels_last, joined)
    stats = empty_stats(given.like, weights)
    given.run(
        add_forward, outs[0], 1 if training and given.images else given.images, False,
        branches=given.packed(split_joined(outs, given.channels, joined), (), norms), stats=stats,
        momentum=momentum, eps=eps, TRAINING=training,
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
    given = Branches(resampled, added, height, width, joined)
    if len(grads) != 2:
        raise ValueError("there is a gradient of each output.")
    for grad, channels in zip(grads, [sum(given.channels)] if joined else given.channels, strict=False):
        check_map(grad, given.like, (given.images, channels, height, width))
    norms = split_norms((weights, biases), given.channels, given.like)
    stats = check_stats(stats, sum(given.channels), given.like)
    grad_maps = [
        [None if map is None else torch.empty_like(map, memory_format=torch.preserve_format) for map in maps]
        for maps in (resampled, added)
    ]
    grad_norms = torch.empty_like(stats)
    if given.images == 0:
        grad_norms.zero_()
    given.run(
        add_backward, grads[0], min(given.images, 1), True,
        branches=given.packed(split_joined(grads, given.channels, joined), grad_maps, norms), stats=stats,
        grad_norms=grad_norms, training=pack(training),
        most_rows=pack(given.most(2, height)), most_columns=pack(given.most(3, width)),
    )  # fmt: skip
    return [grad for grads in grad_maps for grad in grads if grad is not None], grad_norms
