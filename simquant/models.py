"""Models and texts from the hub or from disk: what loads them, where they are placed, and what fits into memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch

import quant_utils as qu
from quant_utils import UserError
from quant_utils import dtype_name as dtype_of
from simquant import checkpoints, processes
from simquant.checkpoints import loading
from simquant.checkpoints import mark as weights_mark  # noqa: F401, for those who load models
from simquant.memory import devices_of, free_memory
from simquant.notices import notify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORKSPACE = 2**31  # bytes that an evaluation takes besides the weights, at the least


def load_config_and_tokenizer(model: str, revision: str | None = None):
    """Return (config, tokenizer) of a hub id or a local folder: cheap, so that mistakes show before weights load."""
    name, revision = checkpoints.source(model, revision)
    checkpoints.check_name(name)
    return checkpoints.load_config(name, revision), checkpoints.load_tokenizer(name, revision)


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
        attention = "flash_attention_2" if is_half and has_flash and not flags.has_window() else None
    return {"dtype": dtype, "attn_implementation": attention}


def skeleton(flags, config) -> PreTrainedModel:
    """Return the model that load_model would, with weights that have shapes, but no values and no memory."""
    loader = checkpoints.language_model(config)
    with loading(f"model {flags.model!r} as its config.json describes it"), torch.device("meta"):
        how = choices(flags, config)
        how["dtype"] = None if how["dtype"] == "auto" else how["dtype"]
        model = loader.from_config(deepcopy(config), **how)
        model.tie_weights()  # transformers 5.0 leaves it to us on this device
    model.config.name_or_path, model.config._commit_hash = config.name_or_path, checkpoints.commit(config)
    return model.eval().requires_grad_(False)


def weight_quantization(config) -> dict:
    """Return how the weights are quantized on disk, as the config says it; {} if they are not."""
    how = getattr(config, "quantization_config", None) or {}
    return how if isinstance(how, dict) else how.to_dict()


def weights_line(config) -> str:
    """Return words on quantized weights, and on an adapter, for the settings line; "" if they are plain."""
    method, applied = weight_quantization(config).get("quant_method"), checkpoints.adapter(config)
    quantized = "" if method is None else f", weights quantized by {getattr(method, 'value', method)}"
    return quantized + (f", with the adapter {applied}" if applied else "")


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


def placement(flags, config) -> torch.device | str:
    """Return where a model goes: "auto", over all GPUs and host memory, if the first GPU does not hold it."""
    device = single_device(flags.device)
    if flags.device != "auto" or device.type == "cpu" or processes.count() > 1:
        return device
    return device if weight_bytes(skeleton(flags, config)) + WORKSPACE <= free_memory(device) else "auto"


def load_model(flags, config) -> PreTrainedModel:
    """Return the model in eval mode, where --device, --dtype and --attn_implementation ask for it."""
    name, revision = checkpoints.source(flags.model, flags.revision)
    revision = checkpoints.commit(config) or revision  # of the config, although a branch may have moved on since
    loader = checkpoints.language_model(config)
    with loading(f"model {name!r}"):
        if (place := placement(flags, config)) != "auto" and torch.device(place).type == "cuda":
            torch.cuda.set_device(place)
        how: dict[str, Any] = {"config": deepcopy(config), "device_map": place, "revision": revision}
        how |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "trust_remote_code": False}
        loaded: Any = loader.from_pretrained(name, **how, **choices(flags, config))
        model, found = loaded
    check_weights(name, found)
    model.config._commit_hash = checkpoints.commit(config)
    if place == "auto" and re.search("cpu|disk", devices_of(model)):
        notify(f"model {name!r} is larger than the GPUs: weights wait in host memory or on disk, which is slow")
    return model.eval().requires_grad_(False)


def check_weights(name: str, found: Mapping[str, Any]) -> None:
    """Raise UserError if tensors are missing or of another shape than the config's, by transformers' loading_info."""
    if other := sorted(found["mismatched_keys"]):
        tensor, has, expected = (other[0][0], *("x".join(map(str, shape)) for shape in other[0][1:]))
        told = f"{tensor} is {has}, and its config.json makes it {expected}"
        raise UserError(f"model {name!r} has {len(other)} tensors of another shape: {told}; are both of one model?")
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"model {name!r} lacks {len(missing)} tensors, {missing[0]} first: is the copy complete?")
    if surplus := sorted(found["unexpected_keys"]):
        notify(f"model {name!r} has {len(surplus)} tensors that its config does not name, {surplus[0]} first")


def versions() -> dict[str, str]:
    """Return those of Python and the libraries that the figures depend on."""
    packages = ("torch", "transformers", "tokenizers", "accelerate", "numpy")
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def environment(model) -> dict:
    """Return what a figure depends on besides the settings: versions, device, dtype."""
    at = qu.input_device(model)
    name = torch.cuda.get_device_name(at) if at.type == "cuda" else "cpu"
    about = {"versions": versions(), "device": devices_of(model), "device_name": name, "dtype": dtype_of(model)}
    return about | {"adapter": checkpoints.adapter(model.config) or None}
