"""Scores a checkpoint, also at boundaries: python -m bcmf_ext.evaluate --checkpoint runs/NAME/best.pt [flags]."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .data import DATASETS, EvalSamples, SegmentationDataset, open_dataset
from .engine import choose_workers, close_loader, evaluate, make_loader
from .errors import UserError, command, counted, run_command
from .files import LONGEST_NAME, check_replaceable, real, write_file
from .inference import Predictor, not_finite
from .metrics import BoundaryFScore, BoundaryIoU, TrimapIoU
from .report import metrics_record, metrics_table, none_for_nan, save_png

COMMAND = "bcmf_ext.evaluate"


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Prints mIoU, pixel accuracy and each class's IoU, Boundary IoU, boundary F-score and trimap IoU, and writes them
    to metrics.json; writes the predictions if asked to."""
    args = parse_flags(argv)
    if args.workers is not None and args.workers < 0:
        raise UserError(f"--workers is {args.workers}, but must be at least 0.")
    predictor = Predictor(args.checkpoint, args.device, args.amp)
    dataset = open_split(args, predictor)
    metrics = metrics_file(args.checkpoint) if args.metrics_file is None else Path(args.metrics_file)
    predictions = [] if args.save_preds is None else prediction_files(dataset, Path(args.save_preds))
    if dataset.has_labels:
        check_writable(metrics)
    if not args.overwrite:
        check_replaceable([metrics] if dataset.has_labels else [], COMMAND, "metrics_file")
        check_replaceable(predictions, COMMAND, "save_preds")
    print(dataset.protocol)

    def save(index: int, prediction: Tensor | np.ndarray) -> None:
        if args.save_preds is not None:
            save_png(predictions[index], dataset.ids[np.asarray(prediction)], COMMAND)

    if dataset.has_labels:
        record = {
            "software": COMMAND,
            "checkpoint": str(args.checkpoint),
            "dataset": dataset.name,
            "split": args.split,
            "images": len(dataset),
            **score(predictor, dataset, args.workers, save),
        }
        write_file(metrics, json.dumps(record, indent=1).encode() + b"\n")
        print(metrics_table(record))
        print(f"metrics {metrics}")
    else:
        for index in tqdm(range(len(dataset)), "predicting", unit=" images", disable=None):
            save(index, predictor(dataset.image(index)))
    if args.save_preds is not None:
        print(f"predictions {args.save_preds}")


def open_split(args: argparse.Namespace, predictor: Predictor) -> SegmentationDataset:
    """The split to score: as in training, where the flags say nothing else. Raises `UserError` if it has other classes
    than the network, or no labels and no predictions are asked for."""
    trained = predictor.config
    name = args.dataset or trained["dataset"]
    root = args.data_root or (trained["data_root"] if name == trained["dataset"] else None)
    options = {option: trained[option] for option in DATASETS[name].options}
    dataset = open_dataset(name, root, args.split, **options)
    if dataset.classes != predictor.classes:
        raise UserError(
            f"{args.checkpoint} knows the {len(predictor.classes)} classes {', '.join(predictor.classes)}; {name} has "
            f"{len(dataset.classes)}, {', '.join(dataset.classes)}: they cannot be compared."
        )
    if not dataset.has_labels and args.save_preds is None:
        raise UserError(
            f"{name} {args.split} has no labels, so there is no mIoU: write the predictions with --save-preds DIR, or "
            "score --split val."
        )
    return dataset


def score(
    predictor: Predictor, dataset: SegmentationDataset, workers: int | None, save: Callable[[int, Tensor], None]
) -> dict[str, Any]:
    """All metrics of a split, as metrics.json holds them."""
    device, classes = predictor.device, len(dataset.classes)
    loader = make_loader(EvalSamples(dataset), choose_workers(workers, device), device)
    samples = tqdm(loader, "evaluating", unit=" images", disable=None)
    band = BoundaryIoU(classes, device=device)
    others = BoundaryFScore(classes, device=device), TrimapIoU(classes, device=device)
    corners, odd = predictor.align_corners, torch.zeros((), dtype=torch.int64, device=device)

    def logits_of(images: Tensor) -> Tensor:
        logits = predictor.logits(images)
        odd.add_(~logits.isfinite().all())  # It is read at the end, so that a GPU is not waited for.
        return logits

    try:
        confusion = evaluate(logits_of, samples, device, classes, save, align_corners=corners, metrics=[band, *others])
    finally:
        close_loader(loader)
    if odd:
        raise UserError(not_finite(predictor.path, f"{int(odd)} of {counted(len(dataset), 'image')}"))
    about = {"pixel_accuracy": none_for_nan(confusion.pixel_accuracy()), "boundary_iou_ratio": band.ratio}
    return {**about, **metrics_record([confusion, band, *others], dataset.classes)}


def prediction_files(dataset: SegmentationDataset, folder: Path) -> list[Path]:
    """Where the predictions go, by index. Raises `UserError` if that is among the images or labels, or a name is too
    long."""
    for taken in dataset.folders:
        if real(taken) in (real(folder), *real(folder).parents):
            raise UserError(f"--save-preds {folder} lies in {taken}, which holds the data: choose another folder.")
    predictions = [folder / f"{dataset.stem(index)}.png" for index in range(len(dataset))]
    for index, path in enumerate(predictions):
        if len(os.fsencode(path.name)) > LONGEST_NAME:
            raise UserError(f"{dataset.source(index)} has too long a name for --save-preds: shorten it.")
    return predictions


def metrics_file(checkpoint: str) -> Path:
    """The file metrics.json beside the checkpoint, or in a run's folder."""
    path = Path(checkpoint)
    return (path if os.path.isdir(path) else path.parent) / "metrics.json"


def check_writable(path: Path) -> None:
    """Raises `UserError` if the scores could not be written: before all images are scored."""
    folder = next(folder for folder in path.absolute().parents if os.path.exists(folder))
    if os.path.isdir(path) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise UserError(f"The scores cannot be written to {path}: name another file with --metrics-file.")


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        "python -m bcmf_ext.evaluate",
        usage="%(prog)s --checkpoint PATH [flags]",
        description="Scores a checkpoint on labelled data.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of a run, or its folder"
    )
    parser.add_argument("--dataset", choices=tuple(DATASETS), help="what to score it on; as in training when left out")
    parser.add_argument("--data-root", metavar="DIR", help="the dataset's folder; as in training when left out")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"), help="its split (%(default)s)")
    parser.add_argument(
        "--metrics-file",
        metavar="FILE",
        help="where to write all scores, as JSON, over an older file; metrics.json beside the checkpoint when left out",
    )
    parser.add_argument("--save-preds", metavar="DIR", help="write predictions as PNG, in the ids of the label files")
    parser.add_argument(
        "--workers", "-j", type=int, metavar="N", help="processes that load data; by the number of cores"
    )
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), help="autocast; as in training when left out")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; the first GPU, or the CPU, when left out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of the results' names that this command has not made"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
