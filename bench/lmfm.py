"""LMFM between its convolutions: pools, norms, ReLU, resampling, sums and concatenation, on maps of its usual sizes.
The convolutions' results are given, as maps, and the gradients of what goes into them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from problem import Problem, our_impls
from torch import Tensor, nn

from bcmf_ext.nn import LMFM
from bcmf_ext.nn._kernels import FusedNorms

SIZES = ((8, 512, 16, 16), (8, 512, 6, 8))  # of crops of 1024×1024, and of CamVid's 360×480
LAYOUTS = {"": torch.contiguous_format, ", channels_last": torch.channels_last}


def problems(labels: Tensor, classes: int) -> Iterator[Problem]:
    """Makes the problems. The labels are asked for because other files' problems have some; only their device
    counts."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SIZES:
            for name, layout in LAYOUTS.items():
                yield problem(shape, dtype, name, layout, labels.device)


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype, name: str, layout: torch.memory_format, device: torch.device
) -> Problem:
    n, channels, height, width = shape
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sides: int) -> Tensor:
        return torch.randn(sides, generator=generator, device=device).to(dtype).contiguous(memory_format=layout)

    title = f"LMFM between convolutions, {'×'.join(map(str, shape))}, {str(dtype).removeprefix('torch.')}{name}"
    module = LMFM(channels).to(device).train()
    small = [draw(n, 128, -(-height // s), -(-width // s)).requires_grad_() for s in (2, 4, 8, height + width)]
    large = [draw(n, 128, height, width).requires_grad_() for _ in range(4)]
    x = draw(n, channels, height, width).requires_grad_()
    definition = partial(by_pytorch, module=copy.deepcopy(module).double(), small=small, large=large)
    contenders = {"eager": partial(by_pytorch, module=module, small=small, large=large)}
    upstream = [draw(*output.shape) for output in contenders["eager"](x)]
    if device.type == "cuda":  # on the CPU inductor stops with an assertion in its C++ (torch 2.13)
        contenders["compile"] = torch.compile(contenders["eager"])
    for impl in our_impls(device):
        if impl != "torch":
            contenders[impl] = partial(by_kernels, module=module, small=small, large=large, impl=impl)
    return Problem(title, x, contenders, definition, work(x, [*small, *large]), upstream=upstream)


def by_pytorch(x: Tensor, module: LMFM, small: list[Tensor], large: list[Tensor]) -> list[Tensor]:
    """Computes what goes into LMFM's convolutions by the module's own forward, whose convolutions give these maps."""
    size, (v1, v2, v3, v4), ys = x.shape[2:], [map.to(x.dtype) for map in small], [map.to(x.dtype) for map in large]

    def up(map: Tensor) -> Tensor:
        return F.interpolate(map, size=size, mode="bilinear", align_corners=False)

    def relu_norm(unit: nn.Sequential, map: Tensor) -> Tensor:
        return unit[:-1](map)  # without its convolution

    pooled = [relu_norm(scale, x) for scale in (module.scale1, module.scale2, module.scale3, module.scale4)]
    a4, a3 = relu_norm(module.process4, up(v4)), relu_norm(module.process3, up(v3))
    a2, a1 = relu_norm(module.process2, up(v2) + ys[3]), relu_norm(module.process1, up(v1) + ys[2])
    joined = torch.cat([relu_norm(module.compression, torch.cat(ys, 1)), relu_norm(module.shortcut, x)], 1)
    # The convolutions of the last two are one, or two and a sum of maps of 128 channels.
    return [*pooled, a1, a2, a3, a4, joined]


def by_kernels(x: Tensor, module: LMFM, small: list[Tensor], large: list[Tensor], impl: str) -> list[Tensor]:
    """Computes what goes into LMFM's convolutions by an impl's kernels."""
    norms = FusedNorms(impl, [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)], x.stride(1) == 1)
    size = x.shape[2:]
    pooled = norms.pool(x, [scale[1] for scale in (module.scale1, module.scale2, module.scale3, module.scale4)])
    a3, a4 = norms.add(small[2:], (None, None), size, (module.process3[0], module.process4[0]))
    a1, a2 = norms.add(small[:2], large[2:], size, (module.process1[0], module.process2[0]))
    units = module.compression[0], module.shortcut[0]
    return [*pooled, a1, a2, a3, a4, *norms.add([None] * 5, (*large, x), size, units, joined=True)]


def work(x: Tensor, maps: list[Tensor]) -> dict[str, tuple[float, float]]:
    """The least work of the phases. Forward: read all maps, write the pools, the levels and the joined map.
    Backward: read maps and the gradients of these, write those of maps. No exponentials."""
    read = x.numel() + sum(map.numel() for map in maps)
    written = 0.34 * x.numel() + 2 * sum(map.numel() for map in maps[4:]) + x.numel()
    size = x.element_size()
    forward, backward = size * (read + written), size * (2 * read + written)
    return {"forward": (forward, 0), "backward": (backward, 0), "both": (forward + backward, 0)}
