"""Levels and bits of many components: 1-D k-means of every one at once, and reverse water-filling over all of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LLOYD_STEPS = 30


def column_kmeans(columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return ([C,2**width] sorted levels, [C] mean squared errors) of sorted columns [C,N]: Lloyd steps on all at once.

    They start where a normal distribution has the best levels of high resolution: at quantiles of one sqrt(3) as wide.
    """
    count, length = 2**width, columns.shape[1]
    totals = F.pad(columns.double().cumsum(1), (1, 0))
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    start = torch.special.ndtr(torch.special.ndtri(share) * math.sqrt(3)) * (length - 1)
    levels = columns[:, start.long().to(columns.device)].double()
    for _ in range(LLOYD_STEPS if width else 1):
        borders = ((levels[:, 1:] + levels[:, :-1]) / 2).float().contiguous()
        edges = F.pad(torch.searchsorted(columns, borders), (1, 0))
        edges = F.pad(edges, (0, 1), value=length)
        mass, moment = edges.diff(dim=1), totals.gather(1, edges).diff(dim=1)
        levels = (moment / mass).where(mass > 0, levels)
    error = columns.double().square().mean(1) - (moment.square() / mass.clamp(min=1)).sum(1) / length
    return levels.float(), error.clamp(min=0).float()


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
