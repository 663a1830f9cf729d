"""From what single windows gave to the figures of a row: means, differences, tails and sizes, each with its error."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import quant_utils as qu
from quant_utils import FIGURES, PARTS
from simquant import positions, tails
from simquant.text_units import bits_per_byte, ratio_with_error, word_perplexity

SHARES = {"kl_median": 0.5, "kl_p99": 0.99, "kl_p999": 0.999}  # quantiles of the tokens' KL divergence
BLOCKS = 2000  # that a bootstrap draws from, at most
OPTIONAL = {"saturation", "accuracy", "squared_change", "kl_max"}  # figures whose list is left out if all are unknown
MOST = {"nll": 690, "top1_agreement": 1, "squared_change": 1, "accuracy": 1, "key_bits": 64, "value_bits": 64,
        "saturation": 1}  # the greatest value that a figure can have; the least is 0  # fmt: skip


@dataclass(frozen=True)
class RowWindows:
    """What is known of n windows of a text in one row: all that its figures come from.

    figures    {one of FIGURES: [n]}, nan where it is not known
    sketches   [n] of the KL divergence of a window's tokens, as tails.packed makes them; fewer where not all are known
    positions  [n,2,P] mean loss and KL divergence in the bins of positions.bins; None where that is not asked
    sizes      [n,2] bytes and words of the text that is predicted; None where they are not known
    predicted  tokens of a window that are predicted
    """

    figures: Mapping[str, Sequence[float]]
    sketches: Sequence[str]
    positions: Tensor | None
    sizes: Tensor | None
    predicted: int

    def first(self, count: int) -> RowWindows:
        """Return the same of the first windows alone."""
        cut = {name: values[:count] for name, values in self.figures.items()}
        places, sizes = (None if each is None else each[:count] for each in (self.positions, self.sizes))
        return RowWindows(cut, self.sketches[:count], places, sizes, self.predicted)

    def __len__(self) -> int:
        return len(self.figures["nll"])

    def lists(self) -> dict[str, Any]:
        """Return the window_ lists of a report, which from_row reads."""
        made: dict[str, Any] = {
            f"window_{name}": list(map(or_none, values))
            for name, values in self.figures.items()
            if name not in OPTIONAL or not all(map(math.isnan, values))
        }
        made |= {"window_kl_sketch": list(self.sketches)} if len(self.sketches) == len(self) else {}
        if self.positions is not None:
            for name, column in zip(("nll", "kl"), self.positions.unbind(1), strict=True):
                if not column.isnan().all():
                    made[f"window_{name}_by_position"] = column.tolist()
        if self.sizes is not None:
            made |= {"window_bytes": self.sizes[:, 0].tolist(), "window_words": self.sizes[:, 1].tolist()}
        return made

    @classmethod
    def from_row(cls, row: Mapping) -> RowWindows:
        """Return what the window_ lists of a report's row hold. ValueError for what cannot have been measured."""
        if type(row["tokens"]) is not int or not 0 < row["tokens"] < 2**53:
            raise ValueError(f"tokens of {row['dataset']} are {str(row['tokens'])[:20]}")
        count, places = len(row["window_nll"]), [row.get(f"window_{name}_by_position") for name in ("nll", "kl")]
        figures = {name: figure_list(row, name) for name in FIGURES}
        sketches = row.get("window_kl_sketch", [])
        for sketch in sketches:
            tails.unpacked(sketch)
        known = [row[name] for name in ("window_bytes", "window_words") if name in row]
        sizes = torch.tensor(known, dtype=torch.long).T if len(known) == 2 else None
        at = None
        if places[0] is not None:
            blank = [[math.nan] * len(each) for each in places[0]]
            at = torch.tensor([places[0], places[1] or blank], dtype=torch.float64).transpose(0, 1)
        if at is not None and at.shape[1:] != (2, len(positions.bins(row["tokens"] // max(1, count)))):
            raise ValueError(f"figures by position of {row['dataset']} have another number of bins")
        lengths = {len(each) for each in (sketches, sizes, at) if each is not None and len(each)} - {count}
        if lengths:
            raise ValueError(f"lists of {row['dataset']} have {count} and {lengths.pop()} windows")
        return cls(figures, sketches, at, sizes, row["tokens"] // max(1, count))


def figure_list(row: Mapping, name: str) -> list[float]:
    """Return the window_ list of a figure in a report's row, nan where it is not known. ValueError for nonsense."""
    values = row.get(f"window_{name}", [None] * len(row["window_nll"]))  # what nobody counted is left out
    most = MOST.get(name, 1e9)
    bad = [value for value in values if not (type(value) in (int, float) and 0 <= value <= most)]
    may_lack = [None] * (len(bad) if name in OPTIONAL else len(values) if name != "nll" else 0)
    if (bad and bad != may_lack) or len(values) != len(row["window_nll"]):
        raise ValueError(f"window_{name} of {row['dataset']} has {bad[0] if bad else len(values)!r}")
    return [math.nan if value is None else value for value in values]


def standard_error(values: Sequence[float]) -> float | None:
    """Return that of the mean of values, taken as independent; None for a single one, or where they are not known."""
    known = len(values) > 1 and not any(map(math.isnan, values))
    return statistics.stdev(values) / math.sqrt(len(values)) if known else None


def paired_difference(nll: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    """Return {"delta_ppl", "delta_percent", each with its "_se"} from losses in nats on the same windows.

    To first order in the losses a difference of perplexities is a mean over windows, and its standard error that of a
    mean: how hard a window is for both cancels out, which is why a pair tells more than two separate runs.
    """
    ppl, base = qu.perplexity(nll), qu.perplexity(baseline)
    pairs = list(zip(nll, baseline, strict=True))
    return {
        "delta_ppl": ppl - base,
        "delta_ppl_se": standard_error([ppl * one - base * other for one, other in pairs]),
        "delta_percent": 100 * (ppl / base - 1),
        "delta_percent_se": standard_error([100 * ppl / base * (one - other) for one, other in pairs]),
    }


def or_none(value: float) -> float | None:
    """Return value; None for nan, which stands for what is not known."""
    return None if math.isnan(value) else value


def storage_cost(key_bits: float, value_bits: float, entries: Mapping[str, int]) -> dict[str, float | None]:
    """Return average bits an entry of keys and values together, and GiB of a cache of so many entries {part: count}."""
    held = [entries[part] for part in PARTS]
    bits = math.fsum(n * each for n, each in zip(held, (key_bits, value_bits), strict=True) if n)
    average = bits / (sum(held) or math.nan)
    gib = sum(held) / 8 / 2**30  # of one bit an entry
    return {"avg_bits": or_none(average), "cache_gib": or_none(average * gib), "fp16_cache_gib": 16 * gib or None}


def kl_tails(mine: RowWindows, with_intervals: bool) -> dict[str, float | None]:
    """Return quantiles and maximum of the KL divergence of all tokens, and 95 % bootstrap intervals over windows.

    Each figure has its ends under "_low" and "_high"; None for a single window, or if intervals are not asked.
    """
    names = [*SHARES, "kl_max"]
    if len(mine.sketches) < len(mine):
        return dict.fromkeys(f"{name}{end}" for name in names for end in ("", "_low", "_high"))
    together = -(-len(mine) // BLOCKS)  # neighbours that a bootstrap draws as one
    counts = torch.zeros(-(-len(mine) // together), tails.BINS, dtype=torch.long)
    most = torch.zeros(len(counts), dtype=torch.float64)
    for window, (sketch, greatest) in enumerate(zip(mine.sketches, mine.figures["kl_max"], strict=True)):
        counts[window // together] += tails.unpacked(sketch)
        most[window // together] = max(most[window // together].item(), greatest)
    found: list[list] = [[*tails.quantiles(counts.sum(0), [*SHARES.values()]).tolist(), most.max().item()]]
    if with_intervals and len(mine) > 1:
        found += [each.tolist() for each in tails.intervals(counts, most, [*SHARES.values()])]
    else:
        found += [[None] * len(names)] * 2
    each = zip(("", "_low", "_high"), found, strict=True)
    return {f"{name}{end}": value for end, values in each for name, value in zip(names, values, strict=True)}


def units(mine: RowWindows) -> dict[str, float | None]:
    """Return bits per byte and word perplexity of the predicted text, and their standard errors over windows."""
    names = ("bits_per_byte", "bits_per_byte_se", "word_ppl", "word_ppl_se")
    if mine.sizes is None or not mine.sizes.sum(0).all():
        return dict.fromkeys(names)
    losses = [each * mine.predicted for each in mine.figures["nll"]]
    total, (size, words) = math.fsum(losses), mine.sizes.sum(0).tolist()
    byte_error, word_error = (ratio_with_error(losses, column)[1] for column in mine.sizes.T.double().tolist())
    ppl = word_perplexity(total, words)
    figures = bits_per_byte(total, size), scaled(byte_error, 1 / math.log(2)), ppl, scaled(word_error, ppl)
    return {name: None if value == math.inf else value for name, value in zip(names, figures, strict=True)}


def scaled(error: float | None, factor: float) -> float | None:
    """Return a standard error times factor; None where there is none."""
    return None if error is None else error * factor


def summary(
    mine: RowWindows, base: RowWindows | None, entries: Mapping[str, int], with_intervals: bool = True
) -> dict[str, Any]:
    """Return the figures of a row, None where they are not known; those of differences if there is a baseline.

    ppl = exp(nll), nll the mean in nats; _se are standard errors over windows, taken as independent. entries are those
    of the cache, {part: count}.
    """
    means = {name: math.fsum(values) / len(values) for name, values in mine.figures.items()}
    ppl, error = qu.perplexity(mine.figures["nll"]), standard_error(mine.figures["nll"])
    difference = paired_difference(mine.figures["nll"], (base or mine).figures["nll"])
    square, square_error = means.pop("squared_change"), standard_error(mine.figures["squared_change"])
    rms = math.sqrt(square)
    errors = {f"{name}_se": standard_error(mine.figures[name]) for name in ("kl", "top1_agreement", "accuracy")}
    return {
        "ppl": ppl, "ppl_se": None if error is None else ppl * error,
        **(difference if base else dict.fromkeys(difference)),
        **{name: or_none(mean) for name, mean in means.items()}, **errors,
        **storage_cost(means["key_bits"], means["value_bits"], entries),
        "rms_dp": or_none(rms), "rms_dp_se": square_error / (2 * rms) if square_error is not None and rms > 0 else None,
        **kl_tails(mine, with_intervals), **units(mine),
        **by_position(mine, base),
    }  # fmt: skip


def bin_sizes(predicted: int) -> Tensor:
    """Return [P] fp64 how many of so many predicted tokens lie in each bin of the position."""
    return torch.tensor([last - first + 1 for first, last in positions.bins(predicted)], dtype=torch.float64)


def by_position(mine: RowWindows, base: RowWindows | None) -> dict[str, list[dict]]:
    """Return loss and KL divergence in bins of the position, under the name of the report; nothing if not known."""
    if mine.positions is None:
        return {}
    sizes = bin_sizes(mine.predicted)
    loss, divergence = (mine.positions * sizes).unbind(1)
    against = None if base is None or base.positions is None else base.positions[:, 0] * sizes
    return {"by_position": positions.by_position(loss, divergence, against, mine.predicted)}
