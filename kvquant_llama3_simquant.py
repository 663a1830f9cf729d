#!/usr/bin/env python3
"""What a KVQuant KV cache costs a Llama-style model in perplexity: calibrate once, then evaluate.

With --calibrate, ranges of the keys and, with --nuq, codebooks of keys and values are fitted on sample text and saved
to --quantizer_path. Without it they are read from there, with every quantization setting that the command leaves out.
Quantization is simulated: this measures accuracy, and saves neither memory nor time.
"""

import shlex
import signal
import sys
from argparse import Namespace

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until qu.run takes over: Ctrl-C while torch loads ends us at once

import quant_utils as qu  # noqa: E402

EXAMPLES = """examples:
  %(prog)s meta-llama/Llama-3-8B --calibrate --abits 3 --nuq --fisher --include_sparse --quantizer_path nuq3.pkl
  %(prog)s meta-llama/Llama-3-8B --quantizer_path nuq3.pkl --datasets wikitext2,c4 --output nuq3.json
  %(prog)s meta-llama/Llama-3-8B --abits 16     the unquantized baseline
"""
QUANTIZATION = (
    "abits", "perchannel", "pertoken", "include_sparse", "sparsity_threshold", "first_few_fp16", "nf", "nuq",
    "norm", "clamp", "cap_outliers",
)  # fmt: skip
CALIBRATION = ("fisher", "fisher_weighting", "calib_dataset", "nsamples", "seed")


def parse_args() -> tuple[Namespace, dict]:
    """(every flag with its default, the settings of QUANTIZATION and CALIBRATION that the command line gives)."""
    parser = qu.Parser(description=__doc__, epilog=EXAMPLES)
    qu.add_model_flags(parser)
    qu.add_quantization_flags(parser)
    qu.add_calibration_flags(parser)
    qu.add_text_flags(parser)
    qu.add_output_flags(parser)
    absent = object()
    args = parser.parse_args(namespace=Namespace(**dict.fromkeys(QUANTIZATION + CALIBRATION, absent)))
    given = {
        name: value for name, value in vars(args).items() if name in QUANTIZATION + CALIBRATION and value is not absent
    }
    for name in set(QUANTIZATION + CALIBRATION) - set(given):
        setattr(args, name, parser.get_default(name))
    return args, given


def take_stored_settings(args: Namespace, given: dict, stored: dict) -> None:
    """Set what the command line leaves out to what the quantizer file says; refuse a contradiction."""

    def comparable(value):
        return sorted(value) if isinstance(value, list) else value

    for name, value in stored.items():
        if name in given and comparable(given[name]) != comparable(value):
            sides = f"{given[name]} on the command line contradicts {value} in {args.quantizer_path!r}"
            raise qu.UserError(f"{name}: {sides}; leave the flag out, or calibrate again")
        setattr(args, name, value)
    if "abits" not in stored and "abits" not in given:
        raise qu.UserError(f"{args.quantizer_path!r} does not say how many bits it is for: give --abits")


def calibrate(args: Namespace) -> None:
    """Fit, save, and print how well the quantizers fit and how to evaluate them."""
    specs, which, how = qu.kv_spec(args), qu.model_spec(args), qu.calibration_spec(args)
    if not specs:
        raise qu.UserError("--calibrate has nothing to fit with --abits 16, or without --perchannel and --pertoken")
    if args.quantizer_path is None:
        raise qu.UserError("--calibrate needs --quantizer_path FILE to save the quantizers to")
    if args.output is not None:
        raise qu.UserError(f"--output {args.output} is for an evaluation's results: leave it out with --calibrate")
    qu.check_writable([args.quantizer_path, args.export_kvquant], [how.dataset])

    qu.quiet_libraries()
    config, tokenizer = qu.load_config_and_tokenizer(which.name)
    windows = qu.load_calibration_windows(config, tokenizer, how)
    model = qu.load_model(which, config)

    fitted = qu.calibrate(model, windows, specs, how)
    quantizers = {name: quantizer for name, (quantizer, _) in fitted.items()}
    settings = {name: getattr(args, name) for name in QUANTIZATION + CALIBRATION}
    qu.save_calibration(args.quantizer_path, quantizers, qu.provenance(model, which.name, settings, how.seqlen))
    if args.export_kvquant is not None:
        qu.export_kvquant(args.export_kvquant, quantizers)
    print(qu.fit_table({name: fit for name, (_, fit) in fitted.items()}))
    command = ["python3", sys.argv[0], which.name, "--quantizer_path", args.quantizer_path]
    command += ["--datasets", how.dataset, "--seqlen", str(how.seqlen)]
    for name in ("dtype", "device", "attn_implementation"):
        command += [f"--{name}", getattr(args, name)] if getattr(args, name) != "auto" else []
    print(f"\nSaved to {args.quantizer_path}. To evaluate:\n{shlex.join(command)}")


def evaluate(args: Namespace, given: dict) -> None:
    """Measure the perplexity with the quantizers of --quantizer_path, or without any at 16 bits."""
    stored = None
    if args.abits == qu.UNQUANTIZED:
        if args.quantizer_path is not None:
            qu.warn(f"--abits {args.abits} is the unquantized baseline: {args.quantizer_path!r} is not used")
    else:
        if args.quantizer_path is None:
            raise qu.UserError("--quantizer_path FILE is missing: make one with --calibrate, or give --abits 16")
        stored = qu.load_calibration(args.quantizer_path)
        take_stored_settings(args, given, stored["settings"])
    specs, text, which = qu.kv_spec(args), qu.eval_spec(args), qu.model_spec(args)
    if args.export_kvquant is not None and not specs:
        raise qu.UserError(f"--export_kvquant {args.export_kvquant} has nothing to write: nothing is quantized")
    qu.check_writable([args.export_kvquant, args.output], [*text.datasets, args.quantizer_path])

    qu.quiet_libraries()
    config, tokenizer = qu.load_config_and_tokenizer(which.name)
    windows = qu.load_texts(config, tokenizer, text)
    model = qu.load_model(which, config)

    quantizers = qu.stored_quantizers(args.quantizer_path, stored, model, specs) if stored else {}
    if args.export_kvquant is not None:
        qu.export_kvquant(args.export_kvquant, quantizers)
    with qu.simulate_quantization(model, quantizers):
        results = qu.print_results(model, windows, args.abits, text.batch_size)
    qu.print_settings(model, which.name, text, specs)
    if args.output is not None:
        qu.write_json(args.output, qu.report(__file__, args, model, results))


def main() -> None:
    """Calibrate or evaluate."""
    args, given = parse_args()
    if args.calibrate:
        calibrate(args)
    else:
        evaluate(args, given)


if __name__ == "__main__":
    sys.exit(qu.run(main))
