"""The codebooks and fake_quantize, against closed forms, a brute-force loop, properties and the published code."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ASSETS
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import quant_utils as qu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def quantized(x, spec):
    return qu.fake_quantize(x, qu.Quantizer(spec, qu.data_free_codebook(spec)))


@st.composite
def tensors(draw):
    """[B,T,C] of any shape and dtype, its numbers ordinary, repeated, tiny, huge or all alike."""
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 12)))
    numbers = draw(st.sampled_from([st.floats(-1e4, 1e4, width=16), st.integers(-3, 3), st.floats(-1, 1, width=16)]))
    values = draw(hnp.arrays(np.float32, shape, elements=numbers))
    offset = draw(st.sampled_from([0.0, 0.0, 100.0, -1000.0]))
    return (torch.from_numpy(values) + offset).to(draw(st.sampled_from(DTYPES)))


@st.composite
def specs(draw, **fixed):
    options = {
        "axis": st.sampled_from([qu.PER_CHANNEL, qu.PER_TOKEN]),
        "bits": st.integers(2, 8),
        "codebook": st.sampled_from(["uniform", "nf"]),
        "include_sparse": st.booleans(),
        "sparsity_threshold": st.floats(0.05, 1.0),
        "first_few_fp16": st.integers(-1, 4),
    }
    return qu.QuantSpec(**{name: fixed[name] if name in fixed else draw(option) for name, option in options.items()})


def kept(x, spec):
    """Bool [B,T,C] by SEMANTICS: sinks, and entries at or beyond numpy's linear quantiles of the other tokens."""
    keep = torch.zeros(x.shape, dtype=torch.bool)
    body = x[:, spec.sink_tokens :].double().numpy()
    if spec.include_sparse and body.size:
        tail = (1 - spec.sparsity_threshold) / 2
        lower, upper = np.quantile(body, [tail, 1 - tail], axis=spec.axis, keepdims=True)
        keep[:, spec.sink_tokens :] = torch.from_numpy((body <= lower) | (body >= upper))
    keep[:, : spec.sink_tokens] = True
    return keep


def rounding(x):
    """What storing a number of x's size in x's dtype may cost."""
    return torch.finfo(x.dtype).eps * x.abs().max().item() + 1e-6 * (x.max() - x.min()).item()


# -- codebooks


def test_uniform_levels_are_integers_stretched_to_minus_one_and_one():
    for bits in range(2, 9):
        expected = np.arange(2**bits) / (2**bits - 1) * 2 - 1
        np.testing.assert_allclose(qu.uniform_levels(bits).numpy(), expected, atol=1e-7)


def test_normal_float_levels_are_those_of_the_published_code():
    with np.load(ASSETS / "kvquant_dynamic.npz") as golden:
        for bits in (2, 3, 4):
            np.testing.assert_allclose(qu.normal_float_levels(bits), golden[f"nf_levels_{bits}"], atol=2e-7)


def test_normal_float_levels_are_sorted_end_at_one_and_have_a_zero():
    for bits in range(2, 9):
        levels = qu.normal_float_levels(bits)
        assert len(levels) == 2**bits
        assert (levels.diff() > 0).all()
        assert levels[0] == -1 and levels[-1] == 1 and (levels == 0).sum() == 1


@given(
    hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-2, 2, width=32)), st.integers(2, 8), st.booleans()
)
def test_nearest_level_is_nearest(unit, bits, nf):
    levels = qu.normal_float_levels(bits) if nf else qu.uniform_levels(bits)
    chosen = levels[qu.nearest_level(torch.from_numpy(unit), levels)].double().numpy()
    distances = np.abs(unit[:, None].astype(np.float64) - levels.double().numpy())
    np.testing.assert_allclose(np.abs(unit - chosen), distances.min(1), atol=1e-7)


# -- order statistics


@given(st.integers(1, 300), st.floats(1e-3, 1), st.booleans(), st.integers(0, 2**31))
def test_tail_quantiles_are_numpys(size, threshold, per_channel, seed):
    x = torch.randn(2, size, 3, generator=torch.Generator().manual_seed(seed))
    x = x if per_channel else x.transpose(1, 2)
    axis = qu.PER_CHANNEL if per_channel else qu.PER_TOKEN
    tail = (1 - threshold) / 2
    expected = np.quantile(x.double().numpy(), [tail, 1 - tail], axis=axis, keepdims=True)
    np.testing.assert_allclose(qu.tail_quantiles(x, threshold, axis)[0], expected[0], atol=1e-6)
    np.testing.assert_allclose(qu.tail_quantiles(x, threshold, axis)[1], expected[1], atol=1e-6)


