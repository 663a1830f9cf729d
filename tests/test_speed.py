"""What makes a GPU faster changes speed alone: figures are the same bits, and every hook runs."""

import itertools
import json
import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, driver, measured, run_script
from default_quantizers import VARIANTS, activations, fitted
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import quant_utils as qu
from simquant import speed
from simquant.notices import Notice
from simquant.sites import find_sites

HALVES = st.sampled_from([torch.bfloat16, torch.float16])
SHORT = ("--datasets", SAMPLE, "--seqlen", "64")


@st.composite
def halves(draw, size=70):
    """[2,T,C] of 16-bit numbers from tiny to huge, with ties, and zeros of both signs."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(2, draw(st.integers(1, size)), draw(st.integers(1, 5)), generator=generator)
    x = x * 10.0 ** torch.randint(-5, 5, (1,), generator=generator)
    x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, 0.0).to(draw(HALVES))
    return x * torch.randint(0, 2, x.shape, generator=generator).mul(2).sub(1).to(x.dtype)


def assert_sorted(tails, x, rank, axis):
    """Assert that tails are what stands at rank and rank + 1 from either end of numpy's sorted x."""
    in_order = np.sort(x.double().numpy(), axis=axis)
    far = min(rank + 1, x.shape[axis] - 1)
    for ours, place in zip((*tails[0], *tails[1]), (rank, far, -1 - rank, -1 - far), strict=True):
        assert ours.dtype == x.dtype
        assert np.array_equal(ours.double().numpy(), np.take(in_order, [place], axis=axis))


@given(halves(), st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99]))
def test_counting_finds_the_order_statistics_that_numpy_sorts_out(x, fraction):
    for axis in (-2, -1):
        rank = math.floor(fraction / 2 * (x.shape[axis] - 1))
        assert_sorted(speed.counted_tails(x, rank, axis), x, rank, axis)


@given(halves(40), st.integers(0, 20), st.sampled_from([0, 1, 3, 1.0]))
def test_absent_entries_have_no_part_in_order_statistics(x, absent, rank):
    padded = torch.nn.functional.pad(x.mT, (0, absent), value=math.nan)
    rank = min(int(rank * (x.shape[1] - 1)) if isinstance(rank, float) else rank, x.shape[1] - 1)
    assert_sorted(speed.counted_tails(padded, rank, -1, absent), x.mT, rank, -1)
    signed = torch.where(padded.isnan(), -padded, padded)  # nan with its sign bit set
    assert_sorted(speed.counted_tails(signed, rank, -1, absent), x.mT, rank, -1)


