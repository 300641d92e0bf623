"""Any shape, layout, label and option against the definition in fp64, on every backend of cases.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness.backends import Backend, every_backend
from harness.cases import DTYPES, assert_not_less_exact, layouts, make_case

from bcmf_ext import BCL, CPG, OHEM

pytest.importorskip("hypothesis")  # some GPU machines have no network to get it from
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = {"cpu": 1000, "emulated": 300, "ptx": 100, "triton": 30, "cuda": 300, "pytorch": 100}


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    """Shape, dtype, layout, labels and options of a call."""
    n, c = draw(st.integers(0, 3)), draw(st.sampled_from([2, 3, 11, 19, 40]))
    h, w = draw(st.integers(0, 17)), draw(st.integers(0, 17))
    size = draw(st.none() | st.tuples(st.integers(1, 20), st.integers(1, 20))) or (h, w)  # of the logits
    ignore_index = draw(st.sampled_from([255, -1, -100, 0, 1]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z = draw(st.sampled_from([0.1, 3, 50, 1e4])) * torch.randn((n, c, *size), generator=g, dtype=torch.float64)
    y = torch.randint(0, c, (n, h, w), generator=g)
    grain = draw(st.integers(1, 6))  # labels in areas have few edges
    y = y[:, ::grain, ::grain].repeat_interleave(grain, 1).repeat_interleave(grain, 2)[:, :h, :w]
    y[torch.rand(n, h, w, generator=g) < draw(st.sampled_from([0, 0.02, 0.2, 1]))] = ignore_index
    return {
        "logits": z.to(draw(st.sampled_from(DTYPES))),
        "target": y.to(draw(st.sampled_from([torch.int16, torch.int32, torch.int64]))),
        "weight": torch.rand(c, generator=g) if draw(st.booleans()) else None,
        "layout": draw(st.sampled_from(["nchw", "channels_last", "slice", "rows cut", "transposed"])),
        "ignore_index": ignore_index,
        "align_corners": draw(st.booleans()),
        "ohem": draw(
            st.none() | st.builds(OHEM, st.sampled_from([1e-3, 0.3, 0.9, 1.0]), st.sampled_from([0, 1, 17, 10**6]))
        ),
        "bcl": draw(
            st.none()
            | st.builds(
                BCL,
                st.just(0.7),
                st.integers(1, 20) | st.tuples(st.integers(1, 3), st.integers(1, 3)),
                st.sampled_from(["original", "flipped"]),
                threshold=st.sampled_from([0.1, 0.7, 1.0]),
                nms_size=st.sampled_from([1, 3, 7]),
            )
        ),
        "cpg": draw(
            st.none()
            | st.builds(
                CPG, st.just(0.6), st.sampled_from([3, 5, 7]), ignore_mode=st.sampled_from(["window", "centre"])
            )
        ),
    }


@every_backend
@pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.thorough)])
def test_fuzz(backend: Backend, share: float) -> None:
    """Protects from what nobody thought of: any shape, layout, label and option as the definition in fp64."""

    @settings(
        max_examples=round(share * EXAMPLES[backend.name]), deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(problems())
    def run(drawn: dict[str, Any]) -> None:
        z, y, weight, layout = (drawn[name] for name in ("logits", "target", "weight", "layout"))
        terms = {name: drawn[name] for name in ("ohem", "bcl", "cpg", "align_corners")}
        if terms["bcl"] is not None and terms["bcl"].supervise == "flipped":
            terms["ohem"] = None
        case = make_case("segmentation_loss fuzz" + " weighted" * (weight is not None), **terms)
        z, y = z.to(backend.device), y.to(backend.device)
        w = torch.ones(z.shape[1]) if weight is None else weight
        view = layouts(z)[layout]
        assert_not_less_exact(case, backend, z, y, w.to(backend.device), view, ignore_index=drawn["ignore_index"])

    run()
