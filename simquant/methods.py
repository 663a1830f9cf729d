"""The named methods, one row each. Nothing here imports torch by itself."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from quant_utils import Quantizer


class Format(NamedTuple):
    """What keys, or values, are quantized by.

    quantizer  module:class of its Quantizer
    options    fields of that class which the method fixes; one that fixes "bits" has no choice of widths
    """

    quantizer: str
    options: Mapping[str, Any]

    def cls(self) -> type[Quantizer]:
        """Return the class, imported now."""
        module, _, name = self.quantizer.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Method:
    """A way to quantize a cache.

    about        what it is, in a few words
    source       the paper or project that it comes from
    quantizer    module:class of its Quantizer
    options      fields of that class which the method fixes
    values       what values are quantized by, where that differs from keys
    family       what --kv_format calls it together with others: vllm, llama.cpp, transformers
    skipped      layers that it leaves unquantized, the last one being -1
    calibrated   whether it needs the calibrated script
    """

    about: str
    source: str
    quantizer: str = "quant_utils:ScalarQuantizer"
    options: Mapping[str, Any] = field(default_factory=dict)
    values: Format | None = None
    family: str = ""
    skipped: tuple[int, ...] = ()
    calibrated: bool = False

    def format(self, part: str) -> Format:
        """Return what quantizes "keys" or "values"."""
        return self.values if self.values and part == "values" else Format(self.quantizer, self.options)


METHODS = {
    "uniform": Method(
        about="evenly spaced levels between the ends of the range, as integers",
        source="the baseline of KVQuant, arXiv:2401.18079",
        options={"levels": "uniform"},
    ),
    "nf": Method(
        about="NormalFloat: levels at quantiles of the normal distribution",
        source="QLoRA, arXiv:2305.14314",
        options={"levels": "nf"},
    ),
    "nuq": Method(
        about="NUQ: levels fitted by k-means, with --fisher weighted by Fisher information",
        source="KVQuant, arXiv:2401.18079, section 3.3",
        options={"levels": "nuq"},
        calibrated=True,
    ),
}
