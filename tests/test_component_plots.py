"""Pictures of caches from inside: what is drawn is what was measured, and constants are what an engine loads."""

import json
import re
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from conftest import CALIBRATED_SCRIPT, NANO, SAMPLE, assert_one_line_error, run_script
from torch import nn

import quant_utils as qu
from quant_utils import ScalarQuantizer, Site, UserError
from simquant import calibration, component_plots, describe, plots, quantizer_file, report
from simquant.calibrated_flags import CalibratedFlags
from simquant.formats.prediction import PredictedQuantizer, with_sources
from simquant.formats.transform import TransformQuantizer
from simquant.plans import Row
from simquant.sites import find_sites

TEXT = ("--seqlen", "128", "--quiet")
SHOWN = re.compile(r"<!--.*?-->|base64,[^\"]*")  # texts and images of an .svg, whose ids are random
SHARED = "--plot_bits shows how transform coding shares bits"


def made(widths, **more):
    """Return a TransformQuantizer of these widths, by a random transform, with evenly spaced levels."""
    size = len(widths)
    levels = torch.cat([torch.linspace(-1, 1, 2**width) if width else torch.zeros(1) for width in widths])
    forward = torch.randn(size, size).half()
    return TransformQuantizer(
        mean=torch.zeros(size), forward=forward, widths=torch.tensor(widths, dtype=torch.int16), levels=levels, **more
    )


def site_of(layer, part, channels):
    return Site(layer, part, f"layers.{layer}.{part}", nn.Identity(), channels)


@pytest.fixture(scope="module")
def coded(model, windows):
    """Return the bundled model's whole cache, transform coded at 1.5 bits with prediction, fitted to two windows."""
    plain = TransformQuantizer(bits=1.5, metric="pca", predict="all", sinks=1)
    setting = with_sources(dict.fromkeys(find_sites(model), plain))
    return calibration.calibrate(model, windows[:2], {"klt": setting})["klt"]


def test_the_picture_of_bits_is_the_widths():
    """Layers 0, 2 and 5; keys of layer 2 and values of layer 5 are not quantized, and layer 5 has fewer channels."""
    draw = np.random.default_rng(0)
    places = [(0, "keys", 6), (0, "values", 6), (2, "values", 6), (5, "keys", 4)]
    setting = {site_of(*place): made(draw.integers(0, 9, place[2]).tolist()) for place in places}
    figure = component_plots.draw_bits(setting, "a title")
    keys, values, bar = figure.axes
    known = {(site.layer, site.part): each.widths.tolist() for site, each in setting.items()}
    blank, absent = [None] * 6, [None] * 2
    for axes, part, lines in (
        (keys, "keys", [known[0, "keys"], blank, known[5, "keys"] + absent]),
        (values, "values", [known[0, "values"], known[2, "values"], blank]),
    ):
        (image,) = axes.images
        assert image.get_array().tolist() == lines
        colours = [image.cmap(image.norm(width)) for width in range(9)]
        assert len(set(colours)) == 9 and image.cmap(image.norm(2.4)) == colours[2]
        widths = [[width for width in line if width is not None] for line in lines]
        assert (
            axes.get_title() == f"{part}: {np.nanmean(np.array(lines, float)):.2f} bits on average"
            and axes.get_xlabel()
        )
        means = [f"{np.mean(each):.2f}" if each else "16" for each in widths]
        assert [text.get_text() for text in axes.texts] == [*means, "mean"]
    assert [label.get_text() for label in keys.get_yticklabels()] == ["0", "2", "5"]
    assert bar.get_yticks().tolist() == list(range(9)) and figure.get_suptitle() == "a title"


def test_the_narrowest_row_that_shares_bits_is_drawn_and_named(monkeypatch):
    site, other = site_of(0, "keys", 4), site_of(1, "keys", 4)
    two = Row("klt", 2, "keys")
    settings = {
        Row("unquantized", 16, "nothing"): {},
        Row("uniform", 1.5, "keys"): {site: ScalarQuantizer("token", 2)},
        Row("klt", 3, "keys"): {site: made([8, 2, 1, 1], bits=3)},
        two._replace(quantized="layer 0", layer=0): {site: made([3, 3, 1, 1], bits=2)},
        two: {site: made([3, 3, 1, 1], bits=2), other: made([2, 2, 1, 0], bits=2)},
    }
    assert component_plots.sharing(settings) == (two, settings[two])
    saved = {}
    monkeypatch.setattr(component_plots, "save_figure", saved.__setitem__)
    component_plots.save_bits("a.png", CalibratedFlags(model="some/where"), settings)
    first, *_, last = saved["a.png"].get_suptitle().splitlines()
    assert first == "where" and last == "klt, abits 2, keys: 1.62 bits a component on average"
    for none in ({}, dict([*settings.items()][:2])):
        with pytest.raises(UserError, match=SHARED):
            component_plots.sharing(none)


