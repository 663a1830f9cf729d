"""torch.compile changes speed alone: the quantizer's figures are the same bits, and every hook runs."""

import itertools
import json
import math
import os
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, driver, measured, run_script
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import quant_utils as qu

HALVES = st.sampled_from([torch.bfloat16, torch.float16])


# -- order statistics by counting, which is what GPUs do


@given(
    HALVES, st.integers(1, 70), st.integers(1, 5), st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]), st.integers(0, 2**31)
)
def test_counting_finds_the_order_statistics_that_numpy_sorts_out(dtype, size, others, threshold, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, size, others, generator=generator) * 10.0 ** torch.randint(-5, 5, (1,), generator=generator)
    x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, 0.0).to(dtype)  # with ties
    x = x * torch.randint(0, 2, x.shape, generator=generator).mul(2).sub(1).to(dtype)  # and with -0
    rank = math.floor((1 - threshold) / 2 * (size - 1))
    for axis in (-2, 1):
        low, high = qu.counted_tails(x, rank, axis)
        across = qu.counted_tails(x.mT.contiguous(), rank, axis + 1 if axis < 0 else 2)
        in_order = np.sort(x.double().numpy(), axis=1)
        far = min(rank + 1, size - 1)
        for ours, theirs, where in zip(
            (*low, *high), (*across[0], *across[1]), (rank, far, -1 - rank, -1 - far), strict=True
        ):
            assert ours.dtype == dtype and np.array_equal(ours[:, 0].double(), in_order[:, where])
            assert torch.equal(ours, theirs.mT)


@given(HALVES, st.integers(1, 40), st.integers(0, 20), st.sampled_from([0, 1, 3, 1.0]), st.integers(0, 2**31))
def test_absent_entries_have_no_part_in_order_statistics(dtype, size, absent, rank, seed):
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    padded = torch.nn.functional.pad(x, (0, absent), value=math.nan)
    rank = min(int(rank * (size - 1)) if isinstance(rank, float) else rank, size - 1)
    expected = qu.sorted_tails(x, rank, -1)
    for tails in (qu.counted_tails, qu.sorted_tails):
        for ours, theirs in zip(tails(padded, rank, -1, absent), expected, strict=True):
            assert all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("size", [2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**16 + 1])
def test_counting_holds_for_long_texts(size):
    x = torch.randn(size, 2).to(torch.bfloat16)
    for ours, theirs in zip(qu.counted_tails(x, size // 200, 0), qu.sorted_tails(x, size // 200, 0), strict=True):
        assert all(map(torch.equal, ours, theirs))


@given(HALVES)
def test_ordered_keys_are_in_the_order_of_the_numbers_and_lead_back(dtype):
    every = torch.arange(-(2**15), 2**15).short().view(dtype)
    every = every[~every.isnan()]
    key = qu.ordered_key(every)
    assert torch.equal(qu.from_ordered_key(key, dtype).view(torch.int16), every.view(torch.int16))
    assert len(key.unique()) == len(every) and key.min() >= 0 and key.max() < 2**16
    assert (every[key.argsort()].double().diff() >= 0).all()


# -- the quantizer


def quantizers(width, dtype):
    """One for every way to quantize."""
    generator = torch.Generator().manual_seed(0)
    fitted = torch.rand(8, generator=generator).mul(2).sub(1).sort().values
    lo, hi = -1 - torch.rand(width, generator=generator), 1 + torch.rand(width, generator=generator)
    for axis, codebook, sparse in itertools.product((qu.PER_CHANNEL, qu.PER_TOKEN), qu.CODEBOOKS, (False, True)):
        spec = qu.QuantSpec(axis, 3, codebook, include_sparse=sparse, sparsity_threshold=0.9, first_few_fp16=2 * sparse)
        levels = qu.Codebook(fitted, 1.1, 0.01) if codebook == "nuq" else qu.data_free_codebook(spec)
        yield qu.Quantizer(spec, levels)
        if axis == qu.PER_CHANNEL:
            yield qu.Quantizer(spec, levels, lo.to(dtype).float(), hi.to(dtype).float())
    spec = qu.QuantSpec(qu.PER_CHANNEL, 4, include_sparse=True, cap_outliers=0.1)
    yield qu.Quantizer(spec, qu.data_free_codebook(spec), lo, hi)
    for bits in (2, 8):
        spec = qu.QuantSpec(qu.PER_TOKEN, bits, clamp=True)
        yield qu.Quantizer(spec, qu.data_free_codebook(spec))


def all_quantized(x, each):
    return [qu.quantize(x, quantizer) for quantizer in each]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compiled_and_eager_quantize_alike_in_every_mode(dtype):
    x = torch.randn(2, 40, 32).to(dtype)
    each = list(quantizers(32, dtype))
    expected = all_quantized(x, each)
    compiled = torch.compile(all_quantized, dynamic=False, fullgraph=True)(x, each)
    for quantizer, ours, theirs in zip(each, compiled, expected, strict=True):
        assert torch.equal(ours[1], theirs[1]), quantizer.spec
        ulp = {"rtol": torch.finfo(dtype).eps, "atol": x.abs().max().item() * torch.finfo(torch.float32).eps}
        torch.testing.assert_close(ours[0], theirs[0], **ulp)  # what cancels to nearly zero has the range's fp32 ulp


@pytest.mark.parametrize("axis", [qu.PER_CHANNEL, qu.PER_TOKEN])
def test_the_compiled_counting_is_the_eager_one(axis):
    x = torch.randn(2, 41, 32).to(torch.bfloat16)
    compiled = torch.compile(qu.counted_tails, dynamic=False, fullgraph=True)(x[:, 1:], 2, axis)
    for ours, theirs in zip(compiled, qu.sorted_tails(x[:, 1:], 2, axis), strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_what_counting_finds_is_quantized_like_what_sorting_finds(monkeypatch):
    x = (torch.randn(2, 70, 24) * 3).to(torch.bfloat16)
    each = list(quantizers(24, torch.bfloat16))
    expected = all_quantized(x, each)
    monkeypatch.setattr(qu, "is_counted", lambda x: True)
    for ours, theirs in zip(all_quantized(x, each), expected, strict=True):
        assert all(map(torch.equal, ours, theirs))


# -- the model


@pytest.fixture
def tiny():
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape)).eval().requires_grad_(False)


def test_a_compiled_model_runs_every_hook_and_all_layers_share_a_graph(tiny):
    windows = torch.randint(64, (3, 24))
    axes = {"k_proj": qu.PER_CHANNEL, "v_proj": qu.PER_TOKEN}
    specs = {leaf: qu.QuantSpec(axis, 2, include_sparse=True, first_few_fp16=1) for leaf, axis in axes.items()}
    whole = qu.dynamic_quantizers(tiny, specs)
    finer = {name: replace(each, codebook=qu.Codebook(qu.normal_float_levels(2))) for name, each in whole.items()}
    keys = {name: each for name, each in whole.items() if "k_proj" in name}
    settings = ({}, whole, keys, finer)  # the unquantized first: its graph must not serve the others
    eager = measured(tiny, windows, *settings).measured["text"]
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with qu.compiled(tiny):
        for _ in range(2):
            compiled = measured(tiny, windows, *settings).measured["text"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - graphs == 3  # bare, keys and values, keys alone
    for ours, theirs in zip(compiled, eager, strict=True):
        assert [each.nll for each in ours] == pytest.approx([each.nll for each in theirs], rel=1e-4)
        assert len({each.nll for each in ours}) == 4
        assert [each.key_bits for each in ours] == [each.key_bits for each in theirs]
    assert not any(layer._compiled_call_impl for layer in tiny.model.layers)


def test_only_the_numbered_layers_are_compiled(tiny):
    assert qu.decoder_layers(tiny) == list(tiny.model.layers)
    with qu.compiled(tiny, enabled=False):
        assert not any(layer._compiled_call_impl for layer in tiny.model.layers)
    with pytest.raises(KeyError), qu.compiled(tiny):
        assert all(layer._compiled_call_impl for layer in tiny.model.layers)
        raise KeyError
    assert not any(layer._compiled_call_impl for layer in tiny.model.layers)


# -- the flag


def test_auto_compiles_on_a_gpu_where_the_compiler_works(monkeypatch, capsys):
    assert [qu.is_to_compile(qu.ModelSpec("m", device="cpu", compile=how)) for how in ("auto", "on", "off")] == [
        False, True, False,
    ]  # fmt: skip
    monkeypatch.setattr(qu.ModelSpec, "torch_device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert qu.is_to_compile(qu.ModelSpec("m", device="cuda")) is False  # there is none
    assert "warning: --compile auto: off, because torch.compile fails" in capsys.readouterr().err


def test_without_a_c_compiler_on_is_one_line(tmp_path):
    missing = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": str(tmp_path)}
    flags = ("--datasets", SAMPLE, "--seqlen", "64", "--limit", "1", "--compile", "on")
    process = run_script(DYNAMIC_SCRIPT, NANO, *flags, env={**missing, "HOME": os.environ.get("HOME", "")})
    assert_one_line_error(process, "torch.compile fails", "--compile off")
    assert sys.executable not in process.stderr


def test_a_compiler_that_is_switched_off_is_one_line():
    flags = ("--datasets", SAMPLE, "--seqlen", "64", "--limit", "1", "--compile", "on")
    process = run_script(DYNAMIC_SCRIPT, NANO, *flags, env={"TORCHDYNAMO_DISABLE": "1"})
    assert_one_line_error(process, "--compile on", "TORCHDYNAMO_DISABLE")


@pytest.mark.parametrize("how", ["auto", "on"])
def test_layers_that_do_not_compile_are_measured_without_if_auto_chose_to(tmp_path, how):
    """The compiler works, as its trial shows, but not on these layers."""
    body = (
        "qu.is_to_compile = lambda spec: True\nwhole = qu.compiled\n"
        "def fail(model, enabled=True):\n    if enabled: raise qu.CompilationError('no graph')\n"
        "    return whole(model, False)\nqu.compiled = fail"
    )
    flags = ("--datasets", SAMPLE, "--seqlen", "64", "--limit", "2", "--compile", how, "--output", tmp_path / "o.json")
    process = run_script(driver(tmp_path, body), DYNAMIC_SCRIPT, NANO, *flags)
    if how == "on":
        assert_one_line_error(process, "no graph")
        return
    assert process.returncode == 0 and process.stderr == "warning: --compile auto: off, because no graph\n"
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["settings"]["compile"] == "off" and report["results"][0]["windows"] == 2
