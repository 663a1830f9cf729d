"""Fits: k-means against scikit-learn and brute force, ranges, Q-Norm, Fisher information against autograd by hand."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ASSETS, SAMPLE, perplexity
from hypothesis import given, settings
from hypothesis import strategies as st

import quant_utils as qu

NUQ = {
    "k_proj": qu.QuantSpec(qu.PER_CHANNEL, 3, "nuq", include_sparse=True, first_few_fp16=1),
    "v_proj": qu.QuantSpec(qu.PER_TOKEN, 3, "nuq", include_sparse=True, first_few_fp16=1),
}


def squared_error(unit, weights, levels):
    levels = torch.as_tensor(levels).double().flatten().sort().values
    distance = (unit.double()[:, None] - levels).abs().amin(1)
    return (weights.double() * distance**2).sum().item()


@pytest.fixture(scope="module")
def calibration_windows(config_and_tokenizer):
    how = qu.CalibrationSpec(str(SAMPLE), nsamples=3, seqlen=256)
    return qu.load_calibration_windows(*config_and_tokenizer, how)


# -- NUQ


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("sparse", [0, 1])
@pytest.mark.parametrize("tensor", ["k", "v"])
def test_levels_are_at_least_as_good_as_those_of_the_published_code(tensor, sparse, fisher, bits):
    with np.load(ASSETS / "kvquant_static.npz") as golden:
        x, importance = (torch.from_numpy(golden[f"{tensor}_{part}"]) for part in ("calibration", "fisher"))
        published = golden[f"{tensor}_nuq_levels_b{bits}_sparse{sparse}_fisher{int(fisher)}"]
    axis = 0 if tensor == "k" else 1
    lo, hi = qu.tail_quantiles(x, 0.99 if sparse else 1.0, axis)
    unit = (x - (hi + lo) / 2) / ((hi - lo) / 2)
    inlier = (unit >= -1) & (unit <= 1)
    unit, weights = unit[inlier], importance[inlier] if fisher else torch.ones_like(unit[inlier])
    ours = qu.kmeans_levels(qu.weighted_histogram(unit, weights), bits)
    assert squared_error(unit, weights, ours) <= 1.0001 * squared_error(unit, weights, published)


def test_levels_are_at_least_as_good_as_scikit_learns_ten_starts():
    from sklearn.cluster import KMeans

    unit = (torch.randn(20_000) / 3).clamp(-1, 1)
    weights = torch.rand(20_000) ** 8
    for bits in (2, 4):
        best = KMeans(2**bits, n_init=10, random_state=0).fit(unit[:, None].numpy(), sample_weight=weights.numpy())
        ours = qu.kmeans_levels(qu.weighted_histogram(unit, weights), bits)
        assert squared_error(unit, weights, ours) <= 1.0001 * squared_error(unit, weights, best.cluster_centers_)


@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(1, 100)), min_size=1, max_size=12))
def test_levels_reach_the_optimum_over_all_partitions(samples):
    unit = torch.tensor([value for value, _ in samples]).double() / 1000
    weights = torch.tensor([weight for _, weight in samples]).double()
    order = unit.argsort()
    unit, weights = unit[order], weights[order]
    optimum = min(
        sum(
            (weights[a:b] * (unit[a:b] - (weights[a:b] * unit[a:b]).sum() / weights[a:b].sum()) ** 2).sum().item()
            for a, b in itertools.pairwise((0, *cut, len(unit)))
            if b > a
        )
        for cut in itertools.combinations_with_replacement(range(len(unit) + 1), 3)
    )
    ours = squared_error(unit, weights, qu.kmeans_levels(qu.weighted_histogram(unit, weights), 2))
    # samples that share a coarse bin are not told apart by the dynamic programme
    assert ours <= 1.0001 * optimum + weights.sum().item() * (2 / qu.EDGES) ** 2 / 4


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(2, 8), st.floats(0, 12))
def test_levels_are_sorted_finite_and_inside_whatever_the_weights(seed, bits, spread):
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(50, generator=generator) * 2 - 1
    weights = 10 ** (-spread * torch.rand(50, generator=generator).double())
    levels = qu.kmeans_levels(qu.weighted_histogram(unit, weights), bits)
    assert len(levels) == 2**bits and levels.isfinite().all()
    assert (levels.diff() >= 0).all() and levels[0] >= -1 and levels[-1] <= 1


@pytest.mark.parametrize(("deviation", "bits"), [(0.0005, 3), (0.002, 4), (0.02, 4)])
def test_levels_are_good_where_outliers_leave_the_rest_a_narrow_band(deviation, bits):
    from sklearn.cluster import KMeans

    unit = torch.cat([torch.randn(20_000) * deviation, torch.tensor([-1.0, 1.0])])
    weights = torch.ones_like(unit)
    best = KMeans(2**bits, n_init=10, random_state=0).fit(unit[:, None].numpy())
    ours = qu.kmeans_levels(qu.weighted_histogram(unit), bits)
    assert squared_error(unit, weights, ours) <= 1.0001 * squared_error(unit, weights, best.cluster_centers_)


def test_fitting_twice_gives_the_same_bits():
    unit = torch.randn(10_000) / 3
    first, second = (qu.kmeans_levels(qu.weighted_histogram(unit), 4) for _ in range(2))
    assert torch.equal(first, second)


def test_a_histogram_of_parts_is_that_of_the_whole():
    unit, weights = torch.rand(1000) * 2 - 1, torch.rand(1000)
    whole = qu.weighted_histogram(unit, weights)
    parts = qu.weighted_histogram(unit[:300], weights[:300]) + qu.weighted_histogram(unit[300:], weights[300:])
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(whole.sum(1), torch.stack([weights.sum(), (weights * unit).sum()]).double())


def test_q_norm_keeps_mean_and_deviation():
    unit = torch.randn(5000).clamp(-3, 3) / 3 + 0.05
    plain = qu.kmeans_levels(qu.weighted_histogram(unit), 2)
    normed = qu.q_norm(unit, plain)
    index = qu.nearest_level(unit, plain)
    assert torch.equal(normed.levels, plain)
    assert normed.decoded[index].mean().item() == pytest.approx(unit.mean().item(), abs=1e-6)
    assert normed.decoded[index].std().item() == pytest.approx(unit.std().item(), rel=1e-5)
    assert plain[index].std().item() < 0.99 * unit.std().item()  # k-means alone shrinks it


# -- ranges


@given(st.integers(1, 3), st.integers(3, 20), st.booleans(), st.integers(0, 2), st.integers(0, 2**31))
def test_calibrated_range_is_that_of_all_tokens_but_the_sinks(windows, tokens, sparse, sinks, seed):
    x = torch.randn(windows, tokens, 5, generator=torch.Generator().manual_seed(seed))
    spec = qu.QuantSpec(qu.PER_CHANNEL, include_sparse=sparse, sparsity_threshold=0.8, first_few_fp16=sinks)
    quantizer = qu.fit_range(x, spec)
    seen = x[:, sinks:].reshape(-1, 5).double().numpy()
    expected = np.percentile(seen, (10, 90) if sparse else (0, 100), axis=0)
    np.testing.assert_allclose(quantizer.lo, expected[0], atol=1e-6)
    np.testing.assert_allclose(quantizer.hi, expected[1], atol=1e-6)


def test_thresholds_are_those_of_the_published_code():
    with np.load(ASSETS / "kvquant_static.npz") as golden:
        x = torch.from_numpy(golden["k_calibration"])
        for sparse in (0, 1):
            ours = qu.fit_range(x[None], qu.QuantSpec(qu.PER_CHANNEL, include_sparse=bool(sparse)))
            np.testing.assert_allclose(ours.lo, golden[f"k_lower_sparse{sparse}"], atol=1e-5)
            np.testing.assert_allclose(ours.hi, golden[f"k_upper_sparse{sparse}"], atol=1e-5)


def test_calibration_windows_are_drawn_as_published():
    import random

    ids = torch.arange(5000)
    random.seed(7)
    expected = [random.randint(0, 5000 - 100 - 1) for _ in range(9)]
    windows = qu.sample_windows(ids, 100, 9, seed=7)
    assert windows[:, 0].tolist() == expected and windows[:, -1].tolist() == [start + 99 for start in expected]


# -- the whole calibration, on the bundled model


def gradients_by_hand(model, sites, ids):
    """{site: gradient of the mean next-token loss of ids [1,T]} with every output made a leaf of its own offset."""
    offsets, handles = {}, []
    for name, module in sites.items():
        offsets[name] = torch.zeros(1, ids.shape[1], module.weight.shape[0], requires_grad=True)
        handles.append(module.register_forward_hook(lambda m, args, out, name=name: out + offsets[name]))
    try:
        with torch.enable_grad():
            logits = model(ids).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
            return dict(zip(offsets, torch.autograd.grad(loss, list(offsets.values())), strict=True))
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("weighting", ["paper", "code"])
def test_fisher_histograms_are_those_of_gradients_by_hand(model, calibration_windows, weighting):
    sites = qu.find_sites(model, NUQ)
    seen = qu.record_activations(model, sites, calibration_windows)
    quantizers = {name: qu.fit_range(seen[name], NUQ[name.rpartition(".")[2]]) for name in sites}
    ours = qu.fisher_histograms(model, calibration_windows, quantizers, weighting)
    expected = dict.fromkeys(sites, 0)
    for i, ids in enumerate(calibration_windows):
        for name, grad in gradients_by_hand(
            model, {name: site.module for name, site in sites.items()}, ids[None]
        ).items():
            y, quantizer = seen[name][i : i + 1, 1:], quantizers[name]
            keep, lo, hi = qu.keep_and_range(y, quantizer)
            radius = ((hi - lo) / 2).expand_as(y)
            weight = grad[:, 1:].double() ** 2 * (radius**2 if weighting == "paper" else 1)
            expected[name] = expected[name] + qu.weighted_histogram(((y - lo) / radius - 1)[~keep], weight[~keep])
    for name in sites:
        # a rounding error in a gradient moves no weight to another bin
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-2, atol=1e-4 * expected[name].abs().max().item())
        assert ours[name][0].sum().item() == pytest.approx(expected[name][0].sum().item(), rel=1e-4)
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_gradient_checkpointing_changes_no_figure(model, calibration_windows, monkeypatch):
    sites = qu.find_sites(model, NUQ)
    seen = qu.record_activations(model, sites, calibration_windows)
    quantizers = {name: qu.fit_range(seen[name], NUQ[name.rpartition(".")[2]]) for name in sites}
    plain = qu.fisher_histograms(model, calibration_windows, quantizers, "paper")
    calls = []
    handle = model.model.layers[3].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    monkeypatch.setattr(qu, "free_memory", lambda device: 0)
    try:
        checkpointed = qu.fisher_histograms(model, calibration_windows, quantizers, "paper")
    finally:
        handle.remove()
    assert len(calls) == 2 * len(calibration_windows)  # once forward, once for the backward pass
    for name in sites:
        torch.testing.assert_close(plain[name], checkpointed[name])
    assert not any(module.training for module in model.modules())


def test_activations_are_the_outputs_of_the_projections(model, calibration_windows):
    name, inputs = "model.layers.2.self_attn.v_proj", []
    projection = model.get_submodule(name)
    handle = projection.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.inference_mode():
        model(calibration_windows)
        handle.remove()
        seen = qu.record_activations(model, {name: qu.site_at(model, name)}, calibration_windows)
        torch.testing.assert_close(seen[name], inputs[0] @ projection.weight.T, rtol=1e-4, atol=1e-4)


def test_host_memory_that_does_not_suffice_is_an_error_with_the_figure(model, calibration_windows, monkeypatch):
    monkeypatch.setattr(qu, "free_memory", lambda device: 1000)
    with pytest.raises(qu.UserError, match=r"take 0.0 GiB of host memory, but 0.0 GiB are free.*nsamples .now 3."):
        qu.calibrate(model, calibration_windows, {4: NUQ}, qu.CalibrationSpec())


def test_the_summary_is_what_fake_quantize_does(model, calibration_windows):
    how = qu.CalibrationSpec(str(SAMPLE), nsamples=3, seqlen=256)
    seen = qu.record_activations(model, qu.find_sites(model, NUQ), calibration_windows)
    for name, (quantizer, fit) in qu.calibrate(model, calibration_windows, {4: NUQ}, how)[4].items():
        x = seen[name][:, 1:]
        y = qu.fake_quantize(seen[name], quantizer)[:, 1:]
        assert fit.error == pytest.approx(((x - y) ** 2).sum().item() / (x**2).sum().item(), rel=1e-4)
        if name.endswith("k_proj"):
            assert (fit.lo, fit.hi) == (quantizer.lo.min().item(), quantizer.hi.max().item())
            outside = ((x < quantizer.lo) | (x > quantizer.hi)).float().mean().item()
            assert fit.kept == pytest.approx(outside, rel=1e-4)
        else:
            assert quantizer.lo is None and fit.kept == pytest.approx(2 / 128)


def test_fitted_levels_beat_uniform_ones_on_held_out_text(model, windows, calibration_windows):
    errors = {}
    for codebook, fisher in (("uniform", None), ("nuq", None), ("nuq", "paper")):
        specs = {name: replace(spec, codebook=codebook, bits=2) for name, spec in NUQ.items()}
        how = qu.CalibrationSpec(str(SAMPLE), fisher=fisher)
        quantizers = {n: q for n, (q, _) in qu.calibrate(model, calibration_windows, {2: specs}, how)[2].items()}
        errors[codebook, fisher] = perplexity(model, windows, quantizers)
    assert errors["nuq", "paper"] < errors["nuq", None] < errors["uniform", None]


@pytest.mark.parametrize("options", [{"codebook": "nuq"}, {"codebook": "nf"}, {"clamp": True}])
@pytest.mark.parametrize("q_norm", [False, True])
def test_every_variant_calibrates_and_evaluates(model, calibration_windows, windows, options, q_norm):
    specs = {name: replace(spec, codebook="uniform", bits=4) for name, spec in NUQ.items()}
    specs = {name: replace(spec, **options) for name, spec in specs.items()}
    how = qu.CalibrationSpec(str(SAMPLE), q_norm=q_norm)
    fitted = qu.calibrate(model, calibration_windows, {4: specs}, how)[4]
    base = perplexity(model, windows[:2])
    ppl = perplexity(model, windows[:2], {name: quantizer for name, (quantizer, _) in fitted.items()})
    assert ppl == pytest.approx(base, rel=0.1) and ppl != base
    assert all((quantizer.codebook.scale != 1) == q_norm for quantizer, _ in fitted.values())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nsamples": 0}, "nsamples must be at least 1, got 0"),
        ({"seqlen": 1}, "seqlen must be at least 2, got 1"),
        ({"seed": -1}, "seed must be in 0"),
        ({"dataset": "a.csv"}, "unknown dataset 'a.csv'"),
    ],
)
def test_a_bad_calibration_spec_names_the_field_and_the_value(fields, message):
    with pytest.raises(qu.UserError, match=message):
        qu.CalibrationSpec(**fields)


def test_calibration_windows_come_from_the_train_split_and_the_seed(config_and_tokenizer, monkeypatch):
    asked, text = [], SAMPLE.read_text(encoding="utf-8")
    monkeypatch.setattr(qu, "load_documents", lambda *name_and_split: asked.append(name_and_split) or [text])
    specs = [qu.CalibrationSpec(nsamples=3, seqlen=64, seed=seed) for seed in (0, 5, 5)]
    first, second, third = (qu.load_calibration_windows(*config_and_tokenizer, spec) for spec in specs)
    assert asked == [("wikitext2", "train")] * 3
    assert torch.equal(second, third) and not torch.equal(first, second)


def test_a_site_that_never_runs_is_an_error_and_no_fit(model, calibration_windows):
    model.model.spare = torch.nn.Module()
    model.model.spare.k_proj = torch.nn.Linear(4, 4)
    try:
        with pytest.raises(qu.UserError, match=r"LlamaForCausalLM caches nothing at model\.spare\.k_proj"):
            qu.calibrate(model, calibration_windows, {4: NUQ}, qu.CalibrationSpec())
    finally:
        del model.model.spare


def test_calibration_text_that_is_too_short(config_and_tokenizer):
    how = qu.CalibrationSpec(str(SAMPLE), seqlen=5829)
    with pytest.raises(qu.UserError, match="5829 tokens, and one window takes 5830"):
        qu.load_calibration_windows(*config_and_tokenizer, how)
