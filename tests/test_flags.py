"""The command line: every flag once, what its words mean, and what is said of flags that do not go together."""

import json
import re
import sys

import pytest
from conftest import ROOT, SAMPLE

from simquant.calibrated_flags import CalibratedFlags, of_the_fit
from simquant.command_line import parse
from simquant.flags import Flags
from simquant.methods import METHODS
from simquant.parsing import as_markdown, decisive, flag_fields, plain_settings
from simquant.plans import Pair, Width
from simquant.tables import USUAL

ON = (False, None, True)
EVERY_FLAG = {  # {flag: (its default, a word that changes it, what it is then)}, of the data-free script
    "dtype": ("auto", "bfloat16", "bfloat16"), "device": ("auto", "cuda:1", "cuda:1"), "compile": ("auto", "on", "on"),
    "attn_implementation": ("auto", "eager", "eager"), "abits": ((Width(4, 4),), "3", (Width(3, 3),)),
    "kv_format": ((Pair("uniform", "uniform"),), "nf", (Pair("nf", "nf"),)), "nf": ON,
    "perchannel": (("k_proj",), "", ()), "pertoken": (("v_proj",), "", ()), "include_sparse": ON,
    "sparsity_threshold": (0.99, "0.9", 0.9), "first_few_fp16": (-1, "5", 5), "skip_layers": ((), "0,-1", (0, -1)),
    "baseline": ON, "attribution": ON,
    "recent": (None, "32", 32), "saturation": ON, "sort": (None, "bits", "bits"),
    "datasets": (("wikitext2",), "c4", ("c4",)), "seqlen": (2048, "128", 128), "limit": (512, "8", 8),
    "batch_size": (1, "auto", "auto"), "output": (None, "o.json", "o.json"), "resume": ON,
    "revision": (None, "main", "main"), "text_column": ("text", "body", "body"), "bos": ("auto", "window", "window"),
    "overwrite": ON, "columns": (USUAL, "ppl,kl", ("ppl", "kl")),
    "report_context": (131072, "1024", 1024), "plot": (None, "a.PNG", "a.PNG"), "plot_layer": (None, "0", 0),
    "plot_activations": (None, "b.svg", "b.svg"), "quiet": ON, "dry_run": ON,
    "by_position": ON, "retrieval": (None, "3", 3), "retrieval_lengths": ((), "512,128,512", (128, 512)),
    "retrieval_depths": ((0, 25, 50, 75, 100), "100,0", (0, 100)),
    "tasks": ((), "arc_easy, piqa", ("arc_easy", "piqa")), "task_path": (None, "tasks", "tasks"),
    "task_limit": (None, "9", 9), "num_fewshot": (None, "0", 0), "compare": ((), "a.json", ("a.json",)),
    "plot_positions": (None, "d.png", "d.png"), "plot_retrieval": (None, "e.svg", "e.svg"),
    "report": (None, "f.html", "f.html"),
}  # fmt: skip
CALIBRATION_FLAGS = {  # those that the calibrated script has besides
    "calibrate": ON, "quantizer_path": (None, "q.pkl", "q.pkl"), "export_kvquant": (None, "e.pkl", "e.pkl"),
    "nuq": ON, "klt": ON, "klt_metric": ("fisher", "pca", "pca"), "predict": ON,
    "fisher": ON, "fisher_weighting": ("paper", "code", "code"), "norm": ON, "clamp": ON,
    "cap_outliers": (None, "0.01", 0.01), "calib_dataset": ("wikitext2", "c4", "c4"), "nsamples": (16, "2", 2),
    "seed": (0, "1", 1), "plot_bits": (None, "c.png", "c.png"),
}  # fmt: skip
COMPANIONS = {  # what a flag does not go without
    "resume": ("--output", "o.json"), "plot_layer": ("--plot_activations", "b.svg"), "fisher": ("--nuq",),
    "plot_positions": ("--by_position",), "plot_retrieval": ("--retrieval", "1"),
    "retrieval_lengths": ("--retrieval", "1"), "retrieval_depths": ("--retrieval", "1"),
    **dict.fromkeys(("task_path", "task_limit", "num_fewshot"), ("--tasks", "piqa")),
    "cap_outliers": ("--include_sparse",), "klt_metric": ("--klt",), "predict": ("--klt",), "plot_bits": ("--klt",),
}  # fmt: skip
NO_FIGURE = {
    "device", "output", "resume", "overwrite", "columns", "plot", "sort",
    "plot_activations", "plot_layer", "quiet", "dry_run", "plot_positions", "plot_retrieval", "report", "compare",
}  # fmt: skip
PATH = ("--quantizer_path", "q.pkl")


