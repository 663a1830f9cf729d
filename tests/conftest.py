"""Paths, the bundled model, and a way to run a script as a user would."""

import os
import subprocess
import sys
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


def run_script(script, *args, env=None, prefix=()):
    """The finished process of `python script args`, from a folder that is not the project's."""
    command = [*map(str, prefix), sys.executable, str(script), *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT.anchor, env={**os.environ, **(env or {})}, timeout=300
    )


def assert_one_line_error(process, *words):
    """Exit status 2, nothing on stdout but at most the table's header, one line on stderr that has all words."""
    assert process.returncode == 2, process.stderr
    lines = [line for line in process.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("kvquant_") and ".py: error: " in lines[0]
    for word in words:
        assert word in lines[0]


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
