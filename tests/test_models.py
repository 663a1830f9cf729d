"""Where a model lies changes no figure; its weights are whole, known by size, and may be quantized on disk."""

import copy
import json
import os
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, SAMPLE, measured, run_script, same_bits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, StaticCache

import quant_utils as qu
from simquant import calibration, memory, models, report
from simquant.flags import Flags
from simquant.notices import Notice
from simquant.plans import Pair, Plan, Width
from simquant.sites import find_sites
from simquant.summary import storage_cost


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
        fits.append(calibration.calibrate(each, windows[:2, :128], {3: plain})[3])
    assert same_bits(*figures) and (figures[0][:, 1, 1] > 0).all()
    for (one, ours), (other, theirs) in zip(*(each.items() for each in fits), strict=True):
        assert (one.name, one.channels) == (other.name, other.channels)
        assert same_bits(ours.codebook, theirs.codebook) and (ours.lo is None or same_bits(ours.lo, theirs.lo))


def test_transform_coding_fits_a_split_model_like_a_whole_one(split, model, windows):
    fits = []
    for each in (split, model):
        axes = {"keys": "channel", "values": "token"}
        plan = Plan([Pair("klt", "klt")], [Width(1, 1)], axes, {"--predict": ("predict", "all")})
        (fitted,) = calibration.calibrate(each, windows[:2, :128], plan.settings(find_sites(each))).values()
        fits.append((fitted, measured(each, windows[:2], {}, fitted)))
    (ours, figures), (theirs, others) = fits
    assert same_bits(figures, others) and (figures[:, 1, 1] > 0).all()
    assert all(torch.equal(one.levels, other.levels) for one, other in zip(ours.values(), theirs.values(), strict=True))


# -- which device


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of 24 GiB, as far as torch can be asked."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(models, "free_memory", lambda device: 24 * 2**30)


def test_auto_is_one_gpu_unless_the_model_is_larger_and_each_process_has_its_own(
    gpus, config_and_tokenizer, monkeypatch
):
    def placements():
        return [str(models.placement(Flags("m", device=d), config_and_tokenizer[0])) for d in ("auto", "cuda:1", "cpu")]

    for gib, expected in ((1, "cuda:0"), (21.9, "cuda:0"), (22.1, "auto"), (70, "auto")):
        monkeypatch.setattr(models, "weight_bytes", lambda model, gib=gib: gib * 2**30)
        assert placements() == [expected, "cuda:1", "cpu"]
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "3"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert placements()[0] == str(models.single_device("cuda")) == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(qu.UserError, match=r"device cuda:2 was asked for.* sees 2 GPU"):
        models.single_device("auto")


def test_dtype_and_attention_are_what_is_asked_or_the_models_own(gpus, config_and_tokenizer):
    chosen = {d: models.choices(Flags("m", device=d), config_and_tokenizer[0])["dtype"] for d in ("cpu", "cuda")}
    assert chosen == {"cpu": "float32", "cuda": "bfloat16"}  # it is bfloat16 on disk
    for kind in ("gpt_oss", "llama"):
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, num_hidden_layers=1))
        for asked, expected in (("auto", plain.config._attn_implementation), ("eager", "eager")):
            flags, config = Flags("m", attn_implementation=asked), AutoConfig.for_model(kind, num_hidden_layers=1)
            assert models.skeleton(flags, config).config._attn_implementation == expected


# -- how many windows


def running_out(monkeypatch, fits):
    """Let start_batch fail unless fits(number of the attempt, windows in it); return the sizes that are tried."""
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
    batches = memory.evaluate_what_fits(model, find_sites(model), windows, [{}], asked)
    return torch.cat([batch.figures for batch in batches])[:, 0, 0]


