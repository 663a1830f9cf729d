"""From flags to settings: which sites are quantized, how many bits that takes, and what the rows are called."""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, ROOT, SAMPLE, assert_one_line_error, run_script
from torch import nn

from quant_utils import Quantized, Quantizer, Site, UserError
from simquant.calibrated_flags import CalibratedFlags
from simquant.flags import Flags
from simquant.formats.scaled import ScaledQuantizer
from simquant.methods import METHODS, Method
from simquant.parsing import format_list
from simquant.plans import Pair, Plan, Width

LAYERS = 4
SITES = [
    Site(layer, part, f"layers.{layer}.{part}", nn.Identity(), channels=8)
    for layer in range(LAYERS)
    for part in ("keys", "values")
]
AXES = {"keys": "channel", "values": "token"}
PLAN = Plan([Pair("uniform", "uniform")], (Width(4, 4),), AXES, {})


def described(settings):
    """Return {row as it is printed: {(layer, part): bits}}."""
    return {str(row): {site.key: q.bits for site, q in setting.items()} for row, setting in settings.items()}


def everywhere(keys, values, skipped=()):
    """Return {(layer, part): bits} with these bits in all layers but the skipped; 16 for what is not quantized."""
    bits = {(layer, p): n for layer in range(LAYERS) for p, n in (("keys", keys), ("values", values)) if n < 16}
    return {(layer, part): n for (layer, part), n in bits.items() if layer not in skipped}


def test_keys_and_values_may_differ_in_width():
    plan = replace(PLAN, widths=(Width(16, 16), Width(4, 2), Width(16, 3), Width(3, 3)))
    assert described(plan.settings(SITES)) == {
        "unquantized": {},
        "uniform, abits 4/2, keys and values": everywhere(4, 2),
        "uniform, abits 16/3, values": everywhere(16, 3),
        "uniform, abits 3, keys and values": everywhere(3, 3),
    }


def test_skipped_layers_stay_as_they_are_and_the_row_says_so():
    for skipped, layers, words in (
        ((0,), {0}, "keys and values except layer 0"),
        ((-1, 0), {0, 3}, "keys and values except layers 0, 3"),
        ((3, -1), {3}, "keys and values except layer 3"),
        ((0, 1, 2, 3), {0, 1, 2, 3}, "nothing"),
    ):
        found = described(replace(PLAN, skipped=skipped).settings(SITES))
        assert found == {f"uniform, abits 4, {words}": everywhere(4, 4, layers)}
    for absent in (4, -5):
        with pytest.raises(UserError, match=f"--skip_layers {absent} .* 4 layers"):
            replace(PLAN, skipped=(0, absent)).settings(SITES)


def test_an_attribution_takes_the_width_apart_behind_the_unquantized_model():
    plan = replace(PLAN, widths=(Width(16, 16), Width(4, 2)), attribution=True)
    settings, whole = plan.settings(SITES), everywhere(4, 2)
    assert [*described(settings).items()] == [
        ("unquantized", {}),
        ("uniform, abits 4/2, keys", everywhere(4, 16)),
        ("uniform, abits 4/2, values", everywhere(16, 2)),
        ("uniform, abits 4/2, keys and values", whole),
        *(
            (f"uniform, abits 4/2, layer {i}", {key: n for key, n in whole.items() if key[0] == i})
            for i in range(LAYERS)
        ),
    ]
    assert [row.layer for row in settings] == [None, None, None, None, 0, 1, 2, 3]


def test_flags_become_fields_of_the_quantizers():
    flags = CalibratedFlags(
        model="m", abits=(Width(3, 3),), kv_format=(Pair("nuq", "nuq"),), nuq=True, include_sparse=True,
        sparsity_threshold=0.98, first_few_fp16=2, fisher=True, fisher_weighting="code", norm=True, cap_outliers=0.05,
    )  # fmt: skip
    (setting,) = flags.plan().settings(SITES).values()
    for site, quantizer in setting.items():
        assert quantizer.outliers == pytest.approx(0.02) and (quantizer.bits, quantizer.levels) == (3, "nuq")
        assert (quantizer.sinks, quantizer.fisher, quantizer.q_norm) == (2, "code", True)
        assert quantizer.cap == (0.05 if site.part == "keys" else None)  # values have no calibrated range to cap
    (setting,) = CalibratedFlags(model="m", clamp=True, fisher_weighting="code").plan().settings(SITES).values()
    assert all(q.integer_zero and q.fisher is q.outliers is None and q.sinks == 0 for q in setting.values())


@dataclass(frozen=True)
class Coarse(Quantizer):
    """Rounding to whole numbers: a format of another project, written as the README shows."""

    bits: int = 4

    def quantize(self, x, others=()):
        return Quantized(x.round())

    def cost(self, tokens, channels):
        return self.bits * tokens * channels


