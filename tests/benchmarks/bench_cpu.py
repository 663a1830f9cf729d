#!/usr/bin/env python3
"""What takes how long on this CPU, each figure beside its peer; nothing is asserted.

    python3 tests/benchmarks/bench_cpu.py                             everything, in some five minutes
    python3 tests/benchmarks/bench_cpu.py --only quantizers,windows   some parts
    python3 tests/benchmarks/bench_cpu.py --old FOLDER                and beside another version of this project

quantizers   each way to quantize keys or values, beside the arithmetic of the published functions
windows      whole windows of the bundled model, beside a plain loop over model(ids) with that arithmetic in hooks
sweep        four widths in one loop, beside four loops of one width each
kmeans       the fit of NUQ levels, beside scikit-learn's KMeans
attribution  each layer alone, where rows start at the layer that they quantize, beside the same from the first layer

The machine's speed drifts, so ours and its peers take turns, in the first two parts each in a process of its own, and a
ratio is the median of the turns' ratios: below 1 ours is faster. CPU time is that of all threads, and counts how they
wait for one another: a single thread, the default, gives the ratios that other work on the machine disturbs least.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
IS_CONTENDER = sys.argv[1:2] == ["--contender"]  # of Contender: --contender FOLDER NAME THREADS
sys.path.insert(0, sys.argv[2] if IS_CONTENDER else str(ROOT))
import peers  # noqa: E402

import quant_utils as qu  # noqa: E402
from simquant import calibration, models, sites, speed, texts  # noqa: E402
from simquant.flags import Flags  # noqa: E402
from simquant.plans import BASELINE, Pair, Plan, Width  # noqa: E402

NANO, SAMPLE = str(ROOT / "tests/assets/llama3-nano"), str(ROOT / "tests/assets/sample.txt")
TOKENS, BITS, CHANNELS = 2048, (2, 3, 4, 8), (1024, 256, 128)
AXES = {"keys": "channel", "values": "token"}
SPARSE = {"outliers": 1 - 0.99}
WAYS = {  # {what a row is called: (what a ScalarQuantizer is told, whether it is calibrated)}
    "uniform": ({}, False),
    "uniform, first token exact": ({"sinks": 1}, False),
    "uniform, 1 % outliers": (SPARSE, False),
    "NormalFloat": ({"levels": "nf"}, False),
    "NUQ, 1 % outliers, calibrated": ({"levels": "nuq", **SPARSE}, True),
    "NUQ, 1 %, calibrated, first token": ({"levels": "nuq", "sinks": 1, **SPARSE}, True),
}
WINDOW_WAYS = ("uniform", "uniform, 1 % outliers", "NormalFloat", "NUQ, 1 % outliers, calibrated")


# -- What takes turns: a function here for each, which a contender's process calls


@cache
def activations(part, channels, seed=0):
    """Return [1,TOKENS,channels] that look like keys, of which some channels are large, or like values."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, TOKENS, channels, generator=generator)
    place = torch.randn(2, channels, generator=torch.Generator().manual_seed(1))
    return x * place[0].exp() + 2 * place[1] if part == "keys" else x


@cache
def codebook(part, bits):
    """Return NUQ levels [2**bits] for keys or values."""
    quantizer = qu.ScalarQuantizer(AXES[part], bits, **WAYS["NUQ, 1 % outliers, calibrated"][0])
    return quantizer.fit(activations(part, 128, seed=2), None, {}).codebook


@cache
def quantizer_of(part, channels, way, bits):
    options, is_calibrated = WAYS[way]
    quantizer = qu.ScalarQuantizer(AXES[part], bits, **options)
    if not is_calibrated:
        return quantizer
    fitted = replace(quantizer, levels="uniform").fit(activations(part, channels, seed=2), None, {})
    return replace(fitted, levels=quantizer.levels, codebook=codebook(part, bits))


def quantize(is_peer, part, channels, way, bits):
    x, quantizer = activations(part, channels), quantizer_of(part, channels, way, bits)
    peers.published(x[0], quantizer) if is_peer else quantizer.quantize(x)


def apart(is_peer, part, channels, way, bits):
    """Return by how many level steps ours and the peer's differ in their distance from what they quantize, at most.

    At a tie they may take different levels, of the same distance: everywhere else the distances tell levels apart.
    """
    x, quantizer = activations(part, channels)[0], quantizer_of(part, channels, way, bits)
    _, lo, hi = peers.exact_and_range(x[quantizer.sinks :], quantizer)
    ours, theirs = ((each - x).abs() for each in (quantizer.quantize(x[None]).values[0], peers.published(x, quantizer)))
    steps = ((ours - theirs).abs()[quantizer.sinks :] / ((hi - lo) / (2**bits - 1))).max().item()
    return steps if torch.equal(ours[: quantizer.sinks], theirs[: quantizer.sinks]) else math.inf


