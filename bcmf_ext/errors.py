"""The one exception that the commands show as a sentence instead of a traceback."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend: what was wrong, where, and what to do, in one sentence."""


def run_command(main: Callable[[], None]) -> None:
    """Runs a command's `main`: a `UserError` becomes `error: <sentence>` on stderr with exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A log file shows each epoch when it ends; and a terminal of few characters shows "?" for the others.
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        main()
    except UserError as error:
        # Raised in a DataLoader worker it arrives with that worker's traceback as its text; the sentence stands last.
        sentence = str(error).rpartition("UserError: ")[2].strip()
        print(f"error: {sentence}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
