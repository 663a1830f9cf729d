"""Whatever is given to the scripts: figures or a clear line, and no file lost or half written."""

import contextlib
import os
import re
import shutil
import signal
import sys
import tempfile
import warnings
from unittest import mock

import pytest
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, SAMPLE
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_report import on_terminal

from simquant import endings, models, quantizer_file


@contextlib.contextmanager
def process_kept():
    """Give back what a script takes over: the handlers of signals, the environment, how warnings are shown."""
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    with mock.patch.dict(os.environ), warnings.catch_warnings():
        try:
            yield
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler)


with process_kept():
    import kvquant_llama3_simquant as calibrated_script
    import kvquant_simquant_ppl_eval as dynamic_script

FUZZ = settings(
    suppress_health_check=[HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a failing example is small, and slow to make smaller
    max_examples=40,
)
EVALUATION = (NANO, "--datasets", "t.txt", "--seqlen", "32", "--limit", "2", "--quiet")
CALIBRATION = (NANO, "--calibrate", "--calib_dataset", "t.txt", "--nsamples", "2", "--seqlen", "32")


@pytest.fixture(scope="module")
def answer(model, config_and_tokenizer, tmp_path_factory):
    """Return a function to (exit status, stdout, {file: content}) of a script's main, in this process.

    It runs on the model that is loaded, in a new folder that has a short text, t.txt, and the files that are given. It
    succeeds, or says one line besides warnings; an exception that would be a traceback goes through.
    """
    whole, text = models.load_config_and_tokenizer, SAMPLE.read_bytes()[:400]

    def of(script, *args, files=()):
        folder = tmp_path_factory.mktemp("answer")
        for name, content in {"t.txt": text, **dict(files)}.items():
            (folder / name).write_bytes(content)
        with process_kept(), pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            streams = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(2)]
            patch.chdir(folder)
            patch.setattr(sys, "argv", [script.__file__, *map(str, args)])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            patch.setattr(models, "load_model", lambda *_: model)
            known = {str(NANO): config_and_tokenizer}
            patch.setattr(models, "load_config_and_tokenizer", lambda name, rev: known.get(name) or whole(name, rev))
            try:
                status = endings.exit_status(script.main)
            except SystemExit as stop:  # argparse
                status = stop.code
            for stream in streams:
                stream.seek(0)
            shown = [stream.read() for stream in streams]
        there = {file.name: file.read_bytes() for file in folder.iterdir()}
        shutil.rmtree(folder)
        lines = [line for line in shown[1].split("\n")[:-1] if not line.startswith("warning: ")]
        assert (status, len(lines)) in ((0, 0), (2, 1)) and all(line.isprintable() for line in lines), shown[1]
        assert all(re.match(r"kvquant_\w+\.py: error: ", line) for line in lines)
        assert there["t.txt"] == text and not any(name.endswith(".partial") for name in there)
        return status, shown[0], there

    return of


@pytest.fixture(scope="module")
def saved(answer):
    """Return {name: content} of a quantizer file."""
    flags = ("--abits", "3", "--nuq", "--include_sparse", "--norm", "--quantizer_path", "q.pkl")
    return {"q.pkl": answer(calibrated_script, *CALIBRATION, *flags)[2]["q.pkl"]}


