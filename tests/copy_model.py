"""A language model with hand-made weights that retrieves: what followed the last four tokens before follows again.

Two layers of attention, as Llama has them, and no MLP. The residual stream holds a constant, the code of the token
(own), the codes of the four tokens before it (before 1 to 4), and the code of the token that is to come (next).

    layer 0  head d looks back d + 1 tokens, which RoPE alone tells apart, and copies the code from there
    layer 1  looks for the place that the four codes before match the four latest here, and copies the code from there

Each code has CODE channels; a match of all four scores 4 * SHARPNESS, any other place about SHARPNESS less.
"""

import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from simquant import needles

BACK, CODE, HEAD = 4, 20, 128
HIDDEN, THETA = 1 + (BACK + 2) * CODE + 7, 1e30
TURNING, STILL = (
    12,
    20,
)  # the first pairs of channels tell positions, those from STILL on turn by less than 1e-9 a token
SHARPNESS = 30.0
OUTLIER = 16.0  # what a channel of each head's values always is, while codes are unit vectors: it makes few bits coarse
OWN, NEXT = 0, BACK + 1  # places of codes in the residual stream; 1 to BACK are those of the tokens before
HAY = [
    "a",
    "and",
    "but",
    "old",
    "new",
    "they",
    "went",
    "along",
    "by",
    "then",
    "when",
    "small",
    "great",
    "wind",
    "rain",
    "snow",
    "road",
    "hill",
    "stone",
    "bird",
    "horse",
    "wolf",
    "gate",
    "tower",
    "light",
    "dark",
    "day",
    "night",
    "song",
    "voice",
    "hand",
    "eye",
    "door",
    "window",
    "fire",
    "water",
    "bread",
    "salt",
    "iron",
    "gold",
    "silver",
    "green",
    "blue",
    "red",
]


def copy_tokenizer():
    """A tokenizer of words, digits and marks, without special tokens but one for what it does not know."""
    asked = needles.QUESTION + needles.CLAIM
    words = ["<unk>", *HAY, *needles.KEYS, *asked.replace("{}", " ").replace("?", " ? ").split(), ".", *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def place(code):
    """The channels of the residual stream that hold a code."""
    return slice(1 + code * CODE, 1 + (code + 1) * CODE)


def look_back(q, k, distance):
    """Fill the rows [HEAD,HIDDEN] of a head's queries and keys so that it attends `distance` tokens before.

    A pair of channels turns by its frequency a token, so a query that is turned back scores
    cos(f * (t - j - distance)).
    """
    frequency = THETA ** (-2 * torch.arange(TURNING, dtype=torch.float64) / HEAD)
    gain = 2 / HIDDEN * HEAD**0.5 * 60  # of the normed constant's square, and of the score
    k[:TURNING, 0] = 1
    q[:TURNING, 0] = gain * (frequency * distance).cos()
    q[HEAD // 2 : HEAD // 2 + TURNING, 0] = -gain * (frequency * distance).sin()


def copy_model(vocabulary, positions=1024, seed=0):
    """The model, for words with random codes."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=HIDDEN, intermediate_size=8, num_hidden_layers=2, num_attention_heads=BACK,
        num_key_value_heads=BACK, head_dim=HEAD, max_position_embeddings=positions, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    norms = {name: each for name, each in model.state_dict().items() if "norm" in name}
    for name, each in model.state_dict().items():
        each.fill_(1 if name in norms else 0)
    codes = F.normalize(torch.randn(vocabulary, CODE, generator=torch.Generator().manual_seed(seed)), dim=1)
    model.model.embed_tokens.weight[:, 0] = 1
    model.model.embed_tokens.weight[:, place(OWN)] = codes
    model.lm_head.weight[:, place(NEXT)] = 40 * (7 / HIDDEN) ** 0.5 * codes

    eye = torch.eye(CODE)
    first, second = (layer.self_attn for layer in model.model.layers)
    for head in range(BACK):
        rows = slice(head * HEAD, (head + 1) * HEAD)
        look_back(first.q_proj.weight[rows], first.k_proj.weight[rows], head + 1)
        first.v_proj.weight[rows][:CODE, place(OWN)] = eye
        first.v_proj.weight[rows][CODE, 0] = OUTLIER
        first.o_proj.weight[place(head + 1), rows][:, :CODE] = (2 / HIDDEN) ** 0.5 * eye
    still = [*range(STILL, HEAD // 2), *range(HEAD // 2 + STILL, HEAD)]
    gain = 6 / HIDDEN * HEAD**0.5 * SHARPNESS
    for back in range(BACK):
        rows = still[back * CODE : (back + 1) * CODE]
        second.q_proj.weight[rows, place(back)] = gain * eye
        second.k_proj.weight[rows, place(back + 1)] = eye
    second.v_proj.weight[:CODE, place(OWN)] = eye
    second.v_proj.weight[CODE, 0] = OUTLIER
    second.o_proj.weight[place(NEXT), :CODE] = (6 / HIDDEN) ** 0.5 * eye
    return model


def main():
    """Write the model, its tokenizer and a text of its words to a folder, for the scripts to be tried on."""
    folder = Path(sys.argv[1])
    tokenizer = copy_tokenizer()
    copy_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = random.Random(0).choices(HAY, k=20_000)
    (folder / "words.txt").write_text(" ".join(words), encoding="utf-8")


if __name__ == "__main__":
    main()
