"""segmentation_loss: all terms together beside the cross-entropy alone, of logits at label size and at an eighth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from problem import Problem, make_logits, our_impls, size_of, work
from torch import Tensor

from bcmf_ext import BCL, CPG, ops, reference, segmentation_loss


def problems(labels: Tensor, classes: int) -> Iterator[Problem]:
    alone = {"CE alone": partial(cross_entropy, target=labels.long())}
    for shrink in (1, 8):
        for bcl, cpg in ((BCL(), CPG()), (None, CPG(kernel_size=7))):
            logits = make_logits(labels, classes, torch.float32, shrink)
            mix = {"target": labels, "bcl": bcl, "cpg": cpg}
            definition, best = (partial(eager, **mix, cpg_loss=form) for form in CPG_FORMS)
            contenders: dict[str, Callable[[Tensor], Tensor]] = {"best eager": best}
            if cpg.kernel_size == 3:  # with 7, minutes
                contenders |= {"authors": definition, "compile": torch.compile(definition)}
            for impl in our_impls(labels.device, ops.loss_lacks(bcl=bcl is not None, cpg=True)):
                contenders[impl] = partial(ours, **mix, impl=impl)
            name = f"CE + {'BCL + ' if bcl else ''}CPG{cpg.kernel_size}, {size_of(logits, labels)}, float32"
            yield Problem(name, logits, contenders, definition, work(logits, labels), alone)


# The dense form is the authors', with its three mistakes repaired (spec section 4).
CPG_FORMS = (reference.cpg_loss, reference.cpg_loss_sparse)


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """As everybody writes it."""
    if z.shape[2:] != target.shape[1:]:
        z = F.interpolate(z, target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(z, target, ignore_index=255)


def eager(z: Tensor, target: Tensor, bcl: BCL | None, cpg: CPG, cpg_loss: Callable[..., Tensor]) -> Tensor:
    if z.shape[2:] != target.shape[1:]:
        z = F.interpolate(z, target.shape[1:], mode="bilinear", align_corners=False)  # once for all terms
    total = F.cross_entropy(z, target.long(), ignore_index=255)
    if bcl is not None:
        total = total + bcl.weight * reference.boundary_corrected_loss(z, target)
    return total + cpg.weight * cpg_loss(z, target, kernel_size=cpg.kernel_size)


def ours(z: Tensor, target: Tensor, bcl: BCL | None, cpg: CPG, impl: str) -> Tensor:
    return segmentation_loss(z, target, bcl=bcl, cpg=cpg, impl=impl).total
