"""Pictures of what caches give back: a layer before and after quantization, and where transform coding spends its bits.

Components are what transform coding quantizes, in the order of falling variance (simquant/formats/transform.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import quant_utils as qu
from quant_utils import Quantized, Quantizer, Setting, Site, UserError
from simquant import calibration
from simquant.formats.prediction import product
from simquant.formats.transform import MOST, TransformQuantizer
from simquant.plots import COLOURS, DPI, heading, save_figure

DRAWN_TOKENS = 256
NO_BITS, NOT_QUANTIZED = "#e8e8e8", "#b0b0b0"  # colours of components without bits, and of hatching where nothing is
WIDEST = 7.0  # inches of a panel, in which 1024 components have a pixel each
LEAST = 8.0  # inches of a figure, in which its title has room
AXIS_OF_COMPONENTS = "component, in the order of falling variance"


class Passage(NamedTuple):
    """A quantizer, what comes to it of a window of text, and what it gives back."""

    quantizer: Quantizer
    x: Tensor  # [1,T,C]
    others: Sequence[Tensor]  # [1,T,C'] each, what its sources gave back
    given: Quantized


def passages(model, window: Tensor, setting: Setting, layer: int) -> dict[Site, Passage]:
    """Return {site of a layer: what passes} for window [T], as a calibration sees it.

    What comes is the unquantized model's, the same for every format; what a quantizer is predicted from are quantized
    caches, in model order from the first source on.
    """
    wanted = {site.key for site in setting if site.layer == layer}
    for site, quantizer in reversed([*setting.items()]):  # sources come before what is predicted from them
        wanted |= set(quantizer.sources) if site.key in wanted else set()
    needed = {site: quantizer for site, quantizer in setting.items() if site.key in wanted}
    came, passed = calibration.record(model, calibration.places_of(needed), window[None]), {}
    for tap in qu.make_taps(needed).values():
        x = came[tap.site].to(tap.site.device)
        quantizer, others = tap.quantizer.to(x.device), tap.others(x.device)
        given = quantizer.quantize(x, others)
        tap.remember(given.values)
        if tap.site.layer == layer:
            passed[tap.site] = Passage(quantizer, x, others, given)
    return passed


def draw_activations(model, window: Tensor, setting: Setting, layer: int, title: str = ""):
    """Draw what quantization does to the keys and values of one layer; window is [T] ids.

    It is their components if transform coding quantizes both, else their magnitudes.
    """
    passed = passages(model, window, setting, layer)
    is_transformed = all(isinstance(each.quantizer, TransformQuantizer) for each in passed.values())
    return (draw_components if is_transformed else draw_magnitudes)(passed, title)


def draw_magnitudes(passed: Mapping[Site, Passage], title: str = ""):
    """Draw |K| and |V| over tokens and channels, before and after quantization, kept outliers marked.

    Ranges are those of the whole window, and its first DRAWN_TOKENS tokens are drawn.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6 * len(passed)), layout="constrained")
    panels = figure.subplots(len(passed), 2, squeeze=False, sharex=True, sharey="row")
    for (site, (quantizer, x, _, given)), line in zip(passed.items(), panels, strict=True):
        images = [each[0, :DRAWN_TOKENS].float().abs().T.cpu().numpy() for each in (x, given.values)]  # [C,T]
        smooth = "nearest" if len(images[0]) <= 512 else "antialiased"  # more channels than the picture has lines
        style = {"cmap": "cividis", "vmin": 0, "vmax": images[0].max(), "interpolation": smooth}
        for axes, image in zip(line, images, strict=True):
            drawn = axes.imshow(image, aspect="auto", origin="lower", **style)
            axes.set_xlabel("token")
        line[0].set_ylabel("channel")
        line[0].set_title(f"{site.part}, layer {site.layer}, before")
        line[1].set_title(f"after: {quantizer.bits} bits")
        if given.outliers is not None:
            places = given.outliers[0, :DRAWN_TOKENS].nonzero().T.cpu()
            line[1].scatter(*places, s=3, linewidths=0, color=COLOURS[1])
            line[1].set_title(f"{line[1].get_title()}, outliers marked")
        figure.colorbar(drawn, ax=list(line), label="magnitude")
    figure.suptitle(title, fontsize=9)
    return figure


