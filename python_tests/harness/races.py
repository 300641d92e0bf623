"""Finds races in interpreted Triton kernels. The interpreter runs one operation after another, so that it hides what a
GPU would not: that threads of a program meet at barriers only, and programs not at all."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


class Races:
    """Who has read and written which address since a kernel was launched. A program's operation is ordered after
    another one of the same program if a barrier lies between them, or if the same lane of equally shaped blocks does
    both (Triton may lay such blocks out differently: between a load and a store of what depends on it that is no
    matter, and nothing else does so here). barriers: where there were any, function and line.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.barriers: set[tuple[str, int]] = set()
        self.launch()

    def launch(self) -> None:
        self.epoch = 0  # barriers of the program so far
        self.written: dict[int, tuple[Any, ...]] = {}
        self.read: dict[int, tuple[Any, ...]] = {}

    def access(self, builder: Any, pointers: Any, mask: Any, writes: bool) -> None:
        addresses = np.atleast_1d(pointers.data)
        lanes = np.flatnonzero(np.broadcast_to(mask.data, addresses.shape))
        here = (tuple(builder.grid_idx), self.epoch, addresses.shape)
        for lane, address in zip(lanes.tolist(), addresses.reshape(-1)[lanes].tolist(), strict=True):
            me = (*here, lane)
            self.compare(me, self.written.get(address), "written")
            if writes:
                self.compare(me, self.read.get(address), "read")
                self.written[address] = me
            else:
                before = self.read.get(address, me)
                program = me[0] if before[0] == me[0] else None  # or several
                several = before[:2] == me[:2] and before != me
                self.read[address] = (program, me[1], None, None) if several else (program, *me[1:])

    def compare(self, me: tuple[Any, ...], other: tuple[Any, ...] | None, what: str) -> None:
        if other is None or me == other or (me[0] == other[0] and me[1] > other[1]):
            return
        self.found.add(f"{what} by another {'program' if me[0] != other[0] else 'lane'}")


@contextmanager
def look_for_races(without: tuple[str, int] | None = None) -> Iterator[Races]:
    """Notes all accesses of the kernels that are run meanwhile, as if one of the barriers were not there."""
    from triton.runtime import interpreter

    races, builder, executor = Races(), interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, call = builder.create_masked_load, builder.create_masked_store, executor.__call__
    set_program = builder.set_grid_idx

    def noted_load(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        races.access(self, pointers, mask, writes=False)
        return load(self, pointers, mask, *more)

    def noted_store(self: Any, pointers: Any, value: Any, mask: Any, *more: Any) -> Any:
        races.access(self, pointers, mask, writes=True)
        return store(self, pointers, value, mask, *more)

    def next_program(self: Any, *index: int) -> None:
        races.epoch = 0
        set_program(self, *index)

    def barrier(self: Any) -> None:
        frame = sys._getframe()
        while frame.f_code.co_name in ("barrier", "<lambda>", "wrapper", "debug_barrier"):
            frame = frame.f_back
        here = frame.f_code.co_name, frame.f_lineno
        races.barriers.add(here)
        races.epoch += here != without

    def launch(self: Any, *arguments: Any, **more: Any) -> Any:
        races.launch()
        return call(self, *arguments, **more)

    with (
        mock.patch.multiple(
            builder,
            create_masked_load=noted_load,
            create_masked_store=noted_store,
            set_grid_idx=next_program,
            create_barrier=barrier,
        ),
        mock.patch.object(executor, "__call__", launch),
    ):
        yield races
