"""The promises of examples/README.md; CI runs the examples, in an environment with their hosts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROW = re.compile(r"^\| .* \| `(.*)` \| \[`(\w+\.py)`\]\(\2\)", re.MULTILINE)

pytestmark = pytest.mark.skipif(not (ROOT / "examples").exists(), reason="examples are not there")


def test_readme_shows_their_lines() -> None:
    """Protects readers: the table names every example, and the lines it shows are the examples' own."""
    rows = ROW.findall((ROOT / "examples" / "README.md").read_text("utf-8"))
    assert {name for _, name in rows} == {path.name for path in (ROOT / "examples").glob("*_*.py")}
    for line, name in rows:
        assert line in (ROOT / "examples" / name).read_text("utf-8"), name


def test_they_are_short() -> None:
    """Protects the examples from growing: one fits on a screen or two."""
    for path in (ROOT / "examples").glob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 60, path.name