def outputs_of(model, window, sites):
    """Return {(layer, part): what the unquantized model gives there for window [T]}, [T,C]."""
    seen = {}

    def see(module, args, out, site):
        seen[site.key] = out[0]

    with torch.no_grad(), qu.hooked((site.module, partial(see, site=site)) for site in sites):
        model.get_decoder()(input_ids=window[None], use_cache=False)
    return seen


def in_fp64(*tensors):
    return (tensor.double().numpy() for tensor in tensors)


def coded_by_hand(x, quantizer, others):
    """Return (components, their levels, what the cache gives back) for x [T,C], in fp64, each level by comparison."""
    x, mean, forward, levels = in_fp64(x, quantizer.mean, quantizer.forward, quantizer.levels)
    predicted = np.zeros_like(x)
    if others:
        predicted = np.concatenate([*others, np.ones((len(x), 1))], 1) @ quantizer.weight.double().numpy()
    components = (x - predicted - mean) @ forward
    own = np.split(levels, np.cumsum([2**width for width in quantizer.widths.tolist()])[:-1])
    nearest = [each[np.abs(column[:, None] - each).argmin(1)] for column, each in zip(components.T, own, strict=True)]
    decoded = np.stack(nearest, 1)
    return components, decoded, decoded @ np.linalg.inv(forward) + mean + predicted


def drawn_components(figure, column):
    """Return (variance, error, widths) [C] as they are drawn in a column."""
    variance, error = (line.get_ydata() for line in figure.axes[column].lines)
    return variance, error, figure.axes[2 + column].patches[0].get_data().values


def test_components_are_drawn_as_quantized_sources_and_levels_give_them(model, windows, coded):
    """Variances, errors and widths of layer 3, against the whole chain of caches before it in fp64."""
    figure = component_plots.draw_activations(model, windows[0], coded, 3, "a title")
    seen, given = outputs_of(model, windows[0], coded), {}
    known = {}
    for site, quantizer in coded.items():
        others = [given[source] for source in quantizer.sources]
        components, decoded, given[site.key] = coded_by_hand(seen[site.key][1:], quantizer, others)
        known[site.key] = (components**2).mean(0), ((decoded - components) ** 2).mean(0), quantizer.widths.numpy()
    assert len(figure.axes) == 4 and figure.get_suptitle() == "a title"
    for column, part in enumerate(qu.PARTS):
        variance, error, widths = drawn_components(figure, column)
        np.testing.assert_allclose(variance, known[3, part][0], rtol=0.03, atol=1e-5)
        np.testing.assert_allclose(error, known[3, part][1], rtol=0.02)
        assert widths.tolist() == known[3, part][2].tolist() and figure.axes[column].get_yscale() == "log"
        assert figure.axes[column].get_title() == f"{part}, layer 3: {widths.mean():.2f} bits (1.5 over all layers)"


def test_errors_are_flat_where_there_are_bits_and_the_variance_where_there_are_none(model, windows, coded):
    """Reverse water-filling, on the text of the fit: a bit divides an error by about four, and none is far off."""
    figure = component_plots.draw_activations(model, windows[0], coded, 3)
    for column in (0, 1):
        variance, error, widths = drawn_components(figure, column)
        assert (error <= 1.001 * variance).all() and 20 < (widths > 0).sum() < 128
        np.testing.assert_allclose(error[widths == 0], variance[widths == 0], rtol=1e-3)
        level = np.median(error[widths > 0])
        assert (np.abs(np.log2(error[widths > 0] / level)) < 2).all() and (error[widths == 0] < 3 * level).all()
        assert variance[widths > 0].max() > 16 * variance[widths > 0].min()


@dataclass(frozen=True, eq=False)
class Rounded(PredictedQuantizer):
    """What is left of a prediction, rounded to quarters."""

    def fit_code(self, x, grad):
        return self

    def coded(self, x):
        return (4 * x).round() / 4


