"""A folder of one's own data: images, labels of the same names, and the class names.

    ROOT/classes.txt                    one class name per line, line 1 for id 0; optionally a colour: `name r g b`
    ROOT/images/{train,val,test}/…      .png .jpg .jpeg .bmp .tif .tiff .webp, in subfolders as you like
    ROOT/labels/{train,val,test}/…      .png with the class index of each pixel (grey or palette), 255 = ignored

Where images/ has neither train/ nor val/, one image in five is held out as val: those whose names have the smallest
hashes, so that the choice looks random, is the same on every machine, and hardly moves when images are added.

With `reduce_zero_label`, id 0 is ignored and classes.txt names ids 1, 2, …, which become classes 0, 1, … (as ADE20K
does).
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import read_text
from .dataset import (
    IGNORE_INDEX,
    IMAGE_ENDINGS,
    LABEL_ENDINGS,
    FileDataset,
    Files,
    find_files,
    match_files,
    read_label_ids,
)

SPLITS = ("train", "val", "test")
MAX_CLASSES = 254
_HOLD_OUT_ONE_IN = 5


class Folder(FileDataset):
    """One's own classes. A test split without labels has `has_labels` False.

    Raises `UserError` if a folder or classes.txt is missing or empty, or images and labels do not match.
    """

    name = "folder"

    def __init__(self, root: Path, split: str, *, reduce_zero_label: bool = False) -> None:
        if split not in SPLITS:
            raise UserError(f"A folder has no split {split!r}: choose one of {', '.join(SPLITS)}.")
        self.split, self.folders = split, (root / "images", root / "labels")
        if not os.path.isdir(root / "images"):
            raise UserError(
                f"{root / 'images'} does not exist: the data root must hold images/, labels/ and classes.txt."
            )
        files, about = _find_split(root, split)
        self.classes, self.palette = _read_classes(root, files)
        self._shift = int(reduce_zero_label)
        ids = {i + self._shift: i for i in range(len(self.classes))}
        super().__init__(files, {0: IGNORE_INDEX, **ids} if reduce_zero_label else ids)
        ignored = "0 and 255" if reduce_zero_label else "255"
        self.protocol = (
            f"{root} {split}: {len(self)} images{about}, {len(self.classes)} classes of classes.txt, {ignored} ignored"
        )

    def _likely_cause(self, ids: set[int], wrong: set[int]) -> str:
        count, last = len(self.classes), len(self.classes) - 1 + self._shift
        if max(ids) > IGNORE_INDEX:
            return f"ids end at {last} by classes.txt; a 16-bit picture may hold instance ids or depth"
        if len(ids) > 64:
            return "so many values look like a grey picture or blurred colours, not class indices"
        if count == 19 and max(ids - {IGNORE_INDEX}) <= 33:
            return "these look like Cityscapes label ids, not train ids 0 to 18; map them, or use --dataset cityscapes"
        cause = f"classes.txt names {count} classes, ids {self._shift} to {last}; it may lack a line"
        if wrong == {count} and not self._shift:
            cause += ", or the classes start at 1 and 0 is unlabelled (then pass --reduce-zero-label)"
        return cause


def _find_split(root: Path, split: str) -> tuple[list[Files], str]:
    """The split's files and a remark for the protocol line."""
    if any(os.path.isdir(root / "images" / name) for name in ("train", "val")):
        folder, labels = root / "images" / split, root / "labels" / split
        if not os.path.isdir(folder):
            raise UserError(f"{folder} does not exist: images/ has folders for other splits, so make one for {split}.")
        images = _find_images(folder)
        if split == "test" and not os.path.isdir(labels):
            return [Files(key, path, None) for key, path in images.items()], " without labels"
        return _match(images, labels), ""
    if split == "test" or os.path.isdir(root / "images" / "test"):
        raise UserError(
            f"{root / 'images'} has no folders train and val: make them, beside test, or put all images into "
            f"{root / 'images'} itself, of which one in five is then held out as val."
        )
    files = _match(_find_images(root / "images"), root / "labels")
    held_out = _hold_out([item.key for item in files])
    if not held_out:
        raise UserError(
            f"{root / 'images'} holds a single image: add more, so that one can be held out for validation."
        )
    chosen = [item for item in files if (item.key in held_out) == (split == "val")]
    return chosen, f" (no train/ and val/ in images/: {len(held_out)} of {len(files)} held out as val by name)"


def _find_images(folder: Path) -> dict[str, Path]:
    images = find_files(folder, IMAGE_ENDINGS)
    if not images:
        raise UserError(f"{folder} holds no images ({' '.join(IMAGE_ENDINGS)}): put some there.")
    return images


def _match(images: dict[str, Path], labels: Path) -> list[Files]:
    if not os.path.isdir(labels):
        raise UserError(f"{labels} does not exist: put one PNG with class indices there for each image, of its name.")
    return match_files(images, find_files(labels, LABEL_ENDINGS), f"{labels}/{{key}}.png")


def _hold_out(keys: list[str]) -> set[str]:
    """One key in five, at least one, none of a single one: those with the smallest hashes."""
    count = min(max(1, len(keys) // _HOLD_OUT_ONE_IN), len(keys) - 1)
    return set(sorted(keys, key=lambda key: hashlib.blake2b(os.fsencode(key)).digest())[:count])


def _read_classes(root: Path, files: list[Files]) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and (C, 3) uint8 palette of classes.txt; classes without a colour there get one of `palette_for`."""
    path = root / "classes.txt"
    if not os.path.isfile(path):
        raise UserError(
            f"{path} is missing: write one class name per line, line 1 for id 0, line 2 for id 1 and so on"
            f"{_ids_in_use(files)}."
        )
    try:
        lines = [line.split() for line in read_text(path).rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a UTF-8 text file: save it as one ({error.reason}).") from error
    if [] in lines:
        raise UserError(f"{path}, line {lines.index([]) + 1} is empty: write a name there, or take the line out.")
    if not 2 <= len(lines) <= MAX_CLASSES:
        raise UserError(
            f"{path} names {len(lines)} class{'es' * (len(lines) != 1)}: write 2 to {MAX_CLASSES}, one name per line."
        )
    names, palette = [], palette_for(len(lines))
    for i, words in enumerate(lines):
        colour = words[-3:]
        if len(words) > 3 and all(word.isdecimal() for word in colour):
            if max(map(int, colour)) > 255:
                raise UserError(f"{path}, class {' '.join(words)!r}: the colour's values must be 0 to 255.")
            words, palette[i] = words[:-3], [int(word) for word in colour]
        if " ".join(words) in names:
            raise UserError(f"{path} names the class {' '.join(words)!r} twice: give each line its own name.")
        names.append(" ".join(words))
    return tuple(names), palette


def _ids_in_use(files: list[Files], at_most: int = 50) -> str:
    labels = [item.label for item in files if item.label is not None][:at_most]
    ids = sorted(set().union(*(np.unique(read_label_ids(path)).tolist() for path in labels)) - {IGNORE_INDEX})
    if not 0 < len(ids) <= MAX_CLASSES:
        return ""
    return f" (ids found in the first labels: {', '.join(map(str, ids[:20]))}{' …' if len(ids) > 20 else ''})"


def palette_for(count: int) -> np.ndarray:
    """(count, 3) uint8: the colours of PASCAL VOC from its index 1 on, all different up to 255.

    The bits of the index are dealt to the high bits of red, green and blue in turn. Index 0, black, is left out: it
    would look like ignored pixels.
    """
    index = np.arange(1, count + 1)
    palette = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette
