"""Models and texts from the hub or from disk: what loads them, where they are placed, and what fits into memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import quant_utils as qu
from quant_utils import UserError
from quant_utils import dtype_name as dtype_of
from simquant import processes
from simquant.notices import is_out_of_memory, notify
from simquant.sites import projections

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORKSPACE = 2**31  # bytes that an evaluation takes besides the weights, at the least


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what a library raises when it cannot load something into a UserError with the library's own words."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"cannot load {what}: {' '.join(str(error).split()) or type(error).__name__}") from error


def load_config_and_tokenizer(name: str):
    """Return (config, tokenizer) of a hub id or a local folder: cheap, so that mistakes show before weights load."""
    from transformers import AutoConfig, AutoTokenizer

    if os.path.isfile(name):
        raise UserError(f"model {name!r} is a file: give the folder that holds it, with its config.json")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise UserError(f"model folder {name!r} has no config.json: give a folder written by save_pretrained")
    if not os.path.isdir(name) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"model {name!r} is neither a folder nor a hub id such as meta-llama/Llama-3-8B")
    with loading(f"model {name!r}"):
        loaders = (AutoConfig, AutoTokenizer)
        config, tokenizer = (loader.from_pretrained(name, trust_remote_code=False) for loader in loaders)
    return config, tokenizer


def single_device(device: str) -> torch.device:
    """Return --device with auto resolved to a single one; each of several processes has its own GPU."""
    kind, _, index = device.partition(":")
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    number, gpus = int(index or processes.index(local=True)), torch.cuda.device_count()
    if number >= gpus or not torch.cuda.is_available():
        seen = f"{gpus} GPU(s), numbered from 0" if gpus else "no GPU"
        raise UserError(f"device cuda:{number} was asked for, but torch {torch.__version__} sees {seen}: try cpu")
    return torch.device("cuda", number)


def choices(flags, config) -> dict[str, Any]:
    """Return {"dtype", "attn_implementation"} with auto resolved; None for transformers' own choice of attention."""
    device, dtype, attention = single_device(flags.device), flags.dtype, flags.attn_implementation
    if dtype == "auto":
        own = str(config.dtype).removeprefix("torch.") if config.dtype else "auto"
        dtype = "float32" if device.type == "cpu" and not weight_quantization(config) else own
    is_half = device.type == "cuda" and dtype in ("float16", "bfloat16")
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if attention == "flash_attention_2" and not (is_half and has_flash):
        needs = "runs in half precision on a GPU only" if has_flash else "needs the package flash-attn"
        raise UserError(f"--attn_implementation flash_attention_2 {needs}: use sdpa")
    if attention == "auto":
        attention = "flash_attention_2" if is_half and has_flash else None
    return {"dtype": dtype, "attn_implementation": attention}


def skeleton(flags, config) -> PreTrainedModel:
    """Return the model that load_model would, with weights that have shapes, but no values and no memory."""
    from transformers import AutoModelForCausalLM

    with loading(f"model {flags.model!r}"), torch.device("meta"):
        how = choices(flags, config)
        how["dtype"] = None if how["dtype"] == "auto" else how["dtype"]
        model = AutoModelForCausalLM.from_config(config, **how)
    return model.eval().requires_grad_(False)


def weight_quantization(config) -> dict:
    """Return how the weights are quantized on disk, as the config says it; {} if they are not."""
    how = getattr(config, "quantization_config", None) or {}
    return how if isinstance(how, dict) else how.to_dict()


def weights_line(config) -> str:
    """Return words on quantized weights for the settings line; "" if they are not."""
    method = weight_quantization(config).get("quant_method")
    return "" if method is None else f", weights quantized by {getattr(method, 'value', method)}"


def weight_bytes(model: PreTrainedModel) -> int:
    """Return what the weights of a skeleton take, as they are quantized, from shapes alone."""
    how, table = weight_quantization(model.config), model.get_input_embeddings().weight
    known = {"load_in_4bit": 4, "load_in_8bit": 8}
    bits = next((width for name, width in known.items() if how.get(name)), how.get("bits"))
    bits = 8 if bits is None and how.get("quant_method") == "fp8" else bits
    whole = sum(parameter.nbytes for parameter in model.parameters())
    if not bits:
        return whole
    packed = [each for each in model.get_decoder().parameters() if each.ndim > 1 and each is not table]
    return whole - int(sum(each.numel() * (each.itemsize - bits / 8) for each in packed))


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be had on device."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return psutil.virtual_memory().available


