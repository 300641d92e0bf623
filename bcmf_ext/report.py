"""Shows what a run does: lines and tables for the terminal, curves and pictures for the eye."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from .data import IGNORE_INDEX, SegmentationDataset
from .engine import Compute, NonFiniteLoss
from .errors import counted, warn
from .files import short_name, write_file
from .losses._module import LossModule
from .losses.criterion import SegmentationCriterion
from .metrics import ConfusionMatrix, Counts
from .options import FIRST_TERMS, WEIGHTED

IGNORED_COLOUR = (0, 0, 0)
WRONG_COLOUR = (255, 255, 255)  # White is near no class of our palettes, as each red is, and stands out from the dark.
PANEL = 480  # Each of the four panels is so many pixels wide, and at most twice as high.
FONT = ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), 14)


def scores(confusion: ConfusionMatrix, classes: Sequence[str]) -> dict[str, Any]:
    """mIoU, pixel accuracy and each class's IoU as the log holds them: None (JSON has no NaN) for an absent class."""
    iou = zip(classes, confusion.iou().tolist(), strict=True)
    return {
        "miou": confusion.mean_iou(),
        "pixel_accuracy": confusion.pixel_accuracy(),
        "iou": {name: None if math.isnan(value) else value for name, value in iou},
    }


def aligned(lines: Mapping[str, str]) -> str:
    """Names and what is said of each, in two columns; lines of the second begin below each other."""
    indent = "\n" + 10 * " "
    return "\n".join(f"{name:<10}{line}".replace("\n", indent) for name, line in lines.items())


def epoch_words(steps: int, batch_size: int, images: int) -> str:
    """Such as "4 steps of 2 images; the short last batch, of 1, is left out, with other images each time"."""
    words = f"{counted(steps, 'step')} of {counted(batch_size, 'image')}"
    if short := images % batch_size:
        words += f"; the short last batch, of {short}, is left out, with other images each time"
    return words


def network_words(network: Any) -> str:
    """How many parameters a `Network` has, and its auxiliary head."""
    parameters, head = sum(parameter.numel() for parameter in network.parameters()), network.auxiliary_head
    if head is None:
        return f"{parameters:,} parameters"
    auxiliary = sum(parameter.numel() for parameter in head.parameters())
    return f"{parameters - auxiliary:,} parameters, and {auxiliary:,} of the auxiliary head"


def loss_words(criterion: SegmentationCriterion, impl: str, warmup: int, iterations: int) -> str:
    """Such as "CE + 0.4 BCL + 1 CPG3, and 0.4 CE of the auxiliary head; impl cpu"; impl: as `choose_impl` says it.

    warmup: in how many of the iterations the terms beside the first gain their weights; 0: they have them all along.
    """
    first = criterion.first.upper() if criterion.ohem is None else criterion.ohem.words
    weighted = [option for name in WEIGHTED if (option := getattr(criterion, name)) is not None]
    terms = [first, *(option.words for option in weighted)]
    extra = {name: loss.label if isinstance(loss, LossModule) else name for name, (_, loss) in criterion.extra.items()}
    terms += [f"{criterion.extra[name][0]:g} {label}" for name, label in extra.items()]
    words = f"{' + '.join(terms)}, and {criterion.aux_weight:g} {first.split()[0]} of the auxiliary head; impl {impl}"
    ramped = [*(option.label for option in weighted), *extra.values()]
    if warmup and ramped:
        words += f"; {' and '.join(ramped)} gain weight in {counted(warmup, 'iteration')}"
        words += ", more than there are" if warmup >= iterations else ""
    elif warmup:
        words += "; no loss stands beside the first, so none has to warm up"
    return words


def device_words(device: torch.device, workers: int) -> str:
    """Such as "cpu, 2 threads, 1 loading process"."""
    threads = f", {counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    return f"{device}{threads}, {counted(workers, 'loading process', 'loading processes')}"


def compute_words(compute: Compute, why_dtype: str, compiled: bool) -> str:
    """Such as "bfloat16 (this GPU computes in it), channels_last, compiled"."""
    dtype = str(compute.dtype).removeprefix("torch.") if compute.dtype else "float32"
    layout = ", channels_last" if compute.channels_last else ""
    return f"{dtype} ({why_dtype}){layout}{', compiled' if compiled else ''}"


def nonfinite_words(stop: NonFiniteLoss, batch: Path | None, last: Path) -> str:
    """The sentence for a loss, or weights, that are not finite. batch: the file with the batch; None: it is the
    weights. last: the checkpoint from before."""
    place = f"epoch {stop.epoch + 1}, step {stop.step + 1}"
    before = f"{last} is from before: try a lower `lr`, or `amp='off'`."
    if batch is None:
        return f"The weights are not finite after {place}, though the loss was; {before}"
    return f"The loss is not finite in {place} ({stop}); the batch is saved as {batch}, and {before}"


def failure_words(error: RuntimeError, batch_size: int, crop_size: tuple[int, int]) -> str | None:
    """The sentence for an error of PyTorch that users can do something about; None for all others."""
    if isinstance(error, torch.OutOfMemoryError) or "CUDA out of memory" in str(error):  # PyTorch's error, and ours
        height, width = crop_size
        return (
            f"The GPU has too little memory for {counted(batch_size, 'crop')} of {height}×{width} pixels: lower "
            "`batch_size` or `crop_size`."
        )
    if isinstance(error, torch._dynamo.exc.TorchDynamoException):
        reason = " ".join(str(error).strip().split("\n\n")[0].split())  # What follows is advice to developers.
        return f"torch.compile failed ({reason}): `compile=False` trains without it."
    return None


