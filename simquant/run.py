"""A run, from flags to report. Libraries are imported when they are needed."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simquant import processes
from simquant.endings import Stopped, on_signals, stop
from simquant.flags import Flags
from simquant.notices import notify, progress_options
from simquant.parsing import decisive, plain_settings

if TYPE_CHECKING:
    from quant_utils import Setting
    from simquant.plans import Plan, Row
    from simquant.report import Run
    from simquant.report_file import ReportFile
    from simquant.sites import PlacedSite

SAVE_EVERY = 30  # seconds between two versions of --output while it is not complete; more where writing takes long
Source = tuple[
    "Plan", "Mapping[str, Any] | None"
]  # what is asked, and the quantizer file's content that it is fitted by
ROUND = 64  # windows that each process measures before all exchange what they have


def begin(flags: Flags, given: Mapping[str, Any]) -> None:
    """Silence what libraries say by themselves: stderr carries our bars, unless quiet, and our notices alone."""
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    if flags.quiet or processes.index() > 0 or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in ("torchao", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    import quant_utils as qu

    logging.getLogger("torch").setLevel(logging.ERROR)  # which importing torch would undo
    qu.PROGRESS.update(progress_options(flags.quiet))
    for complaint in flags.vain(given):
        notify(complaint)
    lonely = f"waiting for {processes.count()} processes, as WORLD_SIZE says: `accelerate launch` starts them"
    patience = threading.Timer(20, notify, [lonely])
    patience.daemon = True
    patience.start()
    processes.gather([None])  # before anything that takes long
    patience.cancel()
    from simquant import speed

    speed.install()


def checked_sites(model, flags: Flags) -> list[PlacedSite]:
    """Return what a model caches. UserError if it is to be quantized and is not supported."""
    from simquant import cache_check, sites

    found = sites.find_sites(model, flags.report_context)
    if flags.quantizes():
        cache_check.check_sites(model, found)
        if model.device.type != "meta":
            cache_check.check_against_cache(model, found)
    return found


def settings_of(model, flags: Flags, sources: Sequence[Source]) -> tuple[list[PlacedSite], dict[Row, Setting]]:
    """Return (what a model caches, what all sources ask for), the unquantized model first."""
    from simquant import cache_check, quantizer_file

    found = checked_sites(model, flags)
    settings: dict[Row, Setting] = {}
    for plan, stored in sources:
        asked = plan.settings(found)
        if stored is not None:
            asked = quantizer_file.fitted(stored, model.config.model_type, found, asked)
        settings |= asked
    if model.device.type != "meta":
        cache_check.check_attention(model, settings.values())
    return found, dict(sorted(settings.items(), key=lambda each: not each[0].is_unquantized))


def evaluate(flags: Flags, given: Mapping[str, Any], sources: Sequence[Source] = ()) -> None:
    """Measure, print, save and draw what the flags ask for, or what the sources do."""
    begin(flags, given)
    sources = sources or [(flags.plan(), None)]
    from simquant import component_plots, describe, kvquant_file, models, plots, prefixes, report, report_file, texts

    file, exported = output_file(flags), getattr(flags, "export_kvquant", None)
    config, tokenizer = models.load_config_and_tokenizer(flags.model, flags.revision)
    windows, shape = texts.load(flags, config, tokenizer), models.skeleton(flags, config)
    found, settings = settings_of(shape, flags, sources)  # so that mistakes show before weights load
    for reason in (reason for plan, _ in sources for reason in plan.left_out(found)):
        notify(f"left out: {reason}")
    for row, setting in settings.items():
        if setting and not any(quantizer.quantized_tokens(flags.seqlen) for quantizer in setting.values()):
            notify(f"{row.format}: its exact tokens cover the window of --seqlen {flags.seqlen}: nothing is quantized")
    if flags.plot_activations:
        component_plots.drawn_layer(narrowest(settings), flags.plot_layer)
    if getattr(flags, "plot_bits", None) is not None:
        component_plots.sharing(settings)
    file.record = make_record(flags, shape, windows)
    known = file.unfinished(windows, decisive(flags)) if flags.resume else {}
    if flags.dry_run:
        describe.print_plan(flags, shape, found, settings, windows)
        return
    if exported is not None and processes.index() == 0:
        kvquant_file.export(exported, narrowest(settings))

    model = models.load_model(flags, config)
    found, settings = settings_of(model, flags, sources)
    file.record["environment"] = models.environment(model)
    run = report.Run(windows, list(settings), found, flags.report_context)
    run.constants = list(map(report.constant_bytes, settings.values()))
    if known:
        report_file.take_over(run, flags.output or "", known, file.record["environment"])
    on_signals(stop)
    with prefixes.stored(model, list(settings.values())):
        failures = [measure_compiled(model, run, settings, flags, file)]
    if processes.index() == 0:
        failures.append(failure_of(lambda: plots.draw(flags, run, settings)))
        failures.append(failure_of(lambda: component_plots.draw(flags, model, run, settings, narrowest(settings))))
        describe.print_results(model, config, flags, settings, run)
    for failure in filter(None, failures):
        raise failure


def output_file(flags: Flags) -> ReportFile:
    """Return the file that --output names. UserError if what the flags write cannot be, or would destroy something."""
    from simquant import files, report_file, text_names

    quantizers, exported = getattr(flags, "quantizer_files", ()), getattr(flags, "export_kvquant", None)
    read = [*text_names.files_read(*flags.datasets), *flags.datasets, *quantizers, flags.model]
    pictures = [flags.plot, flags.plot_activations, getattr(flags, "plot_bits", None)]
    files.check_writable([flags.output, exported, *pictures], read)
    if not flags.overwrite:
        files.check_replaceable(pictures, files.PICTURES)
    file = report_file.ReportFile(flags.output, flags.overwrite)
    if not flags.resume:
        file.check()
    return file


def failure_of(write: Callable[[], object]) -> OSError | None:
    """Return why a file could not be written, if so: what else there is to write and to print comes first."""
    try:
        write()
    except OSError as error:
        return error
    return None


def make_record(flags: Flags, shape, windows: Mapping) -> dict[str, Any]:
    """Return what --output says of a run besides its figures: resolved flags, and marks of what it read."""
    from simquant import models, report_file, speed, texts

    device = models.single_device(flags.device)
    resolved = {"dtype": models.dtype_of(shape), "attn_implementation": shape.config._attn_implementation}
    resolved |= {"device": str(device), "compile": "on" if speed.is_to_compile(flags.compile, device) else "off"}
    read = report_file.digests(windows, getattr(flags, "quantizer_files", ()))
    read["model weights"] = models.weights_mark(shape.config)
    resolved["bos"] = texts.bos_of(flags, shape.config)
    settings = plain_settings(flags) | resolved
    return {"script": Path(sys.argv[0]).name, "model": shape.config.name_or_path, "settings": settings, "sha256": read}


def narrowest(settings: Mapping[Row, Setting]) -> Setting:
    """Return the setting of the fewest bits, of those the one that quantizes most; {} if none quantizes."""
    some = [setting for setting in settings.values() if setting]
    return min(some, key=lambda each: (sum(q.bits for q in each.values()) / len(each), -len(each)), default={})


def measure_compiled(model, run: Run, settings: Mapping[Row, Setting], flags: Flags, file: ReportFile) -> Any:
    """Return measure_and_save, with compiled layers if the flags say so. If they do not compile, auto goes without."""
    from simquant import speed

    try:
        with speed.compiled(model, file.record["settings"]["compile"] == "on"):
            return measure_and_save(model, run, settings, flags, file)
    except speed.CompilationError as error:
        if flags.compile == "on" or processes.count() > 1 or any(run.count.values()):
            raise
        notify(f"--compile auto: off, because {error}")
    file.record["settings"]["compile"] = "off"
    return measure_and_save(model, run, settings, flags, file)


def measure_and_save(
    model, run: Run, settings: Mapping[Row, Setting], flags: Flags, file: ReportFile
) -> OSError | None:
    """Measure what run lacks and write --output, now and then and at the end. Return why that failed.

    A signal or an error saves what there is; after a signal it is also printed.
    """
    from simquant import report, tables

    saved, took = time.monotonic(), 0.0
    try:
        for dataset in run.texts:
            for _ in measure(model, run, dataset, list(settings.values()), flags.batch_size):
                if (start := time.monotonic()) - saved > SAVE_EVERY * max(1, 4 * took):  # at most 1 % of the time
                    if failure := failure_of(lambda: file.write(run, complete=False)):
                        notify(str(failure))
                    saved = time.monotonic()
                    took = saved - start
        return failure_of(lambda: file.write(run, complete=True))
    except BaseException as end:
        done = file.write(run, complete=False)
        if isinstance(end, Stopped):
            if rows := report.all_results(run):
                print(tables.table(rows, (*flags.columns, "windows")))
            raise Stopped("; ".join([str(end), *filter(None, [done])]), end.signum) from None
        if done:
            notify(done)
        raise


def measure(model, run: Run, dataset: str, settings: Sequence[Setting], batch_size: int | str) -> Iterator[None]:
    """Fill run with the figures of a dataset, batch by batch; several processes exchange theirs after each ROUND."""
    import torch

    import quant_utils as qu
    from simquant import memory

    windows, count, total = run.texts[dataset], processes.count(), sum(map(len, run.texts.values()))
    losses = run.done(dataset)[:, :4, 0].sum(0)
    with qu.progress("measure", total=total, initial=sum(run.count.values())) as bar:
        while (first := run.count[dataset]) < len(windows):
            each = len(windows) if count == 1 else min(ROUND, -(-(len(windows) - first) // count))
            place, start, parts = first + processes.index() * each, time.perf_counter(), [run.done(dataset)[:0]]
            for figures in memory.evaluate_what_fits(model, run.sites, windows[place:][:each], settings, batch_size):
                memory.check_figures(model, run, dataset, settings, place, figures)
                place += len(figures)
                parts.append(figures)
                if count == 1:
                    run.add(dataset, figures, time.perf_counter() - start)
                    start = time.perf_counter()
                    losses += figures[:, :4, 0].sum(0)
                    ppl = (losses / run.count[dataset]).exp().tolist()
                    bar.set_postfix_str(
                        " ".join(["ppl", *(f"{each:.4f}" for each in ppl)]), refresh=sys.stderr.isatty()
                    )
                bar.update(min(len(figures) * count, total - bar.n))  # the others are about as far
                yield
            if count > 1:
                run.add(dataset, torch.cat(processes.gather([torch.cat(parts)])), time.perf_counter() - start)
