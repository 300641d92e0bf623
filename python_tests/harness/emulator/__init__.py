"""The CUDA kernels without a GPU: csrc/cuda, compiled by g++ over include/emulator.h, as torch ops on CPU tensors.

``load()`` defines ``torch.ops.bcmf_emulated``; ``in_order`` runs blocks and threads in another order, and
``set_shared_memory`` makes a smaller device.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL
from pathlib import Path

from torch.library import Library
from torch.utils import cpp_extension

from harness import cuda_ops

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc"
ORDERS = ("forward", "reversed", "shuffled")
LAUNCHERS = ("loss", "lmfm")  # of csrc/cuda; each has a file here
OWN = ("order", *LAUNCHERS)
LIB = Library("bcmf_emulated", "DEF")
OPS = cuda_ops.define(LIB)


def why_not() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    if not SOURCES.is_dir():
        return "csrc is not there"
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found" if missing else None


def compile_program(source: Path, executable: Path, *flags: str, include: str = "include") -> None:
    """Compiles a program over the emulator; include: the folder whose files come before those of csrc."""
    headers = [f"-isystem{folder}" for folder in cpp_extension.include_paths()]  # for the half types
    includes = [f"-I{HERE / include}", f"-I{SOURCES}", *headers]
    command = ["g++", "-std=c++20", "-Wno-unknown-pragmas", "-Wno-psabi", *includes, *flags]
    subprocess.run([*command, str(source), "-o", str(executable)], check=True)


def compile_sanitized(source: str, executable: Path, include: str = "include") -> None:
    """Compiles a program of this folder with AddressSanitizer and UndefinedBehaviorSanitizer; include: its folder."""
    flags = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    compile_program(HERE / source, executable, *flags, include=include)


@functools.cache
def load() -> CDLL:
    """Compiles the kernels (half a minute; the result is kept in torch's folder of extensions)."""
    library = cpp_extension.load(
        f"bcmf_emulated_{zlib.crc32(bytes(SOURCES)):08x}",  # each source tree has a folder of its own
        [
            *(str(HERE / f"{name}.cpp") for name in OWN),
            *cuda_ops.SOURCES,
            str(SOURCES / "cpu/memory.cpp"),
        ],
        extra_include_paths=[str(HERE / "include"), str(SOURCES)],  # the files here come before those of csrc
        extra_cflags=["-std=c++20", "-O2", "-fvisibility=hidden", "-Wno-unknown-pragmas"],
        is_python_module=False,
    )
    return CDLL(str(library))


@contextmanager
def in_order(order: str) -> Iterator[None]:
    """Runs blocks, and the threads between two barriers, in one of ORDERS within."""
    load().bcmf_emulated_set_order(ORDERS.index(order))
    try:
        yield
    finally:
        load().bcmf_emulated_set_order(0)


def set_shared_memory(kib: int) -> None:
    """Of a block, as the device says it has; 99 until it is set."""
    load().bcmf_emulated_set_shared_memory(kib << 10)
