"""Files that are written whole or not at all, and never over what is not ours.

A file is put together in memory, written under a name that nobody can foresee, and renamed when it is complete. What
the commands make for users bears a mark, by which they know it again: they replace their own results and nothing else.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import secrets
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from .errors import FileError, UserError

TEMPORARY = re.compile(r"\.bcmf_ext-[0-9a-f]{16}\.tmp")
LONGEST_NAME = 255  # The file systems of Linux, macOS and Windows allow so many bytes.

# JSON and ONNX (ir_version, producer_name) begin with the mark in these ways; PNGs have it in a text chunk.
_MARKED_HEAD = re.compile(rb'\A(?:\{\s*"software": "(bcmf_ext\.[a-z]+)"|\x08.\x12.(bcmf_ext\.[a-z]+))', re.DOTALL)
ZIP_MARK = "software"  # A program of torch.export has the mark in this extra file.


def write_file(path: Path, data: bytes | memoryview, *, sync: bool = False, older: Path | None = None) -> None:
    """Writes a file in one step: at every moment `path` is what it was before, or complete. Makes its folder.

    That survives the death of the process. sync: and that of the machine; it waits for the disk. older: the name that
    what `path` was before is given first, so that one of both is whole even if the new file is damaged later.

    Raises `UserError` if that fails; `path` is then what it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary_beside(path)
        try:
            with _create(temporary) as file:
                file.write(data)
                if sync:
                    file.flush()
                    os.fsync(file.fileno())
            if older is not None:
                _keep(path, older)
            os.replace(temporary, path)
        finally:
            _remove(temporary)  # There is none any more, except after an error or Ctrl-C.
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be written ({reason}): check the folder and the disk.") from error


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file, UTF-8. Raises `FileError` if it cannot be opened."""
    try:
        return path.read_text(encoding="utf-8-sig", errors=errors)
    except OSError as error:
        raise cannot_be_opened(path, error) from error


def cannot_be_opened(path: Path, error: OSError) -> FileError:
    """The error that every reader raises where the system does not let it open a file."""
    return FileError(f"{path} cannot be opened ({error.strerror or error}): check its permissions.")


def _temporary_beside(path: Path) -> Path:
    """A name of our own for what is not complete. Short, since `path` may have the longest name there is."""
    return path.with_name(f".bcmf_ext-{secrets.token_hex(8)}.tmp")


def _create(path: Path) -> io.BufferedWriter:
    """A new file: never one that is there already, and never through a link."""
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def _keep(path: Path, older: Path) -> None:
    """Gives what `path` is a second name: by a hard link, or a copy where the file system refuses links."""
    temporary = _temporary_beside(older)
    try:
        try:
            os.link(path, temporary)
        except FileNotFoundError:
            return
        except OSError:
            with open(path, "rb") as source, _create(temporary) as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(copy.fileno())
        os.replace(temporary, older)
    finally:
        _remove(temporary)  # It is also left where both were one file already: then replace does nothing.


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Waits until the disk has the new name, too."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # Some file systems cannot do it.
            raise
    finally:
        os.close(descriptor)


def remove_temporaries(folder: Path) -> None:
    """Removes what a killed process left half written, in a folder that nobody else writes to."""
    with contextlib.suppress(OSError):  # There may be no such folder, or we may not look into it.
        for name in os.listdir(folder):
            if TEMPORARY.fullmatch(name):
                _remove(folder / name)


def real(path: Path) -> Path:
    """Where a path leads. It is Path.resolve, which would raise for a loop of links."""
    return Path(os.path.realpath(path))


def short_name(stem: str, ending: str) -> str:
    """`stem` + `ending`, or if no file system has such long names, the stem's beginning and a hash in its place."""
    name = stem + ending
    if len(os.fsencode(name)) <= LONGEST_NAME:
        return name
    digest = hashlib.blake2b(os.fsencode(stem), digest_size=8).hexdigest()
    room = LONGEST_NAME - len(os.fsencode(ending)) - len(digest) - 1
    return f"{os.fsencode(stem)[:room].decode(errors='ignore')}-{digest}{ending}"


def damaged_entry(file: IO[bytes]) -> str | None:
    """The first entry of a zip (which checkpoints are) whose bytes are not those that were written, by its CRC-32.
    Raises what zipfile raises for other files."""
    with zipfile.ZipFile(file) as archive:
        return archive.testzip()


# --------------------------------------------------------------------------------------------------------------------
# Files of ours


def mark_of(path: Path) -> str | None:
    """The command that made a file, such as "bcmf_ext.predict"; None if it was none of ours."""
    try:
        with open(path, "rb") as file:
            head = file.read(200)
        if head.startswith(b"\x89PNG"):
            from PIL import Image  # Imported late: most files here are no pictures.

            with Image.open(path) as picture:
                mark = picture.info.get("Software")
        elif head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.endswith(f"/extra/{ZIP_MARK}")]
                mark = archive.read(names[0]).decode() if names else None
        else:
            found = _MARKED_HEAD.match(head)
            mark = (found[1] or found[2]).decode() if found else None
    except Exception:  # A stranger's bytes may raise anything, and a file that cannot be read is not ours.
        return None
    return mark if isinstance(mark, str) else None


def check_replaceable(paths: Iterable[Path], command: str, argument: str) -> None:
    """Raises `UserError` if one of these is there already and `command` (such as "bcmf_ext.predict") has not made it:
    before anything is computed. argument: the one that chooses another place."""
    foreign = [
        path for path in paths if os.path.lexists(path) and (not os.path.isfile(path) or mark_of(path) != command)
    ]
    if foreign:
        more = f" (and {len(foreign) - 1} more)" if len(foreign) > 1 else ""
        raise UserError(
            f"{foreign[0]}{more} is there already, without a mark of python -m {command} (results of 0.1.0 have none): "
            f"choose another `{argument}`, or replace it with `overwrite=True`."
        )
