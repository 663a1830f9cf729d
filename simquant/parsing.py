"""From dataclass fields to a command line, and what its words mean. Errors quote what was given."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
from argparse import ArgumentTypeError
from dataclasses import Field, field, fields
from functools import partial
from typing import Any

from simquant import processes
from simquant.methods import METHODS
from simquant.notices import one_line
from simquant.plans import BASELINE, PROJECTIONS, UNBOUND, UNQUANTIZED, Pair, Width
from simquant.tables import COLUMNS
from simquant.text_names import C4_FROM, DATASETS, TEXT_FILES, files_read, text_label

VERSION = "2.0"


def flag(
    default: Any, help: str, kind: Any = None, decides: bool = True, with_calibrate: str = "used", **how: Any
) -> Any:
    """Return a dataclass field that is a flag.

    kind            the parser of its value, or a tuple of choices; a flag whose default is False takes no value
    decides         whether it changes figures, so that --resume refuses another value
    with_calibrate  what --calibrate does with it: it is used, refused, or unused (which is said)
    how             more for ArgumentParser.add_argument
    """
    parsed = {"choices": kind} if isinstance(kind, tuple) else {"type": kind} if kind else {}
    how = {"action": "store_true"} if default is False else {**parsed, **how}
    return field(
        default=default, metadata={"help": help, "decides": decides, "with_calibrate": with_calibrate, "how": how}
    )


on_output = partial(flag, decides=False, with_calibrate="refused")
on_text = partial(flag, with_calibrate="unused")


def flag_fields(cls: type) -> dict[str, Field]:
    """Return {name: field} of all flags of a class, in order; the model is none."""
    return {each.name: each for each in fields(cls) if each.metadata}


def shown(default: Any) -> str:
    """Return a default as --help and docs/flags.md print it."""
    if isinstance(default, tuple):
        return ",".join(str(getattr(each, "label", each)) for each in default) or "none"
    return "none" if default is None else "off" if default is False else str(default)


def width_list(text: str) -> tuple[Width, ...]:
    """Parse widths between commas, such as 16,4,4/2 (keys/values) or 1.5. 16 comes first."""
    widths = []
    for word in text.split(","):
        parts = word.strip().split("/")
        is_number = all(re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,3})?", part) for part in parts)
        bits = [float(part) for part in parts] if is_number else [0.0]
        if len(parts) > 2 or not all(0.01 <= each <= 8 or each == UNQUANTIZED for each in bits):
            has = "give 2 to 8, 16, or keys/values such as 4/2; with --klt 0.01 to 8, up to three decimals, such as 1.5"
            raise ArgumentTypeError(f"unknown width {word!r}: {has}")
        keys, *_, values = (int(each) if each.is_integer() else each for each in [*bits, *bits])
        widths.append(Width(keys, values))
        if widths.count(widths[-1]) > 1:
            raise ArgumentTypeError(f"{word.strip()} stands there more than once in {text!r}")
    return tuple(sorted(widths, key=lambda width: width != BASELINE))


def format_list(text: str) -> tuple[Pair, ...]:
    """Parse names of METHODS, families, pairs such as q8_0/q4_0 (keys/values) and all, between commas."""
    named: list[Pair] = []
    for word in (word.strip() for word in text.split(",")):
        if word == "all" or word in FAMILIES:
            names = [name for name, each in METHODS.items() if word in ("all", each.family) and not each.calibrated]
            named += [Pair(name, name, is_named=False) for name in names]
            continue
        keys, slash, values = word.partition("/")
        if not keys or (slash and not values):
            raise ArgumentTypeError(f"a name is missing in {text[:80]!r}")
        pair = Pair(method_name(keys), method_name(values if slash else keys))
        if pair in named:
            raise ArgumentTypeError(f"{word} stands there more than once in {text!r}")
        named.append(pair)
    said = {pair.label for pair in named if pair.is_named}
    return tuple(dict.fromkeys(pair for pair in named if pair.is_named or pair.label not in said))


FAMILIES = tuple(dict.fromkeys(method.family for method in METHODS.values() if method.family))


def method_name(word: str) -> str:
    """Return word if it is one of METHODS, or 16 for what stays unquantized."""
    if word in METHODS or word == UNBOUND:
        return word
    if word == "all" or word in FAMILIES:
        raise ArgumentTypeError(f"{word} stands for several formats: it goes into no pair")
    alike = difflib.get_close_matches(word, [*METHODS, *FAMILIES, "all"], 3, 0.5)
    advice = f"did you mean {' or '.join(alike)}?" if alike else "the README lists them; all are in `all`"
    raise ArgumentTypeError(f"unknown format {word[:40]!r}: {advice}")


def dataset_list(text: str) -> tuple[str, ...]:
    """Parse names, text files and folders between commas, no two the same."""
    names = tuple(text_name(name.strip()) for name in text.split(","))
    files = [name if (name := text_label(each)) in DATASETS else os.path.realpath(name) for each in names]
    if repeated := [name for name, file in zip(names, files, strict=True) if files.count(file) > 1]:
        raise ArgumentTypeError(f"{repeated[0]} stands there more than once")
    return names


def text_name(name: str) -> str:
    """Return name if it is one of DATASETS, a readable text file or folder of them, or c4= and such a path."""
    path = name.removeprefix(C4_FROM)
    if path in DATASETS and path == name:
        return name
    if not os.path.isdir(path) and not path.lower().endswith(TEXT_FILES):
        known, kinds = ", ".join(DATASETS), ", ".join(TEXT_FILES)
        raise ArgumentTypeError(f"unknown dataset {name!r}: give {known}, a folder, or a path that ends in {kinds}")
    if not os.path.isdir(path) and not os.path.isfile(path):
        raise ArgumentTypeError(f"text file {path!r} does not exist, or is no file")
    for file in (path, *files_read(name)) if os.access(path, os.R_OK) else [path]:
        if not os.access(file, os.R_OK):
            what = "folder" if os.path.isdir(file) else "file"
            raise ArgumentTypeError(f"text {what} {file!r} cannot be read: check its permissions")
    if not files_read(name):
        raise ArgumentTypeError(f"text folder {path!r} has no file that ends in {', '.join(TEXT_FILES)}")
    return name


def number(text: str, least: int, most: int = 2**50, instead: str | None = None) -> int | str:
    """Parse a whole number from least to most, or the word `instead`."""
    if text == instead:
        return text
    if not re.fullmatch(r"[+-]?[0-9]{1,20}", text) or not least <= int(text) <= most:
        what = f"at least {least}" if most == 2**50 else f"in {least}..{most}"
        raise ArgumentTypeError(
            f"must be a whole number {what}{f', or {instead}' if instead else ''}, got {text[:40]!r}"
        )
    return int(text)


def fraction(text: str) -> float:
    """Parse a number in (0, 1]."""
    if not re.fullmatch(r"[0-9.eE+-]{1,30}", text) or not 0 < float(text) <= 1:
        raise ArgumentTypeError(f"must be in (0, 1], got {text[:40]}")
    return float(text)


def matching(text: str, pattern: str, words: str) -> str:
    """Return text if it matches pattern, which words describe."""
    if not re.fullmatch(pattern, text, re.DOTALL):
        raise ArgumentTypeError(f"must be {words}, got {text[:80]!r}")
    return text


def layer_list(text: str) -> tuple[int, ...]:
    """Parse layers between commas, counted from 0, or from -1 at the end."""
    layer = r"\s*-?[0-9]{1,6}\s*"
    return tuple(int(word) for word in matching(text, f"{layer}(,{layer})*", "layers such as 0,1,-1").split(","))


def column_list(text: str) -> tuple[str, ...]:
    """Parse names of figures between commas, or all."""
    names = tuple(COLUMNS) if text == "all" else tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if unknown := [name for name in names if name not in COLUMNS]:
        raise ArgumentTypeError(f"unknown figure {unknown[0]!r}: give all, or some of {', '.join(COLUMNS)}")
    return names


count = partial(partial, number)  # count(least=1) parses a whole number from 1 on
picture = partial(matching, pattern=r"(?i).*\.(png|svg)", words="a file that ends in .png or .svg")


class Projections(argparse.Action):
    """k_proj and v_proj as plain words, between spaces or commas, or as one JSON list; or nothing."""

    def __call__(self, parser, namespace, values, option_string=None):
        words = " ".join(values)
        try:
            names = json.loads(words) if words.startswith("[") else words.replace(",", " ").split()
        except ValueError:
            names = None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise argparse.ArgumentError(self, f"{words!r} is no JSON list of names, such as '[\"k_proj\"]'")
        if unknown := [name for name in names if name not in PROJECTIONS]:
            has = f"give {' or '.join(PROJECTIONS)}, and the model before this flag"
            raise argparse.ArgumentError(self, f"a cache holds no {unknown[0]!r}, only keys and values: {has}")
        setattr(namespace, self.dest, tuple(dict.fromkeys(names)))


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, said by one process."""

    def error(self, message: str):
        """Exit with status 2 after one line; what looks like a flag is compared with those that there are."""
        wrong = re.match(r"unrecognized arguments: (--\w+)", message)
        alike = difflib.get_close_matches(wrong[1], self._option_string_actions, 1) if wrong else []
        message += f": {alike[0]} is one" if alike else ""
        line = f"{self.prog}: error: {one_line(message)} (--help lists the flags)\n"
        self.exit(2, line if processes.index() == 0 else None)


