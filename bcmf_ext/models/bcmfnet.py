"""BCMFNet (Jiang et al., *Boundary Corrected Multi-scale Fusion Network*, arXiv 2203.00436).

See docs/definitions.md, "Networks and their training".
"""

from __future__ import annotations

from ..nn import LMFM
from .ddrnet import DDRNet


def bcmfnet(num_classes: int = 19, *, aux_head: bool = True, impl: str = "auto") -> DDRNet:
    """BCMFNet: DDRNet-23-slim with LMFM instead of DAPPM. impl: the implementation of LMFM.

    5,612,787 parameters without the auxiliary head (19 classes), 36.24 GMACs at 1×3×1024×2048.
    """
    return DDRNet(LMFM(impl=impl), num_classes, aux_head=aux_head)
