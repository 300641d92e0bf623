"""Which implementation of an op runs, and why not the others.

Asked before an op is called: without its library an op would raise NotImplementedError in the middle of a training
step.
"""

from __future__ import annotations

import importlib
import json
import os
import warnings
from pathlib import Path
from types import ModuleType

import torch

DEBUG = os.environ.get("BCMF_DEBUG") == "1"  # look at labels on CUDA too: costs a sync, gives a sentence instead of NaN
IMPLS = ("cuda", "triton", "cpu", "torch")
_ORDER = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}  # of "auto", by device
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir, from the same source"


def _load_extension() -> tuple[ModuleType | None, str | None, str | None]:
    """The extension; why there is none; why it has no CUDA. Never raises: PyTorch serves where it is missing."""
    try:
        build = json.loads((Path(__file__).parent / "_build.json").read_text())
    except FileNotFoundError:
        reason = "bcmf_ext runs from a source tree that was not built (pip install -e .)"
        return None, reason, reason
    if build["no_extension"] is not None:
        reason = f"the extension was not built: {build['no_extension']}"
        return None, reason, reason
    if build["torch"] != torch.__version__:
        reason = (
            f"bcmf_ext was built for torch {build['torch']}, but this is torch {torch.__version__}: "
            f"reinstall it ({_REINSTALL})"
        )
    else:
        try:
            return importlib.import_module("bcmf_ext._C"), None, build["no_cuda"]
        except ImportError as error:
            reason = f"the extension does not load ({error}): reinstall it ({_REINSTALL})"
    warnings.warn(f"{reason}. Until then its ops run in PyTorch.", RuntimeWarning, stacklevel=2)
    return None, reason, reason


EXTENSION, _NO_EXTENSION, _NO_CUDA = _load_extension()


def why_not(impl: str, device: str, unsupported: str | None = None) -> str | None:
    """Why ``impl`` cannot run an op on tensors of this device type; None if it can.

    unsupported: what the compiled op lacks for the call at hand, from the op's own file; None if it lacks nothing.
    """
    if impl not in IMPLS:
        return f'there is no such impl; choose from "auto", {", ".join(map(repr, IMPLS))}'
    if impl == "torch":
        return None
    if impl not in _ORDER.get(device, ()):
        return f"it does not run on {device} tensors"
    if impl == "triton":
        return "there is no Triton kernel for it yet"
    missing = _NO_EXTENSION if impl == "cpu" else _NO_CUDA
    return missing or unsupported


def choose(op: str, impl: str, device: torch.device, unsupported: str | None = None) -> str:
    """The impl that runs ``op``: for "auto" the first that can, otherwise the one asked for.

    Raises ValueError if the impl asked for by name cannot run, and says why.
    """
    if impl == "auto":
        return next(i for i in _ORDER.get(device.type, ("torch",)) if why_not(i, device.type, unsupported) is None)
    reason = why_not(impl, device.type, unsupported)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run {op}: {reason}.")
    return impl
