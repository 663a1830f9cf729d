"""Formats with a minimum or a zero point, HQQ and TurboQuant's keys, against their packages and against plain loops.

The loops go over single groups in numpy fp32, entry by entry, and follow the formats' own papers and sources.
"""

import gguf
import numpy as np
import pytest
import torch
from conftest import ASSETS
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from optimum.quanto import MaxOptimizer, qint2, qint4

from quant_utils import UserError
from simquant.formats.affine import AffineQuantizer
from simquant.formats.heads import signs
from simquant.formats.lloyd_max import LloydMaxQuantizer, normal_centroids
from simquant.methods import METHODS

f32 = np.float32
GOLDEN = {name: torch.from_numpy(held) for name, held in np.load(ASSETS / "formats.npz").items()}
BITS = {  # an entry of keys and of values takes at D = 128, by hand: codes, then 16 or 32 bits for a number a group
    "int4_per_token_head": (4 + 32 / 128, 4 + 32 / 128),
    "q4_1": (4 + 32 / 32, 4 + 32 / 32),
    "q5_1": (6, 6),
    "q4_1_rot": (5, 5),
    "q5_1_rot": (6, 6),
    "turbomind8": (8.25, 8.25),
    "turbomind4": (4.25, 4.25),
    "quanto4": (4.5, 4.5),
    "quanto2": (2.5, 2.5),
    "hqq4": (4.5, 4.5),
    "kivi4": (5, 5),
    "kivi2": (3, 3),
    "quarot4": (4 + (16 + 4) / 128, 4.25),  # z of keys is one of 16 numbers, that of values any
    "quarot3": (3 + (16 + 3) / 128, 3.25),
    "turboquant4_nc": (4.125, 4.25),
    "turboquant3_nc": (3.125, 3.25),
    "turboquant_k8v4": (None, 4.25),  # keys are plain e4m3
    "turboquant_k3v4_nc": (3.125, 4.25),
}
ROWS = [(name, part) for name, pair in BITS.items() for part, n in zip(("keys", "values"), pair, strict=True) if n]


def made(name, part, head, **options):
    """Return the quantizer of a row of METHODS for heads of so many channels."""
    format = METHODS[name].format(part)
    known = format.cls().__dataclass_fields__
    return format.cls()(head=head, **{k: v for k, v in {**format.options, **options}.items() if k in known})


def decoded(quantizer, x):
    """Return x [B,H,T,D] as it is decoded, from the layout that a cache has."""
    flat = quantizer.quantize(x.transpose(1, 2).flatten(2)).values
    return flat.unflatten(-1, x.shape[1::2]).transpose(1, 2)


def activations(*shape, dtype=torch.float32):
    """Return [B,H,T,D] of channels that differ in place and spread, with some entries far outside."""
    x = torch.randn(shape) * torch.linspace(0.2, 3, shape[-1]) + torch.linspace(-1, 1, shape[-1])
    return torch.where(torch.rand(shape) < 0.02, 6 * x, x).to(dtype)


# -- Against packages

HOSTILE = st.one_of(
    arrays(f32, (4, 64), elements=st.floats(-3e4, 3e4, width=32)),
    arrays(f32, (4, 64), elements=st.sampled_from([0, 0.5, 1, 1.5, 2.5, -7.5, 15, 31]).map(f32)),  # ties
    arrays(f32, (4, 64), elements=st.floats(-(2.0**-120), 2.0**-120, width=32)),  # subnormal steps
    st.builds(lambda x: np.full((4, 64), x, f32), st.floats(-3e4, 3e4, width=32)),  # constant
    st.builds(lambda i, x: np.eye(1, 256, i, dtype=f32).reshape(4, 64) * f32(x), st.integers(0, 255), st.just(3e4)),
)


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        *((name, made(name, "keys", 64)) for name in ("q4_1", "q5_1")),
        *((f"quanto{bits}_axis0_g64", made(f"quanto{bits}", "keys", 64)) for bits in (4, 2)),
        *(
            (f"quanto{bits}_axis-1_g{size}", made(f"quanto{bits}", "keys", 64, axis="channel", group=size))
            for bits in (4, 2)
            for size in (64, 32)
        ),
        ("hqq4_axis1", made("hqq4", "keys", 64, optimized=False)),
        ("hqq4_axis1_optimized", made("hqq4", "keys", 64)),
    ],
)
def test_real_activations_are_decoded_as_the_packages_do(part, name, quantizer):
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if name.startswith("hqq") else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(decoded(quantizer, GOLDEN[part]), GOLDEN[f"{part}_{name}"], **tolerance)


