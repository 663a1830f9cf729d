"""Paths, the bundled model, and a way to run a script as a user would."""

import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker a core: more threads would only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "tests" / "assets"
NANO = ASSETS / "llama3-nano"
SAMPLE = ASSETS / "sample.txt"
DYNAMIC_SCRIPT = ROOT / "kvquant_simquant_ppl_eval.py"
CALIBRATED_SCRIPT = ROOT / "kvquant_llama3_simquant.py"
sys.path.insert(0, str(ROOT))
settings.register_profile("project", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("project")


@functools.cache
def fork_server():
    command = [sys.executable, str(ROOT / "tests" / "fork_server.py")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT.anchor)


def run_script(script, *args, env=None, prefix=()):
    """The finished process of `python script args`, from a folder that is not the project's.

    With env or prefix it is started from nothing; else it is forked from a process that has the imports done.
    """
    command = [*map(str, prefix), sys.executable, str(script), *map(str, args)]
    if env or prefix:
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT.anchor, env=environment, timeout=300)
    return run_together([{}], script, *args)[0]


def run_together(environments, script, *args):
    """The finished processes of `python script args`, forked at once, each with an addition to the environment."""
    command, server = [str(script), *map(str, args)], fork_server()
    with contextlib.ExitStack() as stack:
        files = [[stack.enter_context(tempfile.NamedTemporaryFile("r")) for _ in range(2)] for _ in environments]
        runs = [[each, out.name, err.name] for each, (out, err) in zip(environments, files, strict=True)]
        server.stdin.write(json.dumps([command, runs]) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        finished = zip(statuses, files, strict=True)
        return [subprocess.CompletedProcess(command, status, out.read(), err.read()) for status, (out, err) in finished]


def driver(folder, body):
    """A script that runs another, its first argument, after body has changed quant_utils, qu."""
    (folder / "driver.py").write_text(
        f"import os, runpy, sys\nimport quant_utils as qu\n{body}\n"
        "sys.argv[:2] = sys.argv[1:2]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return folder / "driver.py"


def assert_one_line_error(process, *words):
    """Exit status 2, nothing on stdout but at most the table's header, one line on stderr that has all words."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("kvquant_") and ".py: error: " in lines[0]
    for word in words:
        assert word in lines[0]


def measured(model, windows, *quantizers, batch_size=1):
    """The finished run of one dataset, "text", in a setting for each {site: Quantizer}; {} is the unquantized model."""
    import quant_utils as qu

    bits = [next((q.spec.bits for q in each.values()), qu.UNQUANTIZED) for each in quantizers]
    settings = [qu.Setting(b, qu.parts_of(each), each) for b, each in zip(bits, quantizers, strict=True)]
    run = qu.Run({"text": windows}, settings, qu.cache_widths(model))
    assert list(qu.measure(model, run, batch_size))[-1] == ("text", True)
    return run


def perplexity(model, windows, quantizers=None, batch_size=1):
    """Of model with quantizers."""
    import quant_utils as qu

    run = measured(model, windows, quantizers or {}, batch_size=batch_size)
    return qu.results(run, "text")[0]["ppl"]


@pytest.fixture(scope="session")
def config_and_tokenizer():
    import quant_utils as qu

    return qu.load_config_and_tokenizer(str(NANO))


@pytest.fixture(scope="session")
def tokenizer(config_and_tokenizer):
    return config_and_tokenizer[1]


@pytest.fixture(scope="session")
def model(config_and_tokenizer):
    import quant_utils as qu

    return qu.load_model(qu.ModelSpec(str(NANO), device="cpu"), config_and_tokenizer[0])


@pytest.fixture(scope="session")
def windows(tokenizer):
    """[11, 512] ids of the bundled text."""
    import quant_utils as qu

    return qu.load_windows(str(SAMPLE), tokenizer, qu.EvalSpec((str(SAMPLE),), seqlen=512))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)
