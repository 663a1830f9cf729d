"""Text to windows: files, tokens, the two protocols."""

import json
import random

import pytest
import torch
from conftest import SAMPLE
from hypothesis import given
from hypothesis import strategies as st

import quant_utils as qu


def words(text):
    """A tokenizer that is easy to follow: one token a character, BOS first."""
    return torch.tensor([0, *map(ord, text)])


@given(st.integers(0, 60), st.integers(2, 20))
def test_disjoint_windows_cover_everything_but_the_tail(count, seqlen):
    ids = torch.arange(count)
    windows = qu.disjoint_windows(ids, seqlen)
    assert windows.shape == (count // seqlen, seqlen)
    assert torch.equal(windows.flatten(), ids[: count // seqlen * seqlen])


def test_bos_stands_only_at_the_very_start(tokenizer, windows):
    assert windows[0, 0] == tokenizer.bos_token_id
    assert (windows == tokenizer.bos_token_id).sum() == 1


def test_documents_are_joined_by_a_blank_line_and_tokenized_once(tokenizer, tmp_path):
    documents = ["A first document.", "And a second one, é ü 中.", "The third."]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents) + "\n\n")
    spec = qu.EvalSpec((str(tmp_path / "rows.jsonl"),), seqlen=8)
    expected = tokenizer("\n\n".join(documents), return_tensors="pt").input_ids[0]
    windows = qu.load_windows(spec.datasets[0], tokenizer, spec)
    assert torch.equal(windows.flatten(), expected[: len(expected) // 8 * 8])


def test_txt_jsonl_and_parquet_of_the_same_text_give_the_same_windows(tokenizer, windows, tmp_path):
    from datasets import Dataset

    text = SAMPLE.read_text(encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "a.txt").write_text("\ufeff" + text, encoding="utf-8")  # a byte-order mark is no token
    Dataset.from_dict({"text": [text], "other": [1]}).to_parquet(str(tmp_path / "a.parquet"))
    for name in ("a.jsonl", "a.txt", "a.parquet"):
        path = str(tmp_path / name)
        assert torch.equal(qu.load_windows(path, tokenizer, qu.EvalSpec((path,), seqlen=512)), windows)


def test_limit_takes_the_first_windows(tokenizer, windows):
    spec = qu.EvalSpec((str(SAMPLE),), seqlen=512, limit=3)
    assert torch.equal(qu.load_windows(str(SAMPLE), tokenizer, spec), windows[:3])


def published_c4_windows(documents, encode, seqlen, count):
    """GPTQ's loop, with the exact-length document that crashes KVQuant's passed over."""
    random.seed(0)
    windows = []
    for _ in range(count):
        while True:
            i = random.randint(0, len(documents) - 1)
            ids = encode(documents[i])
            if len(ids) > seqlen:
                break
        start = random.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return torch.stack(windows)


@given(st.lists(st.text("ab中", max_size=30), min_size=1, max_size=12), st.integers(2, 12), st.integers(1, 20))
def test_c4_windows_are_drawn_as_published(documents, seqlen, count):
    if not any(len(words(text)) > seqlen for text in documents):
        with pytest.raises(qu.UserError, match=f"none of {len(documents)} documents is longer than seqlen {seqlen}"):
            qu.sample_documents(documents, words, seqlen, count)
        return
    expected = published_c4_windows(documents, words, seqlen, count)
    assert torch.equal(qu.sample_documents(documents, words, seqlen, count), expected)


def test_a_c4_document_of_exactly_seqlen_tokens_is_no_candidate():
    windows = qu.sample_documents(["abcde", "abcdef"], words, 6, 4)
    assert torch.equal(windows, words("abcde").expand(4, 6))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9", "not UTF-8 .byte 3"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": oops}\n', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "fine"}', 'line 1 .* "text"'),
        ("a.jsonl", b'"just a string"', "line 1"),
        ("a.parquet", b"no parquet", "a.parquet"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(qu.UserError, match=message):
        qu.read_text_file(str(tmp_path / name))


def test_a_parquet_without_the_column_names_those_it_has(tmp_path):
    from datasets import Dataset

    Dataset.from_dict({"body": ["x"], "id": [1]}).to_parquet(str(tmp_path / "a.parquet"))
    with pytest.raises(qu.UserError, match="no column `text`; its columns are: body, id"):
        qu.read_text_file(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seqlen": 1}, "seqlen must be at least 2, got 1"),
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"batch_size": -3}, "batch_size must be at least 1, got -3"),
        ({"datasets": ("wiki",)}, "unknown dataset 'wiki'"),
        ({"datasets": ("c4", "c4")}, "c4 more than once"),
    ],
)
def test_a_bad_evaluation_spec_names_the_field_and_the_value(fields, message):
    with pytest.raises(qu.UserError, match=message):
        qu.EvalSpec(**fields)
