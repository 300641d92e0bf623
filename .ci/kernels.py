"""Compiles csrc/cuda for five GPU generations and holds each kernel to its budget: ``kernels.py [--update]``.

budget.json has, per kernel, the most registers and bytes of shared memory over all archs; and what it takes in the
problems of bench/ptx_profile.py, which run nvcc's PTX on the CPU: executed instructions, sectors of global memory, and
conflicts in shared memory, with 1 % to spare. A change that needs more has to say so by updating it. A kernel of fp32,
bf16 or fp16 that spills registers, or keeps an array on a stack in local memory, fails whatever the budget; one of fp64
may.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
import ptx_profile
from harness.ptx import machine_code
from problem import make_labels

ROOT = Path(__file__).resolve().parents[1]
BUDGET = Path(__file__).with_name("budget.json")
ARCHS = (75, 80, 90, 100, 120)
CAMVID = ROOT.parent / "shared" / "data" / "camvid"
SIZE = (2, 19, 256, 256)
WORDS = {
    "registers": "registers",
    "shared": "bytes of shared memory",
    "executed": "executed instructions",
    "sectors": "sectors of global memory",
    "conflicts": "conflicts in shared memory",
}
SPARE = 1.01  # sums are rounded in another way on another CPU, and then BCL may select another pixel


def most_of_all_archs() -> tuple[dict[str, dict[str, int]], list[str]]:
    """Registers and shared memory of each kernel; and which ones spill."""
    jobs = list(itertools.product(sorted((ROOT / "csrc" / "cuda").rglob("*.cu")), ARCHS))
    with ThreadPoolExecutor(os.cpu_count()) as threads:  # nvcc runs in processes of its own
        reports = list(threads.map(lambda job: machine_code.compile_for(*job), jobs))
    most: dict[str, dict[str, int]] = {}
    spills = []
    for (_, arch), report in zip(jobs, reports, strict=True):
        for name, code in report.items():
            if code.spilled and "double" not in name:
                spills.append(f"{name} spills {code.spilled} bytes on sm_{arch}")
            before = most.setdefault(name, {"registers": 0, "shared": 0})
            before["registers"] = max(before["registers"], code.registers)
            before["shared"] = max(before["shared"], code.shared)
    return most, spills


def main() -> None:
    used, complaints = most_of_all_archs()
    n, classes, height, width = SIZE
    counted = CAMVID.is_dir()
    if counted:
        labels = make_labels(str(CAMVID), n, height, width).long()
        for name, totals in ptx_profile.totals_by_kernel(ptx_profile.count_all(labels, classes)).items():
            used[name].update(totals)
    else:
        print(f"What kernels execute is not compared with the budget: that is of CamVid's labels, in {CAMVID}")
    if "--update" in sys.argv[1:]:
        if not counted:
            sys.exit("--update needs CamVid's labels: what kernels execute would be lost from the budget")
        BUDGET.write_text(json.dumps(dict(sorted(used.items())), indent=1) + "\n")
    budget = json.loads(BUDGET.read_text())
    for name, needs in used.items():
        for what, value in needs.items():
            if what not in budget.get(name, {}):
                complaints.append(f"{name} has no budget of {WORDS[what]}")
            elif value > budget[name][what] * (1 if what in ("registers", "shared") else SPARE):
                complaints.append(f"{name} needs {value} {WORDS[what]}, its budget is {budget[name][what]}")
    complaints += [f"{name} has a budget, but is no kernel" for name in budget if name not in used]
    lost = [name for name in used if counted and "executed" in budget.get(name, {}) and "executed" not in used[name]]
    complaints += [f"{name} is run by no problem of bench/ptx_profile.py any more" for name in lost]
    for complaint in complaints:
        print(complaint)
    if complaints:
        sys.exit("python .ci/kernels.py --update accepts what kernels take as it is, but for spills")
    print(f"{len(used)} kernels for sm_{', '.join(map(str, ARCHS))}: within budget, no spills")


if __name__ == "__main__":
    try:
        main()
    except RuntimeError as error:  # nvcc, or a kernel that does what it must not
        sys.exit(str(error))
