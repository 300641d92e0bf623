"""Our ops against PyTorch: ``python bench/kernels.py [--device cuda] [--labels CAMVID] [--op NAME …]``.

Prints a table and writes bench/results/kernels-<device>.json and .png; of some ops alone, kernels-<op>-<device>.
protocol.py says how times are taken; a ratio's spread is the middle half of the rounds. Every contender's value and
gradient are compared with the fp64 definition in the same run.

Roofline. What an op has to do at least: bytes from memory and exponentials. Both rates are measured in the same run,
the best of all rounds: copying 128 MiB, and torch.exp of a tensor that fits into the cache (on a GPU, the exponentials
are those of its special function units at full clock, if nvidia-smi tells that); the share is the larger of the two
times that this work needs, over the time it took. A share above 100 % says that torch.exp is not the fastest exp.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from torch import Tensor

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

sys.path.insert(0, str(Path(__file__).parent))
import cross_entropy
import lmfm
import protocol
import refinement
import segmentation_loss
import table4
from problem import OURS, Contender, Problem, make_labels, missing_impls

from bcmf_ext.engine import choose_device
from bcmf_ext.errors import run_command

OPS = {
    "training": segmentation_loss.training,
    "cross_entropy": cross_entropy.problems,
    "segmentation_loss": segmentation_loss.problems,
    "sizes": segmentation_loss.sizes,
    "blocks": segmentation_loss.blocks,
    "table4": table4.problems,
    "rmi": table4.rmi,
    "lmfm": lmfm.problems,
    "srm": refinement.problems,
}
COLUMNS = 6  # of the picture
PHASES = ("forward", "backward", "both")
REPEATS = 20  # calls in a row of what is too short to be timed alone


# --------------------------------------------------------------------------------------------------------------------
# One step of one contender


def step(problem: Problem, contender: Contender, clock: protocol.Clock) -> dict[str, float]:
    """Milliseconds of a step's phases."""
    clock.flush_cache()
    start = clock.mark()
    outputs = contender(problem.input)
    middle = clock.mark()
    problem.backward(outputs)
    end = clock.mark()
    problem.input.grad = None
    spans = ((start, middle), (middle, end), (start, end))
    return {phase: clock.between(*span) for phase, span in zip(PHASES, spans, strict=True)}


def peak_mib(problem: Problem, contender: Contender) -> float:
    """Peak memory of a forward and backward, MiB; the gradient is part of it."""

    def run() -> None:
        problem.backward(contender(problem.input))
        problem.input.grad = None

    return protocol.peak_above(run, problem.input.is_cuda)


# --------------------------------------------------------------------------------------------------------------------
# One problem


@dataclass(frozen=True)
class Rates:
    """The machine's measured speed: bytes and exponentials per ms."""

    bytes: float
    exps: float

    def least_ms(self, work: tuple[float, float]) -> float:
        return max(work[0] / self.bytes, work[1] / self.exps)


class RateMeter:
    """Measures both rates once a round, between the contenders; what counts is the best, that of a free machine."""

    def __init__(self, logits: Tensor, clock: protocol.Clock) -> None:
        self.clock = clock
        # 128 MiB: more than a cache holds.
        self.source = torch.zeros(32 << 20, dtype=torch.float32, device=logits.device)
        self.target = torch.empty_like(self.source)
        self.small = torch.rand(1 << 17, device=logits.device)
        self.result = torch.empty_like(self.small)
        self.copy_ms = self.exp_ms = math.inf

    def sample(self) -> None:
        self.copy_ms = min(self.copy_ms, self.clock.time(lambda: self.target.copy_(self.source)))
        exps = self.clock.time(lambda: [torch.exp(self.small, out=self.result) for _ in range(REPEATS)])
        self.exp_ms = min(self.exp_ms, exps / REPEATS)

    def rates(self) -> Rates:
        exps = self.small.numel() / self.exp_ms
        if self.source.is_cuda:  # torch.exp waits for memory there; the special function units take 16 a clock and SM
            processors = torch.cuda.get_device_properties(self.source.device).multi_processor_count
            exps = 16.0 * processors * (max_clock_khz() or math.inf)
        return Rates(2 * self.source.numel() * self.source.element_size() / self.copy_ms, exps)


