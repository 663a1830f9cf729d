"""Faster definitions give the bits of the core's own: on a CPU, and on what stands for a GPU."""

import contextlib
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from default_quantizers import VARIANTS, activations, fitted
from hypothesis import given, settings
from hypothesis import strategies as st

import quant_utils as qu
from simquant import faster_cpu, faster_gpu, speed

speed.install()
HALVES = st.sampled_from([torch.bfloat16, torch.float16])


@st.composite
def halves(draw, size=70):
    """[2,T,C] of 16-bit numbers from tiny to huge, with ties, and zeros of both signs."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(2, draw(st.integers(1, size)), draw(st.integers(1, 5)), generator=generator)
    x = x * 10.0 ** torch.randint(-5, 5, (1,), generator=generator)
    x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, 0.0).to(draw(HALVES))
    return x * torch.randint(0, 2, x.shape, generator=generator).mul(2).sub(1).to(x.dtype)


def assert_sorted(tails, x, rank, axis):
    """Assert that tails are what stands at rank and rank + 1 from either end of numpy's sorted x."""
    in_order = np.sort(x.double().numpy(), axis=axis)
    far = min(rank + 1, x.shape[axis] - 1)
    for ours, place in zip((*tails[0], *tails[1]), (rank, far, -1 - rank, -1 - far), strict=True):
        assert ours.dtype == x.dtype
        assert np.array_equal(ours.double().numpy(), np.take(in_order, [place], axis=axis))


@given(halves(), st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99]))
def test_counting_finds_the_order_statistics_that_numpy_sorts_out(x, fraction):
    for axis in (-2, -1):
        rank = math.floor(fraction / 2 * (x.shape[axis] - 1))
        assert_sorted(faster_gpu.counted_tails(x, rank, axis), x, rank, axis)


@given(halves(40), st.integers(0, 20), st.sampled_from([0, 1, 3, 1.0]))
def test_absent_entries_have_no_part_in_order_statistics(x, absent, rank):
    padded = torch.nn.functional.pad(x.mT, (0, absent), value=math.nan)
    rank = min(int(rank * (x.shape[1] - 1)) if isinstance(rank, float) else rank, x.shape[1] - 1)
    assert_sorted(faster_gpu.counted_tails(padded, rank, -1, absent), x.mT, rank, -1)
    signed = torch.where(padded.isnan(), -padded, padded)  # nan with its sign bit set
    assert_sorted(faster_gpu.counted_tails(signed, rank, -1, absent), x.mT, rank, -1)


