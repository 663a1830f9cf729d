"""The windows of a run: measured batch by batch, saved now and then, whatever ends it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

import quant_utils as qu
from quant_utils import Setting
from simquant import memory, presentation, processes, report, speed, tables
from simquant.endings import Stopped
from simquant.files import failure_of
from simquant.notices import notify
from simquant.report import Run, Windows
from simquant.report_file import ReportFile

SAVE_EVERY = 30  # seconds between two versions of --output while it is not complete; more where writing takes long
ROUND = 64  # windows that each process measures before all exchange what they have


def measure_compiled(model, run: Run, settings: Mapping[Any, Setting], flags: Any, file: ReportFile) -> Any:
    """Return measure_and_save, with compiled layers if the flags say so. If they do not compile, auto goes without."""
    try:
        with speed.compiled(model, file.record["settings"]["compile"] == "on"):
            return measure_and_save(model, run, settings, flags, file)
    except speed.CompilationError as error:
        if flags.compile == "on" or processes.count() > 1 or any(run.count.values()):
            raise
        notify(f"--compile auto: off, because {error}")
    file.record["settings"]["compile"] = "off"
    return measure_and_save(model, run, settings, flags, file)


def measure_and_save(model, run: Run, settings: Mapping[Any, Setting], flags: Any, file: ReportFile) -> OSError | None:
    """Measure what run lacks and write --output, now and then and at the end. Return why that failed.

    A signal or an error saves what there is; after a signal it is also printed.
    """
    saved, took = time.monotonic(), 0.0
    try:
        for dataset in run.texts:
            for _ in measure(model, run, dataset, list(settings.values()), flags.batch_size):
                if (start := time.monotonic()) - saved > SAVE_EVERY * max(1, 4 * took):  # at most 1 % of the time
                    if failure := failure_of(lambda: file.write(run, complete=False)):
                        notify(str(failure))
                    saved = time.monotonic()
                    took = saved - start
        with torch.compiler.set_stance("force_eager"):  # prompts of all lengths, each of which would be compiled
            for name in (name for name in run.later if name not in run.more):
                if failure := failure_of(lambda: file.write(run, complete=False)):
                    notify(str(failure))
                run.more[name] = run.later[name]()
        return failure_of(lambda: file.write(run, complete=True))
    except BaseException as end:
        done = file.write(run, complete=False)
        if isinstance(end, Stopped):
            if rows := report.all_results(run, with_intervals=False):
                print(tables.table(rows, (*flags.columns, "windows")))
                for table in presentation.tables_beside(rows, report.more_results(run), flags.by_position):
                    print(f"\n{tables.text_of(table)}")
            raise Stopped("; ".join([str(end), *filter(None, [done])]), end.signum) from None
        if done:
            notify(done)
        raise


def measure(model, run: Run, dataset: str, settings: Sequence[Setting], batch_size: int | str) -> Iterator[None]:
    """Fill run with the figures of a dataset, batch by batch; several processes exchange theirs after each ROUND."""
    texts, count, total = run.texts[dataset], processes.count(), sum(map(len, run.texts.values()))
    losses = run.done(dataset).figures[:, :4, 0].sum(0)
    with qu.progress("measure", total=total, initial=sum(run.count.values())) as bar:
        while (first := run.count[dataset]) < len(texts):
            each = len(texts) if count == 1 else min(ROUND, -(-(len(texts) - first) // count))
            place, start, parts = first + processes.index() * each, time.perf_counter(), [run.nothing(texts)]
            for measured in memory.evaluate_what_fits(model, run.sites, texts[place:][:each], settings, batch_size):
                memory.check_figures(model, run, dataset, settings, place, measured.figures)
                place += len(measured.figures)
                parts.append(run.kept(measured))
                if count == 1:
                    run.add(dataset, parts.pop(), time.perf_counter() - start)
                    start = time.perf_counter()
                    losses += measured.figures[:, :4, 0].sum(0)
                    ppl = " ".join(f"{each:.4f}" for each in (losses / run.count[dataset]).exp().tolist())
                    bar.set_postfix_str(f"ppl {ppl}", refresh=sys.stderr.isatty())
                bar.update(min(len(measured.figures) * count, total - bar.n))  # the others are about as far
                yield
            if count > 1:
                run.add(dataset, Windows.joined(processes.gather([Windows.joined(parts)])), time.perf_counter() - start)
