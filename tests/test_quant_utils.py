"""The core, against closed forms, loops over single entries, numpy, scikit-learn, autograd and the published code."""

import itertools
import json
import math
import random
import statistics
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import transformers as hf
from conftest import ASSETS, ROOT, measured
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor, nn

import quant_utils as qu
from simquant import calibration
from simquant.sites import find_sites
from simquant.summary import paired_difference, standard_error

AXES, BITS = pytest.mark.parametrize("axis", qu.AXES), pytest.mark.parametrize("bits", [2, 3, 4])
Scalar = qu.ScalarQuantizer


def scalar_setting(model, bits, key_axis="channel", **options):
    """Return the setting that quantizes all of model, values per token."""
    made = {"keys": Scalar(key_axis, bits, **options), "values": Scalar("token", bits, **options)}
    return {site: made[site.part] for site in find_sites(model)}


@st.composite
def tensors(draw):
    """[B,T,C] of any shape and dtype, its numbers ordinary, repeated, tiny, huge or all alike."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)))
    numbers = draw(st.sampled_from([st.floats(-1e4, 1e4, width=16), st.integers(-3, 3), st.floats(-1, 1, width=16)]))
    values = torch.from_numpy(draw(hnp.arrays(np.float32, shape, elements=numbers)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return (values + draw(st.sampled_from([0.0, 0.0, 100.0, -1000.0]))).to(dtype)


def scalars(**fixed):
    """Draw quantizers that are not fitted."""
    options = {
        "axis": st.sampled_from(["channel", "token"]),
        "bits": st.integers(2, 8),
        "levels": st.sampled_from(["uniform", "nf"]),
        "outliers": st.none() | st.floats(0, 0.95),
        "sinks": st.integers(0, 4),
    }
    return st.builds(Scalar, **{name: st.just(fixed[name]) if name in fixed else options[name] for name in options})


def rounding(x):
    """Return what storing a number of x's size in x's dtype may cost."""
    return torch.finfo(x.dtype).eps * x.abs().max().item() + 1e-6 * (x.max() - x.min()).item()


def test_uniform_and_normal_float_levels_have_their_closed_forms_and_the_published_values():
    for bits in range(2, 9):
        expected = np.arange(2**bits) / (2**bits - 1) * 2 - 1
        np.testing.assert_allclose(qu.uniform_levels(bits).numpy(), expected, atol=1e-7)
        levels = qu.normal_float_levels(bits)
        assert len(levels) == 2**bits and (levels.diff() > 0).all()
        assert levels[0] == -1 and levels[-1] == 1 and (levels == 0).sum() == 1
    with np.load(ASSETS / "kvquant_dynamic.npz") as golden:
        for bits in (2, 3, 4):
            np.testing.assert_allclose(qu.normal_float_levels(bits), golden[f"nf_levels_{bits}"], atol=2e-7)


def squared_error(unit, weights, levels):
    """Return the weighted sum of squares between samples [N] and their nearest levels."""
    levels = torch.as_tensor(levels).double().flatten()
    return (weights.double() * (unit.double()[:, None] - levels).abs().amin(1) ** 2).sum().item()


@BITS
@pytest.mark.parametrize("fisher", [0, 1])
@pytest.mark.parametrize("sparse", [0, 1])
@pytest.mark.parametrize("tensor", ["k", "v"])
def test_fitted_levels_are_at_least_as_good_as_the_published_ones(tensor, sparse, fisher, bits):
    with np.load(ASSETS / "kvquant_static.npz") as golden:
        x, weights = (torch.from_numpy(golden[f"{tensor}_{part}"]) for part in ("calibration", "fisher"))
        published = golden[f"{tensor}_nuq_levels_b{bits}_sparse{sparse}_fisher{fisher}"]
    tail = 0.005 * sparse
    lo, hi = (x.quantile(share, 0 if tensor == "k" else 1, keepdim=True) for share in (tail, 1 - tail))
    unit = (x - lo) / (hi - lo) * 2 - 1
    is_inlier = unit.abs() <= 1
    unit, weights = unit[is_inlier], weights[is_inlier] if fisher else torch.ones(int(is_inlier.sum()))
    ours = qu.kmeans_levels(qu.running_totals(unit, weights), bits)
    assert squared_error(unit, weights, ours) <= 1.0001 * squared_error(unit, weights, published)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(-1000, 1000), st.integers(1, 100)), min_size=1, max_size=10))
def test_fitted_levels_reach_the_optimum_over_all_partitions(samples):
    unit, weights = torch.tensor(sorted(samples)).double().unbind(1)
    unit = unit / 1000

    def error(a, b):
        mean = (weights[a:b] * unit[a:b]).sum() / weights[a:b].sum()
        return (weights[a:b] * (unit[a:b] - mean) ** 2).sum().item() if b > a else 0.0

    cuts = itertools.combinations_with_replacement(range(len(unit) + 1), 3)
    optimum = min(sum(itertools.starmap(error, itertools.pairwise((0, *cut, len(unit))))) for cut in cuts)
    levels = qu.kmeans_levels(qu.running_totals(unit, weights), 2)
    assert levels.isfinite().all() and (levels.diff() >= 0).all() and levels.abs().max() <= 1
    # samples that share a coarse bin are not told apart by the dynamic programme
    assert squared_error(unit, weights, levels) <= 1.0001 * optimum + weights.sum().item() / qu.EDGES**2


@BITS
@pytest.mark.parametrize("sparse", [0, 1])
@AXES
@pytest.mark.parametrize("levels", ["uniform", "nf"])
@pytest.mark.parametrize("tensor", ["k", "v"])
def test_the_published_code_gives_the_same(tensor, levels, axis, sparse, bits):
    with np.load(ASSETS / "kvquant_dynamic.npz") as golden:
        x, expected = golden[tensor], golden[f"{tensor}_dynamic_{axis}_{levels}_b{bits}_sparse{sparse}"]
    quantizer = Scalar(axis, bits, levels, outliers=0.01 if sparse else None)
    if levels == "nf":  # the published code decodes through fp16 levels
        object.__setattr__(quantizer, "decoded", quantizer.decoded.half().float())
    np.testing.assert_allclose(quantizer.quantize(torch.from_numpy(x)[None]).values[0], expected, atol=1e-5)


@BITS
@pytest.mark.parametrize("sparse", [0, 1])
@pytest.mark.parametrize("source", ["k uniform", "k nuq fisher0", "k nuq fisher1", "v nuq fisher0", "v nuq fisher1"])
def test_the_published_code_gives_the_same_with_what_it_calibrated(source, sparse, bits):
    tensor, levels, *fisher = source.split()
    suffix, kind = "_".join([f"b{bits}_sparse{sparse}", *fisher]), "k_static" if tensor == "k" else "v_dynamic_token"
    quantizer = Scalar("channel" if tensor == "k" else "token", bits, outliers=0.01 if sparse else None)
    with np.load(ASSETS / "kvquant_static.npz") as golden, np.load(ASSETS / "kvquant_dynamic.npz") as inputs:
        x, expected = torch.from_numpy(inputs[tensor]), golden[f"{kind}_{levels}_{suffix}"]
        if tensor == "k":
            ours = quantizer.fit(torch.from_numpy(golden["k_calibration"])[None], None)
            ends = {"lo": golden[f"k_lower_sparse{sparse}"], "hi": golden[f"k_upper_sparse{sparse}"]}
            for name, end in ends.items():
                np.testing.assert_allclose(getattr(ours, name), end, atol=1e-5)
            quantizer = replace(quantizer, **{n: torch.from_numpy(end).half().float() for n, end in ends.items()})
        if levels == "nuq":
            codebook = torch.from_numpy(golden[f"{tensor}_nuq_levels_{suffix}"]).flatten().sort().values
            quantizer = replace(quantizer, codebook=codebook)
    np.testing.assert_allclose(quantizer.quantize(x[None]).values[0], expected, atol=1e-5)


@given(tensors(), scalars())
def test_quantizing_agrees_with_a_loop_over_single_entries(x, quantizer):
    """What is at or beyond numpy's quantiles of all but the sinks is exact, the rest at the nearest level."""
    levels, given = qu.LEVELS[quantizer.levels](quantizer.bits).double().numpy(), quantizer.quantize(x).values
    assert torch.equal(given[:, : quantizer.sinks], x[:, : quantizer.sinks])
    body, ours = (each[:, quantizer.sinks :] for each in (x, given))
    body, ours = (each.double().numpy() for each in ((body, ours) if quantizer.axis == "token" else (body.mT, ours.mT)))
    for place in np.ndindex(body.shape[:2] if body.size else 0):
        values, kept = body[place], np.zeros(body.shape[-1], bool)
        if quantizer.outliers is not None:
            lower, upper = np.quantile(values, [quantizer.outliers / 2, 1 - quantizer.outliers / 2])
            kept = (values <= lower) | (values >= upper)
        # numpy's quantile may round to the other side of an entry that equals it
        np.testing.assert_allclose(ours[place][kept], values[kept], rtol=1e-9, atol=2 * rounding(x))
        if not kept.all():
            inliers = values[~kept]
            candidates = inliers.min() + (levels + 1) / 2 * np.ptp(inliers)
            distance = np.abs(inliers[:, None] - candidates).min(1)
            np.testing.assert_allclose(np.abs(ours[place][~kept] - inliers), distance, rtol=0, atol=rounding(x))


