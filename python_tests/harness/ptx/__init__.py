"""nvcc's own output without a GPU: the PTX of csrc/cuda, run on the CPU as torch ops on CPU tensors.

``load()`` compiles it with nvcc's host code, so that launches are what they are on a GPU, and defines
``torch.ops.bcmf_ptx``. What runs is checked: bounds and alignment of global and shared memory, initialisation of
global memory (shared memory is full of NaN at first), races, barriers, shuffles, launches. What runs is counted:
``counts()``.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from ctypes import CDLL, c_char_p, c_int64, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

from torch.library import Library
from torch.utils import cpp_extension

from harness import cuda_ops

HERE = Path(__file__).parent
SOURCES = HERE.parents[2] / "csrc"
LAUNCHERS = cuda_ops.LAUNCHERS
EXECUTOR = ("program", "arithmetic", "memory", "decode", "execute", "allocations", "kernels", "python")
FLAGS = (
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
)
OBJECT = ("-c", "-Xcompiler", "-fPIC,-fvisibility=hidden")
GENERATION = 80
"""Of the PTX that is compiled in."""
ORDERS = ("forward", "reversed", "shuffled")
LIB = Library("bcmf_ptx", "DEF")
OPS = cuda_ops.define(LIB)


def why_not() -> str | None:
    """Why the PTX cannot be made or run here; None if it can."""
    if not SOURCES.is_dir():
        return "csrc is not there"
    missing = [tool for tool in ("nvcc", "g++", "ninja") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found" if missing else None


def build_folder() -> Path:
    """Where what is compiled is kept: in torch's folder of extensions, one for each source tree."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()
    folder = Path(root) / f"bcmf_ptx_{zlib.crc32(bytes(SOURCES)):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compile_by_nvcc(source: Path, suffix: str, *flags: str) -> Path:
    """What nvcc makes of a source; RuntimeError if it cannot. It is kept under a name that tells the contents of what
    it may include."""
    files = {source, *HERE.glob("*.h"), *(path for path in SOURCES.rglob("*") if path.suffix in (".cuh", ".h"))}
    contents = b"".join(path.read_bytes() for path in sorted(files)) + " ".join(flags).encode()
    target = build_folder() / f"{source.stem}-{hashlib.sha256(contents).hexdigest()[:16]}{suffix}"
    with (build_folder() / f"{source.stem}.lock").open("w") as lock:  # of several processes one makes it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            unfinished = target.with_name(f"unfinished-{target.name}")
            command = ["nvcc", "-std=c++17", "-O3", "-diag-suppress=177", f"-I{SOURCES}", *flags, str(source)]
            if subprocess.run([*command, "-o", str(unfinished)]).returncode != 0:
                raise RuntimeError(f"nvcc does not compile {source}: it has said why.")
            unfinished.replace(target)
    return target


def compile_kernels(source: Path, generation: int = GENERATION) -> Path:
    """The object file of a .cu: the host's code, and PTX of this generation, without machine code, as text."""
    arch = f"arch=compute_{generation},code=compute_{generation}"
    return compile_by_nvcc(source, ".o", *OBJECT, "-gencode", arch, "-lineinfo", "--no-compress")


def text_of(launcher: str, generation: int = GENERATION) -> str:
    """The PTX of one of LAUNCHERS."""
    contents = compile_kernels(SOURCES / launcher, generation).read_bytes()
    begin = contents.index(b".version")
    return contents[begin : contents.index(0, begin)].decode()


@functools.cache
def load() -> CDLL:
    """Compiles the kernels to PTX (a minute; the result is kept), and what runs it, and defines the ops."""
    sources = [*(SOURCES / name for name in LAUNCHERS), HERE / "planted.cu"]
    with ThreadPoolExecutor() as threads:
        objects = [*threads.map(compile_kernels, sources), compile_by_nvcc(HERE / "runtime.cpp", ".o", *OBJECT)]
    own = [str(HERE / f"{name}.cpp") for name in (*EXECUTOR, "torch")]
    library = cpp_extension.load(
        build_folder().name,
        [*own, *cuda_ops.SOURCES],
        extra_include_paths=[str(HERE / "include"), str(HERE), str(SOURCES)],
        extra_cflags=list(FLAGS),
        extra_ldflags=list(map(str, objects)),
        build_directory=str(build_folder()),
        is_python_module=False,
    )
    return with_types(CDLL(str(library)))


