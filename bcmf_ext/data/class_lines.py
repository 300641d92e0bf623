"""Reads one line of classes.txt: the name of a class, and the values behind it."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError

SEPARATOR = r"(?: ?(?:=>|[-–—]>|→|[,;:=|、]) ?| )"  # Blanks and tabs of a line are single blanks by then.
_THREE = rf"(?P<r>[0-9]+){SEPARATOR}(?P<g>[0-9]+){SEPARATOR}(?P<b>[0-9]+)"
_COLOUR = re.compile(
    rf"(?P<name>.*?){SEPARATOR}[(\[]?(?:#(?P<hex>[0-9a-fA-F]{{6}})|{_THREE}(?:{SEPARATOR}(?P<a>[0-9]+))?)[)\]]?"
)
_LAST_THREE = re.compile(rf"(?P<name>.*?[0-9]){SEPARATOR}{_THREE}(?P<hex>)(?P<a>(?!))?")
_FRACTION = re.compile(rf".*{SEPARATOR}[0-9]*\.[0-9]+")
_RANGE = re.compile(rf"[0-9]+ ?(?:[-–—]|\.\.\.?|to) ?[0-9]+{SEPARATOR}.*")
_QUOTED_FIELD = re.compile(r"""(?:^|(?<=[,;:|=])|(?<=[,;:|=] ))(["'])([^"']*)\1(?=$| ?[,;:|=])""")
_QUOTED_NUMBER = re.compile(r"""(["'])([0-9]+)\1""")
_COLOUR_FIRST = re.compile(rf"(?P<values>(?:[0-9]+{SEPARATOR}){{3,5}})(?P<name>[^0-9].*)")


@dataclass(frozen=True)
class Line:
    """A class: the number of its line in the file, its text, what is left of it as a name, and the values behind it:
    none, a colour, or four, of which one is no colour."""

    number: int
    text: str
    name: str
    colour: tuple[int, ...] | None

    def __str__(self) -> str:
        return f"line {self.number} is {shown(self.text)}"


def parse_line(path: Path, number: int, text: str) -> Line:
    """A line's name and colour. Raises `UserError` if it has no name, or a colour that is none."""
    where = f"{path}, line {number} is {shown(text)}"
    plain = _plain(re.sub(r" # .*", "", text))
    name, colour = plain, None
    if _RANGE.fullmatch(plain):
        raise UserError(f"{where}, but a class has one id, not a range: write one line for each id.")
    if found := _COLOUR.fullmatch(plain):
        name, colour = found["name"], _colour_of(found)
        if colour is None and (three := _LAST_THREE.fullmatch(plain)):  # A number above 255 stands before the colour.
            name, colour = three["name"], _colour_of(three)
    if (found and colour is None) or _FRACTION.fullmatch(plain):
        name = re.split(rf"{SEPARATOR}[0-9]", name)[0]
        raise UserError(f"{where}: the colour's values must be 0 to 255, as in {shown(f'{name} 128 64 128')}.")
    name, swapped = unquoted(name), None
    # Three values are a colour; four or five begin with an id, and may end with an opacity.
    if first := _COLOUR_FIRST.fullmatch(name):
        values = re.findall(r"[0-9]+", first["values"])
        swapped = [first["name"], *(values if len(values) == 3 else values[1:4])]
    elif hexadecimal := re.fullmatch(r"(#[0-9a-fA-F]{6})\W+(.*)", name):
        swapped = [hexadecimal[2], hexadecimal[1]]
    if swapped:
        raise UserError(f"{where}, but a colour stands behind the name: write {shown(' '.join(swapped))}.")
    if not re.match(r"[-+]?\w|[(]|[\[<][0-9]", name):
        raise UserError(
            f"{where}, which does not begin with a class name: write one per line, such as 'road' or "
            "'road 128 64 128' (JSON and the like are not read)."
        )
    if name == "__ignore__":
        raise UserError(f"{where}, which is no class: take the line out; ignored pixels have the id 255.")
    return Line(number, text, name, colour)


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


def unquoted(name: str) -> str:
    """A name with single blanks in it, without quotation marks around it."""
    name = " ".join(name.split())
    return name[1:-1].strip() if len(name) > 2 and name[0] == name[-1] and name[0] in "\"'" else name


def shown(text: str) -> str:
    """The text in quotation marks, cut where it is long."""
    return repr(text) if len(text) <= 60 else repr(text[:60])[:-1] + " …'"
