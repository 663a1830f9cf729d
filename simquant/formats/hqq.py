"""Half-quadratic quantization (HQQ, of Mobius Labs, as transformers' cache calls it): the zero point is optimized."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simquant.formats.affine import GroupQuantizer, Keep

LP_NORM, BETA, STEPS = 0.7, 10.0, 20  # the package's defaults; its default optimizer lets beta stay as it is
NARROW, STEEPEST = 1e-4, 2e4  # a narrower range has scale 1; the scale is at most so large


def shrunk(error: Tensor) -> Tensor:
    """Return error [...] moved towards zero by |error|**(LP_NORM - 1) / BETA, and at most to zero.

    That solves min |e|**LP_NORM + BETA / 2 · (e - error)**2 approximately: large errors stay, small ones vanish.
    """
    size = error.abs()
    return error.sign() * (size - size.pow(LP_NORM - 1) * (1 / BETA)).clamp(min=0)


@dataclass(frozen=True, eq=False)
class HqqQuantizer(GroupQuantizer):
    """x̂ = (q - z) / r, where q = round(x · r + z), half to even.

    r spreads the range of a group over all q. z, no integer, starts at the minimum and is then moved for up to STEPS
    steps, as long as the mean error of a whole sequence falls. (The package takes the mean over a batch.)

    optimized  whether z is moved
    """

    scale: str = "model"
    optimized: bool = True

    @property
    def sees_later_tokens(self) -> bool:
        """See Quantizer. How far z is moved depends on the error of all tokens."""
        return self.optimized or super().sees_later_tokens

    def decoded(self, x: Tensor, keep: Keep) -> Tensor:
        """See GroupQuantizer."""
        lo, hi, top = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True), 2**self.bits - 1
        rate = (top / (hi - lo)).where(hi - lo > NARROW, 1).clamp(max=STEEPEST)
        zero = self.best_zero(x, rate, -lo * rate) if self.optimized else -lo * rate
        q = (x * rate + zero).round().clamp(0, top)
        return (q - keep(zero)) * keep(1 / rate)

    def best_zero(self, x: Tensor, rate: Tensor, zero: Tensor) -> Tensor:
        """Return zero [B,...,1] after the steps for groups x [B,...,size]; a sequence whose error rises is done."""
        inner = tuple(range(1, x.ndim))
        least = torch.full_like(
            zero.amax(inner, keepdim=True), torch.inf, dtype=torch.float64
        )  # [B,1,...] error so far
        is_active = torch.ones_like(least, dtype=torch.bool)
        for _ in range(STEPS):
            q = (x * rate + zero).round().clamp(0, 2**self.bits - 1)
            error = x - (q - zero) / rate
            moved = (q - (x - shrunk(error)) * rate).mean(-1, keepdim=True)
            zero = moved.where(is_active, zero)  # also in the step that finds no gain, as in the package
            size = error.abs().mean(-1, keepdim=True).mean(inner, keepdim=True, dtype=torch.float64)
            is_active = is_active & (size < least)
            least = torch.minimum(least, size)
        return zero

    def __str__(self) -> str:
        """Return a line of plain words, the bits left out."""
        how = "optimized (half-quadratic)" if self.optimized else "taken from the minimum"
        kind = f"integers with scale and a zero point that is {how} per {self.group_words}"
        return ", ".join([kind, *self.extras])
