"""What a run shows of itself: lines and tables for the terminal, curves and pictures for the eye."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .data import IGNORE_INDEX
from .files import write_file
from .metrics import ConfusionMatrix, Counts

IGNORED_COLOUR = (0, 0, 0)
WRONG_COLOUR = (230, 30, 30)
PANEL = 480  # width of each of the four panels, in pixels; they are at most twice as high
FONT = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 14)


def scores(confusion: ConfusionMatrix, classes: Sequence[str]) -> dict[str, Any]:
    """mIoU, pixel accuracy and each class's IoU as the log holds them: None (JSON has no NaN) for an absent class."""
    iou = zip(classes, confusion.iou().tolist(), strict=True)
    return {
        "miou": confusion.mean_iou(),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "iou": {name: None if math.isnan(value) else value for name, value in iou},
    }


def loss_line(record: Mapping[str, Any], epochs: int) -> str:
    """A record of the log in one line, but for its scores."""
    loss = dict(record["loss"])
    terms = f"loss {loss.pop('total'):.3f} ({', '.join(f'{name} {value:.3f}' for name, value in loss.items())})"
    if record.get("grad_share"):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in record["grad_share"].items())
        terms += f", shares of the gradient: {shares}"
    ramped = [name.upper() if name in ("bcl", "cpg") else name for name in loss if name not in ("ce", "aux")]
    if record.get("loss_ramp", 1) < 1 and ramped:
        terms += f", {' and '.join(ramped)} at {record['loss_ramp']:.0%} of the weight"
    speed = f"{record['images_per_second']:.1f} images/s, {record['seconds']:.0f} s"
    return f"epoch {record['epoch']}/{epochs}: {terms}, lr {record['lr']:.2g}, {speed}"


def score_lines(record: Mapping[str, Any], remark: str = "") -> str:
    """`scores` as text: a line and a table."""
    head = f"  mIoU {record['miou']:.4f}{remark}, pixel accuracy {record['pixel_accuracy']:.4f}"
    return f"{head}\n{iou_table(record['iou'])}"


def iou_table(iou: Mapping[str, float | None], columns: int = 4) -> str:
    """The IoU of each class in aligned columns, read downwards; "–" for a class in neither truth nor prediction."""
    width = max(map(len, iou))
    cells = [f"{name:<{width}} {'    –' if value is None else f'{value:.3f}'}" for name, value in iou.items()]
    rows = math.ceil(len(cells) / columns)
    return "\n".join("  " + "   ".join(cells[row::rows]) for row in range(rows))


def metrics_record(metrics: Sequence[Counts], classes: Sequence[str]) -> dict[str, Any]:
    """Every score of the metrics, in the mean and of each class, as metrics.json holds them: None where there is
    nothing to score."""
    columns = {name: column for metric in metrics for name, column in metric.scores().items()}
    return {
        "mean": {name: none_for_nan(column.nanmean().item()) for name, column in columns.items()},
        "classes": {
            label: {name: none_for_nan(column[index].item()) for name, column in columns.items()}
            for index, label in enumerate(classes)
        },
    }


def none_for_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def metrics_table(record: Mapping[str, Any]) -> str:
    """metrics.json as text: the usual two scores; a line for each class, and one for the mean; "–" where there is
    nothing to score."""
    rows = [*record["classes"].items(), ("mean", record["mean"])]
    names = [name.rpartition("_") if name.endswith("px") else ("", "", name) for name in record["mean"]]
    columns = Counter(group for group, *_ in names)
    spaces = [max(7, 2 + len(last), math.ceil((2 + len(group)) / columns[group])) for group, _, last in names]
    width = max(len(name) for name, _ in rows)

    def line(name: str, cells: Iterable[str], spaces: Iterable[int] = spaces) -> str:
        return f"  {name:<{width}}" + "".join(f"{cell:>{space}}" for cell, space in zip(cells, spaces, strict=True))

    above: dict[str, int] = {}
    for (group, *_), space in zip(names, spaces, strict=True):
        above[group] = above.get(group, 0) + space
    miou, accuracy = (math.nan if v is None else v for v in (record["mean"]["iou"], record["pixel_accuracy"]))
    lines = [f"  mIoU {miou:.4f}, pixel accuracy {accuracy:.4f}", line("", above, above.values())]
    lines.append(line("", (last for *_, last in names)))
    for name, row in rows:
        lines.append(line(name, ("–" if value is None else f"{value:.3f}" for value in row.values())))
    return "\n".join(lines)


def share_lines(pixels: np.ndarray, classes: Sequence[str]) -> str:
    """What `SegmentationDataset.check` counted: each class's share of the labelled pixels, and who never occurs."""
    counts = pixels[: len(classes)]
    width = max(map(len, classes))
    percent = 100 * counts / max(1, counts.sum())
    cells = [f"{name:<{width}} {share:5.1f} %" for name, share in zip(classes, percent, strict=True)]
    rows = math.ceil(len(cells) / 4)
    lines = ["  " + "   ".join(cells[row::rows]) for row in range(rows)]
    return "\n".join(lines) + "\n" + absent_line(pixels, classes)


def absent_line(pixels: np.ndarray, classes: Sequence[str]) -> str:
    """The classes of which there is no pixel, as a line; nothing if all occur."""
    absent = [name for name, count in zip(classes, pixels, strict=False) if count == 0]
    return f"  no pixel of {', '.join(absent)}: check the ids if that is not meant\n" if absent else ""


