"""The build's decisions: whether torch is asked for, and what is built. (CI runs the builds themselves.)"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("setuptools")
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_installed_torch_is_found_from_an_isolated_build(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects from a second torch: under build isolation sys.path lacks it, but the target environment has it."""
    packages = str(Path(torch.__file__).parents[1])
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: packages)
    monkeypatch.setattr(backend, "find_compiler", lambda: "/usr/bin/c++")
    assert str(backend.find_torch()) == packages
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []


def test_torch_is_asked_for_only_if_it_is_missing_and_useful(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the empty environment (torch is fetched to build against), and one without a compiler (it is not)."""
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    monkeypatch.setattr(backend, "find_compiler", lambda: "/usr/bin/c++")
    assert backend.get_requires_for_build_wheel() == ["torch>=2.11"]
    monkeypatch.setattr(backend, "find_compiler", lambda: None)
    assert backend.get_requires_for_build_wheel() == []


def test_torch_of_the_user_site_counts_where_it_can_be_imported(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Protects ``pip install --user torch``: pip hides that site from an isolated build, not from the environment; and
    a virtual environment, which does not import from there, from a torch that is not its own."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").touch()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(backend.sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    monkeypatch.setattr(backend.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(backend.site, "getusersitepackages", lambda: str(tmp_path))
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert backend.find_torch() == tmp_path
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert backend.find_torch() is None
    (tmp_path / "pyvenv.cfg").write_text("include-system-site-packages = true\n")
    assert backend.find_torch() == tmp_path


def test_torch_that_will_be_upgraded_is_not_built_against(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Protects from an extension for a torch that pip then replaces, because the package needs a newer one."""
    monkeypatch.setattr(backend, "find_torch", lambda: tmp_path)
    monkeypatch.setattr(backend, "find_compiler", lambda: "/usr/bin/c++")
    for version, wanted in (("2.6.0+cu124", ["torch>=2.11"]), ("2.11.0", []), ("3.0", [])):
        info = tmp_path / "torch.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        assert backend.get_requires_for_build_wheel() == wanted


def cuda_plan(tmp_path: Path, nvcc_archs: str, gpus: str = "[]") -> str:
    """What would be compiled for CUDA with an nvcc 12.6 that knows these archs, on a machine with these GPUs."""
    pytest.importorskip("setuptools")
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").touch()
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "release 12.6, V12.6.1" || echo "{nvcc_archs}"\n')
    nvcc.chmod(0o755)
    code = (
        "import setuptools, sys\n"
        "from types import SimpleNamespace as Fake\n"
        "setuptools.setup = lambda **options: None\n"
        "sys.argv = ['setup.py', 'bdist_wheel']\n"
        "import setup\n"
        "plan = setup.Plan.__new__(setup.Plan)\n"
        f"cuda = Fake(is_available=lambda: {gpus} != [], device_count=lambda: len({gpus}), "
        f"get_device_capability=lambda d: {gpus}[d])\n"
        "plan.torch = Fake(version=Fake(cuda='12.6'), cuda=cuda)\n"
        "print(plan._look_for_cuda() or plan.archs)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_HOME": str(tmp_path)}
    env.pop("TORCH_CUDA_ARCH_LIST", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_an_older_nvcc_builds_for_what_it_knows(tmp_path: Path) -> None:
    """Protects CUDA 12.6 and older, whose nvcc stops at an arch it has never heard of."""
    assert cuda_plan(tmp_path, "compute_75 compute_80 compute_86 compute_90") == "7.5;8.0;9.0+PTX"


def test_ptx_serves_every_gpu_without_code_of_its_own(tmp_path: Path) -> None:
    """Protects GPUs of 11.0, whose number is below that of 12.0, and those to come: each runs code of its generation,
    or PTX that is not newer than itself."""
    archs = cuda_plan(tmp_path, "compute_75 compute_80 compute_90 compute_100 compute_110 compute_103 compute_120")
    code = [tuple(map(int, arch.removesuffix("+PTX").split("."))) for arch in archs.split(";")]
    ptx = [arch for arch, text in zip(code, archs.split(";"), strict=True) if text.endswith("+PTX")]
    for gpu in ((7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)):
        assert any(arch[0] == gpu[0] and arch <= gpu for arch in code) or any(arch <= gpu for arch in ptx), gpu
    assert len(ptx) == 1  # more of it would only make the library larger


@pytest.mark.parametrize(("gpus", "expected"), [("[(9, 0), (8, 0)]", "8.0;9.0"), ("[(12, 0)]", "cannot compile")])
def test_the_gpu_at_hand_is_what_is_built_for(tmp_path: Path, gpus: str, expected: str) -> None:
    """A machine with GPUs compiles for these alone; one that is newer than its nvcc gets a reason, not a traceback."""
    assert expected in cuda_plan(tmp_path, "compute_75 compute_80 compute_86 compute_90", gpus)


def plan(**environment: str) -> subprocess.CompletedProcess[str]:
    """What setup.py would build in this environment."""
    pytest.importorskip("setuptools")
    code = (
        "import setuptools, sys\n"
        "setuptools.setup = lambda **options: print(sorted(options))\n"
        "sys.argv = ['setup.py', 'bdist_wheel']\n"
        "import setup\n"
        "print(setup.Plan())\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no-such-compiler", "no C++ compiler was found"),
        ("'", "no C++ compiler was found"),
        ("/bin/false", "the C++ compiler does not compile C++20 with Python's headers (exit status 1)"),
    ],
)
def test_a_compiler_that_is_missing_or_broken_is_no_error(compiler: str, reason: str) -> None:
    """Protects machines without a compiler that works: no extension, a reason, and no traceback."""
    done = plan(CXX=compiler)
    assert done.returncode == 0, done.stderr
    assert f"extension  left out: {reason}" in done.stdout
    assert "ext_modules" not in done.stdout


