"""Which impl runs and why not the others; what happens to an extension that does not fit; what info prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bcmf_ext
from bcmf_ext import dispatch, info, ops

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything had been compiled."""
    monkeypatch.setattr(dispatch, "_NO_EXTENSION", None)
    monkeypatch.setattr(dispatch, "_NO_CUDA", None)


def test_auto_takes_the_first_that_can(built: None) -> None:
    """Protects the order cuda → triton → torch and cpu → torch, and PyTorch where a kernel lacks something."""
    assert dispatch.choose("op", "auto", CPU) == "cpu"
    assert dispatch.choose("op", "auto", CUDA) == "cuda"
    assert dispatch.choose("op", "auto", CUDA, {"cuda": "no kernel yet", "triton": "no kernel yet"}) == "torch"
    assert dispatch.choose("op", "auto", torch.device("meta")) == "torch"


def test_auto_without_a_compiler_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects users without a compiler: auto never fails."""
    monkeypatch.setattr(dispatch, "_NO_EXTENSION", "no compiler")
    monkeypatch.setattr(dispatch, "_NO_CUDA", "no compiler")
    monkeypatch.setattr(dispatch, "_NO_TRITON", "triton is not installed")
    assert dispatch.choose("op", "auto", CPU) == "torch"
    assert dispatch.choose("op", "auto", CUDA) == "torch"
    z, y = torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3, dtype=torch.long)
    assert bcmf_ext.cross_entropy(z, y).item() == pytest.approx(0.6931472)
    with pytest.raises(ValueError, match="cannot run cross_entropy: no compiler"):
        bcmf_ext.cross_entropy(z, y, impl="cpu")


@pytest.mark.parametrize(
    ("impl", "device", "says"),
    [
        ("cuda", CPU, "does not run on cpu tensors"),
        ("cpu", CUDA, "does not run on cuda tensors"),
        ("triton", CUDA, "BCL has no kernel there yet"),
        ("triton", torch.device("mps"), "does not run on mps tensors"),
        ("fast", CPU, 'choose from "auto"'),
    ],
)
def test_an_impl_asked_for_by_name_says_why_it_cannot(built: None, impl: str, device: torch.device, says: str) -> None:
    """Protects from silent fallbacks: a named impl runs or raises."""
    with pytest.raises(ValueError, match=says):
        dispatch.choose("op", impl, device, ops.loss_lacks(bcl=True))


@pytest.mark.parametrize("call", ["bcl", "cpg"])
def test_named_impl_of_what_cannot_run(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Protects the public functions: impl="cpu" is not answered by PyTorch behind the user's back."""
    monkeypatch.setattr(dispatch, "_NO_EXTENSION", "no compiler")
    z, y = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    calls = {
        "bcl": lambda: bcmf_ext.boundary_corrected_loss(z, y, impl="cpu"),
        "cpg": lambda: bcmf_ext.segmentation_loss(z, y, cpg=1.0, impl="cpu"),
    }
    with pytest.raises(ValueError, match=r"impl='cpu' cannot run \w+: no compiler"):
        calls[call]()


