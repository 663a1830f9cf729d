"""What a name or a folder holds: it is loaded as its own class does, or refused with one line that names the cure."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import NANO, ROOT, measured
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedConfig

import quant_utils as qu
from simquant import checkpoints, models
from simquant.flags import Flags
from simquant.notices import Notice

CONFIG, TOKENIZER, TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
CONTENT = {name: json.loads((NANO / name).read_text()) for name in (CONFIG, TOKENIZER, TOKENIZER_CONFIG)}


def folder(path, lacks=(), **files):
    """Fill a folder with the bundled model, without the files that it lacks, and with others: {name: content}."""
    shutil.copytree(NANO, path, dirs_exist_ok=True)
    for name in lacks:
        (path / name).unlink()
    for name, content in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def load(path):
    """Return (config, skeleton, model) of a folder, as the scripts load them on a CPU."""
    flags, (config, _) = Flags(str(path), device="cpu"), models.load_config_and_tokenizer(str(path))
    return config, models.skeleton(flags, config), models.load_model(flags, config)


# -- what is loaded


def test_a_multimodal_checkpoint_is_measured_as_its_own_class_predicts_text(tmp_path, windows):
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 32,
        "head_dim": 8,
    }
    text = {**shape, "model_type": "mistral", "vocab_size": 2048, "num_key_value_heads": 2}
    vision = {**shape, "head_dim": 8, "model_type": "pixtral", "image_size": 28, "patch_size": 14}
    own = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision)).eval()
    own.get_output_embeddings().weight.data.mul_(20)  # so that some tokens are likelier than others
    own.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(tmp_path)
    config, skeleton, model = load(tmp_path)
    assert type(skeleton) is type(model) is Mistral3ForConditionalGeneration
    ids = windows[:3, :64]
    expected = [own(input_ids=each[None], labels=each[None]).loss.item() for each in ids]
    assert measured(model, ids, {})[:, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)
    assert models.weights_mark(skeleton.config) == models.weights_mark(config)


@pytest.mark.parametrize("attention", ["flash_attention_2", "kernels-community/flash-attn"])
def test_the_attention_is_not_the_configs_choice(tmp_path, attention):
    config = CONTENT[CONFIG] | {"_attn_implementation": attention}
    _, skeleton, model = load(folder(tmp_path, **{CONFIG: config}))
    assert skeleton.config._attn_implementation == model.config._attn_implementation == "sdpa"


def test_an_adapter_beside_the_weights_is_named_or_said_to_be_left_out(tmp_path, monkeypatch):
    path, marks = folder(tmp_path, **{"adapter_config.json": {"peft_type": "LORA"}}), []
    for has_peft in (False, True):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, there=has_peft: there or None)
        with warnings.catch_warnings(record=True) as said:
            config, _ = models.load_config_and_tokenizer(str(path))
        line = models.weights_line(models.skeleton(Flags(str(path), device="cpu"), config).config)
        assert line == (", with the adapter LORA (adapter_config.json)" if has_peft else "")
        left_out = [str(each.message) for each in said if each.category is Notice]
        assert len(left_out) == (not has_peft) and all("left out: pip install peft" in line for line in left_out)
        marks.append(models.weights_mark(config))
    assert len(set(marks)) == 2  # so that --resume does not mix them


def test_our_calls_are_of_the_library_as_it_is_now():
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
            warnings.simplefilter("error", category)
        load(NANO)


REVISIONS = """
import sys
from simquant import models
from simquant.flags import Flags
for name, revision in (("a/b", None), ("a/b", "v2"), ("a/b@v2", None)):
    config, tokenizer = models.load_config_and_tokenizer(name, revision)
    model = models.load_model(Flags(name, device="cpu", revision=revision), config)
    print(len(model.model.layers), tokenizer.eos_token, config.name_or_path, models.weights_mark(model.config))
