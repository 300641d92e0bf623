"""cross_entropy, plain and with OHEM, logits at label size."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from problem import Problem, make_logits, our_impls, size_of, work
from torch import Tensor

from bcmf_ext import OHEM, cross_entropy, reference


def problems(labels: Tensor, classes: int) -> Iterator[Problem]:
    wide = labels.long()  # F.cross_entropy takes no uint8

    def eager(z: Tensor) -> Tensor:
        return F.cross_entropy(z, wide, ignore_index=255)

    def eager_fp32(z: Tensor) -> Tensor:  # what autocast makes of it
        return eager(z.float())

    impls = our_impls(labels.device)
    for dtype in (torch.float32, torch.bfloat16):
        logits = make_logits(labels, classes, dtype)
        if dtype == torch.float32:
            contenders = {"eager": eager, "compile": torch.compile(eager)}
        else:
            contenders = {"eager": eager_fp32, "native": eager}
            contenders |= {"compile": torch.compile(eager_fp32), "compile native": torch.compile(eager)}
        contenders |= {impl: partial(cross_entropy, target=labels, impl=impl) for impl in impls}
        title = f"cross_entropy, {size_of(logits, labels)}, {str(dtype).removeprefix('torch.')}"
        yield Problem(title, logits, contenders, eager, work(logits, labels))

    # A fifth of the pixels is hard. To keep a third, the k-th largest loss has to be found.
    for name, ohem in (("threshold", OHEM(0.7, 1)), ("k-th largest", OHEM(0.7, labels.numel() // 3))):
        logits = make_logits(labels, classes, torch.float32)
        fast = partial(eager_ohem, target=wide, ohem=ohem)
        definition = partial(reference.cross_entropy, target=labels, ohem=ohem)
        contenders = {"eager": fast, "compile": torch.compile(fast)}
        contenders |= {impl: partial(cross_entropy, target=labels, ohem=ohem, impl=impl) for impl in impls}
        title = f"OHEM by {name}, {size_of(logits, labels)}, float32"
        yield Problem(title, logits, contenders, definition, work(logits, labels))


def eager_ohem(z: Tensor, target: Tensor, ohem: OHEM) -> Tensor:
    """The shortest way to write it, without the reference's care for what is empty or not finite."""
    nll = F.cross_entropy(z, target, ignore_index=255, reduction="none").view(-1)
    hard = nll > -math.log(ohem.threshold)
    if hard.sum() < ohem.min_kept:
        hard = nll >= nll.topk(ohem.min_kept).values[-1]
    return nll[hard].mean()
