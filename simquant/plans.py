"""From what a command asks for to {row: {site: quantizer}}: widths, pairs of methods, an attribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from simquant.methods import METHODS

if TYPE_CHECKING:
    from quant_utils import Quantizer, Setting, Site

UNQUANTIZED = 16  # bits an entry of the cache that the others are compared with
PROJECTIONS = {"k_proj": "keys", "v_proj": "values"}  # --perchannel's names, and what they are to the cache


class Width(NamedTuple):
    """Bits an entry of keys and of values."""

    keys: int
    values: int

    @property
    def label(self) -> int | str:
        """4, or "4/2" where keys and values differ: what --abits takes, and what a row is called."""
        return self.keys if self.keys == self.values else f"{self.keys}/{self.values}"

    def of(self, part: str) -> int:
        """Return the bits of "keys" or "values"."""
        return self.keys if part == "keys" else self.values


BASELINE = Width(UNQUANTIZED, UNQUANTIZED)


class Row(NamedTuple):
    """What a setting is called: its width, what it quantizes, and which layer if it is a single one."""

    abits: int | str
    quantized: str
    layer: int | None = None

    @property
    def is_unquantized(self) -> bool:
        """Whether it is the row that others are compared with."""
        return self.abits == UNQUANTIZED

    def __str__(self) -> str:
        return f"abits {self.abits}, {self.quantized}"


@dataclass(frozen=True)
class Plan:
    """What a command asks to quantize, before a model is there to say where.

    method       a name in METHODS
    widths       a setting for each
    axes         {"keys": "channel", "values": "token"}: which parts are quantized, and which entries share a range
    options      {flag: (field of a quantizer, value)} for what is asked beyond the method's own choices
    skipped      layers that stay unquantized; negative ones count from the end
    attribution  whether the only width is also taken apart
    """

    method: str
    widths: Sequence[Width]
    axes: Mapping[str, str]
    options: Mapping[str, tuple[str, Any]]
    skipped: Sequence[int] = ()
    attribution: bool = False

    def quantizer(self, part: str, bits: int) -> Quantizer:
        """Return what quantizes keys or values at that width, not fitted. UserError if the format lacks an option."""
        from quant_utils import UserError

        method = METHODS[self.method]
        cls = method.cls()
        known = {each.name for each in fields(cls) if each.init}  # type: ignore[arg-type]
        if missing := [flag for flag, (name, _) in self.options.items() if name not in known]:
            raise UserError(f"{missing[0]} does not go with the method {self.method}")
        asked = {"axis": self.axes[part], "bits": bits, **dict(self.options.values()), **method.options}
        if self.axes[part] == "token":
            asked.pop("cap", None)  # it caps what has a calibrated range
        return cls(**{name: value for name, value in asked.items() if name in known})

    def skipped_layers(self, sites: Sequence[Site]) -> list[int]:
        """Return the layers that stay unquantized, counted from 0."""
        from quant_utils import UserError

        layers = sorted({site.layer for site in sites})
        if absent := [layer for layer in self.skipped if not -len(layers) <= layer < len(layers)]:
            raise UserError(
                f"--skip_layers {absent[0]} is not there: the model has {len(layers)} layers, counted from 0"
            )
        return sorted({layers[layer] for layer in self.skipped})

    def settings(self, sites: Sequence[Site]) -> dict[Row, Setting]:
        """Return {row: setting} for all widths, or for one width taken apart behind the unquantized model."""
        rows: dict[Row, Setting] = {}
        skipped = self.skipped_layers(sites)
        for width in self.widths:
            made = {part: self.quantizer(part, width.of(part)) for part in self.axes if width.of(part) < UNQUANTIZED}
            setting = {s: made[s.part] for s in sites if s.part in made and s.layer not in skipped}
            quantized = " and ".join(dict.fromkeys(site.part for site in setting)) or "nothing"
            layers = f" except {'layers' if len(skipped) > 1 else 'layer'} {', '.join(map(str, skipped))}"
            rows[Row(width.label, quantized + layers * bool(skipped and setting))] = setting
        return attributed(rows) if self.attribution else rows


def attributed(rows: Mapping[Row, Setting]) -> dict[Row, Setting]:
    """Return rows, the last of which is taken apart: keys and values in all layers, both, each layer alone."""
    *unquantized, (row, whole) = rows.items()
    made = dict(unquantized)
    for part in dict.fromkeys(site.part for site in whole):
        made[Row(row.abits, part)] = {site: quantizer for site, quantizer in whole.items() if site.part == part}
    made[row] = whole
    for layer in dict.fromkeys(site.layer for site in whole):
        made[Row(row.abits, f"layer {layer}", layer)] = {s: q for s, q in whole.items() if s.layer == layer}
    return made
