"""From the words of a command line to flags that go together, or one line that says why they do not."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from simquant import evidence_flags, parsing
from simquant.flags import Flags
from simquant.parsing import flag_fields
from simquant.plans import Pair

SHORT = ("nf", "nuq", "klt")  # forms of --kv_format
AnyFlags = TypeVar("AnyFlags", bound=Flags)


def parse(cls: type[AnyFlags], description: str | None, epilog: str) -> tuple[AnyFlags, dict[str, Any]]:
    """Return (all flags, those that the command line gives). Exits with one line for a mistake."""
    parser = parsing.make_parser(cls, description, epilog, needs_model=not is_comparison(sys.argv))
    try:
        given = vars(parser.parse_args())
        if "compare" in given:
            return compared(cls, given), given
        given = with_method(cls, given)
        flags = checked(cls(**given), given)
    except ArgumentTypeError as error:
        parser.error(str(error))
    return flags, given


def is_comparison(words: Sequence[str]) -> bool:
    """Return whether a command line sets saved reports side by side, and needs no model."""
    return any(word.partition("=")[0] == "--compare" for word in words)


def compared(cls: type[AnyFlags], given: Mapping[str, Any]) -> AnyFlags:
    """Return flags of a comparison of reports. ArgumentTypeError for one that has nothing to do there."""
    if model := given.get("model"):
        raise ArgumentTypeError(f"--compare shows saved reports and takes no model: leave out {model[0]!r}")
    if odd := [name for name in given if name not in (*evidence_flags.WITH_COMPARE, "model")]:
        raise ArgumentTypeError(f"--{odd[0]} measures, and --compare shows what was measured: leave one of them out")
    if repeated := [name for name in given["compare"] if given["compare"].count(name) > 1]:
        raise ArgumentTypeError(f"--compare has {repeated[0]!r} more than once")
    return cls(**{**given, "model": "", "compare": tuple(given["compare"])})


def checked(flags: AnyFlags, given: Mapping[str, Any]) -> AnyFlags:
    """Return flags, or raise ArgumentTypeError if some do not go together."""
    for message in (message for message, is_so in flags.refusals(given).items() if is_so):
        raise ArgumentTypeError(message)
    return flags


def with_method(cls: type[Flags], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return given with --kv_format and its short forms saying the same."""
    short = [name for name in SHORT if given.get(name)]
    named = [Pair(name, name) for name in short] + list(given.get("kv_format", ()))
    if short and len(set(named)) > 1:
        words = " and ".join(dict.fromkeys(pair.label for pair in named))
        flags = " or ".join(f"--{name}" for name in short)
        raise ArgumentTypeError(f"{words} are several methods: name them all in --kv_format, without {flags}")
    if not named:
        return dict(given)
    is_short: dict[str, Any] = {
        name: [Pair(name, name)] == list(set(named)) for name in SHORT if name in flag_fields(cls)
    }
    return {**given, **is_short, "kv_format": tuple(dict.fromkeys(named))}
