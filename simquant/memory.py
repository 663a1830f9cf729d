"""What fits into memory: batches, activations, gradients; and what is said when numbers overflow."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor

import quant_utils as qu
from quant_utils import UserError
from simquant import calibration
from simquant.notices import is_out_of_memory, notify
from simquant.sites import projections


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be had on device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return psutil.virtual_memory().available


def devices_of(model) -> str:
    """Return "cpu", or "cuda:0, cuda:1"; "disk" and "cpu" beside a GPU say where weights wait that it cannot hold."""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    return ", ".join(dict.fromkeys(f"cuda:{at}" if isinstance(at, int) else str(at) for at in placed.values()))


@contextmanager
def checkpointing_if_short(model, tokens: int) -> Iterator[bool]:
    """Let decoder layers recompute their activations for the backward pass, inside the block, if memory is short.

    An estimate decides: the activations that a layer saves, 12 times its width and 4 times that of its MLP a token,
    and the logits with their gradient in fp32.
    """
    config = model.config.get_text_config()
    width = 12 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    need = tokens * (config.num_hidden_layers * width * model.dtype.itemsize + 8 * config.vocab_size)
    short = need > free_memory(qu.input_device(model)) / 2
    layers = [module for module in model.modules() if short and hasattr(module, "gradient_checkpointing")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a new name that older releases of transformers 5 lack
        if short:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            with suppress(AttributeError):  # it lets embeddings require gradients; our first site starts the graph
                model.disable_input_require_grads()
        for layer in layers:
            layer.training = True  # the layer alone: checkpointing asks for it, while dropout inside stays off
        try:
            yield short
        finally:
            for layer in layers:
                layer.training = False
            if short:
                model.gradient_checkpointing_disable()


def batch_size_for_memory(model) -> int:
    """Return how many windows fit, by the most memory that one took since reset_peak_memory: 1 on a CPU."""
    fits = []
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        took = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        fits.append(int(0.9 * free_memory(device) / max(took, 1)))
    return max(1, min(fits, default=1))


def reset_peak_memory() -> None:
    """Let batch_size_for_memory see what comes from here on."""
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        torch.cuda.reset_peak_memory_stats(device)


def evaluate_what_fits(model, sites, windows: Tensor, settings, asked: int | str) -> Iterator[qu.Measured]:
    """Yield quant_utils.evaluate of windows, with as many of them at a time as memory holds.

    asked is a batch size or "auto": then the first window shows how many fit. What runs out of memory is tried again in
    smaller batches, then without inputs of layers that are stored; UserError if a single window does even so.
    """
    reset_peak_memory()
    done, size, is_probe, said = 0, 1 if asked == "auto" else int(asked), asked == "auto", asked
    while done < len(windows):
        try:
            part = windows[done : done + 1] if is_probe else windows[done:]
            for measured in qu.evaluate(model, sites, part, settings, size):
                if asked != "auto" and size != said:
                    notify(f"--batch_size {said} runs out of memory: going on with {size}")
                    said = size
                done += len(measured.figures)
                yield measured
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1 and "run_body" in qu.FASTER:
                del qu.FASTER["run_body"]  # what simquant/prefixes.py stores for it is freed
                notify(
                    "memory is too short to store inputs of layers: from here on every row starts at the first layer"
                )
                continue
            if size == 1:
                advice = "lower --seqlen, choose a smaller --dtype, or give the model more GPUs"
                line = f"one window of seqlen {windows.shape[1]} runs out of memory on {devices_of(model)}: {advice}"
                raise UserError(line) from error
            size = int(0.9 * size)
        else:
            size, is_probe = batch_size_for_memory(model) if is_probe else size, False


def check_figures(model, run, dataset: str, settings, first: int, figures: Tensor) -> None:
    """Raise UserError for the first window whose loss or KL is no number in figures [B,S,F], windows from first on."""
    loss, divergence = figures[..., 0], figures[..., 1] if run.is_paired else torch.zeros_like(figures[..., 0])
    bad = ~((loss < 690) & divergence.isfinite())  # nan is not less
    if not bad.any():
        return
    window, column = bad.nonzero()[0].tolist()
    number, figure = first + window, f"loss {loss[window, column]:g}"
    figure += f", KL divergence {divergence[window, column]:g}" if run.is_paired else ""
    source = first_overflow(model, run.texts[dataset][number], settings[column])
    where = f"{source} overflows first " if source else ""
    place = f"{dataset}, {run.rows[column]}: window {number + 1} of {len(run.texts[dataset])}"
    raise UserError(f"{place} has {figure}, {where}{calibration.advice_on_overflow(model)}")


@torch.inference_mode()
def first_overflow(model, ids: Tensor, setting: qu.Setting) -> str | None:
    """Return the name of the first projection whose output is not finite for window ids [T], if one is."""
    found: list[str] = []

    def look(module: Any, args: tuple, out: Tensor, name: str) -> None:
        """Note the name of the first module whose output is not finite."""
        if not found and not out.isfinite().all():
            found.append(name)

    watched = [(module, partial(look, name=name)) for name, module in projections(model).items()]
    with torch.compiler.set_stance("force_eager"), qu.quantized(qu.on_device(setting)), qu.hooked(watched):
        model.get_decoder()(input_ids=ids[None].to(qu.input_device(model)), use_cache=False)
    return found[0] if found else None


def check_host_memory(windows: Tensor, settings: Mapping[Any, qu.Setting], dtype: torch.dtype) -> None:
    """Raise UserError if the activations of a calibration, and its gradients, do not fit into host memory."""
    needs = {site: 1 for setting in settings.values() for site in setting}
    needs |= {site: 2 for setting in settings.values() for site, q in setting.items() if q.needs_gradient}
    need = windows.numel() * dtype.itemsize * sum(site.channels * times for site, times in needs.items())
    if need > (free := free_memory(torch.device("cpu"))):
        has = f"{free / 2**30:.1f} GiB are free: lower --nsamples (now {len(windows)}) or --seqlen"
        raise UserError(f"calibration activations take {need / 2**30:.1f} GiB of host memory, but {has}")


def warn_of_few_tokens(windows: Tensor, settings: Mapping[Any, qu.Setting]) -> None:
    """Say so if a transform of C channels is to be fitted to fewer than 4 C tokens."""
    sharing = [site.channels for setting in settings.values() for site, each in setting.items() if each.shares_bits]
    if windows.numel() < 4 * max(sharing, default=0):
        wanted = f"a transform of {max(sharing)} channels wants at least {4 * max(sharing)}; raise --nsamples"
        notify(f"{windows.numel()} calibration tokens are few: {wanted}")
