"""This file says what every data set offers, and how ids in label files become classes and are checked.

A label is a (H, W) uint8 array with a class index 0..C-1 per pixel, or 255 where the pixel is ignored. Whatever is
wrong with a file becomes one `UserError` sentence that names it, here on the CPU: the same label would end as a
device-side assertion in the loss.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..files import real
from .listing import Files, and_more
from .pictures import read_image, read_label, turned_on_its_side

IGNORE_INDEX = 255

_UNKNOWN = 254  # The table gives this for ids that must not occur: hence there are at most 254 classes.


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How networks are trained on a data set where nothing else is asked for.

    Attributes:
        crop_size: (height, width) of the training crops, in pixels.
        scale_range: the lowest and the highest factor by which images are resized.
        batch_size: images per step. epochs: passes over the training split.
        lr: the highest learning rate, with that batch size.
    """

    crop_size: tuple[int, int]
    scale_range: tuple[float, float]
    batch_size: int
    epochs: int
    lr: float


@dataclass(frozen=True)
class Submission:
    """The files that a data set's official evaluator takes: a PNG of ids for each image, of the same name.

    Attributes:
        names: how images are named, in words, such as "<city>_<frame>".
        pattern: the same as a regular expression of the name without its ending.
        ids: (256,) uint8, the id of each class index.
    """

    names: str
    pattern: str
    ids: np.ndarray


