#!/usr/bin/env python3
"""What takes how long on this CPU, each figure as a ratio; nothing is asserted.

    python3 tests/benchmarks/bench_cpu.py

1. The k-means fit of NUQ beside scikit-learn's KMeans (n_init 10), on the same activations of the bundled model and on
   a million points: seconds, and the weighted squared error that each reaches.
2. The evaluation loop with quantization, against the same loop without.
3. A sweep of four widths compared with the unquantized model, against four loops of one setting each.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import quant_utils as qu  # noqa: E402

NANO, SAMPLE = str(ROOT / "tests/assets/llama3-nano"), str(ROOT / "tests/assets/sample.txt")


def seconds(function, *args, repeats=1):
    """(median seconds of function(*args), its result)."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function(*args)
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def squared_error(unit, weights, levels):
    distance = unit - levels[qu.nearest_level(unit, levels)]
    return (weights.double() * distance.double() ** 2).sum().item()


def compare_kmeans(label, unit, weights, bits):
    from sklearn.cluster import KMeans

    reference = KMeans(2**bits, n_init=10, random_state=0)
    theirs, fitted = seconds(lambda: reference.fit(unit[:, None].numpy(), sample_weight=weights.numpy()))
    ours, levels = seconds(lambda: qu.kmeans_levels(qu.weighted_histogram(unit, weights), bits), repeats=5)
    their_levels = torch.from_numpy(fitted.cluster_centers_).flatten().float().sort().values
    ratio = squared_error(unit, weights, levels) / squared_error(unit, weights, their_levels)
    print(f"{label:42s} {theirs:9.2f} s {ours:9.3f} s {theirs / ours:8.0f} x   error ratio {ratio:.6f}", flush=True)


def kmeans_table(model, config_and_tokenizer):
    print(f"{'k-means':42s} {'sklearn':>11s} {'ours':>11s} {'faster':>10s}")
    how = qu.CalibrationSpec(SAMPLE, nsamples=8, seqlen=1024)
    windows = qu.load_calibration_windows(*config_and_tokenizer, how)
    for leaf, axis in (("k_proj", qu.PER_CHANNEL), ("v_proj", qu.PER_TOKEN)):
        name, spec = f"model.layers.3.self_attn.{leaf}", qu.QuantSpec(axis, 4, "nuq", include_sparse=True)
        x = qu.record_activations(model, {name: qu.site_at(model, name)}, windows)[name]
        unit, inlier, _ = qu.inliers(x, qu.fit_range(x, spec))
        unit = unit[inlier]
        compare_kmeans(f"layer 3 {leaf}, {len(unit):,} points, 16 levels", unit, torch.ones_like(unit), 4)
    generator = torch.Generator().manual_seed(0)
    unit = (torch.randn(1_000_000, generator=generator) / 3).clamp(-1, 1)
    compare_kmeans("1,000,000 points, weighted, 16 levels", unit, torch.rand(len(unit), generator=generator), 4)


def loop(model, windows, *quantizers):
    """The evaluation loop in a setting for each {site: Quantizer}."""
    settings = [qu.Setting(4 if each else qu.UNQUANTIZED, qu.parts_of(each), each) for each in quantizers]
    return list(qu.measure(model, qu.Run({"text": windows}, settings, qu.cache_widths(model))))


def dynamic(model, bits, codebook="uniform", sparse=False):
    axes = {"k_proj": qu.PER_CHANNEL, "v_proj": qu.PER_TOKEN}
    specs = {leaf: qu.QuantSpec(axis, bits, codebook, include_sparse=sparse) for leaf, axis in axes.items()}
    return qu.dynamic_quantizers(model, specs)


def overhead_table(model, config_and_tokenizer):
    windows = qu.load_windows(SAMPLE, config_and_tokenizer[1], qu.EvalSpec((SAMPLE,), seqlen=1024))
    base, _ = seconds(loop, model, windows, {}, repeats=5)
    print(f"\n{'evaluation loop, windows of 1024':42s} {base:9.2f} s {'1.00':>8s}")
    for codebook in ("uniform", "nf"):
        for sparse in (False, True):
            taken, _ = seconds(loop, model, windows, dynamic(model, 4, codebook, sparse), repeats=5)
            label = f"4-bit {qu.CODEBOOKS[codebook]}{', 1 % outliers' * sparse}, dynamic"
            print(f"{label:42s} {taken:9.2f} s {taken / base:8.2f}", flush=True)


def sweep_table(model, config_and_tokenizer):
    windows = qu.load_windows(SAMPLE, config_and_tokenizer[1], qu.EvalSpec((SAMPLE,), seqlen=1024))
    sweep = [{}, *(dynamic(model, bits) for bits in (4, 3, 2))]
    loop(model, windows, *sweep)
    ratios = []
    for _ in range(14):  # by turns, because the machine's speed drifts
        alone = sum(seconds(loop, model, windows, quantizers)[0] for quantizers in sweep)
        ratios.append(seconds(loop, model, windows, *sweep)[0] / alone)
    print("\n16, 4, 3, 2 bits in one loop with KL divergence and agreement, against four loops:")
    print(f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    qu.quiet_libraries()
    config_and_tokenizer = qu.load_config_and_tokenizer(NANO)
    model = qu.load_model(qu.ModelSpec(NANO, device="cpu"), config_and_tokenizer[0])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    kmeans_table(model, config_and_tokenizer)
    overhead_table(model, config_and_tokenizer)
    sweep_table(model, config_and_tokenizer)
