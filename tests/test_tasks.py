"""Tasks of lm-evaluation-harness, offline: what it says of a quantized model is what a plain loop says."""

import io
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SAMPLE

import quant_utils as qu
from quant_utils import ScalarQuantizer, UserError
from simquant import processes, tasks
from simquant.notices import Lines
from simquant.plans import Row
from simquant.sites import find_sites
from simquant.tables import text_of

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install lm_eval")

DOCUMENTS, NEW_TOKENS = 24, 6
UNQUANTIZED, COARSE = Row("unquantized", 16, "nothing"), Row("uniform", 2, "keys and values")
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/choice.jsonl}}, cache_dir: {folder}/cache}}
output_type: multiple_choice
validation_split: validation
fewshot_split: validation
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
SHORTER = "process_docs: !function cut.to_ten\n"
GROUP = """
group: both
task: [toy, short]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""
GENERATION = """
task: continued
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/continued.jsonl}}, cache_dir: {folder}/cache}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: {tokens}}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Show no bar."""
    monkeypatch.setitem(qu.PROGRESS, "disable", True)


def write_lines(path, rows):
    """Write a JSON a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def documents():
    """Pieces of the bundled text, each with three continuations: its own and those of the next pieces."""
    words = SAMPLE.read_text(encoding="utf-8").split()
    pieces = [words[start : start + 40] for start in range(0, 40 * (DOCUMENTS + 2), 40)]
    found = []
    for number in range(DOCUMENTS):
        endings = [" ".join(pieces[number + step][30 : 33 + step]) for step in range(3)]
        order = [(number + place) % 3 for place in range(3)]
        made = {"context": " ".join(pieces[number][:30]), "choices": [endings[at] for at in order]}
        found.append(made | {"gold": order.index(0)})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory, documents):
    """A folder of tasks: toy; short, which is its first ten documents; both, the two as a group; two without texts."""
    folder = tmp_path_factory.mktemp("tasks")
    write_lines(folder / "choice.jsonl", documents)
    (folder / "toy.yaml").write_text(CHOICE.format(name="toy", folder=folder))
    (folder / "short.yaml").write_text(CHOICE.format(name="short", folder=folder) + SHORTER)
    (folder / "cut.py").write_text("def to_ten(docs):\n    return docs.select(range(10))\n")
    (folder / "both.yaml").write_text(GROUP)
    (folder / "continued.yaml").write_text(GENERATION.format(folder=folder, tokens=NEW_TOKENS))
    (folder / "absent.yaml").write_text(CHOICE.format(name="absent", folder=folder / "nowhere"))
    return folder


def flags(folder, *names, limit=None, fewshot=None):
    """Return what a command line says of tasks."""
    return SimpleNamespace(tasks=names, task_path=str(folder), task_limit=limit, num_fewshot=fewshot)


def by(keys, values):
    """Return two quantizers by the part of the cache that they are for."""
    return {"keys": keys, "values": values}


def settings_of(model, **parts):
    """Return {row: setting} of the unquantized model and of quantizers for keys and values."""
    return {UNQUANTIZED: {}, COARSE: {site: parts[site.part] for site in find_sites(model)}}


SEEING = by(ScalarQuantizer("channel", 2), ScalarQuantizer("token", 2))
DECODING = by(ScalarQuantizer("token", 3, sinks=3), ScalarQuantizer("token", 3, sinks=3))


def log_likelihood(model, tokenizer, context, continuation):
    """Return the log-likelihood of a continuation in nats, from one forward pass over all tokens but the last."""
    whole, start = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    log_probs = model(torch.tensor([whole[:-1]]), use_cache=False).logits[0].double().log_softmax(-1)
    return sum(log_probs[at - 1, whole[at]].item() for at in range(start, len(whole)))


def chosen_by_hand(model, tokenizer, documents, setting):
    """Return (right [N], right where a character counts the same [N]) of a plain loop over documents."""
    right, normed = [], []
    with torch.inference_mode(), qu.quantized(setting):
        for each in documents:
            nats = [log_likelihood(model, tokenizer, each["context"], f" {choice}") for choice in each["choices"]]
            right.append(float(np.argmax(nats) == each["gold"]))
            normed.append(float(np.argmax(np.divide(nats, list(map(len, each["choices"])))) == each["gold"]))
    return right, normed


@pytest.fixture(scope="module")
def by_hand(model, tokenizer, documents):
    """{row: (right [N], right by characters [N])} of plain loops."""
    settings = settings_of(model, **SEEING)
    return {row: chosen_by_hand(model, tokenizer, documents, setting) for row, setting in settings.items()}


@pytest.fixture(scope="module")
def measured(model, tokenizer, folder):
    """What the tasks say of both rows, toy alone and with the others as a group."""
    settings = settings_of(model, **SEEING)
    return {name: tasks.measure(model, tokenizer, flags(folder, name), settings) for name in ("toy", "both")}


