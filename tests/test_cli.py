"""The dynamic script as a user runs it: a process, its output, its exit status."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import DYNAMIC_SCRIPT, NANO, ROOT, SAMPLE, assert_one_line_error, run_script
from safetensors.torch import load_file, save_file

import quant_utils as qu

TEXT = ("--datasets", SAMPLE, "--seqlen", "512")


def nano_copy(folder, **config):
    """A copy of the bundled model with a changed config.json."""
    shutil.copytree(NANO, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def test_table_on_stdout_and_the_same_figures_in_json(tmp_path):
    out = tmp_path / "out.json"
    flags = ("--abits", "3", "--include_sparse", "--first_few_fp16", "1", "--nf", "--limit", "4", "--batch_size", "3")
    process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, *flags, "--output", out, env={"HF_HOME": str(tmp_path)})
    assert process.returncode == 0 and process.stderr == ""
    report = json.loads(out.read_text())
    assert set(report) >= {"script", "model", "settings", "environment", "results"}
    assert report["script"] == "kvquant_simquant_ppl_eval.py" and report["model"] == str(NANO)
    assert report["settings"] == {
        "abits": 3, "perchannel": ["k_proj"], "pertoken": ["v_proj"], "include_sparse": True, "nf": True,
        "sparsity_threshold": 0.99, "first_few_fp16": 1, "datasets": [str(SAMPLE)], "seqlen": 512, "limit": 4,
        "dtype": "float32", "device": "cpu", "attn_implementation": "sdpa", "batch_size": 3, "output": str(out),
        "baseline": False, "attribution": False, "resume": False, "report_context": 131072, "quiet": False,
        "plot": None, "plot_activations": None, "plot_layer": None, "compile": "off",
    }  # fmt: skip
    assert report["environment"]["device"] == "cpu" and report["environment"]["dtype"] == "float32"
    assert report["environment"]["versions"]["torch"] == torch.__version__
    (result,) = report["results"]
    assert set(result) >= {"dataset", "abits", "ppl", "nll", "windows", "tokens", "seconds"}
    assert (result["windows"], result["tokens"]) == (4, 4 * 511)
    header, row, *_ = process.stdout.splitlines()
    shown = dict(zip(header.split(), row.split(), strict=True))
    assert shown["ppl"] == f"{result['ppl']:.4f}" and shown["nll"] == f"{result['nll']:.6f}"
    assert shown["tokens"] == "2044"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (['["k_proj"]'], ["k_proj"]),
        (['["k_proj",', '"v_proj"]'], ["k_proj", "v_proj"]),
        (["k_proj", "v_proj"], ["k_proj", "v_proj"]),
        (["k_proj,v_proj"], ["k_proj", "v_proj"]),
        (["[]"], []),
        ([], []),
    ],
)
def test_projections_are_a_json_list_or_plain_words_or_nothing(words, names):
    parser = qu.Parser()
    qu.add_quantization_flags(parser)
    assert parser.parse_args(["--perchannel", *words]).perchannel == names


def test_a_projection_in_neither_list_stays_unquantized():
    common = (NANO, *TEXT, "--limit", "1")
    none = run_script(DYNAMIC_SCRIPT, *common, "--abits", "2", "--perchannel", "[]", "--pertoken")
    baseline = run_script(DYNAMIC_SCRIPT, *common, "--abits", "16")
    assert none.stdout.split()[10] == baseline.stdout.split()[10]  # the perplexity
    assert "k_proj" not in none.stdout


def test_seqlen_beyond_the_models_positions_is_a_warning(tmp_path):
    model = nano_copy(tmp_path / "short", max_position_embeddings=64)
    process = run_script(DYNAMIC_SCRIPT, model, *TEXT, "--limit", "1")
    assert process.returncode == 0
    assert process.stderr == "warning: seqlen 512 exceeds the 64 positions that the model was made for\n"


@pytest.mark.parametrize("args", [("--help",), ("--abits", "9", NANO), ("--nonsense", NANO)])
def test_help_and_a_mistyped_flag_wait_for_no_heavy_import(args):
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(DYNAMIC_SCRIPT)!r}, *{list(map(str, args))!r}]\n"
        "try:\n    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as stop:\n    status = stop.code\n"
        "print('loaded', sorted({'transformers', 'datasets', 'accelerate'} & set(sys.modules)), status)\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )
    status = 0 if "--help" in args else 2
    assert process.stdout.splitlines()[-1] == f"loaded [] {status}"


# -- bad input: one line that names the value and the remedy, exit status 2


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--abits", "1"), ("--abits", "'1'", "2, 3, 4")),
        (("--abits", "9"), ("--abits", "9", "16")),
        (("--abits", "0"), ("--abits", "0")),
        (("--abits", "four"), ("--abits", "'four'")),
        (("--abits", "4,3,9"), ("--abits", "'9'", "8, 16")),
        (("--abits", "4,3,4"), ("--abits", "4 stands there more than once")),
        (("--abits", "4,"), ("--abits", "''")),
        (("--dtype", "int4"), ("--dtype", "'int4'", "bfloat16")),
        (("--sparsity_threshold", "0"), ("sparsity_threshold", "(0, 1]", "got 0")),
        (("--sparsity_threshold", "1.01"), ("sparsity_threshold", "(0, 1]", "1.01")),
        (("--sparsity_threshold", "nan"), ("sparsity_threshold", "nan")),
        (("--seqlen", "1"), ("seqlen", "at least 2", "got 1")),
        (("--limit", "0"), ("limit", "at least 1")),
        (("--first_few_fp16", "512"), ("first_few_fp16", "512", "whole window")),
        (("--perchannel", "k_proj", "v_proj"), ("v_proj", "--perchannel", "--pertoken")),
        (("--perchannel", '["k_proj"'), ("--perchannel", '["k_proj"')),
        (("--perchannel", "[1]"), ("--perchannel", "[1]")),
        (("--device", "tpu"), ("'tpu'", "cuda", "cpu")),
        (("--attn_implementation", "flash_attention_2"), ("flash",)),
        (("--datasets", "wikitext3"), ("'wikitext3'", "wikitext2", ".jsonl")),
        (("--datasets", "/nowhere/a.txt"), ("'/nowhere/a.txt'", "does not exist")),
        (("--datasets", "a.csv"), ("'a.csv'", ".parquet")),
        (("--datasets", f"{SAMPLE},{SAMPLE.parent}/./sample.txt"), ("sample.txt", "more than once")),
        (("--output", ""), ("''", "file name")),
        (("--output", SAMPLE), ("sample.txt", "also read")),
        (("--perchannel", "self_attn"), ("self_attn", "q_proj, k_proj")),
        (("--perchannel", "lm_head"), ("lm_head", "q_proj, k_proj")),
        (("--output", "/nowhere/out.json"), ("'/nowhere/out.json'", "folder")),
        (("--output", "/dev/null"), ("'/dev/null'", "not a regular file")),
    ],
)
def test_a_mistake_in_a_flag(args, words):
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, NANO, *TEXT, *args), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there():
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--device", "cuda:1"), "cuda:1", "no GPU", "cpu")


def test_a_projection_that_the_model_lacks():
    process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--perchannel", "key")
    assert_one_line_error(process, "no projection key", "q_proj, k_proj, v_proj")


def test_a_text_shorter_than_one_window():
    process = run_script(DYNAMIC_SCRIPT, NANO, "--datasets", SAMPLE, "--seqlen", "6000")
    assert_one_line_error(process, "sample.txt has 5829 tokens", "one window takes 6000", "lower seqlen")


def test_a_damaged_text_file(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "fine"}\nnot json\n')
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, NANO, "--datasets", tmp_path / "b.jsonl"), "b.jsonl", "line 2")


def test_model_folders_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, tmp_path / "empty", *TEXT), "empty", "no config.json")
    broken = nano_copy(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:1000])
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, broken, *TEXT), "cannot load model", "broken")


def test_no_network(tmp_path):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    process = run_script(DYNAMIC_SCRIPT, "meta-llama/Llama-3-8B", *TEXT, env=env)
    assert_one_line_error(process, "meta-llama/Llama-3-8B", "hub cannot be reached", "network")


def test_a_checkpoint_without_all_tensors_is_refused(tmp_path):
    model = nano_copy(tmp_path / "gap", num_hidden_layers=7)
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, model, *TEXT), "gap", "lacks 9 tensors", "model.layers.6")


def test_tensors_that_the_config_does_not_name_are_a_warning(tmp_path):
    process = run_script(DYNAMIC_SCRIPT, nano_copy(tmp_path / "more", num_hidden_layers=5), *TEXT, "--limit", "1")
    assert process.returncode == 0
    assert re.match(r"warning: .*more.* has 9 tensors that its config does not name, model.layers.5", process.stderr)


def test_a_token_beyond_the_vocabulary_is_an_error(tmp_path):
    model = nano_copy(tmp_path / "small", vocab_size=100)
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, model, *TEXT), "token", "the model has 100", "tokenizer")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ('{"text": "fine"}\n{"text": null}\n', ("line 2", "string")),
        ('{"text": "\\ud800"}\n', ("line 1", "Unicode")),
        ("[" * 100_000, ("line 1",)),
        ("\n\n", ("is empty",)),
    ],
)
def test_odd_rows(tmp_path, rows, words):
    (tmp_path / "odd.jsonl").write_text(rows)
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, NANO, "--datasets", tmp_path / "odd.jsonl"), "odd.jsonl", *words)


def test_a_reader_of_stdout_that_leaves_is_no_traceback():
    command = [sys.executable, str(DYNAMIC_SCRIPT), str(NANO), *map(str, TEXT), "--limit", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_full_disk_under_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, str(DYNAMIC_SCRIPT), str(NANO), *map(str, TEXT), "--limit", "1"]
        process = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1
    assert process.stderr == "kvquant_simquant_ppl_eval.py: error: No space left on device\n"


@pytest.mark.parametrize("seconds", [0.3, 1, 4])
def test_ctrl_c_leaves_no_traceback_and_no_file(seconds, tmp_path):
    command = [sys.executable, DYNAMIC_SCRIPT, NANO, "--datasets", SAMPLE, "--seqlen", "64", "--output", tmp_path / "o"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        complaint = process.stderr.read()
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows both as 130
    assert complaint in ("", "kvquant_simquant_ppl_eval.py: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_is_an_error_and_no_figure(tmp_path):
    model, out = nano_copy(tmp_path / "nan"), tmp_path / "out.json"
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    process = run_script(DYNAMIC_SCRIPT, model, *TEXT, "--abits", "2", "--output", out)
    assert_one_line_error(process, "sample.txt, abits 2, keys and values", "window 1 of 11", "nan")
    assert "nan" not in process.stdout and not out.exists()
