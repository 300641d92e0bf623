"""What LMFM's and DAPPM's kernels promise: pool_norm_relu and add_norm_relu on every backend, and the modules."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from harness import emulator
from harness.cases import DTYPES, KERNELS, Backend, layouts
from torch import Tensor, nn

from bcmf_ext import dispatch, ops
from bcmf_ext.nn import DAPPM, LMFM, _kernels
from bcmf_ext.nn._kernels import FusedNorms

Maps = list[Tensor | None]


@dataclass(frozen=True)
class Case:
    """An op with the maps and norms of a call.

    shapes: of the maps (N, C, h, w) for a size, None for one that is missing. norms: how many channels each has.
    """

    name: str
    shapes: Callable[[int, int], Sequence[tuple[int, int, int] | None]]
    norms: Sequence[int]
    joined: bool = False

    def make(self, n: int, size: tuple[int, int], dtype: torch.dtype, device: str) -> tuple[Maps, list[nn.BatchNorm2d]]:
        """Maps, and norms of which no two channels are alike."""
        g = torch.Generator().manual_seed(0)
        maps: Maps = [
            None if shape is None else torch.randn(n, *shape, generator=g, dtype=torch.float64).to(device, dtype)
            for shape in self.shapes(*size)
        ]
        norms = [nn.BatchNorm2d(channels, eps=0.02, momentum=0.3, dtype=torch.float64) for channels in self.norms]
        for norm in norms:
            for tensor in (norm.weight, norm.bias, norm.running_mean):
                nn.init.normal_(tensor, generator=g)
            nn.init.uniform_(norm.running_var, 0.5, 2.0, generator=g)
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        return maps, [norm.to(device, acc) for norm in norms]

    def run(self, impl: str, maps: Maps, norms: Sequence[nn.BatchNorm2d], size: tuple[int, int]) -> list[Tensor]:
        decisive = max((map for map in maps if map is not None), key=lambda map: map.shape[2] * map.shape[3])
        fused = FusedNorms(impl, norms, channels_last=decisive.stride(1) == 1)
        if self.name == "pool":
            assert maps[0] is not None
            return fused.pool(maps[0], norms)
        half = len(maps) // 2
        return fused.add(maps[:half], maps[half:], size, norms, self.joined)

    def define(self, maps: Maps, norms: Sequence[nn.BatchNorm2d], size: tuple[int, int]) -> list[Tensor]:
        """By PyTorch, in the dtype of the maps."""
        if self.name == "pool":
            (x,) = maps
            assert x is not None
            pools = [F.avg_pool2d(x, k, s, p) for k, s, p in ((5, 2, 2), (9, 4, 4), (17, 8, 8))]
            pools.append(F.adaptive_avg_pool2d(x, 1))
            return [F.relu(norm(z)) for norm, z in zip(norms, pools, strict=True)]
        half = len(maps) // 2
        sums = []
        for low, map in zip(maps[:half], maps[half:], strict=True):
            up = None if low is None else F.interpolate(low, size=size, mode="bilinear", align_corners=False)
            sums.append(up if map is None else map if up is None else up + map)
        if self.joined:
            parts = torch.cat(sums, 1).split([norm.num_features for norm in norms], 1)
            return [torch.cat([F.relu(norm(part)) for norm, part in zip(norms, parts, strict=True)], 1)]
        return [F.relu(norm(z)) for norm, z in zip(norms, sums, strict=True)]


def quarter(h: int, w: int) -> tuple[int, int]:
    return (h + 3) // 4, (w + 3) // 4


CASES = (
    Case("pool", lambda h, w: [(5, h, w)], (5, 5, 5, 5)),
    Case("level", lambda h, w: [(3, *quarter(h, w)), (17, 1, 1), (3, h, w), (17, h, w)], (3, 17)),
    Case("first level", lambda h, w: [(3, h + 2, (w + 1) // 2), (2, *quarter(h, w)), None, None], (3, 2)),
    Case("alone", lambda h, w: [None, (3, h, w)], (3,)),
    # A norm may span several branches.
    Case(
        "joined", lambda h, w: [None, None, (2, 1, w), None, (2, h, w), (3, h, w), None, (17, h, w)], (5, 2, 17), True
    ),
)
POOL, LEVEL, _, _, JOINED = CASES
SIZES = ((1, 1), (1, 5), (6, 8), (16, 17), (33, 18))


def marked(backends: Sequence[Backend]) -> list[Any]:
    return [pytest.param(b, marks=pytest.mark.gpu if b.device == "cuda" else (), id=b.name) for b in backends]


every_kernel = pytest.mark.parametrize("backend", marked(KERNELS), indirect=True)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def results(
    call: Callable[..., list[Tensor]],
    maps: Maps,
    norms: Sequence[nn.BatchNorm2d],
    size: tuple[int, int],
    upstream_dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """Outputs, gradients of maps, weights and biases, and running statistics. upstream_dtype: what the gradients of
    outputs are rounded to."""
    norms = [copy.deepcopy(norm) for norm in norms]
    maps = [None if map is None else map.detach().requires_grad_() for map in maps]
    outputs = call(maps, norms, size)
    g = torch.Generator().manual_seed(1)
    drawn = [torch.randn(out.shape, generator=g, dtype=torch.float64).to(upstream_dtype) for out in outputs]
    upstream = [grad.to(out.device, out.dtype) for grad, out in zip(drawn, outputs, strict=True)]
    leaves = [map for map in maps if map is not None]
    parameters = [p for norm in norms for p in (norm.weight, norm.bias)]
    grads = torch.autograd.grad(outputs, [*leaves, *parameters], upstream)
    buffers = [b for norm in norms for b in (norm.running_mean, norm.running_var)]
    return [*(out.detach() for out in outputs), *grads, *buffers]


def assert_not_less_exact(
    case: Case,
    backend: Backend,
    maps: Maps,
    norms: Sequence[nn.BatchNorm2d],
    size: tuple[int, int],
    views: Maps | None = None,
) -> None:
    """Our errors are at most twice those of PyTorch in the same dtype, plus a few roundings; both against fp64. views:
    the same maps in another layout."""
    wide = [None if map is None else map.double() for map in maps]
    dtype = next(map.dtype for map in maps if map is not None)
    truth = results(case.define, wide, [copy.deepcopy(norm).double() for norm in norms], size, dtype)
    eager = results(case.define, maps, norms, size)
    views = maps if views is None else views
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    sums = 8 * torch.finfo(acc).eps * math.sqrt(len(truth[0]) * size[0] * size[1])  # of terms of both signs
    ours = results(lambda *a: case.run(backend.impl, *a), views, norms, size)
    assert len(ours) == len(truth)
    for mine, theirs, true in zip(ours, eager, truth, strict=True):
        assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device)
        # In fp64 eager is the truth itself, and the order of sums is all that differs.
        roundings = 8 if mine.dim() == 1 else 2  # sums over all pixels, whose partial sums are as large as they are
        eps = 1e-11 if mine.dtype == torch.float64 else roundings * torch.finfo(mine.dtype).eps
        allowed = 2 * (theirs - true).abs().max() + eps * (1 + true.abs().max()) + sums
        assert (mine - true).abs().max() <= allowed


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients


@every_kernel
@every_case
@every_dtype
@both_modes
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_not_less_exact_than_eager(
    backend: Backend, case: Case, dtype: torch.dtype, training: bool, size: tuple[int, int]
) -> None:
    """Protects outputs, gradients and running statistics, from one pixel to maps that no block of threads covers."""
    if backend.interpreted and (dtype != torch.float32 or size == SIZES[-1]):
        pytest.skip("interpreted: in fp32 only, and no map of many blocks")
    maps, norms = case.make(3, size, dtype, backend.device)
    assert_not_less_exact(case, backend, maps, [norm.train(training) for norm in norms], size)


@every_kernel
@every_case
def test_a_small_variance_around_a_large_mean(backend: Backend, case: Case) -> None:
    """Protects the variance from cancellation: the mean square less the squared mean would be all wrong here."""
    maps, norms = case.make(3, (6, 8), torch.float32, backend.device)
    maps = [None if map is None else 100 + 0.01 * map for map in maps]
    for norm in norms:
        norm.eps = 1e-9
    wide = [None if map is None else map.double() for map in maps]
    truth = case.define(wide, [copy.deepcopy(norm).double() for norm in norms], (6, 8))
    for mine, true in zip(case.run(backend.impl, maps, norms, (6, 8)), truth, strict=True):
        assert (mine - true).abs().max() <= 0.05 * true.abs().max()  # of the mean's own rounding


@every_kernel
@pytest.mark.parametrize(
    ("low", "size"), [((3, 4), (18, 32)), ((2, 3), (4, 24)), ((1, 2), (9, 13)), ((5, 8), (22, 33)), ((40, 9), (3, 2))]
)
def test_any_ratio(backend: Backend, low: tuple[int, int], size: tuple[int, int]) -> None:
    """Protects resampling, and its gathered gradient, by factors that the other maps of a call do not hide."""
    case = Case("a ratio", lambda h, w: [(3, *low), None], (3,))
    maps, norms = case.make(2, size, torch.float64, backend.device)
    assert_not_less_exact(case, backend, maps, norms, size)


@every_kernel
@every_case
@every_dtype
def test_any_layout(backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Protects strides: each layout is read where it is, NaN between entries is not, and gradients come in it."""
    size = (6, 10)
    maps, norms = case.make(2, size, dtype, backend.device)
    names = ("channels_last", "slice", "transposed") if backend.interpreted else layouts(torch.zeros(1, 2, 3, 4))
    for name in names:
        views = [None if map is None else layouts(map)[name] for map in maps]
        assert_not_less_exact(case, backend, maps, norms, size, views)
        mine = results(lambda *a: case.run(backend.impl, *a), views, norms, size)
        outputs = 4 if case.name == "pool" else 1 if case.joined else len(case.norms)
        layout = torch.channels_last if name == "channels_last" else torch.contiguous_format
        assert all(out.is_contiguous(memory_format=layout) for out in mine[:outputs])
        of_views = [view for view in views if view is not None]
        for view, grad in zip(of_views, mine[outputs:], strict=False):
            assert grad.stride() == torch.empty_like(view).stride()


