"""Pictures: what is drawn is what was measured, it is labelled, and labels can be read."""

import copy
import itertools
import json
import os
import random
import warnings
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest
import torch
from conftest import DYNAMIC_SCRIPT, NANO, SAMPLE, run_script
from matplotlib.collections import LineCollection
from matplotlib.text import Text

from quant_utils import ScalarQuantizer
from simquant import component_plots, plots
from simquant.flags import Flags
from simquant.plans import Pair, Row
from simquant.sites import find_sites

TEXT = ("--datasets", SAMPLE, "--seqlen", "128", "--limit", "6")
WIDTHS = (8, 6, 5, 4, 3, 2, "4/2")


def rows_of(texts=1, widths=WIDTHS, ratio=4.0, error=0.03, first=40.0):
    """Rows of a sweep as report.all_results gives them: a bit more divides the increase of perplexity by ratio."""
    rows = []
    for number in range(texts):
        unquantized = {"ppl": 16.5 + number, "ppl_se": 0.2, "delta_ppl": 0.0, "delta_ppl_se": 0.0, "avg_bits": 16.0}
        rows.append({"dataset": f"text{number}.txt", "format": "unquantized", "abits": 16, **unquantized})
        for width in widths:
            bits = sum(map(int, width.split("/"))) / 2 if isinstance(width, str) else width
            delta = first * (1 + number / 10) * ratio**-bits * (1.5 if isinstance(width, str) else 1)
            figures = {"ppl": 16.5 + delta, "delta_ppl": delta, "delta_ppl_se": error * abs(delta)}
            rows.append({**rows[-1], **figures, "format": "uniform", "abits": width, "avg_bits": bits + 0.25})
    return rows


@pytest.fixture(scope="module")
def attribution(tmp_path_factory):
    """Return (process, report) of an attribution, its bars and a layer's activations drawn."""
    folder = tmp_path_factory.mktemp("attribution")
    flags = ("--abits", "2", "--attribution", "--include_sparse", "--plot", folder / "layers.svg")
    flags = (*flags, "--plot_activations", folder / "k.png", "--output", folder / "out.json")
    process = run_script(DYNAMIC_SCRIPT, NANO, *TEXT, *flags)
    assert process.returncode == 0 and process.stderr == ""
    assert ET.parse(folder / "layers.svg").getroot().tag.endswith("svg")
    assert (folder / "k.png").read_bytes().startswith(b"\x89PNG")
    return process, json.loads((folder / "out.json").read_text())


def test_an_attribution_has_a_row_and_a_bar_for_each_part_and_layer(attribution):
    process, rows = attribution[0], attribution[1]["results"]
    names = ["nothing", "keys", "values", "keys and values", *(f"layer {i}" for i in range(6))]
    assert [row["quantized"] for row in rows] == names
    assert [row["layer"] for row in rows] == [None] * 4 + list(range(6)) and "keys and values" in process.stdout
    assert rows[1]["value_bits"] == rows[2]["key_bits"] == 16 > rows[3]["key_bits"]
    figure = plots.draw_attribution(rows, "a title")
    left, right = figure.axes
    assert [bar.get_height() for bar in left.patches] == [row["delta_ppl"] for row in rows[1:4]]
    assert [bar.get_height() for bar in right.patches] == [row["delta_ppl"] for row in rows[4:]]
    assert left.get_ylabel() and right.get_xlabel() and figure.get_suptitle() == "a title"


def test_the_curve_is_the_rows_with_their_errors():
    rows = rows_of(widths=(4, 2), ratio=2)
    figure = plots.draw_sweep(rows, "a title")
    (axes,) = figure.axes
    line, _, (bars,) = axes.containers[0]
    assert list(line.get_xdata()) == [rows[2]["avg_bits"], rows[1]["avg_bits"]]
    assert list(line.get_ydata()) == [rows[2]["delta_ppl"], rows[1]["delta_ppl"]]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(rows[2]["delta_ppl_se"])
    assert axes.get_title() == "a title"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "unquantized",
        "text0.txt (unquantized: 16.50)",
    ]


def test_a_line_joins_the_widths_that_keys_and_values_share():
    (axes,) = plots.draw_sweep(rows_of(widths=(3, "4/2", "3/2", 2))).axes
    joined, alone = (container.lines[0] for container in axes.containers)
    assert list(joined.get_xdata()) == [2.25, 3.25] and joined.get_linestyle() == "-"
    assert list(alone.get_xdata()) == [2.75, 3.25] and alone.get_linestyle() == "None"


