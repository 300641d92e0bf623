"""Our ops against pure PyTorch: ``python bench/kernels.py [--json FILE]``.

Protocol: the two sides run alternately in one process, 21 pairs; the figure is the median of the paired ratios, which a
busy machine disturbs far less than times. Beside it stands the A/A ratio, the baseline against itself in the same run:
where it is off by more than 5 % the row does not count and says so. CPU memory is the peak of the process's resident
set above its state before the call.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import bcmf_ext
from bcmf_ext import dispatch, info, ops

PAIRS = 21
Step = Callable[[], None]


@dataclass
class Row:
    """One comparison: median paired ratio ours / baseline, the A/A ratio, and both sides' median time and peak
    memory."""

    op: str
    shape: str
    dtype: str
    baseline: str
    impl: str
    ratio: float
    aa_ratio: float
    ours_ms: float
    baseline_ms: float
    ours_mib: float
    baseline_mib: float

    @property
    def counts(self) -> bool:
        return abs(self.aa_ratio - 1) <= 0.05


def seconds(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_mib(step: Step) -> float:
    """Peak resident memory of a step above the state before it. (The profiler does not see C++ scratch.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")

    def read(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = read("VmRSS")
    step()
    return (read("VmHWM") - before) / 1024


def compare(ours: Step, baseline: Step) -> dict[str, float]:
    for _ in range(3):
        ours(), baseline()
    times = [(seconds(ours), seconds(baseline), seconds(baseline)) for _ in range(PAIRS)]
    return {
        "ratio": statistics.median(a / b for a, b, _ in times),
        "aa_ratio": statistics.median(c / b for _, b, c in times),
        "ours_ms": 1e3 * statistics.median(a for a, _, _ in times),
        "baseline_ms": 1e3 * statistics.median(b for _, b, _ in times),
        "ours_mib": peak_mib(ours),
        "baseline_mib": peak_mib(baseline),
    }


def forward_backward(loss: Callable[[Tensor], Tensor], logits: Tensor) -> Step:
    def step() -> None:
        loss(logits).backward()
        logits.grad = None

    return step


def street_labels(n: int, height: int, width: int) -> Tensor:
    """Labels of demo scenes: they have the edges and the ignored pixels of a street."""
    scenes = bcmf_ext.data.open_dataset("demo", None, "val")
    labels = torch.stack([torch.from_numpy(scenes.label(i)) for i in range(n)])
    return F.interpolate(labels[:, None].float(), size=(height, width), mode="nearest")[:, 0].to(torch.uint8)


def cross_entropy_rows() -> list[Row]:
    """(8, 19, 360, 480), logits at label size, forward + backward; bf16 against what autocast does, and native."""
    n, c, h, w = 8, 19, 360, 480
    labels = street_labels(n, h, w)
    wide = labels.long()  # F.cross_entropy takes no uint8
    baselines = [
        (torch.float32, "F.cross_entropy(z)", lambda z: F.cross_entropy(z, wide, ignore_index=255)),
        (torch.bfloat16, "F.cross_entropy(z.float())", lambda z: F.cross_entropy(z.float(), wide, ignore_index=255)),
        (torch.bfloat16, "F.cross_entropy(z)", lambda z: F.cross_entropy(z, wide, ignore_index=255)),
    ]
    impl = dispatch.choose("cross_entropy", "auto", labels.device, ops.loss_lacks())
    found = []
    for dtype, name, baseline in baselines:
        logits = torch.randn(n, c, h, w, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        measured = compare(
            forward_backward(lambda z: bcmf_ext.cross_entropy(z, labels), logits), forward_backward(baseline, logits)
        )
        found.append(Row("cross_entropy", f"{n}×{c}×{h}×{w}", str(dtype).split(".")[1], name, impl, **measured))
        print(render(found[-1]), flush=True)
    return found


def render(row: Row) -> str:
    verdict = "" if row.counts else "   DOES NOT COUNT: the machine was busy"
    return (
        f"{row.op:<16} {row.shape:<14} {row.dtype:<9} {row.impl:<5} {row.ratio:5.2f} × {row.baseline:<27}"
        f" (A/A {row.aa_ratio:4.2f})  {row.ours_ms:6.1f} ms vs {row.baseline_ms:6.1f} ms"
        f"  {row.ours_mib:5.0f} MiB vs {row.baseline_mib:5.0f} MiB{verdict}"
    )


def machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "commit": commit,
        "bcmf_ext": info.versions().splitlines(),
        "platform": platform.platform(),
        "pairs": PAIRS,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows and the versions here")
    arguments = parser.parse_args()
    print("forward + backward, ratio of times, ours / baseline")
    found = cross_entropy_rows()
    if arguments.json:
        arguments.json.write_text(json.dumps({**machine(), "rows": [asdict(row) for row in found]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