def test_an_empty_cxx_means_the_usual_compiler() -> None:
    """Protects from a traceback where a script exports CXX without a value."""
    done = plan(CXX="", BCMF_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert done.stdout == plan(CXX="c++", BCMF_CUDA="0").stdout


def test_cuda_is_left_out_or_refused_with_a_reason() -> None:
    """Protects BCMF_CUDA=0/1: left out when told to; when demanded but impossible, a sentence and no CPU-only build."""
    if not any(Path(folder, "c++").exists() for folder in os.environ["PATH"].split(os.pathsep)):
        pytest.skip("no C++ compiler")
    left_out = plan(BCMF_CUDA="0")
    assert "CUDA       left out: BCMF_CUDA=0" in left_out.stdout, left_out.stderr
    if torch.version.cuda is None:
        refused = plan(BCMF_CUDA="1")
        assert refused.returncode != 0
        assert refused.stderr.strip().endswith("has no CUDA")
        assert "Traceback" not in refused.stderr


@pytest.mark.parametrize(
    ("nm", "readelf", "complaint"),
    [
        ("U aoti_torch_empty_strided", "[libtorch_cpu.so]", None),
        ("U exp@GLIBC_2.2.5", "[libstdc++.so.6]", None),
        ("w __gmon_start__", "[libc.so.6]", None),
        ("0000000000157a20 W _ZNSt19bad_optional_accessD1Ev", "[libm.so.6]", None),
        (
            "U _ZN3c106detail14torchCheckFailEPKcS2_jS2_",
            "",
            "_ZN3c106detail14torchCheckFailEPKcS2_jS2_ is C++ of torch",
        ),
        ("00000000000157a2 W _ZNK2at6Tensor4sizeEl", "", "_ZNK2at6Tensor4sizeEl is C++ of torch"),
        ("U _ZN5torch7LibraryD1Ev", "", "_ZN5torch7LibraryD1Ev is C++ of torch"),
        ("U PyErr_SetString", "", "PyErr_SetString is Python's"),
        ("w _Py_NoneStruct", "", "_Py_NoneStruct is Python's"),
        ("U torch_of_tomorrow", "", "torch_of_tomorrow is not in torch 2.11"),
        ("U GOMP_parallel@GOMP_4.0", "[libgomp.so.1]", "libgomp.so.1 is needed"),
        ("U _ZSt28__throw_bad_array_new_lengthv", "", "_ZSt28__throw_bad_array_new_lengthv has no version"),
        ("", "[libc10.so]", "libc10.so is needed"),
    ],
)
def test_what_the_library_of_a_wheel_needs(nm: str, readelf: str, complaint: str | None) -> None:
    """Protects the wheel from needing more than every torch, Python and glibc has that its name promises."""
    spec = importlib.util.spec_from_file_location("symbols", ROOT / ".ci" / "symbols.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    functions = set(module.LIST.read_text().split())
    needed = [f" 0x0000000000000001 (NEEDED)             Shared library: {readelf}"] if readelf else []
    said = list(module.complaints([f"                 {nm}"] if nm else [], needed, functions))
    assert [sentence.startswith(complaint or "no") for sentence in said] == ([True] if complaint else [])
