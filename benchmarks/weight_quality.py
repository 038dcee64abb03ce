"""What does rounding weights cost in quality? Teacher-forced perplexity and top-1 of each weight mode.

Real text goes through the model a chunk at a time, once under each mode side by side, with an unquantized
cache. At each position: the loss of the token that follows, the likeliest token, and the divergence of the
distribution from that of the file's values as floats.

    python benchmarks/weight_quality.py
"""

import argparse
from pathlib import Path

from benchmarks.kv_quality import judge, text_sequences
from benchmarks.machine import cores, provenance, result_path, write
from benchmarks.real_text import SOURCE
from kvrelay_kernels.interface import WeightMode
from model_runtime.opening import open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent

MODES: tuple[WeightMode, ...] = ("float", "auto", "int8", "fp8", "int4")
"""All are compared with the first."""


def main() -> None:
    """Judge all modes, write the result and print a table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--window", type=int, default=2049, help="tokens of a sequence, one not judged")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, default=result_path("weight_quality"))
    args = parser.parse_args()
    decoders = {
        mode: open_decoder(DecoderOptions(args.model, threads=args.threads, weights=mode), silent)
        for mode in MODES
    }
    ways = {mode: (decoder, "none") for mode, decoder in decoders.items()}
    results = judge(ways, text_sequences(args.model, args.sequences, args.window))
    report = {
        **provenance(("numpy", "numba", "tokenizers")),
        "model": args.model,
        "backend": "cpu",
        "text": SOURCE,
        "window_tokens": args.window,
        "sequences": args.sequences,
        "positions": (args.window - 1) * args.sequences,
        "results": results,
    }
    write(report, args.out)
    print(f"{'weights':8} {'perplexity':>10} {'change':>9} {'error':>8} {'top-1':>7} {'KL':>9}")
    for mode, r in results.items():
        print(
            f"{mode:8} {r['perplexity']:10.4f} {r['perplexity_change']:+9.3%} "
            f"{r['perplexity_change_standard_error']:8.3%} {r['top1_changed']:7.2%} {r['mean_kl']:9.2e}"
        )


if __name__ == "__main__":
    main()
