"""Runs scripts, each in a process of its own, without importing torch and transformers anew for each.

Reads one JSON list a line, [[script, argument, ...], [[environment, stdout file, stderr file], ...]], forks a child for
each environment that runs the script as __main__, all at once, and answers with the list of their exit statuses
(negative: the signal that ended it).
"""

import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import sys
import traceback
from pathlib import Path

os.environ |= {  # as a script sets them before it imports anything; the libraries look once
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import accelerate  # noqa: F401
import pandas  # noqa: F401
import pyarrow.parquet  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

import quant_utils  # noqa: F401
import simquant

for module in pkgutil.walk_packages(simquant.__path__, "simquant."):
    importlib.import_module(module.name)


def measured_coverage():
    """Return coverage, started, if COVERAGE_FORKS names a folder for it; pytest-cov joins it with the tests' own."""
    if not (folder := os.environ.get("COVERAGE_FORKS")):
        return None
    from coverage import Coverage

    files = [f"{folder}/{name}" for name in ("quant_utils.py", "simquant/*", "kvquant_*.py")]
    coverage = Coverage(f"{folder}/.coverage", data_suffix=True, include=files, config_file=False)
    coverage.start()
    return coverage


def run(script, *arguments, environment, out, err):
    """Become the script, in a child: it never returns, and ends with the script's exit status."""
    os.environ.update(environment)
    for path, descriptor in ((os.devnull, 0), (out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    sys.argv = [script, *arguments]
    coverage = measured_coverage()
    status = 0
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if coverage is not None:
        coverage.stop()
        with contextlib.suppress(Exception):  # a test of a full disk
            coverage.save()
    os._exit(status)


for line in sys.stdin:
    command, runs = json.loads(line)
    children = []
    for environment, out, err in runs:
        children.append(os.fork())
        if children[-1] == 0:
            run(*command, environment=environment, out=out, err=err)
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
