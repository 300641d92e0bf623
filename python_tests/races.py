"""Finds races in interpreted Triton kernels. The interpreter runs one operation after another, so that it hides what a
GPU would not: that threads of a program meet at barriers only, and programs not at all."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np


class Races:
    """Who has read and written which address since a kernel was launched. A program's operation is ordered after
    another one of the same program if a barrier lies between them or the same lane of equally shaped blocks does both.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.launch()

    def launch(self) -> None:
        self.epoch = 0  # barriers of the program so far
        self.written: dict[int, tuple[Any, ...]] = {}
        self.read: dict[int, tuple[Any, ...]] = {}

    def access(self, builder: Any, pointers: Any, mask: Any, writes: bool) -> None:
        addresses = np.atleast_1d(pointers.data)
        active = np.broadcast_to(mask.data, addresses.shape).reshape(-1)
        for lane in np.flatnonzero(active):
            address = int(addresses.reshape(-1)[lane])
            me = (tuple(builder.grid_idx), self.epoch, addresses.shape, int(lane))
            self.compare(me, self.written.get(address), "written")
            if writes:
                self.compare(me, self.read.get(address), "read")
                self.written[address] = me
            else:
                before = self.read.get(address)
                several = before is not None and before[:2] == me[:2] and before != me
                self.read[address] = (*me[:2], None, None) if several else me

    def compare(self, me: tuple[Any, ...], other: tuple[Any, ...] | None, what: str) -> None:
        if other is None or me == other or (me[0] == other[0] and me[1] > other[1]):
            return
        self.found.add(f"{what} by another {'program' if me[0] != other[0] else 'lane'}")


@contextmanager
def look_for_races(without: str | None = None) -> Iterator[Races]:
    """Notes all accesses of the kernels that are run meanwhile, as if the barriers of one function were not there."""
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
        races.epoch += without is None or all(frame.function != without for frame in inspect.stack(0)[:6])

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
