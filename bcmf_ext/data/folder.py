"""A folder of one's own data: images, labels of the same names, and the class names.

    ROOT/classes.txt                    a class per line, line 1 for id 0: `name`, or `name r g b` (see classes.py)
    ROOT/images/{train,val,test}/…      pictures of 8 bits per channel, in subfolders as you like
    ROOT/labels/{train,val,test}/…      .png .bmp .tif with the id of each pixel (grey or palette), 255 = ignored

Other usual names of splits will do (see splits.py). Where images/ has no such folders, one image in five is held out as
val: those whose names have the smallest hashes, so that the choice looks random, is the same on every machine, and
hardly moves when images are added.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError, counted
from .classes import MAX_CLASSES, palette_for, read_classes
from .consistency import check_same_depth, check_same_palettes, masks_of_255
from .dataset import IGNORE_INDEX, FileDataset, Recipe
from .listing import Files, find_files, find_images, match_files
from .pictures import IMAGE_ENDINGS, LABEL_ENDINGS, label_coding, read_label
from .splits import SPLITS, check_no_splits, find_split_folder, names_of_split_folders

_HOLD_OUT_ONE_IN = 5


class Folder(FileDataset):
    """One's own classes. A test split without labels has `has_labels` False.

    Args:
        reduce_zero_label: id 0 is ignored, and classes.txt names ids 1, 2, …, which become classes 0, 1, … (as ADE20K
            does).
        ignore_label: an id, 0..65535, that is ignored besides 255; if classes.txt names it, that class is left out.
        binary_masks: of two classes, the first is 0 and the second 255 or 1; 255 is not ignored.
        label_suffix: the label of NAME.jpg is NAME{label_suffix}.png, or another of `LABEL_ENDINGS`.

    Raises `UserError` if a folder or classes.txt is missing or empty, images and labels do not match, labels contradict
    one another, or the options do.
    """

    name = "folder"
    # Images may have any size: a crop that fits most (smaller ones are padded), and a rate between the others'.
    recipe = Recipe(crop_size=(512, 512), scale_range=(0.5, 2.0), batch_size=8, epochs=200, lr=0.02)
    splits = SPLITS
    layout = "images/, labels/ and classes.txt"
    options = ("reduce_zero_label", "ignore_label", "binary_masks", "label_suffix")

    _advice_on_ignored = "; a mask of 0 and 255 needs two names in classes.txt and `binary_masks=True`, or 0 and 1"
    _advice_on_greys = ", or give the classes those colours in classes.txt if the indices are right"

    def __init__(
        self,
        root: Path,
        split: str,
        *,
        reduce_zero_label: bool = False,
        ignore_label: int | None = None,
        binary_masks: bool = False,
        label_suffix: str | None = None,
    ) -> None:
        self._check_split(split)
        self.split = split
        if not os.path.isdir(root / "images"):
            raise UserError(f"{root / 'images'} does not exist: the data root must hold {self.layout}.")
        endings = tuple(f"{label_suffix or ''}{ending}" for ending in LABEL_ENDINGS)
        files, about = _find_split(root, split, endings)
        first = int(reduce_zero_label)
        names, colours = _read_classes(root, first, files)
        self._named = range(first, first + len(names))
        kept = [i for i, named in enumerate(self._named) if named != ignore_label]
        self.classes = tuple(names[i] for i in kept)
        if len(kept) < 2:
            raise UserError(f"`ignore_label={ignore_label}` leaves one of the two classes of classes.txt: add some.")
        known = {index: colours[i] for index, i in enumerate(kept) if i in colours}
        self.palette = palette_for(len(kept))
        self.palette[list(known)] = np.array(list(known.values()), np.uint8).reshape(-1, 3)

        label_ids = {self._named[i]: index for index, i in enumerate(kept)}
        ignored = {*range(first), *(() if ignore_label is None else (ignore_label,))}
        if binary_masks:
            _check_binary(self.classes, first, ignored)
            label_ids[255] = 1
        label_ids |= dict.fromkeys(ignored, IGNORE_INDEX)
        super().__init__(files, label_ids, known, [root / "images", root / "labels"])
        if binary_masks:
            self.ids[1] = 255
        else:
            ignored.add(255)
        self._check_labels(root, endings, decided=binary_masks or ignore_label is not None or reduce_zero_label)
        ids = " and ".join(map(str, sorted(ignored))) or "nothing"
        self.protocol = (
            f"{root} {split}: {counted(len(self), 'image')}{about}, {len(self.classes)} classes of classes.txt, {ids} "
            "ignored"
        )

    def _check_labels(self, root: Path, endings: tuple[str, ...], *, decided: bool) -> None:
        """Raises `UserError` if labels contradict one another, or hold 0 and 255 only and nobody has `decided` what 255
        is."""
        labels = [item.label for item in self.files if item.label is not None]
        codings = _codings(labels)
        check_same_depth(codings)
        check_same_palettes(codings | _codings(_labels_of_other_splits(root, self.split, endings)))
        if len(self.classes) == 2 and not decided and masks_of_255(labels):
            raise UserError(
                f"The labels of {root} {self.split} hold only 0 and 255, which may be {self.classes[1]!r} or ignored: "
                "pass `binary_masks=True` if 255 is that class, or `ignore_label=255` if it is ignored."
            )

    def _likely_cause(self, ids: set[int], wrong: set[int]) -> str:
        count, last = len(self._named), self._named[-1]
        if max(wrong) > IGNORE_INDEX:
            cause = f"ids end at {last} by classes.txt; a 16-bit picture may hold instance ids or depth"
        elif len(ids) > 64:
            return "so many values look like a grey picture or blurred colours, not class indices"
        elif count == 19 and max(ids - {IGNORE_INDEX}) <= 33:
            return "these look like Cityscapes label ids, not train ids 0 to 18; map them, or read them as cityscapes"
        else:
            cause = f"classes.txt names {count} classes, ids {self._named[0]} to {last}; it may lack a line"
            if wrong == {count} and not self._named[0]:
                cause += ", or the classes start at 1 and 0 is unlabelled (then pass `reduce_zero_label=True`)"
        if len(wrong) == 1 and 0 <= min(wrong) < 1 << 16:
            cause += f", or {min(wrong)} means ignored (then pass `ignore_label={min(wrong)}`)"
        return cause


def _find_split(root: Path, split: str, endings: tuple[str, ...]) -> tuple[list[Files], str]:
    """The split's files and a remark for the protocol line."""
    images = root / "images"
    if any(find_split_folder(images, name) for name in ("train", "val")):
        folder = find_split_folder(images, split)
        if folder is None:
            raise UserError(
                f"{images / split} does not exist: images/ has folders for other splits "
                f"({', '.join(names_of_split_folders(images))}), so make one for {split}, or give them other "
                "names if they are none."
            )
        labels = _labels_folder(root, folder, split)
        about = "" if folder.name == split else f" in {folder.name}/"
        if split == "test" and not os.path.isdir(labels):
            return [Files(key, path, None) for key, path in _find_images(folder).items()], f"{about} without labels"
        return _match(_find_images(folder), labels, endings), about
    if split == "test" or names_of_split_folders(images):
        others = ", ".join(names_of_split_folders(images))
        raise UserError(
            f"{images} has no folders train and val: make them{f', beside {others},' if others else ''} or put all "
            f"images into {images} itself, of which one in five is then held out as val."
        )
    found = _find_images(images)
    check_no_splits(root, list(found))
    files = _match(found, root / "labels", endings)
    held_out = _hold_out([item.key for item in files])
    if not held_out:
        raise UserError(f"{images} holds a single image: add more, so that one can be held out for validation.")
    chosen = [item for item in files if (item.key in held_out) == (split == "val")]
    return chosen, f" (no train/ and val/ in images/: {len(held_out)} of {len(files)} held out as val by name)"


