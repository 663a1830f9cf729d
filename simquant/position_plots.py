"""The picture of where in a window quantization hurts: increase of the loss and KL divergence over context length."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from simquant import positions, tables
from simquant.plots import COLOURS, DPI, MARKERS, SPREAD, drawable, titles_of

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))  # one for each time that the colours are used up
MOST = 10**4  # by what factor increases may differ outside of the linear part of their axis
FEW = 4  # up to so many lines a panel has error bars nearly as thick
AXES = {
    "delta_nll": "increase of the loss (nats a token, ± SE)",
    "kl": "KL divergence (nats a token, ± SE)",
    "nll": "loss (nats a token)",
}


def look_of(number: int) -> dict[str, Any]:
    """Return how the line of a row is drawn: no two of 72 look the same, neighbours differ in colour and marker."""
    turn, place = divmod(number, len(COLOURS))
    marker = MARKERS[(place + turn) % len(MARKERS)]
    return {"color": COLOURS[place], "linestyle": DASHES[turn % len(DASHES)], "marker": marker}


def draw_positions(rows: Sequence[Mapping], title: str = ""):
    """Draw figures by position over context length, a line for each row that has some, and panels for each dataset.

    A point stands in the middle of its bin. Where nothing is compared with the unquantized model, it is the loss.
    """
    from matplotlib.figure import Figure

    rows, is_compared = positions.shown(rows)
    names = ("delta_nll", "kl") if is_compared else ("nll",)
    titles = titles_of(rows)
    labels = list(dict.fromkeys(tables.name_of(row) for row in rows))
    looks = {label: look_of(number) for number, label in enumerate(labels)}
    columns = max(1, min(4, 110 // (8 + max(map(len, labels), default=0)), len(labels)))
    height = 3.6 * max(1, len(titles)) + 0.22 * math.ceil(len(labels) / columns) + 0.5
    figure = Figure(figsize=(5.5 * len(names) + 0.5, height), dpi=DPI, layout="constrained")
    panels = figure.subplots(max(1, len(titles)), len(names), squeeze=False)
    for (dataset, text), line in zip(titles.items(), panels, strict=False):
        mine = [row for row in rows if row["dataset"] == dataset]
        for axes, name in zip(line, names, strict=True):
            draw_panel(axes, mine, name, looks)
            axes.set_title(text, fontsize=10)
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title, fontsize=9)
    if handles:
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8)
    return figure


def draw_panel(axes, rows: Sequence[Mapping], name: str, looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Draw a figure of one dataset's rows, each in the look of its label."""
    thin = 1.0 if len(rows) <= FEW else 0.6
    drawn: list[list[Mapping[str, Any]]] = []
    for row in rows:
        known = [each for each in row["by_position"] if each[name] is not None and (name != "kl" or each[name] > 0)]
        errors = [each.get(f"{name}_se") or 0.0 for each in known]
        label = tables.name_of(row)
        style: dict[str, Any] = {"markersize": 4, "linewidth": 1.3, "elinewidth": thin, "capsize": 2, "capthick": thin}
        at = [math.sqrt(each["first"] * each["last"]) for each in known], [each[name] for each in known]
        if known:
            axes.errorbar(*at, errors if any(errors) else None, label=drawable(label), **style, **looks[label])
            drawn.append(known)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if name == "kl":
        axes.set_yscale("log", nonpositive="clip")
    elif name == "delta_nll":
        axes.axhline(0, color="black", linestyle="--", linewidth=1)
        set_scale(axes, drawn)
    axes.set_xlabel("tokens before the predicted one")
    axes.set_ylabel(AXES[name])
    axes.margins(x=0.04, y=0.06)
    axes.grid(alpha=0.3)


def set_scale(axes, drawn: Sequence[Sequence[Mapping[str, Any]]]) -> None:
    """Let the axis of increases be logarithmic outside of the noise, if they differ by more than a factor of SPREAD.

    The linear part around zero goes up to the median of all standard errors, or to the least that a row has in the bin
    of most tokens: a few tokens at the start of a window are so noisy that they would hide what the others tell.
    """
    surest = [max(entries, key=lambda each: each["tokens"])["delta_nll"] for entries in drawn]
    entries = [each for line in drawn for each in line]
    noise = statistics.median([each["delta_nll_se"] or 0.0 for each in entries]) if entries else 0.0
    largest = max((abs(each["delta_nll"]) for each in entries), default=0.0)
    linear = max(noise, largest / MOST, min((abs(each) for each in surest if each), default=0.0))
    if largest > SPREAD * linear:
        axes.set_yscale("symlog", linthresh=linear)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
