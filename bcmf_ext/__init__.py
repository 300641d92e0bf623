"""Boundary-aware, real-time semantic segmentation: losses, models, metrics and a trainer."""

from importlib.metadata import PackageNotFoundError, version

from . import data, inference, metrics, models, reference
from .dispatch import release_kept_memory
from .losses.boundary_corrected_loss import BoundaryCorrectedLoss, boundary_corrected_loss
from .losses.cpg_loss import CPGLoss, cpg_loss
from .losses.criterion import SegmentationCriterion, segmentation_loss
from .losses.cross_entropy import cross_entropy
from .nn import DAPPM, LMFM
from .options import BCL, CPG, OHEM, SegmentationLoss

try:
    __version__ = version("bcmf_ext")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+unknown"

__all__ = [
    "BCL",
    "CPG",
    "DAPPM",
    "LMFM",
    "OHEM",
    "BoundaryCorrectedLoss",
    "CPGLoss",
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
    "segmentation_loss",
]
