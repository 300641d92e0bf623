"""Files that survive the death of the process, and what is said about files that did not."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from bcmf_ext import checkpoint
from bcmf_ext.checkpoint import Run, atomic_write, find_checkpoint, load_checkpoint, new_folder, save_checkpoint
from bcmf_ext.errors import UserError

CONTENT: dict[str, Any] = {"version": 1, "config": {"lr": 0.1}, "classes": ["a", "b"], "model": {"w": torch.ones(3)}}


# Writing


def test_killed_while_writing(tmp_path: Path) -> None:
    """kill −9 in the middle of writing leaves the previous checkpoint whole."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, CONTENT)
    child = os.fork()
    if child == 0:
        with atomic_write(path) as file:
            file.write(b"half of a new checkpoint")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert load_checkpoint(path)["config"] == {"lr": 0.1}
    save_checkpoint(path, {**CONTENT, "config": {"lr": 0.2}})
    assert load_checkpoint(path)["config"] == {"lr": 0.2}
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_reaches_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are flushed to the disk before the file takes its name: a power cut leaves the old or the new file."""
    events: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (events.append("sync"), sync(file)))
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("replace"), replace(old, new)))
    save_checkpoint(tmp_path / "last.pt", CONTENT)
    assert events == ["sync", "replace"]


def test_cannot_write(tmp_path: Path) -> None:
    """A place that cannot be written to is one sentence with the path."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/last\.pt cannot be written \(.+\)"):
        save_checkpoint(tmp_path / "file" / "last.pt", CONTENT)
    with pytest.raises(UserError, match=r"cannot be made .*--output-dir"):
        new_folder(str(tmp_path / "file"), None, "demo")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_disk_full(tmp_path: Path) -> None:
    """A full disk is a sentence too, and the old file stays."""
    save_checkpoint(tmp_path / "last.pt", CONTENT)
    (tmp_path / "last.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(tmp_path / "last.pt", {**CONTENT, "model": {"w": torch.ones(100_000)}})
    assert load_checkpoint(tmp_path / "last.pt")["model"]["w"].numel() == 3


# Reading


def test_not_a_checkpoint(tmp_path: Path) -> None:
    """Each kind of wrong file gets its own sentence, with its path."""
    good, path = tmp_path / "good.pt", tmp_path / "a file.pt"
    save_checkpoint(good, CONTENT)
    with pytest.raises(UserError, match=r"There is no checkpoint .*a file\.pt"):
        load_checkpoint(path)
    for damaged in (b"", b"no checkpoint at all", b"a\nb\nc\n", b"hello", good.read_bytes()[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a file\.pt cannot be read"):
            load_checkpoint(path)
    for other in ({"state_dict": {}}, [1, 2]):
        torch.save(other, path)
        with pytest.raises(UserError, match="--pretrained"):
            load_checkpoint(path)
    torch.save({**CONTENT, "version": checkpoint.VERSION + 1}, path)
    with pytest.raises(UserError, match="newer"):
        load_checkpoint(path)


def test_runs_no_code(tmp_path: Path) -> None:
    """A checkpoint from a stranger cannot run code when it is loaded."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({**CONTENT, "extra": Trap()}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path / "best.pt")
    assert not (tmp_path / "trapped").exists()


# The run's folder


def test_log(tmp_path: Path) -> None:
    """Records come back; half a line of a crash, and epochs later than the checkpoint, do not."""
    run = Run(tmp_path, {})
    for epoch in (1, 2, 3):
        run.log({"epoch": epoch, "miou": epoch / 10})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]

    (tmp_path / "log.jsonl").write_text("\n".join(lines) + '\n{"epoch": 4, "mi')
    run = Run(tmp_path, {}, epochs=2)
    assert [record["epoch"] for record in run.records] == [1, 2]
    run.log({"epoch": 3, "miou": 0.5})
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3


def test_new_runs_never_overwrite(tmp_path: Path) -> None:
    """Default names count up; a name that is taken is refused."""
    output = str(tmp_path / "runs")
    names = [new_folder(output, None, "demo-bcmfnet").name for _ in range(3)]
    assert names == ["demo-bcmfnet", "demo-bcmfnet-2", "demo-bcmfnet-3"]
    assert new_folder(output, "mine", "demo-bcmfnet").name == "mine"
    with pytest.raises(UserError, match=r"mine exists already: .*--name.*--resume"):
        new_folder(output, "mine", "demo-bcmfnet")


def test_what_resume_means(tmp_path: Path) -> None:
    """A file, a folder, or without a path the newest run of that name, and of no other."""
    for age, name in enumerate(("demo-bcmfnet-2", "demo-bcmfnet", "demo-bcmfnet-old", "camvid-bcmfnet", "mine")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
        os.utime(tmp_path / name / "last.pt", (1000 - age, 1000 - age))
    output = str(tmp_path)
    assert find_checkpoint("auto", output, None, "demo-bcmfnet") == tmp_path / "demo-bcmfnet-2" / "last.pt"
    assert find_checkpoint("auto", output, "mine", "demo-bcmfnet") == tmp_path / "mine" / "last.pt"
    assert find_checkpoint(str(tmp_path / "mine"), output, None, "demo-bcmfnet") == tmp_path / "mine" / "last.pt"
    assert find_checkpoint("some.pt", output, None, "demo-bcmfnet") == Path("some.pt")
    assert find_checkpoint("auto", output, None, None) == min(
        tmp_path.glob("*/last.pt"), key=lambda path: -path.stat().st_mtime
    )
    with pytest.raises(UserError, match=r"no run to resume, .*demo-ddrnet_s"):
        find_checkpoint("auto", output, None, "demo-ddrnet_s")
