"""The Apple backend, in its first form: MLX's own operations; its Metal kernels come later."""

from kvrelay_kernels.mlx.backend import MlxBackend

__all__ = ["MlxBackend"]
