"""Where a model lies changes no figure: split over host memory and disk, in batches that fit, whatever one asks for."""

from argparse import Namespace

import pytest
import torch
from accelerate import cpu_offload
from conftest import NANO, SAMPLE, measured
from transformers import AutoModelForCausalLM

import quant_utils as qu

GIB = 2**30


def specs(codebook="uniform"):
    shared = {"codebook": codebook, "include_sparse": True, "first_few_fp16": 1}
    return {"k_proj": qu.QuantSpec(qu.PER_CHANNEL, 3, **shared), "v_proj": qu.QuantSpec(qu.PER_TOKEN, 3, **shared)}


@pytest.fixture(params=["host memory", "disk"])
def split(request, tmp_path):
    """The bundled model with its weights somewhere else than where it computes."""
    if request.param == "host memory":
        model = cpu_offload(AutoModelForCausalLM.from_pretrained(NANO, dtype="float32"), execution_device="cpu")
        assert model.lm_head.weight.is_meta and model.model.layers[0].self_attn.k_proj.weight.is_meta
    else:
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"}
        places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(6)}
        model = AutoModelForCausalLM.from_pretrained(
            NANO, dtype="float32", device_map=places, offload_folder=tmp_path, attn_implementation="sdpa"
        )
        assert model.model.layers[1].self_attn.k_proj.weight.is_meta and qu.devices_of(model) == "cpu, disk"
    return model.eval().requires_grad_(False)


def test_a_split_model_is_measured_like_a_whole_one(split, model, windows):
    settings = ({}, qu.dynamic_quantizers(model, specs()))
    assert measured(split, windows[:3], *settings).measured == measured(model, windows[:3], *settings).measured
    assert qu.cache_widths(split) == qu.cache_widths(model)


def test_a_split_model_is_calibrated_like_a_whole_one(split, model, windows):
    how = qu.CalibrationSpec(str(SAMPLE), nsamples=2, seqlen=128, fisher="paper")
    ours, theirs = (qu.calibrate(each, windows[:2, :128], {3: specs("nuq")}, how)[3] for each in (split, model))
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name][0].codebook.levels, theirs[name][0].codebook.levels)
        assert ours[name][1] == theirs[name][1]


# -- which device


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of 24 GiB, as far as torch can be asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(qu, "free_memory", lambda device: 24 * GIB)


def test_auto_is_one_gpu_unless_the_model_is_larger(gpus, config_and_tokenizer, monkeypatch):
    config = config_and_tokenizer[0]
    for gib, expected in ((1, torch.device("cuda", 0)), (21.9, torch.device("cuda", 0)), (22.1, "auto"), (70, "auto")):
        monkeypatch.setattr(qu, "parameter_bytes", lambda config, dtype, gib=gib: gib * GIB)
        assert qu.placement(qu.ModelSpec("m"), config) == expected
        assert qu.placement(qu.ModelSpec("m", device="cuda:1"), config) == torch.device("cuda", 1)
        assert qu.placement(qu.ModelSpec("m", device="cpu"), config) == torch.device("cpu")


def test_the_size_of_a_model_is_known_from_its_config(config_and_tokenizer, model):
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert qu.parameter_bytes(config_and_tokenizer[0], "float32") == whole
    assert qu.parameter_bytes(config_and_tokenizer[0], "bfloat16") == whole // 2


def test_each_process_has_its_own_gpu(gpus, monkeypatch, config_and_tokenizer):
    monkeypatch.setattr(qu, "parameter_bytes", lambda config, dtype: 70 * GIB)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    for device in ("auto", "cuda"):
        assert qu.placement(qu.ModelSpec("m", device=device), config_and_tokenizer[0]) == torch.device("cuda", 1)
        assert qu.ModelSpec("m", device=device).resolved(config_and_tokenizer[0]).device == "cuda:1"
    args = Namespace(model="m", dtype="auto", device="cuda:0", attn_implementation="auto", compile="auto")
    with pytest.raises(qu.UserError, match="cuda:0 is one GPU, and there are 2 processes"):
        qu.model_spec(args)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(qu.UserError, match=r"cuda:2 for process 3 .* sees 2 GPU"):
        qu.ModelSpec("m")


# -- how many windows


def running_out(monkeypatch, most):
    """measure_batch as if memory held that many windows; the sizes that were tried."""
    whole, tried = qu.measure_batch, []

    def measure_batch(model, ids, *args):
        tried.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return whole(model, ids, *args)

    monkeypatch.setattr(qu, "measure_batch", measure_batch)
    return tried


def test_auto_takes_what_memory_holds(monkeypatch, model, windows):
    expected = measured(model, windows, {}).measured["text"]
    cases = ((4, 11, [1, 4, 4, 2]), (100, 5, [1, 10, 9, 8, 7, 6, 5, 5]), (2, 1, [1, 2] + [1] * 10))
    for estimate, most, sizes in cases:
        tried = running_out(monkeypatch, most)
        with monkeypatch.context() as patch:
            patch.setattr(qu, "batch_size_for_memory", lambda model, estimate=estimate: estimate)
            run = measured(model, windows, {}, batch_size=None)
        assert tried[: len(sizes)] == sizes
        losses = [[row[0].nll for row in each] for each in (run.measured["text"], expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)
        monkeypatch.undo()


def test_auto_is_one_window_on_a_cpu(model, windows, monkeypatch):
    assert qu.batch_size_for_memory(model) == 1
    tried = running_out(monkeypatch, 99)
    measured(model, windows[:3], {}, batch_size=None)
    assert tried == [1, 1, 1]


def test_a_batch_size_that_does_not_fit_names_one_that_does(monkeypatch, model, windows):
    running_out(monkeypatch, 3)
    with pytest.raises(qu.UserError, match="batch_size 8 runs out of memory at seqlen 512 on cpu: --batch_size 3 fits"):
        measured(model, windows, {}, batch_size=8)
    running_out(monkeypatch, 0)
    with pytest.raises(qu.UserError, match="one window of seqlen 512 runs out of memory on cpu: lower --seqlen"):
        measured(model, windows, {}, batch_size=1)


def test_an_error_that_is_not_about_memory_is_not_hidden(monkeypatch, model, windows):
    def measure_batch(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(qu, "measure_batch", measure_batch)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        measured(model, windows, {}, batch_size=2)


def test_memory_that_runs_out_later_is_answered_with_smaller_batches_and_the_same_figures(
    monkeypatch, model, windows, capsys
):
    expected = [row[0].nll for row in measured(model, windows, {}, batch_size=4).measured["text"]]
    whole, tried = qu.measure_batch, []

    def measure_batch(model, ids, *args):  # another process takes memory meanwhile
        tried.append(len(ids))
        if len(tried) > 1 and len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return whole(model, ids, *args)

    monkeypatch.setattr(qu, "measure_batch", measure_batch)
    run = measured(model, windows, {}, batch_size=4)
    assert tried == [4, 4, 3, 2, 2, 2, 1]
    assert [row[0].nll for row in run.measured["text"]] == pytest.approx(expected, rel=1e-6)
    said = "warning: text, window 5: out of memory, which sufficed before; going on by 2\n"
    assert capsys.readouterr().err.endswith(said)
