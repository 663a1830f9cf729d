"""Every row of the matrix is fitted, saved, loaded, costed, batched, compiled, attached and detached."""

import copy
import itertools

import pytest
import torch
from default_quantizers import CALIBRATED, CHANNELS, DATA_FREE, HEAD, MATRIX, VARIANTS, activations, fitted, others_for
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import quant_utils as qu
from simquant import calibration, quantizer_file
from simquant.formats.affine import AffineQuantizer
from simquant.formats.heads import HeadQuantizer
from simquant.formats.higgs import HiggsQuantizer
from simquant.formats.prediction import PredictedQuantizer
from simquant.methods import METHODS
from simquant.plans import Row
from simquant.sites import find_sites

every_row = pytest.mark.parametrize("plain", MATRIX.values(), ids=map(str, MATRIX))
every_variant = pytest.mark.parametrize("quantizer", VARIANTS.values(), ids=map(str, VARIANTS))


def given_back(quantizer, x):
    """Return what the cache gives back for x [B,T,C]."""
    return quantizer.quantize(x, others_for(quantizer, x))


def plain_state(state):
    """Return what state_of gives, with tensors as lists, so that == compares all of it."""
    lists = {name: (str(value.dtype), value.tolist()) for name, value in state.items() if torch.is_tensor(value)}
    return state | lists | {name: plain_state(value) for name, value in state.items() if isinstance(value, dict)}


def assert_same(one, other):
    """Assert that two quantizers are the same, tensors bit for bit."""
    assert plain_state(quantizer_file.state_of(one)) == plain_state(quantizer_file.state_of(other))


def test_the_matrix_has_every_method_and_every_option_of_the_scalar_quantizer():
    """An option that no row sets would go through none of the tests below."""
    assert {case.method for case in MATRIX} == set(METHODS)
    scalar = [each for each in MATRIX.values() if type(each) is qu.ScalarQuantizer]
    for option in ("axis", "levels", "outliers", "cap", "sinks", "integer_zero", "q_norm", "fisher"):
        assert len({getattr(each, option) for each in scalar}) > 1, option


@every_row
def test_fitting_gives_a_copy_and_twice_the_same(plain):
    before = quantizer_file.made_of(quantizer_file.state_of(plain))
    assert_same(fitted(plain), fitted(plain))
    assert_same(plain, before)


@pytest.mark.parametrize("plain", [each for each in MATRIX.values() if each.sinks], ids=str)
def test_sinks_take_no_part_in_a_fit(plain):
    x, other = activations(3), activations(3)
    other[:, : plain.sinks] = 1000
    assert_same(fitted(plain, x), fitted(plain, other))


@every_row
def test_a_saved_quantizer_loads_as_the_same(plain, tmp_path):
    quantizer, row, path = fitted(plain), Row("it", 4, "keys"), str(tmp_path / "fitted.pt")
    site = qu.Site(1, "keys", "layers.1.k_proj", torch.nn.Identity(), CHANNELS)
    about = {"model": {"name": "m", "type": "llama", "channels": {site.name: CHANNELS}}, "settings": {}}
    quantizer_file.save(path, {row: {site: quantizer}}, about)
    loaded = quantizer_file.load(path)["quantizers"][site.name][quantizer.bits]
    assert type(loaded) is type(quantizer)
    assert_same(loaded, quantizer)
    data = quantizer_file.load(path)
    taken = quantizer_file.fitted(data, "llama", [site], {row: {site: plain}})[row][site]
    x = activations(2, seed=5)
    assert torch.equal(given_back(taken, x).values, given_back(quantizer, x).values)


def scalar_bits(quantizer, tokens, channels):
    """Count the bits of a cache entry by entry, and range by range."""
    bits, ranges = 0, set()
    for token in range(tokens):
        for channel in range(channels):
            if token < quantizer.sinks or token >= tokens - quantizer.recent:
                bits += 16
                continue
            bits += quantizer.bits
            if quantizer.lo is None:
                ranges.add(channel if quantizer.axis == "channel" else token)
    return bits + 2 * 16 * len(ranges)


def head_bits(quantizer, tokens, channels):
    """Count the bits token by token: a window has those that the last query sees exact, or in KIVI's rules the next."""
    bits, now = 0, tokens - (quantizer.window == "last")
    for token in range(tokens):
        behind = now - quantizer.sinks, token - quantizer.sinks
        is_recent = (
            quantizer.recent
            and {
                "last": behind[0] - behind[1] < quantizer.recent,
                "before": behind[0] - behind[1] <= quantizer.recent,
                "block": behind[0] // quantizer.recent == behind[1] // quantizer.recent,
            }[quantizer.window]
        )
        bits += channels * (16 if token < quantizer.sinks or is_recent else quantizer.entry_bits)
        if isinstance(quantizer, HiggsQuantizer) and not (token < quantizer.sinks or is_recent):
            bits += 16 * channels / max(2**n for n in range(11) if channels % 2**n == 0)  # norms
    return bits


