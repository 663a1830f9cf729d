"""Simulated KV-cache quantization for Llama-style models: what the two scripts share.

Follow one tensor from top to bottom; the file is written in this order:

    h ── k_proj ── y [B,T,C] ── hook ── fake_quantize
                                          ├ sinks         y[:, :n] passes through untouched
                                          ├ outlier_mask  bool [B,T,C], entries that stay exact
                                          ├ inlier_range  lo, hi (over T for keys, over C for values)
                                          ├ snap          normalize → nearest level → stretch back
                                          └ where(keep, y, ŷ), in y's dtype ── RoPE ── attention ── logits ── NLL

Every KV quantizer is three independent choices, and each published variant is a point in that grid:

    which entries stay in full precision   outliers (dense-and-sparse), attention-sink tokens
    which range the codebook stretches to  dynamic: that of this window, per channel or per token
    which levels lie inside [-1, 1]        uniform, NormalFloat

Shapes: B batch, T tokens of a window, C = kv_heads * head_dim, L = 2**bits levels.
Nothing is packed and no memory is saved: this measures the error of a quantized cache, not its speed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import random
import re
import sys
import tempfile
import time
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PER_CHANNEL, PER_TOKEN = -2, -1  # the axis of [B,T,C] that one range is shared along
UNQUANTIZED = 16  # --abits of the baseline

# ----------------------------------------------------------------------------------------------------------------------
# 1. Configuration: decided once, validated on construction, never mutated


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: it quotes the value and says what would be right."""


@dataclass(frozen=True)
class QuantSpec:
    """How one projection's output is quantized.

    axis                PER_CHANNEL or PER_TOKEN
    bits                2..8
    nf                  NormalFloat levels instead of uniform ones
    include_sparse      keep outliers exact (dense-and-sparse, KVQuant, arXiv:2401.18079, section 3.4)
    sparsity_threshold  p in (0, 1]: the entries beyond the quantiles (1-p)/2 and 1-(1-p)/2 are outliers
    first_few_fp16      leading tokens of every window kept exact (attention sinks); -1 or 0 for none
    """

    axis: int
    bits: int = 4
    nf: bool = False
    include_sparse: bool = False
    sparsity_threshold: float = 0.99
    first_few_fp16: int = -1

    def __post_init__(self):
        if self.axis not in (PER_CHANNEL, PER_TOKEN):
            raise ValueError(f"axis must be PER_CHANNEL ({PER_CHANNEL}) or PER_TOKEN ({PER_TOKEN}), got {self.axis}")
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits must be in 2..8, got {self.bits}")
        if not 0 < self.sparsity_threshold <= 1:
            raise UserError(f"sparsity_threshold must be in (0, 1], got {self.sparsity_threshold:g}: 0.99 keeps 1 %")
        if self.first_few_fp16 < -1:
            raise UserError(f"first_few_fp16 must be -1 (none) or a number of tokens, got {self.first_few_fp16}")

    @property
    def sink_tokens(self) -> int:
        return max(0, self.first_few_fp16)

    def __str__(self) -> str:
        scale = "channel" if self.axis == PER_CHANNEL else "token"
        parts = [f"{self.bits}-bit {'NormalFloat' if self.nf else 'uniform'} per {scale}"]
        if self.include_sparse:
            parts.append(f"outliers beyond {self.sparsity_threshold:g} exact")
        if self.sink_tokens:
            parts.append(f"first {self.sink_tokens} token{'s' * (self.sink_tokens > 1)} exact")
        return ", ".join(parts)


