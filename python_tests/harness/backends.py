"""What the tests run kernels on: the CPU, the emulator, Triton or its interpreter, a GPU, and plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from bcmf_ext import dispatch
from harness import cuda_ops, emulator, ptx

WITHOUT_GPU: dict[str, Any] = {"emulated": emulator, "ptx": ptx}
"""Modules that run the CUDA kernels on the CPU."""


@dataclass(frozen=True)
class Backend:
    """Kernels and the device that they run on.

    impl: the name by which a user asks for the kernels. raises: whether a label out of range is a ValueError; it makes
    the loss NaN otherwise.
    """

    name: str
    impl: str
    device: str
    raises: bool = False

    @property
    def interpreted(self) -> bool:
        """Whether each operation takes 50 µs, so that selection.INTERPRETED says which tests run."""
        return self.impl == "triton" and self.device == "cpu"

    def why_not(self) -> str | None:
        """Why it cannot run here; None if it can."""
        if self.device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        if self.name in WITHOUT_GPU:
            return WITHOUT_GPU[self.name].why_not()
        return dispatch.why_not(self.impl, self.device)

    def load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Makes the public functions find it, until the test ends."""
        if self.name in WITHOUT_GPU:
            WITHOUT_GPU[self.name].load()
            cuda_ops.use(WITHOUT_GPU[self.name].OPS, monkeypatch)

    @contextmanager
    def launching(self) -> Iterator[None]:
        """What runs within has to launch kernels; it could pass without, if something else stood in for them."""
        before = ptx.launches() if self.name == "ptx" else 0
        yield
        assert self.name != "ptx" or ptx.launches() > before


KERNELS = (
    Backend("cpu", "cpu", "cpu", raises=True),
    Backend("emulated", "cuda", "cpu"),  # the CUDA kernels, compiled by g++
    Backend("ptx", "cuda", "cpu"),  # the CUDA kernels, compiled by nvcc
    Backend("triton", "triton", "cpu" if dispatch.INTERPRETED else "cuda"),
    Backend("cuda", "cuda", "cuda"),
)
BACKENDS = (*KERNELS, Backend("pytorch", "torch", "cpu", raises=True))  # -k torch would match dtypes, too


def on(backends: Sequence[Backend]) -> Any:
    """The mark by which a test runs on each of these backends; it takes the fixture ``backend``."""
    return pytest.mark.parametrize("backend", [parameter(backend) for backend in backends], indirect=True)


def parameter(backend: Backend, *values: Any, name: str = "") -> Any:
    """A backend, and what a test takes beside it, as an entry of pytest.mark.parametrize."""
    marks = pytest.mark.gpu if backend.device == "cuda" else ()
    return pytest.param(backend, *values, marks=marks, id=f"{name}-{backend.name}" if name else backend.name)


every_backend = on(BACKENDS)
every_kernel = on(KERNELS)
