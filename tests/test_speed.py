"""What makes a GPU faster changes speed alone: figures are the same bits, and every hook runs."""

import json

import pytest
import torch
from conftest import DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, driver, measured, run_script, same_bits
from transformers import LlamaConfig, LlamaForCausalLM

import quant_utils as qu
from simquant import speed
from simquant.notices import Notice
from simquant.sites import find_sites

SHORT = ("--datasets", SAMPLE, "--seqlen", "64")


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
    loss, kl, bits = 0, 1, slice(6, None)
    torch.testing.assert_close(compiled[..., loss], eager[..., loss], rtol=1e-4, atol=0)
    torch.testing.assert_close(compiled[..., kl], eager[..., kl], rtol=0.05, atol=1e-5)
    assert same_bits(compiled[..., bits], eager[..., bits])
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
