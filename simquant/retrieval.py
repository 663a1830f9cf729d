"""Retrieval: what a quantized model finds again in a long text, scored by teacher forcing in one forward pass.

The model sees a prompt of simquant/needles.py at once, its answer included. What counts is whether each token of the
answer was the likeliest one at its place, and its loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import quant_utils as qu
from quant_utils import STATISTICS, Setting, UserError
from simquant import calibration, memory, processes
from simquant.needles import KINDS, Prompt
from simquant.summary import standard_error


def measure(
    model, sites, asked: Sequence[Prompt], settings: Mapping[Any, Setting], batch_size: int | str
) -> dict[Any, list[dict]]:
    """Return {row: a cell of figures for each kind, length and depth}. Processes share the prompts, and all have all.

    The first row is what the others are compared with if it is unquantized.
    """
    groups: dict[int, list[Prompt]] = {each.length: [] for each in asked}
    for each in asked:
        groups[each.length].append(each)
    mine = {length: group[processes.index() :: processes.count()] for length, group in groups.items()}
    parts = {length: [torch.zeros(0, len(settings), 2, dtype=torch.float64)] for length in groups}
    with qu.progress("retrieval", total=sum(map(len, mine.values())), unit="prompt") as bar:
        for length, group in mine.items():
            for part in scores(model, sites, group, settings, batch_size):
                parts[length].append(part)
                bar.update(len(part))
    found = processes.interleave({length: torch.cat(part) for length, part in parts.items()})
    in_order = [each for group in groups.values() for each in group]
    return cells(in_order, torch.cat(list(found.values())), list(settings))


def scores(
    model, sites, asked: Sequence[Prompt], settings: Mapping[Any, Setting], batch_size: int | str
) -> Iterator[Tensor]:
    """Yield [n,S,2] fp64 of prompts of one length, batch by batch: the mean loss of the answer's tokens in nats, and
    whether all of them are the likeliest ones. UserError for a loss that is no number."""
    columns, waiting = [[*STATISTICS].index(name) for name in ("nll", "accuracy")], iter(asked)
    ids = torch.stack([each.ids for each in asked]) if asked else torch.zeros(0, 0, dtype=torch.long)
    for batch in memory.evaluate_what_fits(model, sites, ids, list(settings.values()), batch_size):
        made = []
        for tokens, prompt in zip(batch.tokens, waiting, strict=False):  # [S,statistics,T-1]
            nll, is_right = tokens[:, columns, -prompt.answer :].double().unbind(1)  # [S,answer] each
            made.append(torch.stack([nll.mean(-1), is_right.amin(-1)], -1))
            check_loss(model, prompt, settings, made[-1][:, 0])
        yield torch.stack(made)


def check_loss(model, prompt: Prompt, settings: Mapping[Any, Setting], nll: Tensor) -> None:
    """Raise UserError for the first of settings whose loss in nll [S] is no number, or beyond all bounds."""
    for (row, setting), loss in zip(settings.items(), nll.tolist(), strict=True):
        if not loss < 690:  # nan is not less
            source = memory.first_overflow(model, prompt.ids, setting)
            where = f"{source} overflows first " if source else ""
            place = f"retrieval, {row}: a needle in {prompt.length} tokens has loss {loss:g}"
            raise UserError(f"{place}, {where}{calibration.advice_on_overflow(model)}")


def cells(asked: Sequence[Prompt], found: Tensor, rows: Sequence[Any]) -> dict[Any, list[dict]]:
    """Return {row: a cell for each kind, length and depth} from the scores [N,S,2] of prompts."""
    groups: dict[tuple, list[int]] = {}
    for number, each in enumerate(asked):
        groups.setdefault((each.kind, each.length, each.depth), []).append(number)
    is_paired = len(rows) > 1 and rows[0].is_unquantized
    differences = found[..., 0] - (found[:, :1, 0] if is_paired else math.nan)
    made: dict[Any, list[dict]] = {row: [] for row in rows}
    for column, row in enumerate(rows):
        for (kind, length, depth), numbers in sorted(groups.items(), key=lambda each: [*KINDS].index(each[0][0])):
            nll, exact = found[numbers, column].T.tolist()
            delta = differences[numbers, column].tolist() if is_paired else None
            made[row].append({
                "kind": kind, "length": length, "depth": depth, "needles": len(numbers), "nll": fmean(nll),
                "delta_nll": delta and fmean(delta), "delta_nll_se": delta and standard_error(delta),
                "exact_match": fmean(exact), "exact_match_se": standard_error(exact),
            })  # fmt: skip
    return made
