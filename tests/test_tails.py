"""Tails: quantiles against a sort of all tokens, intervals that cover, and sketches that are read with care."""

import base64
import contextlib
import math
import statistics
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quant_utils as qu
from quant_utils import ScalarQuantizer
from simquant import positions, report, summary, tails
from simquant.plans import Row
from simquant.sites import find_sites

SHARES = (0.5, 0.99, 0.999, 0.0, 1.0)
WIDTH = 1 / tails.PARTS  # of a bin, relative to where it begins, at most


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4000), st.floats(-8, 2), st.floats(0, 3))
def test_quantiles_are_those_of_a_sort_of_all_tokens(seed, windows, tokens, place, spread):
    x = torch.randn(windows, tokens, generator=torch.Generator().manual_seed(seed)).mul(spread).add(place).exp()
    x = x.clamp(max=60)
    found = tails.quantiles(tails.bin_counts(x).sum(0), SHARES)
    expected = x.double().flatten().quantile(torch.tensor(SHARES, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=WIDTH, atol=2.0**tails.LEAST)


def test_many_tokens_have_quantiles_far_closer_than_a_bin_is_wide():
    x = torch.randn(200_000).mul(2).sub(5).exp()
    found = tails.quantiles(tails.bin_counts(x), (0.5, 0.99))
    expected = x.double().quantile(torch.tensor([0.5, 0.99]).double())
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)


def test_what_is_zero_beyond_all_bins_or_too_little_is_counted_at_an_end():
    counts = tails.bin_counts(torch.tensor([0.0, 1e-9, 2.0**-26, 1.0, 63.9, 64.0, 1e30, math.inf]))
    assert counts[[0, 1, -2, -1]].tolist() == [2, 1, 0, 4] and counts.sum() == 8
    edges = tails.bin_edges()
    assert (edges.diff() > 0).all() and edges[0] == 0 and edges[1] == 2**-26 and edges[-1] == 64
    assert tails.quantiles(tails.bin_counts(torch.zeros(3)), SHARES).tolist() == [0.0] * 5
    inside = tails.bin_counts(edges[1:-1].float())  # where a bin begins belongs to it
    assert inside[0] == 0 and (inside[1:] == 1).all()


@given(st.lists(st.tuples(st.integers(0, tails.BINS - 1), st.integers(0, 2**31)), max_size=9))
def test_counts_come_back_from_their_text(pairs):
    counts = torch.zeros(tails.BINS, dtype=torch.long)
    for place, count in pairs:
        counts[place] = count
    assert torch.equal(tails.unpacked(tails.packed(counts)), counts)


BOMB = base64.b64encode(zlib.compress(bytes(2**28))).decode()


@pytest.mark.parametrize("text", [BOMB, "", "x", None, 3, "AAAA", "é", base64.b64encode(zlib.compress(b"12")).decode()])
def test_what_is_no_sketch_is_said_to_be_none(text):
    with pytest.raises(ValueError, match="holds no"):
        tails.unpacked(text)


@given(st.one_of(st.text(max_size=40), st.binary(max_size=40).map(lambda each: base64.b64encode(each).decode())))
def test_any_text_is_a_sketch_or_a_value_error(text):
    with contextlib.suppress(ValueError):
        assert tails.unpacked(text).shape == (tails.BINS,)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    """Log-normal tokens whose windows differ; the median and the 99 % quantile of all of them are known."""
    within, between, truth = 1.0, 0.4, statistics.NormalDist(-3, math.hypot(1.0, 0.4))
    expected = [math.exp(truth.inv_cdf(q)) for q in (0.5, 0.99)]
    hits, trials = torch.zeros(2), 200
    for seed in range(trials):
        generator = torch.Generator().manual_seed(seed)
        shift = torch.randn(60, 1, generator=generator) * between
        x = (torch.randn(60, 300, generator=generator) * within + shift - 3).exp()
        low, high = tails.intervals(tails.bin_counts(x), x.amax(1), (0.5, 0.99))
        assert low[2] <= high[2] == x.max()
        hits += torch.tensor([low[n] <= expected[n] <= high[n] for n in range(2)]).float()
    assert (hits / trials >= 0.89).all() and (hits / trials <= 0.99).all(), hits / trials


def test_a_bootstrap_is_one_over_windows_drawn_anew():
    """By a plain loop over the same draws, on the tokens themselves."""
    x = torch.randn(7, 40).exp()
    draws = torch.randint(7, (tails.DRAWS, 7), generator=torch.Generator().manual_seed(0))
    medians = torch.stack([x[drawn].flatten().double().quantile(0.5) for drawn in draws])
    greatest = torch.stack([x[drawn].max() for drawn in draws]).double()
    low, high = tails.intervals(tails.bin_counts(x), x.amax(1), (0.5,))
    for found, share in ((low, 0.025), (high, 0.975)):
        assert found[0].item() == pytest.approx(medians.quantile(share).item(), rel=2 * WIDTH)
        assert found[1].item() == pytest.approx(greatest.quantile(share).item(), rel=1e-6)


def test_rows_have_the_tails_of_all_their_tokens_and_positions_that_sum_to_the_mean(model, windows):
    """The bundled model in 3 bits: against a sort, and against sums, of what the loop gives of single tokens."""
    found, ids = find_sites(model), windows[:5]
    settings = {Row("unquantized", 16, "nothing"): {}}
    settings[Row("uniform", 3, "keys and values")] = dict.fromkeys(found, ScalarQuantizer("token", 3))
    run = report.Run({"a": ids}, list(settings), found, 1024, by_position=True)
    tokens = []
    for measured in qu.evaluate(model, found, ids, list(settings.values()), batch_size=2):
        run.add("a", run.kept(measured), 1.0)
        tokens.append(measured.tokens[:, 1])
    whole = dict(zip(qu.STATISTICS, torch.cat(tokens).double().unbind(1), strict=True))  # [5,511] each
    base, row = report.results(run, "a")
    ranked = whole["kl"].flatten().sort().values
    for name, share in summary.SHARES.items():
        assert row[name] == pytest.approx(ranked.quantile(share).item(), rel=WIDTH)
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert row["kl_max"] == pytest.approx(ranked[-1].item(), rel=1e-6) and row["kl_max_low"] <= row["kl_max"]
    assert row["rms_dp"] == pytest.approx(whole["squared_change"].mean().sqrt().item(), rel=1e-6)
    each = whole["squared_change"].mean(1).sqrt()  # of single windows: to first order as far apart as their squares say
    assert row["rms_dp_se"] == pytest.approx(each.std().item() / 5**0.5, rel=0.2)
    for name in ("kl", "top1_agreement", "accuracy"):
        assert row[name] == pytest.approx(whole[name].mean().item(), rel=1e-6)
        assert row[f"{name}_se"] == pytest.approx(whole[name].mean(1).std().item() / 5**0.5, rel=1e-6)
    assert [(each["first"], each["last"]) for each in row["by_position"]] == positions.bins(511)
    for name, mean in (("kl", row["kl"]), ("nll", row["nll"]), ("delta_nll", row["nll"] - base["nll"])):
        total = math.fsum(each[name] * each["tokens"] for each in row["by_position"])
        assert total / (5 * 511) == pytest.approx(mean, rel=1e-6)
    fourth = row["by_position"][3]  # 8 to 15 tokens before the predicted one
    assert fourth["kl"] == pytest.approx(whole["kl"][:, 7:15].mean().item(), rel=1e-6)
    assert (base["kl_p999"], base["kl_max"], base["rms_dp"], base["rms_dp_se"]) == (0, 0, 0, None)
