"""The quantizer file: the same numbers back, and nothing executed, whatever the bytes."""

import contextlib
import io
import math
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SAMPLE, perplexity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import quant_utils as qu

SPECS = {
    "k_proj": qu.QuantSpec(qu.PER_CHANNEL, 4, "nuq", include_sparse=True),
    "v_proj": qu.QuantSpec(qu.PER_TOKEN, 4, "nuq", include_sparse=True),
}
FLAGS = {
    "abits": [4], "perchannel": ["k_proj"], "pertoken": ["v_proj"], "include_sparse": True, "sparsity_threshold": 0.99,
    "first_few_fp16": -1, "nf": False, "nuq": True, "norm": False, "clamp": False, "cap_outliers": None,
    "fisher": False, "fisher_weighting": "paper", "calib_dataset": "wikitext2", "nsamples": 2, "seed": 0,
}  # fmt: skip
GOLDEN = ROOT.parent / "shared" / "golden" / "kvquant_quantizers_nuq4_sparse.pickle"


@pytest.fixture(scope="module")
def quantizers(model, config_and_tokenizer):
    how = qu.CalibrationSpec(str(SAMPLE), nsamples=2, seqlen=256)
    fitted = qu.calibrate(model, qu.load_calibration_windows(*config_and_tokenizer, how), {4: SPECS}, how)
    return {name: quantizer for name, (quantizer, _) in fitted[4].items()}


@pytest.fixture(scope="module")
def saved(model, quantizers, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("saved") / "q.pkl")
    qu.save_calibration(path, {4: quantizers}, qu.provenance(model, "nano", FLAGS, 256))
    return path


@torch.inference_mode()
def logits(model, quantizers, windows):
    with qu.simulate_quantization(model, quantizers):
        return model(windows[:1]).logits


def test_saved_and_loaded_quantizers_give_bit_identical_logits(model, quantizers, saved, windows):
    data = qu.load_calibration(saved)
    assert data["settings"] == FLAGS and data["model"]["name"] == "nano"
    assert data["versions"]["torch"] == torch.__version__
    loaded = qu.stored_quantizers(saved, data, model, SPECS)
    assert torch.equal(logits(model, loaded, windows), logits(model, quantizers, windows))


def test_a_file_of_another_family_is_refused(model, saved):
    data = qu.load_calibration(saved)
    data["model"]["type"] = "qwen2"
    with pytest.raises(
        qu.UserError, match="calibrated for a model of type qwen2, and this one is llama: calibrate again"
    ):
        qu.stored_quantizers(saved, data, model, SPECS)


@pytest.mark.parametrize("q_norm", [False, True])
def test_export_is_read_by_plain_pickle_and_by_our_reader(model, quantizers, windows, tmp_path, q_norm):
    if q_norm:
        unit = torch.randn(1000) / 3
        quantizers = {n: replace(q, codebook=qu.q_norm(unit, q.codebook.levels)) for n, q in quantizers.items()}
    path = str(tmp_path / "published.pickle")
    qu.export_kvquant(path, quantizers)
    with open(path, "rb") as file:
        published = pickle.load(file)
    for name, quantizer in quantizers.items():
        upper, lower, (centroids,), *norm = published[name]
        assert centroids.shape == (16, 1) and centroids.dtype == np.float32 and len(norm) == 2 * q_norm
        if name.endswith("k_proj"):
            assert torch.equal(upper, quantizer.hi[None]) and torch.equal(lower, quantizer.lo[None])
        scale, offset = norm or (1, 0)
        decoded = torch.from_numpy(centroids[:, 0]).double() * scale + offset
        torch.testing.assert_close(decoded.float(), quantizer.codebook.decoded, rtol=1e-6, atol=1e-6)
    data = qu.load_calibration(path)
    assert data["settings"] == {"nuq": True, "norm": q_norm, "abits": [4]}
    read = qu.stored_quantizers(path, data, model, SPECS)
    theirs, ours = logits(model, read, windows), logits(model, quantizers, windows)
    assert torch.equal(theirs, ours)


def test_a_uniform_export_has_ranges_only(model, quantizers, tmp_path):
    path = str(tmp_path / "uniform.pickle")
    specs = {name: replace(spec, codebook="uniform") for name, spec in SPECS.items()}
    levels = qu.Codebook(qu.uniform_levels(4))
    uniform = {n: replace(q, spec=specs[n.rpartition(".")[2]], codebook=levels) for n, q in quantizers.items()}
    qu.export_kvquant(path, uniform)
    with open(path, "rb") as file:
        assert {len(entry) for entry in pickle.load(file).values()} == {2}
    read = qu.stored_quantizers(path, qu.load_calibration(path), model, specs)
    assert all(torch.equal(read[n].codebook.levels, q.codebook.levels) for n, q in uniform.items())


