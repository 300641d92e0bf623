"""The way of gradients back to logits of another size: gathered, in a fixed order.

Of few logits for many labels, a tile of a quad sums up what it has for the four corners, and `low_gather_quads` adds
that up for each logit. Otherwise gradients of all label pixels are written, and `low_gather_pixels` adds them up.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import unpack_logits, unpack_map
from .geometry import pieces_of
from .integers import unpack


@triton.jit
def corner_weights(tile, logits, pixels, TILE: tl.constexpr):
    """The shares of a tile's pixels that go to the logits below and to the right: (ROWS, 1, 1) and (1, SPANS, SPAN).
    All of the quad before the first logit goes to that logit."""
    size, down, across = logits.size, logits.down, logits.across
    _, piece, first_piece = pieces_of(tile, logits, TILE)
    pieces = first_piece + tl.arange(0, TILE.SPANS)[None, :, None]
    lower = tl.load(down.weight + pixels.y, mask=pixels.y < size.height, other=0)
    right = tl.load(across.weight + pixels.x, mask=pixels.x < size.width, other=0)
    return tl.where(piece < down.parts, 1.0, lower), tl.where(pieces < across.parts, 1.0, right)


@triton.jit
def add_to_quads(sums, tile, logits, c, gradient, corners, TILE: tl.constexpr, ADD: tl.constexpr):
    """Sums up a tile's gradients (classes, ROWS, SPANS, SPAN), 0 outside, for the corners of its pieces of quads, and
    puts that into `sums` (N, C, 4, pieces down, pieces across), or ADDs it to what is there. c: (classes, 1)."""
    n, piece, first_piece = pieces_of(tile, logits, TILE)
    pieces = first_piece + tl.arange(0, TILE.SPANS)[None, :]
    count = (logits.size.columns + 1) * logits.across.parts
    lower_weight, right_weight = corners
    lower_weight = lower_weight[None]
    above = tl.sum(gradient * (1 - lower_weight), 1)
    below = tl.sum(gradient * lower_weight, 1)
    to = sums.data + tl.cast(n, tl.int64) * sums.stride_n + tl.cast(c, tl.int64) * sums.stride_c
    to += tl.cast(piece, tl.int64) * count + pieces
    some = (pieces < count) & (c < logits.size.classes)
    plane = tl.cast(sums.stride_h, tl.int64)
    put(to, tl.sum(above * (1 - right_weight), 2), some, ADD)
    put(to + plane, tl.sum(above * right_weight, 2), some, ADD)
    put(to + 2 * plane, tl.sum(below * (1 - right_weight), 2), some, ADD)
    put(to + 3 * plane, tl.sum(below * right_weight, 2), some, ADD)


@triton.jit
def put(to, value, some, ADD: tl.constexpr):
    """Stores values, or ADDs them to what is there."""
    if ADD:
        value += tl.load(to, mask=some, other=0)
    tl.store(to, value, mask=some)


@triton.jit
def cell_of(index, size):
    """Image, class, row and column of logit `index`."""
    row = index // size.columns
    plane = row // size.rows
    return plane // size.classes, plane % size.classes, row % size.rows, index % size.columns


@triton.jit
def low_gather_quads(sums, logits, grad, count, BLOCK: tl.constexpr):
    """The gradient of each logit: of the four quads around it, the corners that it is."""
    sums, logits, grad = unpack_map(sums), unpack_logits(logits), unpack_map(grad)
    down, across = logits.down, logits.across
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < unpack(count)
    n, c, row, column = cell_of(index, logits.size)
    base = sums.data + n * sums.stride_n + c * sums.stride_c
    pieces = (logits.size.columns + 1) * across.parts
    total = tl.full([BLOCK], 0, sums.data.dtype.element_ty)
    for i in range(2 * down.parts):  # pieces of the quad above the logit, whose lower corners it is; then of that below
        is_lower = i < down.parts
        at_row = base + (row * down.parts + i) * pieces + tl.where(is_lower, 2 * tl.cast(sums.stride_h, tl.int64), 0)
        for j in range(2 * across.parts):
            corner = tl.where(j < across.parts, sums.stride_h, 0)
            total += tl.load(at_row + column * across.parts + j + corner, mask=inside, other=0)
    to = grad.data + n * grad.stride_n + c * grad.stride_c + row * grad.stride_h + column * grad.stride_w
    tl.store(to, total.to(grad.data.dtype.element_ty), mask=inside)


@triton.jit
def low_gather_pixels(sums, logits, grad, count, most_rows, most_columns, BLOCK: tl.constexpr):
    """The gradient of each logit from those of label pixels, `sums` (N, C, H, W): of the quads above and below it
    (left and right), which have at most `most_rows` rows (`most_columns` columns)."""
    sums, logits, grad = unpack_map(sums), unpack_logits(logits), unpack_map(grad)
    most_rows, most_columns = unpack(most_rows), unpack(most_columns)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < unpack(count)
    n, c, row, column = cell_of(index, logits.size)
    base = sums.data + n * sums.stride_n + c * sums.stride_c
    top = tl.load(logits.down.start + row, mask=inside, other=0)
    left = tl.load(logits.across.start + column, mask=inside, other=0)
    total = tl.full([BLOCK], 0, sums.data.dtype.element_ty)
    for i in range(most_rows):
        y = top + i
        share_y, some_y = share_of(logits.down, row, y, inside)
        line = tl.full([BLOCK], 0, sums.data.dtype.element_ty)
        for j in range(most_columns):
            x = left + j
            share, some = share_of(logits.across, column, x, some_y)
            line += share * tl.load(base + y * sums.stride_h + x * sums.stride_w, mask=some, other=0)
        total += share_y * line
    to = grad.data + n * grad.stride_n + c * grad.stride_c + row * grad.stride_h + column * grad.stride_w
    tl.store(to, total.to(grad.data.dtype.element_ty), mask=inside)


@triton.jit
def share_of(axis, cell, i, inside):
    """The weight with which pixel i was resampled from a cell; and whether it was at all."""
    start = tl.load(axis.start + cell + 1, mask=inside, other=0)
    some = inside & (i < tl.load(axis.start + cell + 2, mask=inside, other=0))
    weight = tl.load(axis.weight + i, mask=some, other=0)
    weight = tl.where(cell == 0, tl.where(i < start, 1.0, weight), weight)  # before the first logit
    return tl.where(i < start, weight, 1 - weight), some
