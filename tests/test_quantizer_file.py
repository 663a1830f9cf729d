"""The quantizer file: the same quantizers back, and nothing executed, whatever the bytes."""

import contextlib
import io
import json
import math
import os
import pickle
import pickletools
import signal
import zipfile
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATED_SCRIPT, NANO, SAMPLE, measured, run_script
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import quant_utils as qu
from simquant import kvquant_file, quantizer_file
from simquant.flags import CalibratedFlags, of_the_fit
from simquant.sites import find_sites

INTERRUPT = signal.getsignal(signal.SIGINT)
import kvquant_llama3_simquant as script  # noqa: E402, it takes Ctrl-C over

signal.signal(signal.SIGINT, INTERRUPT)

FLAGS = of_the_fit(
    CalibratedFlags("nano", kv_format="nuq", nuq=True, include_sparse=True, norm=True, first_few_fp16=1, nsamples=2)
) | {"abits": [4, 2]}
OPTIONS = {"levels": "nuq", "outliers": 1 - 0.99, "sinks": 1, "q_norm": True}
FUZZ = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # a failing example is small, and slow to make smaller
    max_examples=60,
)
KEYS = "model.layers.0.self_attn.k_proj"
DAMAGED = "is damaged, or holds more than data"


@pytest.fixture(scope="module")
def found(model):
    return find_sites(model)


def setting_of(found, keys=4, values=4):
    """{site: quantizer} as FLAGS ask for it, not fitted."""
    plain = {
        "keys": qu.ScalarQuantizer("channel", keys, **OPTIONS),
        "values": qu.ScalarQuantizer("token", values, **OPTIONS),
    }
    return {site: plain[site.part] for site in found}


@pytest.fixture(scope="module")
def fitted(model, windows, found):
    """{4: setting, 2: setting}, both fitted."""
    return qu.calibrate(model, windows[:2, :256], {bits: setting_of(found, bits, bits) for bits in (4, 2)})


@pytest.fixture(scope="module")
def saved(found, fitted, tmp_path_factory):
    """The path of a quantizer file that holds them."""
    path = str(tmp_path_factory.mktemp("saved") / "q.pkl")
    shape = {"name": "nano", "type": "llama", "channels": {site.name: site.channels for site in found}}
    quantizer_file.save(path, fitted, {"model": shape, "settings": FLAGS, "calibration": {"seqlen": 256}})
    return path


@pytest.fixture(scope="module")
def old_layout(saved, fitted):
    """What the file held in version 2: a range and, for each width, a codebook of every site, and older flags."""
    quantizers = {}
    for bits, setting in fitted.items():
        for site, q in setting.items():
            codebook = {"levels": q.codebook, "scale": q.scale, "offset": q.offset}
            quantizers.setdefault(site.name, {"lo": q.lo, "hi": q.hi, "codebooks": {}})["codebooks"][bits] = codebook
    data = torch.load(saved, weights_only=True)
    flags = {name: value for name, value in FLAGS.items() if name not in ("kv_format", "skip_layers")}
    return data | {"format_version": 2, "settings": flags, "quantizers": quantizers}


def read(path, found, model_type="llama"):
    """{row: setting} as an evaluation takes it from a file, with the file's own flags."""
    data = quantizer_file.load(str(path))
    flags = script.with_stored(CalibratedFlags("nano", quantizer_path=str(path)), {}, data["settings"])
    return quantizer_file.fitted(data, model_type, found, flags.plan().settings(found))


def assert_same(ours, theirs):
    """Two settings have the same fields, tensors bit for bit."""
    assert list(ours) == list(theirs)
    for site in ours:
        states = [quantizer_file.state_of(each[site]) for each in (ours, theirs)]
        for name, value in states[0].items():
            other = states[1][name]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other, name


# -- what comes back


@torch.inference_mode()
def test_saved_and_loaded_quantizers_give_bit_identical_logits(model, found, fitted, saved, windows):
    data = quantizer_file.load(saved)
    assert data["settings"] == FLAGS and data["model"]["name"] == "nano" and data["calibration"] == {"seqlen": 256}
    rows = read(saved, found)
    assert [row.abits for row in rows] == [4, 2]
    for bits, loaded in zip((4, 2), rows.values(), strict=True):
        logits = []
        for setting in ({}, loaded, fitted[bits]):
            with qu.quantized(setting):
                logits.append(model(windows[:1]).logits)
        assert torch.equal(logits[1], logits[2]) and not torch.equal(logits[0], logits[1])
        assert_same(loaded, fitted[bits])


