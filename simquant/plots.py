"""Pictures of a run's rows: a sweep, formats compared, an attribution."""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import quant_utils as qu
from quant_utils import Setting
from simquant import tables
from simquant.files import write_atomically
from simquant.labels import MANY, Label, place_labels, quiet_fonts

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by everyone
MARKERS = "os^Dv*"
DPI, SPREAD = 150, 20


def as_bytes(figure, form: str) -> bytes:
    """Return the file that a matplotlib figure is in a form: png or svg."""
    content = io.BytesIO()
    with quiet_fonts():
        figure.savefig(content, format=form, dpi=DPI, metadata={"Date": None} if form == "svg" else None)
    return content.getvalue()


def save_figure(path: str, figure) -> None:
    """Write a matplotlib figure, atomically, as its ending says."""
    content = as_bytes(figure, Path(path).suffix[1:].lower())
    write_atomically(path, lambda file: file.write(content))


def svg_of(figure) -> str:
    """Return a matplotlib figure as an SVG document whose letters are paths: it needs no font."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "path"}):
        return as_bytes(figure, "svg").decode()


def drawable(text: str) -> str:
    """Return text in which matplotlib sees no formula and no byte that is no letter."""
    return text.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")


def heading(flags, settings: Mapping[Any, Setting]) -> str:
    """Return the title of a picture: the model's name, and what keys and values go through, whatever the width.

    Of several formats, which have their names in the picture, it says what flags ask of all of them.
    """
    words: dict[str, str] = {}  # {part: of its quantizer}
    are_several = len({row.format for row in settings if not row.is_unquantized}) > 1
    for setting in () if are_several else settings.values():
        words |= {site.part: str(quantizer) for site, quantizer in setting.items()}
    parts = [part for part in qu.PARTS if part in words]
    by_words = {words[part]: " and ".join(each for each in parts if words[each] == words[part]) for part in parts}
    lines = [flags.model.rstrip("/").rpartition("/")[2], *(f"{named}: {each}" for each, named in by_words.items())]
    lines += [f"with {' and '.join(flags.options())}"] * bool(are_several and flags.options())
    lines += [f"unquantized layers: {', '.join(map(str, flags.skip_layers))}"] * bool(flags.skip_layers)
    return "\n".join(textwrap.fill(drawable(line), 100) for line in lines)


def titles_of(rows: Iterable[Mapping]) -> dict[str, str]:
    """Return {dataset: its name, or that of its file}, where matplotlib sees no formula and no label that it hides."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    names = [Path(dataset).name for dataset in datasets]
    names = names if len(set(names)) == len(names) else datasets
    shown = map(drawable, names)
    return {dataset: " " * (name[0] == "_") + name for dataset, name in zip(datasets, shown, strict=True)}


def errors_of(rows: Iterable[Mapping], name: str) -> list[float] | None:
    """Return the standard errors of a figure, None where a single window has none."""
    errors = [row[f"{name}_se"] for row in rows]
    return None if None in errors else errors


