"""A run and its rows: what is measured of every window, and the figures that come of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

import quant_utils as qu
from quant_utils import FIGURES, PARTS, Measured, Quantizer, Setting, Site
from simquant import positions, tails
from simquant.summary import RowWindows, bin_sizes, summary

LOSS, DIVERGENCE = (list(qu.STATISTICS).index(name) for name in ("nll", "kl"))


class Windows(NamedTuple):
    """What a run keeps of n windows in S rows.

    figures    [n,S,len(FIGURES)] fp64
    sketches   [n][S] of the KL divergence of tokens, see tails.packed; empty where rows are not paired
    positions  [n,S,2,P] fp64 mean loss and KL divergence in bins of the position; P is 0 where that is not asked
    """

    figures: Tensor
    sketches: list[list[str]]
    positions: Tensor

    @classmethod
    def of(cls, measured: Measured, is_paired: bool, with_positions: bool) -> Windows:
        """Return what is kept of a batch."""
        tokens, sketches = measured.tokens, [list[str]() for _ in measured.tokens]
        if is_paired:
            counts = tails.bin_counts(tokens[:, :, DIVERGENCE])
            sketches = [[tails.packed(each) for each in row] for row in counts]
        places = tokens.new_zeros(*tokens.shape[:2], 2, 0, dtype=torch.float64)
        if with_positions:
            places = positions.position_sums(tokens[:, :, [LOSS, DIVERGENCE]]) / bin_sizes(tokens.shape[-1])
        return cls(measured.figures, sketches, places)

    @classmethod
    def joined(cls, parts: Sequence[Windows]) -> Windows:
        """Return all windows of parts, in their order."""
        figures, sketches, places = zip(*parts, strict=True)
        return cls(torch.cat(figures), list(itertools.chain(*sketches)), torch.cat(places))

    @classmethod
    def of_rows(cls, rows: Sequence[RowWindows]) -> Windows:
        """Return what rows of a report hold of the same windows."""
        figures = [torch.tensor([*row.figures.values()], dtype=torch.float64).T for row in rows]
        blank = torch.zeros(len(rows[0]), 2, 0, dtype=torch.float64)
        places = [blank if row.positions is None else row.positions for row in rows]
        kept = [row.sketches for row in rows if row.sketches]
        sketches = [list(each) for each in zip(*kept, strict=True)] if kept else [[] for _ in range(len(rows[0]))]
        return cls(torch.stack(figures, 1), sketches, torch.stack(places, 1))

    def row(self, number: int, sizes: Tensor | None, predicted: int) -> RowWindows:
        """Return what is kept of one row; sizes [n,2] and predicted as RowWindows has them."""
        figures = dict(zip(FIGURES, self.figures[:, number].T.tolist(), strict=True))
        sketches = [each[number] for each in self.sketches if each]
        places = self.positions[:, number] if self.positions.shape[-1] else None
        return RowWindows(figures, sketches, places, sizes, predicted)


class Run:
    """One evaluation, and what is known of it so far.

    texts    {dataset: windows [N,T]}
    rows     a simquant.plans.Row for every setting; the first is the unquantized model if others are compared with it
    sites    all that the model caches
    context  tokens of the cache whose size is reported
    constants  bytes of each row that an engine holds beside the cache, as constant_bytes counts them
    sizes    {dataset: [N,2] bytes and words of the text that is predicted}, None where they are not known
    seconds  {dataset: wall time of what is measured}
    later    {name: what measures something else of all rows, after the texts: {row: list of plain dicts}}
    more     {name: what that gave}
    """

    def __init__(
        self, texts: Mapping[str, Tensor], rows: Sequence[Any], sites: Sequence[Site], context: int,
        by_position: bool = False,
    ):  # fmt: skip
        self.texts, self.rows, self.sites, self.context = texts, rows, sites, context
        self.by_position, self.constants = by_position, [0] * len(rows)
        self.later, self.more = dict[str, Callable[[], dict]](), dict[str, dict]()
        self.sizes: dict[str, Tensor | None] = dict.fromkeys(texts)
        self.seconds, self.count = dict.fromkeys(texts, 0.0), dict.fromkeys(texts, 0)
        self.parts = {name: [self.nothing(ids)] for name, ids in texts.items()}

    def nothing(self, ids: Tensor) -> Windows:
        """Return what is known of no window of ids [N,T]."""
        blank = torch.zeros(0, len(self.rows), dtype=torch.float64)
        bins = len(positions.bins(ids.shape[1] - 1)) if self.by_position else 0
        figures, places = blank[..., None], blank[..., None, None]
        return Windows(figures.expand(-1, -1, len(FIGURES)), [], places.expand(-1, -1, 2, bins))

    @property
    def is_paired(self) -> bool:
        """Whether rows are compared with the unquantized model."""
        return len(self.rows) > 1 and self.rows[0].is_unquantized

    def done(self, dataset: str) -> Windows:
        """Return the windows that are measured."""
        self.parts[dataset] = [Windows.joined(self.parts[dataset])]
        return self.parts[dataset][0]

    def kept(self, measured: Measured) -> Windows:
        """Return what the run keeps of a batch."""
        return Windows.of(measured, self.is_paired, self.by_position)

    def add(self, dataset: str, windows: Windows, seconds: float) -> None:
        """Take up the next windows."""
        self.parts[dataset].append(windows)
        self.count[dataset] += len(windows.figures)
        self.seconds[dataset] += seconds


def cache_entries(sites: Sequence[Site]) -> dict[str, int]:
    """Return {part: entries of a cache of the reported size}."""
    return {part: sum(site.channels * site.tokens for site in sites if site.part == part) for part in PARTS}


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


def results(run: Run, dataset: str, with_intervals: bool = True) -> list[dict]:
    """Return a dict of figures for every row, from the windows of dataset that are measured; None where not known.

    seconds are divided evenly over the rows; window_ lists hold what is kept of single windows, from which take_over
    goes on.
    """
    done, count, predicted = run.done(dataset), run.count[dataset], run.texts[dataset].shape[1] - 1
    known, made, entries = run.sizes[dataset], list[dict](), cache_entries(run.sites)
    sizes = None if known is None else known[:count]
    windows = [done.row(number, sizes, predicted) for number in range(len(run.rows))]
    for row, constants, mine in zip(run.rows, run.constants, windows, strict=True):
        labels = {"dataset": dataset, **row._asdict()}
        counts = {"windows": count, "tokens": count * predicted, "seconds": run.seconds[dataset] / len(run.rows)}
        figures = summary(mine, windows[0] if run.is_paired else None, entries, with_intervals)
        made.append(labels | counts | figures | {"constants_gib": constants / 2**30} | mine.lists())
    return made


def all_results(run: Run, with_intervals: bool = True) -> list[dict]:
    """Return results of all datasets of which something is measured."""
    return [row for dataset in run.texts if run.count[dataset] for row in results(run, dataset, with_intervals)]


def more_results(run: Run) -> dict[str, list[dict]]:
    """Return {name: for every row its labels, and under that name what was measured after the texts}."""
    return {name: [{**row._asdict(), name: each[row]} for row in run.rows] for name, each in run.more.items()}
