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


AFFINE, LLOYD_MAX = "simquant.formats.affine:AffineQuantizer", "simquant.formats.lloyd_max:LloydMaxQuantizer"
HQQ, SCALED = "simquant.formats.hqq:HqqQuantizer", "simquant.formats.scaled:ScaledQuantizer"


def rotated(method: Method) -> Method:
    """Return a method of llama.cpp with the rotation that it puts before quantized types where 64 divides D."""
    keys, values = (method.format(part) for part in ("keys", "values"))
    return replace(
        method,
        about=f"{method.about}, after a Hadamard rotation of a head",
        options={**keys.options, "transform": "hadamard", "span": 1024},
        values=values._replace(options={**values.options, "transform": "hadamard", "span": 64}),
    )


def ggml(bits: int) -> Method:
    """Return q4_1 or q5_1."""
    return Method(
        about=f"{bits}-bit integers with scale and minimum in fp16 per 32 channels of a token",
        source="llama.cpp, ggml/src/ggml-quants.c",
        quantizer=AFFINE,
        options={"bits": bits, "axis": "token", "group": 32, "rule": "ggml"},
        family="llama.cpp",
    )


def turbomind(bits: int) -> Method:
    """Return what LMDeploy calls quant_policy 8 or 4."""
    return Method(
        about=f"{bits}-bit integers with scale and minimum per token and head",
        source=f"LMDeploy's TurboMind, quant_policy {bits}",
        quantizer=AFFINE,
        options={"bits": bits, "axis": "token", "scale": "model"},
    )


def quanto(bits: int) -> Method:
    """Return the cache of transformers with the backend quanto, without its residual window."""
    return Method(
        about=f"{bits}-bit integers with scale and minimum per 64 entries of a head; no recent window",
        source="transformers' QuantizedCache with optimum-quanto, axis 0",
        quantizer=AFFINE,
        options={"bits": bits, "axis": "token", "group": 64, "wider": "tokens", "scale": "model"},
        family="transformers",
    )


def kivi(bits: int) -> Method:
    """Return KIVI: the latest tokens stay exact, keys until 128 of them are quantized together."""
    return Method(
        about=f"{bits}-bit integers; keys per 32 tokens of a channel, values per 32 channels; latest 128 exact",
        source="KIVI, arXiv:2402.02750",
        quantizer=AFFINE,
        options={"bits": bits, "axis": "channel", "group": 32, "window": "block", "recent": 128},
        values=Format(AFFINE, {"bits": bits, "axis": "token", "group": 32, "window": "before", "recent": 128}),
    )


def quarot(bits: int) -> Method:
    """Return the cache of QuaRot, whose values a rotation of the weights has already spread."""
    shared = {"bits": bits, "axis": "token", "rule": "integer zero", "clip": 0.95}
    return Method(
        about=f"{bits}-bit integers per token and head, zero point and clipped range; keys after a Hadamard rotation",
        source="QuaRot, arXiv:2404.00456",
        quantizer=AFFINE,
        options={**shared, "transform": "hadamard", "extends_to_zero": True},
        values=Format(AFFINE, {**shared, "group": 128, "wider": "head"}),
    )


def turboquant(keys: int, values: int) -> Method:
    """Return TurboQuant as vLLM deploys it: nc is its norm correction; keys of 8 bits are plain e4m3."""
    options = {"bits": keys, "transform": "hadamard"}
    e4m3 = {"bits": 8, "element": "e4m3", "scale": "fixed"}  # PLACEHOLDER for the caller: ScaledQuantizer's own words
    kind = "keys in fp8 (e4m3)" if keys == 8 else f"rotated keys of {keys} bits on a Lloyd-Max grid"
    return Method(
        about=f"{kind}; values of {values} bits, scale and minimum per token and head",
        source="TurboQuant, arXiv:2504.19874, as vLLM deploys it",
        quantizer=SCALED if keys == 8 else LLOYD_MAX,
        options=e4m3 if keys == 8 else options,
        values=Format(AFFINE, {"bits": values, "axis": "token", "rule": "half up", "least": 1e-8}),
        family="vllm",
        skipped=(0, 1, -2, -1),
    )


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
    "int4_per_token_head": Method(
        about="4-bit integers per token and head after a signed Hadamard rotation, zero point inside the scale",
        source="vLLM, kv_cache_dtype int4_per_token_head",
        quantizer=AFFINE,
        options={
            "bits": 4,
            "axis": "token",
            "scale": "float32",
            "rule": "packed zero",
            "least": 1e-6,
            "transform": "signed hadamard",
        },
        family="vllm",
    ),
    "q4_1": ggml(4),
    "q5_1": ggml(5),
    "q4_1_rot": rotated(ggml(4)),
    "q5_1_rot": rotated(ggml(5)),
    "turbomind8": turbomind(8),
    "turbomind4": turbomind(4),
    "quanto4": quanto(4),
    "quanto2": quanto(2),
    "hqq4": Method(
        about="4-bit integers per 64 entries of a head, the zero point optimized; no recent window",
        source="transformers' QuantizedCache with hqq, axis 1",
        quantizer=HQQ,
        options={"bits": 4, "axis": "token", "group": 64, "wider": "tokens", "scale": "model"},
        family="transformers",
    ),
    "kivi4": kivi(4),
    "kivi2": kivi(2),
    "quarot4": quarot(4),
    "quarot3": quarot(3),
    "turboquant4_nc": turboquant(4, 4),
    "turboquant3_nc": turboquant(3, 3),
    "turboquant_k8v4": turboquant(8, 4),
    "turboquant_k3v4_nc": turboquant(3, 4),
}
