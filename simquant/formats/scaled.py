"""Formats that store an element times a scale, without a zero point: fp8, int8, ggml's q8_0 to q4_0, NVFP4, OCP MX.

What an entry decodes to is element * scale. ELEMENTS has the elements, a row each: what x / scale is rounded to. SCALES
has the rules for the scale: most formats round it too, and some divide by it before that, others after. A group is
what shares one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_utils import Quantized, UserError, is_vector, stored
from simquant.formats.heads import HeadQuantizer, finite_or_zero, half_away

# -- What x / scale is rounded to


def power_of_two(x: Tensor) -> Tensor:
    """Return the greatest power of two up to |x| fp32; 0 if x is subnormal, which leaves the exponent's bits 0."""
    return (x.view(torch.int32) & 0x7F800000).view(torch.float32)


def small_float(x: Tensor, mantissa: int, least: int, most: float) -> Tensor:
    """Return x rounded to the nearest float of so many bits of mantissa, half to even, and saturated at most.

    Below 2**least the floats are subnormal: as far apart as those above it. This equals a cast, on every device.
    """
    x = x.clamp(-most, most)
    step = power_of_two(x).clamp(min=2.0**least) * 2.0**-mantissa
    return ((x / step).round() * step).clamp(-most, most)


def integer(x: Tensor) -> Tensor:
    """Return x rounded to int8, half away from zero."""
    return half_away(x).clamp(-128, 127)


def offset_integer(x: Tensor, half: int) -> Tensor:
    """Return x rounded to -half..half - 1 as ggml does: half is added, and the fraction cut off.

    The sum is that of fp32: a compiler cannot round it together with the product before it, as it is taken in fp64.
    """
    return (x.double() + (half + 0.5)).float().trunc().clamp(0, 2 * half - 1) - half


e4m3 = partial(small_float, mantissa=3, least=-6, most=448.0)
e5m2 = partial(small_float, mantissa=2, least=-14, most=57344.0)
e2m1 = partial(small_float, mantissa=1, least=0, most=6.0)


class Element(NamedTuple):
    """What x / scale is rounded to.

    bits   of its code
    most   its greatest magnitude, which the scale maps the greatest of a group to
    round  rounds fp32 numbers to it
    words  what it is called
    """

    bits: int
    most: float
    round: Callable[[Tensor], Tensor]
    words: str


ELEMENTS = {
    "e4m3": Element(8, 448, e4m3, "e4m3 floats"),
    "e5m2": Element(8, 57344, e5m2, "e5m2 floats"),
    "e2m1": Element(4, 6, e2m1, "e2m1 floats"),
    "int8": Element(8, 127, integer, "integers"),
    "int5": Element(5, 16, partial(offset_integer, half=16), "integers"),
    "int4": Element(4, 8, partial(offset_integer, half=8), "integers"),
}

# -- The scale. A rule takes groups x [B,...,N] fp32, and most, the greatest magnitude of an element. It returns
# x / scale, and the scale [...,1] that decodes it.


def largest(x: Tensor) -> Tensor:
    """Return [...,1] the greatest magnitude of every group of x [...,N]."""
    return x.abs().amax(-1, keepdim=True)


def divided(x: Tensor, scale: Tensor) -> Tensor:
    """Return x / scale; x itself where the scale is 0, and decodes it to 0."""
    return x / scale.where(scale > 0, 1)


def as_fp16(scale: Tensor) -> Tensor:
    """Return scale rounded to fp16. It is stored in between, because a compiler passes over such a detour."""
    return stored(scale.half()).float()


