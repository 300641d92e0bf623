"""The C++ kernels on the CPU: what the suite of test_ops.py, which runs on all backends, cannot see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bcmf_ext
from bcmf_ext import dispatch
from bcmf_ext.options import LossOptions

pytestmark = pytest.mark.skipif(dispatch.EXTENSION is None, reason=f"no extension: {dispatch.why_not('cpu', 'cpu')}")


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


def test_kernels_use_torch_threads() -> None:
    """Protects speed: kernels run on torch's pool of threads, and no library of kernels brings another one."""
    code = (
        "import os, time, torch, bcmf_ext\n"
        "torch.set_num_threads(4)\n"
        "def threads(): return set(os.listdir('/proc/self/task'))\n"
        "before = threads()\n"
        "z, y = torch.zeros(2, 5, 64, 64), torch.zeros(2, 64, 64).long()\n"
        "bcmf_ext.cross_entropy(z, y, impl='cpu')\n"
        "ours = threads() - before\n"
        "torch.zeros(1 << 20).exp()\n"
        "print(len(ours), threads() - before == ours)\n"
    )
    if not Path("/proc/self/task").exists():
        pytest.skip("no /proc/self/task to look at")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["3", "True"], done.stderr  # and torch found them there


def test_the_instruction_set_is_torchs() -> None:
    """Protects speed where nobody asks for an instruction set: ours is chosen by torch's rule."""
    torchs = torch.backends.cpu.get_cpu_capability()
    assert dispatch.EXTENSION.build_info()["cpu_capability"] == torchs.replace("DEFAULT", "baseline")


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set(capability: str) -> None:
    """Protects the variants that this machine would not choose: each gives the reference's value and gradient, and
    the metrics' distances."""
    code = (
        "import torch, bcmf_ext\n"
        "from bcmf_ext.metrics import upsample_argmax\n"
        "g = torch.Generator().manual_seed(0)\n"
        "y = torch.randint(0, 7, (2, 33, 35), generator=g); y[0, 0] = 255\n"
        "for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):\n"
        "    z = torch.randn(2, 7, 33, 35, generator=g).to(dtype).requires_grad_()\n"
        "    for ohem in (None, bcmf_ext.OHEM(0.1, 500)):\n"
        "        given = dict(ohem=ohem, weight=torch.rand(7, generator=g))\n"
        "        ours, truth = (bcmf_ext.cross_entropy(z, y, impl=i, **given) for i in ('cpu', 'torch'))\n"
        "        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=0)\n"
        "        grads = [torch.autograd.grad(v, z)[0] for v in (ours, truth)]\n"
        "        torch.testing.assert_close(*grads, rtol=2 * torch.finfo(dtype).eps + 2e-6, atol=1e-7)\n"
        "    logits = torch.randn(2, 7, 9, 11, generator=g).to(dtype).requires_grad_()\n"
        "    for z, k in ((z, 3), (logits, 5), (logits, 7), (1e8 * logits.float(), 3)):\n"
        "        terms = dict(cpg=bcmf_ext.CPG(0.7, k), align_corners=k != 5)\n"
        "        values = [bcmf_ext.segmentation_loss(z, y, impl=i, **terms).total for i in ('cpu', 'torch')]\n"
        "        torch.testing.assert_close(*values, rtol=4e-6, atol=0)\n"
        "        grads = [torch.autograd.grad(v, z)[0] for v in values]\n"
        "        torch.testing.assert_close(*grads, rtol=2 * torch.finfo(dtype).eps + 2e-5, atol=1e-6)\n"
        "    areas = y[:, ::5, ::5].repeat_interleave(5, 1)[:, :33].repeat_interleave(5, 2)[:, :, :35]\n"
        "    bcl = lambda i: bcmf_ext.boundary_corrected_loss(logits, areas, align_corners=True, impl=i)\n"
        "    values = [bcl(i) for i in ('cpu', 'torch')]\n"
        "    torch.testing.assert_close(*values, rtol=1e-5, atol=0)\n"
        "    grads = [torch.autograd.grad(v, logits)[0] for v in values]\n"
        "    torch.testing.assert_close(*grads, rtol=2 * torch.finfo(dtype).eps + 2e-5, atol=1e-6)\n"
        "    assert torch.equal(upsample_argmax(logits, (7, 9)), upsample_argmax(logits.double(), (7, 9)))\n"
        "from bcmf_ext.metrics import boundary\n"
        "near, far = torch.rand(2, 1, 150, 70, generator=g)\n"
        "for classes, radii in ((7, (1, 3, 12)), (1, (1, 3, 12)), (7, (20,)), (1, (20,))):\n"
        "    labels = torch.randint(0, classes, (2, 1, 150, 70), generator=g, dtype=torch.uint8)\n"
        "    maps = labels[0].where(near < 0.3, 255), labels[1].where(far < 0.02, 255)\n"
        "    for given in (maps, [map.int() for map in maps]):\n"
        "        found = [f(*given, classes, radii) for f in (boundary.match_within, boundary._match_within)]\n"
        "        assert torch.equal(*found) and len(found[0].unique()) == len(radii) + 1\n"
        "print(bcmf_ext.dispatch.EXTENSION.build_info()['cpu_capability'].lower())\n"
        "print(torch.backends.cpu.get_cpu_capability().lower())\n"
    )
    if capability == "avx512" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this CPU has no AVX-512")
    if capability == "avx2" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no AVX2")
    env = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [{"default": "baseline"}.get(capability, capability), capability]  # as torch chooses


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_half_number_is_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    """Protects our own conversions: each of the 65,536 patterns as a logit, and gradients rounded to nearest even."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    z = torch.stack([bits.view(dtype), torch.zeros(2**16, dtype=dtype)]).view(1, 2, 256, 256)
    y = torch.ones(1, 256, 256, dtype=torch.uint8)
    stats = torch.ops.bcmf.loss(z, y, None, *LossOptions(255))[2]
    highest = torch.where(z[0, 0].isnan() | (z[0, 0] > 0), z[0, 0], 0).float()
    torch.testing.assert_close(stats[0, 0], highest, rtol=0, atol=0, equal_nan=True)
    # The gradient of a single pixel's other logit is upstream · p, and p is 1 up to rounding: any float comes out.
    upstream = torch.cat([bits.view(dtype).float(), torch.randn(2**16) * 2.0 ** torch.randint(-30, 15, (2**16,))])
    midpoints = (bits.view(dtype).float() + bits.roll(1).view(dtype).float()) / 2
    z = torch.tensor([0.0, 200.0], dtype=dtype).view(1, 2, 1, 1)
    y = torch.zeros(1, 1, 1, dtype=torch.uint8)
    _, _, *kept = torch.ops.bcmf.loss(z, y, None, *LossOptions(255))
    for value in torch.cat([upstream, midpoints])[:: 2**17 // 5000]:
        grad = torch.ops.bcmf.loss_backward(value, z, y, None, *kept, *LossOptions(255))
        assert torch.equal(grad[0, 1, 0, 0], value.to(dtype)) or value.isnan()


def test_memory_that_is_kept_belongs_to_one_tensor_at_a_time() -> None:
    """Protects gradients that are still in use, and the memory of a program that no longer computes losses; and large
    gradients altogether, which are written past the cache."""
    generator = torch.Generator().manual_seed(0)
    size = (701, 659)  # odd: no row begins or ends where a vector does
    y = torch.randint(0, 19, (1, *size), generator=generator)
    z = [torch.randn(1, 19, *size, generator=generator).requires_grad_() for _ in range(2)]  # 33 MiB each

    def gradients(impl: str = "cpu") -> list[torch.Tensor]:
        return [torch.autograd.grad(bcmf_ext.cross_entropy(logits, y, impl=impl), logits)[0] for logits in z]

    first = gradients()
    expected = [grad.clone() for grad in first]
    torch.testing.assert_close(expected, gradients("torch"), rtol=1e-5, atol=1e-11)
    assert first[0].data_ptr() != first[1].data_ptr()
    used = {grad.data_ptr() for grad in first}
    del first
    again = gradients()
    assert {grad.data_ptr() for grad in again} == used  # the same memory
    bcmf_ext.release_kept_memory()
    more = gradients()
    for found in (again, more):
        assert all(torch.equal(grad, wanted) for grad, wanted in zip(found, expected, strict=True))
    again[0].zero_()
    assert torch.equal(more[0], expected[0])


def test_memory_that_is_not_there() -> None:
    """Protects users from a bare MemoryError: a sentence says how much was asked for. (No pixel is ever touched.)"""
    z = torch.zeros(1, 2, 1, 1).expand(1, 2, 2**23, 2**23)
    y = torch.zeros(1, 1, 1, dtype=torch.uint8).expand(1, 2**23, 2**23)
    with pytest.raises(RuntimeError, match=r"no 536870912 MiB of memory for this loss: take fewer or smaller images"):
        bcmf_ext.cross_entropy(z, y, impl="cpu")


def test_too_little_memory_is_said_in_words() -> None:
    """Protects the sentences of commands, and of trainers that take smaller batches: they look for these words."""
    code = (
        "import resource, torch, bcmf_ext\n"
        "n, options = (1 << 61) + (1 << 22), bcmf_ext.options.LossOptions(255)\n"
        "z, y = torch.zeros(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 1, 1).byte()\n"
        "bcmf_ext.cross_entropy(z, torch.zeros(1, 4, 4).long(), impl='cpu').backward()\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), -1))\n"
        "for call in (\n"
        "    lambda: bcmf_ext.metrics.upsample_argmax(z.detach(), (1 << 14, 1 << 14)),\n"
        "    lambda: bcmf_ext.cross_entropy(z, y.expand(1, 1 << 14, 1 << 14), impl='cpu'),\n"
        "    lambda: torch.ops.bcmf.loss_sums(z[:, :, :1, :1].expand(n, 2, 1, 1), y.expand(n, 1, 1), None, *options),\n"
        "):\n"
        "    try:\n"
        "        call()\n"
        "    except RuntimeError as error:\n"
        "        print(type(error).__name__, error)\n"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc/self/statm to look at")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    argmax, loss, endless = done.stdout.splitlines()
    size = "[1, 16384, 16384] (256 MiB) on cpu"
    assert argmax == f"RuntimeError Out of memory: bcmf_ext found no room for a tensor of the size {size}."
    assert loss.startswith("RuntimeError bcmf_ext: the system has no 2048 MiB of memory for this loss")
    assert endless.startswith("RuntimeError Out of memory: ")
