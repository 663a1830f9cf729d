"""Bits per byte and word perplexity: lm-evaluation-harness's figures, and what each token adds to a text's size."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import SAMPLE, measured
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from simquant import text_units
from simquant.texts import Reading, evaluation_windows

SPACES = " \n\t\u3000\u00a0\u2028"  # of one byte, of two and of three
TEXTS = st.text(st.one_of(st.sampled_from(SPACES + "aé語😀\ufffd"), st.characters(codec="utf-8")), min_size=1)
MIXED = "Größe,  naïve\u3000日本語 😀😀 x\n\nword\ufffd end. ለማ 😀"


def sizes_of(tokenizer, *windows):
    """The bytes and words of windows of ids, None where they are not known."""
    found = text_units.text_sizes(tokenizer, torch.tensor(windows))
    return None if found is None else found.tolist()


def ids_of(tokenizer, text):
    """The ids of text without special ones."""
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.fixture(scope="module")
def documents():
    """Parts of the bundled text that begin and end with a word: a harness counts an empty word beside a space."""
    text = SAMPLE.read_text(encoding="utf-8")
    return [text[:1500].strip(), text[5000:5700].strip(), text[9000:12000].strip() + " 日本 Größe"]


def test_figures_are_those_of_the_harness(tmp_path, model, tokenizer, documents):
    lm_eval = pytest.importorskip("lm_eval", reason="compares with lm-evaluation-harness: pip install lm_eval")
    from lm_eval.models.huggingface import HFLM

    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    names = ("word_perplexity", "byte_perplexity", "bits_per_byte")
    task = {
        "task": "ours", "dataset_path": "json", "test_split": "train", "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": str(data), "cache_dir": str(tmp_path)},
        "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": name} for name in names],
    }  # fmt: skip
    harness = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=False)  # it puts BOS before a text in any case
    known = lm_eval.simple_evaluate(model=harness, tasks=[task], bootstrap_iters=0)["results"]["ours"]

    nll, sizes = 0.0, torch.zeros(2)
    for number, document in enumerate(documents):
        path = tmp_path / f"{number}.txt"
        path.write_text(document, encoding="utf-8")
        seqlen = 1 + len(ids_of(tokenizer, document))
        windows = evaluation_windows(str(path), tokenizer, seqlen, 1, Reading(bos="window"))
        nll += measured(model, windows, {})[0, 0, 0].item() * (seqlen - 1)
        sizes += text_units.text_sizes(tokenizer, windows)[0]
    bits, words = text_units.bits_per_byte(nll, sizes[0].item()), text_units.word_perplexity(nll, sizes[1].item())
    assert bits == pytest.approx(known["bits_per_byte,none"], rel=1e-6)
    assert 2**bits == pytest.approx(known["byte_perplexity,none"], rel=1e-6)
    assert words == pytest.approx(known["word_perplexity,none"], rel=1e-6)


@given(TEXTS)
def test_a_window_that_predicts_a_whole_text_has_its_size(tokenizer, text):
    ids = ids_of(tokenizer, text)
    assume(not {*ids} & {*tokenizer.all_special_ids})
    assert sizes_of(tokenizer, [tokenizer.bos_token_id, *ids]) == [[len(text.encode()), len(text.split())]]


@given(TEXTS, st.integers(2, 5))
def test_windows_add_up_to_the_text_less_their_first_tokens(tokenizer, text, seqlen):
    ids = [tokenizer.bos_token_id, *ids_of(tokenizer, text)]
    assume(not {*ids[1:]} & {*tokenizer.all_special_ids} and len(ids) >= seqlen)
    ids = ids[: len(ids) // seqlen * seqlen]
    single = sizes_of(tokenizer, *itertools.pairwise(ids))  # of each token after the one before it
    first = [single[at - 1] for at in range(seqlen, len(ids), seqlen)]
    windows = sizes_of(tokenizer, *(ids[at : at + seqlen] for at in range(0, len(ids), seqlen)))
    (whole,) = sizes_of(tokenizer, ids)
    assert sum(each[0] for each in windows + first) == whole[0]
    if text.isascii():  # where a character is complete is known to its own window alone
        assert sum(each[1] for each in windows + first) == whole[1]


def test_special_tokens_have_no_bytes_and_separate_words(tokenizer):
    bos, eos, (one,) = tokenizer.bos_token_id, tokenizer.eos_token_id, ids_of(tokenizer, "a")
    assert sizes_of(tokenizer, [bos, one, eos, one], [one, one, one, one], [one, bos, eos, bos]) == [
        [2, 2], [3, 0], [0, 0]
    ]  # fmt: skip


def trained(model, trainer, **parts):
    """A tokenizer of the tokenizers library, trained on a text that has all of MIXED but its rare letters."""
    made = Tokenizer(model)
    for name, part in parts.items():
        setattr(made, name, part)
    made.train_from_iterator([SAMPLE.read_text(encoding="utf-8")], trainer)
    return made


def wrapped(made, **special):
    """That tokenizer as transformers has it."""
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **special)


def gemma_like():
    """Spaces are U+2581, nothing is put before a text, and bytes stand for what the vocabulary lacks."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False)
    decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made = trained(model, trainer, normalizer=normalizers.Replace(" ", "▁"), decoder=decoder)
    state = json.loads(made.to_str())
    state["added_tokens"] = [each for each in state["added_tokens"] if not each["content"].startswith("<0x")]
    return wrapped(Tokenizer.from_str(json.dumps(state)), unk_token="<unk>")


