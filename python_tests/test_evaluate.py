"""Scoring and predicting with a checkpoint: the same numbers as in training, the right files, and clear refusals."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness.tiny import CLASSES, TinyNet, one_thread, write_folder  # noqa: F401
from PIL import Image

from bcmf_ext import evaluate, export, predict
from bcmf_ext.checkpoint import VERSION, save_checkpoint
from bcmf_ext.config import make_config
from bcmf_ext.data import MEAN, STD, open_dataset
from bcmf_ext.data.cityscapes import CLASSES as CITYSCAPES_CLASSES
from bcmf_ext.data.cityscapes import PALETTE as CITYSCAPES_PALETTE
from bcmf_ext.data.folder import Folder
from bcmf_ext.errors import UserError, run_command
from bcmf_ext.files import mark_of
from bcmf_ext.inference import Predictor
from bcmf_ext.metrics import BoundaryFScore, BoundaryIoU, ConfusionMatrix, TrimapIoU
from bcmf_ext.models import NETWORKS
from bcmf_ext.report import metrics_record, save_png

PALETTE = np.array([(128, 0, 0), (0, 128, 0), (0, 0, 200)], np.uint8)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NETWORKS, "bcmfnet", TinyNet)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "my data")


def write_checkpoint(
    folder: Path, classes: tuple[str, ...] = CLASSES, palette: np.ndarray = PALETTE, **flags: object
) -> Path:
    """A best.pt with random weights; returns its path."""
    torch.manual_seed(0)
    config = make_config({"dataset": "folder", "amp": "off", **flags})
    content = {
        "version": VERSION,
        "config": asdict(config),
        "classes": list(classes),
        "palette": torch.from_numpy(palette),
        "mean": MEAN,
        "std": STD,
        "align_corners": False,
        "model": TinyNet(len(classes)).state_dict(),
    }
    save_checkpoint(folder / "best.pt", content)
    return folder / "best.pt"


def predicted(checkpoint: Path, image: np.ndarray) -> np.ndarray:
    """The label map, computed step by step."""
    saved = torch.load(checkpoint, weights_only=True)
    model = TinyNet(len(saved["classes"])).eval()
    model.load_state_dict(saved["model"])
    x = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(saved[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        logits = F.interpolate(model((x - mean) / std), image.shape[:2], mode="bilinear")
    return logits[0].argmax(0).numpy()


# Predictor


def test_predictor(tmp_path: Path, root: Path) -> None:
    """An image of any size in, its class of each pixel out, with the checkpoint's own mean and deviation."""
    checkpoint = write_checkpoint(tmp_path)
    predictor = Predictor(checkpoint, device="cpu")
    assert predictor.classes == CLASSES
    assert np.array_equal(predictor.palette, PALETTE)
    for size in ((72, 96), (65, 101)):
        image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        label = predictor(image)
        assert label.dtype == np.uint8
        assert np.array_equal(label, predicted(checkpoint, image))
    saved = torch.load(checkpoint, weights_only=True)
    for other in ({"mean": (0.0, 0.1, 0.9)}, {"std": (0.02, 2.0, 0.02)}):
        torch.save({**saved, **other}, checkpoint)
        assert np.array_equal(Predictor(checkpoint, "cpu")(image), predicted(checkpoint, image))
        assert not np.array_equal(Predictor(checkpoint, "cpu")(image), label)
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        predictor(image[..., 0])
    with pytest.raises(ValueError, match="float64"):
        predictor(image / 255)


# Evaluate


