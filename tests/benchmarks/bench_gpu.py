#!/usr/bin/env python3
"""What an evaluation and a calibration cost on GPUs, on the shape of Llama-3-8B with random weights, beside our bounds
and beside peers: a plain loop over model(ids), the published arithmetic in our hooks, and the time that memory takes.

    python3 tests/benchmarks/bench_gpu.py                                       what one GPU shows, but for:
    python3 tests/benchmarks/bench_gpu.py --formats [NAME ...]                  what each named format costs
    python3 tests/benchmarks/bench_gpu.py --transform                           transform coding: its fit, its speed
    python3 tests/benchmarks/bench_gpu.py --job                                 a whole evaluation, in a new process
    accelerate launch --num_processes 4 tests/benchmarks/bench_gpu.py --scale   one GPU against all

bfloat16, sdpa, windows of 2048 random tokens, batch 1; medians in one process; nothing is asserted.
It needs torch, transformers and accelerate alone: the weights are made from the config.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import peers  # noqa: E402

import quant_utils as qu  # noqa: E402
from simquant import calibration, memory, prefixes, processes, report, sites, speed  # noqa: E402
from simquant.measuring import measure  # noqa: E402
from simquant.methods import METHODS  # noqa: E402
from simquant.plans import BASELINE, Pair, Plan, Width  # noqa: E402

REPEATS, WINDOWS, SEQLEN, WIKITEXT2 = 9, 16, 2048, 141
AXES = {"keys": "channel", "values": "token"}
LLAMA_3_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip


def random_model():
    torch.manual_seed(0)
    torch.cuda.set_device(processes.index(local=True))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_3_8B, attn_implementation="sdpa"))
    torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def random_windows(count, seqlen=SEQLEN):
    return torch.randint(LLAMA_3_8B["vocab_size"], (count, seqlen), generator=torch.Generator().manual_seed(0))


def seconds(function):
    """(what it takes, its result)."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def milliseconds(function):
    """(median of function() for one of WINDOWS windows, its last result)."""
    times, results = zip(*(seconds(function) for _ in range(REPEATS)), strict=True)
    return 1000 * statistics.median(times) / WINDOWS, results[-1]


def copy_bandwidth(size=2**30, copies=10):
    """Return bytes a second that a copy from and to the GPU's memory reads and writes."""
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def copy():
        for _ in range(copies):
            target.copy_(source)

    copy()
    return 2 * size * copies / statistics.median(seconds(copy)[0] for _ in range(REPEATS))


def floor_ms(model, bandwidth):
    """Return the milliseconds a window that reading all keys and values once and writing them once takes."""
    entries = SEQLEN * sum(site.channels for site in sites.find_sites(model))
    return 1000 * 2 * entries * model.dtype.itemsize / bandwidth


def busy_ms(events):
    """Return the milliseconds that kernels and copies took, of a profile's events."""
    on_gpu = [each for each in events if each.device_type.name == "CUDA"]
    return sum(each.time_range.elapsed_us() for each in on_gpu if not getattr(each, "is_user_annotation", False)) / 1000


