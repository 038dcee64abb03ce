"""cuDNN's attention for decoding sequences: one row each over an unquantized cache, a plan a bucket."""

from typing import Any

import numpy as np

from kvrelay_kernels.cuda.cudnn_attention import CudnnAttention, CudnnProblem
from kvrelay_kernels.cuda.decode_attention import DecodeProblem
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant import BLOCK_TOKENS


class CudnnDecode:
    """Takes the place of a `DecodeAttention` where blocks hold 16-bit elements.

    Lengths and tables are read from the device, so that a plan serves every step of its number of sequences
    and width of tables, also inside a graph. cuDNN multiplies what lies behind a sequence's end by zero: the
    blocks there have to hold numbers, as they do unless an earlier owner's activations were none. What it
    writes for a sequence of length 0 is undefined.
    """

    def __init__(self, problem: DecodeProblem, sequences: int, cudnn: CudnnAttention) -> None:
        """Raises FormatUnsupported for a quantized cache, and for several rows a sequence."""
        if problem.layout.format.quantized or problem.rows > 1:
            raise FormatUnsupported(
                f"cuDNN decodes one row a sequence from 16-bit caches, not {problem.rows} from"
                f" {problem.layout.format.name}"
            )
        import cupy  # pyright: ignore[reportMissingImports]

        self.problem = problem
        self._cudnn = cudnn
        self._rows = cupy.ones(sequences, np.int32)
        self._lengths: Any = None
        self._arena: Any = None

    def attach(self, arena: Any) -> None:
        """See `DecodeAttention.attach`."""
        self._arena = arena

    def plan(self, lengths: Any) -> None:
        """Take `lengths`, `[sequences]` int32 on the device, for the calls that follow; runs nothing."""
        if lengths.shape[0] > len(self._rows):
            raise ValueError(f"{lengths.shape[0]} sequences do not fit a workspace for {len(self._rows)}")
        self._lengths = lengths

    def __call__(self, q: Any, layer: int, tables: Any, out: Any) -> None:
        """See `DecodeAttention.__call__`; `tables` are contiguous. Raises FormatUnsupported."""
        _, blocks, block_bytes = self._arena.shape
        sequences, width = tables.shape
        spec, layout = self.problem.spec, self.problem.layout
        problem = CudnnProblem(spec, layout, blocks, sequences, 1, width * BLOCK_TOKENS)
        cache = self._arena.data.ptr + layer * blocks * block_bytes
        keys, values = (cache + layout.frame(name).offset for name in ("k_values", "v_values"))
        self._cudnn(problem, q, out, keys, values, (self._rows[:sequences], self._lengths, None, tables))
