"""Saved reports side by side, without a model: checked against each other, then paired by window."""

from __future__ import annotations

import itertools
import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quant_utils import UserError
from simquant.notices import notify, one_line
from simquant.report_file import ALIKE, CELLS, LABELS, lose_alike, read_report
from simquant.summary import RowWindows, summary
from simquant.tables import UNQUANTIZED

Report = Mapping[str, Any]
OF_THE_TEXT = ("seqlen", "bos", "text_column", "datasets")  # settings that say why windows differ
OF_TASKS = ("num_fewshot", "task_limit")  # settings that say why scores of tasks differ
OF_THE_CACHE = ("avg_bits", "cache_gib", "fp16_cache_gib")


def load(paths: Sequence[str]) -> dict[str, Report]:
    """Return {path: report}, all of one model. UserError for a file that is none, or that is of another model."""
    reports: dict[str, Report] = {path: read_report(path) for path in paths}
    for path, report in reports.items():
        check_model(paths[0], reports[paths[0]], path, report)
        if not report["results"]:
            raise UserError(f"{path!r} has no figures to show")
        if report.get("complete") is not True:
            notify(f"{path!r} is unfinished: its rows are marked")
        both = reports[paths[0]], report
        for name in ("dtype", "report_context", *OF_TASKS * all("tasks" in each for each in both)):
            values = [each["settings"].get(name) for each in both]
            if values[0] != values[1]:
                notify(f"{name} is {values[0]} in {paths[0]!r} and {values[1]} in {path!r}")
        prompts = {each["sha256"].get("retrieval prompts") for each in both} - {None}
        if len(prompts) > 1:
            notify(f"{paths[0]!r} and {path!r} hid other needles: shares and losses of one tell nothing of the other's")
    return reports


def check_model(first: str, one: Report, path: str, other: Report) -> None:
    """Raise UserError if two reports are of different models, by the marks of their weights or else by their names."""
    marks = [each["sha256"].get("model weights") for each in (one, other)]
    if None in marks and one["model"] != other["model"]:
        raise UserError(f"the model is {one['model']!r} in {first!r} and {other['model']!r} in {path!r}")
    if None not in marks and marks[0] != marks[1] and not lose_alike(one, other):
        names = f"{one['model']!r} in {first!r}, {other['model']!r} in {path!r}"
        raise UserError(f"these reports are of models with other weights, or other times of their files: {names}")


def windows_of(path: str, report: Report, dataset: str) -> dict[tuple, tuple[Mapping, RowWindows]]:
    """Return {labels: (row, what its windows keep)} of one text in a report. UserError for damaged figures."""
    try:
        rows = [row for row in report["results"] if row["dataset"] == dataset]
        made = {labels_of(row): (row, RowWindows.from_row(row)) for row in rows}
        if len({len(windows) for _, windows in made.values()}) > 1 or any(not len(each) for _, each in made.values()):
            raise ValueError("rows have different numbers of windows")
        return made
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path!r} holds figures of {dataset} that cannot be read: {one_line(str(error))}") from error


def common_windows(reports: Mapping[str, Report], counts: Mapping[str, int], dataset: str) -> int:
    """Return how many first windows of a text all reports have. UserError, which names the difference, if none."""
    (first, one), *others = ((path, reports[path]) for path in counts)
    common = min(counts.values())
    for path, other in others:
        if one["sha256"].get(dataset) == other["sha256"].get(dataset):
            continue
        each = [report.get("window_sha256", {}).get(dataset, []) for report in (one, other)]
        same = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*each, strict=False))))
        common = min(common, same)
        if not same:
            raise UserError(f"{dataset}: no window of {first!r} is in {path!r}: {difference(first, one, path, other)}")
    if len({*counts.values()}) > 1 or common < min(counts.values()):
        has = ", ".join(f"{count} in {path!r}" for path, count in counts.items())
        notify(f"{dataset}: compared on the {common} windows that all reports have, of {has}")
    return common


def difference(first: str, one: Report, path: str, other: Report) -> str:
    """Return why two reports have different windows."""
    for name in OF_THE_TEXT:
        values = [report["settings"].get(name) for report in (one, other)]
        if values[0] != values[1]:
            return f"{name} is {values[0]!r} there and {values[1]!r} here"
    if not all("window_sha256" in report for report in (one, other)):
        older = first if "window_sha256" not in one else path
        return f"{older!r} is of an older version, whose windows can be told apart only as a whole"
    return "the text is another"


