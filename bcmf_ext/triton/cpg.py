"""CPG, where labels differ (csrc/cuda/kernels/cpg.cuh): in a tile with an edge, the pixels compared (the edges) and
those near one are listed, and worked on class by class; all other tiles are done after a look at their labels.

A program works on one tile after another. It looks at neighbours in scratch memory of its own, which stays in the
caches: the entries of the tile and MARGIN pixels around it, row by row. Beyond the image they are copies of its border,
and the gradient of a copy goes to the pixel that it stands for. G and its estimate are kept times UNIT, a number that
makes the taps integers; G is exact then.

Three kernels share all this: `cpg_compare` in the forward, `cpg_shares` and `sparse_backward` in the backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    CPG_COUNT,
    CPG_SUM,
    QUADS,
    Partials,
    Pixels,
    TileShape,
    class_at,
    place_of,
    ratio,
    stats_at,
    store_partial,
    unpack_labels,
    unpack_logits,
    unpack_map,
)
from .common import EDGES as COMPARED
from .geometry import rectangle_of, tile_of
from .gradient import Asked, TermWeights, asked_of, gradient_of, store_gradient
from .integers import unpack
from .logits import entry
from .low_gather import add_to_quads, corner_weights

# The arrays of a program, each of COUNT entries: of integers, and of numbers.
IDS, EDGES, EDGE_LIST, NEAR_LIST, OWN_LIST = (tl.constexpr(array) for array in range(5))
P, RESIDUAL_X, RESIDUAL_Y, G, PLANE = (tl.constexpr(array) for array in range(5))
ARRAYS = tl.constexpr(5)
NO_CLASS = tl.constexpr(1 << 30)


class Window(NamedTuple):
    """The windows of a kernel, and the entries around a tile. All of it is known when a kernel is compiled."""

    RADIUS: int
    ONLY_VALID: bool  # whether an ignored label in a pixel's window keeps it from being compared
    MARGIN: int  # pixels around a tile
    WIDE: int  # entries of a row
    COUNT: int  # entries in all
    LANES: int  # the power of two that holds them
    BLOCK: int  # entries that are worked on together
    V: int  # places for a row of a window
    PART: int  # places that are worked on together
    PARTS: int  # of a window
    UNIT: int


def window_for(tile: TileShape, radius: int, only_valid: bool, margin: int, block: int, rows: int) -> Window:
    """The windows for a tile. rows: so many rows of a window are looked at together."""
    wide = tile.SPANS * tile.SPAN + 2 * margin
    count = (tile.ROWS + 2 * margin) * wide
    v, unit = 4 if radius == 1 else 8, {1: 2, 2: 20, 3: 780}[radius]
    part = v * min(rows, triton.next_power_of_2(2 * radius + 1))
    parts = triton.cdiv(v * (2 * radius + 1), part)
    return Window(
        RADIUS=radius,
        ONLY_VALID=only_valid,
        MARGIN=margin,
        WIDE=wide,
        COUNT=count,
        LANES=triton.next_power_of_2(count),
        BLOCK=block,
        V=v,
        PART=part,
        PARTS=parts,
        UNIT=unit,
    )


class Scratch(NamedTuple):
    """The scratch memory of a program, or of all programs one after another: ARRAYS of each kind."""

    integers: Any
    numbers: Any


class Lists(NamedTuple):
    """The lengths of the lists of a tile: edges, entries near an edge, and those of them that stand for the tile's own
    pixels. Then the first class to look at, NO_CLASS where there is no edge."""

    edges: Any
    near: Any
    own: Any
    first_class: Any


class Gradients(NamedTuple):
    """G of a class and its estimate, times UNIT, at entries `at`, of which only `some` exist."""

    at: Any
    some: Any
    x: Any
    y: Any
    estimate_x: Any
    estimate_y: Any


# --------------------------------------------------------------------------------------------------------------------
# Entries and windows


@triton.jit
def own_scratch(scratch, W: tl.constexpr):
    """The part of the scratch memory that is the program's own."""
    offset = tl.program_id(0).to(tl.int64) * (ARRAYS * W.COUNT)
    return Scratch(scratch.integers + offset, scratch.numbers + offset)