@pytest.mark.skipif(not GOLDEN.is_file(), reason="needs ../shared")
def test_a_file_of_the_published_calibration_is_read(model, windows):
    data = qu.load_calibration(str(GOLDEN))
    quantizers = qu.stored_quantizers(str(GOLDEN), data, model, SPECS)
    with GOLDEN.open("rb") as file:
        published = pickle.load(file)
    upper, lower, (centroids,) = published["model.layers.3.self_attn.k_proj"]
    read = quantizers["model.layers.3.self_attn.k_proj"]
    assert torch.equal(read.hi, upper[0]) and torch.equal(read.lo, lower[0])
    np.testing.assert_array_equal(read.codebook.levels, np.sort(centroids[:, 0]))
    assert quantizers["model.layers.3.self_attn.v_proj"].lo is None
    base = perplexity(model, windows)
    assert base < perplexity(model, windows, quantizers) < 1.02 * base


# -- refused, with one line


def test_a_file_for_another_model_shape(saved, model):
    from transformers import LlamaConfig, LlamaForCausalLM

    data = qu.load_calibration(saved)
    config = model.config.to_dict() | {"num_hidden_layers": 4, "dtype": "float32"}
    fewer = LlamaForCausalLM(LlamaConfig(**config))
    with pytest.raises(qu.UserError, match=r"for nano: it has 128 channels for model.layers.4.*this model has none"):
        qu.stored_quantizers(saved, data, fewer, SPECS)
    narrow = LlamaForCausalLM(LlamaConfig(**(model.config.to_dict() | {"num_key_value_heads": 2, "dtype": "float32"})))
    with pytest.raises(qu.UserError, match=r"has 128 channels for .*this model has 64"):
        qu.stored_quantizers(saved, data, narrow, SPECS)


def test_a_file_from_a_later_version(saved, tmp_path):
    data = torch.load(saved, weights_only=True)
    torch.save(data | {"format_version": 3}, tmp_path / "later.pkl")
    with pytest.raises(qu.UserError, match="format version 3; this program reads 2"):
        qu.load_calibration(str(tmp_path / "later.pkl"))


def test_a_file_of_the_first_version_is_still_read(saved, quantizers, model, tmp_path):
    """It held one width: abits a number, a site's levels beside its range."""
    data = torch.load(saved, weights_only=True)
    for parts in data["quantizers"].values():
        parts |= parts.pop("codebooks")[4]
    torch.save(data | {"format_version": 1, "settings": data["settings"] | {"abits": 4}}, tmp_path / "v1.pkl")
    read = qu.load_calibration(str(tmp_path / "v1.pkl"))
    assert read["settings"] == FLAGS
    loaded = qu.stored_quantizers("v1.pkl", read, model, SPECS)
    assert all(torch.equal(loaded[n].codebook.levels, q.codebook.levels) for n, q in quantizers.items())


def test_several_widths_in_one_file_are_those_of_separate_calibrations(model, config_and_tokenizer, tmp_path):
    how = qu.CalibrationSpec(str(SAMPLE), nsamples=2, seqlen=128, fisher="paper", q_norm=True)
    windows = qu.load_calibration_windows(*config_and_tokenizer, how)
    sweep = {bits: {n: replace(spec, bits=bits) for n, spec in SPECS.items()} for bits in (4, 3, 2)}
    together = qu.calibrate(model, windows, sweep, how)
    path, flags = str(tmp_path / "q.pkl"), FLAGS | {"abits": [4, 3, 2]}
    fitted = {bits: {n: q for n, (q, _) in sites.items()} for bits, sites in together.items()}
    qu.save_calibration(path, fitted, qu.provenance(model, "nano", flags, 128))
    data = qu.load_calibration(path)
    assert data["settings"]["abits"] == [4, 3, 2]
    for bits, specs in sweep.items():
        alone = qu.calibrate(model, windows, {bits: specs}, how)[bits]
        read = qu.stored_quantizers(path, data, model, specs)
        for name, (quantizer, fit) in alone.items():
            assert together[bits][name][1] == fit and read[name].spec == quantizer.spec
            assert torch.equal(read[name].codebook.decoded, quantizer.codebook.decoded)
            assert quantizer.lo is None or torch.equal(read[name].lo, quantizer.lo)
    with pytest.raises(qu.UserError, match="no usable 5-bit quantizer"):
        qu.stored_quantizers(path, data, model, {n: replace(spec, bits=5) for n, spec in SPECS.items()})


