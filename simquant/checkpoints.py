"""What a hub id or a folder holds, and what is wrong with it: one line with the cure, before weights load."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from quant_utils import UserError
from simquant.notices import is_out_of_memory, notify

MOST = {  # of what is given where a config tells a model's shape: more would run for minutes, and is a mistake
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "depth"), 1000),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim", "n_head"), 100_000),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 1_000_000), "vocab_size": 100_000_000,
}  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CONVERTERS = ("sentencepiece", "protobuf", "tiktoken")  # packages that read a tokenizer.model of one kind or another
LOADERS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "IMAGE_TEXT_TO_TEXT": "AutoModelForImageTextToText",
    "MULTIMODAL_LM": "AutoModelForMultimodalLM",
}


def words_of(error: BaseException) -> str:
    """Return a library's own words, after the name of the error where they alone would say too little."""
    words = " ".join(str(error).split())
    is_plain = isinstance(error, (OSError, EOFError, ValueError, RuntimeError, ImportError, AssertionError)) and words
    return words if is_plain else f"{type(error).__name__} {words}".removeprefix("Exception ").strip()


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what a library raises when it cannot load something into a UserError with the library's own words."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"  # of the tokenizers library, and no Exception
        if is_out_of_memory(error) or not (isinstance(error, Exception) or is_panic):
            raise
        if "trust_remote_code" in str(error):
            line = f"{what} needs its own Python code, which is never run here: give a model that does not"
            raise UserError(line) from error
        raise UserError(f"cannot load {what}: {words_of(error)}") from error


def source(model: str, revision: str | None = None) -> tuple[str, str | None]:
    """Return (hub id or folder, revision) of what --model and --revision say; ID@REVISION says both."""
    has_both = re.search(r".@.", model) and not os.path.exists(model)  # a folder's own name may have an @
    name, _, named = model.partition("@") if has_both else (model, "", "")
    if named and revision not in (None, named):
        raise UserError(f"--revision {revision} and {model!r} are two revisions: give one")
    revision = revision or named or None
    if revision and os.path.exists(name):
        raise UserError(f"--revision {revision}: {name!r} is on disk, and only hub models have revisions: leave it out")
    return name, revision


def held(name: str, file: str, revision: str | None = None) -> str | None:
    """Return the path of a checkpoint's file; None if it has no such file, or the hub cannot be asked."""
    from transformers.utils import cached_file

    kinds = ("gated_repo", "missing_entries", "connection_errors")
    quietly: dict[str, Any] = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    with suppress(OSError, ValueError):  # a name that the hub does not know is told of when its config is read
        return cached_file(name, file, revision=revision, **quietly)
    return None


def files_of(name: str, revision: str | None) -> list[str]:
    """Return the names of a checkpoint's files; [] if they cannot be listed."""
    if os.path.isdir(name):
        return sorted(os.listdir(name))
    from huggingface_hub import list_repo_files

    with suppress(Exception):  # why the hub does not answer is told already
        return sorted(list_repo_files(name, revision=revision))
    return []


def read_json(path: str) -> Any:
    """Return the content of a JSON file; None if it is none."""
    with suppress(OSError, ValueError, RecursionError):
        return json.loads(Path(path).read_bytes())
    return None


def other_kind(name: str, revision: str | None) -> str:
    """Return words on a checkpoint without config.json that is something else, and on what to give instead."""
    files = files_of(name, revision)
    if "adapter_config.json" in files:
        about = read_json(held(name, "adapter_config.json", revision) or "")
        base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
        return f"is a LoRA adapter of {base or 'another model'}: merge it into that first, and give what is saved then"
    if "model_index.json" in files:
        return "is a diffusers pipeline, which predicts no text: give a language model"
    if any(file.endswith(".gguf") for file in files):
        return "holds GGUF files only: give the original checkpoint, with its config.json and .safetensors"
    if "params.json" in files:
        return "holds weights in their publisher's own format: give the checkpoint that is converted for transformers"
    inner = [file for pattern in ("*", "snapshots/*") for file in sorted(Path(name).glob(f"{pattern}/config.json"))]
    if inner:
        return f"has no config.json, but {str(inner[0].parent)!r} has: give that"
    return "has no config.json: give a folder written by save_pretrained"


