"""Where each family of models has its keys and values, and how many tokens of them a layer stores."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quant_utils import CONTEXT, Site, UserError, device_of
from simquant import attention as reading

reading.install()  # sites after RoPE need it
HEADS = 0  # runs of a fused projection: one for each head of keys and values


@dataclass(frozen=True)
class Place:
    """Which module of an attention layer gives its keys or its values last on their way to RoPE and the cache.

    module  its name in the layer
    block   which block of channels of a fused projection, counted from the end of its run: -1 or -2; None: it is none
    runs    of how many equal runs of blocks a fused projection's output consists
    axis    which axis holds the heads: 2 of [B,T,H,D], 1 of [B,H,T,D]; asked only if T is H, else the shape tells
    """

    module: str
    block: int | None = None
    runs: int = 1
    axis: int = 2


@dataclass(frozen=True)
class PlacedSite(Site):
    """A site whose module may give more than [B,T,C], or give it in another shape."""

    place: Place = field(compare=False)
    projection: nn.Module = field(compare=False, repr=False)  # the site's module may be a norm without weights

    @property
    def device(self) -> torch.device:
        """See Site."""
        return device_of(self.projection)

    def given_by(self) -> str:
        """Return words on the module: k_norm, or qkv_proj, block -2."""
        return self.place.module + ("" if self.place.block is None else f", block {self.place.block}")

    def blocks(self, out: Tensor) -> Tensor:
        """Return a fused projection's output as [B,T,runs,blocks,channels of a block]."""
        return out.unflatten(-1, (self.place.runs, -1, self.channels // self.place.runs))

    def heads_first(self, out: Tensor) -> bool:
        """Return whether out is [B,H,T,D]."""
        if out.ndim != 4:
            return False
        first, second = (size == self.channels // out.shape[-1] for size in out.shape[1:3])
        return first if first != second else self.place.axis == 1

    def read(self, out: Tensor) -> Tensor:
        """See Site."""
        if self.place.block is not None:
            return self.blocks(out)[..., self.place.block, :].flatten(2)
        return (out.transpose(1, 2) if self.heads_first(out) else out).flatten(2)

    def write(self, out: Tensor, x: Tensor) -> Tensor:
        """See Site."""
        if self.place.block is not None:
            out = out.clone()
            self.blocks(out)[..., self.place.block, :] = x.unflatten(2, (self.place.runs, -1))
            return out
        return self.as_given(x, out)

    def put_before(self, out: Tensor, x: Tensor) -> Tensor:
        """See Site."""
        if self.place.block is not None:
            raise UserError(f"--recent does not go with keys before RoPE from the fused projection {self.place.module}")
        return torch.cat([self.as_given(x, out), out], -1 if out.ndim == 3 else 1 if self.heads_first(out) else 2)

    def as_given(self, x: Tensor, out: Tensor) -> Tensor:
        """Return x [B,T,C] in the shape that the module gives."""
        x = x if out.ndim == 3 else x.unflatten(2, (-1, out.shape[-1]))
        return x.transpose(1, 2) if self.heads_first(out) else x


def fused(module: str, runs: int = 1, keys: int = -2, values: int = -1) -> dict[str, Place]:
    """Return the places of keys and values in a fused projection."""
    return {part: Place(module, block=at, runs=runs) for part, at in (("keys", keys), ("values", values))}


# What a layer's modules do not tell, by the model_type of the config: which part of a fused projection keys and values
# are. Everywhere else keys come from the norm behind k_proj, or from k_proj if there is none. One more is a line here:
# check_against_cache and tests/test_sites.py see whether it is right.
FAMILIES: dict[str, dict[str, Place]] = {
    "bloom": fused("query_key_value", HEADS),
    "codegen": fused("qkv_proj", runs=4, keys=-1, values=-2),
    "falcon": fused("query_key_value", HEADS),
    "gpt2": fused("c_attn"),
    "gpt_bigcode": fused("c_attn", HEADS),
    "gpt_neox": fused("query_key_value", HEADS),
    "gpt_neox_japanese": fused("query_key_value", HEADS),
    "jetmoe": fused("kv_proj"),
    "mpt": fused("Wqkv"),
    "persimmon": fused("query_key_value", HEADS),
    "phi3": fused("qkv_proj"),
}
HEADS_FIRST = {"apertus", "exaone4", "exaone_moe", "gemma3_text", "hy_v3", "phi", "stablelm"}  # norms get [B,H,T,D]
USUAL = {"keys": Place("k_proj"), "values": Place("v_proj")}
NORMS = {"keys": r"k(ey)?_(layer_?)?norm$", "values": r"v(alue)?_(layer_?)?norm$"}  # names of norms behind a projection
SHARES = "is_kv_shared_layer"  # what says of an attention layer that it reads what another one has cached
UNCACHED = ("linear_attention", "conv", "mamba")  # kinds of layers with a state instead of keys and values


def projections(model) -> dict[str, nn.Module]:
    """Return {name: module} of what multiplies in the decoder, in model order: what has a 2-d weight or packs one."""
    decoder, found = set(model.get_decoder().modules()), {}
    for name, module in model.named_modules():
        is_matrix = getattr(getattr(module, "weight", None), "ndim", 0) == 2 or hasattr(module, "out_features")
        if is_matrix and module in decoder and not isinstance(module, nn.Embedding):
            found[name] = module
    return found


def places_of(attention: nn.Module, kind: str) -> dict[str, Place]:
    """Return {part: where it is} of a layer in a family; not both parts if that is unknown."""
    children = [name for name, _ in attention.named_children()]
    places: dict[str, Place] = {}
    for part, line in (USUAL | FAMILIES.get(kind, {})).items():
        norms = [Place(name, axis=1 if kind in HEADS_FIRST else 2) for name in children if re.match(NORMS[part], name)]
        place = [*norms, line][0]
        places |= {part: place} if place.module in children else {}
    return places


def attention_layers(model) -> Iterator[tuple[str, nn.Module, dict[str, Place]]]:
    """Yield (name, module, where its keys and values are) of every layer that caches its own, in model order."""
    config, decoder = model.config.get_text_config(decoder=True), set(model.get_decoder().modules())
    kinds: dict[Any, str] = dict(enumerate(getattr(config, "layer_types", None) or []))
    for name, module in model.named_modules():
        places = places_of(module, config.model_type)
        is_cacheless = kinds.get(getattr(module, "layer_idx", None)) in UNCACHED or getattr(module, SHARES, False)
        if module in decoder and len(places) == len(USUAL) and not is_cacheless:
            yield name, module, places


def readers_of(model) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """Return {attention layer: itself, and the layers of its kind that read its cache instead of one of their own}."""
    config = model.config.get_text_config(decoder=True)
    kinds: dict[Any, str] = dict(enumerate(getattr(config, "layer_types", None) or []))
    owners, latest = {module for _, module, _ in attention_layers(model)}, dict[Any, nn.Module]()
    readers: dict[nn.Module, tuple[nn.Module, ...]] = {}
    for module in model.get_decoder().modules():
        kind = kinds.get(getattr(module, "layer_idx", None))
        if module in owners:
            latest[kind], readers[module] = module, (module,)
        elif getattr(module, SHARES, False) and hasattr(module, "config") and kind in latest:
            readers[latest[kind]] += (module,)
    return readers


def layers_without_attention(model, sites: Sequence[Site]) -> int:
    """Return how many decoder layers cache no keys and values, of their own or of another layer."""
    sharing = sum(getattr(module, SHARES, False) for module in model.get_decoder().modules())
    return model.config.get_text_config(decoder=True).num_hidden_layers - len({site.layer for site in sites}) - sharing


def heads_of(attention: nn.Module, config) -> int:
    """Return how many heads of keys and values a layer with a fused projection has."""
    names = ("num_key_value_heads", "num_kv_heads", "kv_heads", "num_heads", "num_attention_heads")
    return next(getattr(each, name) for each in (attention, config) for name in names if hasattr(each, name))


def channels_of(attention: nn.Module, projection: Any, config) -> int:
    """Return C of an attention layer (quantized weights are packed, so their shape does not tell)."""
    if hasattr(projection, "out_features"):
        return projection.out_features
    return heads_of(attention, config) * head_dim_of(attention, config)


def head_dim_of(attention: nn.Module, config) -> int:
    """Return D, the channels of a head."""
    own = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def windows_of(config) -> list[int | None]:
    """Return how many tokens each layer's cache holds at most; None: all. A config that tells of no layers gives []."""
    with contextlib.suppress(AttributeError, TypeError, ValueError, LookupError):
        return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return []


def find_sites(model, context: int = CONTEXT) -> list[PlacedSite]:
    """Return all that model caches and we know of, when it holds context tokens: keys and values, in model order."""
    config = model.config.get_text_config(decoder=True)
    windows, readers = dict(enumerate(windows_of(config))), readers_of(model)
    sites: list[PlacedSite] = []
    for layer, (name, attention, places) in enumerate(attention_layers(model)):
        at = getattr(attention, "layer_idx", None)
        at = layer if at is None else at
        for part, place in places.items():
            usual, module = USUAL[part].module, getattr(attention, place.module)
            alone = getattr(attention, usual, None) or getattr(attention, "k_proj", None)  # values may be keys' own
            place = place if place.runs != HEADS else replace(place, runs=heads_of(attention, config))
            where = (f"{name}.{usual}", module, channels_of(attention, alone, config), place, alone or module)
            is_late = part == "keys" and bool(re.match(NORMS["keys"], place.module))
            more: dict[str, Any] = {
                "is_late": is_late,
                "readers": readers[attention],
                "head_dim": head_dim_of(attention, config),
            }
            sites.append(PlacedSite(at, part, *where, tokens=min(windows.get(at) or context, context), **more))
    return sites
