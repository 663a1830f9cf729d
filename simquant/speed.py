"""Speed on a GPU: compiled decoder layers, and definitions that give what the core's own give, bit for bit, sooner."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quant_utils as qu
from quant_utils import UserError
from simquant.notices import notify
from simquant.sites import attention_layers

Tails = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def is_counted(x: Tensor) -> bool:
    """Return whether order statistics of x are found by counting: 16-bit numbers on a GPU."""
    return x.device.type != "cpu" and x.dtype in (torch.bfloat16, torch.float16)


def tail_quantiles(x: Tensor, fraction: float, axis: int, absent: int = 0) -> tuple[Tensor, Tensor]:
    """See quant_utils. If x is padded along axis, so many entries are `absent`: they are nan, and take no part."""
    if not is_counted(x):
        return PLAIN["tail_quantiles"](x, fraction, axis)
    rank = fraction / 2 * (x.shape[axis] - absent - 1)
    near = math.floor(rank)
    ends = counted_tails(x, near, axis, absent)
    lower, upper = (torch.lerp(one.float(), other.float(), rank - near) for one, other in ends)
    return lower, upper


def inlier_bounds(x: Tensor, fraction: float, axis: int, absent: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See quant_utils, and tail_quantiles for absent."""
    if not is_counted(x):
        return PLAIN["inlier_bounds"](x, fraction, axis)
    if axis == qu.AXES["channel"]:  # a GPU counts fastest along contiguous memory, in aligned rows
        pad = -x.shape[1] % 16
        rows = qu.stored(F.pad(x.mT, (0, pad), value=math.nan).contiguous())
        lower, upper, lo, hi = (qu.stored(each).mT for each in inlier_bounds(rows, fraction, qu.AXES["token"], pad))
        return lower, upper, lo, hi
    lower, upper = tail_quantiles(x, fraction, axis, absent)
    is_inlier = (x > lower) & (x < upper)
    lo = x.float().where(is_inlier, math.inf).amin(axis, keepdim=True)
    hi = x.float().where(is_inlier, -math.inf).amax(axis, keepdim=True)
    return lower, upper, lo, hi


def decode_nearest(unit: Tensor, levels: Tensor, decoded: Tensor) -> Tensor:
    """See quant_utils. Step by step in a compiled kernel, which has no search that waits for memory."""
    if not torch.compiler.is_compiling() or len(levels) > 16:
        return PLAIN["decode_nearest"](unit, levels, decoded)
    chosen = decoded[0]
    for border, level in zip(qu.borders(levels).unbind(), decoded[1:].unbind(), strict=True):
        chosen = torch.where(unit > border, level, chosen)
    return chosen


PLAIN: dict[str, Any] = {
    f.__name__: inspect.unwrap(f) for f in (qu.tail_quantiles, qu.inlier_bounds, qu.decode_nearest)
}
qu.FASTER.update(tail_quantiles=tail_quantiles, inlier_bounds=inlier_bounds, decode_nearest=decode_nearest)


