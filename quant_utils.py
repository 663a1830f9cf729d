"""Simulated KV-cache quantization for Llama-style models: what the two scripts share.

Follow one tensor from top to bottom; the file is written in this order:

    h ── k_proj ── y [B,T,C] ── hook ── fake_quantize
                                          ├ sinks         y[:, :n] passes through untouched
                                          ├ keep, lo, hi  which entries stay exact, and the range of the others
                                          │               (over T for keys, over C for values; or calibrated)
                                          ├ snap          normalize → nearest level → stretch back
                                          └ where(keep, y, ŷ), in y's dtype ── RoPE ── attention ── logits ── NLL

Every KV quantizer is three independent choices, and each published variant is a point in that grid:

    which entries stay in full precision   outliers (dense-and-sparse), attention-sink tokens, a cap per token
    which range the codebook stretches to  dynamic (this window) or calibrated (static), per channel or per token
    which levels lie inside [-1, 1]        uniform, NormalFloat, k-means (NUQ); Q-Norm changes what they decode to

Shapes: B batch, T tokens of a window, C = kv_heads * head_dim, L = 2**bits levels.
Nothing is packed and no memory is saved: this measures the error of a quantized cache, not its speed.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import pickle
import pickletools
import random
import re
import shutil
import signal
import statistics
import sys
import time
import warnings
import zipfile
from argparse import (
    Action,
    ArgumentDefaultsHelpFormatter,
    ArgumentParser,
    ArgumentTypeError,
    Namespace,
    RawDescriptionHelpFormatter,
)
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from hashlib import sha256
from pathlib import Path
from threading import Thread
from types import NoneType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PER_CHANNEL, PER_TOKEN = -2, -1  # the axis of [B,T,C] that one range is shared along
UNQUANTIZED = 16  # --abits of the baseline
CACHE_PARTS = {"k_proj": "keys", "v_proj": "values"}  # what a projection's output is to the cache
CODEBOOKS = {"uniform": "uniform", "nf": "NormalFloat", "nuq": "NUQ"}

# ----------------------------------------------------------------------------------------------------------------------
# 1. Configuration: decided once, validated on construction, never mutated


class UserError(ValueError):
    """A mistake that the user can mend. The message is one line: it quotes the value and says what would be right."""


class ProcessError(UserError):
    """A UserError of one process among several, which the others do not make."""


def process_count() -> int:
    """How many processes share the windows: as many as `accelerate launch` or torchrun started, else one."""
    return max(1, environment_number("WORLD_SIZE", 1))


def process_index(local: bool = False) -> int:
    """Which of process_count() processes this is, or which on this machine; 0, the main process, prints and writes."""
    return environment_number("LOCAL_RANK" if local else "RANK", 0) if process_count() > 1 else 0


def environment_number(name: str, absent: int) -> int:
    """A number that a launcher puts into the environment; absent if there is none."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else absent


PATIENCE = 20  # seconds in which processes that are started together come together


def interruptible(function: Callable[[], list], waiting: str | None = None) -> list:
    """function() in a thread, because a signal does not reach what waits in C++. `waiting` is said if it takes long."""
    outcome: Future[list] = Future()

    def call() -> None:
        try:
            outcome.set_result(function())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=call, daemon=True).start()
    if waiting and not wait([outcome], PATIENCE).done:
        print(f"warning: {waiting}", file=sys.stderr)
    return outcome.result()


def join_others() -> None:
    """Meet the other processes, the first time that it is called. UserError if that is in vain."""
    from accelerate import PartialState

    index, count = process_index(), process_count()
    if index >= count:
        raise ProcessError(f"RANK {index} with WORLD_SIZE {count}: ranks are 0 to {count - 1}")
    if torch.distributed.is_initialized():
        return
    try:
        waiting = f"process {index} waits for the other {count - 1} of WORLD_SIZE {count}"
        interruptible(lambda: [PartialState(cpu=True, backend="gloo", timeout=timedelta(days=7))], waiting)
    except (ValueError, RuntimeError) as error:
        advice = "start them with `accelerate launch`, or unset WORLD_SIZE"
        raise ProcessError(f"{count} processes do not find each other ({error}): {advice}") from error


def gather(items: list) -> list:
    """The items of all processes in one list, in order of their index."""
    if process_count() == 1:
        return items
    from accelerate.utils import gather_object

    join_others()
    try:
        return interruptible(lambda: gather_object(items))
    except RuntimeError as error:
        raise UserError("another process has ended: it says why") from error


@contextmanager
def one_for_all() -> Iterator[None]:
    """An error inside the block of any process is raised in all of them, once all are at its end."""
    gather([None])  # before anything that takes long
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = [each for each in gather([failure and str(failure)]) if each is not None]
    if failure is not None:
        raise failure
    if failures:
        raise UserError(failures[0])


@contextmanager
def one_of_many() -> Iterator[None]:
    """Inside the block a UserError is this process's own, and says so."""
    try:
        yield
    except UserError as error:
        if process_count() == 1:
            raise
        raise ProcessError(f"process {process_index()} of {process_count()}: {error}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no more memory to give."""
    lacks = re.search("(out of|allocate|not enough) memory", str(error))
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and lacks is not None)


