"""Transform coding and prediction: their mathematics against closed forms and numpy, and models that use them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import measured, same_bits
from hypothesis import given
from hypothesis import strategies as st
from test_sites import FAMILIES, tiny

import quant_utils as qu
from quant_utils import UserError
from simquant import calibration, quantizer_file, sites
from simquant.formats import prediction, transform
from simquant.formats.transform import RIDGE, TransformQuantizer
from simquant.plans import Pair, Plan, Width

AXES = {"keys": "channel", "values": "token"}


def correlated(seed=0, windows=4, tokens=64, channels=8):
    """Return [N,T,C] of channels that mix few sources, and a gradient that dislikes errors in some directions."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    x = draw(windows, tokens, channels) @ draw(channels, channels) + draw(channels)
    return x, draw(windows, tokens, channels) @ (draw(channels, channels) * torch.linspace(0, 2, channels))


def metric_by_hand(grad):
    """Return the Fisher information of gradients with its ridge, summed token by token."""
    whole = sum(np.outer(g, g) for g in grad.flatten(0, 1).double().numpy()) / (grad.shape[0] * grad.shape[1])
    unit = np.trace(whole) / len(whole)
    return (1 - RIDGE) * whole + RIDGE * unit * np.eye(len(whole))


@given(st.integers(0, 1000), st.sampled_from(["fisher", "pca"]))
def test_components_are_uncorrelated_and_their_error_is_the_metrics(seed, metric):
    x, grad = correlated(seed)
    fitted = TransformQuantizer(2, metric=metric).fit(x, grad if metric == "fisher" else None)
    forward = fitted.forward.double().numpy()
    rows = x.flatten(0, 1).double().numpy()
    components = (rows - rows.mean(0)) @ forward
    covariance = components.T @ components / len(rows)
    spread = np.sqrt(np.diagonal(covariance))
    rounding = 5e-3 * spread[0] * np.maximum.outer(spread, spread)  # the transform is in fp16
    assert (np.abs(covariance - np.diag(spread**2)) < 1e-3 * np.outer(spread, spread) + rounding).all()
    assert (np.diff(spread) <= 1e-3 * spread[0]).all()  # the largest first
    error = np.random.default_rng(seed).normal(size=8)
    unit = transform.fisher_root(grad)[1] if metric == "fisher" else 1.0
    expected = error @ metric_by_hand(grad) @ error if metric == "fisher" else error @ error
    assert unit * np.square(error @ forward).sum() == pytest.approx(expected, rel=0.01)


@given(st.integers(0, 1000), st.integers(1, 24))
def test_forward_times_inverse_is_the_identity(seed, channels):
    fitted = TransformQuantizer(1).fit(*correlated(seed, channels=channels))
    product = fitted.forward.float() @ fitted.inverse
    assert (product - torch.eye(channels)).abs().max() < 1e-4


@pytest.mark.parametrize("sinks", [0, 3])
def test_every_component_takes_the_nearest_of_its_own_levels(sinks):
    x, grad = correlated()
    fitted = TransformQuantizer(1.5, sinks=sinks).fit(x, grad)
    given_back = fitted.quantize(x).values
    assert torch.equal(given_back[:, :sinks], x[:, :sinks])
    rows = x[:, sinks:].flatten(0, 1).double().numpy()
    components = (rows - fitted.mean.double().numpy()) @ fitted.forward.double().numpy()
    start, decoded = 0, np.empty_like(components)
    for place, width in enumerate(fitted.widths.tolist()):
        levels = fitted.levels[start : start + 2**width].double().numpy()
        start += 2**width
        decoded[:, place] = levels[np.abs(components[:, place, None] - levels).argmin(1)]
    assert start == len(fitted.levels) and fitted.widths.sum() == round(1.5 * 8)
    expected = decoded @ np.linalg.inv(fitted.forward.double().numpy()) + fitted.mean.double().numpy()
    close = np.isclose(given_back[:, sinks:].flatten(0, 1).numpy(), expected, atol=1e-3, rtol=1e-3).all(1)
    assert close.mean() > 0.99  # but for ties that rounding decides


