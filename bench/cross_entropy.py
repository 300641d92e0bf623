"""cross_entropy, plain and with OHEM, logits at label size."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from problem import Problem, our_impls, random_logits
from torch import Tensor

from bcmf_ext import OHEM, cross_entropy, reference


def _work(logits: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """Forward: read logits and labels, write two floats per pixel. Backward: read all that, write the gradient. An exp
    per logit in each. (OHEM's passes over the losses of the pixels are left out.)"""
    logit_bytes, pixels = logits.numel() * logits.element_size(), labels.numel()
    label_bytes = pixels * labels.element_size()
    forward = logit_bytes + label_bytes + 8 * pixels
    backward = 2 * logit_bytes + label_bytes + 8 * pixels
    exps = logits.numel()
    return {"forward": (forward, exps), "backward": (backward, exps), "both": (forward + backward, 2 * exps)}


def problems(labels: Tensor, classes: int) -> Iterator[Problem]:
    wide = labels.long()  # F.cross_entropy takes no uint8
    size = "×".join(map(str, (labels.shape[0], classes, *labels.shape[1:])))

    def eager(z: Tensor) -> Tensor:
        return F.cross_entropy(z, wide, ignore_index=255)

    def eager_fp32(z: Tensor) -> Tensor:  # what autocast makes of it
        return eager(z.float())

    for dtype in (torch.float32, torch.bfloat16):
        logits = random_logits(labels, classes, dtype)
        fp32 = dtype == torch.float32
        contenders = {"eager": eager} if fp32 else {"eager": eager_fp32, "native": eager}
        contenders["compile"] = torch.compile(eager if fp32 else eager_fp32)
        contenders |= {impl: partial(cross_entropy, target=labels, impl=impl) for impl in our_impls(labels.device)}
        yield Problem(
            f"cross_entropy, {size}, {str(dtype).removeprefix('torch.')}",
            logits,
            contenders,
            eager,
            _work(logits, labels),
        )

    # Half of the pixels to keep, more than the threshold gives: the selection runs.
    for name, ohem in (("threshold", OHEM(0.9, 1)), ("k-th largest", OHEM(1e-3, labels.numel() // 2))):
        logits = random_logits(labels, classes, torch.float32)
        eager_ohem = partial(reference.cross_entropy, target=labels, ohem=ohem)
        ours = {
            impl: partial(cross_entropy, target=labels, ohem=ohem, impl=impl)
            for impl in our_impls(labels.device)
            if impl != "torch"
        }
        contenders = {"eager": eager_ohem, "compile": torch.compile(eager_ohem), **ours}
        yield Problem(f"OHEM by {name}, {size}, float32", logits, contenders, eager_ohem, _work(logits, labels))
