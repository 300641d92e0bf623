"""Compiles csrc/cuda for four GPU generations and holds each kernel to its budget: ``kernels.py [--update]``.

budget.json has, per kernel, the most registers and bytes of shared memory over all archs; a change that needs more has
to say so by updating it. A kernel of fp32, bf16 or fp16 that spills registers, or keeps an array on a stack in local
memory, fails whatever the budget; one of fp64 may.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("budget.json")
ARCHS = (80, 90, 100, 120)
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)


def compile_for(source: Path, arch: int) -> dict[str, dict[str, int]]:
    """What ptxas says of each kernel: registers, bytes of shared memory, bytes spilled or put on a stack."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            "nvcc",
            "-O3",
            "-std=c++17",
            f"-I{ROOT / 'csrc'}",
            "-Xptxas",
            "-v",
            "-c",
            str(source),
            "-o",
            f"{folder}/kernel.o",
        ]
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source} does not compile for sm_{arch}:\n{done.stderr}")
    found = {}
    for match in REPORT.finditer(done.stderr):
        demangled = subprocess.run(["c++filt", match["name"]], capture_output=True, text=True).stdout.strip()
        name = re.sub(r"^void |\(.*$|bcmf::device::", "", demangled)
        spilled = int(match["stack"]) + int(match["stores"]) + int(match["loads"])  # an array in local memory, too
        found[name] = {"registers": int(match["registers"]), "shared": int(match["shared"] or 0), "spilled": spilled}
    if not found:
        sys.exit(f"ptxas said nothing about the kernels of {source} that this script understands:\n{done.stderr}")
    return found


def main() -> None:
    most: dict[str, dict[str, int]] = {}
    complaints = []
    jobs = list(itertools.product(sorted((ROOT / "csrc" / "cuda").rglob("*.cu")), ARCHS))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # nvcc runs in processes of its own
        reports = list(threads.map(lambda job: compile_for(*job), jobs))
    for (_, arch), report in zip(jobs, reports, strict=True):
        for name, used in report.items():
            if used["spilled"] and "double" not in name:
                complaints.append(f"{name} spills {used['spilled']} bytes on sm_{arch}")
            before = most.setdefault(name, {"registers": 0, "shared": 0})
            for what in before:
                before[what] = max(before[what], used[what])
    if "--update" in sys.argv[1:]:
        BUDGET.write_text(json.dumps(dict(sorted(most.items())), indent=1) + "\n")
    budget = json.loads(BUDGET.read_text())
    for name, used in most.items():
        for what, value in used.items():
            if name not in budget:
                complaints.append(f"{name} has no budget")
                break
            if value > budget[name][what]:
                complaints.append(f"{name} needs {value} {what}, its budget is {budget[name][what]}")
    complaints += [f"{name} has a budget, but is no kernel" for name in budget if name not in most]
    for complaint in complaints:
        print(complaint)
    if complaints:
        sys.exit("python .ci/kernels.py --update accepts registers and shared memory as they are")
    print(f"{len(most)} kernels for sm_{', '.join(map(str, ARCHS))}: within budget, no spills")


if __name__ == "__main__":
    main()
