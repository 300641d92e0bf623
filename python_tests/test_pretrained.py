"""Public checkpoints: every prefix and wrapper, what fits, the report, and refusals in a sentence."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness.files import DDRNET_KEYS
from torch import Tensor, nn

from bcmf_ext.errors import UserError
from bcmf_ext.models import DDRNet, bcmfnet, ddrnet_s, load_pretrained, scr_ddrnet_s, scr_resnet18

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
    lines = (line.split(" ", 1) for line in DDRNET_KEYS.read_text().splitlines())
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


def tiny() -> nn.Module:
    """A network of seven tensors, for what does not depend on which one it is."""
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def drawn_like(model: nn.Module) -> State:
    return drawn({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def assert_equal(model: nn.Module, state: State) -> None:
    own = model.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)


def safetensors(state: State) -> bytes:
    """A file of the format, as its description has it."""
    codes = {
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float64: "F64",
        torch.int64: "I64",
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, end = [], 0
    for name, tensor in state.items():
        data.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        offsets = [end, end := end + len(data[-1])]
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data)


def rezipped(data: bytes, change: Any) -> bytes:
    """A zip of torch.save with another pickle in it, and the sums of that."""
    new = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(new, "w") as archive:
        for name in old.namelist():
            archive.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return new.getvalue()


def as_numpy_1(pickled: bytes) -> bytes:
    return pickled.replace(b"numpy._core.", b"numpy.core.")


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


def test_bcmfnet_into_scr_ddrnet(tmp_path: Path) -> None:
    """A trained BCMFNet fills scr_ddrnet_s but for what that adds: 26 tensors, and three batch norms' counters."""
    state = drawn_like(bcmfnet(19))
    torch.save(state, tmp_path / "b.pth")
    model = scr_ddrnet_s()
    report = load_pretrained(model, tmp_path / "b.pth")
    assert report.matched == [name for name in model.state_dict() if name in state]
    assert not report.other_shape
    assert not report.unexpected
    assert len([name for name in report.missing if not name.endswith("num_batches_tracked")]) == 26
    assert {name.split(".")[0] for name in report.missing} == {"srm", "crm", "crm_gain"}
    assert_loaded(model, state, report.matched)


@pytest.mark.parametrize("counters", [True, False])
def test_imagenet_resnet18(counters: bool, tmp_path: Path) -> None:
    """torchvision's ResNet-18 fills the trunk of scr_resnet18: 120 tensors, 20 of them counters that its file of 2016
    does not have; its classifier is left out."""
    model = scr_resnet18()
    trunk = {
        name: tuple(t.shape) for name, t in model.state_dict().items() if name.startswith(("conv1", "bn1", "layer"))
    }
    state = drawn({**trunk, "fc.weight": (1000, 512), "fc.bias": (1000,)})
    state = {name: t for name, t in state.items() if counters or not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "resnet18.pth")
    report = load_pretrained(model, tmp_path / "resnet18.pth")
    assert len(report.matched) == (120 if counters else 100)
    assert report.unexpected == ["fc.weight", "fc.bias"]
    assert not trunk.keys() & report.missing
    assert_loaded(model, state, report.matched)


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


@pytest.mark.parametrize(
    "wrapper",
    [
        *("state_dict", "model_state_dict", "model_state", "model", "module", "network_weights", "network", "net"),
        *("params", "weights", "weight"),
        *("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema_net", "params_ema", "ema"),
    ],
)
def test_wrappers_of_public_trainers(wrapper: str, tmp_path: Path) -> None:
    """Each name under which a public trainer keeps its weights, beside the tensors that trainers keep next to them."""
    state = tiny().state_dict()
    torch.save({"rng_state": torch.get_rng_state(), "epoch": 3, wrapper: state}, tmp_path / "x.pth")
    assert load_pretrained(tiny(), tmp_path / "x.pth").matched == list(state)


@pytest.mark.parametrize(
    ("averaged", "raw"),
    [("state_dict_ema", "state_dict"), ("model_ema", "model"), ("ema_net", "net"), ("params_ema", "params")],
)
def test_averaged_weights_of_public_trainers(averaged: str, raw: str, tmp_path: Path) -> None:
    """timm, torchvision, SuperGradients and BasicSR keep both, and the averaged weights are the better start."""
    model, state = tiny(), drawn_like(tiny())
    torch.save({raw: {k: 2 * v for k, v in state.items()}, averaged: state}, tmp_path / "x.pth")
    load_pretrained(model, tmp_path / "x.pth")
    assert_equal(model, state)