def metaspace(unknown="<unk>"):
    """SentencePiece's unigram model, which puts a space before a text and has a token for what it lacks."""
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    parts = {"pre_tokenizer": pre_tokenizers.Metaspace(), "decoder": decoders.Metaspace()}
    return wrapped(trained(models.Unigram(), trainer, **parts), unk_token=unknown)


def word_piece():
    """BERT's, which drops spaces and cases."""
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False, continuing_subword_prefix="##"
    )
    parts = {"pre_tokenizer": pre_tokenizers.Whitespace(), "decoder": decoders.WordPiece()}
    return wrapped(trained(models.WordPiece(unk_token="<unk>"), trainer, **parts), unk_token="<unk>")


@pytest.mark.parametrize("cut", range(4))
def test_bytes_that_stand_for_rare_letters_count_each(cut):
    tokenizer = gemma_like()
    ids = ids_of(tokenizer, MIXED)
    assert any(token.startswith("<0x") for token in tokenizer.convert_ids_to_tokens(ids))
    window = [tokenizer.bos_token_id, *ids[: len(ids) - cut]]  # the last letter is of four bytes
    assert sizes_of(tokenizer, window) == [[len(MIXED.encode()) - cut, len(MIXED.split()) - bool(cut)]]


def test_windows_may_begin_and_end_inside_a_letter():
    tokenizer = gemma_like()
    ids = ids_of(tokenizer, MIXED)
    lengths = [1 if token.startswith("<0x") else len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    for first, last in itertools.combinations(range(len(ids)), 2):
        assert sizes_of(tokenizer, ids[first : last + 1])[0][0] == sum(lengths[first + 1 : last + 1])
    assert tokenizer.convert_ids_to_tokens(ids[2:4]) == ["<0xC3>", "<0xB6>"]  # of the first word
    assert sizes_of(tokenizer, ids[3:7], ids[:4]) == [[3, 0], [3, 0]]


def test_a_space_before_the_text_is_one_byte_and_unknown_text_has_no_size():
    tokenizer, text = metaspace(), "The lighthouse is a tower"
    ids = [tokenizer.bos_token_id, *ids_of(tokenizer, text)]
    assert sizes_of(tokenizer, ids) == [[1 + len(text), 5]]
    assert sizes_of(tokenizer, [tokenizer.bos_token_id, *ids_of(tokenizer, "a 日 b")]) is None


def test_tokens_that_do_not_spell_their_text_have_no_size():
    tokenizer = word_piece()
    window = [tokenizer.bos_token_id, *ids_of(tokenizer, "The lighthouse is a tower")]
    alone = window[:2] + window[:1] * (len(window) - 2)  # a word that the decoder joins with no other
    assert sizes_of(tokenizer, alone) is not None and sizes_of(tokenizer, alone, window) is None


def test_what_was_added_to_a_byte_level_vocabulary_is_its_own_text(tokenizer):
    made = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    made.add_tokens([AddedToken("日本 語", normalized=False), AddedToken("<think>", normalized=False)])
    added = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<|begin_of_text|>")
    text = "so 日本 語 <think>\n ok"
    ids = ids_of(added, text)
    assert max(ids) == len(tokenizer) + 1
    assert sizes_of(added, [0, *ids]) == [[len(text.encode()), len(text.split())]]


def test_an_end_of_text_that_is_the_unknown_token_too_is_special(tokenizer):
    end = "<|end_of_text|>"
    named = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token=end, unk_token=end)
    assert sizes_of(named, ids_of(named, f"one two{end}three")) == [[9, 2]]


def test_a_letter_that_byte_level_vocabularies_use_for_a_space_is_itself_elsewhere():
    vocabulary = {"<s>": 0, "</s>": 1, **{letter: number for number, letter in enumerate("ĠaĊb▁", 2)}}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    assert sizes_of(wrapped(made), [0, *ids_of(wrapped(made), "ĠaĊb")]) == [[6, 1]]


def test_ratios_of_windows_and_their_errors():
    draw = np.random.default_rng(0)
    sizes = draw.integers(50, 150, 40).astype(float)
    losses = 2 * sizes + draw.normal(0, 9, 40)
    ratio, error = text_units.ratio_with_error(losses.tolist(), sizes.tolist())
    assert ratio == pytest.approx(losses.sum() / sizes.sum())
    covariance = np.cov(losses, sizes)
    variance = covariance[0, 0] - 2 * ratio * covariance[0, 1] + ratio**2 * covariance[1, 1]
    assert error == pytest.approx(math.sqrt(variance / 40) / sizes.mean())
    left_out = [(losses.sum() - one) / (sizes.sum() - size) for one, size in zip(losses, sizes, strict=True)]
    assert error == pytest.approx(np.std(left_out) * math.sqrt(39), rel=0.05)  # the jackknife's
    assert text_units.ratio_with_error([3.0], [2.0]) == (1.5, None)
    assert math.isnan(text_units.ratio_with_error([3.0, 1.0], [0, 0])[0])


def test_figures_by_hand():
    assert text_units.bits_per_byte(math.log(2) * 12, 4) == pytest.approx(3)
    assert text_units.word_perplexity(math.log(7) * 3, 3) == pytest.approx(7)
    assert text_units.word_perplexity(1e6, 10) == math.inf and math.isnan(text_units.word_perplexity(1.0, 0))