"""


def test_a_revision_is_that_of_config_tokenizer_and_weights(tmp_path):
    """From a cache of the hub, as its client lays it out: the branch v2 has another config, tokenizer and weights."""
    cache = tmp_path / "hub" / "models--a--b"
    for branch, layers, eos in (("main", 5, "<|end_of_text|>"), ("v2", 6, "<|begin_of_text|>")):
        commit = f"{layers}" * 40
        (cache / "refs").mkdir(parents=True, exist_ok=True)
        (cache / "refs" / branch).write_text(commit)
        config = CONTENT[CONFIG] | {"num_hidden_layers": layers}
        changes = {CONFIG: config, TOKENIZER_CONFIG: CONTENT[TOKENIZER_CONFIG] | {"eos_token": eos}}
        folder(cache / "snapshots" / commit, **changes)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REVISIONS]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    other = f"6 <|begin_of_text|> a/b {'6' * 40}"
    expected = [f"5 <|end_of_text|> a/b {'5' * 40}", other, other]
    assert (process.stdout.splitlines(), process.returncode) == (expected, 0), process.stderr


# -- what is refused


def refused(path, match):
    with pytest.raises(qu.UserError, match=match) as found:
        load(path)
    assert "\n" not in str(found.value)


def test_revisions_that_contradict_or_are_of_a_folder(tmp_path):
    with pytest.raises(qu.UserError, match="--revision v1 and 'a/b@v2' are two revisions"):
        checkpoints.source("a/b@v2", "v1")
    for said in ((str(NANO), "main"), (f"{NANO}@main", None)):
        with pytest.raises(qu.UserError, match=r"^--revision main: '.*' is on disk, and only hub models have"):
            checkpoints.source(*said)
    there = folder(tmp_path / "model@v2")
    assert checkpoints.source(str(there)) == (str(there), None)
    assert checkpoints.source("a/b@refs/pr/5") == ("a/b", "refs/pr/5")


ADAPTER = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}


@pytest.mark.parametrize(
    ("lacks", "files", "match"),
    [
        ([CONFIG], {"adapter_config.json": ADAPTER}, "is a LoRA adapter of some/base: merge it into that first"),
        ([CONFIG], {"model_index.json": {}, "unet/config.json": {}}, "is a diffusers pipeline"),
        ([CONFIG], {"tiny-Q4_K_M.gguf": "GGUF"}, "GGUF files only: give the original checkpoint"),
        ([CONFIG], {"params.json": {}}, "give the checkpoint that is converted for transformers"),
        ([CONFIG], {"checkpoint-5/config.json": {}}, "has no config.json, but '.*checkpoint-5' has: give that"),
        ([CONFIG], {}, "has no config.json: give a folder written by save_pretrained"),
        ([], {"modules.json": "[]"}, "is a sentence-transformers model"),
        (
            [],
            {CONFIG: {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}},
            "its own Python code, ",
        ),
        ([], {TOKENIZER_CONFIG: {"auto_map": {"AutoTokenizer": ["own.Own", None]}}}, "tokenizer .* own Python code, "),
        ([], {CONFIG: {"model_type": "t5"}}, "t5 is an encoder and a decoder"),
        ([], {CONFIG: {"model_type": "bert"}}, "bert is an encoder, which has no cache"),
        ([], {CONFIG: {"model_type": "vit"}}, "vit has no language model in transformers"),
        ([TOKENIZER, TOKENIZER_CONFIG], {}, "has no tokenizer: put the original's tokenizer.json beside"),
        ([TOKENIZER], {TOKENIZER_CONFIG: {"tokenizer_class": "LlamaTokenizer"}}, "has no tokenizer: put"),  # it loads
        ([], {TOKENIZER: ""}, "^tokenizer.json of model '.*' holds no JSON object"),
        ([], {TOKENIZER: {}}, r"the tokenizer of model '.*' \(tokenizer.json, .*added_tokens"),
        ([], {CONFIG: [CONTENT[CONFIG]]}, "config.json of model '.*'( is .*, and no JSON object|: TypeError list)"),
    ],
)
def test_what_is_no_checkpoint_is_named_with_the_cure(tmp_path, lacks, files, match):
    refused(folder(tmp_path, lacks, **files), match)


def test_a_tokenizer_model_alone_names_every_package_that_is_missing(tmp_path, monkeypatch):
    path = folder(tmp_path, [TOKENIZER], **{"tokenizer.model": "no SentencePiece"})
    monkeypatch.setattr(checkpoints.importlib.metadata, "distributions", list)
    refused(path, "has no tokenizer.json, .*: pip install sentencepiece protobuf tiktoken$")


def test_a_hub_id_of_an_adapter_and_names_that_are_nowhere(tmp_path, monkeypatch):
    path = folder(tmp_path, **{"adapter_config.json": ADAPTER}) / "adapter_config.json"

    def fails(*args, **kwargs):
        raise OSError("a/b has no file named config.json")

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", fails)
    monkeypatch.setattr(checkpoints, "held", lambda *args: str(path))
    monkeypatch.setattr("huggingface_hub.list_repo_files", lambda *args, **kwargs: ["adapter_config.json"])
    refused("a/b", "model 'a/b' is a LoRA adapter of some/base: merge it")
    monkeypatch.setattr("huggingface_hub.list_repo_files", fails)
    refused("modles/llama", r"config.json of model 'modles/llama' \(there is no such folder, so .*\): a/b has no file")
    for name in ("./modles/llama", "~/llama", ""):
        refused(name, f"^there is no folder '{name}', and a hub id looks like meta-llama/Llama-3-8B$")
    refused("a/b-Q4.gguf", "is a GGUF file: give the original checkpoint")


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = folder(tmp_path / "linked", ["model.safetensors"])
    (path / "model.safetensors").symlink_to(tmp_path / "gone")
    refused(path, "'.*linked/model.safetensors' cannot be read: check its permissions, and where links lead")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(NANO, "'.*llama3-nano' cannot be read")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"text_config": 5}, "text_config is 5, and no JSON object"),
        ({"text_config": {"model_type": "llama"}}, "text_config is no config of a llama model's text"),
        ({"decoder": {"a": 1}}, "decoder is no config"),
        ({"num_hidden_layers": 10**7}, r"num_hidden_layers is 10000000: a whole number in 1\.\.1000 is"),
        ({"num_hidden_layers": -3}, "num_hidden_layers is -3"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vision_config": {"hidden_size": 0.5}}, r"vision_config\.hidden_size is 0\.5"),
        ({"vocab_size": "x"}, "vocab_size is 'x'"),
        ({"dtype": "float99"}, "dtype is 'float99', which is no dtype of torch"),
        ({"hidden_act": "foo"}, "as its config.json describes it: KeyError 'foo'"),
        ({"vocab_size": 100}, r"model\.embed_tokens\.weight is 2048x192, and its config\.json makes it 100x192"),
    ],
)
def test_nonsense_in_a_config_is_named(tmp_path, changes, match):
    refused(folder(tmp_path, **{CONFIG: CONTENT[CONFIG] | changes}), match)


def places(content, above=()):
    """Yield where every value of a JSON object stands, but not each word of a vocabulary."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content[:9]):
        yield (*above, key)
        if isinstance(value, (dict, list)) and key not in ("vocab", "merges"):
            yield from places(value, (*above, key))


