"""Keeps the folder of a run: who may write to it, what is in it, and which one a run that goes on is in."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .checkpoint import RECORD, VERSION, load_checkpoint, save_checkpoint, what_is_wrong
from .engine import NonFiniteLoss
from .errors import Damaged, FileError, UserError, counted, warn
from .files import TEMPORARY, cannot_be_opened, read_text, remove_temporaries, write_file

LAST, OLDER, BEST, LOCK = "last.pt", "last-1.pt", "best.pt", ".lock"


class Lock:
    """The right to write to a run's folder, which one process has at a time.

    It is a POSIX record lock on `.lock`: the system gives it back when the process ends, however it ends, and processes
    that load data, which are forked, do not have it (of `flock` they would keep it after a kill of the trainer). It is
    lost when the process closes any descriptor of the file, so the file is opened once, here.

    Raises `UserError` if another process has it, and says which.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise cannot_be_opened(path, error) from error
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                warn(
                    f"the file system of {folder} has no locks ({error.strerror}), so take care that one process alone "
                    "trains there."
                )
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"{path} cannot be locked ({error.strerror}): check the folder and the disk."
                ) from error
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            self.release()
            raise UserError(f"{folder} is being trained by {holder}: wait until that ends, or stop it.") from error
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): check the folder and the disk.") from error

    def release(self) -> None:
        """Gives the lock back, once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


class Run:
    """A run's folder, which this process alone writes to. Made by `begin_run` and `resume_run`.

    records: the lines of log.jsonl, one per epoch. about: what each checkpoint tells beside the weights and the state.
    """

    def __init__(self, folder: Path, lock: Lock) -> None:
        self.folder, self._lock = folder, lock
        self.about: dict[str, Any] = {}
        self.records: list[dict[str, Any]] = []
        self._last_is_whole = False
        for place in (folder, self.pictures):
            remove_temporaries(place)

    @property
    def last(self) -> Path:
        """The file that the run goes on from."""
        return self.folder / LAST

    @property
    def best(self) -> Path:
        """The weights of the best epoch."""
        return self.folder / BEST

    @property
    def pictures(self) -> Path:
        """The folder of drawn predictions."""
        return self.folder / "pictures"

    def log(self, record: dict[str, Any]) -> None:
        """Adds a record; the file is written anew, so that it never ends in half a line."""
        self.records.append(record)
        lines = "".join(f"{json.dumps(entry)}\n" for entry in self.records)
        write_file(self.folder / "log.jsonl", lines.encode(), sync=True)

    def save_last(self, state: dict[str, Any]) -> None:
        """Writes last.pt; the one before becomes last-1.pt, unless it is damaged: then that stays what it is."""
        older = self.folder / OLDER if self._last_is_whole else None
        save_checkpoint(self.last, {"version": VERSION, **self.about, **state, "saved": time.time()}, older)
        self._last_is_whole = True

    def save_best(self, model: dict[str, Any], epoch: int, miou: float) -> None:
        """Writes best.pt: the weights of the best epoch so far, and its mIoU."""
        weights = {"model": model, "epoch": epoch, "miou": miou}
        save_checkpoint(self.best, {"version": VERSION, **self.about, **weights})

    def save_batch(self, stop: NonFiniteLoss) -> Path:
        """Keeps the batch whose loss is not finite, to be looked at. Returns the file."""
        path, (images, labels) = self.folder / "nonfinite-batch.pt", stop.batch
        where = {"epoch": stop.epoch, "step": stop.step, "terms": stop.terms}
        save_checkpoint(path, {"images": images, "labels": labels, **where})
        return path

    def what_is_wrong_with_best(self) -> str | None:
        """Why best.pt cannot be used, as a sentence; None if it can."""
        try:
            load_checkpoint(self.best)
        except UserError as error:
            return str(error)
        return None

    def load_last(self, path: Path) -> dict[str, Any]:
        """The state to go on from: that of `path` or, if this is a last.pt that is damaged or gone, of last-1.pt."""
        try:
            saved = load_checkpoint(path)
        except FileError as fault:
            older, gone = self.folder / OLDER, not os.path.isfile(path)
            if path.name != LAST or not os.path.isfile(older) or not (gone or isinstance(fault, Damaged)):
                raise
            what = f"{path} is gone" if gone else str(fault).rstrip(".")
            try:
                saved = load_checkpoint(older)
            except Damaged as second:
                raise FileError(
                    f"{what}; and {str(second).rstrip('.')}, so the run cannot go on: start another from its "
                    f"best weights with `pretrained={str(self.best)!r}`."
                ) from second
            warn(f"{what}; the run goes on from {older}, one save earlier.")
        else:
            self._last_is_whole = path.name == LAST or self._has_whole_last()
        if "optimizer" not in saved:
            raise FileError(f"{path} holds weights only: resume from last.pt, or train them further with `pretrained`.")
        self.records = read_log(self.folder / "log.jsonl", saved["epoch"])
        return saved

    def _has_whole_last(self) -> bool:
        """Whether last.pt is whole, also where the run goes on from another file: a newer last.pt is then kept as
        last-1.pt."""
        try:
            load_checkpoint(self.last)
        except UserError:
            return False
        return True

    def close(self) -> None:
        """Lets others write to the folder."""
        self._lock.release()


def read_log(path: Path, epochs: int) -> list[dict[str, Any]]:
    """The records of the first `epochs` epochs. Lines that are none are passed over with a word: the next record takes
    them out of the file."""
    records = []
    lines = read_text(path, errors="replace").splitlines() if os.path.isfile(path) else []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            wrong = what_is_wrong(record, RECORD)
        except (ValueError, RecursionError):  # A number or a nesting without end raises these, too.
            wrong = "it is no JSON"
        if wrong is not None:
            warn(f"{path}, line {number} is no record of an epoch ({wrong}); it is passed over.")
        elif record["epoch"] <= epochs:
            records.append(record)
    return records


# --------------------------------------------------------------------------------------------------------------------
# Which folder


def begin_run(output_dir: str, name: str | None, default_name: str) -> Run:
    """Makes the folder of a new run: `name`, or the first free one of default_name, default_name-2, … A folder that a
    process has died in before it could save anything is free. Raises `UserError` if `name` is not, or cannot be
    made."""
    names = [name] if name is not None else (default_name + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    for candidate in names:
        folder = Path(output_dir, candidate)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            if not os.path.lexists(folder):  # This is so, too, where output_dir is a link to nowhere.
                raise UserError(
                    f"{folder} cannot be made ({error.strerror}): choose another place with `output_dir`."
                ) from error
            if not _is_free(folder):
                continue
        try:
            lock = Lock(folder)
        except UserError:  # Another run begins there at this moment.
            if name is not None:
                raise
            continue
        if _is_free(folder):
            return Run(folder, lock)
        lock.release()  # A run has begun there, and ended, since we looked.
    raise UserError(f"{folder} exists already: choose another `name`, or go on with that run by adding `resume`.")


def _is_ours(lock: Path) -> bool:
    """Whether it holds what `Lock` writes, or nothing yet: users may have a file of this name, too."""
    return os.path.isfile(lock) and re.fullmatch(rb"(process \d+ on \S+\n)?", lock.read_bytes()) is not None


def _is_free(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run has before it saves for the first time."""
    try:
        names = os.listdir(folder)
        return all(TEMPORARY.fullmatch(name) or (name == LOCK and _is_ours(folder / LOCK)) for name in names)
    except OSError:  # It is a file, or nothing that we may read.
        return False


