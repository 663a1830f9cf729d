"""What the page of --report shows: which tables and pictures, in which order, and the words around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from simquant import tables
from simquant.files import failure_of, write_atomically
from simquant.page import Page, Picture, render
from simquant.presentation import More, Rows, in_order, pictures_of, tables_beside
from simquant.tables import UNQUANTIZED, Table

TAILS = (
    "avg_bits", "kl", "kl_se", "kl_median", "kl_median_low", "kl_median_high", "kl_p99", "kl_p99_low", "kl_p99_high",
    "kl_p999", "kl_p999_low", "kl_p999_high", "kl_max", "rms_dp", "rms_dp_se", "top1_agreement", "top1_agreement_se",
)  # fmt: skip
UNITS = (
    "ppl", "ppl_se", "nll", "bits_per_byte", "bits_per_byte_se", "word_ppl", "word_ppl_se", "accuracy", "accuracy_se",
    "windows", "tokens",
)  # fmt: skip
SIZES = ("avg_bits", "key_bits", "value_bits", "cache_gib", "fp16_cache_gib", "constants_gib")
NOTES = {  # what stands below a table
    "cost": "± is a standard error over windows. Δ is the difference from the unquantized model on the same tokens. "
            "KL is the mean Kullback-Leibler divergence of a token's predictions in nats, KL99% its 99 % quantile. "
            "RMSΔp is the root mean square of the change of the right token's probability, top-1 the share of tokens "
            "whose likeliest successor stays the same.",
    "front": "* is on the Pareto front: no other row has at most these bits and this Δppl, and less of one.",
    "tails": "From and to are the ends of a 95 % bootstrap interval over windows.",
    "units": "Bits per byte and word perplexity do not depend on the tokenizer, as lm-evaluation-harness defines them.",
}  # fmt: skip
CAPTIONS = {  # {flag that draws: (caption, what it shows, for those who do not see it)}
    "plot": ("Cost over size", "What each row costs, as in the tables above."),
    "plot_positions": ("Cost over the position in the window", "The tables by position above, as curves."),
    "plot_retrieval": ("Retrieval by depth and length", "The table of retrieval above, as a map."),
}


def of_one_text(rows: Rows, columns: Sequence[str], caption: str, note: str = "") -> Table:
    """Return a table of rows of one text, without its name, with marks in place of stars."""
    table, best = tables.table_of(rows, columns, caption), tables.front(rows)
    lines = [[cell.rstrip("* ") if at == 0 else cell for at, cell in enumerate(line[1:])] for line in table.rows]
    star = f" {NOTES['front']}" if best and note == NOTES["cost"] and len(tables.formats_of(rows)) > 1 else ""
    return replace(
        table, headings=table.headings[1:], rows=lines, labels=table.labels - 1, note=note + star,
        marked=best if star else (),
    )  # fmt: skip


def tables_of(flags, rows: Rows, more: More) -> list[Table]:
    """Return all tables of a page, text by text, then what else was measured."""
    made: list[Table] = []
    names = tables.short_names(list(dict.fromkeys(row["dataset"] for row in rows)))
    for dataset, name in names.items():
        mine = in_order(flags, [row for row in rows if row["dataset"] == dataset])
        made.append(of_one_text(mine, flags.columns, f"{name}: perplexity and size", NOTES["cost"]))
        compared = [row for row in mine if row["delta_ppl"] is not None and row["abits"] != UNQUANTIZED]
        if compared:
            made.append(of_one_text(compared, TAILS, f"{name}: tails", NOTES["tails"]))
        made.append(of_one_text(mine, UNITS, f"{name}: other units", NOTES["units"]))
        made.append(of_one_text(mine, SIZES, f"{name}: what is stored"))
    return [*made, *tables_beside(rows, more, by_position=True)]


def words_of(value: Any) -> str:
    """Return a setting as words."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if value is None or isinstance(value, bool):
        return "none" if value is None else "yes" if value else "no"
    return str(value)


def pairs_of(records: Sequence[Mapping], name: str) -> dict[str, str]:
    """Return {setting: words} of all records; values that differ between them stand beside each other."""
    every: dict[str, list[str]] = {}
    for record in records:
        for key, value in record.get(name, {}).items():
            flat = value.items() if isinstance(value, dict) else [("", value)]
            for part, each in flat:
                words = every.setdefault(f"{key} {part}".strip(), [])
                words += [words_of(each)] if words_of(each) not in words else []
    return {key: " | ".join(words) for key, words in every.items()}


def lead_of(rows: Rows) -> str:
    """Return a sentence of what was found on the first text: the first rows of the Pareto front, by falling bits."""
    text = rows[0]["dataset"]
    mine = [row for row in rows if row["dataset"] == text]
    best = sorted((mine[number] for number in tables.front(mine)), key=lambda row: -row["avg_bits"])
    told = [f"{percent_of(row)} at {row['avg_bits']:.2f} bits ({tables.name_of(row)})" for row in best[:4]]
    name = tables.short_names(list(dict.fromkeys(row["dataset"] for row in rows)))[text]
    start = f"What a smaller KV cache costs this model in perplexity on {name}"
    return f"{start}: {', '.join(told)}. These are on the Pareto front." if told else f"{start}."


def percent_of(row: Mapping[str, Any]) -> str:
    """Return by how much a row's perplexity grows, with its standard error, on one line."""
    error = "" if row["delta_percent_se"] is None else f" ± {row['delta_percent_se']:.2f}"
    return f"{row['delta_percent']:+.2f}{error} %".replace(" ", "\N{NO-BREAK SPACE}")


def content(flags, records: Sequence[Mapping], rows: Rows, more: More) -> Page:
    """Return the page of rows that records, the reports they stand in, tell of."""
    from simquant.plots import svg_of

    pictures = [
        Picture(CAPTIONS[name][0], svg_of(draw()), CAPTIONS[name][1])
        for name, draw in pictures_of(rows, more, records[0].get("title", "")).items()
    ]
    first, commands = rows[0], [record["command"] for record in records if "command" in record]
    facts = {
        "model": records[0]["model"], "text": ", ".join(dict.fromkeys(row["dataset"] for row in rows)),
        "windows": str(first["windows"]), "tokens a window": str(first["tokens"] // max(1, first["windows"]) + 1),
    }  # fmt: skip
    unfinished = [record for record in records if record.get("complete") is False]
    notes = ["Quantization is simulated: this tells accuracy, and neither speed nor memory."]
    notes += ["Some of these figures are of a run that is not finished."] * bool(unfinished)
    return Page(
        title=f"KV cache of {str(records[0]['model']).rstrip('/').rpartition('/')[2]}", lead=lead_of(rows),
        command="\n".join(commands), settings=pairs_of(records, "settings"),
        tables=tables_of(flags, rows, more), pictures=pictures, environment=pairs_of(records, "environment"),
        notes=notes, facts=facts,
    )  # fmt: skip


def save(flags, records: Sequence[Mapping], rows: Rows, more: More) -> OSError | None:
    """Write the page that --report names, if it does. Return why that failed."""
    if flags.report is None or not rows:
        return None
    text = render(content(flags, records, rows, more)).encode()
    return failure_of(lambda: write_atomically(flags.report, lambda file: file.write(text)))
