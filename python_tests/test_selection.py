"""What the tests leave out is what harness/selection.py says, and no more."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from harness.selection import INTERPRETED, cover

HERE = Path(__file__).parent


def test_every_two_values_meet() -> None:
    """Protects the default run: of a test's combinations it takes few, among which every two values meet that meet
    anywhere; and all values of a single parameter."""
    values = {"backend": "abcd", "case": range(10), "dtype": range(4), "shape": ["small", "large"]}
    choices = [dict(zip(values, choice, strict=True)) for choice in itertools.product(*values.values())]
    del choices[7::11]  # a test may leave some out
    kept = [choices[i] for i in cover(choices)]
    for a, b in itertools.combinations(values, 2):
        assert {(each[a], each[b]) for each in kept} == {(each[a], each[b]) for each in choices}
    assert len(kept) < 60
    assert sorted(cover([{"case": i} for i in range(5)])) == [0, 1, 2, 3, 4]
    assert list(cover([{}])) == [0]


def test_every_rule_has_its_test() -> None:
    """Protects the table from rules of tests that have other names now, and so run in full, or as others do."""
    for name in INTERPRETED:
        file, test = name.split("::")
        assert re.search(rf"^def {test}\(", (HERE / file).read_text("utf-8"), re.MULTILINE), name
