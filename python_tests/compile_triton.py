"""Compiles every Triton kernel to cubins without a GPU: ``python python_tests/compile_triton.py [ARCH …]``.

The interpreter, which the tests use, proves neither that a kernel compiles nor that it fits. A new op adds its
specialisations: kernel, dtype of the logits, and the values of its constexprs.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bcmf_ext.triton import loss

ARCHS = (80, 90, 100, 120)
DTYPES = {"fp16": "fp32", "bf16": "fp32", "fp32": "fp32", "fp64": "fp64"}  # of the logits, of the arithmetic

# What the arguments are. Sizes and strides arrive as i32 or i64, by their value.
POINTERS = {
    "scalar": ("logits", "grad"),
    "acc": ("weight", "stats", "nlls", "exceeds", "total", "terms", "summary", "grad_total"),
    "fp64": ("partials",),
    "i64": ("selection", "histogram"),
    "u8": ("target",),
}


def specialisations() -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """(kernel, dtype of the logits, constexprs)"""
    for dtype, weighted, ohem in itertools.product(DTYPES, (False, True), (False, True)):
        acc = getattr(loss.tl, {"fp32": "float32", "fp64": "float64"}[DTYPES[dtype]])
        options = {"ACC": acc, "WEIGHTED": weighted, "OHEM": ohem, "BLOCK": loss.BLOCK}
        yield loss._forward, dtype, options
        yield loss._backward, dtype, options
    for dtype, key_bits in (("fp32", 32), ("fp64", 64)):
        yield loss._finish, dtype, {"BLOCK": loss.FINISH_BLOCK}
        yield loss._ohem_begin, dtype, {"BLOCK": loss.FINISH_BLOCK}
        for shift, bits in loss.digits(key_bits):
            yield loss._ohem_count, dtype, {"SHIFT": shift, "BITS": bits, "BLOCK": loss.BLOCK}
            yield loss._ohem_choose, dtype, {"SHIFT": shift, "BITS": bits}
        for weighted in (False, True):
            yield loss._ohem_sum, dtype, {"WEIGHTED": weighted, "BLOCK": loss.BLOCK}


def signature(kernel: Any, dtype: str, constexprs: dict[str, Any], integer: str) -> dict[str, str]:
    types = {"scalar": dtype, "acc": DTYPES[dtype]}
    pointers = {name: f"*{types.get(kind, kind)}" for kind, names in POINTERS.items() for name in names}
    return {name: "constexpr" if name in constexprs else pointers.get(name, integer) for name in kernel.arg_names}


def main() -> None:
    archs = [int(arch) for arch in sys.argv[1:]] or ARCHS
    began, count = time.perf_counter(), 0
    for kernel, dtype, constexprs in specialisations():
        ones = {name: 1 for name in ("stride_w", "grad_stride_w") if name in kernel.arg_names}
        # As launches do it: an argument of 1 is a constant.
        for arch, integer, fixed in [*((arch, "i64", {}) for arch in archs), (archs[0], "i32", ones)]:
            values = {**constexprs, **fixed}
            source = ASTSource(kernel, signature(kernel, dtype, values, integer), values)
            compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32))
            assert compiled.asm["cubin"]
            count += 1
    seconds = time.perf_counter() - began
    print(f"{count} cubins for sm_{', '.join(map(str, archs))} by triton {triton.__version__}: {seconds:.0f} s")


if __name__ == "__main__":
    main()
