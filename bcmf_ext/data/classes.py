"""classes.txt: the class names, in the forms in which people and other tools write them.

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
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import read_text

MAX_CLASSES = 254

_SEPARATOR = r"(?: ?(?:=>|[-–—]>|→|[,;:=|、]) ?| )"  # in lines whose blanks and tabs are single blanks
_THREE = rf"(?P<r>[0-9]+){_SEPARATOR}(?P<g>[0-9]+){_SEPARATOR}(?P<b>[0-9]+)"
_COLOUR = re.compile(
    rf"(?P<name>.*?){_SEPARATOR}[(\[]?(?:#(?P<hex>[0-9a-fA-F]{{6}})|{_THREE}(?:{_SEPARATOR}(?P<a>[0-9]+))?)[)\]]?"
)
_LAST_THREE = re.compile(rf"(?P<name>.*?[0-9]){_SEPARATOR}{_THREE}(?P<hex>)(?P<a>(?!))?")
_FRACTION = re.compile(rf".*{_SEPARATOR}[0-9]*\.[0-9]+")
_ID = r"(?P<id>[-+]?(?:0[xX][0-9a-fA-F]+|[0-9]+))"
_WORD_FOR_ID = r"(?:no|nr|id|idx|index|class|label|category)[.:=#]? ?#?"
_BEHIND = rf"(?:{_SEPARATOR}[-–] |{_SEPARATOR}|/| ?(?=[(\[])){_SEPARATOR}?"
# Where an id may stand, and how many lines must have a number there for it to be one: "zone 1" is a name as well.
_IDS = (
    (re.compile(rf"{_ID}(?:[.)]?{_SEPARATOR}(?:[-–] )?(?P<name>.*)|[.)]?)"), any),
    (re.compile(rf"[(\[<]{_ID}[)\]>][.]?{_SEPARATOR}?(?:[-–] )?(?P<name>.*)"), any),
    (re.compile(r"(?P<id>[0-9]+)[-_./)](?P<name>.*)"), all),
    (re.compile(rf"(?i:{_WORD_FOR_ID}){_ID}[.)]?{_SEPARATOR}(?:[-–] )?(?P<name>.*)"), all),
    (re.compile(rf"(?P<name>.*?){_BEHIND}[(\[]?(?:(?i:no|nr|idx?|index)[.:=#]* ?)?{_ID}[)\]]?[.]?"), all),
)
_RANGE = re.compile(rf"[0-9]+ ?(?:[-–—]|\.\.\.?|to) ?[0-9]+{_SEPARATOR}.*")
_QUOTED_FIELD = re.compile(r"""(?:^|(?<=[,;:|=])|(?<=[,;:|=] ))(["'])([^"']*)\1(?=$| ?[,;:|=])""")
_QUOTED_NUMBER = re.compile(r"""(["'])([0-9]+)\1""")
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
_CHANNELS = {"r", "g", "b", "red", "green", "blue", "rgb", "bgr"}
_COLUMNS = _HEADINGS | _CHANNELS | {"value", "pixel", "a", "alpha", "color", "colour"}


@dataclass(frozen=True)
class _Line:
    """A class: the number of its line in the file, its text, what is left of it as a name, and the values behind it:
    none, a colour, or four, of which one is no colour."""

    number: int
    text: str
    name: str
    colour: tuple[int, ...] | None

    def __str__(self) -> str:
        return f"line {self.number} is {_shown(self.text)}"


def read_classes(path: Path, first_id: int) -> tuple[tuple[str, ...], dict[int, tuple[int, ...]]]:
    """The names of the ids `first_id`, `first_id` + 1, …, and the colours {position: (r, g, b)} of those that have one.

    `UserError` if the file cannot be read or understood, or names fewer than 2 or more than `MAX_CLASSES` classes.
    """
    lines = _with_three_values(path, [_parse(path, number, text) for number, text in _lines(path)], first_id)
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
        content = read_text(path).rstrip().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a UTF-8 text file: save it as one ({error.reason}).") from error
    texts = [" ".join(text.split()) for text in content.split("\n") if content]  # splitlines splits at form feeds too
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
    """Whether the first line tells what the columns are. `UserError` if it may be a class as well."""
    words, columns = re.findall(r"[^\W\d_]+", text.lower()), re.split(r"[,;:|] ?", text.rstrip(",;:|"))
    if re.search(r"[0-9]", text) or not words:
        return False
    order = "".join(word if word in ("rgb", "bgr") else word[0] for word in words if word in _CHANNELS)
    if len(order) == 3 and order != "rgb" and _COLUMNS.issuperset(words):
        raise UserError(
            f"{path}, line {number} is {_shown(text)}, but colours are read as red, green, blue: put their columns in "
            "that order."
        )
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
    plain = _plain(re.sub(r" # .*", "", text))
    name, colour = plain, None
    if _RANGE.fullmatch(plain):
        raise UserError(f"{where}, but a class has one id, not a range: write one line for each id.")
    if found := _COLOUR.fullmatch(plain):
        name, colour = found["name"], _colour_of(found)
        if colour is None and (three := _LAST_THREE.fullmatch(plain)):  # behind a number that is above 255
            name, colour = three["name"], _colour_of(three)
    if (found and colour is None) or _FRACTION.fullmatch(plain):
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
    if not re.match(r"[-+]?\w|[(]|[\[<][0-9]", name):
        raise UserError(
            f"{where}, which does not begin with a class name: write one per line, such as 'road' or "
            "'road 128 64 128' (JSON and the like are not read)."
        )
    if name == "__ignore__":
        raise UserError(f"{where}, which is no class: take the line out; ignored pixels have the id 255.")
    return _Line(number, text, name, colour)


def _plain(text: str) -> str:
    """A line in the usual characters, without quotation marks around its fields and separators at its end."""
    text = " ".join(unicodedata.normalize("NFKC", text).split())
    text = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text).rstrip(" ,;:|")
    return _QUOTED_NUMBER.sub(r"\2", _QUOTED_FIELD.sub(r"\2", text))


def _colour_of(found: re.Match[str]) -> tuple[int, ...] | None:
    """The three or four values behind a name; None if one is above 255."""
    if found["hex"]:
        return tuple(bytes.fromhex(found["hex"]))
    words = [word.lstrip("0") or "0" for word in found.group("r", "g", "b", "a") if word is not None]
    values = tuple(int(word) if len(word) <= 3 else 256 for word in words)
    return values if max(values) <= 255 else None


def _with_three_values(path: Path, lines: list[_Line], first_id: int) -> list[_Line]:
    """The lines with colours of three values. A fourth one is an id before or behind the colour, which is put before
    the name, an opacity, or a part of the name. `UserError` if it may be either."""
    four = [line.colour for line in lines if line.colour is not None and len(line.colour) == 4]
    firsts, lasts = [values[0] for values in four], [values[3] for values in four]
    own = [*range(first_id, first_id + len(lines))]
    if not four:
        return lines
    all_four, led = len(four) == len(lines), all(re.match(r"[0-9]", line.name) for line in lines)
    opacity = all_four and set(lasts) == {255}
    id_first, id_last = (all_four and not led and _is_run(values) for values in (firsts, lasts))
    if id_first and (id_last or opacity):
        line, (a, b, c, d) = lines[0], four[0]
        raise UserError(
            f"{path}, {line}, in which the id may be {a} and the colour {b} {c} {d}, or the colour {a} {b} {c}: write "
            f"{_shown(f'{first_id} {line.name} {b} {c} {d}')} or {_shown(f'{first_id} {line.name} {a} {b} {c}')}, and "
            "the others likewise."
        )
    if id_last:
        return [_Line(x.number, x.text, f"{v[3]} {x.name}", v[:3]) for x, v in zip(lines, four, strict=True)]
    if opacity:
        return [_Line(x.number, x.text, x.name, v[:3]) for x, v in zip(lines, four, strict=True)]
    for i, line in enumerate(lines):
        if not led and not id_first and line.colour is not None and line.colour[3:] == (255,):
            right = " ".join(map(str, (line.name, *line.colour[:3])))
            raise UserError(
                f"{path}, {line}, four values, of which the last seems to be an opacity: write {_shown(right)}, or "
                f"{_shown(f'{own[i]} {line.text}')}, and ids in all lines, if its first number belongs to the name."
            )
    return [
        line
        if line.colour is None or len(line.colour) == 3
        else _Line(line.number, line.text, f"{line.name} {line.colour[0]}", line.colour[1:])
        for line in lines
    ]


def _is_run(values: list[int]) -> bool:
    """Whether numbers are those of lines: one after the other, or in another order from 0 or 1 on."""
    one_by_one = len(values) > 2 and values == [*range(values[0], values[0] + len(values))]
    return len(values) > 1 and (one_by_one or sorted(values) in ([*range(s, s + len(values))] for s in (0, 1)))


def _without_ids(path: Path, lines: list[_Line], first_id: int) -> list[str]:
    """The names without the ids that stand before or behind all of them. `UserError` if one is not its line's.

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
            f"{other.number}, {_shown(other.text)}, does not: write ids in all lines or in none, as in "
            f"{_shown(f'{first_id + lines.index(other)} {other.text}')}."
        )
    matches = [match for match in found if match]
    names = [_unquoted(match["name"] or match["id"]) for match in matches]
    written = [_number(match["id"]) for match in matches]
    for i, (line, match, name) in enumerate(zip(lines, matches, names, strict=True)):
        if match["name"] and not re.search(r"[^\W\d_]", name):
            raise UserError(
                f"{path}, {line}, numbers without a name: write one, as in {_shown(f'{first_id + i} road 128 64 128')}."
            )
        if written[i] != str(first_id + i):
            raise _wrong_id(path, lines, written, i, name, first_id)
    return names


def _check_numbers_inside(path: Path, lines: list[_Line], first_id: int) -> None:
    """`UserError` if numbers at any place count the lines, but otherwise than we do, and names differ without them."""
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
        if wrong and _is_run(values):
            kept = f", or {_shown(f'{first_id + wrong[0]} {lines[wrong[0]].text}')} if that number belongs to the name"
            raise _wrong_id(path, lines, written, wrong[0], names[wrong[0]], first_id, kept)


def _wrong_id(
    path: Path, lines: list[_Line], written: list[str], i: int, name: str, first_id: int, otherwise: str = ""
) -> UserError:
    """What to do about line `i`, whose written id is not its own."""
    line, own = lines[i], first_id + i
    classes = [number for number in written if number not in ("255", "-1")]
    if written[i] not in classes and classes == [str(first_id + n) for n in range(len(classes))]:
        return UserError(f"{path}, {line}, but names id {own}: take the line out; ignored pixels have the id 255.")
    right = " ".join(map(str, (own, name, *(line.colour or ()))))
    from_1 = first_id == 0 and written == [str(n) for n in range(1, len(lines) + 1)]
    hint = "; if 0 is unlabelled in the labels, pass `reduce_zero_label=True`" if from_1 else ""
    return UserError(
        f"{path}, {line}, but names id {own}: write {_shown(right)}{otherwise}, or all classes in the order of their "
        f"ids{hint}."
    )


def _number(text: str) -> str:
    """A number as it is usually written: 1 for 01, +1 and 0x1. It may be too long for `int`."""
    if text.lower().lstrip("+-").startswith("0x") and len(text) < 10:
        text = format(int(text, 16))
    sign, digits = "-" * text.startswith("-"), text.lstrip("+-").lstrip("0")
    return f"{sign}{digits}" if digits else "0"


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