def check_name(name: str) -> None:
    """Raise UserError unless name is a hub id, or a folder with a config.json that may be read."""
    if name.lower().endswith(".gguf"):
        raise UserError(f"model {name!r} is a GGUF file: give the original checkpoint, a hub id or a folder")
    if os.path.isfile(name):
        raise UserError(f"model {name!r} is a file: give the folder that holds it, with its config.json")
    if not os.path.isdir(name):
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
            raise UserError(f"there is no folder {name!r}, and a hub id looks like meta-llama/Llama-3-8B")
        return
    for path in (name, *map(str, sorted(Path(name).glob("*")) if os.access(name, os.R_OK | os.X_OK) else ())):
        is_needed = path == name or path.endswith((".json", ".safetensors", ".bin", ".model"))
        if is_needed and not os.access(path, os.R_OK | (os.X_OK if path == name else 0)):
            raise UserError(f"model {name!r}: {path!r} cannot be read: check its permissions, and where links lead")
    if not os.path.isfile(os.path.join(name, "config.json")):
        raise UserError(f"model folder {name!r} {other_kind(name, None)}")


def check_fields(name: str, raw: Any, where: str = "") -> None:
    """Raise UserError for what no config.json can mean; raw is its content, or that of its field where."""
    if not isinstance(raw, Mapping):
        raise UserError(f"config.json of model {name!r} is {str(raw)[:40]!r}, and no JSON object")
    for key, value in raw.items():
        said = f"config.json of model {name!r}: {where}{key} is {repr(value)[:40]}"
        if key in ("text_config", "quantization_config") and not isinstance(value, (Mapping, type(None))):
            raise UserError(f"{said}, and no JSON object")
        is_dtype = key in ("dtype", "torch_dtype") and not isinstance(value, (Mapping, type(None)))
        if is_dtype and not isinstance(getattr(torch, str(value).removeprefix("torch."), None), torch.dtype):
            raise UserError(f"{said}, which is no dtype of torch: float16, bfloat16 and float32 are")
        is_size = key in MOST and not isinstance(value, (Mapping, list, type(None)))  # a list has one for each layer
        if is_size and not (type(value) is int and 1 <= value <= MOST[key]):
            raise UserError(f"{said}: a whole number in 1..{MOST[key]} is expected")
        if isinstance(value, Mapping) and key.endswith("config"):
            check_fields(name, value, f"{where}{key}.")


def load_config(name: str, revision: str | None):
    """Return the config of a checkpoint whose text can be predicted. UserError names what is wrong with it."""
    from transformers import AutoConfig, PreTrainedConfig

    known = "" if os.path.isdir(name) else " (there is no such folder, so it is looked for on the hub)"
    try:
        with loading(f"config.json of model {name!r}{known}"):
            check_fields(name, PreTrainedConfig.get_config_dict(name, revision=revision)[0])
            config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
            text = config.get_text_config(decoder=True)
    except UserError:
        if not os.path.isdir(name) and (files := files_of(name, revision)) and "config.json" not in files:
            raise UserError(f"model {name!r} {other_kind(name, revision)}") from None
        raise
    if not isinstance(text, PreTrainedConfig):
        field = next((field for field, value in vars(config).items() if value is text), "text_config")
        raise UserError(f"config.json of model {name!r}: {field} is no config of a {config.model_type} model's text")
    snapshot = re.search(r"snapshots.([0-9a-f]{40}).config\.json$", held(name, "config.json", revision) or "")
    config._commit_hash = snapshot[1] if snapshot else None  # transformers 5.24 does not tell
    config._attn_implementation = None  # --attn_implementation says it, for all parts
    language_model(config)
    if held(name, "adapter_config.json", revision) and not adapter(config):
        notify(f"model {name!r} has an adapter, which is left out: pip install peft, or delete adapter_config.json")
    if held(name, "modules.json", revision):
        raise UserError(f"model {name!r} is a sentence-transformers model, which predicts no text: give its base model")
    return config


