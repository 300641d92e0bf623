"""torch.ops.bcmf.loss on the CPU: equal to the reference, and a well-behaved PyTorch op."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from ctypes import CDLL
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bcmf_ext
from bcmf_ext import dispatch, reference

pytestmark = pytest.mark.skipif(dispatch.EXTENSION is None, reason=f"no extension: {dispatch.why_not('cpu', 'cpu')}")

SHAPES = [(1, 2, 1, 1), (1, 3, 1, 37), (2, 19, 37, 53), (1, 171, 16, 40), (3, 5, 64, 64), (1, 700, 9, 11)]


def problem(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels with some ignored pixels, and class weights."""
    n, c, h, w = shape
    g = torch.Generator().manual_seed(seed)
    z = (3 * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)
    y = torch.randint(0, c, (n, h, w), generator=g)
    y[torch.rand(n, h, w, generator=g) < 0.1] = 255 if c <= 255 else -1
    return z, y, torch.rand(c, generator=g)


def value_and_grad(loss, z: Tensor, upstream: float = 1.0) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z)
    (grad,) = torch.autograd.grad(upstream * value, z)
    return value.detach(), grad


def layouts(z: Tensor) -> dict[str, Tensor]:
    """The same logits as NCHW, channels_last, a strided slice, a view with an offset, and transposed storage."""
    n, c, h, w = z.shape
    big = z.new_full((n, c + 3, h + 2, 2 * w + 1), math.nan)
    big[:, 2:-1, 1:-1, 1::2] = z
    return {
        "nchw": z,
        "channels_last": z.contiguous(memory_format=torch.channels_last),
        "slice": big[:, 2:-1, 1:-1, 1::2],
        "rows cut": big[:, 2:-1, 1:-1, 1::2].contiguous()[..., :w],
        "transposed": z.transpose(2, 3).contiguous().transpose(2, 3),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_not_less_exact_than_eager(shape: tuple[int, ...], dtype: torch.dtype, weighted: bool) -> None:
    """Protects values and gradients of every dtype and layout: our error against the fp64 reference is at most that of
    F.cross_entropy in the same dtype, plus a few roundings of the dtype that the result has."""
    z, y, weight = problem(shape, dtype)
    ignore = 255 if shape[1] <= 255 else -1
    weight = weight if weighted else None
    w64 = None if weight is None else weight.double()
    truth, truth_grad = value_and_grad(
        lambda z: reference.cross_entropy(z, y, weight=w64, ignore_index=ignore), z.double(), 3.0
    )
    w = None if weight is None else weight.to(dtype)
    eager, eager_grad = value_and_grad(lambda z: F.cross_entropy(z, y, weight=w, ignore_index=ignore), z, 3.0)
    eager_error = (eager - truth).abs().nan_to_num(0.0)
    eager_grad_error = (eager_grad - truth_grad).abs().max().nan_to_num(0.0)
    eps, grad_eps = torch.finfo(dispatch_acc(dtype)).eps, torch.finfo(dtype).eps
    for name, view in layouts(z).items():
        ours, grad = value_and_grad(
            lambda z: bcmf_ext.cross_entropy(z, y, weight=weight, ignore_index=ignore, impl="cpu"), view, 3.0
        )
        assert ours.dtype == dispatch_acc(dtype)
        assert grad.dtype == dtype
        assert grad.stride() == torch.empty_like(view).stride(), name
        assert (ours - truth).abs() <= eager_error + 4 * eps * truth.abs(), name
        assert (grad - truth_grad).abs().max() <= eager_grad_error + 2 * grad_eps * truth_grad.abs().max(), name


def dispatch_acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expanded_logits_get_a_dense_gradient(dtype: torch.dtype) -> None:
    """Protects from writes through stride 0: expanded logits are read as they are, their gradient is dense."""
    z, y, _ = problem((1, 5, 8, 8), dtype)
    y = y.expand(3, 8, 8)
    expanded = z.expand(3, 5, 8, 8).detach().requires_grad_()
    (grad,) = torch.autograd.grad(bcmf_ext.cross_entropy(expanded, y, impl="cpu"), expanded)
    _, expected = value_and_grad(lambda z: bcmf_ext.cross_entropy(z, y, impl="torch"), z.repeat(3, 1, 1, 1))
    assert grad.is_contiguous()
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-8)


def test_gradcheck() -> None:
    """Protects the analytic gradient in fp64."""
    z, y, weight = problem((2, 4, 5, 7), torch.float64)
    z.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: bcmf_ext.cross_entropy(z, y, weight=weight, impl="cpu"), (z,))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("ignore_index", [255, -1, -100, 1])
