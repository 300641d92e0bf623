"""Context modules for the low-resolution map of a two-branch network."""

from .dappm import DAPPM
from .lmfm import LMFM

__all__ = ["DAPPM", "LMFM"]
