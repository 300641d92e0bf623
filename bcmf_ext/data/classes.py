"""classes.txt: the class names, in the forms in which people and other tools write them.

    road                     one name per line, the first line for the first id
    road 128 64 128          a colour: three values or #804080, with blanks, tabs, commas, semicolons or colons
    0: road                  an id, before or behind all the names: it must be that of the line
    # …                      a comment

A header such as `name,r,g,b` is passed over. Whatever would give a class another id than its author meant is refused,
with the line that would be right.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import read_text

MAX_CLASSES = 254

_SEPARATOR = r"(?: ?[,;:=|] ?| )"  # in lines whose blanks and tabs are single blanks
_COLOUR = re.compile(
    rf"(?P<name>.*?){_SEPARATOR}[(\[]?(?:#(?P<hex>[0-9a-fA-F]{{6}})|"
    rf"(?P<r>[0-9]+){_SEPARATOR}(?P<g>[0-9]+){_SEPARATOR}(?P<b>[0-9]+))[)\]]?"
)
_FRACTION = re.compile(rf".*{_SEPARATOR}[0-9]*\.[0-9]+")
# Where an id may stand, and how many lines must have a number there for it to be one: "zone 1" is a name as well.
_IDS = (
    (re.compile(rf"(?P<id>[-+]?[0-9]+)(?:[.)]?{_SEPARATOR}(?:[-–] )?(?P<name>.*)|[.)]?)"), any),
    (re.compile(r"(?P<id>[0-9]+)[-_.](?P<name>.*)"), all),
    (re.compile(rf"(?P<name>.*?){_SEPARATOR}(?P<id>[-+]?[0-9]+)"), all),
)
_COLOUR_FIRST = re.compile(rf"(?P<values>(?:[0-9]+{_SEPARATOR}){{3,5}})(?P<name>[^0-9].*)")
_HEADINGS = {
    "name",
    "names",
    "class",
    "classes",
    "label",
    "labels",
    "category",
    "categories",
    "id",
    "ids",
    "idx",
    "index",
}
_COLUMNS = _HEADINGS | {"value", "pixel", "r", "g", "b", "a", "red", "green", "blue", "alpha", "rgb", "color", "colour"}


@dataclass(frozen=True)
class _Line:
    """A class: the number of its line in the file, its text, what is left of it as a name, and its colour."""

    number: int
    text: str
    name: str
    colour: tuple[int, ...] | None


def read_classes(path: Path, first_id: int) -> tuple[tuple[str, ...], dict[int, tuple[int, ...]]]:
    """The names of the ids `first_id`, `first_id` + 1, …, and the colours {position: (r, g, b)} of those that have one.

    `UserError` if the file cannot be read or understood, or names fewer than 2 or more than `MAX_CLASSES` classes.
    """
    lines = [_parse(path, number, text) for number, text in _lines(path)]
    if not 2 <= len(lines) <= MAX_CLASSES:
        raise UserError(
            f"{path} names {len(lines)} class{'es' * (len(lines) != 1)}: write 2 to {MAX_CLASSES}, one name per line."
        )
    names = _without_ids(path, lines, first_id)
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"{path} names the class {_shown(name)} twice: give each line its own name.")
    return tuple(names), {i: line.colour for i, line in enumerate(lines) if line.colour is not None}


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that name a class, with their numbers."""
    try:
        texts = [" ".join(text.split()) for text in read_text(path).rstrip().splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a UTF-8 text file: save it as one ({error.reason}).") from error
    if "" in texts:
        raise UserError(f"{path}, line {texts.index('') + 1} is empty: write a name there, or take the line out.")
    lines = [(number, text) for number, text in enumerate(texts, 1) if not _is_comment(text)]
    if lines and _is_header(path, *lines[0], [text for _, text in lines[1:]]):
        del lines[0]
    return lines


def _is_comment(text: str) -> bool:
    return text.startswith("#") and not re.match(r"#[0-9a-fA-F]{6}\W+\w", text)


def _is_header(path: Path, number: int, text: str, others: list[str]) -> bool:
    """Whether the first line tells what the columns are. `UserError` if it may be a class as well."""
    words, columns = re.findall(r"[^\W\d_]+", text.lower()), re.split(r"[,;:|] ?", text.rstrip(",;:|"))
    if re.search(r"[0-9]", text) or not words:
        return False
    known = _COLUMNS.issuperset(words) and not _HEADINGS.isdisjoint(words)
    if known and (len(columns) > 1 or len(words) > 3 or (len(words) == 2 and _HEADINGS.issuperset(words))):
        return True
    numbered = len(columns) > 1 and all(re.search(r"[0-9]", other) for other in others)
    numbered = numbered or (len(others) > 1 and all(_IDS[0][0].fullmatch(other) for other in others))
    if (known and len(words) == 1) or (others and numbered):
        raise UserError(
            f"{path}, line {number} is {_shown(text)}, which looks like a heading, and would shift every class by one: "
            f"write {_shown(f'# {text}')} if it is one, and if it is a class, name it otherwise."
        )
    return False


def _parse(path: Path, number: int, text: str) -> _Line:
    """A line's name and colour. `UserError` if it has no name, or a colour that is none."""
    where = f"{path}, line {number} is {_shown(text)}"
    text = re.sub(r" # .*", "", text).rstrip(" ,;:|")
    name, colour = text, None
    if found := _COLOUR.fullmatch(text):
        name, colour = found["name"], _colour_of(found)
    if (found and colour is None) or _FRACTION.fullmatch(text):
        name = re.split(rf"{_SEPARATOR}[0-9]", name)[0]
        raise UserError(f"{where}: the colour's values must be 0 to 255, as in {_shown(f'{name} 128 64 128')}.")
    name, swapped = _unquoted(name), None
    if first := _COLOUR_FIRST.fullmatch(name):  # three values; an id before them, and an opacity behind
        values = re.findall(r"[0-9]+", first["values"])
        swapped = [first["name"], *(values if len(values) == 3 else values[1:4])]
    elif hexadecimal := re.fullmatch(r"(#[0-9a-fA-F]{6})\W+(.*)", name):
        swapped = [hexadecimal[2], hexadecimal[1]]
    if swapped:
        raise UserError(f"{where}, but a colour stands behind the name: write {_shown(' '.join(swapped))}.")
    if not re.match(r"[-+]?\w|[(]", name):
        raise UserError(
            f"{where}, which does not begin with a class name: write one per line, such as 'road' or "
            "'road 128 64 128' (JSON and the like are not read)."
        )
    if name == "__ignore__":
        raise UserError(f"{where}, which is no class: take the line out; ignored pixels have the id 255.")
    return _Line(number, text, name, colour)


def _colour_of(found: re.Match[str]) -> tuple[int, ...] | None:
    if found["hex"]:
        return tuple(bytes.fromhex(found["hex"]))
    words = [word.lstrip("0") or "0" for word in (found["r"], found["g"], found["b"])]
    values = tuple(int(word) if len(word) <= 3 else 256 for word in words)
    return values if max(values) <= 255 else None


def _without_ids(path: Path, lines: list[_Line], first_id: int) -> list[str]:
    """The names without the ids that stand before or behind all of them. `UserError` if one is not its line's.

    Numbers without a blank after them, or behind the names, are ids only where the names differ without them.
    """
    for pattern, enough in _IDS:
        found = [pattern.fullmatch(line.name) for line in lines]
        if enough(found) and (enough is any or len({match["name"] for match in found if match}) == len(lines)):
            break
    else:
        return [line.name for line in lines]
    if not all(found):
        odd, other = (lines[[bool(match) for match in found].index(has)] for has in (True, False))
        raise UserError(
            f"{path}, line {odd.number} is {_shown(odd.text)}, which begins with a number as an id does, and line "
            f"{other.number}, {_shown(other.text)}, does not: write ids in all lines or in none, as in "
            f"{_shown(f'{first_id + lines.index(other)} {other.text}')}."
        )
    matches = [match for match in found if match]
    names = [_unquoted(match["name"] or match["id"]) for match in matches]
    from_1 = first_id == 0 and all(match["id"] == str(n) for n, match in enumerate(matches, 1))
    for i, (line, match, name) in enumerate(zip(lines, matches, names, strict=True)):
        where, own_id = f"{path}, line {line.number} is {_shown(line.text)}", str(first_id + i)
        if match["name"] and not re.search(r"[^\W\d_]", name):
            raise UserError(f"{where}, numbers without a name: write one, as in {_shown(f'{own_id} road 128 64 128')}.")
        if (match["id"].lstrip("+0") or "0") != own_id:
            right = " ".join(map(str, (own_id, name, *(line.colour or ()))))
            hint = "; if 0 is unlabelled in the labels, pass --reduce-zero-label" if from_1 else ""
            raise UserError(
                f"{where}, but names id {own_id}: write {_shown(right)}, or all classes in the order of their ids"
                f"{hint}."
            )
    return names


def _unquoted(name: str) -> str:
    """A name with single blanks in it, without quotation marks around it."""
    name = " ".join(name.split())
    return name[1:-1].strip() if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name


def _shown(text: str) -> str:
    """Quoted, and not endless."""
    return repr(text) if len(text) <= 60 else repr(text[:60])[:-1] + " …'"


def palette_for(count: int) -> np.ndarray:
    """(count, 3) uint8: the colours of PASCAL VOC from its index 1 on, all different up to 255.

    The bits of the index are dealt to the high bits of red, green and blue in turn. Index 0, black, is left out: it
    would look like ignored pixels.
    """
    index = np.arange(1, count + 1)
    palette = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((index >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette
