"""How well fitted quantizers do on their own calibration text: what --calibrate prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_utils import Quantized, Quantizer, Site


class Fit(NamedTuple):
    """How well a fitted quantizer does on its own calibration activations, sinks not counted."""

    lowest: float  # of what it gives back, outliers not counted
    highest: float
    kept: float  # share of entries that stay exact
    error: float  # sum of squared errors / sum of squares

    @classmethod
    def of(cls, quantizer: Quantizer, x: Tensor, given: Quantized) -> Fit:
        """Return that of what a quantizer gave back for x [N,T,C]."""
        before, after = x[:, quantizer.sinks :].float(), given.values[:, quantizer.sinks :].float()
        kept = torch.zeros_like(before, dtype=torch.bool)
        kept = kept if given.outliers is None else given.outliers[:, quantizer.sinks :]
        inliers = after[~kept] if not kept.all() else after.new_zeros(1)
        error, whole = (each.square().sum(dtype=torch.float64) for each in (after - before, before))
        share = kept.double().mean().item()
        return cls(inliers.min().item(), inliers.max().item(), share, (error / whole.clamp(min=1e-30)).item())


def fit_table(fits: Mapping[tuple[Any, Site], Fit], rows: Sequence[Any]) -> str:
    """Return a line for every width and site: what it gives back, the share kept exact, the relative squared error."""
    width = max(len(site.name) for _, site in fits)
    titles = ("abits", "lowest", "highest", "kept", "rel. error")
    lines = ["projection".ljust(width) + "".join(title.rjust(12) for title in titles)]
    for (row, site), fit in sorted(fits.items(), key=lambda each: rows.index(each[0][0])):
        figures = f"{fit.lowest:12.4f}{fit.highest:12.4f}{fit.kept:12.3%}{fit.error:12.6f}"
        lines.append(f"{site.name:<{width}}{row.abits!s:>12}{figures}")
    return "\n".join(lines)
