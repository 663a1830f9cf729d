"""Texts from the hub or from disk, as windows of token ids."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from quant_utils import UserError
from simquant.memory import free_memory
from simquant.models import loading
from simquant.notices import notify

ABOUT = {
    "wikitext2": "WikiText-2 raw test, joined by blank lines, in disjoint windows",
    "c4": "C4 validation shard 0, one random window from each of up to 256 random documents (GPTQ protocol)",
}
ABOUT_FILES = "documents joined by blank lines, in disjoint windows"


def tokenize(tokenizer, text: str) -> Tensor:
    """Return [N] ids of text, tokenized once with the tokenizer's own special tokens: BOS at the very start only."""
    return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]


def disjoint_windows(ids: Tensor, seqlen: int) -> Tensor:
    """Return [N // seqlen, seqlen]: ids [N] cut into windows, the incomplete tail dropped."""
    count = len(ids) // seqlen
    return ids[: count * seqlen].view(count, seqlen)


def random_cut(ids: Tensor, seqlen: int, rng: random.Random) -> Tensor:
    """Return [seqlen] of ids [N], N > seqlen, from a place that rng draws as GPTQ and KVQuant do."""
    start = rng.randint(0, len(ids) - seqlen - 1)
    return ids[start : start + seqlen]


def document_windows(tokenizer, documents: Sequence[str], seqlen: int, count: int, seed: int = 0) -> Tensor:
    """Return [count, seqlen]: one random cut from each of count random documents longer than seqlen tokens.

    This is the protocol of GPTQ and KVQuant for C4, draw for draw, so the figures compare with theirs. A document of
    fewer bytes than seqlen is passed over without being tokenized: it cannot hold that many tokens.
    """
    rng = random.Random(seed)
    known: dict[int, Tensor | None] = {}  # ids of the documents that were drawn, None of those that are too short
    windows: list[Tensor] = []
    while len(windows) < count:
        if len(known) == len(documents) and not any(ids is not None for ids in known.values()):
            raise UserError(f"none of {len(documents)} documents is longer than seqlen {seqlen} tokens: lower seqlen")
        i = rng.randint(0, len(documents) - 1)
        if i not in known:
            whole = tokenize(tokenizer, documents[i]) if len(documents[i].encode()) >= seqlen else torch.empty(0)
            known[i] = whole if len(whole) > seqlen else None
        if (ids := known[i]) is not None:
            windows.append(random_cut(ids, seqlen, rng))
    return torch.stack(windows)


def load(flags, config, tokenizer) -> dict[str, Tensor]:
    """Return {dataset: windows [N,seqlen]}, checked against what a model of this config can take."""
    made = {name: evaluation_windows(name, tokenizer, flags.seqlen, flags.limit) for name in flags.datasets}
    check_windows(config, torch.cat(list(made.values())))
    return made


def load_for_calibration(flags, config, tokenizer) -> Tensor:
    """Return [nsamples,seqlen] ids of the calibration text, checked against what a model of this config can take."""
    if (need := 8 * flags.nsamples * flags.seqlen) > free_memory(torch.device("cpu")):
        raise UserError(f"--nsamples {flags.nsamples} takes {need >> 30} GiB for the token ids alone: lower it")
    windows = calibration_windows(flags.calib_dataset, tokenizer, flags.seqlen, flags.nsamples, flags.seed)
    check_windows(config, windows)
    return windows


def load_documents(name: str, split: str = "test") -> list[str]:
    """Return the documents of wikitext2 or c4, their "test" or "train" split, or of a text file."""
    if name not in ("wikitext2", "c4"):
        return read_text_file(name)
    with loading(f"dataset {name!r}"):
        from datasets import load_dataset

        if name == "wikitext2":
            rows = load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        else:
            shard = "c4-train.00000-of-01024" if split == "train" else "c4-validation.00000-of-00008"
            rows = load_dataset("allenai/c4", data_files={split: f"en/{shard}.json.gz"}, split=split)
    return rows[:]["text"]


def read_text_file(path: str) -> list[str]:
    """Return the documents of a text file: a .txt is one, a .jsonl or .parquet has one a row in column `text`."""
    if path.lower().endswith(".parquet"):
        return read_parquet(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"text file {path!r} is not UTF-8 (byte {error.start}): convert it, e.g. with iconv") from error
    if path.lower().endswith(".txt"):
        return [text]
    return [jsonl_text(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]


def read_parquet(path: str) -> list[str]:
    """Return the column `text` of a parquet file."""
    with loading(f"text file {path!r}"):
        from pyarrow import parquet

        columns = parquet.read_schema(path).names
        texts = parquet.read_table(path, columns=["text"])["text"].to_pylist() if "text" in columns else []
    if "text" not in columns:
        raise UserError(f"text file {path!r} has no column `text`; its columns are: {', '.join(columns)}")
    if bad := [number for number, text in enumerate(texts, 1) if not isinstance(text, str)]:
        raise UserError(f"text file {path!r}, row {bad[0]} has no string under `text`: remove such rows")
    return texts


def jsonl_text(path: str, number: int, line: str) -> str:
    """Return the string under `text` in one line of a .jsonl file."""
    try:
        text = json.loads(line)["text"]
        text.encode()  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        raise UserError(f"text file {path!r}, line {number} is not JSON, or no Unicode: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f'text file {path!r}, line {number} is not an object with a string under "text"') from error
    return text


def load_ids(name: str, split: str, tokenizer, least: int) -> Tensor:
    """Return [N] ids of a text, its documents joined by blank lines; N is at least `least`, what one window takes."""
    text = "\n\n".join(load_documents(name, split))
    if not text.strip():
        raise UserError(f"{name} is empty: give a text of at least {least} tokens")
    ids = tokenize(tokenizer, text)
    if len(ids) < least:
        raise UserError(f"{name} has {len(ids)} tokens, and one window takes {least}: lower --seqlen")
    return ids


def evaluation_windows(name: str, tokenizer, seqlen: int, limit: int) -> Tensor:
    """Return [N,seqlen] ids, N <= limit: a text's disjoint windows in order, or c4's random ones (at most 256)."""
    if name == "c4":
        return document_windows(tokenizer, load_documents(name), seqlen, min(256, limit))
    return disjoint_windows(load_ids(name, "test", tokenizer, seqlen), seqlen)[:limit]


def calibration_windows(name: str, tokenizer, seqlen: int, count: int, seed: int) -> Tensor:
    """Return [count,seqlen] ids: random cuts of a text's train split, or of the text itself."""
    if name == "c4":
        return document_windows(tokenizer, load_documents(name, "train"), seqlen, count, seed)
    ids, rng = load_ids(name, "train", tokenizer, seqlen + 1), random.Random(seed)
    return torch.stack([random_cut(ids, seqlen, rng) for _ in range(count)])


def check_windows(config, windows: Tensor) -> None:
    """Raise UserError if windows [N,T] have a token that a model of this config lacks; say so if they are too long."""
    config = config.get_text_config()
    if windows.max() >= config.vocab_size:
        has = f"the tokenizer gives token {windows.max().item()}, the model has {config.vocab_size}"
        raise UserError(f"{has}: use the tokenizer that the model was trained with")
    positions = getattr(config, "max_position_embeddings", None)
    if positions and windows.shape[1] > positions:
        notify(f"seqlen {windows.shape[1]} exceeds the {positions} positions that the model was made for")
