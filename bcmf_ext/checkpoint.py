"""A run's folder, and files in it that are whole whenever the process dies.

`last.pt` holds everything needed to go on, `best.pt` the weights of the best epoch. Both also hold what predicting
needs: the configuration, classes, palette, mean, std and align_corners. Both load with `weights_only=True`.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from .errors import UserError

VERSION = 1


@contextmanager
def atomic_write(path: Path, *, sync: bool = False) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` in one step once it is complete; `UserError` if that fails.

    That survives the death of the process. sync: and that of the machine; it waits for the disk.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror or error}): check the folder and the disk."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # left by an error, or by a second Ctrl-C


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint atomically."""
    with atomic_write(path, sync=True) as file:
        torch.save(content, file)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a `last.pt` or `best.pt` to the CPU; `UserError` if it is neither."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}: check the path.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever the bytes lead it to
        raise UserError(f"{path} cannot be read as a checkpoint: it is damaged, or another kind of file.") from error
    if not isinstance(content, dict) or not {"version", "config", "classes", "model"} <= content.keys():
        raise UserError(
            f"{path} is not a checkpoint of this trainer (last.pt, best.pt): weights from elsewhere can be trained "
            "further with --pretrained."
        )
    if content["version"] > VERSION:
        raise UserError(f"{path} was written by a newer bcmf_ext: update the package.")
    return content


class Run:
    """The folder of a run.

    folder: where. about: what each checkpoint tells beside the weights. records: the lines of log.jsonl, one per epoch.
    """

    def __init__(self, folder: Path, about: dict[str, Any], epochs: int = 0) -> None:
        self.folder, self.about = folder, {"version": VERSION, **about}
        self.records = read_log(folder / "log.jsonl", epochs)

    @property
    def last(self) -> Path:
        return self.folder / "last.pt"

    @property
    def best(self) -> Path:
        return self.folder / "best.pt"

    def log(self, record: dict[str, Any]) -> None:
        """Adds a record; the file is written anew, so that it never ends in half a line."""
        self.records.append(record)
        with atomic_write(self.folder / "log.jsonl", sync=True) as file:
            file.writelines(f"{json.dumps(record)}\n".encode() for record in self.records)

    def save_last(self, state: dict[str, Any]) -> None:
        save_checkpoint(self.last, {**self.about, **state})

    def save_best(self, model: dict[str, Any], epoch: int, miou: float) -> None:
        save_checkpoint(self.best, {**self.about, "model": model, "epoch": epoch, "miou": miou})


def read_log(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The records of the first `epochs` epochs. What a crash left of a line is passed over."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [record for record in records if record["epoch"] <= epochs]


def new_folder(output_dir: str, name: str | None, default_name: str) -> Path:
    """Makes the folder of a new run: `name`, or the first free one of default_name, default_name-2, …"""
    names = [name] if name is not None else (default_name + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    for candidate in names:
        folder = Path(output_dir, candidate)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder} cannot be made ({error.strerror}): choose another place with --output-dir."
            ) from error
    raise UserError(f"{folder} exists already: choose another --name, or go on with that run by adding --resume.")


def find_checkpoint(resume: str, output_dir: str, name: str | None, default_name: str | None) -> Path:
    """What `--resume` means: a file, a folder with a last.pt, or "auto", the run that was saved last.

    That is the run `name`; without one, of those called `default_name`, default_name-2, …; without either, of all.
    """
    if resume != "auto":
        path = Path(resume)
        return path / "last.pt" if path.is_dir() else path
    first = Path(output_dir, name or default_name or "*", "last.pt")
    pattern = f"{default_name}-[0-9]*/last.pt" if default_name else "*/last.pt"
    more = Path(output_dir).glob(pattern) if name is None else ()
    found = [path for path in (first, *more) if path.is_file()]
    if not found:
        raise UserError(
            f"There is no run to resume, {first} does not exist: say which with --resume PATH, or leave --resume out "
            "to begin one."
        )
    return max(found, key=lambda path: path.stat().st_mtime)
