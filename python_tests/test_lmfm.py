"""LMFM and DAPPM: the modules, and what their ops promise beyond the suite of test_ops.py, which all ops pass."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from typing import Any

import pytest
import torch
import torch.nn.utils.prune
from harness.backends import KERNELS, Backend, every_kernel, on
from harness.cases.norms import NORMS, NormCase, detached
from harness.cases.pattern import backward_of, in_layout, layouts, runs
from torch import Tensor, nn

from bcmf_ext import dispatch, ops
from bcmf_ext.nn import DAPPM, LMFM

TRAINING = tuple(case for case in NORMS if case.training)
POOL, LEVEL = (case for case in TRAINING if case.name in ("pool_norm_relu training", "add_norm_relu level training"))
CPU, GPU = KERNELS[:1], tuple(backend for backend in KERNELS if backend.device == "cuda")
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


# --------------------------------------------------------------------------------------------------------------------
# Values and gradients


@runs(TRAINING, KERNELS)
def test_a_small_variance_around_a_large_mean(backend: Backend, case: NormCase) -> None:
    """Protects the variance from cancellation: the mean square less the squared mean would be all wrong here."""
    inputs = case.inputs((3, 0, 6, 8), torch.float32, backend.device)
    maps, *norms, size = case.apart(inputs)
    maps = [None if each is None else 100 + 0.01 * each for each in maps]
    given = (*maps, *(each for group in norms for each in group), *size)
    wide = [each.double() if isinstance(each, Tensor) else each for each in given]
    case = dataclasses.replace(case, eps=1e-9)
    for mine, true in zip(case.run(backend, *given), case.define(*wide), strict=True):
        assert (mine - true).abs().max() <= 0.05 * true.abs().max()  # of the mean's own rounding


@every_kernel
@pytest.mark.parametrize(
    ("low", "size"), [((3, 4), (18, 32)), ((2, 3), (4, 24)), ((1, 2), (9, 13)), ((5, 8), (22, 33)), ((40, 9), (3, 2))]
)
def test_any_ratio(backend: Backend, low: tuple[int, int], size: tuple[int, int]) -> None:
    """Protects resampling, and its gathered gradient, by factors that the other maps of a call do not hide."""
    case = NormCase("add_norm_relu ratio", lambda h, w: [(3, *low), None], (3,))
    case.assert_as_defined(backend, case.inputs((2, 0, *size), torch.float64, backend.device))


@runs(NORMS, KERNELS)
def test_outputs_have_the_layout_of_the_maps(backend: Backend, case: NormCase) -> None:
    """Protects the convolutions that follow from a copy: what comes out of channels_last maps is channels_last."""
    inputs = case.inputs((2, 0, 6, 10), torch.float32, backend.device)
    for layout in layouts(torch.zeros(1, 1, 1, 1)):
        expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
        outputs = case.run(backend, *in_layout(inputs, layout))
        assert all(output.is_contiguous(memory_format=expected) for output in outputs)


@runs(NORMS, KERNELS)
def test_nan_shows(backend: Backend, case: NormCase) -> None:
    """Protects from a ReLU that turns NaN into 0: a NaN in a map is seen behind it, in both modes."""
    inputs = case.inputs((2, 0, 6, 8), torch.float32, backend.device)
    for each in inputs:
        if isinstance(each, Tensor) and each.dim() == 4:
            each[1, 0, 0, 0] = math.nan
    outputs = case.run(backend, *inputs)
    assert all(out.isnan().any() for out in outputs)
    assert all(not out[:, 1].isnan().any() for out in outputs)


# --------------------------------------------------------------------------------------------------------------------
# Calls of the ops


@every_kernel
def test_direct_calls_are_safe(backend: Backend) -> None:
    """Protects memory: a call of torch.ops.bcmf with tensors that do not fit is an error, not a wild read."""
    op, good = LEVEL.call_of(backend, *LEVEL.inputs((2, 0, 6, 8), torch.float32, backend.device))
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
    kept = detached([resampled, added, weights, biases])
    with pytest.raises((ValueError, TypeError), match="stats as the forward returned them"):
        backward(detached(outputs), *kept, stats[:1], height, *options[:-2])
    with pytest.raises((ValueError, TypeError)):
        backward(detached(outputs)[:1], *kept, stats, height, *options[:-2])
    pool, (x, *parameters) = POOL.call_of(backend, *POOL.inputs((2, 0, 6, 8), torch.float32, backend.device))
    for map in (x[0], x[..., :0], x.long()):
        with pytest.raises((ValueError, TypeError)):
            pool(map, *parameters)
    with pytest.raises((ValueError, TypeError)):
        pool(x[:, :4], *parameters)


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


@on(CPU)
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


@on(CPU)
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


@on(CPU)
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
    ours = small(module, backend).train(training)
    x = torch.randn(2, 6, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(backend.device)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, ours, x, rtol=0, atol=0)


@every_kernel
def test_compile_with_inductor(backend: Backend) -> None:
    """Protects torch.compile as users call it, whose code gives running statistics back, too."""
    if backend.device == "cpu" and shutil.which("c++") is None:
        pytest.skip("no C++ compiler for inductor")
    ours = small(LMFM, backend, torch.float32).to(memory_format=torch.channels_last).train()
    x = torch.randn(2, 6, 6, 8, generator=torch.Generator().manual_seed(1)).to(backend.device)
    x = x.contiguous(memory_format=torch.channels_last)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(ours), fullgraph=True)
    assert_same_step(compiled, ours, x, rtol=1e-4, atol=1e-5)


@on(CPU)
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


@on(GPU)
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


@on(GPU)
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
