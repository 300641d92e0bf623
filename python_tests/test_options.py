"""What is asked of a loss: defaults, floats that stand for options, and what is refused."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import torch

from bcmf_ext import dispatch, ops, reference
from bcmf_ext.options import BCL, CPG, OHEM, resolve_options


def test_default_weights_and_floats() -> None:
    """Protects the defaults of docs/definitions.md: λ by kernel size, floats for θ and λ, and 255 as
    ignore_index everywhere."""
    assert [CPG(kernel_size=k).weight for k in (3, 5, 7)] == [1.0, 0.4, 0.35]
    assert CPG(weight=2.0, kernel_size=7).weight == 2.0
    assert (OHEM(), BCL()) == (OHEM(0.9, 131072), BCL(0.1, 2, "original", 0.5, 0.5, 0.7, 3))
    terms = resolve_options(0.7, 0.1, 0.2)
    assert (terms.ce, terms.ohem, terms.bcl, terms.cpg) == (True, OHEM(0.7), BCL(0.1), CPG(0.2))
    terms = resolve_options(None, np.float32(0.5), 1)
    assert (terms.ce, terms.ohem, terms.bcl, terms.cpg) == (True, None, BCL(0.5), CPG(1.0))
    for name in ("cross_entropy", "boundary_corrected_loss", "cpg_loss", "cpg_loss_sparse", "segmentation_loss"):
        assert inspect.signature(getattr(reference, name)).parameters["ignore_index"].default == 255


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda z, y: reference.segmentation_loss(z, y, ohem=True), r"ohem is None, a number or OHEM\(…\), not True"),
        (lambda z, y: reference.cross_entropy(z, y, ohem="0.9"), "ohem is None, a number"),
        (lambda z, y: reference.segmentation_loss(z, y, bcl=torch.tensor(0.7)), "bcl is None, a number or BCL"),
        (lambda z, y: reference.segmentation_loss((z, z), y), "not a tuple: of .* SegmentationCriterion"),
        (lambda z, y: reference.cross_entropy({"out": z}, y), "not a dict: of .* SegmentationCriterion"),
        (lambda z, y: BCL(step=1.5), r"BCL's step is a whole number, not 1\.5 \(float\)"),
        (lambda z, y: BCL(step=(1, True)), "a step of BCL is a whole number, not True"),
        (lambda z, y: BCL(nms_size=3.0), "BCL's nms_size is a whole number"),
        (lambda z, y: BCL(weight="0.1"), "BCL's weight is a number, not '0.1' \\(str\\)"),
        (lambda z, y: CPG(kernel_size=3.0), "CPG's kernel_size is a whole number"),
        (lambda z, y: OHEM(min_kept=1.5), "OHEM's min_kept is a whole number"),
        (lambda z, y: OHEM(min_kept=torch.tensor(3)), "OHEM's min_kept is a whole number"),
        (lambda z, y: reference.cross_entropy(z, y, ignore_index=255.0), "ignore_index is a whole number, not 255.0"),
        (lambda z, y: reference.cross_entropy(z, y, ignore_index=[255]), "ignore_index is a whole number"),
        (lambda z, y: reference.cpg_loss(z, y, ignore_index=None), "ignored pixels, not None: pass -1"),
        (lambda z, y: reference.cross_entropy(z, y.numpy()), "target is a tensor, not a ndarray"),
        (lambda z, y: reference.cross_entropy(z, y, weight=[1.0, 2.0]), "class weights are a tensor, not a list"),
    ],
)
def test_wrong_types_are_type_errors(wrong, says: str) -> None:
    """Protects users from an AttributeError deep inside."""
    with pytest.raises(TypeError, match=says):
        wrong(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3).long())


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: BCL(step=()),
        lambda: BCL(step=0),
        lambda: BCL(weight=math.nan),
        lambda: CPG(weight=-1.0),
        lambda: BCL(step=(1,) * 9),
        lambda: BCL(nms_size=2),
        lambda: BCL(alpha=-0.1),
        lambda: BCL(supervise="flipped", beta=math.nan),
        lambda: BCL(supervise="both"),
        lambda: BCL(threshold=0.0),
        lambda: resolve_options(None, BCL(supervise="flipped", weight=1.0), None),
        lambda: CPG(kernel_size=9),
        lambda: CPG(ignore_mode="no"),
        lambda: OHEM(threshold=1.5),
        lambda: OHEM(min_kept=-1),
        lambda: resolve_options(0.9, BCL(supervise="flipped"), None),
        lambda: reference.cpg_loss(torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3).long(), kernel_size=4),
    ],
)
def test_wrong_options_are_value_errors(wrong) -> None:
    """Protects users from options that would train nonsense."""
    with pytest.raises(ValueError, match=r"\.$"):
        wrong()


@pytest.mark.skipif(dispatch.EXTENSION is None, reason="the extension was not built")
def test_cpp_has_the_same_options_and_numbers() -> None:
    """Protects the hand-over to C++: options and their types, terms, and the entries of sums and summary have one order
    on both sides."""
    assert dispatch.EXTENSION.contract() == ops.CONTRACT
