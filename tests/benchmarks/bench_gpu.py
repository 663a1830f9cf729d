#!/usr/bin/env python3
"""What an evaluation and a calibration cost on GPUs, on the shape of Llama-3-8B with random weights, beside our bounds.

    python3 tests/benchmarks/bench_gpu.py                                       what one GPU shows, but for:
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
import torch.nn.functional as F
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import quant_utils as qu  # noqa: E402
from simquant import memory, processes, report, sites, speed  # noqa: E402
from simquant.methods import Plan, Width  # noqa: E402
from simquant.run import measure  # noqa: E402

REPEATS, WINDOWS, SEQLEN, WIKITEXT2 = 9, 16, 2048, 141
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


@torch.inference_mode()
def plain_loop(model, windows):
    for ids in windows.cuda()[:, None]:
        logits = model(ids, use_cache=False).logits[0, :-1].float()
        F.cross_entropy(logits, ids[0, 1:]).item()


def loop(model, windows, *settings):
    """The finished run of windows in these settings, each a (row, {site: quantizer})."""
    run = report.Run({"random": windows}, [row for row, _ in settings], sites.find_sites(model), 131072)
    for _ in measure(model, run, "random", [setting for _, setting in settings], 1):
        pass
    return run


def plan(bits, **options):
    method = options.pop("levels", "uniform")
    return Plan(
        method, [Width(bits, bits)], {"keys": "channel", "values": "token"}, {n: (n, v) for n, v in options.items()}
    )


def dynamic(model, bits, **options):
    (each,) = plan(bits, **options).settings(sites.find_sites(model)).items()
    return each[0], qu.on_device(each[1])


def calibrated(model, windows=16, **options):
    """(seconds, (row, setting)) of 3-bit quantizers with 1 % outliers and the first token exact."""
    settings = plan(3, outliers=1 - 0.99, sinks=1, **options).settings(sites.find_sites(model))
    taken, fitted = seconds(lambda: qu.calibrate(model, random_windows(windows), settings))
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
    plain_loop(model, windows)
    peak_gib(weights)
    plain, _ = milliseconds(lambda: plain_loop(model, windows))
    show("plain loop over model(ids), whole logits: a window", plain, "ms")
    show("... memory above the weights", peak_gib(weights), "GiB")
    eager, _ = milliseconds(lambda: loop(model, windows, dynamic(model, 16)))
    show("our loop, unquantized, not compiled", eager, "ms")
    taken, static_nuq = calibrated(model, levels="nuq")
    show("calibration on 16 windows, NUQ and outliers", taken, "s", 15)
    show("... memory above the weights", peak_gib(weights), "GiB")
    taken, _ = calibrated(model, levels="nuq", fisher="paper")
    show("... with Fisher information", taken, "s", 30)
    show("... memory above the weights", peak_gib(weights), "GiB")
    return plain, calibrated(model, windows=4)[1], static_nuq


def ratios(model, windows, weights, plain, static_uniform, static_nuq):
    """What each way to quantize costs against the unquantized loop."""
    sparse = {"outliers": 1 - 0.99}
    rows = [
        ("dynamic, uniform", dynamic(model, 3), 1.015),
        ("dynamic, NormalFloat", dynamic(model, 3, levels="nf"), 1.015),
        ("unquantized, which shows the noise", dynamic(model, 16), None),
        ("calibrated keys, uniform, 1 % outliers, first token exact", static_uniform, 1.03),
        ("calibrated keys, NUQ, 1 % outliers, first token exact", static_nuq, 1.03),
        ("dynamic, uniform, 1 % outliers", dynamic(model, 3, **sparse), 1.06),
        ("dynamic, uniform, 1 % outliers, first token exact", dynamic(model, 3, sinks=1, **sparse), 1.06),
    ]
    unquantized = dynamic(model, 16)
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
    for (label, _, bound), taken in zip(rows, zip(*turns, strict=True), strict=True):
        show(f"{label}: against ours unquantized", statistics.median(taken), "x", bound)
    show("... memory above the weights, the most of all rows", peak_gib(weights), "GiB", 2)


def sweep_and_long_window(model, windows, weights):
    """A sweep against its settings alone; the memory of a long window."""
    sweep = [dynamic(model, bits) for bits in (16, 4, 3, 2)]
    loop(model, windows[:1], *sweep)
    alone = [milliseconds(lambda each=each: loop(model, windows, each)) for each in sweep]
    together, run = milliseconds(lambda: loop(model, windows, *sweep))
    show("sweep of 16, 4, 3, 2 bits: against its settings alone", together / sum(ms for ms, _ in alone), "x", 1.1)
    columns = [run.done("random")[:, column, 0] for column in range(len(sweep))]
    same = all(
        torch.equal(one.done("random")[:, 0, 0], column) for (_, one), column in zip(alone, columns, strict=True)
    )
    print(f"losses of the sweep and of its settings alone are {'the same bits' if same else 'DIFFERENT'}")
    peak_gib(weights)
    loop(model, random_windows(1, 32768), dynamic(model, 3, outliers=1 - 0.99, sinks=1))
    show("one window of 32768 tokens, dynamic, 1 %: memory above the weights", peak_gib(weights), "GiB", 12)


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
        one, all_of_them = (each[..., 0].mean().exp().item() for each in (torch.cat(figures), every.done("random")))
        show(f"{count} GPUs against one: throughput", alone / taken, "x")
        print(f"... at least {0.95 * count:.1f}")
        show("... perplexity, relative difference in millionths", 1e6 * abs(all_of_them / one - 1), "", 1)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = random_model()
    if processes.index() == 0:
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.cuda.get_device_name()}")
    if "--scale" in sys.argv:
        scale(model)
    elif "--job" in sys.argv:
        whole_job(model)
    else:
        windows, weights = random_windows(WINDOWS), torch.cuda.memory_allocated()
        known = uncompiled(model, windows, weights)
        with speed.compiled(model):
            ratios(model, windows, weights, *known)
            sweep_and_long_window(model, windows, weights)
