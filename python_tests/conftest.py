"""What all tests share. First: without a GPU, Triton's kernels are interpreted, which triton decides when imported."""

from __future__ import annotations

import importlib.util
import os
import signal
from collections import Counter
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from harness import selection
from harness.backends import Backend

from bcmf_ext import dispatch

if dispatch.INTERPRETED and importlib.util.find_spec("triton"):
    from harness import interpreter

    interpreter.mend()

LEFT_OUT = pytest.StashKey[dict[str, int]]()
"""How many tests were not collected, by the reason why."""


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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that are named on the command line (``file.py::test``, ``-k``) run in full, as do all where CI is set."""
    named = config.option.keyword or any("::" in argument for argument in config.args)
    everything = "CI" in os.environ or bool(named)
    left_out = selection.left_out(items, everything)
    config.stash[LEFT_OUT] = {why: len(tests) for why, tests in left_out.items() if tests}
    gone = {id(test) for tests in left_out.values() for test in tests}
    items[:] = [item for item in items if id(item) not in gone]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process that tests side by side with others tells the one that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})  # of all processes the same


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    counts = Counter(config.stash.get(LEFT_OUT, {}))
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counts[reason.removeprefix("Skipped: ")] += 1
    if counts:
        terminalreporter.section("left out", sep="-")
    for reason, count in counts.most_common():
        terminalreporter.line(f"{count:6} {reason}")
