"""BCMFNet with the refinement modules of Wang et al. (*Semantic and Contextual Refinements*, arXiv 2412.08671).

See docs/definitions.md, "Networks and their training".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn import CRM, LMFM, SRM
from .ddrnet import DDRNet


class SCRDDRNet(DDRNet):
    """A DDRNet whose context map is brought from 1/64 to 1/8 by an SRM, and joined by a CRM of all stages.

    At initialisation it computes what the DDRNet of the same weights does, whose checkpoints it loads: the SRM's
    offsets and the CRM's gains start as zero. Otherwise it is as `DDRNet` says.
    """

    def __init__(self, context: LMFM, num_classes: int = 19, *, aux_head: bool = True) -> None:
        super().__init__(context, num_classes, aux_head=aux_head)
        self.srm = SRM(64, 128, project=False, impl=context.impl)
        self.crm = CRM((64, 128, 256, 128), 128, at=0)
        self.crm_gain = nn.Parameter(torch.zeros(128, 1, 1))

    def fuse(self, high: Tensor, low3: Tensor, low4: Tensor, context: Tensor) -> Tensor:
        """See `DDRNet`."""
        refined = self.srm(high, context, self.layer5_(high))
        return refined + self.crm_gain * self.crm(high, low3, low4, context)


def scr_ddrnet_s(num_classes: int = 19, *, aux_head: bool = True, impl: str = "auto") -> SCRDDRNet:
    """BCMFNet with one SRM and one CRM. impl: the implementation of LMFM and of the SRM.

    5,714,408 parameters without the auxiliary head (19 classes), 37.27 GMACs at 1×3×1024×2048.
    """
    return SCRDDRNet(LMFM(impl=impl), num_classes, aux_head=aux_head)
