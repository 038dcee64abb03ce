"""What does rounding weights cost in quality? Teacher-forced perplexity and top-1 of each weight mode.

Real text goes through the model a chunk at a time, once under each mode side by side, with an unquantized
cache. At each position: the loss of the token that follows, the likeliest token, and the divergence of the
distribution from that of the file's values as floats.

    python benchmarks/weight_quality.py
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.kv_quality import CHUNK, Judged, chunk_batch, log_softmax
from benchmarks.machine import cores, provenance, result_path, write
from benchmarks.real_text import SOURCE, real_tokens
from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.catalog import default_cache_dir, resolve
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from model_runtime.opening import open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent
from model_runtime.tokenizer import load_tokenizer

MODES: tuple[WeightMode, ...] = ("float", "auto", "int8", "fp8", "int4")
"""All are compared with the first."""


def judge(
    decoders: dict[WeightMode, Decoder], sequences: list[NDArray[np.int32]]
) -> dict[str, dict[str, float]]:
    """Each mode's figures over all positions of all sequences."""
    blocks = -(-max(map(len, sequences)) // BLOCK_TOKENS)
    arenas = {mode: decoder.new_arena(blocks, "none") for mode, decoder in decoders.items()}
    judged = {mode: Judged() for mode in MODES}
    for number, sequence in enumerate(sequences, 1):
        inputs, targets = sequence[:-1], sequence[1:].astype(np.int64)
        for start in range(0, len(inputs), CHUNK):
            batch = chunk_batch(inputs[start : start + CHUNK], start)
            base = None
            for mode in MODES:
                logprobs = log_softmax(decoders[mode].forward(batch, arenas[mode]))
                base = logprobs if base is None else base
                judged[mode].add(logprobs, base, targets[start : start + CHUNK])
        print(f"sequence {number} of {len(sequences)}", file=sys.stderr)
    return {mode: judged[mode].report(judged[MODES[0]]) for mode in MODES}


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
    cache = default_cache_dir()
    tokenizer = load_tokenizer(load_model(resolve(args.model, cache), cache), cache)
    wanted = args.window * args.sequences
    tokens = np.array(real_tokens(tokenizer)[:wanted], np.int32)
    if len(tokens) < wanted:
        raise SystemExit(f"the text has {len(tokens)} tokens, {wanted} are wanted")
    decoders: dict[WeightMode, Decoder] = {
        mode: open_decoder(DecoderOptions(args.model, threads=args.threads, weights=mode), silent)
        for mode in MODES
    }
    results = judge(decoders, list(tokens.reshape(args.sequences, args.window)))
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
