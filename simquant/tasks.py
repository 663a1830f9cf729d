"""Tasks of lm-evaluation-harness (the package lm_eval, which is optional): every row's scores, paired by document."""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

import quant_utils as qu
from quant_utils import Setting, UserError
from simquant import processes
from simquant.checkpoints import loading, words_of
from simquant.notices import is_out_of_memory
from simquant.tables import UNQUANTIZED, Table, labels_of, lines_of
from simquant.task_scores import Scores, told_of, values_of_documents

SEED = 1234  # of the examples before a question, which is the harness's own
DRAWS = 1000  # of a bootstrap, for metrics that are no mean of documents


class Nowhere(io.TextIOBase):
    """Takes what is printed, and forgets it. It is never closed: a logger may keep it."""

    def write(self, text: str) -> int:
        """Forget text."""
        return len(text)


@contextmanager
def silence() -> Iterator[None]:
    """Let nothing of what the harness prints, logs or draws reach the terminal; its errors are exceptions."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with contextlib.redirect_stdout(Nowhere()), contextlib.redirect_stderr(Nowhere()):
        yield


def import_harness() -> Any:
    """Return the class of the harness's index of tasks. UserError if the package is missing or too old."""
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no processes for a bootstrap, which a GPU's memory would go to
    try:
        with silence():
            import lm_eval.evaluator
            from lm_eval.tasks import TaskManager

            from simquant import task_model  # noqa: F401, it imports more of the harness
    except Exception as error:  # whatever a broken installation does
        raise UserError(f"--tasks needs lm-evaluation-harness: pip install lm_eval ({words_of(error)})") from error
    if not hasattr(TaskManager, "load"):
        raise UserError(f"--tasks needs a later lm_eval than {lm_eval.__version__}: pip install -U lm_eval")
    return TaskManager


def check_names(names: Sequence[str], known: Sequence[str]) -> None:
    """Raise UserError for a name that is not known: those that are much like it are told."""
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            advice = f"did you mean {' or '.join(near)}?" if near else "tasks of your own are found by --task_path"
            raise UserError(f"--tasks {name}: lm_eval has no such task; {advice}")


@functools.cache
def index_of(folder: str | None) -> Any:
    """Return the harness's index of its own tasks, and of those in a folder. UserError if that is none."""
    manager = import_harness()
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--task_path {folder!r} is no folder")
    with silence():
        return manager(include_path=folder)


@functools.cache
def load(names: tuple[str, ...], folder: str | None, fewshot: int | None, limit: int | None) -> dict[str, Any]:
    """Return {"tasks": {name: task}, "groups": {name: group}} as the harness does, with the requests of all documents.

    Tags become their tasks. fewshot is the number of examples before a question, but a task that says 0 keeps it.
    """
    manager = index_of(folder)
    check_names(names, manager.all_tasks)
    with loading(f"--tasks {','.join(names)}"), silence():
        loaded = {"groups": {}, **manager.load(list(names))}
        for task in loaded["tasks"].values():
            own = task.get_config("num_fewshot")
            task.set_config("num_fewshot", own or 0 if fewshot is None or own == 0 else fewshot)
            task.set_fewshot_seed(seed=SEED)
            task.build_all_requests(limit=limit, rank=0, world_size=1)
    return loaded


def loaded_by(flags: Any) -> dict[str, Any]:
    """Return load for --tasks, --task_path, --num_fewshot and --task_limit."""
    return load(flags.tasks, flags.task_path, flags.num_fewshot, flags.task_limit)