def compared(reports: Mapping[str, Report]) -> tuple[list[dict], dict[str, list[dict]]]:
    """Return (rows of all reports, text by text; {name: what else they measured of rows, see report.more_results}).

    Differences from the unquantized model are paired by window.
    """
    datasets = dict.fromkeys(row["dataset"] for report in reports.values() for row in report["results"])
    rows = [row for dataset in datasets for row in compared_on(reports, dataset)]
    called = {label: row["format"] for row in rows for label in row.pop("stands_for")}
    more: dict[str, list[dict]] = {}
    for (path, report), name in itertools.product(reports.items(), CELLS):
        for row in report.get(name, []):
            if label := called.get((path, *labels_of(row))):
                mine = row | {"format": label}
                more[name] = more.get(name, []) + [mine] * (mine not in more.get(name, []))
    return rows, more


def is_plain(row: Mapping) -> bool:
    """Return whether a row is the unquantized model's."""
    return row["abits"] == UNQUANTIZED


def labels_of(row: Mapping) -> tuple:
    """Return what tells a row from others of a text and a report."""
    return tuple(row[name] for name in LABELS)


def compared_on(reports: Mapping[str, Report], dataset: str) -> list[dict]:
    """Return the rows of one text: the unquantized model once, then all others with names that tell them apart."""
    held = {path: windows_of(path, report, dataset) for path, report in reports.items()}
    held = {path: rows for path, rows in held.items() if rows}
    counts = {path: len(next(iter(rows.values()))[1]) for path, rows in held.items()}
    common = common_windows(reports, counts, dataset)
    baselines = {path: baseline(rows, common) for path, rows in held.items()}
    known = [(path, base) for path, base in baselines.items() if base is not None]
    shared = max(known, key=lambda each: bool(each[1].sketches), default=None)  # one that others were compared with
    plain = [(path, *label) for path, rows in held.items() for label, (row, _) in rows.items() if is_plain(row)]
    made: list[dict] = []
    for path, rows in held.items():
        own = baselines[path] or (shared[1] if shared else None)
        if shared and baselines[path] is not None:
            check_baseline(dataset, *shared, path, baselines[path])
        for label, (row, windows) in rows.items():
            if not is_plain(row) or (shared and path == shared[0]):
                stands_for = plain if is_plain(row) else [(path, *label)]
                made.append(figures_of(row, windows.first(common), own, reports[path]) | {"stands_for": stands_for})
    return named(sorted(made, key=lambda row: not is_plain(row)), reports)


def baseline(rows: Mapping[tuple, tuple[Mapping, RowWindows]], common: int) -> RowWindows | None:
    """Return what is kept of the unquantized row's first windows; None if there is no such row."""
    return next((windows.first(common) for row, windows in rows.values() if is_plain(row)), None)


def check_baseline(dataset: str, first: str, shared: RowWindows, path: str, own: RowWindows | None) -> None:
    """Notify if two unquantized rows differ."""
    pairs = zip(shared.figures["nll"], own.figures["nll"] if own else (), strict=False)
    most = max((abs(one - other) for one, other in pairs), default=0.0)
    if most > ALIKE:
        differ = f"the unquantized rows of {first!r} and {path!r} differ by up to {most:.2g} nats a window"
        notify(f"{dataset}: {differ}, by another device, dtype or version: each row is paired with its own")


def figures_of(row: Mapping, windows: RowWindows, base: RowWindows | None, report: Report) -> dict[str, Any]:
    """Return a report's row anew: its labels, and its figures on some of its windows."""
    is_paired = base is not None and not (is_plain(row) and math.isnan(windows.figures["kl"][0]))
    share = len(windows) / len(row["window_nll"])
    entries = report.get("cache_entries", {})
    figures = summary(windows, base if is_paired else None, {part: entries.get(part, 0) for part in ("keys", "values")})
    figures |= {} if entries else {name: row.get(name) for name in OF_THE_CACHE}  # older versions do not tell
    labels = {"dataset": row["dataset"], **{name: row[name] for name in LABELS}, "layer": row.get("layer")}
    counts = {"windows": len(windows), "tokens": len(windows) * windows.predicted, "seconds": row["seconds"] * share}
    return {**labels, **counts, **figures, "constants_gib": row.get("constants_gib"), **windows.lists()}


