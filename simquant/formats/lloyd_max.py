"""TurboQuant's keys (arXiv:2504.19874, as vLLM stores them): the direction of a rotated head on a Lloyd-Max grid."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_utils import UserError, borders, nearest
from simquant.formats.affine import rounded
from simquant.formats.heads import HeadQuantizer


@functools.cache
def normal_centroids(bits: int, steps: int = 1000) -> Tensor:
    """Return the [2**bits] fp64 levels of least squared error for N(0, 1), by Lloyd's iteration.

    Each is the mean of the normal distribution between the borders a and b half way to its neighbours,
    (pdf(a) - pdf(b)) / (cdf(b) - cdf(a)). The start is at quantiles.
    """
    count = 2**bits
    levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(steps):
        edges = F.pad(F.pad(borders(levels), (1, 0), value=-math.inf), (0, 1), value=math.inf)  # [L+1]
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = -density.diff() / torch.special.ndtr(edges).diff()
    return levels


@dataclass(frozen=True, eq=False)
class LloydMaxQuantizer(HeadQuantizer):
    """The norm of a head in fp16, and for every entry of its direction one of the levels for N(0, 1/D).

    After a rotation the entries of a direction are close to such normal numbers. What is decoded is made as long as
    the norm says ("norm correction").
    """

    levels: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        if self.bits > 8:
            raise UserError(f"there are no {self.bits}-bit Lloyd-Max levels")
        object.__setattr__(self, "levels", (normal_centroids(self.bits) / math.sqrt(self.head)).float())

    def coded(self, x: Tensor) -> Tensor:
        """See HeadQuantizer."""
        norm = x.norm(dim=-1, keepdim=True)
        found = self.levels[nearest(x / (norm + 1e-8), self.levels)]
        return rounded(norm, torch.float16) * (found / found.norm(dim=-1, keepdim=True))

    @property
    def entry_bits(self) -> float:
        """See HeadQuantizer: a norm a head."""
        return self.bits + 16 / self.head

    def __str__(self) -> str:
        """Return a line of plain words, the bits left out."""
        return ", ".join(["Lloyd-Max levels for the direction of a head, its norm in float16", *self.extras])
