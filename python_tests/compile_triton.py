"""Compiles every Triton kernel to cubins without a GPU: ``python python_tests/compile_triton.py [ARCH …]``.

The interpreter, which the tests use, proves neither that a kernel compiles nor that it fits. What is compiled is what
the ops launch, as Triton specialises it: they are called with tensors without data, and a driver that knows an
architecture but no device. A new op adds its calls to `calls`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from bcmf_ext.ops import LossOptions
from bcmf_ext.triton import argmax, launch, loss

ARCHS = (80, 90, 100, 120)
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
# Of logits, for labels of 512x1024: as many, an eighth, a quarter, more than labels.
SIZES = {"direct": (512, 1024), "eighth": (64, 128), "quarter": (128, 256), "more": (600, 1100)}
MIXES: Mapping[str, Mapping[str, Any]] = {
    "CE": {},
    "CE + BCL + CPG": {"bcl_steps": (2,), "bcl_nms_size": 3, "cpg_kernel_size": 3},
    "weighted OHEM + BCL + CPG5": {"ohem_threshold": 0.7, "bcl_steps": (1, 2), "bcl_nms_size": 3, "cpg_kernel_size": 5},
    "CE + flipped BCL + CPG7 by centres": {
        "bcl_steps": (2,), "bcl_flipped": (0.5, 0.5), "cpg_kernel_size": 7, "cpg_window": False
    },
}  # fmt: skip


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
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls of the ops, by a name that tells dtype and options."""
    for dtype, (place, size), (mix, options) in itertools.product(DTYPES, SIZES.items(), MIXES.items()):
        for channels_last in (False, True) if mix.startswith("CE + BCL") or mix == "CE" else (False,):
            logits = empty(2, 19, *size, dtype=dtype, channels_last=channels_last)
            name = f"{mix}, {place}{', channels_last' * channels_last}, {dtype}"
            label_dtype = torch.uint8 if place == "eighth" else torch.int64
            yield name, lambda z=logits, o=options, w="weighted" in mix, t=label_dtype: step(z, o, w, t)
    for dtype, (place, size), channels_last in itertools.product(DTYPES, SIZES.items(), (False, True)):
        logits = empty(2, 19, *size, dtype=dtype, channels_last=channels_last)
        yield f"arg-max, {place}, {dtype}", lambda z=logits: argmax.upsample_argmax(z, 512, 1024, False)


def step(logits: Tensor, options: Mapping[str, Any], weighted: bool, label_dtype: torch.dtype) -> None:
    """Forward and backward of a loss."""
    target = empty(logits.shape[0], 512, 1024, dtype=label_dtype)
    weight = empty(logits.shape[1], dtype=torch.float32) if weighted else None
    given = LossOptions(255, **options)
    total, _, *kept = loss.loss(logits, target, weight, *given)
    loss.loss_backward(total, logits, target, weight, *kept, *given)


def compile_for(arch: int) -> str:
    """Compiles what all calls launch; a summary."""
    began, compiled, spilling = time.perf_counter(), {}, set()
    driver.set_active(Driver(arch))

    def compile_kernel(kernel: Any, programs: int, arguments: Mapping[str, Any], **more: Any) -> None:
        arguments = {**arguments, **more}
        taken = {name: arguments[name] for name in kernel.arg_names if name in arguments}
        warps = arguments.get("num_warps", 4)
        found = kernel.warmup(**taken, **launch.OPTIONS, num_warps=warps, grid=(programs,))
        assert found.asm["cubin"]
        compiled[found.hash] = kernel.fn.__name__

    for name, call in calls():
        with mock.patch.multiple(loss, run=compile_kernel), mock.patch.object(argmax, "run", compile_kernel):
            with mock.patch.object(launch, "run", compile_kernel):
                try:
                    call()
                except Exception as error:
                    raise SystemExit(f"{name}, for sm_{arch}: {error}") from error
    return f"sm_{arch}: {len(compiled)} cubins in {time.perf_counter() - began:.0f} s"


def main() -> None:
    archs = [int(arch) for arch in sys.argv[1:]] or ARCHS
    print(f"triton {triton.__version__}")
    with ProcessPoolExecutor(2) as pool:
        for line in pool.map(compile_for, archs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
