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
from simquant.flags import Flags
from simquant.notices import is_out_of_memory, notices_only, notify, one_line
from simquant.parsing import decisive, plain_settings

if TYPE_CHECKING:
    from quant_utils import Setting
    from simquant.methods import Row
    from simquant.report import Run
    from simquant.sites import PlacedSite

SAVE_EVERY = 30  # seconds between two versions of --output while it is not complete
ROUND = 64  # windows that each process measures before all exchange what they have


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is to leave everything as tidy as Ctrl-C does."""


def on_signals(handler: Any) -> None:
    """Let handler answer Ctrl-C and SIGTERM."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, handler)


def stop(signum: int, frame: object) -> None:
    """Raise the exception of a signal, once: a second one would lose what is being saved."""
    on_signals(signal.SIG_IGN)
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def exit_status(main: Callable[[], None]) -> int:
    """Return the exit status of main: 0; 2 after a line on what the user can mend; 1 if the system fails; 130, 143."""
    nowhere = open(os.devnull, "w")  # noqa: SIM115, for a stream that the caller has closed
    sys.stdout, sys.stderr = nowhere if processes.index() else sys.stdout or nowhere, sys.stderr or nowhere
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    status, message = 0, ""
    try:
        try:
            main()
            sys.stdout.flush()
        finally:
            on_signals(signal.SIG_IGN)  # what is to be said is said in peace
    except KeyboardInterrupt as interruption:
        status, message = 143 if isinstance(interruption, Terminated) else 130, str(interruption) or "interrupted"
    except ArgumentTypeError as error:
        status, message = 2, f"error: {error}"
    except OSError as error:
        status, message = 1, f"error: {error.strerror or error}"
        with contextlib.suppress(OSError, ValueError):  # or Python's own flush at exit fails again
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
    except Exception as error:
        status, message = 2, f"error: {what_to_mend(error)}"
    if message:
        who = f"process {processes.index()}: " if processes.index() else ""
        print(f"{Path(sys.argv[0]).name}: {who}{one_line(message)}", file=sys.stderr)
    return status


def what_to_mend(error: Exception) -> str:
    """Return what is said of an error that the user can mend; raise any other."""
    from quant_utils import UserError

    if is_out_of_memory(error):
        return "out of memory: lower --batch_size or --seqlen, or choose a smaller --dtype"
    if not isinstance(error, UserError):
        raise error
    return str(error)


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


def checked_sites(model, flags: Flags) -> list[PlacedSite]:
    """Return what a model caches. UserError if it is to be quantized and is not supported."""
    from simquant import sites

    found = sites.find_sites(model, flags.report_context)
    if flags.quantizes():
        sites.check_sites(model, found)
        if model.device.type != "meta":
            sites.check_against_cache(model, found)
    return found


def settings_of(model, flags: Flags, stored: Mapping[str, Any] | None) -> tuple[list[PlacedSite], dict[Row, Setting]]:
    """Return (what a model caches, what the flags ask for, with the quantizers of a file's content if there is one)."""
    from simquant import quantizer_file

    found = checked_sites(model, flags)
    settings = flags.plan().settings(found)
    if stored is not None:
        settings = quantizer_file.fitted(stored, model.config.model_type, found, settings)
    return found, settings


