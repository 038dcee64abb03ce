"""Models in the shapes of real ones, with random weights drawn on the GPU."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from kvrelay_kernels.quant import AffineWeight, ScaledWeight
from kvrelay_kernels.quant.levels import decode_e4m3
from kvrelay_kernels.quant.scales import E4M3_NAN
from model_runtime.config import ModelConfig, RopeScaling
from model_runtime.weights import Checkpoint, StoredTensor, TokenizerSource, expected_shapes

CONTEXT = 16384
CODE_GROUP = 64
"""Columns that share a scale in coded weights."""

LLAMA_8B = ModelConfig(
    name="llama-8b", family="llama", vocabulary=128256, hidden=4096, layers=32, heads=32, kv_heads=8,
    head_dim=128, intermediate=14336, context=CONTEXT, norm_eps=1e-5, rope_base=5e5, local_rope_base=None,
    rope_scaling=RopeScaling("llama3", 8.0), windows=(None,) * 32, attention_scale=128**-0.5,
    activation="silu", qk_norm=False, post_norms=False, qkv_bias=False, embedding_scale=1.0,
    tied_embeddings=False, bos_id=None, stop_ids=(),
)  # fmt: skip
QWEN3_4B = replace(
    LLAMA_8B, name="qwen3-4b", family="qwen3", vocabulary=151936, hidden=2560, layers=36, intermediate=9728,
    windows=(None,) * 36, rope_base=1e6, rope_scaling=None, qk_norm=True, tied_embeddings=True,
)  # fmt: skip
GEMMA3_4B = replace(
    LLAMA_8B, name="gemma3-4b", family="gemma3", vocabulary=262208, hidden=2560, layers=34, heads=8,
    kv_heads=4, head_dim=256, intermediate=10240, rope_base=1e6, rope_scaling=RopeScaling("linear", 8.0),
    local_rope_base=1e4,
    windows=tuple(None if layer % 6 == 5 else 1024 for layer in range(34)), attention_scale=1 / 16,
    activation="gelu_tanh", qk_norm=True, post_norms=True, embedding_scale=2560**0.5, tied_embeddings=True,
)  # fmt: skip
SMOLLM2_135M = replace(
    LLAMA_8B, name="smollm2-135m", vocabulary=49152, hidden=576, layers=30, heads=9, kv_heads=3, head_dim=64,
    intermediate=1536, rope_base=1e5, rope_scaling=None, windows=(None,) * 30, attention_scale=1 / 8,
    tied_embeddings=True,
)  # fmt: skip


def random_checkpoint(config: ModelConfig, weights: str = "bf16") -> Checkpoint:
    """Weights of variance 1 / columns, in one of `DRAWS`; norms are ones.

    They are drawn when they are read, and lie on the device.
    """
    draw = DRAWS[weights]

    def reader(number: int, dims: tuple[int, ...]) -> Callable[[], Any]:
        return lambda: np.ones(dims, np.float32) if len(dims) == 1 else draw(number, dims[0], dims[1])

    tensors = {
        name: StoredTensor(dims, reader(number, dims))
        for number, (name, dims) in enumerate(expected_shapes(config))
    }

    def no_tokenizer(folder: Path | None) -> Any:
        raise NotImplementedError("random weights have no tokenizer")

    return Checkpoint(config, tensors, TokenizerSource(no_tokenizer, None, {}))


def _floats(number: int, rows: int, columns: int) -> Any:
    """Normal bfloat16."""
    import cupy  # pyright: ignore[reportMissingImports]

    values = cupy.random.Generator(cupy.random.XORWOW(number)).standard_normal((rows, columns), np.float32)
    values *= np.float32(columns**-0.5)
    # The upper half of a float32 is a bfloat16, rounded towards zero.
    return values.view(np.uint16)[:, 1::2].view(ml_dtypes.bfloat16)


def _small_floats(number: int, rows: int, columns: int) -> Any:
    """Uniform 8-bit floats, under one scale a row."""
    import cupy  # pyright: ignore[reportMissingImports]

    numbers = decode_e4m3(np.arange(E4M3_NAN, dtype=np.uint8))
    codes = cupy.random.RandomState(number).randint(0, 2 * E4M3_NAN, (rows, columns), np.uint8)
    codes += codes >= E4M3_NAN  # which is left out, and 0xff never drawn
    scale = (columns * np.square(numbers).mean()) ** -0.5
    return ScaledWeight(codes, cupy.full((rows, 1), scale, np.float32), columns)


def _codes(bits: int, number: int, rows: int, columns: int) -> Any:
    """Uniform codes round their middle, with scales and biases that float16 has, as files do."""
    import cupy  # pyright: ignore[reportMissingImports]

    most, middle = 2**bits - 1, 2 ** (bits - 1)
    codes = cupy.random.RandomState(number).randint(0, most + 1, (rows, columns), np.uint8)
    scale = np.float16((12 / columns) ** 0.5 / most)
    scales = cupy.full((rows, columns // CODE_GROUP), scale, np.float32)
    return AffineWeight(codes, scales, scales * np.float32(-middle), bits)


DRAWS: dict[str, Callable[[int, int, int], Any]] = {
    "bf16": _floats,
    "int8": partial(_codes, 8),
    "fp8": _small_floats,
    "int4": partial(_codes, 4),
}
