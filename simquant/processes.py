"""Several processes, as `accelerate launch` or torchrun start them: who one is, and what they tell each other."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TypeVar

Item = TypeVar("Item")


def number_in_environment(name: str, absent: int) -> int:
    """Return a number that a launcher puts into the environment."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else absent


def count() -> int:
    """Return how many processes share the work."""
    return max(1, number_in_environment("WORLD_SIZE", 1))


def index(local: bool = False) -> int:
    """Return which of count() processes this is, or which on this machine; 0, the main process, prints and writes."""
    return number_in_environment("LOCAL_RANK" if local else "RANK", 0) if count() > 1 else 0


def gather(items: list[Item]) -> list[Item]:
    """Return the items of all processes in one list, in the order of their index."""
    if count() == 1:
        return items
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from quant_utils import UserError

    try:
        PartialState(cpu=True, backend="gloo", timeout=timedelta(days=7))
        return gather_object(items)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        advice = "another has ended and says why, or was not started by `accelerate launch`"
        raise UserError(f"{count()} processes do not reach each other: {advice} ({reason})") from error


def interleave(parts: dict) -> dict:
    """Return {key: [N,...]} from each process's {key: [n,...]}, made of items index(), index() + count(), ..."""
    made = {}
    for key, part in parts.items():
        shares = gather([part])
        made[key] = part.new_empty(sum(map(len, shares)), *part.shape[1:])
        for number, share in enumerate(shares):
            made[key][number :: count()] = share
    return made
