"""A profile of the CUDA kernels without a GPU: ``python bench/ptx_profile.py [--labels CAMVID] [--diff OTHER.json]``.

nvcc's PTX is run on the CPU (python_tests/harness/ptx) and counted, kernel by kernel, for CE + BCL + CPG3 with int64
labels and with logits as a network gives them, from label size and from an eighth, in two dtypes and layouts; and for
whatever else has kernels. Per kernel it prints

* executed instructions of a warp, times 32, per logit of the labels' size, and what kinds they are of (`KINDS`); lanes
  that were on, of 32;
* sectors of 32 bytes per request of global memory (4 is best for 4 bytes a lane), and the bytes of all sectors that a
  launch touches: as if caches were perfect within a kernel, and empty between two;
* how often the banks of shared memory had to turn for one request, on average and at the worst instruction;
* registers and occupancy, and the machine's instructions per instruction of PTX as both stand in the code (the range
  over the GPUs of gpu_model.py): no block of code is matched with another;
* milliseconds by gpu_model.py, and what binds them.

The figures are of one run; it is the same run every time. --times multiplies them, for a larger batch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_tests"))
sys.path.insert(0, str(Path(__file__).parent))
import gpu_model
import protocol
from harness import cuda_ops, ptx
from harness.ptx import machine_code
from problem import make_labels, make_training_logits

from bcmf_ext import BCL, CPG, OHEM, segmentation_loss
from bcmf_ext.errors import UserError, run_command
from bcmf_ext.nn import LMFM
from bcmf_ext.nn.srm import by_kernels

KINDS = (
    *("fp32", "fp64", "int", "int64", "division", "special", "convert", "move"),
    *("global", "shared", "parameter", "branch", "shuffle", "barrier"),
)
"""Of instructions. division: of any numbers, and remainders, which become 10 to 100 instructions of the machine.
special: those of the special function units, such as ex2. parameter: loads of a kernel's arguments, which cost next to
nothing."""

NAMES = {
    **dict.fromkeys(("bra", "ret", "exit"), "branch"),
    **dict.fromkeys(("div", "rem"), "division"),
    **dict.fromkeys(("ex2", "rcp", "sqrt"), "special"),
    **dict.fromkeys(("cvt", "cvta"), "convert"),
    **dict.fromkeys(("mov", "selp"), "move"),
    **{"bar": "barrier", "shfl": "shuffle", "vote": "shuffle"},
}


def kind_of(opcode: str) -> str:
    """One of KINDS."""
    name, *rest = opcode.split(".")
    if name in ("ld", "st", "atom"):
        return "shared" if "shared" in rest else "parameter" if "param" in rest else "global"
    type_ = rest[-1] if rest else ""
    by_type = {"f32": "fp32", "f64": "fp64"}.get(type_, "int64" if type_.endswith("64") else "int")
    return NAMES.get(name, by_type)


# --------------------------------------------------------------------------------------------------------------------
# What is run


@dataclass(frozen=True)
class Problem:
    """A call whose kernels are counted. entries: what counts are given for each of; it is a logit of the labels' size,
    or an entry of a map."""

    title: str
    entries: int
    call: Callable[[], Sequence[Tensor]]


def problems(labels: Tensor, classes: int) -> Iterator[Problem]:
    """For labels (N, H, W) int64."""
    n, height, width = labels.shape
    entries = classes * labels.numel()
    all_terms = {"bcl": BCL(), "cpg": CPG()}
    sizes = {"label size": (height, width), "from 1/8": (height // 8, width // 8)}
    layouts = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}

    def logits_of(size: tuple[int, int], dtype: torch.dtype, layout: str) -> Tensor:
        made = make_training_logits(labels, classes, size).detach()
        return made.to(dtype).contiguous(memory_format=layouts[layout]).requires_grad_()

    def loss(name: str, size: str, dtype: torch.dtype, layout: str, **terms: Any) -> Problem:
        logits = logits_of(sizes[size], dtype, layout)
        title = f"{name}, {size}, {str(dtype).removeprefix('torch.')}, {layout}"
        return Problem(title, entries, lambda: [segmentation_loss(logits, labels, impl="cuda", **terms).total])

    for dtype in (torch.bfloat16, torch.float32):
        for layout in layouts:
            for size in sizes:
                yield loss("CE + BCL + CPG3", size, dtype, layout, **all_terms)
    for size in sizes:
        yield loss("CE", size, torch.bfloat16, "NCHW")
    yield loss("CE with OHEM", "from 1/8", torch.bfloat16, "channels_last", ohem=OHEM(0.7, labels.numel() // 4))
    few = logits_of(sizes["from 1/8"], torch.bfloat16, "channels_last").detach()
    yield Problem(
        "upsample_argmax, from 1/8, bfloat16, channels_last",
        entries,
        lambda: [ptx.OPS["UPSAMPLE_ARGMAX"](few, height, width, False)],
    )
    # LMFM trains on two images or more.
    context = torch.randn(max(n, 2), 128, 16, 16, generator=torch.Generator().manual_seed(0))
    context = context.contiguous(memory_format=torch.channels_last).requires_grad_()
    lmfm = LMFM(128, 64, 128, impl="cuda").to(memory_format=torch.channels_last).train()
    yield Problem("LMFM of 128 channels, 16×16, float32, channels_last", context.numel(), lambda: [lmfm(context).sum()])
    # An SRM from 1/8 to 1/4.
    generator = torch.Generator().manual_seed(0)
    low, raw, residual = (
        torch.randn(n, channels, height // side, width // side, generator=generator)
        .to(torch.bfloat16, memory_format=torch.channels_last)
        .requires_grad_()
        for channels, side in ((128, 8), (11, 4), (128, 4))
    )
    yield Problem(
        "SRM's tail, 128 channels, 1/8 to 1/4, bfloat16, channels_last",
        residual.numel(),
        lambda: [by_kernels("cuda", low, raw, residual).float().sum()],
    )


# --------------------------------------------------------------------------------------------------------------------
# What is counted


@dataclass
class Launched:
    """A kernel in one phase of a problem; all launches together, in warp instructions, sectors, requests and bytes."""

    name: str
    phase: str
    launches: int
    blocks: int
    threads: int
    executed: int
    lanes: int
    kinds: dict[str, int]
    load_requests: int
    load_sectors: int
    store_requests: int
    store_sectors: int
    bank_requests: int
    bank_passes: int
    worst_banks: float
    bytes_read: int
    bytes_written: int
    shared: int
    instructions: int

    @property
    def sectors(self) -> int:
        return self.load_sectors + self.store_sectors

    @property
    def conflicts(self) -> int:
        return self.bank_passes - self.bank_requests


def launched(kernel: ptx.Kernel, phase: str) -> Launched:
    """A kernel's counts, by kind."""
    kinds: Counter[str] = Counter()
    by_access: dict[str, list[ptx.Instruction]] = {"load": [], "store": [], "shared": []}
    for each in kernel.instructions:
        kind = kind_of(each.opcode)
        kinds[kind] += each.executed
        if kind == "global":
            by_access["load" if each.opcode.startswith("ld") else "store"].append(each)
        if kind == "shared" and each.requests:
            by_access["shared"].append(each)
    loads, stores, shared = by_access.values()
    return Launched(
        machine_code.short_name(kernel.name),
        phase,
        kernel.launches,
        kernel.blocks // kernel.launches,
        kernel.threads // kernel.blocks,
        sum(kinds.values()),
        sum(each.lanes for each in kernel.instructions),
        {kind: kinds[kind] for kind in KINDS},
        sum(each.requests for each in loads),
        sum(each.sectors for each in loads),
        sum(each.requests for each in stores),
        sum(each.sectors for each in stores),
        sum(each.requests for each in shared),
        sum(each.passes for each in shared),
        max((each.passes / each.requests for each in shared), default=0),
        kernel.bytes_read,
        kernel.bytes_written,
        kernel.static_shared + kernel.dynamic_shared,
        len(kernel.instructions),
    )