def loss_line(record: Mapping[str, Any], epochs: int) -> str:
    """A record of the log in one line, but for its scores."""
    loss = dict(record["loss"])
    terms = f"loss {loss.pop('total'):.3f} ({', '.join(f'{name} {value:.3f}' for name, value in loss.items())})"
    if record.get("grad_share"):
        shares = ", ".join(f"{name} {share:.0%}" for name, share in record["grad_share"].items())
        terms += f", shares of the gradient: {shares}"
    ramped = [WEIGHTED[name].label if name in WEIGHTED else name for name in loss if name not in (*FIRST_TERMS, "aux")]
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
    """The value, or None for NaN, which JSON does not know."""
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
    """The result of `SegmentationDataset.check` in words: each class's share of the labelled pixels, and absent
    classes."""
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
    """Writes pixels (H, W) or (H, W, 3), uint8, as a PNG; with a palette (C, 3), pixels (H, W) are indices into it.
    Makes the folder. command: the mark by which it knows its file again, see `files.mark_of`."""
    picture = Image.fromarray(pixels)
    if palette is not None:
        picture.putpalette(palette.tobytes())
    mark, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    mark.add_text("Software", command)
    picture.save(buffer, format="png", pnginfo=mark)
    write_file(path, buffer.getbuffer())


def colourise(label: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """The colours of class indices (H, W), as (H, W, 3) uint8; ignored pixels are black."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette
    table[IGNORE_INDEX] = IGNORED_COLOUR
    return table[label]


def blend(image: np.ndarray, colours: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """Colours laid over an image, both (H, W, 3) uint8."""
    return np.round((1 - opacity) * image + opacity * colours).astype(np.uint8)


def error_map(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image in dark grey, with wrong pixels white and ignored ones black, (H, W, 3) uint8."""
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    picture = (40 + 0.4 * grey).astype(np.uint8)
    picture[label != prediction] = WRONG_COLOUR
    picture[label == IGNORE_INDEX] = IGNORED_COLOUR
    return picture


def draw_epoch(
    folder: Path,
    records: Sequence[dict[str, Any]],
    dataset: SegmentationDataset,
    predictions: Mapping[int, np.ndarray],
) -> None:
    """Draws a run's curves into its folder, and predictions, by their indices in the data set, into pictures/ there.
    Whatever is in the way, no picture ends a run."""
    for index in (None, *predictions):
        try:
            if index is None:
                draw_curves(folder / "curves.png", records)
                continue
            stem, (image, label) = dataset.stem(index), dataset.pair(index)
            path, title = folder / "pictures" / short_name(stem, ".png"), f"{stem}, epoch {records[-1]['epoch']}"
            draw_sample(path, image, label, predictions[index], dataset.classes, dataset.palette, title)
        except Exception as error:
            what = "curves.png" if index is None else f"the picture of {dataset.source(index)}"
            warn(f"{what} could not be drawn ({str(error).rstrip('.') or type(error).__name__}); the run goes on.")


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
    """A title, cut to the room that a panel has; its end stays, which says which picture of many this is."""
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
    figure = Figure((10, 6), dpi=100)
    above, below = figure.subplots(2, 1, sharex=True)
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1, 1), "frameon": False}  # No curve lies there.
    epochs = [record["epoch"] for record in records]
    marker = "o" if len(epochs) <= 30 else None
    for name in records[-1]["loss"]:
        style = {"color": "black", "linewidth": 2} if name == "total" else {}
        above.plot(epochs, [r["loss"].get(name, math.nan) for r in records], label=name, marker=marker, ms=3, **style)
    above.set_ylabel("loss and its unweighted terms")
    if above.dataLim.y0 >= 0:  # An extra loss may be negative.
        above.set_ylim(bottom=0)
    legends = [above.legend(**beside)]
    evaluated = [(record["epoch"], record["miou"]) for record in records if "miou" in record]
    if evaluated:
        below.plot(*zip(*evaluated, strict=True), color="tab:green", marker=marker, ms=3)
        best_epoch, best = max(evaluated, key=lambda pair: pair[1])
        below.plot(best_epoch, best, "*", color="tab:orange", ms=12, label=f"best {best:.3f},\nepoch {best_epoch}")
        legends.append(below.legend(**beside))
    below.set_ylabel("val mIoU")
    below.set_ylim(0, 1)
    below.set_xlabel("epoch")
    below.xaxis.get_major_locator().set_params(integer=True)
    below.set_xlim(0.5, max(2, len(epochs)) + 0.5)  # The ticks are whole numbers for a single epoch, too.
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    # The axes take what the legends leave: matplotlib's own layouts would take longer than all of the drawing.
    right = 0.98 - max(legend.get_window_extent().width for legend in legends) / figure.bbox.width
    figure.subplots_adjust(0.07, 0.08, max(0.3, right), 0.98, hspace=0.08)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": "bcmf_ext.train"})
    write_file(path, buffer.getbuffer())
