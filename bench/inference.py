"""Frames per second of the networks: ``python bench/inference.py [--device cuda] [--size H W …] [--model NAME …]``.

Every row does the same work, from a uint8 image on the device to the class of each of its pixels, on the device:
normalise, network, bilinear upsampling of the logits, arg-max. Batch 1, random weights. Rows: the network as it is
trained (eager, NCHW, fp32), in channels_last, compiled (torch.compile of that), the Predictor (batch norms folded,
channels_last, fused upsampling and arg-max, on a GPU as a CUDA graph); and the last three again in half precision
(autocast, or the Predictor's own), where the device computes in it.

A ratio is that to `eager` (protocol.py). Latency: from the call to the end of the work (on a GPU it is waited for);
median and 90th percentile. Memory: the peak above the state before a call, weights apart. Labels: the share of pixels
that have the class of `eager`.

Prints a table and writes bench/results/inference-<device>.json and .png.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

mpl.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
import protocol
from problem import interpolate

from bcmf_ext.checkpoint import VERSION, save_checkpoint
from bcmf_ext.config import make_config
from bcmf_ext.data import MEAN, STD, normalise
from bcmf_ext.engine import choose_device, choose_dtype
from bcmf_ext.errors import run_command
from bcmf_ext.inference import Predictor
from bcmf_ext.models import NETWORKS

CLASSES = 19
SIZES = ((1024, 2048), (720, 960))
BASELINE = "eager"
Row = Callable[[Tensor], Tensor]


def make_network(name: str, device: str) -> nn.Module:
    """A network with random weights, in evaluation mode, whose batch norms have seen some images."""
    torch.manual_seed(0)
    network = NETWORKS[name](CLASSES).to(device).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(2, 3, 128, 256, device=device))
    return network.eval()


@torch.inference_mode()
def predict(images: Tensor, network: Callable[[Tensor], Tensor], layout: torch.memory_format, half: Any) -> Tensor:
    """Labels of uint8 images, as a script would compute them with a trained network. half: autocast's dtype, or
    None."""
    images = normalise(images.contiguous(memory_format=layout))
    with torch.autocast(images.device.type, half, enabled=half is not None):
        logits = network(images)
    logits = interpolate(logits.float(), images.shape[2:])
    return logits.argmax(1).to(torch.uint8)


def make_predictor(name: str, network: nn.Module, device: str, amp: str) -> Predictor:
    """A Predictor, made from a checkpoint, as users make it."""
    content = {
        "version": VERSION,
        "config": asdict(make_config({"dataset": "folder", "model": name})),
        "classes": [str(index) for index in range(CLASSES)],
        "palette": torch.zeros(CLASSES, 3, dtype=torch.uint8),
        "mean": MEAN,
        "std": STD,
        "align_corners": False,
        "model": network.state_dict(),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "best.pt")
        save_checkpoint(path, content)
        return Predictor(path, device, amp)


def make_rows(name: str, device: str, compiled: bool) -> dict[str, Row]:
    network = make_network(name, device)
    half, _ = choose_dtype("auto", torch.device(device))
    nchw, last = torch.contiguous_format, torch.channels_last
    placed = make_network(name, device).to(memory_format=last)  # type: ignore[call-overload]
    rows: dict[str, Row] = {BASELINE: partial(predict, network=network, layout=nchw, half=None)}
    for dtype in (None, half) if half else (None,):
        suffix = f" {str(dtype).removeprefix('torch.')}" if dtype else ""
        rows[f"channels_last{suffix}"] = partial(predict, network=placed, layout=last, half=dtype)
        if compiled:
            rows[f"compile{suffix}"] = partial(predict, network=torch.compile(placed), layout=last, half=dtype)
        amp = {None: "off", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        rows[f"Predictor{suffix}"] = make_predictor(name, network, device, amp).labels
    return rows


def count(name: str, size: tuple[int, int]) -> dict[str, float]:
    """Counts parameters and multiply-accumulates (what the literature calls FLOPs), without the auxiliary head."""
    network = NETWORKS[name](CLASSES, aux_head=False, impl="torch").eval().to("meta")
    with FlopCounterMode(display=False) as counter:
        network(torch.empty(1, 3, *size, device="meta"))
    return {"parameters": sum(p.numel() for p in network.parameters()), "macs": counter.get_total_flops() / 2}


def measure(name: str, rows: dict[str, Row], size: tuple[int, int], device: str, rounds: int) -> dict[str, Any]:
    noise = torch.rand(1, 3, 9, 17, generator=torch.Generator().manual_seed(0))
    images = (255 * F.interpolate(noise, size, mode="bicubic").clamp(0, 1)).byte().to(device)
    expected = rows[BASELINE](images)
    clock = protocol.Clock(device)
    turns = {row: partial(clock.latency, partial(call, images)) for row, call in rows.items()}
    times = protocol.take_turns(turns, rounds, f"{name}, {'×'.join(map(str, size))}")
    found = {}
    for row, call in rows.items():
        found[row] = {
            "ms": statistics.median(times[row]),
            "p90_ms": statistics.quantiles(times[row], n=10)[-1],
            "fps": 1e3 / statistics.median(times[row]),
            "against": {rival: protocol.ratio(times[row], times[rival]) for rival in rows},
            "equal_labels": (call(images) == expected).double().mean().item(),
            "mib": protocol.peak_above(partial(call, images), images.is_cuda),
        }
    aa = protocol.ratio(times[protocol.AA], times[BASELINE])
    counts = protocol.does_count(rounds, [aa])
    return {"model": name, "size": size, **count(name, size), "A/A": aa, "counts": counts, "rows": found}


def render(result: dict[str, Any]) -> str:
    size = "×".join(map(str, (1, 3, *result["size"])))
    lines = [
        f"{result['model']}, {size}: {result['parameters']:,} parameters, {result['macs'] / 1e9:.2f} GMACs   "
        f"A/A {result['A/A']:.2f}{protocol.verdict(result['counts'])}",
        f"  {'':<24}{'FPS':>8}{'ms':>9}{'p90':>9}{'× eager':>9}{'× compile':>11}{'MiB':>7}   labels as eager's",
    ]
    for name, row in result["rows"].items():
        rival = f"compile{name.removeprefix(name.split(' ')[0])}"  # of the same dtype
        against = f"{row['against'][rival]:11.2f}" if rival in row["against"] else f"{'':11}"
        lines.append(
            f"  {name:<24}{row['fps']:8.1f}{row['ms']:9.2f}{row['p90_ms']:9.2f}{row['against'][BASELINE]:9.2f}{against}"
            f"{row['mib']:7.0f}   {row['equal_labels']:.4%}"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draws frames per second, in a panel for each network and size."""
    figure, axes = plt.subplots(1, len(results), figsize=(1 + 3 * len(results), 4), squeeze=False)
    for axis, result in zip(axes.flat, results, strict=True):
        rows = result["rows"]
        bars = axis.bar(list(rows), [row["fps"] for row in rows.values()])
        for bar, name in zip(bars, rows, strict=True):
            bar.set_color("tab:blue" if name.startswith("Predictor") else "tab:grey")
        axis.bar_label(bars, fmt="%.3g", fontsize=8)
        title = f"{result['model']}\n{'×'.join(map(str, result['size']))}" + ("" if result["counts"] else " (busy)")
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="x", labelrotation=60, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("frames per second")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu", help="%(default)s"
    )
    parser.add_argument("--model", nargs="*", choices=tuple(NETWORKS), default=tuple(NETWORKS), help="default: both")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="one size instead of two usual ones")
    parser.add_argument("--rounds", type=int, default=protocol.ROUNDS, help=f"default: {protocol.ROUNDS}; at least 2")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile, which takes minutes")
    parser.add_argument("--output", type=Path, default=protocol.RESULTS, metavar="DIR", help="where the results go")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds is at least 2")
    choose_device(arguments.device)
    path = arguments.output / f"inference-{protocol.device_name(arguments.device)}.json"
    included = "a uint8 image on the device → normalise, network, bilinear upsampling, arg-max → labels on the device"
    print(f"each row: {included}")
    record = {**protocol.about(), "included": included, "rounds": arguments.rounds, "results": []}
    for name in arguments.model:
        rows = make_rows(name, arguments.device, not arguments.no_compile)
        for size in [tuple(arguments.size)] if arguments.size else SIZES:
            record["results"].append(measure(name, rows, size, arguments.device, arguments.rounds))
            print(render(record["results"][-1]), flush=True)
            protocol.write_record(path, record)  # after each: a run may be cut short
    draw(record["results"], path.with_suffix(".png"))
    print(f"{path}, {path.with_suffix('.png')}")


if __name__ == "__main__":
    run_command(main)
