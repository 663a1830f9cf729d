"""A run, from flags to report. Libraries are imported when they are needed."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simquant import processes
from simquant.endings import on_signals, stop
from simquant.flags import Flags
from simquant.notices import notify, progress_options
from simquant.parsing import decisive, plain_settings

if TYPE_CHECKING:
    from quant_utils import Setting
    from simquant.plans import Plan, Row
    from simquant.report import Run
    from simquant.report_file import ReportFile
    from simquant.sites import PlacedSite

# What is asked, and the content of the quantizer file that it is fitted by.
Source = tuple["Plan", "Mapping[str, Any] | None"]


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
    from simquant import describe, kvquant_file, models, needles, plots, prefixes, report, report_file, texts
    from simquant.measuring import measure_compiled

    file, exported = output_file(flags), getattr(flags, "export_kvquant", None)
    config, tokenizer = models.load_config_and_tokenizer(flags.model, flags.revision)
    windows, shape = texts.load(flags, config, tokenizer), models.skeleton(flags, config)
    found, settings = settings_of(shape, flags, sources)  # so that mistakes show before weights load
    say_what_is_left_out(flags, sources, found, settings)
    prompts = checked_prompts(flags, config, tokenizer, windows, settings)
    file.record = make_record(flags, shape, windows) | {"title": plots.heading(flags, settings)}
    file.record["cache_entries"] = report.cache_entries(found)
    file.record["sha256"] |= {"retrieval prompts": needles.digest(prompts)} if prompts else {}
    known = file.unfinished(windows, decisive(flags)) if flags.resume else {}
    if flags.dry_run:
        describe.print_plan(flags, shape, found, settings, windows)
        describe.print_questions(flags, prompts)
        return
    if exported is not None and processes.index() == 0:
        kvquant_file.export(exported, narrowest(settings))

    model = models.load_model(flags, config)
    found, settings = settings_of(model, flags, sources)
    file.record["environment"] = models.environment(model)
    run = new_run(flags, model, tokenizer, (windows, prompts), (found, settings))
    if known:
        report_file.take_over(run, flags.output or "", known, file.record["environment"])
    on_signals(stop)
    with prefixes.stored(model, list(settings.values())):
        failures = [measure_compiled(model, run, settings, flags, file)]
    if processes.index() == 0:
        failures += show(flags, run, file, model, settings)
        describe.print_what_was_measured(model, config, flags, settings, run)
    for failure in filter(None, failures):
        raise failure


def say_what_is_left_out(
    flags: Flags, sources: Sequence[Source], found: Sequence[Any], settings: Mapping[Row, Setting]
) -> None:
    """Notify of formats that a model cannot have, and of rows that quantize nothing."""
    for reason in (reason for plan, _ in sources for reason in plan.left_out(found)):
        notify(f"left out: {reason}")
    for row, setting in settings.items():
        if setting and not any(quantizer.quantized_tokens(flags.seqlen) for quantizer in setting.values()):
            notify(f"{row.format}: its exact tokens cover the window of --seqlen {flags.seqlen}: nothing is quantized")


def checked_prompts(flags: Flags, config, tokenizer, windows: Mapping, settings: Mapping[Row, Setting]) -> list[Any]:
    """Return the prompts of --retrieval. UserError if these, the tasks or the pictures of a layer cannot be had."""
    from simquant import component_plots, needles

    if flags.plot_activations:
        component_plots.drawn_layer(narrowest(settings), flags.plot_layer)
    if getattr(flags, "plot_bits", None) is not None:
        component_plots.sharing(settings)
    if flags.tasks:
        from simquant import tasks

        tasks.check(flags, settings)
    return needles.prompts(flags, config, tokenizer, windows) if flags.retrieval else []


def new_run(
    flags: Flags, model, tokenizer, texts: tuple[Mapping, list], what: tuple[list, Mapping[Row, Setting]]
) -> Run:
    """Return a run of nothing so far, of texts (windows, prompts) and what (sites, settings)."""
    from simquant import report, retrieval
    from simquant.text_units import text_sizes

    (windows, prompts), (found, settings) = texts, what
    run = report.Run(windows, list(settings), found, flags.report_context, flags.by_position)
    run.sizes = {name: text_sizes(tokenizer, ids) for name, ids in windows.items()}
    run.constants = list(map(report.constant_bytes, settings.values()))
    if prompts:
        run.later["retrieval"] = partial(retrieval.measure, model, found, prompts, settings, flags.batch_size)
    if flags.tasks:
        from simquant import tasks

        run.later["tasks"] = partial(tasks.measure, model, tokenizer, flags, settings)
    return run


def show(flags: Flags, run: Run, file: ReportFile, model, settings: Mapping[Row, Setting]) -> list[OSError | None]:
    """Draw, write and print the rows of a run. Return why files could not be written."""
    from simquant import component_plots, page_content, presentation, report
    from simquant.files import failure_of

    rows, more = report.all_results(run), report.more_results(run)
    failures: list[OSError | None] = [*presentation.draw(flags, rows, more, file.record["title"])]
    failures.append(failure_of(lambda: component_plots.draw(flags, model, run, settings, narrowest(settings))))
    failures.append(page_content.save(flags, [file.record], rows, more))
    presentation.print_rows(flags, rows, more, run.context)
    return failures


def compare(flags: Flags) -> None:
    """Set saved reports side by side, without a model."""
    from simquant import compare as reports

    reports.show(flags)


def output_file(flags: Flags) -> ReportFile:
    """Return the file that --output names. UserError if what the flags write cannot be, or would destroy something."""
    from simquant import files, report_file, text_names

    quantizers, exported = getattr(flags, "quantizer_files", ()), getattr(flags, "export_kvquant", None)
    read = [*text_names.files_read(*flags.datasets), *flags.datasets, *quantizers, flags.model]
    pictures = [flags.plot, flags.plot_positions, flags.plot_retrieval, flags.plot_activations]
    pictures.append(getattr(flags, "plot_bits", None))
    files.check_writable([flags.output, flags.report, exported, *pictures], read)
    if not flags.overwrite:
        files.check_replaceable(pictures, files.PICTURES)
        files.check_replaceable([flags.report], files.PAGES)
    file = report_file.ReportFile(flags.output, flags.overwrite)
    if not flags.resume:
        file.check()
    return file


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
    return {
        "script": Path(sys.argv[0]).name, "command": shlex.join(["python3", *sys.argv]),
        "model": shape.config.name_or_path, "settings": settings,
        "sha256": read, "window_sha256": report_file.window_digests(windows),
    }  # fmt: skip


def narrowest(settings: Mapping[Row, Setting]) -> Setting:
    """Return the setting of the fewest bits, of those the one that quantizes most; {} if none quantizes."""
    some = [setting for setting in settings.values() if setting]
    return min(some, key=lambda each: (sum(q.bits for q in each.values()) / len(each), -len(each)), default={})