VALUES = [
    None,
    True,
    0,
    -1,
    3,
    10**7,
    2**63,
    1e300,
    "",
    "x",
    "auto",
    [],
    [1],
    ["a"],
    {},
    {"a": 1},
    {"model_type": "llama"},
]
FIELDS = (
    "text_config", "vision_config", "decoder", "generator", "quantization_config", "layer_types", "sliding_window",
    "attn_implementation", "auto_map", "is_encoder_decoder", "torch_dtype", "rope_scaling", "architectures",
    "per_layer_config", "id2label", "pruned_heads", "_name_or_path", "_commit_hash", "sub_configs",
)  # fmt: skip
MUTATIONS = st.sampled_from(sorted(CONTENT)).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(
            st.tuples(
                st.sampled_from(list(places(CONTENT[name])) + [(field,) for field in FIELDS]),
                st.sampled_from(VALUES) | st.just(...),
            ),
            min_size=1,
            max_size=3,
        ),
    )
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return folder(tmp_path_factory.mktemp("scratch"), ["model.safetensors"])


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60, deadline=20_000)
@given(MUTATIONS)
def test_whatever_the_files_hold_it_loads_or_is_one_line(scratch, mutations):
    name, changes = mutations
    content = json.loads(json.dumps(CONTENT[name]))
    for (*above, key), value in changes:
        inner = content
        try:
            for step in above:
                inner = inner[step]
            if value is ...:
                del inner[key]
            else:
                inner[key] = value
        except (LookupError, TypeError):
            pass  # an earlier change took its place away
    (scratch / name).write_text(json.dumps(content))
    try:
        config, _ = models.load_config_and_tokenizer(str(scratch))
        models.skeleton(Flags(str(scratch), device="cpu"), config)
    except qu.UserError as error:
        assert str(scratch) in str(error)
    finally:
        (scratch / name).write_text(json.dumps(CONTENT[name]))
