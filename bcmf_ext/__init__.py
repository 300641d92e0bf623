"""Boundary-aware, real-time semantic segmentation: losses, models, metrics and a trainer."""

from bcmf_ext import data, inference, metrics, models, reference
from bcmf_ext.losses.boundary_corrected_loss import BoundaryCorrectedLoss, boundary_corrected_loss
from bcmf_ext.losses.cpg_loss import CPGLoss, cpg_loss
from bcmf_ext.losses.criterion import SegmentationCriterion, segmentation_loss
from bcmf_ext.losses.cross_entropy import cross_entropy
from bcmf_ext.nn import DAPPM, LMFM
from bcmf_ext.reference import BCL, CPG, OHEM, SegmentationLoss

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
