"""Both scripts as a user runs them: processes, their output, their exit status, and what is left on the disk."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from unittest import mock

import conftest
import pytest
import torch
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, driver, run_script
from safetensors.torch import load_file, save_file
from test_report import figures, on_terminal

from simquant import quantizer_file

TEXT = ("--datasets", SAMPLE, "--seqlen", "64", "--limit", "12")
SWEEP = (DYNAMIC_SCRIPT, NANO, *TEXT, "--abits", "16,3,2", "--include_sparse")
NUQ = ("--nuq", "--fisher", "--include_sparse", "--first_few_fp16", "1", "--norm")
FIT = (CALIBRATED_SCRIPT, NANO, "--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "3", "--seqlen", "64", *NUQ)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Return (quantizer file of two widths, process that made it)."""
    path = tmp_path_factory.mktemp("calibrated") / "q.pkl"
    process = run_script(*FIT, "--abits", "4,2", "--quantizer_path", path)
    assert process.returncode == 0 and process.stderr == ""
    return path, process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the report of a sweep by one process that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "o.json"
    assert run_script(*SWEEP, "--output", out).returncode == 0
    return json.loads(out.read_text())


def test_a_calibration_prints_its_fit_and_the_command_that_evaluates_it(calibrated):
    path, process = calibrated
    header, *lines = process.stdout.splitlines()
    assert header.split() == ["projection", "abits", "lowest", "highest", "kept", "rel.", "error"]
    names = [f"model.layers.{i}.self_attn.{kind}_proj" for i in range(6) for kind in "kv"]
    assert [line.split()[:2] for line in lines[:24]] == [[name, bits] for bits in "42" for name in names]
    for line in lines[:24]:
        bits, low, high, kept, error = (float(cell.rstrip("%")) for cell in line.split()[1:])
        assert low < high and 0 < kept < 3 and 0 < error < (0.02 if bits == 4 else 0.3)
    program, script, *rest = shlex.split(lines[-1])
    text = ["--datasets", SAMPLE, "--seqlen", "64"]
    assert program == "python3" and rest == [*map(str, (NANO, "--quantizer_path", path, *text))]
    assert run_script(script, *rest, "--limit", "1").returncode == 0


def test_an_evaluation_takes_its_settings_and_chooses_its_widths_from_the_file(calibrated, tmp_path):
    command = (CALIBRATED_SCRIPT, NANO, "--quantizer_path", calibrated[0], *TEXT, "--output", tmp_path / "o.json")
    rows = {}
    for flags in ("--baseline", "", "--abits 2 --nuq --include_sparse", "--abits 16,4,4/2,16/4"):
        process = run_script(*command, *flags.split())
        assert process.returncode == 0 and process.stderr == ""
        report = json.loads((tmp_path / "o.json").read_text())
        rows[flags] = {row["abits"]: row["ppl"] for row in report["results"]}
        wanted = {"nuq": True, "kv_format": "nuq", "fisher": True, "include_sparse": True, "first_few_fp16": 1}
        assert report["settings"].items() >= {**wanted, "norm": True}.items() and "quantizers" in report["sha256"]
        assert re.search("keys: .*-bit NUQ per channel, outliers exact .*, first token exact", process.stdout)
    all_widths, own, two, mixed = rows.values()
    assert list(all_widths) == [16, 4, 2] and all_widths[16] < all_widths[4] < all_widths[2]
    assert own == {bits: all_widths[bits] for bits in (4, 2)} and two == {2: all_widths[2]}
    assert mixed[4] == all_widths[4] and mixed[16] < mixed["16/4"] < mixed["4/2"] < all_widths[2]