def test_the_prediction_is_the_ridge_regression_of_numpy():
    x, other = correlated(1)[0], correlated(2, channels=5)[0]
    weight = prediction.regression(x, [other, x.roll(1, -1)])
    inputs = torch.cat([other, x.roll(1, -1), torch.ones(*x.shape[:2], 1)], -1).flatten(0, 1).double().numpy()
    ridge = np.sqrt(prediction.RIDGE * np.square(inputs).sum(0).mean())
    padded = np.concatenate([inputs, ridge * np.eye(inputs.shape[1])])
    target = np.concatenate([x.flatten(0, 1).double().numpy(), np.zeros((inputs.shape[1], 8))])
    expected = np.linalg.lstsq(padded, target, rcond=None)[0]
    np.testing.assert_allclose(weight.double().numpy(), expected, atol=2e-3, rtol=2e-3)  # it is in fp16


def test_what_is_predicted_exactly_costs_nothing_and_the_rest_is_coded():
    x, _ = correlated()
    quantizer = TransformQuantizer(0.5, metric="pca", predict="all", sources=((0, "keys"),))
    other = x @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    error = [(q.quantize(x, o).values - x).square().mean().item() for q, o in (
        (quantizer.fit(x, None, [other]), [other]), (replace(quantizer, sources=()).fit(x, None), []))]  # fmt: skip
    assert error[0] < 1e-3 * error[1]
    with pytest.raises(UserError, match="its prediction, or what"):
        replace(quantizer, sources=()).fit(x, None).quantize(x, [other])


@pytest.mark.parametrize("spoil", ["dead channel", "all tokens alike", "equal channels", "no gradient", "one window"])
def test_a_singular_covariance_is_a_sound_fit(spoil):
    x, grad = correlated()
    if spoil == "dead channel":
        x[..., 3], grad[..., 3] = 0, 0
    elif spoil == "all tokens alike":
        x[:] = x[0, 0]
    elif spoil == "equal channels":
        x[..., 1:] = x[..., :1]
    elif spoil == "no gradient":
        grad[:] = 0
    else:
        x, grad = x[:1, :2], grad[:1, :2]
    for metric, predict in (("fisher", None), ("pca", None), ("fisher", "all")):
        others = [x] if predict else []
        plain = TransformQuantizer(1, metric=metric, predict=predict, sources=((0, "keys"),) * len(others))
        fitted = plain.fit(x, grad if metric == "fisher" else None, others)
        values = fitted.quantize(x, others).values
        assert values.isfinite().all() and fitted.widths.sum() == 8
        if spoil == "all tokens alike":
            torch.testing.assert_close(values, x, atol=1e-3, rtol=1e-3)


def test_products_in_fp16_are_close_and_clip_what_they_cannot_hold():
    x, grad = correlated()
    fitted = TransformQuantizer(2).fit(x, grad)
    assert prediction.product(1e30 * torch.eye(8), torch.eye(8), torch.float16).isfinite().all()
    close = fitted.coded_in(x, torch.float16) - fitted.coded(x)
    assert close.square().mean() < 1e-2 * (fitted.coded(x) - x).square().mean()  # but for a few ties
    both = [prediction.product(x.half(), fitted.forward, dtype) for dtype in (torch.float16, torch.float32)]
    torch.testing.assert_close(*both, rtol=1e-2, atol=1e-2)


def spoiled(**changes):
    """Return the state of a fitted quantizer with other tensors in some fields."""
    fitted = TransformQuantizer(2).fit(*correlated())
    return quantizer_file.state_of(fitted) | {n: change(getattr(fitted, n)) for n, change in changes.items()}


