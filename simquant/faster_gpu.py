"""Faster definitions for a GPU, and for compiled layers. They give the same bits as those of quant_utils."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import quant_utils as qu

Tails = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Bounds = tuple[Tensor, Tensor, Tensor, Tensor]


def is_counted(x: Tensor, *_) -> bool:
    """Return whether order statistics of x are found by counting: 16-bit numbers on a GPU."""
    return x.device.type != "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def inlier_bounds(x: Tensor, fraction: float, axis: int, absent: int = 0) -> Bounds:
    """See quant_utils. If x is padded along axis, so many entries are `absent`: they are nan, and take no part."""
    if axis == qu.AXES["channel"]:  # a GPU counts fastest along contiguous memory, in aligned rows
        pad = -x.shape[1] % 16
        rows = qu.stored(F.pad(x.mT, (0, pad), value=math.nan).contiguous())
        lower, upper, lo, hi = (qu.stored(each).mT for each in inlier_bounds(rows, fraction, qu.AXES["token"], pad))
        return lower, upper, lo, hi
    rank, weight = divmod(fraction / 2 * (x.shape[axis] - absent - 1), 1)
    ends = counted_tails(x, int(rank), axis, absent)
    lower, upper = (torch.lerp(near.float(), far.float(), weight) for near, far in ends)
    return lower, upper, *qu.range_between(x, lower, upper, axis)


def is_compiled(unit: Tensor, levels: Tensor, *_) -> bool:
    """Return whether levels are found one after another: few of them, in a compiled kernel, where a search is slow."""
    return torch.compiler.is_compiling() and len(levels) <= 16


def decode_nearest(unit: Tensor, levels: Tensor, decoded: Tensor) -> Tensor:
    """See quant_utils."""
    chosen = decoded[0]
    for border, level in zip(qu.borders(levels).unbind(), decoded[1:].unbind(), strict=True):
        chosen = torch.where(unit > border, level, chosen)
    return chosen


def counted_tails(x: Tensor, rank: int, axis: int, absent: int = 0) -> Tails:
    """Return what stands at rank and rank + 1 along axis of 16-bit x: ((ascending), (descending)), 0 the extreme.

    Nothing is sorted, and the compiler makes a single kernel of it. In the order of its bits a number is found bit by
    bit, from how many are as large as each trial. Both ends are searched at once, in the halves of an integer, and but
    for the last bit by one subtraction: a half that holds 15 bits of a number and a guard bit above them keeps the
    guard if what is subtracted is no larger.
    """
    total, key = x.shape[axis], ordered_key(x)
    key = key.masked_fill(x.isnan(), 2**16 - 1) if absent else key  # a compiler may give a nan either sign
    half, whole = packing(total)
    one = 1 + 2**half  # in each half a 1
    guards = one * 2**15 - (2**32 if half == 16 else 0)  # the upper one is the sign of an int32
    guarded = (key >> 1).to(whole) * one + guards
    found = torch.zeros_like(guarded.narrow(axis, 0, 1))
    for bit in reversed(range(15)):
        as_large = (guarded - (found + (one << bit))) >> 15 & one
        at_low, at_high = halves(as_large.sum(axis, keepdim=True, dtype=whole), half)
        is_low, is_high = at_low >= total - rank, at_high > rank + absent
        found = found + (is_low.to(whole) << bit) + (is_high.to(whole) << bit + half)
    low, high = (2 * each.int() for each in halves(found, half))
    less_low, less_high = counts_below(key, low + 1, high + 1, axis)  # the last bit
    low = torch.where(less_low <= rank, low + 1, low)
    high = torch.where(less_high <= total - absent - 1 - rank, high + 1, high)
    less_low, less_high = counts_below(
        key, low + 1, high, axis
    )  # the next rank holds the same number again, or its neighbour
    above = key.masked_fill(key <= low, 2**16 - 1).amin(axis, keepdim=True)
    below = key.masked_fill(key >= high, 0).amax(axis, keepdim=True)
    next_low = torch.where(less_low < min(rank + 2, total - absent), above, low)
    next_high = torch.where(less_high > max(total - absent - rank - 2, 0), below, high)
    low, next_low, high, next_high = (from_ordered_key(each, x.dtype) for each in (low, next_low, high, next_high))
    return (low, next_low), (high, next_high)


def packing(total: int) -> tuple[int, torch.dtype]:
    """Return (bits of a half, dtype) of integers of which either half counts to total."""
    return (16, torch.int32) if total < 2**16 else (32, torch.int64)


def halves(both: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return the lower and the upper half of integers [...], each of so many bits."""
    return both & 2**half - 1, both >> half & 2**half - 1


def counts_below(key: Tensor, low: Tensor, high: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return how many of key are less than low along axis, and how many less than high, by a single sum."""
    half, whole = packing(key.shape[axis])
    both = (key < low).to(whole) + ((key < high).to(whole) << half)
    return halves(both.sum(axis, keepdim=True, dtype=whole), half)


def ordered_key(x: Tensor) -> Tensor:
    """Return int32 in 0..2**16-1, in the order of 16-bit floating-point x: negative ones have their bits flipped."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, ~bits, bits + 2**15)


def from_ordered_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the number in dtype that ordered_key made key of."""
    return torch.where(key < 2**15, ~key, key - 2**15).short().view(dtype)
