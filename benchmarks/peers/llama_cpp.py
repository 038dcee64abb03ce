"""Measure llama.cpp as a peer: prompt and decode rates of one GGUF model on the CPU.

Run with the interpreter of an environment of its own, where llama-cpp-python was built
from its sdist with CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release":
    PEERS/bin/python benchmarks/peers/llama_cpp.py --model M.gguf --json out.json

It does what llama-bench does: arbitrary tokens, logits of the last one only, no sampling, and an
untimed first round. Each trial runs every measurement once, so that they meet the same weather.
`cpu_share` is the CPU time had over `threads` x wall time: well below 1 means a busy neighbour.
"""

import argparse
import ctypes
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.pop(0)  # this script's folder, where its own name would hide the package
llama: Any = importlib.import_module("llama_cpp")

BATCH, UBATCH = 2048, 512
FLASH = {"off": llama.LLAMA_FLASH_ATTN_TYPE_DISABLED, "on": llama.LLAMA_FLASH_ATTN_TYPE_ENABLED}


class Case(NamedTuple):
    """Read a prompt of `tokens`, or decode after one, with `batch` sequences side by side."""

    kind: str
    tokens: int
    batch: int
    flash_attention: str


class Context:
    """One llama.cpp context of `rows` sequences, each of at most `capacity` tokens."""

    def __init__(self, model: Any, rows: int, capacity: int, threads: int, flash: str) -> None:
        params = llama.llama_context_default_params()
        params.n_ctx = rows * (-capacity // 256 * -256)
        params.n_seq_max, params.kv_unified = rows, False
        params.n_batch, params.n_ubatch = BATCH, UBATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = FLASH[flash]
        self._ctx = llama.llama_init_from_model(model, params)
        if not self._ctx:
            raise RuntimeError("llama.cpp could not make a context")
        self._batch = llama.llama_batch_init(BATCH, 0, 1)
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._rows, self._threads, self._length = rows, threads, 0

    def _run(self, tokens: list[tuple[int, int, bool]]) -> None:
        """One batch of (row, position, wants logits)."""
        for i, (row, position, wants) in enumerate(tokens):
            self._batch.token[i] = (position * 7919 + row) % self._vocab
            self._batch.pos[i] = position
            self._batch.n_seq_id[i] = 1
            self._batch.seq_id[i][0] = row
            self._batch.logits[i] = wants
        self._batch.n_tokens = len(tokens)
        if code := llama.llama_decode(self._ctx, self._batch):
            raise RuntimeError(f"llama_decode answered {code}")
        llama.llama_synchronize(self._ctx)

    def read(self, tokens: int) -> None:
        """Append a prompt of `tokens` to each row."""
        end = self._length + tokens
        for row in range(self._rows):
            for start in range(self._length, end, BATCH):
                self._run([(row, p, p == end - 1) for p in range(start, min(start + BATCH, end))])
        self._length = end

    def decode(self, steps: int) -> None:
        """Append `steps` tokens to each row, one of every row a step."""
        for _ in range(steps):
            self._run([(row, self._length, True) for row in range(self._rows)])
            self._length += 1

    def measure(self, case: Case, steps: int) -> tuple[float, float]:
        """Tokens a second over all rows, and the share of the CPU that the threads had."""
        llama.llama_memory_clear(llama.llama_get_memory(self._ctx), True)
        self._length = 0
        if case.kind == "decode":
            self.read(case.tokens)
        work, count = (self.read, case.tokens) if case.kind == "prompt" else (self.decode, steps)
        wall, cpu = time.perf_counter(), time.process_time()
        work(count)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        return count * self._rows / wall, cpu / wall / self._threads


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--prompt", type=int, nargs="*", default=[512, 2048], help="prompt lengths")
    parser.add_argument("--decode-after", type=int, nargs="*", default=[512], help="prompts before decode")
    parser.add_argument("--decode-tokens", type=int, default=64, help="tokens decoded a row and trial")
    parser.add_argument("--batch", type=int, nargs="*", default=[1], help="rows that decode side by side")
    parser.add_argument("--flash", nargs="*", choices=list(FLASH), default=list(FLASH))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here too")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    cases = [Case("prompt", n, 1, f) for n in args.prompt for f in args.flash]
    cases += [Case("decode", n, b, f) for b in args.batch for n in args.decode_after for f in args.flash]
    capacity = max([*args.prompt, *(n + args.decode_tokens for n in args.decode_after)])

    quiet = llama.llama_log_callback(lambda level, text, data: None)
    llama.llama_log_set(quiet, ctypes.c_void_p())
    model = llama.llama_model_load_from_file(str(args.model).encode(), llama.llama_model_default_params())
    if not model:
        raise SystemExit(f"{args.model}: llama.cpp cannot load it")
    kinds = {(case.batch, case.flash_attention) for case in cases}
    contexts = {(b, f): Context(model, b, capacity, args.threads, f) for b, f in kinds}
    rounds = [
        [contexts[case.batch, case.flash_attention].measure(case, args.decode_tokens) for case in cases]
        for _ in range(args.trials + 1)
    ]
    result = {
        "peer": f"llama.cpp (llama-cpp-python {llama.__version__})",
        "system": llama.llama_print_system_info().decode().strip(" |"),
        "model": args.model.name,
        "threads": args.threads,
        "decode_tokens": args.decode_tokens,
        "results": [
            {
                **case._asdict(),
                "tokens_per_second": [round(rate, 2) for rate, _ in trials],
                "cpu_share": [round(share, 3) for _, share in trials],
            }
            for case, trials in zip(cases, zip(*rounds[1:], strict=True), strict=True)
        ],
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
