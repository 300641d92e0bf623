"""What ptxas makes of the kernels, for a generation of GPUs: registers, shared memory, spills, and instructions."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from harness.ptx import SOURCES

REPORT = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


class MachineCode(NamedTuple):
    """Of a kernel. shared: static, in bytes; spilled: bytes that are spilled, or lie on a stack; instructions: how many
    there are, not how many run, or 0 where cuobjdump is missing."""

    registers: int
    shared: int
    spilled: int
    instructions: int


def short_name(name: str) -> str:
    """The name of a kernel without what all have in common, and without parameters."""
    return re.sub(r"^void |\(.*$|bcmf::device::", "", name)


def compile_for(source: Path, arch: int) -> dict[str, MachineCode]:
    """The kernels of a .cu by their short names; arch: 90 for sm_90. RuntimeError where nvcc fails."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = ["nvcc", "-O3", "-std=c++17", "-diag-suppress=177", f"-I{SOURCES}", "-Xptxas", "-v", "-cubin"]
        command += [f"-arch=sm_{arch}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source} does not compile for sm_{arch}:\n{done.stderr}")
        instructions = count_instructions(cubin)
    reports = list(REPORT.finditer(done.stderr))
    if not reports:
        raise RuntimeError(f"ptxas said nothing about the kernels of {source} that is understood:\n{done.stderr}")
    names = demangle([report["symbol"] for report in reports])
    return {
        short_name(name): MachineCode(
            int(report["registers"]),
            int(report["shared"] or 0),
            sum(int(report[bytes_]) for bytes_ in ("stack", "stores", "loads")),
            instructions[report["symbol"]],
        )
        for name, report in zip(names, reports, strict=True)
    }


def nvcc_version() -> str:
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    return str(done.stdout.splitlines()[-1])


def demangle(symbols: list[str]) -> list[str]:
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@functools.cache
def cuobjdump() -> str | None:
    """The program, of the CUDA toolkit or of the triton package."""
    spec = importlib.util.find_spec("triton")
    folders = (
        []
        if spec is None
        else [Path(folder) / "backends/nvidia/bin" for folder in spec.submodule_search_locations or ()]
    )
    return shutil.which("cuobjdump") or next(
        (found for f in folders if (found := shutil.which("cuobjdump", path=f))), None
    )


def count_instructions(cubin: Path) -> Counter[str]:
    """The number of instructions of each kernel, by its symbol, without those that fill up its end."""
    counts: Counter[str] = Counter()
    program = cuobjdump()
    if program is None:
        return counts
    listing = subprocess.run([program, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    for function in listing.split("Function : ")[1:]:
        symbol, code = function.split("\n", 1)
        counts[symbol.strip()] = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?!NOP)", code, flags=re.MULTILINE))
    return counts
