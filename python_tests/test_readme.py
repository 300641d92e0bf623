"""The commands of README and docs/training.md, typed twice in a row: nothing of the user's is lost, and nothing of ours
is in the way."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.tiny import TinyNet, one_thread, write_folder  # noqa: F401
from PIL import Image

from bcmf_ext.data import DATASETS
from bcmf_ext.models import NETWORKS

ROOT = Path(__file__).parents[1]
DOCUMENTS = ROOT / "README.md", ROOT / "docs" / "training.md"
COMMAND = re.compile(r"python -m bcmf_ext\.(\w+)((?: [^`#\n&]*)?)")


def write_camvid(root: Path) -> None:
    for split in ("train", "val"):
        for index in range(3):
            label = np.repeat(np.arange(12, dtype=np.uint8), 8)[None].repeat(64, 0)
            for folder, pixels in ((split, np.stack([20 * label] * 3, -1)), (f"{split}annot", label)):
                (root / folder).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(root / folder / f"{split}{index}.png")


def write_cityscapes(root: Path) -> None:
    for split in ("train", "val"):
        for index in range(3):
            label = np.repeat(np.arange(32, dtype=np.uint8), 4)[None].repeat(64, 0)
            for kind, ending, pixels in (
                ("leftImg8bit", "leftImg8bit", np.stack([7 * label] * 3, -1)),
                ("gtFine", "gtFine_labelIds", label),
            ):
                city = root / kind / split / "bonn"
                city.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(city / f"bonn_{index:06}_000019_{ending}.png")


@pytest.mark.skipif(not all(map(Path.exists, DOCUMENTS)), reason="the documents are not there")
@pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="pip install '.[export]'")
def test_every_command_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On drawn data, with a tiny network: the commands are those of the text, their folders have the names there."""
    monkeypatch.chdir(tmp_path)
    for name in NETWORKS:
        monkeypatch.setitem(NETWORKS, name, TinyNet)
    for dataset in DATASETS.values():
        monkeypatch.setattr(dataset, "recipe", replace(dataset.recipe, epochs=1, batch_size=2, crop_size=(64, 64)))
    write_camvid(Path("CamVid"))
    for name in ("cityscapes", "DIR"):
        write_cityscapes(Path(name))
    write_folder(Path("mine"))
    Path("more").mkdir()
    for photo in ("street.jpg", "more/lane.png"):
        Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(photo)
    for weights in ("DDRNet23s_imagenet.pth", "resnet18-f37072fd.pth"):
        torch.save({"state_dict": TinyNet(19).state_dict()}, weights)
    theirs = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}

    commands = dict.fromkeys(command for document in DOCUMENTS for command in COMMAND.findall(document.read_text()))
    for name, arguments in commands:
        flags = shlex.split(arguments)
        if name == "train" and not {"--check-data", "--resume"} & set(flags):
            flags += ["--device", "cpu", "--workers", "0"]
        for _ in range(2):
            importlib.import_module(f"bcmf_ext.{name}").main(flags)
    assert {name for name, _ in commands} == {"train", "evaluate", "predict", "export", "info"}
    assert len(commands) >= 9
    assert {path: path.read_bytes() for path in theirs} == theirs
    assert len(list(Path("runs").glob("camvid-bcmfnet*"))) == 2
