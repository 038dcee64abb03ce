"""The rotation of quantized caches, on MLX."""

import mlx.core as mx

from kvrelay_kernels.quant.rotation import run_length


def rotate(x: mx.array) -> mx.array:
    """As `quant.rotation.rotate`."""
    run = run_length(x.shape[-1])
    runs = x.reshape(*x.shape[:-1], -1, run)
    return mx.hadamard_transform(runs, scale=run**-0.5).reshape(x.shape)