def resume_run(resume: str, output_dir: str, name: str | None, default_name: str | None) -> tuple[Run, dict[str, Any]]:
    """The run that `resume` means, see `find_checkpoint`, and its state. Raises `UserError` if there is none, another
    process trains it, or nothing in it is whole."""
    path = find_checkpoint(resume, output_dir, name, default_name)
    if not os.path.isfile(path) and not (path.name == LAST and os.path.isfile(path.with_name(OLDER))):
        begun = path.name == LAST and os.path.exists(path.with_name(LOCK)) and _is_free(path.parent)
        hint = "the run ended before it saved anything, begin it again without `resume`" if begun else "check the path"
        raise FileError(f"There is no checkpoint {path}: {hint}.")
    run = Run(path.parent, Lock(path.parent))
    try:
        return run, run.load_last(path)
    except UserError:
        run.close()
        raise


def check_same_run(saved: Mapping[str, Any], about: Mapping[str, Any], steps: int, last: Path) -> None:
    """Raises `UserError` where what would go on is another run: with other classes or another number of images, or at a
    place that no run of so many steps an epoch can have. about: as `Run.about`. last: the file of what was saved."""
    if saved["classes"] != about["classes"]:
        old, new = (", ".join(content["classes"]) for content in (saved, about))
        raise UserError(f"{last} knows the classes {old}, but the data has {new}: start another run.")
    if saved["train_images"] != about["train_images"]:
        old, new = counted(saved["train_images"], "image"), about["train_images"]
        raise UserError(f"{last} was trained on {old}, but the training split has {new} now: start another run.")
    epoch, step, iteration = saved["epoch"], saved["step"], saved["scheduler"]["last_epoch"]
    if step > steps or iteration != epoch * steps + step:
        raise FileError(
            f"{last} is in epoch {epoch + 1} after {step} of {counted(steps, 'step')}, but its schedule is at "
            f"iteration {iteration}: take the file as the trainer wrote it."
        )