@pytest.mark.parametrize("changes", [
    {"forward": torch.zeros_like}, {"forward": lambda t: t.float()}, {"forward": lambda t: t[:, :3]},
    {"forward": lambda t: t / 0}, {"mean": lambda t: t[:3]}, {"mean": lambda t: None}, {"mean": lambda t: t / 0},
    {"widths": lambda t: t + 9}, {"widths": lambda t: t - 9}, {"widths": lambda t: t.float()},
    {"widths": lambda t: t.roll(1) + 1}, {"widths": lambda t: None}, {"levels": lambda t: t.flip(0)},
    {"levels": lambda t: t[1:]}, {"levels": lambda t: None}, {"bits": lambda t: 9.5}, {"bits": lambda t: 0},
    {"bits": lambda t: "2"}, {"sinks": lambda t: -1}, {"metric": lambda t: "loss"}, {"predict": lambda t: "future"},
    {"weight": lambda t: torch.ones(3, 3)}, {"weight": lambda t: "heavy"}, {"window": lambda t: "x"},
], ids=lambda changes: " ".join(changes))  # fmt: skip
def test_a_file_that_does_not_hold_together_is_refused(changes):
    with pytest.raises(UserError):
        quantizer_file.made_of(spoiled(**changes))


def settings_of(model, *widths, skipped=(), **options):
    """Return {row: setting} of transform coding, not fitted."""
    plan = Plan([Pair("klt", "klt")], [Width(*each) for each in widths], AXES, {n: (n, v) for n, v in options.items()})
    return replace(plan, skipped=skipped).settings(sites.find_sites(model))


@pytest.fixture(scope="module")
def fitted(model, windows):
    """Settings of the bundled model at 2 bits, at 2/1 and at 1, with prediction and without."""
    rates = ((2, 2), (2, 1), (1, 1))
    settings = {("predicted" if p else "plain", row.abits): setting
                for p in (None, "all") for row, setting in settings_of(model, *rates, predict=p).items()}  # fmt: skip
    return calibration.calibrate(model, windows[:4], settings)


def average(setting, part):
    """Return the average width of all components of keys or values."""
    return torch.cat([q.widths for site, q in setting.items() if site.part == part]).double().mean().item()


def test_sites_share_bits_and_the_report_counts_them(model, windows, fitted):
    figures = measured(model, windows[:1], {}, *fitted.values())[0]
    for (_, abits), setting, row in zip(fitted, fitted.values(), figures[1:], strict=True):
        each = [average(setting, part) for part in qu.PARTS]
        assert row[6:8].tolist() == pytest.approx(each, abs=1e-9)
        if abits == "2/1":
            assert each == pytest.approx([2, 1], abs=0.01)
        else:
            assert sum(each) / 2 == pytest.approx(abits, abs=0.01)  # all sites have as many channels
        assert len({int(q.widths.sum()) for q in setting.values()}) > 1  # they do not have the same


def test_bits_and_prediction_help(model, windows, fitted):
    losses = measured(model, windows[:2], {}, *fitted.values())[..., 0].mean(0)
    plain, predicted = losses[1:4] - losses[0], losses[4:] - losses[0]
    assert (predicted < plain).all() and plain[0] < plain[2] and predicted[0] < predicted[2]


@torch.inference_mode()
def outputs(model, ids, setting):
    """Return {(layer, part): [B,T,C]} of what leaves the modules of all sites, quantized or not."""
    seen = {}
    every = sites.find_sites(model)
    hooks = [(s.module, lambda m, a, x, s=s: seen.update({s.key: x.clone()})) for s in every]
    with qu.quantized(setting), qu.hooked(hooks):
        model(ids)
    return seen


def test_the_predictor_sees_what_other_caches_gave_back(model, windows, fitted):
    """The values of layer 1, by hand: from the keys before them and the layer below, as these were quantized."""
    setting, key, ids = fitted["predicted", 1], (1, "values"), windows[:1, :32]
    quantizer = next(each for site, each in setting.items() if site.key == key)
    assert quantizer.sources == ((1, "keys"), (0, "keys"), (0, "values"))
    seen = outputs(model, ids, setting)
    below = {site: each for site, each in setting.items() if site.key <= (1, "keys")}
    before = outputs(model, ids, below)[key]
    assert torch.equal(seen[key], quantizer.quantize(before, [seen[source] for source in quantizer.sources]).values)