def test_what_contradicts_the_file_is_refused(calibrated):
    for flags, said in {
        "--abits 16,4,3": "keys of 4 and 2 bits, and not of 3",
        "--sparsity_threshold 0.95": "sparsity_threshold: 0.95 on the command line contradicts 0.99 in",
        "--perchannel": "perchannel: () on the command line contradicts ('k_proj',)",
        "--kv_format nf,fp8_calibrated": "fp8_calibrated is fitted to data, and --quantizer_path holds nuq",
        "--export_kvquant e.pkl": "--export_kvquant writes one width",
    }.items():
        process = run_script(CALIBRATED_SCRIPT, NANO, "--quantizer_path", calibrated[0], *flags.split())
        assert_one_line_error(process, said)


def test_without_quantization_no_file_is_needed_and_nothing_is_compared():
    process = run_script(CALIBRATED_SCRIPT, NANO, "--abits", "16", *TEXT, "--report_context", "1024")
    assert process.returncode == 0 and re.match(r".*\n\S+ +16 ", process.stdout)
    assert "Δppl" not in process.stdout and "cache of 1024 tokens" in process.stdout


def test_files_that_attack_or_are_damaged_are_one_line(calibrated, tmp_path):
    (tmp_path / "bomb.pkl").write_bytes(f"cos\nmkdir\n(V{tmp_path}/executed\ntR.".encode())
    (tmp_path / "cut.pkl").write_bytes(calibrated[0].read_bytes()[:-1000])
    torn = torch.load(calibrated[0], weights_only=True)
    del torn["settings"]
    torch.save(torn, tmp_path / "torn.pkl")
    for name, said in {"bomb": "more than data", "cut": "cut off", "torn": "damaged", "none": "--calibrate"}.items():
        process = run_script(CALIBRATED_SCRIPT, NANO, "--quantizer_path", tmp_path / f"{name}.pkl", *TEXT)
        assert_one_line_error(process, f"{name}.pkl", said)
    assert not (tmp_path / "executed").exists()


def test_dry_run_says_what_would_be_done_without_weights_and_writes_nothing(tmp_path):
    model = shutil.copytree(NANO, tmp_path / "model", ignore=lambda *_: ["model.safetensors"])
    flags = ("--abits", "16,3", "--skip_layers", "0", "--first_few_fp16", "1", "--output", tmp_path / "o.json")
    process = run_script(DYNAMIC_SCRIPT, model, *TEXT, *flags, "--dry_run", "--sparsity_threshold", "0.9")
    assert process.returncode == 0
    assert process.stderr == "warning: --sparsity_threshold has no effect without --include_sparse\n"
    sites, rest = (part.splitlines() for part in process.stdout.split("\n\n"))
    about = [(i, leaf, ", not quantized" * (i == 0)) for i in range(6) for leaf in ("k_proj", "v_proj")]
    assert sites == [f"model.layers.{i}.self_attn.{p}: the output of {p}, 128 channels{rest}" for i, p, rest in about]
    assert rest[1:5] == [
        "settings: 2, of 16, 3 bits",
        "keys: 3-bit uniform per channel, first token exact",
        "values: 3-bit uniform per token, first token exact",
        f"{SAMPLE}: 12 windows of 64 tokens",
    ]
    size = (NANO / "model.safetensors").stat().st_size  # on disk in 16 bits; computed with in 32
    assert rest[5].startswith(f"weights: {2 * size / 2**30:.2f} GiB; ") and rest[6].endswith("in 16 bits: 0.38 GiB")
    process = run_script(FIT[0], model, *FIT[2:], "--quantizer_path", tmp_path / "q.pkl", "--dry_run")
    assert process.returncode == 0 and f"{SAMPLE}: 3 windows of 64 tokens" in process.stdout
    assert "keys: 4-bit NUQ per channel" in process.stdout and [*tmp_path.iterdir()] == [model]


def test_quiet_is_quiet_on_a_terminal_too(whole):
    status, written = on_terminal(150, sys.executable, *SWEEP, "--quiet")
    assert status == 0 and written.startswith("      text abits") and "it/s" not in written and "\r" not in written
    assert f"{whole['results'][0]['ppl']:.4f}" in written