@triton.jit
def append(list, count, wanted, at):
    """Adds the entries that are wanted, in order; how many there are now."""
    flags = wanted.to(tl.int32)
    tl.store(list + count + tl.cumsum(flags, 0) - 1, at, mask=wanted)
    return count + tl.sum(flags, 0)


@triton.jit
def window_part(part, W: tl.constexpr):
    """Offsets u, v in a window and which of them exist, (PART, 1) each, of one of its PARTS; V places to a row.
    Columns descend, because Triton shares ascending ones, which are neighbours in memory, among threads, and a sum over
    a window should be a thread's own."""
    place = part * W.PART + tl.arange(0, W.PART)[:, None]
    u = place // W.V - W.RADIUS
    v = W.RADIUS - place % W.V
    return u, v, (u <= W.RADIUS) & (v >= -W.RADIUS)


@triton.jit
def taps(u, v, UNIT: tl.constexpr):
    """K_x and K_y times UNIT, exact integers."""
    squared = tl.maximum(u * u + v * v, 1)
    return UNIT * v // squared, UNIT * u // squared


@triton.jit
def pixels_of(at, size, rectangle, W: tl.constexpr):
    """Row and column of entries, in the image: those beyond it are copies of its border."""
    y = tl.minimum(tl.maximum(rectangle.top - W.MARGIN + at // W.WIDE, 0), size.height - 1)
    x = tl.minimum(tl.maximum(rectangle.left - W.MARGIN + at % W.WIDE, 0), size.width - 1)
    return y, x


@triton.jit
def ids_of(labels, size, rectangle, W: tl.constexpr):
    """The labels of all entries, −1 for one that is no class."""
    lane = tl.arange(0, W.LANES)
    y, x = pixels_of(lane, size, rectangle, W)
    return tl.maximum(class_at(labels, Pixels(rectangle.n, y, x, lane < W.COUNT), size.classes), -1)


@triton.jit
def next_class(ids, c, W: tl.constexpr):
    """The least class of the entries that is larger than c, or NO_CLASS."""
    return tl.min(tl.where((ids > c) & (tl.arange(0, W.LANES) < W.COUNT), ids, NO_CLASS))


# --------------------------------------------------------------------------------------------------------------------
# Lists


@triton.jit
def cpg_edges(scratch, size, rectangle, W: tl.constexpr):
    """Lists the entries whose windows hold more than one label and, if ONLY_VALID, no ignored one; how many there
    are."""
    PARTS: tl.constexpr = W.PARTS
    _, top, left, bottom, right = rectangle
    ids = scratch.integers + IDS * W.COUNT
    REACH: tl.constexpr = W.MARGIN - W.RADIUS  # how far around the tile G is compared
    count = 0
    for start in range(0, W.COUNT, W.BLOCK):
        at = start + tl.arange(0, W.BLOCK)
        y = top - W.MARGIN + at // W.WIDE
        x = left - W.MARGIN + at % W.WIDE
        own = tl.load(ids + at, mask=at < W.COUNT, other=-1)
        compared = (own >= 0) & (y >= 0) & (y < size.height) & (x >= 0) & (x < size.width)
        compared = compared & (y >= top - REACH) & (y < bottom + REACH) & (x >= left - REACH) & (x < right + REACH)
        differ = tl.full([W.BLOCK], 0, tl.int32)
        ignored = tl.full([W.BLOCK], 0, tl.int32)
        for part in tl.static_range(PARTS):
            u, v, exists = window_part(part, W)
            there = compared[None] & exists
            id = tl.load(ids + at[None] + (u * W.WIDE + v), mask=there, other=0)
            differ |= tl.max((there & (id != own[None])).to(tl.int32), 0)
            ignored |= tl.max((there & (id < 0)).to(tl.int32), 0)
        edge = compared & (differ > 0)
        if W.ONLY_VALID:
            edge = edge & (ignored == 0)
        tl.store(scratch.integers + EDGES * W.COUNT + at, edge.to(tl.int32), mask=at < W.COUNT)
        count = append(scratch.integers + EDGE_LIST * W.COUNT, count, edge, at)
    tl.debug_barrier()
    return count


@triton.jit
def find_near(scratch, size, rectangle, W: tl.constexpr):
    """Lists the entries with an edge in their window; and of these the tile's own pixels and copies of them. How many
    there are of each."""
    PARTS: tl.constexpr = W.PARTS
    _, top, left, bottom, right = rectangle
    near_count = 0
    own_count = 0
    for start in range(0, W.COUNT, W.BLOCK):
        at = start + tl.arange(0, W.BLOCK)
        found = tl.full([W.BLOCK], 0, tl.int32)
        for part in tl.static_range(PARTS):
            u, v, exists = window_part(part, W)
            # Edges are a radius away from where a row goes over into the next.
            other = at[None] + (u * W.WIDE + v)
            there = exists & (other >= 0) & (other < W.COUNT)
            found |= tl.max(tl.load(scratch.integers + EDGES * W.COUNT + other, mask=there, other=0), 0)
        near = (found > 0) & (at < W.COUNT)
        near_count = append(scratch.integers + NEAR_LIST * W.COUNT, near_count, near, at)
        y, x = pixels_of(at, size, rectangle, W)
        own = near & (y >= top) & (y < bottom) & (x >= left) & (x < right)
        own_count = append(scratch.integers + OWN_LIST * W.COUNT, own_count, own, at)
    tl.debug_barrier()
    return near_count, own_count


@triton.jit
def list_entries(scratch, ids, size, rectangle, BACKWARD: tl.constexpr, W: tl.constexpr):
    """Lists the entries around a tile that there is something to do for: none where all labels are the same. In the
    backward it also clears the numbers that another tile's classes have left behind."""
    lane = tl.arange(0, W.LANES)
    edges = tl.full((), 0, tl.int32)
    near = tl.full((), 0, tl.int32)
    own = tl.full((), 0, tl.int32)
    first_class = tl.full((), NO_CLASS, tl.int32)
    if tl.max(tl.where(lane < W.COUNT, ids, -1)) != tl.min(tl.where(lane < W.COUNT, ids, NO_CLASS)):
        # The tile before is done with: each step ends with a barrier.
        tl.store(scratch.integers + IDS * W.COUNT + lane, ids, mask=lane < W.COUNT)
        if BACKWARD:
            for array in tl.static_range(1, ARRAYS):
                zeros = tl.full([W.LANES], 0, scratch.numbers.dtype.element_ty)
                tl.store(scratch.numbers + array * W.COUNT + lane, zeros, mask=lane < W.COUNT)
        tl.debug_barrier()
        edges = cpg_edges(scratch, size, rectangle, W)
        near, own = find_near(scratch, size, rectangle, W)
        first_class = tl.where(edges > 0, tl.min(tl.where(ids >= 0, ids, NO_CLASS)), NO_CLASS)
    return Lists(edges, near, own, first_class)


# --------------------------------------------------------------------------------------------------------------------
# Steps for one class


@triton.jit
def find_probabilities(scratch, count, c, logits, stats, rectangle, READ: tl.constexpr, W: tl.constexpr):
    """Finds p of a class, wherever a window looks at it."""
    for start in range(0, count, W.BLOCK):
        i = start + tl.arange(0, W.BLOCK)
        some = i < count
        at = tl.load(scratch.integers + NEAR_LIST * W.COUNT + i, mask=some, other=0)
        y, x = pixels_of(at, logits.size, rectangle, W)
        pixels = Pixels(rectangle.n, y, x, some)
        own = stats_at(stats, logits.size, pixels)
        z = entry(logits, pixels, c, READ)
        tl.store(scratch.numbers + P * W.COUNT + at, tl.exp((z - own.m) - own.log_sum), mask=some)
    tl.debug_barrier()


@triton.jit
def gradients_at(scratch, start, count, c, ACC: tl.constexpr, W: tl.constexpr):
    """The gradients of class c at edges of the list, from `start` on."""
    PARTS: tl.constexpr = W.PARTS
    i = start + tl.arange(0, W.BLOCK)
    some = i < count
    at = tl.load(scratch.integers + EDGE_LIST * W.COUNT + i, mask=some, other=0)
    gx = tl.full([W.BLOCK], 0, ACC)
    gy = tl.full([W.BLOCK], 0, ACC)
    px = tl.full([W.BLOCK], 0, ACC)
    py = tl.full([W.BLOCK], 0, ACC)
    for part in tl.static_range(PARTS):
        u, v, exists = window_part(part, W)
        tap_x, tap_y = taps(u, v, W.UNIT)
        there = some[None] & exists
        other = at[None] + (u * W.WIDE + v)
        is_class = there & (tl.load(scratch.integers + IDS * W.COUNT + other, mask=there, other=-1) == c)
        p = tl.load(scratch.numbers + P * W.COUNT + other, mask=there, other=0)
        gx += tl.sum(tl.where(is_class, tap_x.to(ACC), 0.0), 0)
        gy += tl.sum(tl.where(is_class, tap_y.to(ACC), 0.0), 0)
        px += tl.sum(tap_x.to(ACC) * p, 0)
        py += tl.sum(tap_y.to(ACC) * p, 0)
    return Gradients(at, some, gx, gy, px, py)


@triton.jit
def add_errors(error, compared, scratch, count, c, ACC: tl.constexpr, W: tl.constexpr):
    """Adds (G − its estimate)² of class c and what was compared."""
    for start in range(0, count, W.BLOCK):
        _, _, gx, gy, px, py = gradients_at(scratch, start, count, c, ACC, W)
        dx = tl.where(gx != 0, gx - px, 0.0) * (1.0 / W.UNIT)
        dy = tl.where(gy != 0, gy - py, 0.0) * (1.0 / W.UNIT)
        error += dx * dx + dy * dy
        compared += (gx != 0).to(ACC) + (gy != 0).to(ACC)
    tl.debug_barrier()
    return error, compared


@triton.jit
def cpg_residuals(scratch, count, c, scale, ACC: tl.constexpr, W: tl.constexpr):
    """Finds the derivatives of the total by the estimates of class c, which are kept times UNIT."""
    for start in range(0, count, W.BLOCK):
        at, some, gx, gy, px, py = gradients_at(scratch, start, count, c, ACC, W)
        residual_x = tl.where(gx != 0, scale * (px - gx), 0.0)
        residual_y = tl.where(gy != 0, scale * (py - gy), 0.0)
        tl.store(scratch.numbers + RESIDUAL_X * W.COUNT + at, residual_x, mask=some)
        tl.store(scratch.numbers + RESIDUAL_Y * W.COUNT + at, residual_y, mask=some)
    tl.debug_barrier()


@triton.jit
def find_derivatives(scratch, count, ACC: tl.constexpr, W: tl.constexpr):
    """Finds g, the derivative of the total by p, at the tile's own entries and copies of them."""
    PARTS: tl.constexpr = W.PARTS
    for start in range(0, count, W.BLOCK):
        i = start + tl.arange(0, W.BLOCK)
        some = i < count
        at = tl.load(scratch.integers + OWN_LIST * W.COUNT + i, mask=some, other=0)
        g = tl.full([W.BLOCK], 0, ACC)
        for part in tl.static_range(PARTS):
            u, v, exists = window_part(part, W)
            tap_x, tap_y = taps(u, v, W.UNIT)
            there = some[None] & exists
            other = at[None] - (u * W.WIDE + v)  # its window has this entry at (u, v)
            residual_x = tl.load(scratch.numbers + RESIDUAL_X * W.COUNT + other, mask=there, other=0)
            residual_y = tl.load(scratch.numbers + RESIDUAL_Y * W.COUNT + other, mask=there, other=0)
            g += tl.sum(tap_x.to(ACC) * residual_x + tap_y.to(ACC) * residual_y, 0)
        tl.store(scratch.numbers + G * W.COUNT + at, g, mask=some)
    tl.debug_barrier()


@triton.jit
def differentiate(scratch, lists, c, scale, logits, stats, rectangle, READ: tl.constexpr, W: tl.constexpr):
    """Finds p and g of class c, into scratch memory."""
    find_probabilities(scratch, lists.near, c, logits, stats, rectangle, READ, W)
    cpg_residuals(scratch, lists.edges, c, scale, READ.ACC, W)
    find_derivatives(scratch, lists.own, READ.ACC, W)


@triton.jit
def fold(g, at, pixels, size, rectangle, W: tl.constexpr):
    """g of pixels, and of their copies beyond the border."""
    PARTS: tl.constexpr = W.PARTS
    _, top, left, bottom, right = rectangle
    _, y, x, some = pixels
    total = tl.load(g + at, mask=some, other=0)
    if (top == 0) | (left == 0) | (bottom == size.height) | (right == size.width):
        for part in tl.static_range(PARTS):
            u, v, exists = window_part(part, W)
            there = some[None] & exists & ((u != 0) | (v != 0))
            there = there & ((u >= 0) | (y == 0)[None]) & ((u <= 0) | (y == size.height - 1)[None])
            there = there & ((v >= 0) | (x == 0)[None]) & ((v <= 0) | (x == size.width - 1)[None])
            total += tl.sum(tl.load(g + at[None] + (u * W.WIDE + v), mask=there, other=0), 0)
    return total


@triton.jit
def own_pixels(scratch, start, count, size, rectangle, W: tl.constexpr):
    """The tile's own pixels of the list, from `start` on; their entries, and p and g of the class."""
    i = start + tl.arange(0, W.BLOCK)
    at = tl.load(scratch.integers + OWN_LIST * W.COUNT + i, mask=i < count, other=0)
    y = rectangle.top - W.MARGIN + at // W.WIDE
    x = rectangle.left - W.MARGIN + at % W.WIDE
    some = (i < count) & (y >= rectangle.top) & (y < rectangle.bottom) & (x >= rectangle.left) & (x < rectangle.right)
    pixels = Pixels(rectangle.n, y, x, some)
    g = fold(scratch.numbers + G * W.COUNT, at, pixels, size, rectangle, W)
    return pixels, at, tl.load(scratch.numbers + P * W.COUNT + at, mask=some, other=0), g


@triton.jit
def residual_scale(upstream, cpg_weight, ACC: tl.constexpr, W: tl.constexpr):
    """The factor that makes a residual of a difference of G and its estimate, both times UNIT."""
    scale = 2 * tl.full((), cpg_weight, ACC) * tl.load(upstream.grad_total)
    return ratio(scale, tl.load(upstream.summary + COMPARED)) * (1.0 / (W.UNIT * W.UNIT))


# --------------------------------------------------------------------------------------------------------------------
# The kernels


@triton.jit
def cpg_compare(
    logits, labels, stats, partials, scratch, tiles,
    READ: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Partial sums of (G − its estimate)² and of |M|."""
    logits, labels, scratch = unpack_logits(logits), unpack_labels(labels), own_scratch(scratch, W)
    partials = Partials(partials.data, unpack(partials.length))
    for tile in range(tl.program_id(0), unpack(tiles), tl.num_programs(0)):
        rectangle = rectangle_of(tile, logits, READ.MODE, TILE)
        ids = ids_of(labels, logits.size, rectangle, W)
        error = tl.full([W.BLOCK], 0, READ.ACC)
        compared = tl.full([W.BLOCK], 0, READ.ACC)
        lists = list_entries(scratch, ids, logits.size, rectangle, False, W)
        c = lists.first_class
        while c < NO_CLASS:
            find_probabilities(scratch, lists.near, c, logits, stats, rectangle, READ, W)
            error, compared = add_errors(error, compared, scratch, lists.edges, c, READ.ACC, W)
            c = next_class(ids, c, W)
        store_partial(partials, CPG_SUM, tile, error)
        store_partial(partials, CPG_COUNT, tile, compared)


@triton.jit
def cpg_shares(
    logits, labels, upstream, scratch, tiles, cpg_weight: tl.float64,
    READ: tl.constexpr, TILE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Adds s = Σ_c p_c g_c of each pixel to the shares, which are 0."""
    logits, labels, scratch = unpack_logits(logits), unpack_labels(labels), own_scratch(scratch, W)
    scale = residual_scale(upstream, cpg_weight, READ.ACC, W)
    for tile in range(tl.program_id(0), unpack(tiles), tl.num_programs(0)):
        rectangle = rectangle_of(tile, logits, READ.MODE, TILE)
        ids = ids_of(labels, logits.size, rectangle, W)
        lists = list_entries(scratch, ids, logits.size, rectangle, True, W)
        c = lists.first_class
        while c < NO_CLASS:
            differentiate(scratch, lists, c, scale, logits, upstream.stats, rectangle, READ, W)
            for start in range(0, lists.own, W.BLOCK):
                pixels, _, p, g = own_pixels(scratch, start, lists.own, logits.size, rectangle, W)
                share = upstream.shares + place_of(logits.size, pixels)
                tl.store(share, tl.load(share, mask=pixels.inside, other=0) + p * g, mask=pixels.inside)
            tl.debug_barrier()
            c = next_class(ids, c, W)


@triton.jit
def sparse_backward(
    logits, labels, upstream, grad, scratch, tiles,
    cpg_weight: tl.float64, bcl_weight: tl.float64, alpha: tl.float64, beta: tl.float64,
    READ: tl.constexpr, TERMS: tl.constexpr, TILE: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """p_c g_c, class by class: puts whole entries into `grad` (N, C, H, W), or adds to what `dense_backward` has summed
    up for the corners of quads."""
    logits, labels, scratch = unpack_logits(logits), unpack_labels(labels), own_scratch(scratch, W)
    grad, size = unpack_map(grad), logits.size
    weights = TermWeights(bcl_weight, alpha, beta)
    scale = residual_scale(upstream, cpg_weight, READ.ACC, W)
    for tile in range(tl.program_id(0), unpack(tiles), tl.num_programs(0)):
        rectangle = rectangle_of(tile, logits, READ.MODE, TILE)
        ids = ids_of(labels, size, rectangle, W)
        lists = list_entries(scratch, ids, size, rectangle, True, W)
        c = lists.first_class
        while c < NO_CLASS:
            differentiate(scratch, lists, c, scale, logits, upstream.stats, rectangle, READ, W)
            for start in range(0, lists.own, W.BLOCK):
                pixels, at, p, g = own_pixels(scratch, start, lists.own, size, rectangle, W)
                if READ.MODE == QUADS:
                    tl.store(scratch.numbers + PLANE * W.COUNT + at, p * g, mask=pixels.inside)
                else:
                    asked = asked_of(logits, labels, pixels, upstream, weights, READ, TERMS)
                    asked = Asked(asked.label, asked.selected, asked.pull, asked.factor + g)
                    value = gradient_of(c, p, asked, labels, size, pixels, upstream, weights, READ.ACC, TERMS)
                    store_gradient(grad, pixels, c, value, pixels.inside)
            tl.debug_barrier()
            if READ.MODE == QUADS:
                add_products(grad, tile, logits, c, scratch, rectangle, TILE, W)
            c = next_class(ids, c, W)


@triton.jit
def add_products(grad, tile, logits, c, scratch, rectangle, TILE: tl.constexpr, W: tl.constexpr):
    """Adds p g of class c to the sums for the corners of a tile's quads."""
    pixels = tile_of(tile, logits, QUADS, TILE)
    at = (pixels.y - rectangle.top + W.MARGIN) * W.WIDE + pixels.x - rectangle.left + W.MARGIN
    products = tl.load(scratch.numbers + PLANE * W.COUNT + at, mask=pixels.inside, other=0)
    corners = corner_weights(tile, logits, pixels, TILE)
    add_to_quads(grad, tile, logits, c + tl.full([1, 1], 0, tl.int32), products[None], corners, TILE, True)
    tl.debug_barrier()
