"""The context modules: their definitions written out from the formulas of docs/definitions.md, sizes, names."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bcmf_ext import dispatch
from bcmf_ext.metrics import upsample_argmax
from bcmf_ext.nn import DAPPM, LMFM


def randomised(module: nn.Module) -> nn.Module:
    """In fp64, with every parameter and statistic its own, so that no two units can be swapped unnoticed."""
    generator = torch.Generator().manual_seed(0)
    module = module.double()
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2.0, generator=generator)
        elif not name.endswith("num_batches_tracked"):
            tensor.normal_(0.0, 0.3, generator=generator)
    return module


def unit(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """A_k(x) in eval mode from the tensors of ``name``: BN, ReLU, convolution, whatever their indices are."""
    tensors = [value for key, value in state.items() if key.startswith(name + ".") and "num_batches" not in key]
    weight, bias, mean, var, kernel = tensors
    x = F.batch_norm(x, mean, var, weight, bias, eps=1e-5).relu()
    return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)


def pools(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """u1..u4."""
    pooled = [F.avg_pool2d(x, k, s, p) for k, s, p in ((5, 2, 2), (9, 4, 4), (17, 8, 8))]
    pooled.append(x.mean((2, 3), keepdim=True))
    return [
        F.interpolate(unit(state, f"scale{i}", y), x.shape[2:], mode="bilinear", align_corners=False)
        for i, y in enumerate(pooled, start=1)
    ]


def dappm_by_definition(state: dict[str, Tensor], x: Tensor) -> Tensor:
    y = [unit(state, "scale0", x)]
    for i, u in enumerate(pools(state, x), start=1):
        y.append(unit(state, f"process{i}", u + y[i - 1]))
    return unit(state, "compression", torch.cat(y, 1)) + unit(state, "shortcut", x)


def lmfm_by_definition(state: dict[str, Tensor], x: Tensor) -> Tensor:
    u1, u2, u3, u4 = pools(state, x)
    y4 = unit(state, "process4", u4)
    y3 = unit(state, "process3", u3)
    y2 = unit(state, "process2", u2 + y4)
    y1 = unit(state, "process1", u1 + y3)
    return unit(state, "compression", torch.cat([y1, y2, y3, y4], 1)) + unit(state, "shortcut", x)


@pytest.mark.parametrize(
    ("module", "definition"), [(DAPPM, dappm_by_definition), (LMFM, lmfm_by_definition)], ids=["dappm", "lmfm"]
)
@pytest.mark.parametrize("size", [(1, 1), (2, 5), (16, 32)])
def test_wiring(module: type[nn.Module], definition, size: tuple[int, int]) -> None:
    """Each module computes its published formula, on a single cell, a map smaller than its pools, and a usual one."""
    context = randomised(module(12, 8, 6)).eval()
    x = torch.randn(2, 12, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = definition(context.state_dict(), x)
    assert expected.shape == (2, 6, *size)
    torch.testing.assert_close(context(x), expected)


@pytest.mark.parametrize(("module", "parameters"), [(DAPPM, 1_073_408), (LMFM, 990_208)])
def test_parameters(module: type[nn.Module], parameters: int) -> None:
    """The defaults have the published size (docs/definitions.md, Context modules)."""
    assert sum(p.numel() for p in module().parameters()) == parameters


def test_lmfm_has_dappms_names() -> None:
    """A DAPPM checkpoint fits LMFM by name and shape, but for the compression; scale0 alone is left over."""
    dappm, lmfm = DAPPM().state_dict(), LMFM().state_dict()
    assert {name.split(".")[0] for name in dappm.keys() - lmfm.keys()} == {"scale0"}
    differing = {name.split(".")[0] for name in lmfm if lmfm[name].shape != dappm[name].shape}
    assert differing == {"compression"}


@pytest.mark.parametrize("module", [DAPPM, LMFM])
def test_input_is_not_written(module: type[nn.Module]) -> None:
    """The in-place ReLUs stay inside: the caller's map is as it was, and its gradient is right for every branch."""
    context = randomised(module(4, 4, 3)).train()
    x = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    before = x.detach().clone()
    assert torch.autograd.gradcheck(context, (x,), fast_mode=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("module", [DAPPM, LMFM])
def test_tools_that_know_pytorch_alone(module: type[nn.Module]) -> None:
    """torch.jit.trace (TensorBoard, FLOP counters), meta tensors and torch.func get the path of PyTorch's own ops, or a
    sentence; a plain torch.export keeps our ops, which are quicker."""
    network = module(32, 8, 8).eval()
    x = torch.randn(2, 32, 6, 7)
    expected = network(x)
    traced = torch.jit.trace(network, x)
    assert "bcmf::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)
    assert network.to("meta")(x.to("meta")).shape == expected.shape
    if dispatch.why_not("cpu", "cpu") is None:
        network = module(32, 8, 8).eval()
        program = torch.export.export(network, (x,))
        assert "bcmf" in str(program.graph)
        with pytest.raises(NotImplementedError, match=rf"torch\.func .* use impl='torch' for {module.__name__} there"):
            torch.func.vmap(network)(x[:, None])
    by_pytorch = module(32, 8, 8, impl="torch").eval()
    together = torch.func.vmap(by_pytorch)(x[:, None])[:, 0]
    torch.testing.assert_close(together, by_pytorch(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_by_hand(dynamo: bool, tmp_path: Path) -> None:
    """A user's own torch.onnx.export of a module, by either exporter, holds operators of ONNX alone, and computes the
    same."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    class Labels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.context = LMFM(32, 8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return upsample_argmax(self.context(x), (12, 14))

    network, x = Labels().eval(), torch.randn(2, 32, 6, 7)
    path = str(tmp_path / "labels.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the old exporter's of itself
        torch.onnx.export(network, (x,), path, dynamo=dynamo, verbose=False, input_names=["x"])
    (labels,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    assert (torch.from_numpy(labels) == network(x)).double().mean() > 0.99
