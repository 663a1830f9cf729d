"""Levels of all components at once, and reverse water-filling: against brute force and an exhaustive search."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from simquant import faster_cpu
from simquant.formats.allocation import chosen_levels, error_of, kmeans_tables, sorted_rows, water_fill


def best_error(values, count):
    """Return the least mean squared error of count levels: over all ways to cut sorted values into intervals."""
    cuts = itertools.combinations(range(1, len(values)), min(count, len(values)) - 1)
    parts = (np.split(values, list(each)) for each in cuts)
    return min(sum(((part - part.mean()) ** 2).sum() for part in each) for each in parts) / len(values)


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_no_table_is_better_than_every_cut_and_one_level_is_the_mean(seed, count):
    columns = torch.randn(3, count, generator=torch.Generator().manual_seed(seed)).sort(1).values
    levels, error = kmeans_tables(columns, 2)
    torch.testing.assert_close(levels[:, 0], columns.mean(1), atol=1e-6, rtol=1e-5)
    for row, errors in zip(columns.double().numpy(), error, strict=True):
        least = [best_error(row, 2**width) for width in range(3)]
        assert errors[0] == pytest.approx(least[0], abs=1e-6)
        assert all(found >= best - 1e-6 for found, best in zip(errors.tolist(), least, strict=True))


def test_the_error_is_that_of_the_nearest_levels_and_close_to_sklearns_best_of_ten():
    generator = torch.Generator().manual_seed(0)
    columns = torch.stack([torch.randn(2000, generator=generator), torch.randn(2000, generator=generator) ** 3])
    levels, error = kmeans_tables(columns.sort(1).values, 4)
    for component, width in itertools.product(range(2), range(5)):
        own = levels[component, 2**width - 1 : 2 ** (width + 1) - 1].double()
        assert torch.equal(own, own.sort().values)
        nearest = (columns[component].double()[:, None] - own).square().amin(1).mean()
        assert nearest * (1 - 1e-6) <= error[component, width] <= 1.02 * nearest  # levels move after the last count
        peer = KMeans(2**width, n_init=10, random_state=0).fit(columns[component][:, None].numpy()).inertia_ / 2000
        assert error[component, width] <= (1.02, 1.25)[component] * peer


def test_numpy_sorts_as_torch_does():
    x = torch.randn(5, 3000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(faster_cpu.sorted_rows(x), sorted_rows(x)) and torch.equal(sorted_rows(x), x.sort(1).values)


def test_chosen_levels_stand_one_component_after_another():
    levels = torch.arange(21.0).view(3, 7)  # of 0, 1 and 2 bits: 1 + 2 + 4
    assert chosen_levels(levels, torch.tensor([2, 0, 1])).tolist() == [3, 4, 5, 6, 7, 15, 16]


def exhaustive(distortion, budget):
    """Return the least sum of errors of all widths that sum to budget."""
    count, most = distortion.shape[0], distortion.shape[1] - 1
    splits = (each for each in itertools.product(range(most + 1), repeat=count) if sum(each) == budget)
    return min(sum(distortion[place, width].item() for place, width in enumerate(each)) for each in splits)


tables = st.integers(1, 4).flatmap(
    lambda count: st.lists(st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4), min_size=count, max_size=count)
)


@given(tables, st.floats(0.1, 3))
def test_water_filling_is_the_exhaustive_search_where_each_bit_earns_less_than_the_one_before(gains, bits):
    falling = torch.tensor(gains).sort(1, descending=True).values[:, :3]
    distortion = torch.cat([falling, torch.zeros(len(gains), 1)], 1).flip(1).cumsum(1).flip(1)
    widths = water_fill(distortion, bits)
    assert widths.sum() == round(bits * len(gains)) and widths.min() >= 0 and widths.max() <= 3
    assert error_of(distortion, widths) == pytest.approx(exhaustive(distortion, int(widths.sum())), abs=1e-6)


@given(tables, st.sampled_from([1, 2, 3]))
def test_whatever_the_errors_shared_bits_are_never_worse_than_equal_ones(errors, bits):
    distortion = torch.tensor(errors).sort(1, descending=True).values
    widths = water_fill(distortion, bits)
    assert widths.sum() == bits * len(errors)
    assert error_of(distortion, widths) <= error_of(distortion, torch.full((len(errors),), bits)) + 1e-9


def test_two_bits_that_pay_only_together_are_given_together():
    distortion = torch.tensor([[1.0, 0.99, 0.0], [0.5, 0.4, 0.35]])
    assert water_fill(distortion, 1).tolist() == [2, 0]
