"""Levels and bits of many components: 1-D k-means of every one at once, and reverse water-filling over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_utils import replaceable

LLOYD_STEPS = 20


@replaceable
def sorted_rows(x: Tensor) -> Tensor:
    """Return x [C,N] with every row sorted."""
    return x.sort(1).values


def kmeans_tables(columns: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return ([C,2**(most+1)-1] levels, [C,most+1] mean squared errors) of the k-means of sorted columns [C,N].

    Levels are those of 0 bits, then the sorted ones of 1 bit, up to `most` bits. Lloyd steps move all at once.
    """
    length, counts = columns.shape[1], [2**width for width in range(most + 1)]
    totals = F.pad(columns.double().cumsum(1), (1, 0))
    levels = spread_levels(columns, counts)
    is_first = torch.zeros(levels.shape[1], dtype=torch.bool, device=columns.device)
    is_first[[2**width - 1 for width in range(most + 1)]] = True
    is_last = is_first.roll(-1)
    for _ in range(LLOYD_STEPS):
        edges = torch.searchsorted(columns, ((levels[:, 1:] + levels[:, :-1]) / 2).float())  # also between widths
        sums = totals.gather(1, edges)
        mass, moment = (
            F.pad(each, (0, 1)).where(~is_last, whole) - F.pad(each, (1, 0)).where(~is_first, 0)
            for each, whole in ((edges, length), (sums, totals[:, -1:]))
        )
        levels = (moment / mass).where(mass > 0, levels)
    gains = (moment.square() / mass.clamp(min=1)).split(counts, 1)
    error = columns.double().square().mean(1, keepdim=True) - torch.stack([each.sum(1) for each in gains], 1) / length
    return levels.float(), error.clamp(min=0).float()


def spread_levels(columns: Tensor, counts: Sequence[int]) -> Tensor:
    """Return [C,sum of counts] fp64 levels, so many at a time, as dense as the cube root of sorted columns' density.

    So are the best ones of many bits (Panter and Dite, 1951). Between two neighbours of columns [C,N] that are d apart
    the density goes as 1 / d, so the levels there go as d to the power of 2/3.
    """
    share = (columns.diff(dim=1) ** (2 / 3)).cumsum(1, dtype=torch.float64)
    places = torch.cat([(torch.arange(count, dtype=torch.float64) + 0.5) / count for count in counts])
    wanted = places.to(columns.device) * share[:, -1:]
    return columns.gather(1, torch.searchsorted(share, wanted).clamp(max=columns.shape[1] - 1)).double()


def chosen_levels(levels: Tensor, widths: Tensor) -> Tensor:
    """Return [sum of 2**widths]: of kmeans_tables' levels those of each component's own width, one after another."""
    places = torch.arange(1, levels.shape[1] + 1, device=levels.device)
    width = (places + 0.5).log2().floor()  # that each place is for
    return levels[width == widths[:, None]]


def water_fill(distortion: Tensor, bits: float) -> Tensor:
    """Return [C] widths that average to bits, such that the sum of errors is least: reverse water-filling.

    distortion [C,W+1] is the error of each component at 0 to W bits. Each component's errors are taken along their
    lower convex hull, on which the bits that lower the error most, a bit for a bit, are also the best (Shoham and
    Gersho, 1988); the few that are left over go one by one.
    """
    budget = round(bits * len(distortion))
    slopes, targets = hull(distortion.double())
    order = slopes.flatten().argsort(descending=True, stable=True)
    steps = targets.diff(dim=1, prepend=torch.zeros_like(targets[:, :1])).flatten()[order]
    fits = steps.cumsum(0) <= budget
    widths = torch.zeros(len(distortion), dtype=torch.long, device=distortion.device)
    widths.scatter_add_(0, (order // targets.shape[1])[fits], steps[fits])
    for _ in range(budget - int(widths.sum())):
        now = distortion.gather(1, widths[:, None])
        after = F.pad(distortion, (0, 1), value=math.inf).gather(1, widths[:, None] + 1)
        widths[(now - after).squeeze(1).argmax()] += 1
    equal = torch.full_like(widths, round(bits))
    is_better = bits == round(bits) and error_of(distortion, equal) < error_of(distortion, widths)
    return equal if is_better else widths


def error_of(distortion: Tensor, widths: Tensor) -> float:
    """Return the sum of errors at widths [C]."""
    return distortion.double().gather(1, widths[:, None]).sum().item()


def hull(distortion: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([C,W] gains a bit, [C,W] widths reached) of the segments of every component's lower convex hull.

    Slopes fall from left to right. Where a hull has fewer segments than W the last ones have no bits.
    """
    most = distortion.shape[1] - 1
    at = torch.zeros(len(distortion), 1, dtype=torch.long, device=distortion.device)
    widths = torch.arange(most + 1, device=distortion.device)
    slopes, targets = [], []
    for _ in range(most):
        gain = (distortion.gather(1, at) - distortion) / (widths - at)
        best = gain.where(widths > at, -math.inf).max(1, keepdim=True)
        at = best.indices.where(at < most, most)
        slopes.append(best.values)
        targets.append(at)
    return torch.cat(slopes, 1), torch.cat(targets, 1)
