"""Predicts images: python -m bcmf_ext.predict --checkpoint runs/NAME/best.pt IMAGES… [--output DIR]."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from .data import read_image
from .data.cityscapes import CLASSES as CITYSCAPES_CLASSES
from .data.cityscapes import TRAIN_ID_TO_LABEL_ID
from .data.dataset import IMAGE_ENDINGS, find_files
from .errors import UserError, run_command
from .inference import Predictor
from .report import blend, save_png


def main(argv: Sequence[str] | None = None) -> None:
    """Writes what `--format` says for each image, under its name: by default a palette PNG with the class of each
    pixel, and the image with its classes laid over it."""
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
        choices=("both", "labels", "overlays", "cityscapes"),
        help="labels: PNGs of class ids (NAME_label.png); overlays: the images in their classes' colours "
        "(NAME_overlay.png); cityscapes: label ids under the names that the official evaluator and server take (both)",
    )
    parser.add_argument(
        "--amp", choices=("auto", "bf16", "fp16", "off"), help="precision; as in training when left out"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; the first GPU, or the CPU, when left out")
    args = parser.parse_args(argv)

    images = find_images(args.images)
    predictor = Predictor(args.checkpoint, args.device, args.amp)
    if args.format == "cityscapes":
        images = official_names(images, predictor.classes)
    output = Path(args.output)
    for key, path in tqdm(images.items(), "predicting", unit=" images", disable=None):
        image = read_image(path)
        label = predictor(image)
        if args.format == "cityscapes":
            save_png(output / f"{key}.png", TRAIN_ID_TO_LABEL_ID[label])
        if args.format in ("both", "labels"):
            save_png(output / f"{key}_label.png", label, predictor.palette)
        if args.format in ("both", "overlays"):
            save_png(output / f"{key}_overlay.png", blend(image, predictor.palette[label]))
    print(summary(args.format, output, len(images)))
    if args.format in ("both", "labels"):
        print("classes: " + ", ".join(f"{index} {name}" for index, name in enumerate(predictor.classes)))


def summary(form: str, output: Path, images: int) -> str:
    count = f"{images} image{'s' if images > 1 else ''}"
    if form == "cityscapes":
        return (
            f"{count}: {output}/<city>_<sequence>_<frame>_leftImg8bit.png, label ids for the evaluator and the server"
        )
    what = {"labels": "…_label.png holds the class of each pixel", "overlays": "…_overlay.png shows it"}
    return f"{count}: {output}/" + ", ".join(what[kind] for kind in what if form in ("both", kind))


def official_names(images: Mapping[str, Path], classes: Sequence[str]) -> dict[str, Path]:
    """The same images under Cityscapes' names alone, without folders. `UserError` if one has another name, or the
    classes are others."""
    if tuple(classes) != CITYSCAPES_CLASSES:
        raise UserError(
            "--format cityscapes takes a network of the 19 Cityscapes classes, but this one knows "
            f"{', '.join(classes)}."
        )
    found: dict[str, Path] = {}
    for path in images.values():
        if not re.fullmatch(r"[a-z-]+_\d{6}_\d{6}_leftImg8bit", path.stem):
            raise UserError(
                f"{path} is not named <city>_<sequence>_<frame>_leftImg8bit, as --format cityscapes needs it: predict "
                "Cityscapes' own files, or leave --format out."
            )
        other = found.setdefault(path.stem, path)
        if other != path:
            raise UserError(f"{other} and {path} would both be written as {path.stem}.png: predict them apart.")
    return found


def find_images(arguments: Sequence[str]) -> dict[str, Path]:
    """{name of the output, without ending: path}; `UserError` if there is no image, or two would share a name."""
    found: dict[str, Path] = {}
    for argument in map(Path, arguments):
        if argument.is_dir():
            images = find_files(argument, IMAGE_ENDINGS)
            if not images:
                raise UserError(f"{argument} holds no images ({' '.join(IMAGE_ENDINGS)}).")
        elif argument.is_file():
            images = {argument.stem: argument}
        else:
            raise UserError(f"There is no image or folder {argument}: check the path.")
        for key, path in images.items():
            other = found.setdefault(key, path)
            if other != path:
                raise UserError(f"{other} and {path} would both be written as {key}_label.png: predict them apart.")
    return found


if __name__ == "__main__":
    run_command(main)
