"""Rows that start at a later layer have the figures of rows that run all layers, bit for bit."""

import pytest
import torch
from conftest import DYNAMIC_SCRIPT, NANO, SAMPLE, measured, run_script, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import split  # noqa: F401, a fixture
from test_sites import CONV, FAMILIES, LINEAR, SHARING, WINDOW, setting_of, tiny

import quant_utils as qu
from simquant import memory, prefixes, speed
from simquant.notices import Notice
from simquant.sites import find_sites

LAYERS = {"num_hidden_layers": 4}
KINDS = {  # model_type: what differs from tests/test_sites.py, four layers each
    "llama": LAYERS, "gemma3_text": LAYERS | WINDOW, "gpt_neox": LAYERS | {"num_key_value_heads": 4},
    "gptj": LAYERS | {"rotary_dim": 4}, "lfm2": LAYERS | {"layer_types": 2 * CONV["layer_types"]},
    "qwen3_next": {**LINEAR, **LAYERS, **FAMILIES["Qwen3-Next"][1], "layer_types": 2 * LINEAR["layer_types"]},
    "bloom": LAYERS, "gemma4_text": SHARING | {"global_head_dim": 16},
}  # fmt: skip


def attribution(model):
    """[settings] of the unquantized model, all layers, and each layer alone, in 3 bits."""
    whole = setting_of(model, outliers=0.01, sinks=1)
    layers = dict.fromkeys(site.layer for site in whole)
    return [{}, whole, *({s: q for s, q in whole.items() if s.layer == layer} for layer in layers)]


def watched(model, windows, rows, batch_size=1):
    """(figures [N,S,F] of windows [N,T] in rows, [indices of the layers that ran, a list for each forward pass])."""
    layers, passes = prefixes.decoder_list(model), []

    def begin(module, args, kwargs):
        if "forward" not in vars(module):  # it runs, and is not passed over for its logits
            passes.append([])

    handle = model.get_decoder().register_forward_pre_hook(begin, with_kwargs=True)
    watched = [(layer, lambda module, args, out, at=at: passes[-1].append(at)) for at, layer in enumerate(layers)]
    try:
        with qu.hooked(watched):
            return measured(model, windows, *rows, batch_size=batch_size), passes
    finally:
        handle.remove()


def compare(model, windows, rows, batch_size=1):
    """Assert the same figures with stored inputs of layers as without; return the layers that ran in each pass."""
    plain, every = watched(model, windows, rows, batch_size)
    own = list(prefixes.decoder_list(model))
    with prefixes.stored(model, rows):
        figures, passes = watched(model, windows, rows, batch_size)
    assert same_bits(figures.nan_to_num(-1), plain.nan_to_num(-1))
    assert list(prefixes.decoder_list(model)) == own and "run_body" not in qu.FASTER
    assert all(each == list(range(len(own))) for each in every) and len(every) == len(passes)
    return passes


@pytest.mark.parametrize("kind", KINDS)
def test_an_attribution_runs_each_layer_alone_from_that_layer(kind):
    model, windows = tiny(kind, KINDS[kind]), torch.randint(3, 48, (5, 24))
    rows = attribution(model)
    starts = [min((site.layer for site in row), default=0) for row in rows]
    if kind == "gemma4_text":
        starts = [0] * len(starts)  # layers 2 and 3 read the keys and values of layers 0 and 1
    assert max(starts) == (0 if kind == "gemma4_text" else 3)
    assert compare(model, windows, rows, batch_size=2) == 3 * [list(range(start, 4)) for start in starts]


def test_layers_that_share_keys_and_values_are_run_from_the_first_that_is_read():
    kinds = {"num_hidden_layers": 6, "layer_types": 3 * SHARING["layer_types"][:2]}
    model = tiny("gemma4_text", KINDS["gemma4_text"] | kinds)  # layers 4 and 5 read those of layers 2 and 3
    passes = compare(model, torch.randint(3, 48, (1, 24)), attribution(model))
    assert [each[0] for each in passes] == [0, 0, 0, 1, 2, 2]


class Twice(torch.nn.ModuleList):
    """A list of layers over which a decoder runs twice."""

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return [*found, *found] if isinstance(index, slice) else found


def reads_what_layer_0_left(model, at=3, forgets=False):
    """Hooks by which a layer reads more of layer 0 than the output before it."""
    left = []
    read = (lambda module, args, out: out * left.pop()) if forgets else (lambda module, args, out: out * left[-1])
    layers = model.model.layers
    return [(layers[0], lambda module, args, out: left.append(out.mean())), (layers[at], read)]


