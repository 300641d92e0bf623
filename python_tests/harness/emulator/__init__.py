"""The CUDA kernels without a GPU: csrc/cuda, compiled by g++ over include/emulator.h, as torch ops on CPU tensors.

``load()`` defines ``torch.ops.bcmf_emulated``; ``in_order`` runs blocks and threads in another order, and
``set_shared_memory`` makes a smaller device.
"""

from __future__ import annotations

import functools
import os
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


def build_folder() -> Path:
    """Where what is compiled is kept: in torch's folder of extensions, one for each source tree."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / f"bcmf_emulated_{zlib.crc32(bytes(SOURCES)):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def load() -> CDLL:
    """Compiles the kernels (half a minute; the result is kept in torch's folder of extensions)."""
    folder = build_folder()
    library = cpp_extension.load(
        folder.name,
        [
            *wrap_launchers(folder),
            str(HERE / "order.cpp"),
            *cuda_ops.SOURCES,
            str(SOURCES / "cpu/memory.cpp"),
        ],
        extra_include_paths=[str(HERE / "include"), str(SOURCES)],  # the files here come before those of csrc
        extra_cflags=["-std=c++20", "-O2", "-fvisibility=hidden", "-Wno-unknown-pragmas"],
        build_directory=str(folder),
        is_python_module=False,
    )
    return CDLL(str(library))


def wrap_launchers(folder: Path) -> list[str]:
    """Files in a folder that g++ compiles as C++, one for each launcher, which it includes with its kernels."""
    wrapped = {folder / f"{Path(name).stem}.cpp": f'#include "{name}"\n' for name in cuda_ops.LAUNCHERS}
    for path, text in wrapped.items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
    return list(map(str, wrapped))


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
