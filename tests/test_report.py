"""What is printed, written and drawn, and a run that is interrupted and goes on."""

import contextlib
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
from types import SimpleNamespace

import pytest
import torch
from conftest import DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, driver, run_script
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import quant_utils
from quant_utils import FIGURES, STATISTICS, Measured, Site, UserError
from simquant import measuring, memory, report, report_file, tables
from simquant.flags import Flags
from simquant.parsing import decisive
from simquant.plans import Row

TEXT = ("--datasets", SAMPLE, "--seqlen", "128", "--limit", "6")
SWEEP = (*TEXT, "--abits", "16,4,2", "--include_sparse", "--batch_size", "2")
KEYS = (  # of a row, in the product before this one; scripts of users read them
    "dataset format abits quantized ppl ppl_se nll windows tokens seconds delta_ppl delta_ppl_se delta_percent "
    "delta_percent_se kl top1_agreement avg_bits key_bits value_bits saturation cache_gib fp16_cache_gib window_nll "
    "window_kl window_top1_agreement window_key_bits window_value_bits"
)
SINCE = (  # what came to them with tails and units
    "bits_per_byte bits_per_byte_se word_ppl word_ppl_se accuracy accuracy_se kl_se top1_agreement_se rms_dp rms_dp_se "
    "kl_median kl_median_low kl_median_high kl_p99 kl_p99_low kl_p99_high kl_p999 kl_p999_low kl_p999_high kl_max "
    "kl_max_low kl_max_high window_squared_change window_accuracy window_kl_max window_kl_sketch window_bytes "
    "window_words"
)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Return (process, report) of a sweep that nothing interrupted."""
    out = tmp_path_factory.mktemp("sweep") / "out.json"
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out, "--plot", out.with_suffix(".png"))
    assert process.returncode == 0 and process.stderr == ""
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    return process, json.loads(out.read_text())


def figures(path_or_report):
    """Return all of a report's results but the seconds."""
    whole = path_or_report if isinstance(path_or_report, dict) else json.loads(path_or_report.read_text())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in whole["results"]]


def perplexity_without(row, window):
    """Return the perplexity of a row's other windows."""
    return math.exp(statistics.fmean(nll for i, nll in enumerate(row["window_nll"]) if i != window))


def table(stdout):
    """Return [[cell]] of the table that comes first, its headings first."""
    return [line.split() for line in stdout.split("\n\n")[0].splitlines()]