def test_mmengine_swaps_the_averaged_weights(tmp_path: Path) -> None:
    """MMEngine saves the averaged weights under state_dict and the others under ema_state_dict, unlike its names."""
    model, state = tiny(), drawn_like(tiny())
    raw = {f"module.{name}": 2 * tensor for name, tensor in state.items()}
    checkpoint = {"meta": {"mmengine_version": "0.10.7"}, "ema_state_dict": raw, "state_dict": state}
    torch.save(checkpoint, tmp_path / "x.pth")
    load_pretrained(model, tmp_path / "x.pth")
    assert_equal(model, state)


def test_wrapper_that_does_not_fit_is_passed_over(tmp_path: Path) -> None:
    """Under a known name there may be something else, such as the averaging's own state or a teacher."""
    state = drawn_like(tiny())
    torch.save(
        {"ema": {"decay": torch.tensor(0.9)}, "state_dict": {"a": torch.ones(2)}, "model": state}, tmp_path / "x"
    )
    assert load_pretrained(tiny(), tmp_path / "x").matched == list(state)


def test_unknown_wrapper_is_named(tmp_path: Path) -> None:
    """Weights under a name that no rule knows are found and named, with the line that makes a readable file of them."""
    torch.save({"my_net": tiny().state_dict(), "rng_state": torch.get_rng_state()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"under 'my_net'.*checkpoint\['my_net'\]"):
        load_pretrained(tiny(), tmp_path / "x.pth")


@pytest.mark.parametrize(
    "part", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod.module"]
)
def test_wrapped_parts(net: DDRNet, imagenet: State, tmp_path: Path, part: str) -> None:
    """Compiling, sharding or checkpointing a part of a network puts the wrapper's name inside the names."""
    state = {re.sub(r"^(layer\d_?)\.0\.", rf"\1.{part}.0.", name): tensor for name, tensor in imagenet.items()}
    assert sum(part in name for name in state) > 100
    torch.save(state, tmp_path / "x.pth")
    report = load_pretrained(net, tmp_path / "x.pth")
    assert len(report.matched) == 254
    assert_loaded(net, imagenet, report.matched)


def test_wrapped_model(tmp_path: Path) -> None:
    """A model that is itself wrapped, such as a compiled one, gets the weights of a bare one, and of its like."""
    state = drawn_like(tiny())
    for names in (state, {f"_orig_mod.{name}": tensor for name, tensor in state.items()}):
        torch.save(names, tmp_path / "x.pth")
        model = tiny()
        load_pretrained(nn.ModuleDict({"_orig_mod": model}), tmp_path / "x.pth")
        assert_equal(model, state)


def test_attribute_of_a_trainer(net: DDRNet, imagenet: State, tmp_path: Path) -> None:
    """A training module may call the network what it likes; that a loss lies beside it does not matter."""
    state = {f"model.backbone.{name}": tensor for name, tensor in imagenet.items()} | {"loss.weight": torch.ones(19)}
    torch.save({"state_dict": state}, tmp_path / "x.ckpt")
    report = load_pretrained(net, tmp_path / "x.ckpt")
    assert len(report.matched) == 254
    assert "loss.weight" in report.unexpected


def test_ambiguous_names(tmp_path: Path) -> None:
    """Two networks in one file are never mixed or chosen from silently; one that is in it twice is taken."""
    state = drawn_like(tiny())
    other = {name: 2 * tensor for name, tensor in state.items()}
    for first, second, match in [
        ("net.", "model.", r"two different tensors for 0\.weight, net\.0\.weight and model\.0\.weight"),
        ("student.", "teacher.", r"'student\.', 'teacher\.'"),
    ]:
        both = {first + name: t for name, t in state.items()} | {second + name: t for name, t in other.items()}
        torch.save(both, tmp_path / "x.pth")
        with pytest.raises(UserError, match=match):
            load_pretrained(tiny(), tmp_path / "x.pth")
    twice = {prefix + name: t.clone() for prefix in ("net.", "model.") for name, t in state.items()}
    torch.save(twice, tmp_path / "x.pth")
    assert load_pretrained(tiny(), tmp_path / "x.pth").matched == list(state)


@pytest.mark.parametrize("numpy_1", [False, True])
@pytest.mark.parametrize("in_zip", [False, True])
def test_numpy_values_beside_weights(tmp_path: Path, numpy_1: bool, in_zip: bool) -> None:
    """Epochs, scores, random states and options of any NumPy type and version lie beside the weights of many files.
    None of them is needed, so none may keep the weights from loading."""
    state = drawn_like(tiny())
    scalars = [np.int64(3), np.float32(0.5), np.bool_(True), np.str_("a"), np.datetime64("2020")]
    arrays = [np.ones((2, 3)), np.array(["a", {}], dtype=object), np.zeros(2, dtype=[("a", "O"), ("b", "f4")])]
    beside = {"more": scalars + arrays, "rng": np.random.RandomState(0).get_state(), np.int64(1): None}
    checkpoint = {"state_dict": state, "args": argparse.Namespace(lr=np.float64(1)), **beside}
    torch.save(checkpoint, tmp_path / "x.pth", _use_new_zipfile_serialization=in_zip)
    if numpy_1:
        data = rezipped((tmp_path / "x.pth").read_bytes(), as_numpy_1) if in_zip else None
        (tmp_path / "x.pth").write_bytes(data or as_numpy_1((tmp_path / "x.pth").read_bytes()))
    assert load_pretrained(tiny(), tmp_path / "x.pth").matched == list(state)


def test_global_settings_stay(tmp_path: Path) -> None:
    """What a program allows torch.load to make does not keep a file from loading, and is the same afterwards."""
    torch.save({"state_dict": tiny().state_dict(), "epoch": np.int64(3)}, tmp_path / "x.pth")
    with torch.serialization.safe_globals([np.dtype, np.ndarray, Path]):
        before = set(torch.serialization.get_safe_globals())
        load_pretrained(tiny(), tmp_path / "x.pth")
        assert set(torch.serialization.get_safe_globals()) == before


def test_hidden_methods(tmp_path: Path) -> None:
    """A pickle can give its dicts and tensors attributes that hide their methods; reading does not trip over them."""

    class Hiding:
        def __reduce__(self) -> tuple:
            return type(odd), (), {"items": 3, "get": 4, "keys": 5}, None, iter(odd.items())

    odd = tiny().state_dict()
    weight = nn.Parameter(odd["0.weight"])
    weight.to = weight.isfinite = weight.detach = 3  # type: ignore[method-assign, assignment]
    odd["0.weight"] = weight
    torch.save({"model": Hiding()}, tmp_path / "x.pth")
    assert load_pretrained(tiny(), tmp_path / "x.pth").matched == list(odd)


# safetensors


def test_safetensors(net: DDRNet, cityscapes: State, tmp_path: Path) -> None:
    """.safetensors load as .pth do, in each precision, with nothing installed for it."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in cityscapes.items()}
        (tmp_path / "x.safetensors").write_bytes(safetensors({f"module.{name}": t for name, t in state.items()}))
        report = load_pretrained(net, tmp_path / "x.safetensors")
        assert len(report.matched) == 333
        assert_loaded(net, {name: t.to(cityscapes[name].dtype) for name, t in state.items()}, report.matched)


def test_safetensors_of_the_library(tmp_path: Path) -> None:
    """A file of the library, if it is installed, has its padding and order, and loads."""
    library = pytest.importorskip("safetensors.torch")
    state = drawn_like(tiny())
    library.save_file(state, tmp_path / "x.safetensors", metadata={"format": "pt"})
    model = tiny()
    load_pretrained(model, tmp_path / "x.safetensors")
    assert_equal(model, state)


W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ({"a": {**W, "shape": [2**40, 2**40]}}, "of 'a'"),
        ({"a": {**W, "shape": [-1, -2]}}, "of 'a'"),
        ({"a": {**W, "shape": [True, 2]}}, "of 'a'"),
        ({"a": {**W, "shape": 2}}, "of 'a'"),
        ({"a": {**W, "dtype": "F4"}}, "of 'a'"),
        ({"a": {**W, "shape": [3]}}, "'a' is not where"),
        ({"a": {**W, "shape": [2**30, 2**20], "data_offsets": [0, 2**52]}}, "'a' is not where"),
        ({"a": {**W, "data_offsets": [-8, 0]}}, "'a' is not where"),
        ({"a": {**W, "data_offsets": [4, 12]}}, "'a' is not where"),
        ({"a": W, "b": W}, "'b' is not where"),
        ({"a": {**W, "shape": [1], "data_offsets": [0, 4]}}, "speaks of"),
        ({"a": {"dtype": "F32"}}, "no list of tensors"),
        ({"a": 3}, "no list of tensors"),
        ([W], None),
        ('{"a":' * 50_000, None),
        ('{"a":' + "9" * 5000 + "}", "no list of tensors"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_safetensors_header_is_not_believed(header: Any, match: str | None, tmp_path: Path) -> None:
    """Shapes, offsets and types have to agree with the bytes that are there, each of which belongs to one tensor."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    with pytest.raises(UserError, match=match):
        load_pretrained(tiny(), tmp_path / "x")


def test_safetensors_broken_off(tmp_path: Path) -> None:
    """A download that was broken off is called damaged wherever it ends, and a length from nowhere takes no memory."""
    whole = safetensors(tiny().state_dict())
    for end in (9, 100, len(whole) - 1):
        (tmp_path / "x").write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"damaged.*broken off"):
            load_pretrained(tiny(), tmp_path / "x")
    (tmp_path / "x").write_bytes(struct.pack("<Q", 2**39) + whole[8:])
    with pytest.raises(UserError, match="header of 549755813888 bytes"):
        load_pretrained(tiny(), tmp_path / "x")


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


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
def test_weights_of_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """Quantised weights without their scale, copied as the numbers they are, would be noise: they are refused."""
    torch.save({name: tensor.to(dtype) for name, tensor in tiny().state_dict().items()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rf"0\.weight is a tensor \(2, 1, 1, 1\) {str(dtype)[6:]}"):
        load_pretrained(tiny(), tmp_path / "x.pth")
    weight = torch.quantize_per_tensor(torch.ones(2, 1, 1, 1), 0.1, 0, torch.qint8)
    torch.save({"0.weight": weight}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="qint8"):
        load_pretrained(tiny(), tmp_path / "x.pth")


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e300])
def test_weights_that_are_not_finite(value: float, tmp_path: Path) -> None:
    """A training that diverged leaves NaN, and float64 may hold what float32 cannot: neither is a start. The model
    stays as it was; a tensor that is not loaded, and a counter that float16 cannot hold, do not matter."""
    model, state = tiny(), {name: tensor.double() for name, tensor in drawn_like(tiny()).items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["1.weight"][1] = value
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"not finite \(1\.weight\)"):
        load_pretrained(model, tmp_path / "x.pth")
    assert_equal(model, before)
    state["1.weight"][1] = 1
    state |= {"head": torch.tensor([value]), "1.num_batches_tracked": torch.tensor(float("inf"))}
    torch.save(state, tmp_path / "x.pth")
    assert load_pretrained(model, tmp_path / "x.pth").unexpected == ["head"]


