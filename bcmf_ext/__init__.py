"""Boundary-aware, real-time semantic segmentation: losses, models, metrics and a trainer.

The losses and context modules are here at once; `data`, `inference`, `metrics` and `models` are imported when they are
first used, so that whoever takes a loss alone does not load Pillow, matplotlib or the trainer.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

from . import reference
from .dispatch import release_kept_memory
from .losses.boundary_corrected_loss import BoundaryCorrectedLoss, boundary_corrected_loss
from .losses.cpg_loss import CPGLoss, cpg_loss
from .losses.criterion import SegmentationCriterion, segmentation_loss
from .losses.cross_entropy import cross_entropy
from .losses.rmi_loss import RMILoss, rmi_loss
from .nn import CRM, DAPPM, LMFM, SRM
from .options import BCL, CPG, OHEM, SegmentationLoss

if TYPE_CHECKING:  # Type checkers and editors see what __getattr__ imports.
    from . import data, inference, metrics, models

try:
    __version__ = version("bcmf_ext")
except PackageNotFoundError:  # A source tree need not be installed.
    __version__ = "0+unknown"

__all__ = [
    "BCL",
    "CPG",
    "CRM",
    "DAPPM",
    "LMFM",
    "OHEM",
    "SRM",
    "BoundaryCorrectedLoss",
    "CPGLoss",
    "RMILoss",
    "SegmentationCriterion",
    "SegmentationLoss",
    "boundary_corrected_loss",
    "cpg_loss",
    "cross_entropy",
    "data",
    "inference",
    "metrics",
    "models",
    "reference",
    "release_kept_memory",
    "rmi_loss",
    "segmentation_loss",
]


def __getattr__(name: str) -> ModuleType:
    if name in ("data", "inference", "metrics", "models"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
