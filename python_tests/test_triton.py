"""What only Triton's kernels need: no races, tiles as a GPU gets them, autotuning, 64-bit sums of integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from harness.backends import KERNELS
from harness.cases import LOSSES as CASES
from harness.cases import (
    Case,
    assert_not_less_exact,
    make_case,
    problem,
    quarter,
    record,
    value_and_grad,
)  # fmt: skip

from bcmf_ext import BCL, CPG, OHEM, cross_entropy, dispatch, ops

pytest.importorskip("triton")
import triton
import triton.language as tl
from harness import races as races_module
from harness.interpreter import look_for_overflow
from harness.races import Races, look_for_races
from triton.runtime.autotuner import Autotuner
from triton.runtime.errors import InterpreterError

from bcmf_ext.triton import launch, lmfm, loss
from bcmf_ext.triton.common import Pixels, Size, place_of
from bcmf_ext.triton.integers import multiple_of, pack, unpack

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
    assert_not_less_exact(case, TRITON, *areas((1, 3, 13, 45), torch.float32, case))


@every_case
def test_no_races(case: Case, small_tiles: None) -> None:
    """Protects from what the interpreter hides: between two barriers a program reads nothing that another lane has
    written, and programs write nothing that another one reads or writes."""
    z, y, w = areas((2, 3, 9, 36), torch.float32, case)
    with look_for_races() as races:
        value_and_grad(lambda z: case(z, y, w, "triton"), z)
    assert not races.found


@pytest.mark.thorough
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
    assert len(everywhere.barriers) == 10
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
    assert {"dense_forward", "dense_backward"} == set(tried)
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


@pytest.mark.parametrize("value", [0, 1, 16, 48, 255, -1, -100, 2**29, 2**31, 2**32 + 64, 2**40])
def test_integers_arrive_as_they_were_packed(value: int) -> None:
    """Protects the form in which kernels get integers: none is 1 or a multiple of 16, for which Triton would compile a
    kernel anew, and all arrive as they were, also those that were divided by what they are known to be multiples of.
    """

    @triton.jit
    def arrived(packed, to, MULTIPLE: tl.constexpr):
        tl.store(to, unpack(packed, MULTIPLE))

    to = torch.empty(1, dtype=torch.int64)
    for multiple in {1, multiple_of(True, value)}:
        packed = pack(value // multiple)
        assert packed != 1
        assert packed % 16 != 0
        arrived[(1,)](packed, to, multiple)
        assert to.item() == value


@pytest.mark.parametrize("ignore_index", [0, 1, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("min_kept", [0, 2**62 + 1])
def test_options_of_64_bits(ignore_index: int, min_kept: int) -> None:
    """Protects options that no packed integer has room for."""
    z = torch.randn(1, 3, 4, 6)
    y = torch.randint(0, 3, (1, 4, 6))
    y[0, 0, :3] = ignore_index
    options: dict[str, Any] = {"ignore_index": ignore_index, "ohem": OHEM(0.5, min_kept)}
    torch.testing.assert_close(
        cross_entropy(z, y, impl="triton", **options), cross_entropy(z, y, impl="torch", **options)
    )


def test_more_than_two_billion_pixels() -> None:
    """Protects maps of that size: the place of a pixel is counted in 64 bits."""

    @triton.jit
    def place(size, pixels, to):
        tl.store(to, place_of(size, pixels))

    to = torch.empty(1, dtype=torch.int64)
    look_for_overflow(True)
    try:
        place[(1,)](Size(2, 2**15, 2**15, 2**15, 2**15, 6 * 2**30), Pixels(5, 7, 3, 1), to)
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


# --------------------------------------------------------------------------------------------------------------------
# pool_norm_relu and add_norm_relu

NormRelu = Callable[[torch.memory_format, bool], list[torch.Tensor]]


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several to a map, and programs with fewer channels than there are, as on a GPU."""
    monkeypatch.setattr(lmfm, "BLOCKS", {True: lmfm.Block(4, 16), False: lmfm.Block(1, 64)})


class RacesOfLayouts(Races):
    """Between barriers the same lane of equally shaped blocks may be of different threads, because Triton may lay such
    blocks out differently: here only a store is ordered after the one load that its value depends on."""

    def launch(self) -> None:
        super().launch()
        self.loads: dict[int, tuple[tuple[Any, ...], int]] = {}  # by which lane an address was read, and how often

    def access(self, builder: Any, pointers: Any, mask: Any, writes: bool) -> None:
        addresses = np.atleast_1d(pointers.data)
        active = np.broadcast_to(mask.data, addresses.shape).reshape(-1)
        for lane in np.flatnonzero(active):
            address = int(addresses.reshape(-1)[lane])
            me = (tuple(builder.grid_idx), self.epoch, addresses.shape, int(lane))
            reader, times = self.loads.get(address, (me, 0))
            times = times if reader == me else 0
            if self.written.get(address) == me or (writes and times > 1):
                self.found.add("by another layout, perhaps")
            if not writes:
                self.loads[address] = me, times + 1
        super().access(builder, pointers, mask, writes)


@pytest.fixture
def any_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(races_module, "Races", RacesOfLayouts)


def random_maps(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, *shape, generator=g) for shape in shapes]


def parameters(channels: Sequence[int]) -> list[list[torch.Tensor]]:
    """Weights, biases, running means and variances."""
    g = torch.Generator().manual_seed(0)
    return [[torch.rand(c, generator=g) + 0.5 for c in channels] for _ in range(4)]