def standard_error(values):
    """Return that of a mean."""
    return np.std(values, ddof=1) / len(values) ** 0.5


def test_a_local_task_is_a_plain_loop_with_paired_differences(measured, by_hand):
    for row, found in measured["toy"].items():
        assert [(each["task"], each["metric"], each["documents"]) for each in found] == [
            ("toy", metric, DOCUMENTS) for metric in ("acc", "acc_norm")
        ]
        for each, right, before in zip(found, by_hand[row], by_hand[UNQUANTIZED], strict=True):
            assert (each["value"], each["se"]) == pytest.approx((np.mean(right), standard_error(right)), abs=1e-12)
            change = np.subtract(right, before)
            assert each["delta"] == pytest.approx(np.mean(change), abs=1e-12)
            assert each["delta_se"] == pytest.approx(standard_error(change), abs=1e-12)
    assert len({each["value"] for found in measured["toy"].values() for each in found}) > 1
    assert measured["toy"][COARSE][0]["delta_se"] > 0


def test_a_group_is_told_of_as_one_and_its_difference_is_that_of_its_values(measured, by_hand):
    """The harness weighs its tasks by their documents, and pools their variances."""
    (base,), (found,) = measured["both"][UNQUANTIZED], measured["both"][COARSE]
    change = np.subtract(by_hand[COARSE][0], by_hand[UNQUANTIZED][0])
    every = [*change, *change[:10]]
    assert (found["task"], found["metric"], found["documents"]) == ("both", "acc", DOCUMENTS + 10)
    assert found["delta"] == pytest.approx(np.mean(every)) == pytest.approx(found["value"] - base["value"])
    pooled = (np.var(change, ddof=1) * (DOCUMENTS - 1) + np.var(change[:10], ddof=1) * 9) / (len(every) - 2)
    assert found["delta_se"] == pytest.approx((pooled / len(every)) ** 0.5)


class Counting(ScalarQuantizer):
    """Counts how often it quantizes, and what it sees."""

    seen: list = []  # noqa: RUF012, shared on purpose

    def quantize(self, x, others=()):
        self.seen.append(tuple(x.shape))
        return super().quantize(x, others)


def test_hooks_run_once_a_pass_over_sequences_that_are_alone_and_nothing_is_printed(model, tokenizer, folder, capfd):
    Counting.seen.clear()
    settings, passes, shown = settings_of(model, **by(Counting("channel", 2), Counting("token", 2))), [], io.StringIO()
    hook = model.register_forward_hook(lambda *_: passes.append(len(Counting.seen)))
    bar = {"disable": False, "file": shown, "bar_format": "{desc} {n_fmt}/{total_fmt} {unit}", "mininterval": 0}
    before = dict(qu.PROGRESS)
    try:
        qu.PROGRESS.update(bar)
        tasks.measure(model, tokenizer, flags(folder, "toy", limit=5), settings)
    finally:
        hook.remove()
        qu.PROGRESS.clear()
        qu.PROGRESS.update(before)
    sites = find_sites(model)
    steps = np.diff([0, *passes])
    assert steps.tolist() == [0] * 15 + [len(sites)] * 15  # three choices of each, first without a quantizer
    assert {shape[0] for shape in Counting.seen} == {1}
    assert "tasks 30/30 request" in shown.getvalue()
    assert capfd.readouterr() == ("", "")


def test_a_bar_goes_on_in_lines_while_a_library_is_silenced(capsys):
    lines = Lines()
    with tasks.silence():
        print("nobody reads this")
        print("nor this", file=sys.stderr)
        lines.write("tasks: 3 of 9 requests\r")
    assert capsys.readouterr() == ("", "tasks: 3 of 9 requests\n")


def test_every_row_is_asked_with_the_same_examples(model, tokenizer, folder):
    settings = {UNQUANTIZED: {}, COARSE: {}}
    found = tasks.measure(model, tokenizer, flags(folder, "toy", limit=6, fewshot=2), settings)
    assert all(each["delta"] == 0 and each["delta_se"] == 0 for each in found[COARSE])
    task = tasks.loaded_by(flags(folder, "toy", limit=6, fewshot=2))["tasks"]["toy"]
    assert all(each.args[0].count("\n\n") == 2 for each in task.instances)


def test_processes_share_rows_and_each_returns_all(model, tokenizer, folder, monkeypatch):
    settings, asked = settings_of(model, **SEEING), flags(folder, "toy", limit=4)
    alone, sent = tasks.measure(model, tokenizer, asked, settings), []
    monkeypatch.setattr(processes, "count", lambda: 2)
    for index in (1, 0):
        monkeypatch.setattr(processes, "index", lambda local=False, index=index: index)
        monkeypatch.setattr(processes, "gather", lambda items: sent.extend(items) or sent[::-1])
        if index == 1:
            with pytest.raises(KeyError):  # what the other has is missing yet
                tasks.measure(model, tokenizer, asked, settings)
    assert tasks.measure(model, tokenizer, asked, settings) == alone
    assert [list(part) for part in sent] == [[COARSE], [UNQUANTIZED]]


