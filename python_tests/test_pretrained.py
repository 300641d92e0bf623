"""Public checkpoints: every prefix and wrapper, what fits, the report, and refusals in a sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bcmf_ext.errors import UserError
from bcmf_ext.models import DDRNet, bcmfnet, ddrnet_s, load_pretrained

KEYS = Path(__file__).resolve().parents[2] / "shared" / "data" / "ddrnet23s_keys.txt"
State = dict[str, Tensor]


def drawn(shapes: dict[str, tuple[int, ...]]) -> State:
    """A state dict of random tensors."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.tensor(7) if name.endswith("num_batches_tracked") else torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def cityscapes() -> State:
    """The public Cityscapes checkpoint as its list of keys describes it, 346 tensors with the auxiliary head."""
    if not KEYS.exists():
        pytest.skip(f"the list of public keys, {KEYS.name}, is not here")
    lines = (line.split(" ", 1) for line in KEYS.read_text().splitlines())
    return drawn({name: tuple(map(int, re.findall(r"\d+", shape))) for name, shape in lines})


@pytest.fixture(scope="module")
def imagenet(cityscapes: State) -> State:
    """The public ImageNet classifier: the trunk, and three parts of its own."""
    trunk = {k: v for k, v in cityscapes.items() if k.split(".")[0] not in ("spp", "seghead_extra", "final_layer")}
    own = {"down5.0.weight": (256, 128, 3, 3), "last_layer.0.weight": (1024, 512, 1, 1), "linear.bias": (1000,)}
    return trunk | drawn(own)


@pytest.fixture(scope="module")
def net() -> DDRNet:
    """A DDRNet-s without auxiliary head: 333 tensors. Tests load into it what they check."""
    return ddrnet_s(aux_head=False)


def assert_loaded(model: DDRNet, state: State, names: list[str]) -> None:
    own = model.state_dict()
    assert all(torch.equal(own[name], state[name]) for name in names)


# What fits


def test_cityscapes_checkpoint(cityscapes: State, tmp_path: Path) -> None:
    """All 346 tensors load into ddrnet_s, 333 without auxiliary head, to the last bit."""
    torch.save(cityscapes, tmp_path / "c.pth")
    for aux_head, count in ((True, 346), (False, 333)):
        model = ddrnet_s(aux_head=aux_head)
        report = load_pretrained(model, tmp_path / "c.pth")
        assert report.matched == list(model.state_dict())
        assert (len(report.matched), report.missing, report.other_shape) == (count, [], {})
        assert len(report.unexpected) == 346 - count
        assert_loaded(model, cityscapes, report.matched)


@pytest.mark.parametrize(("build", "missing"), [(ddrnet_s, 79), (bcmfnet, 73)])
def test_imagenet_checkpoint(build: Any, missing: int, imagenet: State, tmp_path: Path) -> None:
    """Of the ImageNet classifier 254 tensors fit both networks; context module and head are missing and stay."""
    torch.save(imagenet, tmp_path / "i.pth")
    model = build(aux_head=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_pretrained(model, tmp_path / "i.pth")
    assert (len(report.matched), len(report.missing)) == (254, missing)
    assert report.unexpected == ["down5.0.weight", "last_layer.0.weight", "linear.bias"]
    assert_loaded(model, imagenet, report.matched)
    assert_loaded(model, before, report.missing)


def test_ddrnet_into_bcmfnet(cityscapes: State, tmp_path: Path) -> None:
    """A DDRNet fills BCMFNet but for LMFM's compression; a head of another class count is "other shape" and stays."""
    torch.save(cityscapes, tmp_path / "c.pth")
    model = bcmfnet(11, aux_head=False)
    head = model.final_layer.conv2.weight.clone()
    report = load_pretrained(model, tmp_path / "c.pth")
    assert report.missing == []
    assert {name.rsplit(".", 2)[0] for name in report.other_shape} == {"spp.compression", "final_layer"}
    assert report.other_shape["final_layer.conv2.weight"] == ((19, 64, 1, 1), (11, 64, 1, 1))
    assert {name.split(".")[0] for name in report.unexpected} == {"spp", "seghead_extra"}
    assert torch.equal(model.final_layer.conv2.weight, head)


# Formats


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module.model.", "_orig_mod.module.model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "ema"])
def test_prefixes_and_wrappers(net: DDRNet, imagenet: State, tmp_path: Path, prefix: str, wrapper: str | None) -> None:
    """Every prefix, stacked too, under every wrapper: a loader with strict=False alone would load nothing, silently."""
    state = {prefix + name: tensor for name, tensor in imagenet.items()}
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "x.pth")
    report = load_pretrained(net, tmp_path / "x.pth")
    assert len(report.matched) == 254
    assert_loaded(net, imagenet, report.matched)


@pytest.mark.parametrize("numpy_1", [False, True])
def test_hrnet_family(net: DDRNet, cityscapes: State, tmp_path: Path, numpy_1: bool) -> None:
    """HRNet's trainers save a wrapper module with its loss, and their best score as a NumPy scalar, which
    weights_only=True refuses unless told; NumPy 1 pickled it under another name."""
    file = tmp_path / "best.pth.tar"
    state = {f"model.{name}": tensor for name, tensor in cityscapes.items()} | {"loss.criterion.weight": torch.ones(19)}
    checkpoint = {"epoch": 483, "best_mIoU": np.float64(0.778), "state_dict": state, "optimizer": {}}
    torch.save(checkpoint, file, _use_new_zipfile_serialization=False)
    if numpy_1:
        file.write_bytes(file.read_bytes().replace(b"numpy._core.", b"numpy.core."))
    report = load_pretrained(net, file)
    assert len(report.matched) == 333
    assert "loss.criterion.weight" in report.unexpected


