"""Reads pictures from files: images as viewers show them, and labels as the ids that a file holds.

What is decoded is decided by the file itself, not by its name, and not by the mode that Pillow chooses: it scales grey
pictures of 2 and 4 bits to 0..255, and cuts colours of 16 bits to 8.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image

from ..errors import Damaged, FileError
from ..files import cannot_be_opened

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff", ".webp")
LABEL_ENDINGS = (".png", ".bmp", ".tif", ".tiff")

_LABEL_FORMATS = ("PNG", "BMP", "TIFF")
_LOSSLESS_TIFF = (
    *("raw", "packbits", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "lzma", "zstd"),
    *("tiff_ccitt", "group3", "group4"),
)
_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # These are tags of TIFF.
_WHITE_IS_ZERO, _SIGNED = 0, 2
_BITS_OF_GREYS = {"1": 1, "L": 8}  # The keys are Pillow's modes.

_TURNS = {  # EXIF's orientations ask for these turns, as in ImageOps.exif_transpose.
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_QUARTER_TURNS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Label:
    """The content of a label file.

    Attributes:
        ids: (H, W) integers, upright: its samples, or the indices of a palette picture.
        palette: (n, 3) uint8, the colour of each index; None in grey pictures.
    """

    ids: np.ndarray
    palette: np.ndarray | None


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3) uint8, RGB, upright as its EXIF orientation says, which is how viewers and annotation tools show it.

    Raises `FileError` if the file cannot be decoded, or has more than 8 bits per channel.
    """
    picture, bits = _decode(path)
    if bits > 8:
        raise FileError(f"{path} has more than 8 bits per channel (mode {picture.mode}): convert it to 8 bits.")
    picture.info.pop("transparency", None)  # Pillow would warn about a palette's; opacity is not read.
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def rgb_of(picture: Image.Image) -> np.ndarray:
    """A PIL picture in memory as `read_image` gives that of a file: (H, W, 3) uint8, RGB, upright. Raises ValueError if
    it has more than 8 bits per channel."""
    if picture.mode.startswith(("I", "F")):
        raise ValueError(f"The picture has more than 8 bits per channel (mode {picture.mode}): convert it to 8 bits.")
    orientation = _orientation(picture)
    picture = picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def read_label(path: Path) -> Label:
    """The ids of a single-channel PNG, BMP or TIFF of one page, exactly as they are stored.

    A palette picture holds ids already; what its colours say is for the caller to compare. Raises `FileError` if the
    file cannot be decoded, fails its checksums, has several channels or pages, or was compressed with loss.
    """
    picture, bits = _decode(path, label=True)
    if picture.mode == "P":
        return Label(np.asarray(picture), np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3))
    ids = np.asarray(picture)
    if picture.mode == "1":
        ids = ids.astype(np.uint8)
    elif picture.mode == "L" and bits < 8:
        ids = ids // np.uint8(255 // (2**bits - 1))
    elif picture.mode == "L" and _tag(picture, _SAMPLE_FORMAT) == _SIGNED:
        ids = ids.view(np.int8)
    return Label(ids, None)


def label_coding(path: Path) -> tuple[int, bytes | None] | None:
    """How a label is stored, from its header: bits per sample, and the RGB values of a palette, or None.

    It is None where the file cannot be read, which decoding it will tell.
    """
    with contextlib.suppress(Exception), open(path, "rb") as file:
        picture = Image.open(file)
        bits = _bits_per_sample(picture, file)
        if picture.mode != "P" or picture.palette is None:
            return bits, None
        order, values = picture.palette.getdata()
        # getpalette decodes the picture.
        return bits, bytes(values if order == "RGB" else picture.getpalette("RGB") or ())
    return None


def turned_on_its_side(path: Path) -> bool:
    """Whether EXIF's orientation turns a picture by 90 degrees, one way or the other."""
    with contextlib.suppress(Exception), Image.open(path) as picture:
        return _orientation(picture) in _QUARTER_TURNS
    return False


