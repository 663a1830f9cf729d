"""The table that is printed: which figures of a row it shows, and how. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simquant.notices import one_line


def tails_of(name: str, heading: str, form: str) -> dict[str, tuple[str, str]]:
    """Return the columns of a figure and of both ends of its 95 % interval."""
    return {name: (heading, form), f"{name}_low": ("from", form), f"{name}_high": ("to", form)}


COLUMNS = {  # {figure: (heading, format)} of all that can be printed, under its name in --output
    "avg_bits": ("bits", ".3f"), "key_bits": ("key bits", ".3f"), "value_bits": ("value bits", ".3f"),
    "ppl": ("ppl", ".4f"), "ppl_se": ("±", ".4f"), "nll": ("nll", ".6f"),
    "bits_per_byte": ("bits/byte", ".4f"), "bits_per_byte_se": ("±", ".4f"),
    "word_ppl": ("word ppl", ".3f"), "word_ppl_se": ("±", ".3f"),
    "accuracy": ("accuracy", ".2%"), "accuracy_se": ("±", ".2%"),
    "delta_ppl": ("Δppl", "+.4f"), "delta_ppl_se": ("±", ".4f"),
    "delta_percent": ("Δppl%", "+.2f"), "delta_percent_se": ("±%", ".2f"),
    "kl": ("KL", ".6f"), "kl_se": ("±", ".6f"), **tails_of("kl_median", "KL50%", ".6f"),
    **tails_of("kl_p99", "KL99%", ".4f"), **tails_of("kl_p999", "KL99.9%", ".4f"),
    **tails_of("kl_max", "KL max", ".3f"), "rms_dp": ("RMSΔp", ".2%"), "rms_dp_se": ("±", ".2%"),
    "top1_agreement": ("top-1", ".2%"), "top1_agreement_se": ("±", ".2%"),
    "saturation": ("clipped", ".3%"), "cache_gib": ("GiB", ".3f"), "fp16_cache_gib": ("fp16 GiB", ".3f"),
    "constants_gib": ("constants GiB", ".3f"),
    "windows": ("windows", ""), "tokens": ("tokens", ""), "seconds": ("seconds", ".1f"),
}  # fmt: skip
USUAL = (
    "avg_bits", "ppl", "ppl_se", "delta_ppl", "delta_ppl_se", "delta_percent", "kl", "kl_p99", "rms_dp",
    "top1_agreement", "saturation", "cache_gib",
)  # fmt: skip
AGAINST = ("delta_", "kl", "rms_dp", "top1_")  # how figures begin that compare; the unquantized row's are zeros


@dataclass(frozen=True)
class Table:
    """Cells under headings, all of them text, to be printed or shown on a page.

    labels  how many columns name a line; they are repeated where a table is folded
    marked  the numbers of lines that stand out and have a star behind their name on a page; the note says why
    note    stands below the table on a page
    """

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1
    marked: Collection[int] = ()
    note: str = ""


SORTS = {"given": (), "bits": ("avg_bits", "delta_ppl"), "delta_ppl": ("delta_ppl", "avg_bits")}  # {order: by what}
UNQUANTIZED = 16  # abits of the row that others are compared with


def formats_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the formats that rows quantize by, each once, in their order."""
    return list(dict.fromkeys(row["format"] for row in rows if row["abits"] != UNQUANTIZED))


def name_of(row: Mapping[str, Any]) -> str:
    """Return a row's format and width, and the parts that are quantized if they are not all."""
    part = row.get("quantized", "keys and values")
    words = [row["format"], *([] if row["abits"] == UNQUANTIZED else [f"{row['abits']}-bit"])]
    return " ".join(words + [part] * (part not in ("keys and values", "nothing")))


def front(rows: Sequence[Mapping[str, Any]]) -> set[int]:
    """Return the indices of the rows on the Pareto front of their dataset, over bits and the increase of perplexity.

    A row is on it if no other has at most its bits and at most its increase, and less of one. The unquantized row is
    no candidate, nor is one whose bits or increase are unknown.
    """
    points = {
        number: (row["dataset"], row["avg_bits"], row["delta_ppl"])
        for number, row in enumerate(rows)
        if row["abits"] != UNQUANTIZED and None not in (row["avg_bits"], row["delta_ppl"])
    }
    return {number for number, point in points.items() if not any(beats(other, point) for other in points.values())}


