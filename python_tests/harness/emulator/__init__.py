"""The CUDA kernels without a GPU: csrc/cuda, compiled by g++ over include/emulator.h, as torch ops on CPU tensors.

``load()`` defines ``torch.ops.bcmf_emulated``; ``set_order`` runs blocks and threads in another order, and
``set_shared_memory`` makes a smaller device.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import zlib
from ctypes import CDLL
from pathlib import Path

from torch.library import Library
from torch.utils import cpp_extension

from bcmf_ext import ops

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc"
ORDERS = ("forward", "reversed", "shuffled")
LAUNCHERS = ("loss", "lmfm")  # of csrc/cuda; each has a file here
OWN = ("order", "device", *LAUNCHERS)
OPS = ("cuda/loss_op.cpp", "cuda/lmfm/lmfm_op.cpp", "loss_tensors.cpp", "cpu/memory.cpp")  # of csrc
LIB = Library("bcmf_emulated", "DEF")


def why_not() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    if not SOURCES.is_dir():
        return "csrc is not there"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found" if missing else None


def compile_sanitized(source: str, executable: Path, include: str = "include") -> None:
    """Compiles a program of this folder with AddressSanitizer and UndefinedBehaviorSanitizer; include: its folder."""
    flags = ["-std=c++20", "-O1", "-g", "-Wno-unknown-pragmas", "-Wno-psabi", "-fsanitize=address,undefined"]
    headers = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]  # for the half types
    includes = [f"-I{HERE / include}", f"-I{SOURCES}", *headers]
    command = ["g++", *flags, "-fno-sanitize-recover=all", *includes, str(HERE / source), "-o", str(executable)]
    subprocess.run(command, check=True)


@functools.cache
def load() -> CDLL:
    """Compiles the kernels (half a minute; the result is kept in torch's folder of extensions) and defines their ops.

    ``LOSS`` takes them in: ``ops.LOSS["cpu"] = emulator.LOSS`` runs every caller of bcmf::loss on them.
    """
    library = cpp_extension.load(
        f"bcmf_emulated_{zlib.crc32(bytes(SOURCES)):08x}",  # each source tree has a folder of its own
        [*(str(HERE / f"{name}.cpp") for name in OWN), *(str(SOURCES / name) for name in OPS)],
        extra_include_paths=[str(HERE / "include"), str(SOURCES)],  # the files here come before those of csrc
        extra_cflags=["-std=c++20", "-O2", "-fvisibility=hidden", "-Wno-unknown-pragmas"],
        is_python_module=False,
    )
    return CDLL(str(library))


def set_order(order: str) -> None:
    """Of blocks, and of the threads between two barriers."""
    load().bcmf_emulated_set_order(ORDERS.index(order))


def set_shared_memory(kib: int) -> None:
    """Of a block, as the device says it has; 99 until it is set."""
    load().bcmf_emulated_set_shared_memory(kib << 10)


LOSS = ops.define_loss(LIB, "loss")
LOSS_HALVES = ops.define_loss_halves(LIB)
UPSAMPLE_ARGMAX = ops.define_upsample_argmax(LIB, "upsample_argmax")
POOL_NORM_RELU = ops.define_pool_norm_relu(LIB, "pool_norm_relu")
ADD_NORM_RELU = ops.define_add_norm_relu(LIB, "add_norm_relu")
