"""Simulated KV-cache quantization: the quantizers, the hooks and the perplexity loop.

Read it from top to bottom; it follows one tensor:

    h ── k_proj ── x [B,T,C] ── hook ── quantizer.quantize(x) ── RoPE ── attention ── logits ── loss
                                          keep    which entries stay exact        outliers, attention sinks
                                          range   what the levels stretch over    this window's, or a calibrated one
                                          levels  what lies inside [-1, 1]        uniform, NormalFloat, k-means (NUQ)

B windows of T tokens; C = kv_heads * head_dim channels; L = 2**bits levels; V words. Nothing is packed and no memory is
saved: this measures the error of a quantized cache, not its speed. A format is a subclass of Quantizer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

# -- 1. The types: a quantizer, a site, a setting


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line that quotes the value and says what would be right."""


class Quantized(NamedTuple):
    """What a cache gives back, and how much of it is exact."""

    values: Tensor  # [B,T,C]
    outliers: Tensor | None = None  # bool [B,T,C], the entries that stay exact as outliers; None where there are none
    clipped: Tensor | None = None  # bool [B,T,C], the entries that a cast clipped; None where nobody counts them


# Which tokens j a query t sees exact in a residual window of r tokens, both counted behind the sinks: the latest r with
# its own; its own and r before; those of its own block of r. The last two are the rules of KIVI's values and keys.
WINDOWS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "last": lambda t, j, r: t - j < r,
    "before": lambda t, j, r: t - j <= r,
    "block": lambda t, j, r: t // r == j // r,
}


class Quantizer:
    """What a cache does to the keys or the values of one layer.

    A format is a subclass, a frozen dataclass. Its settings, and what it is fitted to, are its fields: plain values and
    tensors, which the quantizer file holds as they are. A constructor that is given nonsense raises UserError.

    bits        what an entry nominally takes: one of --abits
    sinks       leading tokens of every window that stay exact (attention sinks)
    recent      tokens of the residual window: the latest ones, which a query sees exact
    window      which they are, see WINDOWS
    shares_bits whether sites decide together how many bits each takes, which bits is the average of
    after_rope  whether it is the cache's own keys that are quantized, and not those before RoPE
    sources     (layer, part) of the sites whose caches it predicts from; they come before its own
    """

    bits: float
    sinks: int = 0
    recent: int = 0
    window: str = "last"
    shares_bits: bool = False
    after_rope: bool = False
    sources: tuple[tuple[int, str], ...] = ()

    @property
    def needs_gradient(self) -> bool:
        """Whether fit wants the gradient of the loss."""
        return False

    @property
    def sees_later_tokens(self) -> bool:
        """Whether what a query sees may depend on tokens behind it: then it cannot be decoded token by token."""
        return False

    def fit(self, x: Tensor, grad: Tensor | None, others: Sequence[Tensor] = ()) -> Quantizer:
        """Return a copy that is fitted to calibration activations x [N,T,C], and to the loss's gradient there [N,T,C].

        others [N,T,C'] are what the sources gave back for the same windows. By default there is nothing to fit.
        """
        return self

    @classmethod
    def agreed(cls, setting: Setting) -> Setting:
        """Return setting, once fitted, with what its quantizers of this class decide together, to be fitted again.

        By default each decides alone, and the very same setting comes back.
        """
        return setting

    def quantize(self, x: Tensor, others: Sequence[Tensor] = ()) -> Quantized:
        """Return x [B,T,C] as the cache gives it back; others [B,T,C'] are what the sources gave back."""
        raise NotImplementedError

    def cost(self, tokens: int, channels: int) -> float:
        """Return the bits that a cache of [tokens, channels] entries takes, outliers not counted."""
        raise NotImplementedError

    def quantized_tokens(self, tokens: int) -> int:
        """Return how many of so many cached tokens are neither sinks nor recent ones."""
        behind = max(0, tokens - self.sinks)
        recent = behind % self.recent if self.window == "block" and self.recent else min(self.recent, behind)
        return behind - recent

    @property
    def exact_tokens(self) -> list[str]:
        """Which tokens stay exact, in the words of __str__."""
        sinks = [f"first {self.sinks} tokens exact" if self.sinks > 1 else "first token exact"] if self.sinks else []
        return [*sinks, f"latest {self.recent} tokens exact"] if self.recent else sinks

    def to(self, device: torch.device) -> Quantizer:
        """Return the same with its tensors on device."""
        moved = copy.copy(self)  # not made anew: its constructor would wait for a GPU to check them
        for name, held in vars(self).items():
            if isinstance(held, (Tensor, Quantizer)):
                object.__setattr__(moved, name, held.to(device))
        return moved


CONTEXT = 131072  # tokens of the cache whose bits are counted, unless it is said otherwise