def find_checkpoint(resume: str, output_dir: str, name: str | None, default_name: str | None) -> Path:
    """Finds what `resume` means: a file, a folder with a last.pt, or "auto", the run that was saved last.

    That is the run `name`; without one, of those called `default_name`, default_name-2, …; without either, of all. A
    run that can go on comes before a finished one; when it was saved says the file itself, not its time.
    """
    if resume != "auto":
        path = Path(resume)
        path = path / LAST if os.path.isdir(path) else path
        # The path was given from within the folder.
        return path if path.parent.name not in ("", "..") else Path(os.path.abspath(path))
    folders = [Path(output_dir, name)] if name is not None else _folders_of(Path(output_dir), default_name)
    found = [folder for folder in folders if any(os.path.isfile(folder / file) for file in (LAST, OLDER))]
    if not found:
        first = Path(output_dir, name or default_name or "*", LAST)
        raise UserError(
            f"There is no run to resume, {first} does not exist: say which with `resume=PATH`, or leave `resume` out "
            "to begin one."
        )
    # Files of older versions do not say when they were saved: the last number counts then.
    return (found[0] if len(found) == 1 else max(reversed(found), key=_age)) / LAST


def _folders_of(output_dir: Path, default_name: str | None) -> Iterator[Path]:
    """The folders that runs of this name are called by default; without a name, all. In the order of their numbers."""
    pattern = re.compile(rf"{re.escape(default_name)}(?:-(\d+))?" if default_name else r".*?(?:-(\d+))?")
    named = ((pattern.fullmatch(folder.name), folder) for folder in output_dir.glob("*/"))
    numbered = [(int(match[1] or 1), folder.name, folder) for match, folder in named if match]
    return (folder for _, _, folder in sorted(numbered))


def _age(folder: Path) -> tuple[bool, float]:
    """Whether a run can go on, and when it was saved, for choosing among several: without reading the weights."""
    for name in (LAST, OLDER):
        if not os.path.isfile(folder / name):
            continue
        try:
            saved = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            return saved["epoch"] < saved["config"]["epochs"], float(saved.get("saved", 0))
        except Exception:  # If it is chosen, it is looked at closely, and complained of.
            continue
    return False, -1.0