def knows_its_own_layers_alone(model):
    """No hooks: the decoder itself looks at what stands in its list."""
    whole = model.model.forward

    def forward(*args, **kwargs):
        assert not any(isinstance(layer, prefixes.StandIn) for layer in model.model.layers)
        return whole(*args, **kwargs)

    model.model.forward = forward
    return []


@pytest.mark.parametrize(
    ("hooks", "exact"),
    [
        (lambda model: [], [1, 2, 3]),
        (reads_what_layer_0_left, []),
        (lambda model: reads_what_layer_0_left(model, forgets=True), []),
        (lambda model: reads_what_layer_0_left(model, at=1), [2, 3]),
        (lambda model: [(model.model.layers[2], lambda module, args, out: args[0].add_(out))], [1, 3]),
        (knows_its_own_layers_alone, []),
        (lambda model: setattr(model.model, "layers", Twice(model.model.layers)) or [], []),
    ],
    ids=["llama", "remembers", "raises", "reads until layer 1", "adds in place", "looks at its list", "loops"],
)
def test_no_row_starts_where_a_layer_reads_more_than_the_output_before_it(hooks, exact):
    model = tiny("llama", LAYERS)
    rows, windows, layers = attribution(model), torch.randint(3, 48, (2, 24)), model.model.layers
    with qu.hooked(hooks(model)):
        found = prefixes.Prefixes(model, rows)
        found.keep_what_is_exact()
        assert found.useful == exact
        plain = measured(model, windows, *rows)
        with prefixes.stored(model, rows):
            assert same_bits(measured(model, windows, *rows), plain)
    assert list(model.model.layers) == list(layers)


def test_a_layer_that_stands_twice_in_the_list_counts_where_it_comes_first():
    model, windows = tiny("llama", LAYERS), torch.randint(3, 48, (1, 24))
    model.model.layers[2] = model.model.layers[1]
    rows = attribution(model)
    assert prefixes.Prefixes(model, rows).starts == [4, 0, 0, 1, 3]
    plain = measured(model, windows, *rows)
    with prefixes.stored(model, rows):
        assert same_bits(measured(model, windows, *rows), plain)


def test_a_stand_in_has_the_attributes_of_its_layer():
    layer = tiny("gemma2", {}).model.layers[0].eval()
    found = prefixes.StandIn(layer)
    assert found.self_attn is layer.self_attn and found.gradient_checkpointing is False and not found.training
    with pytest.raises(AttributeError, match="'Gemma2DecoderLayer' object has no attribute 'nonsense'"):
        _ = found.nonsense


@settings(max_examples=40)
@given(st.data())
def test_any_rows_in_any_order_have_the_same_figures(data):
    model = tiny("llama", LAYERS | {"num_key_value_heads": 1})
    whole = setting_of(model)
    some = st.sets(st.sampled_from(sorted(whole, key=lambda site: site.key)))
    rows = [{site: whole[site] for site in row} for row in data.draw(st.lists(some, min_size=1, max_size=6))]
    with pytest.MonkeyPatch.context() as patch:
        each = 32 * 4 * 12  # bytes of a layer's input, for one window
        patch.setattr(prefixes, "free_memory", lambda device: data.draw(st.integers(0, 4)) * each / prefixes.SHARE)
        passes = compare(model, torch.randint(3, 48, (3, 12)), rows, data.draw(st.integers(1, 3)))
    for layers, row in zip(passes, rows * len(passes), strict=False):
        assert layers[-1:] in ([3], []) and not any(site.layer < min(layers, default=4) for site in row)


def test_rows_that_skip_the_first_layers_start_behind_them_without_an_unquantized_one():
    model = tiny("llama", LAYERS)
    rows = [{s: q for s, q in setting_of(model, bits, bits).items() if s.layer >= 2} for bits in (4, 3, 2)]
    assert compare(model, torch.randint(3, 48, (1, 24)), rows) == [[0, 1, 2, 3], [2, 3], [2, 3]]


def test_what_memory_holds_is_evenly_spaced_and_rows_start_at_the_last_that_is_held(monkeypatch):
    assert [prefixes.evenly_spaced(range(1, 8), count / 7 + 1e-9) for count in range(4)] == [
        [], [4], [2, 5], [2, 4, 6]
    ]  # fmt: skip
    assert prefixes.evenly_spaced(range(1, 8), 2.5) == list(range(1, 8))
    model, windows, each = tiny("llama", LAYERS), torch.randint(3, 48, (1, 24)), 24 * 32 * 4
    rows = attribution(model)
    for held, starts in ((0, [0, 0, 0, 0]), (1, [0, 0, 2, 2]), (2, [0, 1, 2, 2]), (3, [0, 1, 2, 3])):
        monkeypatch.setattr(prefixes, "free_memory", lambda device, held=held: 4 * held * each + 1)
        assert [layers[0] for layers in compare(model, windows, rows)] == [0, 0, *starts]


