"""From what a command asks for to {row: {site: quantizer}}: widths, pairs of methods, an attribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from simquant.methods import METHODS

if TYPE_CHECKING:
    from quant_utils import Quantizer, Setting, Site

UNBOUND = "16"  # what --kv_format 16/q4_0 calls keys that are not quantized
UNQUANTIZED = 16  # bits an entry of the cache that the others are compared with
PROJECTIONS = {"k_proj": "keys", "v_proj": "values"}  # --perchannel's names, and what they are to the cache


SEES_ALL = "a range of the whole window sees tokens to come: give --perchannel --pertoken k_proj v_proj"


class Width(NamedTuple):
    """Bits an entry of keys and of values: whole numbers, or any rate where a method shares bits between channels."""

    keys: float
    values: float

    @property
    def is_whole(self) -> bool:
        """Whether formats that give every entry the same bits can have it."""
        return all(type(bits) is int and bits >= 2 for bits in self)

    @property
    def label(self) -> float | str:
        """4, or "4/2" where keys and values differ: what --abits takes, and what a row is called."""
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"

    def of(self, part: str) -> float:
        """Return the bits of "keys" or "values"."""
        return self.keys if part == "keys" else self.values


BASELINE = Width(UNQUANTIZED, UNQUANTIZED)


class Pair(NamedTuple):
    """What keys and values are quantized by: names in METHODS, or UNBOUND for a part that stays in 16 bits.

    is_named  whether the command names it, and not a list that it is in: then it is an error if it does not fit
    """

    keys: str
    values: str
    is_named: bool = True

    @property
    def label(self) -> str:
        """q8_0, or "q8_0/q4_0" where keys and values differ: what --kv_format takes, and what a row is called."""
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"

    def of(self, part: str) -> str:
        """Return the name for "keys" or "values"."""
        return self.keys if part == "keys" else self.values

    @property
    def methods(self) -> list[str]:
        """The names in METHODS, each once."""
        return [name for name in dict.fromkeys(self[:2]) if name != UNBOUND]

    def own_bits(self, part: str) -> int | None:
        """Return the bits of "keys" or "values" that the method fixes; None if it leaves the choice."""
        name = self.of(part)
        return UNQUANTIZED if name == UNBOUND else METHODS[name].format(part).options.get("bits")

    @property
    def is_fixed(self) -> bool:
        """Whether it leaves no choice of widths."""
        return self.own_bits("keys") is not None and self.own_bits("values") is not None

    def width(self, asked: Width) -> Width:
        """Return the bits of keys and values: those asked where a method leaves the choice."""
        own = {part: self.own_bits(part) for part in ("keys", "values")}
        return Width(*(asked.of(part) if bits is None else bits for part, bits in own.items()))


class Row(NamedTuple):
    """What a setting is called: its format and width, what it quantizes, and which layer if it is a single one."""

    format: str
    abits: float | str
    quantized: str
    layer: int | None = None

    @property
    def is_unquantized(self) -> bool:
        """Whether it is the row that others are compared with."""
        return self.abits == UNQUANTIZED

    def __str__(self) -> str:
        return self.format if self.is_unquantized else f"{self.format}, abits {self.abits}, {self.quantized}"


@dataclass(frozen=True)
class Plan:
    """What a command asks to quantize, before a model is there to say where.

    pairs        what keys and values are quantized by, for each format
    widths       a setting for each, in every format that leaves the choice; 16 is the unquantized model
    axes         {"keys": "channel", "values": "token"}: which parts are quantized, and which entries share a range
    options      {flag: (field of a quantizer, value)} for what is asked beyond the methods' own choices
    skipped      layers that stay unquantized; negative ones count from the end
    attribution  whether the only width is also taken apart
    is_calibrated  whether ranges of channels are calibrated
    label        what is added to the formats' names: which quantizer file they come from
    """

    pairs: Sequence[Pair]
    widths: Sequence[Width]
    axes: Mapping[str, str]
    options: Mapping[str, tuple[str, Any]]
    skipped: Sequence[int] = ()
    attribution: bool = False
    is_calibrated: bool = False
    label: str = ""

    def quantizer(self, name: str, part: str, bits: float, head_dim: int) -> Quantizer:
        """Return what quantizes keys or values by a method, not fitted. UserError if it does not fit."""
        from quant_utils import UserError

        format = METHODS[name].format(part)
        cls = format.cls()
        known = {each.name for each in fields(cls) if each.init}  # type: ignore[arg-type]
        asked = {"axis": self.axes[part], "bits": bits, "head": head_dim, **format.options}
        asked |= dict(self.options.values())
        if asked["axis"] == "token":
            asked.pop("cap", None)  # it caps what has a calibrated range
        if asked.get("recent") and "levels" in known and asked["axis"] == "channel" and not self.is_calibrated:
            raise UserError(f"--recent does not go with --kv_format {name} per channel: {SEES_ALL}")
        try:
            return cls(**{name: value for name, value in asked.items() if name in known})
        except UserError as error:
            raise UserError(f"--kv_format {name}: {error}") from error

    def skipped_layers(self, sites: Sequence[Site], own: Sequence[int] = ()) -> set[int]:
        """Return the layers that stay unquantized, counted from 0; own are those that a method leaves out by itself."""
        from quant_utils import UserError

        layers = sorted({site.layer for site in sites})
        is_there = range(-len(layers), len(layers)).__contains__
        if absent := [layer for layer in self.skipped if not is_there(layer)]:
            raise UserError(
                f"--skip_layers {absent[0]} is not there: the model has {len(layers)} layers, counted from 0"
            )
        return {layers[layer] for layer in [*self.skipped, *filter(is_there, own)]}

    def setting(self, pair: Pair, width: Width, sites: Sequence[Site]) -> Setting:
        """Return what one format quantizes in one width."""
        parts = [part for part in self.axes if pair.of(part) != UNBOUND and width.of(part) < UNQUANTIZED]
        skipped = {part: self.skipped_layers(sites, METHODS[pair.of(part)].skipped) for part in parts}
        found = [site for site in sites if site.part in parts and site.layer not in skipped[site.part]]
        heads = dict.fromkeys((site.part, site.head_dim) for site in found)
        made = {(part, d): self.quantizer(pair.of(part), part, width.of(part), d) for part, d in heads}
        setting = {site: made[site.part, site.head_dim] for site in found}
        if all(getattr(quantizer, "predict", None) is None for quantizer in setting.values()):
            return setting
        from simquant.formats import prediction

        return prediction.with_sources(setting)

    def cells(self) -> list[tuple[Pair, Width]]:
        """Return all formats in all their widths, each once, the unquantized model left out."""
        below = [width for width in self.widths if width != BASELINE]
        return list(dict.fromkeys((pair, pair.width(width)) for pair in self.pairs for width in below or [BASELINE]))

    def settings(self, sites: Sequence[Site]) -> dict[Row, Setting]:
        """Return {row: setting} for all formats and widths, or for one taken apart behind the unquantized model."""
        return self.attempt(sites)[0]

    def left_out(self, sites: Sequence[Site]) -> list[str]:
        """Return why formats that the command does not name by themselves are left out."""
        return self.attempt(sites)[1]

    def attempt(self, sites: Sequence[Site]) -> tuple[dict[Row, Setting], list[str]]:
        """Return (settings, why formats are left out). UserError for a format that the command names."""
        from quant_utils import UserError

        rows: dict[Row, Setting] = {Row("unquantized", UNQUANTIZED, "nothing"): {}} if BASELINE in self.widths else {}
        reasons = []
        for pair, width in self.cells():
            if width == BASELINE:
                continue
            try:
                setting = self.setting(pair, width, sites)
            except UserError as error:
                if pair.is_named:
                    raise
                reasons.append(str(error))
            else:
                rows[Row(pair.label + self.label, width.label, quantized_words(setting, sites))] = setting
        classes = {type(quantizer): None for setting in rows.values() for quantizer in setting.values()}
        taken = {each.name for cls in classes for each in fields(cls)}  # type: ignore[arg-type]
        if missing := [flag for flag, (name, _) in self.options.items() if classes and name not in taken]:
            names = ", ".join(dict.fromkeys(pair.label for pair in self.pairs))
            raise UserError(f"{missing[0]} does not go with the method {names}")
        return (attributed(rows) if self.attribution else rows), reasons


def quantized_words(setting: Setting, sites: Sequence[Site]) -> str:
    """Return "keys and values except layer 0", or what else of sites a setting quantizes."""
    words: dict[str, str] = {}
    for part in dict.fromkeys(site.part for site in setting):
        layers = [site.layer for site in sites if site.part == part and site not in setting]
        numbers = ", ".join(map(str, sorted(layers)))
        words[part] = f" except {'layers' if len(layers) > 1 else 'layer'} {numbers}" if layers else ""
    if len({*words.values()}) == 1:
        return " and ".join(words) + next(iter(words.values()))
    return ", ".join(part + skipped for part, skipped in words.items()) or "nothing"


def attributed(rows: Mapping[Row, Setting]) -> dict[Row, Setting]:
    """Return rows, the last of which is taken apart: keys and values in all layers, both, each layer alone."""
    *unquantized, (row, whole) = rows.items()
    made = dict(unquantized)
    for part in dict.fromkeys(site.part for site in whole):
        made[row._replace(quantized=part)] = {site: quantizer for site, quantizer in whole.items() if site.part == part}
    made[row] = whole
    for layer in dict.fromkeys(site.layer for site in whole):
        made[row._replace(quantized=f"layer {layer}", layer=layer)] = {
            s: q for s, q in whole.items() if s.layer == layer
        }
    return made