def pool(
    x: torch.Tensor, training: bool = True, like: Callable[[torch.Tensor], torch.Tensor] = torch.clone
) -> list[torch.Tensor]:
    """All that pool_norm_relu's forward and backward return and change. like: what makes gradients of outputs."""
    weights, biases, means, variances = parameters([x.shape[1]] * 4)
    *outputs, stats = ops.POOL_NORM_RELU["triton"](x, weights, biases, means, variances, training, 0.1, 1e-5)
    upstream = [like(out) for out in outputs]
    grads, grad_norms = torch.ops.bcmf.pool_norm_relu_triton_backward(upstream, x, weights, biases, stats, training)
    return [*outputs, stats, *means, *variances, *grads, grad_norms]


def add(
    resampled: Sequence[torch.Tensor | None],
    added: Sequence[torch.Tensor | None],
    size: tuple[int, int],
    joined: bool = False,
    training: bool = True,
    like: Callable[[torch.Tensor], torch.Tensor] = torch.clone,
) -> list[torch.Tensor]:
    """The same of add_norm_relu."""
    channels = [next(map for map in maps if map is not None).shape[1] for maps in zip(resampled, added, strict=True)]
    weights, biases, means, variances = parameters(channels)
    first = next(map for map in (*added, *resampled) if map is not None)
    options = *size, first.stride(1) == 1, joined, training
    *outputs, stats = ops.ADD_NORM_RELU["triton"](
        resampled, added, weights, biases, means, variances, *options, 0.1, 1e-5
    )
    upstream = [like(out) for out in outputs]
    grads, grad_norms = torch.ops.bcmf.add_norm_relu_triton_backward(
        upstream, resampled, added, weights, biases, stats, *options
    )
    return [*outputs, stats, *means, *variances, *grads, grad_norms]


def pool_of_a_map(layout: torch.memory_format, training: bool) -> list[torch.Tensor]:
    (x,) = random_maps((5, 9, 19))
    return pool(x.contiguous(memory_format=layout), training)


def add_two_and_one(layout: torch.memory_format, training: bool) -> list[torch.Tensor]:
    """Two branches, of which only one has something added; and joined ones, of which none is resampled."""
    low, high, other = (map.contiguous(memory_format=layout) for map in random_maps((5, 4, 8), (2, 3, 5), (2, 9, 17)))
    level = add([low, high], [None, other], (9, 17), training=training)
    return [*level, *add([None, None], [other, other], (9, 17), True, training)]


every_layout = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
both_ops = pytest.mark.parametrize("call", [pool_of_a_map, add_two_and_one])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


@both_ops
@every_layout
@both_modes
def test_norms_of_small_blocks(
    call: NormRelu, layout: torch.memory_format, training: bool, request: pytest.FixtureRequest
) -> None:
    """Protects the seams between blocks, which smaller maps than most do not have."""
    expected = call(layout, training)
    request.getfixturevalue("small_blocks")
    torch.testing.assert_close(call(layout, training), expected, rtol=1e-4, atol=1e-4)


@both_ops
@every_layout
@both_modes
def test_norms_have_no_races(
    call: NormRelu, layout: torch.memory_format, training: bool, small_blocks: None, any_layouts: None
) -> None:
    """Protects what programs keep in scratch memory, and the statistics and gradients that they share out."""
    with look_for_races() as found:
        call(layout, training)
    assert not found.found


@pytest.mark.parametrize(("call", "barriers"), [(pool_of_a_map, 5), (add_two_and_one, 4)])
def test_a_missing_barrier_of_norms_is_found(
    call: NormRelu, barriers: int, small_blocks: None, any_layouts: None
) -> None:
    """Protects the test before: without any one of the barriers there are races."""

    def run(without: tuple[str, int] | None = None) -> Races:
        with look_for_races(without) as found:
            call(torch.channels_last, True)
        return found

    everywhere = run()
    assert not everywhere.found
    assert len(everywhere.barriers) == barriers
    for barrier in sorted(everywhere.barriers):
        assert run(without=barrier).found, barrier


@pytest.mark.parametrize("strides", [(2**31 + 64, 9 * 12, 12, 1), (9 * 12, 2**30 + 64, 12, 1), (64, 1024, 2**28, 1)])
@pytest.mark.parametrize("name", ["pool", "add"])
def test_integers_of_norms_do_not_overflow(
    name: str, strides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects 64-bit offsets into all maps that kernels read and write, and the form that strides come in."""

    def spread(map: torch.Tensor, **_: Any) -> torch.Tensor:
        if map.dim() < 4:  # no map
            return map.clone()
        size = 1 + sum((n - 1) * stride for n, stride in zip(map.shape, strides, strict=True))
        return torch.empty(size, dtype=map.dtype).as_strided(map.shape, strides).copy_(map)

    def spread_out(like: torch.Tensor, channels: int, height: int, width: int, channels_last: bool) -> torch.Tensor:
        return spread(like.new_empty(like.shape[0], channels, height, width))

    def call(like: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        x, low = (like(map.half()) for map in random_maps((3, 9, 12), (3, 5, 7)))
        return pool(x, like=like) if name == "pool" else add([low], [x], (9, 12), like=like)

    expected = call(torch.clone)
    monkeypatch.setattr(ops, "empty_map", spread_out)
    monkeypatch.setattr(torch, "empty_like", spread)
    look_for_overflow(True)
    try:
        found = call(spread)
    finally:
        look_for_overflow(False)
    assert found[0].stride() == strides
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_taps_of_long_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects 64-bit products where a row of pixels and the cells that it is resampled from are long."""
    monkeypatch.setattr(lmfm, "BLOCKS", dict.fromkeys((True, False), lmfm.Block(1, 2**15)))
    (x,) = random_maps((1, 1, 33000))
    look_for_overflow(True)
    try:
        out, *_ = add([x], [None], (1, 33000), training=False)
    finally:
        look_for_overflow(False)
    expected, *_ = add([None], [x], (1, 33000), training=False)
    assert torch.equal(out, expected)
