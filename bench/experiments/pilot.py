"""Which losses, at which weights, help: ``python bench/experiments/pilot.py --data CAMVID [--minutes N]``.

Short trainings of BCMFNet on CamVid at half its size (180×240), train → val, which differ in the loss alone: the same
schedule, batches and seeds for every arm, so that arms are compared in pairs, seed by seed. First every arm with one
seed; then the best arm of each term with a warm-up of its weight; then CE, CE + CPG, what was the default (CE + 0.4
BCL + CPG) and the challengers (that, with one term exchanged for an arm's) with five seeds; last, with as many, the
ablation of BCMFNet's paper, where DDRNet-s stands beside BCMFNet. What is done stands in pilot.json, beside this file,
and is not done again: call it as often as you like, each time for --minutes. The table says of each arm with several
seeds how far it is from CE, from CE + CPG (so, what BCL adds), from what was the default, and from DDRNet-s: the mean
of the paired differences ± two standard errors. Do not run it while a benchmark runs.

The results there came with --challenger "0.1 BCL original, step 2" "1.5 CPG5". They made 0.1 BCL the default.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from problem import interpolate
from protocol import ROOT, about

from bcmf_ext import BCL, CPG, SegmentationCriterion
from bcmf_ext.config import make_config
from bcmf_ext.data import SegmentationDataset, open_dataset
from bcmf_ext.errors import UserError, run_command
from bcmf_ext.files import write_file
from bcmf_ext.inference import Predictor
from bcmf_ext.metrics import BoundaryFScore, BoundaryIoU, ConfusionMatrix
from bcmf_ext.ops import LOSS
from bcmf_ext.options import LossOptions
from bcmf_ext.train import Trainer

HERE = Path(__file__).parent
SEEDS = range(5)
SCHEDULE = {"epochs": 10, "batch_size": 8, "crop_size": (180, 240), "scale_range": (0.75, 1.5)}
SCORES = {"miou": "mIoU", "boundary_iou": "Boundary IoU", "boundary_f_1px": "F 1 px", "boundary_f_3px": "F 3 px"}
WARMUP = 150  # iterations of 450
REACH = 10  # pixels to either side of a pole or an edge


class Arm(NamedTuple):
    """A loss, cross-entropy and what is added to it, and a network."""

    name: str
    bcl: BCL | None = None
    cpg: CPG | None = None
    warmup: int = 0
    network: str = "bcmfnet"


CE = Arm("CE")
WITHOUT_BCL = Arm("1 CPG3", cpg=CPG(1.0))
OLD_DEFAULT = Arm("CE + 0.4 BCL + 1 CPG3", BCL(0.4), CPG(1.0))
SINGLE = (
    CE,
    *(
        Arm(
            f"{weight:g} BCL {supervise}, step {'+'.join(map(str, BCL(step=step).steps))}", BCL(weight, step, supervise)
        )
        for supervise, weights in (("original", (0.1, 0.4, 1.0)), ("flipped", (0.1, 0.4, 0.8)))
        for step in (1, 2, (1, 2))
        for weight in weights
    ),
    *(
        Arm(f"{weight:g} CPG{k}", cpg=CPG(weight, k))
        for k, weights in ((3, (0.3, 1.0, 2.0)), (5, (0.4, 1.5)), (7, (0.35, 1.5)))
        for weight in weights
    ),
    OLD_DEFAULT,
)
PAPER = (
    Arm("DDRNet-s, CE", network="ddrnet_s"),
    Arm("0.1 BCL original, step 2", BCL()),
    Arm("DDRNet-s, CE + 0.1 BCL + 1 CPG3", BCL(), CPG(), network="ddrnet_s"),
)
"""What BCMFNet's ablation needs beside CE and the default loss of BCMFNet."""
ARMS = {
    arm.name: arm
    for single in SINGLE
    for arm in (single, single._replace(name=f"{single.name}, warm-up", warmup=WARMUP))
}