@pytest.mark.parametrize(
    ("asked", "estimate", "fits", "tried", "settled"),
    [
        ("auto", None, lambda attempt, size: True, [1] * 11, None),  # on a CPU
        ("auto", 100, lambda attempt, size: size <= 88, [1, 10], None),
        ("auto", 9, lambda attempt, size: size <= 6, [1, 9, 8, 7, 6, 4], None),
        (8, None, lambda attempt, size: size <= 5, [8, 7, 6, 5, 5, 1], 5),
        (4, None, lambda attempt, size: attempt == 1 or size <= 2, [4, 4, 3, 2, 2, 2, 1], 2),  # it is taken later
    ],
)
def test_what_fits_is_measured_with_the_same_figures(
    monkeypatch, model, windows, recwarn, asked, estimate, fits, tried, settled
):
    windows = windows[:, :64]
    expected, sizes = measured(model, windows, {})[:, 0, 0], running_out(monkeypatch, fits)
    if estimate is not None:
        monkeypatch.setattr(memory, "batch_size_for_memory", lambda model: estimate)
    torch.testing.assert_close(losses(model, windows, asked), expected, rtol=1e-6, atol=0)
    assert sizes == tried
    said = [f"--batch_size {asked} runs out of memory: going on with {settled}"] if settled else []
    assert [str(each.message) for each in recwarn if each.category is Notice] == said


