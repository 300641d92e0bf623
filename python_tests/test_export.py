"""Exported files: they run without bcmf_ext, at any size, and compute what the network does."""

from __future__ import annotations

import builtins
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness.tiny import TinyNet
from test_inference import picture, trained, write_run
from torch import nn

from bcmf_ext import export
from bcmf_ext.errors import UserError
from bcmf_ext.files import mark_of
from bcmf_ext.inference import Predictor
from bcmf_ext.models import NETWORKS
from bcmf_ext.nn import SRM

needs_onnx = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="pip install '.[export]'"
)
formats = pytest.mark.parametrize("form", [pytest.param("onnx", marks=needs_onnx), "torch-export"])

# Runs a file on images.npy in a process that cannot import bcmf_ext.
ELSEWHERE = """
import sys
sys.modules["bcmf_ext"] = None
import numpy as np
path, images = sys.argv[1], np.load("images.npy")
if path.endswith(".onnx"):
    import onnxruntime
    result = onnxruntime.InferenceSession(path).run(None, {"images": images})[0]
else:
    import torch
    result = torch.export.load(path).module()(torch.from_numpy(images)).numpy()
np.save("result.npy", result)
"""


def run_elsewhere(path: Path, images: torch.Tensor, folder: Path) -> np.ndarray:
    np.save(folder / "images.npy", images.numpy())
    subprocess.run([sys.executable, "-c", ELSEWHERE, str(path)], cwd=folder, check=True)
    return np.load(folder / "result.npy")