def challenger(arm: Arm) -> Arm:
    """The old default, with the arm's term and warm-up in place of its own."""
    name = f"CE + {arm.name} + 1 CPG3" if arm.bcl else f"CE + 0.4 BCL + {arm.name}"
    return Arm(name, arm.bcl or OLD_DEFAULT.bcl, arm.cpg or OLD_DEFAULT.cpg, arm.warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="CAMVID", help="CamVid's folder, in SegNet's layout")
    parser.add_argument("--minutes", type=float, default=30, help="no training begins later than that (%(default)s)")
    parser.add_argument(
        "--challenger",
        nargs="+",
        choices=tuple(ARMS),
        default=(),
        metavar="ARM",
        help="arms whose term takes the place of what was the default, with five seeds: names of the table",
    )
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "pilot", metavar="DIR", help="images and runs")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, metavar="DIR", help="where the results go"
    )
    arguments = parser.parse_args()
    path = arguments.output / "pilot.json"
    schedule = json.loads(json.dumps(SCHEDULE))
    try:
        record = json.loads(path.read_text()) if path.is_file() else {"schedule": schedule, "runs": []}
        found, _ = record["schedule"], record["runs"]
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not what was written there ({error}): move it away, or mend it.") from error
    if found != schedule:
        raise UserError(f"{path} holds runs of another schedule, {found}: move it away.")
    root = halve(arguments.data, arguments.work / "camvid-half")
    began = time.monotonic()
    for arm, seed in plan(record["runs"], arguments.challenger):
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        print(f"--- {arm.name}, seed {seed}", flush=True)
        record["runs"].append({**about(), **run(arm, seed, root, arguments.work)})
        write_file(path, json.dumps(record, indent=1).encode() + b"\n")
    print(table(record["runs"]))
    print(path)
    if {CE.name, WITHOUT_BCL.name} <= {
        done["arm"] for done in record["runs"] if (arguments.work / done["folder"]).is_dir()
    }:
        picture = path.with_name("pilot-profiles.png")
        draw_profiles(arguments.work, record["runs"], root, picture)
        print(picture)


def plan(runs: list[dict[str, Any]], challengers: list[str]) -> Iterator[tuple[Arm, int]]:
    """The arms and seeds that are still to be run. `runs` grows meanwhile."""

    def missing(arm: Arm, seed: int) -> bool:
        return not any((done["arm"], done["seed"]) == (arm.name, seed) for done in runs)

    yield from ((arm, 0) for arm in SINGLE if missing(arm, 0))
    for term in ("BCL", "CPG"):
        names = {arm.name for arm in SINGLE if term in arm.name} - {OLD_DEFAULT.name}
        best = max((done for done in runs if done["seed"] == 0 and done["arm"] in names), key=lambda done: done["miou"])
        warm = ARMS[f"{best['arm']}, warm-up"]
        if missing(warm, 0):
            yield warm, 0
    for seed in SEEDS:
        for arm in (CE, WITHOUT_BCL, OLD_DEFAULT, *(challenger(ARMS[name]) for name in challengers)):
            if missing(arm, seed):
                yield arm, seed
    yield from ((arm, seed) for seed in SEEDS for arm in PAPER if missing(arm, seed))


def halve(source: str, target: Path) -> Path:
    """CamVid at half its size: images averaged, labels every second pixel."""
    done = target / "done"
    if done.is_file() and done.read_text() == source:
        return target
    for split in ("train", "val"):
        open_dataset("camvid", source, split)  # before anything is written: all of it has to be there
    shutil.rmtree(target, ignore_errors=True)  # of another source
    for file in sorted(Path(source).rglob("*.*")):
        folder = file.parent.name
        if folder not in ("train", "val", "trainannot", "valannot"):
            continue
        picture = Image.open(file)
        small = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        if folder.endswith("annot"):
            small = Image.fromarray(np.asarray(picture)[1::2, 1::2])
        (target / folder).mkdir(parents=True, exist_ok=True)
        small.save(target / folder / f"{file.stem}.png")
    done.write_text(source)
    return target


