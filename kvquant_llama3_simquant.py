#!/usr/bin/env python3
"""What a KVQuant KV cache costs a Llama-style model in perplexity: calibrate once, then evaluate.

With --calibrate, ranges of the keys and, with --nuq, codebooks of keys and values are fitted on sample text and saved
to --quantizer_path. Without it they are read from there, with every quantization setting that the command leaves out.
Quantization is simulated: this measures accuracy, and saves neither memory nor time.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all this loads ends us at once

import shlex
import sys
from argparse import Namespace

import quant_utils as qu

EXAMPLES = """examples:
  %(prog)s meta-llama/Llama-3-8B --calibrate --abits 3 --nuq --fisher --include_sparse --quantizer_path nuq3.pkl
  %(prog)s meta-llama/Llama-3-8B --quantizer_path nuq3.pkl --datasets wikitext2,c4 --output nuq3.json
  %(prog)s meta-llama/Llama-3-8B --calibrate --abits 4,3,2 --nuq --quantizer_path nuq.pkl     three widths in one pass
  %(prog)s meta-llama/Llama-3-8B --quantizer_path nuq.pkl --baseline --plot nuq.png           all, against fp16
"""
QUANTIZATION = (
    "abits", "perchannel", "pertoken", "include_sparse", "sparsity_threshold", "first_few_fp16", "nf", "nuq",
    "norm", "clamp", "cap_outliers",
)  # fmt: skip
CALIBRATION = ("fisher", "fisher_weighting", "calib_dataset", "nsamples", "seed")
EVALUATION = (
    "baseline", "attribution", "output", "resume", "report_context", "plot", "plot_activations", "plot_layer",
)  # fmt: skip
WITHOUT_EFFECT = ("datasets", "limit", "batch_size", "compile")


def parse_args() -> tuple[Namespace, dict]:
    """(every flag with its default, the flags that the command line gives)."""
    parser = qu.Parser(description=__doc__, epilog=EXAMPLES)
    qu.add_model_flags(parser)
    qu.add_quantization_flags(parser)
    qu.add_calibration_flags(parser)
    qu.add_text_flags(parser)
    qu.add_output_flags(parser)
    defaults, absent = vars(parser.parse_args(["any"])), object()
    args = parser.parse_args(namespace=Namespace(**dict.fromkeys(defaults, absent)))
    given = {name: value for name, value in vars(args).items() if value is not absent}
    return Namespace(**defaults | given), given


def take_stored_settings(args: Namespace, given: dict, stored: dict) -> None:
    """Set what the command line leaves out to what the quantizer file says; refuse a contradiction."""

    def comparable(value):
        return sorted(value) if isinstance(value, list) else value

    widths = stored.pop("abits", None)
    if widths is None and "abits" not in given:
        raise qu.UserError(f"{args.quantizer_path!r} does not say how many bits it is for: give --abits")
    if widths is not None and (others := set(given.get("abits", ())) - {*widths, qu.UNQUANTIZED}):
        sides = f"{sorted(others)} on the command line contradicts {widths} in {args.quantizer_path!r}"
        raise qu.UserError(f"abits: {sides}; leave the flag out, or calibrate again")
    args.abits = given.get("abits", widths)
    for name, value in stored.items():
        if name in given and comparable(given[name]) != comparable(value):
            sides = f"{given[name]} on the command line contradicts {value} in {args.quantizer_path!r}"
            raise qu.UserError(f"{name}: {sides}; leave the flag out, or calibrate again")
        setattr(args, name, value)


def calibration(args: Namespace, given: dict) -> tuple[dict, qu.CalibrationSpec]:
    """({bits: specs} to fit, how); UserError for flags that do not go with --calibrate."""
    for name, value in given.items():
        flag = f"--{name}" if value is True else f"--{name} {value}"
        if name in EVALUATION:
            raise qu.UserError(f"{flag} is for an evaluation: leave it out with --calibrate")
        if name in WITHOUT_EFFECT:
            qu.warn(f"--{name} has no effect with --calibrate")
    sweep, how = qu.kv_sweep(args), qu.calibration_spec(args)
    if qu.UNQUANTIZED in sweep:
        raise qu.UserError("--calibrate has nothing to fit with --abits 16: leave 16 out")
    if not all(sweep.values()):
        raise qu.UserError("--calibrate has nothing to fit without --perchannel and --pertoken")
    if args.quantizer_path is None:
        raise qu.UserError("--calibrate needs --quantizer_path FILE to save the quantizers to")
    check_exportable(args, sweep)
    return sweep, how


def calibrate(args: Namespace, given: dict) -> None:
    """Fit, save, and print how well the quantizers fit and how to evaluate them."""
    sweep, how = calibration(args, given)
    with qu.one_for_all():
        which = qu.model_spec(args)
        qu.check_writable([args.quantizer_path, args.export_kvquant], [how.dataset, which.name])
        qu.quiet_libraries(args.quiet)
        config, tokenizer = qu.load_config_and_tokenizer(which.name)
        if args.list_sites:
            qu.print_sites(qu.skeleton(config), sweep)
            return
        windows = qu.load_calibration_windows(config, tokenizer, how)
        if args.dry_run:
            qu.print_calibration_plan(config, which.resolved(config), how, windows, sweep)
            return
        model = qu.load_model(which, config)

    with qu.one_of_many():
        fitted = qu.calibrate(model, windows, sweep, how)
    if qu.process_index() > 0:
        return
    quantizers = {bits: {name: quantizer for name, (quantizer, _) in sites.items()} for bits, sites in fitted.items()}
    settings = {name: getattr(args, name) for name in QUANTIZATION + CALIBRATION}
    qu.save_calibration(args.quantizer_path, quantizers, qu.provenance(model, which.name, settings, how.seqlen))
    if args.export_kvquant is not None:
        qu.export_kvquant(args.export_kvquant, quantizers[args.abits[0]])
    print(qu.fit_table(fitted))
    command = ["python3", sys.argv[0], which.name, "--quantizer_path", args.quantizer_path]
    command += ["--datasets", how.dataset, "--seqlen", str(how.seqlen)]
    for name in ("dtype", "device", "attn_implementation"):
        command += [f"--{name}", getattr(args, name)] if getattr(args, name) != "auto" else []
    print(f"\nSaved to {args.quantizer_path}. To evaluate:\n{shlex.join(command)}")


def check_exportable(args: Namespace, sweep: dict) -> None:
    """Raise UserError unless there is one width to export, or none is to be."""
    widths = [bits for bits, specs in sweep.items() if specs]
    if args.export_kvquant is not None and len(widths) != 1:
        has = ", ".join(map(str, widths)) or "nothing is quantized"
        raise qu.UserError(f"--export_kvquant {args.export_kvquant} writes one width, and here: {has}")


def evaluate(args: Namespace, given: dict) -> None:
    """Measure the perplexity with the quantizers of --quantizer_path, or without any at 16 bits."""
    stored: dict = {}
    if args.abits == [qu.UNQUANTIZED]:
        if args.quantizer_path is not None:
            qu.warn(f"--abits {qu.UNQUANTIZED} is the unquantized baseline: {args.quantizer_path!r} is not used")
            args.quantizer_path = None
    elif args.quantizer_path is None:
        raise qu.UserError("--quantizer_path FILE is missing: make one with --calibrate, or give --abits 16")
    else:
        stored = qu.load_calibration(args.quantizer_path)
        take_stored_settings(args, given, stored["settings"])
    sweep = qu.kv_sweep(args)
    check_exportable(args, sweep)

    def quantizers_of(model, specs: qu.KVSpec) -> dict[str, qu.Quantizer]:
        if not specs:
            return {}
        quantizers = qu.stored_quantizers(args.quantizer_path, stored, model, specs)
        if args.export_kvquant is not None and qu.process_index() == 0:
            qu.export_kvquant(args.export_kvquant, quantizers)
        return quantizers

    qu.evaluate(__file__, args, sweep, quantizers_of)


def main() -> None:
    """Calibrate or evaluate."""
    args, given = parse_args()
    if args.calibrate:
        calibrate(args, given)
    else:
        evaluate(args, given)


if __name__ == "__main__":
    sys.exit(qu.exit_status(main))
