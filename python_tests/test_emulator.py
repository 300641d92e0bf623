"""The emulator finds what it is there to find, and the kernels are clean under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from harness import emulator

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    executable = tmp_path_factory.mktemp("planted") / "planted"
    emulator.compile_sanitized("planted.cpp", executable)
    return executable


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def test_a_missing_barrier_is_caught(planted: Path) -> None:
    """Protects the order test: without its barrier a kernel gives other bits in another order, with it the same."""
    assert run(planted, "barrier").stdout == "with barrier: same bits\nwithout barrier: other bits\n"


def test_an_access_out_of_bounds_is_caught(planted: Path) -> None:
    """Protects from reading past the end of shared memory: AddressSanitizer stops and names the kernel's line."""
    done = run(planted, "bounds")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert "read_one_too_far" in done.stderr


def test_a_divergent_barrier_is_caught(planted: Path) -> None:
    """Protects from a barrier that not all threads reach, which hangs or corrupts on a GPU."""
    stdout = run(planted, "divergence").stdout
    assert stdout.startswith("divergent barrier: 32 threads at ")
    assert "32 threads at the end of the kernel" in stdout


def test_too_little_shared_memory_is_caught(planted: Path) -> None:
    """Protects from a launch that asks for less dynamic shared memory than the kernel cuts into arrays."""
    done = run(planted, "shared")
    assert done.returncode != 0
    assert "a block uses more dynamic shared memory than its launch asked for" in done.stderr


@pytest.mark.thorough
def test_kernels_are_clean_under_sanitizers(tmp_path: Path) -> None:
    """Protects every kernel, in every dtype and option, from accesses out of bounds, reads of memory that nothing has
    written, undefined behaviour, and results that depend on the order of threads."""
    emulator.compile_sanitized("sanitized.cpp", tmp_path / "sanitized")
    done = run(tmp_path / "sanitized")
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr


def test_match_within_is_clean_under_sanitizers(tmp_path: Path) -> None:
    """Protects the metrics' CPU kernels, with the widest vectors, from accesses out of bounds at any size, radius and
    label; and their distances."""
    emulator.compile_sanitized("sanitized_match.cpp", tmp_path / "match", include="serial")
    done = run(tmp_path / "match")
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr
