"""What all formats of deployed caches share: keys are quantized after RoPE, and every head by itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_utils import Quantized, Quantizer, Tap, UserError


@dataclass(frozen=True, eq=False)
class HeadQuantizer(Quantizer):
    """A format that stores the heads of a token one by one, in fp32 arithmetic. A subclass says how, by `coded`.

    head    D, channels of a head
    bits    that an entry's code takes
    sinks   leading tokens that stay exact; no group of tokens begins among them
    recent  tokens of the residual window (see Quantizer)
    window  its rule, one of WINDOWS
    """

    head: int
    bits: int = 4
    sinks: int = 0
    recent: int = 0
    window: str = "last"
    after_rope = True

    def coded(self, x: Tensor) -> Tensor:
        """Return x [B,H,T,D] fp32 as it is decoded."""
        raise NotImplementedError

    @property
    def entry_bits(self) -> float:
        """Bits that an entry of a quantized token takes, scales and the like included."""
        raise NotImplementedError

    def quantize(self, x: Tensor, taps: Mapping[tuple[int, str], Tap] = {}) -> Quantized:
        """See Quantizer. The result is rounded to x's own dtype."""
        if x.shape[-1] % self.head:
            raise UserError(f"heads of {self.head} channels do not divide {x.shape[-1]}")
        heads = x[:, self.sinks :].float().unflatten(-1, (-1, self.head)).transpose(1, 2)  # [B,H,T,D]
        if heads.numel() == 0:
            return Quantized(x)
        values = self.coded(heads).transpose(1, 2).flatten(2).to(x.dtype)
        return Quantized(torch.cat([x[:, : self.sinks], values], 1))

    def cost(self, tokens: int, channels: int) -> float:
        """See Quantizer. A token that stays exact takes 16 bits an entry."""
        quantized = self.quantized_tokens(tokens)
        return channels * (16 * (tokens - quantized) + self.entry_bits * quantized)
