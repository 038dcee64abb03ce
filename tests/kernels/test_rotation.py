"""The rotation against its matrix, and what it is for."""

import numpy as np
import pytest

from kvrelay_kernels.quant import parse_format
from kvrelay_kernels.quant.affine import dequantize, quantize
from kvrelay_kernels.quant.rotation import rotate, run_length


def matrix(run: int) -> np.ndarray:
    """Sylvester's construction, normalized."""
    whole = np.ones((1, 1))
    while len(whole) < run:
        whole = np.block([[whole, whole], [whole, -whole]])
    return whole / np.sqrt(run)


@pytest.mark.parametrize(("head_dim", "run"), [(64, 64), (96, 32), (128, 128), (256, 256), (80, 16)])
def test_a_rotation_of_each_run(head_dim: int, run: int) -> None:
    x = np.random.default_rng(head_dim).standard_normal((3, 5, head_dim))
    assert run_length(head_dim) == run
    wanted = (x.reshape(3, 5, -1, run) @ matrix(run)).reshape(x.shape)
    np.testing.assert_allclose(rotate(x), wanted, atol=1e-12)
    np.testing.assert_allclose(rotate(rotate(x)), x, atol=1e-12)
    narrow = rotate(x.astype(np.float32))
    assert narrow.dtype == np.float32
    np.testing.assert_allclose(narrow, wanted, atol=1e-5)


def test_scores_stay_and_an_outlier_costs_less() -> None:
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 200, 64))
    k[:, 7] += 25
    np.testing.assert_allclose(rotate(q) @ rotate(k).T, q @ k.T, atol=1e-9)
    fmt = parse_format("int8", 64)

    def error(keys: np.ndarray) -> float:
        codes, scales, biases = quantize(keys, fmt)
        return float(np.linalg.norm(dequantize(codes, scales, biases, fmt) - keys))

    assert error(rotate(k)) < 0.6 * error(k)
