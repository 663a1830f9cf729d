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
    shares_bits  whether --abits is an average, which may be any number up to 8
    """

    about: str
    source: str
    quantizer: str = "quant_utils:ScalarQuantizer"
    options: Mapping[str, Any] = field(default_factory=dict)
    values: Format | None = None
    family: str = ""
    skipped: tuple[int, ...] = ()
    calibrated: bool = False
    shares_bits: bool = False

    def format(self, part: str) -> Format:
        """Return what quantizes "keys" or "values"."""
        return self.values if self.values and part == "values" else Format(self.quantizer, self.options)


SCALED, IQ4_NL = "simquant.formats.scaled:ScaledQuantizer", "simquant.formats.iq4_nl:IQ4NLQuantizer"
AFFINE, HQQ = "simquant.formats.affine:AffineQuantizer", "simquant.formats.hqq:HqqQuantizer"
LLOYD_MAX = "simquant.formats.lloyd_max:LloydMaxQuantizer"
TRANSFORM = "simquant.formats.transform:TransformQuantizer"
HIGGS, COUPLED = "simquant.formats.higgs:HiggsQuantizer", "simquant.formats.coupled:CoupledQuantizer"
VLLM, TRITON = "vLLM, csrc/cache_kernels.cu", "vLLM, triton_reshape_and_cache_flash.py"
GGML, OCP = "llama.cpp, ggml/src/ggml-quants.c", "OCP Microscaling Formats 1.0"
FAMILIES = {VLLM: "vllm", TRITON: "vllm", GGML: "llama.cpp"}


def scaled(about: str, source: str, family: str = "", **options: Any) -> Method:
    """Return the row of a format of simquant/formats/scaled.py: an element times a scale."""
    is_calibrated = options["scale"] == "calibrated"
    return Method(about, source, SCALED, options, None, family or FAMILIES.get(source, ""), calibrated=is_calibrated)


def affine(about: str, source: str, family: str = "", **options: Any) -> Method:
    """Return the row of a format of simquant/formats/affine.py: integers with a scale, and a minimum or zero point."""
    return Method(about, source, AFFINE, {"axis": "token", **options}, None, family or FAMILIES.get(source, ""))


def rotated(method: Method) -> Method:
    """Return the row of a format of blocks as llama.cpp applies it: to keys and values that it rotates before."""
    keys, values = ({**method.options, "transform": "hadamard", "span": span} for span in (1024, 64))
    about = f"{method.about}, after a Hadamard rotation, as llama.cpp does by itself where 64 divides a head"
    return replace(method, about=about, options=keys, values=Format(method.quantizer, values))


def kivi(bits: int) -> Method:
    """Return KIVI: the latest tokens stay exact, keys until a block of them is quantized together."""
    about = f"{bits}-bit integers; keys per 32 tokens of a channel, values per 32 channels; latest 128 exact"
    shared = {"bits": bits, "group": 32, "recent": 128}
    keys, values = (
        {**shared, "axis": axis, "window": rule} for axis, rule in (("channel", "block"), ("token", "before"))
    )
    return Method(about, "KIVI, arXiv:2402.02750", AFFINE, keys, Format(AFFINE, values))


def quarot(bits: int) -> Method:
    """Return the cache of QuaRot, whose values a rotation of the weights has already spread."""
    about = f"{bits}-bit integers per token and head, zero point and clipped range; keys after a Hadamard rotation"
    shared = {"bits": bits, "axis": "token", "rule": "integer zero", "clip": 0.95}
    keys = {**shared, "transform": "hadamard", "extends_to_zero": True}
    return Method(
        about, "QuaRot, arXiv:2404.00456", AFFINE, keys, Format(AFFINE, {**shared, "group": 128, "wider": "head"})
    )


def turboquant(keys: int, bits: int) -> Method:
    """Return TurboQuant as vLLM deploys it: nc is its norm correction; keys of 8 bits are plain e4m3."""
    kind = "keys in fp8 (e4m3)" if keys == 8 else f"rotated keys of {keys} bits on a Lloyd-Max grid"
    options = {"element": "e4m3", "scale": "fixed"} if keys == 8 else {"transform": "hadamard"}
    values = Format(AFFINE, {"bits": bits, "axis": "token", "rule": "half up", "least": 1e-8})
    return Method(
        f"{kind}; values of {bits} bits, scale and minimum per token and head; two layers at each end exact",
        "TurboQuant, arXiv:2504.19874, as vLLM deploys it",
        SCALED if keys == 8 else LLOYD_MAX, {"bits": keys, **options}, values, "vllm", skipped=(0, 1, -2, -1),
    )  # fmt: skip


TURBOMIND, QUANTO = "LMDeploy, TurboMind", "transformers' QuantizedCache with optimum-quanto, axis 0"
HALF = {"group": 64, "wider": "tokens", "scale": "model"}  # of quanto and HQQ
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
    "klt": Method(
        about="transform coding: channels decorrelated, bits where the loss feels them; --predict from the layer below",
        source="docs/methods.md, after KVTC and AQUA-KV",
        quantizer=TRANSFORM,
        calibrated=True,
        shares_bits=True,
    ),
    "kvtc": Method(
        about="transform coding by plain PCA of keys and values; first 4 and latest 128 tokens exact",
        source="KVTC, arXiv:2511.01815, without its entropy coder",
        quantizer=TRANSFORM,
        options={"metric": "pca", "sinks": 4, "recent": 128},
        calibrated=True,
        shares_bits=True,
    ),
    "aqua": Method(
        about="2-bit HIGGS of what the layer below does not predict; first layer 4-bit, first 4 and latest 128 exact",
        source="AQUA-KV, arXiv:2501.19392",
        quantizer=HIGGS,
        options={"bits": 2, "first_bits": 4, "predict": "aqua", "sinks": 4, "recent": 128, "window": "block"},
        calibrated=True,
    ),
    "higgs2": Method(
        about="pairs of channels at 16 points of the plane after a Hadamard rotation of all heads, a norm a token",
        source="HIGGS, arXiv:2411.17525, as AQUA-KV quantizes caches with it",
        quantizer=HIGGS,
        options={"bits": 2},
    ),
    "cq1": Method(
        about="8 channels share an index of 8 bits into vectors fitted by k-means with Fisher information",
        source="CQ, arXiv:2405.03917",
        quantizer=COUPLED,
        options={"bits": 1, "coupled": 8},
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
    "int4_per_token_head": affine(
        "4-bit integers per token and head after a signed Hadamard rotation, the zero point inside the scale",
        TRITON,
        bits=4,
        scale="float32",
        rule="packed zero",
        least=1e-6,
        transform="signed hadamard",
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
    "q5_1": affine("5-bit integers with a minimum in blocks of 32", GGML, bits=5, group=32, rule="ggml"),
    "q5_0": scaled("5-bit integers in blocks of 32", GGML, bits=5, element="int5", group=32, scale="signed fp16"),
    "q4_1": affine("4-bit integers with a minimum in blocks of 32", GGML, bits=4, group=32, rule="ggml"),
    "q4_0": scaled("4-bit integers in blocks of 32", GGML, bits=4, element="int4", group=32, scale="signed fp16"),
    "iq4_nl": Method("4-bit uneven levels in blocks of 32", GGML, IQ4_NL, {"bits": 4}, family="llama.cpp"),
    "turbomind8": affine("8-bit integers with scale and minimum per token and head", TURBOMIND, bits=8, scale="model"),
    "turbomind4": affine("4-bit integers with scale and minimum per token and head", TURBOMIND, bits=4, scale="model"),
    "quanto4": affine(
        "4-bit integers with a minimum per 64 entries; no window", QUANTO, "transformers", bits=4, **HALF
    ),
    "quanto2": affine(
        "2-bit integers with a minimum per 64 entries; no window", QUANTO, "transformers", bits=2, **HALF
    ),
    "hqq4": Method(
        about="4-bit integers per 64 entries of a head, the zero point optimized; no window",
        source="transformers' QuantizedCache with HQQ, axis 1",
        quantizer=HQQ,
        options={"bits": 4, "axis": "token", **HALF},
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
METHODS |= {f"{n}_rot": rotated(METHODS[n]) for n in ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")}
