"""Binary cross-entropy as the first term: its value and gradient, what stands beside it, and what it keeps."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bcmf_ext
from bcmf_ext import BCL, CPG, SegmentationCriterion, reference
from bcmf_ext.losses import _chunks


def problem(*size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2, 4, *size), labels (2, 12, 20) in areas, some of them ignored, and class weights."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (2, 3, 5), generator=generator).repeat_interleave(4, 1).repeat_interleave(4, 2)
    y[0, :3] = 255
    z = torch.randn(2, 4, *(size or (12, 20)), generator=generator, dtype=dtype)
    return z, y, torch.rand(4, generator=generator, dtype=torch.float64)


def value_and_gradient(loss: Any, z: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    value = loss(leaf, *arguments, **options).total
    return value.detach(), torch.autograd.grad(value, leaf)[0]


READINGS = ({}, {"align_corners": True}, {"ignore_index": 2})


@pytest.mark.parametrize("size", [(12, 20), (3, 5), (5, 7)], ids=str)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_as_defined(size: tuple[int, int], weighted: bool, reading: dict[str, Any]) -> None:
    """Protects the scale: summed over classes, averaged over valid pixels, also with class weights, as the public code
    of the RMI loss has it; gradients reach low-resolution logits."""
    z, y, w = problem(*size)
    ignored, corners = reading.get("ignore_index", 255), reading.get("align_corners", False)
    y = torch.where(y == 255, ignored, y)

    def by_hand(z: Tensor, y: Tensor) -> Any:
        full, total, valid = F.interpolate(z, y.shape[1:], mode="bilinear", align_corners=corners), 0.0, 0
        for n, i, j in (y != ignored).nonzero().tolist():
            valid += 1
            for c in range(4):
                loss = F.softplus(-full[n, c, i, j] if y[n, i, j] == c else full[n, c, i, j])
                total = total + loss * (w[c] if weighted else 1.0)
        return bcmf_ext.SegmentationLoss(total / valid, None, None, None)

    options = {"weight": w if weighted else None, "first": "bce", **reading}
    expected = value_and_gradient(by_hand, z, y)
    for loss in (bcmf_ext.segmentation_loss, reference.segmentation_loss):
        torch.testing.assert_close(value_and_gradient(loss, z, y, **options), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype: torch.dtype) -> None:
    """Protects half precision: arithmetic is in fp32, under autocast too, and the gradient has the logits' dtype."""
    z, y, _ = problem(3, 5, dtype=dtype)
    expected = value_and_gradient(reference.segmentation_loss, z.double(), y, first="bce")
    with torch.autocast("cpu", torch.bfloat16):
        value, grad = value_and_gradient(bcmf_ext.segmentation_loss, z, y, first="bce")
    assert (value.dtype, grad.dtype) == (torch.float32, dtype)
    torch.testing.assert_close(value.double(), expected[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), expected[1], rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("reading", READINGS, ids=str)
def test_terms_beside_it(reading: dict[str, Any]) -> None:
    """Protects BCL and CPG beside it, which stay those of the softmax; the auxiliary head gets the same first term, and
    the logged terms say which it was."""
    z, y, _ = problem(3, 5)
    criterion = SegmentationCriterion(bcl=BCL(0.3), cpg=CPG(0.7), first="bce", aux_weight=0.2, **reading)
    y = torch.where(y == 255, reading.get("ignore_index", 255), y)
    terms = criterion.terms((z, 0.5 * z), y)
    assert list(terms) == ["total", "bce", "bcl", "cpg", "aux"]
    bce, aux = (bcmf_ext.segmentation_loss(x, y, first="bce", **reading) for x in (z, 0.5 * z))
    assert torch.equal(bce.ce, bce.total)
    bcl, cpg = bcmf_ext.boundary_corrected_loss(z, y, **reading), bcmf_ext.cpg_loss(z, y, **reading)
    torch.testing.assert_close(terms["total"], bce.total + 0.3 * bcl + 0.7 * cpg + 0.2 * aux.total)
    for name, value in (("bce", bce.total), ("bcl", bcl), ("cpg", cpg), ("aux", aux.total)):
        torch.testing.assert_close(terms[name], value)
    shares = criterion.gradient_shares((z, z), y)
    assert list(shares) == ["bce", "bcl", "cpg"]
    pulls = []
    for loss, weight in (
        (lambda z: bcmf_ext.segmentation_loss(z, y, first="bce", **reading).total, 1.0),
        (lambda z: bcmf_ext.boundary_corrected_loss(z, y, **reading), 0.3),
        (lambda z: bcmf_ext.cpg_loss(z, y, **reading), 0.7),
    ):
        leaf = z.detach().requires_grad_()
        pulls.append(weight * torch.autograd.grad(loss(leaf), leaf)[0].norm())
    torch.testing.assert_close(torch.stack([*shares.values()]), torch.stack(pulls) / sum(pulls))


def test_what_cannot_stand_beside_it() -> None:
    """OHEM is of the cross-entropy; BCL on flipped labels outweighs true ones only there, where it is checked."""
    z, y, w = problem()
    flipped = BCL(3.0, supervise="flipped")
    for call in (SegmentationCriterion, lambda **options: bcmf_ext.segmentation_loss(z, y, **options)):
        with pytest.raises(ValueError, match='beside first="bce" leave ohem out'):
            call(first="bce", ohem=0.7)
        with pytest.raises(ValueError, match=r'first is "ce", .* or "bce", binary ones, not .dice'):
            call(first="dice")
        with pytest.raises(ValueError, match="more than"):
            call(bcl=flipped)
        call(first="bce", bcl=flipped, weight=w)
        with pytest.raises(ValueError, match="impl"):
            call(first="bce", impl="none")
    with pytest.raises(ValueError, match="impl='cuda' cannot run segmentation_loss: it does not run on cpu"):
        bcmf_ext.segmentation_loss(z, y, first="bce", impl="cuda")


@pytest.mark.parametrize("size", [(2, 4, 0, 0), (0, 4, 3, 5), (2, 4, 12, 20)], ids=str)
def test_nothing_to_average(size: tuple[int, ...]) -> None:
    """Protects from NaN: without a valid pixel it is 0, with a gradient of zeros."""
    z = torch.randn(size, dtype=torch.float64)
    y = torch.full((size[0], *(size[2:] if 0 in size else (12, 20))), 255)
    value, grad = value_and_gradient(bcmf_ext.segmentation_loss, z, y, first="bce")
    assert value == 0
    assert not grad.any()


def test_labels_out_of_range_and_values_that_are_not_finite() -> None:
    """A label that is no class is an error that names it; what lies at ignored pixels reaches nothing."""
    z, y, _ = problem()
    z[0, :, 0] = torch.nan
    value, grad = value_and_gradient(bcmf_ext.segmentation_loss, z, y, first="bce")
    assert value.isfinite()
    assert not grad[0, :, :3].any()
    z[1, 0] = torch.where(y[1] == 0, z[1, 0], -torch.inf)  # as who rules classes out does
    value, grad = value_and_gradient(bcmf_ext.segmentation_loss, z, y, first="bce")
    assert value.isfinite()
    assert grad.isfinite().all()
    y[1, 0, 0] = 9
    with pytest.raises(ValueError, match="target holds 9"):
        bcmf_ext.segmentation_loss(z, y, first="bce")


def test_labels_are_widened_before_they_are_compared() -> None:
    """Protects uint8 labels, in which −100 would be 156, from pixels that do not count in the mean."""
    y = torch.tensor([[[156, 3]]], dtype=torch.uint8)
    z = torch.randn(1, 200, 1, 2, dtype=torch.float64)
    for loss in (bcmf_ext.segmentation_loss, reference.segmentation_loss):
        narrow, wide = (loss(z, labels, first="bce", ignore_index=-100).total for labels in (y, y.long()))
        assert torch.equal(narrow, wide)


def test_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects memory: what is kept for the backward has the logits' size, and a chunk an image gives the same."""
    z, y, w = problem(3, 5)
    options = {"weight": w, "first": "bce"}
    whole = value_and_gradient(bcmf_ext.segmentation_loss, z, y, **options)
    kept: list[weakref.ref[Tensor]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(weakref.ref(t)), t)[1], lambda t: t):
        loss = bcmf_ext.segmentation_loss(z.requires_grad_(), y, **options)
    assert max(t.numel() for ref in kept if (t := ref()) is not None) == z.numel(), loss
    monkeypatch.setattr(_chunks, "CHUNK_ON_CPU", 1)
    torch.testing.assert_close(value_and_gradient(bcmf_ext.segmentation_loss, z, y, **options), whole)


def test_second_derivatives() -> None:
    """Protects from a gradient of a gradient that is silently wrong: the loss says that it has none, also with the
    impl "torch", and the reference has it."""
    z, y, _ = problem(3, 5)
    z.requires_grad_()
    loss = bcmf_ext.segmentation_loss(z, y, cpg=CPG(), first="bce", impl="torch").total
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivative: use that of bcmf_ext\.reference"):
        grad.square().sum().backward()
    assert torch.autograd.gradgradcheck(lambda z: reference.segmentation_loss(z, y, first="bce").total, (z,))


def test_compile_and_transforms() -> None:
    """Under torch.compile and torch.func it is the definition, which these can differentiate."""
    z, y, _ = problem(3, 5)
    loss = lambda z: bcmf_ext.segmentation_loss(z, y, first="bce", impl="torch").total  # noqa: E731
    expected = value_and_gradient(bcmf_ext.segmentation_loss, z, y, first="bce")
    torch.testing.assert_close(torch.func.grad(loss)(z), expected[1])
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), expected[0])
    torch.compiler.reset()
