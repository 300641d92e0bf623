"""Checkpoints: whole ones come back, and each kind of other file is a sentence."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bcmf_ext import checkpoint
from bcmf_ext.checkpoint import (
    ABOUT,
    PROGRESS,
    RECORD,
    VERSION,
    load_checkpoint,
    save_checkpoint,
    what_is_wrong,
)
from bcmf_ext.config import make_config
from bcmf_ext.errors import Damaged, FileError, UserError

CONTENT: dict[str, Any] = {
    "version": VERSION,
    "config": asdict(make_config({})),
    "classes": ["a", "b"],
    "palette": torch.zeros(2, 3, dtype=torch.uint8),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.2, 0.2, 0.2),
    "align_corners": False,
    "model": {"w": torch.ones(300), "count": torch.tensor(3)},
}
STATE: dict[str, Any] = {
    "train_images": 9,
    "optimizer": {
        "state": {0: {"momentum_buffer": torch.zeros(300)}},
        "param_groups": [{"lr": 0.1, "initial_lr": 0.1, "params": [0]}],
    },
    "scheduler": {"last_epoch": 6, "_step_count": 7, "base_lrs": [0.1], "_last_lr": [0.1]},
    "scaler": {},
    "epoch": 1,
    "step": 2,
    "loss_sums": {"total": 1.5},
    "seconds": 0.5,
    "best_miou": 0.3,
    "best_epoch": 0,
}
RECORDED: dict[str, Any] = {
    "epoch": 1,
    "step": 4,
    "lr": 0.1,
    "loss": {"total": 1.5, "ce": 1.0},
    "seconds": 0.5,
    "images_per_second": 16.0,
    "miou": 0.4,
    "iou": {"a": 0.4, "b": None},
}


def test_runs_no_code(tmp_path: Path) -> None:
    """A checkpoint from a stranger cannot run code when it is loaded."""

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "trapped"),)

    torch.save({**CONTENT, "extra": Trap()}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(tmp_path / "best.pt")
    assert not (tmp_path / "trapped").exists()


def test_ctrl_c_while_saving(tmp_path: Path) -> None:
    """Ctrl-C inside torch.save is Ctrl-C, not an error of torch's writer; the old file stays."""

    class Pressed:
        def __reduce__(self) -> tuple[Any, ...]:
            os.kill(os.getpid(), signal.SIGINT)
            return int, ()

    save_checkpoint(tmp_path / "last.pt", CONTENT)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path / "last.pt", {**CONTENT, "classes": ["c", "d"], "extra": Pressed()})
    assert load_checkpoint(tmp_path / "last.pt")["classes"] == ["a", "b"]
    assert os.listdir(tmp_path) == ["last.pt"]


def test_disk_full_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So is a full disk, whose error torch's writer would hide."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"last\.pt cannot be written \(No space left on device\)"):
        save_checkpoint(tmp_path / "last.pt", CONTENT)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    """Each kind of wrong file gets its own sentence, with its path."""
    good, path = tmp_path / "good.pt", tmp_path / "a file.pt"
    save_checkpoint(good, CONTENT)
    with pytest.raises(FileError, match=r"There is no checkpoint .*a file\.pt"):
        load_checkpoint(path)
    for damaged in (b"", b"no checkpoint at all", b"a\nb\nc\n", b"hello", good.read_bytes()[:-100]):
        path.write_bytes(damaged)
        with pytest.raises(Damaged, match=r"a file\.pt cannot be read"):
            load_checkpoint(path)
    for other in ({"state_dict": {}}, [1, 2]):
        torch.save(other, path)
        with pytest.raises(UserError, match="`pretrained`"):
            load_checkpoint(path)
    torch.save({**CONTENT, "version": checkpoint.VERSION + 1}, path)
    with pytest.raises(UserError, match="newer"):
        load_checkpoint(path)
    os.mkfifo(tmp_path / "fifo.pt")
    with pytest.raises(UserError, match="There is no checkpoint"):
        load_checkpoint(tmp_path / "fifo.pt")


