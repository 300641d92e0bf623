"""Reads classes.txt: the class names, in the forms in which people and other tools write them.

    road                     one name per line, the first line for the first id
    road 128 64 128          a colour: three values or #804080, with blanks, tabs, commas, semicolons or colons
    road 128 64 128 255      an opacity behind all the colours, which is left out
    0: road                  an id, before or behind all the names: it must be that of the line
    # …                      a comment

A header such as `name,r,g,b` is passed over. Whatever would give a class another id than its author meant is refused,
with the line that would be right. Wide characters are read as the usual ones: `１：road` as `1:road`.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..errors import FileError, UserError, counted
from ..files import read_text
from .class_ids import STARTS_WITH_ID, is_run, without_ids
from .class_lines import Line, parse_line, shown

MAX_CLASSES = 254

_HEADINGS = {
    *("name", "names", "class", "classes", "label", "labels", "category", "categories"),
    *("id", "ids", "idx", "index"),
}
_CHANNELS = {"r", "g", "b", "red", "green", "blue", "rgb", "bgr"}
_COLUMNS = _HEADINGS | _CHANNELS | {"value", "pixel", "a", "alpha", "color", "colour"}


def read_classes(path: Path, first_id: int) -> tuple[tuple[str, ...], dict[int, tuple[int, ...]]]:
    """The names of the ids `first_id`, `first_id` + 1, …, and the colours {position: (r, g, b)} of those that have one.

    Raises `UserError` if the file cannot be read or understood, or names fewer than 2 or more than `MAX_CLASSES`
    classes.
    """
    lines = _with_three_values(path, [parse_line(path, number, text) for number, text in _lines(path)], first_id)
    if not 2 <= len(lines) <= MAX_CLASSES:
        raise UserError(
            f"{path} names {counted(len(lines), 'class', 'classes')}: write 2 to {MAX_CLASSES}, one name per line."
        )
    names = without_ids(path, lines, first_id)
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UserError(f"{path} names the class {shown(name)} twice: give each line its own name.")
    return tuple(names), {i: line.colour for i, line in enumerate(lines) if line.colour is not None}


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that name a class, with their numbers."""
    try:
        content = read_text(path).rstrip().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not a UTF-8 text file: save it as one ({error.reason}).") from error
    # splitlines would split at form feeds, too.
    texts = [" ".join(text.split()) for text in content.split("\n") if content]
    if "" in texts:
        raise UserError(f"{path}, line {texts.index('') + 1} is empty: write a name there, or take the line out.")
    lines = [(number, text) for number, text in enumerate(texts, 1) if not _is_comment(text)]
    if not lines and content:
        raise UserError(
            f"{path} names no class, because all its lines begin with # as comments do: write names without it."
        )
    if lines and _is_header(path, *lines[0], [text for _, text in lines[1:]]):
        del lines[0]
    return lines


def _is_comment(text: str) -> bool:
    return text.startswith("#") and not re.match(r"#[0-9a-fA-F]{6}\W+\w", text)


def _is_header(path: Path, number: int, text: str, others: list[str]) -> bool:
    """Whether the first line tells what the columns are. Raises `UserError` if it may be a class as well."""
    words, columns = re.findall(r"[^\W\d_]+", text.lower()), re.split(r"[,;:|] ?", text.rstrip(",;:|"))
    if re.search(r"[0-9]", text) or not words:
        return False
    order = "".join(word if word in ("rgb", "bgr") else word[0] for word in words if word in _CHANNELS)
    if len(order) == 3 and order != "rgb" and _COLUMNS.issuperset(words):
        raise UserError(
            f"{path}, line {number} is {shown(text)}, but colours are read as red, green, blue: put their columns in "
            "that order."
        )
    known = _COLUMNS.issuperset(words) and not _HEADINGS.isdisjoint(words)
    if known and (len(columns) > 1 or len(words) > 3 or (len(words) == 2 and _HEADINGS.issuperset(words))):
        return True
    numbered = len(columns) > 1 and all(re.search(r"[0-9]", other) for other in others)
    numbered = numbered or (len(others) > 1 and all(STARTS_WITH_ID.fullmatch(other) for other in others))
    if (known and len(words) == 1) or (others and numbered):
        raise UserError(
            f"{path}, line {number} is {shown(text)}, which looks like a heading, and would shift every class by one: "
            f"write {shown(f'# {text}')} if it is one, and if it is a class, name it otherwise."
        )
    return False


def _with_three_values(path: Path, lines: list[Line], first_id: int) -> list[Line]:
    """The lines with colours of three values. A fourth one is an id before or behind the colour, which is put before
    the name, an opacity, or a part of the name. Raises `UserError` if it may be either."""
    four = [line.colour for line in lines if line.colour is not None and len(line.colour) == 4]
    firsts, lasts = [values[0] for values in four], [values[3] for values in four]
    own = [*range(first_id, first_id + len(lines))]
    if not four:
        return lines
    all_four, led = len(four) == len(lines), all(re.match(r"[0-9]", line.name) for line in lines)
    opacity = all_four and set(lasts) == {255}
    id_first, id_last = (all_four and not led and is_run(values) for values in (firsts, lasts))
    if id_first and (id_last or opacity):
        line, (a, b, c, d) = lines[0], four[0]
        raise UserError(
            f"{path}, {line}, in which the id may be {a} and the colour {b} {c} {d}, or the colour {a} {b} {c}: write "
            f"{shown(f'{first_id} {line.name} {b} {c} {d}')} or {shown(f'{first_id} {line.name} {a} {b} {c}')}, and "
            "the others likewise."
        )
    if id_last:
        return [Line(x.number, x.text, f"{v[3]} {x.name}", v[:3]) for x, v in zip(lines, four, strict=True)]
    if opacity:
        return [Line(x.number, x.text, x.name, v[:3]) for x, v in zip(lines, four, strict=True)]
    for i, line in enumerate(lines):
        if not led and not id_first and line.colour is not None and line.colour[3:] == (255,):
            right = " ".join(map(str, (line.name, *line.colour[:3])))
            raise UserError(
                f"{path}, {line}, four values, of which the last seems to be an opacity: write {shown(right)}, or "
                f"{shown(f'{own[i]} {line.text}')}, and ids in all lines, if its first number belongs to the name."
            )
    return [
        line
        if line.colour is None or len(line.colour) == 3
        else Line(line.number, line.text, f"{line.name} {line.colour[0]}", line.colour[1:])
        for line in lines
    ]


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