@pytest.mark.parametrize("ratio", [1.1, 2, 4], ids=["linear", "log", "steep"])
@pytest.mark.parametrize("texts", [1, 2, 3])
def test_every_point_has_a_label_over_no_other_and_inside_the_axes(tmp_path, texts, ratio):
    rows = rows_of(texts, ratio=ratio)
    figure = plots.draw_sweep(rows, "a title\nof two lines")
    plots.save_figure(str(tmp_path / "a.png"), figure)
    (axes,) = figure.axes
    boxes = {text: Text.get_window_extent(text) for text in axes.texts}  # without the line to its point
    known = sorted(f"{row['abits']}-bit {row['delta_ppl']:+.3g}" for row in rows if row["abits"] != 16)
    assert sorted(text.get_text() for text in boxes) == known
    for one, other in itertools.combinations(boxes.values(), 2):
        assert not one.overlaps(other)
    for text, box in boxes.items():
        assert all(axes.bbox.contains(*corner) for corner in box.corners()), text


COMPARED = (  # {format: (bits an entry, increase of perplexity)}, about as formats of 2 to 8 bits do
    "fp8 8 .002, fp8_e5m2 8 .01, int8_per_token_head 8.25 .001, q8_0 8.5 .0005, q8_0_rot 8.5 .0005, mxfp8 8.25 .003,"
    "fp8_per_token_head 8.25 .002, turbomind8 8.25 .0008, turboquant_k8v4 6.5 .02, q5_1 6 .02, q5_0 5.5 .03,"
    "q5_1_rot 6 .018, q5_0_rot 5.5 .026, q4_1 5 .07, q4_1_rot 5 .06, q4_0 4.5 .09, q4_0_rot 4.5 .07, iq4_nl 4.5 .07,"
    "iq4_nl_rot 4.5 .06, nvfp4 4.5 .08, nvfp4_scale1 4.5 .2, mxfp4 4.25 .4, int4_per_token_head 4.25 .08, nf 4 .09,"
    "turbomind4 4.25 .15, quanto4 4.5 .1, quanto2 2.5 9, hqq4 4.5 .09, kivi4 5.01 .05, kivi2 3.01 .6, uniform 4 .11,"
    "quarot4 4.2 .1, quarot3 3.2 .5, turboquant4_nc 5.6 .05, turboquant3_nc 4.9 .1, turboquant_k3v4_nc 5.2 .07,"
    "q8_0/q4_0 6.5 .04"
)
FORMATS = {name: (float(bits), float(delta)) for name, bits, delta in map(str.split, COMPARED.split(","))}
ON_FRONT = [  # of COMPARED, from few bits to many
    "quanto2", "kivi2", "quarot3", "nf", "int4_per_token_head", "iq4_nl_rot", "kivi4", "q5_0_rot", "q5_1_rot", "fp8",
    "turbomind8", "q8_0", "q8_0_rot",
]  # fmt: skip


def rows_of_formats(formats, error=0.1, dataset="text.txt"):
    """Rows of a comparison of {format: (bits, increase)}, where standard errors are this share, or 0.001."""
    rows = rows_of(widths=())
    for name, (bits, delta) in formats.items():
        figures = {"avg_bits": bits, "ppl": 16.5 + delta, "delta_ppl": delta, "delta_ppl_se": max(error * delta, 0.001)}
        rows.append({**rows[0], **figures, "format": name, "abits": int(bits)})
    return [row | {"dataset": dataset} for row in rows]


def random_formats(seed, count=40):
    """Formats of which many need as many bits, and some are long."""
    draw = random.Random(seed)
    names = [f"{draw.choice(['q', 'mxfp', 'some_long_name_of_a_format'])}{number}" for number in range(count)]
    return {name: (draw.choice([3, 4, 4.25, 4.5, 8.5]), 10 ** draw.uniform(-3, 1)) for name in names}


def assert_all_is_named(axes, named):
    """Each of {name: (x, y)} stands once in axes, belongs to its point, and lies over no other and inside."""
    axes.figure.draw_without_rendering()
    boxes = {text: Text.get_window_extent(text) for text in axes.texts}  # without the line to its point
    assert sorted((text.get_text(), *text.xy) for text in boxes) == sorted((name, *at) for name, at in named.items())
    for one, other in itertools.combinations(boxes, 2):
        assert not boxes[one].overlaps(boxes[other]), (one, other)
    for text, box in boxes.items():
        assert all(axes.bbox.contains(*corner) for corner in box.corners()), text


@pytest.mark.parametrize("formats", [FORMATS, *map(random_formats, range(3))], ids=["known", "0", "1", "2"])
def test_every_format_has_its_name_over_no_other_and_inside_the_axes(tmp_path, formats):
    figure = plots.draw_formats(rows_of_formats(formats), "a title\nof two lines")
    plots.save_figure(str(tmp_path / "a.png"), figure)
    assert_all_is_named(figure.axes[0], formats)