@dataclass(frozen=True)
class EvalSpec:
    """Which texts are measured, in which windows.

    datasets    names in DATASETS, or paths to .txt, .jsonl or .parquet files (column `text`)
    seqlen      tokens a window
    limit       at most this many windows of each text
    batch_size  windows a forward pass
    """

    datasets: tuple[str, ...] = ("wikitext2",)
    seqlen: int = 2048
    limit: int = 512
    batch_size: int = 1

    def __post_init__(self):
        for name, least in (("seqlen", 2), ("limit", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in self.datasets:
            check_dataset_name(name)
        if repeated := {name for name in self.datasets if self.datasets.count(name) > 1}:
            raise UserError(f"datasets names {', '.join(sorted(repeated))} more than once")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded; `auto` is resolved by load_model.

    dtype                auto: the checkpoint's own on a GPU, float32 on a CPU
    device               auto: the first GPU if there is one, else the CPU
    attn_implementation  auto: flash_attention_2 if installed and in half precision on a GPU, else sdpa
    """

    name: str
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "auto"

    def __post_init__(self):
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.device.startswith("cuda") and int(self.device.partition(":")[2] or 0) >= gpus:
            seen = f"{gpus} GPU(s), numbered from 0" if gpus else "no GPU"
            raise UserError(f"device {self.device} was asked for, but torch {torch.__version__} sees {seen}: try cpu")
        if self.attn_implementation == "flash_attention_2":
            if importlib.util.find_spec("flash_attn") is None:
                raise UserError(
                    "attn_implementation flash_attention_2 needs flash-attn (see README): install it, or use sdpa"
                )
            if self.torch_device.type != "cuda" or self.dtype == "float32":
                raise UserError("attn_implementation flash_attention_2 runs in half precision on a GPU only: use sdpa")

    @property
    def torch_device(self) -> torch.device:
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Codebooks: the levels inside [-1, 1]


@dataclass(frozen=True)
class Codebook:
    """Sorted levels [L] to search, and the values [L] that they decode to."""

    encode: Tensor
    decode: Tensor

    @classmethod
    def of(cls, levels: Tensor) -> Codebook:
        return cls(levels, levels)

    def to(self, device: torch.device) -> Codebook:
        return Codebook(self.encode.to(device), self.decode.to(device))


def uniform_levels(bits: int) -> Tensor:
    """[L] evenly spaced levels, both ends included: integer quantization is the plainest codebook."""
    return torch.linspace(-1, 1, 2**bits)


def normal_float_levels(bits: int) -> Tensor:
    """[L] quantiles of the normal distribution scaled to [-1, 1], with an exact zero (QLoRA, arXiv:2306.06965).

    The negative half has one level fewer; the outermost quantile is QLoRA's, the mean of 1/32 and 1/30, halved.
    """
    half, tail = 2 ** (bits - 1), 0.5 * (1 / 32 + 1 / 30)
    negative = torch.special.ndtri(torch.linspace(tail, 0.5, half))  # [L/2], ends in 0
    positive = torch.special.ndtri(torch.linspace(0.5, 1 - tail, half + 1))[1:]  # [L/2]
    return torch.cat([negative / -negative[0], positive / positive[-1]])


def data_free_codebook(spec: QuantSpec) -> Codebook:
    """The codebook that spec names, where it needs no data."""
    return Codebook.of(normal_float_levels(spec.bits) if spec.nf else uniform_levels(spec.bits))


# ----------------------------------------------------------------------------------------------------------------------
# 3. The math: tensors in, tensors out, no model in sight


def nearest_level(unit: Tensor, levels: Tensor) -> Tensor:
    """Index [...] of the level in sorted levels [L] nearest to each element of unit [...]; a tie takes the lower."""
    return torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)


def tail_quantiles(x: Tensor, threshold: float, axis: int) -> tuple[Tensor, Tensor]:
    """(lower, upper) quantiles (1-p)/2 and 1-(1-p)/2 of x along axis, p = threshold; axis is reduced to size 1.

    Linear interpolation between order statistics, as torch.quantile. Only the tails are ordered, so for a threshold
    near 1 this is some twenty times faster on a CPU, and the rank is computed in double precision.
    """
    size = x.shape[axis]
    rank = (1 - threshold) / 2 * (size - 1)  # from either end, 0 being the extreme
    below = math.floor(rank)
    ends = []
    for largest in (False, True):
        tail = x.topk(min(below + 2, size), dim=axis, largest=largest).values  # extreme first
        near, far = tail.select(axis, below), tail.select(axis, -1)
        ends.append(torch.lerp(near, far, rank - below).unsqueeze(axis))
    return ends[0], ends[1]


def outlier_mask(x: Tensor, spec: QuantSpec) -> Tensor:
    """Bool [B,T,C]: the entries of x [B,T,C] at or beyond the tail quantiles along axis, if spec is sparse."""
    if not spec.include_sparse:
        return torch.zeros_like(x, dtype=torch.bool)
    lower, upper = tail_quantiles(x, spec.sparsity_threshold, spec.axis)
    return (x <= lower) | (x >= upper)


def inlier_range(x: Tensor, keep: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """(lo, hi): least and greatest entry of x that keep leaves out, axis reduced to size 1; (inf, -inf) if none is."""
    lo = x.masked_fill(keep, math.inf).amin(axis, keepdim=True)
    hi = x.masked_fill(keep, -math.inf).amax(axis, keepdim=True)
    return lo, hi


def snap(x: Tensor, lo: Tensor, hi: Tensor, codebook: Codebook) -> Tensor:
    """x rounded to the nearest level of codebook, stretched from [-1, 1] over [lo, hi] (both broadcast to x).

    lerp hits both ends exactly, and lo == hi gives lo whatever the index, so an empty range needs no special case.
    """
    unit = (x - lo) / (hi - lo) * 2 - 1
    return torch.lerp(lo, hi, (codebook.decode[nearest_level(unit, codebook.encode)] + 1) / 2)


def fake_quantize(x: Tensor, spec: QuantSpec, codebook: Codebook) -> Tensor:
    """x [B,T,C] quantized and dequantized with a dynamic range: the same shape and dtype, arithmetic in fp32.

    Sink tokens take no part: they come back as they are, and neither quantiles nor ranges see them.
    """
    if x.ndim != 3:
        raise ValueError(f"fake_quantize takes [batch, tokens, channels], got a tensor of shape {tuple(x.shape)}")
    sinks, body = x[:, : spec.sink_tokens], x[:, spec.sink_tokens :]
    if body.numel() == 0:
        return x
    y = body.float()
    keep = outlier_mask(y, spec)
    lo, hi = inlier_range(y, keep, spec.axis)
    snapped = snap(y, lo, hi, codebook).to(x.dtype)
    return torch.cat([sinks, torch.where(keep, body, snapped)], dim=1)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Hooks: the only section that touches the model

# projection → how its output is quantized: {"k_proj": ..., "v_proj": ...}; {} for none
KVSpec = Mapping[str, QuantSpec]


def projection_names(model: nn.Module) -> list[str]:
    """Last name part of every projection (a module with a 2-d weight that is no embedding), each once, in order."""
    names = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding):
            names[name.rpartition(".")[2]] = None
    return list(names)


def find_sites(model: nn.Module, specs: KVSpec) -> dict[str, nn.Module]:
    """{"model.layers.0.self_attn.k_proj": Linear, ...}: every projection that specs names, in model order.

    Raises UserError if a name matches nothing, or if the layer normalizes the keys after the projection (k_norm):
    such a model caches the normalized keys, so the projection's output would be the wrong place.
    """
    sites = {name: m for name, m in model.named_modules() if name.rpartition(".")[2] in specs}
    missing = set(specs) - {name.rpartition(".")[2] for name in sites}
    if missing:
        has = ", ".join(projection_names(model)) or "none"
        raise UserError(f"{type(model).__name__} has no projection {', '.join(sorted(missing))}; it has: {has}")
    for name in sites:
        parent, _, leaf = name.rpartition(".")
        if leaf == "k_proj" and hasattr(model.get_submodule(parent), "k_norm"):
            raise UserError(f"{type(model).__name__} normalizes keys after k_proj (k_norm); that is not supported yet")
    return sites


def execution_device(module: nn.Module) -> torch.device:
    """Where module computes: accelerate's word for an offloaded module, whose weights lie on the meta device."""
    hook = getattr(module, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or module.weight.device)


@contextmanager
def hooked(sites: Mapping[str, nn.Module], transform: Callable[[str], Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Inside the block each site's output passes through transform(name); the hooks go whatever happens inside."""
    handles = []
    try:
        for name, module in sites.items():
            function = transform(name)
            handles.append(module.register_forward_hook(lambda module, args, out, function=function: function(out)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def simulate_quantization(model: nn.Module, specs: KVSpec):
    """Context manager: inside it, model attends to the keys and values that a quantized cache would give back."""
    sites = find_sites(model, specs)

    def transform(name: str) -> Callable[[Tensor], Tensor]:
        spec = specs[name.rpartition(".")[2]]
        return partial(fake_quantize, spec=spec, codebook=data_free_codebook(spec).to(execution_device(sites[name])))

    return hooked(sites, transform)


# ----------------------------------------------------------------------------------------------------------------------
# 6. Model and text (5, calibration, comes with the calibrated script)

DATASETS = {
    "wikitext2": "WikiText-2 raw test, joined by blank lines, in disjoint windows",
    "c4": "C4 validation shard 0, one random window from each of up to 256 random documents (GPTQ protocol)",
}
TEXT_FILES = (".txt", ".jsonl", ".parquet")


def check_dataset_name(name: str) -> None:
    """Raise UserError unless name is in DATASETS or is a readable text file of a known kind."""
    if name in DATASETS:
        return
    if not name.endswith(TEXT_FILES):
        known = ", ".join(DATASETS)
        raise UserError(f"unknown dataset {name!r}: give {known}, or a path that ends in {', '.join(TEXT_FILES)}")
    if not Path(name).is_file():
        raise UserError(f"text file {name!r} does not exist")
    if not os.access(name, os.R_OK):
        raise UserError(f"text file {name!r} cannot be read: check its permissions")


@contextmanager
def one_line_errors(what: str) -> Iterator[None]:
    """Turn whatever a loader raises into one UserError that says what to do about it."""
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain, link = [], error
        while link is not None:
            chain.append(link)
            link = link.__cause__ or link.__context__

        def caused_by(*kinds: type) -> bool:
            return any(isinstance(link, kinds) for link in chain)

        if caused_by(GatedRepoError):
            advice = "it is gated: accept its licence on its hub page, then log in with `hf auth login`"
        elif caused_by(LocalEntryNotFoundError, ConnectionError, TimeoutError):
            advice = "the hub cannot be reached and no copy is cached: check the network, or give a local path"
        elif caused_by(RepositoryNotFoundError):
            advice = (
                "no such repository on the hub: check the spelling, or log in with `hf auth login` if it is private"
            )
        else:
            advice = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        raise UserError(f"cannot load {what}: {advice}") from error


def quiet_libraries() -> None:
    """Silence the loaders' own chatter: stderr carries our progress and warnings only."""
    import datasets
    import huggingface_hub.utils.logging
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()


def load_config_and_tokenizer(name: str):
    """(config, tokenizer) of a hub id or a local folder. Cheap, so that mistakes show before any weights load."""
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"model folder {name!r} has no config.json: give a folder written by save_pretrained")
    if not folder.is_dir() and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise UserError(f"model {name!r} is neither a folder nor a hub id such as meta-llama/Llama-3-8B")
    with one_line_errors(f"model {name!r}"):
        return AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def load_model(spec: ModelSpec, config) -> nn.Module:
    """The model on its device, in eval mode, every `auto` of spec resolved (see ModelSpec)."""
    from transformers import AutoModelForCausalLM

    device = spec.torch_device
    dtype = spec.dtype
    if dtype == "auto" and device.type == "cpu":
        dtype = "float32"
    half = dtype in ("float16", "bfloat16") or (dtype == "auto" and config.dtype in (torch.float16, torch.bfloat16))
    attention = spec.attn_implementation
    if attention == "auto":
        flash = device.type == "cuda" and half and importlib.util.find_spec("flash_attn") is not None
        attention = "flash_attention_2" if flash else "sdpa"
    with one_line_errors(f"model {spec.name!r}"):
        model = AutoModelForCausalLM.from_pretrained(
            spec.name, config=config, dtype=dtype, device_map=device, attn_implementation=attention
        )
    return model.eval()


def read_text_file(path: str) -> list[str]:
    """The documents of a text file: a .txt is one, a .jsonl or .parquet has one a row in column `text`."""
    if path.endswith(".parquet"):
        from datasets import Dataset

        with one_line_errors(f"text file {path!r}"):
            rows = Dataset.from_parquet(path, keep_in_memory=True)
        if "text" not in rows.column_names:
            raise UserError(f"text file {path!r} has no column `text`; its columns are: {', '.join(rows.column_names)}")
        return rows[:]["text"]
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"text file {path!r} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv") from error
    if path.endswith(".txt"):
        return [text]
    return [jsonl_text(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def jsonl_text(path: str, number: int, line: str) -> str:
    """The string under `text` in one line of a .jsonl file."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(
            f"text file {path!r}, line {number} is not JSON: {error.msg} at column {error.colno}"
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise UserError(f'text file {path!r}, line {number} is not an object with a string under "text"')
    return row["text"]


def load_documents(name: str) -> list[str]:
    """The evaluation documents of a dataset in DATASETS, or of a text file."""
    if name not in DATASETS:
        return read_text_file(name)
    from datasets import load_dataset

    with one_line_errors(f"dataset {name!r}"):
        if name == "wikitext2":
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
        else:
            shard = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
            rows = load_dataset("allenai/c4", data_files=shard, split="validation")
    return rows[:]["text"]


def tokenize(tokenizer, text: str) -> Tensor:
    """[N] ids of text, tokenized once with the tokenizer's own special tokens: BOS stands at the very start only."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def disjoint_windows(ids: Tensor, seqlen: int) -> Tensor:
    """[N // seqlen, seqlen]: ids [N] cut into windows, the incomplete tail dropped."""
    count = len(ids) // seqlen
    return ids[: count * seqlen].view(count, seqlen)


def sample_documents(documents: Sequence[str], encode: Callable[[str], Tensor], seqlen: int, count: int) -> Tensor:
    """[count, seqlen]: one random window from each of count random documents longer than seqlen tokens.

    The protocol of GPTQ and KVQuant for C4, draw for draw (random.seed(0)), so the figures compare with theirs.
    A document of fewer bytes than seqlen is passed over without being tokenized; it cannot hold that many tokens.
    """
    rng, long, short = random.Random(0), {}, set()
    windows = []
    while len(windows) < count:
        if len(short) == len(documents):
            raise UserError(f"none of {len(documents)} documents is longer than seqlen {seqlen} tokens: lower seqlen")
        i = rng.randint(0, len(documents) - 1)
        if i not in long and i not in short:
            ids = encode(documents[i]) if len(documents[i].encode()) >= seqlen else ()
            if len(ids) > seqlen:
                long[i] = ids
            else:
                short.add(i)
        if i in long:
            start = rng.randint(0, len(long[i]) - seqlen - 1)
            windows.append(long[i][start : start + seqlen])
    return torch.stack(windows)


def load_windows(name: str, tokenizer, spec: EvalSpec) -> Tensor:
    """[N, seqlen] ids: the evaluation windows of one dataset, at most spec.limit of them."""
    documents = load_documents(name)
    encode = partial(tokenize, tokenizer)
    if name == "c4":
        return sample_documents(documents, encode, spec.seqlen, min(256, spec.limit))
    ids = encode("\n\n".join(documents))
    if len(ids) < spec.seqlen:
        raise UserError(f"{name} has {len(ids)} tokens, fewer than one window of seqlen {spec.seqlen}: lower seqlen")
    return disjoint_windows(ids, spec.seqlen)[: spec.limit]


# ----------------------------------------------------------------------------------------------------------------------
# 7. Evaluation: a model and windows in, numbers out; it knows nothing of the method


@dataclass(frozen=True)
class Result:
    """One row of the report: ppl = exp(nll), nll the mean in nats over all predicted tokens."""

    dataset: str
    abits: int
    ppl: float
    nll: float
    windows: int
    tokens: int
    seconds: float


def token_nll(logits: Tensor, ids: Tensor, chunk: int = 1024) -> Tensor:
    """[B, T-1] nats: the loss of ids[:, 1:] under logits [B,T,V], in fp32, chunk tokens at a time to bound memory."""
    losses = []
    for scores, target in zip(logits[:, :-1].split(chunk, dim=1), ids[:, 1:].split(chunk, dim=1), strict=True):
        loss = F.cross_entropy(scores.float().flatten(0, 1), target.flatten(), reduction="none")  # [B * chunk]
        losses.append(loss.view(target.shape))
    return torch.cat(losses, dim=1)


@torch.inference_mode()
def window_nll(model: nn.Module, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """For each batch of ids [B,T] (T > 1), the summed loss [B] of every window, in nats and double precision."""
    for ids in batches:
        logits = model(input_ids=ids.to(model.device), use_cache=False).logits
        yield token_nll(logits, ids.to(logits.device)).double().sum(1).cpu()


def perplexity(losses: Sequence[float], seqlen: int) -> float:
    """exp(total loss / predicted tokens) of windows with summed losses in nats; seqlen - 1 predictions a window."""
    try:
        return math.exp(math.fsum(losses) / (len(losses) * (seqlen - 1)))
    except OverflowError:
        return math.inf


def evaluate(model: nn.Module, windows: Tensor, batch_size: int = 1, label: str = "") -> list[float]:
    """The summed loss of every window of windows [N,T], in nats; a progress bar shows on stderr if that is a terminal.

    Raises UserError at the first window that makes the perplexity infinite or nan; label names the text and setting.
    """
    from tqdm import tqdm

    losses: list[float] = []
    with tqdm(total=len(windows), desc=label, unit="window", leave=False, disable=None) as bar:
        for batch in window_nll(model, windows.split(batch_size)):
            for loss in batch.tolist():
                losses.append(loss)
                if not math.isfinite(perplexity(losses, windows.shape[1])):
                    dtype = str(model.dtype).removeprefix("torch.")
                    advice = (
                        "this model gives no finite loss" if dtype == "float32" else "try --dtype bfloat16 or float32"
                    )
                    raise UserError(
                        f"{label}: window {len(losses)} of {len(windows)} has loss {loss} in {dtype}: {advice}"
                    )
            bar.update(len(batch))
            bar.set_postfix(ppl=f"{perplexity(losses, windows.shape[1]):.4f}")
    return losses


def measure(model: nn.Module, windows: Tensor, dataset: str, abits: int, batch_size: int) -> Result:
    """Evaluate model, as it is hooked now, on windows [N,T] of a dataset."""
    start = time.perf_counter()
    losses = evaluate(model, windows, batch_size, label=f"{dataset}, abits {abits}")
    count, seqlen = windows.shape
    ppl = perplexity(losses, seqlen)
    tokens = count * (seqlen - 1)
    return Result(dataset, abits, ppl, math.fsum(losses) / tokens, count, tokens, time.perf_counter() - start)


# ----------------------------------------------------------------------------------------------------------------------
# 8. Report: the table and the JSON

COLUMNS = {"abits": "", "ppl": ".4f", "nll": ".6f", "windows": "", "tokens": "", "seconds": ".1f"}


def table_header(datasets: Iterable[str]) -> str:
    """The line above the rows; the first column is as wide as the longest dataset name."""
    return "dataset".ljust(max(map(len, ("dataset", *datasets)))) + "".join(name.rjust(11) for name in COLUMNS)


def table_row(result: Result, header: str) -> str:
    """One line that stands under header."""
    cells = "".join(format(getattr(result, name), spec).rjust(11) for name, spec in COLUMNS.items())
    return result.dataset.ljust(len(header) - len(cells)) + cells


def environment(model: nn.Module) -> dict:
    """What a figure depends on besides the settings: versions, device, dtype."""
    packages = ("torch", "transformers", "datasets", "accelerate", "numpy")
    versions = {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"versions": versions, "device": str(device), "device_name": name, "dtype": dtype_name(model)}


def dtype_name(model: nn.Module) -> str:
    return str(model.dtype).removeprefix("torch.")


def check_writable(path: str) -> None:
    """Raise UserError unless write_json(path, ...) will be able to write, whether or not the file exists."""
    target = Path(path).resolve()
    try:
        if target.exists() and not target.is_file():
            raise UserError(f"output {path!r} is not a regular file: give a file name")
        if target.exists() and not os.access(target, os.W_OK):
            raise UserError(f"output {path!r} is write-protected: give another name")
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise UserError(
            f"output {path!r} cannot be written ({error.strerror}): give a file in a writable folder"
        ) from error


def write_json(path: str, data: Mapping) -> None:
    """Write data to path atomically: a reader, or an interruption, finds the old file or the whole new one."""
    target = Path(path).resolve()
    partial_file = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial_file.write_text(
            json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        os.replace(partial_file, target)
    except OSError as error:
        raise UserError(f"output {path!r} could not be written: {error.strerror}") from error
    finally:
        partial_file.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# 9. Command line: what both scripts share


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the description's lines and names every default."""


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, and that takes no abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (--help lists the flags)\n")


class ProjectionList(Action):
    """Projection names as plain words, separated by spaces or commas, or as one JSON list; or nothing."""

    def __call__(self, parser, namespace, values, option_string=None):
        words = " ".join(values)
        if words.startswith("["):
            try:
                names = json.loads(words)
            except ValueError:
                names = None
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                parser.error(f"argument {option_string}: {words!r} is no JSON list of names, such as '[\"k_proj\"]'")
        else:
            names = words.replace(",", " ").split()
        setattr(namespace, self.dest, list(dict.fromkeys(names)))


def dataset_list(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",")]


def add_model_flags(parser: ArgumentParser) -> None:
    """model, --dtype, --device, --attn_implementation."""
    parser.add_argument("model", help="hub id or local folder")
    flag = parser.add_argument_group("model").add_argument
    flag("--dtype", default="auto", choices=["auto", "float16", "bfloat16", "float32"],
         help="auto: the checkpoint's own on a GPU, float32 on a CPU")  # fmt: skip
    flag("--device", default="auto", help="auto, cuda, cuda:1 or cpu; auto: the first GPU if there is one")
    flag("--attn_implementation", default="auto", choices=["auto", "sdpa", "eager", "flash_attention_2"],
         help="auto: flash_attention_2 if installed, on a GPU in half precision; else sdpa")  # fmt: skip


def add_quantization_flags(parser: ArgumentParser) -> None:
    """--abits, --perchannel, --pertoken, --include_sparse, --sparsity_threshold, --nf, --first_few_fp16."""
    flag = parser.add_argument_group("quantization").add_argument
    flag("--abits", type=int, default=4, choices=[*range(2, 9), UNQUANTIZED], metavar="BITS",
         help="bits an entry: 2..8, or 16 for no quantization")  # fmt: skip
    flag("--perchannel", nargs="*", action=ProjectionList, default=["k_proj"], metavar="NAME",
         help="projections with one scale per channel")  # fmt: skip
    flag("--pertoken", nargs="*", action=ProjectionList, default=["v_proj"], metavar="NAME",
         help="projections with one scale per token")  # fmt: skip
    flag("--include_sparse", action="store_true", help="keep outliers exact (dense-and-sparse)")
    flag("--sparsity_threshold", type=float, default=0.99, metavar="P",
         help="with --include_sparse, the share of entries that is quantized")  # fmt: skip
    flag("--nf", action="store_true", help="NormalFloat levels instead of uniform ones")
    flag("--first_few_fp16", type=int, default=-1, metavar="N",
         help="leading tokens of every window kept exact (attention sinks); -1 for none")  # fmt: skip


def add_text_flags(parser: ArgumentParser) -> None:
    """--datasets, --seqlen, --limit, --batch_size."""
    flag = parser.add_argument_group("text").add_argument
    flag("--datasets", type=dataset_list, default="wikitext2", metavar="LIST",
         help="comma list of wikitext2, c4, or paths of .txt, .jsonl or .parquet files")  # fmt: skip
    flag("--seqlen", type=int, default=2048, metavar="N", help="tokens a window")
    flag("--limit", type=int, default=512, metavar="N", help="at most this many windows of each text")
    flag("--batch_size", type=int, default=1, metavar="N", help="windows a forward pass")


def add_output_flags(parser: ArgumentParser) -> None:
    """--output."""
    flag = parser.add_argument_group("output").add_argument
    flag("--output", metavar="FILE", help="write settings, environment and results as JSON")


def kv_spec(args: Namespace) -> KVSpec:
    """{projection: QuantSpec} from the quantization flags; {} at 16 bits."""
    if both := set(args.perchannel) & set(args.pertoken):
        raise UserError(f"{', '.join(sorted(both))} stands in both --perchannel and --pertoken: give it one scale")
    if 0 < args.seqlen <= args.first_few_fp16:
        raise UserError(f"first_few_fp16 {args.first_few_fp16} covers the whole window of seqlen {args.seqlen}")
    axes = dict.fromkeys(args.perchannel, PER_CHANNEL) | dict.fromkeys(args.pertoken, PER_TOKEN)
    shared = {name: getattr(args, name) for name in ("nf", "include_sparse", "sparsity_threshold", "first_few_fp16")}
    bits = min(args.abits, 8)
    specs = {name: QuantSpec(axis, bits, **shared) for name, axis in axes.items()}  # made at 16 bits too: it validates
    if args.sparsity_threshold != 0.99 and not args.include_sparse:
        warn(f"--sparsity_threshold {args.sparsity_threshold:g} has no effect without --include_sparse")
    return specs if args.abits != UNQUANTIZED else {}


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def run(main: Callable[[], None]) -> int:
    """The exit status of main: 0, 2 after a one-line error for what the user can mend, 130 after Ctrl-C."""
    try:
        main()
        return 0
    except UserError as error:
        status, message = 2, f"error: {' '.join(str(error).split())}"
    except torch.OutOfMemoryError:
        status, message = 2, "error: out of GPU memory: lower --batch_size or --seqlen, or choose a smaller --dtype"
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return status
