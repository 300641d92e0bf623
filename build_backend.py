"""PEP 517 backend: setuptools, and one question before it builds a wheel: is there a torch to build with?

The extension runs with every torch, but it is compiled with the headers of one, and with CUDA if that one has it. Under
pip's build isolation torch is not importable, and asking for "torch" would fetch a second one, of 5 GB, for those who
have one. So we look into the environment that pip installs into: if torch is there, it is put on the path (setup.py)
and nothing is asked for; otherwise torch is asked for.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import site
import sys
import sysconfig
from importlib.machinery import PathFinder
from importlib.metadata import distributions
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


OLDEST_TORCH = "2.11"


def find_compiler() -> str | None:
    """The C++ compiler that torch's extension builder would call."""
    try:
        words = shlex.split(os.environ.get("CXX") or "c++")
    except ValueError:  # a quote without its end
        return None
    return shutil.which(words[0]) if words else None


def find_torch() -> Path | None:
    """The folder that holds the torch package of the target environment."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if sees_user_site():
        folders.append(site.getusersitepackages())
    spec = PathFinder.find_spec("torch", [*sys.path, *folders])
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def sees_user_site() -> bool:
    """Whether the target environment imports from ~/.local. (This process does not: pip sets PYTHONNOUSERSITE.)"""
    if sys.prefix == sys.base_prefix:
        return True
    settings = Path(sys.prefix, "pyvenv.cfg")
    lines = settings.read_text().lower().splitlines() if settings.is_file() else []
    return any(line.replace(" ", "") == "include-system-site-packages=true" for line in lines)


def is_too_old(version: str) -> bool:
    """Whether a torch of this version is older than what the package depends on."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]] < [int(part) for part in OLDEST_TORCH.split(".")]


def _will_be_replaced(folder: Path) -> bool:
    """Whether pip upgrades the torch in this folder, because our dependency asks for a newer one."""
    found = [dist.version for dist in distributions(name="torch", path=[str(folder)])]
    return bool(found) and is_too_old(found[0])


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Ask for torch only if there is none that stays installed, and one could be put to use."""
    folder = find_torch()
    wanted = folder is None or _will_be_replaced(folder)
    return [f"torch>={OLDEST_TORCH}"] if wanted and find_compiler() is not None else []


get_requires_for_build_editable = get_requires_for_build_wheel
