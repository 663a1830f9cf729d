#!/usr/bin/env python3
"""What a 4-, 3- or 2-bit KV cache costs a language model in perplexity, by methods that need no calibration.

By default keys are quantized before RoPE with one scale per channel, and values with one scale per token. --kv_format
has the formats of deployed caches, which quantize keys after RoPE.
Quantization is simulated: this measures accuracy, and saves neither memory nor time.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while libraries load ends the process without a traceback

import sys

from simquant import run
from simquant.command_line import parse
from simquant.endings import exit_status
from simquant.flags import Flags

EXAMPLES = """examples:
  %(prog)s meta-llama/Llama-3-8B --abits 4 --datasets wikitext2 --seqlen 2048
  %(prog)s meta-llama/Llama-3-8B --abits 2 --include_sparse --first_few_fp16 1 --output two_bits.json
  %(prog)s meta-llama/Llama-3-8B --abits 16,4,4/2,2 --datasets wikitext2,c4   a sweep, against the unquantized model
  %(prog)s meta-llama/Llama-3-8B --kv_format all --plot formats.png          deployed formats, side by side
  %(prog)s meta-llama/Llama-3-8B --abits 3 --attribution --plot layers.png   where the loss comes from
"""


def main() -> None:
    """Evaluate what the flags ask for, or set saved reports side by side."""
    flags, given = parse(Flags, __doc__, EXAMPLES)
    if flags.compare:
        run.compare(flags)
    else:
        run.evaluate(flags, given)


if __name__ == "__main__":
    sys.exit(exit_status(main))
