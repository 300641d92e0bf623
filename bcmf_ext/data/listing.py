"""Finds which files there are, and which label belongs to which image, on the file systems of three operating
systems."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError, warn
from .pictures import IMAGE_ENDINGS, LABEL_ENDINGS


@dataclass(frozen=True)
class Files:
    """One example on disk. `key` is its path below the split's folder, without extension, with forward slashes."""

    key: str
    image: Path
    label: Path | None


def find_files(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """All files below `folder` (links followed, hidden ones left out) whose names end so, upper case or lower. What is
    called so and is no ordinary file is passed over with a word: to open a FIFO waits for ever.

    Returns {path below `folder` without the ending, with forward slashes: path}, sorted. Raises `UserError` if two
    files share a key (a.jpg beside a.png), or a folder cannot be read.
    """
    return _by_key(folder, _walk(folder), endings)


def find_images(folder: Path) -> dict[str, Path]:
    """`find_files` for images. Says how many files have other endings, since photos may be among them."""
    paths = list(_walk(folder))
    others = Counter(
        path.suffix.lower() or "without ending" for path in paths if not path.name.lower().endswith(IMAGE_ENDINGS)
    )
    if count := sum(others.values()):
        kinds = ", ".join(f"{number} {ending}" for ending, number in others.most_common(5))
        warn(
            f"{count} file{'s are' if count > 1 else ' is'} passed over in {folder} ({kinds}): images end in "
            f"{' '.join(IMAGE_ENDINGS)}."
        )
    return _by_key(folder, paths, IMAGE_ENDINGS)


def _by_key(folder: Path, paths: Iterable[Path], endings: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    passed_over: list[Path] = []
    for path in paths:
        ending = next((e for e in endings if path.name.lower().endswith(e.lower())), None)
        if ending is None:
            continue
        if os.path.exists(path) and not os.path.isfile(path):
            passed_over.append(path)
            continue
        key = path.relative_to(folder).as_posix()[: -len(ending)]
        if key in found:
            raise UserError(f"{found[key]} and {path} differ only in their extension: remove one of them.")
        found[key] = path
    if passed_over:
        others = and_more(len(passed_over) - 1, "path", "paths")
        warn(f"{passed_over[0]}{others} is no ordinary file, and passed over.")
    return dict(sorted(found.items()))


def _walk(folder: Path) -> Iterator[Path]:
    """Every file below a folder, sorted in each, links followed, without what is hidden."""
    visited: set[str] = set()
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=_cannot_be_read):
        if os.path.realpath(parent) in visited:  # A link that points upwards leads here again.
            subfolders.clear()
            continue
        visited.add(os.path.realpath(parent))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(parent, name) for name in sorted(names) if not name.startswith("."))


def _cannot_be_read(error: OSError) -> None:
    raise UserError(
        f"The folder {error.filename} cannot be read ({error.strerror}), so files would be missing: check its "
        "permissions."
    ) from error


def match_files(
    images: dict[str, Path], labels: dict[str, Path], folder: Path, ending: str = ".png", *, any_suffix: bool = False
) -> list[Files]:
    """Pairs images with labels of the same key; of those left over, also those whose keys differ in nothing but upper
    case or the Unicode form (é as one character or two), as copies from another system may.

    Raises `UserError` with the first image without label, and what lies in the labels' folder instead, or with the
    first label without image. folder, ending: a label's path is {folder}/{key}{ending}. any_suffix: whether
    `label_suffix` can change that.
    """
    labels = labels | _other_spellings(images, labels)
    missing = [key for key in images if key not in labels]
    if missing:
        used = {labels[key] for key in images if key in labels}
        instead = _what_lies_there(folder, missing[0], used, any_suffix)
        raise UserError(
            f"{images[missing[0]]}{and_more(len(missing) - 1, 'image', 'images')} has no label: "
            f"{folder}/{missing[0]}{ending} is missing{instead}."
        )
    used = {labels[key] for key in images}
    orphans = [path for path in labels.values() if path not in used]
    if orphans:
        raise UserError(
            f"{orphans[0]}{and_more(len(orphans) - 1, 'label', 'labels')} has no image: "
            "add the image or remove the label."
        )
    return [Files(key, path, labels[key]) for key, path in images.items()]


def _other_spellings(images: dict[str, Path], labels: dict[str, Path]) -> dict[str, Path]:
    """{key of an image: label} for those that are left over on both sides, where only one can be meant."""
    wanted, offered = (
        [key for key in ours if key not in theirs] for ours, theirs in ((images, labels), (labels, images))
    )
    forms = Counter(map(_plain, wanted)), Counter(map(_plain, offered))
    of_form = {_plain(key): labels[key] for key in offered}
    return {key: of_form[form] for key in wanted if forms[0][form := _plain(key)] == forms[1][form] == 1}


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _what_lies_there(folder: Path, key: str, used: set[Path], any_suffix: bool) -> str:
    """A remark on the file that was probably meant to be the label: one whose name begins so, or any other."""
    stem = _plain(key.rpartition("/")[2])
    others = [path for path in _walk(folder) if path not in used]
    alike = [path for path in others if re.match(rf"{re.escape(stem)}(?!\d)", _plain(path.name))]
    if not alike:
        return f" ({folder} holds {others[0].relative_to(folder)})" if others else ""
    nearest = min(alike, key=lambda path: (path.suffix.lower() not in LABEL_ENDINGS, len(path.name)))
    if nearest.suffix.lower() not in LABEL_ENDINGS:
        return f" ({nearest} lies there, but labels are files that keep every id: {' '.join(LABEL_ENDINGS)})"
    suffix = _plain(nearest.stem)[len(stem) :]
    if any_suffix and suffix:
        suffix = nearest.stem[-len(suffix) :]
        return f" ({nearest} lies there: `label_suffix={suffix!r}` takes labels of such names)"
    return f" ({nearest} lies there)"


def and_more(count: int, one: str, many: str) -> str:
    """How many others there are, in brackets; nothing where there are none."""
    return f" (and {count} more {one if count == 1 else many})" if count else ""
