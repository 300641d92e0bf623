"""Prints versions, what was built, and which impl runs where, and why not the others: python -m bcmf_ext.info."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from . import dispatch
from .errors import counted, run_command


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _instructions() -> str:
    """The instruction sets that PyTorch and our kernels use, such as "AVX512 in PyTorch, AVX2 in our kernels"."""
    pytorch = torch.backends.cpu.get_cpu_capability()
    ours = None if dispatch.EXTENSION is None else dispatch.EXTENSION.build_info()["cpu_capability"]
    if ours == pytorch:
        return f"{pytorch} in PyTorch and our kernels"
    return f"{pytorch} in PyTorch" + (f", {ours} in our kernels" if ours else "")


def versions() -> str:
    """One line each: bcmf_ext, Python, torch, CUDA, triton, GPU, CPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    rows = {
        "bcmf_ext": _version("bcmf_ext"),
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "triton": _version("triton"),
        "GPU": gpu,
        "CPU": f"{_cpu()}, {counted(torch.get_num_threads(), 'thread')}, {_instructions()}",
    }
    return "\n".join(f"{name:<10} {value}" for name, value in rows.items())


def build() -> str:
    """Says what the installed extension was built with and for."""
    if dispatch.EXTENSION is None:
        return f"extension  none: {dispatch.why_not('cpu', 'cpu')}"
    facts = dispatch.EXTENSION.build_info()
    no_cuda = dispatch.why_not("cuda", "cuda")
    return "\n".join(
        [
            f"extension  compiled by C++ compiler {facts['compiler']}",
            f"CUDA       {'left out: ' + no_cuda if no_cuda else 'built for ' + facts['cuda_archs']}",
        ]
    )


def impls() -> str:
    """For each device, the impl that "auto" takes for losses and metrics, and why not the others."""
    said = {dispatch.why_not("cpu", "cpu"), dispatch.why_not("cuda", "cuda")} - {None}  # `build` says these.
    lines = []
    for device in ("cpu", "cuda"):
        reasons = {impl: dispatch.why_not(impl, device) for impl in dispatch.ORDER[device]}
        lines.append(f"on {device} tensors: {next(impl for impl, reason in reasons.items() if reason is None)}")
        for impl, reason in reasons.items():
            if reason is not None:
                lines.append(f"  not {impl}: {'not built, see above' if reason in said else reason}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints all of that; there are no flags but --help."""
    parser = argparse.ArgumentParser("python -m bcmf_ext.info", description="What was built, and what runs where.")
    parser.parse_args(argv)
    print(versions(), build(), "", impls(), sep="\n")


if __name__ == "__main__":
    run_command(main)