def nano_copy(folder, **config):
    """Return a copy of the bundled model with a changed config.json."""
    shutil.copytree(NANO, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def test_models_that_are_none_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    cut, nan = nano_copy(tmp_path / "cut"), nano_copy(tmp_path / "nan")
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:1000])
    weights = load_file(nan / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, nan / "model.safetensors", metadata={"format": "pt"})
    for model, flags, words in (
        (tmp_path / "empty", (), ("empty", "no config.json")),
        ("no such model", (), ("there is no folder 'no such model'", "a hub id")),
        (cut, (), ("cannot load model", "cut")),
        (nano_copy(tmp_path / "small", vocab_size=100), (), ("token", "the model has 100", "tokenizer")),
        (nan, ("--abits", "16,2"), ("sample.txt, unquantized", "window 1 of 12", "loss nan", "broken")),
        (NANO, ("--plot_activations", tmp_path / "a.png", "--plot_layer", "6"), ("--plot_layer 6", "0, 1, 2, 3, 4, 5")),
    ):
        process = run_script(DYNAMIC_SCRIPT, model, *TEXT, *flags, "--output", tmp_path / "o.json")
        assert_one_line_error(process, *words)
        assert process.stdout == "" and not (tmp_path / "o.json").exists()


def test_a_full_disk_is_one_line_and_leaves_the_old_report(tmp_path):
    """A file may have 3000 bytes, which the tables do not reach; then stdout has no room at all."""
    out, old = tmp_path / "o.json", b"old"
    body = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))"
    commands = {"--output": SWEEP, "--plot": SWEEP, "--quantizer_path": (*FIT, "--abits", "3")}
    for flag, command in commands.items():
        path = out.with_suffix(".png") if flag == "--plot" else out
        path.write_bytes(old)
        process = run_script(driver(tmp_path, body), *command, flag, path, "--overwrite")
        full = rf"kvquant_\w+\.py: error: .*{path.name}' could not be written .File too large.: what stood there .*\n"
        assert process.returncode == 1 and re.fullmatch(full, process.stderr)
        assert path.read_bytes() == old and not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
        assert ("Δppl" in process.stdout and "keys: 3, 2-bit uniform" in process.stdout) == (command is SWEEP)
    process = run_script(driver(tmp_path, "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)"), *SWEEP)
    assert (process.returncode, process.stderr) == (1, "kvquant_simquant_ppl_eval.py: error: No space left on device\n")


def test_a_closed_stdout_costs_no_figure_and_out_of_memory_is_one_line(tmp_path, whole):
    assert run_script(driver(tmp_path, "sys.stdout = None"), *SWEEP, "--output", tmp_path / "o.json").returncode == 0
    assert figures(tmp_path / "o.json") == figures(whole)
    body = "from simquant import calibration\ndef fail(*args):\n    raise MemoryError\ncalibration.record = fail"
    assert_one_line_error(run_script(driver(tmp_path, body), *FIT, "--quantizer_path", tmp_path / "q"), "out of memory")


def test_libraries_that_warn_are_not_heard_nor_obeyed(tmp_path):
    """A user's own PYTHONWARNINGS, and keys and values that are the same everywhere."""
    weights = load_file((model := nano_copy(tmp_path / "constant")) / "model.safetensors")
    for name in (name for name in weights if re.search("[kv]_proj", name)):
        weights[name].zero_()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    flags = (
        "--abits",
        "16,3",
        "--include_sparse",
        "--plot",
        tmp_path / "a.png",
        "--plot_activations",
        tmp_path / "b.png",
    )
    process = run_script(DYNAMIC_SCRIPT, model, *TEXT, *flags, env={"PYTHONWARNINGS": "error"})
    assert (process.returncode, process.stderr) == (0, "") and "+0.0000" in process.stdout


TIMER = """
import signal, threading
sys.argv = [each.replace("NUMBER", os.environ["NUMBER"]) for each in sys.argv]
if "SIGNAL" in os.environ:
    timer = threading.Timer(float(os.environ["DELAY"]), os.kill, (os.getpid(), getattr(signal, os.environ["SIGNAL"])))
    timer.daemon = True
    timer.start()
"""
SIGNALS = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}


