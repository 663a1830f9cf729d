"""The file that --output names: a run as JSON, or its table as CSV; what it may replace, and how a run goes on."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import Tensor

from quant_utils import UserError
from simquant import processes
from simquant.files import write_atomically
from simquant.notices import notify
from simquant.report import Run, Windows, all_results, more_results, results
from simquant.summary import RowWindows
from simquant.tables import UNQUANTIZED

ALIKE = 1e-6  # nats a window, up to which two unquantized rows are the same
NUMBER, UNKNOWN = (int, float), (int, float, type(None))
LABELS = {"format": str, "abits": (int, float, str), "quantized": str}  # of a row
ROW = {**LABELS, "dataset": str, "seconds": NUMBER, "constants_gib": UNKNOWN}
REPORT = {"script": str, "model": str, "settings": dict, "sha256": dict, "results": list}
SINCE = {"environment": dict, "window_sha256": dict, "cache_entries": dict, "command": str, "title": str}  # may lack
CELLS: dict[str, dict[str, Any]] = {  # what a row has of what is measured beside figures of texts
    "retrieval": {
        "kind": str, "length": int, "depth": int, "needles": int, "nll": NUMBER, "delta_nll": UNKNOWN,
        "delta_nll_se": UNKNOWN, "exact_match": NUMBER, "exact_match_se": UNKNOWN,
    },
    "tasks": {"task": str, "metric": str, **dict.fromkeys(("value", "se", "delta", "delta_se"), UNKNOWN)},
}  # fmt: skip


def as_json(data: Mapping) -> str:
    """Return data indented, but a list of figures on one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # a raw newline is in no string
    return re.sub(r"\[\n[-+.\deE,\snul]*\]", lambda found: " ".join(found[0].split()), text)


def as_csv(rows: Sequence[Mapping], complete: bool) -> str:
    """Return the figures of rows, without lists of them, such as those of single windows."""
    import pandas

    frame = pandas.DataFrame([{n: value for n, value in row.items() if not isinstance(value, list)} for row in rows])
    return frame.astype({"layer": "Int64"}).assign(complete=complete).to_csv(index=False)


def mark_of(path: str | None) -> tuple | None:
    """Return what changes when a file is written anew; None where there is none."""
    if path is None or not os.path.exists(path):
        return None
    about = os.stat(path)
    return about.st_ino, about.st_size, about.st_mtime_ns


def is_csv(path: str) -> bool:
    """Return whether path asks for the table alone."""
    return path.lower().endswith(".csv")


def holds(content: Mapping, kinds: Mapping[str, Any]) -> bool:
    """Return whether content has entries of these kinds, {name: type or types}."""
    return all(isinstance(content[name], kind) for name, kind in kinds.items())


def is_report(content: Mapping) -> bool:
    """Return whether content is built as a report, of this version or an older one. Figures of windows are not read."""
    more = {name: content.get(name, []) for name in CELLS}
    return (
        holds(content, REPORT)
        and holds(content, {name: kind for name, kind in SINCE.items() if name in content})
        and all(holds({"constants_gib": None, **row}, ROW) for row in content["results"])
        and all(0 <= row["seconds"] < 1e15 and (row.get("constants_gib") or 0) < 1e15 for row in content["results"])
        and all(holds(row, {**LABELS, name: list}) for name, rows in more.items() for row in rows)
        and all(holds(cell, CELLS[name]) for name, rows in more.items() for row in rows for cell in row[name])
    )


def read_report(path: str) -> dict[str, Any]:
    """Return the JSON that --output wrote. UserError for anything else."""
    if not os.path.isfile(path):
        raise UserError(f"report {path!r} does not exist, or is no file")
    if is_csv(path):
        raise UserError(f"{path!r} is a table, without figures of single windows: give a .json")
    try:
        content = json.loads(Path(path).read_bytes())
        if is_report(content):
            return content
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, OSError):
        pass
    raise UserError(f"{path!r} is no report that --output wrote: give another name")


def lose_alike(one: Mapping, other: Mapping) -> bool:
    """Return whether unquantized rows lose the same on all windows of a text that both have: then it is one model."""
    plain = ([row for row in each["results"] if row["abits"] == UNQUANTIZED] for each in (one, other))
    mine, theirs = ({row["dataset"]: row.get("window_nll") for row in rows} for rows in plain)
    with contextlib.suppress(TypeError):  # damaged figures: compare.windows_of says so
        pairs = [list(zip(mine[name], theirs[name], strict=False)) for name in mine if name in theirs]
        return any(pair and max(abs(x - y) for x, y in pair) <= ALIKE for pair in pairs)
    return False


def is_complete(path: str) -> bool:
    """Return whether the report that path holds is that of a whole run. UserError if it is no report."""
    if not is_csv(path):
        return read_report(path).get("complete") is True
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        rows = csv.DictReader(file)
        if not {"dataset", "abits", "ppl", "complete"} <= {*(rows.fieldnames or ())}:
            raise UserError(f"{path!r} is no table that --output wrote: give another name")
        return all(row["complete"] == "True" for row in rows)