@given(HOSTILE)
def test_ggml_blocks_are_those_of_gguf(x):
    for name, bits in (("q4_1", 4), ("q5_1", 5)):
        kind = gguf.GGMLQuantizationType[name.upper()]
        for each in (x, ties(bits, 1, 1, 8, 64).numpy()[0, 0]):
            with np.errstate(all="ignore"):
                theirs = gguf.dequantize(gguf.quantize(each, kind), kind)
            ours = decoded(made(name, "values", 64), torch.from_numpy(each)[None, None])
            assert np.array_equal(ours.numpy()[0, 0], theirs), name


@given(HOSTILE, st.sampled_from([16, 32, 64]))
def test_quanto_groups_are_those_of_the_package(x, head):
    """64 entries of a head are one token, or two, or four."""
    x = torch.from_numpy(x).reshape(1, 1, -1, head)
    for name, qtype in (("quanto4", qint4), ("quanto2", qint2)):
        scale, shift = MaxOptimizer()(x, qtype, axis=0, group_size=64)
        q = torch.ops.quanto.quantize_affine(x, qtype.bits, 0, 64, scale, shift)  # its tensors compile an extension
        assert torch.equal(decoded(made(name, "keys", head), x), (scale * q - shift).reshape(x.shape)), name


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("head", [64, 128])
def test_lloyd_max_levels_are_near_those_of_the_project(bits, head):
    """It integrates the density numerically, which moves its outer levels by .0017 of a standard deviation."""
    levels = LloydMaxQuantizer(head, bits).levels
    torch.testing.assert_close(levels, GOLDEN[f"lloyd_max_d{head}_b{bits}"], rtol=0, atol=2e-3 / head**0.5)


@pytest.mark.parametrize(
    ("bits", "positive"),
    [
        (1, [0.7979]),
        (2, [0.4528, 1.510]),
        (3, [0.2451, 0.7560, 1.344, 2.152]),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]),
    ],
)
def test_lloyd_max_levels_are_the_published_ones(bits, positive):
    """J. Max, Quantizing for minimum distortion, 1960, table I."""
    levels = normal_centroids(bits)
    np.testing.assert_allclose(levels[2 ** (bits - 1) :], positive, rtol=5e-4)
    assert torch.allclose(levels, -levels.flip(0))


# -- Against loops over single groups


def as_stored(dtype):
    """Return what rounds a numpy fp32 number to dtype and back."""
    return lambda x: torch.tensor(x).to(dtype).float().numpy()[()]


def clamped(q, bits):
    return f32(min(max(q, 0), 2**bits - 1))


def round_away(x):
    return int(np.sign(x) * np.floor(np.abs(np.float64(x)) + 0.5))


def min_max(group, bits, kept):
    """TurboMind and KIVI: s and min are rounded, then used."""
    low, s = kept(min(group)), kept((max(group) - min(group)) / f32(2**bits - 1))
    return [clamped(round((x - low) / s), bits) * s + low if s else low for x in group]


def turboquant_values(group, bits, kept):
    low, s = min(group), max((max(group) - min(group)) / f32(2**bits - 1), f32(1e-8))
    return [clamped(np.floor((x - low) / s + f32(0.5)), bits) * kept(s) + kept(low) for x in group]


def quarot(group, bits, kept, extends):
    low, high = min([*group, f32(0)] if extends else group), max([*group, f32(0)] if extends else group)
    low, high = low * f32(0.95), high * f32(0.95)
    s = kept((high - low) / f32(2**bits - 1))
    z = round(-low / s) if s else 0
    return [low] * len(group) if not s else [(clamped(round(x / s) + z, bits) - f32(z)) * s for x in group]


