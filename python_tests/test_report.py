"""Tables, colours and pictures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from bcmf_ext import report
from bcmf_ext.data import DATASETS
from bcmf_ext.data.classes import palette_for
from bcmf_ext.metrics import BoundaryFScore, ConfusionMatrix, TrimapIoU
from bcmf_ext.report import (
    IGNORED_COLOUR,
    PANEL,
    WRONG_COLOUR,
    absent_line,
    blend,
    colourise,
    draw_curves,
    draw_sample,
    error_map,
    iou_table,
    loss_line,
    metrics_record,
    metrics_table,
    save_png,
    score_lines,
    scores,
)

PALETTE = np.array([(10, 20, 30), (0, 255, 0)], np.uint8)
LABEL = np.array([[0, 1, 255], [1, 1, 0]], np.uint8)
PREDICTION = np.array([[0, 0, 1], [1, 1, 0]], np.uint8)


def test_iou_table_is_aligned() -> None:
    """Values stand under each other, whatever the names' lengths; an absent class shows no number."""
    names = [f"class{'x' * (i % 4)}{i}" for i in range(9)]
    table = iou_table({name: None if i == 4 else i / 10 for i, name in enumerate(names)})
    lines = table.splitlines()
    assert len(lines) == 3
    columns = {tuple(i for i, c in enumerate(line.replace("–", "0.000")) if c == ".")[:1] for line in lines}
    assert len(columns) == 1
    assert table.count("–") == 1
    for i, name in enumerate(names):
        assert name in table
        assert i == 4 or f"{i / 10:.3f}" in table


def test_scores_and_lines() -> None:
    """The log has no NaN (JSON knows none); the lines show every loss term and score."""
    confusion = ConfusionMatrix(3)
    confusion.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    record = scores(confusion, ("sky", "road", "train"))
    assert record["iou"] == {"sky": 0.5, "road": 0.5, "train": None}
    assert math.isclose(record["miou"], 0.5)
    assert "mIoU 0.5000 (best), pixel accuracy 0.6667" in score_lines(record, " (best)")
    loss = {"total": 1.5, "ce": 1.0, "bcl": 0.25}
    record = {"epoch": 2, "loss": loss, "lr": 0.01, "images_per_second": 8.0, "seconds": 5.0}
    start, end = "epoch 2/7: loss 1.500 (ce 1.000, bcl 0.250)", ", lr 0.01, 8.0 images/s, 5 s"
    share = {"grad_share": {"ce": 0.75, "bcl": 0.25}}
    for more, shown in (
        ({}, ""),
        ({"grad_share": None}, ""),
        (share, ", shares of the gradient: ce 75%, bcl 25%"),
        ({**share, "loss_ramp": 0.5}, ", shares of the gradient: ce 75%, bcl 25%, BCL at 50% of the weight"),
        ({"loss_ramp": 1.0}, ""),
    ):
        assert loss_line({**record, **more}, 7) == start + shown + end
    assert "BCL and CPG at 50% of" in loss_line({**record, "loss": {**loss, "cpg": 0.1}, "loss_ramp": 0.5}, 7)
    assert loss_line({**record, "loss": {"total": 1.0, "ce": 1.0}, "loss_ramp": 0.5}, 7).count("weight") == 0


def test_metrics_table() -> None:
    """All scores of a metric stand under its name, of a class in a line; what cannot be scored shows no number, and is
    null in JSON. A class may be called "mean"."""
    prediction = torch.tensor([[0, 0, 1, 1]])
    metrics = ConfusionMatrix(3), BoundaryFScore(3, widths=(1, 12)), TrimapIoU(3, widths=(3,))
    for metric in metrics:
        metric.update(prediction, prediction)
    record = {"pixel_accuracy": 1.0, **metrics_record(metrics, ("sky", "road", "mean"))}
    names = ["iou", "boundary_f_1px", "boundary_f_12px", "trimap_iou_3px"]
    assert record["classes"]["mean"] == dict.fromkeys(names)
    assert record["mean"] == dict.fromkeys(names, 1.0)
    assert metrics_table(record).splitlines() == [
        "  mIoU 1.0000, pixel accuracy 1.0000",
        "                 boundary_f  trimap_iou",
        "          iou    1px   12px         3px",
        "  sky   1.000  1.000  1.000       1.000",
        "  road  1.000  1.000  1.000       1.000",
        "  mean      –      –      –           –",
        "  mean  1.000  1.000  1.000       1.000",
    ]


def test_colours() -> None:
    """Classes get their colour, ignored pixels black; errors are marked, but not where the truth is ignored."""
    colours = colourise(LABEL, PALETTE)
    assert colours[0, 0].tolist() == [10, 20, 30]
    assert tuple(colours[0, 2]) == IGNORED_COLOUR
    image = np.full((2, 3, 3), 100, np.uint8)
    errors = error_map(image, LABEL, PREDICTION)
    marked = (errors == WRONG_COLOUR).all(2)
    assert marked.tolist() == [[False, True, False], [False, False, False]]
    assert tuple(errors[0, 2]) == IGNORED_COLOUR
    assert blend(image, colours, 0.5)[0, 0].tolist() == [55, 60, 65]