@functools.cache
def max_clock_khz() -> float | None:
    """The highest clock of the GPU's multiprocessors, which CUDA 13 no longer has among the device's properties; None
    where nvidia-smi does not tell it: exponentials then count for nothing in the roofline."""
    command = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
        return 1e3 * float(said.splitlines()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        print(f"The roofline is that of bytes alone: nvidia-smi does not tell the clock ({error}).")
        return None


def errors(problem: Problem) -> dict[str, dict[str, float]]:
    """Each contender's errors against the fp64 definition: those of values and of the gradient, relative to the largest
    entry."""

    def evaluate(contender: Contender, x: Tensor) -> tuple[Tensor, Tensor]:
        outputs = contender(x)
        (grad,) = torch.autograd.grad(outputs, x, problem.upstream)
        several = (outputs,) if isinstance(outputs, Tensor) else outputs
        return torch.cat([output.detach().double().flatten() for output in several]), grad.double()

    truth, truth_grad = evaluate(problem.definition, problem.input.detach().double().requires_grad_())
    found = {}
    for name, contender in problem.contenders.items():
        value, grad = evaluate(contender, problem.input)
        found[name] = {
            "value": ((value - truth).abs().max() / truth.abs().max()).item(),
            "gradient": ((grad - truth_grad).abs().max() / truth_grad.abs().max()).item(),
        }
    return found


def measure(problem: Problem, clock: protocol.Clock, rounds: int) -> dict[str, Any]:
    """Measures one problem. The first of `other`, or else of the contenders, is the baseline."""
    contenders = {**problem.other, **problem.contenders}
    names = list(contenders)
    baseline = names[0]
    wrong = errors(problem)
    meter = RateMeter(problem.input, clock)
    turns = {name: partial(step, problem, contender, clock) for name, contender in contenders.items()}
    steps = protocol.take_turns(turns, rounds, problem.title, before_round=meter.sample)
    times = {name: {phase: [s[phase] for s in steps[name]] for phase in PHASES} for name in steps}
    rates = meter.rates()

    aa = {phase: protocol.ratio(times[protocol.AA][phase], times[baseline][phase]) for phase in PHASES}
    rows = {}
    for name in names:
        rows[name] = {"error": wrong.get(name), "mib": peak_mib(problem, contenders[name])}
        if name in OURS:
            rivals = [rival for rival in names if rival not in OURS]
            ours = times[name]["both"]
            rows[name]["against"] = {rival: protocol.ratio(ours, times[rival]["both"]) for rival in rivals}
        for phase in PHASES:
            low, middle, high = statistics.quantiles(protocol.ratios(times[name][phase], times[baseline][phase]), n=4)
            ms = statistics.median(times[name][phase])
            share = rates.least_ms(problem.work[phase]) / ms
            rows[name][phase] = {"ratio": middle, "spread": [low, high], "ms": ms, "roofline": share}
    return {
        "problem": problem.title,
        "baseline": baseline,
        "A/A": aa,
        "counts": protocol.does_count(rounds, [*aa.values()]),
        "gradient_mib": problem.input.numel() * problem.input.element_size() / 2**20,
        "copy_gb_per_s": rates.bytes / 1e6,
        "exp_g_per_s": rates.exps / 1e6 if math.isfinite(rates.exps) else None,
        "contenders": rows,
    }


# --------------------------------------------------------------------------------------------------------------------
# Report


def render(result: dict[str, Any]) -> str:
    aa = ", ".join(f"{phase} {ratio:.2f}" for phase, ratio in result["A/A"].items())
    lines = [
        f"{result['problem']}   × {result['baseline']}   A/A: {aa}{protocol.verdict(result['counts'])}",
        f"  copy {result['copy_gb_per_s']:.0f} GB/s, exp {result['exp_g_per_s'] or math.nan:.2f} G/s",
        f"  {'':<14}{'forward':>9}{'backward':>10}{'both':>7}  {'(spread)':<13}{'ms':>9}{'roofline':>10}{'MiB':>8}"
        "   error of value, gradient",
    ]
    for name, row in result["contenders"].items():
        both = row["both"]
        spread = "({:.2f}–{:.2f})".format(*both["spread"])
        error = row["error"]
        lines.append(
            f"  {name:<14}{row['forward']['ratio']:9.2f}{row['backward']['ratio']:10.2f}{both['ratio']:7.2f}"
            f"  {spread:<13}{both['ms']:9.2f}{both['roofline']:9.0%}{row['mib']:8.0f}"
            + (f"   {error['value']:.0e}, {error['gradient']:.0e}" if error else "")
        )
    for name, row in result["contenders"].items():
        if "against" in row:
            rivals = ", ".join(f"{ratio:.3f} of {rival}" for rival, ratio in row["against"].items())
            lines.append(f"  {name}: {rivals}")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws forward + backward of each contender, relative to the baseline, as bars."""
    columns = min(COLUMNS, len(results))
    rows_of_axes = math.ceil(len(results) / columns)
    figure, grid = plt.subplots(rows_of_axes, columns, figsize=(1 + 2.6 * columns, 4.2 * rows_of_axes), squeeze=False)
    for axis in grid.flat[len(results) :]:
        axis.set_axis_off()
    for axis, result in zip(grid.flat, results, strict=False):
        rows = result["contenders"]
        heights = [row["both"]["ratio"] for row in rows.values()]
        colours = ["tab:blue" if name in OURS else "tab:grey" for name in rows]
        low, high = zip(*(row["both"]["spread"] for row in rows.values()), strict=True)
        reach = [[max(0, h - a) for h, a in zip(heights, low, strict=True)]]
        reach.append([max(0, b - h) for h, b in zip(heights, high, strict=True)])
        axis.bar(list(rows), heights, color=colours, yerr=reach, ecolor="black", capsize=2)
        if max(heights) > 10 * min(heights):  # else bars as long as their ratios
            axis.set_yscale("log")
            axis.yaxis.set_minor_formatter(NullFormatter())
        for x, (height, top) in enumerate(zip(heights, high, strict=True)):
            axis.text(x, max(height, top), f"{height:.2g}", ha="center", va="bottom", fontsize=8)
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_title(result["problem"].replace(", ", "\n") + ("" if result["counts"] else "\n(busy)"), fontsize=8)
        axis.tick_params(axis="x", labelrotation=45, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in grid[:, 0]:
        axis.set_ylabel("forward + backward, × baseline (less is faster)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that say what to run: device, labels, ops and size."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--labels", metavar="CAMVID", help="CamVid's folder; without it, labels of drawn scenes")
    found.add_argument("--op", nargs="+", choices=tuple(OPS), default=tuple(OPS), help="which ops; all when left out")
    usual = (8, 19, 1024, 1024) if torch.cuda.is_available() else (8, 19, 360, 480)
    found.add_argument("--size", type=int, nargs=4, metavar=("N", "C", "H", "W"), default=usual)
    return found


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--rounds", type=int, default=protocol.ROUNDS, help=f"default: {protocol.ROUNDS}; at least 2")
    flags.add_argument("--output", type=Path, default=protocol.RESULTS, metavar="DIR", help="where the results go")
    arguments = flags.parse_args()
    n, c, height, width = arguments.size
    labels = make_labels(arguments.labels, n, height, width).to(choose_device(arguments.device))

    some = arguments.op if set(arguments.op) < set(OPS) else []
    path = arguments.output / f"{'-'.join(['kernels', *some, protocol.device_name(arguments.device)])}.json"
    source = "CamVid" if arguments.labels else "drawn scenes"
    missing = missing_impls(arguments.device)
    record = {**protocol.about(), "labels": source, "rounds": arguments.rounds, "not_measured": missing, "results": []}
    for impl, reason in missing.items():
        print(f"{impl}: not measured ({reason})")
    clock = protocol.Clock(arguments.device)
    for op in arguments.op:
        for problem in OPS[op](labels, c):
            record["results"].append(measure(problem, clock, arguments.rounds))
            print(render(record["results"][-1]), flush=True)
            protocol.write_record(path, record)  # after each: a run may be cut short
    draw(record["results"], path.with_suffix(".png"))
    print(f"{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(main)