def test_keys_of_one_width_and_values_of_another_come_from_one_file(found, fitted, saved):
    data = quantizer_file.load(saved)
    settings = {name: setting_of(found, *name) for name in ((4, 2), (2, 4))}
    for (keys, values), loaded in quantizer_file.fitted(data, "llama", found, settings).items():
        assert_same(loaded, {site: fitted[keys if site.part == "keys" else values][site] for site in found})
    with pytest.raises(qu.UserError, match=f"no usable 3-bit quantizer for {KEYS}"):
        quantizer_file.fitted(data, "llama", found, {"3/2": setting_of(found, 3, 2)})


def test_a_file_of_version_2_gives_the_same_quantizers_and_figures(model, found, windows, fitted, old_layout, tmp_path):
    torch.save(old_layout, tmp_path / "old.pkl")
    rows = read(tmp_path / "old.pkl", found)
    for bits, loaded in zip((4, 2), rows.values(), strict=True):
        assert_same(loaded, fitted[bits])
        assert all((quantizer.lo is None) == (site.part == "values") for site, quantizer in loaded.items())
    text = ("--datasets", SAMPLE, "--seqlen", 512, "--limit", 1, "--output", tmp_path / "o.json")
    process = run_script(CALIBRATED_SCRIPT, NANO, "--quantizer_path", tmp_path / "old.pkl", "--abits", "4/2", *text)
    assert process.returncode == 0, process.stderr
    mixed = {site: fitted[4 if site.part == "keys" else 2][site] for site in found}
    expected = qu.perplexity(measured(model, windows[:1], mixed)[:, 0, 0].tolist())
    assert json.loads((tmp_path / "o.json").read_text())["results"][0]["ppl"] == pytest.approx(expected, rel=1e-9)


@dataclass(frozen=True, eq=False)
class Nested(qu.Quantizer):
    """A format that holds another quantizer, a table, and whom it looks up."""

    bits: int
    inner: qu.Quantizer
    table: torch.Tensor
    sources: tuple = ()


def test_a_format_comes_back_with_its_tensors_its_sources_and_the_quantizers_inside_it(found, fitted, tmp_path):
    inner, site = fitted[4][found[0]], found[1]
    held = Nested(3, inner, torch.arange(6.0).view(2, 3), ((0, "keys"),))
    path = str(tmp_path / "nested.pkl")
    quantizer_file.save(path, {3: {site: held}}, {"model": {"name": "nano", "channels": {}}, "settings": {}})
    (back,) = quantizer_file.load(path)["quantizers"][site.name].values()
    assert type(back) is Nested and (back.bits, back.sources) == (3, ((0, "keys"),))
    assert torch.equal(back.table, held.table)
    assert_same({site: back.inner}, {site: inner})


# -- files for something else


def test_a_file_of_another_family_is_refused(found, saved):
    with pytest.raises(qu.UserError, match="for a model of type llama, and this one is qwen2: calibrate again"):
        read(saved, found, "qwen2")


def test_a_file_of_another_shape_is_refused(found, saved):
    with pytest.raises(qu.UserError, match=r"for nano: it has 128 channels for model\.layers\.5.*this model has none"):
        read(saved, found[:10])
    narrow = [replace(site, channels=64) for site in found]
    with pytest.raises(qu.UserError, match=r"for nano: it has 128 channels for .*this model has 64"):
        read(saved, narrow)
    deeper = [*found, replace(found[0], layer=6, name="model.layers.6.self_attn.k_proj")]
    with pytest.raises(qu.UserError, match=r"it has no channels for model\.layers\.6.*this model has 128"):
        read(saved, deeper)


@pytest.mark.parametrize("version", [1, 4, "3", None])
def test_a_file_of_a_version_that_is_not_read_names_it(saved, tmp_path, version):
    torch.save(torch.load(saved, weights_only=True) | {"format_version": version}, tmp_path / "later.pkl")
    with pytest.raises(qu.UserError, match=rf"format version {version}, and this program reads 2 and 3"):
        quantizer_file.load(str(tmp_path / "later.pkl"))