@pytest.mark.parametrize(
    "palette", [*(DATASETS[name].palette for name in ("demo", "cityscapes", "camvid")), palette_for(254)]
)
def test_no_class_looks_like_an_error(palette: np.ndarray) -> None:
    """Protects pictures of errors from a class of nearly the colour that marks what is wrong: no palette of ours has
    one, nor has the darkened image under the mark."""
    assert np.linalg.norm(palette.astype(float) - WRONG_COLOUR, axis=1).min() > 80
    image, label = np.full((1, 1, 3), 255, np.uint8), np.zeros((1, 1), np.uint8)
    assert error_map(image, label, label).max() < 160


def test_palette_png(tmp_path: Path) -> None:
    """A predicted label is a palette PNG: its values are the classes, its look the colours."""
    save_png(tmp_path / "new folder" / "label.png", PREDICTION, "bcmf_ext.predict", PALETTE)
    picture = Image.open(tmp_path / "new folder" / "label.png")
    assert picture.mode == "P"
    assert np.array_equal(np.array(picture), PREDICTION)
    assert np.array_equal(np.array(picture.convert("RGB")), PALETTE[PREDICTION])


def test_sample_picture(tmp_path: Path) -> None:
    """Image, truth, prediction and errors stand side by side, in this order."""
    label, prediction = np.kron(LABEL, np.ones((20, 20), np.uint8)), np.kron(PREDICTION, np.ones((20, 20), np.uint8))
    image = np.full((*label.shape, 3), 77, np.uint8)
    draw_sample(tmp_path / "sample.png", image, label, prediction, ("a", "b"), PALETTE, "sample, epoch 1")
    picture = np.array(Image.open(tmp_path / "sample.png"))
    height = PANEL * 2 // 3
    assert picture.shape[1] > 4 * PANEL
    assert picture.shape[0] > height + 24
    gap = (picture.shape[1] - 4 * PANEL) // 5
    # The middle of the second of the upper three fields: truth 1, prediction 0.
    middle = [picture[24 + height // 4, gap + panel * (PANEL + gap) + PANEL // 2].tolist() for panel in range(4)]
    assert middle == [[77, 77, 77], [0, 255, 0], [10, 20, 30], list(WRONG_COLOUR)]


def test_sample_picture_of_a_large_image(tmp_path: Path) -> None:
    """Pictures stay small enough to look at, for many classes too."""
    label = np.zeros((600, 2000), np.uint8)
    label[:] = np.arange(2000) // 80
    classes = [f"a rather long name of class {i}" for i in range(25)]
    palette = np.random.default_rng(0).integers(0, 256, (25, 3), np.uint8)
    draw_sample(tmp_path / "large.png", palette[label], label, label, classes, palette, "x")
    width, height = Image.open(tmp_path / "large.png").size
    assert width < 2000
    assert height < 400


def test_curves(tmp_path: Path) -> None:
    """A log whose first epochs were not evaluated, or with a single epoch, can be drawn."""
    records = [{"epoch": e, "loss": {"total": 3.0 / e, "ce": 1.0 / e}} for e in (1, 2, 3)]
    draw_curves(tmp_path / "none.png", records[:1])
    draw_curves(tmp_path / "curves.png", [*records[:2], {**records[2], "miou": 0.5}])
    pictures = [np.array(Image.open(tmp_path / name).convert("L")) for name in ("none.png", "curves.png")]
    assert pictures[0].shape == pictures[1].shape
    assert all((picture < 128).any() for picture in pictures)


def test_legends_lie_beside_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects curves from being covered: no legend overlaps its axes, for many terms and long names either, and all of
    each is on the picture."""
    figures: list[Figure] = []
    monkeypatch.setattr(report, "Figure", lambda *a, **k: figures.append(Figure(*a, **k)) or figures[-1])
    loss = {"total": 3.0, **{f"a rather long name {i}": 1.0 for i in range(8)}}
    draw_curves(tmp_path / "curves.png", [{"epoch": 1, "loss": loss, "miou": 0.5}])
    for axes in figures[0].axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
        assert figures[0].bbox.contains(legend.x1, legend.y0)
        assert figures[0].bbox.contains(legend.x0, legend.y1)


def test_curves_of_negative_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extra loss may be below 0 and is drawn all the same; otherwise the axis begins at 0."""
    figures: list[Figure] = []
    monkeypatch.setattr(report, "Figure", lambda *a, **k: figures.append(Figure(*a, **k)) or figures[-1])
    for dice in (-0.8, 0.2):
        draw_curves(tmp_path / "curves.png", [{"epoch": 1, "loss": {"total": 3.0, "dice": dice}}])
    negative, positive = (figure.axes[0].get_ylim() for figure in figures)
    assert negative[0] <= -0.8
    assert positive[0] == 0


def test_absent_line() -> None:
    """Classes that never occur are named (train ids in a file of label ids leave most of them out), others are not."""
    pixels = np.array([5, 0, 3, 0, *[0] * 252])
    assert absent_line(pixels, ("road", "sky", "car", "bus")).startswith("  no pixel of sky, bus: ")
    assert absent_line(pixels, ("road",)) == ""
