"""Which folder holds which split, as other data sets name theirs: `Train`, `training`, `train2017`, `train_images`, …

Whoever has splits of their own must not find their val images in the training: names that look like splits and cannot
be followed are refused.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import UserError

SPLITS = ("train", "val", "test")

_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
    None: ("trainval", "dev", "eval", "evaluation", "minival", "holdout"),  # of no one meaning
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_LISTS = (".txt", ".lst", ".csv", ".json")


def find_split_folder(parent: Path, split: str) -> Path | None:
    """The folder in `parent` for a split: the one of that very name, or the only one whose name means it. `UserError`
    if several do."""
    if os.path.isdir(parent / split):
        return parent / split
    found = [name for name, meaning in _split_folders(parent).items() if meaning == split]
    if len(found) > 1:
        raise UserError(
            f"{parent} has several folders for the split {split}, {' and '.join(found)}: call the one to use {split}."
        )
    return parent / found[0] if found else None


def names_of_split_folders(parent: Path) -> list[str]:
    """The folders in `parent` whose names look like splits, ours or not."""
    return list(_split_folders(parent))


def check_no_splits(root: Path, keys: list[str]) -> None:
    """`UserError` if images that are to be split by us have splits already: by the names of folders further down, by
    their own names, or by lists beside them (as PASCAL VOC's ImageSets)."""
    for key in keys:
        *folders, _ = key.split("/")
        for depth, name in enumerate(folders, 1):
            if _looks_like_a_split(name):
                raise UserError(
                    f"{root / 'images' / '/'.join(folders[:depth])} looks like a split, but only folders in "
                    f"{root / 'images'} itself are read as such: make {root / 'images'}/train and val of it, and the "
                    "same in labels/, or give it another name."
                )
    meanings = [_split_in_name(key.rpartition("/")[2]) for key in keys]
    if all(meanings) and len(set(meanings)) > 1:
        other = keys[[meaning != meanings[0] for meaning in meanings].index(True)]
        raise UserError(
            f"The images in {root / 'images'} have splits in their names, such as {keys[0]} and {other}: put them into "
            "images/train and images/val, and their labels likewise."
        )
    for name in sorted(os.listdir(root)):
        stem, ending = os.path.splitext(name.lower())
        if name == "ImageSets" or (stem in _SPLIT_OF_WORD and ending in _LISTS):
            raise UserError(
                f"{root / name} says which images are for training, but such lists are not read: put the images into "
                "images/train and images/val, and their labels likewise, or remove it to have one in five held out."
            )


def _split_folders(parent: Path) -> dict[str, str | None]:
    """{name of a folder that looks like a split: the split it means}, sorted."""
    names = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
    return {
        name: _SPLIT_OF_WORD[_words(name)[0]]
        for name in names
        if _looks_like_a_split(name) and os.path.isdir(parent / name)
    }


def _looks_like_a_split(name: str) -> bool:
    return bool(name[:1].isalpha() and _words(name) and _words(name)[0] in _SPLIT_OF_WORD)


def _split_in_name(name: str) -> str | None:
    """The split that a word in a file's name means: val for ADE_val_00000001."""
    return next((split for word in _words(name) if (split := _SPLIT_OF_WORD.get(word))), None)


def _words(name: str) -> list[str]:
    """The runs of letters in a name: `train_images2017` gives train and images."""
    return re.findall(r"[a-z]+", name.lower())
