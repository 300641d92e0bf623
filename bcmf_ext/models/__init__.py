"""The networks, and the loader for public checkpoints.

A network that joins is a file of its own, and a line in `NETWORKS`; see `Network` for what it must offer.
"""

from .bcmfnet import bcmfnet
from .ddrnet import DDRNet, ddrnet_s
from .network import Network, NetworkFactory
from .pretrained import LoadReport, load_pretrained
from .scr_ddrnet_s import scr_ddrnet_s
from .scr_resnet18 import scr_resnet18

NETWORKS: dict[str, NetworkFactory] = {
    "bcmfnet": bcmfnet,
    "ddrnet_s": ddrnet_s,
    "scr_ddrnet_s": scr_ddrnet_s,
    "scr_resnet18": scr_resnet18,
}
"""The networks that can be trained, by the names that checkpoints and the commands know them by."""

__all__ = [
    "NETWORKS",
    "DDRNet",
    "LoadReport",
    "Network",
    "NetworkFactory",
    "bcmfnet",
    "ddrnet_s",
    "load_pretrained",
    "scr_ddrnet_s",
    "scr_resnet18",
]