def test_one_window_that_does_not_fit_and_errors_of_another_kind_end_the_run(monkeypatch, model, windows):
    running_out(monkeypatch, lambda attempt, size: attempt < 3)
    with pytest.raises(qu.UserError, match="one window of seqlen 64 runs out of memory on cpu: lower --seqlen"):
        losses(model, windows[:, :64], 1)
    monkeypatch.setattr(qu, "start_batch", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        losses(model, windows, 2)


# -- weights


def test_the_first_projection_that_overflows_is_named(model, windows):
    broken, ids = copy.deepcopy(model), windows[0, :32]
    broken.model.layers[2].mlp.down_proj.weight.fill_(3e38)
    assert memory.first_overflow(model, ids, {}) is None
    assert memory.first_overflow(broken, ids, {}) == "model.layers.2.mlp.down_proj"
    values = {site: qu.ScalarQuantizer("token") for site in find_sites(broken) if site.key == (1, "values")}
    with qu.hooked((site.module, lambda module, args, out: out * torch.inf) for site in values):
        assert memory.first_overflow(broken, ids, values) == "model.layers.1.self_attn.v_proj"


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
    with pytest.raises(qu.UserError, match=r"^cannot load model '"):
        load(lacking)


def test_the_mark_of_the_weights_changes_when_a_file_does(tmp_path):
    folder = copied(tmp_path / "model")
    config, path = SimpleNamespace(name_or_path=str(folder)), folder / "model.safetensors"
    marks, later = [models.weights_mark(config)], path.stat().st_mtime_ns + 1
    for change in (
        lambda: os.utime(path, ns=(later, later)),  # as written anew
        lambda: path.write_bytes(path.read_bytes()[:-1]),
        lambda: (folder / "adapter_model.safetensors").write_bytes(b""),
    ):
        change()
        marks.append(models.weights_mark(config))
    assert len(set(marks)) == 4 and models.weights_mark(config) == marks[-1]
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


def measured_rows(model, out, words):
    """The rows of a run in 16 and 3 bits, whose settings line ends so behind the attention."""
    flags = ("--datasets", SAMPLE, "--seqlen", "256", "--limit", "4", "--abits", "16,3", "--include_sparse")
    process = run_script(DYNAMIC_SCRIPT, model, *flags, "--output", out)
    assert process.returncode == 0 and f" attention{words}, windows of 256 tokens\n" in process.stdout, process.stderr
    return json.loads(out.read_text())["results"]


@pytest.fixture(scope="module")
def unquantized(tmp_path_factory):
    return measured_rows(NANO, tmp_path_factory.mktemp("unquantized") / "out.json", "")


@pytest.mark.parametrize(
    ("make", "method", "far", "bytes_each"),
    [
        (lambda folder: bitsandbytes(folder, load_in_4bit=True), "bitsandbytes", 2.0, 0.5),
        (lambda folder: bitsandbytes(folder, load_in_8bit=True), "bitsandbytes", 0.5, 1),
        (fp8, "fp8", 0.5, 1),
    ],
    ids=["bitsandbytes in 4 bits", "bitsandbytes in 8 bits", "fp8"],
)
def test_quantized_weights_are_measured_calibrated_and_named(make, method, far, bytes_each, unquantized, tmp_path):
    make(folder := tmp_path / "model")
    rows = measured_rows(folder, tmp_path / "out.json", f", weights quantized by {method}")
    for one, other in zip(rows, unquantized, strict=True):
        assert 1e-4 < abs(one["ppl"] - other["ppl"]) < far  # other weights, the same model
        assert one["avg_bits"] == pytest.approx(other["avg_bits"], rel=0.01)
    flags = ("--calib_dataset", SAMPLE, "--nsamples", "1", "--seqlen", "128", "--abits", "3", "--nuq")
    process = run_script(CALIBRATED_SCRIPT, folder, "--calibrate", *flags, "--quantizer_path", tmp_path / "q.pkl")
    assert process.returncode == 0 and "model.layers.5.self_attn.v_proj" in process.stdout, process.stderr
    flags = Flags(str(folder), dtype="bfloat16", device="cpu")
    skeleton = models.skeleton(flags, AutoConfig.from_pretrained(folder))
    sizes = {name: each.numel() for name, each in skeleton.named_parameters()}
    packed = sum(size for name, size in sizes.items() if name.endswith("_proj.weight"))
    assert models.weight_bytes(skeleton) == 2 * (sum(sizes.values()) - packed) + bytes_each * packed


def test_the_size_of_a_model_is_known_from_its_config(config_and_tokenizer, model):
    for dtype, width in (("float32", 4), ("bfloat16", 2)):
        skeleton = models.skeleton(Flags("m", dtype=dtype, device="cpu"), config_and_tokenizer[0])
        assert models.weight_bytes(skeleton) == width * sum(each.numel() for each in model.parameters())
        assert all(parameter.is_meta for parameter in skeleton.parameters())


# -- the cache

SHAPE = {
    "vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 32, "head_dim": 8, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
WINDOWED = {  # layers that hold a window or a chunk, of 4
    "llama": (0, {}), "mistral": (4, {"sliding_window": 8}), "gemma2": (2, {"sliding_window": 8}),
    "gemma3_text": (3, {"sliding_window": 8, "sliding_window_pattern": 4}),
    "gpt_oss": (2, {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4_text": (3, {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 32}),
}  # fmt: skip


@pytest.mark.parametrize("context", [6, 8, 100])
@pytest.mark.parametrize("kind", WINDOWED)
def test_the_size_of_a_cache_is_what_a_static_one_allocates(kind, context):
    """Layer by layer, and in GiB."""
    shorter, changes = WINDOWED[kind]
    config = AutoConfig.for_model(kind, **SHAPE | changes)
    with torch.device("meta"):
        found = find_sites(AutoModelForCausalLM.from_config(config), context)
    cache = StaticCache(config, max_cache_len=context)
    cache.early_initialization(1, 2, 8, torch.float16, torch.device("cpu"))
    expected = {i: layer.keys.shape[2] for i, layer in enumerate(cache.layers)}
    assert sum(tokens < context for tokens in expected.values()) == (shorter if context > 8 else 0)
    assert [(site.layer, site.tokens) for site in found] == [each for each in expected.items() for _ in qu.PARTS]
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 2**30
    costs = storage_cost(2.0, 4.0, report.cache_entries(found))
    assert costs == {"avg_bits": 3.0, "cache_gib": size * 3 / 16, "fp16_cache_gib": size}


def test_average_bits_weigh_layers_by_what_a_long_cache_holds_of_them():
    """A count of every entry's bits over widths that differ, with outliers: two layers of 8 tokens, two of 100."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("gemma2", **SHAPE | {"sliding_window": 8})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    found, ids = find_sites(model, 100), torch.randint(3, 48, (1, 64))
    assert [site.tokens for site in found] == [8, 8, 100, 100] * 2
    setting = {site: qu.ScalarQuantizer("token", 2 + site.layer, outliers=0.1) for site in found if site.layer < 3}
    bits, counts = {"keys": 0.0, "values": 0.0}, {"keys": 0, "values": 0}

    def count(module, args, out, site):
        if site in setting:
            kept = setting[site].quantize(out).outliers.sum().item()
            each = 2 + site.layer + 32 * kept / (64 * 16) + 32 / 16  # width, outliers, a range for each token
        else:
            each = 16
        bits[site.part] += each * site.tokens * 16
        counts[site.part] += site.tokens * 16

    with qu.hooked((site.module, partial(count, site=site)) for site in found):
        model.get_decoder()(input_ids=ids, use_cache=False)
    figures = torch.cat([batch.figures for batch in qu.evaluate(model, found, ids, [{}, setting])])[0, :, 6:8]
    assert figures[0].tolist() == [16, 16]
    expected = [bits[part] / counts[part] for part in qu.PARTS]
    assert figures[1].tolist() == pytest.approx(expected, rel=1e-9) and 8 < expected[0] < 13
