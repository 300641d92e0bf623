"""Boundary-aware, real-time semantic segmentation: losses, models, metrics and a trainer."""

from . import data, inference, metrics, models, reference
from .losses.boundary_corrected_loss import BoundaryCorrectedLoss, boundary_corrected_loss
from .losses.cpg_loss import CPGLoss, cpg_loss
from .losses.criterion import SegmentationCriterion, segmentation_loss
from .losses.cross_entropy import cross_entropy
from .nn import DAPPM, LMFM
from .reference import BCL, CPG, OHEM, SegmentationLoss

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
    "segmentation_loss",
]
