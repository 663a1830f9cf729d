#!/usr/bin/env python3
"""What a 4-, 3- or 2-bit KV cache costs a Llama-style model in perplexity, with dynamic ranges: no calibration.

Keys are quantized before RoPE, by default with one scale per channel, values with one scale per token.
Quantization is simulated: this measures accuracy, and saves neither memory nor time.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import quant_utils as qu

EXAMPLES = """examples:
  %(prog)s meta-llama/Llama-3-8B --abits 4 --datasets wikitext2 --seqlen 2048
  %(prog)s meta-llama/Llama-3-8B --abits 2 --include_sparse --first_few_fp16 1 --output two_bits.json
  %(prog)s meta-llama/Llama-3-8B --abits 16 --datasets wikitext2,c4     the unquantized baseline
"""


def parse_args():
    parser = qu.Parser(description=__doc__, epilog=EXAMPLES)
    qu.add_model_flags(parser)
    qu.add_quantization_flags(parser)
    qu.add_text_flags(parser)
    qu.add_output_flags(parser)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    specs = qu.kv_spec(args)
    text = qu.EvalSpec(tuple(args.datasets), args.seqlen, args.limit, args.batch_size)
    which = qu.ModelSpec(args.model, args.dtype, args.device, args.attn_implementation)
    if args.output:
        qu.check_writable(args.output)

    qu.quiet_libraries()
    config, tokenizer = qu.load_config_and_tokenizer(which.name)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions and text.seqlen > positions:
        qu.warn(f"seqlen {text.seqlen} exceeds the {positions} positions that the model was made for")
    windows = {name: qu.load_windows(name, tokenizer, text) for name in text.datasets}
    model = qu.load_model(which, config)

    results = []
    with qu.simulate_quantization(model, specs):
        print(header := qu.table_header(text.datasets), flush=True)
        for name, ids in windows.items():
            results.append(qu.measure(model, ids, name, args.abits, text.batch_size))
            print(qu.table_row(results[-1], header), flush=True)

    attention = model.config._attn_implementation
    how = f"{qu.dtype_name(model)} on {model.device}, {attention} attention, windows of {text.seqlen} tokens"
    print(f"\n{which.name}: {how}")
    for name in text.datasets:
        print(f"{name}: {qu.DATASETS.get(name, 'documents joined by blank lines, in disjoint windows')}")
    for name, spec in specs.items():
        print(f"{name}: {spec}")

    if args.output:
        settings = {name: value for name, value in vars(args).items() if name != "model"}
        settings |= {"dtype": qu.dtype_name(model), "device": str(model.device), "attn_implementation": attention}
        report = {"script": Path(__file__).name, "model": which.name, "settings": settings}
        report |= {"environment": qu.environment(model), "results": [asdict(result) for result in results]}
        qu.write_json(args.output, report)


if __name__ == "__main__":
    sys.exit(qu.run(main))