def on_terminal(columns, *command, **environment):
    """Return (exit status, text) of a command whose stdout and stderr are a terminal that knows colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    usual = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    usual |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "FORCE_COLOR": "1"}
    process = subprocess.Popen([*map(str, command)], stdout=theirs, stderr=theirs, env=usual | environment)
    os.close(theirs)
    written = b""
    with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # Linux's end of file
        while piece := terminal.read(4096):
            written += piece
    return process.wait(), written.decode().replace("\r\n", "\n")


SHOWN = {  # {figure: (heading, format)} of the table, in its order
    "avg_bits": ("bits", ".3f"), "ppl": ("ppl", ".4f"), "ppl_se": ("±", ".4f"), "delta_ppl": ("Δppl", "+.4f"),
    "delta_ppl_se": ("±", ".4f"), "delta_percent": ("Δppl%", "+.2f"), "kl": ("KL", ".6f"),
    "kl_p99": ("KL99%", ".4f"), "rms_dp": ("RMSΔp", ".2%"), "top1_agreement": ("top-1", ".2%"),
    "cache_gib": ("GiB", ".3f"),
}  # fmt: skip


def test_the_same_figures_stand_in_the_table_and_in_the_json(sweep):
    process, whole = sweep
    rows = whole["results"]
    assert whole["complete"] is True and whole["settings"]["abits"] == [row["abits"] for row in rows] == [16, 4, 2]
    headings, *lines = table(process.stdout)
    assert headings == ["text", "abits", *(heading for heading, _ in SHOWN.values())]
    for line, row in zip(lines, rows, strict=True):
        shown = [format(row[name], form) for name, (_, form) in SHOWN.items()]
        shown = [*shown[:3], *("-" * 7), shown[-1]] if row["abits"] == 16 else shown  # compared with itself
        assert line == ["sample.txt", str(row["abits"]), *shown]
    for row in rows:
        assert (row["windows"], row["tokens"], row["fp16_cache_gib"]) == (6, 6 * 127, 0.375)
        for name in ("nll", "kl", "top1_agreement", "key_bits", "value_bits"):
            assert row[name] == pytest.approx(math.fsum(row[f"window_{name}"]) / 6, rel=1e-12)
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]), rel=1e-12)
        assert row["delta_ppl"] == pytest.approx(row["ppl"] - rows[0]["ppl"], abs=1e-9)
        without = [perplexity_without(row, i) - perplexity_without(rows[0], i) for i in range(6)]
        assert row["delta_ppl_se"] == pytest.approx(statistics.pstdev(without) * 5**0.5, rel=0.2)  # the jackknife's


def test_every_key_of_the_product_before_is_there(sweep):
    whole = sweep[1]
    assert {*whole} == {
        "script", "command", "model", "settings", "sha256", "window_sha256", "title", "cache_entries", "environment",
        "complete", "results",
    }  # fmt: skip
    expected = {*KEYS.split(), *SINCE.split(), "format", "layer", "constants_gib"}
    assert all({*row} == expected for row in whole["results"])
    assert {*whole["environment"]} == {"versions", "device", "device_name", "dtype", "adapter"}
    assert {*whole["sha256"]} == {str(SAMPLE), "model weights"}
    resolved = {"dtype": "float32", "device": "cpu", "attn_implementation": "sdpa", "compile": "off"}
    assert whole["settings"].items() >= resolved.items()


def test_baseline_is_16_in_the_list_and_csv_is_the_table(sweep, tmp_path):
    out, known = tmp_path / "out.csv", figures(sweep[1])
    flags = ("--abits", "4,2", "--baseline", "--include_sparse", "--batch_size", "2")
    assert run_script(DYNAMIC_SCRIPT, NANO, *TEXT, *flags, "--output", out).returncode == 0
    for row, known_row in zip(csv.DictReader(io.StringIO(out.read_text())), known, strict=True):
        assert row.pop("complete") == "True" and float(row.pop("seconds")) > 0
        flat = {name: value for name, value in known_row.items() if not isinstance(value, list)}
        assert row == {name: "" if value is None else str(value) for name, value in flat.items()}


def blank_run(known, windows=6):
    """Return an empty run like the one that a report tells of: its rows, its texts."""
    rows = list(dict.fromkeys(Row(*(row[name] for name in Row._fields)) for row in known["results"]))
    sites = [Site(0, part, part, nn.Identity(), 8) for part in ("keys", "values")]
    texts = {row["dataset"]: torch.zeros(windows, 128, dtype=torch.long) for row in known["results"]}
    return report.Run(texts, rows, sites, 1024)


def test_a_narrow_terminal_folds_the_table_loses_no_figure_and_shows_a_bar(sweep):
    """On a terminal that is asked for colours by the usual variables; there are none."""
    status, written = on_terminal(70, sys.executable, DYNAMIC_SCRIPT, NANO, *SWEEP)
    assert status == 0 and re.findall(r"\x1b\[[\d;:]*m", written) == []
    assert re.search(r"measure: .* \d+/6 \[", written)  # how far it comes to be drawn depends on the machine
    assert re.search(r"ppl \d+\.\d{4} \d+\.\d{4} \d+\.\d{4}", written)
    parts = re.findall(r"[\r\n]( *text abits .*\n(?:sample.txt .*\n){3})", written)
    assert len(parts) == 2 and all(len(line) <= 70 for part in parts for line in part.splitlines())
    folded = [first.split() + second.split()[2:] for first, second in zip(*map(str.splitlines, parts), strict=True)]
    assert folded == table(sweep[0].stdout) and len(sweep[0].stdout.splitlines()[0]) > 70


INTERRUPTER = """
import importlib, signal
from simquant import measuring
module, _, name = {place!r}.rpartition(".")
whole, calls = getattr(importlib.import_module(module), name), []
def interrupted(*args, **kwargs):
    calls.append(name)
    for each in {signals!r}.split("+") if len(calls) > {count} else ():
        if each == "failure":
            raise qu.UserError("out of luck")
        os.kill(os.getpid(), getattr(signal, each))
    return whole(*args, **kwargs)
