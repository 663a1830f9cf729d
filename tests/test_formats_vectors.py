"""HIGGS, AQUA-KV and coupled quantization against exhaustive searches, published grids, scikit-learn and counts."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, SAMPLE, run_script
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans
from torch import nn

from quant_utils import Site, UserError
from simquant.formats import coupled, higgs
from simquant.formats.coupled import CoupledQuantizer
from simquant.formats.heads import signs
from simquant.formats.higgs import HiggsQuantizer
from simquant.formats.lloyd_max import normal_centroids
from simquant.formats.normal_grid import normal_grid
from simquant.plans import Pair, Plan, Width

# -- The points for the normal distribution


@functools.cache
def raster():
    """Return (points [N,2], their weights [N]) of a midpoint rule for N(0, I), turned so that no cell lies along it."""
    line = np.arange(-6.5, 6.5, 0.01) + 0.005
    density = np.exp(-(line**2) / 2) * 0.01 / math.sqrt(2 * math.pi)
    turn = np.array([[math.cos(0.3), math.sin(0.3)], [-math.sin(0.3), math.cos(0.3)]])
    return np.stack(np.meshgrid(line, line), -1).reshape(-1, 2) @ turn, np.outer(density, density).ravel()


def integrated(grid):
    """Return (mean squared error a coordinate, centroids [P,2]) of the cells of grid [P,2], by the raster."""
    points, weights = raster()
    distance, owner = cKDTree(grid).query(points)
    sums = [np.bincount(owner, weights * each, len(grid)) for each in (1, points[:, 0], points[:, 1])]
    return (weights * distance**2).sum() / 2, np.stack(sums[1:], 1) / sums[0][:, None]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_grid_is_stationary_and_as_good_as_the_published_one(bits):
    """Published are those of HIGGS's authors, which transformers has. No code of this rate has an error of 4**-bits."""
    published = pytest.importorskip("transformers.integrations.higgs").get_higgs_grid
    grid = normal_grid(4**bits).numpy()
    error, centroids = integrated(grid)
    assert abs(centroids - grid).max() < 2e-3
    level = normal_centroids(bits).numpy()
    of_product, _ = integrated(np.stack(np.meshgrid(level, level), -1).reshape(-1, 2))
    assert 4.0**-bits < error < of_product * (1.0001 if bits == 1 else 0.95)
    if bits > 1:
        assert error < integrated(published(2, 4**bits).double().numpy())[0] * 1.0001


# -- HIGGS


