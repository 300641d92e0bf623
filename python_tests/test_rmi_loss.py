"""The RMI loss: the official formula where that is right, gradients, empty crops, and what it keeps."""

from __future__ import annotations

import inspect
import math
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bcmf_ext
from bcmf_ext import SegmentationCriterion, reference
from bcmf_ext.losses import _chunks
from bcmf_ext.options import RMI

BOTH = pytest.mark.parametrize("loss", [bcmf_ext.rmi_loss, reference.rmi_loss], ids=["chunks", "definition"])
OPTIONS = ({}, {"activation": "softmax"}, {"radius": 2, "pool": 1}, {"radius": 1, "pool": 3, "alpha": 0.1})


def problem(*size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits (2, 3, *size), and labels (2, 16, 20) in areas, some of them ignored."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 3, (2, 4, 5), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    y[0, :3] = 255
    return torch.randn(2, 3, *(size or (16, 20)), generator=generator, dtype=dtype), y


def official(
    z: Tensor, y: Tensor, radius: int = 3, pool: int = 2, alpha: float = 5e-4, activation: str = "sigmoid"
) -> Tensor:
    """The paper's formula, with the inverse that it is written with; the authors' code has the same."""
    valid = y != 255
    one_hot = F.one_hot(torch.where(valid, y, 0), z.shape[1]).movedim(3, 1) * valid[:, None]
    p = z.sigmoid() if activation == "sigmoid" else z.exp() / z.exp().sum(1, keepdim=True)
    maps = one_hot.double(), p * valid[:, None] + 1e-6
    total = 0.0
    for n in range(z.shape[0]):
        for c in range(z.shape[1]):
            rows = []
            for each in maps:
                map = F.avg_pool2d(each[n, c][None], pool, pool, pool // 2)[0] if pool > 1 else each[n, c]
                h, w = (side - radius + 1 for side in map.shape)
                shifts = [map[i : i + h, j : j + w].flatten() for i in range(radius) for j in range(radius)]
                rows.append(torch.stack([shift - shift.mean() for shift in shifts]))
            label, p = rows
            eye = alpha * torch.eye(radius**2, dtype=torch.float64)
            m = label @ label.T - label @ p.T @ torch.inverse(p @ p.T + eye) @ p @ label.T
            total = total + torch.linalg.cholesky(m + eye).diagonal().log().sum()  # half of log det
    return total / z.shape[0] / radius**2


def value_and_gradient(loss: Any, z: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    value = loss(leaf, *arguments, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@BOTH
@pytest.mark.parametrize("options", [*OPTIONS[:3], {"alpha": 0.1}], ids=str)
def test_official_formula(loss: Any, options: dict[str, Any]) -> None:
    """Protects the definition: on inputs where the inverse is harmless, value and gradient are the official ones."""
    z, y = problem()
    expected = value_and_gradient(official, z, y, **options)
    torch.testing.assert_close(value_and_gradient(loss, z, y, **options), expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(16, 20), (4, 5)], ids=str)
def test_chunks_equal_the_definition(options: dict[str, Any], size: tuple[int, int]) -> None:
    """Protects the gradient that is computed along with the loss, of low-resolution logits too."""
    z, y = problem(*size)
    expected = value_and_gradient(reference.rmi_loss, z, y, align_corners=True, **options)
    found = value_and_gradient(bcmf_ext.rmi_loss, z, y, align_corners=True, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@BOTH
def test_gradcheck(loss: Any) -> None:
    """Through both determinants, fp64; half of the classes are absent in the second image."""
    z, y = problem(4, 5)
    y[1] = torch.where(y[1] == 2, 1, y[1])
    assert torch.autograd.gradcheck(lambda z: loss(z, y), (z.requires_grad_(),))


@BOTH
@pytest.mark.parametrize(("height", "width"), [(0, 0), (1, 1), (3, 3), (1, 20)])
def test_nothing_to_compare(loss: Any, height: int, width: int) -> None:
    """Protects from NaN: with images below a region, without a valid pixel, or without any image, the loss is 0, and
    pulls at nothing."""
    z, y = problem()
    for logits, labels in (
        (z[:, :, :height, :width], y[:, 4 : 4 + height, :width]),
        (z, torch.full_like(y, 255)),
        (z[:0], y[:0]),
    ):
        value, grad = value_and_gradient(loss, logits, labels)
        assert value == 0
        assert not grad.any()


@BOTH
def test_images_without_a_valid_pixel_leave_the_mean(loss: Any) -> None:
    """Protects the mean: beside an empty crop an image has the loss and the gradient that it has alone."""
    z, y = problem()
    y[1] = 255
    value, grad = value_and_gradient(loss, z, y)
    alone, grad_alone = value_and_gradient(loss, z[:1], y[:1])
    torch.testing.assert_close(value, alone)
    torch.testing.assert_close(grad[:1], grad_alone)
    assert not grad[1].any()


@BOTH
def test_absent_class(loss: Any) -> None:
    """A class that is absent adds ½ log α, and its gradient is finite."""
    z, y = problem()
    absent = torch.where(y == 2, 255, y)
    with_two = value_and_gradient(loss, z[:, :2], absent)
    with_three = value_and_gradient(loss, z, absent)
    assert (with_three[0] - with_two[0]).item() == pytest.approx(0.5 * math.log(RMI.alpha))
    assert with_three[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype: torch.dtype) -> None:
    """Protects determinants from half precision: they are in fp64 whatever the logits are in, under autocast too."""
    z, y = problem(4, 5, dtype=dtype)
    expected = value_and_gradient(reference.rmi_loss, z.double(), y)
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = value_and_gradient(bcmf_ext.rmi_loss, z, y)
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-4, atol=0)
    scale = expected[1].abs().max().item()
    torch.testing.assert_close(grad.double(), expected[1], rtol=0, atol=scale * max(1e-3, torch.finfo(dtype).eps))


def test_sure_predictions_are_finite() -> None:
    """Protects long trainings: where p equals the labels, PPᵀ is as singular as YYᵀ, and the official inverse fails."""
    z, y = problem()
    sure = torch.where(F.one_hot(y.clamp(max=2), 3).movedim(3, 1) == 1, 40.0, -40.0).double()
    value, grad = value_and_gradient(bcmf_ext.rmi_loss, sure, y)
    assert value.isfinite()
    assert grad.isfinite().all()
    assert value < bcmf_ext.rmi_loss(z, y)


def test_labels_out_of_range_and_values_that_are_not_finite() -> None:
    """A label that is no class is an error that names it; what lies at ignored pixels reaches nothing, and a NaN
    elsewhere shows."""
    z, y = problem()
    z[0, :, 0] = torch.nan
    value, grad = value_and_gradient(bcmf_ext.rmi_loss, z, y)
    assert value.isfinite()
    assert not grad[0, :, :3].any()
    z[0, 0, 8] = torch.nan
    assert bcmf_ext.rmi_loss(z, y).isnan()
    y[1, 0, 0] = 9
    with pytest.raises(ValueError, match="target holds 9"):
        bcmf_ext.rmi_loss(z, y)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"radius": 0}, "RMI's radius is a number of pixels from 1 to 16, not 0"),
        ({"pool": 17}, "RMI's pool is a number of pixels"),
        ({"alpha": 0.0}, r"RMI's alpha is a number above 0, not 0\.0"),
        ({"activation": "tanh"}, 'RMI\'s activation is "sigmoid" or "softmax", not \'tanh\''),
    ],
)
def test_options_that_cannot_be(wrong: dict[str, Any], says: str) -> None:
    """A sentence at once, also from the module's constructor."""
    z, y = problem()
    for call in (lambda **o: bcmf_ext.rmi_loss(z, y, **o), lambda **o: reference.rmi_loss(z, y, **o), bcmf_ext.RMILoss):
        with pytest.raises(ValueError, match=says):
            call(**wrong)


