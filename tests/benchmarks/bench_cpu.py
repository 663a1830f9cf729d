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
from simquant import models, sites, texts  # noqa: E402
from simquant.flags import Flags  # noqa: E402
from simquant.methods import Plan, Width  # noqa: E402

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
    distance = unit - levels[qu.nearest(unit, levels)]
    return (weights.double() * distance.double() ** 2).sum().item()


def compare_kmeans(label, unit, weights, bits):
    from sklearn.cluster import KMeans

    reference = KMeans(2**bits, n_init=10, random_state=0)
    theirs, fitted = seconds(lambda: reference.fit(unit[:, None].numpy(), sample_weight=weights.numpy()))
    ours, levels = seconds(lambda: qu.kmeans_levels(qu.running_totals(unit, weights), bits), repeats=5)
    their_levels = torch.from_numpy(fitted.cluster_centers_).flatten().float().sort().values
    ratio = squared_error(unit, weights, levels) / squared_error(unit, weights, their_levels)
    print(f"{label:42s} {theirs:9.2f} s {ours:9.3f} s {theirs / ours:8.0f} x   error ratio {ratio:.6f}", flush=True)


def kmeans_table(model, tokenizer):
    print(f"{'k-means':42s} {'sklearn':>11s} {'ours':>11s} {'faster':>10s}")
    windows = texts.calibration_windows(SAMPLE, tokenizer, 1024, 8, 0)
    for site in sites.find_sites(model)[6:8]:  # the keys and the values of layer 3
        x = qu.record(model, [site], windows)[site]
        axis = "channel" if site.part == "keys" else "token"
        quantizer = qu.ScalarQuantizer(axis, 4, outliers=1 - 0.99).fit(x, None, {})
        keep, lo, hi = quantizer.keep_and_range(x)
        unit = ((x - lo) / (hi - lo) * 2 - 1)[~keep & (hi > lo)]
        compare_kmeans(f"layer 3 {site.part}, {len(unit):,} points, 16 levels", unit, torch.ones_like(unit), 4)
    generator = torch.Generator().manual_seed(0)
    unit = (torch.randn(1_000_000, generator=generator) / 3).clamp(-1, 1)
    compare_kmeans("1,000,000 points, weighted, 16 levels", unit, torch.rand(len(unit), generator=generator), 4)


def loop(model, windows, *settings):
    return list(qu.evaluate(model, sites.find_sites(model), windows, settings))


def dynamic(model, bits, method="uniform", sparse=False):
    options = {"--include_sparse": ("outliers", 1 - 0.99)} if sparse else {}
    plan = Plan(method, [Width(bits, bits)], {"keys": "channel", "values": "token"}, options)
    (setting,) = plan.settings(sites.find_sites(model)).values()
    return setting


def overhead_table(model, windows):
    base, _ = seconds(loop, model, windows, {}, repeats=5)
    print(f"\n{'evaluation loop, windows of 1024':42s} {base:9.2f} s {'1.00':>8s}")
    for method in ("uniform", "nf"):
        for sparse in (False, True):
            taken, _ = seconds(loop, model, windows, dynamic(model, 4, method, sparse), repeats=5)
            label = f"4-bit {qu.LEVEL_NAMES[method]}{', 1 % outliers' * sparse}, dynamic"
            print(f"{label:42s} {taken:9.2f} s {taken / base:8.2f}", flush=True)


def sweep_table(model, windows):
    sweep = [{}, *(dynamic(model, bits) for bits in (4, 3, 2))]
    loop(model, windows, *sweep)
    ratios = []
    for _ in range(14):  # by turns, because the machine's speed drifts
        alone = sum(seconds(loop, model, windows, setting)[0] for setting in sweep)
        ratios.append(seconds(loop, model, windows, *sweep)[0] / alone)
    print("\n16, 4, 3, 2 bits in one loop with KL divergence and agreement, against four loops:")
    print(f"median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    config, tokenizer = models.load_config_and_tokenizer(NANO)
    model = models.load_model(Flags(NANO, device="cpu"), config)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    windows = texts.evaluation_windows(SAMPLE, tokenizer, 1024, 512)
    kmeans_table(model, tokenizer)
    overhead_table(model, windows)
    sweep_table(model, windows)