def decoded_one_by_one(x, grid):
    """Return x [N,C] as HIGGS gives it back: transforms by scipy, norms in numpy's fp16, every distance by itself."""
    size = max(2**n for n in range(11) if x.shape[1] % 2**n == 0)
    matrix = signs(size).numpy()[:, None] * hadamard(size) / math.sqrt(size)
    result = np.zeros_like(x)
    for token, start in np.ndindex(len(x), x.shape[1] // size):
        part = slice(start * size, (start + 1) * size)
        turned = x[token, part] @ matrix
        scale = float(np.float16(np.sqrt((turned**2).mean())))
        pairs = turned.reshape(-1, 1, 2) / scale
        nearest = ((pairs - grid) ** 2).sum(-1).argmin(1)
        result[token, part] = matrix @ (grid[nearest] * scale).ravel()
    return result


@given(st.sampled_from([2, 6, 24, 64, 96, 128, 768, 2048]), st.integers(1, 4), st.integers(0, 99))
def test_higgs_is_an_exhaustive_search_on_a_rotated_token(channels, bits, seed):
    x = torch.randn(2, 3, channels, generator=torch.Generator().manual_seed(seed))
    x = x.abs() ** 3 * x.sign() + torch.linspace(-2, 2, channels)
    quantizer = HiggsQuantizer(bits=bits)
    ours = quantizer.quantize(x).values.flatten(0, 1).double().numpy()
    theirs = decoded_one_by_one(x.flatten(0, 1).double().numpy(), quantizer.grid.double().numpy())
    far = abs(ours - theirs).max(1) > 1e-4 * abs(theirs).max()
    # a pair half way between two points may go to either, a norm half way between two numbers too: it costs the same
    cost = [((each - x.flatten(0, 1).double().numpy()) ** 2).sum(1) for each in (ours, theirs)]
    assert np.allclose(cost[0][far], cost[1][far], rtol=0.01) and far.mean() < 0.5


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_whatever_a_token_looks_like_its_error_is_that_of_normal_numbers(bits):
    """A rotation spreads what stands out, even a single channel of a tenth of its power."""
    x = torch.randn(1, 400, 1024)
    x[..., 7] *= 10
    x[:, 200:] *= torch.linspace(0.01, 5, 1024)
    error = (HiggsQuantizer(bits=bits).quantize(x).values - x).square().sum() / x.square().sum()
    expected, _ = integrated(normal_grid(4**bits).numpy())
    assert error.item() == pytest.approx(expected, rel=0.02)


def test_tokens_that_fp16_cannot_scale_come_back_finite():
    x = torch.tensor([0.0, 1e-9, 3e4, 1e7])[:, None] * torch.ones(8)
    zero, tiny, large, larger = HiggsQuantizer(bits=2).quantize(x[None]).values[0]
    assert zero.eq(0).all() and tiny.eq(0).all() and (large - 3e4).abs().max() < 2e4
    assert larger.isfinite().all() and larger.norm() <= 1.5 * 65504 * math.sqrt(8)


def test_searches_in_parts_find_the_same(monkeypatch):
    pairs, points = torch.randn(3, 50, 2), normal_grid(16).float()
    vectors, groups = torch.randn(4, 16, 8), torch.randn(4, 50, 8)
    whole = higgs.nearest_points(pairs, points), coupled.nearest_vectors(groups, vectors)
    monkeypatch.setattr(higgs, "SCORES", 16 * 7)
    monkeypatch.setattr(coupled, "SCORES", 4 * 16 * 7)
    assert torch.equal(higgs.nearest_points(pairs, points), whole[0])
    assert torch.equal(coupled.nearest_vectors(groups, vectors), whole[1])
    assert torch.equal(whole[0], points[torch.cdist(pairs, points[None]).argmin(-1)])


# -- AQUA-KV


def test_aqua_predicts_from_the_layer_below_and_gives_the_first_layer_four_bits():
    sites = [
        Site(i, part, f"{i}.{part}", nn.Identity(), channels=128) for i in (1, 2, 5) for part in ("keys", "values")
    ]
    plan = Plan([], [], {"keys": "channel", "values": "token"}, {}, is_calibrated=True)
    setting = plan.setting(Pair("aqua", "aqua"), Width(2, 2), sites)
    assert {site.key: (quantizer.sources, quantizer.width) for site, quantizer in setting.items()} == {
        (1, "keys"): ((), 4),
        (1, "values"): ((), 4),
        (2, "keys"): (((1, "keys"),), 2),
        (2, "values"): (((2, "keys"), (1, "values")), 2),
        (5, "keys"): (((2, "keys"),), 2),
        (5, "values"): (((5, "keys"), (2, "values")), 2),
    }
    tokens = 4 + 128 * 3 + 5  # sinks, full buffers, and what waits in the next one
    for site, quantizer in setting.items():
        bits = 16 * 128 * (4 + 5) + 128 * 3 * (128 * (4 if site.layer == 1 else 2) + 16)
        assert quantizer.cost(tokens, 128) == bits


def test_the_commands_run_and_tell_the_bits_that_one_counts(tmp_path):
    """Of a cache of 1000 tokens: 4 sinks and 7 full blocks of 128, so that 100 tokens wait for the next one."""
    text = ("--calib_dataset", SAMPLE, "--nsamples", "4", "--seqlen", "256")
    shown = ("--datasets", SAMPLE, "--seqlen", "256", "--limit", "4", "--report_context", "1000")
    counted = {
        "aqua": (16 * 104 + 896 * ((4 + 5 * 2) / 6 + 16 / 128)) / 1000,
        "cq1": 1,
        "higgs2": 2 + 16 / 128,
    }
    kls = {}
    for name, bits in counted.items():
        path, out = tmp_path / f"{name}.pkl", tmp_path / f"{name}.json"
        script, how = (DYNAMIC_SCRIPT, ("--kv_format", name)) if name == "higgs2" else (CALIBRATED_SCRIPT, ())
        if not how:
            fit = run_script(script, NANO, "--calibrate", "--kv_format", name, *text, "--quantizer_path", path)
            assert fit.returncode == 0 and fit.stderr == ""
            how = ("--quantizer_path", path)
        process = run_script(script, NANO, *how, *shown, "--baseline", "--output", out)
        assert process.returncode == 0 and process.stderr == ""
        _, row = json.loads(out.read_text())["results"]
        assert row["key_bits"] == pytest.approx(bits, rel=1e-12)
        assert row["value_bits"] == pytest.approx(bits, rel=1e-12)
        kls[name] = row["kl"]
    assert 0 < kls["aqua"] < kls["higgs2"] / 2


# -- Coupled quantization


def weighted_inertia(points, centres, weight):
    """Return the sum of weights [N] times squared distances of points [N,d] from the nearest of centres [K,d]."""
    return (weight * torch.cdist(points.double(), centres.double()).amin(1).square()).sum().item()


@pytest.mark.parametrize("kind", ["normal", "clusters", "offset"])
def test_codebooks_are_as_good_as_those_of_scikit_learn(kind):
    """A token weighs as the sum of squared gradients over the group's channels."""
    x, grad = torch.randn(2, 2000, 16), torch.randn(2, 2000, 16) ** 3
    if kind == "clusters":
        x = 0.3 * x + torch.randn(50, 16)[torch.randint(50, (2, 2000))]
    if kind == "offset":
        x = x @ torch.randn(16, 16) + 50 * torch.randn(16)
    fitted = CoupledQuantizer().fit(x, grad)
    plain = CoupledQuantizer().fit(x, torch.ones_like(grad))
    assert fitted.codebook.shape == (2, 256, 8) and fitted.codebook.dtype == torch.float16
    for group in range(2):
        part = slice(8 * group, 8 * group + 8)
        points, weight = x[..., part].flatten(0, 1), grad[..., part].double().square().sum(-1).flatten()
        for own, other, weights in ((fitted, plain, weight), (plain, fitted, torch.ones_like(weight))):
            peer = KMeans(256, n_init=1, random_state=0).fit(points.numpy(), sample_weight=weights.numpy())
            theirs = weighted_inertia(points, torch.from_numpy(peer.cluster_centers_), weights)
            assert weighted_inertia(points, own.codebook[group], weights) < 1.03 * theirs
            assert weighted_inertia(points, other.codebook[group], weights) > 1.04 * theirs


@given(st.integers(1, 4), st.sampled_from([1, 2, 8]), st.integers(0, 99))
def test_every_group_comes_back_as_the_nearest_vector(groups, size, seed):
    generator = torch.Generator().manual_seed(seed)
    offset = 100 * torch.randn(groups, 1, size, generator=generator)
    codebook = (offset + torch.randn(groups, 16, size, generator=generator)).half()
    x = (offset + torch.randn(groups, 21, size, generator=generator)).transpose(0, 1).reshape(3, 7, -1)
    given_back = CoupledQuantizer(bits=4 / size, coupled=size, codebook=codebook).quantize(x).values
    for token, group in np.ndindex(21, groups):
        point, found = (each.view(21, groups, size)[token, group].double() for each in (x, given_back))
        assert (codebook[group].double() == found).all(1).any()
        nearest = (codebook[group].double() - point).norm(dim=1).min()
        assert (found - point).norm() <= nearest + 1e-4


def test_a_codebook_of_few_or_constant_tokens_or_without_gradients():
    """Fewer tokens than vectors all come back, rounded to fp16; a channel that never changes, too."""
    few = torch.randn(2, 50, 16)
    few[..., 3], few[:, 25:] = 2.5, few[:, :25]
    for grad in (torch.zeros_like(few), torch.randn_like(few), None):
        fitted = CoupledQuantizer().fit(few, grad)
        assert fitted.codebook.isfinite().all()
        assert torch.equal(fitted.quantize(few).values, few.half().float())
    constant = torch.full((1, 300, 8), -7.0)
    assert torch.equal(CoupledQuantizer().fit(constant, None).quantize(constant).values, constant)
    large = 1e6 * torch.randn(1, 300, 8)
    assert CoupledQuantizer().fit(large, torch.ones_like(large)).quantize(large).values.isfinite().all()


# -- What does not fit


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: HiggsQuantizer(bits=5), "no grid of 5 bits"),
        (lambda: HiggsQuantizer(bits=2.5), "no grid of 2.5 bits"),
        (lambda: HiggsQuantizer(bits=2, first_bits="4"), "no grid of 4 bits"),
        (lambda: HiggsQuantizer(bits=2).quantize(torch.zeros(1, 2, 15)), "pairs of channels, and there are 15"),
        (lambda: HiggsQuantizer(bits=2).cost(5, 7), "pairs of channels, and there are 7"),
        (lambda: CoupledQuantizer(coupled=0), "no index"),
        (lambda: CoupledQuantizer(coupled="8"), "no index"),
        (lambda: CoupledQuantizer(bits=2, coupled=8), "no index"),
        (lambda: CoupledQuantizer(bits=0.3, coupled=8), "no index"),
        (lambda: CoupledQuantizer().fit(torch.zeros(1, 2, 60), None), "groups of 8 channels do not divide 60"),
        (lambda: CoupledQuantizer(codebook=torch.zeros(2, 256, 8)), "256 vectors of 8 numbers in fp16"),
        (lambda: CoupledQuantizer(codebook=torch.zeros(2, 255, 8).half()), "256 vectors"),
        (lambda: CoupledQuantizer(codebook=torch.full((2, 256, 8), math.nan).half()), "256 vectors"),
        (lambda: CoupledQuantizer(codebook=torch.zeros(0, 256, 8).half()), "256 vectors"),
        (lambda: CoupledQuantizer(codebook=torch.zeros(2, 256, 8).half().to_sparse()), "256 vectors"),
        (lambda: CoupledQuantizer(codebook="codebook"), "256 vectors"),
        (lambda: CoupledQuantizer(codebook=torch.zeros(1, 256, 8).half()).quantize(torch.zeros(1, 2, 64)), "64 chan"),
        (lambda: CoupledQuantizer().quantize(torch.zeros(1, 2, 64)), "not for 64 channels"),
    ],
)  # fmt: skip
def test_nonsense_is_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
