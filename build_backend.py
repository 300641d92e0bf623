"""PEP 517 backend: setuptools, and one question before it builds a wheel: which torch is the extension for?

The extension only works with the torch it was built against. Under pip's build isolation torch is not importable, and
asking for "torch" would build against the newest release, not against the one installed. So we look into the
environment that pip
installs into: if torch is there, it is put on the path (setup.py) and nothing is asked for; otherwise torch is asked
for, the same release that pip then installs as our dependency.
"""

from __future__ import annotations

import os
import shlex
import shutil
import site
import sys
import sysconfig
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def find_compiler() -> str | None:
    """The C++ compiler that torch's extension builder would call."""
    return shutil.which(shlex.split(os.environ.get("CXX", "c++"))[0])


def find_torch() -> Path | None:
    """The folder that holds the torch package of the target environment."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if not os.environ.get("PYTHONNOUSERSITE"):
        folders.append(site.getusersitepackages())
    spec = PathFinder.find_spec("torch", [*sys.path, *folders])
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Ask for torch only if it is not installed and could be put to use."""
    return ["torch>=2.11"] if find_torch() is None and find_compiler() is not None else []


get_requires_for_build_editable = get_requires_for_build_wheel
