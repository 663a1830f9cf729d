"""Faster definitions for a CPU. They give the same bits as those of quant_utils."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import quant_utils as qu

Bounds = tuple[Tensor, Tensor, Tensor, Tensor]

BLOCK = 2**15  # entries at a time: as many as torch leaves to one thread
MOST_STEPS, MOST_BINS, TINY = 16, 2**16, 2.0**-40


def is_on_cpu(x: Tensor, *_) -> bool:
    """Return whether x is on a CPU, and this is not being compiled."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def is_to_turn(x: Tensor, rank: int, axis: int) -> bool:
    """Return whether x is on a CPU, and axis is its last but one, along which its memory is not contiguous."""
    return is_on_cpu(x) and axis % x.ndim == x.ndim - 2


def turned_order_statistics(x: Tensor, rank: int, axis: int) -> list[tuple[Tensor, Tensor]]:
    """See quant_utils. x is transposed first: sorting is several times faster along contiguous memory."""
    rows = torch.empty_like(x.mT, memory_format=torch.contiguous_format)
    for out, each in zip(rows.view(-1, *rows.shape[-2:]), x.reshape(-1, *x.shape[-2:]), strict=True):
        out.copy_(each.mT)  # torch copies a transposed matrix several times faster than a stack of them
    return [(near.mT, far.mT) for near, far in qu.order_statistics(rows, rank, -1)]


def inlier_bounds(x: Tensor, fraction: float, axis: int) -> Bounds:
    """See quant_utils. The least inlier stands next to the lower quantile, unless numbers are equal there."""
    rank, weight = divmod(fraction / 2 * (x.shape[axis] - 1), 1)
    (least, lo), (greatest, hi) = qu.order_statistics(x, int(rank), axis)
    lower, upper = torch.lerp(least.float(), lo.float(), weight), torch.lerp(greatest.float(), hi.float(), weight)
    if (lo > lower).all() and (hi < upper).all():
        none = (lo >= upper) | (hi <= lower)
        return lower, upper, lo.float().masked_fill(none, math.inf), hi.float().masked_fill(none, -math.inf)
    return lower, upper, *qu.range_between(x, lower, upper, axis)


def has_finder(x: Tensor, exact: Tensor, lo: Tensor, hi: Tensor, levels: Tensor, decoded: Tensor) -> bool:
    """Return whether x is on a CPU, and there is a finder of its levels."""
    return is_on_cpu(x) and level_finder(tuple(levels.tolist()), tuple(decoded.tolist())) is not None


def snap(x: Tensor, exact: Tensor, lo: Tensor, hi: Tensor, levels: Tensor, decoded: Tensor) -> Tensor:
    """See quant_utils."""
    find: Any = level_finder(tuple(levels.tolist()), tuple(decoded.tolist()))
    given, size = torch.empty_like(x), max(1, BLOCK // max(1, x.shape[2]))
    exact = exact.expand(len(x), x.shape[1], exact.shape[-1])  # whole tokens, or single entries
    by_entry = exact.shape[-1] > 1
    some_are_exact = by_entry or bool(exact.any())
    whole = (x, given, exact, *(each.expand_as(x) for each in (lo, hi, hi - lo)))
    for row in zip(*whole, strict=True):
        for some, out, keep, low, high, span in zip(*(each.split(size) for each in row), strict=True):
            unit = torch.sub(some, low).div_(span).mul_(2).sub_(1)
            unit.nan_to_num_(nan=1.0).clamp_(-1, 1)  # a search puts nan behind all borders
            low, high = (each if each.stride(-1) else each.contiguous() for each in (low, high))  # else lerp is slow
            out.copy_(torch.lerp(low, high, find(unit)))
            if some_are_exact:
                place = keep.nonzero().unbind(1)[: 2 if by_entry else 1]
                out[place] = some[place]
    return given


class LevelSteps(NamedTuple):
    """Few levels, found one after another, the highest first, by threshold_, which overwrites what is <= a border.

    Numbers and borders are negated, so that it overwrites what lies above a border. They are also scaled down to TINY,
    so that what it has written exceeds all borders that follow, and stays.

    steps  (border, weight of the level above it), the highest first, -TINY times what they are
    first  weight of the lowest level
    """

    steps: list[tuple[float, float]]
    first: float

    def __call__(self, unit: Tensor) -> Tensor:
        """Overwrite unit [...] in [-1, 1] by the weight of the nearest level, and return it."""
        unit.mul_(-TINY)
        for border, weight in self.steps:
            torch.threshold_(unit, border, weight)
        return torch.threshold_(unit, TINY, self.first)


class LevelTable(NamedTuple):
    """Many levels: [-1, 1] in n equal bins, of which none holds two borders, so a bin and one comparison tell a level.

    border  [n+1] the border in a bin (n is the bin of 1 itself); infinite where there is none
    weight  [2n+2] for each bin, the weight of the level below its border, then that of the level above
    """

    border: Tensor
    weight: Tensor

    def bins(self, unit: Tensor) -> Tensor:
        """Return the bin [...] of unit [...] in [-1, 1]: it never falls where unit rises."""
        return (unit + 1).mul_((len(self.border) - 1) / 2).long()

    def __call__(self, unit: Tensor) -> Tensor:
        """Return the weight of the level nearest to each of unit [...] in [-1, 1], which is overwritten."""
        bins = self.bins(unit)
        border = self.border.index_select(0, bins.flatten()).view_as(unit)
        is_above = torch.gt(unit, border, out=border)  # 0.0 or 1.0, much sooner than bool
        return self.weight.index_select(0, bins.mul_(2).add_(is_above.long()).flatten()).view_as(unit)


@functools.lru_cache(256)
def level_finder(levels: tuple[float, ...], decoded: tuple[float, ...]) -> LevelSteps | LevelTable | None:
    """Return what finds the weight, (decoded + 1) / 2, of the level nearest to a number in [-1, 1], overwriting that.

    None if there is none: for a border outside [-1, 1], or two that are closer than MOST_BINS bins can tell.
    """
    weight, borders = (torch.tensor(decoded) + 1) / 2, qu.borders(torch.tensor(levels))
    if borders.abs().max() > 1:
        return None
    if len(levels) <= MOST_STEPS and (weight[1:] > 2 * TINY).all():
        below = torch.nextafter(borders * -TINY, torch.tensor(-math.inf))  # it replaces what is <=, not what is <
        return LevelSteps(list(zip(below.tolist(), weight[1:].tolist(), strict=True))[::-1], weight[0].item())
    border, count = borders.unique(return_counts=True)
    level, n = F.pad(count.cumsum(0), (1, 0)), len(levels)  # the level below each border, and the last
    while n <= MOST_BINS:
        table = LevelTable(torch.full((n + 1,), math.inf), torch.empty(0))
        bins = table.bins(border)
        if len(bins.unique()) == len(bins):
            table.border[bins] = border
            below = torch.searchsorted(bins, torch.arange(n + 1))  # how many borders lie in the bins before
            both = torch.stack([below, below + table.border.isfinite()], 1)
            return table._replace(weight=weight[level[both.flatten()]])
        n *= 2
    return None


def sorted_rows(x: Tensor) -> Tensor:
    """See simquant/formats/allocation.py. NumPy sorts with vector instructions, some twenty times as fast."""
    return torch.from_numpy(np.sort(x.numpy(), 1))