def run(arm: Arm, seed: int, root: Path, work: Path) -> dict[str, Any]:
    """Trains, and scores the last weights."""
    name = f"{arm.name}, seed {seed}".replace(" ", "-").replace(",", "")
    shutil.rmtree(work / name, ignore_errors=True)  # of a run that was stopped
    flags = {"dataset": "camvid", "data_root": str(root), "output_dir": str(work), "name": name, "seed": seed}
    flags |= {"model": arm.network}
    flags |= {"amp": "off", "device": "cpu", "eval_interval": SCHEDULE["epochs"]}
    flags |= {"loss_warmup": arm.warmup, "log_grad_share": 10, "bcl": arm.bcl.weight if arm.bcl else 0}
    flags |= {"cpg": arm.cpg.weight, "cpg_kernel": arm.cpg.kernel_size} if arm.cpg else {"cpg": 0}
    train_set, val_set = (open_dataset("camvid", str(root), split) for split in ("train", "val"))
    trainer = Trainer(make_config({**SCHEDULE, **flags}), train_set, val_set)
    # Steps and labels of BCL are no flags.
    trainer.criterion = SegmentationCriterion(bcl=arm.bcl, cpg=arm.cpg)
    try:
        trainer.train()
    except SystemExit:
        print("But the pilot begins this run anew when you call it again.")
        raise
    log = trainer.run.records
    return {
        "arm": arm.name,
        "seed": seed,
        "folder": name,
        **score(trainer.run.last, val_set),
        "gradient_share": {"first epoch": log[0]["grad_share"], "last epoch": log[-1]["grad_share"]},
    }


def score(checkpoint: Path, val_set: SegmentationDataset) -> dict[str, float]:
    """Scores on the val split; selected: |S| / |V| of BCL with its defaults, whatever the network was trained with."""
    predictor, classes = Predictor(checkpoint, "cpu"), len(val_set.classes)
    confusion, band = ConfusionMatrix(classes), BoundaryIoU(classes)
    f_score = BoundaryFScore(classes, widths=(1, 3))
    default = LossOptions(255, bcl_steps=BCL().steps, bcl_threshold=BCL().threshold, bcl_nms_size=BCL().nms_size)
    selected = valid = 0
    for index in range(len(val_set)):
        image, label = (torch.from_numpy(array) for array in val_set.pair(index))
        logits = predictor.logits(image.permute(2, 0, 1)[None])
        prediction = confusion.update_from_logits(logits, label[None])
        for metric in (band, f_score):
            metric.update(prediction, label[None])
        marks = LOSS["cpu"](logits, label[None], None, *default)[3]
        selected, valid = selected + int(marks.count_nonzero()), valid + int((label != 255).sum())
    scores = confusion.mean_iou(), band.mean_iou(), *f_score.mean_f_score()
    return {**dict(zip(SCORES, scores, strict=True)), "selected": selected / valid}


def table(runs: list[dict[str, Any]]) -> str:
    """The arms with one seed; then those with several, as paired differences from three of them."""
    width = max((len(done["arm"]) for done in runs), default=0)
    titles = "".join(f"{title:>20}" for title in SCORES.values())
    lines = [f"{'seed 0':<{width}}        {titles}   |S|/|V|   shares of the gradient in the last epoch"]
    for done in (done for done in runs if done["seed"] == 0):
        shares = " ".join(f"{name} {share:.2f}" for name, share in done["gradient_share"]["last epoch"].items())
        figures = "".join(f"{done[score]:>20.4f}" for score in SCORES)
        lines.append(f"{done['arm']:<{width}}        {figures}   {done['selected']:.4f}   {shares}")
    for baseline in (CE.name, WITHOUT_BCL.name, OLD_DEFAULT.name, PAPER[0].name, PAPER[2].name):
        lines.append(f"\n{'minus ' + baseline:<{width}}   seeds{titles}")
        for arm in dict.fromkeys(done["arm"] for done in runs):
            found = [differences(runs, arm, baseline, score) for score in SCORES]
            if arm != baseline and len(found[0]) > 1:
                lines.append(f"{arm:<{width}}{len(found[0]):>8}" + "".join(f"{verdict(pairs):>20}" for pairs in found))
    lines.append("in percent points, ± 2 standard errors; none: no difference measured; few: too few seeds to tell")
    return "\n".join(lines)


def differences(runs: list[dict[str, Any]], arm: str, baseline: str, score: str) -> list[float]:
    """The differences of an arm's scores from the baseline's, seed by seed."""
    scores = {(done["arm"], done["seed"]): done[score] for done in runs}
    return [scores[arm, seed] - scores[baseline, seed] for a, seed in scores if a == arm and (baseline, seed) in scores]