def test_label_dtypes_and_ignore_index(dtype: torch.dtype, ignore_index: int) -> None:
    """Protects the widening of labels before any comparison, for every integer type, strided labels included."""
    z, y, _ = problem((2, 4, 9, 7), torch.float32)
    y = torch.where(y == 255, ignore_index, y)
    if dtype == torch.uint8:
        y = torch.where(y < 0, 2, y)
    expected = reference.cross_entropy(z.double(), y, ignore_index=ignore_index)
    strided = y.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    for labels in (y.to(dtype), strided):
        value = bcmf_ext.cross_entropy(z, labels, ignore_index=ignore_index, impl="cpu")
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("labels", [[33, 26, 5], [255, 3], [-7], [1000, 200, 40, 41, 42, 43, 44, 45, 46, 47]])
@pytest.mark.parametrize("num_classes", [19, 3])
def test_bad_labels_raise_the_reference_sentence(labels: list[int], num_classes: int) -> None:
    """Protects users from a loss over garbage, and the two wordings (Python, C++) from drifting apart."""
    y = torch.zeros(1, 4, 4, dtype=torch.long)
    y.view(-1)[: len(labels)] = torch.tensor(labels)
    z = torch.zeros(1, num_classes, 4, 4)
    messages = []
    for impl in ("cpu", "torch"):
        with pytest.raises(ValueError, match="target holds") as error:
            bcmf_ext.cross_entropy(z, y, ignore_index=-1, impl=impl)
        messages.append(str(error.value).splitlines()[0])
    assert messages[0] == messages[1]


@pytest.mark.parametrize("empty", ["all ignored", "no image", "no pixel", "zero weights"])
def test_nothing_to_average(empty: str) -> None:
    """Protects from NaN on empty crops: 0 with an all-zero gradient, even where the logits are inf or NaN."""
    n, h = (0 if empty == "no image" else 2), (0 if empty == "no pixel" else 4)
    z = torch.full((n, 3, h, 5), math.inf) if empty != "zero weights" else torch.zeros(n, 3, h, 5)
    y = torch.full((n, h, 5), 0 if empty == "zero weights" else 255)
    weight = torch.zeros(3) if empty == "zero weights" else None
    value, grad = value_and_grad(lambda z: bcmf_ext.cross_entropy(z, y, weight=weight, impl="cpu"), z)
    assert value.item() == 0
    assert torch.equal(grad, torch.zeros_like(z))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits(dtype: torch.dtype) -> None:
    """Protects the tails: ±1e4 and −inf as F.cross_entropy, small losses at 1e4 keep their digits, NaN shows."""
    y = torch.tensor([[[0, 1, 2, 0]]])
    z = torch.tensor([[1e4, -1e4, 0], [1e4, 1e4, -1e4], [-math.inf, 3, 4], [1e4, 1e4 - 9, -1e4]], dtype=dtype)
    z = z.T.reshape(1, 3, 1, 4)
    value, grad = value_and_grad(lambda z: bcmf_ext.cross_entropy(z, y, impl="cpu"), z)
    eager, eager_grad = value_and_grad(lambda z: F.cross_entropy(z, y), z)
    torch.testing.assert_close(value, eager)
    torch.testing.assert_close(grad, eager_grad)
    small = bcmf_ext.cross_entropy(z[..., 3:], y[..., 3:], impl="cpu")
    assert small.item() == pytest.approx(math.log1p(math.exp(-9)), rel=1e-3)
    assert bcmf_ext.cross_entropy(torch.full_like(z, math.nan), y, impl="cpu").isnan()
    z[0, 0, 0, 0] = math.nan
    assert bcmf_ext.cross_entropy(z, y, impl="cpu").isnan()


