"""Modules for the low-resolution maps of a network: context (DAPPM, LMFM, CRM), and upsampling that fits (SRM)."""

from .crm import CRM
from .dappm import DAPPM
from .lmfm import LMFM
from .srm import SRM

__all__ = ["CRM", "DAPPM", "LMFM", "SRM"]