def counted_tails(x: Tensor, rank: int, axis: int, absent: int = 0) -> Tails:
    """Return what stands at rank and rank + 1 along axis of 16-bit x: ((ascending), (descending)), 0 the extreme.

    Nothing is sorted, and the compiler makes a single kernel of it. In the order of its bits a number is found bit by
    bit, from how many are as large as each trial. Both ends are searched at once, in the halves of an integer, and but
    for the last bit by one subtraction: a half that holds 15 bits of a number and a guard bit above them keeps the
    guard if what is subtracted is no larger.
    """
    total, key = x.shape[axis], ordered_key(x)
    key = key.masked_fill(x.isnan(), 2**16 - 1) if absent else key  # a compiler may give a nan either sign
    half, whole = (16, torch.int32) if total < 2**16 else (32, torch.int64)
    one, mask = 1 + 2**half, 2**half - 1  # in each half a 1; the lower half
    guards = one * 2**15 - (2**32 if half == 16 else 0)  # the upper one is the sign of an int32
    guarded = (key >> 1).to(whole) * one + guards

    def halves(both: Tensor) -> tuple[Tensor, Tensor]:
        return both & mask, both >> half & mask

    def less(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        both = (key < low).to(whole) + ((key < high).to(whole) << half)
        return halves(both.sum(axis, keepdim=True, dtype=whole))

    found = torch.zeros_like(guarded.narrow(axis, 0, 1))
    for bit in reversed(range(15)):
        as_large = (guarded - (found + (one << bit))) >> 15 & one
        at_low, at_high = halves(as_large.sum(axis, keepdim=True, dtype=whole))
        is_low, is_high = at_low >= total - rank, at_high > rank + absent
        found = found + (is_low.to(whole) << bit) + (is_high.to(whole) << bit + half)
    low, high = (2 * each.int() for each in halves(found))
    less_low, less_high = less(low + 1, high + 1)  # the last bit
    low = torch.where(less_low <= rank, low + 1, low)
    high = torch.where(less_high <= total - absent - 1 - rank, high + 1, high)
    less_low, less_high = less(low + 1, high)  # the next rank holds the same number again, or its neighbour
    above = key.masked_fill(key <= low, 2**16 - 1).amin(axis, keepdim=True)
    below = key.masked_fill(key >= high, 0).amax(axis, keepdim=True)
    next_low = torch.where(less_low < min(rank + 2, total - absent), above, low)
    next_high = torch.where(less_high > max(total - absent - rank - 2, 0), below, high)
    low, next_low, high, next_high = (from_ordered_key(each, x.dtype) for each in (low, next_low, high, next_high))
    return (low, next_low), (high, next_high)


def ordered_key(x: Tensor) -> Tensor:
    """Return int32 in 0..2**16-1, in the order of 16-bit floating-point x: negative ones have their bits flipped."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, ~bits, bits + 2**15)


def from_ordered_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the number in dtype that ordered_key made key of."""
    return torch.where(key < 2**15, ~key, key - 2**15).short().view(dtype)


class CompilationError(UserError):
    """The decoder layers do not compile."""


def is_to_compile(asked: str, device: torch.device) -> bool:
    """Return whether evaluations are compiled. The compiler is tried first, and may lack Triton, or a C compiler.

    If it fails, auto, which compiles on a GPU only, says so and goes without, and on is a UserError.
    """
    if asked == "off" or (asked == "auto" and device.type == "cpu"):
        return False
    try:
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # torch says nothing
            raise RuntimeError("TORCHDYNAMO_DISABLE is set")
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whatever is missing
        reason = f"torch.compile fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if asked == "on":
            raise UserError(f"--compile on: {reason}: give --compile off") from error
        notify(f"--compile auto: off, because {reason}")
        return False
    return True


def decoder_layers(model) -> list[nn.Module]:
    """Return the modules that hold one attention layer each, one below the list that they stand in."""
    attention = {module for _, module, _ in attention_layers(model)}
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return [layer for each in lists for layer in each if attention & set(layer.modules())]


@contextmanager
def compiled(model, enabled: bool = True) -> Iterator[None]:
    """Run every decoder layer as one compiled graph, hooks included, which alike layers share, inside the block."""
    if not enabled:
        yield
        return
    layers = decoder_layers(model)
    # Triton's own division is approximate, and kernels chosen by timing round as they please (as far as torch knows)
    exact = [name for name in torch._inductor.list_options() if re.search("divi[a-z]*_rounding|^deterministic$", name)]
    # without guards on hooks a layer that was compiled without them would pass them over
    options: dict[str, Any] = {"skip_nnmodule_hook_guards": False, "fail_on_recompile_limit_hit": True}
    options |= {"recompile_limit": 1000, "accumulated_recompile_limit": 10000}  # widths, parts and batch sizes
    with torch._dynamo.config.patch(options):
        try:
            for layer in layers:
                layer.compile(dynamic=False, options=dict.fromkeys(exact, True))
            yield
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise CompilationError(f"the decoder layers do not compile ({reason}): give --compile off") from error
        finally:
            for layer in layers:
                layer._compiled_call_impl = None
