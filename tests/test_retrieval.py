"""Retrieval: needles where they belong, scores of a plain forward pass, and a model made by hand that finds them."""

import re
from types import SimpleNamespace

import copy_model
import pytest
import torch
from conftest import CALIBRATED_SCRIPT, DYNAMIC_SCRIPT, NANO, SAMPLE, assert_one_line_error, run_script
from hypothesis import given
from hypothesis import settings as trials
from hypothesis import strategies as st

import quant_utils as qu
from quant_utils import ScalarQuantizer, UserError
from simquant import calibration, needles, processes, retrieval, retrieval_tables, tables
from simquant.plans import Pair, Plan, Row, Width
from simquant.plots import save_figure
from simquant.sites import find_sites

UNQUANTIZED = Row("unquantized", 16, "nothing")
AXES = {"keys": "channel", "values": "token"}


def asked(retrieval=2, lengths=(128, 256), depths=(0, 50, 100), bos="text"):
    """Flags of a run."""
    return SimpleNamespace(
        retrieval=retrieval, retrieval_lengths=lengths, retrieval_depths=depths, seqlen=512, bos=bos, text_column="text"
    )


@pytest.fixture(scope="module")
def copying():
    """(tokenizer, the model that copies, 4000 words that needles are hidden in)."""
    tokenizer = copy_model.copy_tokenizer()
    words = torch.tensor(tokenizer(" ".join(copy_model.HAY)).input_ids)
    return tokenizer, copy_model.copy_model(len(tokenizer)), words[torch.randint(len(words), (1, 4000))]


def found(cells, kind):
    """The share of a kind's answers that are found."""
    shares = [cell["exact_match"] for cell in cells if cell["kind"] == kind]
    return sum(shares) / len(shares)


def test_a_model_that_can_retrieve_does_and_fewer_bits_find_less(copying):
    tokenizer, model, words = copying
    prompts = needles.prompts(asked(), model.config, tokenizer, {"words": words})
    sites = find_sites(model)
    settings = {UNQUANTIZED: {}}
    settings |= Plan([Pair("uniform", "uniform")], [Width(b, b) for b in (5, 4, 3)], AXES, {}).settings(sites)
    rows = retrieval.measure(model, sites, prompts, settings, 4)
    for kind in needles.KINDS:
        shares = [found(cells, kind) for cells in rows.values()]
        assert shares[:2] == [1, 1] and shares == sorted(shares, reverse=True) and 0 == shares[3] < shares[2] < 1
    assert all(cell["exact_match"] == 1 for cell in rows[UNQUANTIZED])  # at every depth and length, of both kinds
    text = tables.text_of(retrieval_tables.table_of([{**r._asdict(), "retrieval": c} for r, c in rows.items()]))
    assert re.search(r"passkey +128 +16 +100% +100% +100% 100.0%", text)
    latest = dict.fromkeys(sites, ScalarQuantizer("token", 2, recent=256))  # the whole prompt stays exact
    short = [each for each in prompts if each.length == 128]
    (near,) = retrieval.measure(model, sites, short, {Row("uniform", 2, "all"): latest}, 1).values()
    assert {cell["exact_match"] for cell in near} == {1}


@torch.inference_mode()
def plain(model, prompt, setting):
    """(loss of the answer, whether it is found), by the model's own whole logits."""
    with qu.quantized(setting):
        logits = model(prompt.ids[None]).logits[0, -prompt.answer - 1 : -1].double()
    target = prompt.ids[-prompt.answer :]
    loss = -logits.log_softmax(-1).gather(1, target[:, None]).mean().item()
    return loss, bool((logits.argmax(-1) == target).all())