def mean_squares(passage: Passage) -> tuple[Tensor, Tensor]:
    """Return (variance, error) [C] of what a TransformQuantizer makes of a window behind the sinks, by component.

    The variance is that of the components, of the residual if there is a prediction, about the calibration's mean. The
    error is that of the code, in fp32: what a cache gives back is then rounded to the model's dtype.
    """
    quantizer: Any = passage.quantizer
    x, *others = (each[:, quantizer.sinks :].float() for each in (passage.x, *passage.others))
    residual = x - quantizer.predicted(others, x.dtype)
    decoded = quantizer.quantize(passage.x.float(), passage.others).values[:, quantizer.sinks :]
    moved = (product(each, quantizer.forward, x.dtype) for each in (residual - quantizer.mean, decoded - x))
    variance, error = (each.double().square().mean((0, 1)).cpu() for each in moved)
    return variance, error


def draw_components(passed: Mapping[Site, Passage], title: str = ""):
    """Draw each component's variance, its error, and its bits, for sites that a TransformQuantizer quantizes.

    Reverse water-filling shows: errors are at one level where there are bits, and at the variance where there are none.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(LEAST, 5 * len(passed) + 1), 5.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(2, len(passed), squeeze=False, sharex="col", sharey="row", height_ratios=(3, 1))
    for (site, passage), (upper, lower) in zip(passed.items(), panels.T, strict=True):
        variance, error = mean_squares(passage)
        widths = widths_of(passage.quantizer.to(torch.device("cpu")))
        upper.plot(variance, color=COLOURS[5], linewidth=3, label="variance")
        upper.plot(
            error,
            color=COLOURS[1],
            linestyle="none",
            marker=".",
            markersize=4,
            label="mean squared error after quantization",
        )
        upper.set_yscale("log")
        bits = f"{widths.mean():.2f} bits ({passage.quantizer.bits} over all layers)"
        upper.set_title(f"{site.part}, layer {site.layer}: {bits}", fontsize=10)
        lower.stairs(widths, np.arange(len(widths) + 1) - 0.5, fill=True, color=COLOURS[0])
        lower.set_yticks(range(0, MOST + 1, 2), minor=False)
        lower.set_ylim(0, MOST)
        lower.set_xlim(-0.5, len(widths) - 0.5)
        lower.set_xlabel(AXIS_OF_COMPONENTS)
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
    panels[0, 0].set_ylabel("mean square of the component")
    panels[1, 0].set_ylabel("bits")
    figure.suptitle(title, fontsize=9)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def sharing(settings: Mapping[Any, Setting]) -> tuple[Any, Setting]:
    """Return (row, what transform coding quantizes there), of the fewest bits, of those the one that quantizes most.

    UserError if no row has that.
    """
    found = {
        row: {site: each for site, each in setting.items() if isinstance(each, TransformQuantizer)}
        for row, setting in settings.items()
    }
    rows = [row for row, setting in found.items() if setting]
    if not rows:
        raise UserError("--plot_bits shows how transform coding shares bits, and nothing here is quantized so")
    row = min(rows, key=lambda row: (np.mean([each.bits for each in found[row].values()]), -len(found[row])))
    return row, found[row]


def draw_bits(setting: Setting, title: str = ""):
    """Draw the bits of every component: a line for each layer, a panel for keys and one for values.

    Beside a line stands its mean. Where a layer has keys or values alone quantized, the other's line is hatched.
    """
    from matplotlib.figure import Figure

    layers = sorted({site.layer for site in setting})
    parts = [part for part in qu.PARTS if any(site.part == part for site in setting)]
    across = max(site.channels for site in setting)
    width, height = min(WIDEST, 3.4 + across / 256) * len(parts) + 1.2, 1.9 + 0.19 * max(6, len(layers))
    figure = Figure(figsize=(max(LEAST, width), height), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    for part, axes in zip(parts, panels, strict=True):
        mine = {site.layer: quantizer for site, quantizer in setting.items() if site.part == part}
        drawn = draw_widths(axes, [widths_of(mine[layer]) if layer in mine else None for layer in layers])
        mean = np.mean(np.concatenate([widths_of(each) for each in mine.values()]))
        axes.set_title(f"{part}: {mean:.2f} bits on average", fontsize=10)
    panels[0].set_ylabel("layer")
    panels[0].set_yticks(range(len(layers)), layers, fontsize=7)
    look: dict[str, Any] = {"pad": 0.01, "fraction": 0.025, "aspect": 30, "label": "bits of the component"}
    figure.colorbar(drawn, ax=list(panels), ticks=range(MOST + 1), **look)
    figure.suptitle(title, fontsize=9)
    return figure


def widths_of(quantizer: Any) -> np.ndarray:
    """Return [C] the bits of a TransformQuantizer's components."""
    return quantizer.widths.numpy()


