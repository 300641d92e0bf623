"""Predicts images: python -m bcmf_ext.predict --checkpoint runs/NAME/best.pt IMAGES… [--output DIR]."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from .data import read_image
from .data.dataset import IMAGE_ENDINGS, find_files
from .errors import UserError, run_command
from .inference import Predictor
from .report import blend, save_png


def main(argv: Sequence[str] | None = None) -> None:
    """Writes for each image a palette PNG with the class of each pixel, and the image with its classes laid over it."""
    parser = argparse.ArgumentParser(
        "python -m bcmf_ext.predict",
        usage="%(prog)s --checkpoint PATH IMAGES… [flags]",
        description="Predicts the class of each pixel.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="files, or folders of them")
    parser.add_argument("--checkpoint", required=True, metavar="PATH", help="best.pt or last.pt of a run")
    parser.add_argument("--output", default="predictions", metavar="DIR", help="where to write (%(default)s)")
    parser.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), help="autocast; as in training when left out")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; the first GPU, or the CPU, when left out")
    args = parser.parse_args(argv)

    images = find_images(args.images)
    predictor = Predictor(args.checkpoint, args.device, args.amp)
    output = Path(args.output)
    for key, path in tqdm(images.items(), "predicting", unit=" images", disable=None):
        image = read_image(path)
        label = predictor(image)
        save_png(output / f"{key}_label.png", label, predictor.palette)
        save_png(output / f"{key}_overlay.png", blend(image, predictor.palette[label]))
    count = f"{len(images)} image{'s' if len(images) > 1 else ''}"
    print(f"{count}: {output}/…_label.png holds the class of each pixel, …_overlay.png shows it")
    print("classes: " + ", ".join(f"{index} {name}" for index, name in enumerate(predictor.classes)))


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
