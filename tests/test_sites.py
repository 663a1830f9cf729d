"""Every family of models: what is quantized is what its cache would hold before RoPE."""

import logging
import math
import re
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT, same_bits
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

import quant_utils as qu
from simquant import cache_check, calibration, sites, speed
from simquant.sites import Place

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
FEW_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 8}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
SHARING = {  # the last two layers read what the first two have cached
    "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 48, **WINDOW,
}  # fmt: skip
OWN_HEADS = {"head_dim": None, "num_key_value_heads": None}  # that the config has no such settings
CONV = {"layer_types": ["conv", "full_attention"]}
SHARED_EXPERT = {"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS}
FAMILIES = {
    "Llama (GQA)": ("llama", {}), "Llama (MHA)": ("llama", MHA), "Llama (MQA)": ("llama", MQA),
    "Llama 3.1, 3.2": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "Llama with YaRN": ("llama", {"rope_parameters": YARN}), "Llama with biases": ("llama", {"attention_bias": True}),
    "Mistral": ("mistral", WINDOW), "Mixtral": ("mixtral", {"num_local_experts": 2}),
    "Qwen2": ("qwen2", {}), "Qwen2-MoE": ("qwen2_moe", {"num_experts": 4, **EXPERTS}),
    "Qwen3": ("qwen3", {}), "Qwen3-MoE": ("qwen3_moe", {"num_experts": 4, **EXPERTS}),
    "Phi-2": ("phi", {"qk_layernorm": True}), "Phi-3, Phi-4": ("phi3", {}),
    "Phi-3.5-MoE": ("phimoe", {"num_local_experts": 2}),
    "Gemma": ("gemma", {}), "Gemma 2": ("gemma2", WINDOW), "Gemma 3": ("gemma3_text", WINDOW),
    "OLMo": ("olmo", {}), "OLMo 2": ("olmo2", {}), "OLMo 3": ("olmo3", WINDOW),
    "OLMoE": ("olmoe", FEW_EXPERTS), "FlexOlmo": ("flex_olmo", FEW_EXPERTS),
    "Granite": ("granite", {"attention_multiplier": 0.2}), "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Command-R": ("cohere", {"use_qk_norm": True}), "Command-R7B": ("cohere2", WINDOW),
    "Apertus": ("apertus", {}), "EXAONE 4": ("exaone4", {}), "GLM-4": ("glm4", {}),
    "GLM-4.5": ("glm4_moe", {"use_qk_norm": True, "n_routed_experts": 4, "first_k_dense_replace": 1, **EXPERTS}),
    "MiniMax-M2": ("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "StableLM": ("stablelm", {"qk_layernorm": True}),
    "GPT-OSS": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Seed-OSS": ("seed_oss", {}), "StarCoder2": ("starcoder2", {}), "Nemotron": ("nemotron", {}),
    "Qwen3-Next": ("qwen3_next", LINEAR | SHARED_EXPERT), "Qwen3.5": ("qwen3_5_text", LINEAR),
    "Qwen3.5-MoE": ("qwen3_5_moe_text", LINEAR | SHARED_EXPERT),
    "LFM2": ("lfm2", CONV), "LFM2-MoE": ("lfm2_moe", CONV | {"num_experts": 4, "num_dense_layers": 1, **EXPERTS}),
    "Gemma 3n": ("gemma3n_text", SHARING | {"altup_num_inputs": 2, "laurel_rank": 4}),
    "Gemma 4": ("gemma4_text", SHARING | {"global_head_dim": 16}),
    "Gemma 4, keys as values": ("gemma4_text", SHARING | {"attention_k_eq_v": True, "global_head_dim": 16}),
    "Ministral 3": ("ministral3", {}), "EXAONE MoE": ("exaone_moe", FEW_EXPERTS), "Arcee": ("arcee", {}),
    "ERNIE 4.5": ("ernie4_5", {}), "GLM": ("glm", {}),
    "dots.llm1": ("dots1", {"n_routed_experts": 4, "n_shared_experts": 1, **EXPERTS}),
    "AFMoE": ("afmoe", {"num_experts": 4, "num_dense_layers": 1, **EXPERTS, **WINDOW}),
    "Solar Open": ("solar_open", {"n_routed_experts": 4, **EXPERTS}), "Helium": ("helium", {}), "Doge": ("doge", {}),
    "Hunyuan 3": ("hy_v3", {"num_experts": 4, **EXPERTS}), "Laguna": ("laguna", {"num_experts": 4, **EXPERTS}),
    "DiffLlama": ("diffllama", {}), "BitNet": ("bitnet", {}),
    "Granite-MoE": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "Granite 4": ("granitemoehybrid", {
        "layer_types": ["mamba", "attention"], "position_embedding_type": "rope", **MAMBA,
    }),
    "Bamba": ("bamba", MAMBA | {"attn_layer_indices": [1]}),
    "Jamba": ("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "num_experts": 2}),
    "Falcon-H1": ("falcon_h1", MAMBA | {"mamba_d_ssm": 64}),
    "Nemotron-H": ("nemotron_h", {
        "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1,
    }),
    "OLMo Hybrid": ("olmo_hybrid", LINEAR), "MiniMax-01": ("minimax", LINEAR | {"num_local_experts": 4}),
    "JetMoE": ("jetmoe", {"kv_channels": 8, "num_local_experts": 4}), "GPT-J": ("gptj", {"rotary_dim": 4}),
    "CodeGen": ("codegen", {"rotary_dim": 4}), "Persimmon": ("persimmon", MHA),
    "Pythia (GPT-NeoX)": ("gpt_neox", MHA), "Japanese GPT-NeoX": ("gpt_neox_japanese", MHA),
    "Falcon 7B": ("falcon", OWN_HEADS),
    "Falcon 40B": ("falcon", {**OWN_HEADS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon RW": ("falcon", {**OWN_HEADS, "multi_query": False, "alibi": True}),
    "BLOOM": ("bloom", {}), "MPT": ("mpt", MHA),
    "StarCoder (GPT-BigCode)": ("gpt_bigcode", MHA), "GPT-BigCode (MHA)": ("gpt_bigcode", {"multi_query": False}),
    "OPT": ("opt", {"num_attention_heads": 4, "word_embed_proj_dim": 32, "ffn_dim": 32}), "GPT-2": ("gpt2", None),
}  # fmt: skip
NEIGHBOURS = (
    "cohere",
    "cohere2",
    "codegen",
    "ernie4_5",
    "glm",
    "glm4",
    "gptj",
    "helium",
)  # RoPE turns neighbouring channels, not channels half a head apart
NO_ROPE = ("gpt2", "opt", "bloom", "mpt", "gpt_bigcode", "jamba", "nemotron_h")

REWRITTEN = {"qwen3_next", "lfm2", "lfm2_moe", "granitemoehybrid", "bamba", "jamba", "falcon_h1", "gptj", "codegen"}
IS_OLD = not hasattr(transformers.cache_utils, "LinearAttentionCacheLayerMixin")  # of hybrids' caches and RoPE


def tiny(kind, changes):
    """A model of a family with random weights."""
    if kind not in CONFIG_MAPPING or (IS_OLD and kind in REWRITTEN):
        pytest.skip(f"transformers {transformers.__version__} has no {kind} as it is now: use a newer one")
    torch.manual_seed(0)
    settings = {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64} if changes is None else {}
    settings = settings or {name: value for name, value in (TINY | changes).items() if value is not None}
    config = AutoConfig.for_model(kind, **settings)
    return lively(AutoModelForCausalLM.from_config(config))


def lively(model):
    """Let the channels and the attention of a model with random weights differ enough to be told apart."""
    for name, weights in model.eval().requires_grad_(False).named_parameters():
        if "norm" in name or name.endswith("bias"):  # what initialization leaves alike in every channel
            weights.uniform_(0.5, 1.5)
        elif weights.ndim > 1:
            weights.mul_(8)  # attention that looks at some tokens more than at others
    return model


@pytest.fixture(params=FAMILIES)
def family(request):
    return tiny(*FAMILIES[request.param])


def setting_of(model, keys=3, values=3, **options):
    """{site: quantizer}, keys per channel and values per token."""
    axes = {"keys": ("channel", keys), "values": ("token", values)}
    return {s: qu.ScalarQuantizer(*axes[s.part], **options) for s in sites.find_sites(model)}


def unturned(x, kind, embeddings):
    """Undo RoPE on x [T,H,D]: (cos, sin) [B,T,R] as the attention layer of that kind got them."""
    cos, sin = (each[0].double()[:, None] for each in embeddings)  # [T,1,R]; one entry for each pair is wanted
    cos, sin = (sin, cos) if kind in ("codegen", "gptj") else (cos, sin)
    if kind in ("cohere", "cohere2"):
        cos, sin = cos[..., ::2], sin[..., ::2]
    elif kind not in ("codegen", "gptj", "gpt_oss"):
        cos, sin = cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]
    cos, sin = cos / (cos.square() + sin.square()), sin / (cos.square() + sin.square())
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    first, second = (turned[..., ::2], turned[..., 1::2]) if kind in NEIGHBOURS else turned.chunk(2, dim=-1)
    pair = first * cos + second * sin, second * cos - first * sin
    back = torch.stack(pair, dim=-1).flatten(-2) if kind in NEIGHBOURS else torch.cat(pair, dim=-1)
    return torch.cat([back, rest], dim=-1)


def watched_pass(model, ids):
    """({site: [T,C]} that passes by, {layer: (cos, sin) or None} that attention gets, the cache) of a forward pass."""
    seen, turns, handles = {}, {}, []

    def watch_attention(module, args, kwargs, layer):
        turns[layer] = kwargs.get("position_embeddings")
        if not getattr(module, "use_rope", True) or kwargs.get("alibi") is not None:
            turns[layer] = None

    def watch_site(module, args, out, site):
        seen[site] = site.read(out)[0]
        assert same_bits(site.write(out, site.read(out)), out)

    for name, module in model.named_modules():
        if match := re.search(r"\.(\d+)\.(self_attn|self_attention|attention|attn|mixer)$", name):
            hook = partial(watch_attention, layer=int(match[1]))
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    for site in sites.find_sites(model):
        handles.append(site.module.register_forward_hook(partial(watch_site, site=site)))
    output = model.get_decoder()(input_ids=ids, use_cache=True)
    cache = output["cache" if "cache" in output else "past_key_values"]  # it was renamed in 5.24 or before
    for handle in handles:
        handle.remove()
    return seen, turns, cache


@torch.inference_mode()
@pytest.mark.parametrize(
    ("tokens", "is_quantized"),
    [(24, False), (24, True), (2, False), (4, False)],
    ids=["as it is", "quantized", "2 tokens", "4 tokens"],  # as many tokens as heads, too
)
def test_the_cache_holds_what_passes_the_sites_with_keys_turned_by_rope(family, tokens, is_quantized):
    kind, ids = family.config.model_type, torch.randint(3, 48, (1, tokens))
    with qu.quantized(setting_of(family, 2, 3) if is_quantized else {}):
        seen, turns, cache = watched_pass(family, ids)
    layers = [at for at, layer in enumerate(cache.layers) if getattr(layer, "keys", None) is not None]
    assert layers and sorted(site.key for site in seen) == [(at, part) for at in layers for part in qu.PARTS]
    has_rope = kind not in NO_ROPE and not getattr(family.config, "alibi", False)
    assert any(turns[at] is not None for at in layers) == has_rope
    others = family.config.num_hidden_layers - len(layers) - (getattr(family.config, "num_kv_shared_layers", 0) or 0)
    assert sites.layers_without_attention(family, list(seen)) == others
    for site, given in seen.items():
        held = getattr(cache.layers[site.layer], site.part)[0].transpose(0, 1).double()  # [T,H,D]
        expected = given[-len(held) :].double().unflatten(-1, (-1, held.shape[-1]))  # a window keeps the last tokens
        expected = expected.repeat_interleave(held.shape[1] // expected.shape[1], dim=1)  # Falcon 40B copies heads
        if site.part == "keys" and turns[site.layer] is not None:
            assert not torch.allclose(expected, held, rtol=1e-2)  # it is before RoPE, not behind it
            held = unturned(held, kind, [each[:, -len(held) :] for each in turns[site.layer]])
        torch.testing.assert_close(held, expected, rtol=1e-4, atol=1e-5)
        if is_quantized:
            levels = [len(row.unique()) for row in (given.T if site.part == "keys" else given)]
            assert 2 < max(levels) <= (4 if site.part == "keys" else 8)  # along its axis


def test_every_family_is_checked_calibrated_and_evaluated(family):
    """The whole way, with gradients: NUQ by Fisher information, then losses."""
    found = sites.find_sites(family)
    cache_check.check_sites(family, found)
    cache_check.check_against_cache(family, found)
    setting = setting_of(family, levels="nuq", outliers=0.01, sinks=1, fisher="paper")
    windows, errors = torch.randint(3, 48, (2, 24)), []

    def on_fit(label, site, fitted, x, given):
        errors.append(((given.values - x)[:, 1:].square().sum() / x[:, 1:].square().sum()).item())

    fitted = calibration.calibrate(family, windows, {3: setting}, on_fit=on_fit)[3]
    assert len(errors) == len(found) and max(errors) < 0.2
    figures = torch.cat([batch.figures for batch in qu.evaluate(family, found, windows, [{}, fitted])])
    loss, divergence, *_, key_bits, value_bits, _ = figures.unbind(-1)
    assert loss.isfinite().all() and (divergence[:, 1] > 0).all() and (loss[:, 0] != loss[:, 1]).all()
    assert (key_bits[:, 0] == 16).all() and (value_bits[:, 0] == 16).all()
    assert ((key_bits[:, 1] > 3) & (key_bits[:, 1] < value_bits[:, 1]) & (value_bits[:, 1] < 16)).all()


@pytest.mark.parametrize("name", ["Qwen3", "Gemma 3", "Phi-3, Phi-4", "Pythia (GPT-NeoX)"])
def test_sites_behind_norms_and_in_fused_projections_are_compiled(name):
    kind, changes = FAMILIES[name]
    model, ids = tiny(kind, changes | {"num_hidden_layers": 1}), torch.randint(3, 48, (1, 24))
    found, setting = sites.find_sites(model), setting_of(model, 2, 2, sinks=1)
    plain, eager = torch.cat([batch.figures for batch in qu.evaluate(model, found, ids, [{}, setting])])[0].tolist()
    with speed.compiled(model):
        compiled = torch.cat([batch.figures for batch in qu.evaluate(model, found, ids, [setting])])[0, 0].tolist()
    assert compiled[0] == pytest.approx(eager[0], rel=1e-4) and compiled[6:8] == eager[6:8]
    assert abs(compiled[0] - plain[0]) > 1e-2  # the hooks are in the compiled graph


def test_the_table_in_the_docs_is_this_one_and_every_line_of_the_site_table_is_tested():
    assert sites.HEADS_FIRST.union(sites.FAMILIES) <= {kind for kind, _ in FAMILIES.values()}
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = text[text.index("| family | loads |") :].split("\n\n")[0].splitlines()[2:]
    rows = {name: where for name, _, _, where in (row.strip("| ").split(" | ") for row in table)}
    assert list(rows) == list(FAMILIES)
    for name, where in rows.items():
        place = sites.find_sites(tiny(*FAMILIES[name]))[0].place
        assert where == f"`{place.module}`" + (", a slice" if place.block is not None else "")


ROPE_3D = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
VISION = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
PATCHES = {**VISION, "image_size": 28, "patch_size": 14}
TOWER = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 2}
MULTIMODAL = {  # class: settings of the decoder, of the vision tower
    "Gemma3": (WINDOW, PATCHES),
    "Gemma4": (SHARING | {"global_head_dim": 16}, {**PATCHES, "num_key_value_heads": 2, "head_dim": 8}),
    "Llava": ({"model_type": "llama"}, {"model_type": "clip_vision_model", **PATCHES}),
    "Mistral3": ({"model_type": "ministral3"}, {"model_type": "pixtral", "head_dim": 8, **PATCHES}),
    "Qwen2_5_VL": (ROPE_3D, TOWER),
    "Qwen3VL": ({}, TOWER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}),
    "Qwen3_5": (LINEAR, TOWER | {"num_position_embeddings": 16}),
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_a_model_that_sees_images_is_measured_on_text(name):
    text, vision = MULTIMODAL[name]
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, f"{name}Config")(text_config=TINY | text, vision_config=vision)
    torch.manual_seed(0)
    model = lively(getattr(transformers, f"{name}ForConditionalGeneration")(config))
    found, windows = sites.find_sites(model), torch.randint(3, 48, (2, 24))
    assert found and not any("vis" in site.name for site in found)
    cache_check.check_sites(model, found)
    cache_check.check_against_cache(model, found)
    figures = torch.cat([batch.figures for batch in qu.evaluate(model, found, windows, [{}, setting_of(model, 2, 2)])])
    with torch.inference_mode():
        logits = model(input_ids=windows, use_cache=False).logits
    expected = F.cross_entropy(logits[:, :-1].mT, windows[:, 1:], reduction="none").mean(1).double()
    torch.testing.assert_close(figures[:, 0, 0], expected, rtol=1e-4, atol=0)
    assert (figures[:, 1, 1] > 1e-4).all()


def test_a_site_is_where_its_layer_is_even_if_its_own_module_has_no_weights():
    found = sites.find_sites(tiny(*FAMILIES["Llama (GQA)"]).to("meta"))
    assert {replace(site, module=torch.nn.Identity()).device.type for site in found} == {"meta"}


@pytest.mark.parametrize("name", ["Llama (GQA)", "Gemma 3n", "Qwen3-Next"])
def test_nothing_that_we_call_is_deprecated(name):
    model, messages, logger = tiny(*FAMILIES[name]), [], logging.getLogger("transformers")
    transformers.utils.logging.warning_once.cache_clear()
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            for kind in (DeprecationWarning, FutureWarning):
                warnings.simplefilter("error", kind)
            test_every_family_is_checked_calibrated_and_evaluated(model)
    finally:
        logger.removeHandler(handler)
    assert not [message for message in messages if "deprecated" in message]


# -- what is refused


def refused(model, match):
    with pytest.raises(qu.UserError, match=match):
        cache_check.check_sites(model, found := sites.find_sites(model))
        cache_check.check_against_cache(model, found)


LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        (
            "deepseek_v3",
            LATENT | {"n_routed_experts": 4},
            r"has no .*compressed latent \(multi-head latent attention\)",
        ),
        ("ctrl", {"n_embd": 32, "dff": 32}, "CTRLLMHeadModel has no projections k_proj and v_proj; it has: Wq, Wk, Wv"),
        ("olmo", {"clip_qkv": 2.0}, r"OlmoForCausalLM clips keys and values behind the projections \(clip_qkv\)"),
        ("mpt", {"attn_config": {"clip_qkv": 2.0}}, r"MptForCausalLM clips keys and values"),
        ("llama4_text", {"num_local_experts": 2}, r"Llama4ForCausalLM normalizes queries and keys alike \(qk_norm\)"),
        ("hunyuan_v1_dense", {}, r"changes its keys before key_layernorm \(by RoPE, maybe\)"),
        ("nanochat", {}, r"changes its keys before k_norm \(by RoPE, maybe\)"),
        ("mimo_v2_flash", {"n_routed_experts": 4, "swa_num_attention_heads": 4, **EXPERTS}, "caches other values than"),
        ("bart", {"decoder_layers": 1, "d_model": 32}, "BartForCausalLM has several attentions in a layer"),
        ("recurrent_gemma", {"lru_width": 32, "num_hidden_layers": 3}, "returns no cache that could be compared with"),
        (
            "modernbert-decoder",
            {},
            "has no projections k_proj and v_proj; it has: decoder",
        ),
    ],
)
def test_a_family_that_caches_something_else_is_refused_with_the_reason(kind, changes, match):
    refused(tiny(kind, changes), match)


@pytest.mark.parametrize(
    ("kind", "part", "place"),
    [
        ("qwen3", "keys", Place("k_proj")),  # before the norm
        ("gpt_neox", "keys", Place("query_key_value", block=-2)),  # as if not every head had its own block
        ("gpt_neox", "values", Place("query_key_value", block=-1)),
        ("llama", "keys", Place("q_proj")),
        ("phi3", "keys", Place("qkv_proj", block=-1)),  # the values
        ("llama", "values", Place("k_proj")),
        ("phi3", "values", Place("qkv_proj", block=-3)),  # the queries
    ],
)
def test_a_wrong_line_in_the_site_table_is_noticed(kind, part, place, monkeypatch):
    monkeypatch.setattr(sites, "NORMS", dict.fromkeys(qu.PARTS, "-"))
    monkeypatch.setitem(sites.FAMILIES, kind, {**sites.FAMILIES.get(kind, {}), part: place})
    model = tiny(kind, MHA)
    with pytest.raises(qu.UserError, match=rf"caches other {part} than \S*\.layers\.0\.\w+\.{part[0]}_proj gives"):
        cache_check.check_against_cache(model, sites.find_sites(model))


def test_the_check_tells_what_is_not_cached_from_what_is_only_small_or_broken():
    """Broken weights show when they are measured, and are not called an unsupported family."""
    few, broken = tiny("llama", {"vocab_size": 6}), tiny("llama", {})
    broken.model.layers[1].self_attn.k_proj.weight.fill_(math.nan)
    for model in (few, broken):
        cache_check.check_against_cache(model, sites.find_sites(model))
    site = sites.find_sites(few)[0]
    for wrong in (replace(site, module=torch.nn.Linear(2, 2)), replace(site, layer=7)):
        with pytest.raises(qu.UserError, match=r"caches nothing at model\.layers\.0\.self_attn\.k_proj"):
            cache_check.check_against_cache(few, [wrong])


def test_a_model_whose_forward_raises_is_one_line_with_the_dtype():
    model = tiny("llama", {})

    def fails(*args, **kwargs):
        raise RuntimeError("no kernel for\nthis dtype")

    model.model.layers[0].mlp.forward = fails
    refused(model, "^LlamaForCausalLM does not run in float32 on cpu: no kernel for this dtype; try another --dtype$")
