"""The ops that csrc/cuda registers, for a library that runs its kernels without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.library import Library

from bcmf_ext import dispatch, ops

CSRC = Path(__file__).parents[2] / "csrc"
LAUNCHERS = tuple(sorted(str(path.relative_to(CSRC)) for path in CSRC.rglob("*.cu")))
"""The files of csrc that launch the kernels."""
SOURCES = (
    *(str(path) for path in sorted(CSRC.glob("cuda/**/*_op.cpp"))),
    str(CSRC / "loss_tensors.cpp"),
    str(Path(__file__).with_name("no_device.cpp")),
)
"""What such a library is compiled from, beside these."""


def define(lib: Library) -> dict[str, Any]:
    """Defines the ops in a library; by the name of their table in ``bcmf_ext.ops``."""
    always_cuda = lambda logits: "cuda"  # noqa: E731
    return {
        "LOSS": ops.define_loss(lib, "loss", always_cuda),
        "LOSS_HALVES": ops.define_loss_halves(lib, always_cuda),
        "UPSAMPLE_ARGMAX": ops.define_upsample_argmax(lib, "upsample_argmax"),
        "POOL_NORM_RELU": ops.define_pool_norm_relu(lib, "pool_norm_relu"),
        "ADD_NORM_RELU": ops.define_add_norm_relu(lib, "add_norm_relu"),
        "SRM": ops.define_srm(lib, "srm"),
    }


def use(defined: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the public functions find them as impl "cuda", on the CPU."""
    for table, op in defined.items():
        monkeypatch.setitem(getattr(ops, table), "cuda", op)
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("cuda", "torch"))
    monkeypatch.setattr(dispatch, "_NO_CUDA", None)