def test_nothing_is_stored_that_no_later_row_reads(monkeypatch):
    model, held = tiny("llama", LAYERS), []
    run = prefixes.Prefixes.run

    def watched_run(self, *args):
        output = run(self, *args)
        held.append(sorted(self.outputs))
        return output

    monkeypatch.setattr(prefixes.Prefixes, "run", watched_run)
    compare(model, torch.randint(3, 48, (2, 24)), attribution(model))
    assert held == 2 * [[1, 2, 3], [1, 2, 3], [1, 2, 3], [2, 3], [3], []]


def test_compiled_layers_give_the_same_bits_from_the_same_graphs():
    model, windows = tiny("llama", LAYERS), torch.randint(3, 48, (2, 24))
    rows, figures, graphs = attribution(model), [], []
    for settings_of in ([], rows):
        torch._dynamo.reset()
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with prefixes.stored(model, settings_of), speed.compiled(model):
            figures.append(measured(model, windows, *rows))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert same_bits(*figures) and graphs[0] == graphs[1] == 2


def test_layers_whose_weights_wait_elsewhere_are_passed_over_alike(split, model, windows):  # noqa: F811
    rows = attribution(split)
    passes = compare(split, windows[:2, :128], rows)
    assert [layers[0] for layers in passes] == 2 * [0, *(min((s.layer for s in row), default=0) for row in rows[1:])]
    assert same_bits(*(measured(each, windows[:1, :128], *attribution(each)) for each in (split, model)))


def test_a_window_that_does_not_fit_beside_what_is_stored_is_measured_without(monkeypatch, recwarn):
    model, windows = tiny("llama", LAYERS), torch.randint(3, 48, (5, 24))
    rows, found, whole, tried = attribution(model), find_sites(model), qu.start_batch, []
    plain = measured(model, windows, *rows)

    def start_batch(model, sites, ids, settings):
        tried.append((len(ids), "run_body" in qu.FASTER))
        if tried[-1][1]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return whole(model, sites, ids, settings)

    monkeypatch.setattr(qu, "start_batch", start_batch)
    with prefixes.stored(model, rows):
        batches = memory.evaluate_what_fits(model, found, windows, rows, 2)
        figures = torch.cat([batch.figures for batch in batches])
    assert tried == [(2, True), (1, True), *5 * [(1, False)]] and same_bits(figures, plain)
    said = [str(each.message) for each in recwarn if each.category is Notice]
    assert [line.split(":")[0] for line in said] == [
        "memory is too short to store inputs of layers", "--batch_size 2 runs out of memory"
    ]  # fmt: skip


def test_an_error_within_a_row_leaves_the_model_as_it_was_and_nothing_stored():
    model, ids = tiny("llama", LAYERS), torch.randint(3, 48, (1, 24))
    rows, layers = attribution(model), list(model.model.layers)

    def fails(module, args, out):
        raise MemoryError

    found = prefixes.Prefixes(model, rows)
    found.keep_what_is_exact()
    with torch.inference_mode():
        found.run(model, ids, rows[0])
        assert sorted(found.outputs) == [1, 2, 3]
        with pytest.raises(MemoryError), qu.hooked([(layers[3], fails)]):
            found.run(model, ids, rows[3])
        assert list(model.model.layers) == layers and not found.outputs and found.ids is None


@pytest.mark.parametrize(("flags", "stored"), [(("--attribution",), 5), (("--skip_layers", "0"), 0), ((), 0)])
def test_a_dry_run_tells_what_is_stored(flags, stored):
    words = ("--datasets", SAMPLE, "--seqlen", "2048", "--abits", "3", "--dry_run")
    process = run_script(DYNAMIC_SCRIPT, NANO, *words, *flags)
    size = f"{stored * 2048 * 192 * 4 / 2**20:.1f}"
    line = f"stored for rows that start at a later layer: the inputs of {stored} layers, {size} MiB for each window"
    assert process.returncode == 0 and (line in process.stdout) == (stored > 0), process.stdout
    assert ("stored" in process.stdout) == (stored > 0)