def draw_sweep(rows: Sequence[Mapping], title: str = ""):
    """Draw perplexity, or how much it grows, over average bits, with standard errors.

    A curve for each dataset joins the widths that keys and values share; the others stand alone.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    is_paired = rows[0]["delta_ppl"] is not None
    name, form = ("delta_ppl", "+.3g") if is_paired else ("ppl", ".2f")
    styles, labels = zip(titles_of(rows).items(), itertools.cycle(COLOURS), itertools.cycle(MARKERS)), []
    drawn: list[Mapping] = []
    for (dataset, text), colour, marker in styles:
        unquantized, *others = (row for row in rows if row["dataset"] == dataset)
        shown = sorted(others if is_paired else [unquantized, *others], key=bits_of)
        label = f"{text} (unquantized: {unquantized['ppl']:.2f})" if is_paired else text
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6, "linewidth": 1.5, "capsize": 4}
        for is_mixed, look in ((False, {"label": label}), (True, {"linestyle": "none", "markerfacecolor": "white"})):
            mine = [row for row in shown if isinstance(row["abits"], str) == is_mixed]
            if mine or not is_mixed:
                at = [bits_of(row) for row in mine], [row[name] for row in mine]
                axes.errorbar(*at, errors_of(mine, name), **style | look)
        drawn += shown
        words = [f"{row['abits']}-bit {row[name]:{form}}" for row in shown]
        labels += [Label(bits_of(row), row[name], each, colour) for row, each in zip(shown, words, strict=True)]
    set_scale(axes, drawn, name)
    if is_paired and axes.get_yscale() != "log":
        axes.axhline(0, color="black", linestyle="--", linewidth=1, label="unquantized")
    axes.set_xlabel("average bits per cached entry")
    axes.set_ylabel("increase of perplexity (± SE)" if is_paired else "perplexity (± SE)")
    axes.margins(x=0.12, y=0.15)
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=9)
    figure.legend(loc="outside lower center", ncols=2)
    place_labels(figure, [(axes, labels)])
    return figure


def set_scale(axes, rows: Sequence[Mapping], name: str) -> None:
    """Let the vertical axis be logarithmic if the figures differ by more than a factor of SPREAD.

    Around zero it stays linear, if a figure is no farther from there than its standard error, or below.
    """
    figures = [(row[name], row[f"{name}_se"] or 0.0) for row in rows]
    sizes = [abs(value) for value, _ in figures if value]
    unclear = max((2 * error for value, error in figures if abs(value) <= error), default=0.0)
    linear = unclear or min(sizes, default=0.0)
    if max(sizes, default=0.0) <= SPREAD * linear:
        return
    if all(value > error for value, error in figures):
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=linear)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


def draw_formats(rows: Sequence[Mapping], title: str = ""):
    """Draw perplexity, or how much it grows, over average bits: a named point for each format, a panel a dataset."""
    from matplotlib.figure import Figure

    titles = titles_of(rows)
    size = max(1, len(rows) / len(titles) / MANY) ** 0.5  # as much room for a name, however many there are
    figure = Figure(figsize=(12 * size, 8 * size * len(titles)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(titles), 1, squeeze=False)[:, 0]
    labels = [
        (axes, draw_panel(axes, [row for row in rows if row["dataset"] == dataset], text))
        for (dataset, text), axes in zip(titles.items(), panels, strict=True)
    ]
    figure.suptitle(title, fontsize=9)
    if handles := panels[0].get_legend_handles_labels()[0]:
        figure.legend(handles=handles, loc="outside lower center")
    place_labels(figure, labels)
    return figure


def draw_panel(axes, rows: Sequence[Mapping], title: str) -> list[Label]:
    """Draw the formats of one dataset, those on the front joined by steps. Return their names, to be placed."""
    name = "ppl" if rows[0]["delta_ppl"] is None else "delta_ppl"
    best = [rows[number] for number in tables.front(rows)]
    shown = [row for row in rows if row["abits"] != tables.UNQUANTIZED]
    rest = [row for row in shown if row not in best]
    style: dict[str, Any] = {"linestyle": "none", "markersize": 4, "elinewidth": 1, "capsize": 2}
    for mine, colour, marker in ((rest, COLOURS[0], "o"), (best, COLOURS[1], "D")):
        at = [bits_of(row) for row in mine], [row[name] for row in mine]
        axes.errorbar(*at, errors_of(mine, name), color=colour, marker=marker, **style)
    if best:
        corners = sorted((row["avg_bits"], row[name]) for row in best)
        axes.step(*zip(*corners, strict=True), where="post", color=COLOURS[1], linewidth=1, label="Pareto front")
    set_scale(axes, shown, name)
    axes.set_xlabel("average bits per cached entry")
    axes.set_ylabel("perplexity (± SE)" if name == "ppl" else "increase of perplexity (± SE)")
    axes.set_title(f"{title} (unquantized: {rows[0]['ppl']:.2f})" if name == "delta_ppl" else title, fontsize=10)
    axes.margins(x=0.08, y=0.12)
    axes.grid(alpha=0.3)
    looks = [(COLOURS[1], "bold") if row in best else (COLOURS[0], "normal") for row in shown]
    words = zip(shown, names_of(shown), looks, strict=True)
    return [Label(bits_of(row), row[name], text, *look) for row, text, look in words]


def names_of(rows: Sequence[Mapping]) -> list[str]:
    """Return the name of each row's format, with its width where the format has several rows."""
    counts = Counter(row["format"] for row in rows)
    return [drawable(row["format"]) + f" {row['abits']}-bit" * (counts[row["format"]] > 1) for row in rows]


def bits_of(row: Mapping) -> float:
    """Return a row's place on the axis of bits; 16 where a model has no storage figures."""
    return 16.0 if row["avg_bits"] is None else row["avg_bits"]


def draw_attribution(rows: Sequence[Mapping], title: str = ""):
    """Draw bars of how much the perplexity grows if only a part of the cache is quantized, a line for each dataset."""
    from matplotlib.figure import Figure

    titles = titles_of(rows)
    figure = Figure(figsize=(8, 4 * len(titles)), layout="constrained")
    panels = figure.subplots(len(titles), 2, squeeze=False, width_ratios=(1, 3))
    for (dataset, text), line in zip(titles.items(), panels, strict=True):
        _, *mine = (row for row in rows if row["dataset"] == dataset)
        parts, layers = ([row for row in mine if (row["layer"] is None) == is_part] for is_part in (True, False))
        names = [row["quantized"].replace(" and ", "\n+ ") for row in parts], [str(row["layer"]) for row in layers]
        for axes, labels, shown, colour in zip(line, names, (parts, layers), COLOURS, strict=False):
            heights = [row["delta_ppl"] for row in shown]
            axes.bar(labels, heights, yerr=errors_of(shown, "delta_ppl"), capsize=3, color=colour)
            axes.axhline(0, color="black", linewidth=1)
            axes.grid(axis="y", alpha=0.3)
            axes.set_ylabel("increase of perplexity (± SE)")
        line[0].set_xlabel("quantized in all layers")
        line[1].set_xlabel("the only quantized layer")
        line[1].set_xticks(range(0, len(layers), math.ceil(len(layers) / 16)))
        line[1].set_title(f"{text}, {mine[0]['abits']} bits", fontsize=10)
    figure.suptitle(title, fontsize=9)
    return figure


def draw_rows(rows: Sequence[Mapping], title: str = ""):
    """Draw rows as what they are: an attribution, several formats, or the widths of one."""
    if any(row["layer"] is not None for row in rows):
        return draw_attribution(rows, title)
    return (draw_formats if len(tables.formats_of(rows)) > 1 else draw_sweep)(rows, title)