@pytest.fixture
def parsed(monkeypatch):
    """Return a function from a class of flags and words to (all flags, those that are given)."""

    def answer(cls, *words):
        monkeypatch.setattr(sys, "argv", ["kvquant_x.py", "some/model", *map(str, words)])
        return parse(cls, "What it does.", "")

    return answer


@pytest.fixture
def refused(parsed, capsys):
    """Return a function like parsed, to the one line that says why the words are refused."""

    def answer(cls, *words):
        with pytest.raises(SystemExit) as stop:
            parsed(cls, *words)
        out, err = capsys.readouterr()
        assert stop.value.code == 2 and out == "" and re.fullmatch("kvquant_x.py: error: .*\n", err), (out, err)
        return err

    return answer


def test_there_are_these_flags_with_these_defaults(parsed):
    assert set(flag_fields(Flags)) == set(EVERY_FLAG)
    assert set(flag_fields(CalibratedFlags)) == {*EVERY_FLAG, *CALIBRATION_FLAGS}
    flags, given = parsed(Flags)
    assert given == {"model": "some/model"} and flags.model == "some/model"
    assert {name: getattr(flags, name) for name in EVERY_FLAG} == {name: each[0] for name, each in EVERY_FLAG.items()}
    flags, _ = parsed(CalibratedFlags, *PATH)
    usual = {name: each[0] for name, each in CALIBRATION_FLAGS.items()} | {"quantizer_path": "q.pkl"}
    assert {name: getattr(flags, name) for name in CALIBRATION_FLAGS} == usual


@pytest.mark.parametrize("name", [name for name in (*EVERY_FLAG, *CALIBRATION_FLAGS) if name != "compare"])
def test_every_flag_is_changed_by_its_word_alone(parsed, name):
    cls, known = Flags if name in EVERY_FLAG else CalibratedFlags, EVERY_FLAG | CALIBRATION_FLAGS
    companions = (*COMPANIONS.get(name, ()), *(PATH if cls is CalibratedFlags and name != "quantizer_path" else ()))
    flags, given = parsed(cls, f"--{name}", *([known[name][1]] if known[name][1] else []), *companions)
    assert getattr(flags, name) == known[name][2] and name in given
    changed = {name, *(word.lstrip("-") for word in companions)}
    forms = {"nf", "nuq", "klt", "kv_format"}
    changed |= forms if changed & forms else set()
    for other in set(flag_fields(cls)) - changed:
        assert getattr(flags, other) == known[other][0]


def test_what_decides_figures_and_what_decides_a_fit():
    """--resume compares the former; the quantizer file holds the latter, and an evaluation may not contradict it."""
    assert set(EVERY_FLAG) - set(decisive(Flags(model="m"))) == NO_FIGURE
    more = NO_FIGURE | {"calibrate", "quantizer_path", "export_kvquant", "plot_bits"}
    assert {*EVERY_FLAG, *CALIBRATION_FLAGS} - set(decisive(CalibratedFlags(model="m"))) == more
    names = "abits kv_format nf perchannel pertoken include_sparse sparsity_threshold first_few_fp16 skip_layers"
    names += " nuq klt klt_metric predict fisher fisher_weighting norm clamp cap_outliers calib_dataset nsamples seed"
    settings = of_the_fit(CalibratedFlags(model="m", abits=(Width(4, 2), Width(3, 3))))
    assert set(settings) == set(names.split()) and settings["abits"] == ["4/2", 3]


