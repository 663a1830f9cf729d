"""What helps at a shell: a look before the run, tables for narrow terminals."""

import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios

import pytest
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, ROOT, SAMPLE, assert_one_line_error, run_script

import quant_utils as qu

TEXT = ("--datasets", SAMPLE, "--seqlen", "512")
CALIBRATION = (
    "--calibrate",
    "--nuq",
    "--include_sparse",
    "--calib_dataset",
    SAMPLE,
    "--nsamples",
    "4",
    "--seqlen",
    "512",
)


@pytest.fixture(scope="module")
def weightless(tmp_path_factory):
    """llama3-nano without its weights."""
    folder = shutil.copytree(NANO, tmp_path_factory.mktemp("weightless") / "model")
    (folder / "model.safetensors").unlink()
    return folder


def test_list_sites_says_what_would_be_quantized_and_how_without_weights(weightless, tmp_path):
    flags = ("--abits", "16,4,3", "--include_sparse", "--first_few_fp16", "1", "--output", tmp_path / "o.json")
    process = run_script(DYNAMIC_SCRIPT, weightless, *flags, "--list_sites")
    assert process.returncode == 0 and process.stderr == ""
    header, *rows, blank, summary, keys, values = process.stdout.splitlines()
    assert header.split() == ["site", "output", "of", "channels"] and blank == ""
    expected = [(f"model.layers.{i}.self_attn.{leaf}", leaf, "128") for i in range(6) for leaf in ("k_proj", "v_proj")]
    assert [tuple(row.split()) for row in rows] == expected
    assert summary == "LlamaForCausalLM: 12 sites"
    how = "outliers exact (sparsity threshold 0.99), first 1 token exact"
    assert keys == f"k_proj: 4, 3-bit uniform per channel, {how}"
    assert values == f"v_proj: 4, 3-bit uniform per token, {how}"
    assert list(tmp_path.iterdir()) == []


def test_list_sites_of_nothing_and_of_what_is_not_there(weightless):
    assert run_script(DYNAMIC_SCRIPT, weightless, "--abits", "16", "--list_sites").stdout.endswith(
        "nothing is quantized\n"
    )
    process = run_script(DYNAMIC_SCRIPT, weightless, "--perchannel", "x_proj", "--list_sites")
    assert_one_line_error(process, "no projection x_proj")


def test_list_sites_and_dry_run_of_a_calibration_write_nothing(weightless, tmp_path):
    flags = (weightless, *CALIBRATION, "--fisher", "--abits", "4,3", "--quantizer_path", tmp_path / "q.pkl")
    process = run_script(CALIBRATED_SCRIPT, *flags, "--list_sites")
    assert process.returncode == 0 and process.stdout.count("4, 3-bit NUQ per channel, outliers exact") == 1
    process = run_script(CALIBRATED_SCRIPT, *flags, "--dry_run")
    assert process.returncode == 0 and f"{SAMPLE}: 4 windows of 512 tokens, seed 0" in process.stdout
    gib = 4 * 512 * 12 * 128 * 4 / 2**30
    assert f"{gib:.2f} GiB of activations in host memory" in process.stdout
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_settings_windows_memory_and_time(weightless, tmp_path, model):
    flags = (*TEXT, "--abits", "16,3", "--batch_size", "2", "--output", tmp_path / "o.json", "--dry_run")
    process = run_script(DYNAMIC_SCRIPT, weightless, *flags)
    assert process.returncode == 0 and process.stderr == "" and list(tmp_path.iterdir()) == []
    lines = process.stdout.splitlines()
    assert lines[0] == f"{weightless}: float32 on cpu, sdpa attention, batch_size 2, compile off"
    assert lines[1:5] == [
        "settings: 2, of 16, 3 bits",
        "k_proj: 3-bit uniform per channel",
        "v_proj: 3-bit uniform per token",
        f"{SAMPLE}: 11 windows of 512 tokens",
    ]
    gib = sum(parameter.nbytes for parameter in model.parameters()) / 2**30
    assert lines[5].startswith(f"memory: about {gib:.2f} GiB of weights and ") and "free on cpu" in lines[5]
    assert re.fullmatch(
        r"time: about \d:\d\d:\d\d \(h:mm:ss\) for 22 forward passes at [\d.e+-]+ TFLOP/s, loading not counted",
        lines[6],
    )


