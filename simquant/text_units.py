"""Units that compare across tokenizers: bits per byte and word perplexity, and the bytes and words that they divide by.

They are those of lm-evaluation-harness: a loss in nats over the UTF-8 bytes of a text, in bits, and the exponential of
a loss over its words, which whitespace separates. A window's first token is context alone, so what counts are the bytes
of the other tokens, and the words that begin in them. A space that SentencePiece puts before a text counts as well.
"""

from __future__ import annotations

import codecs
import math
import re
import statistics
from collections.abc import Callable, Sequence
from itertools import takewhile

import torch
from torch import Tensor

OWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that GPT-2's vocabulary writes as their character
BYTES = {chr(each): each for each in OWN}
BYTES |= {chr(256 + n): each for n, each in enumerate(sorted({*range(256)} - {*OWN}))}  # the others, from U+0100 on
ONE_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how SentencePiece writes a byte of what its vocabulary lacks
Spelling = Sequence[bytes | None]  # of some tokens: their bytes, None for special ones


def byte_level(token: str) -> bytes:
    """Return the bytes of a token of byte-level BPE (GPT-2, Llama 3, Qwen). KeyError if it is none."""
    return bytes(BYTES[character] for character in token)


def sentencepiece(token: str) -> bytes:
    """Return the bytes of a token that writes a space as U+2581 (Llama 2, Mistral, Gemma), or as it is."""
    byte = ONE_BYTE.fullmatch(token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def spelling(tokenizer, ids: Sequence[int], spell: Callable[[str], bytes]) -> Spelling | None:
    """Return the bytes of each of ids as spell gives them, or None if it cannot, or if one stands for unknown text."""
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(each for each, token in added.items() if token.special)}
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)  # as which GPT-2 uses the unknown token, for want of others
    if tokenizer.unk_token_id in {*ids} - {*ends}:
        return None
    found: list[bytes | None] = []
    for each, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        try:
            is_text = each in added and spell is byte_level  # byte-level BPE does not spell what was added to it
            found.append(None if each in special else token.encode() if is_text else spell(token))
        except (KeyError, UnicodeEncodeError, AttributeError, TypeError):  # the last two of a token that is no string
            return None
    return found


def is_inside(token: bytes | None) -> bool:
    """Return whether a token begins inside a character, or has no text at all."""
    return not token or token[0] & 0xC0 == 0x80


def agrees(tokenizer, ids: Sequence[int], spelled: Spelling) -> bool:
    """Return whether the tokenizer decodes ids to what they are spelled as, but for spaces at the ends.

    Characters that the window's ends cut are left out, of which decoders make different things.
    """
    first = len([*takewhile(is_inside, spelled)])
    joined, last = b"".join(each or b"" for each in spelled[first:]), len(spelled)
    while last > first and codecs.utf_8_decode(joined, "replace", False)[1] < len(joined):
        last -= 1
        joined = joined[: len(joined) - len(spelled[last] or b"")]
    decoded = tokenizer.decode(ids[first:last], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return joined.decode(errors="replace").strip(" ") == decoded.strip(" ")


def words_begun(spelled: Spelling) -> int:
    """Return the words that begin in all tokens but the first; a special token separates words, as a space does.

    A word begins where its first character is complete, and goes on over the start of a window that cuts a character.
    """
    joined = (b"".join(b" " if each is None else each for each in part) for part in (spelled, spelled[:1]))
    whole, first = (len(codecs.utf_8_decode(each, "replace", False)[0].split()) for each in joined)
    return whole - first


def text_sizes(tokenizer, windows: Tensor) -> Tensor | None:
    """Return [N,2] int64, the UTF-8 bytes and the words of the predicted tokens of windows [N,T], all but the first.

    They are those of the text after the tokenizer's normalizer, if it has one. None where tokens cannot be turned into
    bytes: where no known convention spells each window as the tokenizer decodes it.
    """
    distinct, places = windows.cpu().unique(return_inverse=True)
    for spell in (byte_level, sentencepiece):
        if (table := spelling(tokenizer, distinct.tolist(), spell)) is None:
            continue
        spelled = [[table[place] for place in window] for window in places.tolist()]
        if all(agrees(tokenizer, *each) for each in zip(windows.tolist(), spelled, strict=True)):
            sizes = [(sum(len(each or b"") for each in window[1:]), words_begun(window)) for window in spelled]
            return torch.tensor(sizes, dtype=torch.int64).view(-1, 2)
    return None


def bits_per_byte(nll: float, size: float) -> float:
    """Return bits a byte of a text of size bytes whose loss is nll nats in total; nan for a text without bytes."""
    return nll / size / math.log(2) if size else math.nan


def word_perplexity(nll: float, words: float) -> float:
    """Return exp of the nats a word, nll being the total; infinite beyond 1e299, and nan for a text without words."""
    mean = nll / words if words else math.nan
    return math.inf if mean > 690 else math.exp(mean)


def ratio_with_error(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float | None]:
    """Return a ratio of totals over windows, and its standard error; None for a single window, nan for 0 / 0.

    The error is that of the linearized ratio: of a mean of what is left of each numerator after ratio x denominator.
    """
    total, count = math.fsum(denominators), len(numerators)
    ratio = math.fsum(numerators) / total if total else math.nan
    rest = [one - ratio * other for one, other in zip(numerators, denominators, strict=True)]
    return ratio, statistics.stdev(rest) * math.sqrt(count) / total if count > 1 and total else None
