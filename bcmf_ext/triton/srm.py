"""bcmf::srm in Triton (csrc/cuda/kernels/srm.cuh). Maps are in channels_last; a program takes some pixels, and their
channels a block at a time.

No float is added atomically: the pixels of an image are sorted by the first entry of `low` that they read (their cell),
in torch's own stable sort, and each entry's gradient is a sum over the lists of nine cells.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import INTERPRETED
from ..ops import acc_dtype
from .common import Size, pack_size, ratio, unpack_size
from .integers import pack, unpack
from .launch import check_sides, on_device, power_of_two, run

RAW = tl.constexpr(11)  # channels: offsets x and y, and the logits of nine neighbours


class Block(NamedTuple):
    """Pixels of a program, and channels that are worked on together."""

    PIXELS: int
    CHANNELS: int


# A long line takes the interpreter as long as a short one.
PIXELS, MOST_CHANNELS = (1024, 64) if INTERPRETED else (32, 128)


class Taps(NamedTuple):
    """What is read along an axis: entries `first` and the two behind it; how much of each (`weight`), and how that
    changes with the position (`slope`)."""

    first: Any
    weight: Any
    slope: Any


class Mixed(NamedTuple):
    """The mixed offset of pixels, and what the neighbours' weights are made of: exp(logit − largest) / total."""

    x: Any
    y: Any
    largest: Any
    total: Any


class Kept(NamedTuple):
    """What `srm_pulls` leaves of pixels, (·, N · H · W) each: weights of the neighbours' offsets; derivatives of the
    total by the position; cells; how much is read, along x and then along y."""

    weights: Any
    pulls: Any
    cells: Any
    reads: Any


@triton.jit
def place_in_batch(index, size):
    """Image, row and column of pixels of the batch."""
    row = index // size.width
    return row // size.height, (row % size.height).to(tl.int32), (index % size.width).to(tl.int32)


@triton.jit
def load_raw(raw, n, y, x, channel, inside, size, ACC: tl.constexpr):
    """Entries of raw, at the border beyond it."""
    y = tl.minimum(tl.maximum(y, 0), size.height - 1)
    x = tl.minimum(tl.maximum(x, 0), size.width - 1)
    at = ((n * size.height + y) * size.width + x) * RAW + channel
    return tl.load(raw + at, mask=inside, other=0).to(ACC)


