"""What SRM does behind its convolutions, from 1/8 to 1/4 and from 1/64 to 1/8 of an image, and on the small maps of a
training on CamVid: mixed offsets, upsampling, sampling and a sum. All maps are in channels_last."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from problem import Problem, our_impls
from torch import Tensor

from bcmf_ext.nn.srm import by_kernels, refine

CHANNELS = 128
SIZES = ((1, (128, 256), (256, 512)), (1, (16, 32), (128, 256)), (8, (45, 60), (90, 120)))
"""Images, and the sizes (h, w) and (H, W): SCRResNet18's last SRM and SCRDDRNet's for 1024×2048, and the former in a
training on 360×480."""


def problems(labels: Tensor, classes: int) -> Iterator[Problem]:
    """Makes the problems. The labels are asked for because other files' problems have some; only their device
    counts."""
    for dtype in (torch.float32, torch.bfloat16):
        for n, low, size in SIZES:
            yield problem(n, low, size, dtype, labels.device)


def problem(n: int, low: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def draw(channels: int, sides: tuple[int, int]) -> Tensor:
        map = torch.randn((n, channels, *sides), generator=generator, device=device).to(dtype)
        return map.contiguous(memory_format=torch.channels_last)

    shapes = f"{n}×{CHANNELS}×{'×'.join(map(str, low))} → {'×'.join(map(str, size))}"
    given, raw, residual = draw(CHANNELS, low), draw(11, size), draw(CHANNELS, size)
    leaves = raw.requires_grad_(), residual.requires_grad_()
    wide = partial(refine, raw=raw.double(), residual=residual.double())
    contenders = {"eager": partial(refine, raw=leaves[0], residual=leaves[1])}
    for impl in our_impls(device):
        if impl != "torch":
            contenders[impl] = partial(run, raw=leaves[0], residual=leaves[1], impl=impl)
    title = f"SRM behind its convolutions, {shapes}, {str(dtype).removeprefix('torch.')}"
    return Problem(title, given.requires_grad_(), contenders, wide, work(given, raw), upstream=[draw(CHANNELS, size)])


def run(low: Tensor, raw: Tensor, residual: Tensor, impl: str) -> Tensor:
    """SRM's tail by an impl's kernels."""
    return by_kernels(impl, low, raw, residual)


def work(low: Tensor, raw: Tensor) -> dict[str, tuple[float, float]]:
    """The least work of the phases. Forward: read all maps, write the output, nine exponentials for each pixel.
    Backward: read low, raw and the upstream gradient, write the gradients of low and raw (that of the residual is the
    upstream one itself)."""
    full = raw.numel() // raw.shape[1] * low.shape[1]
    size, exps = low.element_size(), 9 * raw.numel() // raw.shape[1]
    forward = size * (low.numel() + raw.numel() + 2 * full)
    backward = size * (2 * (low.numel() + raw.numel()) + full)
    return {"forward": (forward, exps), "backward": (backward, exps), "both": (forward + backward, 2 * exps)}