def draw_widths(axes, lines: Sequence[np.ndarray | None]):
    """Draw a line of an image for each of lines [C] of bits, and its mean beside it. Return the image."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    image = np.full((len(lines), max(len(each) for each in lines if each is not None)), np.nan)
    beside = {"transform": axes.get_yaxis_transform(), "fontsize": 7}
    for number, widths in enumerate(lines):
        image[number, : 0 if widths is None else len(widths)] = widths
        axes.text(1.01, number, "16" if widths is None else f"{widths.mean():.2f}", va="center", **beside)
    axes.text(1.01, -0.55, "mean", va="bottom", **beside)
    axes.patch.set(hatch="////", edgecolor=NOT_QUANTIZED)  # it shows where there is no image
    axes.set_xlabel(AXIS_OF_COMPONENTS)
    colours = ListedColormap([NO_BITS, *matplotlib.colormaps["viridis_r"](np.linspace(0, 1, MOST))])
    style: dict[str, Any] = {"cmap": colours, "vmin": -0.5, "vmax": MOST + 0.5, "interpolation": "nearest"}
    return axes.imshow(np.ma.masked_invalid(image), aspect="auto", **style)


def save_bits(path: str, flags, settings: Mapping[Any, Setting]) -> None:
    """Write the picture of --plot_bits: of the narrowest setting that shares bits, which its title names."""
    row, setting = sharing(settings)
    title = heading(flags, {row: setting})
    mean = np.concatenate([widths_of(each) for each in setting.values()]).mean()
    save_figure(path, draw_bits(setting, f"{title}\n{row}: {mean:.2f} bits a component on average"))


def draw(flags, model, run, settings: Mapping[Any, Setting], setting: Setting) -> None:
    """Save the pictures of caches that the flags ask for: --plot_bits of settings, --plot_activations of setting."""
    if getattr(flags, "plot_bits", None) is not None:
        save_bits(flags.plot_bits, flags, settings)
    if flags.plot_activations is not None:
        window, layer = next(iter(run.texts.values()))[0], drawn_layer(setting, flags.plot_layer)
        row = next(row for row, each in settings.items() if each is setting)
        title = heading(flags, {row: setting}) + f"\n{row}" * (sum(map(bool, settings.values())) > 1)
        save_figure(flags.plot_activations, draw_activations(model, window, setting, layer, title))


def drawn_layer(setting: Setting, asked: int | None) -> int:
    """Return the layer to draw: the one that is asked for, else the middle one. UserError if it is not quantized."""
    layers = sorted({site.layer for site in setting})
    layer = layers[len(layers) // 2] if asked is None and layers else asked
    if layer is None or layer not in layers:
        has = f"layers {', '.join(map(str, layers))} are quantized" if layers else "no layer is quantized"
        raise UserError(f"--plot_layer {asked} is not there to draw: {has}")
    return layer