def kernel_ms(function):
    """Return the milliseconds in which the GPU ran kernels and copies during function()."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        seconds(function)
    return busy_ms(seen.events())


def loop(model, windows, *settings):
    """The finished run of windows in these settings, each a (row, {site: quantizer})."""
    run = report.Run({"random": windows}, [row for row, _ in settings], sites.find_sites(model), 131072)
    for _ in measure(model, run, "random", [setting for _, setting in settings], 1):
        pass
    return run


def plan(bits, **options):
    method = options.pop("levels", "uniform")
    return Plan([Pair(method, method)], [Width(bits, bits)], AXES, {n: (n, v) for n, v in options.items()})


def dynamic(model, bits, **options):
    (each,) = plan(bits, **options).settings(sites.find_sites(model)).items()
    return each[0], qu.on_device(each[1])


def calibrated(model, windows=16, **options):
    """(seconds, (row, setting)) of 3-bit quantizers with 1 % outliers and the first token exact."""
    settings = plan(3, outliers=1 - 0.99, sinks=1, **options).settings(sites.find_sites(model))
    taken, fitted = seconds(lambda: calibration.calibrate(model, random_windows(windows), settings))
    ((row, setting),) = fitted.items()
    return taken, (row, qu.on_device(setting))


def peak_gib(weights):
    """Above the weights, since the last call."""
    peak = (torch.cuda.max_memory_allocated() - weights) / 2**30
    memory.reset_peak_memory()
    return peak


def show(label, figure, unit, bound=None):
    beside = "" if bound is None else f"   at most {bound}" + "   EXCEEDED" * (figure > bound)
    print(f"{label:66s} {figure:8.3f} {unit:4s}{beside}", flush=True)


def table(*cells):
    """Print a row: the first cell is what it is about."""
    print(f"{cells[0]:58s}" + "".join(f"{each:>14s}" for each in cells[1:]), flush=True)


def whole_job(model):
    """Everything that follows the loading of model and quantizers, in a process that has compiled nothing yet."""

    def job():
        with speed.compiled(model):
            return loop(model, random_windows(WIKITEXT2), three_bits)

    _, three_bits = calibrated(model, windows=1, levels="nuq")
    taken, _ = seconds(lambda: speed.is_to_compile("auto", torch.device("cuda")))
    show("trying the compiler, which comes before the loading of the model", taken, "s")
    taken, _ = seconds(job)
    show(f"nuq3 with 1 % outliers on {WIKITEXT2} windows, compilation included", taken, "s", 10)


def uncompiled(model, windows, weights):
    """(milliseconds of the plain loop, calibrated settings): the loops as they stand, and calibration."""
    peers.plain_loop(model, windows)
    peak_gib(weights)
    plain, _ = milliseconds(lambda: peers.plain_loop(model, windows))
    show("plain loop over model(ids), whole logits: a window", plain, "ms")
    show("... memory above the weights", peak_gib(weights), "GiB")
    eager, _ = milliseconds(lambda: loop(model, windows, dynamic(model, 16)))
    show("our loop, unquantized, not compiled", eager, "ms")
    show("... against the plain loop", eager / plain, "x")
    taken, static_nuq = calibrated(model, levels="nuq")
    show("calibration on 16 windows, NUQ and outliers", taken, "s", 15)
    show("... memory above the weights", peak_gib(weights), "GiB")
    taken, _ = calibrated(model, levels="nuq", fisher="paper")
    show("... with Fisher information", taken, "s", 30)
    show("... memory above the weights", peak_gib(weights), "GiB")
    return plain, calibrated(model, windows=4)[1], static_nuq


def published_table(model, windows):
    """What our quantizers add to a window where nothing is compiled, beside the published arithmetic."""
    print("\nMilliseconds added to a window of our loop, not compiled")
    table("what", "ours", "peer", "ours/peer")
    for label, options in (("dynamic, uniform", {}), ("dynamic, uniform, 1 % outliers", {"outliers": 1 - 0.99})):
        row, setting = dynamic(model, 3, **options)
        contenders = dynamic(model, 16), (row, setting), (row, peers.as_published(setting))
        calls = [lambda each=each: loop(model, windows, each) for each in contenders]
        for call in calls:
            call()
        turns = [[1000 * seconds(call)[0] / len(windows) for call in calls] for _ in range(3)]
        ours, peer = (statistics.median(turn[n] - turn[0] for turn in turns) for n in (1, 2))
        table(label, f"{ours:.2f}", f"{peer:.2f}", f"{ours / peer:.3f}")
    print("peer: the published arithmetic (minimum, maximum, round; two quantiles by sorting) in the same hooks.\n")


def compiled_rows(model, static_uniform, static_nuq):
    """Return [(label, (row, setting), bound of the ratio to the unquantized loop)]."""
    sparse = {"outliers": 1 - 0.99}
    return [
        ("dynamic, uniform", dynamic(model, 3), 1.015),
        ("dynamic, NormalFloat", dynamic(model, 3, levels="nf"), 1.015),
        ("unquantized, which shows the noise", dynamic(model, 16), None),
        ("calibrated keys, uniform, 1 % outliers, first token exact", static_uniform, 1.03),
        ("calibrated keys, NUQ, 1 % outliers, first token exact", static_nuq, 1.03),
        ("dynamic, uniform, 1 % outliers", dynamic(model, 3, **sparse), 1.06),
        ("dynamic, uniform, 1 % outliers, first token exact", dynamic(model, 3, sinks=1, **sparse), 1.06),
    ]


def ratios(model, windows, weights, bandwidth, known):
    """What each way to quantize costs against the unquantized loop; known is what uncompiled returned."""
    plain, *calibrated_settings = known
    unquantized, rows = dynamic(model, 16), compiled_rows(model, *calibrated_settings)
    taken, _ = seconds(lambda: loop(model, windows, unquantized))
    ours, _ = milliseconds(lambda: loop(model, windows, unquantized))
    show("our loop, unquantized, compiled", ours, "ms")
    show("... first pass over the windows", taken, "s")
    show("... against the plain loop", ours / plain, "x", 0.88)
    peak_gib(weights)
    settings = [each for _, each, _ in rows]
    for each in settings:
        loop(model, windows, each)
    turns = []  # because a GPU's clock follows its temperature
    for _ in range(REPEATS):
        base, *others = (seconds(lambda each=each: loop(model, windows, each))[0] for each in (unquantized, *settings))
        turns.append([taken / base for taken in others])
    medians = [statistics.median(taken) for taken in zip(*turns, strict=True)]
    for (label, _, bound), median in zip(rows, medians, strict=True):
        show(f"{label}: against ours unquantized", median, "x", bound)
    show("... memory above the weights, the most of all rows", peak_gib(weights), "GiB", 2)
    floor = floor_ms(model, bandwidth)
    floors_table(rows, medians, ours, floor)
    kernels_table(model, windows[:4], rows, [ours * median for median in medians], floor)


def floors_table(rows, medians, base, floor):
    """What each row adds to a window of base milliseconds, beside the time that its memory traffic takes."""
    print("\nMilliseconds added to a window of our compiled loop, and the ratio to the unquantized one")
    table("what", "ours", "peer", "ours/peer", "ratio", "peer's ratio")
    for (label, _, bound), median in zip(rows, medians, strict=True):
        added = (median - 1) * base
        beside = (f"{floor:.3f}", f"{added / floor:.2f}") if bound else ("", "")
        table(label, f"{added:.3f}", *beside, f"{median:.4f}", f"{1 + floor / base:.4f}" if bound else "")
    print("peer: the floor, a copy of all keys and values, each read once and written once at the measured bandwidth.")


def kernels_table(model, windows, rows, walls, floor):
    """How long kernels run in a window of each row, whose wall time in milliseconds is known."""
    layers, unquantized = model.config.num_hidden_layers, dynamic(model, 16)

    def busy(each):
        return kernel_ms(lambda: loop(model, windows, each)) / len(windows)

    busy(unquantized)  # the profiler takes its time to start
    base = busy(unquantized)
    print("\nKernels that the profiler sees in our compiled loop")
    if not base:
        print("none: this process may not profile the GPU")
        return
    table("what", "busy ms", "no kernel %", "us a layer", "peer us", "ours/peer")
    for (label, each, bound), wall in zip(rows, walls, strict=True):
        taken = busy(each)
        added = 1000 * (taken - base) / layers
        beside = (f"{1000 * floor / layers:.2f}", f"{added * layers / floor / 1000:.2f}") if bound else ("", "")
        table(label, f"{taken:.2f}", f"{100 * (1 - taken / wall):.2f}", f"{added:.2f}", *beside)
    print("busy: all kernels of a window. no kernel: the share of its wall time, unprofiled, in which none runs.")
    print("us a layer: what kernels take beyond those of an unquantized window. peer: the floor of the table above.\n")


def sweep_and_long_window(model, windows, weights):
    """A sweep against its settings alone; the memory of a long window."""
    sweep = [dynamic(model, bits) for bits in (16, 4, 3, 2)]
    loop(model, windows[:1], *sweep)
    alone = [milliseconds(lambda each=each: loop(model, windows, each)) for each in sweep]
    together, run = milliseconds(lambda: loop(model, windows, *sweep))
    show("sweep of 16, 4, 3, 2 bits: against its settings alone", together / sum(ms for ms, _ in alone), "x", 1.1)
    columns = [run.done("random").figures[:, column, 0] for column in range(len(sweep))]
    same = all(
        torch.equal(one.done("random").figures[:, 0, 0], column)
        for (_, one), column in zip(alone, columns, strict=True)
    )
    print(f"losses of the sweep and of its settings alone are {'the same bits' if same else 'DIFFERENT'}")
    peak_gib(weights)
    loop(model, random_windows(1, 32768), dynamic(model, 3, outliers=1 - 0.99, sinks=1))
    show("one window of 32768 tokens, dynamic, 1 %: memory above the weights", peak_gib(weights), "GiB", 12)


def attribution(model, window):
    """Each layer alone, from its own input as the unquantized model gave it, and from the first layer."""
    rows = Plan([Pair("uniform", "uniform")], [BASELINE, Width(3, 3)], AXES, {}, attribution=True).settings(
        sites.find_sites(model)
    )
    rows = [(row, qu.on_device(setting)) for row, setting in rows.items()]
    times, figures = {}, {}
    for is_stored in (False, True):
        with prefixes.stored(model, [setting for _, setting in rows] if is_stored else []), speed.compiled(model):
            loop(model, window, *rows)  # compiles
            times[is_stored], run = zip(*(seconds(lambda: loop(model, window, *rows)) for _ in range(3)), strict=True)
        figures[is_stored] = run[-1].done("random").figures.nan_to_num(-1.0)  # what nobody counts
    plain, sooner = (statistics.median(each) for each in times.values())
    show(f"attribution of {len(rows)} rows: rows start at their layer, against at the first", sooner / plain, "x", 0.62)
    print(f"its figures are {'the same bits' if torch.equal(*figures.values()) else 'DIFFERENT'}")


def formats(model, names):
    """Each named format beside the unquantized loop, and how long its graph takes to compile; all if none is named."""
    windows, unquantized = random_windows(4), dynamic(model, 16)
    table("format", "compile s", "graphs", "ms", "ratio", "GiB")
    with speed.compiled(model):
        loop(model, windows, unquantized)
        weights = torch.cuda.memory_allocated()
        for name in names or [name for name, method in METHODS.items() if not method.calibrated]:
            ((_, setting),) = (
                Plan([Pair(name, name)], [Width(4, 4)], AXES, {}).settings(sites.find_sites(model)).items()
            )
            each, graphs = (unquantized[0], qu.on_device(setting)), counters["stats"]["unique_graphs"]
            taken, _ = seconds(lambda each=each: loop(model, windows[:1], each))
            peak_gib(weights)
            turns = [[seconds(lambda s=s: loop(model, windows, s))[0] for s in (unquantized, each)] for _ in range(3)]
            plain, ours = (statistics.median(turn) for turn in zip(*turns, strict=True))
            cells = f"{taken:.1f}", str(counters["stats"]["unique_graphs"] - graphs), f"{250 * ours:.2f}"
            table(name, *cells, f"{ours / plain:.3f}", f"{peak_gib(weights):.2f}")


def transforms(model):
    """Transform coding without and with prediction: a calibration of five rates at once, and the loop at 2 bits."""
    windows, unquantized = random_windows(4), dynamic(model, 16)
    for label, options, bound in (("klt", {}, 1.15), ("klt, predict", {"predict": "all"}, 1.25)):
        options = {name: (name, value) for name, value in options.items()}
        five = Plan([Pair("klt", "klt")], [Width(bits, bits) for bits in (3, 2, 1.5, 1, 0.5)], AXES, options)
        asked = five.settings(sites.find_sites(model))
        taken, fitted = seconds(lambda asked=asked: calibration.calibrate(model, random_windows(16), asked))
        show(f"{label}: calibration of five rates on 16 windows", taken, "s", 60)
        row, setting = next((row, qu.on_device(setting)) for row, setting in fitted.items() if row.abits == 2)
        with speed.compiled(model):
            for each in (unquantized, (row, setting)):
                loop(model, windows, each)
            turns = [
                [seconds(lambda s=s: loop(model, windows, s))[0] for s in (unquantized, (row, setting))]
                for _ in range(REPEATS)
            ]
        plain, ours = (statistics.median(turn) for turn in zip(*turns, strict=True))
        show(f"{label}: against ours unquantized", ours / plain, "x", bound)


def scale(model):
    """The loop on the main process's GPU alone, then on those of all; both without compilation time."""
    count, main = processes.count(), processes.index() == 0
    windows, (row, three_bits) = random_windows(16 * count), dynamic(model, 3, outliers=1 - 0.99)
    found, alone = sites.find_sites(model), 1.0
    processes.gather([None])
    with speed.compiled(model):
        loop(model, windows[: 2 * count], (row, three_bits))  # compiles
        if main:
            alone, figures = seconds(lambda: list(qu.evaluate(model, found, windows, [three_bits])))
        processes.gather([None])
        taken, every = seconds(lambda: loop(model, windows, (row, three_bits)))
    if main:
        one, all_of_them = (
            each[..., 0].mean().exp().item()
            for each in (torch.cat([each.figures for each in figures]), every.done("random").figures)
        )
        show(f"{count} GPUs against one: throughput", alone / taken, "x")
        print(f"... at least {0.95 * count:.1f}")
        show("... perplexity, relative difference in millionths", 1e6 * abs(all_of_them / one - 1), "", 1)


if __name__ == "__main__":
    speed.install()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = random_model()
    if processes.index() == 0:
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.cuda.get_device_name()}")
    if "--scale" in sys.argv:
        scale(model)
    elif "--formats" in sys.argv:
        formats(model, sys.argv[sys.argv.index("--formats") + 1 :])
    elif "--transform" in sys.argv:
        transforms(model)
    elif "--job" in sys.argv:
        whole_job(model)
    else:
        windows, weights = random_windows(WINDOWS), torch.cuda.memory_allocated()
        bandwidth = copy_bandwidth()
        show("bandwidth of a copy inside the GPU's memory, read plus write", bandwidth / 1e9, "GB/s")
        known = uncompiled(model, windows, weights)
        published_table(model, windows[:4])
        with speed.compiled(model):
            ratios(model, windows, weights, bandwidth, known)
            sweep_and_long_window(model, windows, weights)
        attribution(model, windows[:1])
