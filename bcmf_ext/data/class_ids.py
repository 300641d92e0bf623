"""Finds the ids in classes.txt, numbers that count the lines, and checks that each is that of its line."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import UserError
from .class_lines import SEPARATOR, Line, shown, unquoted

_ID = r"(?P<id>[-+]?(?:0[xX][0-9a-fA-F]+|[0-9]+))"
_WORD_FOR_ID = r"(?:no|nr|id|idx|index|class|label|category)[.:=#]? ?#?"
_BEHIND = rf"(?:{SEPARATOR}[-–] |{SEPARATOR}|/| ?(?=[(\[])){SEPARATOR}?"
STARTS_WITH_ID = re.compile(rf"{_ID}(?:[.)]?{SEPARATOR}(?:[-–] )?(?P<name>.*)|[.)]?)")
"""Matches a line that begins with an id, as in `0: road`."""
# An id may stand at these places, if any line, or all, have a number there: "zone 1" is a name as well.
_IDS = (
    (STARTS_WITH_ID, any),
    (re.compile(rf"[(\[<]{_ID}[)\]>][.]?{SEPARATOR}?(?:[-–] )?(?P<name>.*)"), any),
    (re.compile(r"(?P<id>[0-9]+)[-_./)](?P<name>.*)"), all),
    (re.compile(rf"(?i:{_WORD_FOR_ID}){_ID}[.)]?{SEPARATOR}(?:[-–] )?(?P<name>.*)"), all),
    (re.compile(rf"(?P<name>.*?){_BEHIND}[(\[]?(?:(?i:no|nr|idx?|index)[.:=#]* ?)?{_ID}[)\]]?[.]?"), all),
)


def without_ids(path: Path, lines: list[Line], first_id: int) -> list[str]:
    """The names without the ids that stand before or behind all of them. Raises `UserError` if one is not its line's.

    Numbers without a blank after them, or behind the names, are ids only where the names differ without them.
    """
    for pattern, enough in _IDS:
        found = [pattern.fullmatch(line.name) for line in lines]
        if enough(found) and (enough is any or len({match["name"] for match in found if match}) == len(lines)):
            break
    else:
        _check_numbers_inside(path, lines, first_id)
        return [line.name for line in lines]
    if not all(found):
        odd, other = (lines[[bool(match) for match in found].index(has)] for has in (True, False))
        raise UserError(
            f"{path}, {odd}, which begins with a number as an id does, and line "
            f"{other.number}, {shown(other.text)}, does not: write ids in all lines or in none, as in "
            f"{shown(f'{first_id + lines.index(other)} {other.text}')}."
        )
    matches = [match for match in found if match]
    names = [unquoted(match["name"] or match["id"]) for match in matches]
    written = [_number(match["id"]) for match in matches]
    for i, (line, match, name) in enumerate(zip(lines, matches, names, strict=True)):
        if match["name"] and not re.search(r"[^\W\d_]", name):
            raise UserError(
                f"{path}, {line}, numbers without a name: write one, as in {shown(f'{first_id + i} road 128 64 128')}."
            )
        if written[i] != str(first_id + i):
            raise _wrong_id(path, lines, written, i, name, first_id)
    return names


def _check_numbers_inside(path: Path, lines: list[Line], first_id: int) -> None:
    """Raises `UserError` if numbers at any place count the lines, but otherwise than we do, and names differ without
    them."""
    runs = [[*re.finditer(r"[0-9]+", line.name)] for line in lines]
    for place in {*range(fewest := min(map(len, runs))), *range(-fewest, 0)}:
        numbers = [run[place] for run in runs]
        written = [_number(number[0]) for number in numbers]
        names = [
            " ".join(re.split(r"[\W_]+", f"{line.name[: number.start()]} {line.name[number.end() :]}")).strip()
            for line, number in zip(lines, numbers, strict=True)
        ]
        if len(set(names)) < len(names) or "" in names or not all(len(number) < 6 for number in written):
            continue
        values = [int(number) for number in written]
        wrong = [i for i, value in enumerate(values) if value != first_id + i]
        if wrong and is_run(values):
            kept = f", or {shown(f'{first_id + wrong[0]} {lines[wrong[0]].text}')} if that number belongs to the name"
            raise _wrong_id(path, lines, written, wrong[0], names[wrong[0]], first_id, kept)


def _wrong_id(
    path: Path, lines: list[Line], written: list[str], i: int, name: str, first_id: int, otherwise: str = ""
) -> UserError:
    """An error that says what to do about line `i`, whose written id is not its own."""
    line, own = lines[i], first_id + i
    classes = [number for number in written if number not in ("255", "-1")]
    if written[i] not in classes and classes == [str(first_id + n) for n in range(len(classes))]:
        return UserError(f"{path}, {line}, but names id {own}: take the line out; ignored pixels have the id 255.")
    right = " ".join(map(str, (own, name, *(line.colour or ()))))
    from_1 = first_id == 0 and written == [str(n) for n in range(1, len(lines) + 1)]
    hint = "; if 0 is unlabelled in the labels, pass `reduce_zero_label=True`" if from_1 else ""
    return UserError(
        f"{path}, {line}, but names id {own}: write {shown(right)}{otherwise}, or all classes in the order of their "
        f"ids{hint}."
    )


def _number(text: str) -> str:
    """A number as it is usually written: 1 for 01, +1 and 0x1. It may be too long for `int`."""
    if text.lower().lstrip("+-").startswith("0x") and len(text) < 10:
        text = format(int(text, 16))
    sign, digits = "-" * text.startswith("-"), text.lstrip("+-").lstrip("0")
    return f"{sign}{digits}" if digits else "0"


def is_run(values: list[int]) -> bool:
    """Whether numbers are those of lines: one after the other, or in another order from 0 or 1 on."""
    one_by_one = len(values) > 2 and values == [*range(values[0], values[0] + len(values))]
    return len(values) > 1 and (one_by_one or sorted(values) in ([*range(s, s + len(values))] for s in (0, 1)))