def write_truncated(file: Path) -> None:
    torch.save({"conv1.0.weight": torch.ones(32, 3, 3, 3)}, file)
    file.write_bytes(file.read_bytes()[:2000])


def write_legacy_truncated(file: Path) -> None:
    torch.save({"conv1.0.weight": torch.ones(32, 3, 3, 3)}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(file.read_bytes()[:2000])


def write_flipped(file: Path) -> None:
    torch.save({"conv1.0.weight": torch.ones(32, 3, 3, 3)}, file)
    file.write_bytes(file.read_bytes().replace(struct.pack("f", 1), struct.pack("f", 2), 1))


def write_archive(file: Path) -> None:
    torch.save({}, file.with_name("w.pth"))
    with zipfile.ZipFile(file, "w") as archive:
        archive.write(file.with_name("w.pth"), "w.pth")


def write_tar(file: Path) -> None:
    torch.save({}, file.with_name("w.pth"))
    with tarfile.open(file, "w") as archive:
        archive.add(file.with_name("w.pth"), "w.pth")


def write_script(file: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(file))


def arrays() -> dict[str, Any]:
    return {"model": {"conv1.weight": np.ones(3)}}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda file: None, "There is no checkpoint file"),
        (lambda file: file.mkdir(), "There is no checkpoint file .*folder"),
        (lambda file: file.write_bytes(b""), "is empty"),
        (lambda file: file.write_text("\n <!DOCTYPE html><title>Quota exceeded</title>"), "is a web page"),
        (lambda file: file.write_text('<?xml version="1.0"?><Error><Code>AccessDenied'), "is a web page"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS"),
        (lambda file: file.write_text('{"error": "Repository not found"}'), "is JSON"),
        (lambda file: file.write_text('{"metadata": {}, "weight_map": {"a": "b"}}'), "several files"),
        (lambda file: file.write_text("404: Not Found"), "is text.*404"),
        (lambda file: file.write_text("confirm\nthat you\n want " + "ä" * 9999), "is text.*confirm"),
        (lambda file: file.write_bytes(gzip.compress(b"weights")), "is an archive"),
        (write_tar, "is an archive"),
        (write_archive, r"zip archive.*'w\.pth'"),
        (write_script, "TorchScript.*state_dict"),
        (lambda file: file.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "HDF5"),
        (lambda file: file.write_bytes(b"\x08\x0a\x12\x07pytorch" + bytes(99)), "ONNX"),
        (lambda file: file.write_bytes(b"\x93NUMPY\x01\0" + bytes(99)), "NumPy"),
        (lambda file: file.write_bytes(pickle.dumps(arrays(), 2)), "is a pickle, .*detectron2"),
        (lambda file: file.write_bytes(pickle.dumps(arrays(), 4)), "is a pickle, .*detectron2"),
        (lambda file: torch.save(tiny().state_dict(), file, pickle_protocol=4), "pickle_protocol=4"),
        (lambda file: file.write_bytes(bytes(range(256))), "damaged or of another format"),
        (write_truncated, "damaged, .*its end is missing"),
        (write_legacy_truncated, "damaged or of another format"),
        (write_flipped, r"damaged, the bytes of 'x/data/0'"),
        (lambda file: torch.save(torch.ones(3), file), "no tensors by name"),
        (
            lambda file: torch.save({"epoch": 3, "state_dict": {}}, file),
            "no tensors by name, only 'epoch', 'state_dict'",
        ),
        (lambda file: torch.save(arrays(), file), "no tensors by name.*NumPy"),
        (lambda file: torch.save({"model": Path("x")}, file), r"Python object \(pathlib\S*\.PosixPath\).*run code"),
        (lambda file: torch.save(nn.Linear(1, 1), file), r"Python object \(torch\S*\.Linear\).*model\.state_dict"),
    ],
    ids=[
        *("missing", "folder", "empty", "web page", "xml", "LFS", "JSON", "index", "text", "text as opcodes"),
        *("gzip", "tar", "zip", "TorchScript", "HDF5", "ONNX", "npy", "pickle 2", "pickle 4", "protocol 4", "noise"),
        *("truncated", "truncated legacy", "flipped", "tensor", "no tensors", "arrays", "objects", "module"),
    ],
)
def test_not_a_checkpoint(net: DDRNet, tmp_path: Path, write: Any, match: str) -> None:
    """A file that is missing, unreadable, no checkpoint, or would have to run code is refused in one sentence with its
    name, which says what it is."""
    write(tmp_path / "x.pth")
    with pytest.raises(UserError, match=match) as caught:
        load_pretrained(net, tmp_path / "x.pth")
    assert "x.pth" in str(caught.value)
    assert "\n" not in str(caught.value)


