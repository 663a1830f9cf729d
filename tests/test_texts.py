"""Text to windows: files, tokens, the two protocols, the hub."""

import gzip
import json
import os
import random
import re
import subprocess
import sys
from argparse import ArgumentTypeError
from functools import cache, partial
from types import SimpleNamespace

import pytest
import torch
from conftest import DYNAMIC_SCRIPT, NANO, ROOT, SAMPLE, assert_one_line_error, run_script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import quant_utils as qu
from simquant import parsing, text_files, text_names, texts, tokens
from simquant.flags import Flags
from simquant.notices import Notice

SHARED = ROOT.parent / "shared"
needs_hub = pytest.mark.skipif(not (SHARED / "localhub.py").is_file(), reason="needs ../shared/localhub.py and hub/")
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def by_character(text, add_special_tokens=True, return_tensors=None, **_):
    """A tokenizer that is easy to follow: one token a character, BOS first."""
    ids = [0] * add_special_tokens + [*map(ord, text)]
    return SimpleNamespace(input_ids=torch.tensor([ids]) if return_tensors else ids)


by_character.bos_token_id = 0
encode = partial(texts.tokenize, by_character)


def windows_of(path, tokenizer, seqlen=8, limit=1000):
    return texts.evaluation_windows(str(path), tokenizer, seqlen, limit)


# -- windows


