"""The site after RoPE and the residual window: one pass is decoding token by token through such a cache."""

import copy

import pytest
import torch
from conftest import DYNAMIC_SCRIPT as SCRIPT
from conftest import NANO, SAMPLE, assert_one_line_error, run_script
from test_sites import FAMILIES, tiny
from transformers import AutoModelForCausalLM, Cache
from transformers.cache_utils import DynamicLayer
from transformers.models.llama.modeling_llama import rotate_half

import quant_utils as qu
from simquant import attention, cache_check, sites
from simquant.formats.heads import HeadQuantizer
from simquant.methods import METHODS
from simquant.plans import Pair, Plan

AXES = {"keys": "channel", "values": "token"}
REFUSED = {  # what does not attend through the interface, or to other tensors than it caches
    "DiffLlama", "JetMoE", "Japanese GPT-NeoX", "Falcon 7B", "Falcon 40B", "Falcon RW", "BLOOM", "MPT",
}  # fmt: skip


class Exact(HeadQuantizer):
    """Gives back what it gets."""

    def coded(self, x):
        return x


class Coarse(HeadQuantizer):
    """Rounds to quarters."""

    def coded(self, x):
        return (4 * x).round() / 4


class QuantizingLayer(DynamicLayer):
    """What a cache of keys and values holds when the next token comes: old tokens quantized by themselves, from what
    has been seen so far; the others exact."""

    def __init__(self, quantizers, old, turned=None):
        super().__init__()
        self.quantizers, self.old, self.turned = quantizers, old, turned

    def update(self, key_states, value_states, *args, **kwargs):
        held = super().update(key_states, value_states, *args, **kwargs)
        now = held[0].shape[2] - 1
        return tuple(self.seen(x, part, self.old[part](now)) for x, part in zip(held, qu.PARTS, strict=True))

    def seen(self, x, part, old):
        turn, back = self.turned if self.turned and part == "keys" else (lambda y: y, lambda y: y)
        flat = back(x[:, :, :old]).transpose(1, 2).flatten(2)
        given = self.quantizers[part].quantize(flat).values if old > 0 else flat
        return torch.cat([turn(given.unflatten(2, (x.shape[1], -1)).transpose(1, 2)), x[:, :, old:]], 2)


@torch.inference_mode()
def decoded_logits(model, ids, setting, old, turned=None):
    """Logits [B,T,V] of ids [B,T], one token after the other, through caches that quantize."""
    layers = [
        QuantizingLayer({site.part: q for site, q in setting.items() if site.layer == layer}, old, turned)
        for layer in range(model.config.num_hidden_layers)
    ]
    cache = Cache(layers=layers)
    steps = [model(input_ids=ids[:, [t]], past_key_values=cache, use_cache=True).logits for t in range(ids.shape[1])]
    return torch.cat(steps, 1)


def setting_of(model, method, **options):
    """What a named method quantizes in a model."""
    flags = {f"--{name}": (name, value) for name, value in options.items()}
    (setting,) = Plan([Pair(method, method)], [], AXES, flags).settings(sites.find_sites(model)).values()
    return setting


