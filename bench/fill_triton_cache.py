"""Fills Triton's cache with what the benches launch: ``python bench/fill_triton_cache.py [--op NAME …]``, on a GPU.

Triton compiles a kernel when it is first launched, one after the other. Here each problem of bench/kernels.py runs once
in Triton, dealt out to as many processes as there are cores, twelve at most. It needs no nvcc and no extension, so that
it can run beside the build.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

from kernels import OPS, parser
from problem import make_labels

from bcmf_ext.engine import choose_device
from bcmf_ext.errors import run_command

MOST = 12  # Each has a context and a problem's tensors on the GPU.


def run_part(part: int, parts: int, arguments: argparse.Namespace) -> int:
    """Runs each parts-th problem; how many of them have Triton kernels."""
    n, c, height, width = arguments.size
    labels = make_labels(arguments.labels, n, height, width).to(choose_device(arguments.device))
    problems = itertools.chain.from_iterable(OPS[op](labels, c) for op in arguments.op)
    ran = 0
    for problem in itertools.islice(problems, part, None, parts):
        if "triton" in problem.contenders:
            problem.backward(problem.contenders["triton"](problem.input))
            ran += 1
    return ran


def main() -> None:
    arguments = parser(__doc__).parse_args()
    parts = min(MOST, os.cpu_count() or 1)
    with ProcessPoolExecutor(parts, multiprocessing.get_context("spawn")) as pool:  # CUDA survives no fork.
        ran = sum(pool.map(partial(run_part, parts=parts, arguments=arguments), range(parts)))
    print(f"{ran} problems ran in Triton, in {parts} processes")


if __name__ == "__main__":
    run_command(main)