def test_a_format_with_sources_is_drawn_as_they_give_it(model, windows):
    """Keys of layer 1 and of layer 2 are predicted from quantized ones: |K| of layer 2 after that, by hand."""
    keys = [site for site in find_sites(model) if site.part == "keys" and site.layer < 3]
    linked = with_sources(dict.fromkeys(keys, Rounded(predict="aqua")))
    weight = (0.1 * torch.randn(129, 128)).half()
    setting = {site: replace(each, weight=weight if each.sources else None) for site, each in linked.items()}
    figure = component_plots.draw_activations(model, windows[0], setting, 2)
    given = None
    for before in outputs_of(model, windows[0], keys).values():
        predicted = 0 if given is None else given @ weight[:-1].float() + weight[-1]
        given = (4 * (before - predicted)).round() / 4 + predicted
    drawn = [torch.from_numpy(axes.images[0].get_array().data) for axes in figure.axes[:2]]
    torch.testing.assert_close(drawn[0], before[:256].abs().T, rtol=1e-4, atol=1e-5)
    off = (drawn[1] - given[:256].abs().T).abs()
    assert (off > 1e-3).float().mean() < 1e-3  # what rounds the other way
    assert (drawn[1] - (4 * before[:256]).round().abs().T / 4).abs().mean() > 0.01


