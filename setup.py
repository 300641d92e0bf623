"""Builds the extension with torch's extension builder, or leaves it out and says why.

The extension is two files: ``_kernels.so``, which runs with every torch from OLDEST_TORCH on and with every Python, and
``_C``, a module for this Python, which tells what was built.

Environment: BCMF_CUDA=0/1 (leave CUDA out / fail if it cannot be built), TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX,
CUDA_HOME.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from build_backend import OLDEST_TORCH, find_compiler, find_torch, is_too_old

MODULE = "csrc/module.cpp"
SOURCES = sorted({*map(str, Path("csrc").glob("*.cpp")), *map(str, Path("csrc/cpu").rglob("*.cpp"))} - {MODULE})
CUDA_SOURCES = sorted(str(path) for path in Path("csrc/cuda").rglob("*.c*") if path.suffix in (".cpp", ".cu"))
KERNELS = "bcmf_ext._kernels"
# Machine code runs on the later GPUs of its generation: that of 8.0 on all 8.x, of 10.0 on 10.3, of 12.0 on 12.1. For
# others the driver compiles PTX, which serves all GPUs that are not older than it: that of 10.0 serves 11.0, as that of
# 12.0 would not, and whatever comes after 12.x.
DEFAULT_ARCHS = ("7.5", "8.0", "9.0", "10.0", "12.0")
PTX_ARCH = "10.0"


def find_cuda_home() -> Path | None:
    """$CUDA_HOME, else the toolkit of the nvcc on the path, else /usr/local/cuda; the first that is complete."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda"]
    for home in map(Path, filter(None, candidates)):
        if (home / "bin" / "nvcc").exists() and (home / "include" / "cuda_runtime.h").exists():
            return home
    return None


def try_compiler() -> str | None:
    """Returns why the C++ compiler cannot compile a tiny file, in its own words, or None if it can."""
    command = [*shlex.split(os.environ.get("CXX") or "c++"), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    command += ["-I", sysconfig.get_path("include"), "-I", sysconfig.get_path("platinclude")]
    try:
        done = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True)
    except OSError as error:
        return str(error)
    if done.returncode == 0:
        return None
    return next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")


def _with_ptx(archs: list[str]) -> list[str]:
    """These archs, with PTX of PTX_ARCH, or where nvcc is too old for it, of the newest."""
    ptx = PTX_ARCH if PTX_ARCH in archs else archs[-1]
    return [f"{arch}+PTX" if arch == ptx else arch for arch in archs]


class Plan:
    """What will be built, and why not the rest. Sentences end up in bcmf_ext.info."""

    def __init__(self) -> None:
        self.torch: Any = None
        self.nvcc: str | None = None
        self.archs = ""
        self.no_extension = self._look_for_torch()
        self.no_cuda = self.no_extension or self._look_for_cuda()
        if os.environ.get("BCMF_CUDA") == "1" and self.no_cuda:
            raise SystemExit(f"bcmf_ext: BCMF_CUDA=1, but CUDA cannot be built: {self.no_cuda}")

    def _look_for_torch(self) -> str | None:
        if find_compiler() is None:
            return "no C++ compiler was found (c++ or $CXX)"
        complaint = try_compiler()
        if complaint is not None:
            return f"the C++ compiler does not compile C++20 with Python's headers ({complaint})"
        folder = find_torch()
        if folder is None:
            return "no torch was found to build against"
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # it comes last, behind the build environment's own packages
        import torch

        self.torch = torch
        if is_too_old(torch.__version__):
            return f"torch {torch.__version__} is older than {OLDEST_TORCH}"
        return None

    def _look_for_cuda(self) -> str | None:
        if os.environ.get("BCMF_CUDA") == "0":
            return "BCMF_CUDA=0"
        if self.torch.version.cuda is None:
            return f"torch {self.torch.__version__} has no CUDA"
        home = find_cuda_home()
        if home is None:
            return "no CUDA toolkit was found (bin/nvcc and include/cuda_runtime.h; set CUDA_HOME)"
        os.environ["CUDA_HOME"] = str(home)  # torch.utils.cpp_extension reads it when imported
        nvcc = str(home / "bin" / "nvcc")
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release (\d+)\.(\d+)", version)
        release = f"{match[1]}.{match[2]}" if match else "unknown"
        if release.split(".")[0] != self.torch.version.cuda.split(".")[0]:
            return f"nvcc is {release}, but torch was built for CUDA {self.torch.version.cuda}"
        self.nvcc = release
        self.archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if not self.archs:
            listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
            known = {f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)", listed)}
            present = self._present_archs()
            if not set(present) <= known:
                gpus = ";".join(present)
                return f"nvcc {release} cannot compile for this machine's GPU ({gpus}): install a newer CUDA toolkit"
            self.archs = ";".join(present or _with_ptx([arch for arch in DEFAULT_ARCHS if arch in known]))
        os.environ["TORCH_CUDA_ARCH_LIST"] = self.archs
        return None

    def _present_archs(self) -> list[str]:
        if not self.torch.cuda.is_available():
            return []
        devices = range(self.torch.cuda.device_count())
        return sorted({"{}.{}".format(*self.torch.cuda.get_device_capability(d)) for d in devices})

    def __str__(self) -> str:
        torch = self.torch.__version__ if self.torch else "not looked at" if find_torch() else "not found"
        lines = ["bcmf_ext build", f"  torch      {torch}", f"  compiler   {find_compiler() or 'not found'}"]
        if self.no_extension:
            lines += [f"  extension  left out: {self.no_extension}", "             losses run in PyTorch"]
        elif self.no_cuda:
            lines += ["  CPU        built", f"  CUDA       left out: {self.no_cuda}"]
        else:
            lines += ["  CPU        built", f"  CUDA       built: nvcc {self.nvcc} for {self.archs}"]
        return "\n".join(lines)

    def write(self, folder: Path) -> None:
        """Writes _build.json, by which bcmf_ext.dispatch knows of the build without loading the extension."""
        files = sorted(path for path in Path("csrc").rglob("*") if path.is_file() and path.suffix != ".md")
        sources = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        facts = {
            "oldest_torch": OLDEST_TORCH,
            "no_extension": self.no_extension,
            "no_cuda": self.no_cuda,
            "sources": sources,
        }
        (folder / "_build.json").write_text(json.dumps(facts, indent=2) + "\n")