def evaluate(flags: Flags, given: Mapping[str, Any], stored: Mapping[str, Any] | None = None) -> None:
    """Measure, print, save and draw what the flags ask for; stored is a quantizer file's content, None for no file."""
    begin(flags, given)
    from simquant import describe, files, kvquant_file, models, plots, report, texts

    exported, read = getattr(flags, "export_kvquant", None), [getattr(flags, "quantizer_path", None), *flags.datasets]
    files.check_writable([flags.output, flags.plot, flags.plot_activations, exported], [*read, flags.model])
    config, tokenizer = models.load_config_and_tokenizer(flags.model)
    windows, shape = texts.load(flags, config, tokenizer), models.skeleton(flags, config)
    found, settings = settings_of(shape, flags, stored)  # so that mistakes show before weights load
    if flags.plot_activations:
        plots.drawn_layer(narrowest(settings), flags.plot_layer)
    if flags.dry_run:
        describe.print_plan(flags, shape, found, settings, windows)
        return
    if exported is not None and processes.index() == 0:
        kvquant_file.export(exported, narrowest(settings))
    record = make_record(flags, shape, windows)
    known = report.load_unfinished(flags.output, record, decisive(flags)) if flags.resume and flags.output else {}

    model = models.load_model(flags, config)
    found, settings = settings_of(model, flags, stored)
    record["environment"] = models.environment(model)
    run = report.Run(windows, list(settings), found, flags.report_context)
    if known:
        report.take_over(run, flags.output or "", known, record["environment"])
    on_signals(stop)
    failure = measure_compiled(model, run, settings, flags, record)
    if processes.index() == 0:
        describe.print_settings(model, config, flags, settings)
        plots.draw(flags, model, run, narrowest(settings))
    if failure is not None:
        raise failure


def make_record(flags: Flags, shape, windows: Mapping) -> dict[str, Any]:
    """Return what --output says of a run besides its figures: resolved flags, and marks of what it read."""
    from simquant import models, report, speed

    device = models.single_device(flags.device)
    resolved = {"dtype": models.dtype_of(shape), "attn_implementation": shape.config._attn_implementation}
    resolved |= {"device": str(device), "compile": "on" if speed.is_to_compile(flags.compile, device) else "off"}
    read = report.digests(windows, getattr(flags, "quantizer_path", None))
    read["model weights"] = models.weights_mark(shape.config)
    settings = plain_settings(flags) | resolved
    return {"script": Path(sys.argv[0]).name, "model": flags.model, "settings": settings, "sha256": read}


def narrowest(settings: Mapping[Row, Setting]) -> Setting:
    """Return the setting of the fewest bits, of those the one that quantizes most; {} if none quantizes."""
    some = [setting for setting in settings.values() if setting]
    return min(some, key=lambda each: (sum(q.bits for q in each.values()) / len(each), -len(each)), default={})


def measure_compiled(model, run: Run, settings: Mapping[Row, Setting], flags: Flags, record: dict) -> OSError | None:
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


def measure_and_report(
    model, run: Run, settings: Mapping[Row, Setting], flags: Flags, record: Mapping
) -> OSError | None:
    """Measure what run lacks, print its tables, write --output, also when interrupted. Return why that failed."""
    from simquant import report

    def save(complete: bool) -> OSError | None:
        try:
            report.write_output(flags.output, record, run, complete)
        except OSError as error:
            return error
        return None

    saved = time.monotonic()
    try:
        for dataset in run.texts:
            for _ in measure(model, run, dataset, list(settings.values()), flags.batch_size):
                if time.monotonic() - saved > SAVE_EVERY:
                    saved = time.monotonic()
                    if failure := save(complete=False):
                        notify(str(failure))
            print(report.table(report.results(run, dataset), report.TABLES[""]), flush=True)
        print(report.comparison(run, report.all_results(run)), flush=True)
        return save(complete=True)
    except BaseException as stop:
        done = report.write_output(flags.output, record, run, complete=False)
        if isinstance(stop, KeyboardInterrupt):
            raise type(stop)("; ".join(["interrupted", *filter(None, [done])])) from None
        if done:
            notify(done)
        raise


def measure(model, run: Run, dataset: str, settings: Sequence[Setting], batch_size: int | str) -> Iterator[None]:
    """Fill run with the figures of a dataset, batch by batch; several processes exchange theirs after each ROUND."""
    import torch

    import quant_utils as qu
    from simquant import memory

    windows, count, total = run.texts[dataset], processes.count(), sum(map(len, run.texts.values()))
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
                    bar.set_postfix_str(
                        "ppl " + " ".join(f"{ppl:.4f}" for ppl in run.done(dataset)[:, :4, 0].mean(0).exp().tolist())
                    )
                bar.update(len(figures))
                yield
            if count > 1:
                run.add(dataset, torch.cat(processes.gather([torch.cat(parts)])), time.perf_counter() - start)