def assert_tidy(process, name):
    """Assert what a process says that a signal of that name may have ended."""
    said = dict.fromkeys(SIGNALS.values(), r"kvquant_\w+\.py: interrupted.*\n")
    ended = {0, SIGNALS[name], -getattr(signal, name)}  # the last, before there is a handler: a shell shows the same
    assert process.returncode in ended, (process.returncode, process.stderr)
    assert re.fullmatch(said.get(process.returncode, ""), process.stderr), process.stderr


@pytest.mark.parametrize("kind", ["data-free", "calibrated", "calibration"])
def test_whenever_a_signal_arrives_files_are_whole_or_as_before_and_a_run_goes_on(kind, calibrated, tmp_path):
    texts = ("--datasets", f"{SAMPLE},{tmp_path}/b.txt", "--limit", "6")
    command, output, ending = (*SWEEP, *texts), "--output", "json"
    shutil.copy(SAMPLE, tmp_path / "b.txt")
    if kind == "calibrated":
        command = (CALIBRATED_SCRIPT, NANO, *TEXT, "--baseline", "--quantizer_path", calibrated[0])
    elif kind == "calibration":
        command, output, ending = (*FIT, "--abits", "2"), "--quantizer_path", "pkl"
    timed, start = (driver(tmp_path, TIMER), *command, output, tmp_path / f"NUMBER.{ending}"), time.monotonic()
    assert conftest.run_together([{"NUMBER": "whole"}], *timed)[0].returncode == 0
    took, whole = time.monotonic() - start, tmp_path / f"whole.{ending}"
    delays = [random.uniform(i + 0.1, i + 1) / 6 * took for i in range(6)]
    each = [{"NUMBER": str(i), "SIGNAL": [*SIGNALS][i % 3], "DELAY": str(delay)} for i, delay in enumerate(delays)]
    files = [tmp_path / f"{i}.{ending}" for i in range(6)]
    for path in files if ending == "pkl" else []:
        path.write_bytes(b"PK, old")
    for first in (0, 2, 4):
        for process, environment in zip(conftest.run_together(each[first:][:2], *timed), each[first:], strict=False):
            assert_tidy(process, environment["SIGNAL"])
    assert {*tmp_path.iterdir()} <= {tmp_path / "b.txt", tmp_path / "driver.py", whole, *files}
    for path in files if ending == "pkl" else []:
        assert path.read_bytes() in (b"PK, old", whole.read_bytes())
    for path in sorted(tmp_path.glob("?.json")):
        if json.loads(path.read_text())["complete"] is False:
            process = run_script(*command, "--output", path, "--resume")
            assert process.returncode == 0 and process.stderr == ""
        assert figures(path) == figures(whole)


def test_a_signal_while_the_libraries_load_is_no_traceback(tmp_path):
    """In processes that start from nothing."""
    running = []
    for name, delay in ((name, delay) for name in ("SIGINT", "SIGTERM") for delay in (1, 2.5)):
        command = [sys.executable, *map(str, SWEEP), "--output", str(tmp_path / "o.json")]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd="/")
        threading.Timer(delay, process.send_signal, (getattr(signal, name),)).start()
        running.append((name, process))
    for name, process in running:
        complaint = process.communicate(timeout=100)[1]
        assert_tidy(subprocess.CompletedProcess([], process.returncode, "", complaint), name)


def test_a_signal_when_all_is_done_is_no_traceback(tmp_path):
    body = (
        "import signal\nwhole = runpy.run_path\ndef then_signal(*args, **how):\n"
        "    try:\n        whole(*args, **how)\n    finally:\n        os.kill(os.getpid(), signal.SIGINT)\n"
        "runpy.run_path = then_signal"
    )
    process = run_script(driver(tmp_path, body), *SWEEP)
    assert process.returncode in (0, -2) and process.stderr == "" and "Δppl" in process.stdout


