"""Predicts images: python -m bcmf_ext.predict --checkpoint runs/NAME/best.pt IMAGES… [--output DIR]."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .data import DATASETS, Submission, listing, read_image
from .data.pictures import IMAGE_ENDINGS
from .errors import UserError, command, counted, run_command, warn
from .files import LONGEST_NAME, check_replaceable, real
from .inference import Predictor
from .report import blend, save_png

COMMAND = "bcmf_ext.predict"
SUBMISSIONS = {name: dataset.submission for name, dataset in DATASETS.items() if dataset.submission is not None}
ENDINGS = {  # of the files that are written for an image, by --format
    "both": ("_label.png", "_overlay.png"),
    "labels": ("_label.png",),
    "overlays": ("_overlay.png",),
    **dict.fromkeys(SUBMISSIONS, (".png",)),
}


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Writes what `--format` says for each image, under its name: by default a palette PNG with the class of each
    pixel, and the image with its classes laid over it."""
    args = parse_flags(argv)
    output, endings = Path(args.output), ENDINGS[args.format]
    images = find_images(args.images, output)
    predictor = Predictor(args.checkpoint, args.device, args.amp)
    submission = SUBMISSIONS.get(args.format)
    if submission is not None:
        images = official_names(images, args.format, submission, predictor.classes)
    check_not_overwritten(images, output, endings)
    if not args.overwrite:
        results = (output / f"{key}{ending}" for key in images for ending in endings)
        check_replaceable(results, COMMAND, "output")
    left_out = []
    for key, path in tqdm(images.items(), "predicting", unit=" images", disable=None):
        try:
            check_name(key, path, endings)
            image = read_image(path)
        except UserError as error:
            warn(f"left out: {error}")
            left_out.append(path)
            continue
        label = predict_one(predictor, image, path)
        for ending in endings:
            if submission is not None:
                save_png(output / f"{key}.png", submission.ids[label], COMMAND)
            elif ending == "_label.png":
                save_png(output / f"{key}_label.png", label, COMMAND, predictor.palette)
            else:
                save_png(output / f"{key}_overlay.png", blend(image, predictor.palette[label]), COMMAND)
    if len(images) > len(left_out):
        print(summary(args.format, output, len(images) - len(left_out)))
        if "_label.png" in endings:
            print("classes: " + ", ".join(f"{index} {name}" for index, name in enumerate(predictor.classes)))
    if left_out:
        raise UserError(
            f"{len(left_out)} of {counted(len(images), 'image')} had to be left out, such as {left_out[0]}."
        )


def check_name(key: str, path: Path, endings: Sequence[str]) -> None:
    """Raises `UserError` if no file system has room for the name of a result."""
    name = max((f"{Path(key).name}{ending}" for ending in endings), key=len)
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise UserError(f"{path} has too long a name for {name[:20]}…{name[-20:]} to be written: shorten it.")


def predict_one(predictor: Predictor, image: np.ndarray, path: Path) -> np.ndarray:
    """The label of an image. Raises `UserError` if there is too little memory for it."""
    try:
        return predictor(image)
    except RuntimeError as error:  # torch.OutOfMemoryError is one; on the CPU there is no such class.
        if "memory" not in str(error):
            raise
        height, width = image.shape[:2]
        raise UserError(
            f"There is too little memory for {path}, {width}×{height} pixels: make it smaller, or cut it into parts."
        ) from error


def check_not_overwritten(images: Mapping[str, Path], output: Path, endings: Sequence[str]) -> None:
    """Raises `UserError` if a result would take the place of an image."""
    sources = {real(path) for path in images.values()}
    for key in images:
        for ending in endings:
            if real(output / f"{key}{ending}") in sources:
                raise UserError(f"{output / key}{ending} is one of the images: choose another --output.")


def summary(form: str, output: Path, images: int) -> str:
    """Says in a line what was written for so many images."""
    count = counted(images, "image")
    if form in SUBMISSIONS:
        return f"{count}: {output}/{SUBMISSIONS[form].names}.png, label ids for the evaluator and the server"
    what = {"labels": "…_label.png holds the class of each pixel", "overlays": "…_overlay.png shows it"}
    return f"{count}: {output}/" + ", ".join(what[kind] for kind in what if form in ("both", kind))


def official_names(
    images: Mapping[str, Path], name: str, submission: Submission, classes: Sequence[str]
) -> dict[str, Path]:
    """The images under a data set's names alone, without folders. Raises `UserError` if one has another name, or
    the classes are others."""
    official = DATASETS[name].classes
    if tuple(classes) != official:
        raise UserError(
            f"--format {name} takes a network of the {len(official)} classes of {name}, but this one knows "
            f"{', '.join(classes)}."
        )
    found: dict[str, Path] = {}
    for path in images.values():
        if not re.fullmatch(submission.pattern, path.stem):
            raise UserError(
                f"{path} is not named {submission.names}, as --format {name} needs it: predict the files of {name} "
                "itself, or leave --format out."
            )
        other = found.setdefault(path.stem, path)
        if other != path:
            raise UserError(f"{other} and {path} would both be written as {path.stem}.png: predict them apart.")
    return found


def find_images(arguments: Sequence[str], output: Path) -> dict[str, Path]:
    """{name of the output, without ending: path}, without what lies in a folder `output` below one of the folders.

    Raises `UserError` if there is no image, two would share a name, or a folder is `output` itself.
    """
    found: dict[str, Path] = {}
    for argument in map(Path, arguments):
        if os.path.isdir(argument):
            images = listing.find_images(argument)
            if real(argument) == real(output):
                raise UserError(
                    f"--output {output} is a folder of images to predict: choose another, or results would be taken "
                    "for images next time."
                )
            if real(argument) in real(output).parents:
                images = {key: path for key, path in images.items() if real(output) not in real(path).parents}
            if not images:
                raise UserError(f"{argument} holds no images ({' '.join(IMAGE_ENDINGS)}).")
        elif os.path.isfile(argument):
            images = {argument.stem: argument}
        else:
            raise UserError(f"There is no image or folder {argument}: check the path.")
        for key, path in images.items():
            other = found.setdefault(key, path)
            if other != path:
                raise UserError(f"{other} and {path} would both be written as {key}_label.png: predict them apart.")
    return found


def parse_flags(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        "python -m bcmf_ext.predict",
        usage="%(prog)s --checkpoint PATH IMAGES… [flags]",
        description="Predicts the class of each pixel.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of a run")
    parser.add_argument("--output", default="predictions", metavar="DIR", help="where to write (%(default)s)")
    parser.add_argument(
        "--format",
        default="both",
        choices=tuple(ENDINGS),
        help="labels: PNGs of class ids (NAME_label.png); overlays: the images in their classes' colours "
        f"(NAME_overlay.png); {', '.join(SUBMISSIONS)}: label ids under the names that the official evaluator and "
        "server take (both)",
    )
    parser.add_argument(
        "--amp", choices=("auto", "bf16", "fp16", "off"), help="precision; as in training when left out"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; the first GPU, or the CPU, when left out")
    parser.add_argument(
        "--overwrite", action="store_true", help="replace files of the results' names that this command has not made"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main)
