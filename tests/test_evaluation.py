"""The perplexity loop, the comparison with the unquantized model and the storage cost, against plain counts."""

import itertools
import math
import random
import statistics

import pytest
import torch
from conftest import NANO, measured, perplexity
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

import quant_utils as qu

SPECS = {"k_proj": qu.QuantSpec(qu.PER_CHANNEL, 3), "v_proj": qu.QuantSpec(qu.PER_TOKEN, 3)}
TINY = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def dynamic(model, bits, key_axis=qu.PER_CHANNEL, **options):
    specs = {"k_proj": qu.QuantSpec(key_axis, bits, **options), "v_proj": qu.QuantSpec(qu.PER_TOKEN, bits, **options)}
    return qu.dynamic_quantizers(model, specs)


@torch.inference_mode()
def whole_log_probs(model, ids, quantizers=None):
    """[T-1,V] in double precision, from the whole logits of ids [T]."""
    with qu.simulate_quantization(model, quantizers or {}):
        return model(ids[None]).logits[0, :-1].double().log_softmax(-1)


def plain_losses(model, windows):
    """Mean loss of every window."""
    return [-whole_log_probs(model, ids).gather(1, ids[1:, None]).mean().item() for ids in windows]


# -- the loop


def test_perplexity_is_that_of_a_plain_loop(model, windows):
    (result,) = qu.results(measured(model, windows, {}), "text")
    expected = plain_losses(model, windows)
    assert result["window_nll"] == pytest.approx(expected, rel=1e-5)
    assert result["nll"] == pytest.approx(statistics.fmean(expected), rel=1e-6)
    assert result["ppl"] == pytest.approx(math.exp(statistics.fmean(expected)), rel=1e-5)
    assert result["ppl_se"] == pytest.approx(result["ppl"] * statistics.stdev(expected) / math.sqrt(11), rel=1e-4)


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_a_batch_of_windows_is_the_windows_one_by_one(model, windows, batch_size):
    windows, quantizers = windows[:5], dynamic(model, 3, include_sparse=True)
    together, single = (
        qu.results(measured(model, windows, {}, quantizers, batch_size=b), "text") for b in (batch_size, 1)
    )
    for name in ("window_nll", "window_kl", "window_top1_agreement", "window_key_bits", "window_value_bits"):
        assert together[1][name] == pytest.approx(single[1][name], rel=1e-2 if "top1" in name else 1e-3)
    assert together[1]["ppl"] == pytest.approx(single[1]["ppl"], rel=1e-4)


@pytest.mark.parametrize("tokens", [1, 2, 99, 255, 510, 511, 10_000])
def test_chunked_statistics_are_the_whole_ones(model, windows, monkeypatch, tokens):
    ids, quantizers = windows[:2, : 20 if tokens < 3 else 256], dynamic(model, 2)
    whole, chunked = [], []
    for run, size in ((whole, 10**6), (chunked, tokens)):
        monkeypatch.setattr(qu, "HEAD_TOKENS", size)
        run += qu.results(measured(model, ids, {}, quantizers, batch_size=2), "text")
    for one, other in zip(whole, chunked, strict=True):
        for name in ("window_nll", "window_kl", "window_top1_agreement"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("batch_size", "chunks"), [(1, 6), (2, 11), (3, 16)])
def test_logits_exist_a_chunk_at_a_time(model, windows, monkeypatch, batch_size, chunks):
    monkeypatch.setattr(qu, "HEAD_TOKENS", 100)
    seen = []
    handle = model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out[..., 0].numel()))
    try:
        measured(model, windows[:batch_size], {}, dynamic(model, 4), dynamic(model, 2), batch_size=batch_size)
    finally:
        handle.remove()
    assert sum(seen) == 3 * 511 * batch_size and max(seen) <= 100 and len(seen) == 3 * chunks


@pytest.mark.parametrize(
    "make",
    [
        lambda: LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)),
        lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.3)),
        lambda: GraniteForCausalLM(GraniteConfig(**TINY, num_key_value_heads=1, logits_scaling=0.05)),
        lambda: OPTForCausalLM(OPTConfig(**TINY, ffn_dim=16, word_embed_proj_dim=16, max_position_embeddings=64)),
        lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=1, output_router_logits=True)),
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=64, n_embd=16, n_layer=1, n_head=2)),
    ],
)
def test_what_a_model_does_around_its_decoder_is_done(make):
    """Soft caps and scales of the logits, which a head's weights alone would miss; bodies inside bodies."""
    model, ids = make().eval(), torch.randint(32, (3, 40))
    assert qu.results(measured(model, ids, {}), "text")[0]["window_nll"] == pytest.approx(
        plain_losses(model, ids), rel=1e-5
    )


