"""CPG, where labels differ (csrc/device/cpg.cuh): in a tile with an edge, the pixels compared (the edges) and those
near one are listed, and worked on class by class; all other tiles are done after a look at their labels.

A program works on one tile after another. It looks at neighbours in memory of its own, which stays in the caches: the
entries of the tile and MARGIN pixels around it, row by row. Beyond the image they are copies of its border, and the
gradient of a copy goes to the pixel that it stands for. G and its estimate are kept times a number that makes the
taps integers; G is exact then.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import EDGES as COMPARED
from .common import QUADS, class_at, double, pixel_at, ratio
from .geometry import rectangle, tile_of
from .gradient import gradient_of, pixel_pulls
from .logits import entry
from .quads import add_to_quads, corner_weights

# What is computed.
COMPARE = tl.constexpr(0)  # the forward's sums
SHARES = tl.constexpr(1)  # s = Σ_c p_c g_c of each pixel, g_c the derivative by p_c
GRADIENT = tl.constexpr(2)  # p_c g_c, class by class

# Arrays of a program, each of an entry for each pixel of a tile and of MARGIN pixels around it: of integers, and of
# numbers.
IDS, EDGES, EDGE_LIST, NEAR_LIST, OWN_LIST = (tl.constexpr(array) for array in range(5))
P, RESIDUAL_X, RESIDUAL_Y, G, PLANE = (tl.constexpr(array) for array in range(5))
ARRAYS = tl.constexpr(5)
NO_CLASS = tl.constexpr(1 << 30)


@triton.jit
def append(list, count, wanted, at):
    """Adds the entries that are wanted, in order; how many there are now."""
    flags = wanted.to(tl.int32)
    tl.store(list + count + tl.cumsum(flags, 0) - 1, at, mask=wanted)
    return count + tl.sum(flags, 0)


@triton.jit
def window_part(first, RADIUS: tl.constexpr, PART: tl.constexpr, V: tl.constexpr):
    """Offsets u, v in a window and which of them exist, (PART, 1) each, from entry `first` on; V entries to a row.
    Columns descend, because Triton shares ascending ones, which are neighbours in memory, among threads, and a sum over
    a window should be a thread's own."""
    entry = first + tl.arange(0, PART)[:, None]
    u = entry // V - RADIUS
    v = RADIUS - entry % V
    return u, v, (u <= RADIUS) & (v >= -RADIUS)


@triton.jit
def taps(u, v, UNIT: tl.constexpr):
    """K_x and K_y times UNIT, exact integers."""
    squared = tl.maximum(u * u + v * v, 1)
    return UNIT * v // squared, UNIT * u // squared