def test_scores(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dataset and folder come from the checkpoint; the scores are those of the predictions, at the labels' size."""
    checkpoint = write_checkpoint(tmp_path, data_root=str(root))
    dataset = open_dataset("folder", root, "val")
    metrics = confusion, *_ = ConfusionMatrix(3), BoundaryIoU(3), BoundaryFScore(3), TrimapIoU(3)
    for index in range(len(dataset)):
        image, label = dataset.pair(index)
        for metric in metrics:
            metric.update(torch.from_numpy(predicted(checkpoint, image)), torch.from_numpy(label))
    evaluate.main(["--checkpoint", str(checkpoint), "--workers", "1", "--device", "cpu"])
    out = capsys.readouterr().out
    assert f"mIoU {confusion.mean_iou():.4f}, pixel accuracy {confusion.pixel_accuracy():.4f}" in out
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert (written["dataset"], written["split"], written["images"]) == ("folder", "val", 3)
    expected = metrics_record(metrics, CLASSES)
    assert (written["mean"], written["classes"]) == (expected["mean"], expected["classes"])
    assert {"boundary_iou", "boundary_f_1px", "trimap_iou_12px"} <= written["classes"]["floor"].keys()
    assert 0 < written["mean"]["boundary_f_3px"] < 1
    assert written["boundary_iou_ratio"] == 0.005
    assert "val: 3 images" in out
    evaluate.main(["--checkpoint", str(checkpoint), "--split", "train", "--workers", "0", "--device", "cpu"])
    assert "train: 9 images" in capsys.readouterr().out


def test_scores_that_cannot_be_written(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """That is said before any image is scored, with the flag that helps."""
    checkpoint = write_checkpoint(tmp_path, data_root=str(root))
    for wrong in (tmp_path, checkpoint / "metrics.json"):
        with pytest.raises(UserError, match=r"cannot be written to .*: name another file with --metrics-file"):
            evaluate.main(["--checkpoint", str(checkpoint), "--metrics-file", str(wrong), "--device", "cpu"])
    assert "images" not in capsys.readouterr().out
    given = tmp_path / "new folder" / "scores.json"
    evaluate.main(["--checkpoint", str(checkpoint), "--metrics-file", str(given), "--device", "cpu", "-j", "0"])
    assert json.loads(given.read_text())["images"] == 3


def test_saved_predictions(tmp_path: Path, root: Path) -> None:
    """Predictions are written under the images' names; with reduce_zero_label in the ids of the label files."""
    output = tmp_path / "pred s"
    for shift in (0, 1):
        checkpoint = write_checkpoint(tmp_path, data_root=str(root), reduce_zero_label=bool(shift))
        if shift:
            for path in root.rglob("labels/val/*.png"):
                ids = np.array(Image.open(path))
                Image.fromarray(np.where(ids == 255, 0, ids + 1).astype(np.uint8)).save(path)
        evaluate.main(["--checkpoint", str(checkpoint), "--save-preds", str(output), "-j", "0", "--device", "cpu"])
        assert sorted(path.name for path in output.iterdir()) == ["val0.png", "val1.png", "val2.png"]
        image = np.array(Image.open(root / "images" / "val" / "val1.png"))
        assert np.array_equal(np.array(Image.open(output / "val1.png")), predicted(checkpoint, image) + shift)


def test_predictions_in_the_ids_of_the_labels(tmp_path: Path, root: Path) -> None:
    """Evaluation reads labels with the run's own flags, and writes predictions that those flags read again: masks of 0
    and 255 under another name, and classes around an id that is ignored."""
    for path in root.rglob("labels/*/*.png"):
        ids = np.array(Image.open(path))
        Image.fromarray(np.where(ids == 2, np.uint8(255), np.uint8(0))).save(path.with_name(f"{path.stem}_box.png"))
        path.write_bytes(b"another kind of label")
    (root / "classes.txt").write_text("floor\nbox\n")
    options = {"data_root": str(root), "binary_masks": True, "label_suffix": "_box"}
    checkpoint = write_checkpoint(tmp_path, ("floor", "box"), PALETTE[:2], **options)
    flags = ["--checkpoint", str(checkpoint), "-j", "0", "--device", "cpu", "--save-preds"]
    evaluate.main([*flags, str(tmp_path / "masks")])
    written = np.array(Image.open(tmp_path / "masks" / "val1.png"))
    image = np.array(Image.open(root / "images" / "val" / "val1.png"))
    assert np.array_equal(written, predicted(checkpoint, image) * 255)
    assert json.loads((tmp_path / "metrics.json").read_text())["classes"].keys() == {"floor", "box"}

    for path in root.rglob("labels/*/*.png"):
        path.unlink()
        if not path.stem.endswith("_box"):
            Image.fromarray(np.arange(72 * 96, dtype=np.uint8).reshape(72, 96) % 4).save(path)
    (root / "classes.txt").write_text("floor\nvoid\nwall\nred box\n")
    checkpoint = write_checkpoint(tmp_path, data_root=str(root), ignore_label=1)
    evaluate.main([*flags, str(tmp_path / "ids")])
    written = np.array(Image.open(tmp_path / "ids" / "val1.png"))
    assert np.array_equal(written, np.array([0, 2, 3])[predicted(checkpoint, image)])


def test_cityscapes_test_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No mIoU for a split without labels, but predictions for the server: regular ids, under the names it wants."""
    city = tmp_path / "data" / "leftImg8bit" / "test" / "bonn"
    city.mkdir(parents=True)
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), np.uint8)
    Image.fromarray(image).save(city / "bonn_000001_000019_leftImg8bit.png")
    checkpoint = write_checkpoint(
        tmp_path, CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, dataset="cityscapes", data_root=str(tmp_path / "data")
    )
    flags = ["--checkpoint", str(checkpoint), "--split", "test", "--device", "cpu"]
    with pytest.raises(UserError, match=r"test has no labels, so there is no mIoU.*--save-preds"):
        evaluate.main(flags)
    evaluate.main([*flags, "--save-preds", str(tmp_path / "results")])
    assert "mIoU" not in capsys.readouterr().out
    written = np.array(Image.open(tmp_path / "results" / "bonn_000001_000019_leftImg8bit.png"))
    regular = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33])
    assert np.array_equal(written, regular[predicted(checkpoint, image)])


def test_other_classes(tmp_path: Path, root: Path) -> None:
    """Scores against other classes would mean nothing: both lists are shown instead."""
    checkpoint = write_checkpoint(tmp_path, ("a", "b", "c"), data_root=str(root))
    with pytest.raises(UserError, match=r"3 classes a, b, c; folder has 3, floor, wall, red box"):
        evaluate.main(["--checkpoint", str(checkpoint)])
    with pytest.raises(UserError, match="no checkpoint"):
        evaluate.main(["--checkpoint", str(tmp_path / "none.pt")])


# Predict


def test_predict(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files and folders in; for each a palette PNG of classes and an overlay of the image's size out."""
    checkpoint, output = write_checkpoint(tmp_path), tmp_path / "out put"
    single = tmp_path / "single.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(single)
    folder = root / "images"
    flags = ["--checkpoint", str(checkpoint), "--output", str(output), "--device", "cpu"]
    predict.main([*flags, str(single), str(folder)])
    assert "13 images" in capsys.readouterr().out

    assert len(list(output.rglob("*_label.png"))) == len(list(output.rglob("*_overlay.png"))) == 13
    for image, name in ((single, "single"), (folder / "val" / "val2.png", "val/val2")):
        label = Image.open(output / f"{name}_label.png")
        pixels = np.array(Image.open(image))
        assert label.mode == "P"
        assert np.array_equal(np.array(label), predicted(checkpoint, pixels))
        overlay = np.array(Image.open(output / f"{name}_overlay.png"))
        expected = 0.4 * pixels + 0.6 * PALETTE[np.array(label)]
        assert np.abs(overlay - expected).max() <= 1


def test_predict_labels_or_overlays(tmp_path: Path, root: Path) -> None:
    """`--format` writes the one or the other alone."""
    checkpoint = write_checkpoint(tmp_path)
    for form, ending in (("labels", "_label"), ("overlays", "_overlay")):
        output = tmp_path / form
        flags = ["--checkpoint", str(checkpoint), "--output", str(output), "--device", "cpu", "--format", form]
        predict.main([*flags, str(root / "images" / "val")])
        assert sorted(p.name for p in output.iterdir()) == [f"val{i}{ending}.png" for i in range(3)]


def test_predict_for_cityscapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The official evaluator, run as a program on what `--format cityscapes` wrote, accepts it unchanged and finds the
    mIoU of our own; other names and other classes are refused before anything is written."""
    data, results = tmp_path / "data", tmp_path / "results"
    rng = np.random.default_rng(0)
    for city, frame in (("bonn", "000019"), ("aachen", "000020")):
        for kind in ("leftImg8bit", "gtFine"):
            (data / kind / "val" / city).mkdir(parents=True)
        stem = f"{city}_000001_{frame}"
        image = rng.integers(0, 256, (64, 128, 3), np.uint8)
        Image.fromarray(image).save(data / "leftImg8bit" / "val" / city / f"{stem}_leftImg8bit.png")
        truth = rng.integers(0, 34, (8, 16), np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(truth).save(data / "gtFine" / "val" / city / f"{stem}_gtFine_labelIds.png")
        instances = data / "gtFine" / "val" / city / f"{stem}_gtFine_instanceIds.png"  # the evaluator wants them
        Image.fromarray(truth.astype(np.uint16)).save(instances)
    checkpoint = write_checkpoint(
        tmp_path, CITYSCAPES_CLASSES, CITYSCAPES_PALETTE, dataset="cityscapes", data_root=str(data)
    )
    flags = ["--checkpoint", str(checkpoint), "--output", str(results), "--device", "cpu", "--format", "cityscapes"]
    predict.main([*flags, str(data / "leftImg8bit" / "val")])
    assert sorted(p.name for p in results.iterdir()) == [
        "aachen_000001_000020_leftImg8bit.png",
        "bonn_000001_000019_leftImg8bit.png",
    ]
    evaluate.main(["--checkpoint", str(checkpoint), "--workers", "0", "--device", "cpu"])
    ours = json.loads((tmp_path / "metrics.json").read_text())["mean"]["iou"]
    pytest.importorskip("cityscapesscripts")
    # It calls what NumPy 2.4 no longer has.
    program = "import numpy, runpy; numpy.in1d = numpy.isin; runpy.run_module(" + (
        "'cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling', run_name='__main__')"
    )
    command = [sys.executable, "-c", program]
    env = {**os.environ, "CITYSCAPES_DATASET": str(data), "CITYSCAPES_RESULTS": str(results)}
    env["CITYSCAPES_EXPORT_DIR"] = str(tmp_path)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    theirs = re.search(r"Score Average\D+(?:\x1b\[\d+m)*\s*(0\.\d+)", done.stdout)
    assert theirs, done.stdout + done.stderr
    assert f"{ours:.3f}" == theirs[1]  # all that it prints

    photos = data / "leftImg8bit" / "val" / "bonn"
    photo = photos / "bonn_000001_000019_leftImg8bit.png"
    before = photo.read_bytes()
    with pytest.raises(UserError, match=r"bonn_000001_000019_leftImg8bit\.png is one of the images: choose another"):
        predict.main([*flags, str(photo), "--output", str(photos)])
    assert photo.read_bytes() == before

    single = tmp_path / "street.png"
    Image.fromarray(image).save(single)
    with pytest.raises(UserError, match="is not named <city>_<sequence>_<frame>_leftImg8bit"):
        predict.main([*flags, str(single)])
    with pytest.raises(UserError, match="takes a network of the 19 classes of cityscapes"):
        predict.main(["--checkpoint", str(write_checkpoint(tmp_path / "other")), *flags[2:], str(single)])


def test_predict_twice_in_one_place(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are not taken for images: neither those in the default folder when all below the current one is
    predicted again, nor beside the images, which is refused."""
    checkpoint = str(write_checkpoint(tmp_path / "run"))
    monkeypatch.chdir(root / "images" / "val")
    for _ in range(2):
        predict.main(["--checkpoint", checkpoint, "--device", "cpu", "."])
        assert len(list(Path("predictions").iterdir())) == 2 * 3
    with pytest.raises(UserError, match="is a folder of images to predict: choose another"):
        predict.main(["--checkpoint", checkpoint, "--device", "cpu", ".", "--output", "../val"])
    predict.main(["--checkpoint", checkpoint, "--device", "cpu", ".", "--output", ".."])  # above: images all the same
    assert len(list(Path("..").glob("val*_label.png"))) == 3


def test_only_its_own_files_are_replaced(tmp_path: Path, root: Path) -> None:
    """A user's mask beside the photo has the name of a result: it is refused before the first image, and so is another
    command's file; `--overwrite` is for who means it. What predict has made it replaces, with other weights, too."""
    photo, output = tmp_path / "street.jpg", tmp_path
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(photo)
    mask = tmp_path / "street_label.png"
    flags = ["--checkpoint", str(write_checkpoint(tmp_path)), "--device", "cpu", "--output", str(output), str(photo)]
    for _ in range(2):
        predict.main(flags)
    for theirs in (b"mine", None):
        if theirs is None:
            save_png(mask, np.zeros((64, 96), np.uint8), "bcmf_ext.evaluate")
        else:
            mask.write_bytes(theirs)
        (tmp_path / "street_overlay.png").unlink()
        before = mask.read_bytes()
        with pytest.raises(UserError, match=r"street_label\.png is there already, .*another --output, .*--overwrite"):
            predict.main(flags)
        assert mask.read_bytes() == before
        assert not (tmp_path / "street_overlay.png").exists()
        predict.main([*flags, "--overwrite"])
        assert mark_of(mask) == "bcmf_ext.predict"


def test_scores_and_predictions_replace_their_own(tmp_path: Path, root: Path) -> None:
    """Scoring twice is no trouble; a user's metrics.json, and predictions of another making, are refused before the
    first image; the folders of images and labels, and all below, are no place for predictions."""
    checkpoint = write_checkpoint(tmp_path, data_root=str(root))
    flags = ["--checkpoint", str(checkpoint), "--device", "cpu", "-j", "0"]
    for _ in range(2):
        evaluate.main([*flags, "--save-preds", str(tmp_path / "out")])
    labels = sorted(root.rglob("labels/val/*.png"))
    before = [path.read_bytes() for path in labels]
    (tmp_path / "link").symlink_to(root / "labels")
    for place in (root / "labels" / "val", root / "labels" / "new", root / "images", tmp_path / "link" / "val"):
        with pytest.raises(UserError, match=r"--save-preds .* lies in .*, which holds the data: choose another folder"):
            evaluate.main([*flags, "--save-preds", str(place), "--overwrite"])
    assert [path.read_bytes() for path in labels] == before
    store = tmp_path / "store"
    (root / "labels" / "val").rename(store)
    (root / "labels" / "val").symlink_to(store)
    with pytest.raises(UserError, match=r"--save-preds .*store lies in .*store, which holds the data"):
        evaluate.main([*flags, "--save-preds", str(store), "--overwrite"])
    for path, flag in ((tmp_path / "out" / "val1.png", "--save-preds"), (tmp_path / "metrics.json", "--metrics-file")):
        path.write_bytes(b"mine")
        with pytest.raises(UserError, match=rf"{path.name} is there already, .*another {flag}, or replace it"):
            evaluate.main([*flags, "--save-preds", str(tmp_path / "out")])
        assert path.read_bytes() == b"mine"
        evaluate.main([*flags, "--save-preds", str(tmp_path / "out"), "--overwrite"])
        assert mark_of(path) == "bcmf_ext.evaluate"


def test_networks_of_nan(tmp_path: Path, root: Path) -> None:
    """A training that has failed gives class 0 everywhere, which looks like a result: predict, evaluate and export
    refuse it."""
    checkpoint = write_checkpoint(tmp_path, data_root=str(root))
    saved = torch.load(checkpoint, weights_only=True)
    saved["model"]["final_layer.weight"][0] = np.nan
    torch.save(saved, checkpoint)
    photo = str(root / "images" / "val" / "val0.png")
    for command in (
        lambda: predict.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), photo]),
        lambda: evaluate.main(["--checkpoint", str(checkpoint)]),
        lambda: export.main(["--checkpoint", str(checkpoint), "--format", "torch-export"]),
    ):
        with pytest.raises(UserError, match=r"The weights in .*best\.pt are not finite \(final_layer\.weight\)"):
            command()