def _decode(path: Path, *, label: bool = False) -> tuple[Image.Image, int]:
    """The picture, upright, and its bits per sample. label: whether to raise `FileError` if it holds anything but the
    ids of one picture."""
    try:
        opened = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise cannot_be_opened(path, error) from error
    try:
        with opened as file:
            picture = Image.open(file)
            bits = _bits_per_sample(picture, file)
            if picture.format == "BMP" and picture.mode in ("1", "L") and bits != _BITS_OF_GREYS[picture.mode]:
                raise FileError(
                    f"{path} is a BMP of {bits} bits with a palette of greys, which Pillow misreads: save it as PNG."
                )
            if label:
                _check_is_label(path, picture)
                if picture.format == "PNG":
                    picture.verify()  # Pillow does not look at the checksums when it decodes.
                    file.seek(0)
                    picture = Image.open(file)
            picture.load()
            orientation = _orientation(picture)  # It is 1 for a TIFF: Pillow has turned that.
            return picture.transpose(_TURNS[orientation]) if orientation in _TURNS else picture, bits
    except FileError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        pixels = str(error).partition("(")[2].partition(" ")[0]
        raise FileError(
            f"{path} has {pixels} pixels, more than Pillow reads: cut it into parts, or make it smaller (in a program "
            "of your own, PIL.Image.MAX_IMAGE_PIXELS is the limit)."
        ) from error
    except Exception as error:  # Pillow's decoders raise many types: OSError, SyntaxError, ValueError, struct.error …
        reason = "" if isinstance(error, Image.UnidentifiedImageError) else f" ({str(error).rstrip('.')})"
        raise Damaged(f"{path} cannot be read as a picture{reason}: replace the file.") from error


def _bits_per_sample(picture: Image.Image, file: IO[bytes]) -> int:
    """The bits per sample that the header says."""
    if picture.format == "PNG":
        return _byte(file, 24)  # IHDR has it behind the signature, its length and name, width and height.
    if picture.format == "BMP" and picture.mode in ("1", "L", "P"):
        return _byte(file, 24 if _byte(file, 14) == 12 else 28)  # The oldest of BMP's headers has 12 bytes.
    if picture.format == "TIFF":
        return max(np.atleast_1d(picture.tag_v2.get(_BITS_PER_SAMPLE, 1)).tolist())  # type: ignore[attr-defined]
    return 1 if picture.mode == "1" else 16 if picture.mode.startswith(("I", "F")) else 8


def _byte(file: IO[bytes], place: int) -> int:
    """A byte of a file, which keeps its own place."""
    before = file.tell()
    file.seek(place)
    value = file.read(1)[0]
    file.seek(before)
    return value


def _orientation(picture: Image.Image) -> Any:
    """The orientation that EXIF or XMP says; 1, which is upright, where they are damaged, for which Pillow raises many
    types."""
    with contextlib.suppress(Exception):
        return picture.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _check_is_label(path: Path, picture: Image.Image) -> None:
    """Raises `FileError` unless the header is that of one picture of ids, whose values come back as they were
    painted."""
    form, compression = picture.format, picture.info.get("compression")
    if form not in _LABEL_FORMATS:
        form = "JPEG" if form == "MPO" else form
        named = f", whatever its name {os.path.splitext(path)[1]} says" if form == "JPEG" else ""
        raise FileError(
            f"{path} is a {form} file inside{named}, but labels are PNG, BMP or TIFF files, which keep every id: "
            "export it again from what it was made of."
        )
    if form == "TIFF" and compression not in _LOSSLESS_TIFF:
        raise FileError(
            f"{path} is a TIFF compressed by {compression}, which may change ids: export it again without loss, as PNG."
        )
    if form == "TIFF" and _tag(picture, _PHOTOMETRIC) == _WHITE_IS_ZERO:
        raise FileError(f"{path} is a TIFF in which white is 0, so its ids may be inverted: save it as PNG.")
    if getattr(picture, "n_frames", 1) > 1:
        raise FileError(f"{path} holds {picture.n_frames} pictures, but a label is one: save that alone.")  # type: ignore[attr-defined]
    if picture.mode.startswith("F"):
        raise FileError(f"{path} holds fractions (mode {picture.mode}), but ids are whole: save it as an 8-bit PNG.")
    if picture.mode in ("LA", "La"):
        raise FileError(
            f"{path} has transparency besides its grey values (mode LA), but a label needs one channel with the class "
            "index of each pixel: save it without, as an 8-bit grey PNG."
        )
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I"):
        raise FileError(
            f"{path} is a colour picture (mode {picture.mode}), but a label needs one channel with the class index of "
            "each pixel: convert its colours to indices and save it as an 8-bit grey or palette PNG."
        )


def _tag(picture: Image.Image, number: int) -> Any:
    """A tag's only or first value in a TIFF; None in other files."""
    value = getattr(picture, "tag_v2", {}).get(number)
    return value[0] if isinstance(value, tuple) and value else value
