"""Problems: what the files of this folder give bench/kernels.py to measure, and what they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from bcmf_ext import dispatch
from bcmf_ext.data import open_dataset

Contender = Callable[[Tensor], Tensor | Sequence[Tensor]]


@dataclass(frozen=True)
class Problem:
    """A loss of some logits, or what else is computed from an input.

    contenders: from the input to a scalar, by name, or to several tensors, for which upstream has gradients; the first
    is the baseline. definition: the same in fp64. work: bytes and exponentials that each phase (forward, backward,
    both) needs at least. other: contenders that compute less, and are timed only (the cross-entropy alone, beside a
    loss that contains it); the first of them is then the baseline.
    """

    title: str
    input: Tensor
    contenders: Mapping[str, Contender]
    definition: Contender
    work: Mapping[str, tuple[float, float]]
    other: Mapping[str, Contender] = field(default_factory=dict)
    upstream: Sequence[Tensor] | None = None

    def backward(self, outputs: Tensor | Sequence[Tensor]) -> None:
        torch.autograd.backward(outputs, self.upstream)


OURS = ("cuda", "triton", "cpu")  # with kernels


def interpolate(map: Tensor, size: Sequence[int], align_corners: bool = False) -> Tensor:
    """A map (N, C, h, w) resampled to ``size`` as everybody does it: the baselines' way. One of that size stays."""
    if map.shape[2:] == torch.Size(size):
        return map
    return F.interpolate(map, tuple(size), mode="bilinear", align_corners=align_corners)


def our_impls(device: torch.device) -> list[str]:
    """The impls that "auto" chooses from on this device and that can run: kernels, and last "torch"."""
    return [impl for impl in dispatch.ORDER[device.type] if dispatch.why_not(impl, device.type) is None]


def missing_impls(device: str) -> dict[str, str]:
    """The other impls, and why they cannot run (the interpreter is no measure)."""
    reasons = {impl: dispatch.why_not(impl, device) or "interpreted" for impl in dispatch.IMPLS}
    return {impl: reason for impl, reason in reasons.items() if impl not in our_impls(torch.device(device))}


def make_labels(camvid: str | None, n: int, height: int, width: int) -> Tensor:
    """uint8 labels (n, height, width): of CamVid's val split, or of drawn scenes; both with ignored pixels."""
    scenes = open_dataset("camvid" if camvid else "demo", camvid, "val")
    labels = [torch.from_numpy(scenes.label(i * len(scenes) // n)) for i in range(n)]
    sized = [F.interpolate(y[None, None], (height, width), mode="nearest")[0, 0] for y in labels]
    return torch.stack(sized)


def make_logits(labels: Tensor, classes: int, dtype: torch.dtype, size: Sequence[int] | None = None) -> Tensor:
    """Logits (N, classes, *size) for labels (N, H, W), `size` being theirs if none is given: normally distributed, and
    at four pixels of five higher by 6 for the right class, as of a network that is being trained."""
    generator = torch.Generator(labels.device).manual_seed(0)
    few = F.interpolate(labels[:, None].float(), tuple(size or labels.shape[1:]), mode="nearest")[:, 0].long()
    logits = torch.randn((few.shape[0], classes, *few.shape[1:]), generator=generator, device=labels.device)
    easy = torch.rand(few.shape, generator=generator, device=labels.device) < 0.8
    logits.scatter_add_(1, few.clamp(max=classes - 1)[:, None], 6 * (easy & (few < classes)).float()[:, None])
    return logits.to(dtype).requires_grad_()


def make_training_logits(labels: Tensor, classes: int, size: Sequence[int]) -> Tensor:
    """Logits (N, classes, *size) in bf16 and channels_last, as a network gives them to a loss in training: at an eighth
    of the labels' size, normally distributed and higher by 4 for the label that is sampled there; those of another size
    are these, resampled. Neighbours are alike, as they are not in `make_logits`: of CamVid's labels of 360×480 BCL
    selects 0.9 % of the pixels by these logits, and 10 % by those of `make_logits` at the labels' size.
    """
    eighth = [side // 8 for side in labels.shape[1:]]
    few = F.interpolate(labels[:, None].float(), eighth, mode="nearest")[:, 0].long()
    one_hot = F.one_hot(few.clamp(max=classes), classes + 1)[..., :classes].movedim(3, 1)
    generator = torch.Generator(labels.device).manual_seed(0)
    logits = 4 * one_hot + torch.randn(one_hot.shape, generator=generator, device=labels.device)
    placed = interpolate(logits, size).to(torch.bfloat16, memory_format=torch.channels_last)
    return placed.detach().requires_grad_()


def size_of(logits: Tensor, labels: Tensor) -> str:
    """The sizes in words, such as 8×19×45×60 → 360×480."""
    shape = "×".join(map(str, logits.shape))
    return shape if logits.shape[2:] == labels.shape[1:] else f"{shape} → {'×'.join(map(str, labels.shape[1:]))}"


def work(logits: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """The least work of any mix of losses. Forward: read logits and labels, write two floats per label pixel.
    Backward: read all that, write the gradient. An exponential per class and label pixel in each. (What is sparse is
    left out.)"""
    logit_bytes, pixels = logits.numel() * logits.element_size(), labels.numel()
    label_bytes = pixels * labels.element_size()
    forward = logit_bytes + label_bytes + 8 * pixels
    backward = 2 * logit_bytes + label_bytes + 8 * pixels
    exps = pixels * logits.shape[1]
    return {"forward": (forward, exps), "backward": (backward, exps), "both": (forward + backward, 2 * exps)}
