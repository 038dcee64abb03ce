"""What does a quantized KV cache cost in quality? Teacher-forced perplexity and top-1 of each cache format.

Real text goes through `Decoder.forward` over the real arena, a chunk at a time, once in each format side by
side. Every key and value is read back from the arena, so that these are the logits that serving draws from.
At each position: the loss of the token that follows, the likeliest token, and the divergence of the
distribution from that of the unquantized cache. Bits of an element are those of its block, scales included.

    python benchmarks/kv_quality.py

Exit status 1 if int8-g64 changes perplexity by more than 0.5%, or the likeliest token at more than 1% of the
positions.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from benchmarks.machine import cores, provenance, result_path, write
from benchmarks.real_text import SOURCE, real_tokens
from kvrelay_kernels.interface import Arena, StepBatch, WeightMode
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.catalog import default_cache_dir, resolve
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from model_runtime.opening import open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent
from model_runtime.tokenizer import load_tokenizer

FORMATS = (
    "none", "int8-g64", "int8-g32", "mxfp8", "int6-g64", "int6-g32", "int4-g32", "int4-g64", "nvfp4",
    "mxfp4", "turbo4", "turbo3",
)  # fmt: skip
"""All are compared with the first."""
GATED = "int8-g64"
MAX_PERPLEXITY_CHANGE = 0.005
MAX_TOP1_CHANGED = 0.01
CHUNK = 256
"""Rows whose logits are in memory at once: 50 MB for a vocabulary of 49152."""

Floats = NDArray[np.float64]


@dataclass
class Judged:
    """What one format made of the positions so far."""

    losses: list[Floats] = field(default_factory=list)
    likeliest: list[NDArray[np.intp]] = field(default_factory=list)
    margins: list[Floats] = field(default_factory=list)
    """Nats by which the unquantized cache puts its likeliest token before this format's; 0 where alike."""
    divergences: list[Floats] = field(default_factory=list)

    def add(
        self, logprobs: NDArray[np.float32], base: NDArray[np.float32], targets: NDArray[np.int64]
    ) -> None:
        """Take a chunk's log-probabilities, and those of the unquantized cache."""
        rows = np.arange(len(targets))
        self.losses.append(-logprobs[rows, targets].astype(np.float64))
        self.likeliest.append(logprobs.argmax(axis=1))
        self.margins.append((base.max(axis=1) - base[rows, self.likeliest[-1]]).astype(np.float64))
        divergence = np.exp(base) * (base - logprobs)
        self.divergences.append(divergence.sum(axis=1, dtype=np.float64))

    def report(self, base: "Judged") -> dict[str, float]:
        """The figures, beside those of the unquantized cache at the same positions."""
        losses, before = np.concatenate(self.losses), np.concatenate(base.losses)
        likeliest, likeliest_before = np.concatenate(self.likeliest), np.concatenate(base.likeliest)
        divergence, margins = np.concatenate(self.divergences), np.concatenate(self.margins)
        change, changed = losses - before, likeliest != likeliest_before
        return {
            "perplexity": float(np.exp(losses.mean())),
            "perplexity_change": float(np.expm1(change.mean())),
            "perplexity_change_standard_error": float(change.std(ddof=1) / np.sqrt(len(change))),
            "top1_changed": float(changed.mean()),
            "top1_changed_standard_error": float(
                np.sqrt(changed.mean() * (1 - changed.mean()) / len(changed))
            ),
            "top1_margin_where_changed": float(np.median(margins[changed])) if changed.any() else 0.0,
            "mean_kl": float(divergence.mean()),
            "p99_kl": float(np.quantile(divergence, 0.99)),
        }


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Along the last dimension; `logits` is overwritten."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def chunk_batch(tokens: NDArray[np.int32], start: int) -> StepBatch:
    """The next rows of one sequence, whose blocks lie in the arena in order; all logits are wanted."""
    length = start + len(tokens)
    rows = np.arange(len(tokens), dtype=np.int32)
    return StepBatch(
        token_ids=tokens,
        positions=rows + np.int32(start),
        row_starts=np.array([0, len(tokens)], np.int32),
        lengths=np.array([length], np.int32),
        block_tables=np.arange(-(-length // BLOCK_TOKENS), dtype=np.int32)[None],
        logit_rows=rows,
    )


def text_sequences(model: str, count: int, window: int) -> list[NDArray[np.int32]]:
    """Stretches of real text, each `[window]` tokens of the model. Raises SystemExit if there is less."""
    cache = default_cache_dir()
    tokenizer = load_tokenizer(load_model(resolve(model, cache), cache), cache)
    tokens = np.array(real_tokens(tokenizer)[: count * window], np.int32)
    if len(tokens) < count * window:
        raise SystemExit(f"the text has {len(tokens)} tokens, {count * window} are wanted")
    return list(tokens.reshape(count, window))


def judge(
    ways: Mapping[str, tuple[Decoder, str]], sequences: list[NDArray[np.int32]]
) -> dict[str, dict[str, float]]:
    """Figures of each way, a decoder and a cache format, over all positions, compared with the first way."""
    blocks = -(-max(map(len, sequences)) // BLOCK_TOKENS)
    arenas: dict[str, Arena] = {name: decoder.new_arena(blocks, fmt) for name, (decoder, fmt) in ways.items()}
    judged = {name: Judged() for name in ways}
    for number, sequence in enumerate(sequences, 1):
        inputs, targets = sequence[:-1], sequence[1:].astype(np.int64)
        for start in range(0, len(inputs), CHUNK):
            batch = chunk_batch(inputs[start : start + CHUNK], start)
            base = None
            for name, (decoder, _) in ways.items():
                logprobs = log_softmax(decoder.forward(batch, arenas[name]))
                base = logprobs if base is None else base
                judged[name].add(logprobs, base, targets[start : start + CHUNK])
        print(f"  sequence {number} of {len(sequences)}", file=sys.stderr)
    first = judged[next(iter(ways))]
    return {name: one.report(first) for name, one in judged.items()}


def failures(results: dict[str, dict[str, dict[str, float]]]) -> list[str]:
    """What the gated format does worse than it may, in words."""
    found = []
    for weights, formats in results.items():
        perplexity, top1 = formats[GATED]["perplexity_change"], formats[GATED]["top1_changed"]
        if abs(perplexity) > MAX_PERPLEXITY_CHANGE:
            found.append(f"{GATED}, weights {weights}: perplexity changes by {perplexity:+.3%}")
        if top1 > MAX_TOP1_CHANGED:
            found.append(f"{GATED}, weights {weights}: top-1 changes at {top1:.2%} of the positions")
    return found


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="smollm2")
    modes = ["auto", "float", "int8", "fp8", "int4"]
    parser.add_argument("--weights", nargs="+", default=["auto"], choices=modes)
    parser.add_argument("--window", type=int, default=2049, help="tokens of a sequence, one not judged")
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--out", type=Path, default=result_path("kv_quality"))
    return parser.parse_args()


def main() -> int:
    """Judge all formats under each kind of weights, write the result, and say whether the gate holds."""
    args = arguments()
    sequences = text_sequences(args.model, args.sequences, args.window)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for weights in args.weights:
        print(f"weights {weights}", file=sys.stderr)
        options = DecoderOptions(args.model, threads=args.threads, weights=cast(WeightMode, weights))
        decoder = open_decoder(options, silent)
        judged = judge({name: (decoder, name) for name in FORMATS}, sequences)
        results[weights] = {
            name: {"bits_per_element": decoder.layout(name).bits_per_element, **figures}
            for name, figures in judged.items()
        }
    faults = failures(results)
    report: dict[str, Any] = {
        **provenance(("numpy", "numba", "tokenizers")),
        "model": args.model,
        "backend": "cpu",
        "text": SOURCE,
        "window_tokens": args.window,
        "sequences": args.sequences,
        "positions": (args.window - 1) * args.sequences,
        "gate": {
            "format": GATED,
            "max_perplexity_change": MAX_PERPLEXITY_CHANGE,
            "max_top1_changed": MAX_TOP1_CHANGED,
            "passed": not faults,
        },
        "results": results,
    }
    write(report, args.out)
    show(results)
    for fault in faults:
        print(f"FAIL {fault}")
    if not faults:
        print(
            f"PASS {GATED} changes perplexity by at most {MAX_PERPLEXITY_CHANGE:.1%} "
            f"and top-1 at no more than {MAX_TOP1_CHANGED:.0%} of the positions"
        )
    return 1 if faults else 0


def show(results: dict[str, dict[str, dict[str, float]]]) -> None:
    """Print a table."""
    titles = f"{'weights':8} {'format':9} {'bits':>6} {'perplexity':>10} {'change':>9} {'error':>8}"
    print(f"{titles} {'top-1':>7} {'KL':>9}")
    for weights, formats in results.items():
        for name, r in formats.items():
            print(
                f"{weights:8} {name:9} {r['bits_per_element']:6.3f} {r['perplexity']:10.4f} "
                f"{r['perplexity_change']:+9.3%} {r['perplexity_change_standard_error']:8.3%} "
                f"{r['top1_changed']:7.2%} {r['mean_kl']:9.2e}"
            )


if __name__ == "__main__":
    sys.exit(main())
