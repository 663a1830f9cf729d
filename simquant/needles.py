"""Needles in the user's own text: prompts that hide lines in it, and end with a question and its answer.

A needle is a line that gives a number to a key. It lies somewhere in a stretch of the text, and the prompt ends with
the question for it and with the right answer, so that one forward pass tells whether a model would have found it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from quant_utils import UserError
from simquant.texts import reading_of
from simquant.tokens import special_ids

KINDS = {"passkey": 1, "multikey": 4}  # {kind: needles in a prompt, of which one is asked for}
KEYS = (
    "river", "garden", "castle", "kitchen", "market", "bridge", "forest", "library", "station", "island", "harbor",
    "temple", "factory", "hotel", "museum", "valley",
)  # fmt: skip
CLAIM = "The secret number of the {} is"  # in the needle, and word for word before the answer
QUESTION = "\nWhat is the secret number of the {}?\n"
DIGITS = 5  # of a number that is hidden
LEAST = 16  # tokens of the text that a prompt has at the least


@dataclass(frozen=True, eq=False)
class Haystack:
    """The text that needles lie in: its name, its ids [N] without special ones, and those [b] that begin a prompt."""

    name: str
    ids: Tensor
    begin: Tensor


@dataclass(frozen=True, eq=False)
class Needles:
    """Token ids of what is hidden in a prompt, and of the question with the answer, which is its last ids."""

    asked: Tensor
    others: tuple[Tensor, ...]
    question: Tensor
    answer: int  # tokens of the answer

    @property
    def tokens(self) -> int:
        """How many ids they all have."""
        return sum(map(len, (self.asked, *self.others, self.question)))


@dataclass(frozen=True, eq=False)
class Prompt:
    """A text with needles, a question and its answer: ids [length], the last of which are the answer."""

    kind: str
    length: int
    depth: int  # percent of the text before the needle that is asked for
    pieces: tuple[Tensor, ...]
    answer: int  # tokens of the answer

    @property
    def ids(self) -> Tensor:
        """[length] ids."""
        return torch.cat(self.pieces)


def prompts(flags, config, tokenizer, windows: Mapping[str, Tensor]) -> list[Prompt]:
    """Return --retrieval prompts for each length, kind and depth, from the first text of {dataset: windows [N,T]}.

    They are the same in every run that reads as much text as they take, whatever its --limit: the n-th prompts of a
    length lie in the n-th stretch of the text. UserError for a length that the model, the needles or the text cannot
    have.
    """
    hay = haystack(flags, config, tokenizer, windows)
    taken = numbers_in(tokenizer, hay.ids)
    places = [(kind, d, number) for kind in KINDS for d in flags.retrieval_depths for number in range(flags.retrieval)]
    hidden = {place: draw_needles(tokenizer, KINDS[place[0]], random.Random(f"{place}"), taken) for place in places}
    tokens = [each.tokens for each in hidden.values()]
    least = len(hay.begin) + max(tokens) + LEAST
    usual = [length for length in (flags.seqlen // 4, flags.seqlen // 2) if length >= least]
    lengths = flags.retrieval_lengths or [*usual, flags.seqlen]
    check_lengths(lengths, config, hay, (least, min(tokens)))
    made = []
    for length in lengths:
        for (kind, depth, number), needles in hidden.items():
            rng = random.Random(f"{length}, {kind}, {depth}, {number}")
            size = length - len(hay.begin) - needles.tokens
            start = number * length % (len(hay.ids) - size + 1)
            pieces = laid_out(hay.begin, hay.ids[start : start + size], needles, depth, rng)
            made.append(Prompt(kind, length, depth, pieces, needles.answer))
    return made


def digest(asked: Sequence[Prompt]) -> str:
    """Return the sha256 of all ids of prompts: what tells whether two runs asked for the same."""
    return sha256(b"".join(each.ids.numpy().tobytes() for each in asked)).hexdigest()


def haystack(flags, config, tokenizer, windows: Mapping[str, Tensor]) -> Haystack:
    """Return as much of the first text as prompts take, without special ids; they begin as it or its windows do."""
    name, ids = next((name, each.flatten()) for name, each in windows.items())
    is_window = reading_of(flags, config, tokenizer).bos == "window"
    begin = [tokenizer.bos_token_id] if is_window else special_ids(tokenizer)[0]
    text = ids[~torch.isin(ids, torch.tensor(tokenizer.all_special_ids, dtype=ids.dtype))]
    most = flags.retrieval * max(flags.retrieval_lengths or (flags.seqlen,))
    return Haystack(name, text[:most], torch.tensor(begin, dtype=torch.long))


def numbers_in(tokenizer, ids: Tensor) -> set[str]:
    """Return all that DIGITS digits in a row make in the text of ids [N], spaces between them not counted."""
    text = "".join(tokenizer.decode(ids, skip_special_tokens=True).split())
    return set(re.findall(f"(?=([0-9]{{{DIGITS}}}))", text))


def draw_needles(tokenizer, count: int, rng: random.Random, taken: set[str]) -> Needles:
    """Return needles with keys and numbers that rng draws, none of which is taken; the first is asked for."""
    keys = rng.sample(KEYS, count)
    drawn = map(str, rng.sample(range(10 ** (DIGITS - 1), 10**DIGITS), 1000))
    numbers = [number for number in drawn if number not in taken][:count]
    if len(numbers) < count:
        raise UserError(f"the text has nearly all numbers of {DIGITS} digits, and none is left to hide: give another")

    def encode(text: str) -> list[int]:
        """Return the ids of a text without special ones."""
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    lines = [f"\n{CLAIM.format(key)} {number}.\n" for key, number in zip(keys, numbers, strict=True)]
    asked, *others = (torch.tensor(encode(line)) for line in lines)
    question, answer = QUESTION.format(keys[0]) + CLAIM.format(keys[0]), f" {numbers[0]}"
    without, whole = encode(question), encode(question + answer)
    shared = next((at for at, (a, b) in enumerate(zip(without, whole, strict=False)) if a != b), len(without))
    return Needles(asked, tuple(others), torch.tensor(whole), len(whole) - shared)


def check_lengths(lengths: Sequence[int], config, hay: Haystack, needs: tuple[int, int]) -> None:
    """Raise UserError for the first length that the model, the needles or the text cannot have.

    needs are the least tokens of a prompt, and what the smallest needles with their question take.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    (need, fewest), advice = needs, "give other --retrieval_lengths"
    for length in lengths:
        if positions and length > positions:
            raise UserError(f"a needle in {length} tokens exceeds the model's {positions} positions: {advice}")
        if length < need:
            raise UserError(f"{length} tokens do not hold needles and question, which take {need}: {advice}")
        if (text := length - len(hay.begin) - fewest) > len(hay.ids):
            has = f"{hay.name} gives {len(hay.ids)} tokens, and a needle in {length} takes {text} of them"
            raise UserError(f"{has}: raise --limit or lower --retrieval_lengths")


def laid_out(begin: Tensor, text: Tensor, needles: Needles, depth: int, rng: random.Random) -> tuple[Tensor, ...]:
    """Return pieces of ids: what begins a prompt, a stretch of the text with the needles in it, and the question.

    The needle that is asked for has `depth` percent of the stretch before it, the others lie anywhere inside.
    """
    size, pieces, done = len(text), [begin], 0
    others = zip(rng.sample(range(1, size), len(needles.others)), needles.others, strict=True)
    for place, needle in sorted([(round(depth * size / 100), needles.asked), *others], key=lambda each: each[0]):
        pieces += [text[done:place], needle]
        done = place
    return *pieces, text[done:], needles.question
