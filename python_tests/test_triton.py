"""What only Triton's kernels need: no races, tiles as a GPU gets them, autotuning, 64-bit sums of integers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import CASES, KERNELS, Case, assert_not_less_exact, problem, value_and_grad

from bcmf_ext import dispatch

pytest.importorskip("triton")
import triton
import triton.language as tl
from conftest import look_for_overflow
from races import look_for_races
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import InterpreterError

from bcmf_ext.triton import launch, loss

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="Triton's kernels are not interpreted")
(TRITON,) = (backend for backend in KERNELS if backend.name == "triton")
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPG's tiles as on a GPU, not as the interpreter gets them."""
    monkeypatch.setattr(loss, "SPARSE", launch.SPARSE_ON_GPUS)


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


BARRIERS = (
    "find_edges", "find_near", "find_probabilities", "add_errors", "find_residuals", "find_derivatives",
    "put_gradients", "cpg_tiles",
)  # fmt: skip


@pytest.mark.parametrize("function", BARRIERS)
def test_a_missing_barrier_is_found(small_tiles: None, function: str) -> None:
    """Protects the test before: without the barriers of any step of CPG's kernel there are races."""
    (case,) = (case for case in CASES if case.name == "segmentation_loss low-resolution")
    z, y, w = areas((1, 3, 16, 12), torch.float32, case)
    with look_for_races(without=function) as races:
        value_and_grad(lambda z: case(z, y, w, "triton"), z)
    assert "written by another lane" in races.found or "read by another lane" in races.found


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
def test_integers_do_not_overflow(small_tiles: None, strides: tuple[int, ...]) -> None:
    """Protects 64-bit offsets: strides below 2³¹ arrive as 32-bit integers, and their multiples may pass that. The
    interpreter looks at each sum and product."""
    (case,) = (case for case in CASES if case.name == "segmentation_loss weighted")
    z, y, w = areas((3, 4, 9, 12), torch.float16, case)
    size = 1 + sum((n - 1) * stride for n, stride in zip(z.shape, strides, strict=True))
    spread = torch.empty(size, dtype=z.dtype).as_strided(z.shape, strides).copy_(z)
    look_for_overflow(True)
    try:
        value, grad = value_and_grad(lambda z: case(z, y, w, "triton"), spread)
    finally:
        look_for_overflow(False)
    expected, expected_grad = value_and_grad(lambda z: case(z, y, w, "triton"), z)
    assert torch.equal(value, expected)
    assert torch.equal(grad, expected_grad)


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