def test_a_model_that_passes_its_decoder_by_is_refused(model, monkeypatch):
    bystander = torch.nn.Identity()
    monkeypatch.setattr(model, "get_decoder", lambda: bystander)
    with pytest.raises(qu.UserError, match="LlamaForCausalLM does not compute its logits from"):
        qu.head(model, BaseModelOutputWithPast(last_hidden_state=torch.zeros(1, 4, 128)), slice(0, 2))
    assert "forward" not in vars(bystander)


def test_a_vision_tower_caches_nothing():
    text = {**TINY, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    model = Gemma3ForConditionalGeneration(config).eval()
    widths = qu.cache_widths(model)
    names = [name for name, _ in model.named_modules() if name.endswith("k_proj")]
    assert len(names) == 3 and len(widths["keys"]) == len(widths["values"]) == 2
    assert not any("vision" in name for name in widths["keys"])
    assert list(qu.find_sites(model, {"v_proj"})) == list(widths["values"])


def test_fewer_bits_cost_more_per_channel_keys_cost_less_and_outliers_help(model, windows):
    base = perplexity(model, windows)
    four, three, two = (perplexity(model, windows, dynamic(model, bits)) for bits in (4, 3, 2))
    assert base < four < three < two
    assert perplexity(model, windows, dynamic(model, 8)) == pytest.approx(base, rel=1e-3)
    assert two < perplexity(model, windows, dynamic(model, 2, key_axis=qu.PER_TOKEN))
    assert perplexity(model, windows, dynamic(model, 2, include_sparse=True)) < two


def test_a_loss_that_is_not_finite_names_window_and_setting(model, windows):
    calls = []

    def poison(module, args, out):  # two chunks a window
        calls.append(None)
        return out * (math.nan if len(calls) == 5 else 1)

    handle = model.lm_head.register_forward_hook(poison)
    try:
        with pytest.raises(
            qu.UserError, match="text, abits 2, keys and values: window 3 of 11 has loss nan in float32"
        ):
            measured(model, windows, dynamic(model, 2))
    finally:
        handle.remove()


def test_perplexity_beyond_the_largest_double_is_infinite():
    assert qu.perplexity([1e9]) == math.inf and math.isnan(qu.perplexity([math.nan]))
    assert qu.perplexity([1.0, 3.0]) == math.exp(2)


# -- compared with the unquantized model


def test_divergence_and_agreement_are_those_of_whole_logits(model, windows):
    for bits in (4, 2):
        quantizers = dynamic(model, bits)
        _, result = qu.results(measured(model, windows[:3], {}, quantizers), "text")
        divergences, agreements = [], []
        for ids in windows[:3]:
            base, changed = whole_log_probs(model, ids), whole_log_probs(model, ids, quantizers)
            divergences.append(torch.nn.functional.kl_div(changed, base, log_target=True, reduction="sum").item() / 511)
            agreements.append((base.argmax(-1) == changed.argmax(-1)).double().mean().item())
        assert result["window_kl"] == pytest.approx(divergences, rel=1e-4)
        assert result["kl"] == pytest.approx(statistics.fmean(divergences), rel=1e-4)
        assert result["window_top1_agreement"] == pytest.approx(agreements, abs=1e-9)
        assert result["top1_agreement"] == pytest.approx(statistics.fmean(agreements), abs=1e-9)


def test_the_unquantized_model_is_no_distance_from_itself_and_fewer_bits_are_farther(model, windows):
    settings = [{}, *(dynamic(model, bits) for bits in (8, 4, 3, 2))]
    base, *others = qu.results(measured(model, windows[:4], *settings), "text")
    assert (base["kl"], base["top1_agreement"], base["delta_ppl"], base["delta_ppl_se"]) == (0, 1, 0, 0)
    for more, fewer in itertools.pairwise(others):
        assert 0 < more["kl"] < fewer["kl"] and 1 > more["top1_agreement"] > fewer["top1_agreement"]
        assert fewer["delta_ppl"] == fewer["ppl"] - base["ppl"] > more["delta_ppl"]
        assert fewer["delta_percent"] == pytest.approx(100 * fewer["delta_ppl"] / base["ppl"])


@given(st.integers(0, 2**32), st.sampled_from([1e-2, 0.1, 3.0]))
def test_divergence_is_never_negative_and_zero_for_equal_distributions(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    one = (torch.randn(5, 50, generator=generator) * 4).log_softmax(-1)
    other = (one + scale * torch.randn(5, 50, generator=generator)).log_softmax(-1)
    assert (qu.divergence(one, one) == 0).all() and (qu.divergence(one, other) >= 0).all()
    expected = (one.double().exp() * (one.double() - other.double())).sum(-1)
    torch.testing.assert_close(qu.divergence(one, other).double(), expected, rtol=1e-3, atol=5e-7)


@pytest.mark.parametrize(("count", "shift", "spread"), [(30, 0.01, 0.005), (141, 0.3, 0.1), (200, 0.0, 0.02)])
def test_the_paired_standard_error_is_that_of_a_bootstrap_over_windows(count, shift, spread):
    rng = random.Random(count)
    baseline = [rng.gauss(2.8, 0.3) for _ in range(count)]
    nll = [loss + rng.gauss(shift, spread) for loss in baseline]
    ours = qu.paired_difference(nll, baseline)
    differences, percents = [], []
    for _ in range(4000):
        drawn = rng.choices(range(count), k=count)
        one, other = (math.exp(statistics.fmean(losses[i] for i in drawn)) for losses in (nll, baseline))
        differences.append(one - other)
        percents.append(100 * (one / other - 1))
    assert ours["delta_ppl_se"] == pytest.approx(statistics.stdev(differences), rel=0.1)
    assert ours["delta_percent_se"] == pytest.approx(statistics.stdev(percents), rel=0.1)
    alone = qu.perplexity(nll) * qu.standard_error(nll)
    assert ours["delta_ppl_se"] < alone / 2


def test_the_paired_standard_error_of_real_windows_is_that_of_a_bootstrap(model, windows):
    ids = windows.reshape(-1, 128)  # 44 windows
    base, result = qu.results(measured(model, ids, {}, dynamic(model, 2), batch_size=4), "text")
    rng, differences = random.Random(0), []
    for _ in range(4000):
        drawn = rng.choices(range(len(ids)), k=len(ids))
        one, other = (math.exp(statistics.fmean(row["window_nll"][i] for i in drawn)) for row in (result, base))
        differences.append(one - other)
    assert result["delta_ppl_se"] == pytest.approx(statistics.stdev(differences), rel=0.1)


def test_one_window_has_no_standard_error_and_one_setting_no_difference(model, windows):
    _, result = qu.results(measured(model, windows[:1], {}, dynamic(model, 4)), "text")
    assert result["delta_ppl"] > 0 and result["delta_ppl_se"] is result["delta_percent_se"] is result["ppl_se"] is None
    (alone,) = qu.results(measured(model, windows[:2], dynamic(model, 4)), "text")
    assert alone["delta_ppl"] is alone["kl"] is alone["top1_agreement"] is None


def test_a_sweep_gives_the_figures_of_separate_runs_bit_for_bit(model, windows):
    settings = [{}, *(dynamic(model, bits, include_sparse=True) for bits in (4, 3, 2))]
    windows = windows[:4]
    together = qu.results(measured(model, windows, *settings), "text")
    for quantizers, result in zip(settings, together, strict=True):
        (alone,) = qu.results(measured(model, windows, quantizers), "text")
        same = ("ppl", "nll", "window_nll", "window_key_bits", "window_value_bits", "avg_bits", "cache_gib")
        assert {name: alone[name] for name in same} == {name: result[name] for name in same}


# -- what is started before it is read, as on a GPU


@pytest.fixture
def two_ahead(monkeypatch):
    monkeypatch.setattr(qu, "batches_ahead", lambda model: 2)


def test_reading_behind_gives_the_same(two_ahead, model, windows, monkeypatch):
    behind = measured(model, windows[:5], {}, dynamic(model, 3)).measured
    monkeypatch.undo()
    assert behind == measured(model, windows[:5], {}, dynamic(model, 3)).measured


def test_what_was_started_is_read_whatever_interrupts(two_ahead, model, windows, monkeypatch):
    whole, calls = qu.measure_batch, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(qu, "measure_batch", interrupted)
    run = qu.Run({"text": windows}, [qu.Setting(16, "nothing", {})], qu.cache_widths(model))
    with pytest.raises(KeyboardInterrupt):
        list(qu.measure(model, run))
    assert len(run.measured["text"]) == 3
    monkeypatch.setattr(qu, "measure_batch", whole)
    run.measured.clear()
    measuring = qu.measure(model, run)
    next(measuring)
    measuring.close()
    assert len(run.measured["text"]) == 3


def test_a_bad_figure_behind_ends_the_run_and_keeps_what_came_before(two_ahead, model, windows, monkeypatch):
    whole, calls = qu.windows_from, []

    def broken(*args):
        calls.append(None)
        rows = whole(*args)
        return [[qu.Window(math.nan)]] if len(calls) >= 3 else rows

    monkeypatch.setattr(qu, "windows_from", broken)
    run = qu.Run({"text": windows}, [qu.Setting(16, "nothing", {})], qu.cache_widths(model), place=(20, 50))
    with pytest.raises(qu.UserError, match="window 23 of 50 has loss nan"):
        list(qu.measure(model, run))
    assert len(run.measured["text"]) == 2


# -- storage cost


def test_average_bits_are_a_count_over_masks_and_shapes(model, windows):
    """Counted from what the projections give, with torch.quantile as the rule that says which entries are kept."""
    tokens, sinks, bits = 512, 2, 3
    quantizers = dynamic(model, bits, include_sparse=True, sparsity_threshold=0.95, first_few_fp16=sinks)
    totals = {"k": 0, "v": 0}

    def count(kind, axis):
        def on_output(module, args, out):  # runs before the quantization
            body = out[0, sinks:].float()
            ends = body.quantile(0.025, axis, keepdim=True), body.quantile(0.975, axis, keepdim=True)
            kept = ((body <= ends[0]) | (body >= ends[1])).sum().item()
            ranges = 128 if axis == 0 else tokens - sinks
            totals[kind] += sinks * 128 * 16 + body.numel() * bits + kept * (16 + 16) + ranges * 2 * 16

        return on_output

    handles = []
    for layer in model.model.layers:
        handles.append(layer.self_attn.k_proj.register_forward_hook(count("k", 0)))
        handles.append(layer.self_attn.v_proj.register_forward_hook(count("v", 1)))
    try:
        (result,) = qu.results(measured(model, windows[:1], quantizers), "text")
    finally:
        for handle in handles:
            handle.remove()
    entries = 6 * tokens * 128
    assert result["key_bits"] == pytest.approx(totals["k"] / entries, rel=1e-3)  # a tie may be rounded apart
    assert result["value_bits"] == pytest.approx(totals["v"] / entries, rel=1e-3)
    assert result["avg_bits"] == pytest.approx((result["key_bits"] + result["value_bits"]) / 2, rel=1e-12)
    assert result["cache_gib"] == pytest.approx(result["avg_bits"] / 8 * 2 * 6 * 128 * 131072 / 2**30, rel=1e-12)
    assert result["fp16_cache_gib"] == 2 * 2 * 6 * 128 * 131072 / 2**30


def test_nuq4_with_one_percent_outliers_on_the_shape_of_llama_3_8b():
    """1024 KV channels: 1 % of the keys, 12 of 1024 values and their range; the literature has 4.32 to 4.33."""
    shape = {"hidden_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128}
    model = LlamaForCausalLM(LlamaConfig(**TINY | shape | {"vocab_size": 8192, "num_hidden_layers": 1}))
    ids = torch.randperm(8192).view(8, 1024)  # no token twice, so no ties
    specs = {
        "k_proj": qu.QuantSpec(qu.PER_CHANNEL, 4, "nuq", include_sparse=True),
        "v_proj": qu.QuantSpec(qu.PER_TOKEN, 4, "nuq", include_sparse=True),
    }
    fitted = qu.calibrate(model.eval(), ids, {4: specs}, qu.CalibrationSpec())[4]
    (result,) = qu.results(measured(model, ids, {name: quantizer for name, (quantizer, _) in fitted.items()}), "text")
    assert result["key_bits"] == pytest.approx(4.32, abs=0.005)
    assert result["value_bits"] == pytest.approx(4 + 32 * 12 / 1024 + 32 / 1024, abs=1e-3)


@pytest.mark.parametrize(("axis", "expected"), [(qu.PER_CHANNEL, 4 + 32 / 100), (qu.PER_TOKEN, 4 + 32 / 8)])
def test_the_range_is_shared_by_the_entries_along_its_axis(axis, expected):
    spec = qu.QuantSpec(axis, 4)
    assert qu.storage_bits(qu.Quantizer(spec, qu.data_free_codebook(spec)), 100, 8) == pytest.approx(800 * expected)
    static = qu.Quantizer(spec, qu.data_free_codebook(spec), torch.zeros(8), torch.ones(8))
    assert qu.storage_bits(static, 100, 8) == 3200 and qu.storage_bits(None, 100, 8) == 12800


def test_what_is_not_quantized_is_stored_in_16_bits(model, windows):
    keys_only = {name: q for name, q in dynamic(model, 4).items() if name.endswith("k_proj")}
    (result,) = qu.results(measured(model, windows[:1], keys_only), "text")
    assert (result["key_bits"], result["value_bits"]) == (4 + 32 / 512, 16)
    assert result["avg_bits"] == (4 + 32 / 512 + 16) / 2 and result["quantized"] == "keys"


def test_a_model_without_separate_keys_and_values_has_no_storage_figures():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    fused = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=32, **shape)).eval()
    (result,) = qu.results(measured(fused, torch.randint(32, (2, 16)), {}), "text")
    assert result["avg_bits"] is result["key_bits"] is result["cache_gib"] is None


# -- where the loss comes from


def test_attribution_quantizes_keys_values_both_and_each_layer_alone(model):
    whole = qu.Setting(3, "keys and values", dynamic(model, 3))
    settings = {setting.quantized: set(setting.quantizers) for setting in qu.attribution_settings(whole)}
    layers = range(6)
    sites = {(kind, layer): f"model.layers.{layer}.self_attn.{kind}_proj" for kind in "kv" for layer in layers}
    assert settings == {
        "keys": {sites["k", layer] for layer in layers},
        "values": {sites["v", layer] for layer in layers},
        "keys and values": set(sites.values()),
        **{f"layer {layer}": {sites["k", layer], sites["v", layer]} for layer in layers},
    }
    values = qu.Setting(3, "values", {name: q for name, q in whole.quantizers.items() if name.endswith("v_proj")})
    assert [setting.quantized for setting in qu.attribution_settings(values)] == [
        "values",
        *(f"layer {i}" for i in layers),
    ]


# -- the model's dtype


def test_auto_on_a_cpu_is_single_precision_and_sdpa(model):
    assert model.dtype == torch.float32 and not model.training
    assert model.config._attn_implementation == "sdpa"


def test_dtype_is_as_asked(config_and_tokenizer):
    bf16 = qu.load_model(qu.ModelSpec(str(NANO), "bfloat16", "cpu", "eager"), config_and_tokenizer[0])
    assert bf16.dtype == torch.bfloat16 and bf16.config._attn_implementation == "eager"
    assert qu.environment(bf16)["dtype"] == "bfloat16"


def test_loss_is_taken_in_single_precision(config_and_tokenizer, windows):
    bf16 = qu.load_model(qu.ModelSpec(str(NANO), "bfloat16", "cpu"), config_and_tokenizer[0])
    with torch.inference_mode():
        scores = bf16(windows[:1]).logits[0, :-1].float().log_softmax(-1)
    expected = -scores.gather(1, windows[0, 1:, None]).mean().item()
    assert qu.results(measured(bf16, windows[:1], {}), "text")[0]["nll"] == pytest.approx(expected, rel=1e-3)


# -- overflow


def test_an_overflow_is_reported_with_its_layer_and_projection():
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(LlamaConfig(**TINY)).half().eval().requires_grad_(False)
    tiny.model.layers[1].mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(qu.UserError) as caught:
        measured(tiny, torch.randint(32, (2, 16)), {}, {})
    place = "text, abits 16, nothing: window 1 of 2 has loss nan"
    assert str(caught.value).startswith(place)
    assert str(caught.value).endswith(
        "in float16, model.layers.1.mlp.up_proj overflows first: try --dtype bfloat16 or float32"
    )
    assert sum(len(module._forward_hooks) for module in tiny.modules()) == 0


def test_the_first_projection_that_overflows_is_found_and_none_where_none_does(model, windows):
    setting = qu.Setting(3, "keys and values", dynamic(model, 3))
    assert qu.first_overflow(model, windows[0], setting) is None
    handle = model.model.layers[2].self_attn.v_proj.register_forward_hook(lambda module, args, out: out * math.inf)
    try:
        assert qu.first_overflow(model, windows[0], setting) == "model.layers.2.self_attn.v_proj"
    finally:
        handle.remove()