def save_png(path: Path, pixels: np.ndarray, command: str, palette: np.ndarray | None = None) -> None:
    """Writes (H, W) or (H, W, 3) uint8; with a palette (C, 3), (H, W) as indices into it. Makes the folder. command:
    the mark by which it knows its file again, see `files.mark_of`."""
    picture = Image.fromarray(pixels)
    if palette is not None:
        picture.putpalette(palette.tobytes())
    mark, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    mark.add_text("Software", command)
    picture.save(buffer, format="png", pnginfo=mark)
    write_file(path, buffer.getbuffer())


def colourise(label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """(H, W) class indices to (H, W, 3) uint8 colours; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = IGNORED_COLOUR
    return table[label]


def blend(image: np.ndarray, colours: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """Colours laid over an image, both (H, W, 3) uint8."""
    return np.round((1 - opacity) * image + opacity * colours).astype(np.uint8)


def error_map(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8: the image in pale grey, wrong pixels red, ignored ones black."""
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    picture = (150 + 0.4 * grey).astype(np.uint8)
    picture[label != prediction] = WRONG_COLOUR
    picture[label == IGNORE_INDEX] = IGNORED_COLOUR
    return picture


def draw_sample(
    path: Path,
    image: np.ndarray,
    label: np.ndarray,
    prediction: np.ndarray,
    classes: Sequence[str],
    palette: np.ndarray,
    title: str,
) -> None:
    """Writes a PNG: image, truth, prediction and errors side by side, with the classes that occur as legend.

    Drawn with Pillow: after every epoch of a short run, matplotlib's time for it would show.
    """
    valid = label != IGNORE_INDEX
    wrong = (label != prediction)[valid]
    panels = {
        title: image,
        "truth": colourise(label, palette),
        "prediction": colourise(prediction, palette),
        f"errors, {100 * wrong.mean() if wrong.size else 0:.1f} % of the pixels": error_map(image, label, prediction),
    }
    legend = [(classes[i], tuple(palette[i])) for i in np.union1d(label[valid], prediction)]
    legend += [("wrong", WRONG_COLOUR), ("ignored", IGNORED_COLOUR)]

    gap, line = 8, 24
    scale = min(PANEL / label.shape[1], 2 * PANEL / label.shape[0])
    height, width = (max(1, round(scale * side)) for side in label.shape)
    entries, legend_bottom = _flow(legend, 4 * (PANEL + gap) - gap, top=line + height + gap, line=line)
    canvas = Image.new("RGB", (4 * (PANEL + gap) + gap, legend_bottom + gap), "white")
    draw = ImageDraw.Draw(canvas)
    for column, (name, pixels) in enumerate(panels.items()):
        left = gap + column * (PANEL + gap)
        draw.text((left, line // 2), _cut(name), "black", FONT, anchor="lm")
        resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
        canvas.paste(Image.fromarray(pixels).resize((width, height), resampling), (left, line))
    for x, y, name, colour in entries:
        draw.rectangle((gap + x, y + 5, gap + x + 20, y + line - 7), colour, "grey")
        draw.text((gap + x + 26, y + line // 2), name, "black", FONT, anchor="lm")
    save_png(path, np.asarray(canvas), "bcmf_ext.train")


def _cut(title: str) -> str:
    """As much of a title as a panel has room for; the end says which picture it is of many."""
    cut = title
    while FONT.getlength(cut) > PANEL:
        cut = "…" + cut[2:]
    return cut


def _flow(
    legend: Sequence[tuple[str, tuple[int, ...]]], width: int, top: int, line: int
) -> tuple[list[tuple[int, int, str, tuple[int, ...]]], int]:
    """Places legend entries from left to right, in as many lines as they need: (x, y, name, colour), and the bottom."""
    placed, x, y = [], 0, top
    for name, colour in legend:
        space = 26 + round(FONT.getlength(name)) + 18
        if x + space > width and x > 0:
            x, y = 0, y + line
        placed.append((x, y, name, colour))
        x += space
    return placed, y + line


def draw_curves(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes a PNG of the loss terms and the mIoU over the epochs of a log."""
    figure = Figure((8, 6), dpi=100)
    above, below = figure.subplots(2, 1, sharex=True)
    figure.subplots_adjust(0.09, 0.08, 0.98, 0.98, hspace=0.08)
    epochs = [record["epoch"] for record in records]
    marker = "o" if len(epochs) <= 30 else None
    for name in records[-1]["loss"]:
        style = {"color": "black", "linewidth": 2} if name == "total" else {}
        above.plot(epochs, [r["loss"].get(name, math.nan) for r in records], label=name, marker=marker, ms=3, **style)
    above.set_ylabel("loss and its unweighted terms")
    if above.dataLim.y0 >= 0:  # an extra loss may be negative
        above.set_ylim(bottom=0)
    above.legend(loc="upper right", ncols=5, frameon=False)
    evaluated = [(record["epoch"], record["miou"]) for record in records if "miou" in record]
    if evaluated:
        below.plot(*zip(*evaluated, strict=True), color="tab:green", marker=marker, ms=3)
        best_epoch, best = max(evaluated, key=lambda pair: pair[1])
        below.plot(best_epoch, best, "*", color="tab:orange", ms=12, label=f"best {best:.3f}, epoch {best_epoch}")
        below.legend(loc="lower right", frameon=False)
    below.set_ylabel("val mIoU")
    below.set_ylim(0, 1)
    below.set_xlabel("epoch")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set_xlim(0.5, max(2, len(epochs)) + 0.5)  # whole numbers for a single epoch, too
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "bcmf_ext.train"})
    write_file(path, buffer.getbuffer())