def packed(group, bits, kept):
    s = max((max(group) - min(group)) / f32(15), f32(1e-6))
    z = int(clamped(round_away(-min(group) / s), 4))
    s = np.array((int(s.view(np.int32)) // 16) * 16 + z, np.int32).view(f32)[()]
    return [(clamped(round_away(x / s + f32(z)), 4) - f32(z)) * s for x in group]


def by_token(x, size, decode):
    """Return x [B,H,T,D] with every size neighbouring channels of a token decoded by themselves."""
    out = np.empty_like(x)
    for b, h, t in np.ndindex(x.shape[:3]):
        for first in range(0, x.shape[3], size):
            out[b, h, t, first : first + size] = decode([*x[b, h, t, first : first + size]])
    return out


def by_channel(x, size, decode):
    """Return x [B,H,T,D] with every size consecutive tokens of a channel decoded by themselves."""
    return by_token(x.swapaxes(2, 3), size, decode).swapaxes(2, 3)


def hadamard(size):
    """Return the Sylvester matrix: the sign of entry i, j is the parity of the ones that i and j share."""
    return np.array([[1 - 2 * (bin(i & j).count("1") % 2) for j in range(size)] for i in range(size)], f32)


def turboquant_keys(group, bits, kept):
    """A norm, and a level for every entry of the direction."""
    levels, norm = LloydMaxQuantizer(len(group), bits).levels.numpy(), np.linalg.norm(group)
    found = np.array([levels[np.argmin(np.abs(levels - x / (norm + 1e-8)))] for x in group])
    return kept(f32(norm)) * found / np.linalg.norm(found)


half = as_stored(torch.float16)
LOOPS = {  # [x, bits] -> decoded, for what stands between the transform and its inverse
    ("int4_per_token_head", "keys"): lambda x, bits: by_token(x, 64, lambda g: packed(g, bits, None)),
    ("kivi4", "keys"): lambda x, bits: by_channel(x, 32, lambda g: min_max(g, bits, half)),
    ("kivi4", "values"): lambda x, bits: by_token(x, 32, lambda g: min_max(g, bits, half)),
    ("quarot4", "keys"): lambda x, bits: by_token(x, 64, lambda g: quarot(g, bits, half, True)),
    ("quarot4", "values"): lambda x, bits: by_token(x, 64, lambda g: quarot(g, bits, half, False)),
    ("turboquant4_nc", "values"): lambda x, bits: by_token(x, 64, lambda g: turboquant_values(g, bits, half)),
    ("turboquant4_nc", "keys"): lambda x, bits: by_token(x, 64, lambda g: turboquant_keys(g, bits, half)),
}
LOOPS |= {
    (other, part): LOOPS[name, part]
    for name, part in [*LOOPS]
    for other in {"kivi4": ["kivi2"], "quarot4": ["quarot3"], "turboquant4_nc": ["turboquant3_nc"]}.get(name, [])
}


def ties(bits, *shape, clip=1.0):
    """Return [B,H,T,D] multiples of half a step, the step being 1, in groups of 32 along tokens or channels."""
    x = torch.randint(2 ** (bits + 1) - 1, shape) / 2
    x[:, :, ::8, ::8] = x[:, :, 1::8, 1::8] = 0
    x[:, :, ::8, 1::8] = x[:, :, 1::8, ::8] = (2**bits - 1) / clip
    x[:, :, 2:8, 2] = x[:, :, 2, 2:8] = 0
    x[:, :, 2:8, 3] = x[:, :, 3, 2:8] = (2**bits - 1) / clip
    return x - 5


KINDS = {  # [B,H,T,D] for a quantizer, by what is special about it
    "spread": lambda quantizer: activations(2, 1, 40, 64),
    "ties": lambda quantizer: ties(quantizer.bits, 2, 1, 40, 64, clip=getattr(quantizer, "clip", 1)),
    "narrow": lambda quantizer: 1 + torch.randint(2, (2, 1, 40, 64)) * 2.0**-23,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "part"), LOOPS)
def test_what_stands_behind_the_transform_is_a_loop_over_groups(name, part, kind):
    """40 tokens leave the last group of a channel partly filled."""
    quantizer = made(name, part, 64, transform=None)
    x = KINDS[kind](quantizer)
    theirs = torch.from_numpy(LOOPS[name, part](x.numpy(), quantizer.bits))
    is_summed = name.startswith("turboquant") and part == "keys"  # squares, in some order
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if is_summed else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(decoded(quantizer, x), theirs, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["turbomind8", "turbomind4", "quanto4"])
def test_scales_in_the_dtype_of_the_model(name, dtype):
    x, quantizer = activations(2, 2, 8, 64, dtype=dtype), made(name, "keys", 64)
    loop = by_token(x.float().numpy(), 64, lambda g: min_max(g, quantizer.bits, as_stored(dtype)))
    assert torch.equal(decoded(quantizer, x), torch.from_numpy(loop).to(dtype))


@pytest.mark.parametrize("name", ["int4_per_token_head", "quarot4", "turboquant3_nc"])
def test_keys_are_rotated_before_and_back_after(name):
    x, quantizer = activations(1, 2, 16, 64), made(name, "keys", 64)
    matrix = hadamard(64) * signs(64).numpy() if quantizer.transform.startswith("signed") else hadamard(64) / f32(8)
    loop = LOOPS[name, "keys"](x.numpy() @ matrix.T, quantizer.bits) @ np.linalg.inv(matrix).T.astype(f32)
    torch.testing.assert_close(decoded(quantizer, x), torch.from_numpy(loop), rtol=1e-4, atol=1e-5)


def hqq_loop(x):
    """Return one sequence [N,64] decoded, and in how many steps its error fell: with a break, as the package loops.

    In torch, because an error that stays the same up to rounding ends the loop or does not.
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    rate = (15 / (high - low)).clamp(max=2e4)
    zero, best, steps = -low * rate, torch.inf, 0
    for _ in range(20):
        q = (x * rate + zero).round().clamp(0, 15)
        error = x - (q - zero) / rate
        size = error.abs()
        zero = (q - (x - error.sign() * (size - 0.1 * size**-0.3).clamp(min=0)) * rate).mean(1, keepdim=True)
        mean = size.mean(1).double().mean().item()
        if mean >= best:
            break
        best, steps = mean, steps + 1
    return ((x * rate + zero).round().clamp(0, 15) - zero) / rate, steps


def test_hqq_stops_for_every_sequence_of_a_batch_by_itself():
    """Of these short sequences about half stop early, and most of those would change after that."""
    x = activations(96, 1, 4, 32)
    loops = [hqq_loop(row.reshape(-1, 64)) for row in x]
    theirs = torch.stack([each for each, _ in loops]).reshape(x.shape)
    torch.testing.assert_close(decoded(made("hqq4", "values", 32), x), theirs, rtol=1e-5, atol=1e-5)
    assert len({steps for _, steps in loops}) > 3


# -- What holds for all of them


def test_bits_an_entry_are_those_that_one_counts_by_hand():
    assert {(name, part): made(name, part, 128).entry_bits for name, part in ROWS} == {
        (name, part): BITS[name][part == "values"] for name, part in ROWS
    }


def test_sequences_of_a_batch_are_apart_and_one_graph_serves_them():
    x, quantizers = activations(3, 2, 37, 32).transpose(1, 2).flatten(2), [made(*row, 32, sinks=2) for row in ROWS]
    traced = torch.compile(lambda x: [each.quantize(x).values for each in quantizers], fullgraph=True, backend="eager")
    for row, quantizer, ours in zip(ROWS, quantizers, traced(x), strict=True):
        assert torch.equal(ours, torch.cat([quantizer.quantize(each[None]).values for each in x])), row
        assert torch.equal(ours[:, :2], x[:, :2])


@pytest.mark.parametrize(("name", "part"), ROWS)
def test_what_is_the_same_everywhere_is_decoded_as_something_finite(name, part):
    quantizer = made(name, part, 64)
    is_plain = type(quantizer) is AffineQuantizer and quantizer.transform is None and quantizer.clip == 1
    for value in (0, 1, -5, 1e4, 1e-30, 1e6):
        x = torch.full((1, 1, 3, 64), float(value))
        given_back = decoded(quantizer, x)
        assert given_back.isfinite().all()
        assert not is_plain or value not in (0, 1, -5) or torch.equal(given_back, x)


def test_the_last_group_is_filled_with_the_last_token():
    x = activations(1, 2, 7, 32)
    filled = torch.cat([x, x[:, :, -1:]], 2)
    for name in ("quanto4", "hqq4"):
        quantizer = made(name, "keys", 32)
        assert torch.equal(decoded(quantizer, x), decoded(quantizer, filled)[:, :, :7])


def test_a_group_is_at_most_a_head_where_a_format_says_so():
    x = activations(1, 1, 4, 256)
    halves = x.unflatten(-1, (2, 128)).movedim(3, 1)[:, :, 0]
    ours = decoded(made("quarot4", "values", 256), x).unflatten(-1, (2, 128)).movedim(3, 1)[:, :, 0]
    assert torch.equal(ours, decoded(made("quarot4", "values", 128), halves))
    assert made("quarot4", "values", 32).size == 32


@pytest.mark.parametrize(
    "options",
    [
        {"group": 24}, {"group": 64}, {"group": 48, "wider": "tokens"}, {"group": -1}, {"group": True},
        {"group": 2**20}, {"axis": "head"}, {"axis": "channel"}, {"scale": "int8"}, {"wider": "yes"}, {"rule": "odd"},
        {"clip": 0}, {"clip": float("nan")}, {"least": -1.0}, {"extends_to_zero": 1}, {"rule": "packed zero"},
        {"rule": "packed zero", "scale": "float32", "bits": 9},
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_line(options):
    with pytest.raises(UserError) as refused:
        AffineQuantizer(32, **options)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 160
    with pytest.raises(UserError):
        LloydMaxQuantizer(32, 9)


@pytest.mark.parametrize(("name", "part"), ROWS)
def test_a_line_says_what_shares_a_scale_and_what_stays_exact(name, part):
    words = str(made(name, part, 128, sinks=4))
    assert "first 4 tokens exact" in words and ("latest 128 tokens exact" in words) == name.startswith("kivi")
    assert ("hadamard" in words) == (made(name, part, 128).transform is not None) and "\n" not in words
