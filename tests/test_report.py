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
import statistics
import struct
import subprocess
import sys
import termios
import warnings
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, driver, run_script
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from quant_utils import ScalarQuantizer, Site, UserError
from simquant import plots, report
from simquant.flags import Flags
from simquant.methods import Row
from simquant.parsing import decisive
from simquant.sites import find_sites

TEXT = ("--datasets", SAMPLE, "--seqlen", "128", "--limit", "6")
SWEEP = (*TEXT, "--abits", "16,4,2", "--include_sparse", "--batch_size", "2")
KEYS = (  # of a row, in the product before this one; scripts of users read them
    "dataset abits quantized ppl ppl_se nll windows tokens seconds delta_ppl delta_ppl_se delta_percent "
    "delta_percent_se kl top1_agreement avg_bits key_bits value_bits cache_gib fp16_cache_gib window_nll window_kl "
    "window_top1_agreement window_key_bits window_value_bits"
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Return (process, report) of a sweep that nothing interrupted."""
    out = tmp_path_factory.mktemp("sweep") / "out.json"
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out, "--plot", out.with_suffix(".png"))
    assert process.returncode == 0 and process.stderr == ""
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return process, json.loads(out.read_text())


@pytest.fixture(scope="module")
def attribution(tmp_path_factory):
    """Return (process, report) of an attribution, its bars and a layer's activations drawn."""
    folder = tmp_path_factory.mktemp("attribution")
    flags = ("--abits", "2", "--attribution", "--include_sparse", "--plot", folder / "layers.svg")
    flags = (*flags, "--plot_activations", folder / "k.png", "--output", folder / "out.json")
    process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, *flags)
    assert process.returncode == 0 and process.stderr == ""
    assert ET.parse(folder / "layers.svg").getroot().tag.endswith("svg")
    assert (folder / "k.png").read_bytes().startswith(b"\x89PNG")
    return process, json.loads((folder / "out.json").read_text())


def figures(path_or_report):
    """Return all of a report's results but the seconds."""
    whole = path_or_report if isinstance(path_or_report, dict) else json.loads(path_or_report.read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in whole["results"]]


def perplexity_without(row, window):
    """Return the perplexity of a row's other windows."""
    return math.exp(statistics.fmean(nll for i, nll in enumerate(row["window_nll"]) if i != window))


def tables(stdout):
    """Return [[{heading: cell}]] of the tables that stand between empty lines."""
    found = []
    for block in stdout.split("\n\n")[:-1]:
        lines = [line.split() for line in block.splitlines()]
        header = next(i for i, line in enumerate(lines) if line[0] == "dataset")
        found.append([dict(zip(lines[header], line, strict=True)) for line in lines[header + 1 :]])
    return found


