"""What is printed, written and drawn, and a run that is interrupted and goes on."""

import csv
import fcntl
import io
import json
import math
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, measured, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import quant_utils as qu

TEXT = ("--datasets", SAMPLE, "--seqlen", "128", "--limit", "6")
SWEEP = (*TEXT, "--abits", "16,4,2", "--include_sparse", "--batch_size", "2")


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """(process, report) of a sweep that nothing interrupted."""
    out = tmp_path_factory.mktemp("sweep") / "out.json"
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out)
    assert process.returncode == 0 and process.stderr == ""
    return process, json.loads(out.read_text())


@pytest.fixture(scope="module")
def attribution(tmp_path_factory):
    """(process, report) of an attribution, both plots drawn."""
    folder = tmp_path_factory.mktemp("attribution")
    flags = ("--abits", "2", "--attribution", "--include_sparse", "--plot", folder / "layers.svg")
    flags = (*flags, "--plot_activations", folder / "k.png", "--output", folder / "out.json")
    process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, *flags)
    assert process.returncode == 0 and process.stderr == ""
    assert ET.parse(folder / "layers.svg").getroot().tag.endswith("svg")
    assert (folder / "k.png").read_bytes().startswith(b"\x89PNG")
    return process, json.loads((folder / "out.json").read_text())


def figures(report):
    """All of results but the seconds."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in report["results"]]


def tables(stdout):
    """[[{heading: cell}]] of the tables that stand between empty lines."""
    found = []
    for block in stdout.split("\n\n")[:-1]:
        lines = [line.split() for line in block.splitlines()]
        header = next(i for i, line in enumerate(lines) if line[0] == "dataset")
        found.append([dict(zip(lines[header], line, strict=True)) for line in lines[header + 1 :]])
    return found


# -- tables and files


def test_the_same_figures_stand_in_the_tables_and_in_the_json(sweep):
    process, report = sweep
    main, differences, storage = tables(process.stdout)
    assert report["complete"] is True and report["settings"]["abits"] == [16, 4, 2]
    for row, line, difference, cost in zip(report["results"], main, differences, storage, strict=True):
        assert line["abits"] == difference["abits"] == cost["abits"] == str(row["abits"])
        assert line["ppl"] == f"{row['ppl']:.4f}" and line["±"] == f"{row['ppl_se']:.4f}"
        assert line["nll"] == f"{row['nll']:.6f}" and line["windows"] == "6"
        assert difference["Δppl"] == f"{row['delta_ppl']:+.4f}" and difference["±"] == f"{row['delta_ppl_se']:.4f}"
        assert difference["Δppl%"] == f"{row['delta_percent']:+.2f}" and difference["KL"] == f"{row['kl']:.6f}"
        assert difference["±%"] == f"{row['delta_percent_se']:.2f}"
        assert difference["top-1"] == f"{row['top1_agreement']:.2%}"
        assert cost["keys"] == f"{row['key_bits']:.3f}" and cost["values"] == f"{row['value_bits']:.3f}"
        assert cost["both"] == f"{row['avg_bits']:.3f}" and cost["GiB"] == f"{row['cache_gib']:.3f}"
        assert cost["fp16-GiB"] == "0.375"
        assert row["nll"] == pytest.approx(math.fsum(row["window_nll"]) / 6, rel=1e-12)
        assert len(row["window_kl"]) == len(row["window_key_bits"]) == 6


def test_columns_stand_under_their_headings(model, windows):
    run = measured(model, windows[:1], {})
    header, row = qu.table(run, qu.results(run, "text"), qu.FIGURES)
    assert header.split() == ["dataset", "abits", "ppl", "±", "nll", "windows", "tokens", "seconds"]
    ends = [[match.end() for match in re.finditer(r"\S+", line)][1:] for line in (header, row)]
    assert ends[0] == ends[1]


def test_a_single_setting_prints_no_differences_and_its_json_has_none(tmp_path):
    out = tmp_path / "out.json"
    process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--abits", "3", "--report_context", "1024", "--output", out)
    assert len(tables(process.stdout)) == 2 and "cache of 1024 tokens" in process.stdout
    report = json.loads(out.read_text())
    (row,) = report["results"]
    assert row["kl"] is row["delta_ppl"] is row["top1_agreement"] is None
    assert report["settings"]["abits"] == 3 and row["fp16_cache_gib"] == 2 * 2 * 6 * 128 * 1024 / 2**30


def test_baseline_is_16_in_the_list(sweep, tmp_path):
    out = tmp_path / "out.json"
    flags = ("--abits", "2", "--baseline", "--include_sparse", "--batch_size", "2")
    assert run_script(DYNAMIC_SCRIPT, NANO, *TEXT, *flags, "--output", out).returncode == 0
    known = figures(sweep[1])
    assert figures(json.loads(out.read_text())) == [known[0], known[2]]


def test_csv_is_the_table(sweep, tmp_path):
    out = tmp_path / "out.csv"
    assert run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out).returncode == 0
    rows = list(csv.DictReader(io.StringIO(out.read_text())))
    for row, known in zip(rows, figures(sweep[1]), strict=True):
        assert row.pop("complete") == "True" and float(row.pop("seconds")) > 0
        flat = {name: value for name, value in known.items() if not name.startswith("window_")}
        assert set(row) == set(flat)
        for name, value in flat.items():
            assert row[name] == ("" if value is None else str(value))


def test_lists_of_figures_take_one_line(sweep, tmp_path, model, windows):
    run = measured(model, windows[:2], {})
    output = qu.OutputSpec(str(tmp_path / "out.json"))
    record = {"name": "中", "settings": {"odd": "[\n1, 2]", "list": [1, "a"]}}
    qu.write_output(output, record, run, complete=True)
    text = (tmp_path / "out.json").read_text(encoding="utf-8")
    assert json.loads(text).items() >= record.items() and "中" in text
    (line,) = (line for line in text.splitlines() if "window_nll" in line)
    expected = [row[0].nll for row in run.measured["text"]]
    assert json.loads("{" + line.strip().rstrip(",") + "}")["window_nll"] == expected


def test_output_is_written_whole_or_not_at_all_and_follows_a_link(tmp_path, monkeypatch, model, windows):
    run = measured(model, windows[:1], {})
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    output = qu.OutputSpec(str(tmp_path / "link.json"))
    qu.write_output(output, {"version": 1}, run, complete=True)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qu.write_output(output, {"version": 2}, run, complete=True)
    assert json.loads((tmp_path / "real.json").read_text())["version"] == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.json", "real.json"]


def test_nothing_is_written_before_anything_is_measured(tmp_path):
    run = qu.Run({"text": torch.zeros(1, 8)}, [qu.Setting(16, "nothing", {})], {"keys": {}, "values": {}})
    assert qu.write_output(qu.OutputSpec(str(tmp_path / "out.json")), {}, run, complete=False) == ""
    assert list(tmp_path.iterdir()) == []


# -- interrupted, and continued

DRIVER = """
import os, runpy, signal, sys
import quant_utils as qu

