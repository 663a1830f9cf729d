"""KVQuant's own quantizer files: what it writes is read, what is written it reads, and nothing in it is executed."""

import contextlib
import os
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import ROOT, measured, same_bits

import quant_utils as qu
from simquant import calibration, kvquant_file, quantizer_file
from simquant.sites import find_sites

GOLDEN = ROOT.parent / "shared" / "golden" / "kvquant_quantizers_nuq4_sparse.pickle"


@pytest.fixture(scope="module")
def found(model):
    return find_sites(model)


def setting_of(found, levels="nuq", **options):
    """{site: quantizer}, 4 bits, keys per channel and values per token, not fitted."""
    axes = {"keys": "channel", "values": "token"}
    return {s: qu.ScalarQuantizer(axes[s.part], 4, levels, outliers=1 - 0.99, **options) for s in found}


def read(path, found, plain):
    """({site: quantizer} with what a file has for them, the flags that it names)."""
    data = quantizer_file.load(str(path))
    return quantizer_file.fitted(data, "llama", found, {"row": plain})["row"], data["settings"]


@pytest.mark.parametrize("q_norm", [False, True])
def test_an_export_is_read_by_plain_pickle_and_by_our_reader(model, found, windows, tmp_path, q_norm):
    plain, path = setting_of(found, q_norm=q_norm), tmp_path / "published.pickle"
    fitted = calibration.calibrate(model, windows[:2, :256], {4: plain})[4]
    kvquant_file.export(str(path), fitted)
    published = pickle.loads(path.read_bytes())
    assert list(published) == [site.name for site in found]
    for site, quantizer in fitted.items():
        upper, lower, (centroids,), *norm = published[site.name]
        assert centroids.shape == (16, 1) and centroids.dtype == np.float32 and len(norm) == 2 * q_norm
        if site.part == "keys":
            assert torch.equal(upper, quantizer.hi[None]) and torch.equal(lower, quantizer.lo[None])
        scale, offset = norm or (1, 0)
        decoded = torch.from_numpy(centroids[:, 0]).double() * scale + offset
        torch.testing.assert_close(decoded.float(), quantizer.decoded, rtol=1e-6, atol=1e-6)
    ours, flags = read(path, found, plain)
    assert flags == {"nuq": True, "norm": q_norm, "abits": [4]}
    for site, quantizer in ours.items():
        assert torch.equal(quantizer.decoded, fitted[site].decoded) and quantizer.sinks == fitted[site].sinks
    figures = measured(model, windows[:2], {}, ours, fitted)
    assert same_bits(figures[:, 1], figures[:, 2]) and (figures[:, 1, 1] > 0).all()


def test_an_export_without_fitted_levels_has_ranges_only(model, found, windows, tmp_path):
    for levels in ("uniform", "nf"):
        plain, path = setting_of(found, levels), tmp_path / "ranges.pickle"
        fitted = calibration.calibrate(model, windows[:1, :64], {4: plain})[4]
        kvquant_file.export(str(path), fitted)
        assert {len(entry) for entry in pickle.loads(path.read_bytes()).values()} == {2}
        ours, flags = read(path, found, plain)
        assert flags == {"nuq": False, "norm": False}
        assert all(torch.equal(ours[site].codebook, q.codebook) for site, q in fitted.items())
        assert all(q.lo is None or torch.equal(ours[site].lo, q.lo) for site, q in fitted.items())