def one_line(message: str) -> str:
    """message without what is not printable, and not endless."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(message.split()))[:2000]


def warn(message: str) -> None:
    """One line on stderr, and the run goes on."""
    if process_index() == 0:
        print(f"warning: {one_line(message)}", file=sys.stderr)


def quiet_libraries(quiet: bool = False) -> None:
    """Silence the loaders' own chatter: stderr carries our progress, unless quiet, and warnings only."""
    import datasets
    import huggingface_hub.utils.logging
    import transformers

    huggingface_hub.utils.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)
    for name in ("torch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="torch|accelerate")  # of compilation and threads
    if quiet or process_index() > 0 or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers.logging.disable_progress_bar()  # ours, too


def progress(label: str, items: Iterable | None = None, total: int | None = None, initial: int = 0):
    """A tqdm bar on stderr, over items or to be moved by hand; none where quiet_libraries switched bars off."""
    from transformers.utils.logging import tqdm

    return tqdm(items, desc=label, total=total, initial=initial, unit="window", leave=False, disable=None)


def announce(text: str) -> None:
    """A line on stderr that says what is being waited for, where there are progress bars."""
    from transformers.utils.logging import tqdm

    tqdm(desc=text, bar_format="{desc}", total=1, disable=None).close()


@dataclass(frozen=True)
class QuantSpec:
    """How one projection's output is quantized.

    axis                PER_CHANNEL or PER_TOKEN
    bits                2..8
    codebook            uniform, nf (NormalFloat) or nuq (k-means, which needs calibration)
    include_sparse      keep outliers exact (dense-and-sparse, KVQuant, arXiv:2401.18079, section 3.4)
    sparsity_threshold  p in (0, 1]: the tails of the quantiles (1-p)/2 and 1-(1-p)/2 are outliers
    first_few_fp16      leading tokens of every window kept exact (attention sinks); -1 or 0 for none
    clamp               round the zero point of uniform levels to an integer, as integer kernels do
    cap_outliers        at most this fraction of a token's entries stay exact (calibrated ranges only); None for all
    """

    axis: int
    bits: int = 4
    codebook: str = "uniform"
    include_sparse: bool = False
    sparsity_threshold: float = 0.99
    first_few_fp16: int = -1
    clamp: bool = False
    cap_outliers: float | None = None

    def __post_init__(self):
        if self.axis not in (PER_CHANNEL, PER_TOKEN):
            raise ValueError(f"axis must be PER_CHANNEL ({PER_CHANNEL}) or PER_TOKEN ({PER_TOKEN}), got {self.axis}")
        if not 2 <= self.bits <= 8:
            raise UserError(f"bits must be in 2..8, got {self.bits}")
        if self.codebook not in CODEBOOKS:
            raise ValueError(f"codebook must be one of {', '.join(CODEBOOKS)}, got {self.codebook!r}")
        if not 0 < self.sparsity_threshold <= 1:
            raise UserError(f"sparsity_threshold must be in (0, 1], got {self.sparsity_threshold:g}: 0.99 keeps 1 %")
        if self.first_few_fp16 < -1:
            raise UserError(f"first_few_fp16 must be -1 (none) or a number of tokens, got {self.first_few_fp16}")
        if self.clamp and self.codebook != "uniform":
            raise UserError(f"clamp rounds the zero point of uniform levels; {CODEBOOKS[self.codebook]} has none")
        if self.cap_outliers is not None and not (self.include_sparse and 0 < self.cap_outliers <= 1):
            what = "must be in (0, 1]" if self.include_sparse else "caps nothing without include_sparse"
            raise UserError(f"cap_outliers {what}, got {self.cap_outliers:g}: 0.01 keeps at most 1 % of a token")

    @property
    def sink_tokens(self) -> int:
        """first_few_fp16 as a count."""
        return max(0, self.first_few_fp16)

    def __str__(self) -> str:
        scale = "channel" if self.axis == PER_CHANNEL else "token"
        parts = [f"{self.bits}-bit {CODEBOOKS[self.codebook]}{' (integer zero point)' * self.clamp} per {scale}"]
        if self.include_sparse:
            cap = "" if self.cap_outliers is None else f" (at most {self.cap_outliers:g} of a token)"
            parts.append(f"outliers exact (sparsity threshold {self.sparsity_threshold:g}){cap}")
        if self.sink_tokens:
            parts.append(f"first {self.sink_tokens} token{'s' * (self.sink_tokens > 1)} exact")
        return ", ".join(parts)


DATASETS = {
    "wikitext2": "WikiText-2 raw test, joined by blank lines, in disjoint windows",
    "c4": "C4 validation shard 0, one random window from each of up to 256 random documents (GPTQ protocol)",
}
TEXT_FILES = (".txt", ".jsonl", ".parquet")


def check_dataset_name(name: str) -> None:
    """Raise UserError unless name is in DATASETS or is a readable text file of a known kind."""
    if name in DATASETS:
        return
    if not name.lower().endswith(TEXT_FILES):
        known = ", ".join(DATASETS)
        raise UserError(f"unknown dataset {name!r}: give {known}, or a path that ends in {', '.join(TEXT_FILES)}")
    if not os.path.isfile(name):
        raise UserError(f"text file {name!r} {'is no regular file' if os.path.exists(name) else 'does not exist'}")
    if not os.access(name, os.R_OK):
        raise UserError(f"text file {name!r} cannot be read: check its permissions")


@dataclass(frozen=True)
class EvalSpec:
    """Which texts are measured, in which windows.

    datasets    names in DATASETS, or paths to .txt, .jsonl or .parquet files (column `text`)
    seqlen      tokens a window
    limit       at most this many windows of each text
    batch_size  windows a forward pass; None for as many as fit
    """

    datasets: tuple[str, ...] = ("wikitext2",)
    seqlen: int = 2048
    limit: int = 512
    batch_size: int | None = 1

    def __post_init__(self):
        for name, least in (("seqlen", 2), ("limit", 1), ("batch_size", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")
        for name in self.datasets:
            check_dataset_name(name)
        files = [name if name in DATASETS else str(Path(name).resolve()) for name in self.datasets]
        if repeated := [name for name, file in zip(self.datasets, files, strict=True) if files.count(file) > 1]:
            raise UserError(f"datasets names {repeated[0]} more than once")


@dataclass(frozen=True)
class CalibrationSpec:
    """What static quantizers are fitted on, and how.

    dataset   a name in DATASETS (its train split), or a text file
    nsamples  windows; seqlen tokens each, cut at random places drawn with seed
    fisher    weigh the NUQ fit: "paper" by F times the squared range of the entry's channel or token, because the error
              is made in normalized units (KVQuant, arXiv:2401.18079, section 3.3); "code" by F alone, as the published
              code does; None not at all. F is the squared gradient of the window's mean next-token loss
    q_norm    let the decoded levels keep the inliers' mean and standard deviation (Q-Norm)
    """

    dataset: str = "wikitext2"
    nsamples: int = 16
    seqlen: int = 2048
    seed: int = 0
    fisher: str | None = None
    q_norm: bool = False

    def __post_init__(self):
        for name, least in (("nsamples", 1), ("seqlen", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")
        check_dataset_name(self.dataset)
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in 0..2**63-1, got {str(self.seed)[:40]}")
        if self.fisher not in (None, "paper", "code"):
            raise ValueError(f"fisher must be None, 'paper' or 'code', got {self.fisher!r}")


def own_attention(config) -> str:
    """sdpa, or eager for families that have no other."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    try:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        return "sdpa" if kind._supports_sdpa else "eager"
    except (KeyError, AttributeError):  # a family that is not in the library, or does not say
        return "sdpa"


@dataclass(frozen=True)
class ModelSpec:
    """Which model, how it is loaded and run.

    dtype                auto: the checkpoint's own on a GPU or if its weights are quantized, else float32
    device               auto: the first GPU if there is one, all of them if the model is larger (load_model sees), else
                         the CPU; of several processes each has its own GPU
    attn_implementation  auto: flash_attention_2 if installed and in half precision on a GPU, else own_attention
    compile              on: decoder layers are compiled for the evaluation; auto: on a GPU (see compiled)
    """

    name: str
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "auto"
    compile: str = "auto"

    def __post_init__(self):
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,2})?", self.device):
            raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {self.device!r}")
        gpus, device = torch.cuda.device_count() if torch.cuda.is_available() else 0, self.torch_device
        if device.type == "cuda" and device.index >= gpus:
            seen = f"{gpus} GPU(s), numbered from 0" if gpus else "no GPU"
            asked = self.device if process_count() == 1 else f"{device} for process {process_index()}"
            raise UserError(f"device {asked} was asked for, but torch {torch.__version__} sees {seen}: try cpu")
        if self.attn_implementation == "flash_attention_2":
            if importlib.util.find_spec("flash_attn") is None:
                raise UserError(
                    "attn_implementation flash_attention_2 needs flash-attn (see README): install it, or use sdpa"
                )
            if device.type != "cuda" or self.dtype == "float32":
                raise UserError("attn_implementation flash_attention_2 runs in half precision on a GPU only: use sdpa")

    @property
    def torch_device(self) -> torch.device:
        """device, with auto resolved to a single one."""
        kind, _, index = self.device.partition(":")
        if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        return torch.device("cuda", int(index or process_index(local=True)))

    def resolved(self, config) -> ModelSpec:
        """The same without any `auto`; only dtype keeps it, on a GPU, where config does not say."""
        device, dtype, attention = self.torch_device, self.dtype, self.attn_implementation
        if dtype == "auto":
            own = str(config.dtype).removeprefix("torch.") if config.dtype else "auto"
            is_packed = getattr(config, "quantization_config", None) is not None
            dtype = "float32" if device.type == "cpu" and not is_packed else own
        if attention == "auto":
            half = device.type == "cuda" and dtype in ("float16", "bfloat16")
            flash = half and importlib.util.find_spec("flash_attn") is not None
            attention = "flash_attention_2" if flash else own_attention(config)
        return ModelSpec(self.name, dtype, str(device), attention, self.compile)


@dataclass(frozen=True)
class OutputSpec:
    """What becomes of the figures besides the printed table.

    output            a .csv file for the table, any other for JSON; None for neither
    resume            go on where output, the JSON of an interrupted run, stops
    report_context    tokens of the cache whose size is reported
    plot              .png or .svg: the sweep, or the attribution
    plot_activations  .png or .svg: keys and values of one layer before and after quantization
    plot_layer        which layer that is; None for the middle one
    """

    output: str | None = None
    resume: bool = False
    report_context: int = 131072
    plot: str | None = None
    plot_activations: str | None = None
    plot_layer: int | None = None

    def __post_init__(self):
        if not 1 <= self.report_context <= 2**50:
            raise UserError(f"report_context must be in 1..2**50, got {str(self.report_context)[:40]}")
        if self.resume and (self.output is None or self.is_csv):
            raise UserError("--resume goes on with the JSON file that --output names: give it, not ending in .csv")
        for name in ("plot", "plot_activations"):
            path = getattr(self, name)
            if path is not None and not path.lower().endswith((".png", ".svg")):
                raise UserError(f"{name} {path!r} must end in .png or .svg")
            if path is not None and importlib.util.find_spec("matplotlib") is None:
                raise UserError(f"{name} needs matplotlib: pip install -r requirements.txt")
        if self.plot_layer is not None and self.plot_activations is None:
            raise UserError(f"plot_layer {self.plot_layer} chooses what --plot_activations draws: give that too")

    @property
    def is_csv(self) -> bool:
        """Whether output is a table, not JSON."""
        return self.output is not None and self.output.lower().endswith(".csv")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Codebooks: the levels inside [-1, 1]


@dataclass(frozen=True, eq=False)
class Codebook:
    """Sorted levels [L] to search; what they decode to differs only by Q-Norm's scale and offset.

    decoded  [L] the values that the levels stand for
    """

    levels: Tensor
    scale: float = 1.0
    offset: float = 0.0
    decoded: Tensor = field(init=False)

    def __post_init__(self):
        is_plain = self.scale == 1 and self.offset == 0
        decoded = self.levels if is_plain else (self.levels.double() * self.scale + self.offset).float()
        object.__setattr__(self, "decoded", decoded)

    def to(self, device: torch.device) -> Codebook:
        """The same on device."""
        return replace(self, levels=self.levels.to(device))


def uniform_levels(bits: int) -> Tensor:
    """[L] evenly spaced levels, both ends included: integer quantization is the plainest codebook."""
    return torch.linspace(-1, 1, 2**bits)


def normal_float_levels(bits: int) -> Tensor:
    """[L] quantiles of the normal distribution scaled to [-1, 1], with an exact zero (QLoRA, arXiv:2305.14314).

    The negative half has one level fewer. The outermost quantile is half the mean of 1/32 and 1/30, for every
    number of bits (arXiv:2306.06965, as the published KVQuant code).
    """
    half, tail = 2 ** (bits - 1), 0.5 * (1 / 32 + 1 / 30)
    negative = torch.special.ndtri(torch.linspace(tail, 0.5, half))  # [L/2], ends in 0
    positive = torch.special.ndtri(torch.linspace(0.5, 1 - tail, half + 1))[1:]  # [L/2]
    return torch.cat([negative / -negative[0], positive / positive[-1]])


def data_free_codebook(spec: QuantSpec) -> Codebook:
    """The codebook that spec names, where it needs no data."""
    if spec.codebook == "nuq":
        raise UserError("a NUQ codebook is fitted to data: calibrate first, or choose uniform or NormalFloat levels")
    return Codebook(normal_float_levels(spec.bits) if spec.codebook == "nf" else uniform_levels(spec.bits))


def borders(levels: Tensor) -> Tensor:
    """[L-1] half way between sorted levels [L]."""
    return (levels[1:] + levels[:-1]) / 2


def nearest_level(unit: Tensor, levels: Tensor) -> Tensor:
    """Index [...] of the level in sorted levels [L] nearest to each element of unit [...]; a tie takes the lower."""
    return torch.bucketize(unit, borders(levels))


def decode_nearest(unit: Tensor, codebook: Codebook) -> Tensor:
    """[...] what the level nearest to each element of unit [...] stands for."""
    if not torch.compiler.is_compiling() or len(codebook.levels) > 16:
        return codebook.decoded[nearest_level(unit, codebook.levels)]
    decoded = codebook.decoded[0]  # the same step by step: a compiled kernel has no search that waits for memory
    for border, level in zip(borders(codebook.levels).unbind(), codebook.decoded[1:].unbind(), strict=True):
        decoded = torch.where(unit > border, level, decoded)
    return decoded


BINS, EDGES = 65536, 512  # k-means sees [-1, 1] as BINS bins, and places its first borders among 2 * EDGES edges
NEGLIGIBLE = 1e-12  # of the total weight: below it, a difference of running totals is rounding error


def weighted_histogram(unit: Tensor, weights: Tensor | None = None) -> Tensor:
    """[2, BINS] fp64: total weight and total weight * value of samples unit [N] in every bin of [-1, 1].

    Histograms of parts add up to that of the whole. Samples outside [-1, 1] count in the outermost bins.
    """
    index = ((unit + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    mass = torch.ones_like(unit, dtype=torch.float64) if weights is None else weights.double()
    return torch.stack([index.bincount(each, minlength=BINS) for each in (mass, mass * unit)])


def kmeans_levels(histogram: Tensor, bits: int) -> Tensor:
    """[L] centroids of the weighted 1-D k-means over a weighted_histogram [2, BINS].

    In one dimension clusters are intervals, so dynamic programming finds the best L of them (Wang and Song, R Journal
    2011): exactly, for borders among EDGES edges at equal distances and EDGES at equal shares of the weight. Lloyd
    steps then move the borders over all bins. What is maximized is the sum of moment**2 / mass over the intervals:
    the squared error is a constant less that. No random start; the cost does not depend on the number of samples.
    """
    totals = F.pad(histogram.cumsum(1), (1, 0))  # [2, BINS + 1]: mass and moment left of every bin edge
    spaced = torch.linspace(0, BINS, EDGES + 1, device=histogram.device).long()
    shares = torch.linspace(0, 1, EDGES + 1, dtype=torch.float64, device=histogram.device) * totals[0, -1]
    edges = torch.cat([spaced, torch.searchsorted(totals[0], shares).clamp(max=BINS)]).unique()  # [E]
    mass, moment = totals[:, edges]
    interval_mass = mass[None, :] - mass[:, None]  # [from edge, to edge]
    gain = (moment[None, :] - moment[:, None]).square() / interval_mass
    gain = gain.where(interval_mass > NEGLIGIBLE * mass[-1], 0)
    gain = gain.where(edges[:, None] <= edges[None, :], -math.inf)  # no interval runs backwards
    best, starts = gain[0], []  # best[e]: gain of the best cut of everything left of edge e
    for _ in range(2**bits - 1):
        best, start = (best[:, None] + gain).max(0)
        starts.append(start)
    ends = [len(edges) - 1]
    for start in reversed(torch.stack(starts).tolist()):
        ends.append(start[ends[-1]])
    return lloyd(histogram, edges[ends[::-1]]).float()


def lloyd(histogram: Tensor, edges: Tensor, steps: int = 100) -> Tensor:
    """[L] fp64 centroids over histogram [2, N], after Lloyd steps from the intervals with upper edges [L]."""
    bins = histogram.shape[1]
    totals = F.pad(histogram.cumsum(1), (1, 0))  # [2, N + 1]
    for _ in range(steps):
        mass, moment = totals[:, edges].diff(dim=1, prepend=totals[:, :1])  # [L] each
        low, high = F.pad(edges[:-1], (1, 0)) * (2 / bins) - 1, edges * (2 / bins) - 1
        levels = torch.where(mass > NEGLIGIBLE * totals[0, -1], moment / mass, (low + high) / 2)
        levels = levels.clamp(low, high)  # sorted, whatever rounding does
        moved = (((levels[1:] + levels[:-1]) / 2 + 1) * (bins / 2)).round().long()
        if torch.equal(moved, edges[:-1]):
            break
        edges = F.pad(moved, (0, 1), value=bins)
    return levels


def q_norm(unit: Tensor, levels: Tensor) -> Codebook:
    """Codebook of levels [L], with what they decode to scaled and shifted so that unit [N] keeps mean and deviation.

    This is Q-Norm of KVQuant (arXiv:2401.18079).
    """
    unit, snapped = unit.double(), levels[nearest_level(unit, levels)].double()
    scale = (unit.std(correction=0) / snapped.std(correction=0)).item()
    if not math.isfinite(scale):  # a single value: there is no deviation to keep
        return Codebook(levels)
    return Codebook(levels, scale, (unit.mean() - snapped.mean() * scale).item())


# ----------------------------------------------------------------------------------------------------------------------
# 3. The math: tensors in, tensors out, no model in sight


def tail_quantiles(x: Tensor, threshold: float, axis: int, absent: int = 0) -> tuple[Tensor, Tensor]:
    """(lower, upper) fp32 quantiles (1-p)/2 and 1-(1-p)/2 of x along axis, p = threshold; axis is reduced to size 1.

    Linear interpolation between order statistics, as torch.quantile, the rank in double precision. Two neighbouring
    order statistics at either end are all it takes: a GPU counts 16-bit numbers, else the tails are sorted. If x is
    padded along axis, so many entries are `absent`: they are nan, and have no part in it.
    """
    rank = (1 - threshold) / 2 * (x.shape[axis] - absent - 1)  # from either end, 0 being the extreme
    below = math.floor(rank)
    ends = (counted_tails if is_counted(x) else sorted_tails)(x, below, axis, absent)
    lower, upper = (torch.lerp(near.float(), far.float(), rank - below) for near, far in ends)
    return lower, upper


def is_counted(x: Tensor) -> bool:
    """Whether order statistics of x are found by counting."""
    return x.device.type != "cpu" and x.dtype in (torch.bfloat16, torch.float16)


Tails = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def sorted_tails(x: Tensor, rank: int, axis: int, absent: int = 0) -> Tails:
    """What stands at rank and rank + 1 along axis: ((in ascending order), (in descending order)), 0 the extreme.

    In the order of torch the absent ones, nan, are the largest.
    """
    far = min(rank + 1, x.shape[axis] - absent - 1)
    ends = []
    for largest, first in ((False, 0), (True, absent)):
        tail = x.topk(first + far + 1, dim=axis, largest=largest).values
        ends.append((tail.narrow(axis, first + rank, 1), tail.narrow(axis, first + far, 1)))
    return ends[0], ends[1]


def counted_tails(x: Tensor, rank: int, axis: int, absent: int = 0) -> Tails:
    """sorted_tails of 16-bit x without sorting: the compiler turns it into a single kernel.

    In the order of its bits a number is found bit by bit, from how many are as large as each trial. Both ends are
    searched at once, in the halves of an integer, and but for the last bit by one subtraction: a half that holds 15
    bits of a number and a guard bit above them keeps the guard if what is subtracted is no larger.
    """
    total, key = x.shape[axis], ordered_key(x)
    half, whole = (16, torch.int32) if total < 2**16 else (32, torch.int64)
    one, mask = 1 + 2**half, 2**half - 1  # in each half a 1; the lower half
    guards = one * 2**15 - (2**32 if half == 16 else 0)  # the upper one is the sign of an int32
    guarded = (key >> 1).to(whole) * one + guards

    def halves(both: Tensor) -> tuple[Tensor, Tensor]:
        return both & mask, both >> half & mask

    def less(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        both = (key < low).to(whole) + ((key < high).to(whole) << half)
        return halves(both.sum(axis, keepdim=True, dtype=whole))

    found = torch.zeros_like(guarded.narrow(axis, 0, 1))
    for bit in reversed(range(15)):
        as_large = (guarded - (found + (one << bit))) >> 15 & one
        at_low, at_high = halves(as_large.sum(axis, keepdim=True, dtype=whole))
        is_low, is_high = at_low >= total - rank, at_high > rank + absent
        found = found + (is_low.to(whole) << bit) + (is_high.to(whole) << bit + half)
    low, high = (2 * each.int() for each in halves(found))
    less_low, less_high = less(low + 1, high + 1)  # the last bit
    low = torch.where(less_low <= rank, low + 1, low)
    high = torch.where(less_high <= total - absent - 1 - rank, high + 1, high)
    less_low, less_high = less(low + 1, high)  # the next rank holds the same number again, or its neighbour
    above = key.masked_fill(key <= low, 2**16 - 1).amin(axis, keepdim=True)
    below = key.masked_fill(key >= high, 0).amax(axis, keepdim=True)
    next_low = torch.where(less_low < min(rank + 2, total - absent), above, low)
    next_high = torch.where(less_high > max(total - absent - rank - 2, 0), below, high)
    low, next_low, high, next_high = (from_ordered_key(each, x.dtype) for each in (low, next_low, high, next_high))
    return (low, next_low), (high, next_high)


def ordered_key(x: Tensor) -> Tensor:
    """int32 in 0..2**16-1, in the order of 16-bit floating-point x: negative ones have their bits turned over."""
    bits = x.view(torch.int16).int()
    return torch.where(bits < 0, ~bits, bits + 2**15)


def from_ordered_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    """The number in dtype that ordered_key made key of."""
    return torch.where(key < 2**15, ~key, key - 2**15).short().view(dtype)


def stored(x: Tensor) -> Tensor:
    """x. The compiler writes it to memory, instead of computing it again, unrounded, wherever it is used."""
    return x.as_strided(x.shape, x.stride())


def inlier_bounds(x: Tensor, threshold: float, axis: int, absent: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(lower, upper, lo, hi) of x [B,T,C] along axis: what is at or beyond lower or upper is an outlier, and the others
    range from lo to hi, or (inf, -inf) if there are none. For absent see tail_quantiles.
    """
    if axis == PER_CHANNEL and is_counted(x):  # a GPU counts fastest along contiguous memory, in aligned rows
        pad = -x.shape[1] % 16
        rows = stored(F.pad(x.mT, (0, pad), value=math.nan).contiguous())
        lower, upper, lo, hi = (stored(each).mT for each in inlier_bounds(rows, threshold, PER_TOKEN, pad))
        return lower, upper, lo, hi
    lower, upper = tail_quantiles(x, threshold, axis, absent)
    is_inlier = (x > lower) & (x < upper)
    lo = x.float().where(is_inlier, math.inf).amin(axis, keepdim=True)
    hi = x.float().where(is_inlier, -math.inf).amax(axis, keepdim=True)
    return lower, upper, lo, hi


def snap(x: Tensor, lo: Tensor, hi: Tensor, codebook: Codebook) -> Tensor:
    """x rounded to the nearest level of codebook, stretched from [-1, 1] over [lo, hi] (both broadcast to x).

    lerp hits both ends exactly, and lo == hi gives lo whatever the index, so an empty range needs no special case.
    """
    unit = (x - lo) / (hi - lo) * 2 - 1
    return torch.lerp(lo, hi, (decode_nearest(unit, codebook) + 1) / 2)


def cap_per_token(keep: Tensor, distance: Tensor, fraction: float) -> Tensor:
    """keep [B,T,C] with at most fraction * C entries of a token left, those of the greatest distance [B,T,C]."""
    most = math.floor(fraction * keep.shape[-1] + 1e-9)  # 0.29 * 100 is less than 29
    far = distance.masked_fill(~keep, -math.inf).topk(most, dim=-1).indices
    return keep & torch.zeros_like(keep).scatter(-1, far, True)


def integer_zero_point(lo: Tensor, hi: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(lo, hi) moved by at most half a step, so that lo is a whole number of steps from zero."""
    step = (hi - lo) / (2**bits - 1)
    moved = torch.where(step > 0, (lo / step).round() * step, lo)
    return moved, moved + (hi - lo)


@dataclass(frozen=True, eq=False)
class Quantizer:
    """All that quantizes one projection's output: how, with which levels, and over which range.

    lo, hi  calibrated range, [C]; None where the range is dynamic
    """

    spec: QuantSpec
    codebook: Codebook
    lo: Tensor | None = None
    hi: Tensor | None = None

    def __post_init__(self):
        if self.spec.cap_outliers is not None and not self.is_static:
            raise UserError(f"cap_outliers {self.spec.cap_outliers:g} needs a calibrated range")

    @property
    def is_static(self) -> bool:
        """Whether the range is calibrated."""
        return self.lo is not None

    def to(self, device: torch.device) -> Quantizer:
        """The same with its tensors on device."""
        if self.codebook.levels.device == device:
            return self
        bounds = [None if bound is None else bound.to(device) for bound in (self.lo, self.hi)]
        return Quantizer(self.spec, self.codebook.to(device), *bounds)


def keep_and_range(x: Tensor, quantizer: Quantizer, sinks: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(keep, lo, hi) for x [B,T,C]: which entries stay exact (bool [B,T,C]), and the fp32 range, broadcasting to x.

    Dynamic: outliers are at or beyond the quantiles of x, and the range is that of the others ((inf, -inf) if none is).
    Calibrated: the range is given, and outliers lie strictly outside; without outliers, the codebook clips to it.
    The first `sinks` tokens stay exact, and no range or quantile sees them.
    """
    spec, lo, hi, y = quantizer.spec, quantizer.lo, quantizer.hi, x.float()
    body = x[:, sinks:] if spec.axis == PER_CHANNEL else x  # a token's range is its own
    keep = torch.zeros_like(x, dtype=torch.bool)
    if lo is not None and hi is not None:
        keep = (y < lo) | (y > hi) if spec.include_sparse else keep
    elif spec.include_sparse:
        lower, upper, lo, hi = inlier_bounds(body, spec.sparsity_threshold, spec.axis)
        keep = (y <= lower) | (y >= upper)
    else:
        lo, hi = body.float().amin(spec.axis, keepdim=True), body.float().amax(spec.axis, keepdim=True)
    if spec.cap_outliers is not None:
        keep = cap_per_token(keep, ((y - lo) / (hi - lo) - 0.5).abs(), spec.cap_outliers)
    if spec.clamp:
        lo, hi = integer_zero_point(lo, hi, spec.bits)
    return keep, lo, hi


def quantize(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """(x [B,T,C] quantized and dequantized in its own dtype, which entries stayed exact as outliers, bool [B,T,C]).

    Arithmetic is in fp32. Sink tokens take no part: they come back as they are, and no quantile or range sees them.
    """
    if x.ndim != 3:
        raise ValueError(f"quantize takes [batch, tokens, channels], got a tensor of shape {tuple(x.shape)}")
    sinks = quantizer.spec.sink_tokens
    if x[:, sinks:].numel() == 0:
        return x, torch.zeros_like(x, dtype=torch.bool)
    keep, lo, hi = keep_and_range(x, quantizer, sinks)
    is_sink = torch.arange(x.shape[1], device=x.device)[:, None] < sinks  # [T,1]
    snapped = snap(x.float(), lo, hi, quantizer.codebook).to(x.dtype)
    return stored(torch.where(keep | is_sink, x, snapped)), keep & ~is_sink


def fake_quantize(x: Tensor, quantizer: Quantizer) -> Tensor:
    """x [B,T,C] quantized and dequantized: the same shape and dtype (see quantize)."""
    return quantize(x, quantizer)[0]


def storage_bits(quantizer: Quantizer | None, tokens: int, channels: int) -> int:
    """Bits that a cache spends on [tokens, channels] entries, its outliers not counted; 16 an entry without quantizer.

    A sink entry takes 16, a dynamic range two fp16 numbers; calibrated ranges and codebooks are constants of the model.
    """
    if quantizer is None:
        return 16 * tokens * channels
    spec = quantizer.spec
    sinks = min(spec.sink_tokens, tokens)
    ranges = channels if spec.axis == PER_CHANNEL else tokens - sinks
    entries = 16 * sinks * channels + spec.bits * (tokens - sinks) * channels
    return entries + (0 if quantizer.is_static else 32 * ranges)


OUTLIER_BITS = 32  # on top of its place among the quantized: a 16-bit value and a 16-bit index


def divergence(reference: Tensor, log_probs: Tensor) -> Tensor:
    """[...] nats: KL(reference || log_probs) of next-token distributions given as log probabilities [..., V]."""
    return (reference.exp() * (reference - log_probs)).sum(-1).clamp(min=0)  # rounding can fall below zero


def token_statistics(log_probs: Tensor, targets: Tensor, reference: tuple[Tensor, Tensor] | None) -> Tensor:
    """[3,B,T]: loss of targets [B,T] in nats, KL divergence from reference, and whether both predict the same token.

    log_probs is [B,T,V]; reference is its like and the likeliest tokens [B,T] by it, which are found once for all
    settings (a maximum costs far less than its place). Without a reference there is the loss alone, [1,B,T].
    """

    def at(tokens: Tensor) -> Tensor:
        return log_probs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    if reference is None:
        return -at(targets)[None]
    reference_log_probs, likeliest = reference
    agrees = at(likeliest) == log_probs.amax(-1)
    return torch.stack([-at(targets), divergence(reference_log_probs, log_probs), agrees.float()])


# ----------------------------------------------------------------------------------------------------------------------
# 4. Hooks: the only section that touches the model

# projection → how its output is quantized: {"k_proj": ..., "v_proj": ...}; {} for none
KVSpec = Mapping[str, QuantSpec]


def projections(model: PreTrainedModel) -> dict[str, nn.Module]:
    """{name: module} of every projection in the decoder, in model order: what has a 2-d weight or packs one."""
    decoder, found = set(model.get_decoder().modules()), {}
    for name, module in model.named_modules():
        is_matrix = getattr(getattr(module, "weight", None), "ndim", 0) == 2 or hasattr(module, "out_features")
        if is_matrix and module in decoder and not isinstance(module, nn.Embedding):
            found[name] = module
    return found


def output_width(module: nn.Module) -> int:
    """C, the width of a projection's output (quantized weights are packed, so their shape does not tell)."""
    width: int | None = getattr(module, "out_features", None)
    return width or module.get_parameter("weight").shape[-1]


@dataclass(frozen=True)
class Place:
    """Where the keys or values of a layer come by last on their way to RoPE and the cache: the output of a module.

    module  its name in the attention layer
    heads   which axis of the output holds the heads: 2 of [B,T,H,D], 1 of [B,H,T,D]; None: it is [B,T,C]
    block   if a fused projection gives more than that: which block of C channels from its end, -1 or -2; None: all
    """

    module: str
    heads: int | None = None
    block: int | None = None

    def read(self, out: Tensor, width: int) -> Tensor:
        """[B,T,C] from the module's output."""
        out = out.transpose(1, 2) if self.heads == 1 else out
        out = out if self.heads is None else out.flatten(2)
        return out if self.block is None else out.narrow(-1, out.shape[-1] + self.block * width, width)

    def write(self, out: Tensor, x: Tensor) -> Tensor:
        """The module's output with x [B,T,C] in place of what read gives."""
        if self.block is not None:
            start = out.shape[-1] + self.block * x.shape[-1]
            return torch.cat([out[..., :start], x, out[..., start + x.shape[-1] :]], dim=-1)
        x = x if self.heads is None else x.unflatten(2, (-1, out.shape[-1]))
        return x.transpose(1, 2) if self.heads == 1 else x


# Families, by the model_type of their config, whose keys and values are not just the outputs of k_proj and v_proj. One
# more is one line here: check_against_cache and tests/test_families.py see whether it is right.
FUSED = {"k_proj": Place("qkv_proj", block=-2), "v_proj": Place("qkv_proj", block=-1)}
SITES: dict[str, dict[str, Place]] = {
    "apertus": {"k_proj": Place("k_norm", heads=1)},
    "cohere": {"k_proj": Place("k_norm", heads=2)},
    "exaone4": {"k_proj": Place("k_norm", heads=1)},
    "flex_olmo": {"k_proj": Place("k_norm")},
    "gemma3_text": {"k_proj": Place("k_norm", heads=1)},
    "glm4_moe": {"k_proj": Place("k_norm", heads=2)},
    "gpt2": {leaf: replace(place, module="c_attn") for leaf, place in FUSED.items()},
    "minimax_m2": {"k_proj": Place("k_norm")},
    "olmo2": {"k_proj": Place("k_norm")},
    "olmo3": {"k_proj": Place("k_norm")},
    "olmoe": {"k_proj": Place("k_norm")},
    "phi": {"k_proj": Place("k_layernorm", heads=1)},
    "phi3": FUSED,
    "qwen3": {"k_proj": Place("k_norm", heads=2)},
    "qwen3_moe": {"k_proj": Place("k_norm", heads=2)},
    "stablelm": {"k_proj": Place("k_layernorm", heads=1)},
}


@dataclass(frozen=True, eq=False)
class Site:
    """A Place in one layer of a model; width is C."""

    module: nn.Module
    place: Place
    width: int

    def read(self, out: Tensor) -> Tensor:
        """[B,T,C] from the module's output."""
        return self.place.read(out, self.width)


def site_at(model: PreTrainedModel, name: str) -> Site:
    """The site of that name: "model.layers.0.self_attn.k_proj" is the keys of layer 0, whichever module gives them."""
    parent, _, leaf = name.rpartition(".")
    attention, config = model.get_submodule(parent), model.get_decoder().config
    place = SITES.get(config.model_type, {}).get(leaf, Place(leaf))
    if not hasattr(attention, place.module):  # a norm that only some models of the family have
        place = Place(leaf)
    if hasattr(attention, leaf):
        width = output_width(getattr(attention, leaf))
    else:
        heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return Site(attention.get_submodule(place.module), place, width)


def all_sites(model: PreTrainedModel) -> dict[str, Site]:
    """{"model.layers.0.self_attn.k_proj": Site, ...}: every projection that can be quantized, in model order."""
    table, found = SITES.get(model.get_decoder().config.model_type, {}), {}
    for name in projections(model):
        parent, _, leaf = name.rpartition(".")
        parts = [part for part, place in table.items() if place.block is not None and place.module == leaf]
        for each in parts or [leaf]:
            found[f"{parent}.{each}"] = site_at(model, f"{parent}.{each}")
    return found


def find_sites(model: PreTrainedModel, specs: Collection[str]) -> dict[str, Site]:
    """all_sites whose last name specs has.

    Raises UserError if a name matches nothing, or if the layer normalizes keys or values after the projection and
    SITES does not have its family: the model would cache the normalized ones.
    """
    known, kind = all_sites(model), type(model).__name__
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in known)
    if missing := [leaf for leaf in specs if leaf not in leaves]:
        has = f"it has: {', '.join(leaves) or 'none'}"
        if "kv_b_proj" in leaves:
            has = "it expands both from a compressed latent (multi-head latent attention), which is not supported"
        raise UserError(f"{kind} has no projection {', '.join(missing)}; {has}")
    if set(specs) & set(CACHE_PARTS) and getattr(model.get_decoder().config, "clip_qkv", None):
        raise UserError(f"{kind} clips keys and values behind the projections (clip_qkv): not supported yet")
    sites = {name: site for name, site in known.items() if name.rpartition(".")[2] in specs}
    for name, site in sites.items():
        parent, _, leaf = name.rpartition(".")
        like = {"k_proj": r"(q?k|key)_(layer_?)?norm", "v_proj": r"v(alue)?_norm"}.get(leaf, "$")
        for each, _ in model.get_submodule(parent).named_children():
            if re.fullmatch(like, each) and each != site.place.module:
                raise UserError(f"{kind} normalizes the output of {leaf} ({each}): this family is not supported yet")
    return sites


def layer_of(site: str) -> int | None:
    """The number in a site's name: 3 for model.layers.3.self_attn.k_proj; None if it has none."""
    return next((int(word) for word in site.split(".") if word.isdigit()), None)


@torch.inference_mode()
def check_against_cache(model: PreTrainedModel, sites: Mapping[str, Site]) -> None:
    """Raise UserError unless sites give what the model's own cache holds, on a few tokens.

    Values are compared as they are; keys at the first position, where RoPE turns nothing, but may scale.
    """
    seen: dict[str, Tensor] = {}

    def watcher(name: str, site: Site) -> Hook:
        return lambda module, args, out: seen.update({name: site.read(out)[0].clone()})

    ids = torch.arange(5, 9, device=input_device(model))[None]  # padding, embedded as zeros, tends to come before
    ids %= model.config.get_text_config().vocab_size
    with hooked((site.module, watcher(name, site)) for name, site in sites.items()):
        try:
            output = model.get_decoder()(input_ids=ids, use_cache=True)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            how, reason = f"{dtype_name(model)} on {model.device}", one_line(str(error))[:200]
            raise UserError(f"{type(model).__name__} does not run in {how}: {reason}; try another --dtype") from error
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    for name in sites:
        part, layer = CACHE_PARTS.get(name.rpartition(".")[2]), layer_of(name)
        held = getattr(layers[layer], part, None) if part and layer is not None and layer < len(layers) else None
        if part is None or (name in seen and not seen[name].isfinite().all()):
            continue  # that it is broken shows when it is measured
        if name not in seen or held is None:
            raise UserError(f"{type(model).__name__} caches nothing at {name}: this family is not supported yet")
        given, held = seen[name].double().cpu(), held[0].transpose(0, 1).flatten(1).double().cpu()  # [T,C] each
        if part == "keys" and given.shape == held.shape:
            given, held = given[0], held[0]
            given = given * ((given * held).sum() / given.square().sum().clamp(min=1e-300))
        close = 8 * torch.finfo(model.dtype).eps * held.abs().amax()
        if given.shape != held.shape or not ((given - held).abs() <= close).all():
            what = f"{type(model).__name__} caches other {part} than {name} gives"
            raise UserError(f"{what}: this family is not supported yet")


def dtype_name(model: PreTrainedModel) -> str:
    """Such as bfloat16."""
    return str(model.dtype).removeprefix("torch.")


Hook = Callable[[nn.Module, tuple, Tensor], Tensor | None]


@contextmanager
def hooked(hooks: Iterable[tuple[nn.Module, Hook]]) -> Iterator[None]:
    """Inside the block each module's output passes through its forward hook; None leaves it as it is.

    The hooks go whatever happens inside.
    """
    handles = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def dynamic_quantizers(model: PreTrainedModel, specs: KVSpec) -> dict[str, Quantizer]:
    """{site: Quantizer} with dynamic ranges and codebooks that need no data."""
    chosen = {name: specs[name.rpartition(".")[2]] for name in find_sites(model, specs)}
    return {name: Quantizer(spec, data_free_codebook(spec)) for name, spec in chosen.items()}


def device_of(module: nn.Module) -> torch.device:
    """Where a projection or an embedding computes; accelerate may keep its weights elsewhere meanwhile."""
    at = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    if at is None:
        return next(itertools.chain(module.parameters(), module.buffers())).device
    return torch.empty(0, device=at).device


def input_device(model: PreTrainedModel) -> torch.device:
    """Where token ids go in."""
    return device_of(model.get_input_embeddings())


def on_device(model: PreTrainedModel, quantizers: Mapping[str, Quantizer]) -> dict[str, Quantizer]:
    """The same {site: Quantizer}, each where its projection computes."""
    return {name: each.to(device_of(site_at(model, name).module)) for name, each in quantizers.items()}


def quantize_output(module: Any, args: tuple, out: Tensor) -> Tensor:
    """Forward hook of a module: what a quantized cache would give back. The module keeps the counts of outliers.

    All that differs between layers is an attribute of the module, so that one compiled graph serves every layer.
    """
    counts = []
    for site, quantizer in module.kv_quantizers:
        quantized, keep = quantize(site.read(out), quantizer)
        counts.append(keep.sum(-1) if quantizer.spec.include_sparse else None)  # [B,T]
        out = site.place.write(out, quantized)
    module.kv_outliers = counts
    return out


@contextmanager
def simulate_quantization(model: PreTrainedModel, quantizers: Mapping[str, Quantizer]) -> Iterator[dict[str, Tensor]]:
    """Inside the block model attends to the keys and values that a quantized cache would give back.

    Yields a dict that is {site: [B,T] outliers of each token} after the block, of the latest forward pass in it. Sites
    that keep none are not in it.
    """
    names: dict[nn.Module, list[str]] = {}
    outliers: dict[str, Tensor] = {}
    try:
        for name, quantizer in quantizers.items():
            site = site_at(model, name)
            names.setdefault(site.module, []).append(name)
            pair = site, quantizer.to(device_of(site.module))
            vars(site.module).setdefault("kv_quantizers", []).append(pair)
        with hooked((module, quantize_output) for module in names):
            yield outliers
    finally:
        for module, sites in names.items():
            vars(module).pop("kv_quantizers", None)
            counts = zip(sites, vars(module).pop("kv_outliers", ()), strict=False)
            outliers.update({name: count for name, count in counts if count is not None})


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules with a number in their name that hold projections: model.layers.0, model.layers.1, ..."""
    numbered = (re.match(r"(.*?\.\d+)\.", name) for name in projections(model))
    return [model.get_submodule(name) for name in dict.fromkeys(found[1] for found in numbered if found)]


class CompilationError(UserError):
    """The decoder layers do not compile."""


def is_to_compile(spec: ModelSpec) -> bool:
    """Whether evaluations are compiled. The compiler is tried first, and may lack Triton, or a C compiler.

    If it fails, auto, which compiles on a GPU only, warns and goes without, and on is a UserError.
    """
    if spec.compile == "off" or (spec.compile == "auto" and spec.torch_device.type == "cpu"):
        return False
    try:
        if os.environ.get("TORCHDYNAMO_DISABLE") == "1":  # torch says nothing
            raise RuntimeError("TORCHDYNAMO_DISABLE is set")
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=spec.torch_device))
    except Exception as error:  # whatever is missing
        reason = f"torch.compile fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if spec.compile == "on":
            raise UserError(f"--compile on: {reason}: give --compile off") from error
        warn(f"--compile auto: off, because {reason}")
        return False
    return True


@contextmanager
def compiled(model: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """Inside the block every decoder layer runs as one compiled graph, hooks included, which alike layers share."""
    if not enabled:
        yield
        return
    announce("compiling with the first windows; later runs find the code in torch's cache")
    layers = decoder_layers(model)
    # Triton's own division is approximate, and kernels chosen by timing round as they please (as far as torch knows)
    exact = [name for name in torch._inductor.list_options() if re.search("divi[a-z]*_rounding|^deterministic$", name)]
    # without guards on hooks a layer that was compiled without them would pass them over
    options: dict[str, Any] = {"skip_nnmodule_hook_guards": False, "fail_on_recompile_limit_hit": True}
    options |= {"recompile_limit": 1000, "accumulated_recompile_limit": 10000}  # widths, parts and batch sizes
    with torch._dynamo.config.patch(options):
        try:
            for layer in layers:
                layer.compile(dynamic=False, options=dict.fromkeys(exact, True))
            yield
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise CompilationError(f"the decoder layers do not compile ({reason}): give --compile off") from error
        finally:
            for layer in layers:
                layer._compiled_call_impl = None


# ----------------------------------------------------------------------------------------------------------------------
# 5. Calibration: observe the projections on sample text, fit, save, load


@dataclass(frozen=True)
class Fit:
    """How well one calibrated quantizer does on its own calibration activations."""

    lo: float
    hi: float
    kept: float  # share of entries that stay exact, sinks not counted
    error: float  # sum of squared errors / sum of squares, sinks not counted


def record_activations(model: PreTrainedModel, sites: Mapping[str, Site], windows: Tensor) -> dict[str, Tensor]:
    """{site: [N,T,C]}: every site's output over windows [N,T], in host memory and the model's dtype."""
    count, seqlen = windows.shape
    width = sum(site.width for site in sites.values())
    need, free = windows.numel() * width * model.dtype.itemsize, free_memory("cpu")
    if need > free:
        advice = f"{free / 2**30:.1f} GiB are free: lower nsamples (now {count}) or seqlen (now {seqlen})"
        raise UserError(f"calibration activations take {need / 2**30:.1f} GiB of host memory, but {advice}")
    blank = torch.tensor(math.nan, dtype=model.dtype)  # of what never runs, which calibrate finds
    seen = {name: blank.repeat(count, seqlen, site.width) for name, site in sites.items()}

    def record(module: nn.Module, args: tuple, out: Tensor, site: Site, row: Tensor) -> None:
        row.copy_(site.read(out)[0])

    with torch.inference_mode():
        for window in progress("activations", range(count)):
            hooks = ((site.module, partial(record, site=site, row=seen[name][window])) for name, site in sites.items())
            with hooked(hooks):
                model.get_decoder()(input_ids=windows[window : window + 1].to(input_device(model)), use_cache=False)
    return seen


def free_memory(device: torch.device | str) -> int:
    """Bytes that can still be had on device."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    import psutil

    return psutil.virtual_memory().available


def fit_range(x: Tensor, spec: QuantSpec) -> Quantizer:
    """The quantizer of one projection from its outputs x [N,T,C], with a codebook that NUQ has yet to replace.

    Per channel the range is calibrated: percentiles over all tokens of all windows but the sinks, or minimum and
    maximum if no outliers are kept. Per token it stays dynamic.
    """
    codebook = Codebook(uniform_levels(spec.bits)) if spec.codebook == "nuq" else data_free_codebook(spec)
    if spec.axis == PER_TOKEN:
        return Quantizer(spec, codebook)
    tokens = x[:, spec.sink_tokens :].flatten(0, 1)  # [N * (T - sinks), C]
    threshold = spec.sparsity_threshold if spec.include_sparse else 1.0
    lo, hi = tail_quantiles(tokens, threshold, axis=0)
    return Quantizer(spec, codebook, lo[0], hi[0])


def inliers(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor, Tensor]:
    """(unit, inlier, radius) for x [N,T,C] without its sinks: x in [-1, 1], which entries to fit, half the range.

    Normalization is that of evaluation: values by the range of their token's inliers (the published calibration
    takes the token's percentiles instead).
    """
    body = x[:, quantizer.spec.sink_tokens :]
    keep, lo, hi = keep_and_range(body, quantizer)
    radius = ((hi - lo) / 2).expand_as(body)
    unit = (body.float() - lo) / radius - 1
    return unit.clamp(-1, 1), ~keep & (radius > 0), radius


def nuq_histogram(x: Tensor, quantizer: Quantizer, grad: Tensor | None = None, weighting: str = "paper") -> Tensor:
    """weighted_histogram of the inliers of x [N,T,C]: of weight 1, or of Fisher information from grad [N,T,C]."""
    unit, inlier, radius = inliers(x, quantizer)
    if grad is None:
        return weighted_histogram(unit[inlier])
    fisher = grad[:, quantizer.spec.sink_tokens :].float().square()[inlier].double()
    return weighted_histogram(unit[inlier], fisher * radius[inlier] ** 2 if weighting == "paper" else fisher)


def fisher_histograms(
    model: PreTrainedModel, windows: Tensor, quantizers: Mapping[str, Quantizer], weighting: str
) -> dict[str, Tensor]:
    """{site: nuq_histogram weighted by Fisher information}, window by window of windows [N,T]; no gradient is kept.

    Only the sites' outputs require gradients, no parameter does: the first site starts the graph. Processes share the
    windows, and each has all histograms in the end.
    """
    sites, local = {name: site_at(model, name) for name in quantizers}, on_device(model, quantizers)
    totals: dict[str, Any] = dict.fromkeys(quantizers, 0)

    def watcher(name: str, site: Site) -> Hook:
        def on_output(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            def on_gradient(grad: Tensor | None) -> None:
                if grad is not None:  # the loss is a sum over tokens, which fp16 does not underflow
                    mean = site.read(grad).float() / (windows.shape[1] - 1)
                    totals[name] = totals[name] + nuq_histogram(site.read(seen), local[name], mean, weighting)

            seen = out.detach()
            out = out if out.requires_grad else seen.requires_grad_()
            out.register_hook(on_gradient)
            return out

        return on_output

    watched = [(site.module, watcher(name, site)) for name, site in sites.items()]
    with torch.enable_grad(), checkpointing_if_short(model, windows.shape[1]), hooked(watched):
        for ids in progress("Fisher information", windows[process_index() :: process_count()]):
            ids = ids.to(input_device(model))
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            F.cross_entropy(logits.float(), ids[1:].to(logits.device), reduction="sum").backward()
    if process_count() > 1:
        parts = gather([{name: torch.as_tensor(total).cpu() for name, total in totals.items()}])
        totals = {name: sum(part[name] for part in parts).to(device_of(sites[name].module)) for name in totals}
    for name, total in totals.items():
        if not isinstance(total, Tensor):
            raise UserError(f"no gradient comes to {name}, maybe for the kind of its weights: leave out --fisher")
        if not total.isfinite().all():
            raise UserError(f"gradients at {name} overflow in {dtype_name(model)}: try --dtype bfloat16 or float32")
    return totals


@contextmanager
def checkpointing_if_short(model: PreTrainedModel, tokens: int) -> Iterator[bool]:
    """Inside the block decoder layers recompute their activations for the backward pass, if memory is short.

    An estimate decides: the activations that a layer saves, 12 times its width and 4 times that of its MLP a token,
    and the logits with their gradient in fp32.
    """
    config = model.config.get_text_config()
    width = 12 * config.hidden_size + 4 * getattr(config, "intermediate_size", 4 * config.hidden_size)
    need = tokens * (config.num_hidden_layers * width * model.dtype.itemsize + 8 * config.vocab_size)
    short = need > free_memory(input_device(model)) / 2
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


def calibrate(
    model: PreTrainedModel, windows: Tensor, sweep: Mapping[int, KVSpec], calibration: CalibrationSpec
) -> dict[int, dict[str, tuple[Quantizer, Fit]]]:
    """{bits: {site: (quantizer, how well it fits)}} for all that sweep {bits: specs} asks, from windows [N,T] of text.

    Ranges and histograms do not depend on bits, so one pass serves every width. The activations of all windows wait in
    host memory and are fitted one projection at a time on its own device.
    """
    specs = next(iter(sweep.values()))
    sites = find_sites(model, specs)
    check_against_cache(model, sites)
    seen = record_activations(model, sites, windows)

    def activations(name: str) -> Tensor:
        x = seen[name].to(device_of(sites[name].module))
        if not x.isfinite().all():
            advice = "the model is broken" if model.dtype == torch.float32 else "try --dtype bfloat16 or float32"
            raise UserError(f"{name} gives nan or inf in {dtype_name(model)}, or never ran: {advice}")
        return x

    ranges = {name: fit_range(activations(name), specs[name.rpartition(".")[2]]) for name in sites}
    to_fit = {name: quantizer for name, quantizer in ranges.items() if quantizer.spec.codebook == "nuq"}
    histograms = fisher_histograms(model, windows, to_fit, calibration.fisher) if calibration.fisher else {}
    fitted: dict[int, dict[str, tuple[Quantizer, Fit]]] = {bits: {} for bits in sweep}
    for name, quantizer in ranges.items():
        x = activations(name)
        if name in to_fit and name not in histograms:
            histograms[name] = nuq_histogram(x, quantizer)
        for bits, each in sweep.items():
            quantizer = replace(quantizer, spec=each[name.rpartition(".")[2]])
            fitted[bits][name] = fit_codebook(x, quantizer, histograms.get(name), calibration.q_norm)
    return fitted


def fit_codebook(x: Tensor, quantizer: Quantizer, histogram: Tensor | None, rescale: bool) -> tuple[Quantizer, Fit]:
    """(quantizer on the CPU with its codebook, how well it fits x [N,T,C]).

    histogram is what NUQ levels are fitted to, None for other levels; rescale applies Q-Norm.
    """
    spec = quantizer.spec
    codebook = data_free_codebook(spec) if histogram is None else Codebook(kmeans_levels(histogram, spec.bits))
    if rescale:
        unit, inlier, _ = inliers(x, quantizer)
        codebook = q_norm(unit[inlier], codebook.levels.to(x.device))
    quantizer = replace(quantizer, codebook=codebook).to(x.device)
    return quantizer.to(torch.device("cpu")), measure_fit(x, quantizer)


def measure_fit(x: Tensor, quantizer: Quantizer) -> Fit:
    """How well quantizer reproduces x [N,T,C]."""
    sinks = quantizer.spec.sink_tokens
    y = x[:, sinks:].float()
    _, lo, hi = keep_and_range(x[:, sinks:], quantizer)
    quantized, keep = quantize(x, quantizer)
    error = (quantized[:, sinks:].float() - y).square().sum(dtype=torch.float64)
    finite = lo.isfinite() & hi.isfinite()  # a token whose entries are all kept has no range
    return Fit(
        lo=lo[finite].min().item() if finite.any() else 0.0,
        hi=hi[finite].max().item() if finite.any() else 0.0,
        kept=keep[:, sinks:].float().mean(dtype=torch.float64).item(),
        error=(error / y.square().sum(dtype=torch.float64).clamp(min=1e-30)).item(),
    )


def check_writable(paths: Iterable[str | None], inputs: Iterable[str | None]) -> None:
    """Raise UserError unless write_atomically will be able to write each of paths, and destroys nothing by that.

    No two paths may be the same, none may be one of the inputs or stand in a folder that is one (a model), and what
    exists must be a file that may be written.
    """
    taken = {Path(os.path.realpath(other)) for other in inputs if other}
    taken |= {Path(os.path.realpath(file)) for folder in taken if os.path.isdir(folder) for file in folder.iterdir()}
    for path in paths:
        if path is None:
            continue
        try:
            target = Path(path).resolve()
            if not path or path.endswith(os.sep) or (target.exists() and not target.is_file()):
                raise UserError(f"output {path!r} is not a regular file: give a file name")
            if target in taken:
                raise UserError(f"output {path!r} is also read, or named twice: give another name")
            if target.exists() and not os.access(target, os.W_OK):
                raise UserError(f"output {path!r} is write-protected: give another name")
            with unfinished_file(target):
                taken.add(target)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or error
            advice = "give a file in a writable folder"
            raise UserError(f"output {path!r} cannot be written ({reason}): {advice}") from error


@contextmanager
def unfinished_file(target: Path) -> Iterator[BinaryIO]:
    """A new file beside target, gone at the end of the block unless it was moved."""
    unfinished = target.with_name(f".{os.urandom(6).hex()}.partial")
    try:
        with open(unfinished, "xb") as file:
            yield file
    finally:
        unfinished.unlink(missing_ok=True)


def write_atomically(path: str, write: Callable[[BinaryIO], object]) -> None:
    """Let write fill a file beside path and put it in its place: a reader finds the old file or the whole new one."""
    target = Path(path).resolve()
    try:
        with unfinished_file(target) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
    except OSError as error:
        raise OSError(f"{path!r} could not be written ({error.strerror}): what stood there is untouched") from error


FILE_FORMAT, FILE_VERSION = "kvquant simulation: calibrated quantizers", 2


def save_calibration(path: str, fitted: Mapping[int, Mapping[str, Quantizer]], record: Mapping) -> None:
    """Write plain dicts and tensors, atomically: the quantizers {bits: {site: Quantizer}}, and how they were made.

    record holds "model" {"name", "channels" {site: C}}, "settings" and "calibration" (flags), and "versions".
    A site's range is the same for every width, its codebook is not.
    """
    stored: dict[str, dict] = {}
    for bits, quantizers in fitted.items():
        for name, q in quantizers.items():
            codebook = {part: getattr(q.codebook, part) for part in ("levels", "scale", "offset")}
            stored.setdefault(name, {"lo": q.lo, "hi": q.hi, "codebooks": {}})["codebooks"][bits] = codebook
    data = {"format": FILE_FORMAT, "format_version": FILE_VERSION, **record, "quantizers": stored}
    content = io.BytesIO()
    torch.save(data, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def versions() -> dict[str, str]:
    """Of Python and the libraries that the figures depend on."""
    packages = ("torch", "transformers", "datasets", "accelerate", "numpy")
    return {"python": sys.version.split()[0]} | {name: importlib.metadata.version(name) for name in packages}


def provenance(model: PreTrainedModel, name: str, settings: Mapping, seqlen: int) -> dict:
    """What a quantizer file says of its making: the model and its shape, the flags, the versions."""
    sites = find_sites(model, dict.fromkeys(settings["perchannel"] + settings["pertoken"]))
    channels = {name: site.width for name, site in sites.items()}
    shape = {"name": name, "type": model.config.model_type, "channels": channels}
    return {"model": shape, "settings": dict(settings), "calibration": {"seqlen": seqlen}, "versions": versions()}


SETTING_TYPES: dict[str, Any] = {
    **dict.fromkeys(("abits", "perchannel", "pertoken"), list),
    **dict.fromkeys(("include_sparse", "nf", "nuq", "norm", "clamp", "fisher"), bool),
    **dict.fromkeys(("first_few_fp16", "nsamples", "seed"), int),
    **dict.fromkeys(("fisher_weighting", "calib_dataset"), str),
    "sparsity_threshold": float,
    "cap_outliers": (float, NoneType),
}


def load_calibration(path: str) -> dict:
    """What save_calibration wrote, or the same made from a file in KVQuant's own format. Nothing in it is executed.

    Raises UserError for a file that is absent, damaged, of a later version, or holds anything but data.
    """
    if not os.path.isfile(path):
        raise UserError(f"quantizer file {path!r} does not exist, or is no regular file: make it with --calibrate")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = read_ours(path) if zipfile.is_zipfile(path) else read_kvquant(path)
        if data["format_version"] == FILE_VERSION:
            check_contents(data)
    except Exception as error:  # a damaged archive or pickle can raise anything
        reason = str(error) if isinstance(error, RefusedPickle) else type(error).__name__
        advice = "calibrate again, or get it again"
        raise UserError(f"quantizer file {path!r} is damaged, or holds more than data ({reason}): {advice}") from error
    if data["format_version"] != FILE_VERSION:
        there = repr(data["format_version"])[:20]
        raise UserError(f"quantizer file {path!r} has format version {there}; this program reads {FILE_VERSION}")
    return data


def read_ours(path: str) -> dict:
    """The content of a file that torch.save wrote, its checksums verified."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} does not match its checksum")
    data = torch.load(path, weights_only=True, map_location="cpu")
    if data["format"] != FILE_FORMAT:
        raise ValueError("it has another format")
    if data["format_version"] == 1:  # of a single width
        data["format_version"], bits = 2, data["settings"]["abits"]
        data["settings"]["abits"] = [bits]
        for parts in data["quantizers"].values():
            parts["codebooks"] = {bits: {part: parts.pop(part) for part in ("levels", "scale", "offset")}}
    return data


def check_contents(data: Mapping) -> None:
    """Raise ValueError, TypeError or KeyError unless load_calibration's data has every part, of the right type."""
    settings, model = data["settings"], data["model"]
    wrong = [name for name in settings if not isinstance(settings[name], SETTING_TYPES[name])]
    widths = settings.get("abits", [4])
    if not widths or not all(type(bits) is int and 2 <= bits <= 8 for bits in widths) or len(set(widths)) < len(widths):
        wrong.append("abits")
    if not isinstance(model["name"], (str, NoneType)):
        wrong.append("model")
    leaves = [*settings.get("perchannel", ()), *settings.get("pertoken", ())]
    wrong += [leaf for leaf in [*leaves, *data["quantizers"]] if not isinstance(leaf, str)]
    for name, parts in data["quantizers"].items():
        codebooks = list(parts["codebooks"].values())
        tensors = [parts[part] for part in ("lo", "hi") if parts[part] is not None]
        tensors += [codebook["levels"] for codebook in codebooks]
        numbers = [codebook[part] for codebook in codebooks for part in ("scale", "offset")]
        sound = all(type(t) is Tensor and t.layout is torch.strided and not t.requires_grad for t in tensors)
        sound = sound and all(t.dtype == torch.float32 and t.ndim == 1 and t.isfinite().all() for t in tensors)
        sound = sound and all(isinstance(x, float) and math.isfinite(x) for x in numbers)
        sound = sound and all(set(each) == {"levels", "scale", "offset"} and each["scale"] > 0 for each in codebooks)
        if not sound or not isinstance(model["channels"][name], (int, NoneType)):
            wrong.append(name)
    if wrong:
        raise ValueError(f"{wrong[0]!r} is of another type, or out of range")


class RefusedPickle(pickle.UnpicklingError):
    """A pickle asks for something that is neither a tensor nor an array of plain numbers."""


class PickledDtype:
    """Stands in for numpy.dtype while a pickle is read: a code such as f4, and a byte order."""

    def __init__(self, code: str, *_):
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise RefusedPickle(f"it asks for an array of {code!r}, which is no plain number")
        self.code = code

    def __setstate__(self, state: tuple):
        self.code = {"<": "<", ">": ">"}.get(state[1], "") + self.code

    def array(self, content: bytes, shape: tuple = (), order: Any = "C") -> np.ndarray:
        """A new array of content's numbers."""
        return np.frombuffer(content, np.dtype(self.code)).reshape(shape, order=order).copy()


class PickledArray:
    """Stands in for an array that numpy's older protocols build up in two steps."""

    def __setstate__(self, state: tuple):
        _, shape, dtype, is_fortran, content = state
        self.value = dtype.array(content, shape, "F" if is_fortran else "C")


class TensorUnpickler(pickle.Unpickler):
    """Reads pickles of torch tensors and numpy arrays in plain containers, and refuses to resolve any other name.

    No live object of a library is ever handed out: what a pickle may call are stand-ins made for that one call.
    """

    def find_class(self, module: str, name: str) -> Callable:
        """The stand-in for a name that pickles of tensors and arrays use."""
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        stand_ins: dict[str, Callable] = {
            "collections.OrderedDict": lambda: OrderedDict(),
            "torch._utils._rebuild_tensor_v2": lambda *parts: torch._utils._rebuild_tensor(*parts[:4]),
            "torch.storage._load_from_bytes": lambda content: torch.load(io.BytesIO(content), "cpu", weights_only=True),
            "numpy.ndarray": lambda: None,
            "numpy.dtype": lambda *parts: PickledDtype(*parts),
            "numpy._core.multiarray._reconstruct": lambda *_: PickledArray(),
            "numpy._core.multiarray.scalar": lambda dtype, content: dtype.array(content),
            "numpy._core.numeric._frombuffer": lambda content, dtype, *how: dtype.array(bytes(content), *how),
            "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes, as protocol 2 writes them
        }
        if full not in stand_ins:
            raise RefusedPickle(f"it asks for {full[:80]}, which is neither a tensor nor an array")
        return stand_ins[full]


def plain(value: object) -> Tensor:
    """The tensor that a pickled tensor, array or number stands for."""
    return torch.as_tensor(value.value if isinstance(value, PickledArray) else value)


def read_kvquant(path: str) -> dict:
    """A quantizer file as KVQuant's calibration writes it, in the form of load_calibration.

    {"model.layers.I.self_attn.k_proj": (upper, lower[, [centroids][, normscale, normoffset]])}: upper and lower are
    [1,C] for keys; for values, whose range is dynamic, they are ignored. It names bits and codebook for NUQ only.
    """
    with open(path, "rb") as file:
        for opcode, number, _ in pickletools.genops(file):  # the unpickler makes room for as many objects
            if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(number, int) and number > os.path.getsize(path):
                raise RefusedPickle(f"it numbers an object {number}, and has no room for so many")
        file.seek(0)
        published = TensorUnpickler(file).load()
    quantizers, widths, settings = {}, {}, dict[str, Any]()
    for name, (upper, lower, *rest) in published.items():
        levels = plain(rest[0][0]).float().flatten().sort().values if rest else None
        scale, offset = (float(plain(x)) for x in rest[1:]) if len(rest) == 3 else (1.0, 0.0)
        upper, lower = plain(upper).float(), plain(lower).float()
        widths[name] = upper.numel() if len(upper) == 1 else None
        quantizers[name] = {"lo": lower.flatten(), "hi": upper.flatten(), "codebooks": {}}
        settings = {"nuq": levels is not None, "norm": len(rest) == 3}
        if levels is not None:
            bits = len(levels).bit_length() - 1
            quantizers[name]["codebooks"] = {bits: {"levels": levels, "scale": scale, "offset": offset}}
            settings["abits"] = [bits]
    model = {"name": None, "channels": widths}
    return {"format_version": FILE_VERSION, "model": model, "settings": settings, "quantizers": quantizers}


def export_kvquant(path: str, quantizers: Mapping[str, Quantizer]) -> None:
    """Write quantizers as read_kvquant reads them, a plain pickle of tensors and arrays, atomically."""
    published = {}
    for name, q in quantizers.items():
        anything = torch.ones(2, 1)  # [tokens,1] there, and ignored: the range is dynamic
        entry: tuple = (anything, -anything) if q.lo is None or q.hi is None else (q.hi[None], q.lo[None])
        is_normed = q.codebook.decoded is not q.codebook.levels
        if q.spec.codebook == "nuq" or is_normed:
            entry += ([q.codebook.levels[:, None].numpy()],)
            if is_normed:
                entry += tuple(torch.tensor(x, dtype=torch.float64) for x in (q.codebook.scale, q.codebook.offset))
        published[name] = entry
    write_atomically(path, lambda file: pickle.dump(published, file))


def stored_quantizers(path: str, data: Mapping, model: PreTrainedModel, specs: KVSpec) -> dict[str, Quantizer]:
    """{site: Quantizer} from load_calibration's data, checked against the sites that model has and specs name.

    Raises UserError if the file was made for a model of another shape, or holds no usable quantizer.
    """
    made_for = data["model"].get("type", model.config.model_type)
    if made_for != model.config.model_type:
        sides = f"a model of type {made_for}, and this one is {model.config.model_type}"
        raise UserError(f"quantizer file {path!r} was calibrated for {sides}: calibrate again")
    sites = find_sites(model, specs)
    stored = {name: parts for name, parts in data["quantizers"].items() if name.rpartition(".")[2] in specs}
    widths = {name: site.width for name, site in sites.items()}
    for name in [*sites, *stored]:
        here = widths.get(name, "none")
        there = (data["model"]["channels"][name] or here) if name in stored else "no"
        if there != here or here == "none":
            origin = f"{path!r} was calibrated for {data['model']['name'] or 'another model'}"
            raise UserError(f"quantizer file {origin}: it has {there} channels for {name}, this model has {here}")
    quantizers = {}
    for name, parts in stored.items():
        spec = specs[name.rpartition(".")[2]]
        known, codebook = parts["codebooks"], None
        if spec.bits in known:
            codebook = Codebook(**known[spec.bits])
        elif not known and spec.codebook != "nuq":  # a file of KVQuant's own
            codebook = data_free_codebook(spec)
        bounds = (parts["lo"], parts["hi"]) if spec.axis == PER_CHANNEL else (None, None)
        if codebook is None or not is_sound(quantizer := Quantizer(spec, codebook, *bounds), widths[name]):
            raise UserError(f"quantizer file {path!r} has no usable {spec.bits}-bit quantizer for {name}")
        quantizers[name] = quantizer
    return quantizers


def is_sound(quantizer: Quantizer, width: int) -> bool:
    """Whether what was read fits its spec: levels sorted inside [-1, 1], a range for every channel."""
    spec, levels = quantizer.spec, quantizer.codebook.levels
    if len(levels) != 2**spec.bits or (levels.diff() < 0).any() or levels.abs().max() > 1 + 1e-6:
        return False
    if spec.codebook != "nuq" and not torch.allclose(levels, data_free_codebook(spec).levels, atol=1e-6):
        return False
    if spec.axis == PER_TOKEN:
        return True
    lo, hi = quantizer.lo, quantizer.hi
    return lo is not None and hi is not None and len(lo) == len(hi) == width and bool((lo <= hi).all())


# ----------------------------------------------------------------------------------------------------------------------
# 6. Model and text


@contextmanager
def one_line_errors(what: str, instead: str) -> Iterator[None]:
    """Turn what a loader of what raises into one UserError that says what to do; instead is another thing to give."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        yield
    except UserError:
        raise
    except Exception as error:
        chain: list[BaseException] = [error]
        while link := chain[-1].__cause__ or chain[-1].__context__:
            chain.append(link)

        def caused_by(*kinds: type) -> bool:
            return any(isinstance(link, kinds) for link in chain)

        is_cut = any(each.__name__ == "TransportError" for link in chain for each in type(link).__mro__)  # of httpx
        if caused_by(GatedRepoError):
            advice = "it is gated: accept its licence on its hub page, then log in with `hf auth login`"
        elif caused_by(OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError) or is_cut:
            cure = "unset HF_HUB_OFFLINE" if HF_HUB_OFFLINE else "check the network"
            advice = f"the hub cannot be reached and no copy is cached: {cure}, or give {instead}"
        elif re.search("attn_implementation|attention implementation", str(error)):
            advice = "it has no such attention: give --attn_implementation eager"
        elif caused_by(ImportError):
            advice = f"it needs a library that is not installed: {' '.join(str(error).split())[:200]}"
        elif caused_by(RepositoryNotFoundError):
            advice = (
                "no such repository on the hub: check the spelling, or log in with `hf auth login` if it is private"
            )
        else:
            reason = " ".join(str(error).split())
            advice = f"is the copy complete and undamaged? {type(error).__name__}: {reason[:200]}"
        raise UserError(f"cannot load {what}: {advice}") from error


def load_config_and_tokenizer(name: str):
    """(config, tokenizer) of a hub id or a local folder. Cheap, so that mistakes show before any weights load."""
    from transformers import AutoConfig, AutoTokenizer

    folder = Path(name)
    if os.path.isfile(name):
        raise UserError(f"model {name!r} is a file: give the folder that holds it, with its config.json")
    if os.path.isdir(name) and not (folder / "config.json").is_file():
        raise UserError(f"model folder {name!r} has no config.json: give a folder written by save_pretrained")
    if not name or (not os.path.isdir(name) and not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name)):
        raise UserError(f"model {name!r} is neither a folder nor a hub id such as meta-llama/Llama-3-8B")
    with one_line_errors(f"model {name!r}", "a local folder"):
        loaders = (AutoConfig, AutoTokenizer)
        config, tokenizer = (loader.from_pretrained(name, trust_remote_code=False) for loader in loaders)
    return config, tokenizer


def skeleton(config, dtype: str = "auto") -> PreTrainedModel:
    """A model of this config whose weights have shapes, but no values and no memory."""
    from transformers import AutoModelForCausalLM

    with one_line_errors(f"model {config.name_or_path!r}", "a local folder"), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=None if dtype == "auto" else dtype)
    return model.eval().requires_grad_(False)


def multiplied(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The weights of the decoder that tokens are multiplied with: projections [out,in] and experts [experts,out,in]."""
    decoder, table = model.get_decoder(), model.get_input_embeddings().weight
    return {name: each for name, each in decoder.named_parameters() if each.ndim > 1 and each is not table}


def parameter_bytes(config, dtype: str) -> int:
    """What the weights of a model of this config take in dtype, or as they are quantized, from its shapes alone."""
    model, how = skeleton(config, dtype), weight_quantization(config)
    known = {"load_in_4bit": 4, "load_in_8bit": 8}
    bits = next((width for flag, width in known.items() if how.get(flag)), how.get("bits"))
    bits = 8 if bits is None and how.get("quant_method") == "fp8" else bits
    packed = sum(each.numel() * (each.itemsize - bits / 8) for each in multiplied(model).values()) if bits else 0
    return sum(parameter.nbytes for parameter in model.parameters()) - int(packed)


def weight_quantization(config) -> dict:
    """How the weights are quantized on disk, as the config says it; {} if they are not."""
    how = getattr(config, "quantization_config", None) or {}
    return how if isinstance(how, dict) else how.to_dict()


WORKSPACE = 2**31  # bytes that an evaluation takes besides the weights, at the least


def placement(spec: ModelSpec, config) -> torch.device | str:
    """The device of a model, or "auto", accelerate's map over all GPUs and host memory, if one GPU does not hold it."""
    device = spec.torch_device
    if spec.device != "auto" or device.type == "cpu" or process_count() > 1:
        return device
    need, free = parameter_bytes(config, spec.resolved(config).dtype) + WORKSPACE, free_memory(device)
    return device if need <= free else "auto"


def devices_of(model: PreTrainedModel) -> str:
    """Such as cpu, or cuda:0, cuda:1; "disk" and "cpu" beside a GPU say where weights wait that it has no room for."""
    placed = getattr(model, "hf_device_map", None) or {"": model.device}
    return ", ".join(dict.fromkeys(f"cuda:{at}" if isinstance(at, int) else str(at) for at in placed.values()))


def load_model(spec: ModelSpec, config) -> PreTrainedModel:
    """The model on its device or devices, in eval mode, every `auto` of spec resolved (see ModelSpec)."""
    from transformers import AutoModelForCausalLM

    with one_line_errors(f"model {spec.name!r}", "a local folder"):
        device = placement(spec, config)
        spec = spec.resolved(config)
        announce(f"loading {spec.name} {'over all GPUs' if device == 'auto' else f'to {device}'}")
        if spec.torch_device.type == "cuda":
            torch.cuda.set_device(spec.torch_device)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            spec.name,
            config=config,
            dtype=spec.dtype,
            device_map=device,
            attn_implementation=spec.attn_implementation,
            output_loading_info=True,
        )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise UserError(f"model {spec.name!r} lacks {len(missing)} tensors, {missing[0]} first: is the copy complete?")
    if surplus := sorted(found["unexpected_keys"]):
        warn(f"model {spec.name!r} has {len(surplus)} tensors that its config does not name, {surplus[0]} first")
    if device == "auto" and re.search("cpu|disk", devices_of(model)):
        warn(f"model {spec.name!r} is larger than the GPUs: weights wait in host memory or on disk, which is slow")
    return model.eval().requires_grad_(False)


def read_text_file(path: str) -> list[str]:
    """The documents of a text file: a .txt is one, a .jsonl or .parquet has one a row in column `text`."""
    if path.lower().endswith(".parquet"):
        from datasets import Dataset

        with one_line_errors(f"text file {path!r}", "another file"):
            rows = Dataset.from_parquet(path, keep_in_memory=True)
            texts = rows.select_columns("text")[:]["text"] if "text" in rows.column_names else []
        if "text" not in rows.column_names:
            raise UserError(f"text file {path!r} has no column `text`; its columns are: {', '.join(rows.column_names)}")
        if bad := [number for number, text in enumerate(texts, 1) if not isinstance(text, str)]:
            raise UserError(f"text file {path!r}, row {bad[0]} has no string under `text`: remove such rows")
        return texts
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"text file {path!r} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv") from error
    if path.lower().endswith(".txt"):
        return [text]
    return [jsonl_text(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def jsonl_text(path: str, number: int, line: str) -> str:
    """The string under `text` in one line of a .jsonl file."""
    try:
        text = json.loads(line)["text"]
        text.encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"text file {path!r}, line {number} is not JSON, or no Unicode: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'text file {path!r}, line {number} is not an object with a string under "text"') from error
    return text


def load_documents(name: str, split: str = "test") -> list[str]:
    """The documents of a dataset in DATASETS, its "test" or its "train" split, or of a text file."""
    if name not in DATASETS:
        return read_text_file(name)
    from datasets import load_dataset

    with one_line_errors(f"dataset {name!r}", "a text file"):
        if name == "wikitext2":
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        else:
            shard = "c4-train.00000-of-01024" if split == "train" else "c4-validation.00000-of-00008"
            rows = load_dataset("allenai/c4", data_files={split: f"en/{shard}.json.gz"}, split=split)
    return rows[:]["text"]


def tokenize(tokenizer, text: str) -> Tensor:
    """[N] ids of text, tokenized once with the tokenizer's own special tokens: BOS stands at the very start only."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def disjoint_windows(ids: Tensor, seqlen: int) -> Tensor:
    """[N // seqlen, seqlen]: ids [N] cut into windows, the incomplete tail dropped."""
    count = len(ids) // seqlen
    return ids[: count * seqlen].view(count, seqlen)


def sample_documents(
    documents: Sequence[str], encode: Callable[[str], Tensor], seqlen: int, count: int, seed: int = 0
) -> Tensor:
    """[count, seqlen]: one random window from each of count random documents longer than seqlen tokens.

    The protocol of GPTQ and KVQuant for C4, draw for draw (random.seed), so the figures compare with theirs.
    A document of fewer bytes than seqlen is passed over without being tokenized; it cannot hold that many tokens.
    """
    rng, long, short = random.Random(seed), dict[int, Tensor](), set[int]()
    windows: list[Tensor] = []
    while len(windows) < count:
        if len(short) == len(documents):
            raise UserError(f"none of {len(documents)} documents is longer than seqlen {seqlen} tokens: lower seqlen")
        i = rng.randint(0, len(documents) - 1)
        if i not in long and i not in short:
            ids = encode(documents[i]) if len(documents[i].encode()) >= seqlen else None
            if ids is not None and len(ids) > seqlen:
                long[i] = ids
            else:
                short.add(i)
        if i in long:
            start = rng.randint(0, len(long[i]) - seqlen - 1)
            windows.append(long[i][start : start + seqlen])
    return torch.stack(windows)


def load_ids(name: str, split: str, tokenizer, least: int) -> Tensor:
    """[N] ids of a text, its documents joined by blank lines; N is at least `least`, what one window takes."""
    text = "\n\n".join(load_documents(name, split))
    if not text.strip():
        raise UserError(f"{name} is empty: give a text of at least {least} tokens")
    ids = tokenize(tokenizer, text)
    if len(ids) < least:
        raise UserError(f"{name} has {len(ids)} tokens, and one window takes {least}: lower seqlen")
    return ids


def load_windows(name: str, tokenizer, spec: EvalSpec) -> Tensor:
    """[N, seqlen] ids: the evaluation windows of one dataset, at most spec.limit of them."""
    if name == "c4":
        count = min(256, spec.limit)
        return sample_documents(load_documents(name), partial(tokenize, tokenizer), spec.seqlen, count)
    return disjoint_windows(load_ids(name, "test", tokenizer, spec.seqlen), spec.seqlen)[: spec.limit]


def load_texts(config, tokenizer, spec: EvalSpec) -> dict[str, Tensor]:
    """{dataset: load_windows}, checked against what a model of this config can take."""
    windows = {name: load_windows(name, tokenizer, spec) for name in spec.datasets}
    check_windows(config, torch.cat(list(windows.values())))
    return windows


def sample_windows(ids: Tensor, seqlen: int, count: int, seed: int) -> Tensor:
    """[count, seqlen] random windows of ids [N], N > seqlen, drawn as GPTQ and KVQuant draw their calibration text."""
    rng = random.Random(seed)
    starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(count)]
    return torch.stack([ids[start : start + seqlen] for start in starts])


def load_calibration_windows(config, tokenizer, spec: CalibrationSpec) -> Tensor:
    """[nsamples, seqlen] ids of the calibration text, checked against what a model of this config can take."""
    need, free = 8 * spec.nsamples * spec.seqlen, free_memory("cpu")
    if need > free:
        raise UserError(f"nsamples {spec.nsamples} takes {need >> 30} GiB for the token ids alone: lower it")
    if spec.dataset == "c4":
        documents, encode = load_documents("c4", "train"), partial(tokenize, tokenizer)
        windows = sample_documents(documents, encode, spec.seqlen, spec.nsamples, spec.seed)
    else:
        ids = load_ids(spec.dataset, "train", tokenizer, spec.seqlen + 1)
        windows = sample_windows(ids, spec.seqlen, spec.nsamples, spec.seed)
    check_windows(config, windows)
    return windows


def check_windows(config, windows: Tensor) -> None:
    """Raise UserError if windows [N,T] have a token that a model of this config lacks; warn if they are too long."""
    config = config.get_text_config()
    if windows.max() >= config.vocab_size:
        has = f"the tokenizer gives token {windows.max().item()}, the model has {config.vocab_size}"
        raise UserError(f"{has}: use the tokenizer that the model was trained with")
    positions = getattr(config, "max_position_embeddings", None)
    if positions and windows.shape[1] > positions:
        warn(f"seqlen {windows.shape[1]} exceeds the {positions} positions that the model was made for")


# ----------------------------------------------------------------------------------------------------------------------
# 7. Evaluation: a model, windows and settings in, numbers out


def cache_widths(model: PreTrainedModel) -> dict[str, dict[str, int]]:
    """{"keys": {site: C, ...}, "values": {...}}: all that model caches, quantized or not, in model order."""
    widths: dict[str, dict[str, int]] = {part: {} for part in CACHE_PARTS.values()}
    for name, site in all_sites(model).items():
        if part := CACHE_PARTS.get(name.rpartition(".")[2]):
            widths[part][name] = site.width
    return widths


@dataclass(frozen=True, eq=False)
class Setting:
    """One row of the report: a width, what is quantized to it ("keys and values"), by which {site: Quantizer}."""

    abits: int
    quantized: str
    quantizers: Mapping[str, Quantizer]

    def __str__(self) -> str:
        return f"abits {self.abits}, {self.quantized}"


def parts_of(sites: Iterable[str]) -> str:
    """Such as "keys and values": what the projections at sites are to the cache."""
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in sites)
    return " and ".join(CACHE_PARTS.get(leaf, leaf) for leaf in leaves) or "nothing"


def attribution_settings(whole: Setting) -> list[Setting]:
    """Settings that quantize a part of what whole does: each projection in all layers, all of them, one layer each."""
    parts: dict[str, dict[str, Quantizer]] = {}
    layers: dict[str, dict[str, Quantizer]] = {}
    for name, quantizer in whole.quantizers.items():
        parts.setdefault(parts_of([name]), {})[name] = quantizer
        if (layer := layer_of(name)) is not None:
            layers.setdefault(f"layer {layer}", {})[name] = quantizer
    rows = parts | {whole.quantized: whole.quantizers} | layers
    return [Setting(whole.abits, quantized, quantizers) for quantized, quantizers in rows.items()]


@dataclass(frozen=True)
class Window:
    """What one window gave under one setting: means over its predicted tokens, average bits over its cache entries."""

    nll: float
    kl: float | None = None  # against the unquantized model, where that is measured
    top1_agreement: float | None = None
    key_bits: float | None = None  # None where the model has no such projection
    value_bits: float | None = None


@dataclass(frozen=True, eq=False)
class Run:
    """One evaluation, and what is known of it so far.

    texts     {dataset: windows [N,T]}
    settings  the unquantized model first, if the others are to be compared with it
    widths    cache_widths of the model
    context   tokens of the cache whose size is reported
    measured  {dataset: [window][setting]}
    seconds   {dataset: wall time of what is measured, printing and saving included; of several processes the first's}
    place     if this is a process's share: how many windows of the text come before it, and are there in all
    """

    texts: Mapping[str, Tensor]
    settings: Sequence[Setting]
    widths: Mapping[str, Mapping[str, int]]
    context: int = OutputSpec.report_context
    measured: dict[str, list[list[Window]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    place: tuple[int, int] | None = None

    @property
    def is_paired(self) -> bool:
        """Whether settings are compared with the unquantized model."""
        return len(self.settings) > 1 and self.settings[0].abits == UNQUANTIZED


HEAD_TOKENS = 256  # whose logits exist at a time: 125 MiB in fp32 for 128,256 words


@contextmanager
def body_passed_over(model: PreTrainedModel, output) -> Iterator[None]:
    """Inside the block model's body (its decoder) does nothing and returns output, so that model is its head alone."""
    body: Any = model.get_decoder()
    replaced, calls = vars(body).get("forward"), []  # accelerate puts its own there

    def passed_over(*args, **kwargs):
        calls.append(None)
        return output

    body.forward = passed_over
    try:
        yield
    finally:
        del body.forward
        if replaced is not None:
            body.forward = replaced
    if not calls:
        raise UserError(f"{type(model).__name__} does not compute its logits from what its decoder returns")


def head(model: PreTrainedModel, output, tokens: slice) -> Tensor:
    """[B,t,V] fp32 log probabilities at some tokens of output, which is what the model's body returned.

    The model's own class computes the logits, with all that it does after the projection (soft caps, scales).
    """
    part = type(output)(last_hidden_state=output.last_hidden_state[:, tokens])
    blank = torch.zeros(part.last_hidden_state.shape[:2], dtype=torch.long, device=input_device(model))
    with body_passed_over(model, part):
        return model(input_ids=blank, use_cache=False).logits.log_softmax(-1, dtype=torch.float32)


def mean_statistics(model: PreTrainedModel, ids: Tensor, outputs: Sequence, is_paired: bool) -> Tensor:
    """[S,3,B] means of token_statistics over the predicted tokens of ids [B,T], from the body's output in S settings.

    If is_paired the first is the reference, else there is the loss alone, [S,1,B]. Logits exist for HEAD_TOKENS tokens
    at a time, those of one setting and of the reference.
    """
    predicted = ids.shape[1] - 1
    totals = torch.zeros(len(outputs), 3 if is_paired else 1, len(ids), dtype=torch.float64, device=ids.device)
    chunk = max(1, HEAD_TOKENS // len(ids))
    for start in range(0, predicted, chunk):
        stop, reference = min(start + chunk, predicted), None
        for total, output in zip(totals, outputs, strict=True):
            log_probs = head(model, output, slice(start, stop))
            if is_paired and reference is None:
                reference = log_probs, log_probs.argmax(-1)
            targets = ids[:, start + 1 : stop + 1].to(log_probs.device)
            total += token_statistics(log_probs, targets, reference).sum(-1, dtype=torch.float64).to(total.device)
    return totals / predicted


def average_bits(
    widths: Mapping[str, int], quantizers: Mapping[str, Quantizer], outliers: Sequence[float], tokens: int
) -> list[float | None]:
    """[B] bits an entry in the caches of B windows with that many outliers in all, over projections {site: C}."""
    if not widths:
        return [None] * len(outliers)
    fixed = sum(storage_bits(quantizers.get(name), tokens, width) for name, width in widths.items())
    entries = tokens * sum(widths.values())
    return [(fixed + OUTLIER_BITS * count) / entries for count in outliers]


def count_outliers(counts: Mapping[str, Tensor], run: Run, blank: Tensor) -> Tensor:
    """[2,B] outliers of each window in all keys and in all values, from {site: [B,T]}; blank is [B,T] zeros."""
    parts = [[counts[name].to(blank.device) for name in sites if name in counts] for sites in run.widths.values()]
    return torch.stack([torch.stack([blank, *part]).sum((0, -1)) for part in parts]).double()


@torch.inference_mode()
def measure_batch(
    model: PreTrainedModel, ids: Tensor, run: Run, on_forward: Callable[[int], object] = lambda count: None
) -> Callable[[], list[list[Window]]]:
    """Start on windows ids [B,T] in every setting of run; call what is returned to wait for the figures, [B][setting].

    The unquantized model's logits are computed once, for all settings that are compared with it. on_forward(B) is
    called after each forward pass. The host is free to start on the next batch before it reads these figures.
    """
    ids = ids.to(input_device(model))
    outputs, outliers = [], []
    for setting in run.settings:
        with simulate_quantization(model, setting.quantizers) as counts:
            output = model.get_decoder()(input_ids=ids, use_cache=False)
        outputs.append(type(output)(last_hidden_state=output.last_hidden_state))  # whatever else it holds may go
        outliers.append(count_outliers(counts, run, torch.zeros_like(ids)))
        on_forward(len(ids))
    means = mean_statistics(model, ids, outputs, run.is_paired)
    figures = torch.cat([torch.stack(outliers), means], dim=1).to("cpu", non_blocking=True)  # [S,2+k,B]
    done = torch.cuda.Event() if ids.is_cuda else None
    if done is not None:
        done.record(torch.cuda.current_stream(ids.device))

    def read() -> list[list[Window]]:
        if done is not None:
            done.synchronize()
        return windows_from(figures.tolist(), run, ids.shape[1])

    return read


def windows_from(figures: Sequence[Sequence[Sequence[float]]], run: Run, tokens: int) -> list[list[Window]]:
    """[B][setting] from figures [S,2+k,B]: outliers of keys and of values, then k token statistics."""
    columns = []
    for setting, (keys, values, nll, *rest) in zip(run.settings, figures, strict=True):
        paired: Sequence[Sequence[float | None]] = rest or [[None] * len(nll)] * 2
        counts = {"keys": keys, "values": values}
        bits = [average_bits(run.widths[part], setting.quantizers, counts[part], tokens) for part in counts]
        columns.append([Window(*each) for each in zip(nll, *paired, *bits, strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


def perplexity(nll: Sequence[float]) -> float:
    """exp of the mean of windows' losses in nats; infinite beyond 1e299."""
    mean = math.fsum(nll) / len(nll)
    return mean * math.inf if mean > 690 else math.exp(mean)


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of values that are taken as independent; None for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def paired_difference(nll: Sequence[float], baseline: Sequence[float]) -> dict[str, float | None]:
    """{"delta_ppl", "delta_percent", each with its "_se"} from losses in nats on the same windows.

    To first order in the losses a difference of perplexities is a mean over windows, and its standard error that of a
    mean: how hard a window is for both cancels out, which is why a pair tells more than two separate runs.
    """
    ppl, base = perplexity(nll), perplexity(baseline)
    pairs = list(zip(nll, baseline, strict=True))
    return {
        "delta_ppl": ppl - base,
        "delta_ppl_se": standard_error([ppl * one - base * other for one, other in pairs]),
        "delta_percent": 100 * (ppl / base - 1),
        "delta_percent_se": standard_error([100 * ppl / base * (one - other) for one, other in pairs]),
    }


def check_finite(model: PreTrainedModel, run: Run, dataset: str, first: int, batch: Sequence[Sequence[Window]]) -> None:
    """Raise UserError for the first figure that is none in batch, the windows of dataset from the first on."""
    before, total = run.place or (0, len(run.texts[dataset]))
    for number, row in enumerate(batch, before + first + 1):
        for setting, window in zip(run.settings, row, strict=True):
            if not math.isfinite(perplexity([window.nll]) + (window.kl or 0)):
                place = f"{dataset}, {setting}: window {number} of {total}"
                advice = "the model is broken" if model.dtype == torch.float32 else "try --dtype bfloat16 or float32"
                figure = f"loss {window.nll}" if window.kl is None else f"loss {window.nll}, KL divergence {window.kl}"
                source = first_overflow(model, run.texts[dataset][number - before - 1], setting)
                where = f", {source} overflows first" if source else ""
                raise UserError(f"{place} has {figure} in {dtype_name(model)}{where}: {advice}")


@torch.inference_mode()
def first_overflow(model: PreTrainedModel, ids: Tensor, setting: Setting) -> str | None:
    """Such as model.layers.3.mlp.down_proj: the first projection whose output is not finite for window ids [T]."""
    found: list[str] = []

    def look(module: nn.Module, args: tuple, out: Tensor, name: str) -> None:
        if not found and not out.isfinite().all():
            found.append(name)

    watched = [(module, partial(look, name=name)) for name, module in projections(model).items()]
    with torch.compiler.set_stance("force_eager"), simulate_quantization(model, setting.quantizers), hooked(watched):
        model.get_decoder()(input_ids=ids[None].to(input_device(model)), use_cache=False)
    return found[0] if found else None


def measure_what_fits(
    model: PreTrainedModel, ids: Tensor, run: Run, on_forward: Callable[[int], object]
) -> tuple[int, Callable[[], list[list[Window]]]]:
    """(B, measure_batch) of the first B of windows ids, all if they do not run out of memory."""

    def attempt(size: int) -> tuple[int, Callable[[], list[list[Window]]]]:
        passes: list[int] = []

        def count(windows: int) -> None:
            passes.append(windows)
            on_forward(windows)

        try:
            return size, measure_batch(model, ids[:size], run, count)
        except BaseException:
            on_forward(-sum(passes))
            raise

    try:
        return attempt(len(ids))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    from accelerate.utils import find_executable_batch_size

    try:  # outside the handler, which holds what the failed attempt had in memory
        return find_executable_batch_size(starting_batch_size=int(0.9 * len(ids)))(attempt)()
    except RuntimeError as error:
        if "reached zero" not in str(error):
            raise
    advice = "lower --seqlen, choose a smaller --dtype, or give the model more GPUs"
    raise UserError(f"one window of seqlen {ids.shape[1]} runs out of memory on {devices_of(model)}: {advice}")


def batch_size_for_memory(model: PreTrainedModel) -> int:
    """How many windows fit, by the most memory that one took since the last reset_peak_memory: 1 on a CPU."""
    fits = []
    for device in {parameter.device for parameter in model.parameters() if parameter.is_cuda}:
        took = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
        fits.append(int(0.9 * free_memory(device) / max(took, 1)))
    return max(1, min(fits, default=1))


def reset_peak_memory() -> None:
    """Let batch_size_for_memory see what comes from here on."""
    for device in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        torch.cuda.reset_peak_memory_stats(device)


def batches(
    model: PreTrainedModel, run: Run, dataset: str, batch_size: int | None, on_forward: Callable[[int], object]
) -> Iterator[tuple[int, Callable[[], list[list[Window]]]]]:
    """(place of the first window, measure_batch) for batch after batch of what run lacks of dataset.

    Without a batch_size the first window shows how many fit; UserError for a batch_size that does not. If memory runs
    out later, where batches fitted before, the windows are tried again in smaller ones.
    """
    reset_peak_memory()
    windows, first, size = run.texts[dataset], len(run.measured[dataset]), batch_size or 1
    is_probe, begin = batch_size is None, first
    while first < len(windows):
        ids = windows[first : first + size]
        count, read = measure_what_fits(model, ids, run, on_forward)
        if is_probe:
            size, is_probe = batch_size_for_memory(model), False
        elif count < len(ids) and (batch_size is None or first > begin):
            if batch_size is not None:
                warn(f"{dataset}, window {first + 1}: out of memory, which sufficed before; going on by {count}")
            size = count
        elif count < len(ids):
            took = f"batch_size {size} runs out of memory at seqlen {ids.shape[1]} on {devices_of(model)}"
            raise UserError(f"{took}: --batch_size {count} fits, and auto finds it")
        yield first, read
        first += count


def batches_ahead(model: PreTrainedModel) -> int:
    """How many batches are started before one is read."""
    return 1 if input_device(model).type == "cuda" else 0


def measure(model: PreTrainedModel, run: Run, batch_size: int | None = 1) -> Iterator[tuple[str, bool]]:
    """Fill run.measured, batch by batch; yields (dataset, whether that is all of it) after each.

    A GPU starts on the next batch before one is read, so that it never waits for the host; if anything interrupts,
    what was started is read first. Raises UserError at the first window whose perplexity is infinite or nan.
    """
    total, done = (sum(map(len, each.values())) * len(run.settings) for each in (run.texts, run.measured))
    ahead = batches_ahead(model)
    with progress("measure", total=total, initial=done) as bar:
        for dataset in run.texts:
            started: list[tuple[int, Callable[[], list[list[Window]]]]] = []
            rows = run.measured.setdefault(dataset, [])
            begin = time.perf_counter() - run.seconds.get(dataset, 0.0)

            def read(started=started, rows=rows, dataset=dataset, begin=begin) -> tuple[str, bool]:
                first, figures = started[0]
                batch = figures()
                check_finite(model, run, dataset, first, batch)
                run.seconds[dataset] = time.perf_counter() - begin
                rows[first:] = batch  # interrupted here, it is read once more
                started.pop(0)
                running = [perplexity([row[column].nll for row in rows]) for column in range(len(run.settings))[:4]]
                more = " ..." * (len(run.settings) > 4)
                bar.set_postfix_str(f"ppl {' '.join(f'{ppl:.4f}' for ppl in running)}{more}")
                return dataset, False

            try:
                for each in batches(model, run, dataset, batch_size, bar.update):
                    started.append(each)
                    if len(started) > ahead:
                        yield read()
                while started:
                    yield read()
            except BaseException:
                with suppress(UserError):
                    while started:
                        read()
                raise
            yield dataset, True


ROUND = 64  # windows that each process measures before all exchange what they have


def share(run: Run, dataset: str, index: int, count: int) -> Run:
    """What process `index` of `count` measures next of what run lacks of dataset: shares are equal, or nearly so.

    The first process goes on with run's own rows, the others begin anew; joined they are the next rows of run.
    """
    rows, windows = run.measured.setdefault(dataset, []), run.texts[dataset]
    each = min(ROUND, math.ceil((len(windows) - len(rows)) / count))
    start = len(rows) + index * each if index else 0
    texts, place = {dataset: windows[start : len(rows) + (index + 1) * each]}, (start, len(windows))
    if index == 0:  # what interrupts it finds its rows and seconds in run
        return replace(run, texts=texts, measured={dataset: rows}, place=place)
    return replace(run, texts=texts, measured={dataset: []}, seconds={}, place=place)


def measure_together(model: PreTrainedModel, run: Run, batch_size: int | None = 1) -> Generator[tuple[str, bool]]:
    """measure, by as many processes as there are, in rounds: after each, all of them have everything."""
    index, count = process_index(), process_count()
    if count == 1:
        yield from measure(model, run, batch_size)
        return
    begun = {name: (len(run.measured.get(name, ())), windows.sum().item()) for name, windows in run.texts.items()}
    if any(each != begun for each in gather([begun])):
        raise UserError("the processes read different texts, or different --output files: give them the same")
    for dataset, windows in run.texts.items():
        while (done := len(run.measured.setdefault(dataset, []))) < len(windows):
            part = share(run, dataset, index, count)
            with one_of_many():
                for _ in measure(model, part, batch_size):
                    yield dataset, False
            rows = gather(part.measured[dataset][0 if index else done :])
            run.measured[dataset] = [*run.measured[dataset][:done], *rows]
            run.seconds[dataset] = part.seconds.get(dataset, 0.0)
        yield dataset, True


def mean_of(windows: Sequence[Window], name: str) -> float | None:
    """Over windows; None where they do not have it."""
    values = [getattr(window, name) for window in windows]
    return None if None in values else math.fsum(values) / len(values)


def storage_cost(windows: Sequence[Window], run: Run) -> dict[str, float | None]:
    """Average bits an entry of keys, values and both, and the GiB of a cache of run.context tokens, also in fp16."""
    names = ("avg_bits", "key_bits", "value_bits", "cache_gib", "fp16_cache_gib")
    channels = {part: sum(sites.values()) for part, sites in run.widths.items()}
    if not (entries := sum(channels.values())):
        return dict.fromkeys(names)
    bits = {"keys": mean_of(windows, "key_bits"), "values": mean_of(windows, "value_bits")}
    average = sum(channels[part] * (bits[part] or 0) for part in bits) / entries
    gib = entries * run.context / 8 / 2**30  # of one bit an entry
    return dict(zip(names, (average, bits["keys"], bits["values"], average * gib, 16 * gib), strict=True))


def results(run: Run, dataset: str) -> list[dict]:
    """A row of figures for every setting, from the windows of dataset that are measured; None where one is not known.

    ppl = exp(nll), nll the mean in nats; _se are standard errors; seconds are divided evenly over the settings; window_
    lists hold the figures of single windows, from which windows_of takes up a run again.
    """
    columns = list(zip(*run.measured[dataset], strict=True))
    baseline = [window.nll for window in columns[0]]
    rows = []
    for setting, windows in zip(run.settings, columns, strict=True):
        nll = [window.nll for window in windows]
        ppl, relative = perplexity(nll), standard_error(nll)
        difference = paired_difference(nll, baseline)
        row = {"dataset": dataset, "abits": setting.abits, "quantized": setting.quantized, "ppl": ppl}
        row |= {"ppl_se": None if relative is None else ppl * relative, "nll": mean_of(windows, "nll")}
        row |= {"windows": len(windows), "tokens": len(windows) * (run.texts[dataset].shape[1] - 1)}
        row |= {"seconds": run.seconds[dataset] / len(columns)}
        row |= difference if run.is_paired else dict.fromkeys(difference)
        row |= {"kl": mean_of(windows, "kl"), "top1_agreement": mean_of(windows, "top1_agreement")}
        row |= storage_cost(windows, run)
        rows.append(row | {f"window_{name}": [getattr(w, name) for w in windows] for name in vars(windows[0])})
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# 8. Report: the tables, the files, the plots


def fit_table(fitted: Mapping[int, Mapping[str, tuple[Quantizer, Fit]]]) -> str:
    """A line for every projection and width: its range, the share kept exact, its relative squared error."""
    titles = ("abits", "lowest", "highest", "kept", "rel. error")
    width = max(len(name) for sites in fitted.values() for name in sites)
    lines = ["projection".ljust(width) + "".join(title.rjust(12) for title in titles)]
    for bits, sites in fitted.items():
        for name, (_, fit) in sites.items():
            lines.append(f"{name:<{width}}{bits:12}{fit.lo:12.4f}{fit.hi:12.4f}{fit.kept:12.3%}{fit.error:12.6f}")
    return "\n".join(lines)


FIGURES = {"ppl": ".4f", "ppl_se": ".4f", "nll": ".6f", "windows": "", "tokens": "", "seconds": ".1f"}
DIFFERENCES = {
    "delta_ppl": "+.4f", "delta_ppl_se": ".4f", "delta_percent": "+.2f", "delta_percent_se": ".2f", "kl": ".6f",
    "top1_agreement": ".2%",
}  # fmt: skip
STORAGE = dict.fromkeys(("key_bits", "value_bits", "avg_bits", "cache_gib", "fp16_cache_gib"), ".3f")
TITLES = {
    "ppl_se": "±", "delta_ppl": "Δppl", "delta_ppl_se": "±", "delta_percent": "Δppl%", "delta_percent_se": "±%",
    "kl": "KL", "top1_agreement": "top-1", "key_bits": "keys", "value_bits": "values", "avg_bits": "both",
    "cache_gib": "GiB", "fp16_cache_gib": "fp16-GiB",
}  # fmt: skip


def table(run: Run, rows: Sequence[Mapping], columns: Mapping[str, str]) -> list[str]:
    """The header and a line for every row; columns are {figure: format}. The first columns say which row it is.

    A terminal that is too narrow gets several tables of fewer columns, one below the other.
    """
    labels = {"dataset": max(map(len, ("dataset", *run.texts)))}
    if len({setting.quantized for setting in run.settings if setting.quantizers}) > 1:
        labels["quantized"] = max(len(setting.quantized) for setting in run.settings)

    def line(texts: Mapping[str, str], figures: Iterable[str]) -> str:
        return " ".join([*(texts[name].ljust(labels[name]) for name in labels), *(f"{each:>10}" for each in figures)])

    lines, width = [], shutil.get_terminal_size().columns if sys.stdout.isatty() else 2**16
    fit = max(1, (width - sum(labels.values()) - len(labels) - 10) // 11)
    for first in range(0, len(columns), fit):
        shown = {"abits": ""} | dict(list(columns.items())[first : first + fit])
        lines.append(line({name: name for name in labels}, (TITLES.get(name, name) for name in shown)))
        for row in rows:
            lines.append(line(row, ("-" if row[name] is None else format(row[name], shown[name]) for name in shown)))
    return lines


def print_comparison(run: Run, rows: Sequence[Mapping]) -> None:
    """The tables below the perplexities: differences from the unquantized model, and storage cost."""
    if run.is_paired:
        title = "against the unquantized model, on the same tokens (±: standard error; KL: mean divergence in nats)"
        print("", title, *table(run, rows, DIFFERENCES), sep="\n")
    if rows[0]["avg_bits"] is not None:
        title = f"bits an entry, and the size of a cache of {run.context} tokens at these bits"
        print("", title, *table(run, rows, STORAGE), sep="\n")


def print_settings(model: PreTrainedModel, config, name: str, text: EvalSpec, sweep: Mapping[int, KVSpec]) -> None:
    """Below the tables: what was measured, on which text, quantized how."""
    how = f"{dtype_name(model)} on {devices_of(model)}, {model.config._attn_implementation} attention"
    print(f"\n{name}: {how}{weights_line(config)}, windows of {text.seqlen} tokens")
    for dataset in text.datasets:
        print(f"{dataset}: {DATASETS.get(dataset, 'documents joined by blank lines, in disjoint windows')}")
    print_specs(sweep)


def specs_of(sweep: Mapping[int, KVSpec]) -> KVSpec:
    """Those of the first width that quantizes: widths differ in bits alone. {} if none does."""
    return next(filter(None, sweep.values()), {})


def print_specs(sweep: Mapping[int, KVSpec]) -> None:
    """Such as k_proj: 4, 3-bit uniform per channel."""
    widths = ", ".join(str(bits) for bits, specs in sweep.items() if specs)
    for projection, spec in specs_of(sweep).items():
        print(f"{projection}: {widths}{str(spec).removeprefix(str(spec.bits))}")


def print_sites(model: PreTrainedModel, sweep: Mapping[int, KVSpec]) -> None:
    """--list_sites: every site, which module gives it, and its channels; how they are quantized."""
    sites = find_sites(model, specs_of(sweep))
    rows = [("site", "output of", "channels")]
    for name, site in sites.items():
        fused = f", block {site.place.block}" if site.place.block is not None else ""
        rows.append((name, f"{site.place.module}{fused}", str(site.width)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print(f"\n{type(model).__name__}: {len(sites)} sites" if sites else "nothing is quantized")
    print_specs(sweep)


def gib(count: float) -> str:
    """Such as 1.50 GiB."""
    return f"{count / 2**30:.2f} GiB"


OVERHEAD = 1.5  # of a forward pass over its matrix products alone


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on device."""
    size, times = 8192 if device.type == "cuda" else 2048, []
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        start = time.perf_counter()
        (one @ other)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def estimate(model: PreTrainedModel, text: EvalSpec, windows: int, rows: int) -> tuple[float, float]:
    """(bytes besides the weights, floating-point operations) of measuring windows in that many settings, roughly."""
    shape, tokens = model.config.get_text_config(), text.seqlen * min(text.batch_size or 1, windows)
    width = 4 * shape.hidden_size + 2 * getattr(shape, "intermediate_size", 4 * shape.hidden_size)
    logits = 12 * HEAD_TOKENS * shape.vocab_size * min(rows, 2)  # fp32: they, their logarithms, and one more
    experts = next((n for name in EXPERTS if (n := getattr(shape, name, None))), 1)
    active = getattr(shape, "num_experts_per_tok", None) or experts
    weights = multiplied(model).values()
    products = sum(each.numel() * (active / experts if each.ndim == 3 else 1) for each in weights)
    products += shape.vocab_size * shape.hidden_size + 2 * text.seqlen * shape.hidden_size * shape.num_hidden_layers
    hidden = tokens * (width + rows * shape.hidden_size) * model.dtype.itemsize
    return hidden + logits, 2 * products * text.seqlen * windows * rows


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # how configs call their number


def print_plan(
    config, how: ModelSpec, text: EvalSpec, texts: Mapping[str, Tensor], sweep: Mapping[int, KVSpec], attribution: bool
) -> None:
    """--dry_run: the settings and windows, which are exact, and memory and time, which are rough."""
    model, device = skeleton(config, how.dtype), how.torch_device
    sites = find_sites(model, specs_of(sweep))
    nothing: dict[str, Any] = dict.fromkeys(sites)
    rows = 1 + len(attribution_settings(Setting(0, "", nothing))) if attribution else len(sweep)
    batch = f"batch_size {text.batch_size or 'auto'}, compile {how.compile}"
    print(f"{how.name}: {how.dtype} on {device}, {how.attn_implementation} attention{weights_line(config)}, {batch}")
    print(f"settings: {rows}, of {', '.join(map(str, sweep))} bits{' (attribution)' * attribution}")
    print_specs(sweep)
    for name, each in texts.items():
        print(f"{name}: {len(each)} windows of {text.seqlen} tokens")
    windows = sum(map(len, texts.values()))
    besides, operations = estimate(model, text, windows, rows)
    weights, free = parameter_bytes(config, how.dtype), free_memory(device)
    enough = "" if weights + besides < free else ": too little, without other GPUs"
    print(
        f"memory: about {gib(weights)} of weights and {gib(besides)} besides; {gib(free)} are free on {device}{enough}"
    )
    rate = product_rate(device, model.dtype)
    seconds = math.ceil(OVERHEAD * operations / rate / process_count())
    passes = f"{windows * rows} forward passes at {rate / 1e12:.2g} TFLOP/s"
    print(f"time: about {timedelta(seconds=seconds)} (h:mm:ss) for {passes}, loading not counted")


def print_calibration_plan(
    config, how: ModelSpec, calibration: CalibrationSpec, windows: Tensor, sweep: Mapping[int, KVSpec]
) -> None:
    """--dry_run of a calibration: as print_plan."""
    model, device = skeleton(config, how.dtype), how.torch_device
    sites = find_sites(model, specs_of(sweep))
    print(f"{how.name}: {how.dtype} on {device}, {how.attn_implementation} attention{weights_line(config)}")
    print_specs(sweep)
    count, tokens = windows.shape
    print(f"{calibration.dataset}: {count} windows of {tokens} tokens, seed {calibration.seed}")
    activations = windows.numel() * sum(site.width for site in sites.values()) * model.dtype.itemsize
    print(f"memory: about {gib(parameter_bytes(config, how.dtype))} of weights", end="; ")
    print(f"{gib(activations)} of activations in host memory, where {gib(free_memory('cpu'))} are free")
    _, operations = estimate(model, EvalSpec(seqlen=tokens), count, 4 if calibration.fisher else 1)
    seconds = math.ceil(OVERHEAD * operations / product_rate(device, model.dtype))
    print(f"time: about {timedelta(seconds=seconds)} (h:mm:ss) for the model, and some to fit; loading not counted")


WITHOUT_RECORD = ("model", "list_sites", "dry_run")  # flags that the record of a run leaves out


def run_record(script: str, args: Namespace, which: ModelSpec, texts: Mapping[str, Tensor]) -> dict:
    """What --output says of a run besides its figures: every flag's resolved value, and digests of what it read."""
    settings = {name: value for name, value in vars(args).items() if name not in WITHOUT_RECORD}
    settings |= {name: getattr(which, name) for name in ("dtype", "device", "attn_implementation", "compile")}
    settings["abits"] = args.abits[0] if len(args.abits) == 1 else args.abits
    read = {dataset: sha256(windows.numpy().tobytes()).hexdigest() for dataset, windows in texts.items()}
    if getattr(args, "quantizer_path", None) is not None:
        read["quantizers"] = sha256(Path(args.quantizer_path).read_bytes()).hexdigest()
    return {"script": Path(script).name, "model": which.name, "settings": settings, "sha256": read}


def weights_digest(model: PreTrainedModel) -> str:
    """A mark of the model's weights, from some 256 entries spread over each parameter: training changes it."""
    digest = sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        if parameter.is_meta:
            continue
        packed = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else ()  # torchao
        for part in [getattr(parameter, each) for each in packed] or [parameter]:
            sample = part.detach().flatten()[:: part.numel() // 256 + 1]
            digest.update(sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_line(config) -> str:
    """Such as ", weights quantized by bitsandbytes"; "" if they are not."""
    method = weight_quantization(config).get("quant_method")
    return "" if method is None else f", weights quantized by {getattr(method, 'value', method)}"


def environment(model: PreTrainedModel) -> dict:
    """What a figure depends on besides the settings: versions, device, dtype."""
    at = input_device(model)
    name = torch.cuda.get_device_name(at) if at.type == "cuda" else "cpu"
    return {"versions": versions(), "device": devices_of(model), "device_name": name, "dtype": dtype_name(model)}


def as_csv(rows: Sequence[Mapping], complete: bool) -> str:
    """The figures of rows, without those of single windows."""
    content = io.StringIO(newline="")
    names = [name for name in rows[0] if not name.startswith("window_")]
    writer = csv.DictWriter(content, [*names, "complete"], extrasaction="ignore")
    writer.writeheader()
    writer.writerows({**row, "complete": complete} for row in rows)
    return content.getvalue()


def as_json(data: Mapping) -> str:
    """Indented, but a list of figures stands on one line."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    # a raw newline is in no string
    return re.sub(r"\[\n[-+.\deE,\snul]*\]", lambda found: " ".join(found[0].split()), text)


def write_output(output: OutputSpec, record: Mapping, run: Run, complete: bool) -> str:
    """Write what run has, if it has anything, as output asks, atomically. Returns words on what there is."""
    rows = [row for dataset, measured in run.measured.items() if measured for row in results(run, dataset)]
    if output.output is None or not rows or process_index() > 0:
        return ""
    text = as_csv(rows, complete) if output.is_csv else as_json({**record, "complete": complete, "results": rows})
    write_atomically(output.output, lambda file: file.write(text.encode("utf-8", "backslashreplace")))
    count, total = (sum(map(len, each.values())) for each in (run.measured, run.texts))
    advice = "" if output.is_csv else ", and --resume goes on from there"
    return f"{output.output} has {count} of {total} windows{advice}"


NOT_DECISIVE = (
    "output", "resume", "quiet", "plot", "plot_activations", "plot_layer", "report_context", "quantizer_path",
    "export_kvquant", "device",
)  # fmt: skip


def load_unfinished(output: OutputSpec, record: Mapping) -> dict:
    """The report of the interrupted run that output is to go on with; {} without --resume, or if it has not begun.

    Raises UserError if that is no file of ours, or of a run of other settings, model or text than record says.
    """
    if not output.resume or output.output is None:
        return {}
    path = Path(output.output)
    if not path.exists():
        warn(f"--resume: {output.output!r} does not exist yet: starting from the beginning")
        return {}
    try:
        data = json.loads(path.read_bytes())
        check_same_run(output, record, data)
        if not isinstance(data["results"], list):
            raise TypeError("results is no list")
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        raise UserError(f"--resume: {output.output!r} is no JSON that --output wrote: give another name") from error
    return data


def check_same_run(output: OutputSpec, here: Mapping, there: Mapping) -> None:
    """Raise UserError if two records differ in anything that here has and that decides the figures."""
    same = {name: (here[name], there[name]) for name in ("script", "model")}
    decisive = [name for name in here["settings"] if name not in NOT_DECISIVE]
    same |= {name: (here["settings"][name], there["settings"].get(name)) for name in decisive}
    for name, (ours, theirs) in same.items():
        if ours != theirs:
            sides = f"{name} is {ours!r} here and {theirs!r} there"
            raise UserError(f"--resume: {output.output!r} is of another run: {sides}")
    for name, digest in here["sha256"].items():
        if digest != there["sha256"].get(name):
            raise UserError(f"--resume: {output.output!r} is of another run: the content of {name} is another")


def take_over(model: PreTrainedModel, run: Run, output: OutputSpec, record: dict, known: Mapping) -> None:
    """Put the figures of known, which load_unfinished read, into run; put what the loaded model tells into record."""
    record["sha256"] = {**record["sha256"], "model weights": weights_digest(model)}
    record["environment"] = environment(model)
    if not known:
        return
    check_same_run(output, record, known)
    if known.get("environment") != record["environment"]:
        warn(f"--resume: {output.output!r} was begun on another device, or with other versions: last digits may differ")
    try:
        for dataset in run.texts:
            rows = [row for row in known["results"] if row["dataset"] == dataset]
            if rows and (windows := windows_of(run, dataset, rows)):
                run.measured[dataset] = windows
                run.seconds[dataset] = math.fsum(max(0.0, float(row["seconds"])) for row in rows)
                json.dumps(results(run, dataset), allow_nan=False)  # no figure is inf or nan
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"--resume: {output.output!r} holds figures that cannot be continued: {error}") from error


LIMITS = {"nll": 690, "kl": 1e9, "top1_agreement": 1, "key_bits": 64, "value_bits": 64}  # of a Window; the least is 0


def windows_of(run: Run, dataset: str, rows: Sequence[Mapping]) -> list[list[Window]]:
    """[window][setting] from the rows that results made of them.

    Raises ValueError if they are of other settings or another text, or hold what cannot have been measured.
    """
    if [(row["abits"], row["quantized"]) for row in rows] != [(each.abits, each.quantized) for each in run.settings]:
        raise ValueError(f"{dataset} has other rows")
    columns = []
    for row in rows:
        for name, most in LIMITS.items():
            values = row[f"window_{name}"]
            bad = [value for value in values if not (type(value) in (int, float) and 0 <= value <= most)]
            if bad and (name == "nll" or bad != [None] * len(values)):
                raise ValueError(f"window_{name} of {dataset} has {bad[0]!r}")
        figures = zip(*(row[f"window_{name}"] for name in LIMITS), strict=True)
        columns.append([Window(**dict(zip(LIMITS, each, strict=True))) for each in figures])
    windows = [list(row) for row in zip(*columns, strict=True)]
    if len(windows) > len(run.texts[dataset]):
        raise ValueError(f"{dataset} has more windows than the text")
    return windows


SAVE_EVERY = 30  # seconds between two versions of --output while it is not complete


def report(
    model: PreTrainedModel, run: Run, batch_size: int | None, output: OutputSpec, record: Mapping
) -> tuple[list[dict], OSError | None]:
    """Measure what run lacks, print its tables, write output, also when interrupted: (all rows, why output failed)."""
    from tqdm import tqdm

    rows: list[dict] = []
    saved, measuring = time.monotonic(), measure_together(model, run, batch_size)
    try:
        for dataset, is_whole in measuring:
            if is_whole:
                new = results(run, dataset)
                lines = table(run, new, FIGURES)
                goes_on = rows and len(lines) == len(new) + 1  # below the header of the first dataset
                tqdm.write("\n".join(lines[1:] if goes_on else lines))
                rows += new
                sys.stdout.flush()
            elif time.monotonic() - saved > SAVE_EVERY:
                try:
                    write_output(output, record, run, complete=False)
                except OSError as error:
                    warn(str(error))
                saved = time.monotonic()
        print_comparison(run, rows)
        sys.stdout.flush()
        try:
            write_output(output, record, run, complete=True)
        except OSError as error:
            return rows, error
        return rows, None
    except BaseException as stop:
        measuring.close()  # after it has read what was under way
        done = write_output(output, record, run, complete=False)
        if isinstance(stop, KeyboardInterrupt):
            raise type(stop)("; ".join(["interrupted", *filter(None, [done])])) from None
        if done:
            warn(done)
        raise


COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by everyone
MARKERS = "os^Dv*"


def save_figure(path: str, figure) -> None:
    """Write a matplotlib figure, atomically, as its ending says."""
    content, form = io.BytesIO(), Path(path).suffix[1:].lower()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of a text file's name: it is drawn as a box
        figure.savefig(content, format=form, dpi=150, metadata={"Date": None} if form == "svg" else None)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def titles_of(rows: Iterable[Mapping]) -> dict[str, str]:
    """{dataset: its name, or that of its file, where matplotlib sees no formula and no label that it would hide}."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    names = [Path(dataset).name for dataset in datasets]
    names = names if len(set(names)) == len(names) else datasets
    drawable = [name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$") for name in names]
    return {dataset: " " * (name[0] == "_") + name for dataset, name in zip(datasets, drawable, strict=True)}


def errors_of(rows: Iterable[Mapping], name: str) -> list[float] | None:
    """Standard errors of a figure, None where a single window has none."""
    errors = [row[f"{name}_se"] for row in rows]
    return None if None in errors else errors


def plot_sweep(rows: Sequence[Mapping]):
    """Perplexity, or how much it grows, over average bits; error bars are standard errors. A curve for each dataset."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    is_paired = rows[0]["delta_ppl"] is not None
    name = "delta_ppl" if is_paired else "ppl"
    for (dataset, title), colour, marker in zip(
        titles_of(rows).items(), itertools.cycle(COLOURS), itertools.cycle(MARKERS)
    ):
        mine = sorted((row for row in rows if row["dataset"] == dataset), key=lambda row: row["abits"])
        shown = [row for row in mine if not (is_paired and row["abits"] == UNQUANTIZED)]
        bits = [row["abits"] if row["avg_bits"] is None else row["avg_bits"] for row in shown]
        label = f"{title} (unquantized: {mine[-1]['ppl']:.2f})" if is_paired else title
        style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 7, "linewidth": 1.5, "capsize": 4}
        axes.errorbar(bits, [row[name] for row in shown], errors_of(shown, name), label=label, **style)
        for x, row in zip(bits, shown, strict=True):
            text = f"{row[name]:+.3g}" if is_paired else f"{row[name]:.2f}"
            axes.annotate(text, (x, row[name]), (6, 6), textcoords="offset points", color=colour)
    if is_paired:
        axes.axhline(0, color="black", linestyle="--", linewidth=1, label="unquantized")
    axes.set_xlabel("average bits per cached entry")
    axes.set_ylabel("increase of perplexity (± SE)" if is_paired else "perplexity (± SE)")
    axes.margins(x=0.12, y=0.12)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def plot_attribution(rows: Sequence[Mapping]):
    """Bars of how much the perplexity grows if only a part of the cache is quantized; a line of panels per dataset."""
    from matplotlib.figure import Figure

    titles = titles_of(rows)
    figure = Figure(figsize=(8, 4 * len(titles)), layout="constrained")
    panels = figure.subplots(len(titles), 2, squeeze=False, width_ratios=(1, 3))
    for (dataset, title), line in zip(titles.items(), panels, strict=True):
        mine = [row for row in rows if row["dataset"] == dataset and row["abits"] != UNQUANTIZED]
        layers = [row for row in mine if row["quantized"].startswith("layer ")]
        parts = [row for row in mine if row not in layers]
        for axes, shown, colour in zip(line, (parts, layers), COLOURS, strict=False):
            names = [row["quantized"].removeprefix("layer ").replace(" and ", "\n+ ") for row in shown]
            axes.bar(
                names, [row["delta_ppl"] for row in shown], yerr=errors_of(shown, "delta_ppl"), capsize=3, color=colour
            )
            axes.axhline(0, color="black", linewidth=1)
            axes.grid(axis="y", alpha=0.3)
            axes.set_ylabel("increase of perplexity (± SE)")
        line[0].set_xlabel("quantized in all layers")
        line[0].tick_params("x", rotation=60 if len(parts) > 3 else 0)
        line[1].set_xlabel("the only quantized layer")
        line[1].set_xticks(range(0, len(layers), math.ceil(len(layers) / 16)))
        line[1].set_title(f"{title}, {mine[0]['abits']} bits")
    return figure


DRAWN_TOKENS = 256


def plot_activations(model: PreTrainedModel, window: Tensor, setting: Setting, layer: int):
    """|K| and |V| of one layer over tokens and channels, before and after quantization; kept outliers are marked.

    window is [T] ids; ranges are those of all of it, and its first DRAWN_TOKENS tokens are drawn.
    """
    from matplotlib.figure import Figure

    quantizers = {name: quantizer for name, quantizer in setting.quantizers.items() if layer_of(name) == layer}
    before = record_activations(model, {name: site_at(model, name) for name in quantizers}, window[None])
    figure = Figure(figsize=(8, 3.6 * len(quantizers)), layout="constrained")
    panels = figure.subplots(len(quantizers), 2, squeeze=False, sharex=True, sharey="row")
    for (name, quantizer), line in zip(quantizers.items(), panels, strict=True):
        after, keep = quantize(before[name], quantizer.to(before[name].device))
        images = [each[0, :DRAWN_TOKENS].float().abs().T.numpy() for each in (before[name], after)]  # [C,T]
        smooth = "nearest" if len(images[0]) <= 512 else "antialiased"  # more channels than the picture has lines
        style = {"cmap": "cividis", "vmin": 0, "vmax": images[0].max(), "interpolation": smooth}
        for axes, image in zip(line, images, strict=True):
            drawn = axes.imshow(image, aspect="auto", origin="lower", **style)
            axes.set_xlabel("token")
        line[1].scatter(*keep[0, :DRAWN_TOKENS].nonzero().T, s=3, linewidths=0, color="#D55E00")
        part = CACHE_PARTS.get(name.rpartition(".")[2], name)
        line[0].set_ylabel("channel")
        line[0].set_title(f"{part}, layer {layer}, before")
        marked = ", outliers marked" if quantizer.spec.include_sparse else ""
        line[1].set_title(f"after: {quantizer.spec.bits} bits{marked}")
        figure.colorbar(drawn, ax=list(line), label="magnitude")
    return figure


def draw(model: PreTrainedModel, run: Run, rows: Sequence[Mapping], output: OutputSpec) -> None:
    """The pictures that output asks for."""
    if output.plot is not None:
        is_attribution = any(row["quantized"].startswith("layer ") for row in rows)
        save_figure(output.plot, plot_attribution(rows) if is_attribution else plot_sweep(rows))
    if output.plot_activations is not None:
        window = next(iter(run.texts.values()))[0]
        setting, layer = drawn_layer(run, output)
        save_figure(output.plot_activations, plot_activations(model, window, setting, layer))


def drawn_layer(run: Run, output: OutputSpec) -> tuple[Setting, int]:
    """(the narrowest setting of all of run's projections, the layer to draw); UserError if there is no such layer."""
    setting = min(run.settings, key=lambda setting: (setting.abits, -len(setting.quantizers)))
    layers = sorted({layer for name in setting.quantizers if (layer := layer_of(name)) is not None})
    layer = layers[len(layers) // 2] if output.plot_layer is None and layers else output.plot_layer
    if layer not in layers:
        has = f"layers {layers[0]} to {layers[-1]}" if layers else "no numbered layer"
        raise UserError(f"plot_layer {output.plot_layer} is not there to draw: {has} of this model are quantized")
    return setting, layer


# ----------------------------------------------------------------------------------------------------------------------
# 9. Command line: what both scripts share


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the description's lines and names every default."""


class Parser(ArgumentParser):
    """An ArgumentParser whose errors are one line, and that takes no abbreviated flags."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str):
        """Exit with status 2 after one line, of the main process."""
        if process_index() > 0:
            self.exit(2)
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help lists the flags)\n")


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


def width_list(text: str) -> list[int]:
    """Different bit widths between commas, 2..8 or UNQUANTIZED, that first."""
    known = [*range(2, 9), UNQUANTIZED]
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word not in map(str, known):
            raise ArgumentTypeError(f"unknown width {word!r}: choose from {', '.join(map(str, known))}")
        if words.count(word) > 1:
            raise ArgumentTypeError(f"{word} stands there more than once in {text!r}")
    return sorted(map(int, words), key=lambda bits: bits != UNQUANTIZED)


def token_count(text: str) -> int:
    """A number of tokens; 0 is -1, which also means none."""
    return int(text) or -1


def dataset_list(text: str) -> list[str]:
    """Names between commas."""
    return [name.strip() for name in text.split(",")]


def number_or_auto(text: str) -> int | str:
    """A number, or auto."""
    if text != "auto" and not re.fullmatch(r"-?\d+", text):
        raise ArgumentTypeError(f"{text!r} is neither a number nor auto")
    return text if text == "auto" else int(text)


def add_model_flags(parser: ArgumentParser) -> None:
    """model, --dtype, --device, --attn_implementation, --compile."""
    parser.add_argument("model", help="hub id or local folder")
    flag = parser.add_argument_group("model").add_argument
    flag("--dtype", default="auto", choices=["auto", "float16", "bfloat16", "float32"],
         help="auto: the checkpoint's own on a GPU, float32 on a CPU")  # fmt: skip
    flag("--device", default="auto", help="auto, cuda, cuda:1 or cpu; auto: the first GPU, or all for a larger model")
    flag("--attn_implementation", default="auto", choices=["auto", "sdpa", "eager", "flash_attention_2"],
         help="auto: flash_attention_2 if installed, on a GPU in half precision; else sdpa")  # fmt: skip
    flag("--compile", default="auto", choices=["auto", "on", "off"],
         help="compile the decoder layers for the evaluation; auto: on a GPU")  # fmt: skip


def add_quantization_flags(parser: ArgumentParser) -> None:
    """--abits to --attribution, --perchannel, --pertoken, the outliers, --nf, --first_few_fp16."""
    flag = parser.add_argument_group("quantization").add_argument
    flag("--abits", type=width_list, default="4", metavar="BITS",
         help="bits an entry, 2..8, or 16 for no quantization; a comma list measures all of them")  # fmt: skip
    flag("--baseline", action="store_true", help="as if 16 stood in --abits: compare with the unquantized model")
    flag("--attribution", action="store_true",
         help="with one width, also quantize keys only, values only, and one layer at a time")  # fmt: skip
    flag("--perchannel", nargs="*", action=ProjectionList, default=["k_proj"], metavar="NAME",
         help="projections with one scale per channel")  # fmt: skip
    flag("--pertoken", nargs="*", action=ProjectionList, default=["v_proj"], metavar="NAME",
         help="projections with one scale per token")  # fmt: skip
    flag("--include_sparse", action="store_true", help="keep outliers exact (dense-and-sparse)")
    flag("--sparsity_threshold", type=float, default=QuantSpec.sparsity_threshold, metavar="P",
         help="with --include_sparse, the share of entries that is quantized")  # fmt: skip
    flag("--nf", action="store_true", help="NormalFloat levels instead of uniform ones")
    flag("--first_few_fp16", type=token_count, default=-1, metavar="N",
         help="leading tokens of every window kept exact (attention sinks); -1 for none")  # fmt: skip


def add_text_flags(parser: ArgumentParser) -> None:
    """--datasets, --seqlen, --limit, --batch_size."""
    flag = parser.add_argument_group("text").add_argument
    flag("--datasets", type=dataset_list, default="wikitext2", metavar="LIST",
         help="comma list of wikitext2, c4, or paths of .txt, .jsonl or .parquet files")  # fmt: skip
    flag("--seqlen", type=int, default=2048, metavar="N", help="tokens a window")
    flag("--limit", type=int, default=512, metavar="N", help="at most this many windows of each text")
    flag("--batch_size", type=number_or_auto, default=1, metavar="N",
         help="windows a forward pass; auto: as many as fit on the GPU")  # fmt: skip


def add_output_flags(parser: ArgumentParser) -> None:
    """--output, --resume, --report_context, --plot, --plot_activations, --plot_layer, --quiet."""
    flag = parser.add_argument_group("output").add_argument
    flag("--output", metavar="FILE", help="write settings, environment and results as JSON, or the table as .csv")
    flag("--resume", action="store_true", help="go on with the interrupted run whose JSON --output names")
    flag("--report_context", type=int, default=OutputSpec.report_context, metavar="N",
         help="tokens of the cache whose size is reported")  # fmt: skip
    flag("--plot", metavar="FILE", help="draw the sweep or the attribution as .png or .svg")
    flag("--plot_activations", metavar="FILE",
         help="draw keys and values of a layer before and after quantization as .png or .svg")  # fmt: skip
    flag("--plot_layer", type=int, metavar="N", help="the layer that --plot_activations draws; else the middle one")
    flag("--quiet", action="store_true", help="no progress bar, even on a terminal")
    flag("--list_sites", action="store_true", help="print what would be quantized, and how; load no weights")
    flag("--dry_run", action="store_true", help="print settings, windows, and roughly memory and time; load no weights")


def add_calibration_flags(parser: ArgumentParser) -> None:
    """What the calibrated script adds: the file, the codebook and its fit, the calibration text."""
    flag = parser.add_argument_group("calibration").add_argument
    flag("--calibrate", action="store_true", help="fit quantizers and save them; without it, evaluate saved ones")
    flag("--quantizer_path", metavar="FILE", help="the quantizer file, ours (.pkl) or KVQuant's own")
    flag("--export_kvquant", metavar="FILE", help="also write the quantizers in KVQuant's own format")
    flag("--nuq", action="store_true", help="non-uniform levels, fitted by k-means")
    flag("--fisher", action="store_true", help="with --nuq, weigh the fit by Fisher information")
    flag("--fisher_weighting", default="paper", choices=["paper", "code"],
         help="F times the squared range (paper), or F alone (published code)")  # fmt: skip
    flag("--norm", action="store_true", help="Q-Norm: decoded levels keep mean and deviation")
    flag("--clamp", action="store_true", help="uniform levels with an integer zero point")
    flag("--cap_outliers", type=float, metavar="F", help="at most this fraction of a token's keys stays exact")
    flag("--calib_dataset", default="wikitext2", metavar="NAME", help="wikitext2, c4 or a text file")
    flag("--nsamples", type=int, default=16, metavar="N", help="calibration windows of --seqlen tokens")
    flag("--seed", type=int, default=0, metavar="N", help="of the calibration windows' places")


def kv_sweep(args: Namespace) -> dict[int, KVSpec]:
    """{bits: {projection: QuantSpec}} from the quantization flags, with {} at 16 bits, which comes first."""
    if both := set(args.perchannel) & set(args.pertoken):
        raise UserError(f"{', '.join(sorted(both))} stands in both --perchannel and --pertoken: give it one scale")
    if 0 < args.seqlen <= args.first_few_fp16:
        raise UserError(f"first_few_fp16 {args.first_few_fp16} covers the whole window of seqlen {args.seqlen}")
    nuq, cap = getattr(args, "nuq", False), getattr(args, "cap_outliers", None)
    if nuq and args.nf:
        raise UserError("--nf and --nuq each name a codebook: give one of them")
    if cap is not None and not args.perchannel:
        raise UserError(f"cap_outliers {cap:g} caps what --perchannel names, and that is nothing")
    if args.sparsity_threshold != QuantSpec.sparsity_threshold and not args.include_sparse:
        warn(f"--sparsity_threshold {args.sparsity_threshold:g} has no effect without --include_sparse")
    shared = {name: getattr(args, name) for name in ("include_sparse", "sparsity_threshold", "first_few_fp16")}
    shared |= {"codebook": "nuq" if nuq else "nf" if args.nf else "uniform", "clamp": getattr(args, "clamp", False)}
    sweep: dict[int, KVSpec] = {}
    for bits in args.abits:
        stored = min(bits, 8)  # the specs are made at 16 bits too: that validates them
        specs = {name: QuantSpec(PER_CHANNEL, stored, cap_outliers=cap, **shared) for name in args.perchannel}
        specs |= {name: QuantSpec(PER_TOKEN, stored, **shared) for name in args.pertoken}
        sweep[bits] = specs if bits != UNQUANTIZED else {}
    if args.attribution:
        check_attributable(sweep)
    return {UNQUANTIZED: {}, **sweep} if args.baseline or args.attribution else sweep


def check_attributable(sweep: Mapping[int, KVSpec]) -> None:
    """Raise UserError unless sweep has one width to take apart."""
    widths = [bits for bits in sweep if bits != UNQUANTIZED]
    if len(widths) != 1:
        raise UserError(f"--attribution takes one width apart, and --abits has {', '.join(map(str, widths)) or 'none'}")
    if not sweep[widths[0]]:
        raise UserError("--attribution has nothing to take apart without --perchannel and --pertoken")


def output_spec(args: Namespace, sweep: Mapping[int, KVSpec]) -> OutputSpec:
    """From the output flags."""
    if args.plot_activations is not None and not any(sweep.values()):
        raise UserError(f"--plot_activations {args.plot_activations} shows quantization: give a width below 16")
    return OutputSpec(**{each.name: getattr(args, each.name) for each in fields(OutputSpec)})


def eval_spec(args: Namespace) -> EvalSpec:
    """From the text flags."""
    size = None if args.batch_size == "auto" else args.batch_size
    return EvalSpec(tuple(args.datasets), args.seqlen, args.limit, size)


def model_spec(args: Namespace) -> ModelSpec:
    """From the model flags."""
    if process_count() > 1 and ":" in args.device:
        raise UserError(f"device {args.device} is one GPU, and there are {process_count()} processes: give cuda")
    return ModelSpec(args.model, args.dtype, args.device, args.attn_implementation, args.compile)


def calibration_spec(args: Namespace) -> CalibrationSpec:
    """From the calibration flags."""
    if args.fisher and not args.nuq:
        raise UserError("--fisher weighs the fit of a NUQ codebook: add --nuq, or leave it out")
    if args.fisher_weighting != "paper" and not args.fisher:
        warn(f"--fisher_weighting {args.fisher_weighting} has no effect without --fisher")
    weighting = args.fisher_weighting if args.fisher else None
    return CalibrationSpec(args.calib_dataset, args.nsamples, args.seqlen, args.seed, weighting, args.norm)


class Terminated(KeyboardInterrupt):
    """SIGTERM, which is to leave everything as tidy as Ctrl-C does."""


def stop(signum: int, frame: object) -> None:
    """Handler of SIGINT and SIGTERM: raise the exception once. The impatient would lose what is being saved."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda *_: None)
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def settings_of(
    model: PreTrainedModel,
    sweep: Mapping[int, KVSpec],
    quantizers_of: Callable[[PreTrainedModel, KVSpec], dict],
    attribution: bool,
) -> list[Setting]:
    """The rows of a run: a setting for each width, or one width taken apart behind the unquantized model."""
    if quantized := specs_of(sweep):
        check_against_cache(model, find_sites(model, quantized))
    settings = []
    for bits, specs in sweep.items():
        quantizers = quantizers_of(model, specs)
        settings.append(Setting(bits, parts_of(quantizers), on_device(model, quantizers)))
    return settings[:1] + attribution_settings(settings[1]) if attribution else settings


def report_compiled(
    model: PreTrainedModel, run: Run, batch_size: int | None, output: OutputSpec, record: dict, optional: bool
) -> tuple[list[dict], OSError | None]:
    """report, with the layers compiled if record says so; if they do not compile and it is optional, without."""
    try:
        with compiled(model, record["settings"]["compile"] == "on"):
            return report(model, run, batch_size, output, record)
    except CompilationError as error:
        if not optional or process_count() > 1 or any(run.measured.values()):
            raise
        warn(f"--compile auto: off, because {error}")
    record["settings"]["compile"] = "off"
    return report(model, run, batch_size, output, record)


def evaluate(
    script: str, args: Namespace, sweep: Mapping[int, KVSpec], quantizers_of: Callable[[PreTrainedModel, KVSpec], dict]
) -> None:
    """Measure, print, save and draw what the flags ask for; quantizers_of(model, specs) is {site: Quantizer}."""
    with one_for_all():
        text, which, output = eval_spec(args), model_spec(args), output_spec(args, sweep)
        calibrated, exported = (getattr(args, name, None) for name in ("quantizer_path", "export_kvquant"))
        inputs = [*text.datasets, calibrated, which.name]
        check_writable([output.output, output.plot, output.plot_activations, exported], inputs)

        quiet_libraries(args.quiet)
        config, tokenizer = load_config_and_tokenizer(which.name)
        if args.list_sites:
            print_sites(skeleton(config), sweep)
            return
        texts = load_texts(config, tokenizer, text)
        how = replace(which.resolved(config), compile="on" if is_to_compile(which) else "off")
        if args.dry_run:
            print_plan(config, how, text, texts, sweep, args.attribution)
            return
        record = run_record(script, args, how, texts)
        known = load_unfinished(output, record)
        model = load_model(which, config)
        settings = settings_of(model, sweep, quantizers_of, args.attribution)
        run = Run(texts, settings, cache_widths(model), output.report_context)
        take_over(model, run, output, record, known)
        if output.plot_activations is not None:
            drawn_layer(run, output)  # before anything is measured

    rows, failure = report_compiled(model, run, text.batch_size, output, record, which.compile == "auto")
    if process_index() > 0:
        return
    print_settings(model, config, which.name, text, sweep)
    draw(model, run, rows, output)
    if failure:
        raise failure


def exit_status(main: Callable[[], None]) -> int:
    """The exit status of main: 0, 2 after a one-line error for what the user can mend, 1 if the system fails, 130 after
    Ctrl-C, 143 after SIGTERM, 141 if the reader of stdout has gone.
    """
    nowhere = open(os.devnull, "w")  # noqa: SIM115, for a stream that the caller has closed
    sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    if process_index() > 0:
        sys.stdout = nowhere
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    status, message, is_ours = 0, None, process_index() == 0
    try:
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, stop)  # the scripts' imports end on Ctrl-C without a word
            main()
            sys.stdout.flush()
        finally:  # what is to be said is said in peace
            for signum in (signal.SIGINT, signal.SIGTERM):
                signal.signal(signum, signal.SIG_IGN)
    except UserError as error:
        status, message, is_ours = 2, f"error: {error}", is_ours or isinstance(error, ProcessError)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        status, is_ours = 2, True
        message = "error: out of memory: lower --batch_size or --seqlen, or choose a smaller --dtype"
    except KeyboardInterrupt as interruption:
        status, message = 143 if isinstance(interruption, Terminated) else 130, str(interruption) or "interrupted"
    except BrokenPipeError:
        status = 141
    except OSError as error:
        status, message, is_ours = 1, f"error: {error.strerror or error}", True
    if message and is_ours:
        print(f"{Path(sys.argv[0]).name}: {one_line(message)}", file=sys.stderr)
    if status in (1, 141):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit fails again
    return status
