"""Compares label files with one another: what each of them says may be right alone and contradict the others.

They are compared when the folder is opened, most of them by their headers alone (see `pictures.label_coding`), so that
scoring is as safe as training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .pictures import read_label

Coding = tuple[int, bytes | None]  # These are the bits per sample, and the RGB values of the palette.
Colour = tuple[int, ...]


def check_same_depth(codings: Mapping[Path, Coding]) -> None:
    """Raises `UserError` if grey labels of less than 8 bits lie among others of 8 and hold more than 0.

    White of a 1-bit picture may be id 1, or 255 if a tool has shrunk it from 8 bits (PNG optimisers and ImageMagick
    do); where all labels have so few bits, they were painted so.
    """
    bits = {path: number for path, (number, palette) in codings.items() if palette is None}
    shallow = [path for path, number in bits.items() if number < 8]
    deep = next((path for path, number in bits.items() if number >= 8), None)
    if deep is None:
        return
    for path in shallow:
        if read_label(path).ids.any():
            raise UserError(
                f"{path} is a grey picture of {bits[path]} bit{'s' * (bits[path] > 1)} and {deep} has {bits[deep]}, so "
                "white may be the highest id of so few bits, or 255: save all labels with 8 bits."
            )


def check_same_palettes(codings: Mapping[Path, Coding]) -> None:
    """Raises `UserError` if labels with palettes show an id in different colours, or different ids in the same colour.

    Tools that make a palette of the colours in each picture give a class another index in every file.
    """
    files: dict[bytes, list[Path]] = {}
    for path, (_, palette) in codings.items():
        if palette is not None:
            files.setdefault(palette, []).append(path)
    longest = max(files, key=len, default=b"")
    if all(longest.startswith(palette) for palette in files):  # Some tools end a palette with the last index in use.
        return
    colour_of: dict[int, tuple[Colour, Path]] = {}
    index_of: dict[Colour, tuple[int, Path]] = {}
    for palette, paths in files.items():
        used = {index: path for path in reversed(paths) for index in np.unique(read_label(path).ids).tolist()}
        colours = {index: tuple(palette[3 * index : 3 * index + 3]) for index in used}
        for index, colour in colours.items():
            other, first = colour_of.get(index, (colour, used[index]))
            if other != colour:
                raise UserError(
                    f"{first} and {used[index]} show the id {index} in different colours, {_words(other)} and "
                    f"{_words(colour)}, so it may be two classes: save all labels with one palette, or as grey PNGs."
                )
            same, first = index_of.get(colour, (index, used[index]))
            if same != index and index not in colour_of:
                raise UserError(
                    f"{first} and {used[index]} show different ids, {same} and {index}, in the same colour "
                    f"{_words(colour)}, so one class may have two: save all labels with one palette, or as grey PNGs."
                )
        for index, colour in colours.items():
            colour_of.setdefault(index, (colour, used[index]))
            index_of.setdefault(colour, (index, used[index]))


def masks_of_255(labels: Sequence[Path]) -> bool:
    """Whether labels of two classes hold 0 and 255, but 1 in none of them: 255 is hardly meant to be ignored then."""
    found = False
    for path in labels:
        present = set(np.unique(read_label(path).ids).tolist())
        if present - {0, 255}:
            return False
        found = found or 255 in present
    return found


def _words(colour: Colour) -> str:
    return " ".join(map(str, colour))