class ReportFile:
    """The file that --output names, if it names one.

    path    where figures go: another name once somebody else has written to this one
    record  what the JSON holds besides figures
    """

    def __init__(self, path: str | None, overwrite: bool):
        self.path, self.overwrite, self.seen = path, overwrite, mark_of(path)
        self.record: dict[str, Any] = {}

    def check(self) -> None:
        """Raise UserError if what is there would be lost: an unfinished run, or what is no report."""
        if self.path is None or self.overwrite or not self.seen or os.path.getsize(self.path) == 0:
            return
        try:
            if not is_complete(self.path):
                way = "give another name" if is_csv(self.path) else "go on with it by --resume"
                raise UserError(f"{self.path!r} holds an unfinished run: {way}")
        except UserError as error:
            raise UserError(f"output {error}, or --overwrite to lose it") from error

    def write(self, run: Run, complete: bool) -> str:
        """Write what run has, if it has anything, atomically, by one process. Return words on what there is."""
        rows = all_results(run, with_intervals=complete)
        if self.path is None or not rows or processes.index() > 0:
            return ""
        self.save({**self.record, "complete": complete, "results": rows, **more_results(run)})
        count, total = sum(run.count.values()), sum(map(len, run.texts.values()))
        advice = "" if is_csv(self.path) else ", and --resume goes on from there"
        return f"{self.path} has {count} of {total} windows{advice}"

    def save(self, report: Mapping[str, Any]) -> None:
        """Write a report, or its table, atomically; under another name once somebody else has written to this one."""
        if self.path is None:
            return
        if not self.overwrite and mark_of(self.path) != self.seen:
            taken, self.path = self.path, unused_name(self.path)
            notify(f"{taken!r} was written by another since this run began: writing to {self.path!r} instead")
        text = as_csv(report["results"], report["complete"]) if is_csv(self.path) else as_json(report)
        write_atomically(self.path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
        self.seen = mark_of(self.path)

    def unfinished(self, texts: Mapping[str, Tensor], decisive: Mapping[str, Any]) -> dict[str, Any]:
        """Return the report of the interrupted run that is there, {} if none is.

        Raises UserError if it is of another run than record says; decisive is {flag that decides figures: what it is
        where a report does not say}. A larger --limit goes on if the first windows of texts are the same.
        """
        if self.seen is None:
            notify(f"--resume: {self.path!r} does not exist yet: starting from the beginning")
            return {}
        try:
            there, settings, path = read_report(self.path or ""), self.record["settings"], self.path
        except UserError as error:
            raise UserError(f"--resume: {error}") from error
        same = {name: (self.record[name], there[name]) for name in ("script", "model")}
        said = {**decisive, "bos": "text", **there["settings"]}  # before there was --bos, that was the protocol
        same |= {name: (settings[name], said[name]) for name in decisive}
        ours, limit = self.record["sha256"], there["settings"].get("limit")
        if type(limit) is int and 0 < limit < settings["limit"]:
            del same["limit"]
            ours = ours | digests({name: windows[:limit] for name, windows in texts.items()})
        for name, (mine, theirs) in same.items():
            if mine != theirs:
                raise UserError(f"--resume: {path!r} is of another run: {name} is {mine!r} here and {theirs!r} there")
        for name, digest in ours.items():
            if digest != there["sha256"].get(name):
                raise UserError(f"--resume: {path!r} is of another run: the content of {name} is another")
        return there


def unused_name(path: str) -> str:
    """Return path with a number that no file has, before its ending."""
    start, ending = os.path.splitext(path)
    return next(name for n in itertools.count(2) if not os.path.exists(name := f"{start}-{n}{ending}"))


def digests(texts: Mapping[str, Tensor], quantizer_files: Sequence[str] = ()) -> dict[str, str]:
    """Return {what: sha256} of each text's token ids, and of the quantizer files."""
    read = {dataset: windows.numpy().tobytes() for dataset, windows in texts.items()}
    for number, path in enumerate(quantizer_files):
        read[f"quantizers {number + 1}" if number else "quantizers"] = Path(path).read_bytes()
    return {name: sha256(content).hexdigest() for name, content in read.items()}


def window_digests(texts: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return {dataset: a digest of each window's token ids}, by which reports of different lengths are compared."""
    return {name: [sha256(each.numpy().tobytes()).hexdigest()[:12] for each in ids] for name, ids in texts.items()}


def take_over(run: Run, path: str, known: Mapping, environment: Mapping) -> None:
    """Put the figures of the report that path held into run. UserError if they are of other rows, or are no figures."""
    if known.get("environment") != environment:
        notify(f"--resume: {path!r} was begun on another device, or with other versions: last digits may differ")
    try:
        for dataset in run.texts:
            rows = [row for row in known["results"] if row["dataset"] == dataset]
            if rows and [(row["format"], row["abits"], row["quantized"]) for row in rows] != [
                each[:3] for each in run.rows
            ]:
                raise ValueError(f"{dataset} has other rows")
            if rows and len(rows[0]["window_nll"]):
                windows = Windows.of_rows([RowWindows.from_row(row) for row in rows])
                run.add(dataset, windows, math.fsum(max(0.0, float(row["seconds"])) for row in rows))
                as_json({"results": results(run, dataset, with_intervals=False)})  # no figure is inf or nan
        for name in run.later:
            said = {(row["format"], row["abits"], row["quantized"]): row[name] for row in known.get(name, [])}
            if all(each[:3] in said for each in run.rows):
                run.more[name] = {each: said[each[:3]] for each in run.rows}
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"--resume: {path!r} holds figures that cannot be continued: {error}") from error