EVERY = {"keys": lambda t: t + 1, "values": lambda t: t + 1}  # how many tokens are quantized when token t is read
LAST_20 = {"keys": lambda t: t - 19, "values": lambda t: t - 19}
KIVI_32 = {"keys": lambda t: t // 32 * 32, "values": lambda t: t - 32}


@pytest.mark.parametrize(
    ("method", "options", "old"),
    [
        ("q4_0", {}, EVERY),
        ("int4_per_token_head", {}, EVERY),
        ("q4_0", {"recent": 20}, LAST_20),
        ("kivi2", {"recent": 32}, KIVI_32),
        ("kivi4", {"recent": 32}, KIVI_32),
    ],
)
def test_one_pass_is_decoding_token_by_token(model, windows, method, options, old):
    model = copy.deepcopy(model).double()  # so that two ways to add up round no entry to another level
    ids, setting = windows[:2, :160], setting_of(model, method, **options)
    with torch.inference_mode(), qu.quantized(setting):
        ours = model(ids).logits
    theirs = decoded_logits(model, ids, setting, old)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    with torch.inference_mode():
        assert (model(ids).logits - ours).abs().max() > 0.01


def test_keys_before_rope_may_have_a_window_too(model, windows):
    """The cache of the reference undoes RoPE, quantizes, and does it again."""
    ids = windows[:1, :96]
    setting = {s: qu.ScalarQuantizer("token", 3, recent=20, sinks=2) for s in sites.find_sites(model)}
    places = torch.arange(96)[None]
    cos, sin = (each[:, None] for each in model.model.rotary_emb(torch.zeros(1, 96, 1), places))  # [1,1,T,D]

    def turn(x):
        return x * cos[:, :, : x.shape[2]] + rotate_half(x) * sin[:, :, : x.shape[2]]

    def back(x):
        return x * cos[:, :, : x.shape[2]] - rotate_half(x) * sin[:, :, : x.shape[2]]

    with torch.inference_mode(), qu.quantized(setting):
        ours = model(ids).logits
    theirs = decoded_logits(model, ids, setting, LAST_20, (turn, back))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_site_before_and_one_after_rope_go_together(model, windows):
    found, ids = sites.find_sites(model), windows[:1, :64]
    before = {s: qu.ScalarQuantizer("token", 3) for s in found if s.part == "keys"}
    after = {s: Coarse(s.head_dim) for s in found if s.part == "values"}
    rounding = {s: qu.Site(s.layer, "values", s.name, s.module, s.channels) for s in after}
    with torch.inference_mode():
        with qu.quantized(before | after):
            ours = model(ids).logits
        hooks = [(s.module, lambda m, a, out: (4 * out).round() / 4) for s in rounding.values()]
        with qu.quantized(before), qu.hooked(hooks):
            assert torch.equal(model(ids).logits, ours)


@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_every_family_is_read_where_it_attends_or_refused_by_name(name):
    """Nothing changes if nothing is quantized, or all is in the window; else it is what a quantizing cache gives."""
    family, ids = tiny(*FAMILIES[name]), torch.randint(3, 48, (2, 20))
    found = sites.find_sites(family)
    exact = {s: Exact(s.head_dim) for s in found}
    if name in REFUSED:
        with pytest.raises(qu.UserError, match=f"{type(family).__name__} .*before RoPE"):
            cache_check.check_attention(family, [exact])
        return
    cache_check.check_attention(family, [exact])
    plain = family(input_ids=ids, use_cache=False).logits
    with qu.quantized(exact):
        assert torch.equal(family(input_ids=ids, use_cache=False).logits, plain)
    coarse = {s: Coarse(s.head_dim) for s in found}
    with qu.quantized(coarse):
        given = family(input_ids=ids, use_cache=False).logits
    assert (given - plain).abs().max() > 1e-3
    with qu.quantized({s: Coarse(s.head_dim, recent=32) for s in found}):
        torch.testing.assert_close(family(input_ids=ids, use_cache=False).logits, plain, rtol=0, atol=1e-4)
    if name == "MiniMax-01":
        return  # it takes no cache but its own
    torch.testing.assert_close(given, cached_logits(family, ids, found), rtol=0, atol=1e-4)


def cached_logits(family, ids, found):
    """Logits through the model's own cache, whose update rounds what it gives back."""
    from transformers import DynamicCache

    layers = {site.layer for site in found}

    class RoundingCache(DynamicCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            held = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            return tuple((4 * x).round() / 4 for x in held) if layer_idx in layers else held

    cache = RoundingCache(config=family.config)
    return family(input_ids=ids, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_implementations_of_attention_agree(implementation, windows):
    model = AutoModelForCausalLM.from_pretrained(NANO, dtype="float64", attn_implementation=implementation).eval()
    setting = setting_of(model, "kivi2", recent=32)
    with torch.inference_mode(), qu.quantized(setting):
        ours = model(windows[:1, :96]).logits
    torch.testing.assert_close(ours, decoded_logits(model, windows[:1, :96], setting, KIVI_32), rtol=0, atol=1e-4)


def test_each_token_is_seen_once_and_kivi_needs_three_kinds_of_pairs():
    rules = {"keys": ("block", 8, 1), "values": ("before", 8, 1)}
    for windows, kinds in (
        (rules, 3),
        ({"keys": ("last", 8, 0)}, 2),
        ({"keys": rules["values"], "values": rules["keys"]}, 3),
    ):
        seen = attention.choices(windows, 30, torch.device("cpu"))
        assert len(seen) == kinds and sum(chosen.int() for _, _, chosen in seen).eq(1).all()
    for keys, values, chosen in attention.choices(rules, 30, torch.device("cpu")):
        for t in range(1, 30):
            for j in range(1, t + 1):
                same_block = (t - 1) // 8 == (j - 1) // 8
                assert chosen[t, j] == (keys == same_block and values == (t - j <= 8))


def test_a_range_that_sees_the_window_is_refused_and_says_why():
    process = run_script(SCRIPT, NANO, "--datasets", SAMPLE, "--seqlen", 64, "--recent", 16)
    assert_one_line_error(
        process, "--recent does not go with --kv_format uniform per channel: a range of the whole window"
    )
    assert "kivi2" in METHODS