def _labels_folder(root: Path, images: Path, split: str) -> Path:
    """Where the labels of a split are: in a folder of the images' name, or another one for that split."""
    same = root / "labels" / images.name
    return same if os.path.isdir(same) else find_split_folder(root / "labels", split) or same


def _labels_of_other_splits(root: Path, split: str, endings: tuple[str, ...]) -> list[Path]:
    folders = [find_split_folder(root / "labels", other) for other in SPLITS if other != split]
    return [path for folder in folders if folder is not None for path in find_files(folder, endings).values()]


def _codings(labels: Sequence[Path]) -> dict[Path, tuple[int, bytes | None]]:
    return {path: coding for path in labels if (coding := label_coding(path)) is not None}


def _find_images(folder: Path) -> dict[str, Path]:
    images = find_images(folder)
    if not images:
        raise UserError(f"{folder} holds no images ({' '.join(IMAGE_ENDINGS)}): put some there.")
    return images


def _match(images: dict[str, Path], labels: Path, endings: tuple[str, ...]) -> list[Files]:
    if not os.path.isdir(labels):
        raise UserError(f"{labels} does not exist: put one PNG with class indices there for each image, of its name.")
    return match_files(images, find_files(labels, endings), labels, endings[0], any_suffix=True)


def _hold_out(keys: list[str]) -> set[str]:
    """One key in five, at least one, none of a single one: those with the smallest hashes."""
    count = min(max(1, len(keys) // _HOLD_OUT_ONE_IN), len(keys) - 1)
    return set(sorted(keys, key=lambda key: hashlib.blake2b(os.fsencode(key)).digest())[:count])


def _read_classes(
    root: Path, first_id: int, files: Sequence[Files]
) -> tuple[tuple[str, ...], dict[int, tuple[int, ...]]]:
    path = root / "classes.txt"
    if not os.path.isfile(path):
        raise UserError(
            f"{path} is missing: write one class name per line, line 1 for id 0, line 2 for id 1 and so on"
            f"{_ids_in_use(files)}."
        )
    return read_classes(path, first_id)


def _ids_in_use(files: Sequence[Files], at_most: int = 50) -> str:
    labels = [item.label for item in files if item.label is not None][:at_most]
    ids = sorted(set().union(*(np.unique(read_label(path).ids).tolist() for path in labels)) - {IGNORE_INDEX})
    if not 0 < len(ids) <= MAX_CLASSES:
        return ""
    return f" (ids found in the first labels: {', '.join(map(str, ids[:20]))}{' …' if len(ids) > 20 else ''})"


def _check_binary(classes: Sequence[str], first_id: int, ignored: set[int]) -> None:
    if len(classes) != 2 or first_id or ignored & {0, 1, 255}:
        raise UserError(
            f"`binary_masks` reads labels of 0 and 255 (or 1) as two classes, but there are {len(classes)} with the "
            "other options: name two in classes.txt, without `reduce_zero_label` or an `ignore_label` of 0, 1 or 255."
        )