@AXES
@pytest.mark.parametrize("options", [{}, {"levels": "nf"}, {"outliers": 0.1}, {"outliers": 0.1, "levels": "nf"}])
def test_constant_channels_and_tokens_and_the_ends_of_a_range_come_back_exactly(axis, options):
    line, along = (1, -1) if axis == "token" else (2, -2)
    values = (0.0, 0.1, -7.3, 65504.0, 1e-7)
    for dtype, value in itertools.product((torch.float32, torch.bfloat16, torch.float16), values):
        x = torch.randn(2, 16, 16).to(dtype)
        x.select(line, 3).fill_(value)
        ours = Scalar(axis, 3, **options).quantize(x).values
        assert torch.equal(ours.select(line, 3), x.select(line, 3))
        assert torch.equal(ours.amax(along), x.amax(along)) and torch.equal(ours.amin(along), x.amin(along))


@given(tensors(), st.integers(2, 8))
def test_an_integer_zero_point_is_that_of_an_integer_kernel(x, bits):
    """q = clip(round(x / scale) + zero_point, 0, L - 1), and back as (q - zero_point) * scale."""
    ours, y = Scalar("channel", bits, integer_zero=True).quantize(x).values.double(), x.double()
    scale = (y.amax(1, keepdim=True) - y.amin(1, keepdim=True)) / (2**bits - 1)
    zero_point = (-y.amin(1, keepdim=True) / scale).round()
    kernel = ((y / scale).round() + zero_point).clamp(0, 2**bits - 1) - zero_point
    expected = torch.where(scale > 0, kernel * scale, y)
    # where an entry or the zero point lies half-way between steps, rounding chooses the side
    half_way = [(part / scale % 1 - 0.5).abs() < 1e-2 for part in (y, y.amin(1, keepdim=True))]
    assert (((ours - expected).abs() <= 4 * rounding(x)) | half_way[0] | half_way[1]).all()
    assert ((ours - y).abs() <= 1.01 * scale + 4 * rounding(x)).all()


