"""Which impl runs and why not the others; what happens to an extension that does not fit; what info prints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

import pytest
import torch

import bcmf_ext
from bcmf_ext import dispatch, info

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if everything had been compiled."""
    monkeypatch.setattr(dispatch, "_NO_EXTENSION", None)
    monkeypatch.setattr(dispatch, "_NO_CUDA", None)


def test_auto_takes_the_first_that_can(built: None) -> None:
    """Protects the order cuda → triton → torch and cpu → torch."""
    assert dispatch.choose("op", "auto", CPU) == "cpu"
    assert dispatch.choose("op", "auto", CUDA) == "cuda"
    assert dispatch.choose("op", "auto", torch.device("meta")) == "torch"


def test_auto_without_a_compiler_is_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects users without a compiler: auto never fails."""
    monkeypatch.setattr(dispatch, "_NO_EXTENSION", "no compiler")
    monkeypatch.setattr(dispatch, "_NO_CUDA", "no compiler")
    monkeypatch.setattr(dispatch, "_NO_TRITON", "triton is not installed")
    dispatch._say_once.cache_clear()
    assert dispatch.choose("op", "auto", CPU) == "torch"
    with pytest.warns(RuntimeWarning, match="On GPUs bcmf_ext runs in PyTorch: no compiler; triton is not installed."):
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
        ("triton", torch.device("mps"), "does not run on mps tensors"),
        ("fast", CPU, 'choose from "auto"'),
    ],
)
def test_an_impl_asked_for_by_name_says_why_it_cannot(built: None, impl: str, device: torch.device, says: str) -> None:
    """Protects from silent fallbacks: a named impl runs or raises."""
    with pytest.raises(ValueError, match=says):
        dispatch.choose("op", impl, device)


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
    """Protects GPU users without nvcc: "auto" takes Triton and says so once; PyTorch only where triton, or the C
    compiler that it needs, is missing too. On the CPU Triton runs for tests, never by itself."""
    monkeypatch.setattr(dispatch, "_NO_CUDA", "nvcc was not found")
    monkeypatch.setattr(dispatch, "_NO_TRITON", None)
    monkeypatch.setattr(dispatch, "_NO_LAUNCHER", None)
    dispatch._say_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"^On GPUs bcmf_ext runs in Triton: nvcc was not found\.$"):
        assert dispatch.choose("op", "auto", CUDA) == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dispatch.choose("op", "auto", CUDA) == "triton"
        assert dispatch.choose("op", "auto", CPU) == "cpu"
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="does not run on cpu tensors"):
        dispatch.choose("op", "triton", CPU)
    monkeypatch.setattr(dispatch, "_NO_LAUNCHER", "triton needs a C compiler")
    with pytest.raises(ValueError, match="cannot run op: triton needs a C compiler"):
        dispatch.choose("op", "triton", CUDA)
    with pytest.warns(RuntimeWarning, match="in PyTorch: nvcc was not found; triton needs a C compiler"):
        assert dispatch.choose("op", "auto", CUDA) == "torch"


def package_with(tmp_path: Path, build: dict) -> dict[str, str]:
    """The environment in which ``import bcmf_ext`` finds a copy of the package with this _build.json."""
    copy = tmp_path / "bcmf_ext"
    shutil.copytree(Path(bcmf_ext.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "_build.json"))
    facts = {"oldest_torch": "2.11", "no_extension": None, "no_cuda": None, "sources": None}
    (copy / "_build.json").write_text(json.dumps(facts | build) if build is not None else "{ damaged")
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "about.cpp").touch()
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize(
    ("build", "says", "warns"),
    [
        ({"oldest_torch": "9.8"}, "kernels need torch 9.8 or later, but this is torch", True),
        ({"oldest_torch": 9}, "_build.json, which says what was built, is damaged", True),
        ({"no_extension": "no C++ compiler was found"}, "no C++ compiler", False),
        ({"no_extension": None, "sources": "other"}, "csrc has changed", True),
        (None, "_build.json, which says what was built, is damaged", True),
    ],
)
def test_import_survives_any_build(tmp_path: Path, build: dict | None, says: str, warns: bool) -> None:
    """Protects import: an older torch, no compiler or other sources leave the extension out with a sentence, never an
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
    (tmp_path / "bcmf_ext" / "_kernels.so").unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", "import bcmf_ext"], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "does not load" in done.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_torch_that_lacks_a_function_is_named(tmp_path: Path) -> None:
    """Protects from a torch that has dropped what the kernels call: a sentence names it, and PyTorch serves."""
    env = package_with(tmp_path, {})
    shutil.rmtree(tmp_path / "csrc")
    library = tmp_path / "bcmf_ext" / "_kernels.so"
    code = "void aoti_torch_of_yesterday(); __attribute__((constructor)) void call() { aoti_torch_of_yesterday(); }"
    subprocess.run(["c++", "-shared", "-fPIC", "-xc++", "-o", str(library), "-"], input=code, text=True, check=True)
    done = subprocess.run(
        [sys.executable, "-c", "from bcmf_ext import dispatch; print(dispatch.why_not('cpu', 'cpu') is None)"],
        env=env,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "False\n", done.stderr
    assert f"does not load with torch {torch.__version__} (" in done.stderr
    assert "aoti_torch_of_yesterday" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(dispatch.EXTENSION is None, reason="no extension")
def test_cuda_kernels_are_left_alone_by_a_torch_without_cuda(tmp_path: Path) -> None:
    """Protects one binary for every torch: one that was built with CUDA says so where torch has none, and so does a
    torch for AMD, whose tensors are on "cuda", too."""
    env = package_with(tmp_path, {"no_cuda": None})
    shutil.copy(dispatch.EXTENSION.file, tmp_path / "bcmf_ext")
    shutil.rmtree(tmp_path / "csrc")
    code = (
        "import torch; torch.version.cuda = None\n"
        "from bcmf_ext import dispatch; print(dispatch.why_not('cuda', 'cuda'))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"torch {torch.__version__} has no CUDA\n", "")


@pytest.mark.skipif(dispatch.EXTENSION is None, reason="no extension")
@pytest.mark.parametrize("module", [None, "no library"])
def test_a_python_without_its_module_gets_the_kernels(tmp_path: Path, module: str | None) -> None:
    """Protects one binary for every Python: where ``_C`` was built for another one, or does not load, the kernels run,
    and what they tell of themselves is the same."""
    copy = tmp_path / "bcmf_ext"
    shutil.copytree(Path(bcmf_ext.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "_C*.so"))
    for name in ("_kernels.so", "_build.json"):
        shutil.copy(Path(dispatch.EXTENSION.file).with_name(name), copy)
    if module is not None:
        (copy / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_text(module)
    code = (
        "from bcmf_ext import dispatch, release_kept_memory\n"
        "release_kept_memory()\n"
        "print(dispatch.why_not('cpu', 'cpu'), dispatch.EXTENSION.build_info(), dispatch.EXTENSION.contract())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    told = dispatch.EXTENSION.build_info(), dispatch.EXTENSION.contract()
    assert (done.stdout.strip(), done.stderr) == (f"None {told[0]} {told[1]}", "")


@pytest.mark.skipif(dispatch.EXTENSION is None, reason="no extension")
def test_an_extension_of_other_options_is_left_out(tmp_path: Path) -> None:
    """Protects from options that are taken for others: torch hands them over by their order and only counts them."""
    env = package_with(tmp_path, {})
    shutil.copy(dispatch.EXTENSION.file, tmp_path / "bcmf_ext")
    shutil.rmtree(tmp_path / "csrc")
    options = tmp_path / "bcmf_ext" / "options.py"
    text = options.read_text()
    assert text.count("    bcl_weight: float = 0.0\n") == text.count("    cpg_weight: float = 0.0\n") == 1
    swapped = text.replace("    bcl_weight: float", "    …").replace("    cpg_weight: float", "    bcl_weight: float")
    options.write_text(swapped.replace("    …", "    cpg_weight: float"))
    code = "import bcmf_ext; print(bcmf_ext.dispatch.why_not('cpu', 'cpu') is None)"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert "the extension is of another bcmf_ext than ops.py" in done.stderr


def test_releases_of_torch_are_numbers() -> None:
    """Protects the floor from comparing texts, and from versions of builds of torch's own."""
    versions = ("2.9", "2.10.1", "2.11rc1", "2.13.0.dev20260101", "2.14.1+cu130", "3.0")
    releases = [dispatch._release(version) for version in versions]
    assert releases == sorted(releases)
    assert dispatch._release("2.11.0a0+git123") == dispatch._release("2.11")


@pytest.mark.skipif(dispatch.EXTENSION is None, reason="no extension")
def test_a_source_tree_finds_the_installed_extension(tmp_path: Path) -> None:
    """Protects ``pip install . && python -m bcmf_ext.train``: the current folder hides the installed package, whose
    extension must still be used."""
    shutil.copytree(
        Path(bcmf_ext.__file__).parent,
        tmp_path / "bcmf_ext",
        ignore=shutil.ignore_patterns("__pycache__", "_build.json", "_C*", "_kernels.so"),
    )
    installed = Path(dispatch.EXTENSION.file).parents[1]
    code = (
        f"import sys; sys.path.append({str(installed)!r})\n"
        "from bcmf_ext import dispatch; print(dispatch.__file__, dispatch.EXTENSION.file)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "bcmf_ext" / "dispatch.py"), dispatch.EXTENSION.file]


def test_debug_checks_labels_where_nobody_else_looks() -> None:
    """Protects BCMF_DEBUG=1: labels are looked at before any impl runs, so that CUDA too gets the sentence, not NaN."""
    code = (
        "import sys, torch\n"
        "from bcmf_ext import cross_entropy, dispatch\n"
        "dispatch.choose = lambda *_: sys.exit('an impl runs')\n"
        "cross_entropy(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), 7))\n"
    )
    for debug, fails in (("1", True), ("0", False)):
        env = {**os.environ, "BCMF_DEBUG": debug}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert ("target holds 7" if fails else "an impl runs") in done.stderr


def test_info_says_which_impl_and_why_not_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """Protects ``python -m bcmf_ext.info``: versions, build, and for each device the choice with reasons."""
    info.main([])
    printed = capsys.readouterr().out
    assert f"torch      {torch.__version__}" in printed
    chosen = {device: dispatch.choose("op", "auto", torch.device(device)) for device in ("cpu", "cuda")}
    assert f"\non cpu tensors: {chosen['cpu']}\n" in printed
    assert f"\non cuda tensors: {chosen['cuda']}\n" in printed
    assert ("  not triton: triton is not installed" in printed) == (dispatch._NO_TRITON is not None)


def test_a_machine_without_a_c_compiler() -> None:
    """Protects "auto never fails for lack of a compiler": triton compiles C when a kernel first runs, so that without a
    compiler it must not be chosen; info says why."""
    code = "from bcmf_ext import info; print(info.impls())"
    env = {**os.environ, "CC": "no-such-compiler"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    missing = "triton is not installed" if dispatch._NO_TRITON else "triton needs a C compiler (no-such-compiler)"
    assert f"not triton: {missing}" in done.stdout


def test_a_machine_without_pythons_headers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Protects from a C compiler that stops at "Python.h: No such file" in the middle of a training step: systems come
    with a Python without headers."""
    monkeypatch.setenv("CC", "python3" if shutil.which("python3") else "python")  # any program that is there
    monkeypatch.setattr(dispatch.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert f"there is no {tmp_path}/Python.h" in str(dispatch._why_no_launcher())
    (tmp_path / "Python.h").touch()
    assert dispatch._why_no_launcher() is None
