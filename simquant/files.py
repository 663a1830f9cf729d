"""Files that are written whole or not at all, and what must hold before a run begins to fill them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from quant_utils import UserError


def write_atomically(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Let write fill a file beside path and put it in its place: a reader finds the old file or the whole new one."""
    target, unfinished = Path(path).resolve(), None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".partial", delete=False) as file:
            unfinished = file.name
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o666 & ~umask())
        os.replace(unfinished, target)
        unfinished = None
    except OSError as error:
        raise OSError(f"{path!r} could not be written ({error.strerror}): what stood there is untouched") from error
    finally:
        if unfinished is not None:
            os.unlink(unfinished)


def umask() -> int:
    """Return the mask of new files' permissions, which can only be read by setting it."""
    os.umask(mask := os.umask(0o077))
    return mask


def check_writable(paths: Iterable[str | None], inputs: Iterable[str | None]) -> None:
    """Raise UserError unless each of paths can be written, and nothing that is read is destroyed by that.

    No two paths may be the same, none may be one of the inputs or stand in a folder that is one (a model), and what
    exists must be a file that may be written.
    """
    taken = {Path(os.path.realpath(other)) for other in inputs if other}
    taken |= {Path(os.path.realpath(file)) for folder in taken if os.path.isdir(folder) for file in folder.iterdir()}
    for path in (path for path in paths if path is not None):
        try:
            target = Path(path).resolve()
            if not path or path.endswith(os.sep) or (target.exists() and not target.is_file()):
                raise UserError(f"output {path!r} is not a regular file: give a file name")
            if target in taken:
                raise UserError(f"output {path!r} is also read, or named twice: give another name")
            if target.exists() and not os.access(target, os.W_OK):
                raise UserError(f"output {path!r} is write-protected: give another name")
            with tempfile.TemporaryFile(dir=target.parent):
                taken.add(target)
            os.stat(target) if target.exists() else None
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"output {path!r} cannot be written ({reason}): give a file in a writable folder"
            ) from error
