"""Elements times a scale, bit for bit: against gguf, ml_dtypes, torchao, goldens of all three, and loops."""

import math
from dataclasses import replace

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import ASSETS
from gguf import GGMLQuantizationType as Types
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor

from quant_utils import UserError
from simquant.formats import scaled
from simquant.formats.heads import TRANSFORMS, hadamard, transformed
from simquant.methods import METHODS

GOLDEN = np.load(ASSETS / "formats.npz")
HEAD = 64
FLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m1": ml_dtypes.float4_e2m1fn}
MOST = {"e4m3": 448, "e5m2": 57344, "e2m1": 6}


def made(name, part="keys", head=HEAD, **options):
    """Return the quantizer of a row of METHODS, or one that differs from it in some options."""
    format = METHODS[name].format(part)
    return format.cls()(**{"head": head, **format.options, **options})


def coded(quantizer, x):
    """Return x [N,D] as an array, coded as N tokens of one head."""
    return quantizer.coded(torch.from_numpy(x)[None, None])[0, 0].numpy()


def assert_same(ours, theirs):
    """Assert that two arrays are equal, nan where the other is nan."""
    np.testing.assert_array_equal(ours, theirs)


def ties():
    """Return [N,64]: halves of a scale that is no power of two, as ggml, int8 and floats see it."""
    steps = np.arange(-32, 32, dtype=np.float32)[None] / 2
    return steps * np.linspace(0.001, 3, 301, dtype=np.float32)[:, None]


def hostile():
    """Return [N,64] fp32: what goes wrong where arithmetic is careless."""
    normal = np.random.default_rng(0).standard_normal((8, HEAD)).astype(np.float32)
    huge, both = normal.copy(), normal.copy()
    huge[:, 5], both[:, 9], both[::2, 40], both[1::2, 3] = 3e5, 7, -7, -7  # the greatest entry with either sign
    tiny = np.float32(2.0) ** np.arange(-149, -85, dtype=np.float32)  # subnormal to 1e-26
    constant = np.full((4, HEAD), [[0.3], [-1], [-0.0], [65504]], np.float32)
    spread = normal * np.float32(10.0) ** np.arange(-40, 0, 5, dtype=np.float32)[:, None]
    return np.concatenate(
        [np.zeros_like(normal), normal, huge, both, tiny[None], -tiny[None], constant, spread, ties()]
    )


@st.composite
def rows(draw):
    """[N,64] fp32 of any size, many alike."""
    shape = (draw(st.integers(1, 4)), HEAD)
    numbers = draw(st.sampled_from([st.floats(-1e4, 1e4, width=32), st.integers(-9, 9), st.floats(-1, 1, width=16)]))
    x = draw(hnp.arrays(np.float32, shape, elements=numbers))
    return x * np.float32(2.0) ** draw(st.sampled_from([0, 0, 0, 3, -3, -20, -100, 60]))


# -- The goldens

GOLDENS = {
    "q8_0": made("q8_0"), "q5_0": made("q5_0"), "q4_0": made("q4_0"), "iq4_nl": made("iq4_nl"),
    "e4m3": made("fp8"), "e5m2": made("fp8_e5m2"), "e4m3_tensor": made("fp8", scale="fp32"),
    "nvfp4": made("nvfp4"), "nvfp4_scale1": made("nvfp4_scale1"),
    "mxfp4_floor": made("mxfp4"), "mxfp4_rceil": made("mxfp4", scale="ceil e8m0"),
    "mxfp8_floor": made("mxfp8"), "mxfp8_rceil": made("mxfp8", scale="ceil e8m0"),
}  # fmt: skip


@pytest.mark.parametrize("name", GOLDENS)
@pytest.mark.parametrize("part", ["k", "v"])
def test_activations_come_back_as_from_the_references(part, name):
    given_back = GOLDENS[name].coded(torch.from_numpy(GOLDEN[part]))
    assert torch.equal(given_back, torch.from_numpy(GOLDEN[f"{part}_{name}"]))


# -- llama.cpp


def by_gguf(x, type):
    """Return x as llama.cpp's own package codes it. What it makes of an infinite inverse is multiplied by 0."""
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(gguf.quants.quantize(x, type), type)


BLOCKS = {"q8_0": Types.Q8_0, "q5_0": Types.Q5_0, "q4_0": Types.Q4_0}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_integers_are_those_of_gguf(name):
    assert_same(coded(made(name), hostile()), by_gguf(hostile(), BLOCKS[name]))
    assert np.isfinite(coded(made(name), np.clip(hostile(), -65504, 65504))).all()


