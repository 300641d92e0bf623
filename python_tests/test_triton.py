"""What only Triton's kernels need: no races, tiles as a GPU gets them, autotuning, 64-bit sums of integers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    KERNELS,
    Case,
    assert_not_less_exact,
    make_case,
    problem,
    quarter,
    record,
    value_and_grad,
)  # fmt: skip

from bcmf_ext import BCL, CPG, dispatch

pytest.importorskip("triton")
import triton
import triton.language as tl
from conftest import look_for_overflow
from races import Races, look_for_races
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import InterpreterError

from bcmf_ext.triton import launch, loss
from bcmf_ext.triton.common import Size, pixel_at

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="Triton's kernels are not interpreted")
(TRITON,) = (backend for backend in KERNELS if backend.name == "triton")
# Of nearly as many logits as labels, whose gradients no other case gathers.
NEARLY = make_case("segmentation_loss nearly", bcl=BCL(0.7), cpg=CPG(0.6), logits=lambda h, w: (h - 2, w + 3))
every_case = pytest.mark.parametrize("case", [*CASES, NEARLY], ids=lambda case: case.name)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPG's tiles as on a GPU, not as the interpreter gets them, and several to a program."""
    monkeypatch.setattr(loss, "SPARSE", launch.SPARSE_ON_GPUS)
    monkeypatch.setattr(loss, "PROGRAMS", 2)


def areas(shape: tuple[int, ...], dtype: torch.dtype, case: Case) -> tuple[torch.Tensor, ...]:
    """A problem with labels in areas of 3x5 pixels."""
    z, y, w = problem(shape, dtype, logits=case.logits)
    y = y[:, ::3, ::5].repeat_interleave(3, 1).repeat_interleave(5, 2)[:, : shape[2], : shape[3]].contiguous()
    return z, y, w


@every_case
def test_tiles_as_on_a_gpu(case: Case, small_tiles: None) -> None:
    """Protects the seams between CPG's tiles, programs that work on several, and lists longer than a block."""
    assert_not_less_exact(case, TRITON, *areas((1, 3, 19, 45), torch.float32, case))


@every_case
def test_no_races(case: Case, small_tiles: None) -> None:
    """Protects from what the interpreter hides: between two barriers a program reads nothing that another lane has
    written, and programs write nothing that another one reads or writes."""
    z, y, w = areas((2, 3, 19, 40), torch.float32, case)
    with look_for_races() as races:
        value_and_grad(lambda z: case(z, y, w, "triton"), z)
    assert not races.found


def test_a_missing_barrier_is_found(small_tiles: None) -> None:
    """Protects the test before: without any one of the barriers of CPG's kernel there are races."""
    case = make_case("segmentation_loss", cpg=CPG(), logits=quarter)
    z, y, w = areas((1, 2, 9, 36), torch.float32, case)

    def races(without: tuple[str, int] | None = None) -> Races:
        with look_for_races(without) as found:
            value_and_grad(lambda z: case(z, y, w, "triton"), z)
        return found

    everywhere = races()
    assert not everywhere.found
    assert len(everywhere.barriers) == 9
    for barrier in sorted(everywhere.barriers):
        assert races(without=barrier).found, barrier


def test_autotuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects BCMF_TRITON_AUTOTUNE=1: each configuration is tried, and the one taken gives the same results."""
    tried = []

    def bench(self: Autotuner, call: Callable[[], None], quantiles: tuple[float, ...]) -> list[float]:
        call()
        tried.append(self.base_fn.__name__)
        return [1.0 / len(tried)] * 3  # so that the last is the fastest

    monkeypatch.setattr(Autotuner, "do_bench", bench)
    monkeypatch.setattr(launch, "AUTOTUNE", True)
    launch.tuned.cache_clear()
    for case in CASES:
        if "segmentation_loss" in case.name:
            assert_not_less_exact(case, TRITON, *problem((2, 5, 9, 11), torch.float32, logits=case.logits))
    assert {"forward", "backward"} == set(tried)
    assert len(tried) >= 2 * 9


@pytest.mark.parametrize("strides", [(2**30 + 64, 9 * 12, 12, 1), (9 * 12, 2**30 + 64, 12, 1), (64, 1024, 2**28, 1)])
def test_integers_do_not_overflow(small_tiles: None, monkeypatch: pytest.MonkeyPatch, strides: tuple[int, ...]) -> None:
    """Protects 64-bit offsets into logits, labels and gradients: strides below 2³¹ arrive as 32-bit integers, and their
    multiples may pass that. The interpreter looks at each sum and product."""
    (case,) = (case for case in CASES if case.name == "segmentation_loss weighted")
    z, y, w = areas((3, 4, 9, 12), torch.float16, case)
    expected, expected_grad = value_and_grad(lambda z: case(z, y, w, "triton"), z)
    size = 1 + sum((n - 1) * stride for n, stride in zip(z.shape, strides, strict=True))

    def spread(z: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.empty(size, dtype=z.dtype).as_strided(z.shape, strides)

    labels = torch.empty(3 * 2**30, dtype=torch.uint8).as_strided(y.shape, (2**30 + 64, 12, 1)).copy_(y)
    recorder = record(case, TRITON, spread(z).copy_(z), labels, w)
    monkeypatch.setattr(torch, "empty_like", spread)  # the gradient's, too
    look_for_overflow(True)
    try:
        assert torch.equal(case(spread(z).copy_(z), labels, w, "triton"), expected)
        arguments = (*recorder.arguments[:3], *recorder.results[2:], *recorder.arguments[3:])
        grad = loss.loss_backward(torch.ones(()), *arguments)
    finally:
        look_for_overflow(False)
    assert grad.stride() == strides
    assert torch.equal(grad, expected_grad)


def test_more_than_two_billion_pixels() -> None:
    """Protects maps of that size: the place of a pixel is counted in 64 bits."""

    @triton.jit
    def place(size, n, y, x, to):
        tl.store(to, pixel_at(size, n, y, x))

    to = torch.empty(1, dtype=torch.int64)
    look_for_overflow(True)
    try:
        place[(1,)](Size(2, 2**15, 2**15, 2**15, 2**15), 5, 7, 3, to)
    finally:
        look_for_overflow(False)
    assert to.item() == 5 * 2**30 + 7 * 2**15 + 3


def test_an_overflow_is_found() -> None:
    """Protects the test before: the interpreter stops at a 32-bit product that does not fit."""

    @triton.jit
    def multiply(a, b, to):
        tl.store(to, a * b)

    look_for_overflow(True)
    try:
        with pytest.raises(InterpreterError, match="overflow"):
            multiply[(1,)](2**20, 2**20, torch.empty(1, dtype=torch.int64))
    finally:
        look_for_overflow(False)