def test_flipped_bytes(tmp_path: Path) -> None:
    """Bytes of the weights that are not those that were written: torch.load does not notice, and the network would
    predict something."""
    save_checkpoint(tmp_path / "best.pt", CONTENT)
    written = (tmp_path / "best.pt").read_bytes()
    weights = written.index(torch.ones(300).numpy().tobytes())
    for seed in range(20):
        odd, places = bytearray(written), random.Random(seed).sample(range(1200), 20)
        for place in places:
            odd[weights + place] ^= 0x10
        (tmp_path / "best.pt").write_bytes(odd)
        with pytest.raises(Damaged, match=r"the bytes of .* are not those that were written"):
            load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_weights_that_are_not_finite(tmp_path: Path, odd: float) -> None:
    """A network of NaN gives class 0 everywhere: every command that reads the file refuses it."""
    save_checkpoint(tmp_path / "best.pt", {**CONTENT, "model": {"w": torch.tensor([1.0, odd]), "v": torch.ones(1)}})
    with pytest.raises(UserError, match=r"The weights in .*best\.pt are not finite \(w\)"):
        load_checkpoint(tmp_path / "best.pt")


# What fields may hold

ODD: tuple[Any, ...] = (
    *(None, True, -2, 2**70, 10**5000, 1.5, math.nan, -math.inf, "x", b"x", [], [None], {}, {1: 2}, {"a": None}, ()),
    *(
        torch.zeros(2),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(1).expand(300),
        torch.zeros(300).to(torch.float8_e5m2),
        [1, 2, 3],
        ["a", 1],
        {"total": "x"},
    ),
)


@pytest.mark.parametrize("name", [*ABOUT, *PROGRESS])
def test_odd_fields(tmp_path: Path, name: str) -> None:
    """Whatever another program wrote into a field: it is what it must be, or the sentence names file and field."""
    path, whole, field = tmp_path / "last.pt", {**CONTENT, **STATE}, (ABOUT | PROGRESS)[name]
    save_checkpoint(path, whole)
    assert load_checkpoint(path).keys() == whole.keys()
    for odd in ODD:
        torch.save({**whole, name: odd}, path)
        if field.holds(odd) and name != "config":
            assert name in load_checkpoint(path)
            continue
        with pytest.raises(UserError, match=r"last\.pt ") as error:
            load_checkpoint(path)
        said = str(error.value)
        assert f"the field {name} is " in said or name == "config" or "cannot be read" in said  # endless numbers
        assert len(said) < 400
    assert sum(map(field.holds, ODD)) < len(ODD) / 2


@pytest.mark.parametrize("name", [*ABOUT, *PROGRESS])
def test_missing_fields(tmp_path: Path, name: str) -> None:
    """A field that is not there, too, but for those that older versions had not."""
    whole = {**CONTENT, **STATE}
    torch.save({key: value for key, value in whole.items() if key != name}, tmp_path / "last.pt")
    if name == "optimizer" or (ABOUT | PROGRESS)[name].optional:  # without an optimiser it is a best.pt
        load_checkpoint(tmp_path / "last.pt")
        return
    with pytest.raises(UserError, match=f"the field {name} is missing|is not a checkpoint of this trainer"):
        load_checkpoint(tmp_path / "last.pt")


def test_fields_that_contradict_each_other(tmp_path: Path) -> None:
    """As many colours as classes."""
    save_checkpoint(tmp_path / "best.pt", {**CONTENT, "palette": torch.zeros(3, 3, dtype=torch.uint8)})
    with pytest.raises(UserError, match="the field palette has 3 colours for 2 classes"):
        load_checkpoint(tmp_path / "best.pt")


@pytest.mark.parametrize("name", list(RECORD))
def test_odd_records(name: str) -> None:
    """The same of a line of the log."""
    assert what_is_wrong(RECORDED, RECORD) is None
    refused = [what_is_wrong({**RECORDED, name: odd}, RECORD) for odd in ODD]
    assert sum(wrong is not None for wrong in refused) > len(ODD) // 2
    assert all(wrong is None or wrong.startswith(f"the field {name} is ") for wrong in refused)
    for other in (None, 3, [], "x"):
        assert what_is_wrong(other, RECORD) == "it holds no fields"


@pytest.mark.parametrize("tensor", [torch.zeros(1).expand(300), torch.zeros(300).to(torch.float8_e5m2)])
def test_tensors_that_cannot_be_computed_with(tmp_path: Path, tensor: torch.Tensor) -> None:
    """Weights and momentum in memory that they share, or of a dtype without arithmetic, would end in a traceback."""
    optimizer = {**STATE["optimizer"], "state": {0: {"momentum_buffer": tensor}}}
    for change, field in (({"model": {"w": tensor}}, "model"), ({"optimizer": optimizer}, "optimizer")):
        torch.save({**CONTENT, **STATE, **change}, tmp_path / "last.pt")
        with pytest.raises(UserError, match=rf"In .*last\.pt the field {field} is "):
            load_checkpoint(tmp_path / "last.pt")