def on_terminal(columns, *command, **environment):
    """Return (exit status, text) of a command whose stdout and stderr are a terminal that knows colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    usual = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    usual |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "FORCE_COLOR": "1"}
    process = subprocess.Popen([*map(str, command)], stdout=theirs, stderr=theirs, env=usual | environment)
    os.close(theirs)
    written = b""
    try:
        while piece := os.read(ours, 4096):
            written += piece
    except OSError:  # Linux's end of file, once the other end is closed
        pass
    os.close(ours)
    return process.wait(), written.decode().replace("\r\n", "\n")


# -- tables and files


def test_the_same_figures_stand_in_the_tables_and_in_the_json(sweep):
    process, whole = sweep
    main, differences, storage = tables(process.stdout)
    assert whole["complete"] is True and whole["settings"]["abits"] == [16, 4, 2]
    base = whole["results"][0]
    for row, line, difference, cost in zip(whole["results"], main, differences, storage, strict=True):
        assert line["abits"] == difference["abits"] == cost["abits"] == str(row["abits"])
        assert line["ppl"] == f"{row['ppl']:.4f}" and line["±"] == f"{row['ppl_se']:.4f}"
        assert line["nll"] == f"{row['nll']:.6f}" and (line["windows"], line["tokens"]) == ("6", str(6 * 127))
        assert difference["Δppl"] == f"{row['delta_ppl']:+.4f}" and difference["±"] == f"{row['delta_ppl_se']:.4f}"
        assert difference["Δppl%"] == f"{row['delta_percent']:+.2f}" and difference["KL"] == f"{row['kl']:.6f}"
        assert difference["±%"] == f"{row['delta_percent_se']:.2f}"
        assert difference["top-1"] == f"{row['top1_agreement']:.2%}"
        assert cost["keys"] == f"{row['key_bits']:.3f}" and cost["values"] == f"{row['value_bits']:.3f}"
        assert cost["both"] == f"{row['avg_bits']:.3f}" and cost["GiB"] == f"{row['cache_gib']:.3f}"
        assert cost["fp16-GiB"] == "0.375"  # 6 layers, 256 channels, 131072 tokens of 2 bytes
        for name in ("nll", "kl", "top1_agreement", "key_bits", "value_bits"):
            assert row[name] == pytest.approx(math.fsum(row[f"window_{name}"]) / 6, rel=1e-12)
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]), rel=1e-12)
        assert row["delta_ppl"] == pytest.approx(row["ppl"] - base["ppl"], abs=1e-9)
        without = [perplexity_without(row, i) - perplexity_without(base, i) for i in range(6)]
        assert row["delta_ppl_se"] == pytest.approx(statistics.pstdev(without) * 5**0.5, rel=0.2)  # the jackknife's


def test_every_key_of_the_product_before_is_there(sweep):
    whole = sweep[1]
    assert {*whole} == {"script", "model", "settings", "sha256", "environment", "complete", "results"}
    assert all({*row} == {*KEYS.split(), "layer"} for row in whole["results"])
    assert {*whole["environment"]} == {"versions", "device", "device_name", "dtype"}
    assert whole["environment"]["versions"]["torch"] == torch.__version__
    resolved = {"dtype": "float32", "device": "cpu", "attn_implementation": "sdpa", "compile": "off"}
    assert whole["settings"].items() >= resolved.items()
    assert {*whole["sha256"]} == {str(SAMPLE), "model weights"}


def test_a_single_setting_prints_no_differences_and_its_json_has_none(tmp_path):
    out = tmp_path / "out.json"
    process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--abits", "3", "--report_context", "1024", "--output", out)
    assert len(tables(process.stdout)) == 2 and "cache of 1024 tokens" in process.stdout
    (row,) = figures(out)
    assert row["kl"] is row["delta_ppl"] is row["top1_agreement"] is None
    assert row["fp16_cache_gib"] == 2 * 2 * 6 * 128 * 1024 / 2**30


def test_baseline_is_16_in_the_list_and_csv_is_the_table(sweep, tmp_path):
    out, known = tmp_path / "out.csv", figures(sweep[1])
    flags = ("--abits", "4,2", "--baseline", "--include_sparse", "--batch_size", "2")
    assert run_script(DYNAMIC_SCRIPT, NANO, *TEXT, *flags, "--output", out).returncode == 0
    for row, known_row in zip(csv.DictReader(io.StringIO(out.read_text())), known, strict=True):
        assert row.pop("complete") == "True" and float(row.pop("seconds")) > 0
        flat = {name: value for name, value in known_row.items() if not name.startswith("window_")}
        assert row == {name: "" if value is None else str(value) for name, value in flat.items()}


def blank_run(known, windows=6):
    """Return an empty run like the one that a report tells of: its rows, its texts."""
    rows = list(dict.fromkeys(Row(row["abits"], row["quantized"], row["layer"]) for row in known["results"]))
    sites = [Site(0, part, part, nn.Identity(), 8) for part in ("keys", "values")]
    texts = {row["dataset"]: torch.zeros(windows, 128, dtype=torch.long) for row in known["results"]}
    return report.Run(texts, rows, sites, 1024)


def test_what_was_written_reads_back_as_it_was_and_a_list_of_figures_takes_one_line(sweep, tmp_path):
    whole, out = sweep[1], tmp_path / "o.json"
    run, record = blank_run(whole), {"name": "中", "odd": "[\n1, 2]", "list": [1, "a"]}
    assert report.write_output(str(out), record, run, complete=False) == "" and not out.exists()  # nothing is measured
    report.take_over(run, "o.json", whole, whole["environment"])
    report.write_output(str(out), record, run, complete=True)
    text = out.read_text(encoding="utf-8")
    assert json.loads(text).items() >= record.items() and "中" in text
    for row, known in zip(json.loads(text)["results"], whole["results"], strict=True):
        assert all(row[name] == known[name] for name in KEYS.split() if name.startswith("window_"))
        assert row["seconds"] == pytest.approx(known["seconds"])
    assert len([line for line in text.splitlines() if '"window_nll": [' in line and line.endswith("],")]) == 3


def test_output_is_written_whole_or_not_at_all_and_follows_a_link(sweep, tmp_path, monkeypatch):
    run, link = blank_run(sweep[1]), tmp_path / "link.json"
    report.take_over(run, "o.json", sweep[1], sweep[1]["environment"])
    link.symlink_to(tmp_path / "real.json")
    report.write_output(str(link), {"version": 1}, run, complete=True)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.write_output(str(link), {"version": 2}, run, complete=True)
    assert json.loads((tmp_path / "real.json").read_text())["version"] == 1 and link.is_symlink()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.json", "real.json"]


def test_a_narrow_terminal_folds_the_tables_loses_no_figure_and_shows_a_bar(sweep):
    """On a terminal that is asked for colours by the usual variables; there are none."""
    status, written = on_terminal(70, sys.executable, DYNAMIC_SCRIPT, NANO, *SWEEP)
    assert status == 0 and re.findall(r"\x1b\[[\d;:]*m", written) == []
    assert "18/18" in written or "6/6" in written
    assert re.search(r"ppl \d+\.\d{4} \d+\.\d{4} \d+\.\d{4}", written)
    shown = written[written.index("dataset") :]
    assert all(len(line) <= 70 for line in shown.splitlines() if not re.match(r"against|bits an entry|\S+: ", line))
    assert max(map(len, sweep[0].stdout.splitlines())) > 90
    for row in (row for table in tables(sweep[0].stdout) for row in table):
        assert all(cell in shown for name, cell in row.items() if name != "seconds")


# -- interrupted, and continued

INTERRUPTER = """
import importlib, signal
module, _, name = {place!r}.rpartition(".")
whole, calls = getattr(importlib.import_module(module), name), []

