"""How a script ends: its exit status, and what signals and errors leave behind."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simquant import processes
from simquant.notices import is_out_of_memory, notices_only, one_line


class Stopped(KeyboardInterrupt):
    """A signal has come, and all is to be left tidy."""

    def __init__(self, words: str, signum: int):
        super().__init__(words)
        self.signum = signum


def on_signals(handler: Any) -> None:
    """Let handler answer Ctrl-C, SIGTERM, and a terminal that closes, unless nohup has the latter ignored."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN:
            signal.signal(each, handler)


def stop(signum: int, frame: object) -> None:
    """Raise the exception of a signal, once: a second one would lose what is being saved."""
    on_signals(signal.SIG_IGN)
    raise Stopped("interrupted", signum)


def exit_status(main: Callable[[], None]) -> int:
    """Return main's exit status: 0; 2 after a line on what the user can mend; 1 if the system fails; 128 + a signal."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115, for a stream that the caller has closed
    sys.stdout, sys.stderr = nowhere if processes.index() else sys.stdout or nowhere, sys.stderr or nowhere
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    notices_only()
    status, message = 0, ""
    try:
        try:
            main()
            sys.stdout.flush()
        finally:
            on_signals(signal.SIG_IGN)  # what is to be said is said in peace
    except Stopped as stopped:
        status, message = 128 + stopped.signum, str(stopped)
    except ArgumentTypeError as error:
        status, message = 2, f"error: {error}"
    except OSError as error:
        status, message = 1, f"error: {error.strerror or error}"
        with contextlib.suppress(OSError, ValueError):  # or Python's own flush at exit fails again
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    except Exception as error:
        status, message = 2, f"error: {what_to_mend(error)}"
    if message:
        who = f"process {processes.index()}: " if processes.index() else ""
        print(f"{Path(sys.argv[0]).name}: {who}{one_line(message)}", file=sys.stderr)
    return status


def what_to_mend(error: Exception) -> str:
    """Return what is said of an error that the user can mend; raise any other."""
    from quant_utils import UserError

    if is_out_of_memory(error):
        return "out of memory: lower --batch_size or --seqlen, or choose a smaller --dtype"
    if not isinstance(error, UserError):
        raise error
    return str(error)