@dataclass(frozen=True)
class Site:
    """The keys or the values of one layer on their way into the cache: the output of a module, [B,T,C].

    Sites are equal by layer and part. Where a module gives its output in another shape, or more than that, a subclass
    says how to read it (simquant/sites.py).
    """

    layer: int
    part: str  # "keys" or "values"
    name: str = field(compare=False)  # of the projection, such as model.layers.0.self_attn.k_proj
    module: nn.Module = field(compare=False, repr=False)
    channels: int = field(compare=False)  # C
    tokens: int = field(default=CONTEXT, compare=False, kw_only=True)  # that a cache of the reported size holds here
    head_dim: int = field(default=1, compare=False, kw_only=True)  # D, channels of a head
    readers: tuple[nn.Module, ...] = field(default=(), compare=False, kw_only=True, repr=False)  # attention layers
    is_late: bool = field(default=False, compare=False, kw_only=True)  # keys whose module may run after the values' own

    @property
    def key(self) -> tuple[int, str]:
        """(layer, part): what tells sites apart, in a file too."""
        return self.layer, self.part

    @property
    def device(self) -> torch.device:
        """Where its module computes."""
        return device_of(self.module)

    def read(self, out: Tensor) -> Tensor:
        """Return [B,T,C] from the module's output."""
        return out

    def write(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the module's output with x [B,T,C] in place of what read gives."""
        return x

    def put_before(self, out: Tensor, x: Tensor) -> Tensor:
        """Return the module's output with x [B,T,C] as further heads before its own."""
        return torch.cat([x, out], -1)


Setting = Mapping[Site, Quantizer]  # what is quantized, and how; {} is the unquantized model

# -- 2. Levels inside [-1, 1]


def uniform_levels(bits: int) -> Tensor:
    """Return [L] evenly spaced levels, both ends included: integer quantization is the plainest codebook."""
    return torch.linspace(-1, 1, 2**bits)


def normal_float_levels(bits: int) -> Tensor:
    """Return [L] quantiles of the normal distribution scaled to [-1, 1], with an exact zero (QLoRA, arXiv:2305.14314).

    The negative half has one level fewer. The outermost quantile is half the mean of 1/32 and 1/30, for every number of
    bits (arXiv:2306.06965, as the published KVQuant code).
    """
    half, tail = 2 ** (bits - 1), 0.5 * (1 / 32 + 1 / 30)
    negative = torch.special.ndtri(torch.linspace(tail, 0.5, half))  # [L/2], ends in 0
    positive = torch.special.ndtri(torch.linspace(0.5, 1 - tail, half + 1))[1:]  # [L/2]
    return torch.cat([negative / -negative[0], positive / positive[-1]])


LEVELS = {"uniform": uniform_levels, "nf": normal_float_levels, "nuq": uniform_levels}  # nuq: until it is fitted
LEVEL_NAMES = {"uniform": "uniform", "nf": "NormalFloat", "nuq": "NUQ"}

FASTER: dict[str, list[tuple[Callable[..., bool], Callable]]] = {}  # {function: [(where it serves, a faster one)]}


def replaceable(function: Callable) -> Callable:
    """Let FASTER, which simquant/speed.py fills, replace function by one that gives the same bits, as tests see."""

    @functools.wraps(function)
    def chosen(*args):
        """Call the first faster function that serves, or the one here."""
        for serves, faster in FASTER.get(function.__name__, ()):
            if serves(*args):
                return faster(*args)
        return function(*args)

    return chosen


def borders(levels: Tensor) -> Tensor:
    """Return [L-1] the points half way between sorted levels [L]."""
    return (levels[1:] + levels[:-1]) / 2


def nearest(unit: Tensor, levels: Tensor) -> Tensor:
    """Return the index [...] of the level in sorted levels [L] nearest to each of unit [...]; a tie takes the lower."""
    return torch.bucketize(unit, borders(levels))


@replaceable
def decode_nearest(unit: Tensor, levels: Tensor, decoded: Tensor) -> Tensor:
    """Return [...] what the level nearest to each of unit [...] decodes to: decoded [L] stands for levels [L]."""
    return decoded[nearest(unit, levels)]


BINS, EDGES = 65536, 512  # k-means sees [-1, 1] as BINS bins, and places its first borders among 2 * EDGES edges
NEGLIGIBLE = 1e-12  # of the total weight: below it, a difference of running totals is rounding error


def running_totals(unit: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return [2,BINS+1] fp64: weight, and weight * value, of samples unit [N] in [-1, 1] left of every bin's edge."""
    index = ((unit + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    mass = torch.ones_like(unit, dtype=torch.float64) if weight is None else weight.double()
    histogram = torch.stack([index.bincount(each, minlength=BINS) for each in (mass, mass * unit)])
    return F.pad(histogram.cumsum(1), (1, 0))


def kmeans_levels(totals: Tensor, bits: int) -> Tensor:
    """Return the [L] centroids of the weighted 1-D k-means over the samples of running_totals [2,BINS+1].

    In one dimension clusters are intervals, so dynamic programming finds the best L of them (Wang and Song, R Journal
    2011): exactly, for borders among EDGES edges at equal distances and EDGES at equal shares of the weight. Lloyd
    steps then move the borders over all bins. There is no random start, and the cost does not grow with the samples.
    """
    spaced = torch.linspace(0, BINS, EDGES + 1, device=totals.device).long()
    shares = torch.linspace(0, 1, EDGES + 1, dtype=torch.float64, device=totals.device) * totals[0, -1]
    edges = torch.cat([spaced, torch.searchsorted(totals[0], shares).clamp(max=BINS)]).unique()  # [E]
    return lloyd(totals, best_intervals(totals[:, edges], edges, 2**bits)).float()


def best_intervals(totals: Tensor, edges: Tensor, count: int) -> Tensor:
    """Return the [count] upper edges of the intervals of least squared error, from totals [2,E] at edges [E].

    What is maximized is the sum of moment**2 / mass over the intervals: the squared error is a constant less that.
    """
    mass, moment = (each[None, :] - each[:, None] for each in totals)  # [from edge, to edge]
    gain = (moment.square() / mass).where(mass > NEGLIGIBLE * totals[0, -1], 0)
    gain = gain.where(edges[:, None] <= edges[None, :], -math.inf)  # no interval runs backwards
    best, starts = gain[0], []  # best[e]: gain of the best cut of everything left of edge e
    for _ in range(count - 1):
        best, start = (best[:, None] + gain).max(0)
        starts.append(start)
    ends = [len(edges) - 1]
    for start in reversed(torch.stack(starts).tolist()):
        ends.append(start[ends[-1]])
    return edges[ends[::-1]]


def lloyd(totals: Tensor, edges: Tensor, steps: int = 100) -> Tensor:
    """Return [L] fp64 centroids after Lloyd steps from intervals with upper edges [L]; totals are [2,N+1]."""
    bins = totals.shape[1] - 1
    for _ in range(steps):
        mass, moment = totals[:, edges].diff(dim=1, prepend=totals[:, :1])  # [L] each
        low, high = F.pad(edges[:-1], (1, 0)) * (2 / bins) - 1, edges * (2 / bins) - 1
        levels = (moment / mass).where(mass > NEGLIGIBLE * totals[0, -1], (low + high) / 2)
        levels = levels.clamp(low, high)  # sorted, whatever rounding does
        moved = ((borders(levels) + 1) * (bins / 2)).round().long()
        if torch.equal(moved, edges[:-1]):
            break
        edges = F.pad(moved, (0, 1), value=bins)
    return levels


# -- 3. The scalar quantizer: keep x range x levels


@replaceable
def order_statistics(x: Tensor, rank: int, axis: int) -> Sequence[tuple[Tensor, Tensor]]:
    """Return [(a, b), (c, d)]: what stands at rank and rank + 1 of x along axis, which is kept as 1.

    a and b count from the least, c and d from the greatest; rank 0 is the extreme. Only the tails are sorted.
    """
    far = min(rank + 1, x.shape[axis] - 1)
    tails = (x.topk(far + 1, dim=axis, largest=largest).values for largest in (False, True))
    return [(tail.narrow(axis, rank, 1), tail.narrow(axis, far, 1)) for tail in tails]


def tail_quantiles(x: Tensor, fraction: float, axis: int) -> tuple[Tensor, Tensor]:
    """Return (lower, upper): the fraction / 2 and 1 - fraction / 2 quantiles of x along axis, fp32, axis kept as 1.

    As torch.quantile, with the rank in double precision: linear interpolation between two neighbours in order.
    """
    rank, weight = divmod(fraction / 2 * (x.shape[axis] - 1), 1)
    ends = order_statistics(x, int(rank), axis)
    lower, upper = (torch.lerp(near.float(), far.float(), weight) for near, far in ends)
    return lower, upper


@replaceable
def inlier_bounds(x: Tensor, fraction: float, axis: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (lower, upper, lo, hi) of x [B,T,C] along axis, fp32.

    What is at or beyond lower or upper is an outlier; the others range from lo to hi, (inf, -inf) if there are none.
    """
    lower, upper = tail_quantiles(x, fraction, axis)
    return lower, upper, *range_between(x, lower, upper, axis)


def range_between(x: Tensor, lower: Tensor, upper: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return (lo, hi), fp32: the range of what lies between lower and upper in x along axis."""
    is_inlier = (x > lower) & (x < upper)
    lo = x.float().where(is_inlier, math.inf).amin(axis, keepdim=True)
    hi = x.float().where(is_inlier, -math.inf).amax(axis, keepdim=True)
    return lo, hi


@replaceable
def snap(x: Tensor, exact: Tensor, lo: Tensor, hi: Tensor, levels: Tensor, decoded: Tensor) -> Tensor:
    """Return x [B,T,C] where exact; elsewhere the nearest of levels [L], stretched from [-1, 1] over [lo, hi].

    exact, lo and hi broadcast to x; arithmetic is in fp32, the result in x's dtype. lerp hits both ends exactly, and
    lo == hi gives lo whatever the level, so an empty range needs no special case.
    """
    unit = (x.float() - lo) / (hi - lo) * 2 - 1
    snapped = torch.lerp(lo, hi, (decode_nearest(unit, levels, decoded) + 1) / 2)
    return torch.where(exact, x, snapped.to(x.dtype))


def most_extreme(keep: Tensor, distance: Tensor, fraction: float) -> Tensor:
    """Return keep [B,T,C] with at most fraction * C entries of a token left, those of the greatest distance [B,T,C]."""
    most = math.floor(fraction * keep.shape[-1] + 1e-9)  # 0.29 * 100 is less than 29
    far = distance.masked_fill(~keep, -math.inf).topk(most, dim=-1).indices
    return keep & torch.zeros_like(keep).scatter(-1, far, True)


def integer_zero_point(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Return (lo, hi) moved by at most half a step, so that lo is a whole number of steps from zero."""
    step = (hi - lo) / (2**bits - 1)
    moved = torch.where(step > 0, (lo / step).round() * step, lo)
    return moved, moved + (hi - lo)


def stored(x: Tensor) -> Tensor:
    """Return x. A compiler writes it to memory, instead of computing it again, unrounded, wherever it is used."""
    return x.as_strided(x.shape, x.stride())


AXES = {"channel": -2, "token": -1}  # the axis of [B,T,C] along which entries share a range: one a channel, one a token


@dataclass(frozen=True, eq=False)
class ScalarQuantizer(Quantizer):
    """Every entry by itself: KVQuant (arXiv:2401.18079) and what it is compared with.

    axis          channel or token: which entries share a range
    bits          2..8
    levels        uniform, nf or nuq: what lies inside the range
    outliers      fraction that stays exact, half in each tail (dense-and-sparse, section 3.4); None for none
    cap           at most this fraction of a token stays exact, the most extreme; it needs a calibrated range
    sinks         leading tokens that stay exact, and that no range or quantile sees
    recent        latest tokens that stay exact; it needs ranges of tokens, or calibrated ones
    integer_zero  round the zero point of uniform levels, as integer kernels do
    q_norm        let fit move what levels decode to, so that inliers keep their mean and deviation (Q-Norm)
    fisher        let fit weigh entries by Fisher information F: "paper", by F times the squared range, because the
                  error is made in normalized units (section 3.3); "code", by F alone, as the published code; None, not
    lo, hi        [C] the calibrated range; None where the range is this window's
    codebook      [L] sorted levels in [-1, 1]
    scale, offset what a level decodes to is level * scale + offset
    """

    axis: str
    bits: int = 4
    levels: str = "uniform"
    outliers: float | None = None
    cap: float | None = None
    sinks: int = 0
    recent: int = 0
    integer_zero: bool = False
    q_norm: bool = False
    fisher: str | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None
    codebook: Tensor = None  # type: ignore[assignment]  # the constructor fills it in
    scale: float = 1.0
    offset: float = 0.0
    decoded: Tensor = field(init=False, repr=False)

    def __post_init__(self):
        for name, is_sound in SOUND.items():
            if name == "codebook" and self.codebook is None:
                object.__setattr__(self, "codebook", LEVELS[self.levels](self.bits))
            if not is_sound(self):
                raise UserError(f"a scalar quantizer has no {name} of {str(getattr(self, name))[:60]}")
        is_plain = self.scale == 1 and self.offset == 0
        decoded = self.codebook if is_plain else (self.codebook.double() * self.scale + self.offset).float()
        object.__setattr__(self, "decoded", decoded)

    @property
    def needs_gradient(self) -> bool:
        """Whether fit weighs by Fisher information."""
        return self.fisher is not None

    @property
    def sees_later_tokens(self) -> bool:
        """Whether a channel's range and outliers are those of this window."""
        return self.axis == "channel" and self.lo is None

    def keep_and_range(self, x: Tensor, sinks: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Return (keep, lo, hi) for x [B,T,C]: which entries stay exact (bool), and the fp32 range of the others.

        A range of this window is that of its inliers, outliers being at or beyond the quantiles. Outside a calibrated
        range lie the outliers or, if none are kept, what is clipped. No range or quantile sees the first sinks. Each
        of the three broadcasts to x.
        """
        axis, y = AXES[self.axis], x.float()
        body = x[:, sinks:] if self.axis == "channel" else x  # a token's range is its own
        keep = torch.zeros(1, dtype=torch.bool, device=x.device)
        if self.lo is not None and self.hi is not None:
            lo, hi = self.lo, self.hi
            keep = (y < lo) | (y > hi) if self.outliers is not None else keep
        elif self.outliers is not None:
            lower, upper, lo, hi = inlier_bounds(body, self.outliers, axis)
            keep = (y <= lower) | (y >= upper)
        else:
            lo, hi = body.amin(axis, keepdim=True).float(), body.amax(axis, keepdim=True).float()
        if self.cap is not None:
            keep = most_extreme(keep, ((y - lo) / (hi - lo) - 0.5).abs(), self.cap)
        if self.integer_zero:
            lo, hi = integer_zero_point(lo, hi, self.bits)
        return keep, lo, hi

    def quantize(self, x: Tensor, others: Sequence[Tensor] = ()) -> Quantized:
        """See Quantizer. Arithmetic is in fp32; the result is rounded to x's own dtype."""
        if x.ndim != 3:
            raise ValueError(f"quantize takes [batch, tokens, channels], got a tensor of shape {tuple(x.shape)}")
        if x[:, self.sinks :].numel() == 0:
            return Quantized(x)
        if self.recent and self.sees_later_tokens:
            raise UserError("a range of the whole window would see the tokens that the residual window keeps out of it")
        keep, lo, hi = self.keep_and_range(x, self.sinks)
        is_sink = torch.arange(x.shape[1], device=x.device)[:, None] < self.sinks  # [T,1]
        values = stored(snap(x, keep | is_sink, lo, hi, self.codebook, self.decoded))
        return Quantized(values, None if self.outliers is None else keep & ~is_sink)

    def cost(self, tokens: int, channels: int) -> float:
        """See Quantizer. What stays exact takes 16 bits an entry, a range of this window two fp16 numbers."""
        quantized = self.quantized_tokens(tokens)
        ranges = 0 if self.lo is not None else channels if self.axis == "channel" else quantized
        return channels * (16 * (tokens - quantized) + self.bits * quantized) + 32 * ranges * (quantized > 0)

    def fit(self, x: Tensor, grad: Tensor | None, others: Sequence[Tensor] = ()) -> ScalarQuantizer:
        """See Quantizer. Per channel the range is calibrated, per token it stays dynamic; NUQ levels are fitted.

        The calibrated range is that of all tokens of all windows but the sinks: percentiles, or minimum and maximum if
        no outliers are kept. Levels are fitted to the inliers, normalized as they are when it quantizes (the published
        calibration normalizes values by percentiles of the token instead).
        """
        fitted, body = self, x[:, self.sinks :]
        if self.axis == "channel":
            lo, hi = tail_quantiles(body.flatten(0, 1), self.outliers or 0.0, 0)
            fitted = replace(self, lo=lo[0], hi=hi[0])
        if self.levels != "nuq" and not self.q_norm:
            return fitted
        keep, lo, hi = fitted.keep_and_range(body)
        radius = ((hi - lo) / 2).expand_as(body)
        is_inlier = ~keep & (radius > 0)
        unit = ((body.float() - lo) / radius - 1).clamp(-1, 1)[is_inlier]  # [N] samples
        if self.levels == "nuq":
            weight = None if grad is None else grad[:, self.sinks :].float().square()[is_inlier].double()
            if weight is not None and self.fisher == "paper":
                weight = weight * radius[is_inlier] ** 2
            fitted = replace(fitted, codebook=kmeans_levels(running_totals(unit, weight), self.bits))
        return fitted.normalized(unit) if self.q_norm else fitted

    def normalized(self, unit: Tensor) -> ScalarQuantizer:
        """Return the same with scale and offset such that samples unit [N] keep their mean and deviation (Q-Norm)."""
        levels = self.codebook.to(unit.device)
        unit, snapped = unit.double(), levels[nearest(unit, levels)].double()
        scale = (unit.std(correction=0) / snapped.std(correction=0)).item()
        if not math.isfinite(scale):  # a single value: there is no deviation to keep
            return self
        return replace(self, scale=scale, offset=(unit.mean() - snapped.mean() * scale).item())

    def __str__(self) -> str:
        """Return a line of plain words, the bits left out."""
        zero = " (integer zero point)" if self.integer_zero else ""
        parts = [f"{LEVEL_NAMES[self.levels]}{zero} per {self.axis}"]
        if self.outliers is not None:
            cap = "" if self.cap is None else f" (at most {self.cap:g} of a token)"
            parts.append(f"outliers exact (sparsity threshold {1 - self.outliers:g}){cap}")
        if self.q_norm:
            parts.append("Q-Norm")
        return ", ".join([*parts, *self.exact_tokens])


def is_number(value: Any, least: float, most: float) -> bool:
    """Return whether value is an int or a float in [least, most], and no bool."""
    return type(value) in (int, float) and least <= value <= most


def is_vector(value: Any) -> bool:
    """Return whether value is a plain [N] fp32 tensor, N at most 2**20, of numbers whose squares are finite."""
    is_plain = type(value) is Tensor and value.layout is torch.strided and not value.requires_grad
    is_plain = is_plain and value.dtype == torch.float32 and value.ndim == 1 and len(value) <= 2**20
    return is_plain and bool((value.abs() <= 1e18).all())


def are_ordered(lo: Any, hi: Any) -> bool:
    """Return whether lo and hi are vectors of the same length, and no entry of lo exceeds that of hi."""
    return is_vector(lo) and is_vector(hi) and lo.shape == hi.shape and bool((lo <= hi).all())


def is_codebook(levels: Any, bits: int) -> bool:
    """Return whether levels are [2**bits] sorted numbers in [-1, 1]."""
    is_inside = is_vector(levels) and len(levels) == 2**bits and bool(levels.abs().max() <= 1 + 1e-6)
    return is_inside and are_ordered(levels[:-1], levels[1:])


SOUND: dict[str, Callable[[ScalarQuantizer], bool]] = {  # what the constructor checks, in this order
    "axis": lambda q: q.axis in AXES,
    "bits": lambda q: type(q.bits) is int and 2 <= q.bits <= 8,
    "levels": lambda q: q.levels in LEVELS,
    "outliers": lambda q: q.outliers is None or is_number(q.outliers, 0, 1),
    "cap": lambda q: q.cap is None or (is_number(q.cap, 0, 1) and q.outliers is not None),
    "sinks": lambda q: type(q.sinks) is int and q.sinks >= 0,
    "recent": lambda q: type(q.recent) is int and q.recent >= 0,
    "integer_zero": lambda q: q.integer_zero is False or (q.integer_zero is True and q.levels == "uniform"),
    "q_norm": lambda q: type(q.q_norm) is bool,
    "fisher": lambda q: q.fisher in (None, "paper", "code"),
    "lo": lambda q: q.lo is q.hi is None or (q.axis == "channel" and are_ordered(q.lo, q.hi)),
    "codebook": lambda q: is_codebook(q.codebook, q.bits),
    "scale": lambda q: is_number(q.scale, 1e-9, 1e9),
    "offset": lambda q: is_number(q.offset, -1e9, 1e9),
}

# -- 4. Hooks: where keys and values pass by


@dataclass(eq=False)
class Tap:
    """A quantizer at its site while a model runs, with what the latest forward pass gave.

    sources   taps of the caches that it predicts from
    is_source whether it is one itself
    releases  those of its sources that no later tap predicts from
    outliers  [B] how many entries stayed exact; None where none do
    clipped   [B] the share of entries that a cast clipped; None where that is not counted
    values    [B,T,C] what the cache gave back, kept while another tap predicts from it
    """

    site: Site
    quantizer: Quantizer
    sources: tuple[Tap, ...] = ()
    is_source: bool = False
    releases: tuple[Tap, ...] = ()
    outliers: Tensor | None = None
    clipped: Tensor | None = None
    values: Tensor | None = None

    @property
    def window(self) -> tuple[str, int, int] | None:
        """(rule, tokens, sinks) of the residual window; None where there is none."""
        each = self.quantizer
        return (each.window, each.recent, each.sinks) if each.recent else None

    @property
    def at_cache(self) -> bool:
        """Whether it sits where attention reads.

        Values are the same there. A window needs both kinds of them, and what is predicted from late keys comes later.
        """
        follows = any(tap.site.is_late and tap.site.layer == self.site.layer for tap in self.sources)
        return self.quantizer.after_rope or (self.site.part == "values" and (self.window is not None or follows))

    def pass_on(self, x: Tensor) -> Tensor:
        """Return x [B,T,C] as the cache gives it back, and remember what there is to remember."""
        given = self.quantizer.quantize(x, self.others(x.device))
        self.outliers = None if given.outliers is None else given.outliers.sum((1, 2))
        self.clipped = None if given.clipped is None else given.clipped.float().mean((1, 2))
        self.remember(given.values)
        return given.values

    def others(self, device: torch.device) -> list[Tensor]:
        """Return what the sources gave back for the same tokens, [B,T,C'] each. UserError for one that comes later."""
        values = []
        for tap in self.sources:
            if tap.values is None:
                raise UserError(f"{self.site.name} runs before what it is predicted from: leave out --predict")
            values.append(tap.values.to(device))
        return values

    def remember(self, values: Tensor) -> None:
        """Keep values [B,T,C] for those who predict from them, and release what nobody needs any more."""
        self.values = values if self.is_source else None
        for tap in self.releases:
            tap.values = None


@dataclass(eq=False)
class Probe:
    """A tap that only looks at what passes by: look(site, x [B,T,C]) returns what goes on."""

    site: Site
    at_cache: bool
    look: Callable[[Site, Tensor], Tensor]
    window: tuple[str, int, int] | None = None

    def pass_on(self, x: Tensor) -> Tensor:
        """Return what look returns."""
        return self.look(self.site, x)


def make_taps(setting: Setting) -> dict[tuple[int, str], Tap]:
    """Return {(layer, part): Tap} for a setting in model order. UserError if it lacks the source of a quantizer."""
    taps: dict[tuple[int, str], Tap] = {}
    last: dict[tuple[int, str], Tap] = {}  # {source: the last tap that predicts from it}
    for site, quantizer in setting.items():
        for layer, part in quantizer.sources:
            if (layer, part) not in taps:
                raise UserError(f"{site.name} is predicted from the {part} of layer {layer}, which stay unquantized")
        taps[site.key] = Tap(site, quantizer, tuple(taps[source] for source in quantizer.sources))
        last |= dict.fromkeys(quantizer.sources, taps[site.key])
    for source, tap in last.items():
        taps[source].is_source, tap.releases = True, (*tap.releases, taps[source])
    return taps


def pass_output(module: Any, args: tuple, out: Tensor) -> Tensor:
    """Forward hook. All that differs between layers hangs on the module: one compiled graph serves every layer."""
    for tap in module.kv_taps:
        x = tap.pass_on(tap.site.read(out))
        out = tap.site.write(out, x) if tap.window is None else tap.site.put_before(out, x)
    return out


@contextmanager
def hung(taps: Iterable[Tap | Probe]) -> Iterator[None]:
    """Let keys and values pass through taps, inside the block: at a module's output, or where attention reads them.

    Keys that are quantized before RoPE and have a residual window pass both: the module puts their quantized heads
    before the exact ones, and simquant/attention.py, which asks every attention for its cache_taps, tells them apart.
    """
    at: dict[str, dict[nn.Module, list]] = {"kv_taps": {}, "cache_taps": {}}
    for tap in taps:
        if not tap.at_cache:
            at["kv_taps"].setdefault(tap.site.module, []).append(tap)
        for reader in tap.site.readers if tap.at_cache or tap.window else ():
            at["cache_taps"].setdefault(reader, []).append(tap)
    try:
        for name, modules in at.items():
            for module, mine in modules.items():
                setattr(module, name, mine)
        with hooked((module, pass_output) for module in at["kv_taps"]):
            yield
    finally:
        for name, modules in at.items():
            for module in modules:
                vars(module).pop(name, None)


@contextmanager
def quantized(setting: Setting) -> Iterator[dict[tuple[int, str], Tap]]:
    """Let the model attend to what quantized caches give back, inside the block.

    Yields its taps, by (layer, part). Taps and hooks are gone afterwards, whatever happens inside.
    """
    taps = make_taps(setting)
    try:
        with hung(taps.values()):
            yield taps
    finally:
        taps.clear()  # whoever still holds the dict does not hold what they remember


Hook = Callable[[Any, tuple, Any], Any]


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Let each module's output pass through its forward hook, inside the block; None leaves the output as it is."""
    with contextlib.ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def device_of(module: nn.Module) -> torch.device:
    """Return where module computes; accelerate may keep its weights elsewhere meanwhile."""
    at = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    tensors = [*module.parameters(), *module.buffers()] if at is None else []
    return tensors[0].device if tensors else torch.empty(0, device=at).device


def input_device(model) -> torch.device:
    """Return where token ids go in."""
    return device_of(model.get_input_embeddings())


def on_device(setting: Setting) -> Setting:
    """Return the same with each quantizer where its module computes."""
    return {site: quantizer.to(site.device) for site, quantizer in setting.items()}


def dtype_name(model) -> str:
    """Return the dtype as people write it: bfloat16."""
    return str(model.dtype).removeprefix("torch.")


# -- 5. Statistics of a predicted token


class Predicted(NamedTuple):
    """What a setting predicts at some tokens. That of the unquantized model is the reference of all others."""

    log_probs: Tensor  # [B,t,V]
    greatest: Tensor  # [B,t] the likeliest token's
    likeliest: Any = None  # [B,t] of the reference alone: its place costs far more than a maximum


def log_prob_of(log_probs: Tensor, tokens: Tensor) -> Tensor:
    """Return [B,t] the entries of log_probs [B,t,V] at tokens [B,t]."""
    return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def loss(predicted: Predicted, targets: Tensor, reference: Predicted | None) -> Tensor:
    """Return [B,t] nats: the negative log-likelihood of targets [B,t]."""
    return -log_prob_of(predicted.log_probs, targets)


def accuracy(predicted: Predicted, targets: Tensor, reference: Predicted | None) -> Tensor:
    """Return [B,t] whether the token that comes is the likeliest."""
    return (log_prob_of(predicted.log_probs, targets) == predicted.greatest).float()


def divergence(predicted: Predicted, targets: Tensor, reference: Predicted) -> Tensor:
    """Return [B,t] nats: KL(reference || predicted), which rounding could otherwise take below zero."""
    return (reference.log_probs.exp() * (reference.log_probs - predicted.log_probs)).sum(-1).clamp(min=0)


def agreement(predicted: Predicted, targets: Tensor, reference: Predicted) -> Tensor:
    """Return [B,t] whether the reference's likeliest token is the likeliest here too."""
    return (log_prob_of(predicted.log_probs, reference.likeliest) == predicted.greatest).float()


def squared_change(predicted: Predicted, targets: Tensor, reference: Predicted) -> Tensor:
    """Return [B,t] the squared change of the probability of the token that comes."""
    before, after = (log_prob_of(each.log_probs, targets).exp() for each in (reference, predicted))
    return (after - before).square()


STATISTICS: dict[str, Callable] = {  # one more is one row
    "nll": loss,
    "kl": divergence,
    "top1_agreement": agreement,
    "squared_change": squared_change,
    "accuracy": accuracy,
}
OF_ITSELF = ("nll", "accuracy")  # those that need no reference
FIGURES = (*STATISTICS, "kl_max", "key_bits", "value_bits", "saturation")  # of a window: means, where no max
PARTS = ("keys", "values")  # of a cache
HEAD_TOKENS = 256  # whose logits exist at a time: 125 MiB in fp32 for 128,256 words


def head(model, output, tokens: slice) -> Tensor:
    """Return [B,t,V] fp32 log probabilities at some tokens of output, which the model's body (decoder) returned.

    The model's own class computes the logits, with all that it does after the projection (soft caps, scales): its body
    is passed over meanwhile.
    """
    body, own = model.get_decoder(), vars(model.get_decoder()).get("forward")  # accelerate puts its own there
    calls: list[tuple] = []
    part = type(output)(last_hidden_state=output.last_hidden_state[:, tokens])
    blank = torch.zeros(part.last_hidden_state.shape[:2], dtype=torch.long, device=input_device(model))

    def passed_over(*args, **kwargs):
        """Stand in for the body."""
        calls.append(args)
        return part

    body.forward = passed_over
    try:
        logits = model(input_ids=blank, use_cache=False).logits
    finally:
        del body.forward
        if own is not None:
            body.forward = own
    if not calls:
        raise UserError(f"{type(model).__name__} does not compute its logits from what its decoder returns")
    return logits.log_softmax(-1, dtype=torch.float32)


def token_statistics(model, ids: Tensor, outputs: Sequence, is_paired: bool) -> Tensor:
    """Return [B,S,len(STATISTICS),T-1] fp32 of the predicted tokens of ids [B,T], from the body's output in S settings.

    If is_paired the first is the reference; else what needs one is nan. Logits exist for HEAD_TOKENS tokens at a time,
    those of one setting and of the reference.
    """
    predicted, chunk, parts = ids.shape[1] - 1, max(1, HEAD_TOKENS // len(ids)), []
    for start in range(0, predicted, chunk):
        stop, reference, rows = min(start + chunk, predicted), None, []
        for output in outputs:
            log_probs = head(model, output, slice(start, stop))
            mine = Predicted(log_probs, log_probs.amax(-1))
            if is_paired and reference is None:
                reference = mine._replace(likeliest=log_probs.argmax(-1))
            targets = ids[:, start + 1 : stop + 1].to(log_probs.device)
            known = {name: f for name, f in STATISTICS.items() if is_paired or name in OF_ITSELF}
            tokens = {name: f(mine, targets, reference) for name, f in known.items()}  # [B,t] each
            unknown = torch.full_like(mine.greatest, math.nan)
            rows.append(torch.stack([tokens.get(name, unknown) for name in STATISTICS], 1).to(ids.device))
        parts.append(torch.stack(rows, 1))
    return torch.cat(parts, -1)


OUTLIER_BITS = 32  # on top of its place among the quantized: a 16-bit value and a 16-bit index


def storage(sites: Sequence[Site], setting: Setting, taps: Collection[Tap], ids: Tensor) -> Tensor:
    """Return [3,B] of windows ids [B,T]: bits an entry of all keys, and of all values; the share that casts clipped.

    Bits are those of a cache of site.tokens tokens, in which outliers are as frequent as the taps saw them. What is not
    quantized takes 16 bits. Layers weigh by what they store. nan where a model has no such part, or nobody counts.
    """
    blank = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    bits, entries = {part: blank.clone() for part in PARTS}, dict.fromkeys(PARTS, 0)
    for site in sites:
        whole = 16 * site.tokens * site.channels
        bits[site.part] += setting[site].cost(site.tokens, site.channels) if site in setting else whole
        entries[site.part] += site.tokens * site.channels
    for tap in taps:
        if tap.outliers is not None:
            times = tap.quantizer.quantized_tokens(tap.site.tokens) / (ids.shape[1] - tap.quantizer.sinks)
            bits[tap.site.part] += OUTLIER_BITS * times * tap.outliers.to(blank)
    clipped = [tap.clipped.to(blank) for tap in taps if tap.clipped is not None]
    saturation = torch.stack(clipped).mean(0) if clipped else blank + math.nan
    return torch.stack([*(bits[part] / (entries[part] or math.nan) for part in PARTS), saturation])


# -- 6. The perplexity loop


PROGRESS: dict[str, Any] = {"disable": None}  # what tqdm is told of where bars show: on a terminal


def progress(label: str, items: Iterable | None = None, total: int | None = None, initial: int = 0, unit="window"):
    """Return a tqdm bar over items, or one to move by hand."""
    return tqdm(items, desc=label, total=total, initial=initial, unit=unit, leave=False, **PROGRESS)


@replaceable
def run_body(model, ids: Tensor, setting: Setting) -> Any:
    """Return the body's output for ids [B,T]; layers before the first that setting quantizes may be passed over."""
    return model.get_decoder()(input_ids=ids, use_cache=False)


class Measured(NamedTuple):
    """What is measured of B windows in S settings."""

    figures: Tensor  # [B,S,len(FIGURES)] fp64, of whole windows
    tokens: Tensor  # [B,S,len(STATISTICS),T-1] fp32, of the predicted tokens


@torch.inference_mode()
def start_batch(model, sites: Sequence[Site], ids: Tensor, settings: Sequence[Setting]) -> Callable[[], Measured]:
    """Begin to measure windows ids [B,T] on their way to the host; call what is returned to wait for them.

    The unquantized model's logits are computed once for all settings. The host may start on the next batch meanwhile.
    """
    if input_device(model).type == "cuda":
        ids = ids.pin_memory()  # the GPU copies them when it is ready, and the host does not wait for it
    ids, outputs, bits = ids.to(input_device(model), non_blocking=True), [], []
    for setting in settings:
        with quantized(setting) as taps:
            output = run_body(model, ids, setting)
            bits.append(storage(sites, setting, taps.values(), ids))
        outputs.append(type(output)(last_hidden_state=output.last_hidden_state))  # whatever else it holds may go
    tokens = token_statistics(model, ids, outputs, is_paired=len(settings) > 1 and not settings[0])
    most = tokens[:, :, [*STATISTICS].index("kl")].amax(-1, keepdim=True)
    of_storage = torch.stack(bits).permute(2, 0, 1)
    figures = torch.cat([tokens.mean(-1, dtype=torch.float64), most, of_storage], dim=-1)
    measured = Measured(*(each.to("cpu", non_blocking=True) for each in (figures, tokens)))
    done = torch.cuda.Event() if ids.is_cuda else None
    if done is not None:
        done.record(torch.cuda.current_stream(ids.device))

    def wait() -> Measured:
        """Return what is measured when the GPU has copied it."""
        if done is not None:
            done.synchronize()
        return measured

    return wait


def evaluate(
    model, sites: Sequence[Site], windows: Tensor, settings: Sequence[Setting], batch_size: int = 1
) -> Iterator[Measured]:
    """Yield what is measured of windows [N,T] in every setting, batch by batch, on the CPU.

    sites are all that the model caches, quantized or not. If the first setting is {} and there are others, all are
    compared with it. A GPU starts on the next batch before one is read, so that it never waits for the host.
    """
    settings = [on_device(setting) for setting in settings]
    ahead = 1 if input_device(model).type == "cuda" else 0
    started: deque[Callable[[], Measured]] = deque()
    for ids in windows.split(batch_size):
        started.append(start_batch(model, sites, ids, settings))
        if len(started) > ahead:
            yield started.popleft()()
    while started:
        yield started.popleft()()


def perplexity(nll: Sequence[float]) -> float:
    """Return exp of the mean of windows' losses in nats; infinite beyond 1e299."""
    mean = math.fsum(nll) / len(nll)
    return mean * math.inf if mean > 690 else math.exp(mean)