setattr(importlib.import_module(module), name, interrupted)
measuring.SAVE_EVERY = 0 if {signals!r} == "SIGKILL" else measuring.SAVE_EVERY
"""
BATCH = "quant_utils.start_batch"


def killed(folder, place, count, signals, *args):
    """Return the process of the data-free script, sent signals whenever it has called place more than count times."""
    script = driver(folder, INTERRUPTER.format(place=place, count=count, signals=signals))
    return run_script(script, DYNAMIC_SCRIPT, NANO, *args)


@pytest.mark.parametrize(
    ("place", "count", "signals", "status", "windows"),
    [
        (BATCH, 0, "SIGTERM", 143, 0),
        (BATCH, 1, "SIGINT+SIGINT", 130, 2),
        (BATCH, 2, "SIGTERM+SIGTERM+SIGINT", 143, 4),
        (BATCH, 2, "SIGKILL", -9, 4),
        (BATCH, 1, "failure", 2, 2),
        ("quant_utils.storage", 4, "SIGINT", 130, 2),  # between two settings of a batch
        ("simquant.report_file.write_atomically", 0, "SIGINT", 130, 6),  # as the complete file is to be written
    ],
)
def test_a_killed_run_saves_what_is_measured_and_goes_on(sweep, tmp_path, place, count, signals, status, windows):
    out = tmp_path / "out.json"
    process = killed(tmp_path, place, count, signals, *SWEEP, "--output", out)
    known = f"{out} has {windows} of 6 windows, and --resume goes on from there\n"
    said = {"SIGKILL": "", "failure": f"warning: {known}kvquant_simquant_ppl_eval.py: error: out of luck\n"}
    interrupted = f"kvquant_simquant_ppl_eval.py: interrupted{f'; {known}' if windows else chr(10)}"
    assert (process.returncode, process.stderr) == (status, said.get(signals, interrupted))
    assert {file.name for file in tmp_path.iterdir()} == {"driver.py", *(["out.json"] if windows else [])}
    assert not windows or [row["windows"] for row in figures(out)] == [windows] * 3
    assert not windows or json.loads(out.read_text())["complete"] is False
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out, "--resume")
    assert process.returncode == 0 and (process.stderr == "") == (windows > 0), process.stderr
    assert json.loads(out.read_text())["complete"] is True and figures(out) == figures(sweep[1])


class Clock:
    """Seconds that pass only where something is said to take them."""

    def __init__(self):
        self.seconds = 0.0

    def takes(self, seconds):
        self.seconds += seconds


@pytest.mark.parametrize(("each", "writes"), [(0.01, 26), (0.5, 15), (10, 2)])
def test_writing_what_is_measured_takes_little_of_the_time_however_long_the_file_is(monkeypatch, each, writes):
    clock, written = Clock(), []
    monkeypatch.setattr(measuring.time, "monotonic", lambda: clock.seconds)
    monkeypatch.setattr(measuring, "measure", lambda *args: (clock.takes(10) for _ in range(100)))
    file = SimpleNamespace(write=lambda of, complete: written.append(complete) or clock.takes(each))
    known = SimpleNamespace(texts=["a"], later={})
    assert measuring.measure_and_save(None, known, {}, SimpleNamespace(batch_size=1), file) is None
    assert written == [False] * (writes - 1) + [True]


def test_the_running_perplexity_is_that_of_all_windows_so_far_also_after_a_resume(monkeypatch):
    rows, shown = [Row("unquantized", 16, "nothing"), Row("uniform", 3, "keys")], []
    whole = report.Run({"a": torch.zeros(9, 4)}, rows, [], 4)
    losses = torch.rand(9, 2, len(FIGURES), dtype=torch.float64)
    batches = [Measured(each, torch.rand(len(each), 2, len(STATISTICS), 3)) for each in losses.split((4, 2, 2, 1))]
    whole.add("a", whole.kept(batches[0]), 1.0)
    bar = SimpleNamespace(n=0, update=lambda count: None, set_postfix_str=lambda text, refresh: shown.append(text))
    monkeypatch.setattr(quant_utils, "progress", lambda *args, **kwargs: contextlib.nullcontext(bar))
    monkeypatch.setattr(memory, "evaluate_what_fits", lambda *args: batches[1:])
    assert len(list(measuring.measure(None, whole, "a", [{}, {}], 2))) == 3
    assert torch.equal(whole.done("a").figures, losses)
    expected = [[math.exp(statistics.fmean(column)) for column in losses[:n, :, 0].T.tolist()] for n in (6, 8, 9)]
    assert shown == [f"ppl {one:.4f} {other:.4f}" for one, other in expected]


def test_a_complete_run_is_not_measured_again_and_may_print_and_draw_otherwise(sweep, tmp_path):
    out = tmp_path / "out.json"
    out.write_text(json.dumps(sweep[1] | {"environment": sweep[1]["environment"] | {"device_name": "another"}}))
    flags = (*SWEEP, "--output", out, "--resume", "--quiet", "--plot", tmp_path / "a.svg")
    process = killed(tmp_path, BATCH, 0, "SIGTERM", *flags)
    assert process.returncode == 0 and "cache of 131072 tokens" in process.stdout and (tmp_path / "a.svg").exists()
    assert re.fullmatch("warning: .*out.json.* another device.*\n", process.stderr)
    names = [name for name in KEYS.split() if not name.endswith("_gib") and name != "seconds"]
    known = [[row[name] for name in names] for row in sweep[1]["results"]]
    assert [[row[name] for name in names] for row in figures(out)] == known


def test_resume_with_another_setting_text_or_checkpoint_is_refused_and_the_file_stays(tmp_path):
    out, text, model = tmp_path / "out.json", tmp_path / "t.txt", shutil.copytree(NANO, tmp_path / "model")
    command = (DYNAMIC_SCRIPT, model, "--datasets", text, "--seqlen", "128", "--limit", "1", "--output", out)
    shutil.copy(SAMPLE, text)
    assert run_script(*command).returncode == 0
    before = out.read_bytes()
    process = run_script(*command, "--skip_layers", "0", "--resume")
    assert_one_line_error(process, "out.json", "another run", "skip_layers is [0] here and [] there")
    process = run_script(*command, "--report_context", "64", "--resume")  # how layers weigh may depend on it
    assert_one_line_error(process, "another run", "report_context is 64 here and 131072 there")
    text.write_text("x" + SAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    assert_one_line_error(run_script(*command, "--resume"), "another run", "the content of", "t.txt is another")
    shutil.copy(SAMPLE, text)
    weights = load_file(model / "model.safetensors") | {"model.norm.weight": torch.ones(256)}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    assert_one_line_error(run_script(*command, "--resume"), "another run", "the content of model weights is another")
    assert out.read_bytes() == before


def test_what_others_wrote_is_not_replaced(sweep, tmp_path):
    """A run that was interrupted, a file of another kind, or, meanwhile, another run."""
    out, killer = (
        tmp_path / "out.json",
        killed(tmp_path, BATCH, 1, "SIGTERM", *SWEEP, "--output", tmp_path / "out.json"),
    )
    assert killer.returncode == 143 and table(killer.stdout)[0][-1] == "windows" and table(killer.stdout)[1][-1] == "2"
    unfinished = out.read_bytes()
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out)
    assert_one_line_error(process, "out.json' holds an unfinished run: go on with it by --resume, or --overwrite")
    body = f"""