@every_variant
def test_the_cost_is_a_count_over_entries_and_ranges(quantizer):
    count = head_bits if isinstance(quantizer, (HeadQuantizer, PredictedQuantizer)) else scalar_bits
    for tokens, channels in ((3, 32), (7, 32), (100, 8), (300, 8)):  # the window has four tokens
        assert quantizer.cost(tokens, channels) == pytest.approx(count(quantizer, tokens, channels), rel=1e-12)


@every_variant
def test_the_cost_grows_with_the_cache_and_tends_to_the_nominal_bits(quantizer):
    short, long = quantizer.cost(1000, 1024), quantizer.cost(2024, 1024)  # whole blocks of 128 tokens apart
    assert 0 < short < long
    nominal = getattr(quantizer, "first_bits", None) or quantizer.bits  # without sources it is the first layer's
    assert nominal <= (long - short) / 1024**2 <= nominal + 2


@every_variant
def test_a_batch_is_its_sequences_one_by_one(quantizer):
    x = activations(3, seed=2)
    together, single = given_back(quantizer, x), [given_back(quantizer, row[None]) for row in x]
    assert torch.equal(together.values, torch.cat([each.values for each in single]))
    if together.outliers is not None:
        assert torch.equal(together.outliers, torch.cat([each.outliers for each in single]))


@every_variant
def test_shape_and_dtype_stay_and_everything_is_finite(quantizer):
    inputs = (activations(1), torch.zeros(2, 5, CHANNELS), torch.full((1, 3, CHANNELS), 1e4), activations(2, tokens=1))
    for x, dtype in itertools.product(inputs, (torch.float32, torch.bfloat16, torch.float16)):
        given = given_back(quantizer, x.to(dtype))
        assert given.values.shape == x.shape and given.values.dtype == dtype and given.values.isfinite().all()
        assert given.outliers is None or (given.outliers.shape == x.shape and given.outliers.dtype == torch.bool)


@every_variant
def test_outliers_and_sinks_are_exact_and_sinks_touch_no_other_token(quantizer):
    x, other, sinks = activations(2, seed=3), activations(2, seed=3), quantizer.sinks
    other[:, :sinks] = -1000
    given, changed = given_back(quantizer, x), given_back(quantizer, other)
    assert torch.equal(given.values[:, :sinks], x[:, :sinks]) and torch.equal(
        changed.values[:, :sinks], other[:, :sinks]
    )
    assert torch.equal(given.values[:, sinks:], changed.values[:, sinks:])
    assert not torch.equal(given.values, x)
    if given.outliers is not None:
        assert torch.equal(given.values[given.outliers], x[given.outliers])
        assert not given.outliers[:, :sinks].any() and given.outliers.any()


@every_variant
def test_quantizing_twice_changes_nothing_more(quantizer):
    """Where a range is this window's, it must come back too: levels between -1 and 1 only may narrow it."""
    x = activations(2, seed=4)
    once = given_back(quantizer, x).values
    twice = given_back(quantizer, once).values
    assert (twice - once).square().sum() <= 2 * (once - x).square().sum()
    is_scalar = isinstance(quantizer, qu.ScalarQuantizer)
    if (
        is_scalar
        and quantizer.scale == 1
        and (quantizer.lo is not None or quantizer.codebook.abs()[[0, -1]].min() == 1)
    ):
        torch.testing.assert_close(twice, once, rtol=0, atol=1e-5)


def all_given_back(x, quantizers):
    """Return what each quantizer gives back, as one graph computes it."""
    return [quantizer.quantize(x, others_for(quantizer, x)) for quantizer in quantizers]


def test_every_row_is_traced_as_one_graph_that_gives_the_same():
    x, quantizers = activations(2, seed=6), list(VARIANTS.values())
    traced = torch.compile(all_given_back, fullgraph=True, backend="eager")(x, quantizers)
    for case, ours, theirs in zip(VARIANTS, traced, all_given_back(x, quantizers), strict=True):
        assert torch.equal(ours.values, theirs.values), case


# a kernel takes a second to compile: of every method, the row with most options that both scripts have; of every other
# option, the last method that has it
COMPILED = {
    torch.bfloat16: {(c.method, c.kind, c.is_fitted): c for c in VARIANTS if c.options in DATA_FREE},
    torch.float32: {(c.options, c.kind): c for c in VARIANTS if c.options in CALIBRATED and "fisher" not in c.options},
}


