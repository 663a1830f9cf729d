#!/usr/bin/env python3
"""What a 4-, 3- or 2-bit KV cache costs a Llama-style model in perplexity, with dynamic ranges: no calibration.

Keys are quantized before RoPE, by default with one scale per channel, values with one scale per token.
Quantization is simulated: this measures accuracy, and saves neither memory nor time.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while all this loads ends us at once

import sys
from argparse import Namespace

import quant_utils as qu

EXAMPLES = """examples:
  %(prog)s meta-llama/Llama-3-8B --abits 4 --datasets wikitext2 --seqlen 2048
  %(prog)s meta-llama/Llama-3-8B --abits 2 --include_sparse --first_few_fp16 1 --output two_bits.json
  %(prog)s meta-llama/Llama-3-8B --abits 16,4,3,2 --datasets wikitext2,c4     a sweep, against the unquantized model
  %(prog)s meta-llama/Llama-3-8B --abits 3 --attribution --plot layers.png   where the loss comes from
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
    """Parse, then evaluate with dynamic quantizers."""
    args = parse_args()
    qu.evaluate(__file__, args, qu.kv_sweep(args), qu.dynamic_quantizers)


if __name__ == "__main__":
    sys.exit(qu.exit_status(main))
