"""What lm-evaluation-harness says of rows of a run, and differences of rows, paired by document."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NONE = "N/A"  # what the harness says instead of a standard error that it does not know


class Scores(NamedTuple):
    """What the harness says of one row.

    metrics    {task or group: {"acc,none": value, "acc_stderr,none": its standard error, "sample_len": documents}}
    documents  {task: {"acc,none": {document: value}}}, where a document's value is a number
    """

    metrics: dict[str, dict[str, Any]]
    documents: dict[str, dict[str, dict[int, float]]]


def metric_names(metrics: Mapping[str, Any]) -> list[str]:
    """Return the keys of metrics, "metric,filter", without those of standard errors and of what is no metric."""
    return [name for name in metrics if "," in name and "_stderr," not in name]


def error_name(name: str) -> str:
    """Return the key of the standard error of "metric,filter"."""
    return name.replace(",", "_stderr,", 1)


def values_of_documents(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, dict[int, float]]]:
    """Return {task: {"acc,none": {document: value}}} of the harness's {task: samples}, where values are numbers."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for task, sample in ((task, sample) for task, mine in samples.items() for sample in mine):
        for metric in sample["metrics"]:
            if (value := number(sample[metric])) is not None:
                documents = found.setdefault(task, {}).setdefault(f"{metric},{sample['filter']}", {})
                documents[sample["doc_id"]] = value
    return found


def number(value: Any) -> float | None:
    """Return a finite number as a float, and None for anything else."""
    is_number = isinstance(value, (numbers.Real, np.bool_)) and math.isfinite(float(value))
    return float(value) if is_number else None


def paired_error(own: Mapping[int, float], other: Mapping[int, float], values: tuple[float, float]) -> float | str:
    """Return the standard error of the mean difference of own and other {document: value}.

    NONE for less than two documents, different ones, or values of the metric that are no means of theirs.
    """
    each = [own[document] - other[document] for document in own if document in other]
    are_means = len(own) == len(other) == len(each) > 1 and all(
        math.isclose(math.fsum(mine.values()) / len(mine), value, rel_tol=1e-9, abs_tol=1e-12)
        for mine, value in zip((own, other), values, strict=True)
    )
    if not are_means:
        return NONE
    mean = math.fsum(each) / len(each)
    return math.sqrt(math.fsum((one - mean) ** 2 for one in each) / (len(each) - 1) / len(each))


def difference(task: str, own: Scores, base: Scores) -> dict[str, Any]:
    """Return the differences of a task's metrics from those of base, as the harness says its metrics."""
    ours, theirs = own.metrics[task], base.metrics[task]
    made = {"sample_len": ours["sample_len"]}
    for name in metric_names(ours):
        value, before = number(ours[name]), number(theirs[name])
        if value is not None and before is not None:
            mine, other = (each.documents.get(task, {}).get(name, {}) for each in (own, base))
            made |= {name: value - before, error_name(name): paired_error(mine, other, (value, before))}
    return made


def shown(loaded: Mapping[str, Any]) -> list[str]:
    """Return what is told of: groups that the harness sums up, as one, and all other tasks."""
    groups = loaded["groups"]

    def within(name: str) -> list[str]:
        """Return name, or what is told of its members."""
        if name not in groups or groups[name].has_aggregation:
            return [name]
        return [each for child in groups[name].child_names for each in within(child)]

    members = {child for group in groups.values() for child in group.child_names}
    return [each for name in [*groups, *loaded["tasks"]] if name not in members for each in within(name)]


def told_of(loaded: Mapping[str, Any], own: Scores, base: Scores | None) -> list[dict[str, Any]]:
    """Return a dict for each task and metric of a row: see measure. Groups sum differences up as they do values."""
    changes = {} if base is None else {name: difference(name, own, base) for name in loaded["tasks"]}
    changes |= {name: group.aggregate(changes) for name, group in loaded["groups"].items() if changes}
    found = []
    for task in shown(loaded):
        metrics, change = own.metrics[task], changes.get(task, {})
        for name in metric_names(metrics):
            told = {"value": metrics[name], "se": metrics.get(error_name(name))}
            told |= {"delta": change.get(name), "delta_se": change.get(error_name(name))}
            about = {"task": task, "metric": name.removesuffix(",none")}
            figures = {key: number(value) for key, value in told.items()}
            found.append({**about, **figures, "documents": metrics["sample_len"]})
    return found