@pytest.mark.parametrize("kind", ["absent", "a folder", "empty", "cut", "a text", "a list", "a state dict"])
def test_what_is_no_quantizer_file_is_one_line(saved, tmp_path, kind):
    path, whole = tmp_path / "bad.pkl", Path(saved).read_bytes()
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "a text": b"hello", "a list": pickle.dumps([1])}
    if kind == "a folder":
        path.mkdir()
    elif kind == "a state dict":
        torch.save({"weight": torch.zeros(3)}, path)
    elif kind != "absent":
        path.write_bytes(contents[kind])
    with pytest.raises(qu.UserError, match=r"bad.pkl' (is damaged|cannot be read)"):
        quantizer_file.load(str(path))


# -- damage


WRONG_PARTS = [
    ("lo", None),
    ("lo", torch.zeros(128, dtype=torch.int64)),
    ("hi", torch.full((128,), -99.0)),
    ("hi", torch.ones(64)),
    ("hi", torch.full((128,), math.inf)),
    ("codebook", 2 * torch.linspace(-1, 1, 16)),
    ("codebook", torch.zeros(8)),
    ("codebook", torch.linspace(1, -1, 16)),
    ("codebook", torch.zeros(16).to_sparse()),
    ("scale", math.nan),
    ("scale", None),
]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(("name", "value"), WRONG_PARTS)
def test_parts_that_make_no_quantizer_are_refused(saved, found, old_layout, tmp_path, version, name, value):
    data = pickle.loads(pickle.dumps(old_layout)) if version == 2 else torch.load(saved, weights_only=True)
    parts = data["quantizers"][KEYS]
    if version == 3:
        parts[4][name] = value
    else:
        held = parts if name in ("lo", "hi") else parts["codebooks"][4]
        held["levels" if name == "codebook" else name] = value
    torch.save(data, tmp_path / "odd.pkl")
    with pytest.raises(qu.UserError, match=rf"odd\.pkl' ({DAMAGED}|has no usable 4-bit quantizer for {KEYS})"):
        read(tmp_path / "odd.pkl", found)


