"""Several processes share the windows and give what one gives: real processes, joined over gloo."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, ROOT, SAMPLE, driver, run_script, run_together

import quant_utils as qu

TEXT = ("--datasets", SAMPLE, "--seqlen", "512")
SWEEP = (NANO, *TEXT, "--abits", "16,3", "--include_sparse")


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(count, script, *args):
    """The finished processes that `accelerate launch --num_processes count` would start, by rank."""
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return run_together([shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)], script, *args)


def assert_same_figures(report, expected):
    rows = [{**row, "seconds": None} for row in report["results"]]
    assert len(rows) == len(expected["results"]) > 0 and report["complete"] is True
    for row, other in zip(rows, expected["results"], strict=True):
        for name, figure in row.items():
            if isinstance(figure, (float, list)):
                assert figure == pytest.approx(other[name], rel=1e-6, abs=1e-9), name
            elif name != "seconds":
                assert figure == other[name], name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The report of one process: 11 windows, which neither 2 nor 3 processes divide."""
    out = tmp_path_factory.mktemp("alone") / "out.json"
    assert run_script(DYNAMIC_SCRIPT, *SWEEP, "--output", out).returncode == 0
    return json.loads(out.read_text())


def test_processes_together_give_what_one_gives_and_the_first_alone_speaks(tmp_path, alone):
    out = tmp_path / "out.json"
    first, *others = launch(3, DYNAMIC_SCRIPT, *SWEEP, "--output", out)
    assert first.returncode == 0 and first.stderr == "" and first.stdout.count("abits        ppl") == 1
    assert all((each.returncode, each.stdout, each.stderr) == (0, "", "") for each in others)
    assert_same_figures(json.loads(out.read_text()), alone)
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]


def test_a_process_without_windows_does_no_harm(tmp_path):
    flags = (*SWEEP, "--limit", "1", "--output", tmp_path / "out.json")
    assert [each.returncode for each in launch(2, DYNAMIC_SCRIPT, *flags)] == [0, 0]
    assert [row["windows"] for row in json.loads((tmp_path / "out.json").read_text())["results"]] == [1, 1]


def test_torchrun_launches_it(tmp_path, alone):
    out = tmp_path / "out.json"
    script = driver(tmp_path, f"open({str(tmp_path)!r} + '/rank' + os.environ['RANK'], 'w').close()")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launcher, script, DYNAMIC_SCRIPT, *SWEEP, "--output", out]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=100)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("abits        ppl") == 1
    assert (tmp_path / "rank0").exists() and (tmp_path / "rank1").exists()
    assert_same_figures(json.loads(out.read_text()), alone)


def test_an_interrupted_run_is_resumed_by_several(tmp_path, alone):
    """One process measured 5 windows; two measure the other 6."""
    rows = [
        {name: value[:5] if name.startswith("window_") else value for name, value in row.items()}
        for row in alone["results"]
    ]
    out = tmp_path / "out.json"
    out.write_text(json.dumps({**alone, "complete": False, "results": rows}))
    first, second = launch(2, DYNAMIC_SCRIPT, *SWEEP, "--output", out, "--resume")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert_same_figures(json.loads(out.read_text()), alone)


def test_a_mistake_is_said_once():
    first, second = launch(2, DYNAMIC_SCRIPT, NANO, *TEXT, "--abits", "4", "--first_few_fp16", "600")
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.count("\n") == 1 and "first_few_fp16 600" in first.stderr and second.stderr == ""


def test_a_model_that_one_process_cannot_load_ends_all_with_one_line(tmp_path):
    body = (
        "whole = qu.load_model\ndef load(*args):\n"
        "    if os.environ['RANK'] == '1': raise qu.UserError('no room here')\n    return whole(*args)\n"
        "qu.load_model = load"
    )
    script = driver(tmp_path, body)
    first, second = launch(2, script, DYNAMIC_SCRIPT, *SWEEP)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr == "kvquant_simquant_ppl_eval.py: error: no room here\n" and second.stderr == ""


def test_an_error_in_one_process_is_said_by_it_and_ends_the_other(tmp_path):
    body = (
        "whole = qu.measure_batch\ndef fail(*args):\n"
        "    if os.environ['RANK'] == '1': raise qu.UserError('out of luck')\n    return whole(*args)\n"
        "qu.measure_batch = fail"
    )
    out = tmp_path / "out.json"
    first, second = launch(2, driver(tmp_path, body), DYNAMIC_SCRIPT, *SWEEP, "--output", out)
    assert (first.returncode, second.returncode) == (2, 2), first.stderr
    assert second.stderr == "kvquant_simquant_ppl_eval.py: error: process 1 of 2: out of luck\n"
    saved, said = first.stderr.splitlines()
    assert "out.json has 6 of 11 windows" in saved and said.endswith("error: another process has ended: it says why")
    assert [row["windows"] for row in json.loads(out.read_text())["results"]] == [6, 6]


def test_a_stray_rank_alone_means_nothing(tmp_path):
    for stray in ({"RANK": "1", "WORLD_SIZE": ""}, {"RANK": "abc", "WORLD_SIZE": "1", "LOCAL_RANK": "2"}):
        (process,) = run_together([stray], DYNAMIC_SCRIPT, *SWEEP, "--limit", "1")
        assert process.returncode == 0 and process.stdout.count("abits        ppl") == 1