class SegmentationDataset:
    """Images with a class per pixel. Derived classes set the attributes and give `__len__`, `stem`, `image`, `label`.

    What a class says of itself is all that the trainer and the commands know of a data set, by its name in `DATASETS`.

    Attributes of the class:
        name: that in `DATASETS`.
        recipe: how to train on it.
        splits: those that it has.
        layout: what its folder holds, in words; None where there is no folder.
        root_variable: the environment variable that says where the folder is if nobody else does.
        options: names of the arguments of its constructor beside root and split.
        submission: what its official evaluator takes; None where there is none.

    Attributes:
        split: one of `splits`.
        classes: the C class names, by class index.
        palette: (C, 3) uint8, the colour of each class in pictures.
        ids: (C,) uint8, the id of each class in the data set's own label files, in which predictions are written.
        protocol: one line for the log: how many images in which layout, which classes, what is ignored.
        has_labels: False for a test split without public labels; `label` then raises `UserError`.
    """

    name: ClassVar[str]
    recipe: ClassVar[Recipe]
    splits: ClassVar[tuple[str, ...]] = ("train", "val", "test")
    layout: ClassVar[str | None] = None
    root_variable: ClassVar[str | None] = None
    options: ClassVar[tuple[str, ...]] = ()
    submission: ClassVar[Submission | None] = None

    split: str
    classes: tuple[str, ...]
    palette: np.ndarray
    ids: np.ndarray
    protocol: str
    has_labels: bool = True

    @classmethod
    def from_root(cls, root: str | Path | None, split: str, **options: Any) -> SegmentationDataset:
        """Finds the files of a split and matches images with labels; `check` decodes them too.

        root: the data set's folder; None where there is none, or an environment variable names it. options: values for
        some of `options`; None and False stand for arguments that are not given.

        Raises `UserError` where root, folders, images or labels are missing, or an option is none of this data set's.
        """
        if cls.layout is None and root is not None:
            raise UserError(f"{cls.name} has no folder and takes no `root`: choose the data set of that folder.")
        given = {option: value for option, value in options.items() if value is not None and value is not False}
        if other := [option for option in given if option not in cls.options]:
            known = f"its options are {', '.join(cls.options)}" if cls.options else "it knows its labels' ids and names"
            raise UserError(f"{cls.name} takes no `{other[0]}`: {known}.")
        make: Any = cls  # Constructors take a root, or none.
        return make(split, **given) if cls.layout is None else make(cls._find_root(root), split, **given)

    @classmethod
    def _find_root(cls, root: str | Path | None) -> Path:
        """The data set's folder, which exists. Raises `UserError` if none is given, or it is no folder."""
        if root is None and cls.root_variable is not None:
            root = os.environ.get(cls.root_variable) or None
        if root is None:
            hint = f" (or set {cls.root_variable})" if cls.root_variable is not None else ""
            raise UserError(f"{cls.name} needs the folder of the data: pass `root=DIR`{hint}.")
        root = Path(root).expanduser()
        if not os.path.isdir(root):
            what = "is not a folder" if os.path.exists(root) else "does not exist"
            raise UserError(f"The data root {root} {what}: check the path.")
        return root

    @classmethod
    def _check_split(cls, split: str) -> None:
        if split not in cls.splits:
            raise UserError(f"{cls.name} has no split {split!r}: choose one of {', '.join(cls.splits)}.")

    @property
    def folders(self) -> Iterable[Path]:
        """The folders that hold images and labels, where nothing of ours is to be written."""
        return ()

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
        """Image and label, see `image` and `label`. Raises `UserError` if they differ in size."""
        image, label = self.image(index), self.label(index)
        if image.shape[:2] != label.shape:
            (h, w), (label_h, label_w) = image.shape[:2], label.shape
            raise UserError(
                f"{self.source(index)} is {w}×{h} pixels, but its label is {label_w}×{label_h}: "
                f"{self._size_advice(index)}."
            )
        return image, label

    def _size_advice(self, index: int) -> str:
        """The advice for an image and a label of different sizes."""
        return "save both at the same size (labels resized with nearest-neighbour sampling)"

    def source(self, index: int) -> str:
        """Where image `index` comes from, for messages."""
        return self.stem(index)

    def check(self) -> np.ndarray:
        """Decodes every image and label, in threads. Raises `UserError` with the first problem, and says how many more
        files have one.

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
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest.
        problems = [result for result in results if isinstance(result, str)]
        if problems:
            others = and_more(len(problems) - 1, "file with a problem", "files with problems")
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
            hint = self._advice_on_ignored
        use = "learn" if self.split == "train" else "score"
        raise UserError(
            f"The labels of {self.name} {self.split} hold {what}, so there is nothing to {use}: paint objects with "
            f"their class index{hint}."
        )

    _advice_on_ignored = ""
    """More advice where so much is ignored that too few classes are left; it begins with a semicolon."""


class FileDataset(SegmentationDataset):
    """A data set of picture files; `label_ids` maps the ids in label files, 0..65535, to class indices or 255.

    255 in a file means ignored unless `label_ids` says otherwise; any other id that is not in `label_ids` is an error.
    colours: those of the classes that are known to have one, for labels with a palette to be compared with.
    folders: the folders of the layout, those of all splits. A constructor sets `split`, and what differs between
    objects of `classes` and `palette`, before it calls this one, and `protocol` after it, when the length is known.
    """

    def __init__(
        self,
        files: Sequence[Files],
        label_ids: Mapping[int, int],
        colours: Mapping[int, tuple[int, ...]],
        folders: Sequence[Path],
    ) -> None:
        self.files = tuple(files)
        self._folders = tuple(folders)
        self.has_labels = all(item.label is not None for item in self.files)
        self._table = np.full(1 << 16, _UNKNOWN, np.uint8)
        self._table[IGNORE_INDEX] = IGNORE_INDEX
        self._table[list(label_ids)] = list(label_ids.values())
        self.ids = np.array([np.argmax(self._table == index) for index in range(len(self.classes))], np.uint8)
        self._classes_of_colour: dict[tuple[int, ...], set[int]] = {}
        for index, colour in colours.items():
            self._classes_of_colour.setdefault(colour, set()).add(index)
        owners: dict[str, Path] = {}
        for index, item in enumerate(self.files):
            other = owners.setdefault(self.stem(index), item.image)
            if other != item.image:
                raise UserError(
                    f"{other} and {item.image} would share the name {self.stem(index)!r}: rename one (and its label)."
                )

    @property
    def folders(self) -> Iterable[Path]:
        """The folders of the layout, and those to which links lead from there."""
        files = (path for item in self.files for path in (item.image, item.label) if path is not None)
        return (*self._folders, *{real(path).parent for path in files})

    def __len__(self) -> int:
        return len(self.files)

    def stem(self, index: int) -> str:
        """The image's place below its folder, in one word."""
        return self.files[index].key.replace("/", "__")

    def source(self, index: int) -> str:
        """The image's file."""
        return str(self.files[index].image)

    def image(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8, RGB. Raises `FileError` if the file cannot be read."""
        return read_image(self.files[index].image)

    def label(self, index: int) -> np.ndarray:
        """(H, W) uint8: class indices, or 255. Raises `UserError` for a file that cannot be read or holds other ids."""
        path = self.files[index].label
        if path is None:
            raise UserError(f"{self.name} {self.split} has no labels: {self.files[index].image} can only be predicted.")
        read = read_label(path)
        ids = read.ids
        if ids.dtype.kind != "u":
            if ids.min() < 0 or ids.max() >= len(self._table):
                raise self._unexpected_ids(path, ids)
            ids = ids.astype(np.uint16)
        label = self._table.take(ids)
        if (label == _UNKNOWN).any():
            raise self._unexpected_ids(path, ids)
        if read.palette is not None:
            self._check_palette(path, ids, read.palette)
        return label

    def _check_palette(self, path: Path, ids: np.ndarray, palette: np.ndarray) -> None:
        """Raises `UserError` if a palette says that an index in use is another class, or another id, than the index
        itself.

        Colours say so that belong to other classes, and greys that differ from their indices: PNG optimisers turn the
        grey values in use into a palette. A mask of two classes in black and white is what it seems to be. An index
        that the palette does not have cannot be compared: the file is damaged.
        """
        if (last := int(ids.max())) >= len(palette):
            raise UserError(
                f"{path} uses the index {last}, but its palette ends at {len(palette) - 1}: save it again with a "
                "colour for each index, or the ids as an 8-bit grey PNG."
            )
        colours = [tuple(colour) for colour in palette.tolist()]
        greys = bool((palette == palette[:, :1]).all()) and not (
            len(self.classes) == 2 and colours[:2] == [(0, 0, 0), (255, 255, 255)]
        )
        doubts: dict[int, str] = {}
        for index, colour in enumerate(colours):
            seen, owners = int(self._table[index]), self._classes_of_colour.get(colour, set())
            if seen < len(self.classes) and owners and seen not in owners:
                doubts[index] = (
                    f"that of {self.classes[min(owners)]!r}, not of {self.classes[seen]!r}: save it with the indices "
                    "of the classes that it shows"
                )
            elif greys and not owners and colour[0] != index:
                doubts[index] = "a grey, so its ids may be the indices or the greys: save the ids as an 8-bit grey PNG"
                doubts[index] += self._advice_on_greys
        if doubts:
            used = np.flatnonzero(np.bincount(ids.ravel())).tolist()
            for index in filter(doubts.__contains__, used):
                shown = " ".join(map(str, colours[index]))
                raise UserError(f"{path} shows its index {index} in the colour {shown}, {doubts[index]}.")

    _advice_on_greys = ""
    """More advice where a palette holds greys; it begins with a comma."""

    def _size_advice(self, index: int) -> str:
        item = self.files[index]
        if item.label is not None:
            turned, other = item.image, item.label
            if turned_on_its_side(other):
                turned, other = other, turned
            if turned_on_its_side(turned) != turned_on_its_side(other):
                return (
                    f"the EXIF orientation of {turned.name} turns it by 90 degrees, and {other.name} has none: save "
                    "both upright, without an orientation"
                )
        return super()._size_advice(index)

    def _unexpected_ids(self, path: Path, ids: np.ndarray) -> UserError:
        values, counts = np.unique(ids, return_counts=True)
        pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
        wrong = [v for v in pixels if not 0 <= v < len(self._table) or self._table[v] == _UNKNOWN]
        shown = ", ".join(f"{v} ({pixels[v]} px)" for v in wrong[:4]) + (" …" if len(wrong) > 4 else "")
        return UserError(f"{path} holds unexpected ids: {shown}: {self._likely_cause(set(pixels), set(wrong))}.")

    def _likely_cause(self, ids: set[int], wrong: set[int]) -> str:
        """The likely reason why a label file holds these ids, of which `wrong` must not occur."""
        known = np.flatnonzero(self._table != _UNKNOWN).tolist()
        return f"labels of {self.name} hold the ids {', '.join(map(str, known))}"
