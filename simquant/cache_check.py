"""Whether a model is supported: its sites against its own cache, on a few tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from quant_utils import (
    Probe,
    Setting,
    Site,
    UserError,
    dtype_name,
    hooked,
    hung,
    input_device,
    make_taps,
    on_device,
)
from simquant.notices import is_out_of_memory
from simquant.sites import PlacedSite, attention_layers, projections


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


def few_tokens(model, sites: Sequence[Site]) -> Tensor:
    """Return ids [1,T], T small and dividing no C, so that their axis cannot be taken for one of heads."""
    tokens = next(count for count in range(4, 99) if all(site.channels % count for site in sites))
    ids = torch.arange(5, 5 + tokens, device=input_device(model))[None]  # padding, embedded as zeros, comes before
    return ids % model.config.get_text_config().vocab_size


@torch.inference_mode()
def run_once(model, sites: Sequence[PlacedSite]) -> tuple[dict[Site, Tensor], set[Site], Sequence]:
    """Return ({site: [T,C] that it gives}, sites with something between projection and norm, the cache's layers)."""
    given, came, changed = dict[Site, Tensor](), dict[nn.Module, Tensor](), set[Site]()

    def watch(module: Any, args: tuple, out: Tensor, site: PlacedSite) -> None:
        """Keep what a site gives, and note whether its norm got something else than the projection gave."""
        given[site] = site.read(out)[0].clone()
        before = came.get(site.projection)
        if module is not site.projection and before is not None and not torch.equal(site.read(args[0]), before):
            changed.add(site)

    def remember(module: Any, args: tuple, out: Tensor) -> None:
        """Keep what a projection gives."""
        came[module] = out

    ids = few_tokens(model, sites)
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


@torch.inference_mode()
def check_attention(model, settings: Iterable[Setting]) -> None:
    """Raise UserError unless attention reads what the cache holds, at each site where a setting quantizes that.

    Keys that are quantized before RoPE and have a residual window double the heads, which not every family lets happen.
    """
    taps = [tap for setting in settings for tap in make_taps(on_device(setting)).values()]
    if read := {tap.site for tap in taps if tap.at_cache}:
        check_readers(model, list(read))
    for site, tap in {tap.site: tap for tap in taps if tap.window and not tap.at_cache}.items():
        try:
            with hung([Probe(site, False, lambda site, x: x, tap.window)]):  # its quantizer may not be fitted yet
                model.get_decoder()(input_ids=few_tokens(model, [site]), use_cache=False)
        except RuntimeError as error:
            raise UserError(f"{type(model).__name__}: --recent does not go with its keys before RoPE") from error


def check_readers(model, sites: Sequence[Site]) -> None:
    """Raise UserError unless attention reads, at every site, what the cache holds."""
    kind, seen = type(model).__name__, dict[Site, list[Tensor]]()

    def look(site: Site, x: Tensor) -> Tensor:
        """Keep what an attention layer reads."""
        seen.setdefault(site, []).append(x[0])
        return x

    with hung(Probe(site, True, look) for site in sites):
        output = model.get_decoder()(input_ids=few_tokens(model, sites), use_cache=True)
    layers = next(each.layers for each in output.values() if hasattr(each, "layers"))
    for site in sites:
        if len(seen.get(site, ())) != len(site.readers):
            reason = "does not attend through transformers' AttentionInterface"
            raise UserError(f"{kind} {reason}: its cache can be quantized before RoPE only")
        held = getattr(layers[site.layer], site.part)[0].transpose(0, 1)
        if held.shape[-1] != site.head_dim or any(not torch.equal(x, held.flatten(1)) for x in seen[site]):
            raise UserError(
                f"{kind} attends to other {site.part} than it caches: they can be quantized before RoPE only"
            )
