"""Texts as windows of token ids: how they are tokenized, the protocols that cut them, and where BOS stands."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from quant_utils import UserError
from simquant.memory import free_memory
from simquant.notices import notify
from simquant.text_files import documents, joined, whole
from simquant.text_names import C4_FROM, text_label
from simquant.tokens import Text, special_ids, tokenize, tokenized

ABOUT = {"wikitext2": "WikiText-2 raw test, joined by blank lines", "c4": "C4 validation shard 0"}
NEEDS_BOS = {  # model_type of families whose perplexity means nothing without BOS in a window: google-deepmind/gemma#44
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n",
    "gemma3n_text",
    "gemma4",
    "gemma4_text",
    "gemma4_unified",
    "gemma4_unified_text",
    "recurrent_gemma",
    "vaultgemma",
}


@dataclass(frozen=True)
class Reading:
    """How a text is read: which field of a file's rows it is, and whether BOS begins the text or every window."""

    column: str = "text"
    bos: str = "text"


AS_PUBLISHED = Reading()


def text_ids(name: str, split: str, tokenizer, reading: Reading, most: int | None = None) -> Tensor:
    """Return the first `most` ids [N] of a text, in int32, or all; its documents are joined by blank lines."""
    text, parts, count = Text(joined(documents(name, split, reading.column))), [], 0
    for part in tokenized(tokenizer, text, reading.bos):
        parts.append(part.to(torch.int32))
        if most is not None and (count := count + len(part)) >= most:
            break
    if text.is_blank and not text.read(1):
        raise UserError(f"{name} is empty: give a text that fills a window")
    if text.crlf:
        say_crlf(name, text.crlf)
    ids = torch.cat(parts)
    return ids if most is None else ids[: min(most, len(ids))]


def say_crlf(name: str, lines: int) -> None:
    """Notify that lines end in CRLF."""
    notify(f"{lines} of the lines read of {name} end in CRLF, which changes figures: convert it, e.g. with dos2unix")


def check_length(name: str, ids: Tensor, least: int) -> None:
    """Raise UserError if a text has fewer ids [N] than one window takes."""
    if len(ids) < least:
        raise UserError(f"{name} has {len(ids)} tokens, and one window takes {least}: lower --seqlen")


# -- windows


def disjoint_windows(ids: Tensor, seqlen: int, bos: str = "text") -> Tensor:
    """Return [M,seqlen]: ids [N] cut into windows, the incomplete tail dropped.

    With bos "window", ids begin with BOS, and each window is BOS and the next seqlen - 1 ids.
    """
    if bos == "window":
        rest = disjoint_windows(ids[1:], seqlen - 1)
        return torch.cat([ids[:1].expand(len(rest), 1), rest], 1)
    count = len(ids) // seqlen
    return ids[: count * seqlen].view(count, seqlen)


def random_cut(ids: Tensor, seqlen: int, rng: random.Random) -> Tensor:
    """Return [seqlen] of ids [N], N > seqlen, from a place that rng draws as GPTQ and KVQuant do."""
    start = rng.randint(0, len(ids) - seqlen - 1)
    return ids[start : start + seqlen]


def begun_with_bos(windows: Tensor, tokenizer, bos: str) -> Tensor:
    """Return random cuts [N,T]; with bos "window", the first token of each gives way to BOS.

    So the places that are drawn, and what is predicted, are those of the published protocol.
    """
    if bos == "window":
        windows[:, 0] = tokenizer.bos_token_id
    return windows


def document_windows(
    encode: Callable[[str], Tensor], documents: Sequence[str], seqlen: int, count: int, seed: int = 0
) -> Tensor:
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
            ids = encode(documents[i]) if len(documents[i].encode()) >= seqlen else torch.empty(0)
            known[i] = ids if len(ids) > seqlen else None
        if (drawn := known[i]) is not None:
            windows.append(random_cut(drawn, seqlen, rng))
    return torch.stack(windows)


def windows_of_documents(name: str, split: str, tokenizer, reading: Reading, draw: tuple[int, int, int]) -> Tensor:
    """Return document_windows of a text as a Reading says; draw is (seqlen, count, seed)."""
    found = [whole(document, name) for document in documents(name, split, reading.column)]
    if lines := sum(document.count("\r\n") for document in found):
        say_crlf(name, lines)
    try:
        windows = document_windows(partial(tokenize, tokenizer, bos=reading.bos), found, *draw)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    return begun_with_bos(windows, tokenizer, reading.bos)


def evaluation_windows(name: str, tokenizer, seqlen: int, limit: int, reading: Reading = AS_PUBLISHED) -> Tensor:
    """Return [N,seqlen] ids, N <= limit: a text's disjoint windows in order, or c4's random ones (at most 256)."""
    if text_label(name) == "c4":
        return windows_of_documents(name, "test", tokenizer, reading, (seqlen, min(256, limit), 0))
    most = limit * seqlen if reading.bos == "text" else limit * (seqlen - 1) + 1
    ids = text_ids(name, "test", tokenizer, reading, most)
    check_length(name, ids, seqlen)
    return disjoint_windows(ids.long(), seqlen, reading.bos)