from simquant import measuring
whole = measuring.measure_and_save
def other_first(*args):
    with open({str(out)!r}, "w") as file:
        file.write("another's")
    return whole(*args)
measuring.measure_and_save = other_first
"""
    process = run_script(driver(tmp_path, body), DYNAMIC_SCRIPT, NANO, *SWEEP, "--output", out, "--resume")
    assert process.returncode == 0 and f"writing to '{tmp_path}/out-2.json' instead" in process.stderr
    assert out.read_text() == "another's" and figures(tmp_path / "out-2.json") == figures(sweep[1])
    for name, content in (
        ("a.json", '{"results": []}'), ("b.json", unfinished), ("a.csv", "a,b\n1,2\n"), ("c.json", "\0"),
        ("b.csv", "dataset,abits,ppl,complete\nx,4,3.5,False\n"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(
            UserError, match=f"^output '{tmp_path / name}' (is no|holds an) .*, or --overwrite to lose it"
        ):
            report_file.ReportFile(str(tmp_path / name), overwrite=False).check()
        report_file.ReportFile(str(tmp_path / name), overwrite=True).check()
    (tmp_path / "b.csv").write_text("dataset,abits,ppl,complete\nx,4,3.5,True\n")
    (tmp_path / "c.json").write_bytes(b"")
    for name in ("b.csv", "c.json", "new.json", "out-2.json"):
        report_file.ReportFile(str(tmp_path / name), overwrite=False).check()


def test_a_reader_that_has_left_costs_no_file(sweep, tmp_path):
    closed, files = "reader, writer = os.pipe()\nos.close(reader)\nos.dup2(writer, 1)", ("o.json", "p.png", "k.svg")
    out, plot, activations = (tmp_path / name for name in files)
    flags = ("--output", out, "--plot", plot, "--plot_activations", activations)
    process = run_script(driver(tmp_path, closed), DYNAMIC_SCRIPT, NANO, *SWEEP, *flags)
    assert (process.returncode, process.stderr) == (1, "kvquant_simquant_ppl_eval.py: error: Broken pipe\n")
    assert figures(out) == figures(sweep[1]) and all(file.stat().st_size > 1000 for file in (plot, activations))


def test_a_larger_limit_goes_on_and_a_smaller_one_is_another_run(sweep, tmp_path):
    out = tmp_path / "out.json"
    assert run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--limit", "4", "--output", out).returncode == 0
    process = killed(tmp_path, BATCH, 1, "SIGTERM", *SWEEP, "--output", out, "--resume")  # one batch more is left
    assert process.returncode == 0 and figures(out) == figures(sweep[1])
    process = run_script(DYNAMIC_SCRIPT, NANO, *SWEEP, "--limit", "4", "--output", out, "--resume")
    assert_one_line_error(process, "another run: limit is 4 here and 6 there")


def test_without_a_terminal_progress_is_lines(tmp_path):
    """As under nohup, every minute; here every batch."""
    script = driver(tmp_path, "from simquant import notices\nnotices.LINE_EVERY = 0")
    process, quiet = (run_script(script, DYNAMIC_SCRIPT, NANO, *SWEEP, *more) for more in ((), ("--quiet",)))
    line = r"measure: (\d) of 6 windows, \S+ left(, ppl [\d. ]+)?"
    assert quiet.stderr == "" and [re.fullmatch(line, each)[1] for each in process.stderr.splitlines()] == [*"0246"]


def test_cells_are_readable_whatever_they_hold(sweep):
    rows = [{**row, "ppl": 1e37, "dataset": "/some/a\x1b[31m_b.txt"} for row in sweep[1]["results"]]
    shown = tables.table(rows, ("ppl", "kl"))
    assert "a?[31m_b.txt     4 1.0000e+37 0.0" in shown and "\x1b" not in shown and "1.0000e+37" in shown
    twice = [{**row, "dataset": f"/{folder}/x.txt"} for folder in "ab" for row in rows]
    assert [line.split()[0] for line in tables.table(twice).splitlines()] == [
        "text",
        *["/a/x.txt"] * 3,
        *["/b/x.txt"] * 3,
    ]
    alone = [{**row, "delta_ppl": None, "kl": None} for row in rows[1:]]
    assert tables.table(alone, ("delta_ppl", "kl", "tokens")).split("\n")[0].split() == ["text", "abits", "tokens"]


def resumed(path, whole, content):
    """Return the run that goes on with content in place of a sweep's report; UserError if it does not."""
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    run, file = blank_run(whole), report_file.ReportFile(str(path), overwrite=False)
    file.record = {name: whole[name] for name in ("script", "model", "settings", "sha256")}
    known = file.unfinished(run.texts, decisive(Flags(model="m")))
    report_file.take_over(run, str(path), known, known.get("environment", {}))
    return run


