"""The calibrated script as a user runs it: calibrate, evaluate, contradict, attack."""

import json
import os
import pickle
import re
import shlex

import pytest
import torch
from conftest import CALIBRATED_SCRIPT, NANO, ROOT, SAMPLE, assert_one_line_error, run_script

CALIBRATION = ("--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "2", "--seqlen", "256")
TEXT = ("--datasets", SAMPLE, "--seqlen", "512", "--limit", "2")
GOLDEN = ROOT.parent / "shared" / "golden" / "kvquant_quantizers_nuq4_sparse.pickle"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """(folder, process) of one calibration with everything switched on."""
    folder = tmp_path_factory.mktemp("calibrated")
    flags = ("--abits", "3", "--nuq", "--fisher", "--include_sparse", "--first_few_fp16", "1", "--norm")
    files = ("--quantizer_path", folder / "q.pkl", "--export_kvquant", folder / "published.pickle")
    process = run_script(CALIBRATED_SCRIPT, NANO, *CALIBRATION, *flags, *files)
    assert process.returncode == 0 and process.stderr == ""
    assert len(pickle.loads((folder / "published.pickle").read_bytes())) == 12
    return folder, process


def test_the_summary_has_a_line_for_every_projection_and_the_command_to_run_next(calibrated):
    folder, process = calibrated
    header, *lines = process.stdout.splitlines()
    assert header.split() == ["projection", "abits", "lowest", "highest", "kept", "rel.", "error"]
    lines = lines[:12]
    assert [line.split()[0] for line in lines] == [
        f"model.layers.{i}.self_attn.{kind}_proj" for i in range(6) for kind in "kv"
    ]
    for line in lines:
        bits, low, high, kept, error = (float(cell.rstrip("%")) for cell in line.split()[1:])
        assert bits == 3 and low < high and 0 < kept < 3 and 0 < error < 0.2
    *_, command = process.stdout.strip().splitlines()
    program, script, *rest = shlex.split(command)
    assert program == "python3" and script == str(CALIBRATED_SCRIPT)
    text = ["--datasets", str(SAMPLE), "--seqlen", "256"]
    assert rest == [str(NANO), "--quantizer_path", str(folder / "q.pkl"), *text]
    assert run_script(script, *rest, "--limit", "1").returncode == 0


def test_evaluation_takes_its_settings_from_the_file(calibrated, tmp_path):
    folder, _ = calibrated
    command = (CALIBRATED_SCRIPT, NANO, "--quantizer_path", folder / "q.pkl", *TEXT)
    process = run_script(*command, "--output", tmp_path / "a.json")
    assert process.returncode == 0 and process.stderr == ""
    report = json.loads((tmp_path / "a.json").read_text())
    wanted = {"abits": 3, "nuq": True, "fisher": True, "include_sparse": True, "first_few_fp16": 1, "norm": True}
    assert report["settings"].items() >= wanted.items()
    assert report["script"] == "kvquant_llama3_simquant.py"
    assert "k_proj: 3-bit NUQ per channel, outliers exact" in process.stdout
    again = run_script(*command, "--abits", "3", "--nuq", "--include_sparse", "--output", tmp_path / "b.json")
    assert again.returncode == 0
    assert json.loads((tmp_path / "b.json").read_text())["results"][0]["ppl"] == report["results"][0]["ppl"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--abits", "16,4,3"), ("abits: [4]", "contradicts [3]")),
        (("--sparsity_threshold", "0.95"), ("sparsity_threshold: 0.95", "contradicts 0.99")),
        (("--perchannel",), ("perchannel: []", "contradicts ['k_proj']")),
        (("--nsamples", "16"), ("nsamples: 16", "contradicts 2")),
    ],
)
def test_evaluation_refuses_a_contradiction_and_names_both_values(calibrated, flags, words):
    process = run_script(CALIBRATED_SCRIPT, NANO, "--quantizer_path", calibrated[0] / "q.pkl", *flags)
    assert_one_line_error(process, "contradicts", "q.pkl", *words)