def test_logits_of_nan(tmp_path: Path, root: Path) -> None:
    """Finite weights may overflow, in half precision first: class 0 everywhere, too."""
    checkpoint = write_checkpoint(tmp_path, data_root=str(root))
    saved = torch.load(checkpoint, weights_only=True)
    saved["model"]["final_layer.weight"].fill_(3e38)
    torch.save(saved, checkpoint)
    photo = root / "images" / "val" / "val0.png"
    message = r"The network of .*best\.pt computes NaN or infinite logits for "
    with pytest.raises(UserError, match=message + "this image"):
        predict.main(["--checkpoint", str(checkpoint), "--output", str(tmp_path / "out"), str(photo)])
    with pytest.raises(UserError, match=message + "3 of 3 images"):
        evaluate.main(["--checkpoint", str(checkpoint), "--device", "cpu", "-j", "0"])
    assert not (tmp_path / "metrics.json").exists()


def test_names_that_files_may_have(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One name without room for an ending costs no other image its prediction; names that are no UTF-8 do; control
    characters do not reach the terminal."""
    folder = root / "images" / "val"
    photo = (folder / "val0.png").read_bytes()
    (folder / f"{'é' * 124}x.png").write_bytes(photo)
    odd = os.fsdecode(b"caf\xe9.png"), "\x1b[2J\x07evil.png"
    for name in odd:
        (folder / name).write_bytes(photo)
    (folder / "\x1b[31mred.png").write_bytes(b"no picture")
    output = tmp_path / "out"
    flags = ["--checkpoint", str(write_checkpoint(tmp_path)), "--device", "cpu", "--output", str(output), str(folder)]
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: predict.main(flags))
    said = capsys.readouterr()
    assert "left out: " in said.err
    assert "has too long a name for " in said.err
    assert "error: 2 of 7 images had to be left out" in said.err
    assert r"\x1b[31mred.png" in said.err
    assert not any(character in said.out + said.err for character in "\x1b\x07")
    labels = {path.name for path in output.glob("*_label.png")}
    assert {f"{name.removesuffix('.png')}_label.png" for name in odd} <= labels
    assert len(labels) == 5
    long = write_checkpoint(tmp_path / "long", data_root=str(root))
    for kind in ("images", "labels"):
        for path in (root / kind / "val").glob("*"):
            path.unlink()
        shutil.copy(root / kind / "train" / "train0.png", root / kind / "val" / f"{'n' * 250}.png")
    (root / "images" / "val" / f"{'n' * 250}.png").rename(root / "images" / "val" / f"{'n' * 250}.PNG")
    evaluate.main(["--checkpoint", str(long), "--device", "cpu", "-j", "0", "--save-preds", str(tmp_path / "preds")])


def test_what_is_no_ordinary_file(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A FIFO among the images would be waited for for ever: it is passed over with a word."""
    os.mkfifo(root / "images" / "val" / "pipe.png")
    (root / "images" / "val" / "folder.png").mkdir()
    output = tmp_path / "out"
    flags = ["--checkpoint", str(write_checkpoint(tmp_path)), "--device", "cpu", "--output", str(output)]
    predict.main([*flags, str(root / "images" / "val")])
    said = capsys.readouterr()
    assert "3 images" in said.out
    assert re.search(r"warning: .*pipe\.png is no ordinary file, and passed over\.", said.err)
    for name in ("first", "second"):  # a loop of links leads nowhere
        (root / "images" / "val" / f"{name}.png").symlink_to({"first": "second.png", "second": "first.png"}[name])
    with pytest.raises(UserError, match=r"2 of 5 images had to be left out, such as .*first\.png"):
        predict.main([*flags, str(root / "images" / "val")])
    with pytest.raises(UserError, match=r"no image or folder .*pipe\.png"):
        predict.main([*flags, str(root / "images" / "val" / "pipe.png")])


def test_a_folder_that_cannot_be_read(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer images than there are would be predicted, or trained on, and nobody would know: an error, before any."""
    (root / "images" / "val" / "closed").mkdir()
    scandir = os.scandir

    def refuse(path: str | os.PathLike[str]) -> Any:
        if "closed" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    flags = ["--checkpoint", str(write_checkpoint(tmp_path)), "--device", "cpu", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"The folder .*closed cannot be read \(Permission denied\)"):
        predict.main([*flags, str(root / "images" / "val")])
    with pytest.raises(UserError, match=r"The folder .*closed cannot be read"):
        open_dataset("folder", root, "val")


def test_a_loading_process_that_dies(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in evaluation that is a sentence; so is what one of them meets, though the other is still there."""
    checkpoint = write_checkpoint(tmp_path, data_root=str(root))
    broken = root / "images" / "val" / "val1.png"
    content = broken.read_bytes()
    broken.write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"val1\.png cannot be read as a picture"):
        evaluate.main(["--checkpoint", str(checkpoint), "--device", "cpu", "-j", "2"])
    broken.write_bytes(content)
    monkeypatch.setattr(Folder, "image", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match=r"A process that loads data died \(.*\), .* use fewer --workers"):
        evaluate.main(["--checkpoint", str(checkpoint), "--device", "cpu", "-j", "1"])


def test_one_bad_image_among_good_ones(tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that cannot be read costs no other image its prediction, and is the command's error at the end."""
    checkpoint, folder = write_checkpoint(tmp_path / "run"), root / "images" / "val"
    (folder / "val1.png").write_bytes(b"not a picture")
    output = tmp_path / "out"
    with pytest.raises(UserError, match=r"1 of 3 images had to be left out, such as .*val1\.png"):
        predict.main(["--checkpoint", str(checkpoint), "--device", "cpu", str(folder), "--output", str(output)])
    assert sorted(p.name for p in output.glob("*_label.png")) == ["val0_label.png", "val2_label.png"]
    said = capsys.readouterr()
    assert "2 images" in said.out
    assert "left out: " in said.err


def test_too_little_memory(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image that is too large for the memory is named, with its size."""
    checkpoint, image = write_checkpoint(tmp_path), root / "images" / "val" / "val0.png"

    def fail(*_: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")

    monkeypatch.setattr(Predictor, "logits", fail)
    with pytest.raises(UserError, match=r"too little memory for .*val0\.png, \d+×\d+ pixels"):
        predict.main(["--checkpoint", str(checkpoint), "--device", "cpu", str(image), "--output", str(tmp_path)])


def test_what_cannot_be_predicted(tmp_path: Path, root: Path) -> None:
    """A path that is not there, a folder without images, a file that is none, two images of one name: sentences."""
    checkpoint = str(write_checkpoint(tmp_path))
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("text")
    first, second = root / "images" / "val" / "val0.png", tmp_path / "val0.png"
    second.write_bytes(first.read_bytes())
    for arguments, message in (
        ([tmp_path / "none.png"], r"no image or folder .*none\.png"),
        ([tmp_path / "empty"], "empty holds no images"),
        ([tmp_path / "text.png"], r"1 of 1 image had to be left out, such as .*text\.png"),
        ([first, second], "would both be written as val0"),
    ):
        flags = ["--checkpoint", checkpoint, "--output", str(tmp_path / "out"), "--device", "cpu"]
        with pytest.raises(UserError, match=message):
            predict.main([*flags, *map(str, arguments)])