def language_model(config):
    """Return the class of transformers that loads the language model of a config. UserError if there is none."""
    import transformers
    from transformers.models.auto import modeling_auto as mappings

    said, kind = f"model {config.name_or_path!r}: {config.model_type}", type(config)
    if config.is_encoder_decoder:
        raise UserError(f"{said} is an encoder and a decoder: give a model of a decoder alone, such as Llama")
    if kind in mappings.MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        raise UserError(f"{said} is an encoder, which has no cache and fills gaps: give a decoder, such as Llama")
    for task, loader in LOADERS.items():
        if kind in getattr(mappings, f"MODEL_FOR_{task}_MAPPING"):
            return getattr(transformers, loader)
    if getattr(config, "auto_map", None):
        raise UserError(f"{said} needs its own Python code, which is never run here: give a model that does not")
    raise UserError(f"{said} has no language model in transformers {transformers.__version__}: give a decoder")


def load_tokenizer(name: str, revision: str | None):
    """Return the tokenizer of a checkpoint. UserError names the file, or the packages, that it lacks."""
    from transformers import AutoTokenizer

    lacks = f"model {name!r} has no tokenizer: put the original's tokenizer.json beside its config.json"
    try:
        with loading(f"the tokenizer of model {name!r} ({', '.join(TOKENIZER_FILES[:2])})"):
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except UserError:
        files = files_of(name, revision)
        for file in (file for file in TOKENIZER_FILES if file in files):
            if not isinstance(read_json(held(name, file, revision) or ""), dict):
                raise UserError(f"{file} of model {name!r} holds no JSON object: is the copy whole?") from None
        if files and not {*files} & {*VOCABULARIES}:
            raise UserError(lacks) from None
        installed = {each.name.lower() for each in importlib.metadata.distributions()}
        packages = [package for package in CONVERTERS if package not in installed]
        if "tokenizer.json" not in files and "tokenizer.model" in files and packages:
            needs = f"its tokenizer.model is read with {', '.join(CONVERTERS)}: pip install {' '.join(packages)}"
            raise UserError(f"model {name!r} has no tokenizer.json, and {needs}") from None
        raise
    own = tokenizer.vocab_files_names.values()  # none for tokenizers of bytes
    if own and not any(held(name, file, revision) for file in dict.fromkeys((*VOCABULARIES, *own))):
        raise UserError(lacks)  # some classes load without a word, and know no words
    return tokenizer


def commit(config) -> str | None:
    """Return the commit of the hub that a config was read from; None for a folder's."""
    return getattr(config, "_commit_hash", None)


def adapter(config) -> str:
    """Return the name of the adapter that transformers applies to a checkpoint's weights; "" if there is none.

    It is applied without a word if the package peft is installed, and left out without a word if not.
    """
    path = held(config.name_or_path, "adapter_config.json", commit(config)) if config.name_or_path else None
    if path is None or importlib.util.find_spec("peft") is None:
        return ""
    about = read_json(path)
    return f"{about.get('peft_type') if isinstance(about, dict) else '?'} (adapter_config.json)"


def mark(config) -> str:
    """Return what tells one checkpoint from another: the hub's commit, or sizes and times of a folder's files."""
    applied = adapter(config)
    if commit(config):
        return f"{commit(config)}{applied}"
    files = sorted(file for file in Path(config.name_or_path).glob("*") if file.is_file())
    about = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return sha256(repr([*about, applied]).encode()).hexdigest()