def test_one_percent_of_1024_channels_is_12_entries_a_token():
    spec = qu.QuantSpec(qu.PER_TOKEN, include_sparse=True)
    keep, _, _ = qu.keep_and_range(torch.randn(2, 5, 1024), qu.Quantizer(spec, qu.data_free_codebook(spec)))
    assert (keep.sum(-1) == 12).all()


# -- fake_quantize


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("codebook", ["uniform", "nf"])
@pytest.mark.parametrize("tensor", ["k", "v"])
def test_published_code_gives_the_same(tensor, codebook, axis, sparse, bits):
    spec = qu.QuantSpec(getattr(qu, f"PER_{axis.upper()}"), bits, codebook, include_sparse=sparse)
    levels = qu.data_free_codebook(spec).levels
    with np.load(ASSETS / "kvquant_dynamic.npz") as golden:
        x = torch.from_numpy(golden[tensor])
        expected = golden[f"{tensor}_dynamic_{axis}_{codebook}_b{bits}_sparse{int(sparse)}"]
    ours = quantized(x[None], spec)[0].numpy()
    if codebook == "uniform":
        np.testing.assert_allclose(ours, expected, atol=1e-5)
        return
    reach = (x.amax(spec.axis, keepdim=True) - x.amin(spec.axis, keepdim=True)).numpy()
    assert (np.abs(ours - expected) <= 1e-3 * reach).all()
    # the published code decodes through fp16 levels; with those it agrees as closely as the uniform one does
    keep, lo, hi = qu.keep_and_range(x[None], qu.Quantizer(spec, qu.Codebook(levels)))
    theirs = qu.snap(x[None], lo, hi, SimpleNamespace(levels=levels, decoded=levels.half().float()))
    theirs = torch.where(keep, x, theirs)[0]
    np.testing.assert_allclose(theirs, expected, atol=1e-5)


@given(tensors(), specs())
def test_agrees_with_a_loop_over_single_entries(x, spec):
    levels = qu.data_free_codebook(spec).levels.double().numpy()
    keep, ours = kept(x, spec), quantized(x, spec)
    lines = x.double().numpy() if spec.axis == qu.PER_TOKEN else x.double().transpose(1, 2).numpy()
    held = keep.numpy() if spec.axis == qu.PER_TOKEN else keep.transpose(1, 2).numpy()
    given_back = ours.double() if spec.axis == qu.PER_TOKEN else ours.double().transpose(1, 2)
    for b, line in np.ndindex(lines.shape[:2]):
        inliers = lines[b, line][~held[b, line]]
        for i, value in enumerate(lines[b, line]):
            result = given_back[b, line, i].item()
            if held[b, line, i]:
                # numpy's quantile may round to the other side of an entry that equals it
                assert result == value or math.isclose(result, value, abs_tol=2 * rounding(x))
                continue
            candidates = inliers.min() + (levels + 1) / 2 * (inliers.max() - inliers.min())
            nearest = np.abs(candidates - value).min()
            assert abs(abs(result - value) - nearest) <= rounding(x)


@given(tensors(), specs(codebook="uniform", include_sparse=False, first_few_fp16=-1))
def test_error_is_at_most_half_a_step(x, spec):
    reach = x.float().amax(spec.axis, keepdim=True) - x.float().amin(spec.axis, keepdim=True)
    error = (quantized(x, spec).float() - x.float()).abs()
    assert (error <= reach / (2**spec.bits - 1) / 2 + rounding(x)).all()


@given(tensors(), specs())
def test_quantizing_twice_changes_nothing_more(x, spec):
    once = quantized(x, spec)
    torch.testing.assert_close(quantized(once, spec), once, rtol=0, atol=rounding(x))


@given(tensors(), specs())
def test_at_most_two_to_the_bits_values_share_a_scale(x, spec):
    ours = quantized(x, spec).masked_fill(kept(x, spec), math.nan)
    lines = ours.flatten(0, 1) if spec.axis == qu.PER_TOKEN else ours.transpose(1, 2).flatten(0, 1)
    for line in lines:
        assert len(line[~line.isnan()].unique()) <= 2**spec.bits


