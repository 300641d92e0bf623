"""Where a training step's time and memory go: ``python bench/train_step.py [--device cuda] [--data CAMVID]``.

A step of the trainer, in its phases: data (load and augment the batch in this process), forward, loss, backward,
optimizer. The impls of the loss take turns, step by step, on the same network and batch (protocol.py). Writes
bench/results/train_step-<device>.json.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import protocol
import torch
from problem import our_impls
from torch.optim import SGD

from bcmf_ext import SegmentationCriterion
from bcmf_ext.data import Augmentation, EpochSampler, TrainSamples, open_dataset
from bcmf_ext.engine import Compute, choose_device, choose_dtype
from bcmf_ext.errors import run_command
from bcmf_ext.models import NETWORKS

PHASES = ("data", "forward", "loss", "backward", "optimizer")


class Step:
    """One network and optimizer, and the loss of each impl."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = choose_device(arguments.device)
        self.clock = protocol.Clock(arguments.device)
        self.compute = Compute(self.device, choose_dtype(arguments.amp, self.device)[0])
        name = "camvid" if arguments.data else "demo"
        dataset = open_dataset(name, arguments.data, "train")
        crop = tuple(arguments.crop or dataset.recipe.crop_size)
        self.samples = TrainSamples(dataset, Augmentation(crop, dataset.recipe.scale_range), 0)
        self.batches = itertools.cycle(EpochSampler(len(dataset), arguments.batch, 0))
        self.model = self.compute.place(NETWORKS[arguments.model](len(dataset.classes))).train()
        self.optimizer = SGD(self.model.parameters(), 1e-3, 0.9, weight_decay=5e-4)
        self.criteria = {impl: SegmentationCriterion(impl=impl) for impl in arguments.impl}
        self.title = f"{arguments.model}, {dataset.name}, batch {arguments.batch}, crop {crop[0]}×{crop[1]}"
        self.title += f", {str(self.compute.dtype or torch.float32).removeprefix('torch.')}, channels_last"

    def next_batch(self) -> None:
        """Draws the batch of the steps that follow."""
        self.batch = next(self.batches)

    def run(self, impl: str) -> dict[str, float]:
        """Milliseconds of each phase, and of the step."""
        marks = [self.clock.mark()]
        samples = [self.samples[key] for key in self.batch]
        images, labels = (torch.stack(tensors) for tensors in zip(*samples, strict=True))
        marks.append(self.clock.mark())
        outputs = self.compute.run(self.model, images)
        marks.append(self.clock.mark())
        loss = self.criteria[impl](outputs, labels.to(self.device))
        marks.append(self.clock.mark())
        self.optimizer.zero_grad()
        loss.backward()
        marks.append(self.clock.mark())
        self.optimizer.step()
        marks.append(self.clock.mark())
        spans = zip(PHASES, itertools.pairwise(marks), strict=True)
        found = {phase: self.clock.between(*span) for phase, span in spans}
        return {**found, "step": sum(found.values())}


def measure(step: Step, rounds: int) -> dict[str, Any]:
    impls = [*step.criteria][::-1]  # The baseline comes first.
    turns = {impl: partial(step.run, impl) for impl in impls}
    steps = protocol.take_turns(turns, rounds, step.title, before_round=step.next_batch)
    times = {name: [found["step"] for found in steps[name]] for name in steps}
    baseline = times[impls[0]]
    rows = {}
    for impl in step.criteria:
        rows[impl] = {phase: statistics.median(found[phase] for found in steps[impl]) for phase in (*PHASES, "step")}
        rows[impl]["ratio"] = protocol.ratio(times[impl], baseline)
        step.next_batch()
        rows[impl]["mib"] = protocol.peak_above(partial(step.run, impl), step.device.type == "cuda")
    aa = protocol.ratio(times[protocol.AA], baseline)
    return {
        "title": step.title,
        "baseline": impls[0],
        "A/A": aa,
        "counts": protocol.does_count(rounds, [aa]),
        "impls": rows,
    }


def render(result: dict[str, Any]) -> str:
    lines = [
        f"{result['title']}   ms, median; ratio: × {result['baseline']}   A/A {result['A/A']:.2f}"
        + protocol.verdict(result["counts"])
    ]
    lines.append(f"  {'':<8}" + "".join(f"{name:>11}" for name in (*PHASES, "step", "ratio", "MiB")))
    for impl, row in result["impls"].items():
        cells = [f"{row[phase]:11.1f}" for phase in (*PHASES, "step")]
        lines.append(f"  {impl:<8}{''.join(cells)}{row['ratio']:11.2f}{row['mib']:11.0f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", metavar="CAMVID", help="CamVid's folder; without it, drawn scenes")
    parser.add_argument("--model", choices=tuple(NETWORKS), default="bcmfnet")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, nargs=2, metavar=("H", "W"), help="as in training when left out")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto")
    parser.add_argument(
        "--impl", nargs="*", help="the last is the baseline; all that run here, and torch, when left out"
    )
    parser.add_argument("--rounds", type=int, default=protocol.LEAST_ROUNDS)
    parser.add_argument("--output", type=Path, default=protocol.RESULTS, metavar="DIR")
    arguments = parser.parse_args()
    if not arguments.impl:
        arguments.impl = our_impls(torch.device(arguments.device))
    result = measure(Step(arguments), arguments.rounds)
    print(render(result))
    path = arguments.output / f"train_step-{protocol.device_name(arguments.device)}.json"
    protocol.write_record(path, {**protocol.about(), "rounds": arguments.rounds, "result": result})
    print(path)


if __name__ == "__main__":
    run_command(main)