class Harmful:
    """What a pickle can make of its reader."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_code_in_a_pickle(kind: str, protocol: int, tmp_path: Path) -> None:
    """Code does not run, whatever it lies in, and what it would have called is named."""
    content = {"state_dict": tiny().state_dict(), "more": Harmful(tmp_path / "ran")}
    if kind == "pickle":
        (tmp_path / "x.pth").write_bytes(pickle.dumps(content["more"], protocol))
    else:
        torch.save(content, tmp_path / "x.pth", pickle_protocol=protocol, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(UserError, match=r"\(posix\.system\).*code in a pickle.*run code"):
        load_pretrained(tiny(), tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["zip", "data.pkl", "legacy", "safetensors"])
def test_damaged_at_random(kind: str, tmp_path: Path) -> None:
    """Whatever bytes are missing or others, a file loads or is refused in a sentence: no traceback, no crash. data.pkl:
    the pickle of a zip whose sums are right."""
    file, state, draw = tmp_path / "x.pth", drawn_like(tiny()), random.Random(0)
    content = {"state_dict": state, "epoch": np.int64(3), "rng": np.ones(3)}
    torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")
    whole = safetensors(state) if kind == "safetensors" else file.read_bytes()

    def damage(data: bytes) -> bytes:
        odd = bytearray(data[: draw.randrange(len(data))] if draw.random() < 0.2 else data)
        for _ in range(draw.choice([0, 1, 1, 2, 8]) if odd else 0):
            odd[draw.randrange(len(odd))] ^= 1 << draw.randrange(8)
        return bytes(odd)

    for _ in range(200):
        file.write_bytes(rezipped(whole, damage) if kind == "data.pkl" else damage(whole))
        with contextlib.suppress(UserError):
            load_pretrained(tiny(), file)
