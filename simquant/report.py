"""From figures of windows to rows: what a run is, and the perplexities, differences and sizes that it gives."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

import quant_utils as qu
from quant_utils import FIGURES, PARTS, Quantizer, Setting, Site


class Run:
    """One evaluation, and what is known of it so far.

    texts    {dataset: windows [N,T]}
    rows     a simquant.plans.Row for every setting; the first is the unquantized model if others are compared with it
    sites    all that the model caches
    context  tokens of the cache whose size is reported
    constants  bytes of each row that an engine holds beside the cache, as constant_bytes counts them
    figures  {dataset: [N,S,len(FIGURES)]}, of which the first count[dataset] windows are measured
    seconds  {dataset: wall time of these}
    """

    def __init__(self, texts: Mapping[str, Tensor], rows: Sequence[Any], sites: Sequence[Site], context: int):
        self.texts, self.rows, self.sites, self.context = texts, rows, sites, context
        self.constants = [0] * len(rows)
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


def has_figure(values: Sequence[float], name: str) -> bool:
    """Return whether the report has a list of a figure's windows: not of what nobody counted."""
    return name != "saturation" or not all(map(math.isnan, values))


def storage_cost(means: Mapping[str, float], run: Run) -> dict[str, float | None]:
    """Return average bits an entry of keys and values together, and the GiB of a cache of run.context tokens."""
    held = [sum(site.channels * site.tokens for site in run.sites if site.part == part) for part in PARTS]
    bits = [means["key_bits"], means["value_bits"]]
    average = math.fsum(n * each for n, each in zip(held, bits, strict=True) if n) / (sum(held) or math.nan)
    gib = sum(held) / 8 / 2**30  # of one bit an entry
    return {"avg_bits": or_none(average), "cache_gib": or_none(average * gib), "fp16_cache_gib": 16 * gib or None}


def constant_bytes(setting: Setting) -> int:
    """Return the bytes of what a setting is fitted to: the model's constants, which an engine holds beside the cache.

    They are the tensors that the quantizer file has, and what a format says of others. Sites may share a quantizer.
    """
    return sum(map(tensor_bytes, {id(each): each for each in setting.values()}.values()))


def tensor_bytes(quantizer: Quantizer) -> int:
    """Return the bytes of the tensors among a quantizer's fields, and its derived_bytes, if it has such."""
    this: Any = quantizer
    held = [getattr(this, each.name) for each in fields(this) if each.init]
    own = sum(each.nbytes for each in held if isinstance(each, Tensor))
    return (
        own
        + sum(tensor_bytes(each) for each in held if isinstance(each, Quantizer))
        + getattr(this, "derived_bytes", 0)
    )


def results(run: Run, dataset: str) -> list[dict]:
    """Return a dict of figures for every row, from the windows of dataset that are measured; None where not known.

    ppl = exp(nll), nll the mean in nats; _se are standard errors; seconds are divided evenly over the rows; window_
    lists hold the figures of single windows, from which take_over goes on.
    """
    made, baseline = [], run.done(dataset)[:, 0, 0].tolist()
    for row, constants, figures in zip(run.rows, run.constants, run.done(dataset).unbind(1), strict=True):
        windows = {name: figures[:, column].tolist() for column, name in enumerate(FIGURES)}
        means = {name: math.fsum(values) / len(values) for name, values in windows.items()}
        ppl, error = qu.perplexity(windows["nll"]), standard_error(windows["nll"])
        difference = paired_difference(windows["nll"], baseline)
        labels = {"dataset": dataset, **row._asdict()}
        counts = {"windows": len(figures), "tokens": len(figures) * (run.texts[dataset].shape[1] - 1)}
        made.append({
            **labels, "ppl": ppl, "ppl_se": None if error is None else ppl * error,
            **counts, "seconds": run.seconds[dataset] / len(run.rows),
            **(difference if run.is_paired else dict.fromkeys(difference)),
            **{name: or_none(mean) for name, mean in means.items()}, **storage_cost(means, run),
            "constants_gib": constants / 2**30,
            **{f"window_{name}": list(map(or_none, each)) for name, each in windows.items() if has_figure(each, name)},
        })  # fmt: skip
    return made


def all_results(run: Run) -> list[dict]:
    """Return results of all datasets of which something is measured."""
    return [row for dataset in run.texts if run.count[dataset] for row in results(run, dataset)]
