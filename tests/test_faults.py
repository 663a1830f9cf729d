"""Whatever is given to the scripts, and whatever fails around them: a clear line, and no file lost or half written."""

import ast
import contextlib
import errno
import fcntl
import gc
import importlib.util
import io
import json
import math
import os
import pickle
import pickletools
import pty
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tracemalloc
import zipfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import (
    CALIBRATED_SCRIPT,
    DYNAMIC_SCRIPT,
    NANO,
    ROOT,
    SAMPLE,
    driver,
    fork_server,
    run_script,
    run_together,
)
from hypothesis import HealthCheck, Phase, assume, event, example, given, settings
from hypothesis import strategies as st

import quant_utils as qu


@contextlib.contextmanager
def handlers_kept():
    """The scripts take over SIGINT and SIGTERM; pytest gets them back."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


with handlers_kept():
    import kvquant_llama3_simquant as calibrated_script
    import kvquant_simquant_ppl_eval as dynamic_script

FUZZ = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a failing example is small, and slow to make smaller
    max_examples=40,
)
SMALL = ("--datasets", "t.txt", "--seqlen", "32", "--limit", "2", "--quiet")
CALIBRATION = ("--calibrate", "--calib_dataset", "t.txt", "--nsamples", "2", "--seqlen", "32")
NUQ = ("--abits", "3", "--nuq", "--fisher", "--include_sparse")
SHARED = ROOT.parent / "shared"


@pytest.fixture
def answer(model, config_and_tokenizer, monkeypatch, tmp_path):
    """A function: (exit status, stdout, stderr) of a script's main, in this process, on the model that is loaded.

    It runs in a folder that has a short text, t.txt. An exception that would be a traceback goes through.
    """
    whole = qu.load_config_and_tokenizer
    monkeypatch.setattr(qu, "load_model", lambda spec, config: model)
    monkeypatch.setattr(
        qu, "load_config_and_tokenizer", lambda name: config_and_tokenizer if name == str(NANO) else whole(name)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.txt").write_text(SAMPLE.read_text(encoding="utf-8")[:400], encoding="utf-8")

    def run(script, *args):
        with contextlib.ExitStack() as stack:
            stack.enter_context(handlers_kept())
            streams = [
                stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", errors="backslashreplace"))
                for _ in range(2)
            ]
            argv = [script.__file__, *map(str, args)]
            stack.enter_context(mock.patch.multiple(sys, argv=argv, stdout=streams[0], stderr=streams[1]))
            try:
                status = qu.exit_status(script.main)
            except SystemExit as stop:  # argparse
                status = stop.code
            for stream in streams:
                stream.seek(0)
            return status, *(stream.read() for stream in streams)

    return run


def contents(folder):
    """{name: content} of every file in it."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def assert_success_or_one_line(status, stderr):
    """Exit status 0, or 2 with one printable line besides warnings."""
    lines = [line for line in stderr.split("\n")[:-1] if not line.startswith("warning: ")]
    assert (status, len(lines)) in ((0, 0), (2, 1)), (status, stderr)
    assert all(line.isprintable() for line in stderr.split("\n")), stderr
    assert status == 0 or re.match(r"kvquant_\w+\.py: error: ", lines[0])


# -- flags

HUGE = 10**400
names = st.text(st.characters(exclude_characters="/\0", exclude_categories=()), max_size=8) | st.just("a" * 300)
counts = st.integers(-3, 40) | st.sampled_from([HUGE, -HUGE, 10**18, 2**63, "", "x", "1.5", "nan", "0x10", "٣"])
numbers = st.floats() | st.floats(0, 1) | st.sampled_from(["", "x", "1e999", "-0.0", "1e-320"])
projections = st.lists(
    st.sampled_from(["k_proj", "v_proj", "q_proj", '["k_proj"]', "[]", "[1]", "["]) | names, max_size=2
)
FLAGS = {
    "--abits": st.sampled_from(["2", "3", "16", "3,2", "16,3", "2,2", ",", "16,"]) | names,
    "--perchannel": projections,
    "--pertoken": projections,
    **dict.fromkeys(("--sparsity_threshold",), numbers),
    **dict.fromkeys(("--seqlen", "--limit", "--batch_size", "--first_few_fp16", "--report_context"), counts),
    "--dtype": st.sampled_from(["auto", "bfloat16", "int8"]) | names,
    "--device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1", "cuda:128", f"cuda:{HUGE}", "cuda:-1"]) | names,
    "--attn_implementation": st.sampled_from(["sdpa", "eager", "flash_attention_2"]) | names,
    "--datasets": names.map("{}.txt".format) | names | st.just("t.txt,t.txt"),
    "--output": st.sampled_from(["o.json", "o.csv", "t.txt", ".", "no/o.json", ""]) | names,
    "--plot_layer": counts,
    **dict.fromkeys(("--include_sparse", "--nf", "--baseline", "--attribution", "--resume"), st.none()),
}
CALIBRATION_FLAGS = FLAGS | {
    "--cap_outliers": numbers,
    **dict.fromkeys(("--nsamples", "--seed"), st.integers(-2, 3) | st.sampled_from([HUGE, 10**18, "x"])),
    "--calib_dataset": names.map("{}.txt".format) | names,
    "--fisher_weighting": st.sampled_from(["paper", "code"]) | names,
    "--export_kvquant": st.sampled_from(["e.pkl", "q.pkl", "t.txt", ""]) | names,
    **dict.fromkeys(("--nuq", "--fisher", "--norm", "--clamp"), st.none()),
}


