"""A run's folder: who may write to it, what comes back from it, and which one is meant."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test_checkpoint import CONTENT, RECORDED, STATE

from bcmf_ext.checkpoint import load_checkpoint
from bcmf_ext.errors import UserError
from bcmf_ext.run import Lock, Run, begin_run, find_checkpoint, read_log, resume_run


def begin(output: Path, name: str | None = None) -> Run:
    run = begin_run(str(output), name, "demo-bcmfnet")
    run.about = {key: value for key, value in CONTENT.items() if key != "model"}
    return run


def state(epoch: int, epochs: int = 8) -> dict[str, Any]:
    config = {**CONTENT["config"], "epochs": epochs}
    return {**STATE, "model": CONTENT["model"], "epoch": epoch, "config": config}


@contextmanager
def in_another_process(folder: Path) -> Iterator[int]:
    """Another process has the lock."""
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        lock = Lock(folder)
        os.write(tell, b"x")
        time.sleep(60)
        lock.release()
    os.read(ready, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# The lock


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """Two processes that train into one folder ruin each other's files: the second is told, and by whom; kill −9 leaves
    no lock behind."""
    with closing(begin(tmp_path, "x")) as run:
        run.save_last(state(1))
    with in_another_process(tmp_path / "x") as child, pytest.raises(UserError, match="x is being trained by") as error:
        resume_run(str(tmp_path / "x"), str(tmp_path), None, None)
    assert f"process {child} on" in str(error.value)
    run, saved = resume_run(str(tmp_path / "x"), str(tmp_path), None, None)
    assert saved["epoch"] == 1
    run.close()
    run.close()  # as any file


def test_loading_processes_do_not_keep_the_lock(tmp_path: Path) -> None:
    """A trainer that is killed leaves its loading processes for a while; the run can be resumed at once."""
    trainer = os.fork()
    if trainer == 0:
        lock = Lock(tmp_path)
        if os.fork() == 0:  # a loading process, which outlives it
            time.sleep(5)
            lock.release()
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(trainer, 0)
    Lock(tmp_path).release()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There is one warning, and the run goes on."""

    def refuse(*_: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with closing(begin(tmp_path, "x")) as run:
        run.save_last(state(1))
    assert capsys.readouterr().err.count("warning: the file system of") == 1


# A new run


def test_new_runs_never_overwrite(tmp_path: Path) -> None:
    """Default names count up; a name that is taken is refused, whatever is in the folder."""
    for name in ("demo-bcmfnet", "demo-bcmfnet-2", "demo-bcmfnet-3"):
        with closing(begin(tmp_path)) as run:
            assert run.folder.name == name
            run.save_last(state(1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    (tmp_path / "file").touch()
    for name in ("demo-bcmfnet", "mine", "file"):
        with pytest.raises(UserError, match=rf"{name} exists already: .*`name`.*`resume`"):
            begin(tmp_path, name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lock").write_text("of another program")
    with pytest.raises(UserError, match="other exists already"):
        begin(tmp_path, "other")
    assert (tmp_path / "other" / ".lock").read_text() == "of another program"
    with pytest.raises(UserError, match=r"cannot be made .*`output_dir`"):
        begin(tmp_path / "file")
    assert os.listdir(tmp_path / "mine") == ["notes.txt"]


def test_a_run_that_died_before_it_saved(tmp_path: Path) -> None:
    """Its folder is free for the same name, and cleared of what was half written; while it is about to save it is
    not."""
    begin(tmp_path, "x").close()
    half = tmp_path / "x" / f".bcmf_ext-{'a' * 16}.tmp"
    half.write_bytes(b"half a checkpoint")
    with pytest.raises(UserError, match=r"x/last\.pt: the run ended before it saved anything, begin it again without"):
        resume_run(str(tmp_path / "x"), str(tmp_path), None, None)
    with in_another_process(tmp_path / "x"):
        with pytest.raises(UserError, match="x is being trained by process"):
            begin(tmp_path, "x")
        os.symlink("x", tmp_path / "demo-bcmfnet")
        with closing(begin(tmp_path)) as run:
            assert run.folder.name == "demo-bcmfnet-2"
    with closing(begin(tmp_path, "x")) as run:
        assert not half.exists()
        run.save_last(state(0))
    with pytest.raises(UserError, match="x exists already"):
        begin(tmp_path, "x")


# What comes back


def test_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Records come back; epochs later than the checkpoint, half a line of a crash, and what another program wrote do
    not, the last with a word."""
    with closing(begin(tmp_path, "x")) as run:
        for epoch in (1, 2, 3):
            run.log({**RECORDED, "epoch": epoch})
    path = tmp_path / "x" / "log.jsonl"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    odd = ["null", '{"a": 1}', "[" * 100_000, '{"epoch": ' + "9" * 5000 + "}", '{"epoch": 1, "loss": {"total": NaN}}']
    path.write_text("\n".join([odd[0], *lines, *odd[1:]]) + '\n{"epoch": 4, "mi')
    assert [record["epoch"] for record in read_log(path, 2)] == [1, 2]
    said = capsys.readouterr().err
    assert "log.jsonl, line 1 is no record of an epoch (it holds no fields); it is passed over." in said
    assert "line 5 is no record of an epoch (the field epoch is missing)" in said
    assert said.count("passed over") == 6
    assert len(said) < 1000


def test_two_generations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where last.pt is damaged or gone the run goes on from the save before, says so, and never gives that one up for
    the damaged file."""
    with closing(begin(tmp_path, "x")) as run:
        for epoch in (1, 2, 3):
            run.save_last(state(epoch))
    last, older = tmp_path / "x" / "last.pt", tmp_path / "x" / "last-1.pt"
    assert [load_checkpoint(path)["epoch"] for path in (last, older)] == [3, 2]
    assert not os.path.samefile(last, older)

    damaged = bytearray(last.read_bytes())
    damaged[damaged.index(torch.ones(300).numpy().tobytes())] ^= 1
    for spoil in (lambda: last.write_bytes(damaged), lambda: last.write_bytes(b""), last.unlink):
        spoil()
        run, saved = resume_run(str(tmp_path / "x"), str(tmp_path), None, None)
        assert saved["epoch"] == 2
        said = capsys.readouterr().err
        assert "the run goes on from" in said
        assert "check the path" not in said
        run.about = {key: value for key, value in CONTENT.items() if key != "model"}
        run.save_last(state(3))
        assert [load_checkpoint(path)["epoch"] for path in (last, older)] == [3, 2]
        run.close()
    run, saved = resume_run(str(older), str(tmp_path), None, None)  # as asked
    assert (saved["epoch"], capsys.readouterr().err) == (2, "")
    run.about = {key: value for key, value in CONTENT.items() if key != "model"}
    run.save_last(state(2))
    assert [load_checkpoint(path)["epoch"] for path in (last, older)] == [2, 3]  # the newer one is not lost
    run.close()
    older.write_bytes(damaged)
    last.write_bytes(damaged)
    with pytest.raises(UserError, match=r"last\.pt is damaged, .*; and .*last-1\.pt is damaged, .*`pretrained=.*best"):
        resume_run(str(tmp_path / "x"), str(tmp_path), None, None)
    older.unlink()
    with pytest.raises(UserError, match=r"last\.pt is damaged"):
        resume_run(str(tmp_path / "x"), str(tmp_path), None, None)


def test_best_that_cannot_be_used(tmp_path: Path) -> None:
    """What is wrong with best.pt is known before it is recommended."""
    with closing(begin(tmp_path, "x")) as run:
        assert "There is no checkpoint" in str(run.what_is_wrong_with_best())
        run.save_best(CONTENT["model"], 1, 0.5)
        assert run.what_is_wrong_with_best() is None
        run.best.write_bytes(run.best.read_bytes()[:-50])
        assert "cannot be read" in str(run.what_is_wrong_with_best())


# Which run


def test_what_resume_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, a folder, or without a path the run of that name, and of no other, that was saved last, as its file says,
    not the clock of the file system; one that can go on before one that is finished."""
    for name, epoch in (("demo-bcmfnet", 1), ("demo-bcmfnet-2", 2), ("demo-bcmfnet-old", 3), ("demo-bcmfnet-10", 8)):
        with closing(begin(tmp_path, name)) as run:
            run.save_last(state(epoch))
    with closing(begin(tmp_path, "mine")) as run:
        run.save_last(state(4))
    for age, name in enumerate(("demo-bcmfnet-10", "demo-bcmfnet", "demo-bcmfnet-2")):
        os.utime(tmp_path / name / "last.pt", (5e9 - age, 5e9 - age))
    output = str(tmp_path)
    assert find_checkpoint("auto", output, None, "demo-bcmfnet") == tmp_path / "demo-bcmfnet-2" / "last.pt"
    assert find_checkpoint("auto", output, "demo-bcmfnet", "demo-bcmfnet") == tmp_path / "demo-bcmfnet" / "last.pt"
    assert find_checkpoint("auto", output, None, None) == tmp_path / "mine" / "last.pt"
    assert find_checkpoint(str(tmp_path / "mine"), output, None, "demo-bcmfnet") == tmp_path / "mine" / "last.pt"
    assert find_checkpoint("some/some.pt", output, None, "demo-bcmfnet") == Path("some/some.pt")
    monkeypatch.chdir(tmp_path / "mine")
    for here in (".", "last.pt", "../mine"):
        assert find_checkpoint(here, output, None, None).parent.name == "mine"
    with pytest.raises(UserError, match=r"no run to resume, .*demo-ddrnet_s"):
        find_checkpoint("auto", output, None, "demo-ddrnet_s")
    for name in ("demo-bcmfnet", "demo-bcmfnet-2"):
        (tmp_path / name / "last.pt").unlink()
    assert find_checkpoint("auto", output, None, "demo-bcmfnet") == tmp_path / "demo-bcmfnet-10" / "last.pt"


def test_runs_of_older_versions(tmp_path: Path) -> None:
    """Their files do not say when they were saved: the last number counts, as a number."""
    for name in ("demo-bcmfnet", "demo-bcmfnet-10", "demo-bcmfnet-2"):
        (tmp_path / name).mkdir()
        torch.save({"version": 1, **CONTENT, **state(1)}, tmp_path / name / "last.pt")
    assert find_checkpoint("auto", str(tmp_path), None, "demo-bcmfnet").parent.name == "demo-bcmfnet-10"


def test_resume_leaves_other_folders_alone(tmp_path: Path) -> None:
    """A path that is mistyped gets no lock of ours."""
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "photos", tmp_path / "nowhere", tmp_path / "photos" / "best.pt"):
        with pytest.raises(UserError, match=r"There is no checkpoint .*: check the path"):
            resume_run(str(path), str(tmp_path), None, None)
    assert os.listdir(tmp_path / "photos") == []


@pytest.mark.thorough
def test_stopped_at_any_moment() -> None:
    """Protects whole runs, with and without loading processes: killed, terminated or interrupted at random moments,
    they end as one that was never stopped, bit for bit. (`kills.py` does as many as asked for.)"""
    kills = [sys.executable, "-m", "harness.kills"]
    kills += ["--kills", "5", "--terminations", "3", "--interrupts", "2", "--seed", str(time.time_ns())]
    here = Path(__file__).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(here.parent)}  # not another one, installed
    done = subprocess.run(kills, capture_output=True, text=True, env=environment, cwd=here)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all equal to one that was not stopped") == 3