def placement(flags, config) -> torch.device | str:
    """Return where a model goes: "auto", over all GPUs and host memory, if the first GPU does not hold it."""
    device = single_device(flags.device)
    if flags.device != "auto" or device.type == "cpu" or processes.count() > 1:
        return device
    return device if weight_bytes(skeleton(flags, config)) + WORKSPACE <= free_memory(device) else "auto"


def devices_of(model) -> str:
    """Return "cpu", or "cuda:0, cuda:1"; "disk" and "cpu" beside a GPU say where weights wait that it cannot hold."""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    return ", ".join(dict.fromkeys(f"cuda:{at}" if isinstance(at, int) else str(at) for at in placed.values()))


def load_model(flags, config) -> PreTrainedModel:
    """Return the model in eval mode, where --device, --dtype and --attn_implementation ask for it."""
    from transformers import AutoModelForCausalLM

    with loading(f"model {flags.model!r}"):
        if (place := placement(flags, config)) != "auto" and torch.device(place).type == "cuda":
            torch.cuda.set_device(place)
        how: dict[str, Any] = {"config": config, "device_map": place, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(flags.model, **how, **choices(flags, config))
        model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"model {flags.model!r} lacks {len(missing)} tensors, {missing[0]} first: is the copy complete?"
        )
    if surplus := sorted(found["unexpected_keys"]):
        notify(f"model {flags.model!r} has {len(surplus)} tensors that its config does not name, {surplus[0]} first")
    if place == "auto" and re.search("cpu|disk", devices_of(model)):
        notify(f"model {flags.model!r} is larger than the GPUs: weights wait in host memory or on disk, which is slow")
    return model.eval().requires_grad_(False)


def weights_mark(config) -> str:
    """Return what tells one checkpoint from another: the hub's commit, or sizes and times of a folder's files."""
    if commit := getattr(config, "_commit_hash", None):
        return commit
    files = sorted(file for file in Path(config.name_or_path).glob("*") if file.is_file())
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return sha256(repr(about).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return those of Python and the libraries that the figures depend on."""
    packages = ("torch", "transformers", "datasets", "accelerate", "numpy")
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def environment(model) -> dict:
    """Return what a figure depends on besides the settings: versions, device, dtype."""
    at = qu.input_device(model)
    name = torch.cuda.get_device_name(at) if at.type == "cuda" else "cpu"
    return {"versions": versions(), "device": devices_of(model), "device_name": name, "dtype": dtype_of(model)}


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
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.reset_peak_memory_stats(device)


def evaluate_what_fits(model, sites, windows: Tensor, settings, asked: int | str) -> Iterator[Tensor]:
    """Yield quant_utils.evaluate of windows, with as many of them at a time as memory holds.

    asked is a batch size or "auto": then the first window shows how many fit. What runs out of memory is tried again in
    smaller batches; UserError if a single window does.
    """
    reset_peak_memory()
    done, size, is_probe = 0, 1 if asked == "auto" else int(asked), asked == "auto"
    while done < len(windows):
        try:
            part = windows[done : done + 1] if is_probe else windows[done:]
            for figures in qu.evaluate(model, sites, part, settings, size):
                done += len(figures)
                yield figures
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                advice = "lower --seqlen, choose a smaller --dtype, or give the model more GPUs"
                line = f"one window of seqlen {windows.shape[1]} runs out of memory on {devices_of(model)}: {advice}"
                raise UserError(line) from error
            size = max(1, int(0.9 * size))
            notify(f"out of memory: going on with --batch_size {size}")
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
    raise UserError(f"{place} has {figure}, {where}{qu.advice_on_overflow(model)}")


@torch.inference_mode()
def first_overflow(model, ids: Tensor, setting: qu.Setting) -> str | None:
    """Return the name of the first projection whose output is not finite for window ids [T], if one is."""
    found: list[str] = []

    def look(module: Any, args: tuple, out: Tensor, name: str) -> None:
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
