"""What every data set offers, and how pictures and labels are read from files and checked.

A label is a (H, W) uint8 array with a class index 0..C-1 per pixel, or 255 where the pixel is ignored. Whatever is
wrong with a file becomes one `UserError` sentence that names it, here on the CPU: the same label would end as a
device-side assertion in the loss.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from ..errors import UserError, warn

IGNORE_INDEX = 255
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
LABEL_ENDINGS = (".png",)

_UNKNOWN = 254  # what the table gives for ids that must not occur: hence at most 254 classes


class SegmentationDataset:
    """Images with a class per pixel. Derived classes set the attributes and give `__len__`, `stem`, `image`, `label`.

    Attributes:
        name: as given to `--dataset`.
        split: "train", "val" or "test".
        classes: the C class names, by class index.
        palette: (C, 3) uint8, the colour of each class in pictures.
        protocol: one line for the log: how many images in which layout, which classes, what is ignored.
        has_labels: False for a test split without public labels; `label` then raises `UserError`.
        folders: those that hold its images and labels, where nothing of ours is to be written.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    palette: np.ndarray
    protocol: str
    has_labels: bool = True
    folders: tuple[Path, ...] = ()

    def __len__(self) -> int:
        raise NotImplementedError

    def stem(self, index: int) -> str:
        """A name for output files, unique in the split, without folder and extension."""
        raise NotImplementedError

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, RGB."""
        raise NotImplementedError

    def label(self, index: int) -> np.ndarray:
        """(H, W) uint8: class indices 0..C-1, or 255 where the pixel is ignored."""
        raise NotImplementedError

    def pair(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image and label of the same size, else `UserError`."""
        image, label = self.image(index), self.label(index)
        if image.shape[:2] != label.shape:
            (h, w), (label_h, label_w) = image.shape[:2], label.shape
            raise UserError(
                f"{self.source(index)} is {w}×{h} pixels, but its label is {label_w}×{label_h}: "
                "save both at the same size (labels resized with nearest-neighbour sampling)."
            )
        return image, label

    def source(self, index: int) -> str:
        """Where image `index` comes from, for messages."""
        return self.stem(index)

    def check(self) -> np.ndarray:
        """Decodes every image and label, in threads. `UserError`: the first problem, and how many more files have one.

        Training labels that hold a single class in the whole split are a problem too: nothing can be learnt from them,
        and the usual reason (a mask painted with 255, which is ignored) would otherwise show as a perfect score.
        Returns how many pixels have each value 0..255: classes, and 255 where ignored.
        """

        def examine(index: int) -> str | np.ndarray:
            try:
                if not self.has_labels:
                    self.image(index)
                    return np.zeros(256, np.int64)
                return np.bincount(self.pair(index)[1].ravel(), minlength=256)
            except UserError as error:
                return str(error)

        pool = ThreadPoolExecutor()
        try:
            found = pool.map(examine, range(len(self)))
            bar = tqdm(found, f"checking {self.name} {self.split}", len(self), unit=" images", disable=None)
            results = list(bar)
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
        problems = [result for result in results if isinstance(result, str)]
        if problems:
            others = _and_more(len(problems) - 1, "file with a problem", "files with problems")
            raise UserError(f"{problems[0].removesuffix('.')}{others}.")
        pixels = np.sum(results, axis=0)
        if self.has_labels:
            self._check_variety(pixels)
        return pixels

    def _check_variety(self, pixels: np.ndarray) -> None:
        present = np.flatnonzero(pixels[:IGNORE_INDEX])
        if len(present) >= (2 if self.split == "train" else 1):
            return
        what = f"only the class {self.classes[present[0]]!r}" if len(present) else "no class at all"
        ignored, hint = 100 * pixels[IGNORE_INDEX] / max(1, pixels.sum()), ""
        if ignored > 0:
            what += f" ({ignored:.0f} % of the pixels are 255 = ignored)"
            hint = "; a mask of 0 and 255 needs 0 and 1"
        use = "learn" if self.split == "train" else "score"
        raise UserError(
            f"The labels of {self.name} {self.split} hold {what}, so there is nothing to {use}: paint objects with "
            f"their class index{hint}."
        )


@dataclass(frozen=True)
class Files:
    """One example on disk. `key` is its path below the split's folder, without extension, with forward slashes."""

    key: str
    image: Path
    label: Path | None