def some_flags(flags):
    """Command lines of up to four of flags."""
    each = st.sampled_from(sorted(flags)).flatmap(lambda flag: st.tuples(st.just(flag), flags[flag]))
    return st.lists(each, max_size=4).map(
        lambda chosen: [
            str(word)
            for flag, value in chosen
            for word in (flag, *(value if isinstance(value, list) else () if value is None else (value,)))
        ]
    )


@FUZZ
@given(some_flags(FLAGS))
def test_any_flags_of_the_dynamic_script_give_figures_or_one_line(answer, tmp_path, flags):
    for file in tmp_path.iterdir():
        if file.name != "t.txt":
            file.unlink()
    before = contents(tmp_path)
    status, stdout, stderr = answer(dynamic_script, NANO, *SMALL, "--include_sparse", *flags)
    assert_success_or_one_line(status, stderr)
    event(f"status {status}")
    after = contents(tmp_path)
    assert after["t.txt"] == before["t.txt"] and not any(name.endswith(".partial") for name in after)
    if status == 0:
        assert not re.search(r"\b(nan|inf)\b", stdout) and len(stdout.splitlines()) > 2
    else:
        assert after == before


@FUZZ
@given(some_flags(CALIBRATION_FLAGS), st.booleans())
def test_any_flags_of_the_calibrated_script_give_figures_or_one_line(answer, tmp_path, flags, is_calibration):
    for file in tmp_path.iterdir():
        if file.name not in ("t.txt", "q.pkl"):
            file.unlink()
    if not (tmp_path / "q.pkl").exists():
        assert answer(calibrated_script, NANO, *CALIBRATION, "--quantizer_path", "q.pkl")[0] == 0
    before = contents(tmp_path)
    base = CALIBRATION if is_calibration else SMALL
    path = "new.pkl" if is_calibration else "q.pkl"
    status, stdout, stderr = answer(calibrated_script, NANO, *base, *flags, "--quantizer_path", path)
    assert_success_or_one_line(status, stderr)
    event(f"status {status}")
    after = contents(tmp_path)
    assert after.items() >= before.items() and not any(name.endswith(".partial") for name in after)
    if status == 0:
        assert len(stdout.splitlines()) > 2
        assert not is_calibration or qu.load_calibration("new.pkl")["format"] == qu.FILE_FORMAT
    else:
        assert after == before


@pytest.mark.parametrize(
    "args",
    [
        ("--device", "cuda:128"),  # torch keeps an index in 8 bits
        ("--device", "cuda:99999999999"),
        ("--device", f"cuda:{HUGE}"),
        ("--datasets", "a" * 300 + ".txt"),
        ("--unknown\x1b[31m",),
    ],
    ids=["device 128", "device beyond 32 bits", "device beyond 64 bits", "long file name", "control character"],
)
def test_a_mistake_in_a_flag_of_the_dynamic_script(answer, args):
    status, _, stderr = answer(dynamic_script, NANO, *SMALL, *args)
    assert status == 2
    assert_success_or_one_line(status, stderr)


@pytest.mark.parametrize(
    "args",
    [
        (*CALIBRATION, "--quantizer_path", "q.pkl", "--nsamples", HUGE),
        ("--quantizer_path", "a" * 300),
        (*CALIBRATION, "--quantizer_path", "q.pkl", "--calib_dataset", "a" * 300 + ".txt"),
    ],
    ids=["nsamples", "long quantizer file name", "long text file name"],
)
def test_a_mistake_in_a_flag_of_the_calibrated_script(answer, args):
    status, _, stderr = answer(calibrated_script, NANO, *args)
    assert status == 2
    assert_success_or_one_line(status, stderr)


@pytest.mark.parametrize(
    "name", ["", ".", "/", "a b", "loop", "t.txt", "a" * 300, "/" + "a" * 300, "\x1b[31m", "中/文/x"]
)
def test_a_model_that_is_none(answer, tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    name = str(tmp_path / "loop") if name == "loop" else name
    for script, flags in ((dynamic_script, SMALL), (calibrated_script, (*CALIBRATION, "--quantizer_path", "q.pkl"))):
        status, _, stderr = answer(script, name, *flags)
        assert status == 2
        assert_success_or_one_line(status, stderr)
    assert sorted(contents(tmp_path)) == ["t.txt"]


# -- texts


def text_or_one_line(path, content):
    """read_text_file gives strings or a UserError of a line that names the file, and leaves the file as it was."""
    path.write_bytes(content)
    before = set(path.parent.iterdir())
    try:
        texts = qu.read_text_file(str(path))
    except qu.UserError as error:
        assert path.name in str(error)
    else:
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)
    assert path.read_bytes() == content and set(path.parent.iterdir()) == before


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(HUGE),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.just("text"), inner, max_size=3)
    ),
    max_leaves=6,
)
json_lines = st.lists((st.dictionaries(st.just("text"), json_values) | json_values).map(json.dumps), max_size=3)


