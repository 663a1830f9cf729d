"""The quantizer file: the same quantizers back, and nothing executed, whatever the bytes."""

import codecs
import contextlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import zipfile
from argparse import ArgumentTypeError
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CALIBRATED_SCRIPT, NANO, SAMPLE, assert_one_line_error, driver, measured, run_script
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import quant_utils as qu
from simquant import calibration, kvquant_file, quantizer_file
from simquant.calibrated_flags import CalibratedFlags, of_the_fit
from simquant.formats.scaled import ScaledQuantizer
from simquant.plans import Pair
from simquant.sites import find_sites
from simquant.stored import with_stored

ASKED = {"kv_format": (Pair("nuq", "nuq"),), "nuq": True, "include_sparse": True, "norm": True, "first_few_fp16": 1}
FLAGS = of_the_fit(CalibratedFlags("nano", **ASKED)) | {"abits": [4, 2]}
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
    axes = {"keys": ("channel", keys), "values": ("token", values)}
    return {site: qu.ScalarQuantizer(*axes[site.part], **OPTIONS) for site in found}


@pytest.fixture(scope="module")
def fitted(model, windows, found):
    """{4: setting, 2: setting}, both fitted."""
    return calibration.calibrate(model, windows[:2, :256], {bits: setting_of(found, bits, bits) for bits in (4, 2)})


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


def content_of(saved, old_layout, version):
    """A copy of what a file of that version holds."""
    return pickle.loads(pickle.dumps(old_layout if version == 2 else torch.load(saved, weights_only=True)))


def read(path, found, model_type="llama"):
    """{row: setting} as an evaluation takes it from a file, with the file's own flags."""
    data = quantizer_file.load(str(path))
    flags = with_stored(CalibratedFlags("nano", quantizer_path=str(path)), {}, data["settings"], str(path))
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
    for bits, loaded in zip((4, 2), read(tmp_path / "old.pkl", found).values(), strict=True):
        assert_same(loaded, fitted[bits])
    text = ("--datasets", SAMPLE, "--seqlen", 512, "--limit", 1, "--output", tmp_path / "o.json")
    process = run_script(CALIBRATED_SCRIPT, NANO, "--quantizer_path", tmp_path / "old.pkl", "--abits", "4/2", *text)
    assert process.returncode == 0, process.stderr
    mixed = {site: fitted[4 if site.part == "keys" else 2][site] for site in found}
    expected = qu.perplexity(measured(model, windows[:1], mixed)[:, 0, 0].tolist())
    assert json.loads((tmp_path / "o.json").read_text())["results"][0]["ppl"] == pytest.approx(expected, rel=1e-9)


# -- files for something else


def test_a_file_of_another_family_or_shape_is_refused(found, saved):
    deeper = [*found, replace(found[0], layer=6, name="model.layers.6.self_attn.k_proj")]
    for kind, sites, match in (
        ("qwen2", found, "for a model of type llama, and this one is qwen2: calibrate again"),
        ("llama", found[:10], r"for nano: it has 128 channels for model\.layers\.5.*this model has none"),
        ("llama", [replace(site, channels=64) for site in found], "it has 128 channels for .*this model has 64"),
        ("llama", deeper, r"no usable 4-bit quantizer for model\.layers\.6\.self_attn\.k_proj"),
    ):
        with pytest.raises(qu.UserError, match=match):
            read(saved, sites, kind)


