"""Compiles every Triton kernel to cubins without a GPU: ``python python_tests/harness/compile_triton.py [ARCH …]``.

The interpreter, which the tests use, proves neither that a kernel compiles nor that it fits. What is compiled is what
the ops launch, as Triton specialises it: they are called with tensors without data, and a driver that knows an
architecture but no device. A new op adds its calls to `calls`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bcmf_ext.ops import acc_dtype
from bcmf_ext.options import LossOptions
from bcmf_ext.triton import argmax, lmfm, loss

ARCHS = (90, 80, 100, 120)  # the first for all calls; the others, which differ in the last step alone, in bf16
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LABELS = (512, 1024)
EIGHTH, MORE = (64, 128), (600, 1100)  # of logits
BCL, FLIPPED = {"bcl_steps": (2,)}, {"bcl_steps": (1, 2), "bcl_flipped": (0.5, 0.5)}
CPG3, CPG5, CPG7 = ({"cpg_kernel_size": size, "cpg_window": size != 7} for size in (3, 5, 7))
OHEM = {"ohem_threshold": 0.7}


class Loss(NamedTuple):
    """A call of bcmf::loss and its backward."""

    logits: tuple[int, int]
    options: Mapping[str, Any] = {}
    weighted: bool = False
    channels_last: bool = False
    label_dtype: torch.dtype = torch.int64


# Every option, source of logits and layout, in few calls: CPG's kernels take seconds each. The slowest are compiled for
# arithmetic in fp32 and in fp64; other dtypes differ in how a logit is read and written.
LOSSES = (
    Loss(LABELS),
    Loss(EIGHTH, weighted=True, channels_last=True),
    Loss(LABELS, {**BCL, **CPG3}),
    Loss(EIGHTH, {**BCL, **CPG3}, label_dtype=torch.uint8),
    Loss(LABELS, OHEM, weighted=True),
    Loss((1, 1), {**BCL, **CPG3}),
)
SLOW_LOSSES = (
    Loss(LABELS, {**OHEM, **BCL, **CPG5}, weighted=True, channels_last=True),
    Loss(MORE, {**OHEM, **FLIPPED, **CPG7}, label_dtype=torch.int32),
    Loss(EIGHTH, {**FLIPPED, **CPG3, "align_corners": True}, label_dtype=torch.int16),
)


MAP, MAPS = (16, 32), ((8, 16), (4, 8), (2, 4), (1, 1))  # LMFM's, and its pools


class Sums(NamedTuple):
    """A call of bcmf::add_norm_relu and its backward."""

    channels: tuple[int, ...]
    resampled: bool = True
    added: bool = True
    joined: bool = False


LEVEL, FIRST_LEVEL = Sums((128, 128)), Sums((128, 128), added=False)
JOINED = Sums((128, 128, 128, 128, 512), resampled=False, joined=True)


class Driver:
    """An architecture without a device."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # the kernels' caches are by device

    def get_current_stream(self, device: int) -> int:
        return 0


