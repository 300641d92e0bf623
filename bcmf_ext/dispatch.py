"""Which implementation of an op runs, and why not the others.

Asked before an op is called: without its library an op would raise NotImplementedError in the middle of a training
step.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import sysconfig
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .checks import in_torch_func
from .ops import CONTRACT

DEBUG = os.environ.get("BCMF_DEBUG") == "1"  # Labels are looked at on GPUs, too: an error for a wait.
IMPLS = ("cuda", "triton", "cpu", "torch")
_NO_SUCH_IMPL = f'there is no such impl; choose from "auto", {", ".join(map(repr, IMPLS))}'
ORDER = {"cuda": ("cuda", "triton", "torch"), "cpu": ("cpu", "torch")}  # what "auto" tries, by device
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels run on the CPU, slowly: for tests
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir, from the same source"


def _find_build() -> Path | None:
    """The folder that setup.py wrote _build.json to: this one; or, where the current folder is the source tree and
    hides the installed package (as in ``pip install . && python -m bcmf_ext.train``), the installed one."""
    folders = [Path(__file__).parent, *(Path(entry, "bcmf_ext") for entry in sys.path)]
    return next((folder for folder in folders if (folder / "_build.json").is_file()), None)


def _source_digest() -> str | None:
    """The digest of csrc beside the package, as setup.py computes it; None where there is no source tree."""
    csrc = Path(__file__).parents[1] / "csrc"
    if not (csrc / "about.cpp").is_file():  # The package is installed; a csrc beside it would be another package's.
        return None
    files = sorted(path for path in csrc.rglob("*") if path.is_file() and path.suffix != ".md")
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest() if files else None


class Extension:
    """The compiled kernels, which loading their library registers with torch.ops.bcmf.

    Raises:
        OSError: if the library does not load, for instance because torch lacks one of its functions.
    """

    def __init__(self, folder: Path) -> None:
        self.file = str(folder / "_kernels.so")
        torch.ops.load_library(self.file)
        self._functions = _import_module(folder) or _c_functions(self.file)

    def build_info(self) -> dict[str, str]:
        """What was compiled (csrc/about.h): compiler, cuda_archs; and cpu_capability, in use here."""
        return json.loads(self._functions.bcmf_build_info())

    def contract(self) -> dict[str, Any]:
        """What ops.py and the kernels have to agree on (csrc/about.h)."""
        return json.loads(self._functions.bcmf_contract())

    def release_kept_memory(self) -> None:
        """Gives the system the memory that the CPU's kernels keep from step to step."""
        self._functions.bcmf_release_kept_memory()


def _import_module(folder: Path) -> ModuleType | None:
    """The module _C that was built beside the library for one Python; None for another Python, or where it does not
    load."""
    spec = PathFinder.find_spec("bcmf_ext._C", [str(folder)])
    if spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:  # It is only a way to the library, which has loaded.
        return None
    return module


def _c_functions(library: str) -> ctypes.CDLL:
    """The library's own functions, which _C would call."""
    functions = ctypes.CDLL(library)
    functions.bcmf_build_info.restype = functions.bcmf_contract.restype = ctypes.c_char_p
    functions.bcmf_release_kept_memory.restype = None
    return functions