def test_averaged_weights_come_first(net: DDRNet, imagenet: State, tmp_path: Path) -> None:
    """Of a checkpoint with both, the averaged weights are taken; an empty ``ema`` is passed by."""
    doubled = {name: 2 * tensor for name, tensor in imagenet.items()}
    averaged = {"n_averaged": torch.tensor(3)} | {f"module.{name}": tensor for name, tensor in doubled.items()}
    for ema, expected in ((averaged, doubled), (None, imagenet)):
        torch.save({"model": imagenet, "ema": ema, "epoch": 3}, tmp_path / "x.pt")
        assert_loaded(net, expected, load_pretrained(net, tmp_path / "x.pt").matched)


def test_half_precision(net: DDRNet, imagenet: State, tmp_path: Path) -> None:
    """A checkpoint in fp16 loads into the model's fp32."""
    half = {name: t.half() if t.is_floating_point() else t for name, t in imagenet.items()}
    torch.save(half, tmp_path / "x.pth")
    report = load_pretrained(net, tmp_path / "x.pth")
    assert len(report.matched) == 254
    assert net.conv1[0].weight.dtype == torch.float32
    assert torch.equal(net.conv1[0].weight, half["conv1.0.weight"].float())


def test_checkpoint_without_counters(net: DDRNet, cityscapes: State, tmp_path: Path) -> None:
    """Old PyTorch wrote no num_batches_tracked; nothing depends on it, so nothing is reported as missing."""
    old = {name: tensor for name, tensor in cityscapes.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "x.pth")
    report = load_pretrained(net, tmp_path / "x.pth")
    assert (report.missing, report.other_shape) == ([], {})


# The report


def test_report(cityscapes: State, tmp_path: Path) -> None:
    """What the commands print: counts first, then a line for each kind, by groups, and nothing on empty kinds."""
    torch.save(cityscapes, tmp_path / "c.pth")
    assert str(load_pretrained(ddrnet_s(), tmp_path / "c.pth")) == (
        "c.pth: 346 of the model's 346 tensors matched, 0 missing, 0 of other shape; 0 unexpected"
    )
    torch.save({k: v for k, v in cityscapes.items() if k != "layer5_.0.conv3.weight"}, tmp_path / "c.pth")
    assert str(load_pretrained(bcmfnet(11), tmp_path / "c.pth")).splitlines() == [
        "c.pth: 329 of the model's 340 tensors matched, 1 missing, 10 of other shape; 6 unexpected",
        "  missing, stay as initialised: layer5_.0.conv3.weight",
        "  other shape, stay as initialised: spp.compression (6), seghead_extra.conv2 (2), final_layer.conv2 (2)",
        "    for example spp.compression.2.weight: (128, 640, 1, 1) in the file, (128, 512, 1, 1) in the model",
        "  unexpected, left out: spp.scale0 (6)",
    ]


def test_report_stays_short(net: DDRNet, imagenet: State, tmp_path: Path) -> None:
    """Hundreds of stray tensors do not become hundreds of lines or a line of hundreds of names."""
    torch.save(imagenet | {f"stray{i}.weight": torch.ones(1) for i in range(300)}, tmp_path / "x.pth")
    text = str(load_pretrained(net, tmp_path / "x.pth"))
    assert "and 295 more groups" in text
    assert len(text) < 700


# Refusals


def test_nothing_matches(net: DDRNet, tmp_path: Path) -> None:
    """A checkpoint of another network is refused, with a few names of both sides, and leaves the model alone. A ResNet
    shares names with DDRNet, but no shape except that of its counters, and those must not pass for a match."""
    resnet = drawn(
        {
            "conv1.weight": (64, 3, 7, 7),
            "layer1.0.conv1.weight": (64, 64, 3, 3),
            "layer1.0.bn1.weight": (64,),
            "layer1.0.bn1.running_mean": (64,),
            "layer1.0.bn1.num_batches_tracked": (),
        }
    )
    torch.save(resnet, tmp_path / "resnet.pth")
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    both_sides = r"resnet\.pth fits.*has conv1\.weight \(64, 3, 7, 7\), .*has conv1\.0\.weight \(32, 3, 3, 3\), "
    with pytest.raises(UserError, match=both_sides):
        load_pretrained(net, tmp_path / "resnet.pth")
    assert_loaded(net, before, list(before))


def write_truncated(file: Path) -> None:
    torch.save({"conv1.0.weight": torch.ones(32, 3, 3, 3)}, file)
    file.write_bytes(file.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda file: None, "There is no checkpoint file"),
        (lambda file: file.mkdir(), "There is no checkpoint file"),
        (lambda file: file.write_bytes(b""), "damaged or of another format"),
        (lambda file: file.write_text("<!DOCTYPE html>"), "damaged or of another format"),
        (lambda file: file.write_bytes(bytes(range(256))), "damaged or of another format"),
        (write_truncated, "damaged or of another format"),
        (lambda file: torch.save(torch.ones(3), file), "no tensors by name"),
        (lambda file: torch.save({"epoch": 3, "state_dict": {}}, file), "no tensors by name"),
        (lambda file: torch.save({"model": Path("x")}, file), r"Python object \(pathlib\S*\.PosixPath\).*run code"),
    ],
    ids=["missing", "folder", "empty", "web page", "noise", "truncated", "tensor", "no tensors", "objects"],
)
def test_not_a_checkpoint(net: DDRNet, tmp_path: Path, write: Any, match: str) -> None:
    """A file that is missing, unreadable, no checkpoint, or would have to run code is refused in one sentence with its
    name."""
    write(tmp_path / "x.pth")
    with pytest.raises(UserError, match=match) as caught:
        load_pretrained(net, tmp_path / "x.pth")
    assert "x.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