def test_without_an_unquantized_row_there_are_no_differences(model, tokenizer, folder):
    settings = {COARSE: {}}
    found = tasks.measure(model, tokenizer, flags(folder, "toy", limit=3), settings)[COARSE]
    assert [(each["delta"], each["delta_se"]) for each in found] == [(None, None)] * 2


def continued(model, tokenizer, context, setting):
    """Return what follows a context by greedy decoding, with a cache: hooks see one new token at a time, no sink."""
    ids, past, made = torch.tensor([tokenizer.encode(context)]), None, []
    while len(made) < NEW_TOKENS:
        with torch.inference_mode(), qu.quantized(setting):
            output = model(ids, past_key_values=past, use_cache=True)
        ids, past = output.logits[:, -1:].argmax(-1), output.past_key_values
        setting = {site: replace(quantizer, sinks=0) for site, quantizer in setting.items()}
        if ids.item() == tokenizer.eos_token_id:
            break
        made.append(ids.item())
    return tokenizer.decode(made, skip_special_tokens=True).split("\n")[0]


def test_generated_text_is_that_of_decoding_token_by_token(model, tokenizer, documents, folder):
    settings = settings_of(model, **DECODING)
    contexts = [each["context"] for each in documents[:12]]
    texts = {
        row: [continued(model, tokenizer, context, setting) for context in contexts]
        for row, setting in settings.items()
    }
    rows = [{"context": c, "target": text} for c, text in zip(contexts, texts[COARSE], strict=True)]
    write_lines(folder / "continued.jsonl", rows)
    asked = flags(folder, "continued")
    tasks.check(asked, settings)
    found = tasks.measure(model, tokenizer, asked, settings)
    same = np.mean([one == other for one, other in zip(texts[UNQUANTIZED], texts[COARSE], strict=True)])
    assert 0 < same < 1
    assert {row: each[0]["value"] for row, each in found.items()} == {UNQUANTIZED: pytest.approx(same), COARSE: 1.0}
    assert "generate" not in vars(model)

    with pytest.raises(UserError, match="--tasks continued generates text by uniform, which cannot decode token by"):
        tasks.check(asked, settings_of(model, **SEEING))


def test_mistakes_are_one_line(model, folder, monkeypatch):
    settings = settings_of(model, **SEEING)
    tasks.check(flags(folder, "toy"), settings)  # it has no generation
    tasks.check(SimpleNamespace(tasks=()), settings)
    for (where, *names), said in {
        (folder, "toi"): "--tasks toi: lm_eval has no such task; did you mean toy",
        (folder, "toy", "helaswag"): "did you mean hellaswag",
        (folder, "?"): "tasks of your own are found by --task_path",
        (folder / "nowhere", "toy"): "nowhere' is no folder",
        (folder, "absent"): "cannot load --tasks absent: ",
        (folder, "both", "toy"): "Duplicate task 'toy'",
    }.items():
        with pytest.raises(UserError) as error:
            tasks.check(flags(where, *names), settings)
        assert said in str(error.value) and "\n" not in str(error.value)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    tasks.index_of.cache_clear()
    with pytest.raises(UserError, match="--tasks needs lm-evaluation-harness: pip install lm_eval"):
        tasks.check(flags(folder, "short"), settings)


def test_the_table_has_a_line_for_each_task_and_row(measured):
    rows = [
        {"format": row.format, "abits": row.abits, "quantized": row.quantized,
         "tasks": measured["toy"][row] + [{**measured["both"][row][0], "metric": "bits"}]}
        for row in (UNQUANTIZED, COARSE)
    ]  # fmt: skip
    head, *lines = text_of(tasks.table_of(rows)).splitlines()[1:]
    assert head.split() == [
        "task",
        "abits",
        "acc",
        "±",
        "Δacc",
        "±",
        "acc_norm",
        "±",
        "Δacc_norm",
        "±",
        "bits",
        "±",
        "Δbits",
        "±",
    ]
    assert [line.split()[:2] for line in lines] == [
        [task, str(row.abits)] for task in ("toy", "both") for row in (UNQUANTIZED, COARSE)
    ]
    acc, bits = measured["toy"][COARSE][0], measured["both"][COARSE][0]
    shares = [f"{acc['value']:.2%}", f"{acc['se']:.2%}", f"{acc['delta']:+.2%}", f"{acc['delta_se']:.2%}"]
    assert lines[1].split()[2:6] == shares and lines[1].split()[10:] == ["-"] * 4
    assert lines[3].split()[2:11] == ["-"] * 8 + [f"{bits['value']:.4f}"]
    assert lines[0].split()[4:6] == ["-", "-"]
