"""The other site: where attention reads its cache, keys after RoPE, and tokens that a residual window keeps exact.

transformers lets its attention functions be replaced by name. Each of them is, when simquant/sites.py is imported: by
one that lets keys and values pass through the taps that hang on the attention layer, and then calls the model's own.
Without taps nothing changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from quant_utils import WINDOWS, Probe, Tap, UserError

EAGER = "eager_attention_forward"  # what each family calls its own, in the file that it is defined in
Window = tuple[str, int, int]  # rule, tokens, sinks: see quant_utils.Tap


def own_eager(module: nn.Module) -> Callable:
    """Return the eager attention of a layer's family."""
    for cls in type(module).__mro__:
        if found := getattr(sys.modules[cls.__module__], EAGER, None):
            return found
    raise UserError(f"{type(module).__name__} has no {EAGER}: give --attn_implementation sdpa")


def given_back(tap: Tap | Probe, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (what the cache gives back, exact) for keys or values x [B,H,T,D] that attention is to read."""
    if not tap.at_cache:  # the quantized heads stand before the exact ones
        quantized, exact = x.chunk(2, dim=1)
        return quantized, exact
    values = tap.pass_on(x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], -1)).transpose(1, 2)
    return values, x


def attend(
    inner: Callable | None, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, **more
):
    """Call inner, or the family's eager attention, on what quantized caches give back for key and value [B,H,T,D]."""
    inner, windows = inner or own_eager(module), {}
    quantized, exact = {"keys": key, "values": value}, {"keys": key, "values": value}
    for tap in getattr(module, "cache_taps", ()):
        part = tap.site.part
        quantized[part], exact[part] = given_back(tap, exact[part])
        windows[part] = tap.window
    if not any(windows.values()):
        return inner(module, query, quantized["keys"], quantized["values"], attention_mask, **more)
    mask = causal_mask(module, query) if attention_mask is None else attention_mask
    keys, values, masks = [], [], []
    for of_keys, of_values, chosen in choices(windows, query.shape[2], query.device):
        keys.append((exact if of_keys else quantized)["keys"])
        values.append((exact if of_values else quantized)["values"])
        masks.append(restricted(mask, chosen))
    if more.get("position_bias") is not None:
        more["position_bias"] = torch.cat([more["position_bias"]] * len(masks), -1)
    return inner(module, query, torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, -1), **more)


def choices(windows: dict[str, Window | None], tokens: int, device: torch.device) -> list[tuple[bool, bool, Tensor]]:
    """Return [(is the key exact, is the value, [T,T] of the tokens that a query sees so)]: each token in one of them.

    A part without a tap is the same either way, and goes with the other one.
    """
    of_keys, of_values = windows.get("keys", windows.get("values")), windows.get("values", windows.get("keys"))
    keys, values = seen_exact(of_keys, tokens, device), seen_exact(of_values, tokens, device)
    kinds = [(False, False), (True, True)]
    kinds += [] if covers(of_values, of_keys) else [(True, False)]
    kinds += [] if covers(of_keys, of_values) else [(False, True)]
    return [(key, value, (keys if key else ~keys) & (values if value else ~values)) for key, value in kinds]


def seen_exact(window: Window | None, tokens: int, device: torch.device) -> Tensor:
    """Return [T,T]: whether a query (down) sees a token (across) exact."""
    places = torch.arange(tokens, device=device)
    if window is None:
        return torch.zeros(tokens, tokens, dtype=torch.bool, device=device)
    rule, recent, sinks = window
    return WINDOWS[rule](places[:, None] - sinks, places - sinks, recent)


def covers(one: Window | None, other: Window | None) -> bool:
    """Return whether every token that window other shows exact is so in window one too, as far as it is easily told."""
    if other is None or one == other:
        return True
    reach = {"last": 0, "before": 1, "block": 0}  # tokens more than the window's own number, at most
    return one is not None and one[0] != "block" and one[1] + reach[one[0]] >= other[1] + reach[other[0]]


def causal_mask(module: nn.Module, query: Tensor) -> Tensor:
    """Return [1,1,T,T] of what a query may see if the model gives no mask, as its attention would understand it."""
    tokens = query.shape[2]
    everything = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device)
    return (everything.tril() if getattr(module, "is_causal", True) else everything)[None, None]


def restricted(mask: Tensor, chosen: Tensor) -> Tensor:
    """Return a mask [B,1,T,T], of what may be seen or of what is added, that hides what is not chosen [T,T]."""
    return mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, torch.finfo(mask.dtype).min)


def install() -> None:
    """Replace the attention functions of transformers."""
    for name, function in list(AttentionInterface._global_mapping.items()):
        if not isinstance(function, partial) and "paged" not in name and name != "flex_attention":
            AttentionInterface.register(name, partial(attend, function))  # type: ignore[arg-type]
    AttentionInterface.register("eager", partial(attend, None))
