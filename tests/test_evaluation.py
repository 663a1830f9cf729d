"""The perplexity loop and the report, against a plain loop over whole logits."""

import json
import math
import os
import re

import pytest
import torch
from conftest import NANO, SAMPLE

import quant_utils as qu

SPECS = {"k_proj": qu.QuantSpec(qu.PER_CHANNEL, 3), "v_proj": qu.QuantSpec(qu.PER_TOKEN, 3)}


@torch.inference_mode()
def plain_losses(model, windows):
    """Summed loss of every window, from whole logits in double precision."""
    losses = []
    for ids in windows:
        scores = model(ids[None]).logits[0, :-1].double().log_softmax(-1)
        losses.append(-scores.gather(1, ids[1:, None]).sum().item())
    return losses


def test_perplexity_is_that_of_a_plain_loop(model, windows):
    losses = qu.evaluate(model, windows)
    expected = plain_losses(model, windows)
    assert losses == pytest.approx(expected, rel=1e-5)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    assert qu.perplexity(losses, windows.shape[1]) == pytest.approx(math.exp(sum(expected) / tokens), rel=1e-5)


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_a_batch_of_windows_is_the_windows_one_by_one(model, windows, batch_size):
    with qu.simulate_quantization(model, qu.dynamic_quantizers(model, SPECS)):
        assert qu.evaluate(model, windows, batch_size) == pytest.approx(qu.evaluate(model, windows), rel=1e-4)


@pytest.mark.parametrize("chunk", [1, 7, 99, 100, 5000])
def test_chunked_loss_is_the_whole_loss(chunk):
    logits, ids = torch.randn(3, 100, 11), torch.randint(11, (3, 100))
    whole = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    torch.testing.assert_close(qu.token_nll(logits, ids, chunk), whole)


def test_loss_is_taken_in_single_precision():
    logits, ids = torch.randn(1, 50, 1000).bfloat16(), torch.randint(1000, (1, 50))
    assert torch.equal(qu.token_nll(logits, ids), qu.token_nll(logits.float(), ids))


def test_fewer_bits_cost_more_per_channel_keys_cost_less_and_outliers_help(model, windows):
    def ppl(bits, key_axis=qu.PER_CHANNEL, sparse=False):
        key = qu.QuantSpec(key_axis, bits, include_sparse=sparse)
        value = qu.QuantSpec(qu.PER_TOKEN, bits, include_sparse=sparse)
        with qu.simulate_quantization(model, qu.dynamic_quantizers(model, {"k_proj": key, "v_proj": value})):
            return qu.perplexity(qu.evaluate(model, windows), windows.shape[1])

    base = qu.perplexity(qu.evaluate(model, windows), windows.shape[1])
    assert base < ppl(4) < ppl(3) < ppl(2)
    assert ppl(8) == pytest.approx(base, rel=1e-3)
    assert ppl(2) < ppl(2, key_axis=qu.PER_TOKEN)
    assert ppl(2, sparse=True) < ppl(2)


def test_a_loss_that_is_not_finite_names_window_and_setting(model, windows):
    bias = torch.zeros(2048)
    calls = []

    def poison(module, args, out):
        calls.append(None)
        return out + bias.fill_(math.nan if len(calls) == 3 else 0)

    handle = model.lm_head.register_forward_hook(poison)
    try:
        with pytest.raises(qu.UserError, match="c4, abits 2: window 3 of 11 has loss nan in float32"):
            qu.evaluate(model, windows, label="c4, abits 2")
    finally:
        handle.remove()


def test_perplexity_beyond_the_largest_double_is_infinite():
    assert qu.perplexity([1e9], 2) == math.inf


def test_auto_on_a_cpu_is_single_precision_and_sdpa(model):
    assert model.dtype == torch.float32 and not model.training
    assert model.config._attn_implementation == "sdpa"


def test_dtype_is_as_asked(config_and_tokenizer):
    bf16 = qu.load_model(qu.ModelSpec(str(NANO), "bfloat16", "cpu", "eager"), config_and_tokenizer[0])
    assert bf16.dtype == torch.bfloat16 and bf16.config._attn_implementation == "eager"
    assert qu.environment(bf16)["dtype"] == "bfloat16"


def test_the_table_has_the_result_under_its_heading():
    result = qu.Result("wikitext2", 4, 16.70471, 2.81569, 215, 440105, 67.34)
    header = qu.table_header([str(SAMPLE), "wikitext2"])
    row = qu.table_row(result, header)
    assert header.split() == ["dataset", "abits", "ppl", "nll", "windows", "tokens", "seconds"]
    assert row.split() == ["wikitext2", "4", "16.7047", "2.815690", "215", "440105", "67.3"]
    ends = [[match.end() for match in re.finditer(r"\S+", line)][1:] for line in (header, row)]
    assert ends[0] == ends[1]


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    qu.write_json(str(path), {"name": "中"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "中"}

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qu.write_json(str(path), {"name": "new"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "中"}
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_json_follows_a_link_and_never_holds_nan(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    qu.write_json(str(tmp_path / "link.json"), {})
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "{}\n"
    with pytest.raises(ValueError):
        qu.write_json(str(tmp_path / "real.json"), {"ppl": math.nan})
    assert (tmp_path / "real.json").read_text() == "{}\n"
