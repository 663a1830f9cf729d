"""Where a model lies changes no figure; its weights are whole, known by size, and may be quantized on disk."""

import copy
import itertools
import json
import os
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, measured, run_script
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import quant_utils as qu
from simquant import memory, models
from simquant.flags import Flags
from simquant.notices import Notice
from simquant.sites import find_sites, projections

GIB = 2**30


def setting_of(model, levels="uniform", **options):
    """{site: quantizer}, 3 bits with outliers and a sink."""
    axes = {"keys": "channel", "values": "token"}
    return {s: qu.ScalarQuantizer(axes[s.part], 3, levels, 0.01, sinks=1, **options) for s in find_sites(model)}


# -- split over host memory and disk


@pytest.fixture(params=["host memory", "disk"])
def split(request, tmp_path):
    """The bundled model with its weights somewhere else than where it computes."""
    if request.param == "host memory":
        model = cpu_offload(AutoModelForCausalLM.from_pretrained(NANO, dtype="float32"), execution_device="cpu")
        assert model.lm_head.weight.is_meta and model.model.layers[0].self_attn.k_proj.weight.is_meta
    else:
        places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "disk", "lm_head": "cpu"}
        places |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(6)}
        how = {"dtype": "float32", "device_map": places, "offload_folder": tmp_path, "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_pretrained(NANO, **how)
        assert model.model.layers[1].self_attn.k_proj.weight.is_meta and memory.devices_of(model) == "cpu, disk"
    return model.eval().requires_grad_(False)


def test_a_split_model_is_measured_and_calibrated_like_a_whole_one(split, model, windows):
    figures, fits = [], []
    for each in (split, model):
        figures.append(measured(each, windows[:3], {}, setting_of(each)))
        plain = setting_of(each, "nuq", fisher="paper")
        fits.append(qu.calibrate(each, windows[:2, :128], {3: plain})[3])
    assert torch.equal(*figures) and (figures[0][:, 1, 1] > 0).all()
    for (one, ours), (other, theirs) in zip(*(each.items() for each in fits), strict=True):
        assert (one.name, one.channels) == (other.name, other.channels)
        assert torch.equal(ours.codebook, theirs.codebook) and (ours.lo is None or torch.equal(ours.lo, theirs.lo))


# -- which device


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of 24 GiB, as far as torch can be asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(models, "free_memory", lambda device: 24 * GIB)


def test_auto_is_one_gpu_unless_the_model_is_larger(gpus, config_and_tokenizer, monkeypatch):
    config = config_and_tokenizer[0]
    for gib, expected in ((1, torch.device("cuda", 0)), (21.9, torch.device("cuda", 0)), (22.1, "auto"), (70, "auto")):
        monkeypatch.setattr(models, "weight_bytes", lambda model, gib=gib: gib * GIB)
        assert models.placement(Flags("m"), config) == expected
        assert models.placement(Flags("m", device="cuda:1"), config) == torch.device("cuda", 1)
        assert models.placement(Flags("m", device="cpu"), config) == torch.device("cpu")


def test_each_process_has_its_own_gpu(gpus, monkeypatch, config_and_tokenizer):
    monkeypatch.setattr(models, "weight_bytes", lambda model: 70 * GIB)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    for device in ("auto", "cuda"):
        assert models.placement(Flags("m", device=device), config_and_tokenizer[0]) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(qu.UserError, match=r"device cuda:2 was asked for.* sees 2 GPU"):
        models.single_device("auto")


def test_the_dtype_is_the_checkpoints_own_where_that_is_fast(gpus, config_and_tokenizer, monkeypatch):
    config = copy.deepcopy(config_and_tokenizer[0])  # bfloat16 on disk
    chosen = {device: models.choices(Flags("m", device=device), config)["dtype"] for device in ("cpu", "cuda")}
    assert chosen == {"cpu": "float32", "cuda": "bfloat16"}
    config.quantization_config = {"quant_method": "fp8"}
    assert models.choices(Flags("m", device="cpu"), config)["dtype"] == "bfloat16"
    assert models.choices(Flags("m", device="cpu", dtype="float16"), config)["dtype"] == "float16"


def test_attention_is_what_is_asked_or_the_models_own_choice():
    for kind in ("gpt_oss", "llama"):
        config = AutoConfig.for_model(kind, num_hidden_layers=1)
        with torch.device("meta"):
            own = AutoModelForCausalLM.from_config(copy.deepcopy(config)).config._attn_implementation
        for asked, expected in (("auto", own), ("eager", "eager")):
            flags = Flags("m", device="cpu", attn_implementation=asked)
            assert models.skeleton(flags, copy.deepcopy(config)).config._attn_implementation == expected
    with pytest.raises(qu.UserError, match="flash_attention_2 (needs|runs in half precision).*: use sdpa"):
        models.choices(Flags("m", device="cpu", attn_implementation="flash_attention_2"), config)


# -- how many windows


def running_out(monkeypatch, fits):
    """Let start_batch fail unless fits(number of the attempt, windows in it); the sizes that were tried."""
    whole, tried = qu.start_batch, []

    def start_batch(model, sites, ids, settings):
        tried.append(len(ids))
        if not fits(len(tried), len(ids)):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return whole(model, sites, ids, settings)

    monkeypatch.setattr(qu, "start_batch", start_batch)
    return tried


def losses(model, windows, asked):
    """[N] of the unquantized model, by evaluate_what_fits."""
    return torch.cat(list(memory.evaluate_what_fits(model, find_sites(model), windows, [{}], asked)))[:, 0, 0]


@pytest.mark.parametrize(
    ("asked", "estimate", "fits", "tried", "notices"),
    [
        ("auto", 4, lambda attempt, size: size <= 11, [1, 4, 4, 2], []),
        ("auto", 100, lambda attempt, size: size <= 88, [1, 10], []),
        ("auto", 9, lambda attempt, size: size <= 6, [1, 9, 8, 7, 6, 4], [8, 7, 6]),
        ("auto", 2, lambda attempt, size: size == 1, [1, 2] + [1] * 10, [1]),
        (8, None, lambda attempt, size: size <= 5, [8, 7, 6, 5, 5, 1], [7, 6, 5]),
        (4, None, lambda attempt, size: attempt == 1 or size <= 2, [4, 4, 3, 2, 2, 2, 1], [3, 2]),  # it is taken later
    ],
)
def test_what_fits_is_measured_with_the_same_figures(
    monkeypatch, model, windows, asked, estimate, fits, tried, notices
):
    windows = windows[:, :64]
    expected, sizes = measured(model, windows, {})[:, 0, 0], running_out(monkeypatch, fits)
    if estimate is not None:
        monkeypatch.setattr(memory, "batch_size_for_memory", lambda model: estimate)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", Notice)
        torch.testing.assert_close(losses(model, windows, asked), expected, rtol=1e-6, atol=0)
    assert sizes == tried
    words = [str(each.message) for each in said if each.category is Notice]
    assert words == [f"out of memory: going on with --batch_size {size}" for size in notices]


def test_auto_is_one_window_on_a_cpu(model, windows, monkeypatch):
    tried = running_out(monkeypatch, lambda attempt, size: True)
    losses(model, windows[:3, :64], "auto")
    assert tried == [1, 1, 1]


def test_one_window_that_does_not_fit_and_errors_of_another_kind_end_the_run(monkeypatch, model, windows):
    running_out(monkeypatch, lambda attempt, size: attempt < 3)
    with pytest.raises(qu.UserError, match="one window of seqlen 64 runs out of memory on cpu: lower --seqlen"):
        losses(model, windows[:, :64], 1)

    def start_batch(*args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(qu, "start_batch", start_batch)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        losses(model, windows, 2)


def test_activations_that_do_not_fit_into_host_memory_are_refused(model, windows, monkeypatch):
    """2 windows of 512 tokens: 12 sites of 128 channels in fp32 take 6 MiB, and as much again for gradients."""
    for fisher, need in ((None, 6 * 2**20), ("paper", 12 * 2**20)):
        settings = {3: setting_of(model, "nuq", fisher=fisher)}
        monkeypatch.setattr(memory, "free_memory", lambda device, need=need: need)
        memory.check_host_memory(windows[:2], settings, torch.float32)
        monkeypatch.setattr(memory, "free_memory", lambda device, need=need: need - 1)
        with pytest.raises(qu.UserError, match=r"--nsamples \(now 2\) or --seqlen"):
            memory.check_host_memory(windows[:2], settings, torch.float32)


# -- weights


def test_the_first_projection_that_overflows_is_named_with_its_window(model, windows):
    broken = copy.deepcopy(model)
    broken.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    ids = windows[:3, :32]
    assert memory.first_overflow(model, ids[0], {}) is None
    assert memory.first_overflow(broken, ids[0], {}) == "model.layers.2.mlp.down_proj"
    run = SimpleNamespace(is_paired=False, texts={"text": ids}, rows=["abits 16"])
    figures = measured(model, ids, {})
    memory.check_figures(model, run, "text", [{}], 0, figures)
    place = r"text, abits 16: window 2 of 3 has loss nan, model\.layers\.2\.mlp\.down_proj overflows first in float32"
    figures[1, 0, 0] = torch.nan
    with pytest.raises(qu.UserError, match=place):
        memory.check_figures(broken, run, "text", [{}], 0, figures)


def copied(folder, change=None, **config):
    """A copy of the bundled model, its tensors changed in place by change, its config by config."""
    shutil.copytree(NANO, folder)
    if change is not None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    whole = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def load(folder):
    config, _ = models.load_config_and_tokenizer(str(folder))
    return models.load_model(Flags(str(folder), device="cpu"), config)


def test_tensors_that_are_missing_or_that_no_one_names(tmp_path):
    name = "model.layers.3.mlp.up_proj.weight"
    lacking = copied(tmp_path / "lacking", lambda tensors: tensors.pop(name))
    with pytest.raises(qu.UserError, match=f"lacks 1 tensors, {name} first: is the copy complete"):
        load(lacking)
    with pytest.warns(Notice, match=r"has 9 tensors that its config does not name, model\.layers\.5\."):
        assert len(load(copied(tmp_path / "surplus", num_hidden_layers=5)).model.layers) == 5
    (lacking / "model.safetensors").write_bytes((NANO / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(qu.UserError, match="^cannot load model '"):
        load(lacking)


def test_the_mark_of_the_weights_changes_when_a_file_does(tmp_path):
    folder = copied(tmp_path / "model")
    config, marks = SimpleNamespace(name_or_path=str(folder)), []
    path = folder / "model.safetensors"
    content, times = path.read_bytes(), path.stat()
    steps = itertools.chain(
        [lambda: None],
        [lambda: os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))],  # as written anew
        [lambda: path.write_bytes(content[:-1])],
        [lambda: (folder / "adapter_model.safetensors").write_bytes(b"")],
    )
    for step in steps:
        step()
        marks.append(models.weights_mark(config))
        assert models.weights_mark(config) == marks[-1]
    assert len(set(marks)) == 4
    assert models.weights_mark(SimpleNamespace(name_or_path="a/b", _commit_hash="0123")) == "0123"


def bitsandbytes(folder, **how):
    how = {"quantization_config": BitsAndBytesConfig(**how), "dtype": torch.float32}
    AutoModelForCausalLM.from_pretrained(NANO, **how).save_pretrained(folder)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(folder)


def fp8(folder, block=32):
    """The format of DeepSeek-V3 and Qwen3-FP8: float8 numbers and a scale for each block."""

    def change(tensors):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            rows, columns = tensors[name].shape
            blocks = tensors[name].float().view(rows // block, block, columns // block, block)
            scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (blocks / scale).reshape(rows, columns).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()

    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    copied(folder, change, quantization_config=how, dtype="bfloat16")


CHECKPOINTS = {  # how it is made, what it is called, how far its perplexity may be from that of whole weights, bytes
    "bitsandbytes, 4 bits": (lambda folder: bitsandbytes(folder, load_in_4bit=True), "bitsandbytes", 2.0, 0.5),
    "bitsandbytes, 8 bits": (lambda folder: bitsandbytes(folder, load_in_8bit=True), "bitsandbytes", 0.5, 1),
    "fp8": (fp8, "fp8", 0.5, 1),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_quantized_weights_are_measured_calibrated_and_named(kind, tmp_path):
    make, method, far, bytes_each = CHECKPOINTS[kind]
    make(folder := tmp_path / "model")
    text = ("--datasets", SAMPLE, "--seqlen", "256", "--limit", "4", "--abits", "16,3", "--include_sparse")
    results = []
    for model in (NANO, folder):
        process = run_script(DYNAMIC_SCRIPT, model, *text, "--output", tmp_path / "out.json")
        assert process.returncode == 0, process.stderr
        results.append(json.loads((tmp_path / "out.json").read_text())["results"])
        (line,) = [line for line in process.stdout.splitlines() if line.startswith(f"{model}:")]
        assert (f"weights quantized by {method}" in line) == (model == folder)
    for one, other in zip(*results, strict=True):
        assert 1e-4 < abs(one["ppl"] - other["ppl"]) < far  # other weights, the same model
        assert one["avg_bits"] == pytest.approx(other["avg_bits"], rel=0.01)
    flags = ("--calib_dataset", SAMPLE, "--nsamples", "1", "--seqlen", "128", "--abits", "3", "--nuq")
    process = run_script(CALIBRATED_SCRIPT, folder, "--calibrate", *flags, "--quantizer_path", tmp_path / "q.pkl")
    assert process.returncode == 0 and "model.layers.5.self_attn.v_proj" in process.stdout, process.stderr

    config = AutoConfig.from_pretrained(folder)
    skeleton = models.skeleton(Flags(str(folder), dtype="bfloat16", device="cpu"), config)
    products = sum(module.weight.numel() for module in projections(skeleton).values())
    whole = sum(parameter.numel() * 2 for parameter in skeleton.parameters())
    assert models.weight_bytes(skeleton) == whole - (2 - bytes_each) * products


def test_the_size_of_a_model_is_known_from_its_config(config_and_tokenizer, model):
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        skeleton = models.skeleton(Flags("m", dtype=dtype, device="cpu"), config_and_tokenizer[0])
        assert models.weight_bytes(skeleton) == width * sum(each.numel() for each in model.parameters())
        assert all(parameter.is_meta for parameter in skeleton.parameters())


def test_a_library_that_is_missing_is_named(tmp_path):
    how = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 1}
    folder = copied(tmp_path / "model", quantization_config=how | {"nbits_per_codebook": 16})
    process = run_script(DYNAMIC_SCRIPT, folder, "--datasets", SAMPLE, "--seqlen", "64")
    assert_one_line_error(process, "cannot load model", "aqlm")
