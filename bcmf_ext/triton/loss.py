"""bcmf::loss in Triton: the steps of docs/definitions.md (Steps), each a kernel; what one writes, the next reads: also
the labels, which `dense_forward` alone reads as they are. Nothing synchronises, and no float is added atomically.

Forward: `dense_forward`, `ohem_…`, `bcl_select`, `cpg_compare`; their sums by tile, then in the order of the tiles
(`add_tiles`), then `loss_finish`. Backward: `cpg_shares`, `dense_backward`, `sparse_backward`; then back to logits of
another size (`low_gather_…`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..checks import check_inputs
from ..ops import SUMMARY, SUMS, id_dtype
from ..options import BCL, CPG, OHEM, LossOptions
from .bcl import bcl_select
from .common import (
    ANY,
    DIRECT,
    QUADS,
    TERM_NAMES,
    Partials,
    TermFlags,
    TileShape,
    pack_ids,
    pack_labels,
    pack_map,
    pack_size,
    sum_rows,
)
from .cpg import ARRAYS, Scratch, cpg_compare, cpg_shares, sparse_backward, window_for
from .dense import dense_backward, dense_forward
from .finish import add_tiles
from .finish import loss_finish as loss_finish_kernel
from .gradient import Upstream
from .integers import pack
from .launch import (
    FLAT,
    FLAT_BLOCK,
    PROGRAMS,
    SPARSE,
    Geometry,
    check_sides,
    multiprocessors,
    on_device,
    run,
    run_dense,
)
from .low_gather import low_gather_pixels, low_gather_quads
from .ohem import DIGIT_BITS, digits, ohem_begin, ohem_choose, ohem_count, ohem_sum

GATHER_BLOCK = 256  # logits


def check(logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """The public functions have checked all this; it keeps a direct call of the op memory-safe."""
    check_inputs(logits, target, weight)
    check_sides(*logits.shape[1:], *target.shape[1:])


def check_options(options: LossOptions) -> None:
    """As `check`."""
    if options.ohem_threshold is not None:
        OHEM(options.ohem_threshold)
    if options.bcl_steps:
        BCL(step=tuple(options.bcl_steps), threshold=options.bcl_threshold, nms_size=options.bcl_nms_size)
    if len(options.bcl_flipped) not in (0, 2):
        raise ValueError("BCL's flipped labels have two weights.")
    if options.cpg_kernel_size:
        CPG(kernel_size=options.cpg_kernel_size)


def term_flags(options: LossOptions, weighted: bool = False) -> TermFlags:
    """The terms that are asked for."""
    return TermFlags(
        CE=options.ce,
        WEIGHTED=weighted,
        OHEM=options.ce and options.ohem_threshold is not None,
        STEPS=tuple(min(step, 2**30) for step in options.bcl_steps),  # no image is as large
        FLIPPED=len(options.bcl_flipped) > 0,
        CPG=options.cpg_kernel_size > 0,
    )


class Call:
    """A call of the op, checked: its geometry, and what its kernels share. marks: those of the forward, if there was
    one."""

    def __init__(
        self, logits: Tensor, target: Tensor, weight: Tensor | None, options: LossOptions, marks: Tensor | None = None
    ) -> None:
        check(logits, target, weight)
        check_options(options)
        self.options, self.target, dtype = options, target, id_dtype(logits.shape[1])
        bytes = target.numel() * dtype.itemsize
        self.marks = logits.new_empty(bytes, dtype=torch.uint8) if marks is None else marks.contiguous()
        if (self.marks.dtype, self.marks.shape, self.marks.device) != (torch.uint8, (bytes,), target.device):
            raise ValueError("bcmf::loss_triton_backward takes marks as bcmf::loss_triton returned them.")
        if self.marks.storage_offset() % dtype.itemsize != 0:
            self.marks = self.marks.clone()
        self.ids = self.marks.view(dtype).view(target.shape)
        self.geometry = Geometry(logits, target.shape[1], target.shape[2], options.align_corners)
        self.new, self.acc = logits.new_empty, self.geometry.acc
        self.weight = logits if weight is None else weight.to(self.acc).contiguous()  # not read without weights
        self.terms = term_flags(options, weight is not None)
        self.alpha, self.beta = options.bcl_flipped or (0.0, 0.0)

    def inputs(self, by_rows: bool) -> dict[str, Any]:
        """Logits and labels for a kernel after `dense_forward`. by_rows: it works on rows of neighbouring pixels."""
        return {"logits": self.geometry.logits(by_rows), "labels": pack_ids(self.ids, by_rows)}

    def run_dense_forward(self, **arguments: Any) -> None:
        """Launches the kernel that reads all labels, and writes their ids."""
        by_rows = self.geometry.by_rows
        run_dense(
            dense_forward, self.geometry, logits=self.geometry.logits(by_rows),
            labels=pack_labels(self.target, self.options.ignore_index, by_rows), ids=self.ids, **arguments,
            TERMS=self.terms,
        )  # fmt: skip

    def run_dense_backward(self, **arguments: Any) -> None:
        """Launches the kernel that writes the gradient, from the labels' ids."""
        run_dense(dense_backward, self.geometry, **self.inputs(self.geometry.by_rows), **arguments, TERMS=self.terms)

    def run_cpg(self, kernel: Any, mode: int, tile: TileShape, margin: int, **arguments: Any) -> None:
        """One of CPG's kernels, in programs that take one tile after another. margin: around a tile, in radii."""
        options = self.options
        radius = options.cpg_kernel_size // 2
        window = window_for(tile, radius, options.cpg_window, margin * radius, SPARSE.block, SPARSE.window_rows)
        tiles = self.geometry.tiles(tile, mode)
        programs = min(tiles, PROGRAMS * multiprocessors(self.target.device))
        entries = programs * ARRAYS.value * window.COUNT
        scratch = Scratch(self.new(entries, dtype=torch.int32), self.new(entries, dtype=self.acc))
        read = self.geometry.read._replace(MODE=mode)
        run(
            kernel,
            programs,
            **self.inputs(False),
            **arguments,
            scratch=scratch,
            tiles=pack(tiles),
            READ=read,
            TILE=tile,
            W=window,
        )

    @property
    def rectangles(self) -> int:
        """The mode of kernels that read a few logits of tiles that are rectangles."""
        mode = self.geometry.mode
        return ANY.value if mode == QUADS.value else mode

    @property
    def sparse_tile(self) -> TileShape:
        """The tile of `sparse_backward`. In mode QUADS it has to be one of `dense_backward`, but with fewer columns."""
        if self.geometry.mode != QUADS.value:
            return SPARSE.tile
        dense = self.geometry.tile
        return dense._replace(SPANS=max(1, SPARSE.tile.SPANS * SPARSE.tile.SPAN // dense.SPAN))


def loss(
    logits: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel of bcmf::loss_triton; see ops.py for shapes and dtypes. arguments: LossOptions.

    Raises:
        ValueError, TypeError: for inputs or options that the op does not take.
    """
    sums, cutoff, stats, selected, marks = loss_sums(logits, target, weight, *arguments)
    total, terms, summary = loss_finish(sums, cutoff, *arguments)
    return total, terms, stats, selected, marks, summary


def loss_sums(
    logits: Tensor, target: Tensor, weight: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The kernel of bcmf::loss_sums_triton; see ops.py for shapes and dtypes. arguments: LossOptions.

    Raises:
        ValueError, TypeError: for inputs or options that the op does not take.
    """
    options = LossOptions(*arguments)
    with on_device(logits):
        call = Call(logits, target, weight, options)
        shape, terms, new, acc = target.shape, call.terms, call.new, call.acc
        steps = len(terms.STEPS)
        sums, cutoff = new(SUMS, dtype=torch.float64), new((), dtype=acc)
        stats = new((2, *shape), dtype=acc)
        selected = new((shape[0] if steps else 0, *shape[1:]), dtype=torch.uint8)
        nll = new(shape, dtype=acc) if terms.OHEM else stats
        scores = new((steps, *shape), dtype=acc)
        if call.geometry.pixels == 0:
            return sums.zero_(), cutoff.zero_(), stats, selected, call.marks

        flat_tiles = call.geometry.tiles(FLAT, DIRECT.value)
        cpg_tiles = call.geometry.tiles(SPARSE.tile, call.rectangles)
        tiles = max(1, call.geometry.dense_tiles, flat_tiles, cpg_tiles)
        table = new((sum_rows(terms) + 1, tiles), dtype=torch.float64).zero_()
        partials, exceeds = Partials(table, pack(tiles)), least_hard_loss(options, acc)
        call.run_dense_forward(
            weight=call.weight, stats=stats, nll=nll, scores=scores, partials=partials, exceeds=exceeds
        )
        if terms.OHEM:
            run_ohem(call, nll, cutoff, partials, exceeds)
        if steps:
            run(
                bcl_select, flat_tiles, **call.inputs(True), stats=stats, scores=scores, selected=selected,
                partials=partials, nms_radius=pack(min(options.bcl_nms_size // 2, 2**30)),
                least_score=-math.log(options.bcl_threshold), alpha=call.alpha, beta=call.beta,
                READ=call.geometry.read, TERMS=terms, TILE=FLAT,
            )  # fmt: skip
        if terms.CPG:
            call.run_cpg(cpg_compare, call.rectangles, SPARSE.tile, 1, stats=stats, partials=partials, TERMS=terms)
        run(add_tiles, SUMS, partials=partials, sums=sums, ROWS=sum_rows(terms), BLOCK=FLAT_BLOCK)
        return sums, cutoff if terms.OHEM else cutoff.zero_(), stats, selected, call.marks


def loss_finish(sums: Tensor, cutoff: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of bcmf::loss_finish_triton; see ops.py for shapes and dtypes. arguments: LossOptions.

    Raises:
        ValueError, TypeError: for options that the op does not take, or for other tensors than those of loss_sums.
    """
    options, acc = LossOptions(*arguments), cutoff.dtype
    check_options(options)
    if (sums.shape, sums.dtype) != ((SUMS,), torch.float64) or acc not in (torch.float32, torch.float64):
        raise ValueError("bcmf::loss_finish_triton takes sums and cutoff as bcmf::loss_sums_triton returned them.")
    if cutoff.numel() != 1 or cutoff.device != sums.device:
        raise ValueError("bcmf::loss_finish_triton takes one cutoff, and all tensors on one device.")
    with on_device(sums):
        new = cutoff.new_empty
        total, terms, summary = new(()), new(len(TERM_NAMES)), new(SUMMARY)
        run(
            loss_finish_kernel, 1, sums=sums.contiguous(), cutoff=cutoff.contiguous(),
            total=total, terms=terms, summary=summary,
            bcl_weight=options.bcl_weight, cpg_weight=options.cpg_weight, TERMS=term_flags(options),
        )  # fmt: skip
        return total, terms, summary


def least_hard_loss(options: LossOptions, acc: torch.dtype) -> float:
    """The smallest number of this dtype that exceeds OHEM's threshold. On the CPU: no copy waits for the GPU."""
    if options.ohem_threshold is None:
        return 0.0
    return (
        torch.tensor(-math.log(options.ohem_threshold), dtype=acc).nextafter(torch.tensor(math.inf, dtype=acc)).item()
    )


def run_ohem(call: Call, nll: Tensor, cutoff: Tensor, partials: Partials, exceeds: float) -> None:
    """Finds the smallest loss that is kept, and sums up the kept ones. Every level is always launched: whether it is
    needed only the device knows."""
    geometry, selection = call.geometry, nll.new_empty(2, dtype=torch.int64)
    levels = list(digits(8 * nll.element_size()))
    histograms = nll.new_zeros((len(levels), 1 << DIGIT_BITS), dtype=torch.int64)
    rows = sum_rows(call.terms) + 1
    totals = nll.new_empty(rows, dtype=torch.float64)
    run(add_tiles, rows, partials=partials, sums=totals, ROWS=rows, BLOCK=FLAT_BLOCK)
    min_kept = pack(min(call.options.ohem_min_kept, geometry.pixels))
    run(ohem_begin, 1, totals=totals, min_kept=min_kept, selection=selection, HARD_ROW=rows - 1)
    programs = min(256, triton.cdiv(geometry.pixels, FLAT_BLOCK))
    for digit, histogram in zip(levels, histograms, strict=True):
        run(
            ohem_count, programs, nll=nll, selection=selection, histogram=histogram,
            size=pack_size(geometry.size, True), DIGIT=digit, BLOCK=FLAT_BLOCK,
        )  # fmt: skip
        run(ohem_choose, 1, selection=selection, histogram=histogram, DIGIT=digit)
    run(
        ohem_sum, geometry.dense_tiles, **call.inputs(geometry.by_rows), weight=call.weight, nll=nll,
        selection=selection, cutoff=cutoff, partials=partials, exceeds=exceeds,
        READ=geometry.read, TERMS=call.terms, TILE=geometry.tile,
    )  # fmt: skip


def loss_backward(
    grad_total: Tensor,
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    stats: Tensor,
    selected: Tensor,
    marks: Tensor,
    summary: Tensor,
    *arguments: Any,
) -> Tensor:
    """The kernel of bcmf::loss_triton_backward: the gradient of the logits, dense, in their dtype. arguments:
    LossOptions.

    Raises:
        ValueError, TypeError: for inputs or options that the op does not take, or another forward's results.
    """
    options = LossOptions(*arguments)
    with on_device(logits):
        call = Call(logits, target, weight, options, marks)
        geometry, cpg = call.geometry, call.terms.CPG
        check_kept(call, grad_total, stats, selected, summary)
        grad = torch.empty_like(logits, memory_format=torch.preserve_format)
        if geometry.pixels == 0:
            return grad.zero_()
        sink = make_sink(call, grad)
        upstream = Upstream(
            call.weight, grad_total.to(call.acc).contiguous(), stats.contiguous(), selected.contiguous(),
            summary.contiguous(), call.new(target.shape, dtype=call.acc).zero_() if cpg else stats,
        )  # fmt: skip
        weights = {"bcl_weight": options.bcl_weight, "alpha": call.alpha, "beta": call.beta}
        if cpg:
            call.run_cpg(cpg_shares, call.rectangles, SPARSE.tile, 2, upstream=upstream, cpg_weight=options.cpg_weight)
        call.run_dense_backward(upstream=upstream, grad=pack_map(sink, geometry.mode != QUADS.value), **weights)
        if cpg:
            call.run_cpg(
                sparse_backward, geometry.mode, call.sparse_tile, 2, upstream=upstream, grad=pack_map(sink),
                cpg_weight=options.cpg_weight, **weights, TERMS=call.terms,
            )  # fmt: skip
        if geometry.mode != DIRECT.value:
            run_low_gather(geometry, sink, grad)
        return grad


def make_sink(call: Call, grad: Tensor) -> Tensor:
    """The map that `dense_backward` writes to: the gradient itself, or, of logits of another size, the gradients of
    label pixels (N, C, H, W), or sums for the corners of quads' pieces (N, C, 4, down, across), without the last
    axis."""
    geometry, planes = call.geometry, grad.shape[:2]
    if geometry.mode == DIRECT.value:
        return grad
    if geometry.mode == ANY.value:
        return call.new((*planes, *call.target.shape[1:]), dtype=call.acc)
    down = (geometry.size.rows + 1) * geometry.down.parts
    across = (geometry.size.columns + 1) * geometry.across.parts
    return call.new((*planes, 4, down, across), dtype=call.acc)[..., 0]


def run_low_gather(geometry: Geometry, sink: Tensor, grad: Tensor) -> None:
    """Takes the gradients from the sink to logits of another size."""
    programs = triton.cdiv(grad.numel(), GATHER_BLOCK)
    arguments = {
        "sums": pack_map(sink), "logits": geometry.logits(by_cells=True), "grad": pack_map(grad, True),
        "count": pack(grad.numel()), "BLOCK": GATHER_BLOCK,
    }  # fmt: skip
    if geometry.mode == QUADS.value:
        run(low_gather_quads, programs, **arguments)
    else:
        rows, columns = (pack(2 * most) for most in geometry.most)
        run(low_gather_pixels, programs, **arguments, most_rows=rows, most_columns=columns)


def check_kept(call: Call, grad_total: Tensor, stats: Tensor, selected: Tensor, summary: Tensor) -> None:
    """Whether the backward gets what the forward returned."""
    shape, device = call.target.shape, call.target.device
    kept = (stats.shape, stats.dtype), (summary.shape, summary.dtype), (selected.shape, selected.dtype)
    images = shape[0] if call.terms.STEPS else 0
    if kept != (((2, *shape), call.acc), ((SUMMARY,), call.acc), ((images, *shape[1:]), torch.uint8)):
        raise ValueError("bcmf::loss_triton_backward takes stats, selected and summary as bcmf::loss returned them.")
    if grad_total.numel() != 1 or any(t.device != device for t in (grad_total, stats, selected, summary)):
        raise ValueError("bcmf::loss_triton_backward takes one upstream gradient, and all tensors on one device.")