@pytest.mark.skipif(not GOLDEN.is_file(), reason="needs ../shared/golden/kvquant_quantizers_nuq4_sparse.pickle")
def test_a_file_of_the_published_calibration_is_read(model, found, windows):
    setting, flags = read(GOLDEN, found, setting_of(found))
    assert flags == {"nuq": True, "norm": False, "abits": [4]}
    published = pickle.loads(GOLDEN.read_bytes())
    for site, quantizer in setting.items():
        upper, lower, (centroids,) = published[site.name]
        np.testing.assert_array_equal(quantizer.codebook, np.sort(centroids[:, 0]))
        if site.part == "keys":
            assert torch.equal(quantizer.hi, upper[0].float()) and torch.equal(quantizer.lo, lower[0].float())
        else:
            assert quantizer.lo is None and quantizer.hi is None
    base, quantized = (qu.perplexity(row.tolist()) for row in measured(model, windows, {}, setting)[..., 0].T)
    assert base < quantized < 1.02 * base


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_files_of_every_protocol_are_read(tmp_path, protocol, kind):
    centroids = np.asfortranarray(np.random.default_rng(0).uniform(-1, 1, (16, 1)).astype(kind))  # they are not sorted
    rows = np.asfortranarray(np.arange(8.0).reshape(2, 4))
    keys = (torch.ones(1, 4), -torch.ones(1, 4), [centroids], kind(1.5), torch.tensor(0.25))
    content = pickle.dumps({"layer.v_proj": (rows, -rows), "layer.k_proj": keys}, protocol)
    (tmp_path / "p.pickle").write_bytes(content.replace(b"numpy._core", b"numpy.core") if protocol == 2 else content)
    data = quantizer_file.load(str(tmp_path / "p.pickle"))
    parts = data["quantizers"]["layer.k_proj"][4]
    np.testing.assert_array_equal(parts["codebook"], np.sort(centroids[:, 0]).astype(np.float32))
    assert parts["hi"].tolist() == [1] * 4 and parts["lo"].tolist() == [-1] * 4
    assert (parts["scale"], parts["offset"]) == (1.5, 0.25)
    assert data["quantizers"]["layer.v_proj"] == {None: {}}  # a range of tokens
    assert data["model"]["channels"] == {"layer.v_proj": None, "layer.k_proj": 4}


# -- what a pickle may not do


def refused(tmp_path, content, match):
    (tmp_path / "attack.pkl").write_bytes(content)
    with pytest.raises(qu.UserError, match=match):
        quantizer_file.load(str(tmp_path / "attack.pkl"))


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, protocol):
    """At its top, and deep inside; plain pickle would run it."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "works"), protocol))
    assert (tmp_path / "works").is_dir()
    bomb = Bomb(tmp_path / "executed")
    for content in (bomb, {"model.layers.0.self_attn.k_proj": (torch.ones(1, 4), -torch.ones(1, 4), bomb)}):
        refused(tmp_path, pickle.dumps(content, protocol), r"holds more than data.*(mkdir|opcode)")
    assert not (tmp_path / "executed").exists()


class Forged:
    """A structured dtype that hides a pointer, through the state that numpy.dtype takes, or a scalar of it."""

    def __init__(self, is_dtype=False):
        self.is_dtype = is_dtype

    def __reduce__(self):
        if not self.is_dtype:
            return np.float32(0).__reduce__()[0], (Forged(True), b"A" * 8)
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)


def test_numpy_and_torch_see_no_forged_dtype_and_no_other_state(tmp_path):
    refused(tmp_path, pickle.dumps({"a.k_proj": (Forged(), torch.ones(1, 2))}), "'[VO]8', which is no plain number")
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    attack = b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\nN}(\x8c\x0c__defaults__(\x8c\x01a\x8c\x01btu\x86b."
    refused(tmp_path, attack, r"attack\.pkl")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


@pytest.mark.parametrize("opcode", [b"r" + (2**24).to_bytes(4, "little"), b"p16777216\n"], ids=["LONG_BINPUT", "PUT"])
def test_a_few_bytes_take_no_memory(tmp_path, opcode):
    """Python's reader makes room for as many objects as a number in the file says; 2**31 of them are 32 GiB."""
    (tmp_path / "q.pkl").write_bytes(b"\x80\x02}" + opcode + b".")
    tracemalloc.start()
    try:
        with contextlib.suppress(qu.UserError):
            quantizer_file.load(str(tmp_path / "q.pkl"))
        assert tracemalloc.get_traced_memory()[1] < 2**26
    finally:
        tracemalloc.stop()
