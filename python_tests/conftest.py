"""What all tests share. First: without a GPU, Triton's kernels are interpreted, which triton decides when imported."""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from harness.cases import Backend

from bcmf_ext import dispatch

if dispatch.INTERPRETED and importlib.util.find_spec("triton"):
    from harness import interpreter

    interpreter.mend()


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    chosen: Backend = request.param
    if chosen.why_not():
        pytest.skip(str(chosen.why_not()))
    chosen.load(monkeypatch)
    return chosen


def pytest_configure(config: pytest.Config) -> None:
    """Processes that test side by side (-n) share the cores; and nohup and a shell's & must not keep signals from runs
    that are tested for what they do then."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))
