"""What all tests share. First: without a GPU, Triton's kernels are interpreted, which triton decides when imported."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cases import Backend


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    chosen: Backend = request.param
    if chosen.why_not():
        pytest.skip(str(chosen.why_not()))
    chosen.load(monkeypatch)
    return chosen
