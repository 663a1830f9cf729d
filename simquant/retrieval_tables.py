"""What is shown of retrieval: a table, and a map of depth by length. Nothing here loads a model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from simquant import tables
from simquant.plots import drawable
from simquant.tables import Table

Row = Mapping[str, Any]  # with format, abits, quantized and retrieval, a list of cells: see retrieval.cells


def groups_of(row: Row) -> dict[tuple[str, int], list[Mapping]]:
    """Return {(kind, length): a cell for each depth} of a row."""
    groups: dict[tuple[str, int], list[Mapping]] = {}
    for cell in row["retrieval"]:
        groups.setdefault((cell["kind"], cell["length"]), []).append(cell)
    return groups


def table_of(rows: Sequence[Row]) -> Table:
    """Return a line for each kind, length and row: answers found at each depth, at all, and their loss."""
    found = [groups_of(row) for row in rows]
    lines = [
        (group, row, groups[group])
        for group in dict.fromkeys(group for groups in found for group in groups)
        for row, groups in zip(rows, found, strict=True)
        if group in groups
    ]
    labels = {"kind": [kind for (kind, _), _, _ in lines], "tokens": [str(length) for (_, length), _, _ in lines]}
    labels |= tables.labels_of([row for _, row, _ in lines])
    figures = [figures_of(row, cells) for _, row, cells in lines]
    depths = sorted({cell["depth"] for row in rows for cell in row["retrieval"]})
    headings = [*(f"at{depth}%" for depth in depths), "all", "loss", "Δloss", "±"]
    columns = {heading: [each.get(heading, "-") for each in figures] for heading in headings}
    shown = {heading: column for heading, column in columns.items() if set(column) != {"-"}}
    needles = sorted({cell["needles"] for row in rows for cell in row["retrieval"]})
    count = " or ".join(map(str, needles))
    note = f"Answers whose tokens are all likeliest, of {count} at each depth; loss of their tokens in nats."
    cells = tables.lines_of([*labels.values(), *shown.values()])
    return Table("Retrieval: answers found at each depth", [*labels, *shown], cells, len(labels), note=note)


def figures_of(row: Row, cells: Sequence[Mapping]) -> dict[str, str]:
    """Return {heading: text} of the cells of a row that have one kind and one length."""
    made = {f"at{cell['depth']}%": f"{cell['exact_match']:.0%}" for cell in cells}
    made["all"] = f"{fmean(cell['exact_match'] for cell in cells):.1%}"
    made["loss"] = f"{fmean(cell['nll'] for cell in cells):.4f}"
    delta, errors = ([cell[name] for cell in cells] for name in ("delta_nll", "delta_nll_se"))
    if None not in delta and row["abits"] != tables.UNQUANTIZED:
        made["Δloss"] = f"{fmean(delta):+.4f}"
        made |= {} if None in errors else {"±": f"{math.hypot(*errors) / len(errors):.4f}"}
    return made


def draw_retrieval(rows: Sequence[Row], title: str = ""):
    """Draw a map for each row and kind: depth by length, coloured by answers found, with the difference of the loss."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(cell["kind"] for row in rows for cell in row["retrieval"]))
    every = [cell for row in rows for cell in row["retrieval"]]
    lengths, depths = (sorted({cell[name] for cell in every}) for name in ("length", "depth"))
    across = min(len(rows), 4)
    down = -(-len(rows) // across)
    size = max(2.4, 0.75 * len(lengths) + 0.6), max(1.9, 0.36 * len(depths) + 0.9)
    figure = Figure(figsize=(size[0] * across + 1.4, (size[1] * down + 0.3) * len(kinds) + 0.6), layout="constrained")
    panels = figure.subplots(down * len(kinds), across, squeeze=False)
    for number, row in enumerate(rows):
        for block, kind in enumerate(kinds):
            axes = panels[block * down + number // across, number % across]
            mine = [cell for cell in row["retrieval"] if cell["kind"] == kind]
            if row["abits"] == tables.UNQUANTIZED:
                mine = [{**cell, "delta_nll": None} for cell in mine]
            drawn = draw_map(axes, mine, lengths, depths)
            axes.set_title(f"{drawable(tables.name_of(row))}\n{kind}", fontsize=8)
            axes.set_ylabel("depth, %" if number % across == 0 else "", fontsize=8)
            axes.set_xlabel("tokens", fontsize=8)
    for axes in panels.flat:
        if not axes.get_title():
            axes.set_axis_off()
    bar = figure.colorbar(drawn, ax=panels, shrink=0.6, label="answers found (below: Δloss in nats)")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.suptitle(title, fontsize=9)
    return figure


def draw_map(axes, cells: Sequence[Mapping], lengths: Sequence[int], depths: Sequence[int]):
    """Draw one map. Return the image, whose colours a bar explains."""
    known = {(cell["depth"], cell["length"]): cell for cell in cells}
    grid = [[known[d, n]["exact_match"] if (d, n) in known else math.nan for n in lengths] for d in depths]
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (depth, length), cell in known.items():
        delta = cell["delta_nll"]
        words = f"{cell['exact_match']:.0%}" + ("" if delta is None else f"\n{delta:+.2f}")
        colour = "black" if cell["exact_match"] > 0.55 else "white"
        at = lengths.index(length), depths.index(depth)
        axes.text(*at, words, ha="center", va="center", fontsize=6, color=colour)
    axes.set_xticks(range(len(lengths)), map(str, lengths), fontsize=7)
    axes.set_yticks(range(len(depths)), map(str, depths), fontsize=7)
    return image