@given(st.integers(1, 3), st.integers(3, 20), st.sampled_from([None, 0.2]), st.integers(0, 2), st.integers(0, 2**31))
def test_a_calibrated_range_is_numpys_percentiles_of_all_tokens_but_the_sinks(count, tokens, outliers, sinks, seed):
    x = torch.randn(count, tokens, 5, generator=torch.Generator().manual_seed(seed))
    fitted = Scalar("channel", outliers=outliers, sinks=sinks).fit(x, None)
    expected = np.percentile(x[:, sinks:].flatten(0, 1).double(), (10, 90) if outliers else (0, 100), axis=0)
    np.testing.assert_allclose(torch.stack([fitted.lo, fitted.hi]), expected, atol=1e-6)
    other = 1.5 * x + 0.1
    values, kept, _ = fitted.quantize(other)
    is_outside = (other < fitted.lo) | (other > fitted.hi)
    is_outside[:, :sinks] = False
    assert kept is None if outliers is None else torch.equal(kept, is_outside)
    clipped = (values >= fitted.lo - 1e-5) & (values <= fitted.hi + 1e-5)
    assert (clipped | (is_outside if outliers else False))[:, sinks:].all()


@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**31))
def test_a_cap_keeps_the_most_extreme_of_each_token(tokens, channels, percent, seed):
    x = torch.randn(2, tokens, channels, generator=torch.Generator().manual_seed(seed))
    bound = torch.linspace(0.2, 1, channels)
    capped = Scalar("channel", outliers=0.1, cap=percent / 100, lo=-bound, hi=bound).quantize(x)
    for token, kept in zip((x / bound).abs().flatten(0, 1).tolist(), capped.outliers.flatten(0, 1), strict=True):
        outside = sorted(((far, channel) for channel, far in enumerate(token) if far > 1), reverse=True)
        expected = {channel for _, channel in outside[: percent * channels // 100]}
        assert set(kept.nonzero().flatten().tolist()) == expected
    assert torch.equal(capped.values[capped.outliers], x[capped.outliers])


@AXES
def test_q_norm_keeps_mean_and_deviation_of_normalized_inliers(axis):
    x = torch.randn(4, 200, 32) ** 3 + 0.3
    plain = Scalar(axis, 2, "nuq", outliers=0.1).fit(x, None)
    normed = Scalar(axis, 2, "nuq", outliers=0.1, q_norm=True).fit(x, None)
    keep, lo, hi = plain.keep_and_range(x)
    before, shrunk, after = (
        ((each - lo) / (hi - lo) * 2 - 1)[~keep] for each in (x, plain.quantize(x).values, normed.quantize(x).values)
    )
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=1e-4)
    assert after.std().item() == pytest.approx(before.std().item(), rel=1e-3) and shrunk.std() < 0.99 * before.std()
    assert torch.equal(plain.codebook, normed.codebook)


@AXES
def test_fisher_information_weighs_the_fit_in_two_ways(axis):
    """As the paper, F times the squared range, or as the published code, F: each is best by its own measure.

    Some entries lie so far out that the rest has a narrow band of [-1, 1].
    """
    from sklearn.cluster import KMeans

    x = torch.randn(2, 100, 32) ** 5 * torch.rand(2, 100, 1) ** 2 * torch.linspace(0.1, 3, 32)
    grad = torch.randn(2, 100, 32) ** 3
    body, along = x[:, 1:].double(), (0, 1) if axis == "channel" else (2,)
    radius = ((body.amax(along, keepdim=True) - body.amin(along, keepdim=True)) / 2).expand_as(body)
    unit = ((body - body.amin(along, keepdim=True)) / radius - 1).flatten()
    fitted = {how: Scalar(axis, 2, "nuq", sinks=1, fisher=how).fit(x, grad, {}).codebook for how in ("paper", "code")}
    weights = {"code": (grad[:, 1:].double() ** 2).flatten()}
    weights["paper"] = weights["code"] * radius.flatten() ** 2
    for how, other in (("paper", "code"), ("code", "paper")):
        best = KMeans(4, n_init=10, random_state=0).fit(unit[:, None].numpy(), sample_weight=weights[how].numpy())
        error = squared_error(unit, weights[how], fitted[how])
        assert error <= 1.0001 * squared_error(unit, weights[how], best.cluster_centers_)
        assert error < 0.99 * squared_error(unit, weights[how], fitted[other])


BAD = [
    {"axis": "row"}, {"bits": 1}, {"bits": 9}, {"bits": 4.0}, {"levels": "fp8"}, {"outliers": 1.1}, {"outliers": -0.1},
    {"cap": 1.5, "outliers": 0.1}, {"cap": 0.01}, {"sinks": -1}, {"sinks": 1.0}, {"integer_zero": True, "levels": "nf"},
    {"q_norm": 1}, {"fisher": "both"}, {"lo": torch.zeros(3), "axis": "channel"}, {"scale": 0.0}, {"offset": math.nan},
    {"lo": torch.ones(3), "hi": torch.zeros(3), "axis": "channel"}, {"lo": torch.zeros(3), "hi": torch.ones(3)},
    {"codebook": torch.zeros(3)}, {"codebook": torch.linspace(1, -1, 16)}, {"codebook": torch.linspace(-2, 2, 16)},
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_a_bad_field_is_named_and_so_is_a_wrong_rank(bad):
    name = next(iter(bad))
    with pytest.raises(qu.UserError, match=f"no {name} of {str(bad[name])[:5]}".replace("(", ".").replace("[", ".")):
        Scalar(**{"axis": "token", **bad})
    with pytest.raises(ValueError, match=r"\(4, 8\)"):
        Scalar("token").quantize(torch.randn(4, 8))


@dataclass(frozen=True)
class Difference(qu.Quantizer):
    """Rounds the difference from what its source gave back, to steps that are fitted to the largest one."""

    bits: float = 4
    sources: tuple = ()
    step: Tensor | None = None

    def fit(self, x, grad, others):
        return replace(self, step=(x - others[0]).abs().amax()[None] / 8)

    def quantize(self, x, others):
        (base,) = others
        return qu.Quantized(base + ((x - base) / self.step).round() * self.step)


def outputs_of(model, sites, ids):
    """Return {site: [B,T,C]} of what leaves the modules of sites."""
    seen = {}
    with qu.hooked((s.module, lambda m, a, out, s=s: seen.__setitem__(s, out.clone())) for s in sites):
        model(ids)
    return seen


@torch.inference_mode()
def test_a_quantizer_looks_up_what_its_source_gave_back(model, windows):
    first, second = [site for site in find_sites(model) if site.layer == 0]
    ids, plain = windows[:2, :64], Scalar("channel", 2)
    seen = outputs_of(model, (first, second), ids)
    source = plain.fit(seen[first], None).quantize(seen[first]).values
    difference = seen[second] - source
    step = difference.abs().max() / 8
    both = {first: plain, second: Difference(sources=(first.key,))}
    setting = calibration.calibrate(model, ids.clone(), {"d": both})["d"]
    torch.testing.assert_close(setting[second].step, step[None], rtol=1e-4, atol=0)
    with qu.quantized(setting) as taps:
        given = outputs_of(model, (first, second), ids)
        assert taps[first.key].values is None and taps[second.key].values is None  # nobody needs them any more
    expected = source + (difference / step).round() * step
    is_tie = ((difference / step) % 1 - 0.5).abs() < 1e-2
    assert (((given[second] - expected).abs() < 1e-3) | is_tie).all()
    assert not taps and not any(hasattr(module, "kv_taps") for module in model.modules())


def test_activations_and_gradients_are_those_of_autograd_by_hand(model, windows):
    ids, sites = windows[:2, :64], find_sites(model)
    places = dict.fromkeys(sites, False)
    seen, grads = calibration.record(model, places, ids), calibration.record(model, places, ids, gradients=True)
    for number, each in enumerate(ids):
        offsets = [torch.zeros(1, 64, 128, requires_grad=True) for _ in sites]
        hooks = [(s.module, lambda m, a, out, o=offset: out + o) for s, offset in zip(sites, offsets, strict=True)]
        with qu.hooked(hooks), torch.enable_grad():
            loss = nn.functional.cross_entropy(model(each[None]).logits[0, :-1], each[1:], reduction="sum")
            expected = torch.autograd.grad(loss, offsets)
        for site, grad in zip(sites, expected, strict=True):
            torch.testing.assert_close(grads[site][number], grad[0], rtol=1e-3, atol=1e-5)
        for site, out in outputs_of(model, sites, each[None]).items():
            torch.testing.assert_close(seen[site][number], out[0], rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_calibration_refuses_what_is_not_finite(model, windows):
    site, fisher = find_sites(model)[0], Scalar("channel", levels="nuq", fisher="paper")
    spare = qu.Site(9, "keys", "spare.k_proj", nn.Linear(4, 4), 4)
    with pytest.raises(qu.UserError, match=r"spare.k_proj gives nan or inf, or never ran, in float32"):
        calibration.calibrate(model, windows[:1, :8], {"a": {spare: Scalar("channel")}})
    for value, words in ((math.nan, "no gradient comes to model.layers.0"), (math.inf, "gradients at .* overflow")):
        with pytest.raises(qu.UserError, match=words):
            calibration.calibrate(model, windows[:1, :8], {"a": {site: fisher}}, {site: torch.full((1, 8, 128), value)})


@torch.inference_mode()
def whole_log_probs(model, ids, setting):
    """Return [T-1,V] in double precision, from the whole logits of ids [T]."""
    with qu.quantized(setting):
        return model(ids[None]).logits[0, :-1].double().log_softmax(-1)


@pytest.mark.parametrize(("batch_size", "tokens"), [(1, 256), (3, 256), (2, 100), (1, 10_000), (3, 1)])
def test_figures_are_those_of_a_plain_loop_over_whole_logits(model, windows, monkeypatch, batch_size, tokens):
    """Whatever the size of a batch, and of the chunks whose logits exist at a time."""
    ids, seen = windows[:3, : 40 if tokens == 1 else 512], []
    every = [{}, scalar_setting(model, 4), scalar_setting(model, 2)]
    monkeypatch.setattr(qu, "HEAD_TOKENS", tokens)
    with qu.hooked([(model.lm_head, lambda m, a, out: seen.append(out[..., 0].numel()))]):
        figures = measured(model, ids, *every, batch_size=batch_size)
    assert figures.shape == (3, 3, len(qu.FIGURES)) and figures.dtype == torch.float64
    assert sum(seen) == 3 * 3 * (ids.shape[1] - 1) and max(seen) <= max(tokens, batch_size)
    assert (figures[:, 0, [1, 3, 5]] == 0).all() and (figures[:, 0, 2] == 1).all()
    for row, each in zip(figures, ids, strict=True):
        base = whole_log_probs(model, each, {})
        for (nll, kl, top, squared, right, most, *_), setting in zip(row.tolist(), every, strict=True):
            changed = whole_log_probs(model, each, setting)
            before, after = (log_probs.gather(1, each[1:, None])[:, 0] for log_probs in (base, changed))
            assert nll == pytest.approx(-after.mean().item(), rel=1e-5)
            expected = nn.functional.kl_div(changed, base, log_target=True, reduction="none").sum(-1)
            assert kl == pytest.approx(expected.mean().item(), rel=1e-3, abs=1e-7)
            assert most == pytest.approx(expected.max().item(), rel=1e-3, abs=1e-6)
            assert top == pytest.approx((base.argmax(-1) == changed.argmax(-1)).double().mean().item(), abs=1e-9)
            assert squared == pytest.approx((after.exp() - before.exp()).square().mean().item(), rel=1e-3, abs=1e-9)
            assert right == pytest.approx((changed.argmax(-1) == each[1:]).double().mean().item(), abs=1e-9)
    alone = measured(model, ids, every[1], batch_size=batch_size)[:, 0]
    assert alone[:, [1, 2, 3, 5]].isnan().all() and torch.equal(alone[:, [0, 4, 6, 7]], figures[:, 1, [0, 4, 6, 7]])


TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
ONE = {**TINY, "num_key_value_heads": 1}
FAMILIES = {
    "LlamaForCausalLM": lambda: hf.LlamaConfig(**TINY, tie_word_embeddings=True),
    "Gemma2ForCausalLM": lambda: hf.Gemma2Config(**ONE, head_dim=8, final_logit_softcapping=0.3),
    "GraniteForCausalLM": lambda: hf.GraniteConfig(**ONE, logits_scaling=0.05),
    "GPTNeoXForCausalLM": lambda: hf.GPTNeoXConfig(**TINY),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_does_around_its_decoder_is_done(family):
    """Soft caps and scales of the logits, which a head's weights alone would miss; bodies inside bodies."""
    model, ids = getattr(hf, family)(FAMILIES[family]()).eval(), torch.randint(32, (3, 40))
    figures = measured(model, ids, {})[:, 0]
    expected = [-whole_log_probs(model, each, {}).gather(1, each[1:, None]).mean().item() for each in ids]
    assert figures[:, 0].tolist() == pytest.approx(expected, rel=1e-5)
    has = {site.part for site in find_sites(model)}  # what is fused otherwise than FAMILIES says has no bits
    assert figures[0, 6:8].tolist() == pytest.approx(
        [16 if part in has else math.nan for part in qu.PARTS], nan_ok=True
    )


def test_a_body_that_is_passed_by_is_refused_and_keeps_its_own_forward(model, monkeypatch):
    bystander, output = nn.Identity(), hf.modeling_outputs.BaseModelOutputWithPast(torch.zeros(1, 4, 128))
    bystander.forward = own = lambda x: x  # as accelerate does
    monkeypatch.setattr(model, "get_decoder", lambda: bystander)
    with pytest.raises(qu.UserError, match="LlamaForCausalLM does not compute its logits from"):
        qu.head(model, output, slice(0, 2))
    assert vars(bystander)["forward"] is own


def test_a_gpu_starts_on_the_next_batch_before_one_is_read(monkeypatch):
    def start(model, sites, ids, settings):
        events.append(f"s{ids.item()}")
        return lambda: events.append(f"r{ids.item()}") or ids

    monkeypatch.setattr(qu, "start_batch", start)
    for kind, expected in (("cuda", "s0 s1 r0 s2 r1 r2"), ("cpu", "s0 r0 s1 r1 s2 r2")):
        events = []
        monkeypatch.setattr(qu, "input_device", lambda model, kind=kind: torch.device(kind))
        assert [each.item() for each in qu.evaluate(None, [], torch.arange(3)[:, None], [{}])] == [0, 1, 2]
        assert " ".join(events) == expected


CONTEXT = qu.CONTEXT


def test_average_bits_are_a_count_over_what_the_projections_give(model, windows):
    """With torch.quantile as the rule that says which entries are kept, and 16 bits for what is not quantized.

    In a longer cache outliers are as frequent, and the range of a channel weighs less.
    """
    setting, totals = scalar_setting(model, 3, outliers=0.05, sinks=2), {"keys": 0, "values": 0}

    def count(module, args, out, site):  # runs before the quantization
        axis, body = (0, out[0, 2:]) if site.part == "keys" else (1, out[0, 2:])
        kept = (body <= body.quantile(0.025, axis, keepdim=True)) | (body >= body.quantile(0.975, axis, keepdim=True))
        ranges = 128 if site.part == "keys" else CONTEXT - 2
        rest = (CONTEXT - 2) * 128 * (3 + 32 * kept.double().mean().item())
        totals[site.part] += 2 * 128 * 16 + rest + ranges * 32

    with qu.hooked((s.module, lambda m, a, out, s=s: count(m, a, out, s)) for s in setting):
        figures = measured(model, windows[:1], setting)[0, 0]
    expected = [total / (6 * CONTEXT * 128) for total in totals.values()]
    assert figures[6:8].tolist() == pytest.approx(expected, rel=1e-3)  # a tie may be rounded apart
    keys = {site: Scalar("channel", 4) for site in setting if site.part == "keys"}
    assert measured(model, windows[:1], keys)[0, 0, 6:8].tolist() == [4 + 32 / CONTEXT, 16]


def test_nuq4_with_one_percent_outliers_on_the_shape_of_llama_3_8b():
    """1024 channels: 1 % of the keys, 12 of 1024 values and their range; the literature has 4.32 to 4.33."""
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 1}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**TINY | shape | {"vocab_size": 4096})).eval()
    ids = torch.randperm(4096).view(4, 1024)  # no token twice, so no ties
    fitted = calibration.calibrate(model, ids, {"a": scalar_setting(model, 4, levels="nuq", outliers=0.01)})["a"]
    keys, values = measured(model, ids, fitted)[:, 0, 6:8].mean(0).tolist()
    assert keys == pytest.approx(4 + 32 * 42 / 4096) == 4.328125  # 0.005 * 4095 is 20.5: 21 at each end
    assert values == pytest.approx(4 + 32 * 12 / 1024 + 32 / 1024, abs=1e-3)


@pytest.mark.parametrize(("count", "shift", "spread"), [(30, 0.01, 0.005), (141, 0.3, 0.1)])
def test_the_paired_standard_error_is_that_of_a_bootstrap_over_windows(count, shift, spread):
    rng = random.Random(count)
    baseline = [rng.gauss(2.8, 0.3) for _ in range(count)]
    nll = [loss + rng.gauss(shift, spread) for loss in baseline]
    ours, drawn_differences = paired_difference(nll, baseline), []
    for _ in range(4000):
        drawn = rng.choices(range(count), k=count)
        one, other = (math.exp(statistics.fmean(losses[i] for i in drawn)) for losses in (nll, baseline))
        drawn_differences.append((one - other, 100 * (one / other - 1)))
    deviations = [statistics.stdev(each) for each in zip(*drawn_differences, strict=True)]
    assert [ours["delta_ppl_se"], ours["delta_percent_se"]] == pytest.approx(deviations, rel=0.1)
    assert ours["delta_ppl_se"] < qu.perplexity(nll) * standard_error(nll) / 2
    assert ours["delta_ppl"] == pytest.approx(math.exp(statistics.fmean(nll)) - math.exp(statistics.fmean(baseline)))
    assert qu.perplexity([1e9]) == math.inf and math.isnan(qu.perplexity([math.nan])) and standard_error([1.0]) is None


def test_the_python_example_of_the_docs_gives_what_the_script_prints(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec((ROOT / "docs" / "python.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0], {})
    assert json.loads(capsys.readouterr().out) == pytest.approx([22.7961, 22.9889], rel=1e-4)
