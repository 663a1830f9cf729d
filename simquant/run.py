"""A run from flags to report, and its exit status. Libraries are imported when they are needed."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simquant import processes
from simquant.flags import Flags, decisive, plain_settings
from simquant.notices import is_out_of_memory, notices_only, notify, one_line

if TYPE_CHECKING:
    from quant_utils import Setting, Site
    from simquant.methods import Row
    from simquant.report import Run

SAVE_EVERY = 30  # seconds between two versions of --output while it is not complete
ROUND = 64  # windows that each process measures before all exchange what they have
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is to leave everything as tidy as Ctrl-C does."""


def stop(signum: int, frame: object) -> None:
    """Raise the exception of a signal, once: a second one would lose what is being saved."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def exit_status(main: Callable[[], None]) -> int:
    """Return the exit status of main: 0; 2 after a line on what the user can mend; 1 if the system fails; 130, 143."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115, for a stream that the caller has closed
    sys.stdout, sys.stderr = nowhere if processes.index() else sys.stdout or nowhere, sys.stderr or nowhere
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    status, message = 0, ""
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt as interruption:
        status, message = 143 if isinstance(interruption, Terminated) else 130, str(interruption) or "interrupted"
    except ArgumentTypeError as error:
        status, message = 2, f"error: {error}"
    except OSError as error:
        status, message = 1, f"error: {error.strerror or error}"
        with contextlib.suppress(OSError, ValueError):  # or Python's own flush at exit fails again
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    except Exception as error:
        from quant_utils import UserError

        if not isinstance(error, UserError) and not is_out_of_memory(error):
            raise
        advice = "out of memory: lower --batch_size or --seqlen, or choose a smaller --dtype"
        status, message = 2, f"error: {error if isinstance(error, UserError) else advice}"
    if message:
        who = f"process {processes.index()}: " if processes.index() else ""
        print(f"{Path(sys.argv[0]).name}: {who}{one_line(message)}", file=sys.stderr)
    return status


def begin(flags: Flags, given: Mapping[str, Any]) -> None:
    """Silence what libraries say by themselves: stderr carries our bars, unless quiet, and our notices alone."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "DATASETS_VERBOSITY": "critical", "HF_HUB_VERBOSITY": "error"}
    if flags.quiet or processes.index() > 0 or not sys.stderr.isatty():
        os.environ |= dict.fromkeys(("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"), "1")
    for name in ("torch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    notices_only()
    for complaint in flags.vain(given):
        notify(complaint)
    processes.gather([None])  # before anything that takes long


def checked_sites(model, flags: Flags) -> list[Site]:
    """Return what a model caches. UserError if it is to be quantized and is not supported."""
    from simquant import sites

    found = sites.find_sites(model)
    if flags.quantizes():
        sites.check_sites(model, found)
        if model.device.type != "meta":
            sites.check_against_cache(model, found)
    return found


def evaluate(flags: Flags, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> None:
    """Measure, print, save and draw what the flags ask for; stored is a quantizer file's content, None for no file."""
    begin(flags, given)
    from simquant import files, kvquant_file, models, plots, quantizer_file, report, speed, texts

    path: str | None = getattr(flags, "quantizer_path", None)
    exported: str | None = getattr(flags, "export_kvquant", None)
    outputs = [flags.output, flags.plot, flags.plot_activations, exported]
    files.check_writable(outputs, [path, *flags.datasets, flags.model])
    config, tokenizer = models.load_config_and_tokenizer(flags.model)
    windows = texts.load(flags, config, tokenizer)

    def settings_of(model) -> tuple[list[Site], dict[Row, Setting]]:
        found = checked_sites(model, flags)
        settings = flags.plan().settings(found)
        if stored is not None and path is not None:
            settings = quantizer_file.fitted(path, stored, model.config.model_type, found, settings)
        return found, settings

    shape = models.skeleton(flags, config)
    found, settings = settings_of(shape)  # so that mistakes show before weights load
    layer = plots.drawn_layer(narrowest(settings), flags.plot_layer) if flags.plot_activations else None
    if exported is not None and processes.index() == 0:
        kvquant_file.export(exported, narrowest(settings))
    if flags.dry_run:
        print_plan(flags, shape, found, settings, windows)
        return
    resolved = {"dtype": models.dtype_of(shape), "attn_implementation": shape.config._attn_implementation}
    resolved["compile"] = "on" if speed.is_to_compile(flags.compile, models.single_device(flags.device)) else "off"
    record: dict[str, Any] = {
        "script": Path(sys.argv[0]).name,
        "model": flags.model,
        "settings": plain_settings(flags) | resolved,
    }
    record["sha256"] = report.digests(windows, path) | {"model weights": models.weights_mark(config)}
    known = report.load_unfinished(flags.output, record, decisive(flags)) if flags.resume and flags.output else {}

    model = models.load_model(flags, config)
    found, settings = settings_of(model)
    record["environment"] = models.environment(model)
    record["settings"]["device"] = record["environment"]["device"]
    run = report.Run(windows, list(settings), found, flags.report_context)
    if known:
        report.take_over(run, flags.output or "", known, record["environment"])
    for each in SIGNALS:
        signal.signal(each, stop)
    rows = measure_compiled(model, run, settings, flags, record)
    if processes.index() == 0:
        print_settings(model, flags, settings)
        if flags.plot is not None:
            plots.save_figure(flags.plot, plots.draw_attribution(rows) if flags.attribution else plots.draw_sweep(rows))
        if flags.plot_activations is not None and layer is not None:
            drawn = plots.draw_activations(model, windows[flags.datasets[0]][0], narrowest(settings), layer)
            plots.save_figure(flags.plot_activations, drawn)