def launch(count, script, *args):
    """Return the finished processes that `accelerate launch --num_processes count` would start, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "OMP_NUM_THREADS": "1"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return conftest.run_together(
        [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)], script, *args
    )


def assert_same_figures(path, expected):
    """Assert that a report is complete and has the figures of another, but for the last digits."""
    assert json.loads(path.read_text())["complete"] is True
    for row, other in zip(figures(path), figures(expected), strict=True):
        for name, figure in row.items():
            is_figure = isinstance(figure, (float, list)) and other[name] is not None and name != "window_kl_sketch"
            assert figure == (pytest.approx(other[name], rel=1e-6, abs=1e-9) if is_figure else other[name]), name


def test_three_processes_give_what_one_gives_round_by_round_and_the_first_alone_speaks(tmp_path, whole):
    """In rounds of three windows each, the 12 are a whole round and a third of one."""
    script = driver(tmp_path, "from simquant import measuring\nmeasuring.ROUND = 3")
    first, *others = launch(3, script, *SWEEP, "--output", tmp_path / "o.json")
    assert first.returncode == 0 and first.stderr == "" and first.stdout.count("Δppl%") == 1
    assert all((each.returncode, each.stdout, each.stderr) == (0, "", "") for each in others)
    assert_same_figures(tmp_path / "o.json", whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["driver.py", "o.json"]


def test_processes_that_are_terminated_save_what_they_exchanged_and_both_go_on(tmp_path, whole):
    body = (
        "import signal\nfrom simquant import measuring\nmeasuring.ROUND, start, calls = 2, qu.start_batch, []\n"
        "def interrupted(*args):\n    calls.append(None)\n"
        "    if len(calls) == 4: os.kill(os.getpid(), signal.SIGTERM)\n    return start(*args)\n"
        "qu.start_batch = interrupted"
    )
    first, second = launch(2, driver(tmp_path, body), *SWEEP, "--output", tmp_path / "o.json")
    assert (first.returncode, second.returncode) == (143, 143)
    assert f"interrupted; {tmp_path}/o.json has 4 of 12 windows" in first.stderr
    resumed = launch(2, *SWEEP, "--output", tmp_path / "o.json", "--resume")
    assert [process.returncode for process in resumed] == [0, 0]
    assert_same_figures(tmp_path / "o.json", whole)


def test_an_error_of_one_process_is_said_by_it_and_ends_the_other(tmp_path):
    body = (
        "start = qu.start_batch\ndef fail(*args):\n"
        "    if os.environ['RANK'] == '1': raise qu.UserError('out of luck')\n    return start(*args)\n"
        "qu.start_batch = fail"
    )
    first, second = launch(2, driver(tmp_path, body), *SWEEP)
    assert (first.returncode, second.returncode) == (2, 2)
    assert second.stderr == "kvquant_simquant_ppl_eval.py: process 1: error: out of luck\n"
    assert_one_line_error(first, "2 processes do not reach each other", "another has ended and says why")


def test_a_mistyped_flag_is_said_once_and_a_stray_rank_means_nothing():
    first, second = launch(2, DYNAMIC_SCRIPT, NANO, "--abbits", "3")
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stderr.count("\n") == 1 and second.stderr == ""
    (process,) = conftest.run_together([{"RANK": "1", "WORLD_SIZE": ""}], *SWEEP, "--limit", "1")
    assert process.returncode == 0 and process.stdout.count("Δppl%") == 1
    (process,) = conftest.run_together(
        [{"WORLD_SIZE": "2", "MASTER_PORT": "x", "RANK": "0", "LOCAL_RANK": "0"}], *SWEEP
    )
    assert_one_line_error(process, "2 processes do not reach each other", "accelerate launch")


def test_calibration_by_several_processes_writes_what_one_writes(tmp_path, calibrated):
    first, second = launch(2, *FIT, "--abits", "4,2", "--quantizer_path", tmp_path / "two.pkl")
    assert (first.returncode, second.returncode, second.stdout, second.stderr) == (0, 0, "", ""), first.stderr
    assert first.stdout.splitlines()[:25] == calibrated[1].stdout.splitlines()[:25]
    one, two = (quantizer_file.load(str(path)) for path in (calibrated[0], tmp_path / "two.pkl"))
    assert one["settings"] == two["settings"] and list(one["quantizers"]) == list(two["quantizers"])
    for name, bits in ((name, bits) for name in one["quantizers"] for bits in (4, 2)):
        ours, theirs = (vars(each["quantizers"][name][bits]) for each in (one, two))
        for field in ("lo", "hi", "codebook"):
            assert ours[field] is theirs[field] or torch.allclose(ours[field], theirs[field], atol=1e-6)


def test_transform_coding_by_two_processes_and_resumed_gives_what_one_gives_in_one_go(tmp_path):
    fit = (*FIT[: FIT.index("--nuq")], "--klt", "--predict", "--abits", "1.5,2/0.5", "--quantizer_path")
    (alone,), (first, second) = (launch(count, *fit, tmp_path / f"{count}.pkl") for count in (1, 2))
    assert (alone.returncode, first.returncode, second.returncode) == (0, 0, 0), first.stderr
    few = "warning: 192 calibration tokens are few: a transform of 128 channels wants at least 512; raise --nsamples\n"
    assert (
        alone.stderr == few and second.stderr == "" and alone.stdout.splitlines()[:25] == first.stdout.splitlines()[:25]
    )
    one, two = (quantizer_file.load(str(tmp_path / f"{count}.pkl"))["quantizers"] for count in (1, 2))
    assert {width for widths in one.values() for width in widths} == {1.5, "2/0.5"}
    for name, width in ((name, width) for name, widths in one.items() for width in widths):
        ours, theirs = (vars(each[name][width]) for each in (one, two))
        assert all(torch.equal(ours[n], theirs[n]) for n in ours if isinstance(ours[n], torch.Tensor))
    evaluate = (CALIBRATED_SCRIPT, NANO, *TEXT, "--quantizer_path", tmp_path / "1.pkl", "--baseline", "--output")
    assert run_script(*evaluate, tmp_path / "whole.json").returncode == 0
    assert launch(2, *evaluate, tmp_path / "two.json")[0].returncode == 0
    assert_same_figures(tmp_path / "two.json", tmp_path / "whole.json")
    stopping = driver(tmp_path, STOPPING)
    assert run_script(stopping, *evaluate, tmp_path / "rest.json").returncode != 0
    assert json.loads((tmp_path / "rest.json").read_text())["complete"] is False
    assert run_script(*evaluate, tmp_path / "rest.json", "--resume").returncode == 0
    assert [figures(tmp_path / "rest.json")] == [figures(tmp_path / "whole.json")]


STOPPING = """
from simquant import measuring
whole = measuring.measure
def measure(*args):
    for number, _ in enumerate(whole(*args)):
        yield
        if number == 4:
            raise OSError("the disk is gone")
measuring.measure = measure
"""


def digits(folder):
    """Yield what a calibration prints and saves, and the JSON of an evaluation by each script without the seconds."""
    path, out = folder / "q.pkl", folder / "o.json"
    yield run_script(*FIT, "--abits", "3", "--quantizer_path", path).stdout
    yield path.read_bytes()
    for command in (SWEEP, (CALIBRATED_SCRIPT, NANO, *TEXT, "--baseline", "--quantizer_path", path)):
        assert run_script(*command, "--output", out).returncode == 0
        yield re.sub(r'"seconds": [\d.e-]+', "", out.read_text())


def test_two_interpreters_give_the_same_digits(tmp_path):
    """They hash strings differently."""
    server, env = conftest.ROOT / "tests" / "fork_server.py", {**os.environ, "PYTHONHASHSEED": "12345"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": "/"}
    known = list(digits(tmp_path))
    with subprocess.Popen([sys.executable, str(server)], env=env, **pipes) as other:
        with mock.patch.object(conftest, "fork_server", lambda: other):
            assert len(known) == 4 and list(digits(tmp_path)) == known
        other.stdin.close()