def test_a_flag_that_is_none_is_said_once():
    first, second = launch(2, DYNAMIC_SCRIPT, NANO, "--abbits", "3")
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.count("\n") == 1 and second.stderr == ""


def test_processes_that_do_not_meet_are_one_line():
    alone = {"WORLD_SIZE": "2", "MASTER_PORT": "x", "LOCAL_RANK": "0"}
    (process,) = run_together([alone], DYNAMIC_SCRIPT, *SWEEP)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "2 processes do not find each other" in process.stderr and "WORLD_SIZE" in process.stderr
    (process,) = run_together(
        [{"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "", "MASTER_PORT": ""}], DYNAMIC_SCRIPT, *SWEEP
    )
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "do not find each other" in process.stderr


def test_a_rank_beyond_the_others_is_one_line():
    for flags in (SWEEP, (NANO, "--no_such_flag")):
        (process,) = run_together([{"WORLD_SIZE": "2", "RANK": "2"}], DYNAMIC_SCRIPT, *flags)
        assert process.returncode == 2
    (process,) = run_together([{"WORLD_SIZE": "2", "RANK": "2"}], DYNAMIC_SCRIPT, *SWEEP)
    assert process.stderr == "kvquant_simquant_ppl_eval.py: error: RANK 2 with WORLD_SIZE 2: ranks are 0 to 1\n"


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_waits_for_the_others_says_so_and_heeds_signals(tmp_path, signum, status, rank):
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": str(ROOT)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, driver(tmp_path, "qu.PATIENCE = 0.5"), DYNAMIC_SCRIPT, *SWEEP]
    process = subprocess.Popen(list(map(str, command)), env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr.readline() == f"warning: process {rank} waits for the other 1 of WORLD_SIZE 2\n"
    process.send_signal(signum)
    assert process.wait(timeout=60) == status


@pytest.mark.parametrize("most", [1, 2, 64])
def test_the_shares_of_all_processes_are_the_next_windows(most, monkeypatch):
    monkeypatch.setattr(qu, "ROUND", most)
    windows = torch.arange(11 * 2).view(11, 2)
    for done in (0, 1, 5, 10):
        for count in (2, 3, 4, 12):
            known = [[i] for i in range(done)]
            run = qu.Run({"text": windows}, [], {}, measured={"text": known})
            parts = [qu.share(run, "text", index, count) for index in range(count)]
            assert parts[0].measured["text"] is known and not any(part.measured["text"] for part in parts[1:])
            joined = torch.cat([part.texts["text"] for part in parts])
            assert torch.equal(joined, windows[: len(joined)])
            for part in parts:
                (before, total), text = part.place, part.texts["text"]
                assert total == 11 and torch.equal(windows[before : before + len(text)], text)
            shares = [len(part.texts["text"]) - done * (index == 0) for index, part in enumerate(parts)]
            assert shares[0] == max(shares) == min(most, -(-(11 - done) // count))


def test_many_rounds_and_two_texts_give_the_windows_in_their_order(tmp_path, alone):
    """Rounds of 2 windows; the second text is a copy of the first."""
    (tmp_path / "copy.txt").write_text(SAMPLE.read_text())
    flags = (*SWEEP, "--datasets", f"{SAMPLE},{tmp_path / 'copy.txt'}", "--output", tmp_path / "out.json")
    first, second = launch(2, driver(tmp_path, "qu.ROUND = 2"), DYNAMIC_SCRIPT, *flags)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert_same_figures({**report, "results": report["results"][:2]}, alone)
    assert report["results"][2]["window_nll"] == report["results"][0]["window_nll"]


def test_an_error_of_one_process_before_it_measures_ends_all_with_one_line(tmp_path):
    body = "def fail(*args):\n    if os.environ['RANK'] == '1': raise qu.UserError('another text')\nqu.take_over = fail"
    first, second = launch(2, driver(tmp_path, body), DYNAMIC_SCRIPT, *SWEEP)
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr == "kvquant_simquant_ppl_eval.py: error: another text\n" and second.stderr == ""


def test_calibration_by_several_processes_writes_one_file_like_one_process(tmp_path):
    text = ("--calib_dataset", SAMPLE, "--nsamples", "3", "--seqlen", "64")
    flags = (NANO, "--calibrate", "--nuq", "--fisher", "--include_sparse", "--abits", "3", *text, "--quantizer_path")
    assert run_script(CALIBRATED_SCRIPT, *flags, tmp_path / "one.pkl").returncode == 0
    first, second = launch(2, CALIBRATED_SCRIPT, *flags, tmp_path / "two.pkl")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert second.stdout == second.stderr == "" and "Saved to" in first.stdout
    one, two = (qu.load_calibration(str(tmp_path / name))["quantizers"] for name in ("one.pkl", "two.pkl"))
    assert list(one) == list(two)
    for name in one:
        for part in ("lo", "hi"):
            assert (one[name][part] is None) == (two[name][part] is None)
            assert one[name][part] is None or torch.equal(one[name][part], two[name][part])
        assert torch.allclose(one[name]["codebooks"][3]["levels"], two[name]["codebooks"][3]["levels"], atol=1e-6)