def test_dry_run_counts_the_settings_of_an_attribution(weightless):
    process = run_script(DYNAMIC_SCRIPT, weightless, *TEXT, "--abits", "2", "--attribution", "--dry_run")
    assert "settings: 10, of 16, 2 bits (attribution)" in process.stdout  # 16, keys, values, both, six layers
    assert "for 110 forward passes" in process.stdout


def test_dry_run_finds_mistakes(weightless):
    process = run_script(DYNAMIC_SCRIPT, weightless, *TEXT, "--seqlen", "99999", "--dry_run")
    assert_one_line_error(process, "99999")


@pytest.mark.parametrize(
    ("shape", "flops"),
    [
        # Llama-3-8B: 2 flops for each of 6.98e9 + 0.525e9 weights a token, and attention's 4 * T * hidden * layers
        ({"hidden": 4096, "intermediate": 14336, "layers": 32, "vocab": 128256}, 2 * 7.504e9 + 4 * 2048 * 4096 * 32),
        ({"hidden": 2048, "intermediate": 8192, "layers": 16, "vocab": 128256}, 2 * 1.2358e9 + 4 * 2048 * 2048 * 16),
    ],
)
def test_the_estimate_counts_the_matrix_products(shape, flops):
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=shape["hidden"], intermediate_size=shape["intermediate"], num_hidden_layers=shape["layers"],
        vocab_size=shape["vocab"], num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    model = qu.skeleton(config, "bfloat16")
    assert all(parameter.is_meta for parameter in model.parameters())
    besides, operations = qu.estimate(model, qu.EvalSpec(), 3, 2)
    assert operations == pytest.approx(3 * 2 * 2048 * flops, rel=0.01)
    assert 2**28 < besides < 2**31


def test_experts_that_a_token_does_not_use_are_not_counted():
    from transformers import MixtralConfig

    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 8}
    work = []
    for experts in (2, 8):
        model = qu.skeleton(MixtralConfig(**sizes, num_local_experts=experts, num_experts_per_tok=2))
        work.append(qu.estimate(model, qu.EvalSpec(), 1, 1)[1])
    assert work[0] == pytest.approx(work[1], rel=0.01)  # but for the router


def on_terminal(columns, *command):
    """What command writes to a terminal of so many columns, stdout and stderr together."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        list(map(str, command)), stdout=theirs, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT
    )
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 4096):
            written += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return written.decode().replace("\r", "")


def test_tables_fold_on_a_narrow_terminal_and_lose_no_figure():
    text = SAMPLE.relative_to(ROOT)
    flags = (DYNAMIC_SCRIPT, NANO, "--datasets", text, "--seqlen", "64", "--limit", "2", "--abits", "16,3")
    tables = {columns: on_terminal(columns, sys.executable, *flags) for columns in (70, 400)}
    figures = {}
    for columns, written in tables.items():
        lines = [line for line in written.splitlines() if line.startswith(("dataset", str(text))) and ":" not in line]
        assert max(map(len, lines)) <= columns
        found, header = {}, None
        for line in lines:
            if line.startswith("dataset"):
                header = line.split()
            else:
                found |= {
                    (header[2], name, line.split()[1]): value for name, value in zip(header, line.split(), strict=True)
                }
        figures[columns] = {key[1:]: value for key, value in found.items() if key[1] not in ("seconds", "±", "dataset")}
    assert figures[70] == figures[400] and len(figures[70]) > 25
    assert tables[70].count("dataset ") > tables[400].count("dataset ") == 3
