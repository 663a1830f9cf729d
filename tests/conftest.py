"""Paths, the bundled model, and ways to run a script as a user would and an evaluation as a script would."""

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


def same_bits(one, other):
    """Return whether two tensors of figures are the same, nan standing for what nobody counted in both."""
    return torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))


@functools.cache
def fork_server():
    """Return the process that forks scripts, started at the first call."""
    command = [sys.executable, str(ROOT / "tests" / "fork_server.py")]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT.anchor)


def run_script(script, *args, env=None, prefix=()):
    """Return the finished process of `python script args`, run in a folder that is not the project's.

    With env or prefix it is started from nothing; else it is forked from a process that has the imports done.
    """
    command = [*map(str, prefix), sys.executable, str(script), *map(str, args)]
    if env or prefix:
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT.anchor, env=environment, timeout=300)
    return run_together([{}], script, *args)[0]


def run_together(environments, script, *args):
    """Return finished processes of `python script args`, forked at once, each with an addition to the environment."""
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
    """Return a script that runs another, its first argument, after body has changed quant_utils, qu."""
    (folder / "driver.py").write_text(
        f"import os, runpy, sys\nimport quant_utils as qu\n{body}\n"
        "sys.argv[:2] = sys.argv[1:2]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return folder / "driver.py"


def assert_one_line_error(process, *words):
    """Assert exit status 2, and on stderr, besides warnings, a single line that has all words."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("kvquant_") and ".py: error: " in lines[0]
    for word in words:
        assert word in lines[0]


def measured(model, windows, *settings, batch_size=1):
    """Return the figures [N,S,len(qu.FIGURES)] of windows [N,T] in each setting; {} is the unquantized model."""
    import quant_utils as qu
    from simquant.sites import find_sites

    return torch.cat([batch.figures for batch in qu.evaluate(model, find_sites(model), windows, settings, batch_size)])


def perplexity(model, windows, setting=None, batch_size=1):
    """Return the perplexity of model over windows [N,T] in a setting."""
    import quant_utils as qu

    return qu.perplexity(measured(model, windows, setting or {}, batch_size=batch_size)[:, 0, 0].tolist())


@pytest.fixture(scope="session")
def config_and_tokenizer():
    """Those of the bundled model."""
    from simquant.models import load_config_and_tokenizer

    return load_config_and_tokenizer(str(NANO))


@pytest.fixture(scope="session")
def tokenizer(config_and_tokenizer):
    """The bundled model's."""
    return config_and_tokenizer[1]


@pytest.fixture(scope="session")
def model(config_and_tokenizer):
    """The bundled model on the CPU: 6 layers, 128 channels of keys and of values each."""
    from simquant.flags import Flags
    from simquant.models import load_model

    return load_model(Flags(model=str(NANO), device="cpu"), config_and_tokenizer[0])


@pytest.fixture(scope="session")
def windows(tokenizer):
    """[11, 512] ids of the bundled text."""
    from simquant.texts import evaluation_windows

    return evaluation_windows(str(SAMPLE), tokenizer, 512, 512)


@pytest.fixture(autouse=True)
def fixed_seed():
    """Let every test draw the same random numbers."""
    torch.manual_seed(0)