@given(rows(), st.sampled_from([*BLOCKS]))
def test_any_blocks_of_integers_are_those_of_gguf(x, name):
    assert_same(coded(made(name), x), by_gguf(x, BLOCKS[name]))


def iq4_nl_block(block):
    """Return one block of 32 as FORMATS describes iq4_nl, entry by entry."""
    levels = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
    first = max(block, key=abs) / np.float32(-127)  # max takes the first of several
    if abs(first) < 1e-30:
        return [0.0] * len(block)
    inverse, chosen = np.float32(1) / first, []
    for x in block:
        distances = [abs(float(x * inverse) - level) for level in levels]
        chosen.append(max(level for level, each in zip(levels, distances, strict=True) if each == min(distances)))
    exact = [(float(x), level) for x, level in zip(block, chosen, strict=True)]
    scale = np.float32(math.fsum(x * x * v * x for x, v in exact) / math.fsum(x * x * v * v for x, v in exact))
    return [np.float32(level) * np.float32(np.float16(scale)) for level in chosen]


@np.errstate(over="ignore", invalid="ignore")
def assert_iq4_nl(x):
    looped = [[y for half in (row[:32], row[32:]) for y in iq4_nl_block(half)] for row in x]
    assert_same(coded(made("iq4_nl"), x), np.array(looped, np.float32))


def test_uneven_levels_are_those_of_a_loop():
    halfway = np.array([-127, -115.5, -4.5, 7, 19, 101, 61, 1] * 8, np.float32)[None]  # a tie goes up
    assert_iq4_nl(np.concatenate([hostile()[:60], halfway, -halfway]))


@given(rows())
def test_any_uneven_levels_are_those_of_a_loop(x):
    assert_iq4_nl(x)


# -- Floats of 8 and 4 bits


def cast(x, name):
    """Return x as ml_dtypes casts it, saturated."""
    return x.clip(-MOST[name], MOST[name]).astype(FLOATS[name]).astype(np.float32)


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_that_of_a_cast_at_every_border_and_beside_it(name):
    """fp32 numbers of 16 bits have all borders between floats of 8 bits among them."""
    near = (np.arange(2**16, dtype=np.uint32) << 16)[:, None] + np.array([0, 1, 2**15, 2**16 - 1], np.uint32)
    x = near.view(np.float32)
    x = x[np.isfinite(x)]
    assert_same(scaled.ELEMENTS[name].round(torch.from_numpy(x)).numpy(), cast(x, name))


def test_ties_of_e2m1_go_to_the_even_code():
    border = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6, 7, math.inf])
    assert scaled.e2m1(border).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, 6]
    assert scaled.e2m1(-border).tolist() == [0, -1, -1, -2, -2, -4, -4, -6, -6, -6]


def by_token(x, most, least=0.0):
    """Return (x / scale, scale): tokens of x [N,D] with the greatest at most."""
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / np.float32(most), np.float32(least))
    return x / np.where(scale > 0, scale, 1), scale


def half_away(x):
    """Return x rounded as C rounds it."""
    return math.copysign(math.floor(abs(x) + 0.5), x)


@given(rows())
def test_scales_of_tokens_and_heads(x):
    for each in (x, hostile()[:60]):
        assert_same(coded(made("fp8"), each), cast(each, "e4m3"))
        assert_same(coded(made("fp8_e5m2"), each), cast(each, "e5m2"))
        unit, scale = by_token(each, 448)
        assert_same(coded(made("fp8_per_token_head"), each), cast(unit, "e4m3") * scale)
        unit, scale = by_token(each, 127, 1e-6)
        integers = np.vectorize(lambda y: min(127, max(-128, half_away(float(y)))))(unit).astype(np.float32)
        assert_same(coded(made("int8_per_token_head"), each), integers * scale)


# -- Blocks of floats


def by_torchao_nvfp4(x, levels):
    """Return x [N,64] as torchao codes it with one level of scales or two, x being a sequence."""
    x = torch.from_numpy(x)
    tensor_scale = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().amax()) if levels == 2 else None
    return nvfp4_tensor.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=tensor_scale).dequantize(torch.float32).numpy()


@np.errstate(all="ignore")
def by_casts_nvfp4(x, levels):
    """Return (x [N,64] as ml_dtypes' casts code it, its scales in units of the tensor's)."""
    blocks = x.reshape(-1, 16)
    unit = np.abs(x).max() / np.float32(6 * 448) if levels == 2 and x.any() else np.float32(1)
    scale = cast(np.abs(blocks).max(-1, keepdims=True) / np.float32(6) / unit, "e4m3")
    inverse = np.where(scale > 0, np.float32(1) / unit / scale, 0)
    return (cast(blocks * inverse, "e2m1") * (unit * scale)).reshape(x.shape), np.broadcast_to(scale, blocks.shape)