def test_bit_identical_for_any_number_of_threads() -> None:
    """Protects determinism: values and gradients are the same bits with 1, 2 and 3 threads, run after run."""
    z, y, weight = problem((4, 19, 97, 101), torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for t in (1, 2, 3, 2):
            torch.set_num_threads(t)
            results.append(value_and_grad(lambda z: bcmf_ext.cross_entropy(z, y, weight=weight, impl="cpu"), z))
    finally:
        torch.set_num_threads(threads)
    for value, grad in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_kernels_use_torch_threads() -> None:
    """Protects speed: at::parallel_for without OpenMP would silently run on one thread."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc/self/maps to look at")
    assert CDLL(dispatch.EXTENSION.__file__).GOMP_parallel  # bound to an OpenMP runtime …
    runtimes = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(runtimes) == 1  # … and to torch's only


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    """Protects the variants that this machine would not choose: each gives the reference's value and gradient."""
    code = (
        "import torch, bcmf_ext\n"
        "g = torch.Generator().manual_seed(0)\n"
        "y = torch.randint(0, 7, (2, 33, 35), generator=g); y[0, 0] = 255\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
        "    z = torch.randn(2, 7, 33, 35, generator=g).to(dtype).requires_grad_()\n"
        "    ours, truth = (bcmf_ext.cross_entropy(z, y, impl=i) for i in ('cpu', 'torch'))\n"
        "    torch.testing.assert_close(ours, truth, rtol=1e-6, atol=0)\n"
        "    grads = [torch.autograd.grad(v, z)[0] for v in (ours, truth)]\n"
        "    torch.testing.assert_close(*grads, rtol=2 * torch.finfo(dtype).eps + 2e-6, atol=1e-7)\n"
        "print(bcmf_ext.dispatch.EXTENSION.build_info()['cpu_capability'].lower())\n"
    )
    if capability == "avx512" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this CPU has no AVX-512")
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == {"default": "baseline"}.get(capability, capability)


# --------------------------------------------------------------------------------------------------------------------
# A well-behaved op


def op_arguments(dtype: torch.dtype = torch.float32) -> tuple:
    z, y, weight = problem((2, 5, 6, 7), dtype)
    return z, y, weight.to(dtype), 255


def test_opcheck() -> None:
    """Protects schema, fake kernels and autograd registration (torch.library.opcheck), forward and backward."""
    z, y, weight, ignore = op_arguments()
    for logits in (z.requires_grad_(), z.detach().contiguous(memory_format=torch.channels_last).requires_grad_()):
        torch.library.opcheck(torch.ops.bcmf.loss, (logits, y, weight, ignore))
        torch.library.opcheck(torch.ops.bcmf.loss, (logits, y, None, ignore))
    with torch.no_grad():
        _, stats, denominator = torch.ops.bcmf.loss(z, y, weight, ignore)
    arguments = (torch.tensor(1.0), z.detach(), y, weight, stats, denominator, ignore)
    torch.library.opcheck(torch.ops.bcmf.loss_backward, arguments)


def test_compile_fullgraph() -> None:
    """Protects torch.compile(fullgraph=True): same value and gradient, no graph break."""
    z, y, weight, _ = op_arguments()
    loss = torch.compile(
        lambda z: bcmf_ext.cross_entropy(2 * z, y, weight=weight, impl="cpu"), fullgraph=True, backend="aot_eager"
    )
    for ours, expected in zip(
        value_and_grad(loss, z),
        value_and_grad(lambda z: bcmf_ext.cross_entropy(2 * z, y, weight=weight, impl="cpu"), z),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_export_keeps_the_gradient() -> None:
    """Protects torch.export: the exported module has the value and the gradient (a Function around the op loses it)."""
    z, y, _, _ = op_arguments()

    class Loss(torch.nn.Module):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return bcmf_ext.cross_entropy(z, y, impl="cpu")

    module = torch.export.export(Loss(), (z, y)).module()
    for ours, expected in zip(
        value_and_grad(lambda z: module(z, y), z), value_and_grad(lambda z: Loss()(z, y), z), strict=True
    ):
        assert torch.equal(ours, expected)


def test_double_backward_raises_our_sentence() -> None:
    """Protects from silently missing second-order terms."""
    z, y, _, _ = op_arguments()
    z.requires_grad_()
    (grad,) = torch.autograd.grad(bcmf_ext.cross_entropy(z, y, impl="cpu"), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


def test_inputs_are_not_written_and_autocast_is_ignored() -> None:
    """Protects the inputs, and fp32 arithmetic under autocast."""
    z, y, weight, _ = op_arguments(torch.bfloat16)
    copies = z.clone(), y.clone(), weight.clone()
    expected, _ = value_and_grad(lambda z: bcmf_ext.cross_entropy(z, y, weight=weight, impl="cpu"), z)
    with torch.autocast("cpu", torch.bfloat16):
        value, _ = value_and_grad(lambda z: bcmf_ext.cross_entropy(z, y, weight=weight, impl="cpu"), z)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    assert all(torch.equal(a, b) for a, b in zip((z, y, weight), copies, strict=True))


def test_inference_mode_and_no_grad() -> None:
    """Protects evaluation: the op runs without autograd."""
    z, y, _, _ = op_arguments()
    expected = bcmf_ext.cross_entropy(z, y, impl="cpu")
    with torch.inference_mode():
        assert torch.equal(bcmf_ext.cross_entropy(z, y, impl="cpu"), expected)
    with torch.no_grad():
        assert not bcmf_ext.cross_entropy(z.requires_grad_(), y, impl="cpu").requires_grad


def test_direct_calls_are_memory_safe() -> None:
    """Protects torch.ops.bcmf from arguments that would be read out of bounds."""
    z, y, weight, ignore = op_arguments()
    _, stats, denominator = torch.ops.bcmf.loss(z, y, weight, ignore)
    one = torch.tensor(1.0)
    for arguments in [(z[:, :, :3], y, weight), (z, y[:1], weight), (z, y, weight[:3]), (z[0], y, None)]:
        with pytest.raises(ValueError, match=r"shape|size|classes"):
            torch.ops.bcmf.loss(*arguments, ignore)
    with pytest.raises(ValueError, match="as bcmf::loss returned them"):
        torch.ops.bcmf.loss_backward(one, z, y, weight, stats[:, :1], denominator, ignore)
    with pytest.raises(TypeError, match="class ids"):
        torch.ops.bcmf.loss(z, y.float(), weight, ignore)
    bad = torch.ops.bcmf.loss_backward(one, z, torch.full_like(y, 99), weight, stats, denominator, ignore)
    assert bad.isnan().all()