@pytest.mark.parametrize("dtype", COMPILED)
def test_kernels_and_eager_operations_quantize_alike(dtype):
    x, cases = activations(2, seed=6).to(dtype), list(COMPILED[dtype].values())
    quantizers = [VARIANTS[case] for case in cases]
    compiled = torch.compile(all_given_back, dynamic=False, fullgraph=True)(x, quantizers)
    ulp = {"rtol": torch.finfo(dtype).eps, "atol": x.abs().max().item() * torch.finfo(torch.float32).eps}
    for case, ours, theirs in zip(cases, compiled, all_given_back(x, quantizers), strict=True):
        assert (ours.outliers is None) == (theirs.outliers is None), case
        assert ours.outliers is None or torch.equal(ours.outliers, theirs.outliers), case
        torch.testing.assert_close(ours.values, theirs.values, **ulp)  # what cancels out has the range's ulp


@pytest.fixture(scope="module")
def small(model):
    """The first two layers of the bundled model."""
    small = copy.deepcopy(model)
    del small.model.layers[2:]
    small.config.num_hidden_layers = 2
    return small


class InFp32(qu.Quantizer):
    """Quantizes in fp32 what a model computes in fp64: its rounding then moves no entry to another level."""

    def __init__(self, inner):
        self.inner = inner
        for name in ("sinks", "recent", "window", "after_rope", "sources"):
            setattr(self, name, getattr(inner, name))

    def quantize(self, x, others=()):
        return qu.Quantized(self.inner.quantize(x.float(), others).values.double())


def test_tokens_that_are_cut_off_change_earlier_ones_where_a_quantizer_says_so():
    """It holds of what queries see: a residual window hides groups of tokens that are not complete."""
    sizes = {"hidden_size": CHANNELS, "intermediate_size": CHANNELS, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": CHANNELS // HEAD, "num_key_value_heads": CHANNELS // HEAD}
    wild = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3)).double().eval()
    sites, ids, wrong = find_sites(wild), torch.randint(97, (3, 170)), []
    for case, quantizer in VARIANTS.items():
        with torch.inference_mode(), qu.quantized(dict.fromkeys(sites, InFp32(quantizer))):
            whole = wild(ids, use_cache=False).logits
            cut = [wild(ids[:, :tokens], use_cache=False).logits for tokens in (7, 40, 133, 161)]
        change = max((each - whole[:, : each.shape[1]]).abs().max().item() for each in cut)
        wrong += [(str(case), change)] * (quantizer.sees_later_tokens != (change > 1e-9))
    assert wrong == []
    assert {True, False} == {each.sees_later_tokens for each in VARIANTS.values()}


@given(st.integers(1, 9), st.integers(0, 20), st.sampled_from(sorted(qu.WINDOWS)))
def test_a_group_of_tokens_is_hidden_where_no_query_sees_it_before_its_last_token(group, recent, rule):
    tokens = torch.arange(100)
    query, token = tokens[:, None], tokens
    is_exact = qu.WINDOWS[rule](query, token, recent) if recent else torch.zeros(100, 100, dtype=torch.bool)
    is_early = (token <= query) & ~is_exact & ((token // group + 1) * group - 1 > query)
    quantizer = AffineQuantizer(HEAD, axis="channel", group=group, recent=recent, window=rule)
    assert quantizer.sees_later_tokens == bool(is_early.any())


def hook_count(model):
    """Return how many forward hooks, and lists of taps, hang on a model."""
    names = ("kv_taps", "cache_taps")
    return sum(len(each._forward_hooks) + sum(hasattr(each, n) for n in names) for each in model.modules())


@every_row
def test_attached_it_changes_what_the_model_attends_to_and_detached_nothing(plain, small, windows):
    ids, seen = windows[:2, :48], {}
    setting = calibration.calibrate(small, ids, {"row": dict.fromkeys(find_sites(small), plain)})["row"]

    def watch(module, args, out):
        seen[module] = torch.nn.functional.linear(args[0], module.weight), out

    before = small(ids).logits
    with qu.quantized(setting), qu.hooked((site.module, watch) for site in setting):
        attached = small(ids).logits
    is_seen = any(each.recent < 48 for each in setting.values())
    assert attached.isfinite().all() and (not is_seen or not torch.equal(attached, before))
    for site, quantizer in setting.items():
        own, given = seen[site.module]
        is_elsewhere = quantizer.sources or quantizer.after_rope or quantizer.recent
        assert is_elsewhere or torch.equal(quantizer.quantize(own).values, given), site
    assert hook_count(small) == 0 and torch.equal(small(ids).logits, before)
    with pytest.raises(RuntimeError, match="inside"), qu.quantized(setting):
        assert hook_count(small) > 0
        raise RuntimeError("inside")
    assert hook_count(small) == 0 and torch.equal(small(ids).logits, before)