def with_types(library: CDLL) -> CDLL:
    """Tells ctypes what the functions of python.cpp take and return."""
    for name in ("load", "decode_all", "run", "counts", "opcodes"):
        getattr(library, f"ptx_{name}").restype = c_char_p
    library.ptx_launches.restype = c_uint64
    library.ptx_run.argtypes = (c_char_p, c_uint, c_uint, c_int64, c_char_p)
    for name, types in {"note_fresh": (c_void_p, c_int64), "note_input": (c_void_p, c_int64)}.items():
        getattr(library, f"ptx_{name}").argtypes = types
    library.ptx_note_release.argtypes = (c_void_p,)
    library.planted_run.restype = library.planted_faults.restype = c_char_p
    return library


def check(error: bytes | None) -> None:
    """RuntimeError for what a function of python.cpp returns, if it is an error."""
    if error is not None:
        raise RuntimeError(error.decode())


def in_order(order: str) -> AbstractContextManager[None]:
    """Runs blocks, and the warps of a block, in one of ORDERS within."""
    return options(order=order)


@contextmanager
def options(
    order: str = "forward", races: bool = True, traffic: bool = False, shared_memory: int = 99, ulps: int = 0
) -> Iterator[None]:
    """Runs what is within in another way.

    order: of blocks and warps. races: accesses that nothing orders are looked for. traffic: sectors and banks are
    counted. shared_memory: what the device has of it for a block, in KiB. ulps: what ex2.approx and rcp.approx are off
    by at most, in units of the last place.
    """
    load().ptx_set(ORDERS.index(order), races, traffic, shared_memory << 10, ulps)
    try:
        yield
    finally:
        load().ptx_set_usual()


def launches() -> int:
    """How many kernels have been launched in this process."""
    return int(load().ptx_launches())


def take_in(text: str) -> None:
    """Loads a module of PTX, whose kernels run from now on in the place of others with the same symbols."""
    check(load().ptx_load(text.encode()))


class Instruction(NamedTuple):
    """What was counted of an instruction of a kernel, where it stands in the CUDA source.

    executed: by warps. lanes: that were on, of all of these. requests and sectors: of global memory, how often, and how
    many sectors of 32 bytes these touched. In shared memory requests are what its banks could have done at once, and
    passes what they had to do one after the other.
    """

    opcode: str
    file: str
    line: int
    executed: int
    lanes: int
    requests: int
    sectors: int
    passes: int


class Kernel(NamedTuple):
    """What was counted of the launches of a kernel; shared memory in bytes, and bytes of the sectors of global memory
    that a launch touched."""

    name: str
    symbol: str
    launches: int
    blocks: int
    threads: int
    static_shared: int
    dynamic_shared: int
    bytes_read: int
    bytes_written: int
    instructions: list[Instruction]


def counts() -> list[Kernel]:
    """What was counted since `reset_counts`, of kernels that were launched."""
    kernels = json.loads(load().ptx_counts())
    return [
        Kernel(**{**kernel, "instructions": [Instruction(*each) for each in kernel["instructions"]]})
        for kernel in kernels
    ]


def reset_counts() -> None:
    load().ptx_reset_counts()


def run(
    text: str, inputs: Sequence[Any], outputs: Sequence[Any] = (), blocks: int = 1, threads: int = 32, shared: int = 0
) -> None:
    """Runs the one kernel of a module, whose parameters are pointers to these NumPy arrays."""
    library = load()
    take_in(text)
    for array in inputs:
        library.ptx_note_input(array.ctypes.data, array.nbytes)
    for array in outputs:
        library.ptx_note_fresh(array.ctypes.data, array.nbytes)
    name = re.search(r"\.entry\s+(\w+)", text)
    assert name is not None
    pointers = struct.pack(f"{len(inputs) + len(outputs)}Q", *(array.ctypes.data for array in (*inputs, *outputs)))
    try:
        check(library.ptx_run(name[1].encode(), blocks, threads, shared, pointers))
    finally:
        for array in (*inputs, *outputs):
            library.ptx_note_release(array.ctypes.data)
