"""From figures of windows to tables and files, and back: what a run is, its rows, its JSON, and going on with it."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import quant_utils as qu
from quant_utils import FIGURES, PARTS, Site, UserError
from simquant import processes
from simquant.files import write_atomically
from simquant.notices import notify

TABLES: dict[str, dict[str, tuple[str, str]]] = {  # {title: {figure: (heading, format)}}
    "": {
        "ppl": ("ppl", ".4f"), "ppl_se": ("±", ".4f"), "nll": ("nll", ".6f"), "windows": ("windows", ""),
        "tokens": ("tokens", ""), "seconds": ("seconds", ".1f"),
    },
    "against the unquantized model, on the same tokens (±: standard error; KL: mean divergence in nats)": {
        "delta_ppl": ("Δppl", "+.4f"), "delta_ppl_se": ("±", ".4f"), "delta_percent": ("Δppl%", "+.2f"),
        "delta_percent_se": ("±%", ".2f"), "kl": ("KL", ".6f"), "top1_agreement": ("top-1", ".2%"),
    },
    "bits an entry, and the size of a cache of {context} tokens at these bits": {
        "key_bits": ("keys", ".3f"), "value_bits": ("values", ".3f"), "avg_bits": ("both", ".3f"),
        "cache_gib": ("GiB", ".3f"), "fp16_cache_gib": ("fp16-GiB", ".3f"),
    },
}  # fmt: skip


class Run:
    """One evaluation, and what is known of it so far.

    texts    {dataset: windows [N,T]}
    rows     a simquant.methods.Row for every setting; the first is the unquantized model if others are compared with it
    sites    all that the model caches
    context  tokens of the cache whose size is reported
    figures  {dataset: [N,S,len(FIGURES)]}, of which the first count[dataset] windows are measured
    seconds  {dataset: wall time of these}
    """

    def __init__(self, texts: Mapping[str, Tensor], rows: Sequence[Any], sites: Sequence[Site], context: int):
        self.texts, self.rows, self.sites, self.context = texts, rows, sites, context
        blank = torch.tensor(math.nan, dtype=torch.float64)
        self.figures = {name: blank.repeat(len(ids), len(rows), len(FIGURES)) for name, ids in texts.items()}
        self.count, self.seconds = dict.fromkeys(texts, 0), dict.fromkeys(texts, 0.0)

    @property
    def is_paired(self) -> bool:
        """Whether rows are compared with the unquantized model."""
        return len(self.rows) > 1 and self.rows[0].is_unquantized

    def done(self, dataset: str) -> Tensor:
        """Return [n,S,len(FIGURES)] of the windows that are measured."""
        return self.figures[dataset][: self.count[dataset]]

    def add(self, dataset: str, figures: Tensor, seconds: float) -> None:
        """Take up the figures [n,S,len(FIGURES)] of the next windows."""
        first = self.count[dataset]
        self.figures[dataset][first : first + len(figures)] = figures
        self.count[dataset] += len(figures)
        self.seconds[dataset] += seconds


def standard_error(values: Sequence[float]) -> float | None:
    """Return that of the mean of values, taken as independent; None for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_difference(nll: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    """Return {"delta_ppl", "delta_percent", each with its "_se"} from losses in nats on the same windows.

    To first order in the losses a difference of perplexities is a mean over windows, and its standard error that of a
    mean: how hard a window is for both cancels out, which is why a pair tells more than two separate runs.
    """
    ppl, base = qu.perplexity(nll), qu.perplexity(baseline)
    pairs = list(zip(nll, baseline, strict=True))
    return {
        "delta_ppl": ppl - base,
        "delta_ppl_se": standard_error([ppl * one - base * other for one, other in pairs]),
        "delta_percent": 100 * (ppl / base - 1),
        "delta_percent_se": standard_error([100 * ppl / base * (one - other) for one, other in pairs]),
    }


def or_none(value: float) -> float | None:
    """Return value; None for nan, which stands for what is not known."""
    return None if math.isnan(value) else value


def storage_cost(means: Mapping[str, float], run: Run) -> dict[str, float | None]:
    """Return average bits an entry of keys and values together, and the GiB of a cache of run.context tokens."""
    held = [sum(site.channels * site.tokens for site in run.sites if site.part == part) for part in PARTS]
    bits = [means["key_bits"], means["value_bits"]]
    average = math.fsum(n * each for n, each in zip(held, bits, strict=True) if n) / (sum(held) or math.nan)
    gib = sum(held) / 8 / 2**30  # of one bit an entry
    return {"avg_bits": or_none(average), "cache_gib": or_none(average * gib), "fp16_cache_gib": 16 * gib or None}


def results(run: Run, dataset: str) -> list[dict]:
    """Return a dict of figures for every row, from the windows of dataset that are measured; None where not known.

    ppl = exp(nll), nll the mean in nats; _se are standard errors; seconds are divided evenly over the rows; window_
    lists hold the figures of single windows, from which take_over goes on.
    """
    made, baseline = [], run.done(dataset)[:, 0, 0].tolist()
    for row, figures in zip(run.rows, run.done(dataset).unbind(1), strict=True):
        windows = {name: figures[:, column].tolist() for column, name in enumerate(FIGURES)}
        means = {name: math.fsum(values) / len(values) for name, values in windows.items()}
        ppl, error = qu.perplexity(windows["nll"]), standard_error(windows["nll"])
        difference = paired_difference(windows["nll"], baseline)
        labels = {"dataset": dataset, "abits": row.abits, "quantized": row.quantized, "layer": row.layer}
        counts = {"windows": len(figures), "tokens": len(figures) * (run.texts[dataset].shape[1] - 1)}
        made.append({
            **labels, "ppl": ppl, "ppl_se": None if error is None else ppl * error,
            **counts, "seconds": run.seconds[dataset] / len(run.rows),
            **(difference if run.is_paired else dict.fromkeys(difference)),
            **{name: or_none(mean) for name, mean in means.items()}, **storage_cost(means, run),
            **{f"window_{name}": [or_none(value) for value in values] for name, values in windows.items()},
        })  # fmt: skip
    return made


def all_results(run: Run) -> list[dict]:
    """Return results of all datasets of which something is measured."""
    return [row for dataset in run.texts if run.count[dataset] for row in results(run, dataset)]


def table(rows: Sequence[Mapping], columns: Mapping[str, tuple[str, str]]) -> str:
    """Return a line of text for every row; a terminal that is too narrow gets the columns in several parts."""
    import pandas

    is_plain = all(row["quantized"] == "keys and values" or row["abits"] == 16 for row in rows)
    labels = ["dataset", "abits"] if is_plain else ["dataset", "quantized", "abits"]
    frame = pandas.DataFrame([[row[name] for name in labels] for row in rows], columns=labels)
    for name, (heading, form) in columns.items():
        frame[heading] = ["-" if row[name] is None else format(row[name], form) for row in rows]
    width = os.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    parts: list[str] = []
    shown: list[str] = []
    for heading, _ in columns.values():
        if shown and frame[[*labels, *shown, heading]].to_string(index=False).index("\n") > width:
            parts.append(frame[[*labels, *shown]].to_string(index=False))
            shown = []
        shown.append(heading)
    parts.append(frame[[*labels, *shown]].to_string(index=False))
    return "\n".join(parts)


def comparison(run: Run, rows: Sequence[Mapping]) -> str:
    """Return the tables below the perplexities: differences from the unquantized model, and storage cost."""
    parts = []
    for title, columns in list(TABLES.items())[1:]:
        if any(row[name] is not None for row in rows for name in columns if name != "top1_agreement"):
            parts.append(f"\n{title.format(context=run.context)}\n{table(rows, columns)}")
    return "\n".join(parts)


def as_json(data: Mapping) -> str:
    """Return data indented, but a list of figures on one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # a raw newline is in no string
    return re.sub(r"\[\n[-+.\deE,\snul]*\]", lambda found: " ".join(found[0].split()), text)


def as_csv(rows: Sequence[Mapping], complete: bool) -> str:
    """Return the figures of rows, without those of single windows."""
    import pandas

    frame = pandas.DataFrame([{n: value for n, value in row.items() if not n.startswith("window_")} for row in rows])
    return frame.astype({"layer": "Int64"}).assign(complete=complete).to_csv(index=False)


def write_output(path: str | None, record: Mapping, run: Run, complete: bool) -> str:
    """Write what run has, if it has anything, atomically, by one process. Return words on what there is."""
    rows = all_results(run)
    if path is None or not rows or processes.index() > 0:
        return ""
    is_csv = path.lower().endswith(".csv")
    text = as_csv(rows, complete) if is_csv else as_json({**record, "complete": complete, "results": rows})
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
    count, total = sum(run.count.values()), sum(map(len, run.texts.values()))
    return f"{path} has {count} of {total} windows{'' if is_csv else ', and --resume goes on from there'}"


def digests(texts: Mapping[str, Tensor], quantizer_path: str | None) -> dict[str, str]:
    """Return {what: sha256} of each text's token ids, and of the quantizer file."""
    read = {dataset: windows.numpy().tobytes() for dataset, windows in texts.items()}
    if quantizer_path is not None:
        read["quantizers"] = Path(quantizer_path).read_bytes()
    return {name: sha256(content).hexdigest() for name, content in read.items()}


def load_unfinished(path: str, record: Mapping, decisive: Mapping[str, Any]) -> dict:
    """Return the report of the interrupted run that path holds, {} if it is not there yet.

    Raises UserError if it is no file of ours, or of another run than record says. decisive is {flag that decides
    figures: what it is where a report does not say}.
    """
    if not os.path.exists(path):
        notify(f"--resume: {path!r} does not exist yet: starting from the beginning")
        return {}
    try:
        there, settings = json.loads(Path(path).read_bytes()), record["settings"]
        same = {name: (record[name], there[name]) for name in ("script", "model")}
        same |= {name: (settings[name], there["settings"].get(name, usual)) for name, usual in decisive.items()}
        read, _ = dict(there["sha256"]), list(there["results"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"--resume: {path!r} is no JSON that --output wrote: give another name") from error
    for name, (ours, theirs) in same.items():
        if ours != theirs:
            raise UserError(f"--resume: {path!r} is of another run: {name} is {ours!r} here and {theirs!r} there")
    for name, digest in record["sha256"].items():
        if digest != read.get(name):
            raise UserError(f"--resume: {path!r} is of another run: the content of {name} is another")
    return there


def take_over(run: Run, path: str, known: Mapping, environment: Mapping) -> None:
    """Put the figures of the report that path held into run. UserError if they are of other rows, or are no figures."""
    if known.get("environment") != environment:
        notify(f"--resume: {path!r} was begun on another device, or with other versions: last digits may differ")
    try:
        for dataset in run.texts:
            rows = [row for row in known["results"] if row["dataset"] == dataset]
            if rows and [(row["abits"], row["quantized"]) for row in rows] != [row[:2] for row in run.rows]:
                raise ValueError(f"{dataset} has other rows")
            if rows and len(rows[0]["window_nll"]):
                figures = torch.stack([window_figures(row) for row in rows], 1)  # [n,S,F]
                run.add(dataset, figures, math.fsum(max(0.0, float(row["seconds"])) for row in rows))
                as_json({"results": results(run, dataset)})  # no figure is inf or nan
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"--resume: {path!r} holds figures that cannot be continued: {error}") from error


MOST = {"nll": 690, "top1_agreement": 1, "key_bits": 64, "value_bits": 64}  # of a figure; the least is 0


def window_figures(row: Mapping) -> Tensor:
    """Return [n,len(FIGURES)] from the window_ lists of a row. ValueError for what cannot have been measured."""
    columns = []
    for name in FIGURES:
        values, most = row[f"window_{name}"], MOST.get(name, 1e9)
        bad = [value for value in values if not (type(value) in (int, float) and 0 <= value <= most)]
        if bad and (name == "nll" or bad != [None] * len(values)):
            raise ValueError(f"window_{name} of {row['dataset']} has {bad[0]!r}")
        columns.append([math.nan if value is None else value for value in values])
    return torch.tensor(columns, dtype=torch.float64).T
