"""Coupled Quantization (CQ, arXiv:2405.03917): neighbouring channels share one index into a codebook of vectors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from quant_utils import UserError
from simquant.formats.prediction import MOST_CHANNELS, PredictedQuantizer

SCORES = 2**26  # that are held at a time: 256 MiB
STEPS, TRIALS = 40, 8  # of k-means: its iterations, at most, and how many points are drawn for each seed
SETTLED = 1e-4  # it ends when the error falls by less, relative to what it is
FLOOR = 1e-6  # of the mean weight: a token that no gradient reaches still has its place


@dataclass(frozen=True, eq=False)
class CoupledQuantizer(PredictedQuantizer):
    """Every group of neighbouring channels at the nearest of its own codebook's vectors, which k-means has fitted.

    A token weighs in a group's k-means as its Fisher information there: the sum of its channels' squared gradients
    (the paper's "Fisher-guided centroid learning"). The nearest vector is so in plain Euclidean distance.

    bits      index bits / coupled
    coupled   channels of a group; the paper's 1 bit is 8 channels in an index of 8 bits
    codebook  fp16 [C/coupled,2**index bits,coupled]
    """

    bits: float = 1
    coupled: int = 8
    codebook: Tensor | None = None
    vectors: Tensor | None = field(init=False, repr=False, default=None)  # the same in fp32
    middle: Tensor | None = field(init=False, repr=False, default=None)  # fp32 [C/coupled,1,coupled], their mean

    def __post_init__(self):
        super().__post_init__()
        is_size = type(self.coupled) is int and 1 <= self.coupled <= 64
        if not is_size or self.bits * self.coupled not in range(1, 13):
            raise UserError(f"no index of 1 to 12 bits gives {str(self.coupled)[:40]} channels {self.bits} bits each")
        if self.codebook is None:
            return
        if not is_codebook(self.codebook, 2**self.index_bits, self.coupled):
            raise UserError(f"its codebook is not of {2**self.index_bits} vectors of {self.coupled} numbers in fp16")
        object.__setattr__(self, "vectors", self.codebook.float())
        object.__setattr__(self, "middle", self.codebook.float().mean(1, keepdim=True))

    @property
    def index_bits(self) -> int:
        """Bits of an index."""
        return round(self.bits * self.coupled)

    @property
    def needs_gradient(self) -> bool:
        """See Quantizer."""
        return True

    def groups(self, x: Tensor) -> Tensor:
        """Return [G,N,coupled], groups of neighbouring channels of x [B,T,C]. UserError where they do not divide C."""
        if x.shape[-1] % self.coupled:
            raise UserError(f"groups of {self.coupled} channels do not divide {x.shape[-1]} channels")
        return x.flatten(0, 1).unflatten(-1, (-1, self.coupled)).transpose(0, 1)

    def fit_code(self, x: Tensor, grad: Tensor | None) -> Self:
        """See PredictedQuantizer."""
        points = self.groups(x).contiguous()
        weight = torch.ones_like(points[..., 0]) if grad is None else importance(self.groups(grad))
        most = torch.finfo(torch.float16).max
        centres = kmeans(points, weight, 2**self.index_bits).clamp(-most, most)
        return replace(self, codebook=centres.half())

    def coded(self, x: Tensor) -> Tensor:
        """See PredictedQuantizer. The codebook's mean is taken away first, so that no digits cancel in the search."""
        if self.vectors is None or self.middle is None or x.shape[-1] != self.middle.numel():
            raise UserError(f"its codebook is not for {x.shape[-1]} channels")
        index = nearest_vectors(self.groups(x - self.middle.flatten()), self.vectors - self.middle)
        groups, count, _ = self.vectors.shape
        place = index.T + count * torch.arange(groups, device=x.device)  # [N,G]: a token's channels stay together
        return self.vectors.flatten(0, 1)[place].reshape(x.shape)

    @property
    def entry_bits(self) -> float:
        """See PredictedQuantizer. The codebook is a constant of the model, and not counted."""
        return self.bits

    def __str__(self) -> str:
        """Return a line of plain words, the bits left out."""
        words = f"CQ: {self.coupled} channels share an index of {self.index_bits} bits, by k-means with Fisher weights"
        return ", ".join([words, *self.extras])


def is_codebook(value: Any, count: int, size: int) -> bool:
    """Return whether value is a plain fp16 tensor [G,count,size] of finite numbers, for at most MOST_CHANNELS."""
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.requires_grad
    is_plain = is_plain and value.dtype == torch.float16 and value.ndim == 3 and value.shape[1:] == (count, size)
    return is_plain and 0 < len(value) <= MOST_CHANNELS // size and bool(value.isfinite().all())


def importance(grad: Tensor) -> Tensor:
    """Return [G,N] fp32: the squared length of grad [G,N,d] over its mean in the group; 1 where nothing has any."""
    square = grad.float().square().sum(-1)
    mean = square.mean(1, keepdim=True)
    return (square / mean).where(mean > 0, 1) + FLOOR


def nearest_vectors(points: Tensor, vectors: Tensor) -> Tensor:
    """Return [G,N]: which of its group's vectors [G,K,d] is nearest to each of points [G,N,d].

    That is the one of greatest score x·c - |c|²/2.
    """
    bias = vectors.square().sum(-1)[:, None] / -2
    length = max(1, SCORES // (vectors.shape[0] * vectors.shape[1]))
    parts = [torch.baddbmm(bias, part, vectors.mT).argmax(-1) for part in points.split(length, 1)]
    return torch.cat(parts, 1)


def kmeans(points: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return [G,count,d] centres of the weighted k-means of every group's points [G,N,d], weight [G,N] above 0.

    All groups move at once: Lloyd's iteration from seeds that are drawn alike whenever it is called. A centre that is
    nearest to no point stays where it is.
    """
    middle = (points * weight[..., None]).sum(1, keepdim=True) / weight.sum(1)[:, None, None]
    points = points - middle
    centres = seeds(points, weight, count)
    spread = (points.square().sum(-1) * weight).sum(dtype=torch.float64).item()
    before = torch.inf
    for _ in range(STEPS):
        mass, moment = cell_sums(points, weight, nearest_vectors(points, centres), count)
        centres = (moment / mass).where(mass > 0, centres).float()
        error = spread - (moment.square() / mass.clamp(min=1e-300)).sum().item()
        if error >= (1 - SETTLED) * before:
            break
        before = error
    return centres + middle


def seeds(points: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return [G,count,d] of points [G,N,d] by k-means++, each the best of TRIALS (Arthur and Vassilvitskii, 2007).

    Points are drawn in proportion to weight [G,N] and to their squared distance from what is drawn already; of TRIALS
    of them the one that leaves the least of it to draw is taken. The first is the one that leaves least itself.
    """
    groups, size = points.shape[0], points.shape[-1]
    generator, every = torch.Generator().manual_seed(0), torch.arange(groups, device=points.device)
    draws = torch.rand(count, groups, TRIALS, generator=generator, dtype=torch.float64).to(points.device)
    square, distance, found = points.square().sum(-1), torch.full_like(weight, torch.inf), []
    for draw in draws:
        left = (weight * distance).double().where(distance < torch.inf, weight).cumsum(1)
        drawn = torch.searchsorted(left, draw * left[:, -1:]).clamp(max=points.shape[1] - 1)  # [G,TRIALS]
        tried = points.gather(1, drawn[..., None].expand(-1, -1, size))
        away = torch.baddbmm(square[:, None], tried, points.mT, alpha=-2)  # [G,TRIALS,N]
        away = (away + tried.square().sum(-1, keepdim=True)).clamp(min=0).minimum(distance[:, None])
        best = (away @ weight[..., None]).squeeze(-1).argmin(1)
        distance = away[every, best]
        found.append(tried[every, best])
    return torch.stack(found, 1)


def cell_sums(points: Tensor, weight: Tensor, index: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (mass [G,count,1], moment [G,count,d]), fp64: summed weight, and weight * point, of each index [G,N]."""
    groups = len(points)
    place = (index + count * torch.arange(groups, device=index.device)[:, None]).flatten()
    held = torch.cat([weight[..., None], points * weight[..., None]], -1).double()
    blank = held.new_zeros(groups * count, held.shape[-1])
    totals = blank.index_add_(0, place, held.flatten(0, 1)).view(groups, count, -1)
    return totals[..., :1], totals[..., 1:]
