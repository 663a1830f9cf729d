"""Texts as they lie on disk or on the hub: documents, read piece by piece, so that a large file takes no memory."""

from __future__ import annotations

import codecs
import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, cast

from quant_utils import UserError
from simquant.models import loading
from simquant.text_names import files_read

PIECE = 2**18  # characters, or bytes, that are held at a time
LONGEST = 2**28  # bytes of a line, or characters of a document, that are taken for one
HUB = {  # {dataset: (repository, {split: file})}
    "wikitext2": (
        "Salesforce/wikitext",
        {split: f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet" for split in ("train", "test")},
    ),
    "c4": (
        "allenai/c4",
        {"train": "en/c4-train.00000-of-01024.json.gz", "test": "en/c4-validation.00000-of-00008.json.gz"},
    ),
}

Document = Iterable[str]  # pieces, which are one text when joined


def documents(name: str, split: str, column: str = "text") -> Iterator[Document]:
    """Yield the documents of a text: of a split of a dataset on the hub, of a file, or of a folder's files in order."""
    if name in HUB:
        yield from read_file(hub_file(name, split), "text")
    for path in files_read(name):
        yield from read_file(path, column)


def joined(texts: Iterable[Document]) -> Iterator[str]:
    """Yield pieces of documents joined by blank lines."""
    for number, document in enumerate(texts):
        yield "\n\n" * (number > 0)
        for piece in document:
            yield from (piece[start : start + PIECE] for start in range(0, len(piece), PIECE))


def whole(document: Document, name: str) -> str:
    """Return a document of the text called name in one string. UserError if it would fill the memory."""
    pieces, length = [], 0
    for piece in document:
        pieces.append(piece)
        if (length := length + len(piece)) > LONGEST:
            raise UserError(f"{name} has a document of more than {LONGEST >> 20} MiB: give it without c4=")
    return "".join(pieces)


def hub_file(name: str, split: str) -> str:
    """Return the path of a dataset's file in the hub's cache, downloaded if need be."""
    repository, files = HUB[name]
    with loading(f"dataset {name!r}"):
        from huggingface_hub import hf_hub_download

        return hf_hub_download(repository, files[split], repo_type="dataset")


def read_file(path: str, column: str = "text") -> Iterator[Document]:
    """Yield the documents of a file: a .txt is one; .json, .jsonl and .parquet have theirs in a column."""
    kind = path.lower().removesuffix(".gz")
    with loading(f"text file {path!r}"):
        if kind.endswith(".parquet"):
            yield from ([text] for text in read_parquet(path, column))
        elif kind.endswith(".txt"):
            yield read_txt(path)
        else:
            yield from ([text] for text in read_json(path, column, is_jsonl=kind.endswith(".jsonl")))


def opened(path: str) -> BinaryIO:
    """Return a file open for reading, inflated as it is read if it ends in .gz."""
    return cast(BinaryIO, gzip.open(path)) if path.lower().endswith(".gz") else open(path, "rb")


def read_txt(path: str) -> Iterator[str]:
    """Yield the pieces of a text in UTF-8, without the mark at its start."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with loading(f"text file {path!r}"), opened(path) as file:
        data, count = b"start", 0
        while data:
            begun, data = len(decoder.getstate()[0]), file.read(PIECE)
            try:
                piece = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise not_utf8(path, f"byte {count - begun + error.start}") from error
            yield piece if count else piece.removeprefix("\ufeff")
            count += len(data)


def not_utf8(path: str, place: str) -> UserError:
    """Return the error for a file in another encoding."""
    return UserError(f"text file {path!r} is not UTF-8 ({place}): convert it, e.g. with iconv")


def read_parquet(path: str, column: str) -> Iterator[str]:
    """Yield the rows of a column of a parquet file, a few at a time."""
    from pyarrow import parquet

    columns = parquet.read_schema(path).names
    if column not in columns:
        raise UserError(f"text file {path!r} has no column `{column}`; its columns are: {', '.join(columns)}")
    # as a dictionary, a text that many rows repeat is held once: two kilobytes of a file can stand for gigabytes
    with parquet.ParquetFile(path, read_dictionary=[column]) as file:
        batches = file.iter_batches(batch_size=64, columns=[column])
        rows = (each.as_py() for batch in batches for each in batch.column(0))
        for number, text in enumerate(rows, 1):
            if not isinstance(text, str):
                raise UserError(f"text file {path!r}, row {number} has no string under `{column}`: remove such rows")
            yield text


def read_json(path: str, column: str, is_jsonl: bool) -> Iterator[str]:
    """Yield the texts of a file of JSON: a value a line, or, if it is no .jsonl, one value over several lines.

    A value is a string, or an object with a string under column. The first of a .json may also hold them all: a list,
    or an object with a list under column or under its only key that has one.
    """
    with opened(path) as file:
        is_first = not is_jsonl
        for number, line in numbered_lines(path, file):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                if not is_first:
                    raise not_json(path, number, error) from error
                value = parsed_to_the_end(path, number, line, file)
            place, several = f"line {number}", listed(value, column) if is_first else None
            rows = (
                [(place, value)] if several is None else [(f"{place}, item {i}", v) for i, v in enumerate(several, 1)]
            )
            yield from (text_in(path, where, row, column) for where, row in rows)
            is_first = False


def numbered_lines(path: str, file: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a file in UTF-8. UserError for a line that would fill the memory."""
    number = 0
    while data := file.readline(LONGEST + 1):
        number += 1
        if len(data) > LONGEST:
            raise UserError(f"text file {path!r}, line {number} is longer than {LONGEST >> 20} MiB: split it")
        try:
            yield number, data.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, f"line {number}, byte {error.start}") from error


def parsed_to_the_end(path: str, number: int, line: str, file: BinaryIO) -> Any:
    """Return the value that begins with line, which has a number, and takes the rest of the file."""
    rest = file.read(LONGEST + 1)
    if len(rest) > LONGEST:
        raise UserError(f"text file {path!r} is one JSON value of more than {LONGEST >> 20} MiB: give JSON lines")
    try:
        return json.loads(line + rest.decode())
    except UnicodeDecodeError as error:
        raise not_utf8(path, f"byte {error.start} after line {number}") from error
    except (ValueError, RecursionError) as error:
        raise not_json(path, number + getattr(error, "lineno", 1) - 1, error) from error


def not_json(path: str, number: int, error: Exception) -> UserError:
    """Return the error for a line that is no JSON, with the library's reason and without its own line number."""
    place = f"line {number}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else f"line {number}"
    return UserError(f"text file {path!r}, {place} is not JSON: {getattr(error, 'msg', error)}")


def listed(value: Any, column: str) -> Sequence[Any] | None:
    """Return the list that a value is, or has under column or under its only key with one; None if there is none."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else None
    lists = [each for each in value.values() if isinstance(each, list)]
    if column in value:
        return value[column] if isinstance(value[column], list) else None
    return lists[0] if len(lists) == 1 else None


def text_in(path: str, place: str, value: Any, column: str) -> str:
    """Return the string that a value is, or has under column."""
    if isinstance(value, dict) and column not in value:
        fields = ", ".join(value)[:200] or "none"
        raise UserError(f"text file {path!r}, {place} has no field {column!r}; its fields are: {fields}")
    text = value[column] if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f"text file {path!r}, {place} is neither a string nor an object with one under {column!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"text file {path!r}, {place} is no Unicode: {error}") from error
    return text