def count(problem: Problem) -> list[Launched]:
    """The kernels that a problem's forward and backward launch."""
    found: list[Launched] = []
    with ptx.options(traffic=True, races=False, shared_memory=227):  # an H100's
        ptx.reset_counts()
        outputs = problem.call()
        found += (launched(kernel, "forward") for kernel in ptx.counts())
        if outputs[0].requires_grad:
            ptx.reset_counts()
            torch.autograd.backward(outputs)
            found += (launched(kernel, "backward") for kernel in ptx.counts())
    return found


def count_all(labels: Tensor, classes: int) -> dict[Problem, list[Launched]]:
    """The counts of all problems; the kernels run on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        ptx.load()
        cuda_ops.use(ptx.OPS, patch)
        made = list(problems(labels, classes))
        return {problem: count(problem) for problem in tqdm(made, "counting", leave=False, disable=None)}


def totals_by_kernel(counted: dict[Problem, list[Launched]]) -> dict[str, dict[str, int]]:
    """What a kernel takes in all problems together: for .ci/budget.json."""
    totals: dict[str, Counter[str]] = {}
    for kernels in counted.values():
        for kernel in kernels:
            totals.setdefault(kernel.name, Counter()).update(
                executed=kernel.executed, sectors=kernel.sectors, conflicts=kernel.conflicts
            )
    return {name: dict(total) for name, total in totals.items()}


# --------------------------------------------------------------------------------------------------------------------
# What comes of it


def machine_codes() -> dict[int, dict[str, machine_code.MachineCode]]:
    """What ptxas makes of all kernels, for the GPUs of the model."""
    archs = [gpu.arch for gpu in gpu_model.GPUS.values()]
    jobs = [(ptx.SOURCES / launcher, arch) for launcher in ptx.LAUNCHERS for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        reports = list(
            tqdm(
                threads.map(lambda job: machine_code.compile_for(*job), jobs),
                "compiling",
                total=len(jobs),
                leave=False,
                disable=None,
            )
        )
    found: dict[int, dict[str, machine_code.MachineCode]] = {arch: {} for arch in archs}
    for (_, arch), report in zip(jobs, reports, strict=True):
        found[arch].update(report)
    return found


MULTIPLIED = ("executed", "lanes", "load_requests", "load_sectors", "store_requests", "store_sectors")
MULTIPLIED += ("bank_requests", "bank_passes", "bytes_read", "bytes_written")


def row_of(kernel: Launched, codes: dict[int, dict[str, machine_code.MachineCode]], times: int) -> dict[str, Any]:
    """A kernel of a record: its counts, multiplied, and what the model makes of them for each GPU."""
    row = asdict(kernel)
    row.update({name: times * row[name] for name in MULTIPLIED})
    row["kinds"] = {kind: times * number for kind, number in kernel.kinds.items()}
    if kernel.blocks > 1:
        row["blocks"] *= times
    row["gpus"] = {name: on_gpu(gpu, kernel, codes[gpu.arch][kernel.name], row) for name, gpu in gpu_model.GPUS.items()}
    return row


def on_gpu(
    gpu: gpu_model.Gpu, kernel: Launched, code: machine_code.MachineCode, row: Mapping[str, Any]
) -> dict[str, Any]:
    per_ptx = code.instructions / kernel.instructions
    work = gpu_model.Work(
        instructions=row["executed"] * per_ptx,
        integer=row["kinds"]["int"] + 2 * row["kinds"]["int64"],
        fp64=row["kinds"]["fp64"],
        special=row["kinds"]["special"],
        passes=row["bank_passes"],
        sectors=row["load_sectors"] + row["store_sectors"],
        bytes=row["bytes_read"] + row["bytes_written"],
        blocks=row["blocks"],
    )
    needed = gpu_model.times(gpu, work)
    return {
        "registers": code.registers,
        "occupancy": gpu_model.occupancy(gpu, kernel.threads, code.registers, kernel.shared),
        "machine_per_ptx": per_ptx,
        "needed_ms": needed,
        "limit": max(needed, key=needed.__getitem__),
        "ms": max(needed.values()),
    }


def make_record(labels: Tensor, classes: int, times: int, labels_from: str) -> dict[str, Any]:
    counted = count_all(labels, classes)
    codes = machine_codes()
    return {
        "version": gpu_model.VERSION,
        "gpus": {name: asdict(gpu) for name, gpu in gpu_model.GPUS.items()},
        "about": {**protocol.about(), "nvcc": machine_code.nvcc_version(), "ptx": f"compute_{ptx.GENERATION}"},
        "size": [labels.shape[0], classes, *labels.shape[1:]],
        "labels": labels_from,
        "times": times,
        "problems": [
            {
                "title": problem.title,
                "entries": times * problem.entries,
                "kernels": [row_of(kernel, codes, times) for kernel in kernels],
            }
            for problem, kernels in counted.items()
        ],
    }


# --------------------------------------------------------------------------------------------------------------------
# What is printed


def ratio_of(a: float, b: float) -> float:
    return a / b if b else 0.0


def totals(problem: Mapping[str, Any]) -> dict[str, float]:
    """The sums over the kernels of a problem."""
    kernels = problem["kernels"]
    return {
        "instructions per entry": 32 * sum(k["executed"] for k in kernels) / problem["entries"],
        "MB": sum(k["bytes_read"] + k["bytes_written"] for k in kernels) / 1e6,
        "passes per request": ratio_of(
            sum(k["bank_passes"] for k in kernels), sum(k["bank_requests"] for k in kernels)
        ),
        "worst banks": max(k["worst_banks"] for k in kernels),
        "launches": sum(k["launches"] for k in kernels),
        **{f"{name} ms": sum(k["gpus"][name]["ms"] for k in kernels) for name in gpu_model.GPUS},
    }


def display(name: str) -> str:
    """A kernel's name, filled up with blanks to a column."""
    return f"{name.replace('__nv_bfloat16', 'bf16').replace('__half', 'f16').replace(' >', '>'):62s}"


