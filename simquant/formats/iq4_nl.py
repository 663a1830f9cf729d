"""llama.cpp's iq4_nl: levels that are not evenly spaced, and a scale that is fitted to them by least squares."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from quant_utils import UserError, borders
from simquant.formats.heads import HeadQuantizer, finite_or_zero
from simquant.formats.scaled import as_fp16

LEVELS = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
GROUP = 32


@dataclass(frozen=True, eq=False)
class IQ4NLQuantizer(HeadQuantizer):
    """Blocks of 32 channels, levels chosen by a first scale, which a second one, fitted to them, then decodes.

    levels  [16] in units of the scale
    """

    levels: Tensor = field(init=False, repr=False, default=None)  # type: ignore[assignment]

    def __post_init__(self):
        super().__post_init__()
        self.check_group(GROUP)
        if self.bits != 4:
            raise UserError(f"iq4_nl takes 4 bits, not {self.bits}")
        object.__setattr__(self, "levels", torch.tensor(LEVELS))

    def coded(self, x: Tensor) -> Tensor:
        """See HeadQuantizer. The first entry of the greatest magnitude goes to -127 at first; a tie goes up.

        The scale minimizes the squared error weighted by x². Its sums are taken in fp64, so that their order is of no
        account.
        """
        blocks = x.contiguous().unflatten(-1, (-1, GROUP))  # as bucketize likes it
        first = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / LEVELS[0]
        level = self.levels[torch.bucketize(blocks * finite_or_zero(1 / first), borders(self.levels), right=True)]
        weighted = blocks.double().square() * level
        fitted, norm = ((weighted * each).sum(-1, keepdim=True) for each in (blocks, level))
        scale = as_fp16((fitted / norm).where(norm > 0, 0).float())
        return (level * scale).flatten(-2)

    @property
    def entry_bits(self) -> float:
        """See HeadQuantizer: an fp16 scale a block."""
        return self.bits + 16 / GROUP

    def __str__(self) -> str:
        """Return a line of plain words, the bits left out."""
        return ", ".join([f"iq4_nl in blocks of {GROUP} channels", "fitted fp16 scale", *self.extras])
