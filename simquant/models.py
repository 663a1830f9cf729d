"""Models and texts from the hub or from disk: what loads them, where they are placed, and what fits into memory."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import quant_utils as qu
from quant_utils import UserError
from quant_utils import dtype_name as dtype_of
from simquant import processes
from simquant.memory import devices_of, free_memory
from simquant.notices import is_out_of_memory, notify

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
        model = AutoModelForCausalLM.from_config(deepcopy(config), **how)
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


def placement(flags, config) -> torch.device | str:
    """Return where a model goes: "auto", over all GPUs and host memory, if the first GPU does not hold it."""
    device = single_device(flags.device)
    if flags.device != "auto" or device.type == "cpu" or processes.count() > 1:
        return device
    return device if weight_bytes(skeleton(flags, config)) + WORKSPACE <= free_memory(device) else "auto"


def load_model(flags, config) -> PreTrainedModel:
    """Return the model in eval mode, where --device, --dtype and --attn_implementation ask for it."""
    from transformers import AutoModelForCausalLM

    with loading(f"model {flags.model!r}"):
        if (place := placement(flags, config)) != "auto" and torch.device(place).type == "cuda":
            torch.cuda.set_device(place)
        how: dict[str, Any] = {"config": deepcopy(config), "device_map": place, "output_loading_info": True}
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