def test_scores_are_those_of_a_plain_forward_pass_with_calibrated_quantizers_too(model, tokenizer, windows):
    """On the bundled model; in the same order whatever the batch, and twice the same."""
    prompts = needles.prompts(asked(1, (128, 192), (0, 100)), model.config, tokenizer, {"sample": windows})
    sites = find_sites(model)
    fitted = calibration.calibrate(model, windows[:2], {3: dict.fromkeys(sites, ScalarQuantizer("channel", 3, "nuq"))})[
        3
    ]
    settings = {UNQUANTIZED: {}, Row("nuq", 3, "keys and values"): fitted}
    rows = retrieval.measure(model, sites, prompts, settings, 1)
    again = retrieval.measure(
        model,
        sites,
        needles.prompts(asked(1, (128, 192), (0, 100)), model.config, tokenizer, {"sample": windows}),
        settings,
        1,
    )
    assert rows == again
    cells = {row: {(c["kind"], c["length"], c["depth"]): c for c in each} for row, each in rows.items()}
    for prompt in prompts:
        base, _ = plain(model, prompt, {})
        for row, setting in settings.items():
            cell = cells[row][prompt.kind, prompt.length, prompt.depth]
            loss, is_found = plain(model, prompt, setting)
            assert cell["nll"] == pytest.approx(loss, rel=1e-4) and cell["exact_match"] == is_found
            assert cell["delta_nll"] == pytest.approx(loss - base, abs=1e-4) and cell["delta_nll_se"] is None