@pytest.mark.parametrize("size", [2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**16 + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_counting_holds_for_long_texts_and_any_bits(size, dtype):
    x = torch.randint(-(2**15), 2**15, (size, 2)).short().view(dtype)
    x = x.masked_fill(x.isnan(), 1)
    for rank in (0, size // 200, size // 2 - 1):
        assert_sorted(faster_gpu.counted_tails(x, rank, 0), x, rank, 0)


def test_the_compiled_counting_finds_the_same():
    x = torch.randn(2, 41, 32).to(torch.bfloat16)[:, 1:]
    both = torch.compile(lambda x: [faster_gpu.counted_tails(x, 2, axis) for axis in (-2, -1)], fullgraph=True)(x)
    for axis, tails in zip((-2, -1), both, strict=True):
        assert_sorted(tails, x, 2, axis)


@contextlib.contextmanager
def as_on_a_gpu():
    """Let order statistics be counted, and levels be found step by step, on a CPU and without a compiler too."""
    with pytest.MonkeyPatch.context() as patch:
        counts = [(lambda x, *_: x.dtype != torch.float32, faster_gpu.counted_tails)]
        patch.setitem(qu.FASTER, "order_statistics", counts)
        patch.setitem(qu.FASTER, "inlier_bounds", [(counts[0][0], faster_gpu.inlier_bounds)])
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        yield


@contextlib.contextmanager
def plain():
    """Let nothing be faster."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qu, "FASTER", {})
        yield


def assert_same_bits(one, other):
    """Assert that two tensors, or tuples of them, are equal, nan to nan, in the same dtype and shape."""
    if torch.is_tensor(one):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.nan_to_num(nan=1.5e38), other.nan_to_num(nan=1.5e38))
        return
    for each in zip(one, other, strict=True):
        assert_same_bits(*each)


def assert_faster_is_equal(function, *args):
    """Assert that a function of the core gives its own bits in place of which FASTER serves."""
    name = function.__name__
    (faster,) = [faster for serves, faster in qu.FASTER.get(name, ()) if serves(*args)]
    with plain():
        expected = function(*args)
    assert_same_bits(faster(*args), expected)


@settings(max_examples=60)
@given(halves(), st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99, 1.0]))
def test_counted_bounds_are_the_sorted_ones(x, fraction):
    with as_on_a_gpu():
        for axis in qu.AXES.values():
            assert_faster_is_equal(qu.order_statistics, x, int(fraction / 2 * (x.shape[axis] - 1)), axis)
            assert_faster_is_equal(qu.inlier_bounds, x, fraction, axis)


@settings(max_examples=60)
@given(st.integers(2, 4), st.integers(0, 2**31))
def test_levels_found_step_by_step_are_those_of_a_search(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    levels = (torch.rand(2**bits, generator=generator) * 2 - 1).sort().values
    ties = torch.cat([levels, qu.borders(levels), torch.tensor([-2.0, 2.0])])
    with as_on_a_gpu():
        assert_faster_is_equal(qu.decode_nearest, ties, levels, levels * 1.1 + 0.01)


@st.composite
def tensors(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    """[B,T,C] from tiny to 1e30, with ties, constant rows and columns, huge numbers, infinities and nan."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = draw(st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 9)))
    x = torch.randn(shape, generator=generator) * 10.0 ** draw(st.sampled_from([-30, -6, 0, 0, 0, 3, 30]))
    kind = draw(st.sampled_from(["plain", "ties", "constant", "special"]))
    if kind == "ties":
        x = (x * 2).round()
    if kind == "constant":
        x[:, :, 0], x[:, 0] = 1.25, 0.5
    if kind == "special":
        some = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 3e38, -3e38])
        at = torch.rand(shape, generator=generator) < 0.1
        x = torch.where(at, some[torch.randint(0, len(some), shape, generator=generator)], x)
    return x.to(draw(st.sampled_from(dtypes)))


@st.composite
def codebooks(draw):
    """(levels [L] sorted in [-1, 1], what they decode to): named ones, random ones, some equal or almost so."""
    bits, kind = draw(st.integers(2, 8)), draw(st.sampled_from(["uniform", "nf", "random", "equal", "close", "inner"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    levels = qu.LEVELS[kind](bits) if kind in qu.LEVELS else torch.rand(2**bits, generator=generator) * 2 - 1
    if kind == "equal":
        levels = (levels * 3).round() / 3
    if kind == "close":
        levels[1] = levels[0] + 1e-7
    if kind == "inner":
        levels = levels * 1e-3
    levels = levels.clamp(-1, 1).sort().values
    return levels, draw(st.sampled_from([levels, levels * 1.25 - 0.125, levels * 0.5 + 0.125]))


@settings(max_examples=400, deadline=None)
@given(tensors(), codebooks(), st.sampled_from(["own", "channel", "token", "calibrated"]), st.integers(0, 3))
def test_levels_in_blocks_are_those_of_a_search(x, codebook, kind, kept):
    y = x.float()
    axes = {"own": (0, 1, 2), "channel": (1,), "token": (2,), "calibrated": (0, 1)}[kind]
    lo, hi = y.amin(axes, keepdim=True), y.amax(axes, keepdim=True)
    if kind == "calibrated":  # numbers beyond it are clipped
        lo, hi = (lo * 0.5)[0, 0], (hi * 0.5)[0, 0]
    exact = torch.zeros(1, dtype=torch.bool) if kept == 0 else torch.arange(x.shape[1])[:, None] < kept - 1
    if kept == 3:
        exact = torch.rand(x.shape) < 0.3
    if not faster_cpu.has_finder(x, exact, lo, hi, *codebook):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster_cpu, "BLOCK", 50)
        assert_faster_is_equal(qu.snap, x, exact, lo, hi, *codebook)


@settings(max_examples=200, deadline=None)
@given(tensors(), st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99, 1.0]))
def test_bounds_from_the_tails_are_those_of_a_mask(x, fraction):
    for axis in qu.AXES.values():
        assert_faster_is_equal(qu.inlier_bounds, x, fraction, axis)
    for each, axis in ((x, -2), (x[0], 0)):
        assert_faster_is_equal(qu.order_statistics, each, int(fraction / 2 * (each.shape[axis] - 1)), axis)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", qu.LEVELS)
def test_every_named_codebook_has_a_finder_that_is_right_next_to_each_border(kind, bits):
    levels = qu.LEVELS[kind](bits)
    borders = qu.borders(levels)
    near = [borders]
    for _ in range(3):
        near += [torch.nextafter(near[-1], torch.tensor(math.inf)), torch.nextafter(near[0], torch.tensor(-math.inf))]
    unit = torch.cat([*near, levels, torch.linspace(-1, 1, 10007), torch.tensor([-0.0, 2**-25, -(2**-25)])])
    unit = unit[(unit == 0) | (unit.abs() >= 2**-25)]  # a difference from 1 is never nearer to zero
    find = faster_cpu.level_finder(tuple(levels.tolist()), tuple(levels.tolist()))
    assert isinstance(find, faster_cpu.LevelSteps if bits <= 4 else faster_cpu.LevelTable)
    expected = (levels[(unit[:, None] > borders).sum(1)] + 1) / 2
    assert torch.equal(find(unit.clone()), expected)


def test_borders_that_no_table_can_tell_apart_are_left_to_the_search():
    close = torch.cat([torch.tensor([0.5, 0.5000001, 0.5000002]), torch.linspace(0.6, 1, 29)])
    beyond = torch.cat([torch.linspace(-1, 0, 30), torch.tensor([1.0000009, 1.0000009])])
    for levels in (close, beyond):
        assert faster_cpu.level_finder(*[tuple(levels.tolist())] * 2) is None
        x = torch.randn(1, 9, 4)
        assert not faster_cpu.has_finder(x, x > 9, x.amin(), x.amax(), levels, levels)


def test_every_quantizer_gives_the_same_bits_whatever_is_faster():
    devices = itertools.product(("cpu", "meta"), (torch.bfloat16, torch.float16, torch.float32))  # meta is no CPU
    counted = [faster_gpu.is_counted(torch.empty(1, device=device, dtype=dtype)) for device, dtype in devices]
    assert counted == [False, False, False, True, True, False]
    cases = {case: quantizer for case, quantizer in VARIANTS.items() if not quantizer.sources}
    scalar = qu.ScalarQuantizer("channel", outliers=0.1)
    for dtype in (torch.bfloat16, torch.float32):
        x = activations(2, seed=7).to(dtype)
        with plain():
            expected = {case: quantizer.quantize(x, {}) for case, quantizer in cases.items()}
            calibrated = fitted(scalar, x)
        for around in (contextlib.nullcontext, as_on_a_gpu):
            with around():
                for case, quantizer in cases.items():
                    given = quantizer.quantize(x, {})
                    assert torch.equal(given.values, expected[case].values), case
                    assert given.outliers is None or torch.equal(given.outliers, expected[case].outliers), case
                again = fitted(scalar, x)
                assert torch.equal(calibrated.lo, again.lo) and torch.equal(calibrated.hi, again.hi)


def test_a_script_installs_what_is_faster_before_it_does_anything():
    code = (
        "import quant_utils as qu; from simquant import flags, run; run.begin(flags.Flags('m'), {}); print(*qu.FASTER)"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["order_statistics", "inlier_bounds", "decode_nearest", "sorted_rows", "snap"]