def interrupted(*args, **kwargs):
    calls.append(name)
    for each in {signals!r}.split("+") if len(calls) > {count} else ():
        os.kill(os.getpid(), getattr(signal, each))
    return whole(*args, **kwargs)

setattr(importlib.import_module(module), name, interrupted)
if {signals!r} == "SIGKILL":
    importlib.import_module("simquant.run").SAVE_EVERY = 0
"""


def killed(folder, count, signals, *command, place="quant_utils.start_batch"):
    """Return the process of a script, sent signals whenever it has called `place` more than count times."""
    return run_script(driver(folder, INTERRUPTER.format(place=place, count=count, signals=signals)), *command)


@pytest.mark.parametrize(
    ("batches", "signals", "status"),
    [(1, "SIGINT+SIGINT", 130), (2, "SIGTERM", 143), (1, "SIGTERM+SIGTERM+SIGINT", 143), (2, "SIGKILL", -9)],
)
def test_a_killed_run_goes_on_to_the_same_figures(sweep, tmp_path, batches, signals, status):
    out = tmp_path / "out.json"
    process = killed(tmp_path, batches, signals, DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out)
    assert process.returncode == status and process.stdout == ""
    if signals != "SIGKILL":
        known = f"interrupted; {out} has {2 * batches} of 6 windows, and --resume goes on from there\n"
        assert process.stderr == f"kvquant_simquant_ppl_eval.py: {known}"
    partial = json.loads(out.read_text())
    assert partial["complete"] is False and [row["windows"] for row in partial["results"]] == [2 * batches] * 3
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out, "--resume")
    assert process.returncode == 0 and process.stderr == ""
    assert json.loads(out.read_text())["complete"] is True and figures(out) == figures(sweep[1])


@pytest.mark.parametrize(
    ("place", "count", "windows"),
    [
        ("simquant.report.write_atomically", 0, 6),  # as the complete file is to be written
        ("quant_utils.average_bits", 4, 2),  # between two settings of a batch
    ],
)
def test_wherever_a_signal_arrives_what_is_measured_is_saved(sweep, tmp_path, place, count, windows):
    out = tmp_path / "out.json"
    process = killed(tmp_path, count, "SIGINT", DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out, place=place)
    assert process.returncode == 130 and f"{out} has {windows} of 6 windows" in process.stderr
    assert [row["windows"] for row in figures(out)] == [windows] * 3
    assert {file.name for file in tmp_path.iterdir()} == {"driver.py", "out.json"}


def test_before_anything_is_measured_there_is_no_file(tmp_path):
    process = killed(tmp_path, 0, "SIGTERM", DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", tmp_path / "out.json")
    assert process.returncode == 143 and process.stderr == "kvquant_simquant_ppl_eval.py: interrupted\n"
    assert [file.name for file in tmp_path.iterdir()] == ["driver.py"]


def test_what_was_measured_before_an_error_is_saved_and_said(tmp_path, sweep):
    body = (
        "whole, calls = qu.start_batch, []\ndef fail(*args):\n    calls.append(None)\n"
        "    if len(calls) == 2: raise qu.UserError('out of luck')\n    return whole(*args)\nqu.start_batch = fail"
    )
    out = tmp_path / "out.csv"
    process = run_script(driver(tmp_path, body), DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out)
    assert_one_line_error(process, "out of luck")
    assert process.stderr.startswith(f"warning: {out} has 2 of 6 windows\n")
    assert [row["complete"] for row in csv.DictReader(io.StringIO(out.read_text()))] == ["False"] * 3


def test_the_second_of_two_texts_is_interrupted(tmp_path):
    (tmp_path / "b.txt").write_text(SAMPLE.read_text(encoding="utf-8")[4000:9000])
    flags = ("--datasets", f"{SAMPLE},{tmp_path / 'b.txt'}", "--seqlen", "128", "--limit", "2", "--abits", "16,3")
    assert run_script(DYNAMIC_SCRIPT, NANO, *flags, "--output", tmp_path / "whole.json").returncode == 0
    process = killed(tmp_path, 3, "SIGINT", DYNAMIC_SCRIPT, NANO, *flags, "--output", tmp_path / "o.json")
    assert process.returncode == 130 and [row["windows"] for row in figures(tmp_path / "o.json")] == [2, 2, 1, 1]
    process = run_script(DYNAMIC_SCRIPT, NANO, *flags, "--output", tmp_path / "o.json", "--resume")
    assert process.stdout.count("windows tokens") == 2 and process.stdout.count("Δppl%") == 1
    assert figures(tmp_path / "whole.json") == figures(tmp_path / "o.json")


def test_a_complete_run_is_not_measured_again_and_may_print_and_draw_otherwise(sweep, tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps(sweep[1] | {"environment": sweep[1]["environment"] | {"device_name": "another"}}))
    flags = (*SWEEP, "--output", out, "--resume", "--quiet", "--report_context", "1024", "--plot", tmp_path / "a.svg")
    process = killed(tmp_path, 0, "SIGTERM", DYNAMIC_SCRIPT, NANO, *flags)
    assert process.returncode == 0 and "cache of 1024 tokens" in process.stdout and (tmp_path / "a.svg").exists()
    assert re.fullmatch("warning: .*out.json.* another device.*\n", process.stderr)
    names = [name for name in KEYS.split() if not name.endswith("_gib") and name != "seconds"]
    known = [[row[name] for name in names] for row in sweep[1]["results"]]
    assert [[row[name] for name in names] for row in figures(out)] == known


@pytest.mark.parametrize("nf", [[], ["--nf"]])
def test_a_report_of_the_product_before_goes_on(tmp_path, nf):
    """It knew neither --kv_format nor --skip_layers."""
    out, flags = tmp_path / "out.json", (*SWEEP, "--limit", "4", *nf)
    assert killed(tmp_path, 1, "SIGINT", DYNAMIC_SCRIPT, NANO, *flags, "--output", out).returncode == 130
    partial = json.loads(out.read_text())
    for name in ("kv_format", "skip_layers"):
        del partial["settings"][name]
    for row in partial["results"]:
        del row["layer"]
    out.write_text(json.dumps(partial))
    process = run_script(DYNAMIC_SCRIPT, NANO, *flags, "--output", out, "--resume")
    assert process.returncode == 0 and process.stderr == ""
    assert [row["windows"] for row in figures(out)] == [4] * 3


def test_resume_without_a_file_starts_from_the_beginning(tmp_path):
    process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--output", tmp_path / "new.json", "--resume")
    assert process.returncode == 0 and re.fullmatch("warning: .*new.json.* does not exist yet.*\n", process.stderr)
    assert json.loads((tmp_path / "new.json").read_text())["complete"] is True


def test_resume_with_another_setting_text_or_checkpoint_is_refused_and_the_file_stays(sweep, tmp_path):
    out, text, model = tmp_path / "out.json", tmp_path / "t.txt", shutil.copytree(NANO, tmp_path / "model")
    text.write_text(SAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    command = (DYNAMIC_SCRIPT, model, "--datasets", text, "--seqlen", "128", "--limit", "1", "--output", out)
    assert run_script(*command).returncode == 0
    before = out.read_bytes()
    process = run_script(*command, "--skip_layers", "0", "--resume")
    assert_one_line_error(process, "out.json", "another run", "skip_layers is [0] here and [] there")
    text.write_text("x" + SAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    assert_one_line_error(run_script(*command, "--resume"), "another run", "the content of", "t.txt is another")
    text.write_text(SAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] *= 3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert_one_line_error(run_script(*command, "--resume"), "another run", "the content of model weights is another")
    assert out.read_bytes() == before


def test_resume_with_other_quantizers_is_refused(tmp_path):
    calibrate = ("--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "1", "--seqlen", "128")
    evaluate = (*TEXT, "--quantizer_path", tmp_path / "q.pkl", "--output", tmp_path / "o.json")
    for seed in ("0", "1"):
        flags = (*calibrate, "--seed", seed, "--quantizer_path", tmp_path / "q.pkl")
        assert run_script(CALIBRATED_SCRIPT, NANO, *flags).returncode == 0
        if seed == "0":
            assert run_script(CALIBRATED_SCRIPT, NANO, *evaluate).returncode == 0
    process = run_script(CALIBRATED_SCRIPT, NANO, *evaluate, "--resume")
    assert_one_line_error(process, "o.json", "another run", "seed is 1 here and 0 there")


def resumed(path, whole, content):
    """Return the run that goes on with content in place of a sweep's report; UserError if it does not."""
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    run, record = blank_run(whole), {name: whole[name] for name in ("script", "model", "settings", "sha256")}
    known = report.load_unfinished(str(path), record, decisive(Flags(model="m")))
    report.take_over(run, str(path), known, known.get("environment", {}))
    return run


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("model",), "some/other", "model is .* 'some/other' there"),
        (("script",), "kvquant_llama3_simquant.py", "script"),
        (("settings", "abits"), [16, 3], r"abits is \[16, 4, 2\] here and \[16, 3\] there"),
        (("settings", "kv_format"), "nf", "kv_format"),
        (("sha256", str(SAMPLE)), "0", "content of .*sample.txt is another"),
        (("results", 0, "window_nll", 1), None, "cannot be continued"),
        (("results", 0, "window_nll", 1), 1e300, "cannot be continued"),
        (("results", 0, "window_nll", 1), "3", "cannot be continued.*window_nll.*'3'"),
        (("results", 1, "window_kl", 1), None, "cannot be continued.*window_kl"),
        (("results", 1, "window_kl"), [0.0], "cannot be continued"),
        (("results", 1, "quantized"), "keys", "cannot be continued.*other rows"),
        (("results",), 3, "no JSON that --output wrote"),
        (("settings",), [], "no JSON that --output wrote"),
    ],
)
def test_resume_refuses_another_run_and_damaged_figures(sweep, tmp_path, place, value, words):
    changed = json.loads(json.dumps(sweep[1]))
    *path, last = place
    part = changed
    for key in path:
        part = part[key]
    part[last] = value
    with pytest.raises(UserError, match=f"--resume: .*out.json.*{words}"):
        resumed(tmp_path / "out.json", sweep[1], changed)


