"""What a run, or saved reports, show of their rows: tables as text, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from quant_utils import UserError
from simquant import positions, tables
from simquant.files import failure_of
from simquant.tables import UNQUANTIZED, Table

Rows = Sequence[Mapping[str, Any]]
More = Mapping[str, Rows]  # see report.more_results


def tables_beside(rows: Rows, more: More, by_position: bool) -> list[Table]:
    """Return the tables of what is measured besides the figures of texts."""
    made = positions.tables_of(rows) if by_position else []
    if "retrieval" in more:
        from simquant import retrieval_tables

        made.append(retrieval_tables.table_of(more["retrieval"]))
    if "tasks" in more:
        from simquant import tasks

        made.append(tasks.table_of(more["tasks"]))
    return made


def print_rows(flags, rows: Rows, more: More, context: int | None) -> None:
    """Print the table of rows and what its columns are, then what else is measured; context is None if they differ."""
    print(tables.table(in_order(flags, rows), flags.columns))
    is_paired = any(row["delta_ppl"] is not None for row in rows)
    against = "Δ: from the unquantized model, on the same tokens; KL in nats; " if is_paired else ""
    size = f"a cache of {context} tokens" if context else "the cache of each report's tokens"
    print(f"\n±: standard error; {against}GiB: of {size}")
    if is_paired and {"kl_p99", "rms_dp"} & {*flags.columns}:
        print("KL99%: what the KL of 1 % of the tokens exceeds; RMSΔp: RMS change of the right token's probability")
    if len(tables.formats_of(rows)) > 1 and tables.front(rows):
        print("*: Pareto front: no other row of the text has at most these bits and this Δppl, and less of one")
    for table in tables_beside(rows, more, flags.by_position):
        print(f"\n{tables.text_of(table)}" + (f"\n{table.note}" if table.note else ""))


def in_order(flags, rows: Rows) -> Rows:
    """Return rows in the order that --sort asks for: by bits if several formats are compared."""
    return tables.sorted_rows(rows, flags.sort or ("bits" if len(tables.formats_of(rows)) > 1 else "given"))


def pictures_of(rows: Rows, more: More, title: str) -> dict[str, Callable[[], Any]]:
    """Return {flag: what draws that picture} of all that there is to draw of rows."""
    from simquant import plots, position_plots

    made: dict[str, Callable[[], Any]] = {}
    if any(row["abits"] != UNQUANTIZED for row in rows):
        made["plot"] = lambda: plots.draw_rows(rows, title)
    if measured := [row for row in rows if "by_position" in row]:
        made["plot_positions"] = lambda: position_plots.draw_positions(measured, title)
    if "retrieval" in more:
        from simquant import retrieval_tables

        made["plot_retrieval"] = lambda: retrieval_tables.draw_retrieval(more["retrieval"], title)
    return made


def draw(flags, rows: Rows, more: More, title: str) -> list[OSError]:
    """Save the pictures that flags ask for. Return why some could not be written."""
    from simquant import plots

    asked = {name: getattr(flags, name) for name in ("plot", "plot_positions", "plot_retrieval")}
    known = pictures_of(rows, more, title)
    if lacking := [name for name, path in asked.items() if path is not None and name not in known]:
        raise UserError(f"--{lacking[0]}: there is nothing of that kind among these figures")
    saves = [partial(plots.save_figure, path, known[name]()) for name, path in asked.items() if path is not None]
    return [failure for failure in map(failure_of, saves) if failure is not None]