@pytest.mark.parametrize("damage", ["absent", "empty", "cut", "text", "other", "state_dict"])
def test_a_file_that_is_none(saved, tmp_path, damage):
    path, whole = tmp_path / "bad.pkl", Path(saved).read_bytes()
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "text": b"hello", "other": pickle.dumps([1])}
    if damage == "state_dict":
        torch.save({"weight": torch.zeros(3)}, path)
    elif damage != "absent":
        path.write_bytes(contents[damage])
    with pytest.raises(qu.UserError, match=r"bad.pkl"):
        qu.load_calibration(str(path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"lo": None},
        {"levels": 2 * torch.linspace(-1, 1, 16)},
        {"levels": torch.zeros(8)},
        {"levels": torch.arange(16.0).flip(0)},
        {"hi": torch.full((128,), -99.0)},
        {"hi": torch.ones(64)},
    ],
)
def test_tensors_that_make_no_quantizer(saved, model, tmp_path, wrong):
    data = torch.load(saved, weights_only=True)
    parts = data["quantizers"]["model.layers.0.self_attn.k_proj"]
    (parts["codebooks"][4] if "levels" in wrong else parts).update(wrong)
    torch.save(data, tmp_path / "wrong.pkl")
    with pytest.raises(qu.UserError, match=r"no usable 4-bit quantizer for model.layers.0.self_attn.k_proj"):
        qu.stored_quantizers("wrong.pkl", qu.load_calibration(str(tmp_path / "wrong.pkl")), model, SPECS)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("settings", "sparsity_threshold"), None),
        (("settings", "perchannel"), [1]),
        (("settings", "abits"), [16]),
        (("settings", "abits"), []),
        (("settings", "abits"), [4, 4]),
        (("settings", "abits"), [4.0]),
        (("settings", "abits"), 4),
        (("settings", "unknown"), 1),
        (("settings", "cap_outliers"), 10**400),
        (("model", "name"), torch.zeros(2)),
        (("quantizers", 1), {}),
        (("quantizers", "model.layers.0.self_attn.k_proj", "codebooks"), []),
        (("quantizers", "model.layers.0.self_attn.k_proj", "codebooks"), None),
        (("quantizers", "model.layers.0.self_attn.k_proj", "codebooks", 4, "scale"), math.nan),
        (("quantizers", "model.layers.0.self_attn.k_proj", "codebooks", 4, "scale"), None),
        (("quantizers", "model.layers.0.self_attn.k_proj", "codebooks", 4, "levels"), torch.zeros(16).to_sparse()),
        (("quantizers", "model.layers.0.self_attn.k_proj", "lo"), torch.zeros(128, dtype=torch.int64)),
        (("quantizers", "model.layers.0.self_attn.k_proj", "hi"), torch.full((128,), math.inf)),
    ],
)
def test_contents_of_another_type_are_refused(saved, tmp_path, place, value):
    data = torch.load(saved, weights_only=True)
    *path, last = place
    part = data
    for key in path:
        part = part[key]
    part[last] = value
    torch.save(data, tmp_path / "odd.pkl")
    with pytest.raises(qu.UserError, match=r"odd.pkl.* is damaged, or holds more than data"):
        qu.load_calibration(str(tmp_path / "odd.pkl"))


