"""Files that tests read: those of python_tests/data, and the copy of CamVid that a clone alone does not have."""

from __future__ import annotations

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
DDRNET_KEYS = DATA / "ddrnet23s_keys.txt"
"""Name and shape of each of the 346 tensors of DDRNet-23-slim's public Cityscapes checkpoint."""
CAMVID = Path(__file__).resolve().parents[3] / "shared" / "data" / "camvid"


def camvid() -> Path:
    """CamVid in SegNet's form. A test that asks for it is skipped where there is no copy beside the repository."""
    if not CAMVID.is_dir():
        pytest.skip("CamVid is not at ../shared/data/camvid, seen from the repository")
    return CAMVID