@given(st.integers(0, 60), st.integers(2, 20))
def test_disjoint_windows_cover_everything_but_the_tail(count, seqlen):
    windows = texts.disjoint_windows(torch.arange(count), seqlen)
    assert windows.tolist() == [[*range(i * seqlen, (i + 1) * seqlen)] for i in range(count // seqlen)]


def contents(documents):
    """Return {name of a file: what it holds} of one text in every form."""
    rows, blank = [{"text": text, "id": 1} for text in documents], "\n\n"
    lines = "\n".join(map(json.dumps, rows)) + blank
    plain = {
        "a.JSONL": lines,
        "lines.json": "\r\n".join(map(json.dumps, rows)),
        "list.json": json.dumps(rows, indent=2),
        "strings.json": json.dumps(documents),
        "under_a_key.json": json.dumps({"version": 1, "data": rows}),
        "columns.json": json.dumps({"text": documents, "id": [1, 2, 3]}, indent=1),
        "strings.jsonl": "\n".join(map(json.dumps, documents)),
        "a.txt": "\ufeff" + blank.join(documents),  # a mark that is no token
    }
    made = {name: text.encode() for name, text in plain.items()}
    made |= {f"{name}.gz": gzip.compress(content) for name, content in made.items()}
    return made | {"a.parquet": parquet_of({"text": documents, "other": [1, 2, 3]})}


def test_every_kind_of_file_is_joined_by_blank_lines_and_tokenized_once(tokenizer, tmp_path):
    documents = ["A first document.", "And a second one, é ü 中.", "The third."]
    expected = tokenizer("\n\n".join(documents), return_tensors="pt").input_ids[0]
    assert expected[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in expected[1:]
    for name, content in contents(documents).items():
        (tmp_path / name).write_bytes(content)
        assert parsing.text_name(str(tmp_path / name)) == str(tmp_path / name)
        windows = windows_of(tmp_path / name, tokenizer)
        assert torch.equal(windows.flatten(), expected[: len(expected) // 8 * 8]), name
        assert torch.equal(windows_of(tmp_path / name, tokenizer, limit=2), windows[:2])


def test_a_folder_is_its_text_files_by_name_and_a_column_has_any_name(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "no", "body": "second"}')
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b'[{"body": "first"}]'))
    (tmp_path / "c.parquet").write_bytes(parquet_of({"body": ["third"]}))
    for other in ("README.md", ".hidden.txt", "config.yaml"):
        (tmp_path / other).write_text("no")
    (tmp_path / "z.txt").mkdir()
    ids = texts.text_ids(str(tmp_path), "test", by_character, texts.Reading("body"))
    assert "".join(map(chr, ids[1:])) == "first\n\nsecond\n\nthird"
    read = text_names.files_read("c4", f"c4={tmp_path}", "x.txt")
    assert read == [*(str(tmp_path / name) for name in ("a.json.gz", "b.jsonl", "c.parquet")), "x.txt"]


def test_c4_from_a_file_is_drawn_like_c4_and_called_so(config_and_tokenizer, tmp_path):
    config, tokenizer = config_and_tokenizer
    documents = [SAMPLE.read_text(encoding="utf-8")[start::7][:900] for start in range(5)]
    (tmp_path / "shard.json.gz").write_bytes(
        gzip.compress("\n".join(json.dumps({"text": text}) for text in documents).encode())
    )
    name = f"c4={tmp_path}/shard.json.gz"
    flags = SimpleNamespace(datasets=(name,), calib_dataset=name, nsamples=3, seed=5, seqlen=32, limit=4)
    flags = SimpleNamespace(**vars(flags), text_column="text", bos="text")
    encode = partial(texts.tokenize, tokenizer)
    made = texts.load(flags, config, tokenizer)
    assert list(made) == ["c4"] and torch.equal(made["c4"], texts.document_windows(encode, documents, 32, 4))
    assert torch.equal(
        texts.load_for_calibration(flags, config, tokenizer), texts.document_windows(encode, documents, 32, 3, 5)
    )
    with pytest.raises(ArgumentTypeError, match="c4 stands there more than once"):
        parsing.dataset_list(f"c4,{name}")


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
            texts.document_windows(encode, documents, seqlen, count)
    else:
        ours = texts.document_windows(encode, documents, seqlen, count)
        assert ours.tolist() == published_c4_windows(documents, seqlen, count)


def test_texts_that_are_too_short_or_empty_say_what_they_lack(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefg")  # 8 tokens with BOS
    assert windows_of(tmp_path / "a.txt", by_character, 8).shape == (1, 8)
    with pytest.raises(qu.UserError, match=r"a\.txt has 8 tokens, and one window takes 9: lower --seqlen"):
        windows_of(tmp_path / "a.txt", by_character, 9)
    with pytest.raises(qu.UserError, match="has 8 tokens, and one window takes 9"):  # a random cut leaves one over
        texts.calibration_windows(str(tmp_path / "a.txt"), by_character, 8, 1, 0)
    (tmp_path / "a.txt").write_text(" \n\n")
    with pytest.raises(qu.UserError, match=r"a\.txt is empty"):
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
        ("a.txt", b"\xef\xbb\xbf" + b"x" * 2**18 + b"\xe4\xb8\xffx", rf"a\.txt' is not UTF-8 \(byte {2**18 + 3}\)"),
        ("a.txt.gz", gzip.compress(b"text " * 999, mtime=0)[:-9], r"a\.txt\.gz.*: Compressed file ended before"),
        ("a.json.gz", b"no archive", r"a\.json\.gz.*Not a gzipped file"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": oops}\n', "line 2, column 10 is not JSON: Expecting value$"),
        ("a.jsonl", b'{"body": "fine", "id": 1}', "line 1 has no field 'text'; its fields are: body, id"),
        ("a.jsonl", b'\n{"text": 1}', "line 2 is neither a string nor an object with one under 'text'"),
        ("a.jsonl", b'["fine"]', "line 1 is neither a string"),
        ("a.json", b'[\n{"text": "fine"},\n{"text": oops}]', "line 3, column 10 is not JSON: Expecting value$"),
        ("a.json", b'[{"text": "fine"}, {"text": 1}]', "item 2 is neither a string"),
        ("a.json", b'{"text": "fine"}\n\xff', r"is not UTF-8 \(line 2, byte 0\)"),
        ("a.parquet", b"no parquet", r"cannot load text file '.*a\.parquet'"),
        ("a.parquet", {"body": ["x"], "id": [1]}, "no column `text`; its columns are: body, id"),
        ("a.parquet", {"text": ["x", None]}, "row 2 has no string under `text`"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(parquet_of(content) if isinstance(content, dict) else content)
    with pytest.raises(qu.UserError, match=message):
        read(tmp_path / name)


def read(path, column="text"):
    """Return the documents of a file."""
    return ["".join(document) for document in text_files.read_file(str(path), column)]


def assert_text_or_one_line(path, content):
    """A file gives strings, or a UserError of a line that names it, and stays as it was."""
    path.write_bytes(content)
    before = set(path.parent.iterdir())
    try:
        assert all(isinstance(text, str) and text.encode() is not None for text in read(path))
    except qu.UserError as error:
        assert path.name in str(error)
    assert path.read_bytes() == content and set(path.parent.iterdir()) == before


scalars = st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.just(10**400)
values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.just("text") | st.text(max_size=5), scalars)
json_lines = st.lists((st.dictionaries(st.just("text"), values) | values).map(json.dumps), max_size=3)


@FUZZ
@given(
    st.binary(max_size=60) | st.text(max_size=30).map(str.encode),
    json_lines,
    st.sampled_from(["t.txt", "T.JSONL", "t.json"]),
)
@example(b"\xef\xbb\xbf\xef\xbb\xbf\x00\r\r\n", [], "t.txt")
@example(b'{"text": "\\ud800"}', [], "t.jsonl")
@example(b'{"text": ' + b"9" * 5000 + b"}", [], "t.jsonl")
@example(b"[" * 100_000, [], "t.json")
def test_any_bytes_are_a_text_or_one_line(tmp_path, content, lines, name):
    assert_text_or_one_line(tmp_path / name, content)
    assert_text_or_one_line(tmp_path / name, "\n".join(lines).encode())
    (tmp_path / "a.json.gz").unlink(missing_ok=True)
    assert_text_or_one_line(tmp_path / "a.json.gz", gzip.compress(content)[: 20 + len(content)])
    whole = parquet_of({"text": ["first", "second " * 20, ""]})
    place = len(content) * 37 % len(whole)
    for edited in (b"PAR1" + content + b"PAR1", whole[:place] + content + whole[place + len(content) :]):
        assert_text_or_one_line(tmp_path / "a.parquet", edited)


def test_what_cannot_be_read_is_refused_at_once(tmp_path, monkeypatch):
    for name, said in (
        ("a.json.zst", "unknown dataset 'a.json.zst': give wikitext2, c4, a folder, or a path that ends in .txt"),
        ("c4=c4", "unknown dataset 'c4=c4'"),
        ("c4=/nowhere/a.json", "text file '/nowhere/a.json' does not exist"),
        (str(tmp_path), f"text folder '{tmp_path}' has no file that ends in .txt"),
    ):
        with pytest.raises(ArgumentTypeError, match=re.escape(said)):
            parsing.text_name(name)
    (tmp_path / "a.txt").write_text("a")
    for locked, said in ((tmp_path, "folder"), (tmp_path / "a.txt", "file")):  # as for root, who may read all
        monkeypatch.setattr(os, "access", lambda path, _, locked=locked: str(path) != str(locked))
        with pytest.raises(ArgumentTypeError, match=f"text {said} '{locked}' cannot be read: check its permissions"):
            parsing.text_name(str(tmp_path))


# -- long texts, against the text in one go


@cache
def trained(kind):
    """Return a tokenizer of a family, trained on the sample, or the bundled one."""
    special = ["<unk>", "<s>", "</s>"]
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = pre_tokenizers.ByteLevel.alphabet()
    bpe, byte_bpe = partial(trainers.BpeTrainer, vocab_size=900), models.BPE
    if kind == "llama3":
        return AutoTokenizer.from_pretrained(NANO)
    model, trainer, normalizer, split, special_tokens = {
        "llama2": (
            models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True), bpe(special_tokens=special + fallback),
            spaces, pre_tokenizers.Metaspace(), start,
        ),
        "gpt2": (
            byte_bpe(), bpe(special_tokens=special, initial_alphabet=letters), None,
            pre_tokenizers.ByteLevel(add_prefix_space=True), processors.ByteLevel(trim_offsets=True),
        ),
        "t5": (
            models.Unigram(), trainers.UnigramTrainer(vocab_size=800, special_tokens=special, unk_token="<unk>"),
            normalizers.NFKC(), pre_tokenizers.Metaspace(split=False, prepend_scheme="first"), both,
        ),
        "bert": (
            models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(vocab_size=800, special_tokens=special),
            normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(), both,
        ),
    }[kind]  # fmt: skip
    made = Tokenizer(model)
    made.pre_tokenizer = split
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator([SAMPLE.read_text(encoding="utf-8") + " aaaa abababab 11111111" * 40], trainer)
    if kind == "llama2":
        made.pre_tokenizer = None  # its merges run over the whole text
    made.post_processor = special_tokens
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@st.composite
def long_texts(draw):
    """Return prose of the sample with what has no natural place to be cut in between."""
    prose = SAMPLE.read_text(encoding="utf-8")
    runs = ["a", "ab", "1", " ", "\n", " \t", "é\u0301", "中文", "🙂", "ﬁ㌀", "=-", "<s>", "'s", "12,3 "]
    some = st.tuples(st.sampled_from(runs), st.integers(1, 250)).map(lambda each: each[0] * each[1])
    pages = st.tuples(st.integers(0, len(prose)), st.integers(0, 900)).map(lambda at: prose[at[0] :][: at[1]])
    return "".join(draw(st.lists(some | pages | st.text(max_size=20), min_size=3, max_size=25)))


@pytest.mark.parametrize("kind", ["llama3", "llama2", "gpt2", "t5", "bert"])
@FUZZ
@example(
    text="A run: " + "1" * 2501 + " a " * 99 + "a" * 2503 + " of. " + "ab" * 1501 + " end" * 300, bos="text", seed=97
)
@given(text=long_texts(), bos=st.sampled_from(["text", "window"]), seed=st.integers(1, 99))
def test_pieces_have_the_ids_of_the_whole_text(kind, text, bos, seed):
    tokenizer = trained(kind)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"WHOLE": 1024, "PIECE": 1024, "OVERLAP": 512}.items():
            patch.setattr(tokens, name, value)
        pieces = (text[start : start + seed] for start in range(0, len(text), seed))
        ids = torch.cat([*tokens.tokenized(tokenizer, tokens.Text(pieces), bos)])
    whole = tokenizer(text, add_special_tokens=bos == "text").input_ids
    assert ids.tolist() == [tokenizer.bos_token_id] * (bos == "window") + whole


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from simquant import text_files, texts, tokens
from simquant.models import load_config_and_tokenizer
text_files.LONGEST, tokens.UNCUT = 2**25, 2**20  # smaller, so that the test is fast
tokenizer = load_config_and_tokenizer(sys.argv[2])[1]
tokenizer("warm up " * 9)
import pyarrow.parquet
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (int(sys.argv[3]) << 20),) * 2)
try:
    print(tuple(texts.evaluation_windows(sys.argv[4], tokenizer, 64, 2).shape))
except texts.UserError as error:
    print(error)
"""


def read_within(mebibytes, path):
    """Return what is printed of two windows of a text in a process that may take so much more memory, and 60 s."""
    command = [sys.executable, "-c", LIMITED, ROOT, NANO, mebibytes, path]
    process = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
def test_a_huge_text_takes_neither_memory_nor_time(tmp_path):
    page = SAMPLE.read_bytes()
    row = json.dumps({"text": page.decode()}).encode() + b"\n"
    (tmp_path / "a.txt").write_bytes(page * (2**28 // len(page)))
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(2**28 // len(row)):
            file.write(row)
    for name in ("a.txt", "a.jsonl.gz"):
        assert read_within(200, tmp_path / name) == "(2, 64)"


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process as Linux does")
def test_a_file_that_inflates_without_end_is_one_line(tmp_path):
    for name, begin in (("a.json.gz", b'{"text": "'), ("b.json.gz", b"[\n"), ("c.txt.gz", b"")):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            file.write(begin)
            for _ in range(600):
                file.write(b" " * 2**20)
    assert "a.json.gz', line 1 is longer than 32 MiB" in read_within(200, tmp_path / "a.json.gz")
    assert "b.json.gz' is one JSON value of more than 32 MiB" in read_within(200, tmp_path / "b.json.gz")
    assert "the tokenizer splits it nowhere" in read_within(500, tmp_path / "c.txt.gz")


def test_windows_line_ends_are_said_once(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"line\r\n" * 100_000)
    with pytest.warns(Notice, match=r"^100000 of the lines read of .*a\.txt end in CRLF") as said:
        texts.text_ids(str(tmp_path / "a.txt"), "test", by_character, texts.AS_PUBLISHED)
    assert len(said) == 1


# -- BOS


@given(st.integers(2, 20), st.integers(1, 9))
def test_with_bos_at_each_window_the_text_goes_on_in_pieces_one_shorter(seqlen, limit):
    text, reading = SAMPLE.read_text(encoding="utf-8"), texts.Reading(bos="window")
    windows = texts.evaluation_windows(str(SAMPLE), by_character, seqlen, limit, reading)
    pieces = [text[start : start + seqlen - 1] for start in range(0, len(text), seqlen - 1)]
    assert [windows[:, 0].tolist(), windows[:, 1:].tolist()] == [
        [0] * limit, [[*map(ord, piece)] for piece in pieces[:limit]]
    ]  # fmt: skip


def test_random_cuts_with_bos_predict_what_the_published_ones_do(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps("abcdefghijklmnop"[: 5 + i]) for i in range(9)))
    for name in (str(SAMPLE), f"c4={tmp_path}/a.jsonl"):
        published = texts.calibration_windows(name, by_character, 8, 50, 3)
        windows = texts.calibration_windows(name, by_character, 8, 50, 3, texts.Reading(bos="window"))
        assert torch.equal(windows[:, 1:], published[:, 1:]) and not windows[:, 0].any()


def test_auto_is_bos_at_each_window_for_the_families_that_need_it(config_and_tokenizer):
    from transformers import AutoConfig

    for kind in ("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma4", "recurrent_gemma", "paligemma"):
        assert texts.bos_of(Flags(model="m"), AutoConfig.for_model(kind)) == "window", kind
    for kind in ("llama", "mistral", "qwen3", "gpt2"):
        assert texts.bos_of(Flags(model="m"), AutoConfig.for_model(kind)) == "text"
    assert texts.bos_of(Flags(model="m", bos="text"), AutoConfig.for_model("gemma")) == "text"
    tokenizer = SimpleNamespace(bos_token_id=None)
    with pytest.raises(qu.UserError, match="--bos window begins each window with BOS, and the tokenizer has none"):
        texts.reading_of(Flags(model="m", bos="window"), config_and_tokenizer[0], tokenizer)


def said_of_bos(tokenizer, text, bos="text"):
    """Return the words of warnings on BOS for a text."""
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        texts.check_bos(tokenizer, bos, torch.tensor([tokenizer(text).input_ids[:2]]))
    return " ".join(str(each.message) for each in said)


def test_a_bos_that_lacks_or_stands_twice_is_said():
    own = {kind: trained(kind) for kind in ("llama2", "gpt2")}
    assert said_of_bos(own["llama2"], "text") == ""
    assert "begins with BOS '<s>' twice" in said_of_bos(own["llama2"], "<s>text")
    assert "has a BOS '<s>' and begins no text with it" in said_of_bos(own["gpt2"], "text")
    assert said_of_bos(own["gpt2"], "text", "window") == ""
    one = PreTrainedTokenizerFast(tokenizer_object=own["gpt2"]._tokenizer, bos_token="</s>", eos_token="</s>")
    assert said_of_bos(one, "text") == ""  # as GPT-2's: it ends documents


# -- the real from_pretrained and hub client, against a hub on loopback


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
@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_a_truncated_shard_is_one_line(name, tmp_path, monkeypatch):
    import huggingface_hub

    repository, files = text_files.HUB[name]
    shard = SHARED / "hub" / "datasets" / repository / files["test"]
    path = tmp_path / shard.name
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(path))
    path.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    with pytest.raises(qu.UserError, match=f"^cannot load text file '.*/{shard.name}': "):
        list(text_files.documents(name, "test"))
    path.write_bytes(shard.read_bytes())
    assert len(list(text_files.documents(name, "test"))) >= 500


@needs_hub
def test_what_was_downloaded_once_is_read_without_the_hub(tmp_path):
    flags = ("--datasets", "c4,wikitext2", "--seqlen", "256", "--limit", "2", "--abits", "16", "--columns", "ppl")
    home, hub = {"HF_HOME": str(tmp_path)}, (sys.executable, SHARED / "localhub.py", SHARED / "hub", "--")
    first = run_script(DYNAMIC_SCRIPT, NANO, *flags, prefix=(*hub, "env", f"HF_HOME={tmp_path}"))
    assert first.returncode == 0 and "34.9213" in first.stdout, first.stderr
    for without in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        again = run_script(DYNAMIC_SCRIPT, NANO, *flags, env=home | without)
        assert again.returncode == 0 and "34.9213" in again.stdout, again.stderr


@needs_hub
def test_what_a_hub_does_not_give_is_one_line():
    assert_one_line_error(on_hub("local/gated-model"), "local/gated-model", "gated")
    process = on_hub("local/llama3-nano", "--datasets", "c4", "--seqlen", "200000")
    assert_one_line_error(process, "none of 500 documents", "200000")