@pytest.mark.parametrize("size", [2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**16 + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counting_holds_for_long_texts_and_any_bits(size, dtype):
    x = torch.randint(-(2**15), 2**15, (size, 2)).short().view(dtype)
    x = x.masked_fill(x.isnan(), 1)
    for rank in (0, size // 200, size // 2 - 1):
        assert_sorted(speed.counted_tails(x, rank, 0), x, rank, 0)


def test_the_compiled_counting_finds_the_same():
    x = torch.randn(2, 41, 32).to(torch.bfloat16)[:, 1:]
    both = torch.compile(lambda x: [speed.counted_tails(x, 2, axis) for axis in (-2, -1)], fullgraph=True)(x)
    for axis, tails in zip((-2, -1), both, strict=True):
        assert_sorted(tails, x, 2, axis)


@contextmanager
def as_on_a_gpu():
    """Let order statistics be counted, and levels be found step by step, on a CPU and without a compiler too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "is_counted", lambda x: x.dtype != torch.float32)
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


def assert_plain_and_faster_agree(name, *args):
    """Assert that the definition in FASTER gives the bits of the core's own."""
    with as_on_a_gpu():
        faster = getattr(qu, name)(*args)
    plain = getattr(qu, name).__wrapped__(*args)
    assert qu.FASTER[name] is getattr(speed, name)
    for one, other in zip(*((each,) if torch.is_tensor(each) else each for each in (faster, plain)), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@settings(max_examples=60)
@given(halves(), st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99, 1.0]))
def test_counted_quantiles_and_bounds_are_the_sorted_ones(x, fraction):
    for axis in qu.AXES.values():
        assert_plain_and_faster_agree("tail_quantiles", x, fraction, axis)
        assert_plain_and_faster_agree("inlier_bounds", x, fraction, axis)


@settings(max_examples=60)
@given(st.integers(2, 6), st.integers(0, 2**31))
def test_levels_found_step_by_step_are_those_of_a_search(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    levels = (torch.rand(2**bits, generator=generator) * 2 - 1).sort().values
    ties = torch.cat([levels, qu.borders(levels), torch.tensor([math.nan, -2.0, 2.0])])
    assert_plain_and_faster_agree("decode_nearest", ties[~ties.isnan()], levels, levels * 1.1 + 0.01)


def test_every_quantizer_gives_the_same_bits_whatever_is_faster(monkeypatch):
    devices = itertools.product(("cpu", "meta"), (torch.bfloat16, torch.float16, torch.float32))  # meta is no CPU
    assert [speed.is_counted(torch.empty(1, device=d, dtype=t)) for d, t in devices] == [False] * 3 + [
        True,
        True,
        False,
    ]
    x = activations(2, seed=7).to(torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(qu, "FASTER", {})
        plain = {case: quantizer.quantize(x, {}) for case, quantizer in VARIANTS.items() if not quantizer.sources}
    monkeypatch.setattr(speed, "is_counted", lambda x: x.dtype != torch.float32)
    for case, expected in plain.items():
        given = VARIANTS[case].quantize(x, {})
        assert torch.equal(given.values, expected.values), case
        assert given.outliers is None or torch.equal(given.outliers, expected.outliers), case
    scalar = qu.ScalarQuantizer("channel", outliers=0.1)
    counted = fitted(scalar, x)
    monkeypatch.setattr(qu, "FASTER", {})
    assert torch.equal(counted.lo, fitted(scalar, x).lo) and torch.equal(counted.hi, fitted(scalar, x).hi)


@pytest.fixture
def tiny():
    """Five equal layers."""
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval().requires_grad_(False)


def compiled_layers(model):
    """Return which of the decoder layers are compiled."""
    return [layer._compiled_call_impl is not None for layer in model.model.layers]


def test_a_compiled_model_runs_every_hook_and_all_layers_share_a_graph(tiny):
    ids, sites, options = torch.randint(64, (3, 24)), find_sites(tiny), {"bits": 2, "outliers": 0.01, "sinks": 1}
    axes, made = {"keys": "channel", "values": "token"}, {}
    for levels in ("uniform", "nf"):
        made[levels] = {site: qu.ScalarQuantizer(axes[site.part], levels=levels, **options) for site in sites}
    keys = {site: each for site, each in made["uniform"].items() if site.part == "keys"}
    every = ({}, made["uniform"], keys, made["nf"])  # the unquantized model's graph comes first
    eager = measured(tiny, ids, *every)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with speed.compiled(tiny):
        assert all(compiled_layers(tiny))
        for _ in range(2):
            compiled = measured(tiny, ids, *every)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 3  # bare, keys and values, keys alone
    loss, kl, bits = 0, 1, slice(3, None)
    torch.testing.assert_close(compiled[..., loss], eager[..., loss], rtol=1e-4, atol=0)
    torch.testing.assert_close(compiled[..., kl], eager[..., kl], rtol=0.05, atol=1e-5)
    assert torch.equal(compiled[..., bits], eager[..., bits])
    assert all(len(row.unique()) == 4 for row in compiled[..., loss])
    assert not any(compiled_layers(tiny))


def test_the_layers_that_hold_attention_are_compiled_and_no_longer_after_the_block(tiny):
    tiny.model.spare = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    assert speed.decoder_layers(tiny) == list(tiny.model.layers)
    with speed.compiled(tiny, enabled=False):
        assert not any(compiled_layers(tiny))
    line = r"^the decoder layers do not compile \(Unsupported: a graph break\b.*give --compile off$"
    with pytest.raises(speed.CompilationError, match=line), speed.compiled(tiny):
        assert all(compiled_layers(tiny))
        raise torch._dynamo.exc.Unsupported("a\ngraph break")
    assert not any(compiled_layers(tiny))


def test_auto_compiles_on_a_gpu_where_the_compiler_works(monkeypatch):
    cpu, gpu, tried = torch.device("cpu"), torch.device("meta"), []  # meta stands for a GPU
    monkeypatch.setattr(torch, "compile", lambda function: tried.append(function) or function)
    assert not speed.is_to_compile("off", gpu) and not speed.is_to_compile("auto", cpu) and not tried
    assert speed.is_to_compile("on", cpu) and speed.is_to_compile("auto", gpu) and len(tried) == 2

    def broken(function):
        raise RuntimeError("no\n Triton")

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.warns(Notice, match=r"--compile auto: off, because torch.compile fails \(RuntimeError: no Triton\)"):
        assert not speed.is_to_compile("auto", gpu)
    with pytest.raises(qu.UserError, match=r"--compile on: .*no Triton.*: give --compile off"):
        speed.is_to_compile("on", cpu)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(qu.UserError, match="TORCHDYNAMO_DISABLE"):
        speed.is_to_compile("on", cpu)


def test_layers_that_do_not_compile_are_measured_without_if_auto_chose_to(tmp_path):
    """The compiler works, as its trial shows, but not on these layers."""
    body = (
        "from simquant import speed\nspeed.is_to_compile = lambda *_: True\nwhole = speed.compiled\n"
        "def fail(model, enabled=True):\n    if enabled: raise speed.CompilationError('no graph')\n"
        "    return whole(model, False)\nspeed.compiled = fail"
    )
    script, flags = (driver(tmp_path, body), DYNAMIC_SCRIPT, NANO), (*SHORT, "--limit", "2", "--compile")
    assert_one_line_error(run_script(*script, *flags, "on"), "no graph")
    process = run_script(*script, *flags, "auto", "--output", tmp_path / "o.json")
    assert process.returncode == 0 and process.stderr == "warning: --compile auto: off, because no graph\n"
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["settings"]["compile"] == "off" and report["results"][0]["windows"] == 2
