"""Speaks to people: errors and warnings as sentences, and no byte that a terminal would obey.

A wrong argument of a function is a TypeError or a ValueError, as in PyTorch. What users can mend in their files, their
settings or their machine is a `UserError`, which the commands print without a traceback. Library functions name their
arguments; only the commands know flags, and `command` puts these in the arguments' place.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

# File names and classes may hold any character; these move the cursor, change colours or send keys.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# A sentence names an argument as it is typed in Python. Its flag has the same name, but for these.
_ARGUMENT = re.compile(r"`([a-z][a-z_]*)(?:=([^`]+))?`")
_OTHER_NAMES = {"root": "data_root"}


class UserError(ValueError):
    """Something the user can mend: what was wrong, where, and what to do, in one sentence.

    An argument of the library stands in backquotes, as in "pass `ignore_label=7`".
    """


class FileError(UserError):
    """A file that is not there, cannot be opened, or is not what its reader takes."""


class Damaged(FileError):
    """A file whose bytes are not those that were written, or of another kind: another copy may be whole."""


def sentence_of(error: UserError) -> str:
    """The error's sentence alone: from a loading process it arrives with that process's traceback before it."""
    return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 epoch", "2 epochs", "0 classes" (many: a plural that does not end in s alone)."""
    return f"{count} {one if count == 1 else many or f'{one}s'}"


def briefly(value: Any) -> str:
    """A value of a file in few words, whatever it is."""
    if isinstance(value, Tensor):
        return f"a tensor {tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (dict, list, tuple)) and len(value) > 4:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "an endless number"
    return text if len(text) <= 40 else text[:40] + " …"


def printable(text: str) -> str:
    r"""The text with control characters spelt out (\x1b), but for line breaks and tabs."""
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def warn(sentence: str) -> None:
    """Says on stderr what went wrong, and goes on."""
    from tqdm import tqdm  # Imported late: whoever only uses a loss shows no bars.

    with contextlib.suppress(OSError):  # Whoever closed it does not want to know.
        tqdm.write(f"warning: {printable(sentence)}", sys.stderr)


class _Output(io.TextIOWrapper):
    """Standard output, for people. A log file shows each line when it ends, and a terminal of few characters shows "?"
    for the others. Where nobody reads any more (`| head`, a closed terminal, a full disk) the command goes on: what it
    computes it writes to files."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        super().__init__(stream.buffer, encoding=stream.encoding, errors="replace", line_buffering=True)

    def write(self, text: str) -> int:
        try:
            return super().write(printable(text))
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())  # This takes what is still in the buffer, too.
        os.close(nowhere)
        warn(f"what is printed has nowhere to go any more ({error.strerror}); the command goes on without.")


def as_flags(sentence: str) -> str:
    """The sentence with flags in the place of arguments: `ignore_label=7` becomes --ignore-label 7."""

    def flag(found: re.Match[str]) -> str:
        name, value = f"--{_OTHER_NAMES.get(found[1], found[1]).replace('_', '-')}", found[2]
        if value in (None, "True"):
            return name
        if value == "False":
            return name.replace("--", "--no-", 1)
        with contextlib.suppress(ValueError, SyntaxError):  # A placeholder such as PATH is no literal.
            value = str(ast.literal_eval(value))
        between = "=" if value.startswith("-") else " "  # argparse would take -x for a flag.
        return f"{name}{between}{shlex.quote(value)}"

    return _ARGUMENT.sub(flag, sentence)


def command(main: Callable[[Sequence[str] | None], None]) -> Callable[..., None]:
    """Decorates the `main` of a command: its errors name flags where those of the library name arguments."""

    @functools.wraps(main)
    def with_flags(argv: Sequence[str] | None = None) -> None:
        try:
            main(argv)
        except UserError as error:
            error.args = (as_flags(str(error)),)
            raise

    return with_flags


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's `main`: a `UserError` becomes `error: <sentence>` on stderr with exit status 2."""
    _open_what_is_closed()
    stdout = sys.stdout
    if isinstance(stdout, io.TextIOWrapper):
        sys.stdout = _Output(stdout)
    try:
        main()
    except UserError as error:
        _leave(2, f"error: {sentence_of(error)}")
    except KeyboardInterrupt:
        _leave(130, "interrupted")
    finally:
        if isinstance(sys.stdout, _Output):
            sys.stdout.flush()
            sys.stdout.detach()  # This does not close what it writes to.
            sys.stdout = stdout


def _open_what_is_closed() -> None:
    """Gives a process that was started without stdin, stdout or stderr (`2>&-`, some daemons) the null device there.
    Otherwise Python has no stream to write to, and the next file that is opened, such as a checkpoint, takes the number
    that every library writes its errors to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # This takes the lowest number that is free.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _leave(status: int, sentence: str) -> None:
    with contextlib.suppress(OSError):
        print(printable(sentence), file=sys.stderr)
    sys.exit(status)
