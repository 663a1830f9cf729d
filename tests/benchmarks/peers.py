"""What the benchmarks show beside this project, rebuilt from its description; every function is plain eager torch.

The published arithmetic is that of KVQuant's simulated quantization (arXiv:2401.18079, SqueezeAILab/KVQuant): dynamic
ranges by a maximum and a minimum that also give places, outliers by two quantiles that sort, a median in their place
while the range is sought, uniform levels by rounding, other levels by the least of all distances.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))  # last: who imports this may have chosen another
import quant_utils as qu

DISTANCES = 2**25  # that exist at a time, between entries and levels


def round_to_integer(x, lo, hi, bits):
    """Return x [T,C] at the nearest of 2**bits evenly spaced levels over [lo, hi]."""
    per_step = (2**bits - 1) / (hi - lo)
    zero = lo * per_step
    return ((x * per_step - zero).round() + zero) / per_step


def nearest_of_all(x, lo, hi, levels):
    """Return x [T,C] at the nearest of levels [L], stretched from [-1, 1] over [lo, hi], by its distance to each."""
    unit = (x - lo) / (hi - lo) * 2 - 1
    rows = max(1, DISTANCES // (x.shape[1] * len(levels)))
    chosen = torch.cat([(part[..., None] - levels).abs().argmin(-1) for part in unit.split(rows)])
    return (levels[chosen] + 1) / 2 * (hi - lo) + lo


def exact_and_range(x, quantizer):
    """Return (which entries of x [T,C] stay exact or None, lo, hi) for a ScalarQuantizer's settings."""
    axis, fraction = qu.AXES[quantizer.axis], quantizer.outliers
    if quantizer.lo is not None:
        lo, hi = quantizer.lo, quantizer.hi
        return (None if fraction is None else (x < lo) | (x > hi)), lo, hi
    if fraction is None:
        return None, x.min(axis, keepdim=True).values, x.max(axis, keepdim=True).values
    lower = torch.quantile(x, fraction / 2, dim=axis, keepdim=True)
    upper = torch.quantile(x, 1 - fraction / 2, dim=axis, keepdim=True)
    exact = (x <= lower) | (x >= upper)
    inliers = torch.where(exact, x.median(axis, keepdim=True).values, x)
    return exact, inliers.min(axis, keepdim=True).values, inliers.max(axis, keepdim=True).values


def published(x, quantizer):
    """Return fp32 x [T,C] as the published arithmetic quantizes it, in the settings of a ScalarQuantizer."""
    sinks, body = x[: quantizer.sinks], x[quantizer.sinks :]
    exact, lo, hi = exact_and_range(body, quantizer)
    if quantizer.levels == "uniform":
        values = round_to_integer(body, lo, hi, quantizer.bits)
    else:
        values = nearest_of_all(body, lo, hi, quantizer.codebook)
    values = (values if exact is None else torch.where(exact, body, values)).nan_to_num(0, 0, 0)
    return torch.cat([sinks, values]) if quantizer.sinks else values


@dataclass(frozen=True, eq=False)
class Published(qu.Quantizer):
    """The published arithmetic in this project's hooks: the settings are those of a ScalarQuantizer."""

    settings: qu.ScalarQuantizer
    bits: float = 0

    def quantize(self, x, others=()):
        """See Quantizer. One window at a time."""
        return qu.Quantized(published(x[0].float(), self.settings)[None].to(x.dtype))

    def cost(self, tokens, channels):
        """See Quantizer."""
        return self.settings.cost(tokens, channels)


def as_published(setting):
    """Return a setting with the published arithmetic in place of each of its ScalarQuantizers."""
    return {site: Published(quantizer) for site, quantizer in setting.items()}


@torch.inference_mode()
def plain_loop(model, windows, setting={}):  # noqa: B006, nothing changes it
    """Return the mean loss of windows [N,T], by model(ids) with whole logits and cross entropy, window by window."""
    losses = []
    with qu.quantized(setting):
        for ids in windows.to(qu.input_device(model))[:, None]:
            logits = model(ids, use_cache=False).logits[0, :-1].float()
            losses.append(F.cross_entropy(logits, ids[0, 1:]).item())
    return sum(losses) / len(losses)
