"""What the formats of deployed caches share: keys are quantized after RoPE, head by head, and maybe rotated before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant_utils import WINDOWS, Quantized, Quantizer, UserError


def hadamard(size: int) -> Tensor:
    """Return the Sylvester Hadamard matrix [size,size] fp32 of ones and minus ones; size is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def signs(size: int) -> Tensor:
    """Return [size] ones and minus ones, drawn once and for all."""
    return torch.randint(2, (size,), generator=torch.Generator().manual_seed(0)) * 2.0 - 1


MOST_SPAN = 1024  # channels that are transformed together
TRANSFORMS: dict[str, Callable[[int], Tensor]] = {  # {name: the matrix [n,n] that multiplies n channels}
    "hadamard": lambda n: hadamard(n) / n**0.5,
    "signed hadamard": lambda n: hadamard(n) * signs(n)[:, None],  # its channels get random signs first; not normalized
}


@dataclass(frozen=True, eq=False)
class HeadQuantizer(Quantizer):
    """A format that stores the heads of a token one by one, in fp32 arithmetic. A subclass says how, by `coded`.

    head       D, channels of a head
    bits       that an entry's code takes
    sinks      leading tokens that stay exact; no group of tokens reaches into them
    recent     tokens of the residual window (see Quantizer)
    window     its rule, one of WINDOWS
    transform  one of TRANSFORMS, which multiplies a head's channels first, and is undone after; None for none
    span       at most so many channels are transformed together: the largest power of two that divides D
    """

    head: int
    bits: int = 4
    sinks: int = 0
    recent: int = 0
    window: str = "last"
    transform: str | None = None
    span: int = MOST_SPAN
    forward: Tensor | None = field(init=False, repr=False, default=None)
    inverse: Tensor | None = field(init=False, repr=False, default=None)
    after_rope = True

    def __post_init__(self):
        is_count = all(type(each) is int and each >= 0 for each in (self.head, self.sinks, self.recent, self.span))
        if not is_count or not 0 < self.head <= 2**16 or type(self.bits) is not int or not 1 <= self.bits <= 16:
            raise UserError(
                f"no heads of {self.head} channels in {self.bits} bits, {self.sinks} sinks, {self.recent} recent"
            )
        if self.span > MOST_SPAN:
            raise UserError(f"a transform of {self.span} channels is larger than any head: at most {MOST_SPAN}")
        if self.window not in WINDOWS or self.transform not in (None, *TRANSFORMS):
            raise UserError(f"there is no window {str(self.window)[:40]!r} and transform {str(self.transform)[:40]!r}")
        if self.transform is not None:
            size = math.gcd(self.head, 2 ** int(math.log2(self.span or 1)))
            matrix = TRANSFORMS[self.transform](size)
            object.__setattr__(self, "forward", matrix)
            object.__setattr__(self, "inverse", torch.linalg.inv(matrix.double()).float())

    def check_group(self, size: int) -> None:
        """Raise UserError unless blocks of so many channels divide a head."""
        if self.head % size:
            raise UserError(f"blocks of {size} channels do not divide heads of {self.head}")

    def coded(self, x: Tensor) -> Tensor:
        """Return x [B,H,T,D] fp32 as it is decoded."""
        raise NotImplementedError

    def coded_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the same where the model computes in dtype. Only formats that store scales in it differ."""
        return self.coded(x)

    @property
    def extras(self) -> list[str]:
        """What __str__ says of every format of heads: the transform, and the tokens that stay exact."""
        return [*([f"after a {self.transform} transform"] if self.transform else []), *self.exact_tokens]

    @property
    def entry_bits(self) -> float:
        """Bits that an entry of a quantized token takes, scales and the like included."""
        raise NotImplementedError

    def heads(self, x: Tensor) -> Tensor:
        """Return [B,H,T,D] fp32: the heads of x [B,T,C] as they are coded, transformed and without the sinks."""
        if x.shape[-1] % self.head:
            raise UserError(f"heads of {self.head} channels do not divide {x.shape[-1]}")
        body = transformed(x[:, self.sinks :].float(), self.forward)  # tokens first: one product of two matrices
        return body.unflatten(-1, (-1, self.head)).transpose(1, 2)

    def quantize(self, x: Tensor, others: Sequence[Tensor] = ()) -> Quantized:
        """See Quantizer. The result is rounded to x's own dtype."""
        heads = self.heads(x)
        if heads.numel() == 0:
            return Quantized(x)
        decoded = self.coded_in(heads, x.dtype).transpose(1, 2).flatten(2)
        values = transformed(decoded, self.inverse).to(x.dtype)
        return Quantized(torch.cat([x[:, : self.sinks], values], 1))

    def cost(self, tokens: int, channels: int) -> float:
        """See Quantizer. A token that stays exact takes 16 bits an entry."""
        quantized = self.quantized_tokens(tokens)
        return channels * (16 * (tokens - quantized) + self.entry_bits * quantized)


def transformed(x: Tensor, matrix: Tensor | None) -> Tensor:
    """Return x [...,C] with every n neighbouring channels multiplied by matrix [n,n]; x itself if there is none."""
    return x if matrix is None else (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def half_away(x: Tensor) -> Tensor:
    """Return x rounded to the nearest integer, a half away from zero."""
    size = x.abs()
    return x.sign() * (size.floor() + (size - size.floor() >= 0.5))


def finite_or_zero(inverse: Tensor) -> Tensor:
    """Return the inverse of a scale, and 0 where it is infinite: so small a scale is decoded as nothing."""
    return inverse.where(inverse.isfinite(), 0)
