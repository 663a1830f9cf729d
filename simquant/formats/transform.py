"""Transform coding: decorrelate all channels of a token, then spend bits where the loss feels them.

The transform is the Karhunen-Loeve transform (KLT) in the metric of the loss, its Fisher information. Every component
has its own k-means levels, and as many bits as it earns by reverse water-filling over all layers: from 0 to 8. With
plain PCA instead this is KVTC (arXiv:2511.01815); simquant/formats/prediction.py goes around it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from quant_utils import Setting, Site, UserError, is_vector
from simquant.formats.allocation import chosen_levels, kmeans_tables, sorted_rows, water_fill
from simquant.formats.prediction import PredictedQuantizer, is_matrix, product

RIDGE = 0.2  # how much of a flat metric is mixed into the Fisher information
METRICS = {"fisher": "in the metric of Fisher information", "pca": "(PCA)"}
MOST = 8  # bits of a component
ABOVE = 5  # bits more than the average that a component may have: 30 dB


@dataclass(frozen=True, eq=False)
class TransformQuantizer(PredictedQuantizer):
    """z = (x - mean) @ forward, every component of z to the nearest of its own levels, and back by the inverse.

    metric      fisher or pca: in what metric components are uncorrelated, and their errors add up
    mean        fp32 [C]
    forward     fp16 [C,C]; the inverse is that of these rounded numbers, so that rounding them costs nothing
    widths      int16 [C] bits of each component, 0 to 8
    levels      fp32 [sum of 2**widths]: those of the first component, sorted, then those of the second, ...
    distortion  fp32 [C,W+1] error of each component at 0 to W bits, in units of the loss; gone when bits are agreed
    """

    metric: str = "fisher"
    mean: Tensor = None  # type: ignore[assignment]  # this and what follows are there when it is fitted
    forward: Tensor = None  # type: ignore[assignment]
    widths: Tensor = None  # type: ignore[assignment]
    levels: Tensor = None  # type: ignore[assignment]
    distortion: Tensor | None = None
    inverse: Tensor = field(init=False, repr=False, default=None)  # type: ignore[assignment]  # fp32 [C,C]
    table: Tensor = field(init=False, repr=False, default=None)  # type: ignore[assignment]  # [C,256], padded with inf
    borders: Tensor = field(init=False, repr=False, default=None)  # type: ignore[assignment]  # [C,255]
    shares_bits = True

    def __post_init__(self):
        super().__post_init__()
        if self.metric not in METRICS:
            raise UserError(f"there is no metric {str(self.metric)[:40]!r}: {' or '.join(METRICS)}")
        if self.forward is None:
            return
        size = len(self.forward)
        is_sound = is_matrix(self.forward) and is_vector(self.mean) and is_vector(self.levels)
        is_sound = is_sound and isinstance(self.widths, Tensor) and self.widths.dtype == torch.int16
        is_sound = is_sound and self.widths.shape == self.mean.shape == (size,) == self.forward.shape[1:]
        if not is_sound or self.widths.min() < 0 or self.widths.max() > MOST:
            raise UserError("its transform, its mean, its widths and its levels do not belong together")
        inverse, info = torch.linalg.inv_ex(self.forward.double())
        if info.item() or not inverse.isfinite().all():
            raise UserError("its transform has no inverse")
        object.__setattr__(self, "inverse", inverse.float())
        table = padded(self.levels, self.widths)
        object.__setattr__(self, "table", table)
        object.__setattr__(self, "borders", (table[:, 1:] + table[:, :-1]) / 2)

    @property
    def needs_gradient(self) -> bool:
        """See Quantizer."""
        return self.metric == "fisher"

    def fit_code(self, x: Tensor, grad: Tensor | None) -> Self:
        """See PredictedQuantizer. The first fit gives each site its own share of bits; agreed and a second follow."""
        root, unit = (None, 1.0) if grad is None else fisher_root(grad)
        mean, forward = klt(x, root)
        columns = sorted_rows(forward.float().T @ (x.flatten(0, 1) - mean).T)  # [C,N]
        most = min(MOST, math.ceil(self.bits) + ABOVE) if self.widths is None else int(self.widths.max())
        every_level, errors = kmeans_tables(columns, most)
        distortion = unit * errors if self.widths is None else None
        widths = self.widths if distortion is None else water_fill(distortion, self.bits).to(torch.int16)
        levels = chosen_levels(every_level, widths)
        return replace(self, mean=mean, forward=forward, widths=widths, levels=levels, distortion=distortion)

    @classmethod
    def agreed(cls, setting: Setting) -> Setting:
        """See Quantizer. Sites of the same bits, and of caches of as many tokens, share them."""
        sharing: dict[tuple[float, int], dict[Site, TransformQuantizer]] = {}
        for site, each in setting.items():
            if isinstance(each, TransformQuantizer) and each.distortion is not None:
                sharing.setdefault((each.bits, site.tokens), {})[site] = each
        changed = dict(setting)
        for (bits, _), mine in sharing.items():
            tables = [each.distortion for each in mine.values() if each.distortion is not None]
            shares = water_fill(torch.cat(tables), bits).to(torch.int16).split([len(table) for table in tables])
            for (site, each), widths in zip(mine.items(), shares, strict=True):
                changed[site] = replace(each, widths=widths.clone(), **UNFITTED)  # a file holds no views
        return changed if sharing else setting

    def coded_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See PredictedQuantizer."""
        tokens = (x - self.mean).flatten(0, 1)
        columns = product(self.forward.T, tokens.T, dtype)  # [C,N], as the search wants them
        decoded = product(nearest_of_own(columns, self.table, self.borders).T, self.inverse, dtype)
        return (decoded + self.mean).view_as(x)

    @property
    def derived_bytes(self) -> int:
        """Bytes of the inverse, in the precision of the transform: the file does not hold it, an engine does."""
        return 0 if self.forward is None else self.forward.nbytes

    @property
    def entry_bits(self) -> float:
        """See PredictedQuantizer. The transform and the levels are constants of the model, and not counted."""
        return self.bits if self.widths is None else self.widths.double().mean().item()

    def __str__(self) -> str:
        """Return a line of plain words, the bits left out."""
        return ", ".join([f"KLT of all heads {METRICS[self.metric]}, shared bits, k-means levels", *self.extras])