def test_constants_are_all_that_an_engine_loads():
    """Bytes counted one by one: transform and inverse, mean, widths, levels, prediction; ranges; a shared one once."""
    keys, values = (site_of(0, part, 4) for part in qu.PARTS)
    one = made([8, 2, 1, 0])
    two = replace(made([2, 2, 2, 2]), weight=torch.zeros(9, 4).half(), sources=(keys.key,))
    bytes_of_one = 2 * (16 * 2) + 4 * 4 + 4 * 2 + 4 * (256 + 4 + 2 + 1)
    bytes_of_two = 2 * (16 * 2) + 4 * 4 + 4 * 2 + 4 * 16 + 9 * 4 * 2
    assert report.constant_bytes({keys: one, values: two}) == bytes_of_one + bytes_of_two
    ranged = ScalarQuantizer("channel", 3, lo=torch.zeros(4), hi=torch.ones(4))
    assert report.constant_bytes({keys: ranged, values: ranged}) == 4 * (4 + 4 + 8)
    assert report.constant_bytes({}) == report.constant_bytes({keys: TransformQuantizer()}) == 0


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([2**20, 2**20 + 9], "1.00 MiB for klt"),
        ([0, 2**20, 3 * 2**30], "up to 3.00 GiB for klt"),
        ([0, 100, 1000], None),
        ([2**28], "0.25 GiB for klt"),
    ],
)
def test_constants_are_said_where_they_count_beside_the_cache(capsys, sizes, said):
    """Beside a cache of 64 MiB in 16 bits."""
    found = [replace(site_of(0, part, 4096), tokens=4096) for part in qu.PARTS]
    rows = [Row("klt", 8 - number, "keys") for number in range(len(sizes))]
    describe.print_constants(dict(zip(rows, sizes, strict=True)), found)
    start = "constants beside the cache, such as transforms and levels: "
    assert capsys.readouterr().out == (f"{start}{said}\n" if said else "")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Return the folder of a calibration at 2 and 1 bits, with q.pkl and bits.svg, and of an nf one, nf.pkl."""
    folder = tmp_path_factory.mktemp("fitted")
    flags = ("--calibrate", "--calib_dataset", SAMPLE, "--nsamples", "4", *TEXT)
    pictures = ("--klt", "--predict", "--klt_metric", "pca", "--abits", "2,1", "--plot_bits", folder / "bits.svg")
    for name, more in (("q.pkl", pictures), ("nf.pkl", ("--nf", "--abits", "2"))):
        process = run_script(CALIBRATED_SCRIPT, NANO, *flags, *more, "--quantizer_path", folder / name)
        assert (process.returncode, process.stderr) == (0, "")
    return folder


def test_a_calibration_draws_its_bits_and_an_evaluation_counts_its_constants(fitted, tmp_path):
    evaluation = (CALIBRATED_SCRIPT, NANO, "--quantizer_path", fitted / "q.pkl", "--datasets", SAMPLE, *TEXT)
    pictures = ("--plot_bits", tmp_path / "bits.svg", "--plot_activations", tmp_path / "a.png")
    output = ("--limit", "2", "--baseline", "--report_context", "4096", "--output", tmp_path / "o.json")
    process = run_script(*evaluation, *output, *pictures)
    assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    words, again = (SHOWN.findall((folder / "bits.svg").read_text()) for folder in (fitted, tmp_path))
    assert words == again and "<!-- klt, abits 1, keys and values: 1.00 bits a component on average -->" in words
    held = quantizer_file.load(str(fitted / "q.pkl"))["quantizers"]
    whole = {2: 0, 1: 0}
    for width, quantizer in (each for widths in held.values() for each in widths.items()):
        sources = len(quantizer.sources)
        whole[width] += 2 * 128 * 128 * 2 + 128 * (4 + 2) + 4 * sum(2**n for n in quantizer.widths.tolist())
        whole[width] += (128 * sources + 1) * 128 * 2 if sources else 0
    rows = json.loads((tmp_path / "o.json").read_text())["results"]
    assert [row["constants_gib"] * 2**30 for row in rows] == [0, whole[2], whole[1]]
    line = f"constants beside the cache, such as transforms and levels: up to {whole[2] / 2**20:.2f} MiB for klt"
    assert line in process.stdout.splitlines()
    dry = run_script(*evaluation, "--dry_run", "--report_context", "4096")
    assert line in dry.stdout.splitlines() and dry.returncode == 0


def test_a_picture_of_bits_replaces_no_input_and_nothing_but_pictures(fitted, tmp_path):
    (tmp_path / "notes.png").write_text("precious")
    (tmp_path / "q.png").write_bytes((fitted / "q.pkl").read_bytes())
    evaluation = (CALIBRATED_SCRIPT, NANO, "--datasets", SAMPLE, *TEXT, "--limit", "1")
    fit = (CALIBRATED_SCRIPT, NANO, "--calibrate", "--klt", "--calib_dataset", SAMPLE, *TEXT)
    for command, picture, path, said in (
        (evaluation, "q.png", tmp_path / "q.png", "also read"),
        (evaluation, "notes.png", fitted / "q.pkl", "something else"),
        (fit, "notes.png", tmp_path / "new.pkl", "something else"),
        (fit, "new.png", tmp_path / "new.png", "named twice"),
        (evaluation, "b.png", fitted / "nf.pkl", f"{SHARED}, and --quantizer_path holds nf"),
        ((*evaluation, "--skip_layers", "0,1,2,3,4,5"), "b.png", fitted / "q.pkl", "nothing here is quantized so"),
    ):
        process = run_script(*command, "--quantizer_path", path, "--plot_bits", tmp_path / picture)
        assert_one_line_error(process, said)
    assert (tmp_path / "notes.png").read_text() == "precious" and not (tmp_path / "b.png").exists()
    assert (tmp_path / "q.png").read_bytes() == (fitted / "q.pkl").read_bytes()


@pytest.mark.parametrize("rows", [1, 2])
def test_activations_are_those_of_the_row_that_the_title_names(monkeypatch, rows):
    """Of one row there is nothing to tell apart."""
    site, saved = site_of(0, "keys", 4), {}
    two, three = ({site: ScalarQuantizer("token", bits)} for bits in (2, 3))
    settings = {Row("unquantized", 16, "nothing"): {}, Row("uniform", 2, "keys"): two, Row("nuq", 3, "keys"): three}
    monkeypatch.setattr(component_plots, "draw_activations", lambda *given: given)
    monkeypatch.setattr(component_plots, "save_figure", saved.__setitem__)
    flags = CalibratedFlags(model="some/where", plot_activations="a.png")
    run = report.Run({"text": torch.zeros(2, 4)}, [*settings], [], 4)
    component_plots.draw(flags, "a model", run, dict([*settings.items()][: rows + 1]), two)
    model, window, drawn, layer, title = saved["a.png"]
    assert (model, window.tolist(), drawn, layer) == ("a model", [0] * 4, two, 0)
    assert title.splitlines() == ["where", "keys: uniform per token", "uniform, abits 2, keys"][: rows + 1]


def test_titles_and_labels_lie_over_no_other(tmp_path):
    """A figure of one panel has room for a whole title."""
    setting = {site_of(layer, "keys", 16): made([3] * 16) for layer in range(3)}
    figure = component_plots.draw_bits(setting, "M" * 60 + "\n" + "m" * 60)
    plots.save_figure(str(tmp_path / "a.png"), figure)
    title, whole = figure._suptitle.get_window_extent(), figure.bbox
    assert whole.x0 <= title.x0 and title.x1 <= whole.x1
    (axes, bar) = figure.axes
    beside = [text.get_window_extent() for text in axes.texts]
    assert not any(box.overlaps(bar.get_window_extent()) for box in beside)
    assert not any(one.overlaps(other) for one in beside for other in beside if one is not other)
