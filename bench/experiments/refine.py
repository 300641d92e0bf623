"""What refining a trained BCMFNet gains: ``python bench/experiments/refine.py --data CAMVID [--minutes N]``.

The pilot's protocol, from one starting point: BCMFNet is trained once, 20 epochs with the default loss; each arm then
goes on from its weights for ten epochs, at 0.3 of the rate, as the same network with another loss, or as scr_ddrnet_s,
which begins as it. Arms differ in that alone, and are compared seed by seed. What is done stands in refine.json, beside
this file, and is not done again: call it as often as you like, each time for --minutes. Do not run it while a benchmark
runs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from pilot import SCHEDULE, SCORES, SEEDS, differences, halve, score, verdict
from protocol import ROOT, about

from bcmf_ext import BCL, CPG, RMILoss, SegmentationCriterion
from bcmf_ext.config import make_config
from bcmf_ext.data import DATASETS, open_dataset
from bcmf_ext.errors import UserError, run_command
from bcmf_ext.files import write_file
from bcmf_ext.train import Trainer

START = "BCMFNet, 20 epochs"
RATE = 0.3  # of the recipe's learning rate


class Arm(NamedTuple):
    """A network, a loss, and how many seeds it gets. crm: whether the CRM of scr_ddrnet_s joins in: its gain is else
    kept at zero."""

    name: str
    criterion: Any
    network: str = "bcmfnet"
    crm: bool = False
    seeds: int = len(SEEDS)


def rmi(**terms: Any) -> SegmentationCriterion:
    return SegmentationCriterion(bcl=None, extra={"rmi": (0.5, RMILoss())}, **terms)


ARMS = (
    Arm("BCMFNet", SegmentationCriterion),
    Arm("SRM", SegmentationCriterion, "scr_ddrnet_s"),
    Arm("SRM + CRM", SegmentationCriterion, "scr_ddrnet_s", crm=True),
    Arm("BCMFNet, CE", lambda: SegmentationCriterion(bcl=None, cpg=None)),
    Arm("BCMFNet, CE + 0.5 RMI", lambda: rmi(cpg=None)),
    Arm("BCMFNet, CE + 0.5 RMI + 1 CPG3", lambda: rmi(cpg=CPG())),
    Arm("BCMFNet, BCE + 0.1 BCL + 1 CPG3", lambda: SegmentationCriterion(first="bce", bcl=BCL(), cpg=CPG()), seeds=1),
    # PyTorch's own scale, the mean over classes too: eleven of them.
    Arm(
        "BCMFNet, BCE / 11 + 0.1 BCL + 1 CPG3",
        lambda: SegmentationCriterion(torch.full((11,), 1 / 11), first="bce", bcl=BCL(), cpg=CPG()),
        seeds=1,
    ),
)
BASELINES = {"BCMFNet": ARMS[1:3] + ARMS[5:], "BCMFNet, CE": ARMS[:1] + ARMS[4:6]}
"""What is compared with what."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="CAMVID", help="CamVid's folder, in SegNet's layout")
    parser.add_argument("--minutes", type=float, default=30, help="no training begins later than that (%(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "pilot", metavar="DIR", help="images and runs")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, metavar="DIR", help="where the results go"
    )
    arguments = parser.parse_args()
    path = arguments.output / "refine.json"
    root, began = halve(arguments.data, arguments.work / "camvid-half"), time.monotonic()
    start = arguments.work / "start" / "last.pt"
    if not start.is_file():
        print(f"--- {START}", flush=True)
        unfinished = arguments.work / "start-unfinished"
        train(ARMS[0], 0, root, unfinished, epochs=20)
        unfinished.rename(start.parent)
    record = read_record(path, evaluate(start, root))
    for arm, seed in plan(record["runs"]):
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        print(f"--- {arm.name}, seed {seed}", flush=True)
        folder = arguments.work / re.sub(r"\W+", "-", f"{arm.name} seed {seed}")
        train(arm, seed, root, folder, pretrained=str(start), lr=RATE * DATASETS["camvid"].recipe.lr / 2)
        record["runs"].append({**about(), "arm": arm.name, "seed": seed, **evaluate(folder / "last.pt", root)})
        write_file(path, json.dumps(record, indent=1).encode() + b"\n")
    print(table(record))
    print(path)


def read_record(path: Path, start: dict[str, float]) -> dict[str, Any]:
    """What is done, which has to be from this starting point; UserError if it is not, or if the file is no record."""
    try:
        record = json.loads(path.read_text()) if path.is_file() else {"start": start, "runs": []}
        found, _ = record["start"], [(run["arm"], run["seed"]) for run in record["runs"]]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not what was written there ({error}): move it away, or mend it.") from error
    if found != start:
        raise UserError(f"{path} holds runs from another starting point, of mIoU {found['miou']}: move it away.")
    return record


def plan(runs: list[dict[str, Any]]) -> Iterator[tuple[Arm, int]]:
    """The arms and seeds that are still to be run, seed by seed."""
    done = {(run["arm"], run["seed"]) for run in runs}
    yield from ((arm, seed) for seed in SEEDS for arm in ARMS if seed < arm.seeds and (arm.name, seed) not in done)


def train(arm: Arm, seed: int, root: Path, folder: Path, **flags: Any) -> None:
    """Trains in this folder."""
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    flags |= {"dataset": "camvid", "data_root": str(root), "output_dir": str(folder.parent), "name": folder.name}
    flags |= {"model": arm.network, "seed": seed, "amp": "off", "device": "cpu"}
    config = make_config({**SCHEDULE, "eval_interval": 1000, **flags})
    trainer = Trainer(config, *(open_dataset("camvid", str(root), split) for split in ("train", "val")))
    trainer.criterion = arm.criterion()  # What it is made of are not all flags.
    if arm.network == "scr_ddrnet_s" and not arm.crm:
        trainer.state.model.crm_gain.requires_grad_(False)
    trainer.train()


def evaluate(checkpoint: Path, root: Path) -> dict[str, float]:
    return score(checkpoint, open_dataset("camvid", str(root), "val"))


def table(record: dict[str, Any]) -> str:
    """The mean of each arm's scores, and its paired differences from the arm that it is compared with."""
    runs, width = record["runs"], max(len(arm.name) for arm in ARMS)
    lines = [f"{'':<{width}}   seeds" + "".join(f"{title:>20}" for title in SCORES.values())]
    lines.append(f"{START:<{width}}        " + "".join(f"{record['start'][score]:>20.4f}" for score in SCORES))
    for arm in ARMS:
        if found := [run for run in runs if run["arm"] == arm.name]:
            means = "".join(f"{statistics.mean(run[score] for run in found):>20.4f}" for score in SCORES)
            lines.append(f"{arm.name:<{width}}{len(found):>8}{means}")
    for baseline, arms in BASELINES.items():
        lines.append(f"minus {baseline}")
        for arm in arms:
            pairs = [differences(runs, arm.name, baseline, score) for score in SCORES]
            if len(pairs[0]) > 1:
                verdicts = "".join(f"{verdict(each):>20}" for each in pairs)
                lines.append(f"{arm.name:<{width}}{len(pairs[0]):>8}{verdicts}")
    lines.append("differences in percent points, ± 2 standard errors; none: no difference measured; few: too few seeds")
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(main)