def test_triton_serves_where_cuda_was_not_built(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects GPU users without nvcc: "auto" takes Triton, and PyTorch only where triton is missing too; on the CPU
    Triton runs for tests, never by itself."""
    monkeypatch.setattr(dispatch, "_NO_CUDA", "nvcc was not found")
    monkeypatch.setattr(dispatch, "_NO_TRITON", None)
    assert dispatch.choose("op", "auto", CUDA) == "triton"
    assert dispatch.choose("op", "auto", CPU) == "cpu"
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="does not run on cpu tensors"):
        dispatch.choose("op", "triton", CPU)
    monkeypatch.setattr(dispatch, "_NO_TRITON", "triton is not installed")
    assert dispatch.choose("op", "auto", CUDA) == "torch"


def package_with(tmp_path: Path, build: dict) -> dict[str, str]:
    """The environment in which ``import bcmf_ext`` finds a copy of the package with this _build.json."""
    copy = tmp_path / "bcmf_ext"
    shutil.copytree(Path(bcmf_ext.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "_build.json"))
    facts = {"torch": torch.__version__, "no_extension": None, "no_cuda": None, "sources": None}
    (copy / "_build.json").write_text(json.dumps(facts | build) if build is not None else "{ damaged")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "ops.cpp").touch()
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("build", "says", "warns"),
    [
        ({"torch": "1.2.3", "no_extension": None}, "built for torch 1.2.3", True),
        ({"torch": None, "no_extension": "no C++ compiler was found"}, "no C++ compiler", False),
        ({"no_extension": None, "sources": "other"}, "csrc has changed", True),
        (None, "_build.json is damaged", True),
    ],
)
def test_import_survives_any_build(tmp_path: Path, build: dict | None, says: str, warns: bool) -> None:
    """Protects import: another torch, no compiler or other sources leave the extension out with a sentence, never an
    ImportError, and the losses run in PyTorch."""
    code = (
        "import torch, bcmf_ext\n"
        "print(bcmf_ext.cross_entropy(torch.zeros(1, 2, 2, 2), torch.zeros(1, 2, 2).long()).item())\n"
        "print(bcmf_ext.dispatch.why_not('cpu', 'cpu'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=package_with(tmp_path, build), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "0.693" in done.stdout
    assert says in done.stdout
    assert (says in done.stderr) == warns
    assert done.stderr.count("RuntimeWarning") == done.stderr.count("\n") == int(warns)  # a line, and no more


def test_a_library_that_does_not_load_is_left_out(tmp_path: Path) -> None:
    """Protects import from a broken shared library: one sentence, not a traceback."""
    env = package_with(tmp_path, {})
    shutil.rmtree(tmp_path / "csrc")
    for library in (tmp_path / "bcmf_ext").glob("_C*.so"):
        library.unlink()
    done = subprocess.run(
        [sys.executable, "-c", "import bcmf_ext"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "does not load" in done.stderr


@pytest.mark.skipif(dispatch.EXTENSION is None, reason="no extension")
def test_a_source_tree_finds_the_installed_extension(tmp_path: Path) -> None:
    """Protects ``pip install . && python -m bcmf_ext.train``: the current folder hides the installed package, whose
    extension must still be used."""
    shutil.copytree(
        Path(bcmf_ext.__file__).parent,
        tmp_path / "bcmf_ext",
        ignore=shutil.ignore_patterns("__pycache__", "_build.json", "_C*"),
    )
    installed = Path(dispatch.EXTENSION.__file__).parents[1]
    code = (
        f"import sys; sys.path.append({str(installed)!r})\n"
        "from bcmf_ext import dispatch; print(dispatch.__file__, dispatch.EXTENSION.__file__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "bcmf_ext" / "dispatch.py"), dispatch.EXTENSION.__file__]


def test_debug_checks_labels_where_nobody_else_looks() -> None:
    """Protects BCMF_DEBUG=1: labels are looked at before any impl runs, so that CUDA too gets the sentence, not NaN."""
    code = (
        "import torch\n"
        "from bcmf_ext.losses._kernels import resolve_impl\n"
        "resolve_impl('op', 'auto', torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 7), None, 255)\n"
    )
    for debug, fails in (("1", True), ("0", False)):
        env = {**os.environ, "BCMF_DEBUG": debug}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert ("target holds 7" in done.stderr) == fails


def test_info_says_which_impl_and_why_not_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects ``python -m bcmf_ext.info``: versions, build, and for each op and device the choice with reasons."""
    info.main()
    printed = capsys.readouterr().out
    assert f"torch      {torch.__version__}" in printed
    for op in info._OPS:
        assert f"\n{op}\n  on cpu tensors: " in printed
    assert "on cuda tensors" in printed
    assert (
        "not triton: BCL and CPG have no kernel there yet" in printed
        or "not triton: triton is not installed" in printed
    )