@given(tensors(), specs())
def test_shape_and_dtype_stay(x, spec):
    ours = quantized(x, spec)
    assert ours.shape == x.shape and ours.dtype == x.dtype and ours.isfinite().all()


@given(tensors(), specs())
def test_a_batch_is_its_sequences_one_by_one(x, spec):
    together = quantized(x, spec)
    assert torch.equal(together, torch.cat([quantized(row[None], spec) for row in x]))


@given(tensors(), specs(first_few_fp16=2))
def test_sinks_are_exact_in_every_sequence_and_touch_no_other_token(x, spec):
    ours = quantized(x, spec)
    assert torch.equal(ours[:, :2], x[:, :2])
    assume(x.shape[1] > 2)
    alone = replace(spec, first_few_fp16=-1)
    assert torch.equal(ours[:, 2:], quantized(x[:, 2:], alone))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook", ["uniform", "nf"])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 65504.0, 1e-7])
def test_constant_channel_and_constant_token_come_back_exactly(value, sparse, codebook, dtype):
    for axis in (qu.PER_CHANNEL, qu.PER_TOKEN):
        x = torch.randn(2, 16, 16).to(dtype)
        x.select(1 if axis == qu.PER_TOKEN else 2, 3).fill_(value)
        ours = quantized(x, qu.QuantSpec(axis, 3, codebook, sparse))
        constant = (x if axis == qu.PER_TOKEN else x.transpose(1, 2))[:, 3]
        assert torch.equal((ours if axis == qu.PER_TOKEN else ours.transpose(1, 2))[:, 3], constant)


@given(tensors(), st.integers(2, 8))
def test_integer_zero_point_is_that_of_an_integer_kernel(x, bits):
    """q = clip(round(x / scale) + zero_point, 0, L - 1), and back as (q - zero_point) * scale."""
    ours = quantized(x, qu.QuantSpec(qu.PER_CHANNEL, bits, clamp=True)).double()
    y = x.double()
    scale = (y.amax(1, keepdim=True) - y.amin(1, keepdim=True)) / (2**bits - 1)
    zero_point = (-y.amin(1, keepdim=True) / scale).round()
    kernel = ((y / scale).round() + zero_point).clamp(0, 2**bits - 1) - zero_point
    expected = torch.where(scale > 0, kernel * scale, y)
    # where an entry or the zero point lies half-way between steps, rounding chooses the side
    half_way = [(part / scale % 1 - 0.5).abs() < 1e-2 for part in (y, y.amin(1, keepdim=True))]
    assert (((ours - expected).abs() <= 4 * rounding(x)) | half_way[0] | half_way[1]).all()
    assert ((ours - y).abs() <= 1.01 * scale + 4 * rounding(x)).all()


@given(tensors(), specs(axis=qu.PER_CHANNEL, first_few_fp16=-1))
def test_static_outliers_lie_strictly_outside_and_the_rest_is_clipped(x, spec):
    quantizer = qu.fit_range(x, spec)
    other = (x.float() * 1.5 + 0.1).to(x.dtype)
    ours, y = qu.fake_quantize(other, quantizer).float(), other.float()
    exact = ((y < quantizer.lo) | (y > quantizer.hi)) & spec.include_sparse
    assert torch.equal(ours[exact], y[exact])
    clipped = (ours >= quantizer.lo - rounding(other)) & (ours <= quantizer.hi + rounding(other))
    assert (clipped | exact).all()


