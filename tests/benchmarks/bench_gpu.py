#!/usr/bin/env python3
"""What a window costs on this GPU, on the shape of Llama-3-8B with random weights; nothing is asserted.

    python3 tests/benchmarks/bench_gpu.py

bfloat16, sdpa, windows of 2048 random tokens, batch 1; medians over REPEATS in one process. It needs torch and
transformers alone: the weights are made from the config.

1. Our loop against a plain loop over model(ids) with whole logits, unquantized and in several settings.
2. A sweep compared with the unquantized model, against its settings one by one; whether the losses are the same bits.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import quant_utils as qu  # noqa: E402

REPEATS, WINDOWS, SEQLEN = 5, 8, 2048
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip


def random_model():
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_3_8B, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def milliseconds(function):
    """(median of function() for one window, its last result)."""
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start) / WINDOWS)
    return statistics.median(times), result


@torch.inference_mode()
def plain_loop(model, windows):
    for ids in windows.cuda()[:, None]:
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        F.cross_entropy(logits, ids[0, 1:]).item()


def loop(model, windows, *settings):
    run = qu.Run({"random": windows}, settings, qu.cache_widths(model))
    list(qu.measure(model, run))
    return run


def setting(model, bits, **options):
    axes = {} if bits == qu.UNQUANTIZED else {"k_proj": qu.PER_CHANNEL, "v_proj": qu.PER_TOKEN}
    specs = {leaf: qu.QuantSpec(axis, bits, **options) for leaf, axis in axes.items()}
    quantizers = qu.dynamic_quantizers(model, specs)
    return qu.Setting(bits, qu.parts_of(quantizers), qu.on_device(model, quantizers))


def peak_gib(weights):
    """Above the weights, since the last call."""
    peak = (torch.cuda.max_memory_allocated() - weights) / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def show(label, taken, base, weights):
    print(f"{label:48s} {taken:8.1f} ms {taken / base:8.3f} {peak_gib(weights):8.2f} GiB", flush=True)


if __name__ == "__main__":
    model = random_model()
    windows = torch.randint(LLAMA_3_8B["vocab_size"], (WINDOWS, SEQLEN), generator=torch.Generator().manual_seed(0))
    weights = torch.cuda.memory_allocated()
    sweep = [setting(model, bits) for bits in (16, 4, 3, 2)]
    loop(model, windows[:2], *sweep)
    plain_loop(model, windows[:2])
    peak_gib(weights)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}; a window, its ratio, peak memory above weights")
    plain, _ = milliseconds(lambda: plain_loop(model, windows))
    show("plain loop, whole logits", plain, plain, weights)
    base, _ = milliseconds(lambda: loop(model, windows, sweep[0]))
    show("our loop, unquantized", base, plain, weights)
    for codebook in ("uniform", "nf"):
        for sparse in (False, True):
            each = setting(model, 4, codebook=codebook, include_sparse=sparse)
            taken, _ = milliseconds(lambda each=each: loop(model, windows, each))
            label = f"4-bit {qu.CODEBOOKS[codebook]}{', 1 % outliers' * sparse}, dynamic"
            show(f"{label}; against ours unquantized", taken, base, weights)
    alone = [milliseconds(lambda each=each: loop(model, windows, each)) for each in sweep]
    peak_gib(weights)
    total = sum(taken for taken, _ in alone)
    together, run = milliseconds(lambda: loop(model, windows, *sweep))
    show("sweep of 16, 4, 3, 2; against its settings alone", together, total, weights)
    same = all(row["window_nll"] == qu.results(one, "random")[0]["window_nll"]
               for row, (_, one) in zip(qu.results(run, "random"), alone, strict=True))  # fmt: skip
    print(f"losses of the sweep and of its settings alone are {'the same bits' if same else 'DIFFERENT'}")