def named(rows: Sequence[dict], reports: Mapping[str, Report]) -> list[dict]:
    """Return rows of one text without repetitions, each under a name of its own that says if it is unfinished."""
    kept: list[dict] = []
    for row in rows:
        if twin := next((other for other in kept if alike(row, other)), None):
            twin["stands_for"] += row["stands_for"]
        else:
            kept.append(row)
    labels = [labels_of(row) for row in kept]
    for row, label in zip(kept, labels, strict=True):
        path = row["stands_for"][0][0]
        words = [stem_of(path, reports)] if labels.count(label) > 1 else []
        words += ["unfinished"] if reports[path].get("complete") is not True else []
        if words and not is_plain(row):
            row["format"] += f" ({', '.join(words)})"
    return kept


def alike(one: Mapping, other: Mapping) -> bool:
    """Return whether two rows are the same measurement."""
    return all(one[name] == other[name] for name in (*LABELS, "window_nll", "key_bits", "value_bits"))


def stem_of(path: str, paths: Iterable[str]) -> str:
    """Return the name of a file without its ending; its path where another has the same name."""
    stems = [Path(each).stem for each in paths]
    return Path(path).stem if stems.count(Path(path).stem) == 1 else path


def show(flags: Any) -> None:
    """Print, draw and save what --compare names: reports side by side."""
    from simquant import page_content, presentation, report_file
    from simquant.files import PAGES, PICTURES, check_replaceable, check_writable, failure_of

    pictures = [flags.plot, flags.plot_positions, flags.plot_retrieval]
    check_writable([flags.output, flags.report, *pictures], flags.compare)
    if not flags.overwrite:
        check_replaceable(pictures, PICTURES)
        check_replaceable([flags.report], PAGES)
    file = report_file.ReportFile(flags.output, flags.overwrite)
    file.check()
    reports = load(flags.compare)
    try:
        rows, more = compared(reports)
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        words = ", ".join(map(repr, reports))
        raise UserError(f"{words} hold figures that no run can have: {one_line(str(error))}") from error
    if flags.by_position and not any("by_position" in row for row in rows):
        raise UserError("--by_position: none of these reports was measured with it")
    records = list(reports.values())
    titles = {record.get("title", record["model"]) for record in records}
    record = {**records[0], "title": titles.pop() if len(titles) == 1 else records[0]["model"].rpartition("/")[2]}
    failures = [failure_of(lambda: file.save({**record, **merged(records, rows), "results": rows, **more}))]
    failures += presentation.draw(flags, rows, more, record["title"])
    here = {"command": shlex.join(["python3", *sys.argv])}
    failures.append(page_content.save(flags, [record, *records[1:], here], rows, more))
    contexts = {report["settings"].get("report_context") for report in records}
    presentation.print_rows(flags, rows, more, contexts.pop() if len(contexts) == 1 else None)
    print("\n" + "\n".join(about(path, report) for path, report in reports.items()))
    for failure in filter(None, failures):
        raise failure


def merged(records: Sequence[Report], rows: Sequence[Mapping]) -> dict[str, Any]:
    """Return what a report of several reports' rows has otherwise than the first: digests, whether all is there."""
    counts = {row["dataset"]: row["windows"] for row in rows}
    known = {name: digests for record in records for name, digests in record.get("window_sha256", {}).items()}
    digests = {name: each[: counts[name]] for name, each in known.items() if name in counts}
    whole = {name: mark for record in records for name, mark in record["sha256"].items()}
    is_complete = all(record.get("complete") is True for record in records)
    return {"sha256": whole, "window_sha256": digests, "complete": is_complete}


def about(path: str, report: Report) -> str:
    """Return a line that says what a report is of."""
    settings, environment = report["settings"], report.get("environment", {})
    where = environment.get("device_name") or environment.get("device", "an unknown device")
    state = "" if report.get("complete") is True else ", unfinished"
    window = f"windows of {settings.get('seqlen')} tokens"
    return f"{path}: {report['model']}, {settings.get('dtype')} on {where}, {window}{state}"