def make_parser(cls: Any, description: str | None, epilog: str, needs_model: bool = True) -> Parser:
    """Return the parser of a class of flags. What a command line leaves out is not in its namespace."""
    how: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "argument_default": argparse.SUPPRESS,
    }
    parser = Parser(description=description, epilog=epilog, allow_abbrev=False, **how)
    parser._negative_number_matcher = re.compile(r"-\d[\d, -]*$")  # so that -1,0 is a value and no flag
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    names: dict[str, Any] = (
        {"help": "hub id or local folder"} if needs_model else {"nargs": "*", "help": argparse.SUPPRESS}
    )
    parser.add_argument("model", **names)
    for group in cls.groups:
        add = parser.add_argument_group(group.__doc__).add_argument
        for name, each in flag_fields(group).items():
            text, how = each.metadata["help"], each.metadata["how"]
            text += f": {', '.join(how['choices'])}" if {"choices", "metavar"} <= set(how) else ""
            text += "" if each.default is False else f" (default: {shown(each.default)})"
            add(f"--{name}", **how, help=text)
    return parser


def plain_settings(flags: Any) -> dict[str, Any]:
    """Return {flag: value} as JSON holds it; --abits and --kv_format are lists only for several."""
    settings = {name: getattr(flags, name) for name in flag_fields(type(flags)) if name != "dry_run"}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    for name in ("abits", "kv_format"):
        labels = [each.label for each in getattr(flags, name)]
        settings[name] = labels[0] if len(labels) == 1 else labels
    return settings


def decisive(flags: Any) -> dict[str, Any]:
    """Return {flag that decides figures: its default}: what --resume compares."""
    usual = plain_settings(type(flags)(model=flags.model))
    return {name: usual[name] for name, each in flag_fields(type(flags)).items() if each.metadata["decides"]}


def as_markdown(cls: Any) -> str:
    """Return the tables of docs/flags.md for a class of flags."""
    parts = []
    for group in cls.groups:
        rows = [f"| `--{n}` | {f.metadata['help']} | `{shown(f.default)}` |" for n, f in flag_fields(group).items()]
        head = [f"## {(group.__doc__ or '').capitalize()}", "", "| flag | meaning | default |", "|---|---|---|"]
        parts.append("\n".join([*head, *rows]))
    return "\n\n".join(parts) + "\n"