@cache
def bundled():
    """Return (the bundled model, its tokenizer)."""
    transformers.logging.disable_progress_bar()
    config, tokenizer = models.load_config_and_tokenizer(NANO)
    return models.load_model(Flags(NANO, device="cpu"), config), tokenizer


def plain_setting(model, bits, **options):
    plan = Plan(
        [Pair(*[options.pop("levels", "uniform")] * 2)],
        [Width(bits, bits)],
        AXES,
        {n: (n, v) for n, v in options.items()},
    )
    (setting,) = plan.settings(sites.find_sites(model)).values()
    return setting


@cache
def setting_of(way):
    """Return {site: quantizer} at 4 bits; way None is the unquantized model."""
    model, tokenizer = bundled()
    options, is_calibrated = WAYS.get(way, ({}, False))
    setting = plain_setting(model, 4 if way else 16, **options)
    if not is_calibrated:
        return setting
    windows = texts.calibration_windows(SAMPLE, tokenizer, TOKENS, 2, 0)
    return calibration.calibrate(model, windows, {way: setting})[way]


@cache
def evaluated_windows(seqlen):
    return texts.evaluation_windows(SAMPLE, bundled()[1], seqlen, seqlen // 2)


def loop(model, windows, *settings):
    return torch.cat([batch.figures for batch in qu.evaluate(model, sites.find_sites(model), windows, settings)])


def window(is_peer, way):
    """Return the mean loss of a window of TOKENS."""
    model, windows = bundled()[0], evaluated_windows(TOKENS)[:1]
    if is_peer:
        return peers.plain_loop(model, windows, peers.as_published(setting_of(way)))
    return loop(model, windows, setting_of(way))[..., 0].mean().item()


TURNS = {each.__name__: each for each in (quantize, apart, window)}


def timed(function, *args):
    """Return (CPU seconds, wall seconds, result) of function(*args)."""
    cpu, wall = time.process_time(), time.perf_counter()
    result = function(*args)
    return time.process_time() - cpu, time.perf_counter() - wall, result


def answer_requests(name):
    """Call what each line of standard input asks for, and answer with what timed returns."""
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        function, *args = json.loads(line)
        print(json.dumps(timed(TURNS[function], name == "peer", *args)), file=answers, flush=True)


class Contender:
    """A process in which ours, another version of it, or the peer waits for its turn."""

    def __init__(self, name, folder, threads):
        command = [sys.executable, __file__, "--contender", str(folder), name, str(threads)]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def turn(self, *request):
        """Return (CPU seconds, wall seconds, result)."""
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended in {request}: its error is above")
        return tuple(json.loads(line))


# -- Tables


def rounds(contenders, requests, budget, most=9):
    """Return [{(contender's name, request): (CPU seconds, wall seconds, result)}], a dict for each round.

    There are as many as begin within budget seconds. Each contender has answered each request once before.
    """
    calls, done = [(each, request) for request in requests for each in contenders], []
    for each, request in calls:
        each.turn(*request)
    start = time.perf_counter()
    while not done or (len(done) < most and time.perf_counter() - start < budget):
        done.append({(each.name, request): each.turn(*request) for each, request in calls})
    return done


def median(done, call, figure):
    return statistics.median(each[call][figure] for each in done)


def ratio(done, call, other, figure=0):
    """Return the median ratio of two calls in CPU time (figure 0) or wall time (figure 1)."""
    return statistics.median(each[call][figure] / each[other][figure] for each in done)


def both_ratios(done, call, other):
    """Return the cell of the ratio in CPU time, with that in wall time in brackets."""
    return f"{ratio(done, call, other):.2f} ({ratio(done, call, other, 1):.2f})", 16


def columns(*cells):
    """Print a row: the first cell is what it is about."""
    what, *figures = cells
    print(f"{what:52s}" + "".join(f"{each:>{width}s}" for each, width in figures), flush=True)


def quantizers_row(contenders, part, channels, way):
    """Print the row of one way to quantize; return by how many level steps ours and the peer's are apart."""
    olds = [each.name for each in contenders if each.name == "old"]
    cells, against_peer, against_old, steps = [], [], [], 0.0
    for bits in BITS:
        request = ("quantize", part, channels, way, bits)
        done = rounds(contenders, [request], budget=0.3)
        ours, peer = ("ours", request), ("peer", request)
        against_peer.append((f"{ratio(done, ours, peer):.2f}", 7))
        against_old += [(f"{ratio(done, ours, (old, request)):.2f}", 7) for old in olds]
        steps = max(steps, contenders[0].turn("apart", *request[1:])[2])
        if bits == 4:
            cells = [(f"{1000 * median(done, each, 1):.1f}", 10) for each in (ours, peer)]
            cells += [(f"{ratio(done, ours, peer, 1):.2f}", 12)]
    gap = ("", 5)
    columns(
        f"{part} C={channels}, {way}", *cells, gap, *against_peer, *[gap] * len(olds), *against_old, (f"{steps:.4f}", 9)
    )
    return steps


def quantizers_table(contenders):
    print(f"\nQuantizers alone, [1, {TOKENS}, C] in float32: milliseconds and wall time are those of 4 bits")
    each_width = [("", 5), *((f"{bits} bits", 7) for bits in BITS)]
    has_old = any(each.name == "old" for each in contenders)
    groups = [("CPU time, ours/peer", 33), *[("CPU time, ours/old", 33)] * has_old]
    columns("", ("", 10), ("", 10), ("wall time,", 12), *groups)
    columns("what", ("ours ms", 10), ("peer ms", 10), ("ours/peer", 12), *each_width * len(groups), ("apart", 9))
    rows = [(part, channels, way) for channels in CHANNELS for part in AXES for way in WAYS]
    worst = max(quantizers_row(contenders, *row) for row in rows)
    print("peer: the published arithmetic; keys per channel, values per token. Uniform: minimum, maximum, round.")
    print("Outliers: two quantiles by sorting. NormalFloat and NUQ: the distances to all levels.")
    print("apart: the most by which the errors of ours and of the peer differ, in level steps; rounding gives 0.0003.")
    print(f"the same function in all rows: {'yes' if worst < 0.01 else 'NO'} (at most {worst:.4f} steps apart)")


def windows_table(contenders):
    olds = [each.name for each in contenders if each.name == "old"]
    requests = [("window", way) for way in (None, *WINDOW_WAYS)]
    done = rounds(contenders, requests, budget=45)
    print(f"\nWhole windows of {TOKENS} tokens of llama3-nano, 4 bits; ratios of CPU time, of wall time in brackets")
    head = [("ours ms", 10), ("peer ms", 10), ("ours/peer", 16), ("ours/unquant.", 16), ("peer/unquant.", 16)]
    columns("what", *head, *[("ours/old", 16)] * len(olds), ("loss apart", 12))
    for request in requests:
        ours, peer = ("ours", request), ("peer", request)
        cells = [(f"{1000 * median(done, each, 1):.0f}", 10) for each in (ours, peer)]
        pairs = (
            (ours, peer),
            (ours, ("ours", requests[0])),
            (peer, ("peer", requests[0])),
            *((ours, (old, request)) for old in olds),
        )
        cells += [both_ratios(done, *pair) for pair in pairs]
        difference = abs(done[0][ours][2] / done[0][peer][2] - 1)
        columns(request[1] or "unquantized", *cells, (f"{difference:.0e}", 12))
    print("peer: a plain loop over model(ids) with whole logits and cross entropy; the published arithmetic in hooks.")
    print(f"unquant.: the same loop, unquantized. loss apart: relative, from rounding at ties. {len(done)} rounds.")


def sweep_table():
    model, windows = bundled()[0], evaluated_windows(1024)
    sweep = [{}, *(plain_setting(model, bits) for bits in (4, 3, 2))]
    loop(model, windows, *sweep)
    done = []
    for _ in range(5):
        alone = [timed(loop, model, windows, setting)[:2] for setting in sweep]
        done.append(
            {"ours": timed(loop, model, windows, *sweep), "peer": [sum(each) for each in zip(*alone, strict=True)]}
        )
    print(f"\nA sweep of 16, 4, 3 and 2 bits with KL divergence and agreement, {len(windows)} windows of 1024")
    columns("what", ("ours s", 10), ("peer s", 10), ("ours/peer", 16), ("CPU time from", 16), ("to", 8))
    singles = [each["ours"][0] / each["peer"][0] for each in done]
    cells = [(f"{median(done, each, 1):.2f}", 10) for each in ("ours", "peer")]
    cells += [both_ratios(done, "ours", "peer"), (f"{min(singles):.2f}", 16), (f"{max(singles):.2f}", 8)]
    columns("one loop for all", *cells)
    print("peer: four loops of one width each, which compare nothing. Ratio of CPU time, of wall time in brackets.")


def squared_error(unit, weights, levels):
    distance = unit - levels[qu.nearest(unit, levels)]
    return (weights.double() * distance.double() ** 2).sum().item()


def compare_kmeans(label, unit, weights, bits):
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    with threadpool_limits(torch.get_num_threads()):
        kmeans = KMeans(2**bits, n_init=10, random_state=0)
        peer = timed(lambda: kmeans.fit(unit[:, None].numpy(), sample_weight=weights.numpy()).cluster_centers_)
    turns = [timed(lambda: qu.kmeans_levels(qu.running_totals(unit, weights), bits)) for _ in range(5)]
    done = [{"ours": ours, "peer": peer} for ours in turns]
    their_levels = torch.from_numpy(peer[2]).flatten().float().sort().values
    error = squared_error(unit, weights, turns[0][2]) / squared_error(unit, weights, their_levels)
    cells = [(f"{median(done, each, 1):.3f}", 10) for each in ("ours", "peer")]
    ratios = f"{ratio(done, 'ours', 'peer'):.4f} ({ratio(done, 'ours', 'peer', 1):.4f})"
    columns(label, *cells, (ratios, 20), (f"{error:.6f}", 14))


def kmeans_table():
    print("\nThe fit of 16 NUQ levels; ratios of CPU time, of wall time in brackets")
    columns("what", ("ours s", 10), ("peer s", 10), ("ours/peer", 20), ("error ratio", 14))
    model, tokenizer = bundled()
    windows = texts.calibration_windows(SAMPLE, tokenizer, 1024, 8, 0)
    for site in sites.find_sites(model)[6:8]:  # the keys and the values of layer 3
        x = calibration.record(model, {site: False}, windows)[site]
        quantizer = qu.ScalarQuantizer(AXES[site.part], 4, **SPARSE).fit(x, None, {})
        keep, lo, hi = quantizer.keep_and_range(x)
        unit = ((x - lo) / (hi - lo) * 2 - 1)[~keep & (hi > lo)]
        compare_kmeans(f"layer 3 {site.part}, {len(unit):,} points", unit, torch.ones_like(unit), 4)
    generator = torch.Generator().manual_seed(0)
    unit = (torch.randn(1_000_000, generator=generator) / 3).clamp(-1, 1)
    compare_kmeans("1,000,000 points, weighted", unit, torch.rand(len(unit), generator=generator), 4)
    print("peer: scikit-learn's KMeans, n_init 10. error ratio: of the weighted squared errors, ours over the peer's.")


def attribution_table():
    from simquant import prefixes  # older versions, which --old may name, lack it

    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 32, "num_attention_heads": 8}
    config = LlamaConfig(**shape, num_key_value_heads=4, vocab_size=512)
    model, windows = LlamaForCausalLM(config).eval().requires_grad_(False), torch.randint(512, (6, 256))
    plan = Plan(
        [Pair("uniform", "uniform")], [BASELINE, Width(3, 3)], AXES, {"": ("outliers", 1 - 0.99)}, attribution=True
    )
    settings, done = list(plan.settings(sites.find_sites(model)).values()), []

    def attribution(stored):
        with prefixes.stored(model, stored):
            return loop(model, windows, *settings)

    for _ in range(2):
        done.append({"ours": timed(attribution, settings), "peer": timed(attribution, [])})
    print(f"\nAn attribution of {len(settings)} rows, 32 layers, {len(windows)} windows of 256")
    columns("what", ("ours s", 10), ("peer s", 10), ("ours/peer", 16))
    cells = [(f"{median(done, each, 1):.2f}", 10) for each in ("ours", "peer")]
    columns("each row starts at its first layer", *cells, both_ratios(done, "ours", "peer"))
    print("peer: every row runs all layers. Ratio of CPU time, of wall time in brackets.")
    is_same = torch.equal(done[0]["ours"][2], done[0]["peer"][2])
    print(f"the figures of both are {'the same bits' if is_same else 'DIFFERENT'}")


