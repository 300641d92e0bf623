"""Which label pixels a program works on, between which logits they lie, which label a flip brings
(csrc/device/geometry.cuh)."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import QUADS, ratio


@triton.jit
def flip(i, STEP: tl.constexpr, length):
    """π_s of BCL: swaps neighbouring groups of STEP; an index whose partner would lie outside stays."""
    partner = tl.where(i // STEP % 2 == 0, i + STEP, i - STEP)
    return tl.where(partner < length, partner, i)


@triton.jit
def fill_axis(axis, inside, outside, i, ALIGN: tl.constexpr):
    """Entries i of all tables, of `inside` logits and `outside` pixels. In integers: floating point picks another
    `first` where the coordinate is almost one."""
    acc = axis.weight.dtype.element_ty
    if ALIGN:
        numerator, denominator = i * (inside - 1), tl.maximum(outside - 1, 1)
    else:
        numerator, denominator = tl.maximum((2 * i + 1) * inside - outside, 0), 2 * outside
    first = numerator // denominator
    # Beyond the last centre: exact copies, so that ties stay ties.
    rest = tl.where(first + 1 < inside, numerator % denominator, 0)
    tl.store(axis.first + i, first.to(tl.int32), mask=i < outside)
    tl.store(axis.weight + i, ratio(rest.to(acc), (denominator + i * 0).to(acc)), mask=i < outside)

    quad = i - 1  # its first pixel: the least with a coordinate of at least `quad`
    if ALIGN:
        # A single pixel lies at logit 0.
        least = quad * tl.maximum(outside - 1, 1)
        unit = tl.where(outside > 1, tl.maximum(inside - 1, 1), 1)
    else:
        least, unit = 2 * quad * outside + outside - inside, 2 * inside
    start = tl.minimum((tl.maximum(least, 0) + unit - 1) // unit, outside)
    start = tl.where(quad < inside, start, outside)
    tl.store(axis.start + i, tl.where(quad < 0, 0, start).to(tl.int32), mask=quad <= inside)


@triton.jit
def fill_axes(size, down, across, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """The tables of both axes."""
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    zero = i * 0
    fill_axis(down, zero + size.rows, zero + size.height, i, ALIGN)
    fill_axis(across, zero + size.columns, zero + size.width, i, ALIGN)


@triton.jit
def tile_of(tile, size, down, across, MODE: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr):
    """The label pixels of a tile: image n, rows y (ROWS, 1, 1), columns x (1, SPANS, SPAN), and which of them are
    inside. In mode QUADS a span is a piece of a quad, in other modes just SPAN pixels, and the tile a rectangle."""
    row = tl.arange(0, ROWS)[:, None, None]
    span = tl.arange(0, SPANS)[None, :, None]
    column = tl.arange(0, SPAN)[None, None, :]
    if MODE == QUADS:
        n, down_piece, first_piece = quads_of(tile, size, down, across, SPANS)
        piece = first_piece + span
        exists = piece < (size.columns + 1) * across.parts
        y = tl.load(down.start + down_piece // down.parts) + down_piece % down.parts * ROWS + row
        x = tl.load(across.start + piece // across.parts, mask=exists, other=0) + piece % across.parts * SPAN + column
        bottom = tl.load(down.start + down_piece // down.parts + 1)
        right = tl.load(across.start + piece // across.parts + 1, mask=exists, other=0)
        inside = (y < bottom) & (x < right)
    else:
        n, top, left = corner_of(tile, size, ROWS, SPANS * SPAN)
        y = top + row
        x = left + span * SPAN + column
        inside = (y < size.height) & (x < size.width)
    return n, y, x, inside


@triton.jit
def corner_of(tile, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Image, first row and first column of a tile that is a rectangle."""
    across = tl.cdiv(size.width, COLUMNS)
    down = tl.cdiv(size.height, ROWS)
    return tile // (across * down), tile // across % down * ROWS, tile % across * COLUMNS


@triton.jit
def quads_of(tile, size, down, across, SPANS: tl.constexpr):
    """Image, piece of a quad along y, and the first of SPANS pieces along x."""
    across_tiles = tl.cdiv((size.columns + 1) * across.parts, SPANS)
    down_tiles = (size.rows + 1) * down.parts
    return tile // (across_tiles * down_tiles), tile // across_tiles % down_tiles, tile % across_tiles * SPANS


@triton.jit
def rectangle(
    tile, size, down, across, MODE: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr
):  # fmt: skip
    """The same pixels as a rectangle: image, first row and column, and where rows and columns end."""
    if MODE == QUADS:
        n, down_piece, first_piece = quads_of(tile, size, down, across, SPANS)
        last_piece = tl.minimum(first_piece + SPANS, (size.columns + 1) * across.parts) - 1
        top = tl.load(down.start + down_piece // down.parts) + down_piece % down.parts * ROWS
        bottom = tl.minimum(top + ROWS, tl.load(down.start + down_piece // down.parts + 1))
        left = tl.load(across.start + first_piece // across.parts) + first_piece % across.parts * SPAN
        left = tl.minimum(left, tl.load(across.start + first_piece // across.parts + 1))
        right = tl.load(across.start + last_piece // across.parts) + last_piece % across.parts * SPAN + SPAN
        right = tl.minimum(right, tl.load(across.start + last_piece // across.parts + 1))
    else:
        n, top, left = corner_of(tile, size, ROWS, SPANS * SPAN)
        bottom = tl.minimum(top + ROWS, size.height)
        right = tl.minimum(left + SPANS * SPAN, size.width)
    return n, top, left, bottom, right
