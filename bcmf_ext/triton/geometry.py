"""Which label pixels a program works on, between which logits they lie, which label a flip brings
(csrc/common/geometry.h)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import QUADS, Pixels, ratio, unpack_axis, unpack_size


class Rectangle(NamedTuple):
    """The pixels of image n from row `top` and column `left` on; `bottom` and `right` lie behind it."""

    n: Any
    top: Any
    left: Any
    bottom: Any
    right: Any


class Pieces(NamedTuple):
    """The pieces of quads that a tile of image n consists of: one along y (`down`), and those from `across` on along
    x."""

    n: Any
    down: Any
    across: Any


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
    # Beyond the last logit's centre pixels are exact copies, so that ties stay ties.
    rest = tl.where(first + 1 < inside, numerator % denominator, 0)
    tl.store(axis.first + i, first.to(tl.int32), mask=i < outside)
    tl.store(axis.weight + i, ratio(rest.to(acc), (denominator + i * 0).to(acc)), mask=i < outside)

    quad = i - 1  # its first pixel is the least with a coordinate of at least `quad`
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
    """Fills the tables of both axes."""
    size, down, across = unpack_size(size), unpack_axis(down), unpack_axis(across)
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    zero = i * 0
    fill_axis(down, zero + size.rows, zero + size.height, i, ALIGN)
    fill_axis(across, zero + size.columns, zero + size.width, i, ALIGN)


@triton.jit
def tile_of(tile, logits, MODE: tl.constexpr, TILE: tl.constexpr):
    """The label pixels of a tile: an image, rows (ROWS, 1, 1) and columns (1, SPANS, SPAN). In mode QUADS a span is a
    piece of a quad; in other modes it is just SPAN pixels, and the tile a rectangle."""
    size, down, across = logits.size, logits.down, logits.across
    row = tl.arange(0, TILE.ROWS)[:, None, None]
    span = tl.arange(0, TILE.SPANS)[None, :, None]
    column = tl.arange(0, TILE.SPAN)[None, None, :]
    if MODE == QUADS:
        pieces = pieces_of(tile, logits, TILE)
        piece = pieces.across + span
        exists = piece < (size.columns + 1) * across.parts
        n = pieces.n
        y = tl.load(down.start + pieces.down // down.parts) + pieces.down % down.parts * TILE.ROWS + row
        x = tl.load(across.start + piece // across.parts, mask=exists, other=0)
        x += piece % across.parts * TILE.SPAN + column
        bottom = tl.load(down.start + pieces.down // down.parts + 1)
        right = tl.load(across.start + piece // across.parts + 1, mask=exists, other=0)
        inside = (y < bottom) & (x < right)
    else:
        n, top, left = corner_of(tile, size, TILE)
        y = top + row
        x = left + span * TILE.SPAN + column
        inside = (y < size.height) & (x < size.width)
    return Pixels(n, y, x, inside)


@triton.jit
def corner_of(tile, size, TILE: tl.constexpr):
    """Image, first row and first column of a tile that is a rectangle."""
    across = tl.cdiv(size.width, TILE.SPANS * TILE.SPAN)
    down = tl.cdiv(size.height, TILE.ROWS)
    return tile // (across * down), tile // across % down * TILE.ROWS, tile % across * (TILE.SPANS * TILE.SPAN)


@triton.jit
def pieces_of(tile, logits, TILE: tl.constexpr):
    """Which pieces of quads a tile consists of."""
    across_tiles = tl.cdiv((logits.size.columns + 1) * logits.across.parts, TILE.SPANS)
    down_tiles = (logits.size.rows + 1) * logits.down.parts
    return Pieces(
        tile // (across_tiles * down_tiles), tile // across_tiles % down_tiles, tile % across_tiles * TILE.SPANS
    )


@triton.jit
def rectangle_of(tile, logits, MODE: tl.constexpr, TILE: tl.constexpr):
    """The rectangle around the pixels of `tile_of`, which they fill."""
    size, down, across = logits.size, logits.down, logits.across
    if MODE == QUADS:
        n, piece, first = pieces_of(tile, logits, TILE)
        last = tl.minimum(first + TILE.SPANS, (size.columns + 1) * across.parts) - 1
        top = tl.load(down.start + piece // down.parts) + piece % down.parts * TILE.ROWS
        bottom = tl.minimum(top + TILE.ROWS, tl.load(down.start + piece // down.parts + 1))
        left = tl.load(across.start + first // across.parts) + first % across.parts * TILE.SPAN
        left = tl.minimum(left, tl.load(across.start + first // across.parts + 1))
        right = tl.load(across.start + last // across.parts) + last % across.parts * TILE.SPAN + TILE.SPAN
        right = tl.minimum(right, tl.load(across.start + last // across.parts + 1))
    else:
        n, top, left = corner_of(tile, size, TILE)
        bottom = tl.minimum(top + TILE.ROWS, size.height)
        right = tl.minimum(left + TILE.SPANS * TILE.SPAN, size.width)
    return Rectangle(n, top, left, bottom, right)