def test_without_rounding_to_levels_nothing_changes(model, windows, fitted, monkeypatch):
    monkeypatch.setattr(transform, "nearest_of_own", lambda columns, table, borders: columns)
    with torch.inference_mode():
        plain = model(windows[:1]).logits
        for setting in (fitted["plain", 1], fitted["predicted", 1]):
            with qu.quantized(setting):
                assert (model(windows[:1]).logits - plain).abs().max() < 1e-3


def test_any_subset_of_layers_and_parts_works_without_prediction(model, windows, fitted):
    whole = fitted["plain", 2]
    some = {site: each for site, each in whole.items() if site.layer in (1, 4) and site.part == "keys"}
    assert measured(model, windows[:1], {}, some)[0, 1, 1] < measured(model, windows[:1], {}, whole)[0, 1, 1]


def test_with_prediction_the_layer_below_is_the_next_quantized_one(model):
    (setting,) = settings_of(model, (2, 2), skipped=(1,), predict="all").values()
    sources = {site.key: quantizer.sources for site, quantizer in setting.items()}
    assert sources[0, "keys"] == () and sources[0, "values"] == ((0, "keys"),)
    assert sources[2, "keys"] == ((0, "keys"), (0, "values"))
    (alone,) = settings_of(model, (16, 1), predict="all").values()
    assert {s.key: q.sources for s, q in alone.items()}[3, "values"] == ((2, "values"),)
    incomplete = {site: each for site, each in setting.items() if site.key != (0, "keys")}
    with pytest.raises(UserError, match="keys of layer 0, which stay unquantized"), qu.quantized(incomplete):
        pass


def test_saved_and_loaded_logits_are_the_same_bits(model, windows, fitted, tmp_path):
    path, found = str(tmp_path / "q.pkl"), sites.find_sites(model)
    for kind, predict in (("plain", None), ("predicted", "all")):
        asked = settings_of(model, (2, 2), (2, 1), (1, 1), predict=predict)
        held = {row: fitted[kind, row.abits] for row in asked}
        about = {"model": {"name": "nano", "type": "llama", "channels": {s.name: s.channels for s in found}}}
        quantizer_file.save(path, held, about | {"settings": {}})
        loaded = quantizer_file.fitted(quantizer_file.load(path), "llama", found, asked)
        before, after = (measured(model, windows[:1], {}, *each.values()) for each in (held, loaded))
        assert same_bits(before, after)
    with pytest.raises(UserError, match="predicted from other layers"):
        quantizer_file.fitted(
            quantizer_file.load(path), "llama", found, settings_of(model, (2, 2), skipped=(0,), predict="all")
        )
    with pytest.raises(UserError, match=r"no usable 1-bit quantizer"):  # 1/2 was not fitted: bits are shared otherwise
        quantizer_file.fitted(quantizer_file.load(path), "llama", found, settings_of(model, (1, 2), predict="all"))


@pytest.mark.parametrize("name", ["Qwen3", "Phi-3, Phi-4", "Qwen2", "Llama (MQA)", "Gemma 3", "GPT-2"])
@pytest.mark.parametrize("predict", [None, "all"])
def test_families(name, predict):
    """k_norm, a fused projection, biases, a single head, sliding windows, GPT-2's."""
    model = tiny(*FAMILIES[name])
    ids = torch.randint(48, (4, 24), generator=torch.Generator().manual_seed(0))
    fitted = calibration.calibrate(model, ids, settings_of(model, (4, 4), (1, 1), predict=predict))
    losses = measured(model, ids, {}, *fitted.values())[..., 1].mean(0)
    assert 0 <= losses[1] < losses[2] < 10  # KL divergence