def test_resume_refuses_another_run_and_damaged_figures(sweep, tmp_path):
    ours = sweep[1] | {"sha256": sweep[1]["sha256"] | {"quantizers": "1"}}
    for place, value, words in (
        (("model",), "some/other", "model is .* 'some/other' there"),
        (("settings", "abits"), [16, 3], r"abits is \[16, 4, 2\] here and \[16, 3\] there"),
        (("sha256", "quantizers"), "2", "content of quantizers is another"),
        (("results", 0, "window_nll", 1), "3", "cannot be continued.*window_nll.*'3'"),
        (("results", 1, "window_kl", 1), None, "cannot be continued.*window_kl"),
        (("results", 1, "quantized"), "keys", "cannot be continued.*other rows"),
        (("results",), 3, "no report that --output wrote"),
    ):
        part = changed = json.loads(json.dumps(ours))
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = value
        with pytest.raises(UserError, match=f"--resume: .*out.json.*{words}"):
            resumed(tmp_path / "out.json", ours, changed)


def test_a_report_of_the_product_before_goes_on(sweep, tmp_path):
    """It knew neither --kv_format nor --skip_layers nor --bos, and no row had a layer."""
    before = json.loads(json.dumps(sweep[1]))
    for name in ("kv_format", "skip_layers", "bos", "text_column", "revision"):
        del before["settings"][name]
    before["results"] = [{name: row[name] for name in KEYS.split()} for row in before["results"]]
    assert resumed(tmp_path / "out.json", sweep[1], before).count == {str(SAMPLE): 6}


ODD = st.sampled_from([0, -1, 0.5, 1e308, math.nan, math.inf, 10**400, "1e999", [], {}, [[]], None, True, ""])


@settings(max_examples=150)
@given(st.data())
def test_any_json_goes_on_or_is_one_line(sweep, tmp_path_factory, data):
    """One part of a report, wherever it lies, is replaced or taken away, or the file is cut."""
    content = json.loads(json.dumps(sweep[1]))
    place, parts = content, []
    while isinstance(place, (dict, list)) and place and (not parts or data.draw(st.integers(0, 3))):
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        parts.append((place, key))
        place = place[key]
    parent, key = parts[-1]
    action = data.draw(st.sampled_from(["replace", "replace", "remove", "cut"]))
    if action == "replace":
        parent[key] = data.draw(ODD)
    elif action == "remove":
        del parent[key]
    else:
        content = json.dumps(content).encode()[: data.draw(st.integers(0, 5000))] + data.draw(st.binary(max_size=9))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run = resumed(tmp_path_factory.mktemp("any") / "out.json", sweep[1], content)
    except UserError as error:
        assert "--resume" in str(error)
    else:
        assert 0 <= run.count[str(SAMPLE)] <= 6
        json.dumps(report.all_results(run), allow_nan=False)