def test_settings_are_plain_and_a_single_width_is_no_list():
    settings = plain_settings(Flags(model="m", skip_layers=(0, -1)))
    assert json.loads(json.dumps(settings)) == settings
    assert settings["abits"] == 4 and settings["skip_layers"] == [0, -1] and settings["perchannel"] == ["k_proj"]
    assert plain_settings(Flags(model="m", abits=(Width(16, 16), Width(4, 2))))["abits"] == [16, "4/2"]


def test_widths_and_layers(parsed):
    for words, widths in {
        "4": [(4, 4)],
        "16,4,4/2,2": [(16, 16), (4, 4), (4, 2), (2, 2)],
        "16/4, 8,16": [(16, 16), (16, 4), (8, 8)],  # the unquantized model comes first, whatever the order
    }.items():
        assert [*parsed(Flags, "--abits", words)[0].abits] == widths
    assert parsed(Flags, "--skip_layers", "-1,0")[0].skip_layers == (-1, 0)


def test_projections_are_a_json_list_or_plain_words_or_nothing(parsed):
    for words in (['["k_proj",', '"v_proj"]'], ["k_proj", "v_proj"], ["k_proj,v_proj"], ['["k_proj"]'], ["[]"], []):
        flags, _ = parsed(Flags, "--abits", "16", "--pertoken", "--perchannel", *words)
        assert flags.perchannel == tuple(name for name in ("k_proj", "v_proj") if name in " ".join(words))
        assert flags.pertoken == ()


def test_the_short_forms_of_a_method_and_its_name_say_the_same(parsed):
    for words in (["--nf"], ["--kv_format", "nf"], ["--nf", "--kv_format", "nf"]):
        flags, _ = parsed(CalibratedFlags, *words, *PATH)
        assert (flags.kv_format, flags.nf, flags.nuq) == ((Pair("nf", "nf"),), True, False)
        assert parsed(Flags, *words)[0].nf
    flags, _ = parsed(CalibratedFlags, "--kv_format", "nuq", *PATH)
    assert (flags.kv_format, flags.nf, flags.nuq) == ((Pair("nuq", "nuq"),), False, True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--abits 1", "--abits 1: uniform takes 2 to 8 bits, --klt of kvquant_llama3_simquant.py fractions"),
        ("--abits 4,3,4", "4 stands there more than once"),
        ("--kv_format nuq", "kv_format nuq.*kvquant_llama3_simquant.py"),
        ("--nf --kv_format uniform", "nf and uniform are several methods"),
        ("--sparsity_threshold 0", r"sparsity_threshold.*\(0, 1\].*0"),
        ("--seqlen 512 --first_few_fp16 512", "first_few_fp16 512 covers the whole window.* 512"),
        ("--perchannel k_proj v_proj", "v_proj in both --perchannel and --pertoken"),
        ('--perchannel ["k_proj"', r'\["k_proj".*JSON'),
        ("--perchannel q_proj", "'q_proj'.*only keys and values.*k_proj or v_proj"),
        ("--device tpu", "'tpu'|cuda:N.*tpu"),
        ("--datasets /nowhere/a.txt", "'/nowhere/a.txt' does not exist"),
        (f"--datasets {SAMPLE},{SAMPLE.parent}/./sample.txt", "sample.txt stands there more than once"),
        ("--perchannel --pertoken", "both empty: name k_proj or v_proj, or give --abits 16"),
        ("--abits 16 --plot a.png", "--plot draws a sweep or an attribution: give a width below 16"),
        ("--output precious.pkl", r"--output: must be a file that ends in \.json or \.csv, got 'precious.pkl'"),
        ("--columns ppl,kld", "unknown figure 'kld': give all, or some of avg_bits, .*kl"),
        ("--abit 4", "--abit 4: --abits is one"),
        ("--plot_layer 2", "--plot_layer.*--plot_activations"),
        ("--attribution --abits 4,3", "--attribution takes one row"),
        ("--resume", "--resume.*--output"),
        ("--\x1b[31m", r"\?\[31m"),
    ],
)
def test_a_mistake_is_one_line_with_the_value_and_the_remedy(refused, words, said):
    line = refused(Flags, *words.split())
    assert re.search(said, line) and line[:-1].isprintable(), line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("", "--quantizer_path FILE.*--calibrate"),
        ("--calibrate {} --abits 16", "nothing to fit at 16 bits"),
        ("--calibrate {} --nuq --nf", "nf and nuq are several methods"),
        ("--calibrate {} --fisher", "--fisher.*add --nuq"),
        ("--calibrate {} --clamp --nuq", "--clamp.*nuq has none"),
        ("--calibrate {} --cap_outliers 0.01", "--cap_outliers.*--include_sparse"),
        ("--calibrate {} --abits 4,3 --export_kvquant e.pkl", "--export_kvquant.*one width"),
        ("--calibrate {} --output a.json", "--output .*leave it out with --calibrate"),
        ("--calibrate {} --abits 4,1.5", "--abits 1.5: uniform takes 2 to 8 bits, --klt fractions too"),
        ("--calibrate {} --nuq --abits 1", "--abits 1: nuq takes 2 to 8 bits"),
        ("--calibrate {} --klt --abits 8.5", "unknown width '8.5': .*0.01 to 8"),
        ("--calibrate {} --klt --abits 0", "unknown width '0'"),
        ("--calibrate {} --klt --abits 2,-1", "unknown width '-1'"),
        ("--calibrate {} --klt --abits nan", "unknown width 'nan'"),
        ("--calibrate {} --klt --abits 0.000001", "unknown width '0.000001'"),
        ("--calibrate {} --klt --abits 2 --export_kvquant e.pkl", "KVQuant's own file, which cannot hold klt"),
        ("{} --kv_format aqua --attribution", "--attribution takes layers apart.*below"),
        ("--calibrate {} --predict", "--predict and --klt_metric are for transform coding: add --klt"),
        ("--calibrate {} --nuq --klt_metric pca", "--predict and --klt_metric are for transform coding: add --klt"),
        ("--calibrate {} --klt --nuq", "nuq and klt are several methods: .* without --nuq or --klt"),
        ("--calibrate {} --nuq --plot_bits a.png", "--plot_bits shows how transform coding shares bits: add --klt"),
        ("--kv_format q4_0 --plot_bits a.png", "--plot_bits shows how transform coding shares bits: add --klt"),
        ("{} --abits 16 --plot_bits a.png", "--plot_bits .* a width below 16"),
        (
            "--calibrate {} --klt --plot_bits a.pdf",
            "--plot_bits: must be a file that ends in .png or .svg, got 'a.pdf'",
        ),
    ],
)
def test_a_mistake_at_the_calibrated_script(refused, words, said):
    assert re.search(said, refused(CalibratedFlags, *words.format(" ".join(PATH)).split()))