def empty(*shape: int, dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    """A tensor without data."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def calls(dtypes: Sequence[torch.dtype]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of the ops, and what to call them."""
    for dtype in dtypes:
        for call in (*LOSSES, *(SLOW_LOSSES if dtype in (torch.bfloat16, torch.float64) else ())):
            yield f"{call}, {dtype}", partial(loss_and_gradient, call, dtype)
        for size, channels_last in itertools.product((LABELS, EIGHTH, MORE), (False, True)):
            logits = empty(2, 19, *size, dtype=dtype, channels_last=channels_last)
            yield f"arg-max of {size}, {dtype}", partial(argmax.upsample_argmax, logits, *LABELS, False)
    # Every layout and mode, as above: the slowest for arithmetic in fp32 and in fp64.
    both, half, double = (False, True), torch.bfloat16, torch.float64
    doubles = ((double, True, True), (double, False, False)) if double in dtypes else ()
    for dtype, channels_last, training in (*itertools.product([half], both, both), *doubles):
        name = f"{dtype}, channels_last {channels_last}, training {training}"
        yield f"pools, {name}", partial(pools, 512, dtype, channels_last, training)
        yield f"{LEVEL}, {name}", partial(sums, LEVEL, dtype, channels_last, training)
    yield f"{JOINED}, training", partial(sums, JOINED, half, False, True)
    yield f"{JOINED}, eval", partial(sums, JOINED, half, True, False)
    if torch.float32 in dtypes:
        yield f"{FIRST_LEVEL}", partial(sums, FIRST_LEVEL, torch.float16, True, True)
        yield "pools of fp32", partial(pools, 512, torch.float32, False, True)
    yield "pools of 30 channels", partial(pools, 30, half, True, True)


def repeated_calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """What may change from step to step, and must not have a kernel compiled anew."""
    for weight in (0.0, 0.3, 1.0):
        options = {
            **OHEM,
            **BCL,
            **CPG5,
            "ohem_min_kept": int(1e5 * weight),
            "bcl_weight": weight,
            "cpg_weight": weight,
        }
        call = Loss(LABELS, options, weighted=True, channels_last=True)
        yield f"bcl_weight {weight}", partial(loss_and_gradient, call, torch.bfloat16)
    for channels_last, size, eps in itertools.product((False, True), ((1, 3), (7, 16), (33, 20)), (0.0, 1e-3)):
        name = f"{size}, eps {eps}, channels_last {channels_last}"
        yield f"pools, {name}", partial(pools, 512, torch.bfloat16, channels_last, True, size, eps)
        yield f"{LEVEL}, {name}", partial(sums, LEVEL, torch.bfloat16, channels_last, True, size, eps)


def loss_and_gradient(call: Loss, dtype: torch.dtype) -> None:
    logits = empty(2, 19, *call.logits, dtype=dtype, channels_last=call.channels_last)
    target = empty(2, *LABELS, dtype=call.label_dtype)
    weight = empty(19, dtype=torch.float32) if call.weighted else None
    options = LossOptions(255, **call.options)
    total, _, *kept = loss.loss(logits, target, weight, *options)
    loss.loss_backward(total, logits, target, weight, *kept, *options)


def norms(channels: tuple[int, ...], dtype: torch.dtype) -> list[list[Tensor]]:
    """Weights, biases, running means and variances."""
    return [[empty(c, dtype=acc_dtype(empty(1, dtype=dtype))) for c in channels] for _ in range(4)]


def pools(
    channels: int,
    dtype: torch.dtype,
    channels_last: bool,
    training: bool,
    size: tuple[int, int] = MAP,
    eps: float = 1e-5,
) -> None:
    x, parameters = empty(2, channels, *size, dtype=dtype, channels_last=channels_last), norms((channels,) * 4, dtype)
    *outputs, stats = lmfm.pool_norm_relu(x, *parameters, training, 0.1, eps)
    lmfm.pool_norm_relu_backward(outputs, x, *parameters[:2], stats, training)


def sums(
    call: Sums,
    dtype: torch.dtype,
    channels_last: bool,
    training: bool,
    size: tuple[int, int] = MAP,
    eps: float = 1e-5,
) -> None:
    maps = partial(empty, dtype=dtype, channels_last=channels_last)
    resampled = [maps(2, c, *cells) if call.resampled else None for c, cells in zip(call.channels, MAPS, strict=False)]
    resampled += [None] * (len(call.channels) - len(resampled))
    added = [maps(2, c, *size) if call.added else None for c in call.channels]
    parameters = norms(call.channels, dtype)
    options = *size, channels_last, call.joined, training
    *outputs, stats = lmfm.add_norm_relu(resampled, added, *parameters, *options, 0.1, eps)
    lmfm.add_norm_relu_backward(outputs, resampled, added, *parameters[:2], stats, *options)


def compile_for(arch: int) -> str:
    """Compiles what all calls launch; a summary."""
    began, compiled = time.perf_counter(), set()
    driver.set_active(Driver(arch))

    def compile_only(self: Any, *arguments: Any, warmup: bool, **more: Any) -> None:
        found = launch(self, *arguments, warmup=True, **more)
        assert found.asm["cubin"]
        assert found.metadata.enable_fp_fusion is False
        compiled.add(found.hash)

    def run(calls: Iterator[tuple[str, Callable[[], Any]]]) -> int:
        for name, call in calls:
            try:
                call()
            except Exception as error:
                raise RuntimeError(f"{name}, for sm_{arch}: {error}") from error
        return len(compiled)

    launch = JITFunction.run
    with mock.patch.object(JITFunction, "run", compile_only):
        count = run(calls(DTYPES if arch == ARCHS[0] else DTYPES[:1]))
        assert arch != ARCHS[0] or run(repeated_calls()) == count, (
            "another weight, size or eps has a kernel compiled anew"
        )
    return f"sm_{arch}: {count} cubins in {time.perf_counter() - began:.0f} s"


def main() -> None:
    archs = [int(arch) for arch in sys.argv[1:]] or ARCHS
    print(f"triton {triton.__version__}")
    with ProcessPoolExecutor(2) as pool:
        for line in pool.map(compile_for, archs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
