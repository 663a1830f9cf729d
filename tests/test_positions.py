"""Figures by position: bins hold every token once, means and errors are NumPy's, tables and pictures show them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from simquant import plots, position_plots, positions, tables

GAPS = ("kl", "kl_se", "delta_nll", "delta_nll_se")


@given(st.integers(1, 5000))
def test_every_context_length_is_in_one_bin(predicted):
    found = positions.bins(predicted)
    assert [length for first, last in found for length in range(first, last + 1)] == [*range(1, predicted + 1)]
    assert all(math.log2(first).is_integer() for first, _ in found)
    assert all(last == 2 * first - 1 for first, last in found[:-1])


@given(st.integers(1, 70), st.lists(st.integers(1, 3), max_size=2))
def test_sums_are_those_of_a_loop(predicted, shape):
    x = torch.randn(*shape, predicted, dtype=torch.float32) * 1e4
    known = np.zeros((*shape, len(positions.bins(predicted))))
    for place in range(predicted):
        known[..., int(math.log2(place + 1))] += x[..., place].double().numpy()
    np.testing.assert_allclose(positions.position_sums(x).numpy(), known, rtol=1e-12, atol=1e-9)


def measured(windows=7, predicted=100):
    """Losses, divergences and losses of the unquantized model [windows,predicted]."""
    baseline = torch.rand(windows, predicted, dtype=torch.float64) * 4
    return baseline + torch.randn_like(baseline) / 10 + 0.02, torch.rand_like(baseline) / 9, baseline


def test_means_and_errors_are_those_of_numpy():
    nll, kl, baseline = measured()
    found = positions.by_position(*map(positions.position_sums, (nll, kl, baseline)), 100)
    assert [(each["first"], each["last"], each["tokens"]) for each in found[-2:]] == [(32, 63, 224), (64, 100, 259)]
    for each in found:
        part = slice(each["first"] - 1, each["last"])
        assert each["nll"] == pytest.approx(nll[:, part].mean().item())
        for name, tokens in (("kl", kl), ("delta_nll", nll - baseline)):
            means = tokens[:, part].numpy().mean(1)
            assert each[name] == pytest.approx(means.mean())
            assert each[f"{name}_se"] == pytest.approx(means.std(ddof=1) / np.sqrt(7))


@given(st.integers(1, 300), st.integers(1, 5))
def test_figures_weighted_by_tokens_are_the_mean_of_all(predicted, windows):
    nll, kl, baseline = measured(windows, predicted)
    found = positions.by_position(*map(positions.position_sums, (nll, kl, baseline)), predicted)
    for name, tokens in {"nll": nll, "kl": kl, "delta_nll": nll - baseline}.items():
        total = math.fsum(each["tokens"] * each[name] for each in found)
        assert total / tokens.numel() == pytest.approx(tokens.mean().item(), abs=1e-12)
    assert all((each["kl_se"] is None) == (each["delta_nll_se"] is None) == (windows == 1) for each in found)


def test_what_is_not_compared_has_no_divergence_and_no_increase():
    nll, kl, _ = map(positions.position_sums, measured())
    found = positions.by_position(nll, kl + math.nan, None, 100)
    assert all(each[name] is None for each in found for name in GAPS) and found[0]["nll"] is not None


def rows_of(count, datasets=1, compared=True, windows=5, shift=0.0):
    """Rows as a report has them: the unquantized one, and others that hurt more and more."""
    rows = []
    for number in range(datasets):
        nll, kl, baseline = measured(windows)
        for place in range(count + 1):
            sums = map(positions.position_sums, (baseline + place * (nll - baseline + shift), place * kl, baseline))
            nlls, kls, base = sums
            given = (nlls, kls, base, 100) if compared else (nlls, kls + math.nan, None, 100)
            label = {"format": f"format{place}", "abits": 4, "quantized": "keys"} if place else UNQUANTIZED
            rows.append({"dataset": f"text{number}.txt", **label, "by_position": positions.by_position(*given)})
    return rows


def text_of_all(rows):
    """The tables of rows as text."""
    return "\n\n".join(map(tables.text_of, positions.tables_of(rows)))


UNQUANTIZED = {"format": "unquantized", "abits": 16, "quantized": "nothing"}


def without(row):
    """The row with nothing known but its loss."""
    return row | {"by_position": [each | dict.fromkeys(GAPS) for each in row["by_position"]]}


def test_the_table_has_a_line_for_each_row_and_figure():
    rows = rows_of(2, datasets=2)
    blocks = [block.splitlines() for block in text_of_all(rows).split("\n\n")]
    names = [positions.FIGURES[name][0] for name in ("delta_nll", "delta_nll_se", "kl")]
    assert [lines[0] for lines in blocks] == [f"text{number}.txt: {name}" for number in range(2) for name in names]
    for lines in blocks:
        assert lines[1].split() == ["tokens", "before", "1", "2-3", "4-7", "8-15", "16-31", "32-63", "64-100"]
        assert [line.split()[:3] for line in lines[2:]] == [[f"format{each}", "4-bit", "keys"] for each in (1, 2)]
        assert len({*map(len, lines[1:])}) == 1
    known = [f"{each['delta_nll']:+.5f}" for each in rows[5]["by_position"]]
    assert blocks[3][3].split()[3:] == known


def test_a_table_of_what_is_not_compared_has_the_losses():
    lines = text_of_all(rows_of(1, compared=False)).splitlines()
    assert lines[0] == "text0.txt: loss in nats" and [line.split()[0] for line in lines[2:]] == [
        "unquantized",
        "format1",
    ]
    assert text_of_all([]) == text_of_all([UNQUANTIZED | {"dataset": "a.txt"}]) == ""
    alone = text_of_all(rows_of(1, windows=1))
    assert "standard error" not in alone and "KL divergence" in alone


@pytest.mark.parametrize("datasets", [1, 2])
@pytest.mark.parametrize("count", [1, 4, 12])
def test_lines_are_the_figures_of_the_rows(tmp_path, datasets, count):
    rows = rows_of(count, datasets, shift=-0.05)
    rows += [without(rows[1]) | {"format": "unknown"}]
    figure = position_plots.draw_positions(rows, "a title")
    plots.save_figure(str(tmp_path / "a.png"), figure)
    assert len(figure.axes) == 2 * datasets and figure.get_suptitle() == "a title"
    mine = [row for row in rows if row["dataset"] == "text0.txt" and row["abits"] == 4 and row["format"] != "unknown"]
    for axes, name in zip(figure.axes[:2], ("delta_nll", "kl"), strict=True):
        assert [list(each.lines[0].get_ydata()) for each in axes.containers] == [
            [entry[name] for entry in row["by_position"]] for row in mine
        ]
        low, high = axes.get_ylim()
        assert all(low < each[name] < high for row in mine for each in row["by_position"])
        middles = [math.sqrt(first * last) for first, last in positions.bins(100)]
        assert list(axes.containers[0].lines[0].get_xdata()) == middles
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"format{n + 1} 4-bit keys" for n in range(count)
    ]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line, *_ in figure.axes[0].containers]
    assert len({*looks}) == count and figure.axes[1].get_yscale() == "log"
    box = figure.legends[0].get_window_extent()
    assert all(figure.bbox.contains(*corner) for corner in box.corners())
    assert not any(box.overlaps(axes.bbox) for axes in figure.axes)


@pytest.mark.parametrize(
    "rows",
    [[], [UNQUANTIZED | {"dataset": "a.txt"}], rows_of(1, windows=1), rows_of(2, compared=False), rows_of(0)],
    ids=["none", "unknown", "one window", "not compared", "unquantized"],
)
def test_odd_rows_are_drawn(tmp_path, rows):
    figure = position_plots.draw_positions(rows)
    plots.save_figure(str(tmp_path / "a.svg"), figure)
    is_compared = any(row["abits"] == 4 and row["by_position"][0]["kl"] for row in rows)
    assert len(figure.axes) == 1 + is_compared and len(figure.legends) == any("by_position" in row for row in rows)


def test_zeros_are_drawn_without_a_word(tmp_path, recwarn):
    rows = rows_of(1)
    for each in rows[1]["by_position"]:
        each.update(dict.fromkeys(GAPS, 0.0))
    plots.save_figure(str(tmp_path / "a.png"), position_plots.draw_positions(rows))
    assert [str(each.message) for each in recwarn] == []


def test_thirty_rows_of_many_magnitudes_keep_their_looks_and_room(tmp_path):
    rows = rows_of(30, shift=-0.01)
    for number, row in enumerate(rows[1:]):
        for each in row["by_position"]:
            each.update({name: each[name] * 1.6**number for name in GAPS})
    figure = position_plots.draw_positions(rows, "a title")
    plots.save_figure(str(tmp_path / "a.png"), figure)
    left = figure.axes[0]
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line, *_ in left.containers]
    assert len({*looks}) == 30 and left.get_yscale() == "symlog"
    places = left.transAxes.inverted().transform(
        left.transData.transform([(1, value) for line, *_ in left.containers for value in line.get_ydata()])
    )[:, 1]
    assert 0.06 < places.min() < 0.2 and 0.8 < places.max() < 0.96  # no room is lost, and nothing touches the edge
    assert all(axes.bbox.height > 2.5 * figure.dpi for axes in figure.axes)
