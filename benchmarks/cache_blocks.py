"""How fast the kernels around the cache are: the pass that writes blocks, their expansion, and turning back.

    python -m benchmarks.cache_blocks [--formats none,int8-g64] [--rows 32,2048,8192]

One layer with Llama-3.1-8B's heads (32/8 of 128) in bfloat16, under CUDA-graph replay; layers take turns, and
hold more than the second-level cache together. 32 rows are a decode step, more are one prompt. A floor is
the bytes that are read and written at 4.2 TB/s. What the pass wrote is compared with the bytes that quant/
gives for the same rows: 1 where all are alike. Writes results/h200/cache_blocks.json.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cupy  # pyright: ignore[reportMissingImports]
import numpy as np

from benchmarks.decode_attention import BEYOND_CACHE, bfloat16_bits, from_bfloat16, replay
from benchmarks.machine import RESULTS, gpu_provenance, write
from kvrelay_kernels.cuda.arena import CudaArena
from kvrelay_kernels.cuda.batch import Uploads, upload_batch
from kvrelay_kernels.cuda.expand import Expansion, Scratch
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.cuda.rope import RopeAppend
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.interface import AttentionSpec, RopeTable
from kvrelay_kernels.plans import default_plan_folder
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, parse_format
from kvrelay_kernels.quant.codec import quantize
from kvrelay_kernels.quant.formats import SCHEMES
from kvrelay_kernels.quant.rotation import rotate
from model_runtime.steps import sequence_steps

BYTES = 4.2e12
HEADS, KV_HEADS, DIM = 32, 8, 128
DECODE_ROWS, PAST = 32, 2048
CHECKED = 256
"""Rows whose bytes are compared."""
FORMATS = ["none", "int8-g32", "int4-g32", *SCHEMES]


class Bench:
    """One format with a step of so many rows."""

    def __init__(self, fmt: str, rows: int, kernels: KernelCache, stream: Any) -> None:
        self.layout = BlockLayout(parse_format(fmt, DIM, "bfloat16"), KV_HEADS, DIM)
        self.rows, self.stream = rows, stream
        decode = rows <= DECODE_ROWS
        batch, blocks = sequence_steps(*(([1] * rows, [PAST] * rows) if decode else ([rows], [0])))
        order = np.random.default_rng(0).permutation(blocks).astype(np.int32)
        self.batch = replace(batch, block_tables=order[batch.block_tables])
        self.turns = int(min(64, np.ceil(BEYOND_CACHE / (2 * rows * (HEADS + 2 * KV_HEADS) * DIM))))
        with stream:
            self._uploads = Uploads()
            self._there = upload_batch(self.batch, self._uploads)
            self.arena = CudaArena(self.layout, self.turns, blocks)
            self.qkv = bfloat16_bits(
                cupy.random.standard_normal((self.turns, rows, (HEADS + 2 * KV_HEADS) * DIM), np.float32)
            )
            self._q = cupy.full((self.turns, rows, HEADS * DIM), 0xFFFF, np.uint16)
            angles = (int(batch.lengths.max()), DIM // 2)
            self._rope = RopeTable(cupy.ones(angles, np.float32), cupy.zeros(angles, np.float32))
            self._append = RopeAppend("bfloat16", kernels)
            self._rows = RowKernels("bfloat16", kernels)
            self._scratch = Scratch(Expansion(self.layout, "bfloat16"), blocks, kernels)
            self._scratch.reserve(blocks)
            self._sources = cupy.asarray(
                np.stack([np.arange(blocks), np.full(blocks, BLOCK_TOKENS)], -1).astype(np.int32)
            )
        self._spec = AttentionSpec(HEADS, KV_HEADS, DIM, DIM**-0.5)

    def append(self, turn: int) -> None:
        """Write a layer."""
        q = self._q[turn]
        self._append(self.qkv[turn], self._there, self.arena, turn, self._spec, self._rope, None, q)

    def expand(self, turn: int) -> None:
        """Expand all blocks of a layer."""
        self._scratch.fill(self.arena.layer_address(turn), self._sources)

    def turn_back(self, turn: int) -> None:
        """Rotate a layer's attention output."""
        self._rows.rotate(self._q[turn], DIM)

    def run(self) -> dict[str, Any]:
        """Time everything, and check what was written."""
        token, row = self.layout.block_bytes / BLOCK_TOKENS, 2 * DIM
        appended = self.rows * ((2 * HEADS + 2 * KV_HEADS) * row + token)
        expanded = self.arena.blocks * BLOCK_TOKENS * (token + 2 * KV_HEADS * row)
        results: dict[str, Any] = {
            "format": self.layout.format.name,
            "rows": self.rows,
            "append": self._timed(self.append, appended),
            "bytes_alike": self._alike(),
        }
        if self.layout.format.quantized:
            results["expand"] = self._timed(self.expand, expanded)
        if self.layout.format.rotates_values:
            results["turn_back"] = self._timed(self.turn_back, 2 * self.rows * HEADS * row)
        return results

    def _timed(self, call: Callable[[int], None], nbytes: float) -> dict[str, Any]:
        times = replay([lambda turn=turn: call(turn) for turn in range(self.turns)], self.stream)
        return {"microseconds": asdict(times), "bytes": nbytes, "floor_microseconds": 1e6 * nbytes / BYTES}

    def _alike(self) -> float:
        """The share of bytes that are those of the definition, in the first layer."""
        layout, fmt, batch = self.layout, self.layout.format, self.batch
        count = min(CHECKED, self.rows)
        heads = from_bfloat16(self.qkv[0, :count]).get().reshape(count, -1, DIM)
        stored = {"k": heads[:, HEADS : HEADS + KV_HEADS], "v": heads[:, HEADS + KV_HEADS :]}
        blocks = self.arena.bytes[0].get()
        sequence = np.repeat(np.arange(batch.sequences), np.diff(batch.row_starts))[:count]
        at = batch.positions[:count]
        place = batch.block_tables[sequence, at // BLOCK_TOKENS], slice(None), at % BLOCK_TOKENS
        same: list[Any] = []
        for side, values in stored.items():
            turned = fmt.quantized and (side == "k" or fmt.rotates_values)
            plain = {"values": values.view(np.uint32) >> 16}
            parts = quantize(rotate(values) if turned else values, fmt) if fmt.quantized else plain
            for name, array in parts.items():
                frame = layout.frame(f"{side}_{name}")
                kind = np.uint16 if frame.dtype == "bfloat16" else np.dtype(frame.dtype)
                found = blocks[:, frame.offset : frame.offset + frame.nbytes].copy().view(kind)
                found = found.reshape(-1, *frame.shape)[place]
                same.append((found == array.astype(kind)).ravel())
        return float(np.concatenate(same).mean())


def print_row(row: dict[str, Any]) -> None:
    """A line of the table: microseconds over their floors."""
    parts = [
        f"{name} {row[name]['microseconds']['median']:7.1f} / {row[name]['floor_microseconds']:.1f}"
        for name in ("append", "expand", "turn_back")
        if name in row
    ]
    print(
        f"{row['format']:9} {row['rows']:5} rows  {row['bytes_alike']:.4f}  {'   '.join(parts)}", flush=True
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rows", default="32,2048,8192")
    parser.add_argument("--commit", help="name of the commit, where the checkout has no repository")
    parser.add_argument("--out", type=Path, default=RESULTS / "h200" / "cache_blocks.json")
    options = parser.parse_args()
    kernels, stream = KernelCache(default_plan_folder()), cupy.cuda.Stream(non_blocking=True)
    rows: list[dict[str, Any]] = []
    for fmt in options.formats.split(","):
        for count in map(int, options.rows.split(",")):
            rows.append(Bench(fmt, count, kernels, stream).run())
            print_row(rows[-1])
            cupy.get_default_memory_pool().free_all_blocks()
    head = gpu_provenance(("numpy", "cupy-cuda13x"), options.commit)
    write(head | {"rows": rows}, options.out)


if __name__ == "__main__":
    main()