@triton.jit
def mix_offsets(raw, n, y, x, inside, size, ACC: tl.constexpr):
    """Δ of pixels, and their softmax."""
    largest = load_raw(raw, n, y, x, 2, inside, size, ACC)
    for q in tl.static_range(1, 9):
        largest = tl.maximum(largest, load_raw(raw, n, y, x, 2 + q, inside, size, ACC))  # leaves NaN out
    across, down, total = tl.zeros_like(largest), tl.zeros_like(largest), tl.zeros_like(largest)
    for q in tl.static_range(9):
        weight = tl.exp(load_raw(raw, n, y, x, 2 + q, inside, size, ACC) - largest)
        total += weight
        across += weight * load_raw(raw, n, y + (q // 3 - 1), x + (q % 3 - 1), 0, inside, size, ACC)
        down += weight * load_raw(raw, n, y + (q // 3 - 1), x + (q % 3 - 1), 1, inside, size, ACC)
    return Mixed(across / total, down / total, largest, total)


@triton.jit
def axis_tap(i, inside, outside, ACC: tl.constexpr):
    """Between which of `inside` entries pixel i of `outside` lies: the first, and the weight of the other."""
    numerator, denominator = tl.maximum((2 * i + 1) * inside - outside, 0), 2 * outside
    first = numerator // denominator
    rest = tl.where(first + 1 < inside, numerator % denominator, 0)
    return first.to(tl.int32), ratio(rest.to(ACC), (denominator + i * 0).to(ACC))


@triton.jit
def taps_at(position, inside, outside, ACC: tl.constexpr):
    """What is read at positions of an axis of `outside` pixels, from `inside` entries (csrc/common/srm.h)."""
    last = tl.cast(outside - 1, ACC)
    clamped = tl.where(position <= 0, 0.0, tl.where(position >= last, last, position))
    before = tl.where(clamped == clamped, clamped, 0.0).to(tl.int32)
    before = tl.minimum(before, tl.maximum(outside - 2, 0))
    t = clamped - before.to(ACC)
    within = ((position > 0) & (position < last)).to(ACC)
    wide = before.to(tl.int64)
    lower, lower_weight = axis_tap(wide, inside, outside, ACC)
    upper, upper_weight = axis_tap(tl.minimum(wide + 1, outside - 1), inside, outside, ACC)
    same = lower == upper
    a, b = (1 - t) * lower_weight, t * upper_weight
    c, d = (1 - t) - a, t - b
    weight = (tl.where(same, c + d, c), tl.where(same, a + b, a + d), tl.where(same, 0.0, b))
    rise = within * (upper_weight - lower_weight)
    slope = (
        tl.where(same, -rise, within * (lower_weight - 1)),
        tl.where(same, rise, within * (1 - upper_weight - lower_weight)),
        tl.where(same, 0.0, within * upper_weight),
    )
    return Taps(lower, weight, slope)


@triton.jit
def read_pixels(raw, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The pixels of a program: their index in the batch, and whether they exist; image, row and column; their mixed
    offsets; and what they read, along x and along y."""
    index = tl.program_id(0).to(tl.int64) * BLOCK.PIXELS + tl.arange(0, BLOCK.PIXELS)
    inside = index < size.pixels
    n, row, column = place_in_batch(index, size)
    mixed = mix_offsets(raw, n, row, column, inside, size, ACC)
    x = taps_at(column.to(ACC) + mixed.x, size.columns, size.width, ACC)
    y = taps_at(row.to(ACC) + mixed.y, size.rows, size.height, ACC)
    return index, inside, n, row, column, mixed, x, y


@triton.jit
def load_entries(low, n, x: Taps, y: Taps, a, b, c, wanted, size, ACC: tl.constexpr):
    """Channels c of the entries a rows and b columns behind the first ones that pixels read; 0 of those that are not
    wanted."""
    entry = (n * size.rows + y.first + a) * size.columns + x.first + b
    at = entry[:, None] * size.classes + c[None]
    return tl.load(low + at, mask=wanted[:, None] & (c < size.classes)[None], other=0).to(ACC)


@triton.jit
def srm_forward(low, raw, residual, out, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The output."""
    size = unpack_size(size)
    index, inside, n, _, _, _, x, y = read_pixels(raw, size, ACC, BLOCK)
    for first in range(0, size.classes, BLOCK.CHANNELS):
        c = first + tl.arange(0, BLOCK.CHANNELS)
        at = index[:, None] * size.classes + c[None]
        asked = inside[:, None] & (c < size.classes)[None]
        sums = tl.load(residual + at, mask=asked, other=0).to(ACC)
        for a in tl.static_range(3):
            for b in tl.static_range(3):
                weight = y.weight[a] * x.weight[b]  # what is read with a weight of 0 might be infinite
                sums += weight[:, None] * load_entries(low, n, x, y, a, b, c, inside & (weight != 0), size, ACC)
        tl.store(out + at, sums.to(out.dtype.element_ty), mask=asked)


@triton.jit
def srm_pulls(low, raw, grad, grad_raw, kept, size, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """The gradients of raw's logits, and what the kernels behind it need of each pixel."""
    size = unpack_size(size)
    index, inside, n, row, column, mixed, x, y = read_pixels(raw, size, ACC, BLOCK)
    across, down = tl.zeros_like(mixed.x), tl.zeros_like(mixed.y)
    for first in range(0, size.classes, BLOCK.CHANNELS):
        c = first + tl.arange(0, BLOCK.CHANNELS)
        asked = inside[:, None] & (c < size.classes)[None]
        upstream = tl.load(grad + index[:, None] * size.classes + c[None], mask=asked, other=0).to(ACC)
        for a in tl.static_range(3):
            for b in tl.static_range(3):
                of_x, of_y = y.weight[a] * x.slope[b], y.slope[a] * x.weight[b]
                wanted = inside & ((of_x != 0) | (of_y != 0))
                product = tl.sum(upstream * load_entries(low, n, x, y, a, b, c, wanted, size, ACC), 1)
                across += of_x * product
                down += of_y * product
    mean = across * mixed.x + down * mixed.y
    for q in tl.static_range(9):
        weight = tl.exp(load_raw(raw, n, row, column, 2 + q, inside, size, ACC) - mixed.largest) / mixed.total
        own = across * load_raw(raw, n, row + (q // 3 - 1), column + (q % 3 - 1), 0, inside, size, ACC)
        own += down * load_raw(raw, n, row + (q // 3 - 1), column + (q % 3 - 1), 1, inside, size, ACC)
        tl.store(kept.weights + q * size.pixels + index, weight, mask=inside)
        value = (weight * (own - mean)).to(grad_raw.dtype.element_ty)
        tl.store(grad_raw + index * RAW + (2 + q), value, mask=inside)
    tl.store(kept.pulls + index, across, mask=inside)
    tl.store(kept.pulls + size.pixels + index, down, mask=inside)
    tl.store(kept.cells + index, y.first * size.columns + x.first, mask=inside)
    for k in tl.static_range(3):
        tl.store(kept.reads + k * size.pixels + index, x.weight[k], mask=inside)
        tl.store(kept.reads + (3 + k) * size.pixels + index, y.weight[k], mask=inside)


@triton.jit
def is_source(i, d: tl.constexpr, length, FROM_BORDER: tl.constexpr):
    """Whether the pixel before place i, in direction d, has it as its neighbour; FROM_BORDER: whether the pixel at i
    has itself, in the place of one beyond the border."""
    other = i + d if FROM_BORDER else i - d
    exists = (other >= 0) & (other < length)
    return ~exists if FROM_BORDER else exists


@triton.jit
def srm_offsets(kept, grad_raw, size, BLOCK: tl.constexpr):
    """The gradients of raw's offsets: sums over the pixels that have them as a neighbour's."""
    size = unpack_size(size)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size.pixels
    _, y, x = place_in_batch(index, size)
    across = tl.zeros([BLOCK], kept.pulls.dtype.element_ty)
    down = tl.zeros_like(across)
    for q in tl.static_range(9):
        for border in tl.static_range(4):  # of rows, of columns
            by_row = is_source(y, q // 3 - 1, size.height, border // 2 == 1)
            by_column = is_source(x, q % 3 - 1, size.width, border % 2 == 1)
            found = inside & by_row & by_column
            source = index
            if border // 2 == 0:
                source -= (q // 3 - 1) * tl.cast(size.width, tl.int64)
            if border % 2 == 0:
                source -= q % 3 - 1
            weight = tl.load(kept.weights + q * size.pixels + source, mask=found, other=0)
            across += weight * tl.load(kept.pulls + source, mask=found, other=0)
            down += weight * tl.load(kept.pulls + size.pixels + source, mask=found, other=0)
    tl.store(grad_raw + index * RAW, across.to(grad_raw.dtype.element_ty), mask=inside)
    tl.store(grad_raw + index * RAW + 1, down.to(grad_raw.dtype.element_ty), mask=inside)


@triton.jit
def srm_low(grad, kept, listed, starts, grad_low, parts, size, CHANNELS: tl.constexpr):
    """The gradient of an entry of low, some channels of it. listed: the pixels of each image by their cells, which
    begin at `starts`."""
    size, parts = unpack_size(size), unpack(parts)
    part, entry = tl.program_id(0) % parts, tl.program_id(0).to(tl.int64) // parts
    cells, pixels = tl.cast(size.rows, tl.int64) * size.columns, tl.cast(size.height, tl.int64) * size.width
    n, y, x = entry // cells, entry // size.columns % size.rows, entry % size.columns
    c = (part * CHANNELS + tl.arange(0, CHANNELS)).to(tl.int64)
    sums = tl.zeros([CHANNELS], kept.reads.dtype.element_ty)
    for a in tl.static_range(3):
        for b in tl.static_range(3):
            there = (y >= a) & (x >= b)
            at = starts + n * (cells + 1) + (y - a) * size.columns + (x - b)
            begin, end = tl.load(at, mask=there, other=0), tl.load(at + 1, mask=there, other=0)
            for i in range(begin, end):
                pixel = n * pixels + tl.load(listed + n * pixels + i)
                weight = tl.load(kept.reads + (3 + a) * size.pixels + pixel)
                weight *= tl.load(kept.reads + b * size.pixels + pixel)
                upstream = tl.load(grad + pixel * size.classes + c, mask=c < size.classes, other=0).to(sums.dtype)
                sums += tl.where(weight != 0, weight * upstream, 0.0)
    to = grad_low + entry * size.classes + c
    tl.store(to, sums.to(grad_low.dtype.element_ty), mask=c < size.classes)


# --------------------------------------------------------------------------------------------------------------------
# Checks and launches


def check(low: Tensor, raw: Tensor, full: Tensor) -> None:
    """SRM has checked all this; it keeps a direct call of the op memory-safe. full: residual, or the upstream
    gradient."""
    if low.dim() != 4 or raw.dim() != 4:
        raise ValueError(f"maps have the shape (N, C, h, w), not {tuple(low.shape)} and {tuple(raw.shape)}.")
    (n, c, h, w), (height, width) = low.shape, raw.shape[2:]
    if not low.is_floating_point() or raw.dtype not in (low.dtype, acc_dtype(low)) or full.dtype != low.dtype:
        raise TypeError(f"maps are of one floating-point dtype, not {low.dtype}, {raw.dtype} and {full.dtype}.")
    if tuple(raw.shape[:2]) != (n, RAW.value) or tuple(full.shape) != (n, c, height, width):
        raise ValueError(f"raw and the output's map do not fit low: {tuple(raw.shape)}, {tuple(full.shape)}.")
    if min(h, w) < 1 or height < h or width < w or height * width >= 2**31 or c >= 2**24:
        raise ValueError(
            f"low, {tuple(low.shape)}, may not be larger than raw, {tuple(raw.shape)}, nor either too large."
        )
    check_sides(height, width)
    if not (low.device == raw.device == full.device):
        raise ValueError(f"maps are on one device, not on {low.device}, {raw.device} and {full.device}.")


class Call:
    """A call of the op, checked: its maps in channels_last, and what its kernels share."""

    def __init__(self, low: Tensor, raw: Tensor, full: Tensor) -> None:
        check(low, raw, full)
        self.low, self.raw, self.full = (map.contiguous(memory_format=torch.channels_last) for map in (low, raw, full))
        n, c, h, w = low.shape
        height, width = raw.shape[2:]
        self.pixels, self.acc = n * height * width, acc_dtype(low)
        self.size = pack_size(Size(c, height, width, h, w, self.pixels))
        self.block = Block(PIXELS, min(MOST_CHANNELS, power_of_two(c)))

    def run(self, kernel: Any, **arguments: Any) -> None:
        """Launches a kernel for all pixels and channels."""
        acc = tl.float64 if self.acc == torch.float64 else tl.float32
        programs = triton.cdiv(self.pixels, self.block.PIXELS)
        run(kernel, programs, low=self.low, raw=self.raw, **arguments, size=self.size, ACC=acc, BLOCK=self.block)


def empty_for(map: Tensor) -> Tensor:
    """An empty map in channels_last."""
    return torch.empty_like(map, memory_format=torch.channels_last)


def laid_out_as(map: Tensor, found: Tensor) -> Tensor:
    """What was found, in the layout of a map."""
    like = torch.empty_like(map)
    return found if like.stride() == found.stride() else like.copy_(found)


def srm(low: Tensor, raw: Tensor, residual: Tensor) -> Tensor:
    """The kernel of bcmf::srm_triton; see ops.py for shapes and dtypes.

    Raises:
        ValueError, TypeError: for maps that the op does not take.
    """
    with on_device(low):
        call = Call(low, raw, residual)
        out = empty_for(residual)
        call.run(srm_forward, residual=call.full, out=out)
        return laid_out_as(residual, out)


def srm_backward(grad: Tensor, low: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """The kernel of bcmf::srm_triton_backward: the gradients of low and raw.

    Raises:
        ValueError, TypeError: for maps that the op does not take.
    """
    with on_device(low):
        call = Call(low, raw, grad)
        grad_low, grad_raw = empty_for(low), empty_for(raw)
        if grad.numel() == 0:
            return torch.zeros_like(low), torch.zeros_like(raw)
        new, pixels = call.low.new_empty, call.pixels
        kept = Kept(
            new((9, pixels), dtype=call.acc), new((2, pixels), dtype=call.acc), new(pixels, dtype=torch.int32),
            new((6, pixels), dtype=call.acc),
        )  # fmt: skip
        call.run(srm_pulls, grad=call.full, grad_raw=grad_raw, kept=kept)
        run(srm_offsets, triton.cdiv(pixels, PIXELS), kept=kept, grad_raw=grad_raw, size=call.size, BLOCK=PIXELS)
        n, c, h, w = low.shape
        cells, listed = kept.cells.view(n, -1).sort(dim=1, stable=True)
        starts = torch.searchsorted(cells, torch.arange(h * w + 1, dtype=torch.int32, device=low.device).repeat(n, 1))
        parts = triton.cdiv(c, call.block.CHANNELS)
        run(
            srm_low, n * h * w * parts, grad=call.full, kept=kept, listed=listed, starts=starts, grad_low=grad_low,
            parts=pack(parts), size=call.size, CHANNELS=call.block.CHANNELS,
        )  # fmt: skip
        return laid_out_as(low, grad_low), laid_out_as(raw, grad_raw)