def test_one_gpu_is_no_place_for_two_processes(parsed, refused, monkeypatch):
    assert parsed(Flags, "--device", "cuda:1")[0].device == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--device cuda:1 is one GPU, and there are 2 processes" in refused(Flags, "--device", "cuda:1")


def test_a_flag_without_effect_is_said(parsed):
    for cls, words, said in (
        (Flags, "--sparsity_threshold 0.9", ["--sparsity_threshold has no effect without --include_sparse"]),
        (Flags, "--sparsity_threshold 0.9 --include_sparse", []),
        (CalibratedFlags, "--calibrate --fisher_weighting code", ["--fisher_weighting has no effect without --fisher"]),
        (CalibratedFlags, "--calibrate --limit 8 --seqlen 9", ["--limit has no effect with --calibrate"]),
        (CalibratedFlags, "--limit 8", []),
    ):
        flags, given = parsed(cls, *words.split(), *(PATH if cls is CalibratedFlags else ()))
        assert flags.vain(given) == said


def test_the_page_of_flags_is_the_parser():
    assert as_markdown(CalibratedFlags) in (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")


def test_the_methods_of_the_readme_are_those_of_the_program():
    _, rest = (ROOT / "README.md").read_text(encoding="utf-8").split("<!-- methods -->")
    rows = [line for line in rest.split("<!-- /methods -->")[0].splitlines() if line.startswith("|")][2:]
    assert len(rows) == len(METHODS)
    for row, (name, method) in zip(rows, METHODS.items(), strict=True):
        assert name in row.split("|")[1] and method.about in row and method.source in row
        assert ("(calibrated)" in row) == method.calibrated
