"""Saved reports side by side: equal to one run that measured all, and checked against each other."""

import json
import shutil

import pytest
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, ROOT, SAMPLE, assert_one_line_error, driver, run_script

TEXT = ("--datasets", SAMPLE, "--seqlen", "128", "--limit", "6", "--by_position")
RUNS = {"sweep": "16,4,3,2", "base": "16", "four": "16,4", "three": "16,3", "two": "2"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return {name: path of the report} of a sweep and of its rows, one by one."""
    folder = tmp_path_factory.mktemp("saved")
    for name, widths in RUNS.items():
        process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--abits", widths, "--output", folder / f"{name}.json")
        assert process.returncode == 0, process.stderr
    return {name: folder / f"{name}.json" for name in RUNS}


def changed(path, to, change):
    """Return the path of a copy of a report in which change(report) has been made."""
    content = json.loads(path.read_text())
    change(content)
    to.write_text(json.dumps(content))
    return to


def shown(*args, script=DYNAMIC_SCRIPT):
    """Return (stdout, stderr) of a comparison that goes well."""
    process = run_script(script, "--compare", *args)
    assert process.returncode == 0, process.stderr
    return process.stdout, process.stderr


def blocks(stdout):
    """Return the tables of an output, without what says where they come from."""
    return [part for part in stdout.split("\n\n") if ".json: " not in part and "float32 on cpu" not in part]


def test_single_runs_side_by_side_equal_the_sweep_to_the_printed_digit(saved, tmp_path):
    """A row that was measured without the unquantized model is paired with that of another report."""
    merged, columns = (
        tmp_path / "merged.json",
        ("--columns", "avg_bits,ppl,ppl_se,delta_ppl,delta_ppl_se,delta_percent"),
    )
    names = ("base", "four", "three", "two")
    alone, silent = shown(saved["sweep"], "--by_position")
    together, _ = shown(
        *(saved[name] for name in names), "--by_position", "--output", merged, "--plot", tmp_path / "a.png"
    )
    assert silent == "" and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert shown(saved["sweep"], *columns)[0].split("\n\n")[0] == shown(merged, *columns)[0].split("\n\n")[0]
    sweep = {row["abits"]: row for row in json.loads(saved["sweep"].read_text())["results"]}
    unknown = set()
    for row in json.loads(merged.read_text())["results"]:
        for name, value in row.items():
            if value is None and sweep[row["abits"]][name] is not None:
                unknown.add((row["abits"], name.partition("_")[0]))
            elif name not in ("seconds", "by_position") and not (row["abits"] == 2 and name.startswith("window_")):
                assert value == sweep[row["abits"]][name], name
    assert unknown == {(2, name) for name in ("kl", "rms", "top1")}  # of which the loss alone was measured
    lines = blocks(run_script(DYNAMIC_SCRIPT, NANO, *TEXT, "--abits", RUNS["sweep"]).stdout)
    assert blocks(alone)[: len(lines) - 1] == lines[:-1]  # a report shows what its run showed
    assert together.split()[:12] == alone.split()[:12]


def test_a_report_is_shown_again_with_any_columns_and_pictures(saved, tmp_path):
    columns = ("--columns", "kl_median,kl_median_low,kl_p999,bits_per_byte,word_ppl", "--sort", "bits")
    pictures = ("--plot_positions", tmp_path / "p.svg", "--report", tmp_path / "p.html")
    out, _ = shown(saved["four"], *columns, *pictures, script=CALIBRATED_SCRIPT)
    assert out.splitlines()[0].split() == ["text", "abits", "KL50%", "from", "KL99.9%", "bits/byte", "word", "ppl"]
    assert (tmp_path / "p.svg").read_text().startswith("<?xml") and "16,4</span>" in (tmp_path / "p.html").read_text()
    process = run_script(DYNAMIC_SCRIPT, "--compare", saved["four"], "--plot_retrieval", tmp_path / "r.png")
    assert_one_line_error(process, "--plot_retrieval", "nothing of that kind")


def test_reports_of_other_models_or_texts_are_refused_and_the_difference_is_named(saved, tmp_path):
    def other_windows(setting, value):
        def change(content):
            content["settings"][setting] = value
            content["sha256"][str(SAMPLE)] = "0"
            content["window_sha256"][str(SAMPLE)] = ["0"] * 6

        return change

    def retrained(content):
        content["sha256"]["model weights"] = "0"
        content["results"][0]["window_nll"][0] += 0.1

    def renamed(content):
        content["model"] = "some/other"
        del content["sha256"]["model weights"]

    def without_digests(content):
        del content["window_sha256"]
        content["sha256"][str(SAMPLE)] = "0"

    for name, change, words in (
        ("seqlen", other_windows("seqlen", 64), ("seqlen is 128 there and 64 here", "no window")),
        ("bos", other_windows("bos", "window"), ("bos is 'text' there and 'window' here",)),
        ("text", other_windows("limit", 6), ("the text is another",)),
        ("weights", retrained, ("other weights", "llama3-nano")),
        ("name", renamed, ("some/other", "model is")),
        ("older", without_digests, ("older.json' is of an older version",)),
        ("damaged", lambda c: c["results"][0].update(window_nll=[1, "x"]), ("cannot be read", "window_nll")),
        ("sketch", lambda c: c["results"][1].update(window_kl_sketch=["eJw="] * 6), ("cannot be read", "holds no")),
        ("short", lambda c: c["results"][1].update(window_bytes=[1]), ("cannot be read",)),
        ("none", lambda c: c.update(results=3), ("no report that --output wrote",)),
        ("row", lambda c: c["results"].append(1), ("no report that --output wrote",)),
        ("seconds", lambda c: c["results"][1].pop("seconds"), ("no report that --output wrote",)),
        ("cell", lambda c: c.update(retrieval=[{**c["results"][1], "retrieval": [{}]}]), ("no report that",)),
        ("entries", lambda c: c.update(cache_entries=3), ("no report that --output wrote",)),
        ("empty", lambda c: c.update(results=[]), ("no figures to show",)),
    ):  # fmt: skip
        other = changed(saved["four"], tmp_path / f"{name}.json", change)
        assert_one_line_error(run_script(DYNAMIC_SCRIPT, "--compare", saved["three"], other), *words)
    for words, said in (
        ((saved["four"], saved["four"]), "more than once"),
        ((tmp_path / "absent.json",), "absent.json"),
        ((saved["four"], "--abits", "2"), "--abits measures"),
        ((saved["four"], "--quiet", NANO), "takes no model: leave out"),
        ((), "expected at least one argument"),
    ):
        assert_one_line_error(run_script(DYNAMIC_SCRIPT, "--compare", *words), said)
    assert_one_line_error(run_script(DYNAMIC_SCRIPT, "--abits", "4"), "required: model")


def test_reports_of_fewer_windows_unfinished_and_older_ones_are_compared_as_far_as_they_go(saved, tmp_path):
    short = tmp_path / "short.json"
    assert run_script(DYNAMIC_SCRIPT, NANO, *TEXT[:-2], "4", "--abits", "16,3", "--output", short).returncode == 0
    out, err = shown(saved["four"], short, "--output", tmp_path / "m.json")
    assert "compared on the 4 windows that all reports have, of 6 in" in err and "by position" not in out
    rows = json.loads((tmp_path / "m.json").read_text())["results"]
    assert [(row["abits"], row["windows"], len(row["window_kl"])) for row in rows] == [(16, 4, 4), (4, 4, 4), (3, 4, 4)]
    known = json.loads(short.read_text())["results"]
    assert [rows[0]["kl_p99"], rows[2]["kl_p99"], rows[2]["delta_ppl_se"]] == [
        known[0]["kl_p99"], known[1]["kl_p99"], known[1]["delta_ppl_se"]
    ]  # fmt: skip

    def before(content):
        """As a version before tails, digests of windows and sizes wrote it."""
        for name in ("window_sha256", "cache_entries", "title", "command"):
            del content[name]
        new = (
            "window_kl_sketch",
            "window_squared_change",
            "window_accuracy",
            "window_kl_max",
            "window_bytes",
            "window_words",
        )
        content["results"] = [{k: v for k, v in row.items() if k not in new} for row in content["results"]]

    def unfinished(content):
        content["complete"] = False

    older = changed(saved["three"], tmp_path / "older.json", before)
    stopped = changed(saved["four"], tmp_path / "stopped.json", unfinished)
    out, err = shown(older, stopped)
    assert "stopped.json' is unfinished" in err and "uniform (unfinished)" in out
    three = next(line for line in out.splitlines() if line.split()[2:3] == ["3"])
    assert json.loads(saved["three"].read_text())["results"][1]["cache_gib"] == pytest.approx(
        float(three.split()[-1]), abs=1e-3
    )
    assert three.split()[10:12] == ["-", "-"]  # its tails are not known


def test_rows_of_one_name_are_told_apart_and_baselines_that_differ_are_said(saved, tmp_path):
    def louder(content):
        content["settings"]["dtype"] = "bfloat16"
        for row in content["results"]:
            row["window_nll"] = [value + 0.01 for value in row["window_nll"]]

    other = changed(saved["four"], tmp_path / "other.json", louder)
    out, err = shown(saved["four"], other)
    assert "dtype is float32 in" in err and "differ by up to 0.01 nats a window" in err
    lines = [line.split() for line in out.splitlines()[1:4]]
    assert [line[1] for line in lines] == ["unquantized", "uniform", "uniform"] and "(other)" in out and "(four)" in out
    out, _ = shown(saved["sweep"], saved["four"])  # the same measurement twice stands there once
    assert len(blocks(out)[0].splitlines()) == 5


def test_what_a_repeated_row_measured_besides_is_shown(saved, tmp_path):
    """First the loss alone, then the same command with more: the second report's scores belong to the first's rows."""
    cell = {"task": "made", "metric": "acc", "value": 0.5, "se": None, "delta": None, "delta_se": None, "documents": 2}

    def scored(content):
        rows = content["results"]
        content["tasks"] = [{**{k: row[k] for k in ("format", "abits", "quantized")}, "tasks": [cell]} for row in rows]

    other = changed(saved["four"], tmp_path / "other.json", scored)
    again = changed(saved["four"], tmp_path / "again.json", scored)
    out, err = shown(saved["sweep"], other, again)
    table = next(part for part in blocks(out) if part.startswith("Tasks"))
    assert [line.split()[:2] for line in table.splitlines()[2:]] == [["made", "16"], ["made", "4"]] and err == ""


def test_files_of_one_name_are_told_apart_by_their_folders(saved, tmp_path):
    other = changed(saved["four"], tmp_path / "other.json", lambda c: c["results"][1]["window_nll"].reverse())
    (tmp_path / "sub").mkdir()
    shutil.copy(other, tmp_path / "sub" / "four.json")
    assert f"({tmp_path}/sub/four.json)" in shown(saved["four"], tmp_path / "sub" / "four.json")[0]


def test_no_model_and_no_transformers_are_loaded_to_compare(saved, tmp_path):
    body = "import atexit; atexit.register(lambda: print(*{'transformers', 'accelerate'} & set(sys.modules), 'loaded'))"
    process = run_script(
        driver(tmp_path, body), DYNAMIC_SCRIPT, "--compare", saved["sweep"], env={"PYTHONPATH": str(ROOT)}
    )
    assert process.returncode == 0 and process.stdout.splitlines()[-1] == "loaded", process.stdout


def test_reports_that_hid_other_needles_are_said_to(saved, tmp_path):
    def hidden(mark):
        return lambda content: content["sha256"].update({"retrieval prompts": mark})

    one, other = (changed(saved["four"], tmp_path / f"{mark}.json", hidden(mark)) for mark in ("a", "b"))
    assert "hid other needles" in shown(one, other)[1] and "needles" not in shown(one, saved["three"])[1]


def test_a_copy_of_a_model_is_that_model_if_it_loses_the_same(saved, tmp_path):
    """Its files have other times, and so the report another mark."""
    copied = changed(saved["three"], tmp_path / "copy.json", lambda c: c["sha256"].update({"model weights": "0"}))
    assert shown(saved["four"], copied)[1] == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", 10**400), ("tokens", "x"), ("seconds", 10**400), ("window_kl_sketch", {}), ("constants_gib", []),
        ("window_nll_by_position", []), ("window_kl_by_position", [[1.0]]), ("window_bytes", 3), ("abits", None),
    ],
)  # fmt: skip
def test_figures_that_no_run_can_have_are_one_line(saved, tmp_path, name, value):
    damaged = changed(saved["four"], tmp_path / "a.json", lambda c: c["results"][1].update({name: value}))
    process = run_script(DYNAMIC_SCRIPT, "--compare", damaged, "--columns", "all", "--report", tmp_path / "a.html")
    assert_one_line_error(process, "a.json")