script, place, count, name, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
calls = []

def interrupt_at(place, count):
    whole = getattr(qu, place)

    def interrupted(*args, **kwargs):
        calls.append(place)
        if calls.count(place) > int(count):
            for each in name.split("+"):
                os.kill(os.getpid(), getattr(signal, each))
        return whole(*args, **kwargs)

    setattr(qu, place, interrupted)

interrupt_at(place, count)
if name == "SIGKILL":
    qu.SAVE_EVERY = 0
runpy.run_path(script, run_name="__main__")
"""


def killed(tmp_path, script, batches, name, *args, place="measure_batch"):
    """The process of script, sent a signal whenever it has called the function `place` more than `batches` times."""
    (tmp_path / "driver.py").write_text(DRIVER)
    return run_script(tmp_path / "driver.py", script, place, batches, name, *args)


@pytest.mark.parametrize(
    ("batches", "name", "status"),
    [
        (1, "SIGINT", 130),
        (2, "SIGTERM", 143),
        (1, "SIGTERM+SIGTERM+SIGINT", 143),
        (2, "SIGINT+SIGINT", 130),
        (1, "SIGKILL", -9),
        (2, "SIGKILL", -9),
    ],
)
def test_a_killed_run_goes_on_to_the_same_figures(sweep, tmp_path, batches, name, status):
    out = tmp_path / "out.json"
    process = killed(tmp_path, DYNAMIC_SCRIPT, batches, name, NANO, *SWEEP, "--output", out)
    assert process.returncode == status and process.stdout == ""
    if name != "SIGKILL":
        known = f"interrupted; {out} has {2 * batches} of 6 windows, and --resume goes on from there\n"
        assert process.stderr == f"kvquant_simquant_ppl_eval.py: {known}"
    partial = json.loads(out.read_text())
    assert partial["complete"] is False and [row["windows"] for row in partial["results"]] == [2 * batches] * 3
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out, "--resume")
    assert process.returncode == 0 and process.stderr == ""
    whole = json.loads(out.read_text())
    assert whole["complete"] is True and figures(whole) == figures(sweep[1])
    assert {*whole} == {*sweep[1]}


@pytest.mark.parametrize(
    ("place", "count", "windows"),
    [
        ("write_output", 0, 6),  # as the complete file is to be written, and again while what is there is saved
        ("write_atomically", 0, 6),
        ("mean_statistics", 1, 2),
        ("simulate_quantization", 4, 2),  # between two settings of a batch
        ("check_finite", 2, 6),  # the last batch is read again
    ],
)
def test_wherever_a_signal_arrives_what_is_measured_is_saved(sweep, tmp_path, place, count, windows):
    out = tmp_path / "out.json"
    process = killed(tmp_path, DYNAMIC_SCRIPT, count, "SIGINT", NANO, *SWEEP, "--output", out, place=place)
    assert process.returncode == 130 and f"{out} has {windows} of 6 windows" in process.stderr
    assert [row["windows"] for row in json.loads(out.read_text())["results"]] == [windows] * 3
    assert [file.name for file in tmp_path.iterdir() if file.name.startswith(".")] == []
    assert run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out, "--resume").returncode == 0
    assert figures(json.loads(out.read_text())) == figures(sweep[1])


def test_what_was_measured_before_an_error_is_saved_and_said(tmp_path, sweep):
    (tmp_path / "driver.py").write_text(
        "import runpy, sys\nimport quant_utils as qu\n"
        "whole, calls = qu.measure_batch, []\n"
        "def fail(*args):\n    calls.append(None)\n"
        "    if len(calls) == 2: raise qu.UserError('out of luck')\n    return whole(*args)\n"
        "qu.measure_batch = fail\nsys.argv[:2] = sys.argv[1:2]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    out = tmp_path / "out.json"
    process = run_script(tmp_path / "driver.py", DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out)
    assert_one_line_error(process, "out of luck")
    assert process.stderr.startswith(f"warning: {out} has 2 of 6 windows, and --resume goes on from there\n")
    assert figures(json.loads(out.read_text()))[0]["window_nll"] == sweep[1]["results"][0]["window_nll"][:2]


def test_a_run_killed_before_anything_is_measured_leaves_no_file(tmp_path):
    out = tmp_path / "out.json"
    process = killed(tmp_path, DYNAMIC_SCRIPT, 0, "SIGTERM", NANO, *SWEEP, "--output", out)
    assert process.returncode == 143 and process.stderr == "kvquant_simquant_ppl_eval.py: interrupted\n"
    assert [file.name for file in tmp_path.iterdir()] == ["driver.py"]


def test_an_interrupted_csv_says_that_it_is_not_complete(tmp_path):
    out = tmp_path / "out.csv"
    process = killed(tmp_path, DYNAMIC_SCRIPT, 1, "SIGINT", NANO, *SWEEP, "--output", out)
    assert process.returncode == 130 and process.stderr.endswith(f"{out} has 2 of 6 windows\n")
    assert [row["complete"] for row in csv.DictReader(io.StringIO(out.read_text()))] == ["False"] * 3


def test_the_second_of_two_texts_is_interrupted(tmp_path):
    (tmp_path / "b.txt").write_text(SAMPLE.read_text(encoding="utf-8")[4000:9000])
    flags = ("--datasets", f"{SAMPLE},{tmp_path / 'b.txt'}", "--seqlen", "128", "--limit", "2", "--abits", "16,3")
    assert run_script(DYNAMIC_SCRIPT, NANO, *flags, "--output", tmp_path / "whole.json").returncode == 0
    process = killed(tmp_path, DYNAMIC_SCRIPT, 3, "SIGINT", NANO, *flags, "--output", tmp_path / "o.json")
    assert process.returncode == 130
    assert [row["windows"] for row in json.loads((tmp_path / "o.json").read_text())["results"]] == [2, 2, 1, 1]
    process = run_script(DYNAMIC_SCRIPT, NANO, *flags, "--output", tmp_path / "o.json", "--resume")
    assert len(tables(process.stdout)[0]) == 4
    whole, resumed = (json.loads((tmp_path / name).read_text()) for name in ("whole.json", "o.json"))
    assert figures(whole) == figures(resumed)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(st.integers(0, 10), st.integers(1, 4))
def test_wherever_it_stops_the_figures_are_the_same(model, windows, tmp_path, stop, batch_size):
    """In one process: the state goes through the JSON file and back."""
    ids = windows[:, :32]
    specs = {"k_proj": qu.QuantSpec(qu.PER_CHANNEL, 3, include_sparse=True), "v_proj": qu.QuantSpec(qu.PER_TOKEN, 3)}
    quantizers = [{}, qu.dynamic_quantizers(model, specs)]
    whole = measured(model, ids, *quantizers, batch_size=batch_size)
    first, second = (replace(whole, measured={}, seconds={}) for _ in range(2))
    path = str(tmp_path / "out.json")
    for number, _ in enumerate(qu.measure(model, first, batch_size)):
        if number == stop:
            break
    qu.write_output(qu.OutputSpec(path), {}, first, complete=False)
    with open(path, encoding="utf-8") as file:
        second.measured["text"] = qu.windows_of(second, "text", json.load(file)["results"])
    assert second.measured == first.measured
    assert list(qu.measure(model, second, batch_size))[-1] == ("text", True)
    assert second.measured == whole.measured


def test_a_complete_run_is_not_measured_again(sweep, tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps(sweep[1]))
    process = killed(tmp_path, DYNAMIC_SCRIPT, 0, "SIGTERM", NANO, *SWEEP, "--output", out, "--resume")
    assert process.returncode == 0
    assert json.loads(out.read_text())["results"] == [
        row | {"seconds": pytest.approx(row["seconds"])} for row in sweep[1]["results"]
    ]
    assert process.stdout == sweep[0].stdout


def test_resume_may_change_what_decides_no_figure(sweep, tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps(sweep[1]))
    flags = (
        "--report_context",
        "1024",
        "--plot",
        tmp_path / "a.png",
        "--quiet",
        "--plot_activations",
        tmp_path / "b.svg",
    )
    process = killed(tmp_path, DYNAMIC_SCRIPT, 0, "SIGTERM", NANO, *SWEEP, *flags, "--output", out, "--resume")
    assert process.returncode == 0 and process.stderr == "" and "cache of 1024 tokens" in process.stdout
    assert (tmp_path / "a.png").exists() and (tmp_path / "b.svg").exists()


def test_resume_on_another_device_is_a_warning(sweep, tmp_path):
    out = tmp_path / "out.json"
    environment = sweep[1]["environment"] | {"device_name": "another"}
    out.write_text(json.dumps(sweep[1] | {"environment": environment}))
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out, "--resume")
    assert process.returncode == 0 and re.fullmatch("warning: .*out.json.* another device.*\n", process.stderr)


def test_resume_with_other_weights_of_the_same_name(tmp_path):
    model, out = shutil.copytree(NANO, tmp_path / "model"), tmp_path / "out.json"
    assert killed(tmp_path, DYNAMIC_SCRIPT, 1, "SIGINT", model, *SWEEP, "--output", out).returncode == 130
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    process = run_script(DYNAMIC_SCRIPT, model, *SWEEP, "--output", out, "--resume")
    assert_one_line_error(process, "another run", "content of model weights")


def test_resume_of_a_report_without_windows_starts_from_the_beginning(sweep, tmp_path):
    rows = [{**row, **{name: [] for name in row if name.startswith("window_")}} for row in sweep[1]["results"]]
    (tmp_path / "out.json").write_text(json.dumps(sweep[1] | {"results": rows}))
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", tmp_path / "out.json", "--resume")
    assert process.returncode == 0 and figures(json.loads((tmp_path / "out.json").read_text())) == figures(sweep[1])


def test_an_output_that_fails_at_the_end_costs_no_table_and_no_plot(tmp_path):
    (tmp_path / "driver.py").write_text(
        "import os, runpy, shutil, sys\nimport quant_utils as qu\n"
        "whole = qu.measure_batch\n"
        "def vanish(*args):\n    shutil.rmtree(folder, ignore_errors=True)\n    return whole(*args)\n"
        "qu.measure_batch = vanish\nfolder = sys.argv.pop(1)\nsys.argv[:2] = sys.argv[1:2]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    (tmp_path / "gone").mkdir()
    files = ("--output", tmp_path / "gone" / "out.json", "--plot", tmp_path / "a.png")
    process = run_script(tmp_path / "driver.py", tmp_path / "gone", DYNAMIC_SCRIPT, NANO, *SWEEP, *files)
    assert process.returncode == 1 and len(tables(process.stdout)) == 3 and (tmp_path / "a.png").exists()
    assert re.fullmatch("kvquant_.*error: .*out.json' could not be written .No such file.*\n", process.stderr)
    assert "k_proj: 4, 2-bit uniform" in process.stdout


def test_a_closed_stdout_costs_no_figure(tmp_path):
    flags = (*TEXT, "--limit", "1", "--output", tmp_path / "out.json")
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, DYNAMIC_SCRIPT, NANO, *flags]
    process = subprocess.run(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    assert process.returncode == 0 and process.stderr == ""
    assert json.loads((tmp_path / "out.json").read_text())["complete"] is True


def test_out_of_memory_is_one_line(tmp_path):
    errors = ("MemoryError()", "RuntimeError('DefaultCPUAllocator: cannot allocate memory')")
    for error in errors:
        (tmp_path / "driver.py").write_text(
            "import runpy, sys\nimport quant_utils as qu\n"
            f"def fail(*args):\n    raise {error}\n"
            "qu.measure_batch = fail\nsys.argv[:2] = sys.argv[1:2]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        process = run_script(tmp_path / "driver.py", DYNAMIC_SCRIPT, NANO, *SWEEP)
        assert_one_line_error(process, "out of memory", "--batch_size")


def test_no_output_replaces_a_file_of_the_model(tmp_path):
    model = shutil.copytree(NANO, tmp_path / "model")
    process = run_script(DYNAMIC_SCRIPT, model, *TEXT, "--output", model / "config.json")
    assert_one_line_error(process, "config.json", "also read")
    flags = ("--calibrate", "--calib_dataset", SAMPLE, "--quantizer_path", model / "model.safetensors")
    assert_one_line_error(run_script(CALIBRATED_SCRIPT, model, *flags), "model.safetensors", "also read")


def test_resume_without_a_file_starts_from_the_beginning(tmp_path):
    process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--output", tmp_path / "new.json", "--resume")
    assert process.returncode == 0 and re.fullmatch("warning: .*new.json.* does not exist yet.*\n", process.stderr)
    assert json.loads((tmp_path / "new.json").read_text())["complete"] is True


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--abits", "16,3"), ("abits", "[16, 3] here", "[16, 4, 2] there")),
        (("--seqlen", "64"), ("seqlen", "64 here", "128 there")),
        (("--nf",), ("nf", "True here")),
        (("--dtype", "bfloat16"), ("dtype", "'bfloat16' here", "'float32' there")),
        (("--limit", "5"), ("limit", "5 here", "6 there")),
    ],
)
def test_resume_refuses_another_setting_and_names_it(sweep, tmp_path, flags, words):
    out = tmp_path / "out.json"
    out.write_text(json.dumps(sweep[1]))
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, *flags, "--output", out, "--resume")
    assert_one_line_error(process, "out.json", "another run", *words)
    assert json.loads(out.read_text()) == sweep[1]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("model",), "some/other", ("model is", "'some/other' there")),
        (("script",), "kvquant_llama3_simquant.py", ("script",)),
        (("sha256", str(SAMPLE)), "0", ("content of", "sample.txt is another")),
        (("results", 0, "window_nll", 1), None, ("cannot be continued",)),
        (("results", 0, "window_nll", 1), math.nan, ("cannot be continued",)),
        (("results", 0, "window_nll", 1), 1e300, ("cannot be continued",)),
        (("results", 0, "window_nll", 1), "3", ("cannot be continued", "window_nll", "'3'")),
        (("results", 0, "window_nll", 1), -500, ("cannot be continued", "-500")),
        (("results", 0, "window_nll", 1), True, ("cannot be continued", "True")),
        (("results", 1, "window_kl", 1), None, ("cannot be continued", "window_kl", "None")),
        (("results", 1, "window_key_bits", 0), None, ("cannot be continued", "window_key_bits")),
        (("results", 1, "window_top1_agreement", 0), 55, ("cannot be continued", "55")),
        (("results", 0, "seconds"), "x", ("cannot be continued",)),
        (("results", 1, "window_kl"), [0.0], ("cannot be continued",)),
        (("results", 1, "quantized"), "keys", ("cannot be continued", "other rows")),
        (("results", 1), {}, ("cannot be continued",)),
        (("results",), 3, ("out.json",)),
        (("settings",), [], ("no JSON that --output wrote",)),
        (("sha256",), {}, ("content of",)),
        (("sha256", "model weights"), "0", ("another run", "content of model weights")),
    ],
)
def test_resume_refuses_another_run_and_damaged_figures(sweep, tmp_path, place, value, words):
    report = json.loads(json.dumps(sweep[1]))
    *path, last = place
    part = report
    for key in path:
        part = part[key]
    part[last] = value
    (tmp_path / "out.json").write_text(json.dumps(report))
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", tmp_path / "out.json", "--resume")
    assert_one_line_error(process, "--resume", "out.json", *words)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_resume_refuses_what_is_no_report(tmp_path, content):
    (tmp_path / "out.json").write_bytes(content)
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", tmp_path / "out.json", "--resume")
    assert_one_line_error(process, "out.json", "no JSON that --output wrote")


def test_resume_with_other_quantizers(tmp_path):
    calibrate = ("--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "1", "--seqlen", "128")
    evaluate = (*TEXT, "--quantizer_path", tmp_path / "q.pkl", "--output", tmp_path / "o.json")
    for seed in ("0", "1"):
        flags = (*calibrate, "--seed", seed, "--quantizer_path", tmp_path / "q.pkl")
        assert run_script(CALIBRATED_SCRIPT, NANO, *flags).returncode == 0
        if seed == "0":
            assert run_script(CALIBRATED_SCRIPT, NANO, *evaluate).returncode == 0
    process = run_script(CALIBRATED_SCRIPT, NANO, *evaluate, "--resume")
    assert_one_line_error(process, "o.json", "another run", "seed is 1 here and 0 there")


# -- the calibrated sweep


def test_several_widths_are_calibrated_and_evaluated_in_one_go(tmp_path):
    flags = ("--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "2", "--seqlen", "128", "--nuq")
    fit = run_script(CALIBRATED_SCRIPT, NANO, *flags, "--abits", "4,2", "--quantizer_path", tmp_path / "q.pkl")
    assert fit.returncode == 0 and len(fit.stdout.splitlines()) == 1 + 24 + 3
    common = (CALIBRATED_SCRIPT, NANO, *TEXT, "--quantizer_path", tmp_path / "q.pkl", "--output", tmp_path / "o.json")
    rows = {}
    for widths in ((), ("--abits", "16,4,2"), ("--abits", "2", "--baseline"), ("--abits", "4")):
        process = run_script(*common, *widths)
        assert process.returncode == 0, process.stderr
        rows[widths] = {row["abits"]: row["ppl"] for row in json.loads((tmp_path / "o.json").read_text())["results"]}
    whole = rows["--abits", "16,4,2"]
    assert whole[16] < whole[4] < whole[2]
    for widths, bits in zip(rows, ((4, 2), (16, 4, 2), (16, 2), (4,)), strict=True):
        assert rows[widths] == {b: whole[b] for b in bits}
    assert_one_line_error(run_script(*common, "--abits", "4,3"), "abits: [3]", "contradicts [4, 2]")
    process = run_script(*common, "--export_kvquant", tmp_path / "e.pkl")
    assert_one_line_error(process, "--export_kvquant", "one width", "4, 2")
    assert run_script(*common, "--abits", "16,2", "--export_kvquant", tmp_path / "e.pkl").returncode == 0


# -- plots


def test_attribution_has_a_row_for_each_part_and_layer(attribution):
    process, report = attribution
    names = [row["quantized"] for row in report["results"]]
    assert names == ["nothing", "keys", "values", "keys and values", *(f"layer {i}" for i in range(6))]
    by_name = {row["quantized"]: row for row in report["results"]}
    both = by_name["keys and values"]
    assert 0 < by_name["keys"]["delta_ppl"] < both["delta_ppl"] and 0 < by_name["values"]["kl"] < both["kl"]
    assert by_name["keys"]["value_bits"] == by_name["values"]["key_bits"] == 16
    expected = (5 * 16 + both["key_bits"]) / 6
    assert by_name["layer 3"]["key_bits"] == pytest.approx(expected, rel=0.01)
    assert "quantized" in process.stdout and "keys and values" in process.stdout


def test_the_bars_are_the_rows(attribution):
    rows = attribution[1]["results"]
    left, right = qu.plot_attribution(rows).axes
    assert [bar.get_height() for bar in left.patches] == [row["delta_ppl"] for row in rows[1:4]]
    assert [bar.get_height() for bar in right.patches] == [row["delta_ppl"] for row in rows[4:]]
    assert left.get_ylabel() and right.get_xlabel()


def test_the_curve_is_the_rows_with_their_errors(sweep):
    rows = sweep[1]["results"]
    (axes,) = qu.plot_sweep(rows).axes
    line, _, (bars,) = axes.containers[0]
    assert list(line.get_xdata()) == [rows[2]["avg_bits"], rows[1]["avg_bits"]]
    assert list(line.get_ydata()) == [rows[2]["delta_ppl"], rows[1]["delta_ppl"]]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(rows[2]["delta_ppl_se"])
    assert "unquantized" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert axes.get_xlabel() and axes.get_ylabel()


def test_one_setting_is_drawn_too(tmp_path):
    for ending in ("png", "svg"):
        process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--limit", "1", "--plot", tmp_path / f"one.{ending}")
        assert process.returncode == 0 and process.stderr == ""
    assert ET.parse(tmp_path / "one.svg").getroot().tag.endswith("svg")


def test_the_heat_map_has_the_activations_and_marks_the_outliers(model, windows):
    specs = {
        "k_proj": qu.QuantSpec(qu.PER_CHANNEL, 2, include_sparse=True, first_few_fp16=1),
        "v_proj": qu.QuantSpec(qu.PER_TOKEN, 2),
    }
    setting = qu.Setting(2, "keys and values", qu.dynamic_quantizers(model, specs))
    figure = qu.plot_activations(model, windows[0], setting, layer=2)
    before, after = (axes.images[0].get_array() for axes in figure.axes[:2])
    captured = []
    projection = model.model.layers[2].self_attn.k_proj
    handle = projection.register_forward_hook(lambda module, args, out: captured.append(out[0]))
    with torch.inference_mode():
        model(windows[:1])
    handle.remove()
    keys = captured[0]
    torch.testing.assert_close(torch.from_numpy(before.data), keys[:256].abs().T, rtol=1e-4, atol=1e-5)
    marks = {tuple(map(int, place)) for place in figure.axes[1].collections[0].get_offsets()}  # (token, channel)
    body = keys[1:]
    ends = body.quantile(0.005, 0), body.quantile(0.995, 0)
    kept = {(t + 1, c) for t, c in ((body <= ends[0]) | (body >= ends[1])).nonzero().tolist() if t + 1 < 256}
    assert len(marks ^ kept) <= 0.02 * len(kept)
    for token, channel in list(marks)[:50]:
        assert after[channel, token] == before[channel, token]
    assert not figure.axes[3].collections[0].get_offsets().any()


def test_matplotlib_is_loaded_for_plots_only():
    code = f"import sys, runpy; sys.argv = {['x', str(NANO), *map(str, TEXT), '--limit', '1']!r}\n"
    code += f"try: runpy.run_path({str(DYNAMIC_SCRIPT)!r}, run_name='__main__')\nexcept SystemExit: pass\n"
    code += "print('matplotlib' in sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.stdout.splitlines()[-1] == "False" and len(tables(process.stdout)) == 2, process.stderr


# -- progress


@pytest.mark.parametrize("quiet", [False, True])
def test_one_bar_with_the_running_perplexity_on_a_terminal_only(quiet):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = [sys.executable, DYNAMIC_SCRIPT, NANO, *SWEEP, *(["--quiet"] if quiet else [])]
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        with open(ours, "rb", buffering=0) as terminal:
            try:
                while chunk := terminal.read(4096):
                    shown += chunk
            except OSError:  # Linux's end of file
                pass
        assert process.wait() == 0 and "Δppl" in process.stdout.read().decode()
    if quiet:
        assert shown == b""
    else:
        assert b"18/18" in shown and re.search(rb"ppl \d+\.\d{4} \d+\.\d{4} \d+\.\d{4}", shown)


# -- bad input


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--plot", "/nowhere/a.png"), ("'/nowhere/a.png'", "folder")),
        (("--plot_activations", "/nowhere/a.png"), ("'/nowhere/a.png'", "folder")),
        (("--plot", "a.pdf"), ("plot 'a.pdf'", ".png or .svg")),
        (("--plot_activations", "a"), ("plot_activations 'a'", ".png or .svg")),
        (("--output", "/nowhere/a.csv"), ("'/nowhere/a.csv'", "folder")),
        (("--output", "a.png", "--plot", "a.png"), ("'a.png'", "named twice")),
        (("--plot_activations", "a.png", "--abits", "16"), ("a.png", "below 16")),
        (("--plot_activations", "a.png", "--plot_layer", "6"), ("plot_layer 6", "layers 0 to 5")),
        (("--plot_activations", "a.png", "--plot_layer", "-1"), ("plot_layer -1", "layers 0 to 5")),
        (("--plot_layer", "2"), ("plot_layer 2", "--plot_activations")),
        (("--attribution", "--abits", "4,3"), ("--attribution", "one width", "4, 3")),
        (("--attribution", "--abits", "16"), ("--attribution", "one width", "none")),
        (("--attribution", "--perchannel", "--pertoken"), ("--attribution", "nothing")),
        (("--report_context", "0"), ("report_context", "1..2**50", "got 0")),
        (("--report_context", "1" + "0" * 400), ("report_context", "1..2**50")),
        (("--resume",), ("--resume", "--output")),
        (("--resume", "--output", "a.csv"), ("--resume", ".csv")),
    ],
)
def test_a_mistake_in_a_flag(flags, words):
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, NANO, *TEXT, *flags), *words)


@pytest.mark.parametrize("name", ["a$_^b$.txt", "_a.txt", "数据.txt", os.fsdecode(b"a\xff.txt")])
def test_any_file_name_is_a_label(tmp_path, name):
    (tmp_path / name).write_text(SAMPLE.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    flags = ("--datasets", tmp_path / name, "--seqlen", "64", "--limit", "2", "--plot", tmp_path / "a.svg")
    for options in (("--abits", "16,2"), ("--abits", "2", "--attribution")):
        process = run_script(DYNAMIC_SCRIPT, NANO, *flags, *options)
        assert process.returncode == 0 and process.stderr == ""
    row = {"dataset": name, "ppl": 9.0, "avg_bits": 2, "delta_ppl": 0.0, "delta_ppl_se": None}
    figure = qu.plot_sweep([row | {"abits": bits} for bits in (16, 2)])
    assert len(figure.axes[0].get_legend().get_texts()) == 2


@pytest.mark.parametrize(
    "flag",
    ["--plot a.png", "--attribution", "--baseline", "--resume", "--plot_activations a.png", "--plot_layer 0",
     "--report_context 9"],
)  # fmt: skip
def test_calibration_takes_no_flag_of_the_evaluation(flag):
    process = run_script(CALIBRATED_SCRIPT, NANO, "--calibrate", "--quantizer_path", "q.pkl", *flag.split())
    assert_one_line_error(process, flag.split()[0], "leave it out")