def test_module() -> None:
    """Protects the constructor: it takes the function's keywords and defaults, and each reaches the function; the
    criterion takes the module beside its own terms."""
    keywords = [p for p in inspect.signature(bcmf_ext.rmi_loss).parameters.values() if p.kind is p.KEYWORD_ONLY]
    constructor = inspect.signature(bcmf_ext.RMILoss).parameters.values()
    assert [(p.name, p.default) for p in constructor] == [(p.name, p.default) for p in keywords]
    z, y = problem(4, 5)
    options = {"radius": 2, "pool": 1, "alpha": 0.1, "activation": "softmax", "ignore_index": 2, "align_corners": True}
    labels = torch.where(y == 255, 2, y)
    assert torch.equal(bcmf_ext.RMILoss(**options)(z, labels), bcmf_ext.rmi_loss(z, labels, **options))
    criterion = SegmentationCriterion(first="bce", extra={"rmi": (0.5, bcmf_ext.RMILoss())})
    assert torch.equal(criterion.terms(z, y)["rmi"], bcmf_ext.rmi_loss(z, y))
    for reading in ({"ignore_index": 2}, {"align_corners": True}):
        with pytest.raises(ValueError, match=r"'rmi' has .*: give both the same"):
            SegmentationCriterion(extra={"rmi": (0.5, bcmf_ext.RMILoss())}, **reading)
        SegmentationCriterion(extra={"rmi": (0.5, bcmf_ext.RMILoss(**reading))}, **reading)


