"""Files that are whole whatever happens, and files that are not ours."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bcmf_ext import files
from bcmf_ext.errors import UserError
from bcmf_ext.files import TEMPORARY, check_replaceable, mark_of, read_text, remove_temporaries, short_name, write_file
from bcmf_ext.report import save_png


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# Writing


def test_killed_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill −9 in the middle of writing leaves the previous file whole, and a temporary file that is known as ours."""
    path = tmp_path / "last.pt"
    write_file(path, b"old")
    child = os.fork()
    if child == 0:
        monkeypatch.setattr(os, "fsync", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        write_file(path, b"new", sync=True)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert path.read_bytes() == b"old"
    (left,) = set(names(tmp_path)) - {"last.pt"}
    assert TEMPORARY.fullmatch(left)
    (tmp_path / "notes.tmp").touch()
    (tmp_path / ".bcmf_ext-mine.tmp").touch()
    remove_temporaries(tmp_path)
    assert names(tmp_path) == [".bcmf_ext-mine.tmp", "last.pt", "notes.tmp"]


def test_reaches_the_disk_before_the_name_and_the_name_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are flushed to the disk before the file takes its name, and the folder after: a power cut leaves the
    old or the new file."""
    events: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    write_file(tmp_path / "last.pt", b"new", sync=True)
    assert events == ["sync", "replace", "sync"]


def test_nobody_elses_file_is_written_through(tmp_path: Path) -> None:
    """A link in the place of the file is replaced, not followed; a user's own temporary files stay."""
    mine, path = tmp_path / "mine", tmp_path / "last.pt"
    mine.write_bytes(b"mine")
    path.symlink_to(mine)
    (tmp_path / "last.pt.tmp").symlink_to(mine)
    write_file(path, b"new")
    assert (mine.read_bytes(), path.read_bytes()) == (b"mine", b"new")
    assert names(tmp_path) == ["last.pt", "last.pt.tmp", "mine"]
    assert not path.is_symlink()


def test_a_temporary_file_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even who foresees its name cannot have us write somewhere else: what is there already is an error."""
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "0" * 16)
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    (tmp_path / f".bcmf_ext-{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(UserError, match=r"last\.pt cannot be written \(File exists\)"):
        write_file(tmp_path / "last.pt", b"new")
    assert victim.read_bytes() == b"mine"


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room(error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, a quota and a limit are a sentence with the path; the old file stays, and nothing else."""
    path = tmp_path / "last.pt"
    write_file(path, b"old")

    def full(_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=rf"last\.pt cannot be written \({os.strerror(error)}\)"):
        write_file(path, b"new", sync=True)
    assert (path.read_bytes(), names(tmp_path)) == (b"old", ["last.pt"])
    with pytest.raises(UserError, match=r"last\.pt/x cannot be written"):
        write_file(path / "x", b"new")


def test_two_generations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every moment one whole file has its name: the older one gets its second name first, by a link, or a copy where
    there are none; also if both are one file, as after a kill in between."""
    path, older = tmp_path / "last.pt", tmp_path / "last-1.pt"
    write_file(path, b"1", older=older)
    assert names(tmp_path) == ["last.pt"]
    replace, seen = os.replace, []
    monkeypatch.setattr(
        os, "replace", lambda old, new: (replace(old, new), seen.append([f.read_bytes() for f in (path, older)]))
    )
    write_file(path, b"2", older=older)
    os.unlink(older)
    os.link(path, older)
    write_file(path, b"3", older=older)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_file(path, b"4", older=older)
    assert seen == [[b"1", b"1"], [b"2", b"1"], [b"2", b"2"], [b"3", b"2"], [b"3", b"3"], [b"4", b"3"]]
    assert names(tmp_path) == ["last-1.pt", "last.pt"]


def test_names_that_are_too_long(tmp_path: Path) -> None:
    """A picture of an image with the longest name has a name, too, and its own, in any language."""
    for letter in ("a", "é", "名"):
        stems = [letter * (250 // len(letter.encode())) + ending for ending in ("1", "2")]
        first, second = (short_name(stem, "_picture.png") for stem in stems)
        assert first != second
        assert len(first.encode()) <= 255
        assert first.endswith("_picture.png")
        write_file(tmp_path / first, b"")
    assert short_name("street", ".png") == "street.png"


def test_files_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log, a classes.txt or a folder of pictures of another user: a sentence, or nothing that matters."""

    def refuse(path: str | os.PathLike[str], *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "log.jsonl").touch()
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UserError, match=r"log\.jsonl cannot be opened \(Permission denied\): check its permissions"):
        read_text(tmp_path / "log.jsonl")
    remove_temporaries(tmp_path)


# What is ours


def test_marks(tmp_path: Path) -> None:
    """What a command made is known by what is in it, not by its name; strangers' files are nobody's, whatever they
    hold."""
    save_png(tmp_path / "label.png", np.zeros((4, 5), np.uint8), "bcmf_ext.predict", np.zeros((2, 3), np.uint8))
    assert mark_of(tmp_path / "label.png") == "bcmf_ext.predict"
    (tmp_path / "metrics.json").write_text(json.dumps({"software": "bcmf_ext.evaluate", "images": 3}, indent=1))
    assert mark_of(tmp_path / "metrics.json") == "bcmf_ext.evaluate"
    strangers = (
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"PK\x03\x04",
        b'{"software": "Adobe"}',
        b'{"software": 3}',
        b"\x08\x0a\x12\x07pytorch",
        b"bcmf_ext.predict",
    )
    for content in strangers:
        (tmp_path / "other").write_bytes(content)
        assert mark_of(tmp_path / "other") is None
    assert mark_of(tmp_path / "none") is None


def test_only_our_own_files_are_replaced(tmp_path: Path) -> None:
    """A file of the same command may go; another command's, a user's, a folder and a broken link may not."""
    ours = tmp_path / "ours.png"
    save_png(ours, np.zeros((4, 5), np.uint8), "bcmf_ext.predict")
    check_replaceable([ours, tmp_path / "none.png"], "bcmf_ext.predict", "output")
    with pytest.raises(UserError, match=r"ours\.png is there already, without a mark of python -m bcmf_ext\.evaluate"):
        check_replaceable([ours], "bcmf_ext.evaluate", "output")
    (tmp_path / "theirs.png").write_bytes(b"theirs")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere")
    for name in ("theirs", "folder", "link"):
        with pytest.raises(
            UserError, match=rf"{name}\.png \(and 1 more\) is there already, .*another `output`.*`overwrite=True`"
        ):
            check_replaceable([ours, *[tmp_path / f"{name}.png"] * 2], "bcmf_ext.predict", "output")
