"""From text to token ids: the same ids as from the whole text, in pieces that take little memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from quant_utils import UserError
from simquant.text_files import PIECE

WHOLE = 2**20  # characters of a text that is tokenized in one go
OVERLAP = 2**13  # characters that two neighbouring pieces of a longer one share
AGREED = 8  # different tokens at least in what they agree on: a run of one token agrees with itself anywhere
UNCUT = 2**21  # characters that are taken in one go at most where they do not agree


class Text:
    """A text that is read from its pieces by numbers of characters, with what there is to say of it."""

    def __init__(self, pieces: Iterable[str]):
        self.pieces, self.rest, self.last = iter(pieces), "", ""
        self.is_blank, self.crlf = True, 0

    def read(self, most: int | None) -> str:
        """Return the next characters, all that are left for None, fewer than `most` only at the end."""
        parts, count = [self.rest], len(self.rest)
        while (most is None or count < most) and (piece := next(self.pieces, None)) is not None:
            self.is_blank = self.is_blank and not piece.strip()
            self.crlf += (self.last + piece).count("\r\n")
            self.last = piece[-1:] or self.last
            parts.append(piece)
            count += len(piece)
        text = "".join(parts)
        self.rest = text[count if most is None else most :]
        return text[:most]


def special_ids(tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after a text by itself."""
    dressed, bare = (tokenizer("a", add_special_tokens=each, verbose=False).input_ids for each in (True, False))
    first = next((at for at in range(len(dressed)) if bare and dressed[at : at + len(bare)] == bare), 0)
    return dressed[:first], dressed[first + len(bare) :]


def tokenize(tokenizer, text: str, bos: str = "text") -> Tensor:
    """Return [N] ids of text, tokenized once: as the tokenizer does by itself, or after BOS and no other special."""
    if bos == "text":
        return tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor([tokenizer.bos_token_id, *ids])


def tokenized(tokenizer, text: Text, bos: str = "text") -> Iterator[Tensor]:
    """Yield parts [n] of the ids that tokenize gives for a text, without holding a long one whole."""
    begin = text.read(WHOLE)
    if len(begin) < WHOLE or not getattr(tokenizer, "is_fast", False):  # slow ones do not tell where a token stands
        yield tokenize(tokenizer, begin + text.read(None), bos)
        return
    text.rest = begin + text.rest
    before, after = special_ids(tokenizer) if bos == "text" else ([tokenizer.bos_token_id], [])
    yield torch.tensor(before, dtype=torch.long)
    yield from tokenized_in_pieces(tokenizer, text)
    yield torch.tensor(after, dtype=torch.long)


def tokenized_in_pieces(tokenizer, text: Text) -> Iterator[Tensor]:
    """Yield parts [n] of a text's ids, without special ones, equal to those of the whole, from pieces that overlap.

    A piece is wrong near its ends, where a word is cut, or a merge lacks its neighbour. So it gives way to the next one
    in the middle of their overlap, and only if both have the same tokens at the same places in the whole middle half.
    Where they differ (a run of digits, spaces or letters without an end), the piece grows and is tokenized anew.
    """
    piece, begun, size = text.read(PIECE), 0, PIECE  # the tokens before the place `begun` are given already
    tokens = located(tokenizer, piece)
    quarter, middle, end = OVERLAP // 4, OVERLAP // 2, OVERLAP - OVERLAP // 4
    while more := text.read(size - OVERLAP):
        shared = len(piece) - OVERLAP
        following = piece[shared:] + more
        others = located(tokenizer, following)
        mine, theirs = between(tokens, shared + quarter, shared + end), between(others, quarter, end)
        if len(mine[:, 0].unique()) >= AGREED and torch.equal(mine - torch.tensor([0, shared, shared]), theirs):
            yield between(tokens, begun, shared + middle)[:, 0]
            piece, tokens, begun, size = following, others, middle, PIECE
        else:
            piece, size = piece + more, 2 * size
            if len(piece) > UNCUT:
                raise UserError(
                    f"a text runs on for {len(piece)} characters, and the tokenizer splits it nowhere: break lines"
                )
            tokens = located(tokenizer, piece)
    yield between(tokens, begun, len(piece) + 1)[:, 0]


def located(tokenizer, text: str) -> Tensor:
    """Return [N,3]: the ids of a text without special ones, and the characters where each begins and ends."""
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    places = torch.tensor(made.offset_mapping, dtype=torch.long).view(-1, 2)
    return torch.cat([torch.tensor(made.input_ids, dtype=torch.long)[:, None], places], 1)


def between(tokens: Tensor, first: int, last: int) -> Tensor:
    """Return those of located tokens [N,3] that begin in [first, last)."""
    return tokens[(tokens[:, 1] >= first) & (tokens[:, 1] < last)]
