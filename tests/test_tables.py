"""The table of formats: its order, its columns, and which rows no other beats."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from quant_utils import FIGURES, STATISTICS, Measured, Site
from simquant import describe, presentation, report, tables
from simquant.plans import Row

DATASETS = ("a.txt", "b.txt")
FEW = st.one_of(st.none(), st.sampled_from([0.0, -0.5, 0.25, 1.0, 2.0]))  # so that there are ties


def row(dataset="a.txt", format="unquantized", bits=16.0, delta=0.0, abits=4):
    """A row as far as orders and fronts look at it; without an increase, nothing was compared."""
    ppl = 9.0 + (1.0 if delta is None else delta)
    abits = 16 if format == "unquantized" else abits
    figures = {"avg_bits": bits, "ppl": ppl, "delta_ppl": delta, "kl": None}
    return {"dataset": dataset, "format": format, "abits": abits, "quantized": "keys and values", **figures}


ROWS = st.lists(st.builds(row, st.sampled_from(DATASETS), st.sampled_from(["unquantized", *"pqr"]), FEW, FEW))


@given(ROWS)
def test_the_front_is_what_no_other_row_beats(rows):
    found = tables.front(rows)
    for number, mine in enumerate(rows):
        known = mine["abits"] != 16 and mine["avg_bits"] is not None and mine["delta_ppl"] is not None
        for other in rows:
            if other["abits"] == 16 or other["dataset"] != mine["dataset"] or not known:
                continue
            bits, delta = other["avg_bits"], other["delta_ppl"]
            if bits is not None and delta is not None and bits <= mine["avg_bits"] and delta <= mine["delta_ppl"]:
                known = not (bits < mine["avg_bits"] or delta < mine["delta_ppl"])
        assert (number in found) == known


def test_a_front_by_hand():
    bits_and_deltas = [(8, 0.0), (4, 0.5), (4, 0.7), (5, 0.5), (3, 2.0), (4, 0.5), (9, 0.0), (None, 0.0), (2, None)]
    rows = [row(), *(row(format="q", bits=bits, delta=delta) for bits, delta in bits_and_deltas)]
    assert tables.front(rows) == {1, 2, 5, 6} and tables.front(rows[:1]) == tables.front([]) == set()
    rows += [row("b.txt", "q", 1, -1.0)]  # of another dataset: beats nothing here
    assert tables.front(rows) == {1, 2, 5, 6, 10}


@given(ROWS, st.sampled_from([*tables.SORTS]))
def test_rows_are_in_the_order_that_is_asked_for(rows, by):
    rows = [each | {"number": number} for number, each in enumerate(rows)]
    found = tables.sorted_rows(rows, by)
    assert sorted(each["number"] for each in found) == [*range(len(rows))]
    datasets = [each["dataset"] for each in found]
    assert [name for name, _ in itertools.groupby(datasets)] == [*dict.fromkeys(each["dataset"] for each in rows)]
    first, second = ("delta_ppl", "avg_bits") if by == "delta_ppl" else ("avg_bits", "delta_ppl")
    for one, other in itertools.pairwise(found):
        if one["dataset"] != other["dataset"]:
            continue
        assert one["abits"] == 16 or other["abits"] != 16
        if (one["abits"] == 16) != (other["abits"] == 16) or None in (one["delta_ppl"], other["delta_ppl"]):
            continue
        pairs = [(one[name], other[name]) for name in (first, second) if by != "given"]
        pairs = [(mine, theirs) for mine, theirs in pairs if mine != theirs]
        if not pairs:
            assert one["number"] < other["number"]
        elif None in pairs[0]:
            assert pairs[0][1] is None
        else:
            assert pairs[0][0] < pairs[0][1]


def test_an_order_by_hand():
    places = {"p": (4, 0.2), "q": (3, 0.3), "r": (4, 0.1), "s": (3.5, 0.1), "t": (None, 0.1), "u": (2, None)}
    rows = [row(format=name, bits=bits, delta=delta) for name, (bits, delta) in places.items()]
    for by, known in (("given", "pqrstu"), ("bits", "uqsrpt"), ("delta_ppl", "srtpqu")):
        found = tables.sorted_rows([*rows, row("b.txt", "p"), row("b.txt"), row()], by)
        assert [each["format"] for each in found] == ["unquantized", *known, "unquantized", "p"]


def test_without_a_baseline_the_order_is_that_of_perplexities():
    rows = [row(format=name, delta=None, bits=4) | {"ppl": ppl} for name, ppl in (("p", 9.0), ("q", 7.0), ("r", 8.0))]
    assert [each["format"] for each in tables.sorted_rows(rows, "delta_ppl")] == ["q", "r", "p"]
    assert [each["format"] for each in tables.sorted_rows(rows, "bits")] == ["q", "r", "p"]  # all of 4 bits


def table(rows):
    """Return [[cell]] of the table, its headings first."""
    return [line.split() for line in tables.table(rows, ("avg_bits", "delta_ppl")).splitlines()]


def test_formats_have_a_column_and_stars_on_the_front():
    rows = [row(), row(format="q8_0", bits=8.5, delta=0.01, abits=8), row(format="q4_0", bits=4.5, delta=0.2)]
    rows += [row(format="q4_0/q8_0", bits=6.5, delta=0.3, abits="4/8")]
    assert table(rows) == [
        ["text", "format", "abits", "bits", "Δppl"],
        ["a.txt", "unquantized", "16", "16.000", "-"],
        ["a.txt", "q8_0*", "8", "8.500", "+0.0100"],
        ["a.txt", "q4_0*", "4", "4.500", "+0.2000"],
        ["a.txt", "q4_0/q8_0", "4/8", "6.500", "+0.3000"],
    ]
    lines = tables.table(rows, ("avg_bits",)).splitlines()[1:]
    names = [each["format"] for each in rows]
    ends = [line.index(f" {name}") + len(name) for name, line in zip(names, lines, strict=True)]
    assert len({*ends}) == 1  # names end in one column, with a star or without
    alone = table([rows[0], rows[1], rows[1] | {"abits": 4}])  # one format in two widths
    assert alone[0] == ["text", "abits", "bits", "Δppl"] and "*" not in str(alone)
    unpaired = table([each | {"delta_ppl": None} for each in rows[1:]])
    assert [line[1] for line in unpaired] == ["format", "q8_0", "q4_0", "q4_0/q8_0"]


@pytest.mark.parametrize(("formats", "starred"), [(["q8_0", "nf"], True), (["nf", "nf"], False)])
def test_results_say_their_format_and_the_star_is_explained(monkeypatch, capsys, formats, starred):
    rows = [Row("unquantized", 16, "nothing"), *(Row(name, 8 - i, "keys") for i, name in enumerate(formats))]
    sites = [Site(0, part, part, nn.Identity(), 8) for part in ("keys", "values")]
    run = report.Run({"a": torch.zeros(4, 9)}, rows, sites, 64)
    figures, tokens = torch.rand(4, 3, len(FIGURES), dtype=torch.float64), torch.rand(4, 3, len(STATISTICS), 8)
    run.add("a", run.kept(Measured(figures, tokens)), 1.0)
    assert [each["format"] for each in report.results(run, "a")] == ["unquantized", *formats]
    for name in ("print_settings", "print_hybrid"):
        monkeypatch.setattr(describe, name, lambda *given: None)
    flags = SimpleNamespace(columns=tables.USUAL, sort=None, by_position=False, quantizes=lambda: True)
    presentation.print_rows(flags, report.all_results(run), {}, run.context)
    describe.print_what_was_measured(None, None, flags, {}, run)
    printed = capsys.readouterr().out
    assert ("*: Pareto front" in printed) == ("*" in printed.split("\n\n")[0]) == starred