class Forged:
    """A structured dtype that hides a pointer, through the state that numpy.dtype takes."""

    def __reduce__(self):
        fields = {"a": (np.dtype("O"), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, 0)


class Pointer:
    def __reduce__(self):
        return np.float32(0).__reduce__()[0], (Forged(), b"A" * 8)


def test_a_forged_dtype_is_refused_before_numpy_sees_it(tmp_path):
    (tmp_path / "forged.pkl").write_bytes(pickle.dumps({"a.k_proj": (Pointer(), torch.ones(1, 2))}))
    with pytest.raises(qu.UserError, match=r"'V8', which is no plain number|'O8', which is no plain number"):
        qu.load_calibration(str(tmp_path / "forged.pkl"))


def test_a_pickle_changes_no_function_of_torch(tmp_path):
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    attack = b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\nN}(\x8c\x0c__defaults__(\x8c\x01a\x8c\x01btu\x86b."
    (tmp_path / "attack.pkl").write_bytes(attack)
    with pytest.raises(qu.UserError, match=r"attack.pkl"):
        qu.load_calibration(str(tmp_path / "attack.pkl"))
    assert torch._utils._rebuild_tensor_v2.__defaults__ == defaults


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_published_files_of_every_protocol_are_read(tmp_path, protocol, kind):
    centroids = np.sort(np.random.default_rng(0).uniform(-1, 1, (16, 1)).astype(kind), axis=0)
    entry = (torch.ones(1, 4), -torch.ones(1, 4), [centroids], kind(1.5), torch.tensor(0.25))
    (tmp_path / "p.pickle").write_bytes(pickle.dumps({"layer.k_proj": entry}, protocol=protocol))
    data = qu.load_calibration(str(tmp_path / "p.pickle"))
    parts = data["quantizers"]["layer.k_proj"]["codebooks"][4]
    np.testing.assert_array_equal(parts["levels"], centroids[:, 0].astype(np.float32))
    assert (parts["scale"], parts["offset"]) == (1.5, 0.25) and data["model"]["channels"] == {"layer.k_proj": 4}


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, protocol):
    target = tmp_path / "executed"
    harmless = (torch.ones(1, 4), -torch.ones(1, 4))
    for content in (Bomb(target), {"model.layers.0.self_attn.k_proj": (*harmless, Bomb(target))}):
        (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(qu.UserError, match=r"holds more than data.*mkdir"):
            qu.load_calibration(str(tmp_path / "bomb.pkl"))
        assert not target.exists()


def test_code_inside_our_own_format_or_inside_a_tensors_storage_is_refused(tmp_path):
    target = tmp_path / "executed"
    torch.save({"format": qu.FILE_FORMAT, "format_version": 1, "settings": Bomb(target)}, tmp_path / "zip.pkl")
    inner = io.BytesIO()
    torch.save(Bomb(target), inner, _use_new_zipfile_serialization=False)

    class Storage:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.getvalue(),)

    (tmp_path / "storage.pkl").write_bytes(pickle.dumps({"a": Storage()}))
    for name in ("zip.pkl", "storage.pkl"):
        with pytest.raises(qu.UserError, match="holds more than data"):
            qu.load_calibration(str(tmp_path / name))
    assert not target.exists()


edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(edits, st.floats(0, 1), st.sampled_from(["ours", "published"]))
def test_edited_and_truncated_files_are_read_or_refused(model, saved, quantizers, tmp_path, changes, length, kind):
    path = tmp_path / "fuzzed"
    if kind == "published":
        qu.export_kvquant(str(path), quantizers)
    content = bytearray((path if kind == "published" else Path(saved)).read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(content if length > 0.5 else content[: int(2 * length * len(content))])
    with contextlib.suppress(qu.UserError):
        read = qu.stored_quantizers(str(path), qu.load_calibration(str(path)), model, SPECS)
        if kind == "ours":  # its checksums let no edit of a number through
            assert all(torch.equal(read[n].codebook.levels, q.codebook.levels) for n, q in quantizers.items())


def test_an_edited_number_does_not_pass_the_checksum(saved, quantizers, tmp_path):
    content = Path(saved).read_bytes()
    levels = quantizers["model.layers.0.self_attn.k_proj"].codebook.levels.numpy().tobytes()
    assert content.count(levels) == 1
    (tmp_path / "edited.pkl").write_bytes(content.replace(levels, levels[:-4] + b"\x00\x00\x80\x3f"))
    with pytest.raises(qu.UserError, match=r"edited.pkl.* is damaged"):
        qu.load_calibration(str(tmp_path / "edited.pkl"))


def test_an_interrupted_save_leaves_the_old_file(saved, quantizers, model, tmp_path, monkeypatch):
    path = tmp_path / "q.pkl"
    path.write_bytes(b"old")

    def interrupted(descriptor):
        assert any(file.name.endswith(".partial") and file.stat().st_size > 1000 for file in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qu.save_calibration(str(path), {4: quantizers}, qu.provenance(model, "nano", FLAGS, 256))
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["q.pkl"]


def test_the_file_holds_plain_data_only(saved):
    with zipfile.ZipFile(saved) as archive:
        names = [name for name in archive.namelist() if name.endswith("data.pkl")]
        assert len(names) == 1
    assert torch.load(saved, weights_only=True)["format_version"] == 2