def target_version() -> str:
    """OLDEST_TORCH as torch's headers want it: they then declare what that release has, and no more."""
    major, minor = map(int, OLDEST_TORCH.split("."))
    return f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000"


def kernels(plan: Plan) -> Any:
    from torch.utils.cpp_extension import CppExtension

    common = ["-O3", f'-DBCMF_CUDA_ARCHS="{plan.archs}"', target_version()]
    # Where loops begin in a line of the cache changes with any line of code, and the gradient's time with it by 2.6 %.
    cxx = [*common, "-std=c++20", "-falign-loops=64", "-fvisibility=hidden", "-Wno-unknown-pragmas", "-g0"]
    extension = CppExtension(
        KERNELS,
        SOURCES if plan.no_cuda else SOURCES + CUDA_SOURCES,
        include_dirs=[str(Path("csrc").resolve())],
        py_limited_api=True,  # no library of Python's is linked
        extra_compile_args={
            "cxx": cxx,
            "nvcc": [*common, "-std=c++17", "--threads=0"],  # the GPU generations side by side
        },
        extra_link_args=["-Wl,-soname,_kernels.so", "-Wl,--exclude-libs,ALL"],
    )
    # Of torch only what has the stable ABI is linked, and after the C++ library, of which torch exports parts, too.
    extension.libraries = ["stdc++", "torch_cpu"]
    if not plan.no_cuda:
        # CUDA's run time is linked statically, so that the library loads beside a torch of another CUDA, or of none.
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"]
        extension.library_dirs.append(str(Path(os.environ["CUDA_HOME"], "lib64")))
    return extension


def module() -> list[Any]:
    """The module, or none where pybind11 is not installed: the kernels run without it."""
    try:
        import pybind11
    except ImportError:
        return []
    extension = Extension(
        "bcmf_ext._C",
        [MODULE],
        include_dirs=[str(Path("csrc").resolve()), pybind11.get_include()],
        extra_compile_args={"cxx": ["-O2", "-std=c++20", "-fvisibility=hidden", "-g0"]},
        extra_link_args=["-Wl,-rpath,$ORIGIN", "-Wl,--allow-shlib-undefined"],
    )
    return [extension]


def main() -> None:
    building = not {"sdist", "egg_info", "dist_info"} & set(sys.argv[1:])
    if not building:
        setup()
        return
    plan = Plan()

    class BuildPy(build_py):
        """Adds _build.json, and starts from an empty folder so that no deleted module of an earlier build is packed."""

        def run(self) -> None:
            print(plan, flush=True)
            target = Path("." if self.editable_mode else self.build_lib) / "bcmf_ext"
            if not self.editable_mode:
                shutil.rmtree(target, ignore_errors=True)
            super().run()
            target.mkdir(parents=True, exist_ok=True)
            plan.write(target)

    if plan.no_extension:
        setup(cmdclass={"build_py": BuildPy})
        return
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        """Also tells of what ``build_ext --inplace`` has built, which runs without build_py."""

        def run(self) -> None:
            super().run()
            if self.inplace:
                plan.write(Path("bcmf_ext"))

        def get_ext_filename(self, fullname: str) -> str:
            parts = fullname.split(".")  # it comes with the package's name, and without
            if parts[-1] == KERNELS.split(".")[-1]:
                return os.path.join(*parts) + ".so"
            return super().get_ext_filename(fullname)

        def build_extension(self, ext: Any) -> None:
            if ext.name != KERNELS:  # the module calls functions of the library, which lies beside it
                ext.extra_objects = [self.get_ext_fullpath(KERNELS)]
            super().build_extension(ext)

    extensions = [kernels(plan), *module()]
    setup(cmdclass={"build_py": BuildPy, "build_ext": BuildExt}, ext_modules=extensions)


main()