@settings(FUZZ, max_examples=100)
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode), json_lines, st.sampled_from(["t.txt", "T.JSONL"]))
@example(b"\xef\xbb\xbf\xef\xbb\xbf\x00\r\r\n", [], "t.txt")
@example(b'{"text": "\\ud800"}', [], "t.jsonl")
@example(b'{"text": ' + b"9" * 5000 + b"}", [], "t.jsonl")
def test_any_bytes_are_a_text_or_one_line(tmp_path, content, lines, name):
    text_or_one_line(tmp_path / name, content)
    text_or_one_line(tmp_path / name, "\n".join(lines).encode())


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """The bytes of a sound one."""
    from datasets import Dataset

    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    Dataset.from_dict({"text": ["first", "second " * 20, ""]}).to_parquet(str(path))
    return path.read_bytes()


@settings(FUZZ, max_examples=25)
@given(st.binary(max_size=60), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3))
def test_any_parquet_is_a_text_or_one_line(parquet, tmp_path_factory, content, edits):
    folder = tmp_path_factory.mktemp("parquet")
    edited = bytearray(parquet)
    for place, value in edits:
        edited[int(place * len(edited))] = value
    text_or_one_line(folder / "a.parquet", bytes(edited) if edits else b"PAR1" + content + b"PAR1")


@pytest.mark.parametrize("kind", ["Image", "Audio", "no Unicode"])
def test_a_parquet_whose_columns_cannot_be_decoded(tmp_path, kind):
    """Only its text is wanted; the library would also decode the pictures and sounds beside it."""
    import pyarrow as pa
    from pyarrow import parquet

    if kind == "no Unicode":
        table = pa.table({"text": pa.array([b"caf\xe9"], type=pa.binary()).view(pa.string())})
    else:
        inner = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        table = pa.table({"text": ["fine"], "other": pa.array([{"bytes": b"?", "path": None}], type=inner)})
        features = {"text": {"dtype": "string", "_type": "Value"}, "other": {"_type": kind}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(table, tmp_path / "a.parquet")
    text_or_one_line(tmp_path / "a.parquet", (tmp_path / "a.parquet").read_bytes())


# -- the JSON that --resume reads


@pytest.fixture
def report(answer, tmp_path):
    """The JSON of a run with a baseline."""
    assert answer(dynamic_script, NANO, *SMALL, "--abits", "16,3", "--output", "o.json")[0] == 0
    return (tmp_path / "o.json").read_bytes()


def changed(value, data):
    """value with one part of it, wherever it lies, replaced, added or taken away."""
    value = json.loads(json.dumps(value))
    place, parts = value, []
    while isinstance(place, (dict, list)) and place and (not parts or data.draw(st.integers(0, 3))):
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        parts.append((place, key))
        place = place[key]
    parent, key = parts[-1]
    action = data.draw(st.sampled_from(["replace", "replace", "remove", "add"]))
    if action == "replace":
        close = st.sampled_from([0, -1, 1e308, math.nan, 10**400, "1e999", [], {}, [[]], None, True, ""])
        parent[key] = data.draw(json_values | close)
    elif action == "remove":
        del parent[key]
    elif isinstance(parent, list):
        parent.append(data.draw(json_values | st.just(parent[key])))
    else:
        parent[data.draw(st.text(max_size=5))] = data.draw(json_values)
    return value


@settings(FUZZ, max_examples=80)
@given(st.data(), st.binary(max_size=40))
def test_resume_of_any_json_goes_on_or_is_one_line(answer, report, tmp_path, data, content):
    kind = data.draw(st.sampled_from(["changed", "changed", "changed", "cut", "bytes"]))
    if kind == "changed":
        content = json.dumps(changed(json.loads(report), data)).encode()
    elif kind == "cut":
        content = report[: data.draw(st.integers(0, len(report) - 3))] + content
    (tmp_path / "o.json").write_bytes(content)
    before = contents(tmp_path)
    status, _, stderr = answer(dynamic_script, NANO, *SMALL, "--abits", "16,3", "--output", "o.json", "--resume")
    assert_success_or_one_line(status, stderr)
    event(f"status {status}")
    after = contents(tmp_path)
    if status == 2:
        assert after == before
    else:
        assert set(after) == set(before)
        resumed = json.loads(after["o.json"], parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
        assert resumed["complete"] is True and [row["windows"] for row in resumed["results"]] == [2, 2]


# -- quantizer files


@pytest.fixture
def saved(answer, tmp_path):
    """The path of a quantizer file, with one in KVQuant's own format beside it."""
    flags = (*CALIBRATION, *NUQ, "--norm", "--quantizer_path", "q.pkl", "--export_kvquant", "e.pkl")
    assert answer(calibrated_script, NANO, *flags)[0] == 0
    return tmp_path / "q.pkl"


odd_values = json_values | st.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(8),
        torch.zeros(2, 2),
        torch.tensor(math.nan),
        math.inf,
        -1.0,
        10**400,
        "k_proj",
        (),
        b"",
    ]
)


