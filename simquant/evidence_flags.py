"""Flags of what is measured beside means over a text: positions, retrieval, tasks, and the page that shows it all."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from simquant.parsing import count, matching, number, on_output, picture


def number_list(text: str, least: int, most: int) -> tuple[int, ...]:
    """Parse whole numbers from least to most between commas, each once, in rising order."""
    return tuple(sorted({int(number(word.strip(), least, most)) for word in text.split(",")}))


def name_list(text: str) -> tuple[str, ...]:
    """Parse names between commas, each once."""
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if "" in names:
        raise ArgumentTypeError(f"a name is missing in {text[:80]!r}")
    return names


page = partial(matching, pattern=r"(?i).*\.html?", words="a file that ends in .html")
measured = partial(on_output, decides=True)


@dataclass(frozen=True)
class EvidenceFlags:
    """evidence beyond the mean"""

    by_position: bool = measured(False, "KL and loss difference over the position in the window, in bins that double")
    retrieval: int | None = measured(
        None, "prompts for each depth and length, whose answer a line hidden in the text tells, alone and among others",
        count(least=1, most=1000), metavar="N",
    )  # fmt: skip
    retrieval_lengths: tuple[int, ...] = measured(
        (), "tokens of a prompt; none: a quarter and a half of --seqlen, where they hold needles, and all of it",
        partial(number_list, least=64, most=2**24), metavar="LIST",
    )  # fmt: skip
    retrieval_depths: tuple[int, ...] = measured(
        (0, 25, 50, 75, 100), "where needles lie: percent of the prompt before them",
        partial(number_list, least=0, most=100), metavar="LIST",
    )  # fmt: skip
    tasks: tuple[str, ...] = measured(
        (), "comma list of tasks of lm-evaluation-harness (pip install lm_eval)", name_list, metavar="LIST"
    )
    task_path: str | None = measured(
        None, "folder of tasks of your own, as lm-evaluation-harness reads them", metavar="DIR"
    )
    task_limit: int | None = measured(None, "at most this many documents of each task", count(least=1), metavar="N")
    num_fewshot: int | None = measured(
        None, "examples before each question; none: as the task has it", count(least=0), metavar="N"
    )
    compare: tuple[str, ...] = on_output(
        (), "instead of a model: saved reports (.json) to set side by side, paired by window", nargs="+", metavar="FILE"
    )
    plot_positions: str | None = on_output(
        None, "draw KL and loss difference over the position", picture, metavar="FILE"
    )
    plot_retrieval: str | None = on_output(
        None, "draw what is retrieved at which depth and length", picture, metavar="FILE"
    )
    report: str | None = on_output(
        None, "write one page with settings, tables and pictures as .html", page, metavar="FILE"
    )


WITH_COMPARE = {  # what goes with --compare: how saved figures are shown
    "compare", "by_position", "output", "overwrite", "sort", "columns", "plot", "plot_positions", "plot_retrieval",
    "report", "quiet",
}  # fmt: skip


def vain(flags: Any) -> list[str]:
    """Return what is said of flags whose figures a file of another kind would hold."""
    lost = [name for name in ("by_position", "retrieval", "tasks") if getattr(flags, name)]
    is_csv = flags.output is not None and flags.output.lower().endswith(".csv")
    return [f"--output {flags.output} holds no figures of --{name}: a .json does" for name in lost if is_csv]


def refusals(flags: Any, given: Mapping[str, Any]) -> dict[str, bool]:
    """Return {what is said of flags that do not go together: whether they do not}; given is the command line."""
    asked = {
        "retrieval": [name for name in ("retrieval_lengths", "retrieval_depths") if name in given],
        "tasks": [name for name in ("task_path", "task_limit", "num_fewshot") if name in given],
    }
    alone = {name: more[0] for name, more in asked.items() if more and not getattr(flags, name)}
    return {
        **{f"--{more} says how --{name} measures: give that too": True for name, more in alone.items()},
        "--plot_positions draws what --by_position measures: give that too":
            flags.plot_positions is not None and not flags.by_position,
        "--plot_retrieval draws what --retrieval measures: give that too":
            flags.plot_retrieval is not None and flags.retrieval is None,
    }  # fmt: skip
