"""What the commands say to people: errors and warnings as sentences, and no byte that a terminal would obey."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor
from tqdm import tqdm

# File names and classes may hold any character; these move the cursor, change colours or send keys.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class UserError(ValueError):
    """Something the user can mend: what was wrong, where, and what to do, in one sentence."""


def sentence_of(error: UserError) -> str:
    """Its sentence alone: from a loading process it arrives with that process's traceback before it."""
    return str(error).rpartition("UserError: ")[2].strip()


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
    with contextlib.suppress(OSError):  # whoever closed it does not want to know
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
        os.dup2(nowhere, self.fileno())  # takes what is still in the buffer, too
        os.close(nowhere)
        warn(f"what is printed has nowhere to go any more ({error.strerror}); the command goes on without.")


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
            sys.stdout.detach()  # without closing what it writes to
            sys.stdout = stdout


def _open_what_is_closed() -> None:
    """Gives a process that was started without stdin, stdout or stderr (`2>&-`, some daemons) the null device there.
    Otherwise Python has no stream to write to, and the next file that is opened, such as a checkpoint, takes the number
    that every library writes its errors to."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def _leave(status: int, sentence: str) -> None:
    with contextlib.suppress(OSError):
        print(printable(sentence), file=sys.stderr)
    sys.exit(status)
