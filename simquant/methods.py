"""The named methods, one row each. Nothing here imports torch by itself."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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


SCALED, IQ4_NL = "simquant.formats.scaled:ScaledQuantizer", "simquant.formats.iq4_nl:IQ4NLQuantizer"
VLLM, TRITON = "vLLM, csrc/cache_kernels.cu", "vLLM, triton_reshape_and_cache_flash.py"
GGML, OCP = "llama.cpp, ggml/src/ggml-quants.c", "OCP Microscaling Formats 1.0"
FAMILIES = {VLLM: "vllm", TRITON: "vllm", GGML: "llama.cpp"}


def scaled(about: str, source: str, family: str = "", **options: Any) -> Method:
    """Return the row of a format of simquant/formats/scaled.py."""
    is_calibrated = options["scale"] == "calibrated"
    return Method(about, source, SCALED, options, None, family or FAMILIES.get(source, ""), calibrated=is_calibrated)


def rotated(method: Method) -> Method:
    """Return the row of a format of blocks as llama.cpp applies it: to keys and values that it rotates before."""
    keys, values = ({**method.options, "transform": "hadamard", "span": span} for span in (1024, 64))
    about = f"{method.about}, after a Hadamard transform, as llama.cpp does by itself where 64 divides a head"
    return replace(method, about=about, options=keys, values=Format(method.quantizer, values))


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
    "fp8": scaled("8-bit floats (e4m3), not scaled", VLLM, bits=8, element="e4m3", scale="fixed"),
    "fp8_e5m2": scaled("8-bit floats (e5m2), not scaled", VLLM, bits=8, element="e5m2", scale="fixed"),
    "fp8_calibrated": scaled(
        "8-bit floats, scaled per head", "vLLM, llm-compressor", "vllm", bits=8, element="e4m3", scale="calibrated"
    ),
    "fp8_per_token_head": scaled(
        "8-bit floats (e4m3), one scale a token and head", TRITON, bits=8, element="e4m3", group=0, scale="fp32"
    ),
    "int8_per_token_head": scaled(
        "8-bit integers, one scale a token and head", TRITON, bits=8, element="int8", group=0, scale="fp32 from 1e-6"
    ),
    "nvfp4": scaled(
        "4-bit floats, two levels of scales", "vLLM, ModelOpt", "vllm", bits=4, element="e2m1", group=16, scale="nvfp4"
    ),
    "nvfp4_scale1": scaled(
        "nvfp4 with a tensor scale of 1", "vLLM, ModelOpt", "vllm", bits=4, element="e2m1", group=16, scale="e4m3"
    ),
    "mxfp4": scaled("4-bit floats in blocks of 32", OCP, bits=4, element="e2m1", group=32, scale="floor e8m0"),
    "mxfp8": scaled("8-bit floats in blocks of 32", OCP, bits=8, element="e4m3", group=32, scale="floor e8m0"),
    "q8_0": scaled("8-bit integers in blocks of 32", GGML, bits=8, element="int8", group=32, scale="fp16"),
    "q5_0": scaled("5-bit integers in blocks of 32", GGML, bits=5, element="int5", group=32, scale="signed fp16"),
    "q4_0": scaled("4-bit integers in blocks of 32", GGML, bits=4, element="int4", group=32, scale="signed fp16"),
    "iq4_nl": Method("4-bit uneven levels in blocks of 32", GGML, IQ4_NL, {"bits": 4}, family="llama.cpp"),
}
METHODS |= {f"{name}_rot": rotated(METHODS[name]) for name in ("q8_0", "q5_0", "q4_0", "iq4_nl")}
