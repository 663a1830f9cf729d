"""The real from_pretrained and load_dataset code, against a hub on loopback; skipped where that hub is not there."""

import json
import sys

import pytest
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, ROOT, assert_one_line_error, run_script

SHARED = ROOT.parent / "shared"
LOCALHUB = (sys.executable, SHARED / "localhub.py", SHARED / "hub", "--")
pytestmark = pytest.mark.skipif(not (SHARED / "localhub.py").is_file(), reason="needs ../shared/localhub.py")


def on_hub(*args, script=DYNAMIC_SCRIPT):
    return run_script(script, *args, prefix=LOCALHUB)


def test_wikitext2_and_c4_by_their_hub_names(tmp_path):
    out = tmp_path / "out.json"
    process = on_hub(
        "meta-llama/Llama-3-8B", "--abits", "16", "--datasets", "wikitext2,c4", "--limit", "8", "--output", out
    )
    assert process.returncode == 0, process.stderr
    wikitext2, c4 = json.loads(out.read_text())["results"]
    assert (wikitext2["windows"], c4["windows"]) == (8, 8)
    assert wikitext2["tokens"] == c4["tokens"] == 8 * 2047
    assert "disjoint windows" in process.stdout and "GPTQ protocol" in process.stdout


@pytest.mark.parametrize(
    ("flags", "low", "high"),
    [
        (("--abits", "16"), 15.4945, 15.4955),
        (("--abits", "2"), 22.5, 23.5),
        (("--abits", "2", "--include_sparse"), 18.9, 19.9),
        (("--abits", "2", "--perchannel", "--pertoken", "k_proj", "v_proj"), 66, 70),
    ],
)
def test_the_first_20_windows_have_the_known_perplexity(flags, low, high, tmp_path):
    """Known from a plain loop (15.495) and from the published functions (about 23, 19 and 68)."""
    process = on_hub("local/llama3-nano", *flags, "--limit", "20", "--output", tmp_path / "out.json")
    assert process.returncode == 0, process.stderr
    assert low <= json.loads((tmp_path / "out.json").read_text())["results"][0]["ppl"] < high


def test_calibration_by_hub_names_is_at_or_below_the_published_functions(tmp_path):
    """First 20 windows, 8 calibration windows, seed 0: the published functions give 17.689."""
    flags = ("--calibrate", "--abits", "2", "--nuq", "--fisher", "--include_sparse", "--nsamples", "8")
    fit = on_hub("meta-llama/Llama-3-8B", *flags, "--quantizer_path", tmp_path / "q.pkl", script=CALIBRATED_SCRIPT)
    assert fit.returncode == 0, fit.stderr
    output = ("--quantizer_path", tmp_path / "q.pkl", "--limit", "20", "--output", tmp_path / "out.json")
    process = on_hub("meta-llama/Llama-3-8B", *output, script=CALIBRATED_SCRIPT)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "out.json").read_text())["results"][0]["ppl"] <= 17.689


def test_a_gated_repository():
    assert_one_line_error(on_hub("local/gated-model"), "local/gated-model", "gated", "licence", "log in")


def test_a_name_that_does_not_exist():
    assert_one_line_error(on_hub("local/no-such-model"), "local/no-such-model", "no such repository", "spelling")


def test_c4_without_a_document_that_is_long_enough():
    process = on_hub("local/llama3-nano", "--datasets", "c4", "--seqlen", "200000")
    assert_one_line_error(process, "none of 500 documents", "200000")