def test_a_new_method_is_a_class_and_a_row(monkeypatch):
    monkeypatch.setitem(METHODS, "coarse", Method("whole numbers", "a test", f"{__name__}:Coarse"))
    (setting,) = replace(PLAN, pairs=[Pair("coarse", "coarse")]).settings(SITES).values()
    assert all(q.quantize(torch.full((1, 2, 8), 1.4)).values.eq(1).all() for q in setting.values())
    sparse = Flags(model="m", include_sparse=True).plan()
    with pytest.raises(UserError, match="--include_sparse does not go with the method coarse"):
        replace(sparse, pairs=[Pair("coarse", "coarse")]).settings(SITES)


def test_bits_an_entry_are_those_that_one_counts_by_hand(tmp_path):
    """A range is two 16-bit numbers: shared by all tokens of a key channel, by the 128 channels of a value token."""
    flags = (
        "--datasets",
        SAMPLE,
        "--seqlen",
        "64",
        "--limit",
        "2",
        "--abits",
        "16,4/2",
        "--skip_layers",
        "0,-1",
        "--report_context",
        "256",
    )
    process = run_script(DYNAMIC_SCRIPT, NANO, *flags, "--output", tmp_path / "o.json")
    assert process.returncode == 0 and process.stderr == ""
    unquantized, row = json.loads((tmp_path / "o.json").read_text())["results"]
    assert unquantized["key_bits"] == unquantized["value_bits"] == unquantized["avg_bits"] == 16
    assert (row["abits"], row["quantized"]) == ("4/2", "keys and values except layers 0, 5")
    keys, values = (4 * (4 + 32 / 256) + 2 * 16) / 6, (4 * (2 + 32 / 128) + 2 * 16) / 6
    assert row["key_bits"] == pytest.approx(keys, rel=1e-12) and row["value_bits"] == pytest.approx(values, rel=1e-12)
    assert row["avg_bits"] == pytest.approx((keys + values) / 2, rel=1e-12)
    assert row["cache_gib"] == pytest.approx(row["avg_bits"] * 2 * 6 * 128 * 256 / 8 / 2**30, rel=1e-12)
    assert row["kl"] > 0 and row["quantized"] in process.stdout