@given(rows(), st.sampled_from([1, 2]))
def test_nvfp4_is_that_of_torchao_where_no_scale_is_below_its_least(x, levels):
    quantizer = made("nvfp4" if levels == 2 else "nvfp4_scale1")
    for each in (np.where(np.abs(x).max() < 1e-30, 0, x), hostile(), hostile()[:24], ties()):
        ours, (casts, scale) = coded(quantizer, each), by_casts_nvfp4(each, levels)
        assert_same(ours, casts)
        if each.any():  # torchao gives nan else
            is_normal = scale.reshape(each.shape) > 2.0**-6  # it has no scale below, where e4m3 is subnormal
            assert_same(ours[is_normal], by_torchao_nvfp4(each, levels)[is_normal])


@given(st.floats(2.0**-20, 2.0**20, width=32))
def test_scales_of_nvfp4_at_the_borders_between_e4m3_floats_are_those_of_torchao(most):
    floats = np.arange(8, 127, dtype=np.uint8).view(FLOATS["e4m3"]).astype(np.float32)  # normal, to 448
    shares = (floats[1:] + floats[:-1]) / 2 / 448
    x = (
        np.concatenate([np.float32([most]), shares * np.float32(most), np.zeros(1, np.float32)])[:, None]
        * np.eye(16)[0]
    )
    x = x.astype(np.float32).reshape(-1, HEAD)
    assert_same(coded(made("nvfp4"), x), by_torchao_nvfp4(x, 2))


def test_a_tensor_scale_is_that_of_a_sequence():
    x = (
        torch.randn(3, 2, 5, HEAD, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 1e-3, 1e3])[:, None, None, None]
    )
    for quantizer in (made("nvfp4"), made("fp8", scale="fp32")):
        together = quantizer.coded(x)
        assert torch.equal(together, torch.cat([quantizer.coded(each[None]) for each in x]))
        flat = x.transpose(0, 1).reshape(1, 2, 15, HEAD)
        assert not torch.equal(together.transpose(0, 1).reshape(flat.shape), quantizer.coded(flat))


MODES = {"floor": mx_tensor.ScaleCalculationMode.FLOOR, "ceil": mx_tensor.ScaleCalculationMode.RCEIL}


def by_torchao_mx(x, name, mode):
    """Return x [N,64] as torchao codes blocks of 32 with a power of two."""
    dtype = torch.float4_e2m1fn_x2 if name == "mxfp4" else torch.float8_e4m3fn
    held = mx_tensor.MXTensor.to_mx(torch.from_numpy(x), dtype, 32, MODES[mode])
    return held.dequantize(torch.float32).numpy()


@given(rows(), st.sampled_from(["mxfp4", "mxfp8"]))
def test_powers_of_two_are_those_of_torchao(x, name):
    for each in (x, hostile(), ties()):
        assert_same(coded(made(name), each), by_torchao_mx(each, name, "floor"))
        np.testing.assert_allclose(  # where its logarithm rounds up, and of subnormal numbers, it is not exact
            coded(made(name, scale="ceil e8m0"), each), by_torchao_mx(each, name, "ceil"), rtol=0, atol=1e-35
        )


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_least_power_of_two_that_clips_nothing(most):
    for element, top in (("e2m1", 6), ("e4m3", 448)):
        _, scale = scaled.ceil_e8m0(torch.tensor([most, -most / 3]), top)
        mantissa, exponent = math.frexp(np.float32(most) / np.float32(top))
        assert scale.item() == 2.0 ** (exponent - (mantissa == 0.5)), element


# -- Calibration, clipping, bits, words


def test_a_calibrated_scale_is_the_greatest_of_each_head_behind_the_sinks():
    x = torch.randn(2, 9, 2 * HEAD, generator=torch.Generator().manual_seed(0))
    x[0, 5, 7], x[1, 3, HEAD + 2], x[:, 0] = -40, 600, 1e4
    plain = made("fp8_calibrated", sinks=1)
    fitted = plain.fit(x, None)
    assert fitted.amax.tolist() == [40, 600] and plain.amax is None and METHODS["fp8_calibrated"].calibrated
    other = x[:, 1:].unflatten(-1, (2, HEAD)).transpose(1, 2) * 1.5
    for head, most in enumerate(np.float32([40, 600])):
        scale, mine = most / np.float32(448), other[:, head].numpy()
        assert_same(fitted.coded(other)[:, head].numpy(), cast(mine / scale, "e4m3") * scale)
        assert_same(fitted.clipped(other)[:, head].numpy(), abs(mine) > most)
    assert torch.equal(plain.coded(other), made("fp8").coded(other))
    with pytest.raises(UserError, match="2 heads were calibrated, and here are 3"):
        fitted.coded(torch.zeros(1, 3, 1, HEAD))
    assert fitted.fit(torch.zeros_like(x), None).coded(other).abs().max() == 0