def print_problem(problem: Mapping[str, Any]) -> None:
    """Two tables: what the kernels take, and what kinds of instructions."""
    print(f"\n{problem['title']}")
    gpus = "".join(f"  {f'{name} ms, limit':>16s}" for name in gpu_model.GPUS)
    print(
        f"  {'':62s} x  per entry  lanes  sectors in, out    MB in, out  banks, worst  registers  occupied  code{gpus}"
    )
    for k in problem["kernels"]:
        found = list(k["gpus"].values())
        per_ptx = [gpu["machine_per_ptx"] for gpu in found]
        sectors = (ratio_of(k[f"{way}_sectors"], k[f"{way}_requests"]) for way in ("load", "store"))
        print(
            f"  {display(k['name'])}{k['launches']:2d}  {32 * k['executed'] / problem['entries']:9.2f}"
            f"  {ratio_of(k['lanes'], k['executed']):5.1f}  {'{:7.1f} {:7.1f}'.format(*sectors)}"
            f"  {k['bytes_read'] / 1e6:6.1f} {k['bytes_written'] / 1e6:6.1f}"
            f"  {ratio_of(k['bank_passes'], k['bank_requests']):5.1f} {k['worst_banks']:6.1f}"
            f"  {found[0]['registers']:9d}  {found[0]['occupancy']:8.0%}  {min(per_ptx):.1f}–{max(per_ptx):.1f}"
            + "".join(f"  {gpu['ms']:7.4f} {gpu['limit']:>8s}" for gpu in found)
        )
    sums = totals(problem)
    print("  together: " + ", ".join(f"{name} {value:.4g}" for name, value in sums.items()))
    shown = [kind for kind in KINDS if any(k["kinds"][kind] for k in problem["kernels"])]
    print(f"  {'per entry':62s}" + "".join(f"{kind:>10s}" for kind in shown))
    for k in problem["kernels"]:
        numbers = (32 * k["kinds"][kind] / problem["entries"] for kind in shown)
        print(f"  {display(k['name'])}" + "".join(f"{number:10.3f}" for number in numbers))


