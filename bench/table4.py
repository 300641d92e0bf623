"""The losses of the CPG paper's Table 4: binary cross-entropy, with RMI, with CPG of each size, and with both; and RMI
alone.

The plain forms are what their papers' code computes, in plain PyTorch; CPG is there in its fastest eager form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from problem import Problem, interpolate, make_logits, our_impls, size_of, work
from torch import Tensor

from bcmf_ext import CPG, reference, rmi_loss, segmentation_loss

RMI_WEIGHT = 0.5


@dataclass(frozen=True)
class Row:
    """Binary cross-entropy and what stands beside it."""

    rmi: bool = False
    cpg: CPG | None = None

    def __str__(self) -> str:
        return " + ".join(["BCE"] + ["RMI"] * self.rmi + [f"CPG{cpg.kernel_size}" for cpg in [self.cpg] if cpg])

    def plain(self, z: Tensor, target: Tensor) -> Tensor:
        z = interpolate(z, target.shape[1:])
        one_hot, valid = maps(z, target)
        losses = F.binary_cross_entropy_with_logits(z, one_hot, reduction="none").sum(1)
        total = (losses * valid).sum() / valid.sum()
        if self.rmi:
            total = total + RMI_WEIGHT * official_rmi(z, one_hot, valid)
        if self.cpg is not None:
            total = total + self.cpg.weight * reference.cpg_loss_sparse(z, target, kernel_size=self.cpg.kernel_size)
        return total

    def defined(self, z: Tensor, target: Tensor) -> Tensor:
        total = reference.segmentation_loss(z, target, cpg=self.cpg, first="bce").total
        return total + RMI_WEIGHT * reference.rmi_loss(z, target) if self.rmi else total

    def ours(self, z: Tensor, target: Tensor, impl: str) -> Tensor:
        total = segmentation_loss(z, target, cpg=self.cpg, first="bce", impl=impl).total
        return total + RMI_WEIGHT * rmi_loss(z, target) if self.rmi else total


def maps(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The labels as one-hot maps (N, C, H, W), any at ignored pixels, and which are valid (N, H, W)."""
    valid = target != 255
    one_hot = F.one_hot(torch.where(valid, target, 0).long(), z.shape[1]).movedim(3, 1)
    return one_hot.to(z.dtype), valid


def plain_rmi(z: Tensor, target: Tensor) -> Tensor:
    z = interpolate(z, target.shape[1:])
    return official_rmi(z, *maps(z, target))


def official_rmi(z: Tensor, one_hot: Tensor, valid: Tensor, radius: int = 3, alpha: float = 5e-4) -> Tensor:
    """The formula of the RMI paper, with the inverse that it is written with: nine shifts of each map, stacked."""

    def regions(map: Tensor) -> Tensor:
        map = F.avg_pool2d(map, 2, padding=1)
        h, w = (side - radius + 1 for side in map.shape[2:])
        shifts = [map[:, :, i : i + h, j : j + w] for i in range(radius) for j in range(radius)]
        stacked = torch.stack(shifts, dim=2).flatten(3).double()
        return stacked - stacked.mean(3, keepdim=True)

    valid = valid.unsqueeze(1)
    y, p = regions(one_hot * valid), regions(z.sigmoid() * valid + 1e-6)
    eye = alpha * torch.eye(radius**2, dtype=torch.float64, device=z.device)
    y_p = y @ p.mT
    m = y @ y.mT - y_p @ torch.inverse(p @ p.mT + eye) @ y_p.mT
    half = torch.linalg.cholesky(m + eye).diagonal(dim1=2, dim2=3).log().sum(2)
    return half.mean(0).sum().to(z.dtype) / radius**2


def logits_of_sizes(labels: Tensor, classes: int) -> Iterator[Tensor]:
    """At the labels' size and at an eighth."""
    height, width = labels.shape[1:]
    for size in ((height, width), (height // 8, width // 8)):
        yield make_logits(labels, classes, torch.float32, size)


def problems(labels: Tensor, classes: int) -> Iterator[Problem]:
    """Each row beside binary cross-entropy alone."""
    cpgs = [CPG(kernel_size=size) for size in (3, 5, 7)]
    rows = (Row(), Row(rmi=True), *(Row(cpg=cpg) for cpg in cpgs), Row(rmi=True, cpg=cpgs[0]))
    for logits in logits_of_sizes(labels, classes):
        for row in rows:
            contenders: dict[str, Callable[[Tensor], Tensor]] = {"plain": partial(row.plain, target=labels)}
            for impl in our_impls(labels.device):
                contenders[impl] = partial(row.ours, target=labels, impl=impl)
            alone = {} if row == Row() else {"BCE alone": partial(Row().plain, target=labels)}
            title = f"{row}, {size_of(logits, labels)}, float32"
            definition = partial(row.defined, target=labels)
            yield Problem(title, logits, contenders, definition, work(logits, labels), alone)


def rmi(labels: Tensor, classes: int) -> Iterator[Problem]:
    """RMI alone."""
    for logits in logits_of_sizes(labels, classes):
        yield Problem(
            f"RMI, {size_of(logits, labels)}, float32",
            logits,
            {"plain": partial(plain_rmi, target=labels), "torch": partial(rmi_loss, target=labels)},
            partial(reference.rmi_loss, target=labels),
            work(logits, labels),
        )