def test_what_is_no_quantizer_file_or_of_a_version_that_is_not_read_is_one_line(saved, tmp_path):
    for version in (1, 4, "3", None):
        torch.save(torch.load(saved, weights_only=True) | {"format_version": version}, tmp_path / "other.pkl")
        with pytest.raises(qu.UserError, match=rf"format version {version}, and this program reads 2 and 3"):
            quantizer_file.load(str(tmp_path / "other.pkl"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state_dict.pkl")
    whole = Path(saved).read_bytes()
    for number, content in enumerate((b"", whole[: len(whole) // 2], b"hello", pickle.dumps([1]))):
        (tmp_path / f"{number}.pkl").write_bytes(content)
    for path in (*tmp_path.iterdir(), tmp_path / "absent.pkl", tmp_path):
        with pytest.raises(qu.UserError, match=rf"{path.name}' (is damaged|cannot be read)"):
            quantizer_file.load(str(path))


# -- damage


WRONG_PARTS = {
    "lo": [None, torch.zeros(128, dtype=torch.int64)],
    "hi": [torch.full((128,), -99.0), torch.ones(64), torch.full((128,), math.inf)],
    "codebook": [2 * torch.linspace(-1, 1, 16), torch.zeros(8), torch.linspace(1, -1, 16), torch.zeros(16).to_sparse()],
    "scale": [math.nan, None],
}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", WRONG_PARTS)
def test_parts_that_make_no_quantizer_are_refused(saved, found, old_layout, tmp_path, version, name):
    for value in WRONG_PARTS[name]:
        data = content_of(saved, old_layout, version)
        parts = data["quantizers"][KEYS]
        held = parts[4] if version == 3 else parts if name in ("lo", "hi") else parts["codebooks"][4]
        held["levels" if (name, version) == ("codebook", 2) else name] = value
        torch.save(data, tmp_path / "odd.pkl")
        with pytest.raises(qu.UserError, match=rf"odd\.pkl' ({DAMAGED}|has no usable 4-bit quantizer for {KEYS})"):
            read(tmp_path / "odd.pkl", found)


def test_a_file_of_a_method_that_this_program_lacks_is_refused(saved, found, tmp_path):
    data = torch.load(saved, weights_only=True)
    torch.save(data | {"settings": data["settings"] | {"nuq": False, "kv_format": "newer"}}, tmp_path / "q.pkl")
    with pytest.raises((qu.UserError, ArgumentTypeError), match="newer"):
        read(tmp_path / "q.pkl", found)


odd = [None, True, 0, -1.0, 16, 10**400, "", "k_proj", b"", [], [4.0], ["x"], {}, {"a": 1}, (), math.nan, "nf"]
odd += [torch.zeros(0), torch.zeros(8), torch.zeros(2, 2), torch.tensor(math.nan)]


@settings(FUZZ, max_examples=150)
@given(st.data(), st.sampled_from([2, 3]))
def test_a_file_with_anything_in_place_of_a_part_is_read_or_refused(saved, old_layout, found, tmp_path, data, version):
    place = stored = content_of(saved, old_layout, version)
    while isinstance(place, dict) and place and (place is stored or data.draw(st.integers(0, 4))):
        parent, key = place, data.draw(st.sampled_from(sorted(place, key=str)))
        place = parent[key]
    if data.draw(st.booleans()):
        parent[key] = data.draw(st.sampled_from(odd))
    else:
        del parent[key]
    torch.save(stored, tmp_path / "odd.pkl")
    with contextlib.suppress(qu.UserError, ArgumentTypeError):
        for setting in read(tmp_path / "odd.pkl", found).values():
            for site, quantizer in setting.items():
                assert quantizer.quantize(torch.ones(1, 2, site.channels)).values.shape == (1, 2, site.channels)


edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8)


@FUZZ
@given(edits, st.floats(0, 1), st.booleans())
def test_edited_and_truncated_files_are_read_or_refused(saved, found, fitted, tmp_path, changes, length, is_ours):
    path = tmp_path / "fuzzed"
    kvquant_file.export(str(path), fitted[4])
    content = bytearray((Path(saved) if is_ours else path).read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(content if length > 0.5 else content[: int(2 * length * len(content))])
    with contextlib.suppress(qu.UserError, ArgumentTypeError):
        rows = read(path, found)
        if is_ours:  # its checksums let no edit of a number through
            assert_same(next(iter(rows.values())), fitted[4])


def test_an_edited_number_does_not_pass_the_checksum(saved, fitted, found, tmp_path):
    content, levels = Path(saved).read_bytes(), fitted[4][found[0]].codebook.numpy().tobytes()
    assert content.count(levels) == 1
    (tmp_path / "edited.pkl").write_bytes(content.replace(levels, levels[:-4] + b"\x00\x00\x80\x3f"))
    with pytest.raises(qu.UserError, match=rf"edited\.pkl' {DAMAGED}"):
        quantizer_file.load(str(tmp_path / "edited.pkl"))


def test_an_interrupted_save_leaves_the_old_file(fitted, tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    (tmp_path / "q.pkl").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantizer_file.save(str(tmp_path / "q.pkl"), fitted, {})
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("q.pkl", b"old")]


# -- nothing is executed


def zipped(members):
    """The bytes of an archive of {name: content}."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, each in members.items():
            archive.writestr(name, each)
    return content.getvalue()


members = st.sampled_from(["a/data.pkl", "a/version", "a/byteorder", "a/data/0", "a/code/x.py", "../x"])
contents = st.binary(max_size=30) | st.sampled_from([pickle.dumps({}), pickle.dumps({"format": "x"}, 2), b"3\n"])
archives = st.dictionaries(members, contents).map(zipped)
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
    *[("os", "mkdir", "{}"), ("posix", "mkdir", "{}"), ("torch.jit", "os.mkdir", "{}")],
    ("builtins", "eval", "__import__('os').mkdir({!r})"),
    ("numpy", "_core.multiarray.sys.modules", "{}"),
]


def call(module, name, argument, is_global=True):
    """Opcodes that call module.name with a text, and drop the result."""
    texts = [b"X" + len(text.encode()).to_bytes(4, "little") + text.encode() for text in (module, name, argument)]
    lookup = f"c{module}\n{name}\n".encode() if is_global else texts[0] + texts[1] + b"\x93"  # STACK_GLOBAL
    return lookup + texts[2] + b"\x85R0"


def test_the_calls_below_are_ones_that_pickle_would_make(tmp_path):
    for name in ("True", ""):
        pickle.loads(b"\x80\x04" + call("os", "mkdir", str(tmp_path / f"made{name}"), bool(name)) + b"N.")
        assert (tmp_path / f"made{name}").is_dir()


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
    content = sound[:place] + call(module, name, argument.format(str(tmp_path / "no")), is_global) + sound[place:]
    if kind == "ours":
        content = zipped(members | {stem: content})
    elif kind == "storage":
        content = b"\x80\x02ctorch.storage\n_load_from_bytes\n" + pickle.dumps(content, 2)[2:-1] + b"\x85R."
    (tmp_path / "attack.pkl").write_bytes(content)
    with pytest.raises(qu.UserError, match=r"attack\.pkl"):
        quantizer_file.load(str(tmp_path / "attack.pkl"))
    assert not (tmp_path / "no").exists()


# -- what would take all memory or all time


class Call:
    """Is pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def nested(kind):
    """What holds something four times that holds something four times, 30 deep: 2**60 numbers in 300 bytes."""
    x = kind([0] * 10)
    for _ in range(30):
        x = kind([x] * 4)
    return x


def entry(upper):
    """A pickle of KVQuant's of a single projection."""
    return pickle.dumps({"a.k_proj": (upper, upper)})


def as_key(opcodes):
    """A pickle of a dictionary with this key."""
    return b"\x80\x02}" + opcodes + b"Ns."


@pytest.fixture(scope="module")
def ours():
    """Make the bytes of our file of one quantizer, with changes of its fields."""

    def make(**changes):
        state = quantizer_file.state_of(qu.ScalarQuantizer("channel", lo=-torch.ones(128), hi=torch.ones(128)))
        about = {"format": quantizer_file.FORMAT, "format_version": 3, "settings": FLAGS | {"abits": [4]}}
        about |= {"model": {"name": "nano", "type": "llama", "channels": {KEYS: 128}}}
        content = io.BytesIO()
        torch.save(about | {"quantizers": {KEYS: {4: state | changes}}}, content)
        return content.getvalue()

    return make


def packed(content, method=zipfile.ZIP_STORED, copies=0):
    """An archive again: compressed, or with many more entries that name the bytes of the first storage."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.filelist += copies * [next(each for each in new.infolist() if "/data/" in each.filename)]
    return made.getvalue()


def claiming(entries):
    """A tensor of a loose storage of 4 entries which says that it has more."""
    loose = io.BytesIO()
    torch.save(torch.zeros(4).storage(), loose, _use_new_zipfile_serialization=False)
    said = b"\x8a\x06" + entries.to_bytes(6, "little") + b"N"
    storage = Call(torch.storage._load_from_bytes, loose.getvalue().replace(b"K\x04N", said))
    return Call(torch._utils._rebuild_tensor_v2, storage, 0, (1, entries), (entries, 1), False, None)


wide, whole, deep = torch.zeros(1).expand(1, 10**9), torch.ones(1, 2**20), b")" + b"\x85" * 500_000
frombuffer = np.zeros(1).__reduce_ex__(5)[0]
BOMBS = {  # {(what, what is said of it): its bytes}
    ("lists of lists", "twice"): lambda ours: entry(nested(list)),
    ("lists of lists, ours", "twice"): lambda ours: ours(axis=nested(list)),
    ("tuples of tuples as a key", "twice"): lambda ours: as_key(pickle.dumps(nested(tuple), 2)[2:-1]),
    ("a deep tuple as a key", "keys"): lambda ours: as_key(deep),  # its hash overflows the stack
    ("a deep tuple", "deeply"): lambda ours: b"\x80\x02}K\x01" + deep + b"s.",
    ("stride 0", "more entries than are stored"): lambda ours: entry(wide),
    ("stride 0, ours", "more entries than are stored"): lambda ours: ours(lo=wide[0], hi=wide[0]),
    ("a codebook of stride 0", "more entries than are stored"): lambda ours: ours(codebook=wide[0]),
    ("compressed", "compressed"): lambda ours: packed(ours(lo=torch.zeros(2**25)), zipfile.ZIP_DEFLATED),
    ("entries that overlap", "larger than the file"): lambda ours: packed(ours(), copies=50_000),
    ("one tensor for all", "twice"): lambda ours: pickle.dumps({f"{i}.k_proj": (whole, whole) for i in range(10_000)}),
    ("one storage for all", "twice"): lambda ours: ours(lo=whole[0], **{str(i): whole[0, 0:] for i in range(1000)}),
    ("a storage that claims to be long", "more entries than are stored"): lambda ours: entry(claiming(2**40)),
    ("an array of an integer", "data: calibrate again"): lambda ours: entry(
        Call(frombuffer, 10**11, np.dtype("u1"), (10**11,), "C")
    ),
    ("bytes without end", "data: calibrate again"): lambda ours: (
        b"\x80\x05}K\x01\x96" + (2**36).to_bytes(8, "little") + b"s."
    ),
    ("a text encoded often", "twice"): lambda ours: pickle.dumps(
        [Call(codecs.encode, t, "l1") for t in ["x" * 10**6] * 10**4], 2
    ),
    ("16 million lists", "too many values"): lambda ours: b"\x80\x02" + b"]" * 2**24 + b".",
    ("a million names", "too many values"): lambda ours: pickle.dumps(dict.fromkeys(map(str, range(10**6)))),
    ("sinks without end", "other bits or sinks"): lambda ours: ours(sinks=10**12),
    ("a range that overflows", "no lo of"): lambda ours: ours(
        lo=torch.full((128,), -3e38), hi=torch.full((128,), 3e38)
    ),
    ("a published range that overflows", "no lo of"): lambda ours: pickle.dumps(
        {KEYS: (3e38 * torch.ones(1, 128),) * 2}
    ),
}
LIMITED = """
import resource, signal
in_use = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (in_use + 2**28,) * 2)
signal.alarm(60)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize(("name", "reason"), BOMBS)
def test_a_file_takes_no_more_memory_or_time_than_its_size_deserves(tmp_path, ours, name, reason):
    (tmp_path / "q.pkl").write_bytes(BOMBS[name, reason](ours))
    flags = ("--quantizer_path", tmp_path / "q.pkl", "--abits", 4, "--datasets", SAMPLE, "--seqlen", 64)
    process = run_script(driver(tmp_path, LIMITED), CALIBRATED_SCRIPT, NANO, *flags)
    assert_one_line_error(process, f"quantizer file '{tmp_path / 'q.pkl'}'", reason)
    assert len(process.stderr) < 500 and not re.search(r"[a-z]Error|NoneType|Exception", process.stderr)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, saved, monkeypatch):
    (tmp_path / "broken.pkl").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.pkl")
    with open(tmp_path / "huge.pkl", "wb") as file:
        file.truncate(2**40)
    for name, reason in (
        ("broken.pkl", "No such file or directory"),
        ("pipe.pkl", "it is not a regular file"),
        ("huge.pkl", "it has 1099511627776 bytes"),
        ("", "it is not a regular file"),
    ):
        with pytest.raises(qu.UserError, match=rf"cannot be read \({reason}"):
            quantizer_file.load(str(tmp_path / name))

    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(qu.UserError, match=r"cannot be read \(Permission denied\)"):
        quantizer_file.load(saved)


def held(site, plain, made):
    """Return what a file that holds a quantizer for a site gives where plain is asked for."""
    data = {"path": "q.pkl", "quantizers": {site.name: {plain.bits: made}}}
    return quantizer_file.stored(data, site, plain, plain.bits, {(0, "keys"): site.channels})


def test_a_quantizer_with_sources_loads_though_they_are_not_there(saved, found):
    @dataclass(frozen=True, eq=False)
    class Dependent(qu.ScalarQuantizer):
        sources: tuple = ((0, "keys"),)

        def quantize(self, x, others):
            return qu.Quantized(others[0])

    plain = Dependent("token")
    made = quantizer_file.made_of(quantizer_file.state_of(plain))
    assert held(found[1], plain, made) is made
    with pytest.raises(qu.UserError, match="predicted from other layers than are"):
        held(found[1], plain, Dependent("token", sources=((0, "values"),)))


def test_a_calibrated_scale_that_is_missing_and_a_transform_beyond_any_head_are_refused():
    """Without its scale the format would cast as if it were 1; the matrix of a huge transform would fill memory."""
    plain = ScaledQuantizer(8, 8, scale="calibrated")
    site = qu.Site(0, "keys", KEYS, torch.nn.Identity(), 16)
    with pytest.raises(qu.UserError, match="its scale is missing"):
        held(site, plain, plain)
    fitted = plain.fit(torch.randn(1, 3, 16), None)
    assert held(site, plain, fitted) is fitted
    state = quantizer_file.state_of(plain) | {"head": 2**16, "transform": "hadamard", "span": 2**16}
    with pytest.raises(qu.UserError, match="at most 1024"):
        quantizer_file.made_of(state)