def verdict(pairs: list[float]) -> str:
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    remark = "" if abs(mean) > 2 * error else "none"
    return f"{100 * mean:+.2f} ± {200 * error:.2f} {remark if len(pairs) >= len(SEEDS) else 'few':<4}"


def draw_profiles(work: Path, runs: list[dict[str, Any]], root: Path, path: Path) -> None:
    """CE beside CE + CPG (as figure 6 of the CPG paper): the probability of "pole" along rows that cross a pole of
    three pixels, and below that of the class to the right along rows that cross an edge between any two."""
    folders = {done["arm"]: work / done["folder"] for done in runs if done["seed"] == 0}
    pair = {"CE": folders[CE.name], "CE + 1 CPG3": folders[WITHOUT_BCL.name]}
    val_set = open_dataset("camvid", str(root), "val")
    figure, grid = plt.subplots(2, 2, figsize=(9, 6.4), sharey=True, constrained_layout=True)
    for axes, (title, folder) in zip(grid.T, pair.items(), strict=True):
        images = list(probabilities(Predictor(folder / "last.pt", "cpu"), val_set))
        pole = val_set.classes.index("pole")
        poles = np.concatenate([across_poles(p, label, pole) for p, label in images])
        edges = np.concatenate([across_edges(p, label) for p, label in images])
        middle, pixels = np.arange(-REACH, REACH + 1), np.arange(-REACH, REACH) + 0.5
        draw_profile(axes[0], poles, middle, abs(middle) <= 1, f"{title}: {len(poles):,} rows across poles")
        draw_profile(axes[1], edges, pixels, pixels > 0, f"{title}: {len(edges):,} rows across edges")
        axes[0].set_xlabel("pixels from the pole's middle")
        axes[1].set_xlabel("pixels from the edge")
    grid[0, 0].set_ylabel("probability of pole")
    grid[1, 0].set_ylabel("probability of the class to the right")
    grid[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_profile(axis: Axes, profiles: np.ndarray, offsets: np.ndarray, truth: np.ndarray, title: str) -> None:
    for low, high, shade in ((10, 90, 0.15), (25, 75, 0.3)):
        band = np.percentile(profiles, (low, high), axis=0)
        axis.fill_between(offsets, *band, color="tab:blue", alpha=shade, lw=0, label=f"{low}–{high} % of the rows")
    axis.plot(offsets, profiles.mean(0), color="tab:blue", label="mean")
    axis.step(offsets, truth, where="mid", color="black", lw=1, label="truth")
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)


def probabilities(predictor: Predictor, val_set: SegmentationDataset) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each image's probabilities (C, H, W), and its labels."""
    for index in range(len(val_set)):
        image, label = val_set.pair(index)
        logits = predictor.logits(torch.from_numpy(image).permute(2, 0, 1)[None])
        yield interpolate(logits.float(), label.shape).softmax(1)[0].numpy(), label


def across_poles(p: np.ndarray, label: np.ndarray, pole: int) -> np.ndarray:
    """The probability of pole along each piece of a row in whose middle, and nowhere else, are three pixels of it."""
    windows = np.lib.stride_tricks.sliding_window_view(label, 2 * REACH + 1, axis=1)
    exact = ((windows == pole) == (abs(np.arange(-REACH, REACH + 1)) <= 1)).all(-1) & (windows != 255).all(-1)
    return np.lib.stride_tricks.sliding_window_view(p[pole], 2 * REACH + 1, axis=1)[exact]


def across_edges(p: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The probability of the class to the right along each piece of a row that is of one class to the left of its
    middle, and of another to the right."""
    windows = np.lib.stride_tricks.sliding_window_view(label, 2 * REACH, axis=1)
    left, right = windows[..., :REACH], windows[..., REACH:]
    plain = (left == left[..., :1]).all(-1) & (right == right[..., :1]).all(-1) & (left[..., 0] != right[..., 0])
    y, x = np.nonzero(plain & (windows != 255).all(-1))
    return p[right[y, x, 0][:, None], y[:, None], x[:, None] + np.arange(2 * REACH)]


if __name__ == "__main__":
    run_command(main)
