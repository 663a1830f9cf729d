"""Every family of models: what is quantized is what its cache would hold before RoPE."""

import math
import re

import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoModelForCausalLM

import quant_utils as qu

TINY = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MHA, MQA = {"num_key_value_heads": 4}, {"num_key_value_heads": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
FAMILIES = {
    "Llama (GQA)": ("llama", {}),
    "Llama (MHA)": ("llama", MHA),
    "Llama (MQA)": ("llama", MQA),
    "Llama 3.1, 3.2": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "Llama with YaRN": ("llama", {"rope_parameters": YARN}),
    "Llama with biases": ("llama", {"attention_bias": True}),
    "Mistral": ("mistral", {"sliding_window": 8}),
    "Mixtral": ("mixtral", {"num_local_experts": 2}),
    "Qwen2": ("qwen2", {}),
    "Qwen2-MoE": ("qwen2_moe", {"num_experts": 4, **EXPERTS}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {"num_experts": 4, **EXPERTS}),
    "Phi-2": ("phi", {"qk_layernorm": True}),
    "Phi-3, Phi-4": ("phi3", {}),
    "Phi-3.5-MoE": ("phimoe", {"num_local_experts": 2}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"sliding_window": 8}),
    "Gemma 3": ("gemma3_text", {"sliding_window": 8}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", {"sliding_window": 8}),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "FlexOlmo": ("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
    "Granite": ("granite", {"attention_multiplier": 0.2}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Command-R": ("cohere", {"use_qk_norm": True}),
    "Command-R7B": ("cohere2", {"sliding_window": 8}),
    "Apertus": ("apertus", {}),
    "EXAONE 4": ("exaone4", {}),
    "GLM-4": ("glm4", {}),
    "GLM-4.5": ("glm4_moe", {"use_qk_norm": True, "n_routed_experts": 4, "first_k_dense_replace": 1, **EXPERTS}),
    "MiniMax-M2": ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "StableLM": ("stablelm", {"qk_layernorm": True}),
    "GPT-OSS": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Seed-OSS": ("seed_oss", {}),
    "StarCoder2": ("starcoder2", {}),
    "Nemotron": ("nemotron", {}),
    "OPT": ("opt", {"num_attention_heads": 4, "word_embed_proj_dim": 32, "ffn_dim": 32}),
    "GPT-2": ("gpt2", None),
}


def tiny(kind, changes):
    torch.manual_seed(0)
    settings = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if changes is None else {}
    config = AutoConfig.for_model(kind, **(settings or TINY | changes))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, weights in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # what initialization leaves alike in every channel
            weights.uniform_(0.5, 1.5)
        elif weights.ndim > 1:
            weights.mul_(8)  # attention that looks at some tokens more than at others
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return tiny(*FAMILIES[request.param])


def rotated(x, kind, embeddings, backwards=False):
    """RoPE on x [T,H,D] by (cos, sin) [B,T,R] as the attention layer of that kind got them, or its inverse."""
    cos, sin = (each[0].double()[:, None] for each in embeddings)  # [T,1,R]; one entry for each pair is wanted
    if kind in ("cohere", "cohere2"):
        cos, sin = cos[..., ::2], sin[..., ::2]
    elif kind != "gpt_oss":
        cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    if backwards:
        scale = cos.square() + sin.square()
        cos, sin = cos / scale, -sin / scale
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    neighbours = kind in ("cohere", "cohere2", "glm4")  # which entries make a pair
    first, second = (turned[..., ::2], turned[..., 1::2]) if neighbours else turned.chunk(2, dim=-1)
    pair = first * cos - second * sin, first * sin + second * cos
    turned = torch.stack(pair, dim=-1).flatten(-2) if neighbours else torch.cat(pair, dim=-1)
    return torch.cat([turned, rest], dim=-1)


def embeddings_by_layer(model, ids):
    """[(cos, sin) or None, ...] that every attention layer is called with, and the cache after it."""
    seen, handles = {}, []

    def watch(layer):
        def hook(module, args, kwargs):
            if (given := kwargs.get("position_embeddings")) is not None:
                seen[layer] = given if getattr(module, "use_rope", True) else None

        return hook

    for name, module in model.named_modules():
        if name.endswith(("self_attn", "attn")) and qu.layer_of(name) is not None:
            handles.append(module.register_forward_pre_hook(watch(qu.layer_of(name)), with_kwargs=True))
    cache = model.get_decoder()(input_ids=ids, use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    return [seen.get(layer) for layer in range(len(cache.layers))], cache


@torch.inference_mode()
def test_the_cache_holds_the_quantized_keys_turned_by_rope_and_the_quantized_values(family):
    """The sites are quantized; the cache's keys are turned back and must be what the quantizer gave."""
    specs = {"k_proj": qu.QuantSpec(qu.PER_CHANNEL, 2), "v_proj": qu.QuantSpec(qu.PER_TOKEN, 3)}
    quantizers, ids = qu.dynamic_quantizers(family, specs), torch.randint(3, 48, (1, 24))
    sites, given = qu.find_sites(family, specs), {}
    assert len(sites) == 4 and all(site.width % 8 == 0 for site in sites.values())

    with qu.simulate_quantization(family, quantizers):
        hooks = [
            site.module.register_forward_hook(
                lambda module, args, out, name=name, site=site: given.update({name: site.read(out)[0]})
            )
            for name, site in sites.items()
        ]
        embeddings, cache = embeddings_by_layer(family, ids)
    for hook in hooks:
        hook.remove()
    for name, quantized in given.items():
        layer, part = qu.layer_of(name), "keys" if name.endswith("k_proj") else "values"
        held = getattr(cache.layers[layer], part)[0].transpose(0, 1).double()  # [T,H,D]
        expected = quantized[-len(held) :].double().reshape(held.shape)  # a sliding window keeps the last tokens
        if part == "keys" and embeddings[layer] is not None:
            turn = [each[:, -len(held) :] for each in embeddings[layer]]
            held = rotated(held, family.config.model_type, turn, backwards=True)
        torch.testing.assert_close(held, expected, rtol=1e-4, atol=1e-5)
        levels = [len(row.unique()) for row in (quantized.T if part == "keys" else quantized)]
        assert max(levels) <= (4 if part == "keys" else 8) and max(levels) > 2  # it has been quantized, along its axis


@torch.inference_mode()
def test_the_site_is_what_the_unquantized_cache_holds_before_rope(family):
    sites, seen = qu.find_sites(family, {"k_proj"}), {}
    ids = torch.randint(3, 48, (1, 24))
    with qu.hooked(
        (site.module, lambda module, args, out, name=name, site=site: seen.update({name: site.read(out)[0]}))
        for name, site in sites.items()
    ):
        embeddings, cache = embeddings_by_layer(family, ids)
    has_rope = family.config.model_type not in ("gpt2", "opt")
    assert any(each is not None for each in embeddings) == has_rope
    for name, keys in seen.items():
        layer = qu.layer_of(name)
        held = cache.layers[layer].keys[0].transpose(0, 1).double()
        keys = keys[-len(held) :].double().reshape(held.shape)
        if embeddings[layer] is not None:
            turn = [each[:, -len(held) :] for each in embeddings[layer]]
            assert not torch.allclose(keys, held, rtol=1e-2)  # it is before RoPE, not behind it
            keys = rotated(keys, family.config.model_type, turn)
        torch.testing.assert_close(keys, held, rtol=1e-4, atol=1e-5)


def test_every_family_passes_the_check_that_each_run_makes(family):
    qu.check_against_cache(family, qu.find_sites(family, {"k_proj", "v_proj"}))


def test_every_line_of_the_site_table_is_tested():
    assert set(qu.SITES) <= {kind for kind, _ in FAMILIES.values()}


def test_every_family_is_calibrated_and_evaluated(family):
    """The whole way, with gradients: NUQ by Fisher information, then losses."""
    axes = {"k_proj": qu.PER_CHANNEL, "v_proj": qu.PER_TOKEN}
    specs = {leaf: qu.QuantSpec(axis, 3, "nuq", include_sparse=True, first_few_fp16=1) for leaf, axis in axes.items()}
    windows = torch.randint(3, 48, (2, 24))
    fitted = qu.calibrate(family, windows, {3: specs}, qu.CalibrationSpec(fisher="paper", seqlen=24))[3]
    quantizers = {name: quantizer for name, (quantizer, _) in fitted.items()}
    assert all(fit.error < 0.2 for _, fit in fitted.values())
    settings = [qu.Setting(16, "nothing", {}), qu.Setting(3, "keys and values", quantizers)]
    run = qu.Run({"text": windows}, settings, qu.cache_widths(family))
    list(qu.measure(family, run))
    for plain, quantized in run.measured["text"]:
        assert math.isfinite(quantized.nll) and quantized.kl > 0 and quantized.nll != plain.nll
        assert plain.key_bits == plain.value_bits == 16 and 3 < quantized.key_bits < quantized.value_bits < 16


def test_the_table_in_the_readme_is_this_one():
    readme = (ROOT / "README.md").read_text()
    table = readme[readme.index("| family | loads |") :].split("\n\n")[0].splitlines()[2:]
    rows = {name: where for name, _, _, where in (re.split(r" \| ", row.strip("| ")) for row in table)}
    assert list(rows) == list(FAMILIES)
    for name, where in rows.items():
        place = next(iter(qu.find_sites(tiny(*FAMILIES[name]), {"k_proj"}).values())).place
        assert where == f"`{place.module}`" + (", a slice" if place.block is not None else "")


# -- what is refused


def refused(kind, changes, match):
    with pytest.raises(qu.UserError, match=match):
        model = tiny(kind, changes)
        qu.check_against_cache(model, qu.find_sites(model, ["k_proj", "v_proj"]))


def test_a_compressed_latent_is_refused_with_the_reason():
    for kind in ("deepseek_v2", "deepseek_v3"):
        latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        refused(kind, {**latent, "n_routed_experts": 4, **EXPERTS}, "compressed latent .multi-head latent attention.")


def test_a_fused_projection_that_no_one_has_described_is_refused_with_what_there_is():
    changes = {"num_key_value_heads": 4}
    refused("gpt_neox", changes, "GPTNeoXForCausalLM has no projection k_proj, v_proj; it has: query_key_value, dense")


def test_keys_that_are_clipped_behind_the_projection_are_refused():
    refused("olmo", {"clip_qkv": 2.0}, r"OlmoForCausalLM clips keys and values behind the projections \(clip_qkv\)")


def test_a_model_without_a_cache_like_ours_is_one_line():
    refused(
        "recurrent_gemma", {"lru_width": 32, "num_hidden_layers": 3}, "this family is not supported yet|does not run"
    )


def test_a_vocabulary_of_a_few_words_is_checked_too():
    model = tiny("llama", {"vocab_size": 6})
    qu.check_against_cache(model, qu.find_sites(model, ["k_proj", "v_proj"]))


def test_broken_weights_are_not_called_an_overflow():
    model = tiny("llama", {})
    model.model.layers[1].self_attn.k_proj.weight.fill_(math.nan)
    specs = {"k_proj": qu.QuantSpec(qu.PER_CHANNEL, 3)}
    with pytest.raises(
        qu.UserError, match=r"layers\.1\.self_attn\.k_proj gives nan or inf in float32.*the model is broken"
    ):
        qu.calibrate(model, torch.randint(3, 48, (1, 24)), {3: specs}, qu.CalibrationSpec())


def test_families_without_sdpa_get_eager_attention():
    kinds = {kind: AutoConfig.for_model(kind, **TINY) for kind in ("gpt_oss", "llama")}
    chosen = {
        kind: qu.ModelSpec("m", device="cpu").resolved(config).attn_implementation for kind, config in kinds.items()
    }
    assert chosen == {"gpt_oss": "eager", "llama": "sdpa"}


def test_norms_that_no_one_has_described_are_refused(monkeypatch):
    monkeypatch.delitem(qu.SITES, "qwen3")
    refused("qwen3", {}, r"Qwen3ForCausalLM normalizes the output of k_proj \(k_norm\)")


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("qwen3", qu.Place("k_proj")),  # before the norm
        ("gemma3_text", qu.Place("k_norm", heads=2)),  # heads taken for tokens
        ("llama", qu.Place("q_proj")),
        ("phi3", qu.Place("qkv_proj", block=-1)),  # the values
    ],
)
def test_a_wrong_line_in_the_site_table_is_noticed(kind, place, monkeypatch):
    monkeypatch.setitem(qu.SITES, kind, {**qu.SITES.get(kind, {}), "k_proj": place})
    monkeypatch.setattr(qu.re, "fullmatch", lambda *_: None)  # the rule about names
    refused(kind, MHA, "caches other keys than model.layers.0.self_attn.k_proj gives")


def test_values_that_are_changed_behind_the_projection_are_noticed():
    model = tiny("llama", {})
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.v_proj = torch.nn.Sequential(attention.v_proj, torch.nn.Tanh())  # its name is now v_proj.0
        attention.v_proj.out_features = 16
    sites = {
        name: qu.Site(model.get_submodule(f"{name}.0"), qu.Place("0"), 16) for name in qu.find_sites(model, {"v_proj"})
    }
    with pytest.raises(qu.UserError, match=r"caches other values than model\.layers\.0"):
        qu.check_against_cache(model, sites)


@pytest.mark.parametrize("name", ["Qwen3", "Gemma 3", "Phi-3, Phi-4"])
def test_sites_behind_norms_and_in_fused_projections_are_compiled(name):
    model, ids = tiny(*FAMILIES[name]), torch.randint(3, 48, (2, 24))
    axes = {"k_proj": qu.PER_CHANNEL, "v_proj": qu.PER_TOKEN}
    specs = {leaf: qu.QuantSpec(axis, 2, include_sparse=True, first_few_fp16=1) for leaf, axis in axes.items()}
    settings = [qu.Setting(16, "nothing", {}), qu.Setting(2, "keys and values", qu.dynamic_quantizers(model, specs))]
    runs = [qu.Run({"text": ids}, settings, qu.cache_widths(model)) for _ in range(2)]
    list(qu.measure(model, runs[0]))
    with qu.compiled(model):
        list(qu.measure(model, runs[1]))
    for eager, compiled in zip(*(run.measured["text"] for run in runs), strict=True):
        for one, other in zip(eager, compiled, strict=True):
            assert other.nll == pytest.approx(one.nll, rel=1e-4) and other.key_bits == one.key_bits
        assert abs(compiled[0].nll - compiled[1].nll) > 1e-2