ODD = st.sampled_from([0, -1, 0.5, 1e308, math.nan, math.inf, 10**400, "1e999", [], {}, [[]], None, True, ""])


@settings(max_examples=150)
@given(st.data())
@example(None).via("the report as it is")
def test_any_json_goes_on_or_is_one_line(sweep, tmp_path_factory, data):
    """One part of a report, wherever it lies, is replaced, added or taken away; or the file is cut."""
    whole = sweep[1]
    content = json.loads(json.dumps(whole))
    place, parts = content, []
    while data and isinstance(place, (dict, list)) and place and (not parts or data.draw(st.integers(0, 3))):
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        parts.append((place, key))
        place = place[key]
    action = data.draw(st.sampled_from(["replace", "replace", "remove", "add", "cut"])) if data else "none"
    if action == "replace":
        parts[-1][0][parts[-1][1]] = data.draw(ODD)
    elif action == "remove":
        del parts[-1][0][parts[-1][1]]
    elif action == "add":
        parent = parts[-1][0]
        parent.append(data.draw(ODD)) if isinstance(parent, list) else parent.update({data.draw(st.text()): 0})
    elif action == "cut":
        content = json.dumps(content).encode()[: data.draw(st.integers(0, 5000))] + data.draw(st.binary(max_size=9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            run = resumed(tmp_path_factory.mktemp("any") / "out.json", whole, content)
        except UserError as error:
            assert data is not None and "--resume" in str(error)
            return
    (count,) = run.count.values()
    assert 0 <= count <= 6 and (action != "none" or count == 6)
    json.dumps(report.all_results(run), allow_nan=False)


# -- pictures


def test_an_attribution_has_a_row_and_a_bar_for_each_part_and_layer(attribution):
    process, rows = attribution[0], attribution[1]["results"]
    names = ["nothing", "keys", "values", "keys and values", *(f"layer {i}" for i in range(6))]
    assert [row["quantized"] for row in rows] == names
    assert [row["layer"] for row in rows] == [None] * 4 + list(range(6)) and "keys and values" in process.stdout
    assert rows[1]["value_bits"] == rows[2]["key_bits"] == 16
    assert rows[7]["key_bits"] == pytest.approx((5 * 16 + rows[3]["key_bits"]) / 6, rel=0.01)
    left, right = plots.draw_attribution(rows).axes
    assert [bar.get_height() for bar in left.patches] == [row["delta_ppl"] for row in rows[1:4]]
    assert [bar.get_height() for bar in right.patches] == [row["delta_ppl"] for row in rows[4:]]
    assert left.get_ylabel() and right.get_xlabel()


def test_the_curve_is_the_rows_with_their_errors(sweep):
    rows = sweep[1]["results"]
    (axes,) = plots.draw_sweep(rows).axes
    line, _, (bars,) = axes.containers[0]
    assert list(line.get_xdata()) == [rows[2]["avg_bits"], rows[1]["avg_bits"]]
    assert list(line.get_ydata()) == [rows[2]["delta_ppl"], rows[1]["delta_ppl"]]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(rows[2]["delta_ppl_se"])
    assert "unquantized" in [text.get_text() for text in axes.get_legend().get_texts()]
    alone = [row | {"dataset": name, "delta_ppl": None} for name in "ab" for row in rows[1:2]]  # one setting, two texts
    (axes,) = plots.draw_sweep(alone).axes
    assert [len(container[0].get_xdata()) for container in axes.containers] == [1, 1]


def test_the_heat_map_has_the_activations_and_marks_the_outliers(model, windows):
    keys, values = [site for site in find_sites(model) if site.layer == 2]
    sparse = ScalarQuantizer(axis="channel", bits=2, outliers=0.01, sinks=1)
    setting = {keys: sparse, values: ScalarQuantizer(axis="token", bits=2)}
    figure = plots.draw_activations(model, windows[0], setting, 2)
    before, after = (axes.images[0].get_array() for axes in figure.axes[:2])
    captured = []
    projection = model.model.layers[2].self_attn.k_proj
    handle = projection.register_forward_hook(lambda module, args, out: captured.append(out[0]))
    with torch.inference_mode():
        model(windows[:1])
    handle.remove()
    torch.testing.assert_close(torch.from_numpy(before.data), captured[0][:256].abs().T, rtol=1e-4, atol=1e-5)
    marks = {tuple(map(int, place)) for place in figure.axes[1].collections[0].get_offsets()}  # (token, channel)
    body = captured[0][1:]
    low, high = body.quantile(0.005, 0), body.quantile(0.995, 0)
    kept = {(t + 1, c) for t, c in ((body <= low) | (body >= high)).nonzero().tolist() if t + 1 < 256}
    assert len(kept) > 100 and len(marks ^ kept) <= 0.02 * len(kept)
    assert all(after[channel, token] == before[channel, token] for token, channel in list(marks)[:50])
    assert len(figure.axes[3].collections) == 0


@pytest.mark.parametrize(("asked", "words"), [(6, "--plot_layer 6 .*layers 0, 1, 2, 3, 4, 5 are"), (None, "no layer")])
def test_a_layer_that_is_not_quantized_cannot_be_drawn(model, asked, words):
    setting = {site: ScalarQuantizer("channel") for site in find_sites(model)} if asked else {}
    with pytest.raises(UserError, match=words):
        plots.drawn_layer(setting, asked)


@pytest.mark.parametrize("name", ["a$_^b$.txt", "_a.txt", "数据.txt", os.fsdecode(b"a\xff.txt")])
def test_any_file_name_is_a_label(sweep, attribution, tmp_path, name):
    for number, (draw, known) in enumerate(((plots.draw_sweep, sweep), (plots.draw_attribution, attribution))):
        figure = draw([row | {"dataset": f"/some/where/{name}"} for row in known[1]["results"]])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plots.save_figure(str(tmp_path / f"{number}.svg"), figure)
        assert ET.parse(tmp_path / f"{number}.svg").getroot().tag.endswith("svg")
    assert (
        len(plots.draw_sweep([row | {"dataset": name} for row in sweep[1]["results"]]).axes[0].get_legend().texts) == 2
    )