def fixed(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """A scale of 1."""
    return x, x.new_ones(())


def fp32(x: Tensor, most: float, least: float = 0.0) -> tuple[Tensor, Tensor]:
    """The greatest magnitude goes to most; the scale is at least `least`."""
    scale = (largest(x) / most).clamp(min=least)
    return divided(x, scale), scale


def fp16(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """The same as ggml stores it: x is multiplied by the inverse of the fp32 scale, and decoded by the fp16 one."""
    scale = largest(x) / most
    return x * finite_or_zero(1 / scale), as_fp16(scale)


def signed_fp16(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """The same with a sign: the first entry of the greatest magnitude goes to -most, which has one code more."""
    scale = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -most
    return x * finite_or_zero(1 / scale), as_fp16(scale)


def one_level(x: Tensor, most: float, unit: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """An e4m3 scale in units of an fp32 number. x is multiplied by the inverse of the rounded scale."""
    scale = e4m3(largest(x) / most / unit)
    return x * finite_or_zero(1 / unit / scale), unit * scale


def two_levels(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """An e4m3 scale in units that map the greatest magnitude of a sequence to 448 * most."""
    unit = x.flatten(1).abs().amax(1)[(..., *[None] * (x.ndim - 1))] / (448 * most)  # [B,1,...,1]
    return one_level(x, most, unit.where(unit > 0, 1))


def floor_e8m0(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """A power of two: the greatest magnitude gets the exponent of most, and may be clipped (OCP MX, section 6.3)."""
    return power_scaled(x, power_of_two(largest(x)) * 2.0 ** -math.floor(math.log2(most)))


def ceil_e8m0(x: Tensor, most: float) -> tuple[Tensor, Tensor]:
    """The least power of two that clips nothing."""
    scale = largest(x) / most
    below = power_of_two(scale).clamp(min=2.0**-127)
    return power_scaled(x, torch.where(scale > below, 2 * below, below))


def power_scaled(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return x / scale, at least the least normal fp32 number, and scale, at least the least that e8m0 holds."""
    return x / scale.clamp(min=2.0**-126), scale.clamp(min=2.0**-127)


class Rule(NamedTuple):
    """How a group gets its scale: bits of one, the function, its name, whether all tokens count whatever the group."""

    bits: int
    scaled: Callable[[Tensor, float], tuple[Tensor, Tensor]]
    words: str
    sees_all: bool = False


SCALES = {
    "fixed": Rule(0, fixed, "not scaled"),
    "calibrated": Rule(0, fixed, "scale calibrated per head"),  # until it is fitted
    "fp32": Rule(32, fp32, "fp32 scale"),
    "fp32 from 1e-6": Rule(32, partial(fp32, least=1e-6), "fp32 scale"),
    "fp16": Rule(16, fp16, "fp16 scale"),
    "signed fp16": Rule(16, signed_fp16, "signed fp16 scale"),
    "e4m3": Rule(8, one_level, "e4m3 scale"),
    "nvfp4": Rule(8, two_levels, "e4m3 scale under an fp32 scale of the sequence", sees_all=True),
    "floor e8m0": Rule(8, floor_e8m0, "power of two as scale"),
    "ceil e8m0": Rule(8, ceil_e8m0, "power of two as scale that clips nothing"),
}

# -- The quantizer

ROUNDING = 1e-6  # by so much x / scale may exceed most for the scale's own rounding, which clips nothing


@dataclass(frozen=True, eq=False)
class ScaledQuantizer(HeadQuantizer):
    """A format that decodes an entry to element * scale.

    element  one of ELEMENTS
    group    channels that share a scale; 0 for the head of a token, None for all tokens of all heads
    scale    one of SCALES
    amax     [H] the greatest magnitude of every head's calibration activations, if the scale is calibrated and fitted
    counts_clipped  whether quantize tells which entries lie beyond what their scale can express
    """

    element: str = "e4m3"
    group: int | None = None
    scale: str = "fixed"
    amax: Tensor | None = None
    counts_clipped: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.element not in ELEMENTS or self.scale not in SCALES:
            raise UserError(f"there is no element {str(self.element)[:40]!r} with a scale {str(self.scale)[:40]!r}")
        if self.bits != ELEMENTS[self.element].bits:
            raise UserError(f"the element {self.element} takes {ELEMENTS[self.element].bits} bits, not {self.bits}")
        if self.group is not None and (type(self.group) is not int or self.group < 0):
            raise UserError(f"there are no blocks of {str(self.group)[:40]} channels")
        self.check_group(self.group or self.head)
        is_fitted = self.scale == "calibrated" and is_vector(self.amax) and bool((self.amax >= 0).all())
        if not is_fitted and self.amax is not None:
            raise UserError(f"a {self.scale} scale has no calibrated maximum of {str(self.amax)[:60]}")

    @property
    def sees_later_tokens(self) -> bool:
        """See Quantizer. A scale does that all tokens share, and that is not calibrated."""
        return SCALES[self.scale].sees_all or (self.group is None and SCALES[self.scale].bits > 0)

    def fit(self, x: Tensor, grad: Tensor | None, others: Sequence[Tensor] = ()) -> ScaledQuantizer:
        """See Quantizer. A calibrated scale is that of the greatest magnitude of every head."""
        if self.scale != "calibrated":
            return self
        return replace(self, amax=self.heads(x).abs().amax((0, 2, 3)))

    def scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x / scale, scale) for x [B,H,T,D]: groups [B,...,N], and what broadcasts to them."""
        if self.amax is not None:
            if len(self.amax) != x.shape[1]:
                raise UserError(f"{len(self.amax)} heads were calibrated, and here are {x.shape[1]}")
            scale = (self.amax / ELEMENTS[self.element].most)[:, None, None]
            return divided(x, scale), scale
        groups = x.flatten(1) if self.group is None else x.unflatten(-1, (-1, self.group or self.head))
        return SCALES[self.scale].scaled(groups, ELEMENTS[self.element].most)

    def coded(self, x: Tensor) -> Tensor:
        """See HeadQuantizer."""
        unit, scale = self.scaled(x)
        return (ELEMENTS[self.element].round(unit) * scale).reshape(x.shape)

    def quantize(self, x: Tensor, others: Sequence[Tensor] = ()) -> Quantized:
        """See HeadQuantizer."""
        given = super().quantize(x, others)
        if not self.counts_clipped or "float" not in ELEMENTS[self.element].words or x.shape[1] <= self.sinks:
            return given
        clipped = self.clipped(self.heads(x)).transpose(1, 2).flatten(2)
        return given._replace(clipped=F.pad(clipped, (0, 0, self.sinks, 0)))

    def clipped(self, x: Tensor) -> Tensor:
        """Return bool [B,H,T,D]: the entries of heads x that lie beyond the greatest element times their scale."""
        unit, _ = self.scaled(x)
        return (unit.abs() > ELEMENTS[self.element].most * (1 + ROUNDING)).reshape(x.shape)

    @property
    def entry_bits(self) -> float:
        """See HeadQuantizer. What all tokens share is a constant, and not counted."""
        return self.bits + (0 if self.group is None else SCALES[self.scale].bits / (self.group or self.head))

    def __str__(self) -> str:
        """Return a line of plain words, the bits left out."""
        blocks = f" in blocks of {self.group} channels" if self.group else " per token and head"
        words = f"{ELEMENTS[self.element].words}{'' if self.group is None else blocks}"
        return ", ".join([words, SCALES[self.scale].words, *self.extras])