def test_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects memory: what is kept for the backward has the logits' size, in the criterion too, and chunks of one
    image and of one class give the same."""
    z, y = problem(4, 5)
    whole = value_and_gradient(bcmf_ext.rmi_loss, z, y)
    criterion = SegmentationCriterion(bcl=None, cpg=None, first="bce", extra={"rmi": (0.5, bcmf_ext.RMILoss())})
    for function in (bcmf_ext.rmi_loss, criterion):
        kept: list[weakref.ref[Tensor]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(weakref.ref(t)), t)[1], lambda t: t):  # noqa: B023
            loss = function(z.requires_grad_(), y)
        assert max(t.numel() for ref in kept if (t := ref()) is not None) == z.numel(), loss
    monkeypatch.setattr(_chunks, "CHUNK_ON_CPU", 1)
    torch.testing.assert_close(value_and_gradient(bcmf_ext.rmi_loss, z, y), whole)


def test_second_derivatives() -> None:
    """Protects from a gradient of a gradient that is silently wrong: the loss says that it has none, with or without
    others beside it, and the reference has it."""
    z, y = problem(4, 5)
    z.requires_grad_()
    for loss in (bcmf_ext.rmi_loss(z, y), bcmf_ext.rmi_loss(z, y) + z.square().sum()):
        (grad,) = torch.autograd.grad(loss, z, create_graph=True)
        with pytest.raises(NotImplementedError, match=r"no second derivative: use that of bcmf_ext\.reference"):
            grad.square().sum().backward()
    assert torch.autograd.gradgradcheck(lambda z: reference.rmi_loss(z, y), (z,), fast_mode=True)
    with torch.no_grad():
        assert not bcmf_ext.rmi_loss(z, y).requires_grad


def test_compile_and_transforms() -> None:
    """Under torch.compile and torch.func it is the definition, which these can differentiate."""
    z, y = problem(4, 5)
    loss = lambda z: bcmf_ext.rmi_loss(z, y)  # noqa: E731
    expected = value_and_gradient(bcmf_ext.rmi_loss, z, y)
    torch.testing.assert_close(torch.func.grad(loss)(z), expected[1])
    torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(z), expected[0])
    torch.compiler.reset()
