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
from bcmf_ext.triton import argmax, lmfm, loss, srm

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
    labels: tuple[int, int] = LABELS


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
        yield f"SRM, {dtype}", partial(refined, dtype)
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


class Repeated(NamedTuple):
    """Calls that differ in what may change from step to step or from image to image: a kernel is compiled for all of
    them once, or twice, if it is one of `by_alignment`, which gain where all rows begin at multiples of 16 entries.
    in_16_bytes: these kernels then read so many at once."""

    name: str
    calls: Sequence[Callable[[], Any]]
    by_alignment: tuple[str, ...] = ()
    in_16_bytes: bool = False


# Of labels: multiples of 16, other even and odd ones, whose rows are aligned or not; and single rows, columns, pixels.
WIDE = ((512, 1024), (1080, 1920), (360, 480), (33, 16), (513, 1025), (375, 1242), (333, 500), (64, 100), (720, 1001))
THIN = ((1, 1), (97, 1), (1, 97))
MAP_SIZES = ((1, 3), (7, 16), (33, 20), (1, 16), (16, 1), (2, 2), (16, 32), (17, 31), (48, 64), (5, 5))  # LMFM's


def repeated_calls() -> Iterator[Repeated]:
    """What must not have a kernel compiled anew."""
    half, dense = torch.bfloat16, ("dense_forward", "dense_backward")
    options = {**OHEM, **BCL, **CPG5}
    weights = [
        {**options, "ohem_min_kept": int(1e5 * weight), "bcl_weight": weight, "cpg_weight": weight}
        for weight in (0.0, 0.3, 1.0)
    ]
    losses = [Loss(LABELS, each, weighted=True, channels_last=True) for each in weights]
    yield Repeated("weights", [partial(loss_and_gradient, each, half) for each in losses])
    # At label size alignment is that of rows; from 1/8, where labels are read quad by quad, that of logits' gradients.
    equal, eighths = [(size, size) for size in (*WIDE, *THIN)], [(eighth(*size), size) for size in WIDE]
    for name, sizes, channels_last, options, by_alignment in (
        ("label size", equal, False, {**BCL, **CPG3}, (*dense, "bcl_select")),
        ("label size", equal, True, OHEM, (*dense, "ohem_count", "ohem_sum")),
        ("from 1/8", eighths, False, {**BCL, **CPG3}, ("bcl_select", "low_gather_quads")),
        ("from 1/8", eighths, True, OHEM, ("ohem_count", "low_gather_quads")),
    ):
        losses = [Loss(low, options, channels_last=channels_last, labels=size) for low, size in sizes]
        calls = [partial(loss_and_gradient, each, half) for each in losses]
        in_16_bytes = sizes is equal and not channels_last
        yield Repeated(f"loss, {name}, channels_last {channels_last}", calls, by_alignment, in_16_bytes)
        maps = [empty(1, 19, *low, dtype=half, channels_last=channels_last) for low, _ in sizes]
        calls = [partial(argmax.upsample_argmax, z, *size, False) for z, (_, size) in zip(maps, sizes, strict=True)]
        by_alignment = ("argmax",) if sizes is equal else ()
        yield Repeated(f"arg-max, {name}, channels_last {channels_last}", calls, by_alignment, in_16_bytes)
    yield Repeated("SRM", [partial(refined, half, *sizes) for sizes in REFINED])
    for channels_last in (False, True):
        for name, call in (("pools", partial(pools, 512)), (f"{LEVEL}", partial(sums, LEVEL))):
            calls = [
                partial(call, half, channels_last, True, size, eps)
                for size, eps in zip(MAP_SIZES, itertools.cycle((0.0, 1e-3)), strict=False)
            ]
            yield Repeated(f"{name}, channels_last {channels_last}", calls)


REFINED = ((16, 32), (64, 128)), ((15, 20), (45, 60)), ((7, 9), (7, 18)), ((1, 1), (1, 1)), ((33, 17), (264, 136))


def refined(
    dtype: torch.dtype, low: tuple[int, int] = (16, 32), size: tuple[int, int] = (64, 128), channels: int = 128
) -> None:
    maps = partial(empty, 2, dtype=dtype, channels_last=True)
    given, raw, residual = maps(channels, *low), maps(11, *size), maps(channels, *size)
    srm.srm_backward(srm.srm(given, raw, residual), given, raw)


def eighth(height: int, width: int) -> tuple[int, int]:
    return -(-height // 8), -(-width // 8)


def loss_and_gradient(call: Loss, dtype: torch.dtype) -> None:
    logits = empty(2, 19, *call.logits, dtype=dtype, channels_last=call.channels_last)
    target = empty(2, *call.labels, dtype=call.label_dtype)
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
    began = time.perf_counter()
    compiled: dict[str, dict[str, str]] = {}  # of each kernel the PTX of its variants
    driver.set_active(Driver(arch))

    def compile_only(self: Any, *arguments: Any, warmup: bool, **more: Any) -> None:
        found = launch(self, *arguments, warmup=True, **more)
        assert found.asm["cubin"]
        assert found.metadata.enable_fp_fusion is False
        compiled.setdefault(self.fn.__name__, {})[found.hash] = found.asm["ptx"]

    def run(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:
            raise RuntimeError(f"{name}, for sm_{arch}: {error}") from error

    launch = JITFunction.run
    with mock.patch.object(JITFunction, "run", compile_only):
        for name, call in calls(DTYPES if arch == ARCHS[0] else DTYPES[:1]):
            run(name, call)
        count = sum(map(len, compiled.values()))
        for repeated in repeated_calls() if arch == ARCHS[0] else ():
            compiled.clear()
            run(repeated.name, repeated.calls[0])
            alone = {kernel: len(variants) for kernel, variants in compiled.items()}
            for call in repeated.calls[1:]:
                run(repeated.name, call)
            check_variants(repeated, alone, compiled)
    return f"sm_{arch}: {count} cubins in {time.perf_counter() - began:.0f} s"


def check_variants(repeated: Repeated, alone: Mapping[str, int], compiled: Mapping[str, Mapping[str, str]]) -> None:
    """Whether no kernel was compiled anew but for alignment. alone: how many variants the first call needs."""
    for kernel, variants in compiled.items():
        expected = alone.get(kernel, 0) * (2 if kernel in repeated.by_alignment else 1)
        found = f"{repeated.name}: {len(variants)} variants of {kernel}"
        assert len(variants) == expected, f"{found} instead of {expected}"
        if repeated.in_16_bytes and kernel in repeated.by_alignment:
            wide = sum("ld.global.v4" in ptx for ptx in variants.values())
            assert wide == expected // 2, f"{found}, {wide} of which read 16 bytes at once"


def main() -> None:
    archs = [int(arch) for arch in sys.argv[1:]] or ARCHS
    print(f"triton {triton.__version__}")
    with ProcessPoolExecutor(2) as pool:
        for line in pool.map(compile_for, archs):
            print(line, flush=True)


if __name__ == "__main__":
    main()
