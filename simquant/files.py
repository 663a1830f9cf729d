"""Files that are written whole or not at all, and what must hold before a run begins to fill them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from quant_utils import UserError

PICTURES = (b"\x89PNG", b"<?xml", b"<svg")  # how they begin
PAGES = (b"<!DOCTYP", b"<!doctyp")


@contextmanager
def unfinished_file(target: Path) -> Iterator[BinaryIO]:
    """Open a new file beside target, gone at the end of the block unless it was moved."""
    unfinished = target.with_name(f".{os.urandom(6).hex()}.partial")
    try:
        with open(unfinished, "xb") as file:
            yield file
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Let write fill a file beside path and put it in its place: a reader finds the old file or the whole new one."""
    target = Path(path).resolve()
    try:
        with unfinished_file(target) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
    except OSError as error:
        raise OSError(f"{path!r} could not be written ({error.strerror}): what stood there is untouched") from error


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
            with unfinished_file(target):
                taken.add(target)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"output {path!r} cannot be written ({reason}): give a file in a writable folder"
            ) from error


def check_replaceable(paths: Iterable[str | None], starts: tuple[bytes, ...]) -> None:
    """Raise UserError unless each of paths is new, empty, or begins like the kind of file that will replace it."""
    for path in (path for path in paths if path is not None and os.path.exists(path)):
        with open(path, "rb") as file:
            start = file.read(8)
        if start and not start.startswith(starts):
            raise UserError(f"output {path!r} holds something else: give another name, or --overwrite to lose it")


def failure_of(write: Callable[[], object]) -> OSError | None:
    """Return why a file could not be written, if so: what else there is to write and to print comes first."""
    try:
        write()
    except OSError as error:
        return error
    return None