@every_kernel
@every_case
@both_modes
def test_gradcheck(backend: Backend, case: Case, training: bool) -> None:
    """Protects the analytic gradients of maps, weights and biases in fp64."""
    if backend.interpreted and not training and case is not LEVEL:
        pytest.skip("interpreted: one case in eval mode")
    size = (5, 6) if backend.impl == "cpu" else (3, 4)
    maps, norms = case.make(2, size, torch.float64, backend.device)
    leaves = [map.requires_grad_() for map in maps if map is not None]
    parameters = [p for norm in norms for p in (norm.weight, norm.bias)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        here = [None if map is None else next(given) for map in maps]
        fresh = [copy.deepcopy(norm).train(training) for norm in norms]
        for norm in fresh:
            del norm.weight, norm.bias
            norm.weight, norm.bias = next(given), next(given)  # not parameters: they have a history
        return tuple(case.run(backend.impl, here, fresh, size))

    assert torch.autograd.gradcheck(call, (*leaves, *parameters), fast_mode=backend.impl != "cpu")


@every_kernel
@every_case
def test_nan_shows(backend: Backend, case: Case) -> None:
    """Protects from a ReLU that turns NaN into 0: a NaN in a map is seen behind it, in both modes."""
    maps, norms = case.make(2, (6, 8), torch.float32, backend.device)
    for map in maps:
        if map is not None:
            map[1, 0, 0, 0] = math.nan
    for training in (True, False):
        outputs = case.run(backend.impl, maps, [norm.train(training) for norm in norms], (6, 8))
        assert all(out.isnan().any() for out in outputs)
        assert all(not out[:, 1].isnan().any() for out in outputs)


@every_kernel
@every_case
def test_no_image(backend: Backend, case: Case) -> None:
    """Protects an empty batch in eval mode: empty maps, zero gradients."""
    maps, norms = case.make(0, (6, 8), torch.float32, backend.device)
    found = results(lambda *a: case.run(backend.impl, *a), maps, [norm.eval() for norm in norms], (6, 8))
    assert found[0].shape[0] == 0
    grads = found[-4 * len(norms) : -2 * len(norms)]
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


@every_kernel
@every_case
def test_beyond_two_billion_elements_of_memory(backend: Backend, case: Case) -> None:
    """Protects 64-bit offsets, without the memory: strides so large that a 32-bit product would wrap."""
    if backend.device == "cuda":
        pytest.skip("its memory is all real")
    maps, norms = case.make(3, (6, 8), torch.float16, backend.device)
    expected = results(lambda *a: case.run(backend.impl, *a), maps, norms, (6, 8))
    far = 2**31 + 64
    spread: Maps = []
    for map in maps:
        if map is None:
            spread.append(None)
            continue
        h, w = map.shape[2:]
        try:
            memory = torch.empty(3 * far, dtype=map.dtype)
        except RuntimeError:
            pytest.skip("the system does not lend memory that is not there")
        spread.append(memory.as_strided(map.shape, (far, h * w, w, 1)).copy_(map))
    for ours, theirs in zip(
        results(lambda *a: case.run(backend.impl, *a), spread, norms, (6, 8)), expected, strict=True
    ):
        assert torch.equal(ours, theirs)


# --------------------------------------------------------------------------------------------------------------------
# Determinism


@every_kernel
@every_case
@pytest.mark.parametrize("channels_last", [False, True])
def test_bit_identical_from_run_to_run(backend: Backend, case: Case, channels_last: bool) -> None:
    """Protects determinism: the same bits run after run and for any number of threads, which changes how many channels
    a thread takes; PyTorch's deterministic mode, which fills new memory with NaN, changes none."""
    size = (6, 9) if backend.interpreted else (16, 17)
    maps, norms = case.make(3, size, torch.float32, backend.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [None if map is None else map.contiguous(memory_format=layout) for map in maps]
    threads, found = torch.get_num_threads(), []
    try:
        for count in (threads, 1, 3, 2):
            torch.set_num_threads(count)
            torch.use_deterministic_algorithms(count == 3)
            found.append(results(lambda *a: case.run(backend.impl, *a), maps, norms, size))
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("backend", marked([b for b in KERNELS if b.name == "emulated"]), indirect=True)
@every_case
@both_modes
@pytest.mark.parametrize("channels_last", [False, True])
def test_bit_identical_in_any_order_of_threads(
    backend: Backend, case: Case, training: bool, channels_last: bool
) -> None:
    """Protects the CUDA kernels from races: blocks and threads in forward, reversed and shuffled order."""
    maps, norms = case.make(2, (17, 20), torch.float32, backend.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [None if map is None else map.contiguous(memory_format=layout) for map in maps]
    norms = [norm.train(training) for norm in norms]
    found = []
    try:
        for order in emulator.ORDERS:
            emulator.set_order(order)
            found.append(results(lambda *a: case.run(backend.impl, *a), maps, norms, (17, 20)))
    finally:
        emulator.set_order("forward")
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


# --------------------------------------------------------------------------------------------------------------------
# Well-behaved ops


def arguments_of(case: Case, maps: Maps, norms: Sequence[nn.BatchNorm2d], size: tuple[int, int], training: bool) -> Any:
    """Of the op behind a case."""
    parameters = _kernels.parameters(norms)
    if case.name == "pool":
        return (maps[0], *parameters, training, 0.1, 1e-5)
    half = len(maps) // 2
    channels_last = next(map for map in maps if map is not None).stride(1) == 1
    return (maps[:half], maps[half:], *parameters, *size, channels_last, case.joined, training, 0.1, 1e-5)


def op_of(case: Case, backend: Backend) -> Any:
    return (ops.POOL_NORM_RELU if case.name == "pool" else ops.ADD_NORM_RELU)[backend.impl]


def backward_of(op: Any) -> Any:
    namespace, name = op.default.name().split("::")
    return getattr(getattr(torch.ops, namespace), f"{name.split('.')[0]}_backward")


@every_kernel
@every_case
@both_modes
@pytest.mark.parametrize("channels_last", [False, True])
def test_opcheck(backend: Backend, case: Case, training: bool, channels_last: bool) -> None:
    """Protects schema (the running statistics are written, in training), fake kernels and autograd registration,
    forward and backward."""
    if backend.interpreted and not (channels_last and training):
        pytest.skip("interpreted: in one mode and layout")
    maps, norms = case.make(2, (6, 8), torch.bfloat16, backend.device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    maps = [None if map is None else map.contiguous(memory_format=layout).requires_grad_() for map in maps]
    op, arguments = op_of(case, backend), arguments_of(case, maps, norms, (6, 8), training)
    torch.library.opcheck(op, arguments)
    *outputs, stats = op(*arguments)
    assert not stats.requires_grad
    given = 1 if case.name == "pool" else 2
    detached = [detach(argument) for argument in arguments[: given + 2]]
    options = arguments[given + 4 : -2]
    torch.library.opcheck(backward_of(op), (detach(outputs), *detached, stats, *options))


def detach(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [detach(entry) for entry in argument]
    return None if argument is None else argument.detach()


@every_kernel
@every_case
def test_no_second_derivative(backend: Backend, case: Case) -> None:
    """Protects from a second derivative that lacks a term: there is none, and a sentence says so."""
    maps, norms = case.make(2, (6, 8), torch.float32, backend.device)
    leaf = next(map for map in maps if map is not None).requires_grad_()
    outputs = case.run(backend.impl, maps, norms, (6, 8))
    (grad,) = torch.autograd.grad(sum(out.square().sum() for out in outputs), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative: use impl='torch'"):
        grad.sum().backward()


@every_kernel
def test_direct_calls_are_safe(backend: Backend) -> None:
    """Protects memory: a call of torch.ops.bcmf with tensors that do not fit is an error, not a wild read."""
    maps, norms = LEVEL.make(2, (6, 8), torch.float32, backend.device)
    op, good = op_of(LEVEL, backend), arguments_of(LEVEL, maps, norms, (6, 8), True)
    resampled, added, weights, biases, means, variances, height, *options = good

    def call(**changed: Any) -> None:
        names = ("resampled", "added", "weights", "biases", "means", "variances", "height")
        values = dict(zip(names, good, strict=False)) | changed
        op(*values.values(), *options)

    call()
    for wrong in (
        {"weights": weights[:1]},
        {"biases": [biases[0], biases[1][:-1]]},
        {"means": [*means, means[0]]},
        {"variances": [variances[0].double(), variances[1]]},
        {"height": height + 1},
        {"added": [added[0], added[1][:1]]},
        {"added": [added[0], added[1].double()]},
        {"added": added[:1]},
        {"resampled": [None, None], "added": [None, None]},
        {"resampled": [resampled[0], None], "added": [added[0], None]},
        {"resampled": [resampled[0][0], resampled[1]]},
        {"resampled": [*resampled, resampled[0]], "added": [*added, added[0]], "weights": [*weights, weights[0]]},
    ):
        with pytest.raises((ValueError, TypeError)):
            call(**wrong)
    *outputs, stats = op(*good)
    backward = backward_of(op)
    detached = detach([resampled, added, weights, biases])
    with pytest.raises((ValueError, TypeError), match="stats as the forward returned them"):
        backward(detach(outputs), *detached, stats[:1], height, *options[:-2])
    with pytest.raises((ValueError, TypeError)):
        backward(detach(outputs)[:1], *detached, stats, height, *options[:-2])
    pool, x = op_of(POOL, backend), torch.zeros(2, 5, 6, 8, device=backend.device)
    parameters = _kernels.parameters(POOL.make(2, (6, 8), torch.float32, backend.device)[1])
    for map in (x[0], x[..., :0], x.long()):
        with pytest.raises((ValueError, TypeError)):
            pool(map, *parameters, True, 0.1, 1e-5)
    with pytest.raises((ValueError, TypeError)):
        pool(x[:, :4], *parameters, True, 0.1, 1e-5)


# --------------------------------------------------------------------------------------------------------------------
# The modules

modules = pytest.mark.parametrize("module", [LMFM, DAPPM])


def small(
    module: type[LMFM | DAPPM], backend: Backend, dtype: torch.dtype = torch.float64, **options: Any
) -> nn.Module:
    """Of few channels, none of whose norms are alike."""
    made = module(6, 4, 5, impl=backend.impl).to(backend.device, dtype)
    g = torch.Generator().manual_seed(0)
    for child in made.modules():
        if isinstance(child, nn.BatchNorm2d):
            child.eps, child.momentum = 0.02, 0.3
            for tensor in (child.weight, child.bias, child.running_mean):
                tensor.data.copy_(torch.randn(tensor.shape, generator=g))
            child.running_var.copy_(0.5 + torch.rand(child.running_var.shape, generator=g))
    return made


def with_impl(module: nn.Module, impl: str) -> nn.Module:
    made = copy.deepcopy(module)
    made.impl = impl
    return made


def assert_same_step(ours: nn.Module, theirs: nn.Module, x: Tensor, **tolerance: float) -> None:
    """One step: outputs, gradients and every entry of the state."""
    found = []
    for module in (ours, theirs):
        leaf = x.detach().requires_grad_()
        out = module(leaf)
        g = torch.Generator().manual_seed(2)
        out.backward(torch.randn(out.shape, generator=g, dtype=torch.float64).to(out.device, out.dtype))
        found.append([out.detach(), leaf.grad, *(p.grad for p in module.parameters()), *module.state_dict().values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@every_kernel
@modules
@both_modes
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (6, 8), (9, 16)], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_module_equals_pytorch(
    backend: Backend, module: type[LMFM], training: bool, size: tuple[int, int], channels_last: bool
) -> None:
    """Protects the wiring: each module by kernels is the module by PyTorch, in outputs, gradients, running statistics
    and the number of batches, on maps down to one pixel."""
    if backend.interpreted and size != (2, 2) and (channels_last or size != (6, 8)):
        pytest.skip("interpreted: two sizes, one of them in both layouts")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    ours = small(module, backend).to(memory_format=layout).train(training)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(3, 6, *size, generator=g, dtype=torch.float64).to(backend.device)
    assert_same_step(ours, with_impl(ours, "torch"), x.contiguous(memory_format=layout), rtol=1e-9, atol=1e-10)


@every_kernel
@modules
def test_one_image_in_eval_mode(backend: Backend, module: type[LMFM]) -> None:
    """Protects inference with a batch of one; in training its norms have a single value to go by, which is an error."""
    ours = small(module, backend).eval()
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(backend.device)
    torch.testing.assert_close(ours(x), with_impl(ours, "torch")(x))
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match="cannot train on 1 images: the batch norm after its global pool"):
        ours.train()(x)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), ours.state_dict().values(), strict=True))


@every_kernel
@modules
def test_autocast(backend: Backend, module: type[LMFM]) -> None:
    """Protects mixed precision: bf16 maps with fp32 norms, also where the map that comes in is fp32. As exact as
    PyTorch."""
    ours = small(module, backend, torch.float32).train()
    x = torch.randn(3, 6, 6, 8, generator=torch.Generator().manual_seed(1)).to(backend.device)
    for given in (x, x.bfloat16(), 30 + 0.1 * x):  # the last one cannot be rounded before it is normalised
        truth = with_impl(ours, "torch").double()(given.double())
        with torch.autocast(backend.device, torch.bfloat16):
            out, eager = with_impl(ours, backend.impl)(given), with_impl(ours, "torch")(given)
        assert out.dtype == eager.dtype == torch.bfloat16
        out.float().square().mean().backward()
        assert (out - truth).abs().mean() <= 1.5 * (eager - truth).abs().mean()


@pytest.mark.parametrize("backend", marked(KERNELS[:1]), indirect=True)
@modules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_module_in_half_precision(backend: Backend, module: type[LMFM], dtype: torch.dtype) -> None:
    """Protects `.half()`: norms in half precision are PyTorch's, not an error."""
    ours = small(module, backend, torch.float32).to(dtype).eval()
    x = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(with_impl(ours, "auto")(x), with_impl(ours, "torch")(x))
    with pytest.raises(ValueError, match=rf"its batch norms are in {dtype} for maps in {dtype}, not in torch.float32"):
        ours(x)


def change_a_part(module: nn.Module, change: str) -> None:
    if change == "ReLU":
        module.process1[1] = nn.LeakyReLU(0.5)
    elif change == "pool":
        module.scale1[0] = nn.AvgPool2d(3, 2, 1)
    elif change == "padding":
        module.scale2[0].count_include_pad = False
    elif change == "global pool":
        module.scale4[0] = nn.AdaptiveMaxPool2d(1)
    elif change == "bias":
        module.compression[2] = nn.Conv2d(module.compression[2].in_channels, 5, 1)
    elif change == "no norm":
        module.process1[0] = nn.Identity()
    elif change == "no unit":
        module.shortcut = nn.Conv2d(6, 5, 1)
    elif change == "pruned":
        nn.utils.prune.l1_unstructured(module.compression[2], "weight", 0.5)
    elif change == "parametrised":
        nn.utils.parametrizations.weight_norm(module.shortcut[2])
    elif change == "hook":
        module.process2[1].register_forward_hook(lambda module, args, output: 2 * output)
    elif change == "hook before":
        module.scale3.register_forward_pre_hook(lambda module, args: (2 * args[0],))


CHANGES = (
    "ReLU", "pool", "padding", "global pool", "bias", "no norm", "no unit", "pruned", "parametrised", "hook",
    "hook before",
)  # fmt: skip


@pytest.mark.parametrize("backend", marked(KERNELS[:1]), indirect=True)
@modules
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_does_what_it_says(backend: Backend, module: type[LMFM], change: str) -> None:
    """Protects users who change or hook a part that kernels bypass: PyTorch runs the module then, step after step."""
    ours, theirs = module(6, 4, 5), module(6, 4, 5, impl="torch")
    theirs.load_state_dict(ours.state_dict())
    for either in (ours, theirs):
        change_a_part(either, change)
    theirs.load_state_dict(ours.state_dict())  # of what is new
    x = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        assert_same_step(ours, theirs, x, rtol=0, atol=0)
    ours.impl = "cpu"
    with pytest.raises(ValueError, match=f"cannot run {module.__name__}: its .* (is not as it was made|has hooks)"):
        ours(x)


@modules
def test_a_changed_convolution_still_runs_by_kernels(module: type[LMFM]) -> None:
    """Protects the other side of that: convolutions that are called may be anything, hooked or with a bias."""
    if dispatch.why_not("cpu", "cpu"):
        pytest.skip(str(dispatch.why_not("cpu", "cpu")))
    ours = module(6, 4, 5, impl="cpu").eval()
    ours.process1[2] = nn.Conv2d(4, 4, 3, padding=1)
    ours.scale1[3].register_forward_hook(lambda module, args, output: 2 * output)
    x = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), with_impl(ours, "torch")(x))


@pytest.mark.parametrize("backend", marked(KERNELS[:1]), indirect=True)
@modules
@pytest.mark.parametrize("change", ["SyncBatchNorm", "frozen", "no momentum", "not affine", "no statistics", "eps"])
def test_other_norms_take_pytorch(
    backend: Backend, module: type[LMFM], change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects norms that kernels do not know: "auto" runs PyTorch for them, an impl asked for by name says why not."""
    ours = module(6, 4, 5)
    norm = ours.process2[0]
    if change == "SyncBatchNorm":
        ours = nn.SyncBatchNorm.convert_sync_batchnorm(ours).eval()
    elif change == "frozen":
        norm.eval()
    elif change == "no momentum":
        norm.momentum = None
    elif change == "eps":
        norm.eps = 1e-3
    else:
        ours.process2[0] = nn.BatchNorm2d(
            4, affine=change != "not affine", track_running_stats=change != "no statistics"
        )
    x = torch.randn(2, 6, 4, 5, generator=torch.Generator().manual_seed(1))
    with monkeypatch.context() as patch:
        patch.setattr(ops, "POOL_NORM_RELU", {})  # a kernel would be looked up here
        assert_same_step(ours, with_impl(ours, "torch"), x, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"impl='cpu' cannot run {module.__name__}: its (batch )?norms "):
        with_impl(ours, "cpu")(x)


@modules
def test_auto_takes_kernels(module: type[LMFM], monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the tests above, and users: plain norms run by kernels where there are any."""
    if dispatch.why_not("cpu", "cpu"):
        pytest.skip(str(dispatch.why_not("cpu", "cpu")))
    monkeypatch.setattr(ops, "POOL_NORM_RELU", {})
    with pytest.raises(KeyError):
        module(6, 4, 5)(torch.zeros(2, 6, 4, 5))


@modules
def test_a_map_of_another_shape(module: type[LMFM]) -> None:
    """Protects from a traceback out of a kernel: a sentence says what a map looks like."""
    for shape in ((6, 4, 5), (2, 6, 0, 5)):
        with pytest.raises(ValueError, match=r"takes maps of the shape \(N, C, h, w\), h, w >= 1, not "):
            module(6, 4, 5)(torch.zeros(shape))
    with pytest.raises(ValueError, match="impl='cuda' cannot run"):
        module(6, 4, 5, impl="cuda")(torch.zeros(2, 6, 4, 5))


@every_kernel
@modules
@both_modes
def test_compile_fullgraph(backend: Backend, module: type[LMFM], training: bool) -> None:
    """Protects torch.compile(fullgraph=True): same values, gradients and running statistics, no graph break."""
    if backend.interpreted and (module is DAPPM or not training):
        pytest.skip("interpreted: LMFM in training only")
    ours = small(module, backend).train(training)
    x = torch.randn(2, 6, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(backend.device)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, ours, x, rtol=0, atol=0)


@every_kernel
def test_compile_with_inductor(backend: Backend) -> None:
    """Protects torch.compile as users call it, whose code gives running statistics back, too."""
    if backend.interpreted or (backend.device == "cpu" and shutil.which("c++") is None):
        pytest.skip("interpreted, or no C++ compiler for inductor")
    ours = small(LMFM, backend, torch.float32).to(memory_format=torch.channels_last).train()
    x = torch.randn(2, 6, 6, 8, generator=torch.Generator().manual_seed(1)).to(backend.device)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True)
    assert_same_step(compiled, ours, x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", marked(KERNELS[:1]), indirect=True)
@modules
@pytest.mark.parametrize("strict", [True, False])
def test_export(backend: Backend, module: type[LMFM], strict: bool) -> None:
    """Protects torch.export, with dynamic sizes."""
    ours = small(module, backend).eval()
    x = torch.randn(2, 6, 20, 24, dtype=torch.float64)
    # PyTorch itself makes a case apart of maps of one pixel, which the smallest pool gives up to 8×8.
    sides = {2: torch.export.Dim("h", min=9, max=64), 3: torch.export.Dim("w", min=9, max=64)}
    exported = torch.export.export(ours, (x,), dynamic_shapes=(sides,), strict=strict).module()
    for size in ((20, 24), (9, 31)):
        x = torch.randn(2, 6, *size, dtype=torch.float64)
        torch.testing.assert_close(exported(x), ours(x))


# --------------------------------------------------------------------------------------------------------------------
# What only a GPU can show

gpu_kernels = pytest.mark.parametrize("backend", marked([b for b in KERNELS if b.device == "cuda"]), indirect=True)


@pytest.mark.gpu
@gpu_kernels
@every_case
@both_modes
def test_side_stream(backend: Backend, case: Case, training: bool) -> None:
    """Protects streams: kernels go to the current one. The maps are written late, by that stream alone."""
    maps, norms = case.make(8, (16, 16), torch.float32, "cuda")
    norms = [norm.train(training) for norm in norms]
    expected = results(lambda *a: case.run(backend.impl, *a), maps, norms, (16, 16))
    late = [None if map is None else torch.zeros_like(map) for map in maps]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)
        for map, source in zip(late, maps, strict=True):
            if map is not None:
                map.copy_(source)
        found = results(lambda *a: case.run(backend.impl, *a), late, norms, (16, 16))
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.gpu
@gpu_kernels
@modules
@both_modes
def test_graph_replay_with_other_values(backend: Backend, module: type[LMFM], training: bool) -> None:
    """Protects CUDA graphs: no host sync, nothing of the captured values is baked in, running statistics move."""
    ours = small(module, backend, torch.float32).train(training)
    theirs = copy.deepcopy(ours)
    static = torch.randn(2, 6, 6, 8, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.autograd.grad(copy.deepcopy(ours)(static).sum(), static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(static)
        (grad,) = torch.autograd.grad(out.square().sum(), static)
    for seed in range(3):
        x = torch.randn(2, 6, 6, 8, generator=torch.Generator().manual_seed(seed)).cuda()
        with torch.no_grad():
            static.copy_(x)
        graph.replay()
        leaf = x.requires_grad_()
        expected = theirs(leaf)
        (expected_grad,) = torch.autograd.grad(expected.square().sum(), leaf)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grad, expected_grad)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
@gpu_kernels
@both_modes
def test_few_launches(backend: Backend, training: bool) -> None:
    """Protects what the kernels are for: at most six that are not convolutions' in LMFM's forward."""
    ours = LMFM(impl=backend.impl).cuda().to(memory_format=torch.channels_last).train(training)
    x = torch.randn(8, 512, 16, 16, device="cuda").contiguous(memory_format=torch.channels_last)
    ours(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ours(x)
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    known = ("norm_relu", "pool_forward", "add_forward", "cat", "Cat", "foreach", "multi_tensor", "elementwise")
    assert 0 < sum(any(part in name for part in known) for name in kernels) <= 6, kernels


def test_lists_of_different_lengths_are_refused() -> None:
    """Protects parameters from being taken for running statistics, which training writes to: a list that is too long
    would shift all that come after it."""
    maps = [torch.randn(2, 4, 3, 5)]
    one, two = [torch.ones(4)], [torch.ones(2), torch.ones(2)]
    for op, given, size in (
        (torch.ops.bcmf.pool_norm_relu, maps, ()),
        (torch.ops.bcmf.add_norm_relu, ([None], maps), (3, 5, False, False)),
    ):
        with pytest.raises(ValueError, match="are lists of one length, not of 1, 2, 1, 1"):
            op(*given, one, two, one, one, *size, True, 0.1, 1e-5)
        assert all(torch.equal(tensor, torch.ones(2)) for tensor in two)
