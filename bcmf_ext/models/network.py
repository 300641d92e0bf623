"""This file says what a network is to the rest of the package, and what others may rely on."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn


class Network(Protocol):
    """The part of a network, an `nn.Module`, that the trainer, checkpoints, the Predictor and exports rely on.

    It is made by ``NETWORKS[name](num_classes, aux_head=True, impl="auto")``. num_classes: C. aux_head: whether it has
    an auxiliary head. impl: that of its context module and its SRMs, "torch" for exports; ignored where there are none.

    ``network(images)`` takes normalised floating-point images (N, 3, H, W) of any size and gives logits (N, C, h, w) of
    a size of its own, which the criterion, the metrics and the Predictor resample to that of the labels. While it
    trains with an auxiliary head it gives (main, auxiliary) logits, and the trainer gives it batches of at least two
    images.

    Where it is known what a training costs that begins with random weights, an attribute ``untrained`` says so in a
    sentence, which the trainer prints.

    Its weights are known by their names in ``state_dict()``: checkpoints of a run hold all of them, also those of the
    auxiliary head, and `load_pretrained` takes from public checkpoints those whose names and shapes fit. So names are
    never changed; otherwise old checkpoints no longer load.

    The Predictor folds a batch norm into the convolution before it where the network says that nothing else reads what
    is between them: an ``nn.Sequential`` says so by its order, and any other block by an attribute
    ``norm_after = {name of the convolution: name of the batch norm}``.
    """

    @property
    def auxiliary_head(self) -> nn.Module | None:
        """The part that only training uses; None where there is none."""

    def drop_auxiliary_head(self) -> None:
        """Takes the auxiliary head out: from then on there are main logits alone, also in training mode."""

    def __call__(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, or (main, auxiliary) logits, see above."""


class NetworkFactory(Protocol):
    """An entry of `NETWORKS`: a class, or a function that makes a network."""

    def __call__(self, num_classes: int, *, aux_head: bool = True, impl: str = "auto") -> Any:
        """A `Network` with random weights."""