@settings(FUZZ, max_examples=60)
@given(st.data())
def test_a_file_with_anything_in_place_of_a_part_is_evaluated_or_one_line(answer, saved, tmp_path, data):
    stored = torch.load(saved, weights_only=True)
    place, parts = stored, []
    while isinstance(place, (dict, list)) and place and (not parts or data.draw(st.integers(0, 4))):
        key = data.draw(st.sampled_from(sorted(place, key=str) if isinstance(place, dict) else range(len(place))))
        parts.append((place, key))
        place = place[key]
    parent, key = parts[-1]
    if data.draw(st.booleans()):
        parent[key] = data.draw(odd_values)
    else:
        del parent[key]
    torch.save(stored, tmp_path / "odd.pkl")
    before = contents(tmp_path)
    status, _, stderr = answer(calibrated_script, NANO, *SMALL, "--limit", "1", "--quantizer_path", "odd.pkl")
    assert_success_or_one_line(status, stderr)
    event(f"status {status}")
    assert contents(tmp_path) == before


def zipped(members):
    """The bytes of an archive of {name: content}."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, each in members.items():
            archive.writestr(name, each)
    return content.getvalue()


archives = st.dictionaries(
    st.sampled_from(["a/data.pkl", "a/version", "a/byteorder", "a/data/0", "constants.pkl", "a/code/x.py", "../x"]),
    st.binary(max_size=30) | st.sampled_from([pickle.dumps({}), pickle.dumps({"format": qu.FILE_FORMAT}, 2), b"3\n"]),
).map(zipped)
pickles = st.lists(st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes]) | st.binary(max_size=6))
loose = st.binary(max_size=80) | pickles.map(lambda ops: b"\x80\x04" + b"".join(ops))


@settings(FUZZ, max_examples=200)
@given(archives | loose.map(lambda content: content.translate(bytes.maketrans(b"pr", b"qq"))))  # see the next test
def test_any_bytes_are_no_quantizer_file(tmp_path, content):
    path = tmp_path / "q.pkl"
    path.write_bytes(content)
    with contextlib.suppress(qu.UserError):  # an empty dictionary is one of KVQuant's, of no projection
        assert qu.load_calibration(str(path))["quantizers"] == {}
    assert contents(tmp_path) == {"q.pkl": content}


@pytest.mark.parametrize("opcode", [b"r" + (2**24).to_bytes(4, "little"), b"p16777216\n"], ids=["LONG_BINPUT", "PUT"])
def test_a_few_bytes_take_no_memory(tmp_path, opcode):
    """Python's reader makes room for as many objects as a number in the file says; 2**31 of them are 32 GiB."""
    (tmp_path / "q.pkl").write_bytes(b"\x80\x02}" + opcode + b".")
    tracemalloc.start()
    try:
        with contextlib.suppress(qu.UserError):
            qu.load_calibration(str(tmp_path / "q.pkl"))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()


CALLS = [
    ("os", "mkdir", "{}"),
    ("posix", "mkdir", "{}"),
    ("builtins", "eval", "__import__('os').mkdir({!r})"),
    ("builtins", "exec", "import os; os.mkdir({!r})"),
    ("torch.jit", "os.mkdir", "{}"),
    ("numpy", "_core.multiarray.sys.modules", "{}"),
]


@settings(FUZZ, max_examples=50)
@given(st.data(), st.sampled_from(CALLS), st.sampled_from(["ours", "published", "storage"]), st.booleans())
def test_a_call_anywhere_inside_a_file_is_refused_and_not_made(saved, tmp_path, data, call, kind, is_global):
    """A call whose result is dropped at once, between two opcodes of a sound file."""
    module, name, argument = call
    argument = argument.format(str(tmp_path / "executed"))
    assume(is_global or name.isidentifier())
    whole = saved.read_bytes() if kind == "ours" else pickle.dumps(pickle.loads((tmp_path / "e.pkl").read_bytes()), 2)
    if kind == "ours":
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            members = {each: archive.read(each) for each in archive.namelist()}
        stem = next(each for each in members if each.endswith("data.pkl"))
    sound = members[stem] if kind == "ours" else whole
    if kind == "storage":  # a tensor's storage is a pickle in the pickle
        sound = pickle.dumps({"a": 1}, 2)
    places = [place for _, _, place in pickletools.genops(sound)][1:]
    place = data.draw(st.sampled_from(places))
    if is_global:
        lookup = f"c{module}\n{name}\n".encode()
    else:  # STACK_GLOBAL
        lookup = b"".join(b"X" + len(x).to_bytes(4, "little") + x.encode() for x in (module, name)) + b"\x93"
    attack = lookup + b"X" + len(argument.encode()).to_bytes(4, "little") + argument.encode() + b"\x85R0"
    content = sound[:place] + attack + sound[place:]
    if kind == "ours":
        content = zipped(members | {stem: content})
    elif kind == "storage":
        content = b"\x80\x02ctorch.storage\n_load_from_bytes\n" + pickle.dumps(content, 2)[2:-1] + b"\x85R."
    path = tmp_path / "attack.pkl"
    path.write_bytes(content)
    with pytest.raises(qu.UserError, match=r"attack.pkl"):
        qu.load_calibration(str(path))
    assert not (tmp_path / "executed").exists()


