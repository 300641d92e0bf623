"""The networks and the loader for public checkpoints."""

from .bcmfnet import bcmfnet
from .ddrnet import DDRNet, ddrnet_s
from .pretrained import LoadReport, load_pretrained

__all__ = ["DDRNet", "LoadReport", "bcmfnet", "ddrnet_s", "load_pretrained"]
