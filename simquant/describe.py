"""What is printed of a run besides its figures: its settings, and what --dry_run shows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from quant_utils import PARTS, Setting, Site
from simquant import memory, models, prefixes, report, texts
from simquant.sites import PlacedSite, layers_without_attention

WORTH_SAYING = 1e-3  # of the cache in 16 bits: from there on the bytes of constants are printed


def print_what_was_measured(model, config, flags, settings: Mapping[Any, Setting], run: report.Run) -> None:
    """Print below the table of a run's rows what was measured how."""
    print()
    print_constants(dict(zip(run.rows, run.constants, strict=True)), run.sites)
    print_settings(model, config, flags, settings)
    print_hybrid(model, run.sites)
    if flags.quantizes() and not run.is_paired:
        print("\n--baseline also measures the unquantized model, and shows what quantization costs")


def print_constants(sizes: Mapping[Any, int], found: Sequence[Site]) -> None:
    """Print sizes {row: report.constant_bytes}, of each format the most, if that is WORTH_SAYING beside the cache."""
    words = []
    for name in dict.fromkeys(row.format for row in sizes):
        shown = {size_words(size): size for row, size in sizes.items() if row.format == name}
        text, most = max(shown.items(), key=lambda each: each[1])
        up_to = "up to " if len(shown) > 1 else ""
        words += [f"{up_to}{text} for {name}"] if most > WORTH_SAYING * cache_bytes(found) else []
    if words:
        print(f"constants beside the cache, such as transforms and levels: {', '.join(words)}")


def cache_bytes(found: Sequence[Site]) -> int:
    """Return what the cache takes in 16 bits."""
    return 2 * sum(site.channels * site.tokens for site in found)


def size_words(size: float) -> str:
    """Return bytes in GiB; in MiB if they are few."""
    return f"{size / 2**30:.2f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:.2f} MiB"


def print_settings(model, config, flags, settings: Mapping[Any, Setting]) -> None:
    """Print what was measured, on which text, quantized how."""
    attention, where = model.config._attn_implementation, memory.devices_of(model)
    line = f"{models.dtype_of(model)} on {where}, {attention} attention{models.weights_line(config)}"
    print(f"{flags.model}: {line}, windows of {flags.seqlen} tokens")
    for dataset in flags.datasets:
        print(texts.about(dataset, texts.bos_of(flags, config)))
    formats = list(dict.fromkeys(row.format for row in settings if not row.is_unquantized))
    if len(formats) == 1:
        print_quantizers(settings)


def print_quantizers(settings: Mapping[Any, Setting]) -> None:
    """Print a line for keys and one for values of each format: their widths, and how they are quantized."""
    formats = list(dict.fromkeys(row.format for row in settings if not row.is_unquantized))
    for name, part in itertools.product(formats, PARTS):
        held = [setting for row, setting in settings.items() if row.format == name]
        mine = [q for setting in held for site, q in setting.items() if site.part == part]
        if mine:
            start = f"{name}, {part}" if len(formats) > 1 else part
            print(f"{start}: {', '.join(map(str, dict.fromkeys(q.bits for q in mine)))}-bit {mine[0]}")


def print_hybrid(model, found: Sequence[Site]) -> None:
    """Print how many layers of a hybrid have no attention, and so no keys and values."""
    if found and (count := layers_without_attention(model, found)) > 0:
        print(f"{count} layers have no attention: their states stay as they are")


def print_plan(flags, shape, found: Sequence[PlacedSite], settings: Mapping[Any, Setting], windows: Mapping) -> None:
    """Print what --dry_run shows: the sites, the settings, the windows, the sizes of weights and cache."""
    quantized = {site for setting in settings.values() for site in setting}
    for site in found:
        is_after = site in quantized and all(s[site].after_rope for s in settings.values() if site in s)
        rest = ", quantized where attention reads it" if is_after else "" if site in quantized else ", not quantized"
        print(f"{site.name}: the output of {site.given_by()}, {site.channels} channels{rest}")
    device, line = models.single_device(flags.device), models.weights_line(shape.config)
    print(f"\n{flags.model}: {type(shape).__name__}, {models.dtype_of(shape)} on {device}{line}")
    print(f"settings: {len(settings)}, of {', '.join(dict.fromkeys(str(row.abits) for row in settings))} bits")
    print_quantizers(settings)
    print_hybrid(shape, found)
    start = ", each begins with BOS" if texts.bos_of(flags, shape.config) == "window" else ""
    for name, each in windows.items():
        print(f"{name}: {len(each)} windows of {flags.seqlen} tokens{start}")
    sizes = [models.weight_bytes(shape), memory.free_memory(device), cache_bytes(found)]
    weights, free, held = (f"{size / 2**30:.2f} GiB" for size in sizes)
    print(f"weights: {weights}; {free} are free on {device}")
    print(f"cache of {flags.report_context} tokens in 16 bits: {held}")
    print_constants({row: report.constant_bytes(setting) for row, setting in settings.items()}, found)
    if any(quantizer.recent for setting in settings.values() for quantizer in setting.values()):
        size = window_bytes(shape, found, flags.seqlen) / 2**20
        print(f"residual windows: attention reads up to three copies, {size:.1f} MiB more for each window of a batch")
    count, size = prefixes.storage(shape, list(settings.values()), flags.seqlen, device)
    if count:
        each = f"{size / 2**20:.1f} MiB for each window of a batch"
        print(f"stored for rows that start at a later layer: the inputs of {count} layer{'s' * (count > 1)}, {each}")


def print_questions(flags, prompts: Sequence[Any]) -> None:
    """Print what --dry_run shows of --retrieval and --tasks: how much each setting is asked."""
    lengths = ", ".join(map(str, dict.fromkeys(each.length for each in prompts)))
    if prompts:
        print(f"retrieval: {len(prompts)} prompts for each setting, of {lengths} tokens")
    if flags.tasks:
        print(f"tasks for each setting: {', '.join(flags.tasks)}")


def window_bytes(shape, found: Sequence[Site], tokens: int) -> int:
    """Return what two more copies of keys and values take in one layer, for every head of queries, and the mask."""
    config = shape.config.get_text_config(decoder=True)
    entries = 2 * 2 * tokens * config.num_attention_heads * max(site.head_dim for site in found)
    return entries * shape.dtype.itemsize + 3 * tokens**2