HUGE = 10**400
names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), max_size=8) | st.just("a" * 300)
counts = st.integers(-3, 40) | st.sampled_from([HUGE, -HUGE, 10**18, 2**63, "", "x", "1.5", "nan", "0x10", "٣", "auto"])
numbers = st.floats() | st.floats(0, 1) | st.sampled_from(["", "x", "1e999", "-0.0", "1e-320", "e", "."])
lists = st.lists(st.sampled_from(["k_proj", "v_proj", "q_proj", '["k_proj"]', "[]", "[1]", "["]) | names, max_size=2)
few = st.integers(-2, 3) | st.sampled_from([HUGE, 10**18, "x"])
FLAGS = {
    "abits": st.sampled_from(["2", "3", "16", "3,2", "16,3", "4/2", "16/3,2/16", "2,2", ",", "16,", "/"]) | names,
    "perchannel": lists, "pertoken": lists, "kv_format": st.sampled_from(["uniform", "nf", "nuq"]) | names,
    "skip_layers": st.sampled_from(["0", "-1", "-1,0", "5,6", "0,1,2,3,4,5", ",", HUGE, "1 2"]) | names,
    **dict.fromkeys(("seqlen", "limit", "batch_size", "first_few_fp16", "report_context", "plot_layer"), counts),
    "sparsity_threshold": numbers, "dtype": st.sampled_from(["auto", "bfloat16", "int8"]) | names,
    "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:1", "cuda:128", f"cuda:{HUGE}", "cuda:-1"]) | names,
    "attn_implementation": st.sampled_from(["sdpa", "eager", "flash_attention_2"]) | names,
    "datasets": names.map("{}.txt".format) | names | st.just("t.txt,t.txt"),
    "output": st.sampled_from(["o.json", "o.csv", "t.txt", ".", "no/o.json", "", "q.pkl"]) | names,
    **dict.fromkeys(("include_sparse", "nf", "baseline", "attribution", "resume", "dry_run"), st.none()),
}  # fmt: skip
CALIBRATION_FLAGS = FLAGS | {
    "nsamples": few, "seed": few, "cap_outliers": numbers, "calib_dataset": names.map("{}.txt".format) | names,
    "fisher_weighting": st.sampled_from(["paper", "code"]) | names,
    "export_kvquant": st.sampled_from(["e.pkl", "q.pkl", "t.txt", ""]) | names,
    **dict.fromkeys(("nuq", "fisher", "norm", "clamp"), st.none()),
}  # fmt: skip


def command_lines(flags):
    """Return a strategy for up to four of flags."""
    one = st.sampled_from(sorted(flags)).flatmap(lambda name: st.tuples(st.just(f"--{name}"), flags[name]))
    return st.lists(one.map(words_of), max_size=4).map(lambda chosen: [word for words in chosen for word in words])


def words_of(flag):
    """Return the words of a command line for (name, value): a value is a word, several, or None."""
    name, value = flag
    return [name, *map(str, value if isinstance(value, list) else [] if value is None else [value])]


@FUZZ
@given(command_lines(FLAGS))
def test_any_flags_of_the_data_free_script_give_figures_or_one_line(answer, flags):
    status, stdout, there = answer(dynamic_script, *EVALUATION, "--include_sparse", *flags)
    assert not re.search(r"\b(nan|inf)\b", stdout) and (len(stdout.splitlines()) > 2) == (status == 0)
    assert status == 0 or list(there) == ["t.txt"]


@FUZZ
@given(command_lines(CALIBRATION_FLAGS))
def test_any_flags_of_a_calibration_fit_or_give_one_line(answer, tmp_path_factory, flags):
    status, stdout, there = answer(calibrated_script, *CALIBRATION, *flags, "--quantizer_path", "new.pkl")
    if status == 0 and "--dry_run" not in flags:
        path = tmp_path_factory.mktemp("new") / "new.pkl"
        path.write_bytes(there["new.pkl"])
        assert len(quantizer_file.load(str(path))["quantizers"]) > 0 and "Saved to new.pkl" in stdout
    else:
        assert list(there) == ["t.txt"]


@FUZZ
@given(command_lines(CALIBRATION_FLAGS))
def test_any_flags_beside_a_quantizer_file_give_figures_or_one_line(answer, saved, flags):
    status, stdout, there = answer(calibrated_script, *EVALUATION, *flags, "--quantizer_path", "q.pkl", files=saved)
    assert there.items() >= saved.items() and (len(stdout.splitlines()) > 2) == (status == 0)
    assert status == 0 or set(there) == {"t.txt", "q.pkl"}


@pytest.mark.parametrize("script", [DYNAMIC_SCRIPT, CALIBRATED_SCRIPT])
def test_nothing_on_a_terminal_is_coloured(script):
    """Of what comes before the libraries load; tests/test_report.py looks at the tables and the bar."""
    for flags, known in (("--abits", "9"), 2), (("--help",), 0), (("--datasets", "no"), 2):
        status, written = on_terminal(100, sys.executable, script, NANO, *flags)
        assert status == known and len(written) > 50 and re.findall(r"\x1b\[[\d;:]*m", written) == []