PARTS = {
    "quantizers": quantizers_table, "windows": windows_table, "sweep": sweep_table, "kmeans": kmeans_table,
    "attribution": attribution_table,
}  # fmt: skip
BY_TURNS = ("quantizers", "windows")


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated (default: %(default)s)")
    parser.add_argument(
        "--old", type=Path, help="a checkout of another version, which takes turns in the first two parts"
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    args = parser.parse_args()
    args.only = args.only.split(",")
    if unknown := [each for each in args.only if each not in PARTS]:
        parser.error(f"--only {unknown[0]!r}: the parts are {', '.join(PARTS)}")
    if args.threads < 1:
        parser.error(f"--threads {args.threads}: give 1 or more")
    if args.old and not (args.old / "quant_utils.py").is_file():
        parser.error(f"--old {args.old} has no quant_utils.py: name the top folder of a checkout")
    return args


def main():
    args = parse()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, threads: {args.threads}; the peer of each table is told below it")
    contenders = []
    if any(part in BY_TURNS for part in args.only):
        folders = {"ours": ROOT, "peer": ROOT} | ({"old": args.old.resolve()} if args.old else {})
        contenders = [Contender(name, folder, args.threads) for name, folder in folders.items()]
    for part in args.only:
        PARTS[part](*[contenders] * (part in BY_TURNS))


if __name__ == "__main__":
    getattr(speed, "install", lambda: None)()  # a version that lacks it did it on import
    if IS_CONTENDER:
        torch.set_num_threads(int(sys.argv[4]))
        answer_requests(sys.argv[3])
    else:
        main()