def check(flags: Any, settings: Mapping[Any, Setting]) -> None:
    """Raise UserError if --tasks names what cannot be measured in every setting. Loads the documents of the tasks.

    flags have tasks, task_path, task_limit, num_fewshot; settings go by simquant/plans.py's Row, as in measure.
    """
    if not flags.tasks:
        return
    seeing = (row for row, setting in settings.items() if any(each.sees_later_tokens for each in setting.values()))
    row = next(seeing, None)
    for name, task in loaded_by(flags)["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"--tasks {name} runs code that the model writes, or shows it pictures: leave it out")
        if row is not None and any(each.request_type == "generate_until" for each in task.instances):
            why = "which cannot decode token by token, because what it does to a token depends on later ones"
            raise UserError(f"--tasks {name} generates text by {row.format}, {why}: leave out one of them")


def scores(lm: Any, loaded: Mapping[str, Any], limit: int | None) -> Scores:
    """Return what the harness measures. Every call gives a question the same examples."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)
    try:
        found: Any = evaluate(lm, loaded, limit=limit, bootstrap_iters=DRAWS)  # type: ignore[arg-type]
    except Exception as error:
        if isinstance(error, (UserError, OSError, RuntimeError)) or is_out_of_memory(error):
            raise
        raise UserError(f"lm_eval cannot measure {', '.join(loaded['tasks'])}: {words_of(error)}") from error
    return Scores(found["results"], values_of_documents(found["samples"]))


def measure(model: Any, tokenizer: Any, flags: Any, settings: Mapping[Any, Setting]) -> dict[Any, list[dict[str, Any]]]:
    """Return for each row a dict for each task and metric: task, metric, value, se, delta, delta_se, documents.

    value and se are the harness's own. delta is the difference from the first row if that is unquantized, and its
    standard error that of the mean of the documents' differences; None where there is none. Every sequence is computed
    alone (see task_model). Several processes share the rows, and each returns all.
    """
    from simquant.task_model import SequenceModel

    loaded, rows = loaded_by(flags), list(settings)
    mine, found = rows[processes.index() :: processes.count()], dict[Any, Scores]()
    requests = sum(each.repeats for task in loaded["tasks"].values() for each in task.instances)
    total, look = requests * len(mine), {"desc": "tasks", "unit": "request", "leave": False}
    with tqdm(total=total, **look, **qu.PROGRESS) as bar, silence():
        lm = SequenceModel(model, tokenizer, bar.update)
        for row in mine:
            with qu.quantized(qu.on_device(settings[row])):
                found[row] = scores(lm, loaded, flags.task_limit)
    every = {row: each for part in processes.gather([found]) for row, each in part.items()}
    base = every[rows[0]] if rows[0].is_unquantized else None
    return {row: told_of(loaded, every[row], base) for row in rows}


PERCENT = ("acc", "em", "exact_match", "f1")  # metrics whose names begin so are shares
HEADINGS = {"value": "{}", "se": "±", "delta": "Δ{}", "delta_se": "±"}


def table_of(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a line for each task and row: each metric and its difference from the unquantized row, with ±.

    rows have format, abits, quantized and tasks, which is what measure returns for them. Shares are in percent.
    """
    names = dict.fromkeys(each["task"] for row in rows for each in row["tasks"])
    lines = [(task, row) for task in names for row in rows]
    labels = {"task": [task for task, _ in lines]} | labels_of([row for _, row in lines])
    columns = [(heading, column) for heading, column in labels.items()]
    for metric in dict.fromkeys(each["metric"] for row in rows for each in row["tasks"]):
        for figure, heading in HEADINGS.items():
            column = [cell(row, task, metric, figure) for task, row in lines]
            columns += [(heading.format(metric), column)] if set(column) != {"-"} else []
    headings, cells = zip(*columns, strict=True)
    return Table("Tasks", headings, lines_of(cells), len(labels))


def cell(row: Mapping[str, Any], task: str, metric: str, figure: str) -> str:
    """Return a figure as it is printed, and - where there is none."""
    values = [each[figure] for each in row["tasks"] if (each["task"], each["metric"]) == (task, metric)]
    if not values or values[0] is None or (figure.startswith("delta") and row["abits"] == UNQUANTIZED):
        return "-"
    sign = "+" if figure == "delta" else ""
    return f"{values[0]:{sign}.2%}" if metric.startswith(PERCENT) else f"{values[0]:{sign}.4f}"