def _load_extension() -> tuple[Extension | None, str | None, str | None]:
    """The extension; why there is none; why it has no CUDA. Never raises: PyTorch serves where it is missing."""
    folder = _find_build()
    if folder is None:
        reason = "bcmf_ext runs from a source tree and is not installed (pip install .)"
        return None, reason, reason
    try:
        build = json.loads((folder / "_build.json").read_text())
        oldest, no_extension, no_cuda = build["oldest_torch"], build["no_extension"], build["no_cuda"]
        too_old = _release(torch.__version__) < _release(oldest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        reason = f"_build.json, which says what was built, is damaged: reinstall bcmf_ext ({_REINSTALL})"
    else:
        if no_extension is not None:
            reason = f"the extension was not built: {no_extension}"
            return None, reason, reason
        if too_old:
            reason = f"bcmf_ext's kernels need torch {oldest} or later, but this is torch {torch.__version__}"
        elif _source_digest() not in (None, build.get("sources")):
            reason = f"csrc has changed since the extension was built: reinstall it ({_REINSTALL})"
        else:
            try:
                if no_cuda is None and torch.version.cuda is None:  # One for AMD's GPUs calls them "cuda", too.
                    no_cuda = f"torch {torch.__version__} has no CUDA"
                extension = Extension(folder)
                if extension.contract() == CONTRACT:
                    return extension, None, no_cuda
                reason = f"the extension is of another bcmf_ext than ops.py: reinstall it ({_REINSTALL})"
            except OSError as error:
                reason = (
                    f"the extension does not load with torch {torch.__version__} ({error.__cause__ or error}): "
                    f"install a newer bcmf_ext, or this one again ({_REINSTALL})"
                )
    # warnings.warn would add a line that quotes this one.
    warnings.warn_explicit(
        f"{reason}. Until then its ops run in PyTorch, on GPUs in Triton.", RuntimeWarning, "bcmf_ext", 1
    )
    return None, reason, reason


def _release(version: str) -> list[int]:
    """[2, 11] of "2.11.0+cu130" and "2.11rc1"."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]


EXTENSION, _NO_EXTENSION, _NO_CUDA = _load_extension()
_NO_TRITON = None if importlib.util.find_spec("triton") else "triton is not installed"


def _why_no_launcher() -> str | None:
    """Why triton cannot compile its launcher, which is in C, when the first kernel runs; None if it can."""
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"triton needs a C compiler ({' or '.join(compilers)}), and none was found"
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as triton looks for it
    header = Path(sysconfig.get_path("include", scheme), "Python.h")
    if not header.is_file():
        return f"triton needs Python's C headers, and there is no {header} (in Debian's package python3-dev)"
    return None


_NO_LAUNCHER = _why_no_launcher()
_NAMES = {"triton": "Triton", "torch": "PyTorch"}


def release_kept_memory() -> None:
    """Gives the memory back to the system that the CPU's kernels keep for their next call. It would take it back itself
    whenever it needs it. Without the extension nothing is kept."""
    if EXTENSION is not None:
        EXTENSION.release_kept_memory()


def check_impl(impl: str) -> str:
    """Returns ``impl``; raises ValueError if there is none of this name."""
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"impl={impl!r}: {_NO_SUCH_IMPL}.")
    return impl


def why_not(impl: str, device: str) -> str | None:
    """Why ``impl`` cannot run ops on tensors of this device type; None if it can."""
    if impl not in IMPLS:
        return _NO_SUCH_IMPL
    if impl == "torch":
        return None
    if impl not in ORDER.get(device, ()) and not (impl == "triton" and device == "cpu" and INTERPRETED):
        return f"it does not run on {device} tensors"
    if impl == "triton" and device == "cuda" and _NO_TRITON is None:
        return _NO_LAUNCHER
    return {"cpu": _NO_EXTENSION, "cuda": _NO_CUDA, "triton": _NO_TRITON}[impl]


def choose(op: str, impl: str, device: torch.device) -> str:
    """The impl that runs ``op``: for "auto" the first that can, otherwise the one asked for.

    Where that is not "cuda" on a GPU, the first call says why. Under torch.jit.trace and in an ONNX export, which know
    PyTorch's own ops alone, "auto" is "torch".
    Raises ValueError if the impl asked for by name cannot run, and says why; NotImplementedError where kernels would
    run under a transform of torch.func.
    """
    if impl == "auto" and (torch.jit.is_tracing() or torch.onnx.is_in_onnx_export()):
        return "torch"
    chosen = _choose(op, impl, device)
    if chosen != "torch" and not torch.compiler.is_compiling() and in_torch_func():
        raise NotImplementedError(
            f"bcmf_ext's kernels know no torch.func (grad, vmap, jvp, …): use impl='torch' for {op} there."
        )
    return chosen


def _choose(op: str, impl: str, device: torch.device) -> str:
    if impl == "auto":
        chosen = next(i for i in ORDER.get(device.type, ("torch",)) if why_not(i, device.type) is None)
        if device.type == "cuda" and chosen != "cuda" and not torch.compiler.is_compiling():
            reasons = (why_not(i, device.type) for i in ORDER["cuda"])
            _say_once(f"On GPUs bcmf_ext runs in {_NAMES[chosen]}: {'; '.join(r for r in reasons if r)}.")
        return chosen
    reason = why_not(impl, device.type)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run {op}: {reason}.")
    return impl


@functools.cache
def _say_once(sentence: str) -> None:
    # warnings.warn would add a line that quotes this one.
    warnings.warn_explicit(sentence, RuntimeWarning, "bcmf_ext", 1)
