"""What is said to the user on one line while a run goes on, and which errors mean that memory is short."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

from simquant import processes


class Notice(UserWarning):
    """Something that the user should know although the run goes on."""


def notify(message: str) -> None:
    """Issue a Notice."""
    warnings.warn(message, Notice, stacklevel=2)


def one_line(message: str) -> str:
    """Return message without what is not printable, and not endless."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))[:2000]


def notices_only() -> None:
    """Print each Notice as a line on stderr, by one process, and no warning of a library."""

    def show(message, *where) -> None:
        """Print a notice in one line."""
        if processes.index() == 0:
            print(f"warning: {one_line(str(message))}", file=sys.stderr)

    warnings.simplefilter("ignore")
    warnings.simplefilter("always", Notice)
    warnings.showwarning = show  # type: ignore[assignment]


class Lines:
    """Where a tqdm bar is written to if stderr is no terminal: each of its states becomes a line.

    stderr is that of the moment when it is made: a library may be silenced later.
    """

    def __init__(self):
        self.stream = sys.stderr

    def write(self, text: str) -> None:
        """Print what is not blank."""
        if line := text.strip():
            print(line, file=self.stream, flush=True)

    def flush(self) -> None:
        """Do nothing: print has."""


LINE_EVERY = 60  # seconds


def progress_options(quiet: bool) -> dict[str, Any]:
    """Return tqdm's options: a bar on a terminal, else a line a minute; nothing if quiet or not the main process."""
    if quiet or processes.index() > 0 or sys.stderr.isatty():
        return {"disable": quiet or processes.index() > 0}
    line = "{desc}: {n_fmt} of {total_fmt} {unit}s, {remaining} left{postfix}"
    every = {"mininterval": LINE_EVERY, "delay": LINE_EVERY, "miniters": 1}
    return {"disable": False, "file": Lines(), "bar_format": line, **every}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device or the host had no more memory to give."""
    lacks = re.search("(out of|allocate|not enough) memory", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and lacks is not None)
