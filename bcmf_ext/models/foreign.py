"""Reads files of weights that others wrote: what a file is by its first bytes, and what it holds, without running code.

It reads `torch.save`'s two formats (a zip, and before PyTorch 1.6 a row of pickles) and safetensors. Anything else is
refused by a sentence that says what it is.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import pickletools
import re
import warnings
import zipfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import Damaged, FileError, briefly
from ..files import cannot_be_opened, damaged_entry
from .safetensors import is_safetensors, read_safetensors

# Each entry tells how a file begins, what it is then, and what to do.
_KINDS = (
    (rb"\Z", "is empty: the download or the writing was broken off, get the file again."),
    (
        rb"version https://git-lfs",
        "is a pointer of Git LFS, which stands for the file in a repository: run git lfs pull there, or download the "
        "file itself.",
    ),
    (
        rb"(?:\xef\xbb\xbf)?\s*<[!?a-zA-Z]",
        "is a web page, not a checkpoint (a login, a confirmation, an exceeded quota): open its address in a browser, "
        "and download the file from there.",
    ),
    (
        rb'(?:\xef\xbb\xbf)?\s*\{.*"weight_map"',
        "is the index of weights that lie in several files: save them in one file, and give that.",
    ),
    (
        rb'(?:\xef\xbb\xbf)?\s*(?:\{\s*["}]|\[\s*[\[{"\]])',
        "is JSON, not a checkpoint (settings, or the refusal of a site): get the file with the weights.",
    ),
    (
        rb"\x1f\x8b|BZh[1-9]|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf\x27\x1c|Rar!|.{257}ustar",
        "is an archive (gzip, tar or the like): unpack it, and give the checkpoint in it.",
    ),
    (
        rb"\x89HDF\r\n\x1a\n",
        "is an HDF5 file, as Keras writes them: only checkpoints of PyTorch and .safetensors can be read.",
    ),
    (
        rb"\x08[\x01-\x1f]\x12",
        "is an ONNX model or another graph, where weights lose their names: give the checkpoint that it was made from.",
    ),
    (rb"\x93NUMPY", "is a NumPy array, which has no names: save the weights by name with torch.save."),
)
_LONGEST_KIND = 1024  # The patterns need so many bytes; a web page may begin with blanks.
_ZIP, _LEGACY = b"PK\x03\x04", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # The second stands behind two or more bytes.

# Pickles that hold weights need these globals; others mean code.
_OF_WEIGHTS = re.compile(
    r"(torch|numpy|collections|_codecs|copyreg|copy_reg)\..*|argparse\.Namespace|"
    r"(builtins|__builtin__)\.(set|bytearray|complex|object)"
)


class Stub:
    """Stands in for a NumPy value (an epoch, a best score, a random state) or argparse's options beside the weights.

    Nothing of them is needed, so nothing of NumPy runs, and what it is called in which version does not matter.
    """

    def __new__(cls, *_: object) -> Stub:
        """Takes whatever arguments, and forgets them."""
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


_STUBBED = (
    *(f"numpy.{core}.multiarray.{maker}" for core in ("core", "_core") for maker in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    "argparse.Namespace",
)


def read_foreign(path: Path) -> object:
    """Returns the file's content, on the CPU. Raises `FileError` if it cannot be read, with what it is and what to
    do."""
    if not os.path.isfile(path):
        folder = " (this is a folder: give a file in it)" if os.path.isdir(path) else ""
        raise FileError(f"There is no checkpoint file {path}{folder}: check the path.")
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise cannot_be_opened(path, error) from error
    with file:
        try:
            head = file.read(_LONGEST_KIND)
            if is_safetensors(head):
                return read_safetensors(file, path)
            for begins, sentence in _KINDS:
                if re.match(begins, head, re.DOTALL):
                    raise FileError(f"{path} {sentence}")
            if head.startswith(_ZIP):
                _check_zip(file, path)
            file.seek(0)
            with warnings.catch_warnings(), _stubs_allowed():
                warnings.simplefilter("ignore")  # PyTorch warns of odd files in several lines.
                return torch.load(file, map_location="cpu", weights_only=True)
        except FileError:
            raise
        except Exception as error:  # The readers raise whatever the bytes lead them to.
            raise _unreadable(path, file, error) from error


@contextlib.contextmanager
def _stubs_allowed() -> Iterator[None]:
    """Lets `torch.load` make stubs, also where the program around us allows it NumPy's own under their names. What else
    that program allows stays."""
    allowed: Any = torch.serialization.get_safe_globals()
    names = [it[1] if isinstance(it, tuple) else f"{it.__module__}.{it.__qualname__}" for it in allowed]
    others = [it for it, name in zip(allowed, names, strict=True) if name not in _STUBBED]
    stubs: Any = [(Stub, name) for name in _STUBBED]
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(others + stubs)
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _check_zip(file: IO[bytes], path: Path) -> None:
    """Raises `FileError` if a zip is none of torch.save's, or damaged: PyTorch does not look at the sums of its
    bytes."""
    if not zipfile.is_zipfile(file):
        raise Damaged(
            f"{path} is damaged, it begins as a checkpoint, but its end is missing: the download or the writing was "
            "broken off, get the file again."
        )
    names = zipfile.ZipFile(file).namelist()
    entries = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in entries:
        raise FileError(
            f"{path} is a TorchScript program, which reading would run: if you trust it, save its weights, "
            'torch.save(torch.jit.load("…").state_dict(), "…"), and give those.'
        )
    if "archive_format" in entries:
        raise FileError(f"{path} is a program of torch.export: give the checkpoint that it was made from.")
    if "data.pkl" not in entries:
        shown = ", ".join(map(briefly, names[:3])) + (", …" if len(names) > 3 else "")
        raise FileError(
            f"{path} is a zip archive, but none of torch.save (it holds {shown or 'nothing'}): if a checkpoint is in "
            "it, unpack it and give that."
        )
    if (damaged := damaged_entry(file)) is not None:
        raise Damaged(
            f"{path} is damaged, the bytes of {briefly(damaged)} are not those that were written: get the file again."
        )


# --------------------------------------------------------------------------------------------------------------------
# Why a file could not be read


def _unreadable(path: Path, file: IO[bytes], error: Exception) -> FileError:
    """Why PyTorch could not read the file, which may lie in the pickle that it is or holds."""
    pickled = _pickle_in(file)
    refused = re.search(r"GLOBAL (\S+)|``(torch\.\S+)`` must be imported", str(error))
    is_pickle, called = _calls(pickled)
    if not is_pickle and (words := _words(pickled[:_LONGEST_KIND])):
        return FileError(f"{path} is text, not a checkpoint ({words}): get the file with the weights.")
    if called := (refused and (refused[1] or refused[2])) or called:
        called = re.sub(r"[^\w.]+", " ", called)[:80]
        return FileError(
            f"{path} holds a Python object ({called}) beside its weights, which is code in a pickle, and reading "
            "it could run code: where the file was made, save the weights alone, "
            'torch.save(model.state_dict(), "…"), and load that.'
        )
    if is_pickle and _LEGACY not in pickled[:32] and not zipfile.is_zipfile(file):
        return FileError(
            f"{path} is a pickle, but none of torch.save (detectron2's .pkl and Paddle's .pdparams are such): load it "
            "with the program that made it, and save the weights as tensors with torch.save."
        )
    if re.match(rb"\x80[\x03-\x05]", pickled):
        return FileError(
            f"{path} was saved with pickle_protocol={pickled[1]}, which PyTorch reads only by running what is in the "
            "file: save it again without pickle_protocol."
        )
    return FileError(
        f"{path} cannot be read as a PyTorch checkpoint, it is damaged or of another format: download or save it again."
    )


def _pickle_in(file: IO[bytes], most: int = 2**20) -> bytes:
    """The beginning of the pickle that a zip of torch.save holds, or of the file itself."""
    with contextlib.suppress(Exception), zipfile.ZipFile(file) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        with archive.open(name) as entry:
            return entry.read(most)
    with contextlib.suppress(OSError):
        file.seek(0)
        return file.read(most)
    return b""


def _calls(pickled: bytes) -> tuple[bool, str | None]:
    """Whether these bytes are a pickle, and the first global in it that neither weights nor NumPy's values need."""
    stream, is_pickle, called = io.BytesIO(pickled), False, None
    with contextlib.suppress(Exception):  # The end, and bytes that are no pickle, raise many types.
        while True:  # Before PyTorch 1.6 a file is a row of pickles.
            strings, memo = deque[str](maxlen=2), []  # STACK_GLOBAL takes the last two strings.
            for opcode, argument, _ in pickletools.genops(stream):
                name = None
                if opcode.name in ("GLOBAL", "INST"):
                    name = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    name = ".".join(strings)
                elif opcode.name == "MEMOIZE":
                    memo.append(strings[-1] if strings else "")
                elif isinstance(argument, int) and opcode.name in ("BINGET", "LONG_BINGET") and memo:
                    strings.append(memo[argument])
                elif isinstance(argument, str):
                    strings.append(argument)
                if name and not _OF_WEIGHTS.fullmatch(name):
                    called = called or name
            is_pickle = True
    return is_pickle, called


def _words(head: bytes) -> str | None:
    """How a text begins; None if it is none."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # The last character may be cut.
    except UnicodeDecodeError:
        return None
    words = " ".join(text.split())
    return briefly(words) if words.isprintable() else None
