"""HIGGS (arXiv:2411.17525), and AQUA-KV (arXiv:2501.19392), which codes with it what the layer below leaves unsaid."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from quant_utils import UserError
from simquant.formats.affine import rounded
from simquant.formats.heads import MOST_SPAN, TRANSFORMS, finite_or_zero, transformed
from simquant.formats.normal_grid import normal_grid
from simquant.formats.prediction import PredictedQuantizer

SCORES = 2**24  # that are held at a time: 64 MiB


@functools.cache
def rotation() -> Tensor:
    """Return [1024,1024] of ones and minus ones: its first n rows and columns are those of a smaller transform."""
    return TRANSFORMS["signed hadamard"](MOST_SPAN)


@dataclass(frozen=True, eq=False)
class HiggsQuantizer(PredictedQuantizer):
    """A token's channels, rotated together, then pairs of them at the nearest of 4**bits points for N(0, I).

    As many channels are rotated, and share a norm in fp16, as the largest power of two that divides their number, at
    most 1024. AQUA-KV's code (goodevening13/aquakv) has 1024 too, but pads to that, and draws no signs; it keeps the
    first layer, which nothing predicts, at 256 points a pair, and quantizes its buffer of 128 tokens when that is full.

    bits        1 to 4; what sites of the same row are called by
    first_bits  bits of what is to be predicted, but has no sources: the first layer; None for the same as the others
    """

    first_bits: int | None = None
    grid: Tensor = field(init=False, repr=False)  # fp32 [4**width,2]
    rotation: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        super().__post_init__()
        for bits in (self.bits, self.bits if self.first_bits is None else self.first_bits):
            if type(bits) is not int or not 1 <= bits <= 4:
                raise UserError(f"HIGGS has no grid of {str(bits)[:40]} bits: 1 to 4")
        object.__setattr__(self, "grid", normal_grid(4**self.width).float())
        object.__setattr__(self, "rotation", rotation())

    @property
    def width(self) -> int:
        """Bits that an entry's code takes here."""
        is_first = self.predict is not None and not self.sources and self.first_bits is not None
        return self.first_bits if is_first else self.bits  # type: ignore[return-value]

    def fit_code(self, x: Tensor, grad: Tensor | None) -> Self:
        """See PredictedQuantizer. The grid is the same for all data."""
        return self

    def coded(self, x: Tensor) -> Tensor:
        """See PredictedQuantizer. UserError for an odd number of channels."""
        size = span_of(x.shape[-1])
        matrix = self.rotation[:size, :size] / size**0.5
        groups = transformed(x, matrix).unflatten(-1, (-1, size))
        scale = rounded(groups.square().mean(-1, keepdim=True).sqrt(), torch.float16)
        pairs = (groups * finite_or_zero(1 / scale)).unflatten(-1, (-1, 2))
        decoded = nearest_points(pairs, self.grid).flatten(-2) * scale
        return transformed(decoded.flatten(-2), matrix.T)

    @property
    def entry_bits(self) -> float:
        """See PredictedQuantizer. Norms are not in it: how many there are depends on the channels."""
        return self.width

    def cost(self, tokens: int, channels: int) -> float:
        """See Quantizer. Every group of channels has its norm."""
        norms = self.quantized_tokens(tokens) * channels / span_of(channels)
        return super().cost(tokens, channels) + 16 * norms

    def __str__(self) -> str:
        """Return a line of plain words, the bits left out."""
        first = [f"first layer in {self.first_bits} bits"] if self.predict and self.first_bits else []
        words = [f"HIGGS: all heads rotated, pairs of channels at {4**self.bits} points, norms in float16"]  # type: ignore[operator]
        return ", ".join([*words, *first, *self.extras])


def span_of(channels: int) -> int:
    """Return how many channels are rotated together, and share a norm. UserError if they make no pairs."""
    size = math.gcd(channels, MOST_SPAN)
    if size == 1:
        raise UserError(f"HIGGS codes pairs of channels, and there are {channels}")
    return size


def nearest_points(pairs: Tensor, points: Tensor) -> Tensor:
    """Return pairs [...,2], each replaced by the nearest of points [P,2].

    That is the one of greatest score x·p - |p|²/2. A compiler fuses the scores into the search; without one, SCORES of
    them are held at a time.
    """
    first, second = points.T
    bias = (first.square() + second.square()) / 2
    found = [
        (part[:, :1] * first + part[:, 1:] * second - bias).argmax(1)
        for part in pairs.reshape(-1, 2).split(max(1, SCORES // len(points)))
    ]
    return points[torch.cat(found)].view(pairs.shape)