@pytest.mark.parametrize(
    ("form", "name"),
    [
        pytest.param("onnx", "bcmfnet", marks=needs_onnx),
        pytest.param("onnx", "ddrnet_s", marks=[needs_onnx, pytest.mark.thorough]),
        pytest.param("onnx", "scr_ddrnet_s", marks=[needs_onnx, pytest.mark.thorough]),
        pytest.param("onnx", "scr_resnet18", marks=[needs_onnx, pytest.mark.thorough]),
        pytest.param("torch-export", "bcmfnet", marks=pytest.mark.thorough),
        pytest.param("torch-export", "scr_resnet18", marks=pytest.mark.thorough),
    ],
)
def test_it_runs_without_the_package(tmp_path: Path, form: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Protects deployment: a process without bcmf_ext gets the Predictor's labels, for two images of an odd size."""
    folder = write_run(tmp_path / "run", name, trained(name))
    export.main(["--checkpoint", str(folder), "--format", form])
    path = folder / f"best{export.ENDINGS[form]}"
    # The kernels of an SRM round otherwise.
    assert re.search(rf"{path}: labels are equal at (100\.0000|99\.99\d\d)% of the pixels", capsys.readouterr().out)
    images = picture(101, 139, batch=2)
    labels = run_elsewhere(path, images, tmp_path)
    assert labels.dtype == np.uint8
    expected = Predictor(folder, "cpu").labels(images).numpy()
    assert (labels == expected).mean() >= 0.9999


@formats
def test_logits(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects `--logits`, `--output` and what the file tells of itself."""
    monkeypatch.setitem(NETWORKS, "bcmfnet", TinyNet)
    torch.manual_seed(0)
    folder = write_run(tmp_path / "run", "bcmfnet", TinyNet(11))
    path = tmp_path / f"net{export.ENDINGS[form]}"
    export.main(["--checkpoint", str(folder / "best.pt"), "--format", form, "--output", str(path), "--logits"])
    images = picture(64, 96)
    logits = torch.from_numpy(run_elsewhere(path, images, tmp_path))
    torch.testing.assert_close(logits, Predictor(folder, "cpu").logits(images), rtol=1e-4, atol=1e-5)
    if form == "onnx":
        import onnx

        model = onnx.load(path)
        sides = [[s.dim_param or s.dim_value for s in v.type.tensor_type.shape.dim] for v in model.graph.input]
        assert sides == [["N", 3, "H", "W"]]
        assert model.graph.output[0].type.tensor_type.shape.dim[0].dim_param == "N"
        (entry,) = model.metadata_props
        classes = json.loads(entry.value)
    else:
        extra = {"classes.json": ""}
        torch.export.load(path, extra_files=extra)
        classes = json.loads(extra["classes.json"])
    assert classes == [f"class {index}" for index in range(11)]


class Refined(nn.Module):
    """An SRM between an image and half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.srm = SRM(3, 4, impl="torch")  # as export.py makes networks
        self.smaller = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        nn.init.normal_(self.srm.offset.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = images.float() / 255
        return self.srm(images, self.smaller(images))


@needs_onnx
def test_grid_sample() -> None:
    """Protects TensorRT's users: in opset 20 GridSample's mode is called linear, and TensorRT up to 11.1 then takes the
    nearest pixel without a word."""
    import onnx

    torch.manual_seed(0)
    network = Refined().eval()
    file, run = export.to_onnx(export.trace(network), "logits", [])
    model = onnx.load_from_string(file)
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [18]
    (node,) = (node for node in model.graph.node if node.op_type == "GridSample")
    values = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
    assert (values["mode"], values["padding_mode"], values["align_corners"]) == (b"bilinear", b"border", 0)
    images = picture(33, 46, batch=2)
    torch.testing.assert_close(run(images), network(images), rtol=1e-4, atol=1e-5)


@needs_onnx
@pytest.mark.thorough
@pytest.mark.parametrize("name", ["scr_ddrnet_s", "scr_resnet18"])
def test_refined_networks(tmp_path: Path, name: str) -> None:
    """Protects their logits: they are the Predictor's within 1e-5 of the largest, at sizes that were not traced."""
    folder = write_run(tmp_path / "run", name, trained(name))
    export.main(["--checkpoint", str(folder), "--format", "onnx", "--logits"])
    for size in ((97, 130), (33, 45)):
        images = picture(*size, batch=2)
        logits = torch.from_numpy(run_elsewhere(folder / "best.onnx", images, tmp_path))
        expected = Predictor(folder, "cpu").logits(images)
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("logits", [False, True])
def test_another_function_is_refused(tmp_path: Path, logits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the check: a file that computes something else is an error, not a figure among others."""
    monkeypatch.setitem(NETWORKS, "bcmfnet", TinyNet)
    torch.manual_seed(0)
    saved = export.read_checkpoint(write_run(tmp_path, "bcmfnet", TinyNet(11)))
    network = export.ExportedNetwork(TinyNet(11), saved, logits).eval()
    assert "100.0000%" in export.compare(network, network, tmp_path) or logits
    wrong = (lambda x: 1.01 * network(x)) if logits else (lambda x: network(x.flip(3)))
    nothing = lambda x: network(x) * math.nan  # noqa: E731
    for other in (wrong, nothing):
        with pytest.raises(UserError, match="does not compute what the network does"):
            export.compare(network, other, tmp_path)
    flags = ["--checkpoint", str(tmp_path), "--format", "torch-export", *(["--logits"] if logits else [])]
    export.main(flags)
    good = (tmp_path / "best.pt2").read_bytes()
    monkeypatch.setattr(export, "to_program", lambda *_: (b"something else", wrong))
    with pytest.raises(UserError, match=r"so nothing was written"):
        export.main(flags)
    assert (tmp_path / "best.pt2").read_bytes() == good


def test_logits_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from labels that are equal because both are class 0 everywhere: finite weights may overflow."""
    monkeypatch.setitem(NETWORKS, "bcmfnet", TinyNet)
    network = TinyNet(11)
    network.final_layer.weight.data.fill_(3e38)
    folder = write_run(tmp_path, "bcmfnet", network)
    with pytest.raises(UserError, match="computes NaN or infinite logits"):
        export.main(["--checkpoint", str(folder), "--format", "torch-export"])


@formats
def test_only_its_own_files_are_replaced(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects a user's file of that name: before the network is traced it is refused, but for `--overwrite`; what this
    command has made it replaces."""
    monkeypatch.setitem(NETWORKS, "bcmfnet", TinyNet)
    folder = write_run(tmp_path, "bcmfnet", TinyNet(11))
    path, flags = folder / f"best{export.ENDINGS[form]}", ["--checkpoint", str(folder), "--format", form]
    for _ in range(2):
        export.main(flags)
    assert mark_of(path) == "bcmf_ext.export"
    path.write_bytes(b"mine")
    with monkeypatch.context() as patch:
        patch.setattr(export, "trace", None)
        with pytest.raises(UserError, match=r"best\..* is there already, .*another --output, or .*--overwrite"):
            export.main(flags)
    assert path.read_bytes() == b"mine"
    export.main([*flags, "--overwrite"])
    assert mark_of(path) == "bcmf_ext.export"


def test_what_cannot_be_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong ending, no checkpoint, packages that are missing: sentences, before any work."""
    folder = write_run(tmp_path, "bcmfnet", trained("bcmfnet"))
    with pytest.raises(UserError, match=r"net\.onnx is a file of --format torch-export, .* end in \.pt2"):
        export.main(["--checkpoint", str(folder), "--format", "torch-export", "--output", "net.onnx"])
    with pytest.raises(UserError, match="There is no checkpoint"):
        export.main(["--checkpoint", str(tmp_path / "none"), "--format", "torch-export"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else builtins)
    with pytest.raises(UserError, match=r"--format onnx needs onnxscript: pip install 'bcmf_ext\[export\]'"):
        export.main(["--checkpoint", str(folder), "--format", "onnx"])
