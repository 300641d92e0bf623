"""How everything in this folder is timed, and what a record says of the machine and the code.

All contenders take turns in one process, round after round, in an order drawn anew, so that no one always follows the
same other, in the memory that it left. A figure is the median over the rounds of a contender's time divided by the
baseline's in the same round, which a busy machine disturbs far less than times. The baseline runs twice a round: where
this A/A ratio is off by more than 5 %, or with fewer than 15 rounds, the result does not count and says so. On a GPU
times come from events, and the L2 cache is flushed before each step. Memory is the peak above the state before the
call: that of CUDA's allocator, or the process's resident set.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from bcmf_ext import dispatch, info

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
ROUNDS = 21
LEAST_ROUNDS = 15
AA_LIMIT = 0.05
AA = "A/A"  # the name of the baseline's second turn
WARM_UP = 3  # rounds that are not counted: kernels are compiled, caches filled, graphs captured
Measured = TypeVar("Measured")


class Clock:
    """Takes times on a device, in ms."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        # Twice the L2 of the largest GPU.
        self._cache = torch.empty(256 << 20, dtype=torch.uint8, device="cuda") if self.cuda else None

    def flush_cache(self) -> None:
        """Makes what follows read its input from memory, on a GPU."""
        if self._cache is not None:
            self._cache.zero_()

    def mark(self) -> Any:
        """This moment, on a GPU in its stream of work."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks; on a GPU it waits for the second."""
        if not self.cuda:
            return 1e3 * (end - start)
        end.synchronize()
        return start.elapsed_time(end)

    def time(self, run: Callable[[], object]) -> float:
        """Milliseconds that a call takes."""
        start = self.mark()
        run()
        return self.between(start, self.mark())

    def latency(self, run: Callable[[], object]) -> float:
        """Milliseconds from a call to the end of its work, as whoever waits for it sees them."""
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return 1e3 * (time.perf_counter() - start)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def take_turns(
    turns: Mapping[str, Callable[[], Measured]],
    rounds: int,
    title: str,
    before_round: Callable[[], object] = lambda: None,
) -> dict[str, list[Measured]]:
    """The results of each contender's calls, by name; the first is the baseline, whose second calls are under `AA`.

    before_round: what all contenders of a round share is made by it.
    """
    turns = {**turns, AA: next(iter(turns.values()))}
    measured: dict[str, list[Measured]] = {name: [] for name in turns}
    order = random.Random(0)
    for round_ in tqdm(range(-WARM_UP, rounds), title, leave=False, disable=None):
        before_round()
        for name in order.sample(list(turns), len(turns)):
            found = turns[name]()
            if round_ >= 0:
                measured[name].append(found)
    return measured


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """The ratios of two contenders' times, round by round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of these ratios."""
    return statistics.median(ratios(ours, theirs))


def does_count(rounds: int, aa: Sequence[float]) -> bool:
    """Whether the rounds are enough and no A/A ratio is off."""
    return rounds >= LEAST_ROUNDS and all(abs(found - 1) <= AA_LIMIT for found in aa)


def verdict(counts: bool) -> str:
    """The words in a table's heading for a result that does not count."""
    return "" if counts else "   DOES NOT COUNT: the machine was busy, or the rounds are too few"


def peak_above(run: Callable[[], object], cuda: bool) -> float:
    """Peak memory of a call above the state before it, MiB. (PyTorch's profiler does not see the scratch of C++.)"""
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")

    def read(key: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))

    # Otherwise the memory that malloc and our kernels keep of earlier steps would count as there before.
    dispatch.release_kept_memory()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # This resets the high-water mark to what is left.
    resident = read("VmRSS")
    run()
    return (read("VmHWM") - resident) / 1024


def device_name(device: str) -> str:
    """The device in names of files: cpu, or such as h100-80gb-hbm3."""
    if device == "cpu":
        return device
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia ")).strip("-")


def commit() -> str:
    """The commit, and whether a file was changed since; results are not counted, which a bench before may have
    written."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def about() -> dict[str, Any]:
    """Commit, a hash of the sources that were measured, versions and machine."""
    files = sorted(path for folder in ("bcmf_ext", "csrc") for path in (ROOT / folder).rglob("*.*") if path.is_file())
    sources = [path for path in files if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh")]
    return {
        "commit": commit(),
        "sources": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16],
        "versions": info.versions().splitlines(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record as JSON, and the folder that it goes to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