def narrowest(settings: Mapping[Row, Setting]) -> Setting:
    """Return the setting of the fewest bits, of those the one that quantizes most; {} if none quantizes."""
    some = [setting for setting in settings.values() if setting]
    return min(some, key=lambda each: (sum(q.bits for q in each.values()) / len(each), -len(each)), default={})


def measure_compiled(model, run: Run, settings: Mapping[Row, Setting], flags: Flags, record: dict) -> list[dict]:
    """Return measure_and_report, with compiled layers if record says so. If they do not compile, auto goes without."""
    from simquant import speed

    try:
        with speed.compiled(model, record["settings"]["compile"] == "on"):
            return measure_and_report(model, run, settings, flags, record)
    except speed.CompilationError as error:
        if flags.compile == "on" or processes.count() > 1 or any(run.count.values()):
            raise
        notify(f"--compile auto: off, because {error}")
    record["settings"]["compile"] = "off"
    return measure_and_report(model, run, settings, flags, record)


def measure_and_report(model, run: Run, settings: Mapping[Row, Setting], flags: Flags, record: Mapping) -> list[dict]:
    """Measure what run lacks, print its tables, write --output, also when interrupted. Return all rows."""
    from simquant import report

    saved = time.monotonic()
    try:
        for dataset in run.texts:
            for _ in measure(model, run, dataset, list(settings.values()), flags.batch_size):
                if time.monotonic() - saved > SAVE_EVERY:
                    saved = time.monotonic()
                    try:
                        report.write_output(flags.output, record, run, complete=False)
                    except OSError as error:
                        notify(str(error))
            print(report.table(report.results(run, dataset), report.TABLES[""]), flush=True)
        rows = report.all_results(run)
        print(report.comparison(run, rows), flush=True)
    except BaseException as stop:
        done = report.write_output(flags.output, record, run, complete=False)
        if isinstance(stop, KeyboardInterrupt):
            raise type(stop)("; ".join(["interrupted", *filter(None, [done])])) from None
        if done:
            notify(done)
        raise
    report.write_output(flags.output, record, run, complete=True)
    return rows


def measure(model, run: Run, dataset: str, settings: Sequence[Setting], batch_size: int | str) -> Iterator[None]:
    """Fill run with the figures of a dataset, batch by batch; several processes exchange theirs after each ROUND."""
    import torch

    import quant_utils as qu
    from simquant import models

    windows, count, total = run.texts[dataset], processes.count(), sum(map(len, run.texts.values()))
    with qu.progress("measure", total=total, initial=sum(run.count.values())) as bar:
        while (first := run.count[dataset]) < len(windows):
            each = len(windows) if count == 1 else min(ROUND, -(-(len(windows) - first) // count))
            place, start, parts = first + processes.index() * each, time.perf_counter(), [run.done(dataset)[:0]]
            for figures in models.evaluate_what_fits(model, run.sites, windows[place:][:each], settings, batch_size):
                models.check_figures(model, run, dataset, settings, place, figures)
                place += len(figures)
                parts.append(figures)
                if count == 1:
                    run.add(dataset, figures, time.perf_counter() - start)
                    start = time.perf_counter()
                    bar.set_postfix_str(
                        "ppl " + " ".join(f"{ppl:.4f}" for ppl in run.done(dataset)[:, :4, 0].mean(0).exp().tolist())
                    )
                bar.update(len(figures))
                yield
            if count > 1:
                run.add(dataset, torch.cat(processes.gather([torch.cat(parts)])), time.perf_counter() - start)


def print_settings(model, flags: Flags, settings: Mapping[Row, Setting]) -> None:
    """Print below the tables what was measured, on which text, quantized how."""
    from simquant import models, texts

    attention, where = model.config._attn_implementation, models.devices_of(model)
    line = f"{models.dtype_of(model)} on {where}, {attention} attention{models.weights_line(model.config)}"
    print(f"\n{flags.model}: {line}, windows of {flags.seqlen} tokens")
    for dataset in flags.datasets:
        print(f"{dataset}: {texts.ABOUT.get(dataset, texts.ABOUT_FILES)}")
    print_quantizers(settings)


def print_quantizers(settings: Mapping[Row, Setting]) -> None:
    """Print a line for keys and one for values: their widths, and how they are quantized."""
    for part in ("keys", "values"):
        mine = [q for setting in settings.values() for site, q in setting.items() if site.part == part]
        if mine:
            print(f"{part}: {', '.join(map(str, dict.fromkeys(q.bits for q in mine)))}-bit {mine[0]}")


def print_plan(flags: Flags, shape, found: Sequence[Site], settings: Mapping[Row, Setting], windows: Mapping) -> None:
    """Print what --dry_run shows: the sites, the settings, the windows, the sizes of weights and cache."""
    from simquant import models, sites

    quantized = {site for setting in settings.values() for site in setting}
    for site in found:
        rest = "" if site in quantized else ", not quantized"
        print(f"{site.name}: the output of {sites.module_name(site)}, {site.channels} channels{rest}")
    device, line = models.single_device(flags.device), models.weights_line(shape.config)
    print(f"\n{flags.model}: {type(shape).__name__}, {models.dtype_of(shape)} on {device}{line}")
    print(f"settings: {len(settings)}, of {', '.join(dict.fromkeys(str(row.abits) for row in settings))} bits")
    print_quantizers(settings)
    for name, each in windows.items():
        print(f"{name}: {len(each)} windows of {flags.seqlen} tokens")
    cache = 2 * flags.report_context * sum(site.channels for site in found)
    sizes = [models.weight_bytes(shape), models.free_memory(device), cache]
    weights, free, held = (f"{size / 2**30:.2f} GiB" for size in sizes)
    print(f"weights: {weights}; {free} are free on {device}")
    print(f"cache of {flags.report_context} tokens in 16 bits: {held}")
