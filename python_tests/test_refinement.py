"""SRM and CRM: their definitions written out from the formulas of docs/definitions.md, any size, and what precision,
layouts, compilers and exporters must not break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_nn import randomised
from torch import Tensor, nn

from bcmf_ext.inference import fold_batch_norms
from bcmf_ext.nn import CRM, SRM
from bcmf_ext.nn.srm import mix_offsets, sample

# Sizes (h, w) -> (H, W): factors 2, 4 and 8, odd ones, and axes of one pixel.
SIZES = [((3, 4), (6, 8)), ((5, 3), (37, 23)), ((1, 2), (8, 16)), ((1, 1), (1, 1)), ((1, 5), (1, 9)), ((4, 1), (7, 1))]


both_ways = pytest.mark.parametrize(
    "impl", ["torch", "auto"]
)  # what it is defined by, and kernels where there are some


def maps(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, dtype=dtype, generator=generator) for size in sizes]


def unit(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """1×1 convolution, batch norm in eval mode, ReLU, from the tensors of ``name``."""
    weight, bias, mean, var = (state[f"{name}.1.{t}"] for t in ("weight", "bias", "running_mean", "running_var"))
    return F.batch_norm(F.conv2d(x, state[f"{name}.0.weight"]), mean, var, weight, bias).relu()


def srm_by_definition(state: dict[str, Tensor], high: Tensor, low: Tensor) -> Tensor:
    """Pixel by pixel, from the formulas."""
    n, _, height, width = high.shape
    up = F.interpolate(low, (height, width), mode="bilinear")
    joined = torch.cat(
        [unit(state, "high", high), F.interpolate(unit(state, "low", low), (height, width), mode="bilinear")], 1
    )
    raw = F.conv2d(joined, state["offset.weight"], state["offset.bias"], padding=1)
    out = F.conv2d(high, state["lateral.weight"], state["lateral.bias"])
    at = lambda i, size: min(max(i, 0), size - 1)  # noqa: E731
    for i in range(n):
        for y in range(height):
            for x in range(width):
                a = raw[i, 2:, y, x].softmax(0)
                around = [(at(y + v, height), at(x + u, width)) for v in (-1, 0, 1) for u in (-1, 0, 1)]
                dx, dy = (sum(a[k] * raw[i, d, v, u] for k, (v, u) in enumerate(around)) for d in (0, 1))
                px, py = (min(max(float(p), 0.0), size - 1) for p, size in ((x + dx, width), (y + dy, height)))
                left, top = int(px), int(py)
                right, bottom, s, t = at(left + 1, width), at(top + 1, height), px - left, py - top
                out[i, :, y, x] += (1 - t) * ((1 - s) * up[i, :, top, left] + s * up[i, :, top, right])
                out[i, :, y, x] += t * ((1 - s) * up[i, :, bottom, left] + s * up[i, :, bottom, right])
    return out


def crm_by_definition(state: dict[str, Tensor], at: int, *stages: Tensor) -> Tensor:
    """One 1×1 convolution of all maps' concatenation, and the attentions."""
    height, width = size = stages[at].shape[2:]
    resampled = []
    for i, stage in enumerate(stages):
        if i < at:  # The mean of each window that begins within the map.
            side = 2 ** (at - i)
            rows = [
                torch.stack(
                    [
                        stage[:, :, side * y : side * y + side, side * x : side * x + side].mean((2, 3))
                        for x in range(width)
                    ],
                    -1,
                )
                for y in range(height)
            ]
            stage = torch.stack(rows, 2)
        resampled.append(F.interpolate(stage, size, mode="bilinear"))
    kernel = torch.cat([state[f"project.{i}.weight"] for i in range(len(stages))], 1)
    norm = (state[f"norm.{t}"] for t in ("running_mean", "running_var", "weight", "bias"))
    x = F.batch_norm(F.conv2d(torch.cat(resampled, 1), kernel), *norm).relu()

    def mlp(pooled: Tensor) -> Tensor:
        hidden = F.conv2d(pooled, state["channel.0.weight"], state["channel.0.bias"]).relu()
        return F.conv2d(hidden, state["channel.2.weight"], state["channel.2.bias"])

    x = x * (mlp(F.adaptive_avg_pool2d(x, 1)) + mlp(F.adaptive_max_pool2d(x, 1))).sigmoid()
    pooled = torch.stack([x.mean(1), x.max(1).values], 1)
    return x * F.conv2d(pooled, state["spatial.weight"], padding=3).sigmoid()