def test_what_is_clipped_lies_beyond_the_greatest_float():
    x = torch.tensor([448, 449, -449, 57344, -6e4, 0.0, 1e-9, 3.0]).repeat(8)[None, None, None]
    assert torch.equal(made("fp8").clipped(x), x.abs() > 448) and torch.equal(
        made("fp8_e5m2").clipped(x), x.abs() > 57344
    )
    numbers = torch.randn(1, 2, 500, HEAD, generator=torch.Generator().manual_seed(0)).exp()
    assert not made("fp8_per_token_head").clipped(numbers).any()  # though x / scale may be an ulp above 448


BITS = {
    "fp8": 8, "fp8_e5m2": 8, "fp8_calibrated": 8, "fp8_per_token_head": 8.25, "int8_per_token_head": 8.25,
    "nvfp4": 4.5, "nvfp4_scale1": 4.5, "mxfp4": 4.25, "mxfp8": 8.25,
    "q8_0": 8.5, "q5_0": 5.5, "q4_0": 4.5, "iq4_nl": 4.5,
    "q8_0_rot": 8.5, "q5_0_rot": 5.5, "q4_0_rot": 4.5, "iq4_nl_rot": 4.5,
}  # fmt: skip


@pytest.mark.parametrize("name", BITS)
def test_an_entry_takes_its_code_and_its_share_of_a_scale(name):
    quantizer = made(name, head=128)
    assert quantizer.entry_bits == BITS[name] and quantizer.cost(10, 256) == 2560 * BITS[name]
    assert quantizer.bits == METHODS[name].options["bits"] == int(BITS[name])


def test_a_line_of_plain_words():
    assert str(made("fp8")) == "e4m3 floats, not scaled"
    assert str(made("int8_per_token_head", sinks=2)) == "integers per token and head, fp32 scale, first 2 tokens exact"
    line = "iq4_nl in blocks of 32 channels, fitted fp16 scale, after a hadamard transform"
    assert str(made("iq4_nl_rot", sinks=1)) == f"{line}, first token exact"
    assert str(made("q4_0", recent=9)) == "integers in blocks of 32 channels, signed fp16 scale, latest 9 tokens exact"


@pytest.mark.parametrize(
    "options",
    [{"element": "e3m4"}, {"scale": "fp7"}, {"bits": 7}, {"group": -1}, {"group": 2.0}, {"group": 24}, {"group": 96},
     {"amax": torch.ones(2)}, {"scale": "calibrated", "amax": torch.tensor([-1.0])}, {"head": 0}],
    ids=str,
)  # fmt: skip
def test_nonsense_is_refused(options):
    with pytest.raises(UserError):
        made("q8_0", **options)


def test_blocks_that_divide_no_head_are_refused():
    for name in ("q4_0", "iq4_nl", "nvfp4", "mxfp4"):
        with pytest.raises(UserError, match=r"blocks of .* channels do not divide heads of 40"):
            made(name, head=40)
    with pytest.raises(UserError, match="iq4_nl takes 4 bits, not 5"):
        made("iq4_nl", bits=5)


# -- Rotation


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_hadamard_matrices_have_their_closed_form(size):
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    assert hadamard(size).tolist() == signs
    assert torch.equal(hadamard(size) @ hadamard(size).T, size * torch.eye(size))


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_is_undone(name):
    quantizer, x = made("q8_0", head=192, transform=name), torch.randn(2, 3, 4, 192)
    assert quantizer.forward.shape == (64, 64)  # the greatest power of two that divides the head
    torch.testing.assert_close(transformed(transformed(x, quantizer.forward), quantizer.inverse), x)


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q4_0", "iq4_nl"])
def test_rotated_rows_rotate_keys_by_heads_and_values_by_64(name):
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    for part, size in (("keys", 128), ("values", 64)):
        quantizer, matrix = made(f"{name}_rot", part, 128), hadamard(size) / size**0.5
        rotated = (x.unflatten(-1, (-1, size)) @ matrix).flatten(2)
        plain = replace(quantizer, transform=None).quantize(rotated).values
        looped = (plain.unflatten(-1, (-1, size)) @ matrix.T).flatten(2)
        torch.testing.assert_close(quantizer.quantize(x).values, looped)
        assert METHODS[f"{name}_rot"].about.startswith(METHODS[name].about)