UNFITTED: dict[str, Any] = dict.fromkeys(("mean", "forward", "levels", "distortion"))


def gram(x: Tensor) -> Tensor:
    """Return [C,C] fp64: the mean of x xᵀ over the tokens of x [N,T,C], window by window."""
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64, device=x.device)
    for rows in x:
        total += rows.double().T @ rows.double()
    return total / (x.shape[0] * x.shape[1])


@functools.lru_cache(maxsize=1)  # all rates of a site ask for the same, one after another
def fisher_root(grad: Tensor) -> tuple[Tensor, float]:
    """Return (root [C,C] fp64, unit): root @ root * unit is the Fisher information of gradients [N,T,C], with a ridge.

    To second order an error e costs the loss e @ G @ e, G being that; so it costs unit times the square of root @ e.
    """
    fisher = gram(grad)
    unit = fisher.diagonal().mean()
    flat = torch.eye(len(fisher), dtype=torch.float64, device=grad.device)
    if not unit > 0:  # nothing here reaches the loss
        return flat, 0.0
    scale, basis = torch.linalg.eigh((1 - RIDGE) * fisher / unit + RIDGE * flat)
    return (basis * scale.clamp(min=RIDGE / 2).sqrt()) @ basis.T, unit.item()


def klt(x: Tensor, root: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (mean [C], forward fp16 [C,C]): the columns of (x - mean) @ forward are uncorrelated, the largest first.

    Their plain squared error is that in the metric of root [C,C]: with U the eigenvectors of root @ cov(x) @ root,
    forward is root @ U.
    """
    mean = x.mean((0, 1), dtype=torch.float64)
    covariance = gram(x) - mean[:, None] * mean
    root = torch.eye(len(mean), dtype=torch.float64, device=x.device) if root is None else root
    vectors = torch.linalg.eigh(root @ covariance @ root).eigenvectors.flip(1)
    return mean.float(), (root @ vectors).half()


def padded(levels: Tensor, widths: Tensor) -> Tensor:
    """Return [C,256] of levels [sum of 2**widths], a row for each component, with inf behind them."""
    counts = 2 ** widths.long()
    if counts.sum() != len(levels):
        raise UserError(f"it has {len(levels)} levels for components that have {counts.sum()}")
    table = torch.full((len(widths), 2**MOST), torch.inf, device=levels.device)
    table[torch.arange(2**MOST, device=levels.device) < counts[:, None]] = levels
    if not (table[:, 1:] >= table[:, :-1]).all():
        raise UserError("its levels are not sorted")
    return table


def nearest_of_own(columns: Tensor, table: Tensor, borders: Tensor) -> Tensor:
    """Return columns [C,N] with each entry at the nearest level of its row of table [C,L]; borders are [C,L-1]."""
    return table.gather(1, torch.searchsorted(borders, columns, out_int32=True).long())
