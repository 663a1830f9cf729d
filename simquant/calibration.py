"""Calibration: record what passes by a model's sites, then fit quantizers to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from quant_utils import Probe, Setting, Site, UserError, dtype_name, hung, input_device, make_taps, progress

Label = TypeVar("Label", bound=Hashable)  # what a setting is called by those who ask for it


def record(model, places: Mapping[Site, bool], windows: Tensor, gradients: bool = False) -> dict[Site, Tensor]:
    """Return {site: [N,T,C]}, what passes by over windows [N,T], in host memory and the model's dtype.

    places tell of each site whether it is where attention reads, after RoPE. With gradients, it is the gradient there
    of each window's total next-token loss (a total, not a mean, so that fp16 does not underflow). No parameter needs
    one: the first site starts the graph. What never comes stays nan.
    """
    blank = torch.tensor(math.nan, dtype=model.dtype)
    seen = {site: blank.repeat(*windows.shape, site.channels) for site in places}

    def keep(site: Site, x: Tensor) -> None:
        """Copy what passes, or its gradient, to host memory."""
        seen[site][number].copy_(x[0])

    def look(site: Site, x: Tensor) -> Tensor:
        """Keep x [1,T,C] now, or its gradient when that comes."""
        if not gradients:
            keep(site, x)
            return x
        x = x if x.requires_grad else x.detach().requires_grad_()
        x.register_hook(functools.partial(keep, site))
        return x

    watched = hung(Probe(site, at_cache, look) for site, at_cache in places.items())
    with torch.inference_mode(not gradients), torch.set_grad_enabled(gradients), watched:
        label = "Fisher information" if gradients else "activations"
        for number, ids in enumerate(progress(label, windows)):  # noqa: B007, keep reads number
            ids = ids[None].to(input_device(model))
            if not gradients:
                model.get_decoder()(input_ids=ids, use_cache=False)
                continue
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            F.cross_entropy(logits.float(), ids[0, 1:].to(logits.device), reduction="sum").backward()
    return seen


def places_of(*settings: Setting) -> dict[Site, bool]:
    """Return {site of any setting: whether its quantizer is where attention reads}."""
    return {site: quantizer.after_rope for setting in settings for site, quantizer in setting.items()}


def advice_on_overflow(model) -> str:
    """Return in which dtype a model gave nan or inf, and what may help."""
    advice = "the model is broken" if model.dtype == torch.float32 else "try --dtype bfloat16 or float32"
    return f"in {dtype_name(model)}: {advice}"


def calibrate(
    model, windows: Tensor, settings: Mapping[Label, Setting], gradients: Mapping | None = None, on_fit: Any = None
) -> dict[Label, Setting]:
    """Return settings with every quantizer fitted to windows [N,T] of text, in model order.

    Activations and gradients wait in host memory and are fitted one site at a time on its own device. gradients are
    recorded here, unless they are given. on_fit(label, site, quantizer, x [N,T,C], given back) hears of each fit.
    """
    places = places_of(*settings.values())
    needing = {
        s: at for s, at in places.items() if any(each[s].needs_gradient for each in settings.values() if s in each)
    }
    activations = record(model, places, windows)
    gradients = record(model, needing, windows, gradients=True) if needing and gradients is None else gradients or {}
    fitted = fit_in_order(model, settings, activations, gradients, on_fit)
    agreed = {label: agree(setting) for label, setting in fitted.items()}
    again = {label: setting for label, setting in agreed.items() if setting is not fitted[label]}
    fitted = {label: setting for label, setting in fitted.items() if label not in again}  # first fits may go
    return fitted | fit_in_order(model, again, activations, gradients, on_fit)


def agree(setting: Setting) -> Setting:
    """Return a fitted setting with what its quantizers decide together; the very same if that is nothing."""
    for cls in dict.fromkeys(type(quantizer) for quantizer in setting.values()):
        setting = cls.agreed(setting)
    return setting


def fit_in_order(
    model, settings: Mapping[Label, Setting], activations: Mapping, gradients: Mapping, on_fit: Any
) -> dict[Label, Setting]:
    """Return settings with every quantizer fitted, in model order, to {site: [N,T,C]}; see calibrate."""
    taps = {label: make_taps(setting) for label, setting in settings.items()}
    for site in places_of(*settings.values()):
        x = activations[site].to(site.device)
        grad = gradients[site].to(x.device) if site in gradients else None
        if not x.isfinite().all():
            raise UserError(f"{site.name} gives nan or inf, or never ran, {advice_on_overflow(model)}")
        if grad is not None and grad.isnan().all():
            raise UserError(f"no gradient comes to {site.name}, maybe for the kind of its weights: leave out --fisher")
        if grad is not None and not grad.isfinite().all():
            raise UserError(f"gradients at {site.name} overflow {advice_on_overflow(model)}")
        for label in (label for label, setting in settings.items() if site in setting):
            tap = taps[label][site.key]
            others = tap.others(x.device)
            tap.quantizer = tap.quantizer.to(x.device).fit(x, grad, others)
            given = tap.quantizer.quantize(x, others)
            tap.remember(given.values)
            if on_fit is not None:
                on_fit(label, site, tap.quantizer, x, given)
    cpu = torch.device("cpu")
    return {label: {tap.site: tap.quantizer.to(cpu) for tap in mine.values()} for label, mine in taps.items()}
