"""Formats that store an integer q for every entry and, for every group, a scale s and a minimum or a zero point z.

    min-max    x̂ = q·s + min     quanto, TurboMind, KIVI, ggml's q4_1 and q5_1, the values of TurboQuant
    integer z  x̂ = (q - z)·s     QuaRot, vLLM's int4_per_token_head

They differ in which entries are a group, in the dtype of s, and in a dozen details of rounding: see RULES.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quant_utils import UserError, is_number, stored
from simquant.formats.heads import HeadQuantizer, half_away

MODEL = "model"  # the dtype that the model computes in
STORED_BITS = {"float32": 32, "float16": 16, MODEL: 16}  # {dtype of s and min: bits of one}
Keep = Callable[[Tensor], Tensor]  # rounds fp32 to the dtype in which s and min are stored, and gives fp32 back


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return fp32 x [...] rounded to dtype, as fp32; what is too large for it becomes the largest that it has."""
    most = torch.finfo(dtype).max
    return stored(x.clamp(-most, most).to(dtype)).float()  # stored: a compiler would leave out the detour


def keeper(name: str, dtype: torch.dtype) -> Keep:
    """Return what rounds to a dtype of STORED_BITS, where the model computes in dtype."""
    target = dtype if name == MODEL else getattr(torch, name)
    return lambda x: x if target == torch.float32 else rounded(x, target)


WIDER = ("refused", "head", "tokens")  # what becomes of a group along a token that is larger than a head