class FileDataset(SegmentationDataset):
    """A data set of picture files; `label_ids` maps the ids in label files to class indices or 255.

    255 in a file always means ignored; any other id that is not in `label_ids` is an error.
    """

    def __init__(self, files: Sequence[Files], label_ids: Mapping[int, int]) -> None:
        self.files = tuple(files)
        self.has_labels = all(item.label is not None for item in self.files)
        self._table = np.full(256, _UNKNOWN, np.uint8)
        self._table[list(label_ids)] = list(label_ids.values())
        self._table[IGNORE_INDEX] = IGNORE_INDEX
        owners: dict[str, Path] = {}
        for index, item in enumerate(self.files):
            other = owners.setdefault(self.stem(index), item.image)
            if other != item.image:
                raise UserError(
                    f"{other} and {item.image} would share the name {self.stem(index)!r}: rename one (and its label)."
                )

    def __len__(self) -> int:
        return len(self.files)

    def stem(self, index: int) -> str:
        return self.files[index].key.replace("/", "__")

    def source(self, index: int) -> str:
        return str(self.files[index].image)

    def image(self, index: int) -> np.ndarray:
        return read_image(self.files[index].image)

    def label(self, index: int) -> np.ndarray:
        path = self.files[index].label
        if path is None:
            raise UserError(f"{self.name} {self.split} has no labels: {self.files[index].image} can only be predicted.")
        ids = read_label_ids(path)
        if ids.dtype != np.uint8 and ids.min() >= 0 and ids.max() <= 255:
            ids = ids.astype(np.uint8)
        if ids.dtype != np.uint8:
            raise self._unexpected_ids(path, ids)
        label = self._table.take(ids)
        if (label == _UNKNOWN).any():
            raise self._unexpected_ids(path, ids)
        return label

    def _unexpected_ids(self, path: Path, ids: np.ndarray) -> UserError:
        values, counts = np.unique(ids, return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        wrong = [v for v in pixels if not 0 <= v <= 255 or self._table[v] == _UNKNOWN]
        shown = ", ".join(f"{v} ({pixels[v]} px)" for v in wrong[:4]) + (" …" if len(wrong) > 4 else "")
        return UserError(f"{path} holds unexpected ids: {shown}: {self._likely_cause(set(pixels), set(wrong))}.")

    def _likely_cause(self, ids: set[int], wrong: set[int]) -> str:
        """What to tell about a label file with these ids, of which `wrong` must not occur."""
        raise NotImplementedError


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, RGB, upright as its EXIF orientation says, which is how viewers and annotation tools show it.

    `UserError` if the file cannot be decoded, or has more than 8 bits per channel.
    """
    picture = _decode(path)
    if picture.mode.startswith(("I", "F")):
        raise UserError(f"{path} has more than 8 bits per channel (mode {picture.mode}): convert it to 8 bits.")
    with contextlib.suppress(Exception):  # Pillow raises many types where EXIF is damaged: it is read as it lies then
        picture = ImageOps.exif_transpose(picture)
    return np.array(picture.convert("RGB"))


def read_label_ids(path: Path) -> np.ndarray:
    """(H, W) of the ids in a single-channel picture: uint8, or a wider integer type for 16-bit files.

    Palette pictures (mode P) hold ids already: their colours are ignored. `UserError` if the file cannot be decoded or
    has several channels.
    """
    picture = _decode(path)
    if picture.mode == "1":
        return np.array(picture).astype(np.uint8)
    if picture.mode not in ("L", "P") and not picture.mode.startswith("I"):
        raise UserError(
            f"{path} is a colour picture (mode {picture.mode}), but a label needs one channel with the class index of "
            "each pixel: convert its colours to indices and save it as an 8-bit grey or palette PNG."
        )
    return np.array(picture)


def _decode(path: Path) -> Image.Image:
    try:
        picture = Image.open(path)
        picture.load()
    except Exception as error:  # Pillow's decoders raise many types: OSError, SyntaxError, ValueError, struct.error …
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({str(error).rstrip('.')})"
        raise UserError(f"{path} cannot be read as a picture{reason}: replace the file.") from error
    return picture


def find_files(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """All files below `folder` (links followed, hidden ones left out) whose names end so, upper case or lower. What is
    called so and is no ordinary file is passed over with a word: to open a FIFO waits for ever.

    Returns {path below `folder` without the ending, with forward slashes: path}, sorted. `UserError` if two files share
    a key (a.jpg beside a.png), or a folder cannot be read.
    """
    found: dict[str, Path] = {}
    visited: set[str] = set()
    passed_over: list[Path] = []
    for parent, subfolders, names in os.walk(folder, followlinks=True, onerror=_cannot_be_read):
        if os.path.realpath(parent) in visited:  # by a link that points upwards
            subfolders.clear()
            continue
        visited.add(os.path.realpath(parent))
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in sorted(names):
            ending = next((e for e in endings if name.lower().endswith(e.lower())), None)
            if ending is None or name.startswith("."):
                continue
            path = Path(parent, name)
            if os.path.exists(path) and not os.path.isfile(path):
                passed_over.append(path)
                continue
            key = path.relative_to(folder).as_posix()[: -len(ending)]
            if key in found:
                raise UserError(f"{found[key]} and {path} differ only in their extension: remove one of them.")
            found[key] = path
    if passed_over:
        more = _and_more(len(passed_over) - 1, "path", "paths")
        warn(f"{passed_over[0]}{more} is no ordinary file, and passed over.")
    return dict(sorted(found.items()))


def _cannot_be_read(error: OSError) -> None:
    raise UserError(
        f"The folder {error.filename} cannot be read ({error.strerror}), so files would be missing: check its "
        "permissions."
    ) from error


def match_files(images: dict[str, Path], labels: dict[str, Path], label_of: str) -> list[Files]:
    """Pairs images with labels of the same key. `UserError`: the first image without label, or label without image.

    `label_of`: the label's path with {key} in place of the key, for the message.
    """
    missing = [key for key in images if key not in labels]
    if missing:
        raise UserError(
            f"{images[missing[0]]}{_and_more(len(missing) - 1, 'image', 'images')} has no label: "
            f"{label_of.format(key=missing[0])} is missing."
        )
    orphans = [key for key in labels if key not in images]
    if orphans:
        raise UserError(
            f"{labels[orphans[0]]}{_and_more(len(orphans) - 1, 'label', 'labels')} has no image: "
            "add the image or remove the label."
        )
    return [Files(key, path, labels[key]) for key, path in images.items()]


def _and_more(count: int, one: str, many: str) -> str:
    return f" (and {count} more {one if count == 1 else many})" if count else ""
