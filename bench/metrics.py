"""The cost of the metrics in an evaluation: ``python bench/metrics.py [--device cuda] [--labels CAMVID]``.

Updates of every metric with one image (1024×2048 unless --size says otherwise) on one thread: with the compiled kernels
(CPU) and with PyTorch alone, and the confusion matrix from logits at 1/8, which holds the upsampling and arg-max, too.
The truth are labels of an image, enlarged; the prediction is that in 1/8 of the resolution, enlarged again, as a
network's is.

The sum over all metrics, by the kernels, is the baseline (protocol.py). Prints a table and writes
bench/results/metrics-<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import protocol
from problem import interpolate, make_labels

from bcmf_ext import dispatch
from bcmf_ext.engine import choose_device
from bcmf_ext.errors import run_command
from bcmf_ext.metrics import BoundaryFScore, BoundaryIoU, ConfusionMatrix, Counts, TrimapIoU
from bcmf_ext.metrics._counts import by_kernels

METRICS = (ConfusionMatrix, BoundaryIoU, BoundaryFScore, TrimapIoU)
TOTAL = "all four"
SIZE = (1, 19, 1024, 2048)


def make_prediction(target: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Makes logits at 1/8, and their classes at the target's size."""
    scores = F.one_hot(target.clamp(max=classes).long(), classes + 1)[..., :classes].permute(0, 3, 1, 2).float()
    logits = F.avg_pool2d(scores, 8)
    prediction = interpolate(logits, target.shape[1:]).argmax(1)
    return logits, prediction.to(torch.uint8)


def update_all(metrics: list[Counts], prediction: Tensor, target: Tensor) -> None:
    for metric in metrics:
        metric.update(prediction, target)


def by_pytorch(update: Callable[[], None]) -> None:
    with mock.patch.object(dispatch, "why_not", return_value="PyTorch was asked for"):
        update()


def make_rows(target: Tensor, classes: int) -> dict[str, Callable[[], object]]:
    device = target.device
    logits, prediction = make_prediction(target, classes)
    metrics = [metric(classes, device=device) for metric in METRICS]
    updates = {type(metric).__name__: partial(update_all, [metric], prediction, target) for metric in metrics}
    updates[TOTAL] = partial(update_all, metrics, prediction, target)
    rows: dict[str, Callable[[], object]] = {}
    if by_kernels(target):
        rows = {f"{name}, kernels": update for name, update in updates.items()}
    rows |= {f"{name}, PyTorch": partial(by_pytorch, update) for name, update in updates.items()}
    rows["ConfusionMatrix, from logits"] = partial(ConfusionMatrix(classes).update_from_logits, logits, target)
    return rows


def measure(target: Tensor, classes: int, rounds: int) -> dict[str, Any]:
    rows = make_rows(target, classes)
    clock = protocol.Clock(target.device.type)
    order = sorted(rows, key=lambda name: not name.startswith(TOTAL))  # The baseline comes first.
    times = protocol.take_turns({name: partial(clock.latency, rows[name]) for name in order}, rounds, "metrics")
    baseline = order[0]
    aa = protocol.ratio(times[protocol.AA], times[baseline])
    counts = protocol.does_count(rounds, [aa])
    ratios = {row: protocol.ratio(times[row], times[baseline]) for row in rows}
    found = {row: {"ms": statistics.median(times[row]), "ratio": ratio} for row, ratio in ratios.items()}
    return {
        "size": list(target.shape),
        "classes": classes,
        "baseline": baseline,
        "A/A": aa,
        "counts": counts,
        "rows": found,
    }


def render(result: dict[str, Any]) -> str:
    lines = [
        f"{'×'.join(map(str, result['size']))}, {result['classes']} classes   A/A {result['A/A']:.2f}"
        + protocol.verdict(result["counts"]),
        f"  {'':<30}{'ms':>9}   × {result['baseline']}",
    ]
    lines += [f"  {name:<30}{row['ms']:9.2f}{row['ratio']:9.2f}" for name, row in result["rows"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--labels", metavar="CAMVID", help="CamVid's folder; without it, labels of drawn scenes")
    parser.add_argument("--size", type=int, nargs=4, metavar=("N", "C", "H", "W"), default=SIZE)
    parser.add_argument("--rounds", type=int, default=protocol.ROUNDS, help=f"default: {protocol.ROUNDS}; at least 2")
    parser.add_argument("--output", type=Path, default=protocol.RESULTS, metavar="DIR", help="where the results go")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds is at least 2")
    torch.set_num_threads(1)
    n, classes, height, width = arguments.size
    target = make_labels(arguments.labels, n, height, width).to(choose_device(arguments.device))
    found = target[target != 255].unique().tolist()
    if found and found[-1] >= classes:
        parser.error(f"--size says {classes} classes, and the labels hold {found[-1]}: at least {found[-1] + 1}.")
    path = arguments.output / f"metrics-{protocol.device_name(arguments.device)}.json"
    source = "CamVid" if arguments.labels else "drawn scenes"
    result = measure(target, classes, arguments.rounds)
    record = {**protocol.about(), "labels": source, "rounds": arguments.rounds, "result": result}
    print(render(result))
    protocol.write_record(path, record)
    print(path)


if __name__ == "__main__":
    run_command(main)
