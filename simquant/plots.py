"""Pictures: a sweep, an attribution, and a layer's keys and values before and after quantization."""

from __future__ import annotations

import io
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import quant_utils as qu
from quant_utils import Setting, UserError
from simquant import report
from simquant.files import write_atomically

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by everyone
MARKERS = "os^Dv*"
DRAWN_TOKENS = 256


def save_figure(path: str, figure) -> None:
    """Write a matplotlib figure, atomically, as its ending says."""
    content, form = io.BytesIO(), Path(path).suffix[1:].lower()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a text file's name: it is drawn as a box
        figure.savefig(content, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def titles_of(rows: Iterable[Mapping]) -> dict[str, str]:
    """Return {dataset: its name, or that of its file}, where matplotlib sees no formula and no label that it hides."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    names = [Path(dataset).name for dataset in datasets]
    names = names if len(set(names)) == len(names) else datasets
    drawable = [name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$") for name in names]
    return {dataset: " " * (name[0] == "_") + name for dataset, name in zip(datasets, drawable, strict=True)}


def errors_of(rows: Iterable[Mapping], name: str) -> list[float] | None:
    """Return the standard errors of a figure, None where a single window has none."""
    errors = [row[f"{name}_se"] for row in rows]
    return None if None in errors else errors


def draw_sweep(rows: Sequence[Mapping]):
    """Draw perplexity, or how much it grows, over average bits, a curve for each dataset, with standard errors."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    is_paired = rows[0]["delta_ppl"] is not None
    name = "delta_ppl" if is_paired else "ppl"
    styles = zip(titles_of(rows).items(), itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    for (dataset, title), colour, marker in styles:
        unquantized, *others = (row for row in rows if row["dataset"] == dataset)
        shown = sorted(others if is_paired else [unquantized, *others], key=bits_of)
        bits = [bits_of(row) for row in shown]
        label = f"{title} (unquantized: {unquantized['ppl']:.2f})" if is_paired else title
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 1.5, "capsize": 4}
        axes.errorbar(bits, [row[name] for row in shown], errors_of(shown, name), label=label, **style)
        for x, row in zip(bits, shown, strict=True):
            text = f"{row[name]:+.3g}" if is_paired else f"{row[name]:.2f}"
            axes.annotate(text, (x, row[name]), (6, 6), textcoords="offset points", color=colour)
    if is_paired:
        axes.axhline(0, color="black", linestyle="--", linewidth=1, label="unquantized")
    axes.set_xlabel("average bits per cached entry")
    axes.set_ylabel("increase of perplexity (± SE)" if is_paired else "perplexity (± SE)")
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def bits_of(row: Mapping) -> float:
    """Return a row's place on the axis of bits; 16 where a model has no storage figures."""
    return 16.0 if row["avg_bits"] is None else row["avg_bits"]


def draw_attribution(rows: Sequence[Mapping]):
    """Draw bars of how much the perplexity grows if only a part of the cache is quantized, a line for each dataset."""
    from matplotlib.figure import Figure

    titles = titles_of(rows)
    figure = Figure(figsize=(8, 4 * len(titles)), layout="constrained")
    panels = figure.subplots(len(titles), 2, squeeze=False, width_ratios=(1, 3))
    for (dataset, title), line in zip(titles.items(), panels, strict=True):
        _, *mine = (row for row in rows if row["dataset"] == dataset)
        parts, layers = ([row for row in mine if (row["layer"] is None) == is_part] for is_part in (True, False))
        names = [row["quantized"].replace(" and ", "\n+ ") for row in parts], [str(row["layer"]) for row in layers]
        for axes, labels, shown, colour in zip(line, names, (parts, layers), COLOURS, strict=False):
            heights = [row["delta_ppl"] for row in shown]
            axes.bar(labels, heights, yerr=errors_of(shown, "delta_ppl"), capsize=3, color=colour)
            axes.axhline(0, color="black", linewidth=1)
            axes.grid(axis="y", alpha=0.3)
            axes.set_ylabel("increase of perplexity (± SE)")
        line[0].set_xlabel("quantized in all layers")
        line[1].set_xlabel("the only quantized layer")
        line[1].set_xticks(range(0, len(layers), math.ceil(len(layers) / 16)))
        line[1].set_title(f"{title}, {mine[0]['abits']} bits")
    return figure


def draw_activations(model, window: Tensor, setting: Setting, layer: int):
    """Draw |K| and |V| of one layer over tokens and channels, before and after quantization, kept outliers marked.

    window is [T] ids; ranges are those of all of it, and its first DRAWN_TOKENS tokens are drawn.
    """
    from matplotlib.figure import Figure

    mine = {site: quantizer for site, quantizer in setting.items() if site.layer == layer}
    before = qu.record(model, mine, window[None])
    figure = Figure(figsize=(8, 3.6 * len(mine)), layout="constrained")
    panels = figure.subplots(len(mine), 2, squeeze=False, sharex=True, sharey="row")
    for (site, quantizer), line in zip(mine.items(), panels, strict=True):
        given = quantizer.to(before[site].device).quantize(before[site], {})
        images = [each[0, :DRAWN_TOKENS].float().abs().T.numpy() for each in (before[site], given.values)]  # [C,T]
        smooth = "nearest" if len(images[0]) <= 512 else "antialiased"  # more channels than the picture has lines
        style = {"cmap": "cividis", "vmin": 0, "vmax": images[0].max(), "interpolation": smooth}
        for axes, image in zip(line, images, strict=True):
            drawn = axes.imshow(image, aspect="auto", origin="lower", **style)
            axes.set_xlabel("token")
        line[0].set_ylabel("channel")
        line[0].set_title(f"{site.part}, layer {layer}, before")
        line[1].set_title(f"after: {quantizer.bits} bits")
        if given.outliers is not None:
            line[1].scatter(*given.outliers[0, :DRAWN_TOKENS].nonzero().T, s=3, linewidths=0, color="#D55E00")
            line[1].set_title(f"{line[1].get_title()}, outliers marked")
        figure.colorbar(drawn, ax=list(line), label="magnitude")
    return figure


def draw(flags, model, run, setting: Setting) -> None:
    """Save the pictures that the flags ask for; setting is what --plot_activations shows."""
    rows = report.all_results(run)
    if flags.plot is not None:
        save_figure(flags.plot, draw_attribution(rows) if flags.attribution else draw_sweep(rows))
    if flags.plot_activations is not None:
        window, layer = run.texts[flags.datasets[0]][0], drawn_layer(setting, flags.plot_layer)
        save_figure(flags.plot_activations, draw_activations(model, window, setting, layer))


def drawn_layer(setting: Setting, asked: int | None) -> int:
    """Return the layer to draw: the one that is asked for, else the middle one. UserError if it is not quantized."""
    layers = sorted({site.layer for site in setting})
    layer = layers[len(layers) // 2] if asked is None and layers else asked
    if layer is None or layer not in layers:
        has = f"layers {', '.join(map(str, layers))} are quantized" if layers else "no layer is quantized"
        raise UserError(f"--plot_layer {asked} is not there to draw: {has}")
    return layer