def test_the_front_is_a_line_through_bold_names():
    figure = plots.draw_formats(rows_of_formats(FORMATS), "a title")
    (axes,) = figure.axes
    bold = {text.get_text() for text in axes.texts if text.get_weight() == "bold"}
    assert bold == {*ON_FRONT} and axes.get_yscale() == "symlog" and figure.get_suptitle() == "a title"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["Pareto front"]
    (line,) = (line for line in axes.lines if line.get_label() == "Pareto front")
    assert [*zip(*line.get_data(), strict=True)] == [FORMATS[name] for name in ON_FRONT]
    assert "16.50" in axes.get_title()


def test_each_dataset_has_its_panel_and_formats_of_several_widths_tell_them():
    other = {"q4_0": (4.5, 0.2), "q8_0": (8.5, 0.01)}
    rows = rows_of(widths=(4, 3)) + rows_of_formats(other, dataset="other.txt")
    rows.insert(3, rows[1] | {"format": "q4_0", "avg_bits": 4.5})
    first, second = plots.draw_formats(rows).axes
    at = [(row["avg_bits"], row["delta_ppl"]) for row in rows]
    assert_all_is_named(first, {"uniform 4-bit": at[1], "uniform 3-bit": at[2], "q4_0": at[3]})
    assert_all_is_named(second, other)
    assert first.get_title().startswith("text0.txt") and second.get_title().startswith("other.txt")


@pytest.mark.parametrize("unknown", ["delta_ppl_se", "avg_bits", "delta_ppl"])
def test_a_comparison_without_errors_bits_or_differences_is_drawn(tmp_path, unknown):
    formats = {name: FORMATS[name] for name in ("fp8", "q8_0", "q4_0", "nf", "kivi2")}
    rows = [row | ({unknown: None} if row["abits"] != 16 else {}) for row in rows_of_formats(formats)]
    rows = rows[1:] if unknown == "delta_ppl" else rows
    figure = plots.draw_formats(rows)
    plots.save_figure(str(tmp_path / "a.svg"), figure)
    y = "ppl" if unknown == "delta_ppl" else "delta_ppl"
    named = {row["format"]: (row["avg_bits"] or 16, row[y]) for row in rows if row["abits"] != 16}
    assert_all_is_named(figure.axes[0], named)
    assert len(figure.legends) == (unknown == "delta_ppl_se")


@pytest.mark.parametrize(
    ("rows", "drawn"),
    [
        (rows_of(widths=(4, 3)), "draw_sweep"),
        ([row | {"layer": number} for number, row in enumerate(rows_of(widths=(4, 3)))], "draw_attribution"),
        (rows_of_formats({"q4_0": (4.5, 0.2), "q8_0": (8.5, 0.01)}), "draw_formats"),
        (rows_of_formats({"q4_0": (4.5, 0.2)}), "draw_sweep"),
    ],
)
def test_the_picture_is_that_of_what_is_compared(monkeypatch, rows, drawn):
    for name in ("draw_sweep", "draw_attribution", "draw_formats"):
        monkeypatch.setattr(plots, name, lambda *given, name=name: (name, *given))
    rows = [{"layer": None, **row} for row in rows]
    assert plots.draw_rows(rows, "a title") == (drawn, rows, "a title")


def test_a_title_of_several_formats_leaves_their_settings_to_their_names(model):
    sites, named = find_sites(model), {"uniform": ScalarQuantizer("token"), "nf": ScalarQuantizer("token", levels="nf")}
    settings = {Row(name, 4, "keys and values"): dict.fromkeys(sites, each) for name, each in named.items()}
    settings = {Row("unquantized", 16, "nothing"): {}, **settings}
    options = {"--first_few_fp16": ("sinks", 1), "--include_sparse": ("outliers", 0.01)}

    def title(settings, options):
        plan = SimpleNamespace(settings=lambda sites: settings)
        return plots.heading(
            SimpleNamespace(model="a/b", skip_layers=(0,), options=lambda: options), plan.settings(sites)
        )

    assert title(settings, options) == "b\nwith --first_few_fp16 and --include_sparse\nunquantized layers: 0"
    assert title(settings, {}) == "b\nunquantized layers: 0"
    only = dict([*settings.items()][:2])
    assert title(only, options) == "b\nkeys and values: uniform per token\nunquantized layers: 0"