def stages_of(height: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Maps of 3, 4, 5 and 6 channels, each half as large as the one before, rounded up."""
    return maps(*((2, 3 + i, -(-height // 2**i), -(-width // 2**i)) for i in range(4)), dtype=dtype)


@both_ways
@pytest.mark.parametrize(("small", "large"), SIZES, ids=str)
def test_srm(small: tuple[int, int], large: tuple[int, int], impl: str) -> None:
    """The module computes its formula, for offsets of several pixels that also point outside, at any size."""
    module = randomised(SRM(5, 6, impl=impl)).eval()
    module.offset.weight.data *= 3
    high, low = maps((2, 5, *large), (2, 6, *small))
    torch.testing.assert_close(module(high, low), srm_by_definition(module.state_dict(), high, low))


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("size", [(16, 24), (37, 23), (1, 9), (1, 1)], ids=str)
def test_crm(at: int, size: tuple[int, int]) -> None:
    """The module computes its formula, where the result has the size of the largest map, the smallest and another."""
    module = randomised(CRM((3, 4, 5, 6), 8, at=at)).eval()
    stages = stages_of(*size)
    torch.testing.assert_close(module(*stages), crm_by_definition(module.state_dict(), at, *stages))


@pytest.mark.parametrize(("small", "large"), SIZES, ids=str)
def test_srm_begins_as_upsampling(small: tuple[int, int], large: tuple[int, int]) -> None:
    """Protects who puts an SRM into a trained network: at first it is bilinear upsampling plus the projection."""
    module = SRM(5, 6).eval()
    high, low = maps((2, 5, *large), (2, 6, *small), dtype=torch.float32)
    expected = F.interpolate(low, large, mode="bilinear") + module.lateral(high)
    torch.testing.assert_close(module(high, low), expected, rtol=0, atol=1e-5)


@both_ways
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool, impl: str) -> None:
    """Gradients by maps and by all parameters, fp64. Offsets are random: at none bilinear sampling has a kink."""
    srm, crm = (randomised(m).train(training) for m in (SRM(3, 4, impl=impl), CRM((3, 4, 5, 6), 4)))
    pairs = ((srm, maps((2, 3, 6, 5), (2, 4, 3, 3))), (crm, stages_of(9, 10)))
    for module, inputs in pairs:
        parameters = dict(module.named_parameters())
        count = len(inputs)

        def run(
            *tensors: Tensor, module: nn.Module = module, names: tuple[str, ...] = tuple(parameters), count: int = count
        ) -> Tensor:
            named = dict(zip(names, tensors[count:], strict=True))
            return torch.func.functional_call(module, named, tensors[:count])

        leaves = [t.detach().requires_grad_() for t in (*inputs, *parameters.values())]
        assert torch.autograd.gradcheck(run, leaves, eps=1e-7, atol=1e-5, fast_mode=True)


@both_ways
@pytest.mark.parametrize("size", [((1, 1), (1, 1)), ((1, 3), (1, 5)), ((2, 1), (5, 1))], ids=str)
def test_gradcheck_of_one_pixel(size: tuple[tuple[int, int], tuple[int, int]], impl: str) -> None:
    """Protects axes of one pixel from a division by zero, which values, clamped to the border, would hide."""
    srm = randomised(SRM(3, 4, impl=impl)).eval()
    leaves = [t.requires_grad_() for t in maps((2, 3, *size[1]), (2, 4, *size[0]))]
    assert torch.autograd.gradcheck(srm, leaves, eps=1e-7, atol=1e-5)


@both_ways
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_offsets_that_are_not_numbers(layout: torch.memory_format, impl: str) -> None:
    """Protects a training that diverges: its image becomes NaN, or with kernels the pixels that the offset acts on,
    which the trainer tells. grid_sample hides it, and then its backward on a CPU ends the process."""
    srm = SRM(8, 8, impl=impl).to(memory_format=layout)
    nn.init.normal_(srm.offset.weight, 0, 0.1)
    high, low = (m.to(memory_format=layout) for m in maps((2, 8, 16, 16), (2, 8, 8, 8), dtype=torch.float32))
    bias = torch.zeros(2, 11, 16, 16)
    bias[1, 0, 5, 5] = torch.nan
    srm.offset.register_forward_hook(lambda _, __, raw: raw + bias)
    out = srm.eval()(high, low)
    assert out[0].isfinite().all()
    assert out[1, :, 4:7, 4:7].isnan().all()
    out.sum().backward()
    assert srm.offset.weight.grad is not None
    assert srm.offset.weight.grad.isnan().any()


@pytest.mark.parametrize("module", [SRM(5, 6), SRM(5, 6, project=False), CRM((3, 4, 5, 6), 6), CRM((3, 4), 6, at=0)])
def test_sentences(module: nn.Module) -> None:
    """Maps that do not fit are refused by name; a residual can be given, and has to be without a projection."""
    high, low = maps((1, 5, 6, 8), (1, 6, 3, 4), dtype=torch.float32)
    if isinstance(module, CRM):
        with pytest.raises(ValueError, match=f"CRM takes {len(module.project)} maps, .*, not 1"):
            module(low)
        return
    residual = torch.randn(1, 6, 6, 8)
    given = module.eval()(high, low, residual)
    if module.lateral is None:
        with pytest.raises(ValueError, match="needs a residual"):
            module(high, low)
    else:
        torch.testing.assert_close(given, module(high, low) - module.lateral(high) + residual)
    with pytest.raises(
        ValueError, match=r"SRM upsamples: its second map, \(1, 6, 7, 4\), may not be larger than its f"
    ):
        module(high, torch.randn(1, 6, 7, 4), residual)
    with pytest.raises(ValueError, match=r"residual of an SRM has the shape .*\(1, 6, 6, 8\), not \(1, 6, 6, 1\)"):
        module(high, low, residual[..., :1])


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: SRM(4, 7), "low_channels are even, and at least 2, not 7"),
        (lambda: SRM(4, 0), "low_channels are even, and at least 2, not 0"),
        (lambda: CRM((4, 4), 8), "A CRM of 2 maps .*: at is not 3"),
        (lambda: CRM((4, 4), 8, at=-1), "at is not -1"),
    ],
)
def test_what_cannot_be_built(build: Callable[[], nn.Module], says: str) -> None:
    """A sentence when the module is made, not a traceback when it runs."""
    with pytest.raises(ValueError, match=says):
        build()


@both_ways
@pytest.mark.parametrize("how", ["autocast", "bf16"])
def test_positions_are_in_fp32(how: str, impl: str) -> None:
    """Protects half precision: at 512 columns a bf16 position is off by up to half a pixel. Under autocast, and with
    weights in bf16 as the Predictor has them, a ramp of one pixel a step is read where fp32 reads it."""
    width = 512
    offsets = torch.full((1, 11, 1, width), 0.25)
    ramp = torch.arange(width, dtype=torch.float32).view(1, 1, 1, width)
    dtype = torch.bfloat16 if how == "bf16" else torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        mixed = mix_offsets(offsets.to(dtype))
        found = sample(ramp, mixed)
    assert mixed.dtype == found.dtype == torch.float32
    torch.testing.assert_close(found, (ramp + 0.25).clamp(max=width - 1), rtol=0, atol=1e-4)

    module = SRM(8, 8, impl=impl).eval()
    nn.init.normal_(module.offset.bias[:2])
    high, low = maps((1, 8, 4, 256), (1, 8, 2, 128), dtype=torch.float32)
    expected = module(high, low)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = module.to(dtype)(high.to(dtype), low.to(dtype))
    assert found.dtype == torch.bfloat16 or how == "autocast"
    assert (found.float() - expected).abs().mean() < 0.02 * expected.abs().mean()


@both_ways
def test_channels_last(impl: str) -> None:
    """Protects the rest of the network: maps that come in channels_last go out in channels_last, with equal values,
    although grid_sample on a CPU drops that layout."""
    srm, crm = SRM(8, 8, impl=impl).eval(), CRM((8, 8), 8, at=1).eval()
    high, low = maps((2, 8, 12, 16), (2, 8, 6, 8), dtype=torch.float32)
    nn.init.normal_(srm.offset.weight, 0, 0.1)
    expected = srm(high, low), crm(high, low)
    by_channel = [m.to(memory_format=torch.channels_last) for m in (high, low)]
    for module, value in zip((srm, crm), expected, strict=True):
        found = module.to(memory_format=torch.channels_last)(*by_channel)
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@both_ways
@pytest.mark.thorough
def test_compiled_training(impl: str) -> None:
    """A compiled training step in channels_last has eager's gradients: with F.pad(mode="replicate") for the offsets'
    border, torch 2.13 stops with an assertion there."""
    torch.manual_seed(0)
    module = SRM(8, 8, impl=impl).to(memory_format=torch.channels_last)
    nn.init.normal_(module.offset.weight, 0, 0.1)
    high, low = (
        m.to(memory_format=torch.channels_last) for m in maps((2, 8, 12, 16), (2, 8, 6, 8), dtype=torch.float32)
    )

    def gradients(function: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(function(high, low).square().sum(), list(module.parameters())))

    expected = gradients(module)
    torch.testing.assert_close(gradients(torch.compile(module, fullgraph=True)), expected, rtol=1e-3, atol=1e-3)
    torch.compiler.reset()


def test_folding() -> None:
    """The Predictor folds the norms of an SRM's two units; a CRM's follows a sum, and stays."""
    srm, crm = randomised(SRM(5, 6)).eval(), randomised(CRM((3, 4, 5, 6), 6)).eval()
    high, low = maps((1, 5, 8, 8), (1, 6, 4, 4))
    stages = stages_of(8, 8)
    expected = srm(high, low), crm(*stages)
    for module in (srm, crm):
        fold_batch_norms(module)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in srm.modules())
    assert isinstance(crm.norm, nn.BatchNorm2d)
    torch.testing.assert_close((srm(high, low), crm(*stages)), expected)