def calibration_windows(
    name: str, tokenizer, seqlen: int, count: int, seed: int, reading: Reading = AS_PUBLISHED
) -> Tensor:
    """Return [count,seqlen] ids: random cuts of a text's train split, or of the text itself."""
    if text_label(name) == "c4":
        return windows_of_documents(name, "train", tokenizer, reading, (seqlen, count, seed))
    ids, rng = text_ids(name, "train", tokenizer, reading), random.Random(seed)
    check_length(name, ids, seqlen + 1)
    windows = torch.stack([random_cut(ids, seqlen, rng) for _ in range(count)]).long()
    return begun_with_bos(windows, tokenizer, reading.bos)


# -- what the flags ask for


def about(name: str, bos: str) -> str:
    """Return a line that says what a text is, how it is cut, and where BOS stands."""
    label, is_random = text_label(name), text_label(name) == "c4"
    source = ABOUT.get(name) or (name.removeprefix(C4_FROM) if is_random else "documents joined by blank lines")
    cut = (
        "one random window from each of up to 256 random documents (GPTQ protocol)"
        if is_random
        else "in disjoint windows"
    )
    start = f"BOS at the start of {'a document' if is_random else 'the text'} alone"
    return f"{label}: {source}, {cut}, {'each window begins with BOS' if bos == 'window' else start}"


def load(flags, config, tokenizer) -> dict[str, Tensor]:
    """Return {dataset: windows [N,seqlen]}, checked against what a model of this config can take."""
    reading, how = reading_of(flags, config, tokenizer), (flags.seqlen, flags.limit)
    made = {text_label(name): evaluation_windows(name, tokenizer, *how, reading) for name in flags.datasets}
    check_windows(config, torch.cat(list(made.values())))
    check_bos(tokenizer, reading.bos, torch.stack([windows[0] for windows in made.values()]))
    return made


def load_for_calibration(flags, config, tokenizer) -> Tensor:
    """Return [nsamples,seqlen] ids of the calibration text, checked against what a model of this config can take."""
    if (need := 12 * flags.nsamples * flags.seqlen) > free_memory(torch.device("cpu")):
        asked = f"--nsamples {flags.nsamples} windows of --seqlen {flags.seqlen}"
        raise UserError(f"{asked} take {need >> 30} GiB for the token ids alone: lower them")
    reading, draw = reading_of(flags, config, tokenizer), (flags.seqlen, flags.nsamples, flags.seed)
    windows = calibration_windows(flags.calib_dataset, tokenizer, *draw, reading)
    check_windows(config, windows)
    check_bos(tokenizer, reading.bos, windows[:1])
    return windows


def bos_of(flags, config) -> str:
    """Return --bos with auto resolved: "text", or "window" for the families that need BOS in every window."""
    if flags.bos != "auto":
        return flags.bos
    return "window" if {config.model_type, config.get_text_config().model_type} & NEEDS_BOS else "text"


def reading_of(flags, config, tokenizer) -> Reading:
    """Return how the flags ask for texts to be read. UserError for a BOS that the tokenizer lacks."""
    bos = bos_of(flags, config)
    if bos == "window" and tokenizer.bos_token_id is None:
        raise UserError(f"--bos {flags.bos} begins each window with BOS, and the tokenizer has none: give --bos text")
    return Reading(flags.text_column, bos)


def check_bos(tokenizer, bos: str, windows: Tensor) -> None:
    """Notify, once, of texts that lack the BOS of the tokenizer, or whose first windows [N,T] have it twice.

    A BOS that is also the end of a document, as GPT-2's, is one that models go without.
    """
    own, token = tokenizer.bos_token_id, tokenizer.bos_token
    if own is None:
        return
    if (windows[:, :2] == own).all(1).any():
        notify(f"a text begins with BOS {token!r} twice: remove the one that is written in it")
    elif bos == "text" and own != tokenizer.eos_token_id and own not in special_ids(tokenizer)[0]:
        notify(f"the tokenizer has a BOS {token!r} and begins no text with it: was the model? Then give --bos window")


def check_windows(config, windows: Tensor) -> None:
    """Raise UserError if windows [N,T] have a token that a model of this config lacks; say so if they are too long."""
    config = config.get_text_config()
    if windows.max() >= config.vocab_size:
        has = f"the tokenizer gives token {windows.max().item()}, the model has {config.vocab_size}"
        raise UserError(f"{has}: use the tokenizer that the model was trained with")
    positions = getattr(config, "max_position_embeddings", None)
    if positions and windows.shape[1] > positions:
        notify(f"seqlen {windows.shape[1]} exceeds the {positions} positions that the model was made for")
