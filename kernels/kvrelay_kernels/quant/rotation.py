"""The rotation that keys and queries share in quantized caches."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def run_length(head_dim: int) -> int:
    """Elements that are rotated together: the largest power of two that divides the head dimension."""
    return head_dim & -head_dim


def rotate(x: NDArray[Any]) -> NDArray[Any]:
    """The normalized Walsh-Hadamard transform of each run along the last dimension, in the type of x.

    A few of a key's elements are far larger than the others and would set the step of all codes of their
    group; behind the rotation each element is a bit of all of them, and the step is half as large (QuaRot,
    Ashkboos et al., 2024). A rotation leaves the product of query and key as it is, and undoes itself.
    """
    run = run_length(x.shape[-1])
    out = x.reshape(-1, run).copy()
    step = 1
    while step < run:
        pairs = out.reshape(-1, run // (2 * step), 2, step)
        out = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2)
        out = out.reshape(-1, run)
        step *= 2
    return (out * x.dtype.type(run**-0.5)).reshape(x.shape)