def print_difference(record: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """This record's figures divided by those of another one."""
    others = {problem["title"]: problem for problem in before["problems"]}
    for problem in record["problems"]:
        if problem["title"] not in others:
            print(f"\n{problem['title']}: it was not there before")
            continue
        old = others[problem["title"]]
        print(f"\n{problem['title']}: now, before, ratio")
        for name, value in totals(problem).items():
            other = totals(old)[name]
            print(f"  {name:62s}{value:12.4g}{other:12.4g}{ratio_of(value, other):8.3f}")
        rows = {(k["phase"], k["name"]): k for k in old["kernels"]}
        for k in problem["kernels"]:
            row = rows.pop((k["phase"], k["name"]), None)
            per_entry = [32 * each["executed"] / of["entries"] for each, of in ((k, problem), (row, old)) if each]
            print(
                f"  {display(k['name'])}"
                + "".join(f"{number:12.4g}" for number in per_entry)
                + ("" if row else "  new")
            )
        for _, name in rows:
            print(f"  {display(name)}  gone")


def read_profile(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Another run's record; UserError if it is none, or not of what is expected by name."""
    try:
        before = dict(json.loads(path.read_text()))
        found = {name: before[name] for name in expected}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is no profile that --output has written: {error!r}.") from None
    for name, value in expected.items():
        if found[name] != value:
            raise UserError(f"{path} has the {name} {found[name]}, this run {value}: give both runs the same.")
    return before


def check_arguments(arguments: argparse.Namespace) -> None:
    """Before minutes of counting, UserError for what would fail behind them."""
    why_not = ptx.why_not()
    if why_not is None and machine_code.cuobjdump() is None:
        why_not = "cuobjdump not found"
    if why_not is not None:
        raise UserError(f"The kernels cannot be compiled and counted here: {why_not}.")
    n, classes, height, width = arguments.size
    if min(n, classes, arguments.times) < 1 or min(height, width) < 8:
        raise UserError("There has to be an image and a class, with sides of 8 pixels or more, --times 1 or more.")
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(arguments.output.parent, os.W_OK) or arguments.output.is_dir():
            raise UserError(f"{arguments.output} cannot be written.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--size",
        type=int,
        nargs=4,
        default=(2, 19, 256, 256),
        metavar=("N", "C", "H", "W"),
        help="images, classes and pixels of the labels (2 19 256 256)",
    )
    parser.add_argument("--times", type=int, default=1, help="multiply the counts, as of so many batches (1)")
    parser.add_argument("--labels", metavar="CAMVID", help="labels of CamVid in this folder (drawn scenes)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures to it, as JSON")
    parser.add_argument(
        "--diff", type=Path, metavar="FILE", help="print ratios to the figures of another run's --output"
    )
    arguments = parser.parse_args()
    check_arguments(arguments)
    labels_from = "CamVid" if arguments.labels else "drawn scenes"
    expected = {"version": gpu_model.VERSION, "size": list(arguments.size), "labels": labels_from}
    expected["times"] = arguments.times  # milliseconds do not grow with it where a GPU is not full
    before = None if arguments.diff is None else read_profile(arguments.diff, expected)
    n, classes, height, width = arguments.size
    labels = make_labels(arguments.labels, n, height, width).long()
    try:
        record = make_record(labels, classes, arguments.times, labels_from)
    except RuntimeError as error:  # nvcc, or a kernel that does what it must not
        raise UserError(str(error)) from error
    for problem in record["problems"]:
        print_problem(problem)
    if arguments.output is not None:
        protocol.write_record(arguments.output, record)
    if before is not None:
        print_difference(record, before)


if __name__ == "__main__":
    run_command(main)