@triton.jit
def pixels_of(at, size, window, MARGIN: tl.constexpr, WIDE: tl.constexpr):
    """Row and column of entries, in the image: those beyond it are copies of its border."""
    y = tl.minimum(tl.maximum(window[1] - MARGIN + at // WIDE, 0), size.height - 1)
    x = tl.minimum(tl.maximum(window[2] - MARGIN + at % WIDE, 0), size.width - 1)
    return y, x


@triton.jit
def find_edges(
    integers, size, window, WINDOW: tl.constexpr,
    RADIUS: tl.constexpr, MARGIN: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Lists the entries whose windows hold more than one label and, if WINDOW, no ignored one; how many there are."""
    _, top, left, bottom, right = window
    REACH: tl.constexpr = MARGIN - RADIUS  # how far around the tile G is compared
    count = 0
    for start in range(0, COUNT, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = top - MARGIN + at // WIDE
        x = left - MARGIN + at % WIDE
        own = tl.load(integers + IDS * COUNT + at, mask=at < COUNT, other=-1)
        compared = (own >= 0) & (y >= 0) & (y < size.height) & (x >= 0) & (x < size.width)
        compared = compared & (y >= top - REACH) & (y < bottom + REACH) & (x >= left - REACH) & (x < right + REACH)
        differ = tl.zeros([BLOCK], tl.int32)
        ignored = tl.zeros([BLOCK], tl.int32)
        for first in tl.static_range(0, V * (2 * RADIUS + 1), PART):
            u, v, exists = window_part(first, RADIUS, PART, V)
            there = compared[None] & exists
            id = tl.load(integers + IDS * COUNT + at[None] + (u * WIDE + v), mask=there, other=0)
            differ |= tl.max((there & (id != own[None])).to(tl.int32), 0)
            ignored |= tl.max((there & (id < 0)).to(tl.int32), 0)
        edge = compared & (differ > 0)
        if WINDOW:
            edge = edge & (ignored == 0)
        tl.store(integers + EDGES * COUNT + at, edge.to(tl.int32), mask=at < COUNT)
        count = append(integers + EDGE_LIST * COUNT, count, edge, at)
    tl.debug_barrier()
    return count


@triton.jit
def find_near(
    integers, size, window,
    RADIUS: tl.constexpr, MARGIN: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
    PART: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Lists the entries with an edge in their window; and of these the tile's own pixels and copies of them. How many
    there are of each."""
    _, top, left, bottom, right = window
    near_count = 0
    own_count = 0
    for start in range(0, COUNT, BLOCK):
        at = start + tl.arange(0, BLOCK)
        found = tl.zeros([BLOCK], tl.int32)
        for first in tl.static_range(0, V * (2 * RADIUS + 1), PART):
            u, v, exists = window_part(first, RADIUS, PART, V)
            # Edges are a radius away from where a row goes over into the next.
            other = at[None] + (u * WIDE + v)
            there = exists & (other >= 0) & (other < COUNT)
            found |= tl.max(tl.load(integers + EDGES * COUNT + other, mask=there, other=0), 0)
        near = (found > 0) & (at < COUNT)
        near_count = append(integers + NEAR_LIST * COUNT, near_count, near, at)
        y, x = pixels_of(at, size, window, MARGIN, WIDE)
        own = near & (y >= top) & (y < bottom) & (x >= left) & (x < right)
        own_count = append(integers + OWN_LIST * COUNT, own_count, own, at)
    tl.debug_barrier()
    return near_count, own_count


@triton.jit
def find_probabilities(
    integers, numbers, count, c, logits, size, down, across, stats, pixels, window,
    ACC: tl.constexpr, MODE: tl.constexpr, MARGIN: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """p of a class, wherever it is looked at."""
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        some = i < count
        at = tl.load(integers + NEAR_LIST * COUNT + i, mask=some, other=0)
        y, x = pixels_of(at, size, window, MARGIN, WIDE)
        pixel = pixel_at(size, window[0], y, x)
        m = tl.load(stats + pixel, mask=some, other=0)
        log_sum = tl.load(stats + pixels + pixel, mask=some, other=0)
        z = entry(logits, size, down, across, window[0], y, x, c, some, ACC, MODE)
        tl.store(numbers + P * COUNT + at, tl.exp((z - m) - log_sum), mask=some)
    tl.debug_barrier()


@triton.jit
def compare(
    integers, numbers, start, count, c,
    ACC: tl.constexpr, RADIUS: tl.constexpr, UNIT: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Edges of the list, from `start` on: their entries, which there are, and of class c G_x, G_y and the estimates of
    both, times UNIT."""
    i = start + tl.arange(0, BLOCK)
    some = i < count
    at = tl.load(integers + EDGE_LIST * COUNT + i, mask=some, other=0)
    gx = tl.zeros([BLOCK], ACC)
    gy = tl.zeros([BLOCK], ACC)
    px = tl.zeros([BLOCK], ACC)
    py = tl.zeros([BLOCK], ACC)
    for first in tl.static_range(0, V * (2 * RADIUS + 1), PART):
        u, v, exists = window_part(first, RADIUS, PART, V)
        tap_x, tap_y = taps(u, v, UNIT)
        there = some[None] & exists
        other = at[None] + (u * WIDE + v)
        is_class = there & (tl.load(integers + IDS * COUNT + other, mask=there, other=-1) == c)
        p = tl.load(numbers + P * COUNT + other, mask=there, other=0)
        gx += tl.sum(tl.where(is_class, tap_x.to(ACC), 0.0), 0)
        gy += tl.sum(tl.where(is_class, tap_y.to(ACC), 0.0), 0)
        px += tl.sum(tap_x.to(ACC) * p, 0)
        py += tl.sum(tap_y.to(ACC) * p, 0)
    return at, some, gx, gy, px, py


@triton.jit
def add_errors(
    error, compared, integers, numbers, count, c,
    ACC: tl.constexpr, RADIUS: tl.constexpr, UNIT: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Adds (G − its estimate)² of class c and what was compared."""
    for start in range(0, count, BLOCK):
        _, _, gx, gy, px, py = compare(
            integers, numbers, start, count, c, ACC, RADIUS, UNIT, COUNT, WIDE, BLOCK, PART, V
        )
        dx = tl.where(gx != 0, gx - px, 0.0) * (1.0 / UNIT)
        dy = tl.where(gy != 0, gy - py, 0.0) * (1.0 / UNIT)
        error += dx * dx + dy * dy
        compared += (gx != 0).to(ACC) + (gy != 0).to(ACC)
    tl.debug_barrier()
    return error, compared


@triton.jit
def find_residuals(
    integers, numbers, count, c, scale,
    ACC: tl.constexpr, RADIUS: tl.constexpr, UNIT: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """The derivatives of the total by the estimates of class c, which are kept times UNIT."""
    for start in range(0, count, BLOCK):
        at, some, gx, gy, px, py = compare(
            integers, numbers, start, count, c, ACC, RADIUS, UNIT, COUNT, WIDE, BLOCK, PART, V
        )
        tl.store(numbers + RESIDUAL_X * COUNT + at, tl.where(gx != 0, scale * (px - gx), 0.0), mask=some)
        tl.store(numbers + RESIDUAL_Y * COUNT + at, tl.where(gy != 0, scale * (py - gy), 0.0), mask=some)
    tl.debug_barrier()


@triton.jit
def find_derivatives(
    integers, numbers, count,
    ACC: tl.constexpr, RADIUS: tl.constexpr, UNIT: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """G, the derivative of the total by p, at the tile's own entries and copies of them."""
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        some = i < count
        at = tl.load(integers + OWN_LIST * COUNT + i, mask=some, other=0)
        g = tl.zeros([BLOCK], ACC)
        for first in tl.static_range(0, V * (2 * RADIUS + 1), PART):
            u, v, exists = window_part(first, RADIUS, PART, V)
            tap_x, tap_y = taps(u, v, UNIT)
            there = some[None] & exists
            other = at[None] - (u * WIDE + v)  # its window has this entry at (u, v)
            residual_x = tl.load(numbers + RESIDUAL_X * COUNT + other, mask=there, other=0)
            residual_y = tl.load(numbers + RESIDUAL_Y * COUNT + other, mask=there, other=0)
            g += tl.sum(tap_x.to(ACC) * residual_x + tap_y.to(ACC) * residual_y, 0)
        tl.store(numbers + G * COUNT + at, g, mask=some)
    tl.debug_barrier()


@triton.jit
def fold(
    g, at, y, x, some, size, window,
    ACC: tl.constexpr, RADIUS: tl.constexpr, WIDE: tl.constexpr, PART: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """g of pixels, and of their copies beyond the border."""
    _, top, left, bottom, right = window
    total = tl.load(g + at, mask=some, other=0)
    if (top == 0) | (left == 0) | (bottom == size.height) | (right == size.width):
        for first in tl.static_range(0, V * (2 * RADIUS + 1), PART):
            u, v, exists = window_part(first, RADIUS, PART, V)
            there = some[None] & exists & ((u != 0) | (v != 0))
            there = there & ((u >= 0) | (y == 0)[None]) & ((u <= 0) | (y == size.height - 1)[None])
            there = there & ((v >= 0) | (x == 0)[None]) & ((v <= 0) | (x == size.width - 1)[None])
            total += tl.sum(tl.load(g + at[None] + (u * WIDE + v), mask=there, other=0), 0)
    return total


@triton.jit(do_not_specialize=["ignore_index", "cpg_weight", "bcl_weight", "alpha", "beta"])
def cpg_tiles(
    logits, labels, size, down, across, weight, stats, selected, summary, grad_total, shares, grad, partials,
    integers, numbers, tiles, length, pixels, ignore_index, cpg_weight, bcl_weight, alpha, beta,
    PHASE: tl.constexpr, WINDOW: tl.constexpr, RADIUS: tl.constexpr, MARGIN: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, PART_ROWS: tl.constexpr, ACC: tl.constexpr, CE: tl.constexpr, WEIGHTED: tl.constexpr,
    OHEM: tl.constexpr, STEPS: tl.constexpr, FLIPPED: tl.constexpr,
    MODE: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """COMPARE: partial sums of (G − its estimate)² and of |M|. SHARES: adds to `shares` (N, H, W), which are 0.
    GRADIENT: puts whole entries into `grad` (N, C, H, W), or adds p_c g_c to what `loss.backward` has summed up for the
    corners of quads."""
    WIDE: tl.constexpr = SPANS * SPAN + 2 * MARGIN
    COUNT: tl.constexpr = (ROWS + 2 * MARGIN) * WIDE
    V: tl.constexpr = 4 if RADIUS == 1 else 8
    PART: tl.constexpr = V * PART_ROWS
    UNIT: tl.constexpr = 2 if RADIUS == 1 else 20 if RADIUS == 2 else 780  # makes the taps integers
    integers += tl.program_id(0).to(tl.int64) * (ARRAYS * COUNT)
    numbers += tl.program_id(0).to(tl.int64) * (ARRAYS * COUNT)
    scale = double(cpg_weight).to(ACC)
    if PHASE != COMPARE:
        scale = ratio(2 * scale * tl.load(grad_total), tl.load(summary + COMPARED)) * (1.0 / (UNIT * UNIT))
    lane = tl.arange(0, LANES)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        window = rectangle(tile, size, down, across, MODE, ROWS, SPANS, SPAN)
        y, x = pixels_of(lane, size, window, MARGIN, WIDE)
        id = tl.maximum(class_at(labels, window[0], y, x, lane < COUNT, size.classes, ignore_index), -1)
        error = tl.zeros([BLOCK], ACC)
        compared = tl.zeros([BLOCK], ACC)
        c = tl.max(tl.where(lane < COUNT, id, -1))
        if c != tl.min(tl.where(lane < COUNT, id, NO_CLASS)):
            # The tile before is done with: each step ends with a barrier.
            tl.store(integers + IDS * COUNT + lane, id, mask=lane < COUNT)
            if PHASE != COMPARE:
                for array in tl.static_range(1, ARRAYS):
                    tl.store(numbers + array * COUNT + lane, tl.zeros([LANES], ACC), mask=lane < COUNT)
            tl.debug_barrier()
            edge_count = find_edges(integers, size, window, WINDOW, RADIUS, MARGIN, COUNT, WIDE, BLOCK, PART, V)
            near_count, own_count = find_near(integers, size, window, RADIUS, MARGIN, COUNT, WIDE, BLOCK, PART, V)
            c = tl.where(edge_count > 0, tl.min(tl.where(id >= 0, id, NO_CLASS)), NO_CLASS)
            while c < NO_CLASS:
                find_probabilities(
                    integers, numbers, near_count, c, logits, size, down, across, stats, pixels, window,
                    ACC, MODE, MARGIN, COUNT, WIDE, BLOCK,
                )  # fmt: skip
                if PHASE == COMPARE:
                    error, compared = add_errors(
                        error, compared, integers, numbers, edge_count, c,
                        ACC, RADIUS, UNIT, COUNT, WIDE, BLOCK, PART, V,
                    )  # fmt: skip
                else:
                    find_residuals(
                        integers, numbers, edge_count, c, scale, ACC, RADIUS, UNIT, COUNT, WIDE, BLOCK, PART, V
                    )
                    find_derivatives(integers, numbers, own_count, ACC, RADIUS, UNIT, COUNT, WIDE, BLOCK, PART, V)
                    put_gradients(
                        integers, numbers, own_count, c, tile, window,
                        logits, labels, size, down, across, weight, stats, selected, summary, grad_total, shares, grad,
                        pixels, ignore_index, bcl_weight, alpha, beta,
                        PHASE, RADIUS, MARGIN, COUNT, WIDE, BLOCK, PART, V, ACC, CE, WEIGHTED, OHEM, STEPS, FLIPPED,
                        MODE, ROWS, SPANS, SPAN,
                    )  # fmt: skip
                c = tl.min(tl.where((id > c) & (lane < COUNT), id, NO_CLASS))
        if PHASE == COMPARE:
            tl.store(partials + tile, tl.sum(error, 0).to(tl.float64))
            tl.store(partials + length + tile, tl.sum(compared, 0).to(tl.float64))


@triton.jit
def put_gradients(
    integers, numbers, count, c, tile, window,
    logits, labels, size, down, across, weight, stats, selected, summary, grad_total, shares, grad,
    pixels, ignore_index, bcl_weight, alpha, beta,
    PHASE: tl.constexpr, RADIUS: tl.constexpr, MARGIN: tl.constexpr, COUNT: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, PART: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr, CE: tl.constexpr,
    WEIGHTED: tl.constexpr, OHEM: tl.constexpr, STEPS: tl.constexpr, FLIPPED: tl.constexpr,
    MODE: tl.constexpr, ROWS: tl.constexpr, SPANS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """What the phase makes of p and g of class c at the tile's own pixels."""
    n, top, left, bottom, right = window
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = tl.load(integers + OWN_LIST * COUNT + i, mask=i < count, other=0)
        y = top - MARGIN + at // WIDE
        x = left - MARGIN + at % WIDE
        some = (i < count) & (y >= top) & (y < bottom) & (x >= left) & (x < right)
        g = fold(numbers + G * COUNT, at, y, x, some, size, window, ACC, RADIUS, WIDE, PART, V)
        p = tl.load(numbers + P * COUNT + at, mask=some, other=0)
        if PHASE == SHARES:
            share = shares + pixel_at(size, n, y, x)
            tl.store(share, tl.load(share, mask=some, other=0) + p * g, mask=some)
        elif MODE == QUADS:
            tl.store(numbers + PLANE * COUNT + at, p * g, mask=some)
        else:
            label, chosen, pull, factor = pixel_pulls(
                logits, labels, size, down, across, weight, stats, selected, summary, grad_total, shares, pixels,
                ignore_index, bcl_weight, alpha, beta, n, y, x, some,
                ACC, MODE, CE, WEIGHTED, OHEM, STEPS, FLIPPED, True,
            )  # fmt: skip
            value = gradient_of(
                c, p, factor + g, label, chosen, pull, labels, size, n, y, x,
                grad_total, summary, bcl_weight, alpha, beta, ignore_index, ACC, STEPS, FLIPPED,
            )  # fmt: skip
            to = grad.data + tl.cast(n, tl.int64) * grad.stride_n + tl.cast(c, tl.int64) * grad.stride_c
            to += y.to(tl.int64) * grad.stride_h + x.to(tl.int64) * grad.stride_w
            tl.store(to, value.to(grad.data.dtype.element_ty), mask=some)
    tl.debug_barrier()
    if (PHASE == GRADIENT) and (MODE == QUADS):
        _, rows, columns, inside = tile_of(tile, size, down, across, MODE, ROWS, SPANS, SPAN)
        where = (rows - top + MARGIN) * WIDE + columns - left + MARGIN
        products = tl.load(numbers + PLANE * COUNT + where, mask=inside, other=0)
        lower, right = corner_weights(tile, size, down, across, rows, columns, SPANS)
        add_to_quads(
            grad, tile, size, down, across, c + tl.zeros([1, 1], tl.int32), products[None], lower, right, SPANS, True
        )
        tl.debug_barrier()