@given(st.integers(1, 2), st.integers(1, 6), st.integers(1, 40), st.integers(1, 100), st.integers(0, 2**31))
def test_cap_keeps_the_most_extreme_of_each_token(batch, tokens, channels, percent, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, tokens, channels, generator=generator) < 0.5
    distance = torch.rand(batch, tokens, channels, generator=generator)
    capped = qu.cap_per_token(keep, distance, percent / 100)
    for b, t in np.ndindex(batch, tokens):
        candidates = [(distance[b, t, c].item(), c) for c in range(channels) if keep[b, t, c]]
        expected = {c for _, c in sorted(candidates, reverse=True)[: percent * channels // 100]}
        assert set(capped[b, t].nonzero().flatten().tolist()) == expected


def test_the_cap_reaches_fake_quantize():
    x, bound = torch.randn(1, 50, 200), torch.ones(200)
    spec = qu.QuantSpec(qu.PER_CHANNEL, 2, include_sparse=True)
    loose = qu.Quantizer(spec, qu.data_free_codebook(spec), -bound, bound)
    capped = replace(loose, spec=replace(spec, cap_outliers=0.01))
    kept = [(qu.fake_quantize(x, quantizer) == x).sum(-1) for quantizer in (loose, capped)]
    assert (kept[0] > 30).all() and (kept[1] == 2).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sparse", [0, 1])
@pytest.mark.parametrize("fisher", [0, 1])
@pytest.mark.parametrize("codebook", ["uniform", "nuq"])
def test_published_code_gives_the_same_with_calibrated_keys(codebook, fisher, sparse, bits):
    with np.load(ASSETS / "kvquant_static.npz") as golden, np.load(ASSETS / "kvquant_dynamic.npz") as inputs:
        x, lo, hi = (
            torch.from_numpy(a)
            for a in (inputs["k"], golden[f"k_lower_sparse{sparse}"], golden[f"k_upper_sparse{sparse}"])
        )
        suffix = f"b{bits}_sparse{sparse}"
        levels = qu.uniform_levels(bits)
        if codebook == "nuq":
            suffix += f"_fisher{fisher}"
            levels = torch.from_numpy(golden[f"k_nuq_levels_{suffix}"]).flatten().sort().values
        expected = golden[f"k_static_{codebook}_{suffix}"]
    spec = qu.QuantSpec(qu.PER_CHANNEL, bits, codebook, include_sparse=bool(sparse))
    ours = qu.fake_quantize(x[None], qu.Quantizer(spec, qu.Codebook(levels), lo.half().float(), hi.half().float()))
    np.testing.assert_allclose(ours[0], expected, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sparse", [0, 1])
@pytest.mark.parametrize("fisher", [0, 1])
def test_published_code_gives_the_same_with_nuq_values(fisher, sparse, bits):
    suffix = f"b{bits}_sparse{sparse}_fisher{fisher}"
    with np.load(ASSETS / "kvquant_static.npz") as golden, np.load(ASSETS / "kvquant_dynamic.npz") as inputs:
        x = torch.from_numpy(inputs["v"])
        levels = torch.from_numpy(golden[f"v_nuq_levels_{suffix}"]).flatten().sort().values
        expected = golden[f"v_dynamic_token_nuq_{suffix}"]
    spec = qu.QuantSpec(qu.PER_TOKEN, bits, "nuq", include_sparse=bool(sparse))
    ours = qu.fake_quantize(x[None], qu.Quantizer(spec, qu.Codebook(levels)))
    np.testing.assert_allclose(ours[0], expected, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        qu.QuantSpec(qu.PER_CHANNEL, 4, include_sparse=True, first_few_fp16=1),
        qu.QuantSpec(qu.PER_TOKEN, 3, "nf"),
        qu.QuantSpec(qu.PER_CHANNEL, 2, clamp=True),
    ],
)
def test_one_graph_compiles_and_gives_the_same(spec):
    x = torch.randn(2, 40, 24)
    for quantizer in (qu.Quantizer(spec, qu.data_free_codebook(spec)), qu.fit_range(x, spec)):
        compiled = torch.compile(qu.fake_quantize, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x, quantizer), qu.fake_quantize(x, quantizer))


def test_the_range_ends_come_back_exactly():
    x = torch.randn(1, 64, 64) + 1000
    for spec in (qu.QuantSpec(qu.PER_CHANNEL, 4), qu.QuantSpec(qu.PER_TOKEN, 3, "nf")):
        ours = quantized(x, spec)
        assert torch.equal(ours.amax(spec.axis), x.amax(spec.axis))
        assert torch.equal(ours.amin(spec.axis), x.amin(spec.axis))


def test_a_wrong_rank_is_refused():
    with pytest.raises(ValueError, match=r"\(4, 8\)"):
        quantized(torch.randn(4, 8), qu.QuantSpec(qu.PER_TOKEN))


@pytest.mark.parametrize(
    "bad",
    [
        {"bits": 1},
        {"bits": 9},
        {"sparsity_threshold": 0},
        {"sparsity_threshold": 1.1},
        {"first_few_fp16": -2},
        {"cap_outliers": 1.5, "include_sparse": True},
        {"cap_outliers": 0.01},
    ],
)
def test_a_bad_spec_names_the_field_and_the_value(bad):
    name, value = next(iter(bad.items()))
    with pytest.raises(qu.UserError, match=rf"{name}.*{value}"):
        qu.QuantSpec(qu.PER_TOKEN, **bad)
