"""Where each family of models has its keys and values, and the check against the model's own cache."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant_utils import Site, UserError, device_of, dtype_name, hooked, input_device
from simquant.notices import is_out_of_memory

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
        x = x if out.ndim == 3 else x.unflatten(2, (-1, out.shape[-1]))
        return x.transpose(1, 2) if self.heads_first(out) else x


def fused(module: str, runs: int = 1, keys: int = -2, values: int = -1) -> dict[str, Place]:
    """Return the places of keys and values in a fused projection."""
    return {part: Place(module, block=at, runs=runs) for part, at in (("keys", keys), ("values", values))}


# What a layer's modules do not tell, by the model_type of the config: which part of a fused projection keys and values
# are. Elsewhere keys are the output of k_norm, or what it may be called, or else of k_proj. One more is one line here:
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
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None)
    return heads_of(attention, config) * (head_dim or config.hidden_size // config.num_attention_heads)


def find_sites(model) -> list[PlacedSite]:
    """Return all that model caches and we know of: the keys and values of every layer, in model order."""
    config = model.config.get_text_config(decoder=True)
    sites: list[PlacedSite] = []
    for layer, (name, attention, places) in enumerate(attention_layers(model)):
        at = getattr(attention, "layer_idx", None)
        for part, place in places.items():
            usual, module = USUAL[part].module, getattr(attention, place.module)
            alone = getattr(attention, usual, None) or getattr(attention, "k_proj", None)  # values may be keys' own
            place = place if place.runs != HEADS else replace(place, runs=heads_of(attention, config))
            where = (f"{name}.{usual}", module, channels_of(attention, alone, config), place, alone or module)
            sites.append(PlacedSite(layer if at is None else at, part, *where))
    return sites


def check_sites(model, sites: Sequence[Site]) -> None:
    """Raise UserError if model has no sites, or does something to its keys or values that FAMILIES does not tell of."""
    kind = type(model).__name__
    if not sites:
        leaves = list(dict.fromkeys(re.sub(r".*\.", "", name) for name in projections(model)))
        has = f"it has: {', '.join(leaves) or 'none'}"
        if "kv_b_proj" in leaves:
            has = "it expands both from a compressed latent (multi-head latent attention), which is not supported"
        raise UserError(f"{kind} has no projections k_proj and v_proj; {has}")
    if len(set(sites)) < len(sites) or any(site.layer < 0 for site in sites):
        raise UserError(f"{kind} has several attentions in a layer, or one for several layers: not supported yet")
    attentions = [attention for _, attention, _ in attention_layers(model)]
    if any(getattr(each, "clip_qkv", None) for each in (model.config.get_text_config(decoder=True), *attentions)):
        raise UserError(f"{kind} clips keys and values behind the projections (clip_qkv): not supported yet")
    if any(isinstance(getattr(each, "qk_norm", None), nn.Module) for each in attentions):
        raise UserError(f"{kind} normalizes queries and keys alike (qk_norm): this family is not supported yet")


@torch.inference_mode()
def run_once(model, sites: Sequence[PlacedSite]) -> tuple[dict[Site, Tensor], set[Site], Sequence]:
    """Return what sites give on a few tokens, [T,C]; which get other than their projection gives; the cache's layers.

    A number of tokens that divides no site's channels is no number of heads.
    """
    given, came, changed = dict[Site, Tensor](), dict[nn.Module, Tensor](), set[Site]()

    def watch(module: Any, args: tuple, out: Tensor, site: PlacedSite) -> None:
        given[site] = site.read(out)[0].clone()
        before = came.get(site.projection)
        if module is not site.projection and before is not None and not torch.equal(site.read(args[0]), before):
            changed.add(site)

    def remember(module: Any, args: tuple, out: Tensor) -> None:
        came[module] = out

    tokens = next(count for count in range(4, 99) if all(site.channels % count for site in sites))
    ids = torch.arange(5, 5 + tokens, device=input_device(model))[None]  # padding, embedded as zeros, comes before
    ids %= model.config.get_text_config().vocab_size
    hooks = [(site.projection, remember) for site in sites if site.place.block is None]
    with hooked([*hooks, *((site.module, partial(watch, site=site)) for site in sites)]):
        output = model.get_decoder()(input_ids=ids, use_cache=True)
    return given, changed, next((each.layers for each in output.values() if hasattr(each, "layers")), ())


def check_against_cache(model, sites: Sequence[PlacedSite]) -> None:
    """Raise UserError unless sites give what the model's own cache holds, on a few tokens.

    Values are compared as they are; keys at the first position, where RoPE turns nothing, but may scale. What gets into
    a norm shows whether RoPE comes before it.
    """
    kind = type(model).__name__
    try:
        given, changed, layers = run_once(model, sites)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason, where = " ".join(str(error).split())[:200], f"{dtype_name(model)} on {model.device}"
        raise UserError(f"{kind} does not run in {where}: {reason}; try another --dtype") from error
    if not layers:
        raise UserError(f"{kind} returns no cache that could be compared with: not supported in this transformers")
    for site in sites:
        held = getattr(layers[site.layer], site.part, None) if site.layer < len(layers) else None
        if site in given and not given[site].isfinite().all():
            continue  # that it is broken shows when it is measured
        if site not in given or held is None:
            raise UserError(f"{kind} caches nothing at {site.name}: this family is not supported yet")
        if not is_same(site.part, given[site], held[0].transpose(0, 1), model.dtype):
            raise UserError(f"{kind} caches other {site.part} than {site.name} gives: this family is not supported yet")
        if site in changed:
            before = f"{site.place.module} (by RoPE, maybe)"
            raise UserError(f"{kind} changes its {site.part} before {before}: this family is not supported yet")


def is_same(part: str, given: Tensor, held: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a site's [T,C] are the cache's [T,H,D]: values as they are, keys at the first position, scaled.

    A cache may hold each head several times, once for each head of queries that reads it (Falcon's does).
    """
    copies, rest = divmod(held.numel(), given.numel())
    if rest or not copies or given.shape[-1] % held.shape[-1]:
        return False
    given = given.unflatten(-1, (-1, held.shape[-1])).repeat_interleave(copies, 1).double().cpu()
    held = held.double().cpu()
    if part == "keys":
        given, held = given[0], held[0]
        given = given * ((given * held).sum() / given.square().sum().clamp(min=1e-300))
    return bool(((given - held).abs() <= 8 * torch.finfo(dtype).eps * held.abs().amax()).all())