@pytest.mark.skipif(not GOLDEN.is_file(), reason="needs ../shared")
def test_a_file_of_the_published_calibration_is_evaluated():
    process = run_script(CALIBRATED_SCRIPT, NANO, "--quantizer_path", GOLDEN, "--include_sparse", *TEXT)
    assert process.returncode == 0, process.stderr
    assert "4-bit NUQ per channel" in process.stdout


def test_the_baseline_needs_no_file():
    process = run_script(CALIBRATED_SCRIPT, NANO, "--abits", "16", *TEXT)
    assert process.returncode == 0 and re.match(r".*\n\S+ +16 ", process.stdout)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--abits", "4"), ("--quantizer_path", "--calibrate", "--abits 16")),
        (("--calibrate",), ("--calibrate needs --quantizer_path",)),
        (("--calibrate", "--abits", "16", "--quantizer_path", "q.pkl"), ("nothing to fit", "--abits 16")),
        (("--calibrate", "--nuq", "--nf", "--quantizer_path", "q.pkl"), ("--nf", "--nuq")),
        (("--calibrate", "--fisher", "--quantizer_path", "q.pkl"), ("--fisher", "add --nuq")),
        (("--calibrate", "--clamp", "--nuq", "--quantizer_path", "q.pkl"), ("clamp", "NUQ")),
        (("--calibrate", "--cap_outliers", "0.01", "--quantizer_path", "q.pkl"), ("cap_outliers", "include_sparse")),
        (("--calibrate", "--nsamples", "0", "--quantizer_path", "q.pkl"), ("nsamples", "got 0")),
        (("--calibrate", "--calib_dataset", "a.csv", "--quantizer_path", "q.pkl"), ("'a.csv'",)),
        (("--calibrate", "--quantizer_path", "/nowhere/q.pkl"), ("'/nowhere/q.pkl'", "writable folder")),
        (("--calibrate", "--calib_dataset", SAMPLE, "--quantizer_path", SAMPLE), ("sample.txt", "also read")),
        (("--calibrate", "--seqlen", "1", "--quantizer_path", "q.pkl"), ("seqlen", "got 1")),
        (("--calibrate", "--seed", "-1", "--quantizer_path", "q.pkl"), ("seed", "-1")),
        (("--calibrate", "--nsamples", "100000000000", "--quantizer_path", "q.pkl"), ("nsamples 100000000000", "GiB")),
        (("--calibrate", "--output", "a.json", "--quantizer_path", "q.pkl"), ("--output a.json", "leave it out")),
        (("--abits", "16", "--export_kvquant", "e.pkl"), ("--export_kvquant e.pkl", "nothing")),
        (("--quantizer_path", "/nowhere/q.pkl"), ("'/nowhere/q.pkl'", "make it with --calibrate")),
        (("--quantizer_path", "/dev/zero"), ("'/dev/zero'", "no regular file")),
        (("--quantizer_path", SAMPLE), ("sample.txt", "damaged")),
    ],
)
def test_a_mistake_in_a_flag(args, words):
    assert_one_line_error(run_script(CALIBRATED_SCRIPT, NANO, *args), *words)


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps({"model.layers.0.self_attn.k_proj": Bomb()}))
    process = run_script(CALIBRATED_SCRIPT, NANO, "--quantizer_path", tmp_path / "bomb.pkl")
    assert_one_line_error(process, "bomb.pkl", "holds more than data", "mkdir")
    assert not (tmp_path / "executed").exists()


def test_a_file_for_another_model(calibrated, tmp_path):
    data = torch.load(calibrated[0] / "q.pkl", weights_only=True)
    data["model"] |= {"name": "some/other-model", "channels": dict.fromkeys(data["quantizers"], 1024)}
    torch.save(data, tmp_path / "other.pkl")
    process = run_script(CALIBRATED_SCRIPT, NANO, "--quantizer_path", tmp_path / "other.pkl", *TEXT)
    assert_one_line_error(process, "calibrated for some/other-model", "1024 channels", "this model has 128")