FIT = (CALIBRATED_SCRIPT, NANO, "--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "2", "--seqlen", "64")
EVALUATION = ("--datasets", SAMPLE, "--seqlen", "64", "--limit", "2")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return two quantizer files: 3-bit NUQ, and calibrated scales of fp8."""
    folder = tmp_path_factory.mktemp("files")
    for name, *flags in (("nuq", "--nuq", "--abits", "3"), ("fp8", "--kv_format", "fp8_calibrated")):
        process = run_script(*FIT, *flags, "--quantizer_path", folder / f"{name}.pkl")
        assert process.returncode == 0 and process.stderr == ""
    return folder / "nuq.pkl", folder / "fp8.pkl"


def test_quantizer_files_and_named_formats_stand_in_one_table(files, tmp_path):
    """Each row is what it is when it is measured alone."""
    both = ",".join(map(str, files))
    rows = {}
    for paths, formats in ((both, "q4_0,16/fp8"), (files[0], None), (files[1], None), (None, "q4_0"), (None, "16/fp8")):
        flags = (*(("--quantizer_path", paths) if paths else ()), *(("--kv_format", formats) if formats else ()))
        out = tmp_path / f"{len(rows)}.json"
        process = run_script(CALIBRATED_SCRIPT, NANO, *flags, *EVALUATION, "--baseline", "--output", out)
        assert process.returncode == 0 and process.stderr == ""
        report = json.loads(out.read_text())
        rows[paths, formats] = {each["format"]: each["nll"] for each in report["results"]}
    together, *alone = rows.values()
    assert list(together) == ["unquantized", "nuq (nuq)", "fp8_calibrated (fp8)", "q4_0", "16/fp8"]
    assert [nll for name, nll in together.items()] == [alone[0]["unquantized"], *(each.popitem()[1] for each in alone)]


def test_what_a_list_of_formats_refuses(files):
    for flags, said in {
        ("--quantizer_path", files[1], "--kv_format", "nuq"): "nuq is fitted to data, and --quantizer_path holds fp8_",
        ("--kv_format", "q4_0,nuq"): "--quantizer_path FILE is missing",
        ("--kv_format", "q4_0,q5_9"): "unknown format 'q5_9': did you mean q5_1 or q5_0",
        ("--kv_format", "q8_0/q4_0,q8_0/q4_0"): "q8_0/q4_0 stands there more than once",
        ("--kv_format", "q4_0/"): "a name is missing in 'q4_0/'",
        ("--kv_format", "q4_0,"): "a name is missing in 'q4_0,'",
        ("--kv_format", "all/q4_0"): "all stands for several formats: it goes into no pair",
        ("--kv_format", "q4_0", "--recent", 64): "--recent 64 covers the whole window of --seqlen 64",
        ("--quantizer_path", files[0], "--kv_format", "nuq/q4_0"): "a pair takes methods that need no data",
        ("--calibrate", "--nuq", "--quantizer_path", "a.pkl,b.pkl"): "--calibrate writes one file",
        ("--kv_format", "q4_0", "--include_sparse"): "--include_sparse does not go with the method q4_0",
        ("--calibrate", "--kv_format", "q4_0", "--quantizer_path", "x.pkl"): "nothing to fit: q4_0 needs no data",
    }.items():
        text = () if "--calibrate" in flags else EVALUATION
        assert_one_line_error(run_script(CALIBRATED_SCRIPT, NANO, *flags, *text), said)


def test_a_head_that_a_block_does_not_divide_is_an_error_or_left_out():
    sites = [replace(site, channels=40, head_dim=20) for site in SITES]
    with pytest.raises(UserError, match="--kv_format q4_0: blocks of 32 channels do not divide heads of 20"):
        replace(PLAN, pairs=format_list("q4_0")).settings(sites)
    plan = replace(PLAN, pairs=format_list("llama.cpp,fp8"))
    assert {row.format for row in plan.settings(sites)} == {"fp8"}
    assert len(plan.left_out(sites)) == 12 and all("heads of 20" in reason for reason in plan.left_out(sites))


def test_the_page_of_methods_has_every_row_with_its_bits():
    """Of keys and values, in a cache of 4 million tokens, 8 heads of 128 channels."""
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split("## Arithmetic, row by row")[1]
    told = {cells[1].strip(): cells[3] for line in page.splitlines() if len(cells := line.split("|")) == 5}
    plan = Plan([], [], AXES, {}, is_calibrated=True)
    sites = [replace(site, layer=layer, channels=1024, head_dim=128) for layer in range(5) for site in SITES[:2]]
    for name in METHODS:
        setting = plan.setting(Pair(name, name), Pair(name, name).width(Width(4, 4)), sites)
        bits = [setting[site].cost(2**22, 1024) / 2**32 for site in sites[4:6]]  # of a layer that no method leaves out
        shown = [float(each) for each in told[name].split("/")]
        assert shown * (2 // len(shown)) == pytest.approx(bits, abs=6e-4), name


def test_clipped_entries_are_those_that_a_loop_counts_and_a_file_counts_them_too(files, tmp_path):
    """Of casts alone: integers have none. Scales that were calibrated on text clip what is greater on other text."""
    flags = ("--kv_format", "fp8,q8_0", "--saturation", "--output", tmp_path / "o.json")
    process = run_script(CALIBRATED_SCRIPT, NANO, "--quantizer_path", files[1], *flags, *EVALUATION)
    assert process.returncode == 0 and process.stderr == "" and "clipped" in process.stdout
    shares = {each["format"]: each["saturation"] for each in json.loads((tmp_path / "o.json").read_text())["results"]}
    assert shares["q8_0"] is None and shares["unquantized"] is None
    assert shares["fp8"] == 0 and 0 < shares["fp8_calibrated"] < 0.01
    amax, x = torch.tensor([1.0, 2.0]), torch.tensor([[[0.5, -1.1, 1.9, 2.1], [1.0, 0.0, -3.0, 0.0]]])
    given = ScaledQuantizer(2, 8, scale="calibrated", amax=amax, counts_clipped=True).quantize(x)
    assert given.clipped.tolist() == [[[False, True, False, True], [False, False, True, False]]]


def test_a_window_that_covers_everything_is_said():
    process = run_script(DYNAMIC_SCRIPT, NANO, "--kv_format", "kivi2", *EVALUATION)
    assert process.returncode == 0
    assert process.stderr == "warning: kivi2: its exact tokens cover the window of --seqlen 64: nothing is quantized\n"


def test_a_file_of_kvquant_without_levels_is_what_the_command_says(tmp_path):
    """It does not tell NormalFloat from uniform levels; --nf is then no other format beside it."""
    ours, theirs = tmp_path / "ours.pkl", tmp_path / "theirs.pkl"
    run_script(*FIT, "--nf", "--quantizer_path", ours, "--export_kvquant", theirs)
    figures = []
    for path in (ours, theirs):
        flags = ("--quantizer_path", path, "--nf", "--abits", "4", "--output", tmp_path / "o.json", "--overwrite")
        assert run_script(CALIBRATED_SCRIPT, NANO, *flags, *EVALUATION).returncode == 0
        figures.append(
            [(row["format"], row["nll"]) for row in json.loads((tmp_path / "o.json").read_text())["results"]]
        )
    assert figures[0] == figures[1] and [name for name, _ in figures[0]] == ["nf"]