def test_figures_of_many_magnitudes_have_a_logarithmic_axis_with_every_point_on_it():
    assert plots.draw_sweep(rows_of(widths=(4, 3))).axes[0].get_yscale() == "linear"
    (axes,) = plots.draw_sweep(rows_of()).axes
    assert axes.get_yscale() == "log"
    rows = rows_of(widths=(8, 6, 5, 4, 3, 2))
    for row, delta, error in zip(rows[1:], (-0.004, 0.0, 0.01), (0.003, 0.002, 0.02), strict=False):
        row |= {"delta_ppl": delta, "delta_ppl_se": error}
    (axes,) = plots.draw_sweep(rows).axes
    assert axes.get_yscale() == "symlog"
    bottom, top = axes.get_ylim()
    (bars,) = (each for each in axes.collections if isinstance(each, LineCollection))
    assert len(bars.get_segments()) == 6
    assert all(bottom < y < top for segment in bars.get_segments() for _, y in segment)
    places = axes.transData.transform([(4, row["delta_ppl"]) for row in rows[4:]])[:, 1]
    assert min(b - a for a, b in itertools.pairwise(places)) > 30  # pixels: told apart


@pytest.mark.parametrize(
    "changes", [{"delta_ppl_se": None}, {"delta_ppl": 0.0, "delta_ppl_se": 0.0}, {"avg_bits": None}]
)
def test_a_sweep_without_errors_differences_or_bits_is_drawn(tmp_path, changes):
    rows = [row | (changes if row["abits"] != 16 else {}) for row in rows_of()]
    plots.save_figure(str(tmp_path / "a.png"), plots.draw_sweep(rows))
    unpaired = [row | {"delta_ppl": None} for row in rows[1:]]
    plots.save_figure(str(tmp_path / "b.png"), plots.draw_sweep(unpaired))


def test_a_title_names_the_model_and_what_keys_and_values_go_through(model):
    flags = {"model": "some/where/Llama-3$8B/", "abits": ((16, 16),), "first_few_fp16": 1}
    assert heading_of(model, **flags) == r"Llama-3\$8B"
    lines = heading_of(model, **flags | {"abits": ((16, 2), (4, 4)), "skip_layers": (0,)}).splitlines()
    keys = "keys: uniform per channel, first token exact"
    assert lines[1:] == [keys, "values: uniform per token, first token exact", "unquantized layers: 0"]
    both = {"perchannel": (), "pertoken": ("k_proj", "v_proj"), "kv_format": (Pair("nf", "nf"),)}
    assert heading_of(model, model="m", **both).splitlines() == ["m", "keys and values: NormalFloat per token"]


def heading_of(shape, abits=((4, 4),), **flags):
    """The title of a run with these flags."""
    from simquant.plans import Width

    chosen = Flags(abits=tuple(Width(*each) for each in abits), **flags)
    return plots.heading(chosen, chosen.plan().settings(find_sites(shape)))


def test_the_heat_map_has_the_activations_and_marks_the_outliers(model, windows):
    keys, values = [site for site in find_sites(model) if site.layer == 2]
    sparse = ScalarQuantizer(axis="channel", bits=2, outliers=0.01, sinks=1)
    figure = component_plots.draw_activations(model, windows[0], {keys: sparse, values: ScalarQuantizer("token")}, 2)
    before, after = (torch.from_numpy(axes.images[0].get_array().data) for axes in figure.axes[:2])  # [C,T]
    with torch.inference_mode():
        own = copy.deepcopy(model)  # transformers leaves its hooks on a model that once gave its hidden states
        hidden = own(windows[:1], output_hidden_states=True).hidden_states[2]
        layer = model.model.layers[2]
        known = layer.self_attn.k_proj(layer.input_layernorm(hidden))[0]  # [T,C]
    torch.testing.assert_close(before, known[:256].abs().T, rtol=1e-4, atol=1e-5)
    body = known[1:]
    kept = (body <= body.quantile(0.005, 0)) | (body >= body.quantile(0.995, 0))
    kept = {(token + 1, channel) for token, channel in kept[:255].nonzero().tolist()}
    marks = {tuple(map(int, place)) for place in figure.axes[1].collections[0].get_offsets()}
    assert len(kept) > 100 and len(marks ^ kept) <= 0.02 * len(kept) and len(figure.axes[3].collections) == 0
    assert all(after[channel, token] == before[channel, token] for token, channel in marks)


@pytest.mark.parametrize("name", ["a$_^b$.txt", "_a.txt", "数据.txt", os.fsdecode(b"a\xff.txt")])
def test_any_file_name_is_a_label(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = plots.draw_sweep(
            [row | {"dataset": f"/some/where/{name}"} for row in rows_of(ratio=2)], plots.drawable(name)
        )
        plots.save_figure(str(tmp_path / "a.svg"), figure)
    assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    assert len(figure.legends[0].texts) == 1
