"""The CPU ops, whatever their tensors hold and whoever writes to them meanwhile: hostile.py's calls end well, and the
faults that it is there to find are found."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness import hostile

from bcmf_ext import ops

CALLS = 3000

# Calls one of the planted faults: what is checked in the library, and between which red zones torch's memory lies.
PLANTED = """
import ctypes, os, sys, torch
library = ctypes.CDLL(os.environ["BCMF_HOSTILE_LIBRARY"])
fault, count, at = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
tensor = torch.zeros(count, dtype=torch.uint8)
memory = ctypes.c_void_p(tensor.data_ptr())
if fault in ("read", "write"):
    library["planted_" + fault](memory, ctypes.c_int64(int(at)))
elif fault == "sum":
    library.planted_sum(ctypes.c_int(2**31 - 1), ctypes.c_int(int(at)))
else:
    library.planted_index(ctypes.c_double(at))
"""


@pytest.fixture(scope="module")
def library() -> Path:
    if reason := hostile.why_not():
        pytest.skip(reason)
    return hostile.build()


def run(library: Path, *command: object) -> subprocess.CompletedProcess[str]:
    environment = hostile.environment(library)
    command = (sys.executable, *map(str, command))
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("fault", "count", "at", "said"),
    [
        ("read", 15, 14, None),
        ("read", 15, 15, "heap-buffer-overflow"),
        ("read", 15, 15 + 100, "heap-buffer-overflow"),
        ("read", 128, -1, "heap-buffer-overflow"),
        ("write", 1 << 22, 1 << 22, "heap-buffer-overflow"),
        ("sum", 1, 0, None),
        ("sum", 1, 1, "signed integer overflow"),
        ("index", 1, -1.5, None),
        ("index", 1, float("nan"), "outside the range of representable values"),
    ],
)
def test_a_planted_fault_is_caught(library: Path, fault: str, count: int, at: float, said: str | None) -> None:
    """Protects the fuzz from finding nothing because nothing is checked: torch's tensors lie between red zones, and
    code that is compiled as the ops are, into the same library, is stopped and named."""
    done = run(library, "-c", PLANTED, fault, count, at)
    if said is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert said in done.stderr
        assert f"planted_{fault}" in done.stderr


def test_what_no_sanitizer_sees_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from what ends no process: calls that take long, errors of another kind, inputs that an op writes to."""

    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    monkeypatch.setattr(torch.ops, "bcmf", SimpleNamespace(work=work, take=lambda i: [][i], convert=int))
    monkeypatch.setattr(hostile, "SECONDS", 0.5)
    calls = [("work", 0.56), ("work", 0.01), ("take", 1), ("convert", "x")]
    attempts = [hostile.attempt(hostile.Call(op, [argument])) for op, argument in calls]
    assert [attempt.outcome for attempt in attempts] == ["returned", "returned", "IndexError", "ValueError"]
    reports = [attempt.report for attempt in attempts]
    assert reports == ["took 0.6 s", None, "IndexError: list index out of range", None]

    draw = hostile.Draw(seed=0, number=0)
    tensor = draw.float_tensor((2, 3), torch.float32, kind="usual", plain=True)
    before = [memory.block.clone() for memory in draw.memory]
    assert hostile.changed(draw, before, []) is None
    tensor[1, 2] += 1
    assert hostile.changed(draw, before, []) == "wrote to an input float32[6]/[1]+0"
    assert hostile.changed(draw, before, draw.memory) is None


def test_the_summary_is_as_long_as_that_of_the_op() -> None:
    """hostile.py runs without the package, and a call of the backward with another length would never get far."""
    assert hostile.SUMMARY == ops.SUMMARY


@pytest.mark.thorough
def test_no_call_reads_or_writes_outside_its_tensors(library: Path) -> None:
    """Protects whoever shares memory with a loss: labels, selections and statistics that anybody refills at any time,
    and arguments of any size, give a wrong number or an error, in no time, but no access out of bounds."""
    done = run(library, hostile.__file__, "--calls", CALLS)
    assert done.stdout.endswith(f"{CALLS} calls, 0 reports\n"), done.stdout + done.stderr[-10_000:]
    returned, refilled, raced = map(int, re.findall(r"\d+", done.stdout.splitlines()[-2]))
    assert returned > CALLS / 2  # most of them get as far as the kernels
    assert raced > CALLS / 10
    assert refilled > 0.9 * raced