def test_the_call_of_the_test_above_is_one_that_pickle_would_make(tmp_path):
    target = str(tmp_path / "executed")
    attack = b"cos\nmkdir\nX" + len(target).to_bytes(4, "little") + target.encode() + b"\x85R0"
    assert pickle.loads(b"\x80\x02" + attack + pickle.dumps({"a": 1}, 2)[2:]) == {"a": 1}
    assert Path(target).is_dir()


# -- signals


def figures(report):
    """All of results but the seconds."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in report["results"]]


TEXT = ("--datasets", SAMPLE, "--seqlen", "64", "--limit", "12")
EVALUATIONS = {
    "dynamic": (DYNAMIC_SCRIPT, NANO, *TEXT, "--abits", "16,3,2", "--include_sparse"),
    "calibrated": (CALIBRATED_SCRIPT, NANO, *TEXT, "--baseline"),
}
TIMER = """
import signal, threading
sys.argv = [each.replace("NUMBER", os.environ["NUMBER"]) for each in sys.argv]
if "SIGNAL" in os.environ:
    number = getattr(signal, os.environ["SIGNAL"])
    timer = threading.Timer(float(os.environ["DELAY"]), os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
"""


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    """The path of a quantizer file, NUQ with 1 % outliers."""
    path = tmp_path_factory.mktemp("calibration") / "q.pkl"
    flags = ("--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "2", "--seqlen", "64", *NUQ)
    assert run_script(CALIBRATED_SCRIPT, NANO, *flags, "--quantizer_path", path).returncode == 0
    return path


def evaluation(name, calibration):
    """The command line of one of EVALUATIONS."""
    return (*EVALUATIONS[name], *(("--quantizer_path", calibration) if name == "calibrated" else ()))


def assert_tidy(process, name):
    """What a process that a signal may have ended says."""
    said = {0: "", 130: r"kvquant_\w+\.py: interrupted.*\n", 143: r"kvquant_\w+\.py: interrupted.*\n"}
    statuses = {"SIGINT": 130, "SIGTERM": 143}
    ended = {0, statuses[name], -getattr(signal, name)}  # before there is a handler: a shell shows the same
    assert process.returncode in ended, (process.returncode, process.stderr)
    assert re.fullmatch(said.get(process.returncode, ""), process.stderr), process.stderr


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("error", "status"),
    [(None, 0), (qu.UserError("mistake"), 2), (OSError(errno.ENOSPC, "full"), 1), (BrokenPipeError(), 141)],
)
def test_a_signal_before_any_line_of_exit_status_is_no_traceback(error, status, signum):
    """Also just before the script's own part begins, just after it has ended, and while its error is being said."""

    def main():
        if error is not None:
            raise error

    def run(number):
        """(which line it was, the exit status, stderr) of a run with a signal before that many lines."""
        lines = []

        def at_line(frame, kind, _):
            if kind == "line":
                lines.append(frame.f_lineno)
                if len(lines) == number:
                    os.kill(os.getpid(), signum)
            return at_line

        before = sys.gettrace()
        with handlers_kept(), tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            for each in (signal.SIGINT, signal.SIGTERM):
                signal.signal(each, signal.SIG_IGN)
            with mock.patch.multiple(sys, stdout=out, stderr=err, argv=["kvquant_x.py"]):
                sys.settrace(lambda frame, *_: at_line if frame.f_code is qu.exit_status.__code__ else None)
                try:
                    given = qu.exit_status(main)
                except BaseException as stop:
                    given = repr(stop)
                finally:
                    sys.settrace(before)
            err.seek(0)
            return (lines[number - 1] if len(lines) >= number else None), given, err.read()

    number = 1
    while (answer := run(number))[0] is not None:
        assert answer[1] in (status, 130 if signum == signal.SIGINT else 143), answer
        assert answer[2].count("\n") <= 1
        number += 1
    assert number > 10


@pytest.mark.parametrize("name", EVALUATIONS)
def test_whenever_a_signal_arrives_the_json_is_whole_or_absent_and_goes_on(name, calibration, tmp_path):
    command = evaluation(name, calibration)
    timed = (driver(tmp_path, TIMER), *command, "--output", tmp_path / "NUMBER.json")
    start = time.monotonic()
    (whole,) = run_together([{"NUMBER": "whole"}], *timed)
    took = time.monotonic() - start
    assert whole.returncode == 0, whole.stderr
    known = figures(json.loads((tmp_path / "whole.json").read_text()))
    signals = [("SIGINT", "SIGTERM")[i % 2] for i in range(6)]
    delays = [(i + random.random()) / len(signals) * took for i in range(len(signals))]
    for first in range(0, len(signals), 2):
        each = [{"NUMBER": str(i), "SIGNAL": signals[i], "DELAY": str(delays[i])} for i in range(first, first + 2)]
        for process, environment in zip(run_together(each, *timed), each, strict=True):
            assert_tidy(process, environment["SIGNAL"])
    files = {file.name for file in tmp_path.iterdir()}
    assert files <= {"driver.py", "whole.json", *(f"{i}.json" for i in range(len(signals)))}
    left = [tmp_path / f"{i}.json" for i in range(len(signals)) if (tmp_path / f"{i}.json").exists()]
    partial = [path for path in left if json.loads(path.read_text())["complete"] is False]
    for path in partial[:2]:
        process = run_script(*command, "--output", path, "--resume")
        assert process.returncode == 0 and process.stderr == ""
    for path in {*left} - {*partial[2:]}:
        assert figures(json.loads(path.read_text())) == known


def test_a_signal_during_a_calibration_leaves_the_old_file(tmp_path):
    files = ("--quantizer_path", tmp_path / "NUMBER.pkl", "--export_kvquant", tmp_path / "NUMBER.e.pkl")
    flags = ("--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "2", "--seqlen", "64", *NUQ, "--abits", "2")
    timed = (driver(tmp_path, TIMER), CALIBRATED_SCRIPT, NANO, *flags, *files)
    start = time.monotonic()
    assert run_together([{"NUMBER": "whole"}], *timed)[0].returncode == 0
    took = time.monotonic() - start
    each = [
        {"NUMBER": str(i), "SIGNAL": signum, "DELAY": str(random.uniform(0.2, 1.1) * took)}
        for i, signum in enumerate(("SIGINT", "SIGTERM"))
    ]
    for i in range(2):
        (tmp_path / f"{i}.pkl").write_bytes(b"old")
    for i, process in enumerate(run_together(each, *timed)):
        assert_tidy(process, each[i]["SIGNAL"])
        path = tmp_path / f"{i}.pkl"
        assert path.read_bytes() == b"old" or qu.load_calibration(str(path))["format"] == qu.FILE_FORMAT
        assert process.returncode != 0 or path.read_bytes() != b"old"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("script", [DYNAMIC_SCRIPT, CALIBRATED_SCRIPT], ids=["dynamic", "calibrated"])
def test_ctrl_c_is_silent_from_the_first_line_on(script):
    """Until the handler is gone, which prints a traceback, nothing is imported that Python itself has not imported."""
    before = []
    for statement in ast.parse(script.read_text(encoding="utf-8")).body:
        if isinstance(statement, (ast.Import, ast.ImportFrom)):
            before += [statement.module] if isinstance(statement, ast.ImportFrom) else [n.name for n in statement.names]
        if "SIG_DFL" in ast.unparse(statement):
            break
    else:
        pytest.fail("the handler stays")
    assert set(before) <= {"signal", "sys"}


@pytest.mark.parametrize("delays", [(0.3, 0.02), (1.3, 0.6), (3, 4)])
def test_a_signal_while_the_libraries_load(delays, calibration, tmp_path):
    """In processes that start from nothing: Ctrl-C to the calibrated script, SIGTERM to the dynamic one."""
    running = []
    for (name, signum), delay in zip((("calibrated", "SIGINT"), ("dynamic", "SIGTERM")), delays, strict=True):
        command = [sys.executable, *evaluation(name, calibration), "--output", tmp_path / f"{name}.json"]
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT.anchor
        )
        timer = threading.Timer(delay, process.send_signal, (getattr(signal, signum),))
        timer.start()
        running.append((name, signum, process, timer))
    for name, signum, process, timer in running:
        process.stderr_text = process.communicate(timeout=100)[1]
        timer.cancel()
        assert_tidy(subprocess.CompletedProcess([], process.returncode, "", process.stderr_text), signum)
        path = tmp_path / f"{name}.json"
        assert not path.exists() or json.loads(path.read_text())["results"]
    assert {file.name for file in tmp_path.iterdir()} <= {"calibrated.json", "dynamic.json"}


# -- the hub and the disk


def half_a_hub(ending, is_down_after):
    """(server, address, requests) of a hub that ends the connection half way through files of that ending."""
    spec = importlib.util.spec_from_file_location("localhub", SHARED / "localhub.py")
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    cut, working = [], threading.Event()

    class Half(hub.Handler):
        root = SHARED / "hub"

        def _file(self, file):
            if working.is_set() or self.command == "HEAD" or not file.name.endswith(ending):
                return super()._file(file)
            cut.append(file.name)
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{self._oid(file)}"')
            self.send_header("X-Repo-Commit", hub.SHA)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            if is_down_after:
                server.socket.close()  # no further connection
                threading.Thread(target=server.shutdown).start()
            return None

        do_GET = do_HEAD = do_POST = lambda self: self._route()

    server = hub.ThreadingHTTPServer(("127.0.0.1", 0), Half)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}", cut, working


