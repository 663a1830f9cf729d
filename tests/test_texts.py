"""Text to windows: files, tokens, the two protocols, the hub."""

import json
import random
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import DYNAMIC_SCRIPT, ROOT, SAMPLE, assert_one_line_error, run_script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import quant_utils as qu
from simquant import texts
from simquant.notices import Notice

SHARED = ROOT.parent / "shared"
needs_hub = pytest.mark.skipif(not (SHARED / "localhub.py").is_file(), reason="needs ../shared/localhub.py and hub/")
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def by_character(text, **_):
    """A tokenizer that is easy to follow: one token a character, BOS first."""
    return SimpleNamespace(input_ids=torch.tensor([[0, *map(ord, text)]]))


def windows_of(path, tokenizer, seqlen=8, limit=1000):
    return texts.evaluation_windows(str(path), tokenizer, seqlen, limit)


# -- windows


@given(st.integers(0, 60), st.integers(2, 20))
def test_disjoint_windows_cover_everything_but_the_tail(count, seqlen):
    windows = texts.disjoint_windows(torch.arange(count), seqlen)
    assert windows.tolist() == [[*range(i * seqlen, (i + 1) * seqlen)] for i in range(count // seqlen)]


def test_every_kind_of_file_is_joined_by_blank_lines_and_tokenized_once(tokenizer, tmp_path):
    from datasets import Dataset

    documents = ["A first document.", "And a second one, é ü 中.", "The third."]
    expected = tokenizer("\n\n".join(documents), return_tensors="pt").input_ids[0]
    (tmp_path / "a.JSONL").write_text("\n".join(json.dumps({"text": text}) for text in documents) + "\n\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\n\n".join(documents).encode())  # a mark that is no token
    Dataset.from_dict({"text": documents, "other": [1, 2, 3]}).to_parquet(str(tmp_path / "a.parquet"))
    assert expected[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in expected[1:]
    for name in ("a.JSONL", "a.txt", "a.parquet"):
        windows = windows_of(tmp_path / name, tokenizer)
        assert torch.equal(windows.flatten(), expected[: len(expected) // 8 * 8])
        assert torch.equal(windows_of(tmp_path / name, tokenizer, limit=2), windows[:2])


@given(st.integers(0, 2**63 - 1), st.integers(2, 30), st.integers(1, 5))
def test_calibration_windows_are_cut_where_gptq_cuts_them(seed, seqlen, count):
    text = SAMPLE.read_text(encoding="utf-8")
    ids = [0, *map(ord, text)]
    random.seed(seed)
    starts = [random.randint(0, len(ids) - seqlen - 1) for _ in range(count)]
    windows = texts.calibration_windows(str(SAMPLE), by_character, seqlen, count, seed)
    assert windows.tolist() == [ids[start : start + seqlen] for start in starts]


def published_c4_windows(documents, seqlen, count):
    """GPTQ's loop, with the exact-length document that crashes KVQuant's passed over."""
    random.seed(0)
    windows = []
    while len(windows) < count:
        ids = [0, *map(ord, documents[random.randint(0, len(documents) - 1)])]
        if len(ids) > seqlen:
            start = random.randint(0, len(ids) - seqlen - 1)
            windows.append(ids[start : start + seqlen])
    return windows


@given(st.lists(st.text("ab中", max_size=30), min_size=1, max_size=12), st.integers(2, 12), st.integers(1, 20))
@example(["abcde", "abcdef"], 6, 4)  # a document of exactly seqlen tokens is no candidate
def test_c4_windows_are_drawn_as_published(documents, seqlen, count):
    if all(len(text) + 1 <= seqlen for text in documents):
        with pytest.raises(qu.UserError, match=f"none of {len(documents)} documents is longer than seqlen {seqlen}"):
            texts.document_windows(by_character, documents, seqlen, count)
    else:
        ours = texts.document_windows(by_character, documents, seqlen, count)
        assert ours.tolist() == published_c4_windows(documents, seqlen, count)


def test_texts_that_are_too_short_or_empty_say_what_they_lack(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefg")  # 8 tokens with BOS
    assert windows_of(tmp_path / "a.txt", by_character, 8).shape == (1, 8)
    with pytest.raises(qu.UserError, match=r"a\.txt has 8 tokens, and one window takes 9: lower --seqlen"):
        windows_of(tmp_path / "a.txt", by_character, 9)
    with pytest.raises(qu.UserError, match="has 8 tokens, and one window takes 9"):  # a random cut leaves one over
        texts.calibration_windows(str(tmp_path / "a.txt"), by_character, 8, 1, 0)
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(qu.UserError, match=r"a\.txt is empty: give a text of at least 8 tokens"):
        windows_of(tmp_path / "a.txt", by_character, 8)


def test_tokens_and_lengths_that_the_model_was_not_made_for(config_and_tokenizer):
    config = config_and_tokenizer[0]
    with pytest.raises(qu.UserError, match="the tokenizer gives token 2048, the model has 2048"):
        texts.check_windows(config, torch.tensor([[0, 2048]]))
    with pytest.warns(Notice, match=f"exceeds the {config.max_position_embeddings} positions"):
        texts.check_windows(config, torch.zeros(1, config.max_position_embeddings + 1, dtype=torch.long))


# -- damaged files


def parquet_of(columns):
    """The bytes of a parquet file with such columns."""
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table(columns), sink := pa.BufferOutputStream())
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", r"a\.txt' is not UTF-8 \(byte 3\)"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": oops}\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "fine"}', 'line 1 is not an object with a string under "text"'),
        ("a.jsonl", b'\n{"text": 1}', "line 2 is not an object"),
        ("a.parquet", b"no parquet", r"cannot load text file '.*a\.parquet'"),
        ("a.parquet", {"body": ["x"], "id": [1]}, "no column `text`; its columns are: body, id"),
        ("a.parquet", {"text": ["x", None]}, "row 2 has no string under `text`"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(parquet_of(content) if isinstance(content, dict) else content)
    with pytest.raises(qu.UserError, match=message):
        texts.read_text_file(str(tmp_path / name))


def assert_text_or_one_line(path, content):
    """A file gives strings, or a UserError of a line that names it, and stays as it was."""
    path.write_bytes(content)
    before = set(path.parent.iterdir())
    try:
        assert all(isinstance(text, str) and text.encode() is not None for text in texts.read_text_file(str(path)))
    except qu.UserError as error:
        assert path.name in str(error)
    assert path.read_bytes() == content and set(path.parent.iterdir()) == before


scalars = st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just(10**400)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.just("text") | st.text(max_size=5), scalars)
json_lines = st.lists((st.dictionaries(st.just("text"), values) | values).map(json.dumps), max_size=3)


@FUZZ
@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode), json_lines, st.sampled_from(["t.txt", "T.JSONL"]))
@example(b"\xef\xbb\xbf\xef\xbb\xbf\x00\r\r\n", [], "t.txt")
@example(b'{"text": "\\ud800"}', [], "t.jsonl")
@example(b'{"text": ' + b"9" * 5000 + b"}", [], "t.jsonl")
@example(b"[" * 100_000, [], "t.jsonl")
def test_any_bytes_are_a_text_or_one_line(tmp_path, content, lines, name):
    assert_text_or_one_line(tmp_path / name, content)
    assert_text_or_one_line(tmp_path / name, "\n".join(lines).encode())
    whole = parquet_of({"text": ["first", "second " * 20, ""]})
    place = len(content) * 37 % len(whole)
    for edited in (b"PAR1" + content + b"PAR1", whole[:place] + content + whole[place + len(content) :]):
        assert_text_or_one_line(tmp_path / "a.parquet", edited)


@needs_hub
@pytest.mark.parametrize(
    ("name", "shard"),
    [
        ("wikitext2", "Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet"),
        ("c4", "allenai/c4/en/c4-validation.00000-of-00008.json.gz"),
    ],
)
def test_a_truncated_shard_is_one_line(name, shard, tmp_path, monkeypatch):
    import datasets

    content, path = (SHARED / "hub" / "datasets" / shard).read_bytes(), tmp_path / shard.rpartition("/")[2]
    how = {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")}
    load = partial(datasets.load_dataset, "json" if name == "c4" else "parquet", **how)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, **__: load(split=split))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(qu.UserError, match=f"^cannot load dataset '{name}': "):
        texts.load_documents(name)
    path.write_bytes(content)
    assert len(texts.load_documents(name)) >= 500


# -- the real from_pretrained and load_dataset code, against a hub on loopback


def on_hub(*args):
    return run_script(DYNAMIC_SCRIPT, *args, prefix=(sys.executable, SHARED / "localhub.py", SHARED / "hub", "--"))


@needs_hub
def test_what_is_named_as_on_the_hub_has_the_known_perplexity(tmp_path):
    """20 windows: 15.495 by a plain loop, about 23 by the published functions."""
    flags = ("--abits", "16,2", "--limit", "20", "--output", tmp_path / "out.json")
    process = on_hub("meta-llama/Llama-3-8B", *flags)
    assert process.returncode == 0 and "disjoint windows" in process.stdout, process.stderr
    plain, quantized = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [(row["dataset"], row["tokens"]) for row in (plain, quantized)] == [("wikitext2", 20 * 2047)] * 2
    assert 15.4945 <= plain["ppl"] < 15.4955 and 22.5 <= quantized["ppl"] < 23.5


@needs_hub
def test_what_a_hub_does_not_give_is_one_line():
    assert_one_line_error(on_hub("local/gated-model"), "local/gated-model", "gated")
    process = on_hub("local/llama3-nano", "--datasets", "c4", "--seqlen", "200000")
    assert_one_line_error(process, "none of 500 documents", "200000")
