"""Weights that are quantized on disk are loaded as they are, and the settings line says so."""

import json
import shutil

import pytest
import torch
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, run_script
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import quant_utils as qu

TEXT = ("--datasets", SAMPLE, "--seqlen", "256", "--limit", "4", "--abits", "16,3", "--include_sparse")


def bitsandbytes(folder, **how):
    model = AutoModelForCausalLM.from_pretrained(
        NANO, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(folder)


def fp8(folder, block=32):
    """The format of DeepSeek-V3 and Qwen3-FP8: float8 numbers and a scale for each block."""
    shutil.copytree(NANO, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        rows, columns = tensors[name].shape
        blocks = tensors[name].float().view(rows // block, block, columns // block, block)
        scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        tensors[name] = (blocks / scale).reshape(rows, columns).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": how, "dtype": "bfloat16"}))


CHECKPOINTS = {
    "bitsandbytes, 4 bits": (lambda folder: bitsandbytes(folder, load_in_4bit=True), "bitsandbytes", 2.0),
    "bitsandbytes, 8 bits": (lambda folder: bitsandbytes(folder, load_in_8bit=True), "bitsandbytes", 0.5),
    "fp8": (fp8, "fp8", 0.5),
}


@pytest.fixture(scope="module", params=CHECKPOINTS)
def checkpoint(request, tmp_path_factory):
    make, method, loss = CHECKPOINTS[request.param]
    folder = tmp_path_factory.mktemp("quantized") / "model"
    make(folder)
    return folder, method, loss


def test_quantized_weights_are_measured_and_the_settings_say_so(checkpoint, tmp_path):
    folder, method, loss = checkpoint
    plain = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--output", tmp_path / "plain.json")
    process = run_script(DYNAMIC_SCRIPT, folder, *TEXT, "--output", tmp_path / "out.json")
    assert plain.returncode == process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if line.startswith(f"{folder}:")]
    assert f"weights quantized by {method}" in line and "weights quantized" not in plain.stdout
    ours, theirs = (json.loads((tmp_path / name).read_text())["results"] for name in ("out.json", "plain.json"))
    for one, other in zip(ours, theirs, strict=True):
        assert 1e-4 < abs(one["ppl"] - other["ppl"]) < loss  # other weights, the same model
        assert one["avg_bits"] == pytest.approx(other["avg_bits"], rel=0.01)
    assert ours[1]["kl"] > 0


def test_quantized_weights_are_calibrated(checkpoint, tmp_path):
    folder, _, loss = checkpoint
    text = ("--calib_dataset", SAMPLE, "--nsamples", "2", "--seqlen", "256")
    flags = ("--calibrate", "--nuq", "--include_sparse", "--abits", "3", *text, "--quantizer_path", tmp_path / "q.pkl")
    if loss == 2.0:  # on a CPU these products have no gradient once the model has run without one
        process = run_script(CALIBRATED_SCRIPT, folder, *flags, "--fisher")
        assert process.returncode == 2 and "no gradient comes to model.layers.0" in process.stderr
    else:
        flags = (*flags, "--fisher")
    process = run_script(CALIBRATED_SCRIPT, folder, *flags)
    assert process.returncode == 0, process.stderr
    process = run_script(CALIBRATED_SCRIPT, folder, "--quantizer_path", tmp_path / "q.pkl", *TEXT[:6])
    assert process.returncode == 0, process.stderr


def test_the_size_of_quantized_weights_is_known_from_the_config(checkpoint):
    folder, _, _ = checkpoint
    config, _ = qu.load_config_and_tokenizer(str(folder))
    plain, _ = qu.load_config_and_tokenizer(str(NANO))
    model = qu.skeleton(plain, "bfloat16")
    products = sum(module.weight.numel() for module in qu.projections(model).values())
    per_weight = 0.5 if "4bit': True" in str(config.quantization_config) else 1
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert qu.parameter_bytes(config, "bfloat16") == whole - int((2 - per_weight) * products)


def test_a_dtype_in_which_quantized_weights_do_not_run_is_one_line(tmp_path):
    fp8(tmp_path / "model")
    process = run_script(DYNAMIC_SCRIPT, tmp_path / "model", *TEXT, "--dtype", "float32")
    assert_one_line_error(process, "does not run in", "--dtype")


def test_a_library_that_is_missing_is_named(tmp_path):
    shutil.copytree(NANO, tmp_path / "model")
    config = json.loads((NANO / "config.json").read_text())
    how = {
        "quant_method": "aqlm",
        "in_group_size": 8,
        "out_group_size": 1,
        "num_codebooks": 1,
        "nbits_per_codebook": 16,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    process = run_script(DYNAMIC_SCRIPT, tmp_path / "model", *TEXT)
    assert_one_line_error(process, "cannot load model", "needs a library that is not installed", "aqlm")


def test_the_mark_of_the_weights_sees_what_packed_tensors_hold():
    def mark(first, second):
        model = torch.nn.Linear(2, 2, bias=False)
        model.weight = torch.nn.Parameter(TwoTensor(torch.full((2, 2), first), torch.full((2, 2), second)))
        return qu.weights_digest(model)

    assert mark(1.0, 2.0) == mark(1.0, 2.0) != mark(1.0, 3.0)