@pytest.mark.skipif(not (SHARED / "localhub.py").is_file(), reason="needs ../shared/localhub.py")
def test_a_hub_that_goes_down_within_a_download(tmp_path):
    """Half a file does no harm later. The library's pauses between its attempts are passed over."""
    cases = {  # what is cut: the command, and whether the hub answers again
        "model.safetensors": (("local/llama3-nano", "--datasets", SAMPLE), False),
        "test-00000-of-00001.parquet": ((NANO, "--datasets", "wikitext2"), True),
    }
    running, impatient = {}, driver(tmp_path, "import time\ntime.sleep = lambda seconds: None")
    for ending, (args, is_down_after) in cases.items():
        server, address, cut, working = half_a_hub(ending, is_down_after)
        env = os.environ | {
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / ending), "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0",
        }  # fmt: skip
        flags = ("--seqlen", "64", "--limit", "1", "--output", tmp_path / f"{ending}.json")
        command = list(map(str, [sys.executable, impatient, DYNAMIC_SCRIPT, *args, *flags]))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        running[ending] = server, cut, working, process, command, env
    complaints = {}
    for ending, (_, cut, _, process, _, _) in running.items():
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 2 and stdout == "" and cut[0].endswith(ending)
        assert len(stderr.splitlines()) == 1 and "error: cannot load" in stderr, stderr
        complaints[ending] = stderr
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["driver.py"]
    _, _, working, _, command, env = running["model.safetensors"]
    working.set()
    process = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert process.returncode == 0 and process.stderr == ""
    for server, *_ in running.values():
        server.shutdown()
    for ending, complaint in complaints.items():
        assert "check the network" in complaint, ending


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_a_truncated_shard_is_one_line(name, tmp_path, monkeypatch):
    import datasets

    shard = {"wikitext2": "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet",
             "c4": "allenai/c4/en/c4-validation.00000-of-00008.json.gz"}[name]  # fmt: skip
    source = SHARED / "hub" / "datasets" / shard
    if not source.is_file():
        pytest.skip("needs ../shared/hub")
    content, path, load = source.read_bytes(), tmp_path / source.name, datasets.load_dataset
    path.write_bytes(content[: len(content) // 2])
    form = "json" if name == "c4" else "parquet"

    def load_dataset(*_, split, **__):
        return load(form, data_files={split: str(path)}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(qu.UserError, match=f"cannot load dataset '{name}': is the copy complete and undamaged"):
        qu.load_documents(name)
    path.write_bytes(content)
    assert len(qu.load_documents(name)) >= 500


LIMIT = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
qu.SAVE_EVERY = float(os.environ.get("SAVE_EVERY", 30))
"""
FULL = re.compile(r"kvquant_\w+\.py: error: .*could not be written .File too large.: what stood there is untouched\n")


@pytest.mark.parametrize("often", ["0", "30"])
def test_a_disk_that_fills_up_leaves_the_old_report(tmp_path, often):
    """A file may have 8000 bytes, which the table does not reach."""
    out = tmp_path / "o.json"
    out.write_bytes(b"old")
    flags = ("--datasets", SAMPLE, "--seqlen", "32", "--limit", "80", "--batch_size", "40", "--abits", "16,3")
    (process,) = run_together(
        [{"SAVE_EVERY": often}], driver(tmp_path, LIMIT), DYNAMIC_SCRIPT, NANO, *flags, "--output", out
    )
    assert process.returncode == 1 and "Δppl" in process.stdout
    *warnings, error = process.stderr.splitlines(keepends=True)
    assert FULL.fullmatch(error) and "o.json" in error
    assert all(line.startswith("warning: ") and "File too large" in line for line in warnings)
    assert (out.read_bytes() == b"old") or (often == "0" and json.loads(out.read_text())["complete"] is False)
    assert {file.name for file in tmp_path.iterdir()} == {"driver.py", "o.json"}


@pytest.mark.parametrize("flag", ["--quantizer_path", "--export_kvquant", "--plot", "--plot_activations"])
def test_a_disk_that_fills_up_leaves_the_old_file(tmp_path, calibration, flag):
    old = tmp_path / "old.png"
    old.write_bytes(b"old")
    command = evaluation("calibrated", calibration)
    if flag == "--quantizer_path":
        command = (
            CALIBRATED_SCRIPT,
            NANO,
            "--calibrate",
            "--calib_dataset",
            SAMPLE,
            "--nsamples",
            "1",
            "--seqlen",
            "64",
        )
    process = run_script(driver(tmp_path, LIMIT), *command, flag, old)
    assert process.returncode == 1 and FULL.fullmatch(process.stderr) and "old.png" in process.stderr
    assert old.read_bytes() == b"old" and {file.name for file in tmp_path.iterdir()} == {"driver.py", "old.png"}
    assert ("ppl" in process.stdout) == flag.startswith("--plot")  # a picture that fails costs no table


# -- leaks, determinism, colour


def test_10000_times_attached_and_detached_leave_nothing():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    tiny = LlamaForCausalLM(config).eval()
    specs = {
        "k_proj": qu.QuantSpec(qu.PER_CHANNEL, 3, include_sparse=True),
        "v_proj": qu.QuantSpec(qu.PER_TOKEN, 2, include_sparse=True),
    }
    quantizers, ids = qu.dynamic_quantizers(tiny, specs), torch.arange(8)[None]

    def state():
        return [
            (name, sorted(vars(module)), len(module._forward_hooks), len(module._forward_hooks_with_kwargs))
            for name, module in tiny.named_modules()
        ]

    def cycles(count):
        for i in range(count):
            with contextlib.suppress(ZeroDivisionError), qu.simulate_quantization(tiny, quantizers) as outliers:
                if i % 100 == 0:
                    tiny(ids)
                if i % 10 == 0:
                    raise ZeroDivisionError
            assert set(outliers) == (set(quantizers) if i % 100 == 0 else set())
        gc.collect()
        return len(gc.get_objects()), tracemalloc.get_traced_memory()[0]

    before = state()
    with torch.inference_mode():
        cycles(100)
        first, _ = cycles(100)
        last, _ = cycles(8000)
        assert state() == before and last - first < 100
        tracemalloc.start()
        try:
            _, first = cycles(200)
            _, last = cycles(1700)
        finally:
            tracemalloc.stop()
    assert state() == before and last - first < 80_000


def test_two_processes_give_the_same_digits(tmp_path):
    """Forked from two interpreters that hash differently; of a calibration, the same table and the same file too."""
    servers = [fork_server()]
    command, env = [sys.executable, str(ROOT / "tests" / "fork_server.py")], {**os.environ, "PYTHONHASHSEED": "12345"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT.anchor}
    with subprocess.Popen(command, env=env, **pipes) as other:
        servers.append(other)
        answers = []
        for server in servers:
            with mock.patch("conftest.fork_server", lambda server=server: server):
                answers.append(list(digits(tmp_path)))
    assert len(answers[0]) == 4 and answers[0] == answers[1]


def digits(folder):
    """The JSON of both scripts without the seconds, and what a calibration prints and saves."""
    path, out = folder / "q.pkl", folder / "o.json"
    flags = ("--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "3", "--seqlen", "64", *NUQ, "--norm")
    fit = run_script(CALIBRATED_SCRIPT, NANO, *flags, "--quantizer_path", path)
    assert fit.returncode == 0, fit.stderr
    yield fit.stdout
    yield path.read_bytes()
    sparse = ("--include_sparse", "--sparsity_threshold", "0.99")
    for command in (
        (DYNAMIC_SCRIPT, NANO, *TEXT, "--abits", "16,4,2", *sparse),
        (CALIBRATED_SCRIPT, NANO, *TEXT, "--baseline", *sparse, "--quantizer_path", path),
    ):
        process = run_script(*command, "--output", out)
        assert process.returncode == 0, process.stderr
        text, count = re.subn(r'"seconds": [\d.e-]+', '"seconds": 0', out.read_text())
        assert count == len(json.loads(text)["results"]) >= 2
        yield text
        out.unlink()


TERMINAL = """
terminal = os.open(os.environ["TERMINAL"], os.O_RDWR | os.O_NOCTTY)
for stream in (0, 1, 2):
    os.dup2(terminal, stream)
assert sys.stdout.isatty() and sys.stderr.isatty()
"""


@pytest.mark.parametrize("flags", [(*TEXT, "--abits", "16,2"), ("--abits", "9"), ("--help",), ("--datasets", "no")])
def test_nothing_on_a_terminal_is_coloured(tmp_path, flags):
    """stdout and stderr both on a terminal that knows colours, and that is asked for them by a usual variable."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    shown = []

    def read():
        with open(ours, "rb", buffering=0) as terminal, contextlib.suppress(OSError):  # Linux's end of file
            while chunk := terminal.read(4096):
                shown.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    colours = {"TERM": "xterm-256color", "COLORTERM": "truecolor", "FORCE_COLOR": "1", "COLUMNS": "100"}
    (process,) = run_together(
        [colours | {"TERMINAL": os.ttyname(theirs)}], driver(tmp_path, TERMINAL), DYNAMIC_SCRIPT, NANO, *flags
    )
    os.close(theirs)
    reader.join(timeout=60)
    text = b"".join(shown)
    assert process.returncode == (2 if "9" in flags or "no" in flags else 0), text
    assert len(text) > 50 and re.findall(rb"\x1b\[[\d;:]*m", text) == []
    assert "--limit" not in flags or b"24/24" in text  # the progress bar