@trials(max_examples=25)
@given(st.integers(128, 400), st.integers(0, 100), st.integers(1, 3), st.sampled_from(["text", "window"]))
def test_prompts_have_their_length_their_depth_and_the_answer_once(tokenizer, windows, length, depth, count, bos):
    config = SimpleNamespace(max_position_embeddings=4096, model_type="llama")
    config.get_text_config = lambda: config
    made = needles.prompts(asked(count, (length,), (depth,), bos), config, tokenizer, {"sample": windows})
    assert len(made) == 2 * count
    for prompt in made:
        ids = prompt.ids
        assert len(ids) == length and ids[0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1
        text = tokenizer.decode(ids, skip_special_tokens=True)
        numbers = re.findall(r"The secret number of the (\w+) is (\d{5})\.", text)
        assert len(numbers) == needles.KINDS[prompt.kind] == len({each for _, each in numbers})
        (key,) = re.findall(r"What is the secret number of the (\w+)\?", text)
        answer = dict(numbers)[key]
        assert text.count(answer) == 2 and text.endswith(f"The secret number of the {key} is {answer}")
        assert tokenizer.decode(ids[-prompt.answer :]).strip() == answer
        needle = tokenizer(f"\nThe secret number of the {key} is {answer}.\n", add_special_tokens=False).input_ids
        pieces = [piece.tolist() for piece in prompt.pieces[1:-1]]
        hay = [0 if "secret number" in tokenizer.decode(piece) else len(piece) for piece in pieces]
        assert sum(hay[: pieces.index(needle)]) == round(depth * sum(hay) / 100)


def test_lengths_that_cannot_be_are_said(tokenizer, model, windows):
    for flags, said in (
        (asked(1, (64,)), "64 tokens do not hold needles and question, which take"),
        (asked(1, (10**6,)), "a needle in 1000000 tokens exceeds the model's"),
        (asked(1, (2000,)), "sample gives 998 tokens, and a needle in 2000 takes"),
    ):
        with pytest.raises(UserError, match=said):
            needles.prompts(flags, model.config, tokenizer, {"sample": windows[:1].repeat(1, 2)[:, :1000]})


def test_processes_share_the_prompts_and_all_have_all(copying, monkeypatch):
    """As three processes would: each measures its part, and what the others have is handed to it."""
    tokenizer, model, words = copying
    prompts = needles.prompts(asked(3, (128,), (0, 100)), model.config, tokenizer, {"words": words})
    settings = {
        UNQUANTIZED: {},
        Row("uniform", 4, "all"): dict.fromkeys(find_sites(model), ScalarQuantizer("token", 4)),
    }
    whole, shares = retrieval.measure(model, find_sites(model), prompts, settings, 2), []
    monkeypatch.setattr(processes, "count", lambda: 3)
    monkeypatch.setattr(processes, "interleave", lambda parts: shares.append(parts) or parts)
    monkeypatch.setattr(retrieval, "cells", lambda *given: None)
    for number in range(3):
        monkeypatch.setattr(processes, "index", lambda number=number, **_: number)
        retrieval.measure(model, find_sites(model), prompts, settings, 2)
    monkeypatch.undo()
    scores = torch.empty(len(prompts), 2, 2, dtype=torch.float64)
    for number, share in enumerate(shares):
        scores[number::3] = share[128]
    for row, cells in retrieval.cells(prompts, scores, list(settings)).items():
        for cell, known in zip(cells, whole[row], strict=True):
            assert cell == pytest.approx(known, abs=1e-6)


@pytest.mark.parametrize("count", [1, 5, 12])
def test_maps_and_tables_hold_what_rows_have(tmp_path, count):
    def cells(shift, lengths):
        return [
            {"kind": kind, "length": n, "depth": d, "needles": 2, "nll": 1.0, "delta_nll": shift, "delta_nll_se": None,
             "exact_match": 0.5, "exact_match_se": 0.1}
            for kind in needles.KINDS for n in lengths for d in (0, 100)
        ]  # fmt: skip

    rows = [{**UNQUANTIZED._asdict(), "retrieval": cells(0.0, (128, 512))}]
    rows += [
        {**Row(f"$x_{n}", 4, "keys and values")._asdict(), "retrieval": cells(0.1, (128,))} for n in range(count - 1)
    ]
    figure = retrieval_tables.draw_retrieval(rows, "a title")
    save_figure(str(tmp_path / "a.png"), figure)
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert len(words) == 2 * (4 + 2 * (count - 1)) and words[0] == "50%"  # the unquantized row has no difference
    assert {*words} <= {"50%", "50%\n+0.10"}
    table = retrieval_tables.table_of(rows)
    assert len(table.rows) == 2 * (2 + count - 1) and {len(line) for line in table.rows} == {len(table.headings)}


def test_a_run_retrieves_prints_saves_draws_and_resumes(tmp_path):
    command = (DYNAMIC_SCRIPT, NANO, "--datasets", SAMPLE, "--seqlen", "256", "--limit", "3", "--kv_format", "q4_0")
    flags = (
        "--retrieval",
        "1",
        "--retrieval_lengths",
        "128",
        "--retrieval_depths",
        "0,100",
        "--output",
        tmp_path / "o.json",
    )
    process = run_script(*command, *flags, "--plot_retrieval", tmp_path / "r.png", "--report", tmp_path / "r.html")
    assert process.returncode == 0, process.stderr
    assert "Retrieval: answers found at each depth" in process.stdout and "at100%" in process.stdout
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG") and "Retrieval" in (tmp_path / "r.html").read_text()
    again = run_script(*command, *flags, "--resume")
    assert again.returncode == 0 and again.stdout == process.stdout
    shown = run_script(CALIBRATED_SCRIPT, "--compare", tmp_path / "o.json", "--plot_retrieval", tmp_path / "s.png")
    assert (
        shown.returncode == 0
        and shown.stdout.split("Retrieval")[1].splitlines()[:5]
        == (process.stdout.split("Retrieval")[1].splitlines()[:5])
    )
    assert (tmp_path / "s.png").read_bytes() == (tmp_path / "r.png").read_bytes()
    assert_one_line_error(
        run_script(*command, "--retrieval", "1", "--retrieval_lengths", "9999"), "9999 tokens exceeds"
    )
    planned = run_script(*command, *flags[:-2], "--dry_run")
    assert planned.returncode == 0 and "retrieval: 4 prompts for each setting, of 128 tokens" in planned.stdout
    assert_one_line_error(run_script(*command, "--retrieval_depths", "3"), "--retrieval measures: give that too")


def test_prompts_are_the_same_whatever_the_limit(tokenizer, model, windows):
    made = [needles.prompts(asked(2, (256,)), model.config, tokenizer, {"a": ids}) for ids in (windows[:2], windows)]
    assert needles.digest(made[0]) == needles.digest(made[1])
