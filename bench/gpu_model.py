"""How long a kernel takes on a GPU that is not there, by what was counted of it and by what NVIDIA publishes.

A kernel's time is that of the scarcest of six things, each at its full rate: issuing instructions, memory, the path to
shared memory and L1, and the units for integers, for fp64 and for special functions. What is left out (latency, a tail
of few blocks, launches, caches between kernels) makes a GPU slower, or memory faster. So these are figures to compare
two versions of a kernel by, and to see what binds it; no GPU has confirmed them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

VERSION = 1
"""Of these constants and of what is counted: figures of different versions are not comparable."""


@dataclass(frozen=True)
class Gpu:
    """arch: 90 for sm_90. clock in Hz, memory in bytes a second. The rates are those of a multiprocessor and a clock:
    issued is in warp instructions, integer, fp64 and special in operations of a lane, banks in bytes. The rest is what
    a multiprocessor has for its blocks, in bytes, registers, threads and blocks."""

    arch: int
    multiprocessors: int
    clock: float
    memory: float
    fp64: int
    integer: int = 64
    special: int = 16
    issued: int = 4
    banks: int = 128
    registers: int = 65536
    shared: int = 0
    threads: int = 2048
    blocks: int = 32


# From NVIDIA's architecture whitepapers (boost clocks) and from the CUDA C++ Programming Guide ("Throughput of native
# arithmetic instructions", "Technical specifications per compute capability").
GPUS = {
    "H100": Gpu(90, 132, 1.98e9, 3.35e12, fp64=64, shared=228 << 10),  # SXM5, 80 GB
    "4090": Gpu(89, 128, 2.52e9, 1.008e12, fp64=2, shared=100 << 10, threads=1536, blocks=24),
}
RESERVED_SHARED = 1 << 10  # bytes of each block


@dataclass(frozen=True)
class Work:
    """What all launches of a kernel take together: warp instructions of the machine, of these with integers (two for
    one of 64 bits), in fp64 and by special function units, passes of banks, sectors of 32 bytes that went through L1,
    and bytes of memory. blocks: of a launch."""

    instructions: float
    integer: float
    fp64: float
    special: float
    passes: float
    sectors: float
    bytes: float
    blocks: float


def times(gpu: Gpu, work: Work) -> dict[str, float]:
    """The milliseconds that each of the six things needs. A launch of few blocks leaves multiprocessors idle."""
    busy = gpu.clock * min(gpu.multiprocessors, work.blocks)
    seconds = {
        "issue": work.instructions / (busy * gpu.issued),
        "memory": work.bytes / gpu.memory,
        "shared": (work.passes * 128 + work.sectors * 32) / (busy * gpu.banks),
        "integer": 32 * work.integer / (busy * gpu.integer),
        "fp64": 32 * work.fp64 / (busy * gpu.fp64),
        "special": 32 * work.special / (busy * gpu.special),
    }
    return {name: 1e3 * needed for name, needed in seconds.items()}


def occupancy(gpu: Gpu, threads: int, registers: int, shared: int) -> float:
    """The share of a multiprocessor's threads that its blocks take. threads and shared (bytes) are those of a block,
    registers those of a thread."""
    warps = -(-threads // 32)
    # Registers and shared memory are given out in such pieces, and registers to the warps of four schedulers.
    of_a_warp = -(-registers * 32 // 256) * 256
    of_a_block = -(-(shared + RESERVED_SHARED) // 128) * 128
    limits: Mapping[str, int] = {
        "registers": gpu.registers // 4 // of_a_warp * 4 // warps,
        "shared": gpu.shared // of_a_block,
        "threads": gpu.threads // (32 * warps),
        "blocks": gpu.blocks,
    }
    return min(limits.values()) * warps * 32 / gpu.threads
