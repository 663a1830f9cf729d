"""An evaluation by quantizer files: what their settings say, and what the command line may add. No torch by itself."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from simquant.calibrated_flags import CalibratedFlags, of_the_fit
from simquant.command_line import SHORT, checked, with_method
from simquant.methods import METHODS
from simquant.parsing import format_list, width_list
from simquant.plans import BASELINE, PROJECTIONS, Plan

UNIFORM = format_list("uniform")  # what KVQuant's own file without levels is, unless the command says NormalFloat
Sources = list[tuple[Plan, "Mapping[str, Any] | None"]]


def sources_of(flags: CalibratedFlags, given: Mapping[str, Any]) -> tuple[CalibratedFlags, Sources]:
    """Return (flags with what files say, [(plan, a file's content)]): files first, then formats that need none.

    A name in --kv_format that a file was fitted for stands for what that file holds.
    """
    if not flags.quantizer_files:
        return flags, [(flags.plan(), None)]
    from simquant import quantizer_file

    contents = [quantizer_file.load(path) for path in flags.quantizer_files]
    fitted = [with_stored(flags, given, content["settings"], content["path"]) for content in contents]
    if flags.plot_bits is not None and not any(each.shares_bits() for each in fitted):
        has = ", ".join(dict.fromkeys(name for each in fitted for name in each.methods()))
        raise ArgumentTypeError(f"--plot_bits shows how transform coding shares bits, and --quantizer_path holds {has}")
    plans = [each.plan() for each in fitted]
    if len(plans) > 1:
        plans = [replace(plan, label=f" ({Path(c['path']).stem})") for plan, c in zip(plans, contents, strict=True)]
    sources: Sources = list(zip(plans, contents, strict=True))
    beside = beside_files(given, [pair.label for each in fitted for pair in each.kv_format])
    if len(plans) == 1 and not beside:
        return fitted[0], sources
    whole = replace(fitted[0], kv_format=(*fitted[0].kv_format, *beside)) if len(plans) == 1 else flags
    if beside:
        dynamic = replace(replace(flags, kv_format=beside).plan(), is_calibrated=False)
        sources.append((dynamic, None))
    widths = (BASELINE, *(width for width in whole.abits if width != BASELINE))
    return replace(whole, abits=widths), [(replace(plan, widths=(BASELINE, *plan.widths)), c) for plan, c in sources]


def beside_files(given: Mapping[str, Any], in_files: list[str]) -> tuple:
    """Return the pairs of --kv_format that no file was fitted for. ArgumentTypeError for one that needs a file."""
    beside = tuple(pair for pair in given.get("kv_format", ()) if pair.label not in in_files)
    for pair in (pair for pair in beside if pair.is_named):
        if lacking := [name for name in pair.methods if METHODS[name].calibrated]:
            has = f"--quantizer_path holds {', '.join(dict.fromkeys(in_files))}"
            has = "a pair takes methods that need no data" if lacking[0] in in_files else has
            raise ArgumentTypeError(f"--kv_format {lacking[0]} is fitted to data, and {has}")
    return beside


def is_alike(name: str, usual: object, value: object) -> bool:
    """Return whether a flag's value in a file is one that the flag can have, or of its default's type."""
    if name == "kv_format":
        return value in list(METHODS)
    if name in ("perchannel", "pertoken"):
        return isinstance(value, list) and all(each in list(PROJECTIONS) for each in value)
    if isinstance(usual, list):
        kinds = (int, float, str) if name == "abits" else (int,)
        return isinstance(value, list) and all(type(each) in kinds for each in value)
    return type(value) is type(usual) or (usual is None and type(value) is float)


def with_stored(flags: CalibratedFlags, given: Mapping, stored: Mapping, path: str) -> CalibratedFlags:
    """Return flags with what the command line leaves out as a quantizer file says it. An error if they contradict.

    --kv_format may name other formats than the file's: they stand beside it.
    """
    usual = of_the_fit(CalibratedFlags(model=flags.model))
    for name, value in stored.items():
        if name not in usual or not is_alike(name, usual[name], value):
            raise ArgumentTypeError(
                f"quantizer file {path!r}: its {name} is {str(value)[:40]!r}, which is not known here"
            )
    stored = {name: tuple(value) if isinstance(value, list) else value for name, value in stored.items()}
    is_silent = "nf" not in stored  # KVQuant's own file: it does not tell uniform from NormalFloat levels
    asked = tuple(pair for pair in given.get("kv_format", ()) if pair.label in ("uniform", "nf") and is_silent)
    named = {"kv_format": format_list(stored["kv_format"]) if "kv_format" in stored else asked[:1] or UNIFORM}
    given = {name: value for name, value in given.items() if name not in ("kv_format", *SHORT)}
    short = {name: True for name in SHORT if stored.get(name)}  # a file of version 2 says no more
    stored |= with_method(CalibratedFlags, short or named)
    if "abits" in stored:
        stored["abits"] = width_list(",".join(map(str, stored["abits"])))
        for part in ("keys", "values"):
            has = {width.of(part) for width in stored["abits"]}
            if lacks := {width.of(part) for width in given.get("abits", ())} - has - {16}:
                known, lacking = (" and ".join(map(str, sorted(each, reverse=True))) for each in (has, lacks))
                raise ArgumentTypeError(f"--abits: {path!r} has {part} of {known} bits, and not of {lacking}")
    elif "abits" not in given:
        raise ArgumentTypeError(f"{path!r} does not say how many bits it is for: give --abits")
    for name in (name for name in stored if name in given and name not in ("abits", "skip_layers")):
        if given[name] != stored[name]:
            sides = f"{given[name]} on the command line contradicts {stored[name]} in {path!r}"
            raise ArgumentTypeError(f"--{name}: {sides}; leave the flag out, or calibrate again")
    return checked(replace(flags, **(stored | given)), given)
