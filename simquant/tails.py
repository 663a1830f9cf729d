"""Quantiles of a figure of tokens, from counts in bins: a window's counts take the same memory however long it is.

Counts of several windows add up, so that any choice of windows has its quantiles, and a bootstrap over windows is a
product of matrices (Efron, Annals of Statistics 1979; sketches of bounded relative error: DDSketch, arXiv:1908.10693).
"""

from __future__ import annotations

import base64
import binascii
import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST, OCTAVES, PARTS = -26, 32, 64  # bins from 2**-26 to 2**6, each octave in 64 equal parts: 0.8 to 1.6 % wide
BINS = OCTAVES * PARTS + 1  # the first one holds what is less than all these, which counts as zero
FIRST, SHIFT = (127 + LEAST) * PARTS, 23 - 6  # the bits of an fp32 number in order: 8 of the exponent, 6 that are kept
WIDTHS = (1, 2, 4)  # bytes of a count
DRAWS, CONFIDENCE, AT_ONCE = 1000, 0.95, 2**23  # of a bootstrap; window weights that exist at a time


def bin_counts(x: Tensor) -> Tensor:
    """Return [...,BINS] how many of x [...,T], fp32 and not negative, lie in each bin; what is more, in the last."""
    index = ((x.contiguous().view(torch.int32) >> SHIFT) - FIRST + 1).clamp(0, BINS - 1).long()
    return torch.zeros(*x.shape[:-1], BINS, dtype=torch.long).scatter_add_(-1, index, torch.ones_like(index))


def bin_edges() -> Tensor:
    """Return [BINS+1] fp64 where bins begin and end."""
    ends = torch.arange(FIRST, FIRST + BINS, dtype=torch.int32) << SHIFT
    return F.pad(ends.view(torch.float32).double(), (1, 0))


def values_at(counts: Tensor, ranks: Tensor) -> Tensor:
    """Return [...,R] fp64 what counts [...,BINS], spread evenly inside each bin, have at whole ranks [...,R]."""
    totals, edges = counts.cumsum(-1), bin_edges()
    index = torch.searchsorted(totals, ranks, right=True).clamp(max=BINS - 1)
    held = counts.gather(-1, index)
    share = (ranks - (totals.gather(-1, index) - held) + 0.5) / held.clamp(min=1)
    return torch.lerp(edges[index], edges[index + 1], share).where(index > 0, 0)


def quantiles(counts: Tensor, shares: Sequence[float]) -> Tensor:
    """Return [...,len(shares)] fp64 the quantiles of what counts [...,BINS] hold, as torch.quantile interpolates.

    They differ from those of the tokens themselves by less than the width of a bin, 1.6 %.
    """
    counts = counts.double()
    rank = torch.tensor(shares, dtype=torch.float64) * (counts.sum(-1, keepdim=True) - 1)
    low, high = values_at(counts, torch.cat([rank.floor(), rank.ceil()], -1)).chunk(2, -1)
    return torch.lerp(low, high, rank.frac())


def window_weights(windows: int, draws: int = DRAWS) -> Tensor:
    """Return [draws,windows] fp64: how often each of so many windows is drawn, with replacement, by a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(windows, (draws, windows), generator=generator)
    return torch.zeros(draws, windows, dtype=torch.float64).scatter_add_(
        1, drawn, torch.ones(1).double().expand_as(drawn)
    )


def intervals(counts: Tensor, most: Tensor, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (low, high), each [len(shares)+1]: 95 % percentile bootstrap intervals over windows.

    They are those of the quantiles of counts [n,BINS], and behind them that of the greatest of most [n], which no
    draw exceeds.
    """
    held = counts.sum(0).nonzero()[:, 0]  # bins that are not empty
    drawn = []
    for weights in window_weights(len(counts)).split(max(1, AT_ONCE // max(len(counts), BINS))):
        total = torch.zeros(len(weights), BINS, dtype=torch.float64)
        total[:, held] = weights @ counts[:, held].double()
        greatest = most.double().expand_as(weights).where(weights > 0, -torch.inf).amax(1)
        drawn.append(torch.cat([quantiles(total, shares), greatest[:, None]], 1))
    ends = torch.tensor([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], dtype=torch.float64)
    low, high = torch.cat(drawn).quantile(ends, dim=0)
    return low, high


def packed(counts: Tensor) -> str:
    """Return a window's counts [BINS] as text: whole numbers as wide as they need be, compressed, in base64."""
    most = counts.max().item()
    width = next(each for each in WIDTHS if most < 256**each)
    return base64.b64encode(zlib.compress(counts.numpy().astype(f"<u{width}").tobytes())).decode()


def unpacked(text: str) -> Tensor:
    """Return the counts [BINS] that packed made text of. ValueError for anything else, however large it would be."""
    import numpy as np

    try:
        reader = zlib.decompressobj()
        content = reader.decompress(base64.b64decode(text, validate=True), WIDTHS[-1] * BINS + 1)
    except (TypeError, ValueError, binascii.Error, zlib.error) as error:
        raise ValueError(f"{str(text)[:20]!r} holds no counts") from error
    width = len(content) // BINS
    if width * BINS != len(content) or width not in WIDTHS or not reader.eof:
        raise ValueError(f"{text[:20]!r} holds no {BINS} counts")
    return torch.from_numpy(np.frombuffer(content, f"<u{width}").astype("int64"))
