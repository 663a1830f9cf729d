#!/usr/bin/env python3
"""What a 4-, 3- or 2-bit KV cache costs a Llama-style model in perplexity, with dynamic ranges: no calibration.

Keys are quantized before RoPE, by default with one scale per channel, values with one scale per token.
Quantization is simulated: this measures accuracy, and saves neither memory nor time.
"""

import signal
import sys
from argparse import Namespace

signal.signal(signal.SIGINT, signal.SIG_DFL)  # until qu.run takes over: Ctrl-C while torch loads ends us at once

import quant_utils as qu  # noqa: E402

EXAMPLES = """examples:
  %(prog)s meta-llama/Llama-3-8B --abits 4 --datasets wikitext2 --seqlen 2048
  %(prog)s meta-llama/Llama-3-8B --abits 2 --include_sparse --first_few_fp16 1 --output two_bits.json
  %(prog)s meta-llama/Llama-3-8B --abits 16 --datasets wikitext2,c4     the unquantized baseline
"""


def parse_args() -> Namespace:
    """Every flag, with its default."""
    parser = qu.Parser(description=__doc__, epilog=EXAMPLES)
    qu.add_model_flags(parser)
    qu.add_quantization_flags(parser)
    qu.add_text_flags(parser)
    qu.add_output_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Parse, load, evaluate, report."""
    args = parse_args()
    specs, text, which = qu.kv_spec(args), qu.eval_spec(args), qu.model_spec(args)
    qu.check_writable([args.output], text.datasets)

    qu.quiet_libraries()
    config, tokenizer = qu.load_config_and_tokenizer(which.name)
    windows = qu.load_texts(config, tokenizer, text)
    model = qu.load_model(which, config)

    with qu.simulate_quantization(model, qu.dynamic_quantizers(model, specs)):
        results = qu.print_results(model, windows, args.abits, text.batch_size)
    qu.print_settings(model, which.name, text, specs)
    if args.output is not None:
        qu.write_json(args.output, qu.report(__file__, args, model, results))


if __name__ == "__main__":
    sys.exit(qu.run(main))