odd_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400) | st.binary()
    | st.sampled_from([torch.zeros(0), torch.zeros(8), torch.zeros(2, 2), torch.tensor(math.nan), "k_proj", 16, -1.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)  # fmt: skip


@settings(FUZZ, max_examples=300)
@given(st.data(), st.sampled_from([2, 3]))
def test_a_file_with_anything_in_place_of_a_part_is_read_or_refused(saved, old_layout, found, tmp_path, data, version):
    stored = pickle.loads(pickle.dumps(old_layout)) if version == 2 else torch.load(saved, weights_only=True)
    place, parts = stored, []
    while isinstance(place, dict) and place and (not parts or data.draw(st.integers(0, 4))):
        key = data.draw(st.sampled_from(sorted(place, key=str)))
        parts.append((place, key))
        place = place[key]
    parent, key = parts[-1]
    if data.draw(st.booleans()):
        parent[key] = data.draw(odd_values)
    else:
        del parent[key]
    torch.save(stored, tmp_path / "odd.pkl")
    with contextlib.suppress(qu.UserError, ArgumentTypeError):
        for setting in read(tmp_path / "odd.pkl", found).values():
            for site, quantizer in setting.items():
                assert quantizer.quantize(torch.ones(1, 2, site.channels)).values.shape == (1, 2, site.channels)


edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


@FUZZ
@given(edits, st.floats(0, 1), st.sampled_from(["ours", "published"]))
def test_edited_and_truncated_files_are_read_or_refused(saved, found, fitted, tmp_path, changes, length, kind):
    path = tmp_path / "fuzzed"
    if kind == "published":
        kvquant_file.export(str(path), fitted[4])
    content = bytearray((path if kind == "published" else Path(saved)).read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(content if length > 0.5 else content[: int(2 * length * len(content))])
    with contextlib.suppress(qu.UserError, ArgumentTypeError):
        rows = read(path, found)
        if kind == "ours":  # its checksums let no edit of a number through
            assert_same(next(iter(rows.values())), fitted[4])


def test_an_edited_number_does_not_pass_the_checksum(saved, fitted, found, tmp_path):
    content, levels = Path(saved).read_bytes(), fitted[4][found[0]].codebook.numpy().tobytes()
    assert content.count(levels) == 1
    (tmp_path / "edited.pkl").write_bytes(content.replace(levels, levels[:-4] + b"\x00\x00\x80\x3f"))
    with pytest.raises(qu.UserError, match=rf"edited\.pkl' {DAMAGED}"):
        quantizer_file.load(str(tmp_path / "edited.pkl"))


def test_an_interrupted_save_leaves_the_old_file(fitted, tmp_path, monkeypatch):
    path = tmp_path / "q.pkl"
    path.write_bytes(b"old")

    def interrupted(descriptor):
        assert any(file.name.endswith(".partial") and file.stat().st_size > 1000 for file in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantizer_file.save(str(path), fitted, {})
    assert path.read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["q.pkl"]


# -- nothing is executed


def zipped(members):
    """The bytes of an archive of {name: content}."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, each in members.items():
            archive.writestr(name, each)
    return content.getvalue()


archives = st.dictionaries(
    st.sampled_from(["a/data.pkl", "a/version", "a/byteorder", "a/data/0", "constants.pkl", "a/code/x.py", "../x"]),
    st.binary(max_size=30) | st.sampled_from([pickle.dumps({}), pickle.dumps({"format": "x"}, 2), b"3\n"]),
).map(zipped)
pickles = st.lists(st.sampled_from([op.code.encode("latin1") for op in pickletools.opcodes]) | st.binary(max_size=6))
loose = st.binary(max_size=80) | pickles.map(lambda ops: b"\x80\x04" + b"".join(ops))


@settings(FUZZ, max_examples=300)
@given(archives | loose)
def test_any_bytes_are_no_quantizer_file(tmp_path, content):
    (tmp_path / "q.pkl").write_bytes(content)
    with contextlib.suppress(qu.UserError):  # an empty dictionary is one of KVQuant's, of no projection
        assert quantizer_file.load(str(tmp_path / "q.pkl"))["quantizers"] == {}
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"q.pkl": content}


CALLS = [
    ("os", "mkdir", "{}"),
    ("posix", "mkdir", "{}"),
    ("builtins", "eval", "__import__('os').mkdir({!r})"),
    ("builtins", "exec", "import os; os.mkdir({!r})"),
    ("torch.jit", "os.mkdir", "{}"),
    ("numpy", "_core.multiarray.sys.modules", "{}"),
]


def call(module, name, argument, is_global=True):
    """Opcodes that call module.name with a text, and drop the result."""
    texts = [b"X" + len(text.encode()).to_bytes(4, "little") + text.encode() for text in (module, name, argument)]
    lookup = f"c{module}\n{name}\n".encode() if is_global else texts[0] + texts[1] + b"\x93"  # STACK_GLOBAL
    return lookup + texts[2] + b"\x85R0"


def test_the_calls_below_are_ones_that_pickle_would_make(tmp_path):
    for number, is_global in enumerate((True, False)):
        target = tmp_path / str(number)
        assert pickle.loads(b"\x80\x04" + call("os", "mkdir", str(target), is_global) + b"N.") is None
        assert target.is_dir()


@FUZZ
@given(st.data(), st.sampled_from(CALLS), st.sampled_from(["ours", "published", "storage"]), st.booleans())
def test_a_call_anywhere_inside_a_file_is_refused_and_not_made(saved, fitted, tmp_path, data, what, kind, is_global):
    """Also in a tensor's storage, which is a pickle in the pickle."""
    module, name, argument = what
    assume(is_global or name.isidentifier())
    with zipfile.ZipFile(saved) as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    stem = next(each for each in members if each.endswith("data.pkl"))
    kvquant_file.export(str(tmp_path / "e.pkl"), fitted[4])
    published = pickle.dumps(pickle.loads((tmp_path / "e.pkl").read_bytes()), 2)
    sound = {"ours": members[stem], "published": published, "storage": pickle.dumps({"a": 1}, 2)}[kind]
    place = data.draw(st.sampled_from([place for _, _, place in pickletools.genops(sound)][1:]))
    attack = call(module, name, argument.format(str(tmp_path / "executed")), is_global)
    content = sound[:place] + attack + sound[place:]
    if kind == "ours":
        content = zipped(members | {stem: content})
    elif kind == "storage":
        content = b"\x80\x02ctorch.storage\n_load_from_bytes\n" + pickle.dumps(content, 2)[2:-1] + b"\x85R."
    (tmp_path / "attack.pkl").write_bytes(content)
    with pytest.raises(qu.UserError, match=r"attack\.pkl"):
        quantizer_file.load(str(tmp_path / "attack.pkl"))
    assert not (tmp_path / "executed").exists()