def beats(one: tuple[str, float, float], other: tuple[str, float, float]) -> bool:
    """Return whether one (dataset, bits, increase) is nowhere worse than another of its dataset, and once better."""
    return one[0] == other[0] and one[1] <= other[1] and one[2] <= other[2] and one != other


def sorted_rows(rows: Sequence[Mapping[str, Any]], by: str) -> list[Mapping[str, Any]]:
    """Return rows in an order of SORTS, what is unknown last; datasets stay together, the unquantized row first."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))

    def place(row: Mapping[str, Any]) -> tuple:
        """Return what a row is sorted by."""
        increase = row["ppl"] if row["delta_ppl"] is None else row["delta_ppl"]  # without a baseline: the same order
        figures = [{**row, "delta_ppl": increase}[name] for name in SORTS[by]]
        known = ((each is None, each or 0.0) for each in figures)
        return datasets.index(row["dataset"]), row["abits"] != UNQUANTIZED, *known

    return sorted(rows, key=place)


def short_names(datasets: Sequence[str]) -> dict[str, str]:
    """Return {dataset: its name, or that of its file}; paths are whole where two files have the same name."""
    names = [Path(dataset).name for dataset in datasets]
    shown = names if len(set(names)) == len(names) else datasets
    return {dataset: one_line(name) for dataset, name in zip(datasets, shown, strict=True)}


def cell(row: Mapping[str, Any], name: str, form: str) -> str:
    """Return a figure as it is printed: - where there is none, in scientific notation where it is huge."""
    value = row[name]
    if value is None or (name.startswith(AGAINST) and row["abits"] == UNQUANTIZED):
        return "-"
    return format(value, form.replace("f", "e") if abs(value) >= 1e6 and form else form)


def starred_formats(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of each row's format, with a star where it is on the front, and all of them aligned."""
    best = front(rows)
    stars = ["*" if number in best else " " * bool(best) for number in range(len(rows))]
    return [row["format"] + star for row, star in zip(rows, stars, strict=True)]


def table_of(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = USUAL, caption: str = "") -> Table:
    """Return a line for each row of a report: what it is, and those of its figures that some row has."""
    labels = labels_of(rows)
    names = short_names(list(dict.fromkeys(row["dataset"] for row in rows)))
    if "format" in labels:
        labels["format"] = starred_formats(rows)
    labels = {"text": [names[row["dataset"]] for row in rows]} | labels
    cells = {name: [cell(row, name, COLUMNS[name][1]) for row in rows] for name in columns}
    cells = {name: column for name, column in cells.items() if set(column) != {"-"}}
    headings = [*labels, *(COLUMNS[name][0] for name in cells)]
    return Table(caption, headings, lines_of([*labels.values(), *cells.values()]), len(labels))


def labels_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return {heading: cells} of what tells rows apart: the format if there are several, the width, the parts."""
    labels = {"format": [row["format"] for row in rows]} if len(formats_of(rows)) > 1 else {}
    labels["abits"] = [str(row["abits"]) for row in rows]
    if any(row["quantized"] != "keys and values" for row in rows if row["abits"] != UNQUANTIZED):
        labels["quantized"] = [row["quantized"] for row in rows]
    return labels


def lines_of(columns: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the lines of columns of cells."""
    return [list(line) for line in zip(*columns, strict=True)]


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = USUAL) -> str:
    """Return table_of as text."""
    return text_of(table_of(rows, columns))


def text_of(table: Table) -> str:
    """Return a table as text; on a terminal that is too narrow, columns that do not fit go below, labelled anew."""
    import pandas

    width = os.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    columns = [pandas.Series(cells, name=name) for name, *cells in zip(table.headings, *table.rows, strict=True)]
    labels, parts = columns[: table.labels], list[pandas.DataFrame]()
    for column in columns[table.labels :]:
        wider = pandas.concat([parts[-1], column] if parts else [*labels, column], axis=1)
        if parts and wider.to_string(index=False).index("\n") > width:
            parts.append(pandas.concat([*labels, column], axis=1))
        else:
            parts[-1:] = [wider]
    above = f"{table.caption}\n" if table.caption else ""
    return above + "\n\n".join(part.to_string(index=False) for part in parts)