@dataclass(frozen=True, eq=False)
class GroupQuantizer(HeadQuantizer):
    """A format whose groups of entries share a scale and an offset. A subclass says how, by `decoded`.

    axis   token: a group is of neighbouring channels of a token's head; channel: of consecutive tokens of a channel
    group  entries that share them; 0 for the head of a token
    wider  a group that is larger than a head is refused, is the head instead, or takes in the next tokens of the head
    scale  the dtype in which they are stored, one of STORED_BITS

    A group that the last tokens do not fill is filled with the last of them again.
    """

    axis: str = "token"
    group: int = 0
    wider: str = "refused"
    scale: str = "float16"

    def __post_init__(self):
        super().__post_init__()
        if self.axis not in ("token", "channel") or self.wider not in WIDER or self.scale not in STORED_BITS:
            kind = ", ".join(str(each)[:20] for each in (self.axis, self.wider, self.scale))
            raise UserError(f"there are no groups of the kind {kind!r}")
        is_count = type(self.group) is int and (self.axis == "channel") <= self.group <= 2**16
        if not is_count:
            raise UserError(f"there are no groups of {str(self.group)[:20]} entries along a {self.axis}")
        if self.axis == "token" and (self.wider != "tokens" or self.size % self.head):
            self.check_group(self.size)

    @property
    def size(self) -> int:
        """Entries of a group."""
        is_cut = self.axis == "token" and self.wider == "head"
        return min(self.group, self.head) if is_cut and self.group else self.group or self.head

    @property
    def tokens(self) -> int:
        """Consecutive tokens that a group reaches over."""
        return self.size if self.axis == "channel" else max(1, self.size // self.head)

    @property
    def sees_later_tokens(self) -> bool:
        """See Quantizer. A group of several tokens does, unless the window hides it from queries until it is full."""
        ahead = self.tokens - 1  # of its first token
        is_hidden = {"last": self.recent >= ahead, "before": self.recent + 1 >= ahead}
        is_hidden["block"] = self.recent % self.tokens == 0 or ahead == 1  # a query sees its own token exact
        return ahead > 0 and not (self.recent > 0 and is_hidden[self.window])

    def grouped(self, x: Tensor) -> Tensor:
        """Return x [B,H,T,D] with a group in its last dimension: [B,H,N,size], or [B,H,N,D,size] along channels."""
        missing = -x.shape[2] % self.tokens
        x = torch.cat([x, x[:, :, -1:].expand(-1, -1, missing, -1)], 2) if missing else x
        if self.axis == "channel":
            return x.unflatten(2, (-1, self.tokens)).transpose(-1, -2)
        return x.flatten(2).unflatten(-1, (-1, self.size))

    def coded_in(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See HeadQuantizer."""
        y = self.decoded(self.grouped(x), keeper(self.scale, dtype))
        heads = (
            y.transpose(-1, -2).flatten(2, 3) if self.axis == "channel" else y.flatten(2).unflatten(-1, (-1, self.head))
        )
        return heads[:, :, : x.shape[2]]

    def decoded(self, x: Tensor, keep: Keep) -> Tensor:
        """Return groups x [B,...,size] fp32 as they are decoded."""
        raise NotImplementedError

    @property
    def entry_bits(self) -> float:
        """See HeadQuantizer: a scale and an offset a group."""
        return self.bits + 2 * STORED_BITS[self.scale] / self.size

    @property
    def group_words(self) -> str:
        """Which entries share a scale, in words."""
        if self.axis == "channel":
            return f"{self.size} tokens of a channel"
        if self.size > self.head:
            return f"{self.size // self.head} tokens of a head"
        return f"{self.size} channels of a token" if self.group else "token and head"


def quotient(x: Tensor, s: Tensor) -> Tensor:
    """Return x / s, and 0 where s is 0: there all of a group are the same."""
    return (x / s).where(s > 0, 0)


# Rules take groups x [...,size] fp32, the lower end of their range and the step between levels [...,1], the greatest q,
# and what rounds to the dtype of s. They return x as it is decoded.


def even(x: Tensor, lo: Tensor, step: Tensor, top: int, keep: Keep) -> Tensor:
    """q = (x - min) / s to the nearest, half to even, by s and min as they are stored."""
    s, least = keep(step), keep(lo)
    return quotient(x - least, s).round().clamp(0, top) * s + least


def ggml(x: Tensor, lo: Tensor, step: Tensor, top: int, keep: Keep) -> Tensor:
    """q = (x - min) · (1 / s), half up, by s and min before they are rounded; decoded by those after."""
    inverse = quotient(torch.ones_like(step), step).clamp(max=torch.finfo(step.dtype).max)  # of a subnormal: infinite
    q = ((x - lo) * inverse + 0.5).trunc().clamp(0, top)
    return q * keep(step) + keep(lo)


def half_up(x: Tensor, lo: Tensor, step: Tensor, top: int, keep: Keep) -> Tensor:
    """q = (x - min) / s, half up, by s and min before they are rounded; decoded by those after."""
    q = (quotient(x - lo, step) + 0.5).floor().clamp(0, top)
    return q * keep(step) + keep(lo)


def integer_zero(x: Tensor, lo: Tensor, step: Tensor, top: int, keep: Keep) -> Tensor:
    """q = round(x / s) + z, half to even, by s as it is stored; z = round(-min / s), as large as it comes."""
    s = keep(step)
    zero = quotient(-lo, s).round()
    q = (quotient(x, s).round() + zero).clamp(0, top)
    return ((q - zero) * s).where(s > 0, lo)


def packed_zero(x: Tensor, lo: Tensor, step: Tensor, top: int, keep: Keep) -> Tensor:
    """q = round(x / s + z), half away from zero; z is in 0..top, and takes the place of the low mantissa bits of s."""
    zero = half_away(quotient(-lo, step)).clamp(0, top)
    s = (step.view(torch.int32) & ~top | zero.int()).view(torch.float32)
    q = half_away(quotient(x, s) + zero).clamp(0, top)
    return (q - zero) * s


RULES: dict[str, Callable[[Tensor, Tensor, Tensor, int, Keep], Tensor]] = {
    "even": even,
    "ggml": ggml,
    "half up": half_up,
    "integer zero": integer_zero,
    "packed zero": packed_zero,
}


@dataclass(frozen=True, eq=False)
class AffineQuantizer(GroupQuantizer):
    """Levels at equal distances between the least and the greatest entry of a group.

    rule             one of RULES
    extends_to_zero  whether the range reaches to zero even if all entries are on one side of it
    clip             both ends of the range are multiplied by it
    least            s is no less
    """

    rule: str = "even"
    extends_to_zero: bool = False
    clip: float = 1.0
    least: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        is_sound = type(self.extends_to_zero) is bool and is_number(self.clip, 0.01, 1) and is_number(self.least, 0, 1)
        if self.rule not in RULES or not is_sound:
            raise UserError(f"there is no rule {str(self.rule)[:40]!r} with a range of this kind")
        if self.rule == "packed zero" and (self.scale != "float32" or self.bits > 8):
            raise UserError(f"a scale in {self.scale} has no place for a zero point of {self.bits} bits")

    def decoded(self, x: Tensor, keep: Keep) -> Tensor:
        """See GroupQuantizer."""
        lo, hi = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        if self.extends_to_zero:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        lo, hi, top = lo * self.clip, hi * self.clip, 2**self.bits - 1
        return RULES[self.rule](x, lo, ((hi - lo) / top).clamp(min=self.least), top, keep)

    @property
    def entry_bits(self) -> float:
        """See HeadQuantizer. A zero point in 0..2**bits - 1 takes as many bits, and none of its own inside s."""
        own = {"packed zero": 0, "integer zero": self.bits if self.extends_to_zero else STORED_BITS[self.scale]}
        scale = STORED_BITS[self.scale]
        return self.bits + (scale + own.get(self.rule, scale)) / self.size

    def __str__(self) -> str:
        """Return a line of plain words, the bits left out."""
        offset = "integer zero point" if self.rule in ("integer zero", "packed zero") else "minimum"
        clip = "" if self.clip == 1 else f", range times {self.clip:g}"
        dtype = "the model's dtype" if self.scale == MODEL else self.scale
        kind = f"integers with scale and {offset} per {self.group_words}, in {dtype}{clip}"
        return ", ".join([kind, *self.extras])
