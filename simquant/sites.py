"""Where each family of models has its keys and values, and the check against the model's own cache."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quant_utils import Site, UserError, dtype_name, hooked, input_device
from simquant.notices import is_out_of_memory


@dataclass(frozen=True)
class Place:
    """Which module of an attention layer gives its keys or its values last on their way to RoPE and the cache.

    module  its name in the layer
    heads   which axis of its output holds the heads: 2 of [B,T,H,D], 1 of [B,H,T,D]; None: the output is [B,T,C]
    block   which block of C channels of a fused projection's output, counted from its end: -1 or -2; None: all of it
    """

    module: str
    heads: int | None = None
    block: int | None = None


@dataclass(frozen=True)
class PlacedSite(Site):
    """A site whose module gives more than [B,T,C], or gives it in another shape."""

    place: Place = field(compare=False)

    def given_by(self) -> str:
        """Return words on the module: k_norm, or qkv_proj, block -2."""
        return self.place.module + ("" if self.place.block is None else f", block {self.place.block}")

    def read(self, out: Tensor) -> Tensor:
        """See Site."""
        heads, block = self.place.heads, self.place.block
        out = out.transpose(1, 2) if heads == 1 else out
        out = out if heads is None else out.flatten(2)
        return out if block is None else out.narrow(-1, out.shape[-1] + block * self.channels, self.channels)

    def write(self, out: Tensor, x: Tensor) -> Tensor:
        """See Site."""
        heads, block = self.place.heads, self.place.block
        if block is not None:
            start = out.shape[-1] + block * self.channels
            return torch.cat([out[..., :start], x, out[..., start + self.channels :]], dim=-1)
        x = x if heads is None else x.unflatten(2, (-1, out.shape[-1]))
        return x.transpose(1, 2) if heads == 1 else x


# Families, by the model_type of their config, whose keys and values are not just the outputs of k_proj and v_proj. One
# more is one line here: check_against_cache and tests/test_sites.py see whether it is right.
FUSED = {"keys": Place("qkv_proj", block=-2), "values": Place("qkv_proj", block=-1)}
FAMILIES: dict[str, dict[str, Place]] = {
    "apertus": {"keys": Place("k_norm", heads=1)},
    "cohere": {"keys": Place("k_norm", heads=2)},
    "exaone4": {"keys": Place("k_norm", heads=1)},
    "flex_olmo": {"keys": Place("k_norm")},
    "gemma3_text": {"keys": Place("k_norm", heads=1)},
    "glm4_moe": {"keys": Place("k_norm", heads=2)},
    "gpt2": {part: replace(place, module="c_attn") for part, place in FUSED.items()},
    "minimax_m2": {"keys": Place("k_norm")},
    "olmo2": {"keys": Place("k_norm")},
    "olmo3": {"keys": Place("k_norm")},
    "olmoe": {"keys": Place("k_norm")},
    "phi": {"keys": Place("k_layernorm", heads=1)},
    "phi3": FUSED,
    "qwen3": {"keys": Place("k_norm", heads=2)},
    "qwen3_moe": {"keys": Place("k_norm", heads=2)},
    "stablelm": {"keys": Place("k_layernorm", heads=1)},
}
USUAL = {"keys": Place("k_proj"), "values": Place("v_proj")}
NORMS = {"keys": r"(q?k|key)_(layer_?)?norm", "values": r"v(alue)?_norm"}  # names of norms behind a projection


def projections(model) -> dict[str, nn.Module]:
    """Return {name: module} of what multiplies in the decoder, in model order: what has a 2-d weight or packs one."""
    decoder, found = set(model.get_decoder().modules()), {}
    for name, module in model.named_modules():
        is_matrix = getattr(getattr(module, "weight", None), "ndim", 0) == 2 or hasattr(module, "out_features")
        if is_matrix and module in decoder and not isinstance(module, nn.Embedding):
            found[name] = module
    return found


def attention_layers(model) -> Iterator[tuple[str, nn.Module, dict[str, Place]]]:
    """Yield (name, module, where its keys and values are) of every layer with known projections, in model order."""
    places = USUAL | FAMILIES.get(model.get_decoder().config.model_type, {})
    decoder = set(model.get_decoder().modules())
    for name, module in model.named_modules():
        here = {part: place if hasattr(module, place.module) else USUAL[part] for part, place in places.items()}
        if module in decoder and all(hasattr(module, place.module) for place in here.values()):
            yield name, module, here  # a norm may be there in some models of the family only


def channels_of(attention: nn.Module, projection: str, config) -> int:
    """Return C of an attention layer (quantized weights are packed, so their shape does not tell)."""
    module: Any = getattr(attention, projection, None)
    if module is not None:
        return getattr(module, "out_features", None) or module.weight.shape[-1]
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def windows_of(config) -> list[int | None]:
    """Return how many tokens each layer's cache holds at most; None: all. A config that tells of no layers gives []."""
    with contextlib.suppress(AttributeError, TypeError, ValueError, LookupError):
        return [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    return []


def find_sites(model, context: int = 1) -> list[PlacedSite]:
    """Return all that model caches and we know of, when it holds context tokens: keys and values, in model order."""
    config = model.get_decoder().config
    windows = dict(enumerate(windows_of(config)))
    sites: list[PlacedSite] = []
    for layer, (name, attention, places) in enumerate(attention_layers(model)):
        for part, place in places.items():
            projection = USUAL[part].module
            channels = channels_of(attention, projection, config)
            module = getattr(attention, place.module)
            at = getattr(attention, "layer_idx", None)
            at = layer if at is None else at
            tokens = min(windows.get(at) or context, context)
            sites.append(PlacedSite(at, part, f"{name}.{projection}", module, channels, place, tokens=tokens))
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
    if getattr(model.get_decoder().config, "clip_qkv", None):
        raise UserError(f"{kind} clips keys and values behind the projections (clip_qkv): not supported yet")
    for _, attention, places in attention_layers(model):
        for part, place in places.items():
            for child, _ in attention.named_children():
                if re.fullmatch(NORMS[part], child) and child != place.module:
                    raise UserError(f"{kind} normalizes its {part} ({child}): this family is not supported yet")


@torch.inference_mode()
def check_against_cache(model, sites: Sequence[Site]) -> None:
    """Raise UserError unless sites give what the model's own cache holds, on a few tokens.

    Values are compared as they are; keys at the first position, where RoPE turns nothing, but may scale.
    """
    kind, seen = type(model).__name__, dict[Site, Tensor]()

    def watch(module: Any, args: tuple, out: Tensor, site: Site) -> None:
        seen[site] = site.read(out)[0].clone()

    ids = torch.arange(5, 9, device=input_device(model))[None]  # padding, embedded as zeros, tends to come before
    ids %= model.config.get_text_config().vocab_size
    with hooked((site.module, partial(watch, site=site)) for site in sites):
        try:
            output = model.get_decoder()(input_ids=ids, use_cache=True)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200]
            where = f"{dtype_name(model)} on {model.device}"
            raise UserError(f"{kind} does not run in {where}: {reason}; try another --dtype") from error
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    for site in sites:
        held = getattr(layers[site.layer], site.part, None) if site.layer < len(layers) else None
        if site in seen and not seen[site].isfinite().all():
            continue  # that it is broken shows when it is measured
        if site not in seen or held is None:
            raise UserError(f"{kind} caches nothing at {site.name}: this family is not supported yet")
        if not is_same(site.part, seen[site], held[0].transpose(0, 1).flatten(1), model.dtype):
            raise UserError(f"{kind} caches other {site.part} than {site.name} gives: this family is not supported yet")


def is_same(part: str, given: Tensor, held: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a site's [T,C] agree with the cache's: values as they are, keys at the first position, scaled."""
    if given.shape != held.shape:
        return False
    given, held = given.double().cpu(), held.double().cpu()
    if part == "keys":
        given, held = given[0], held[0]
        given = given * ((given * held).sum() / given.square().sum().clamp(min=1e-300))
    return bool(((given - held).abs() <= 8 * torch.finfo(dtype).eps * held.abs().amax()).all())
