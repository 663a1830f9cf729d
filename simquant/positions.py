"""Where in a window quantization hurts: figures by the number of tokens before the predicted one.

The numbers are binned by powers of two: 1, 2-3, 4-7, and so on. Nothing but position_sums imports torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from simquant import tables
from simquant.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

FIGURES = {  # {figure: (heading, format)} in the order of the table
    "nll": ("loss in nats", ".4f"),
    "delta_nll": ("increase of the loss, Δnll in nats", "+.5f"),
    "delta_nll_se": ("standard error of Δnll", ".5f"),
    "kl": ("KL divergence in nats", ".6f"),
}


def bins(predicted: int) -> list[tuple[int, int]]:
    """Return the (first, last) context length of every bin, for windows in which so many tokens are predicted."""
    return [(2**each, min(2 ** (each + 1) - 1, predicted)) for each in range(predicted.bit_length())]


def position_sums(x: Tensor) -> Tensor:
    """Return [...,P] float64: the figures x [...,t] of a window's t predicted tokens, added up in each bin."""
    import torch

    return torch.stack([x[..., first - 1 : last].sum(-1, dtype=torch.float64) for first, last in bins(x.shape[-1])], -1)


def mean_with_error(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean of windows' values and its standard error; None where unknown, as the error of one window is."""
    if not values or any(map(math.isnan, values)):
        return None, None
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return math.fsum(values) / len(values), error


def by_position(nll: Tensor, kl: Tensor, baseline: Tensor | None, predicted: int) -> list[dict[str, Any]]:
    """Return a dict for each bin from the position_sums [n,P] of n windows, in each of which so many are predicted.

    Figures are nats a token, _se their standard errors over windows. kl is nan where it is not known; the increase
    delta_nll is paired with the baseline's losses [n,P], and None without them.
    """
    made = []
    for number, (first, last) in enumerate(bins(predicted)):
        count = last - first + 1
        losses, divergences = ((each[:, number] / count).tolist() for each in (nll, kl))
        increases = [] if baseline is None else ((nll - baseline)[:, number] / count).tolist()
        figures = {"nll": losses, "kl": divergences, "delta_nll": increases}
        means = {name: mean_with_error(values) for name, values in figures.items()}
        made.append({
            "first": first, "last": last, "tokens": count * len(nll), "nll": means["nll"][0],
            **{f"{name}{end}": means[name][at] for name in ("kl", "delta_nll") for at, end in enumerate(("", "_se"))},
        })  # fmt: skip
    return made


# -- the table


def shown(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], bool]:
    """Return (the rows that have figures by position to be shown, whether they are compared with the unquantized).

    The unquantized row is among them only if none is compared.
    """
    known = [row for row in rows if row.get("by_position")]
    compared = [row for row in known if row["abits"] != tables.UNQUANTIZED and has(row, "delta_nll")]
    return compared or known, bool(compared)


def has(row: Mapping[str, Any], name: str) -> bool:
    """Return whether a row knows a figure in some bin."""
    return any(each[name] is not None for each in row["by_position"])


def range_of(entry: Mapping[str, Any]) -> str:
    """Return the context lengths of a bin, as they are printed."""
    return f"{entry['first']}-{entry['last']}" if entry["last"] > entry["first"] else f"{entry['first']}"


def lines_of(rows: Sequence[Mapping[str, Any]], name: str) -> list[list[str]]:
    """Return lines of cells for a figure of one dataset's rows: bins across, one line a row, of those that know it."""
    lengths = [range_of(each) for each in max((row["by_position"] for row in rows), key=len)]
    known, form = [row for row in rows if has(row, name)], FIGURES[name][1]
    cells = [["-" if each[name] is None else format(each[name], form) for each in row["by_position"]] for row in known]
    labelled = [[tables.name_of(row), *line] for row, line in zip(known, cells, strict=True)]
    return [["tokens before", *lengths], *labelled] if known else []


def tables_of(rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    """Return a table for each dataset and figure, with a line for each row and bins across; none without any.

    The loss itself is shown where nothing is compared.
    """
    rows, is_compared = shown(rows)
    made = []
    for dataset, text in tables.short_names(list(dict.fromkeys(row["dataset"] for row in rows))).items():
        mine = [row for row in rows if row["dataset"] == dataset]
        for name, (heading, _) in FIGURES.items():
            if (name != "nll" or not is_compared) and (lines := lines_of(mine, name)):
                made.append(Table(f"{text}: {heading}", lines[0], lines[1:]))
    return made
