"""Finds which folder holds which split, as other data sets name theirs: `Train`, `training`, `train2017`,
`train_images`, `TrainingSet`, …

Whoever has splits of their own must not find their val images in the training: names that look like splits and cannot
be followed are refused. One name alone may be that of a place or a thing, such as `my_test` or `trains`; names side by
side that mean different splits, such as `my_train` and `my_test`, are splits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError

SPLITS = ("train", "val", "test")

_UNCLEAR = "of no one meaning"
_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
    _UNCLEAR: ("trainval", "dev", "eval", "evaluation", "minival", "holdout"),
}
_SPLIT_OF_WORD = {word: split for split, words in _WORDS.items() for word in words}
_COMPOUND = re.compile(
    r"(train|training|val|valid|validation|test|testing)"
    r"(?:set|data|dataset|split|part|fold|folder|img|image|pic|picture|photo|frame|mask|label|annot)s?"
)
# The first mean a split beside another one; the second only where no other names stand beside them: tr is Turkish, too.
_IN_PAIRS = {"trn": "train", "trains": "train", "vld": "val", "vals": "val", "tst": "test", "tests": "test"}
_ABBREVIATIONS = {"tr": "train", "va": "val", "vl": "val", "te": "test", "ts": "test"}
_CAMEL_CASE = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_LISTS = (".txt", ".lst", ".csv", ".tsv", ".json", ".jsonl")
_FOLDERS_OF_LISTS = ("imagesets", "split", "splits")
_NO_LISTS = {"log", "logs", "results", "metrics", "scores", "notes", "readme", "requirements", "classes", "names"}


def find_split_folder(parent: Path, split: str) -> Path | None:
    """The folder in `parent` for a split: the one of that very name, or the only one whose name means it. Raises
    `UserError` if several do."""
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
    """Raises `UserError` if images that are to be split by us have splits already: by the names of folders, by their
    own names, or by lists beside them (as PASCAL VOC's ImageSets)."""
    _check_folders(root / "images", keys)
    _check_names(root / "images", keys)
    _check_lists(root, keys)


def _check_folders(images: Path, keys: list[str]) -> None:
    folders = sorted({folder for key in keys for folder in _folders_of(key)})
    for folder in folders:
        if _looks_like_a_split(folder.rpartition("/")[2]):
            raise UserError(
                f"{images / folder} looks like a split, but only folders in {images} itself are read as such: make "
                f"{images}/train and val of it, and the same in labels/, or give it another name."
            )
    for depth in sorted({folder.count("/") for folder in folders}):
        level = [folder for folder in folders if folder.count("/") == depth]
        if pair := _two_splits({folder: folder.rpartition("/")[2] for folder in level}):
            raise UserError(
                f"{images / pair[0]} and {images / pair[1]} look like splits, but such names are not followed: make "
                f"{images}/train and val of them, and the same in labels/, or give them other names."
            )


def _folders_of(key: str) -> list[str]:
    """`a` and `a/b` of `a/b/name`."""
    parts = key.split("/")
    return ["/".join(parts[:depth]) for depth in range(1, len(parts))]


def _check_names(images: Path, keys: list[str]) -> None:
    """Raises `UserError` if images begin with different splits, or most of them hold such words."""
    names = {key: key.rpartition("/")[2] for key in keys}
    pair = _two_of({key: _meaning(_words(name)[:1]) for key, name in names.items()})
    if not pair and 2 * sum(_meaning(_words(name)) is not None for name in names.values()) >= len(names):
        pair = _two_of({key: _meaning(_words(name)) for key, name in names.items()})
    if pair := pair or _two_abbreviations(names):
        raise UserError(
            f"The images in {images} have splits in their names, such as {pair[0]} and {pair[1]}: put them into "
            "images/train and images/val, and their labels likewise."
        )


def _check_lists(root: Path, keys: list[str]) -> None:
    """Raises `UserError` if a list in the data root or a folder there may say what is for training. A file in a folder
    that begins with an image's name is none: it may be that image's annotation."""
    images = set(keys)
    for path in sorted([*root.glob("*"), *root.glob("*/*")]):
        stem, ending = os.path.splitext(path.name)
        words = {*_words(stem)}
        if path.parent == root and path.name.lower() in _FOLDERS_OF_LISTS and os.path.isdir(path):
            listed = True
        else:
            listed = ending.lower() in _LISTS and not words & _NO_LISTS
            listed = listed and (path.parent == root or not _begins_with_one(stem, images))
            listed = listed and (_meaning(words) is not None or not words.isdisjoint(_FOLDERS_OF_LISTS))
        if listed and not any(part.startswith(".") for part in path.relative_to(root).parts):
            raise UserError(
                f"{path} says which images are for training, but such lists are not read: put the images into "
                "images/train and images/val, and their labels likewise, or remove it to have one in five held out."
            )


def _begins_with_one(stem: str, images: set[str]) -> bool:
    """Whether a name is that of an image, with more words behind or without."""
    return any(stem[:n] in images and not stem[n : n + 1].isalnum() for n in range(1, len(stem) + 1))


def _split_folders(parent: Path) -> dict[str, str]:
    """{name of a folder that looks like a split: the split it means}, sorted."""
    names = sorted(os.listdir(parent)) if os.path.isdir(parent) else []
    return {
        name: _meaning(_words(name)[:1]) or _UNCLEAR
        for name in names
        if _looks_like_a_split(name) and os.path.isdir(parent / name)
    }


def _looks_like_a_split(name: str) -> bool:
    return name[:1].isalpha() and _meaning(_words(name)[:1]) is not None


def _two_splits(names: dict[str, str]) -> tuple[str, str] | None:
    """Two keys whose names mean different splits beside each other."""
    return _two_of({key: _meaning(_words(name), _IN_PAIRS) for key, name in names.items()}) or _two_abbreviations(names)


def _two_abbreviations(names: dict[str, str]) -> tuple[str, str] | None:
    """Two keys whose names mean different splits by abbreviations: imagesTr and imagesTs, or Tr and Ts and no other."""
    known = _IN_PAIRS | _ABBREVIATIONS
    meanings = {key: _meaning(_words(name), known) for key, name in names.items()}
    if None not in meanings.values():
        return _two_of(meanings)
    alike: dict[tuple[str, ...], dict[str, str | None]] = {}
    for key, name in names.items():
        others = tuple(word for word in _words(name) if _meaning([word], known) is None)
        if others and meanings[key]:
            alike.setdefault(others, {})[key] = meanings[key]
    return next((pair for group in alike.values() if (pair := _two_of(group))), None)


def _two_of(meanings: dict[str, str | None]) -> tuple[str, str] | None:
    """The first two keys of different splits."""
    first: dict[str, str] = {}
    for key, meaning in meanings.items():
        if meaning is not None:
            first.setdefault(meaning, key)
    return tuple(first.values())[:2] if len(first) > 1 else None  # type: ignore[return-value]


def _meaning(words: Iterable[str], besides: dict[str, str] | None = None) -> str | None:
    """The split that the first such word means: val for ADE_val_00000001."""
    known = _SPLIT_OF_WORD | (besides or {})
    for word in words:
        if word in known:
            return known[word]
        if compound := _COMPOUND.fullmatch(word):
            return _SPLIT_OF_WORD[compound[1]]
    return None


def _words(name: str) -> list[str]:
    """The runs of letters in a name, in lower case, and CamelCase taken apart: `trainSet2017` gives train and set."""
    runs = re.findall(r"[^\W\d_]+", name)
    return [
        word.lower() for run in runs for word in ([run] if run.lower() in _SPLIT_OF_WORD else _CAMEL_CASE.split(run))
    ]
