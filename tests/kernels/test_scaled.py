"""Formats whose codes stand for numbers: their bounds, their bytes, and what goes wrong visibly."""

import math

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from kvrelay_kernels.quant import levels, parse_format, scales
from kvrelay_kernels.quant.codec import dequantize, quantize
from kvrelay_kernels.quant.formats import SCHEMES

FORMATS = [name for name, scheme in SCHEMES.items() if scheme.levels]
OF_MLX = ["mxfp8", "mxfp4", "nvfp4"]
DIM = 64
ANY = st.floats(width=32, allow_nan=True, allow_infinity=True)
SPREAD = st.sampled_from([2.0**-20, 1e-3, 1.0, 300.0])


def normal(seed: int, spread: float = 1.0, rows: int = 3) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, 2, DIM)).astype(np.float32) * np.float32(spread)


@pytest.mark.parametrize("name", OF_MLX)
@given(seed=st.integers(0, 10**6), spread=SPREAD)
def test_bytes_and_values_are_mlxs(name: str, seed: int, spread: float) -> None:
    fmt, values = parse_format(name, DIM), normal(seed, spread)
    values[0, 0] = 0
    kind = {"group_size": fmt.group, "bits": fmt.code_bits, "mode": name}
    codes, stored, *_ = mx.quantize(mx.array(values), **kind)
    found = quantize(values, fmt)
    if spread > 2.0**-20 or name != "nvfp4":  # MLX divides by an nvfp4 scale of 0
        assert np.array(codes).tobytes() == found["codes"].tobytes()
    assert np.array(stored).tobytes() == found["scales"].tobytes()
    wanted = mx.dequantize(mx.array(found["codes"]), mx.array(found["scales"]), **kind, dtype=mx.float32)
    np.testing.assert_array_equal(dequantize(found, fmt), np.array(wanted))


@pytest.mark.parametrize("name", FORMATS)
@given(values=arrays.arrays(np.float32, (2, DIM), elements=st.floats(-1000, 1000, width=32)))
def test_error_is_half_the_gap_between_numbers(name: str, values: NDArray[np.float32]) -> None:
    fmt = parse_format(name, DIM)
    assert fmt.scheme.levels is not None
    arrays_ = quantize(values, fmt)
    scale = scales.decode(arrays_["scales"], fmt.scheme.scales)[..., None]
    groups, found = (each.reshape(2, -1, fmt.group) for each in (values, dequantize(arrays_, fmt)))
    every = np.unique(levels.decode(np.arange(2**fmt.code_bits, dtype=np.uint8), fmt.scheme.levels))
    reach = levels.largest(fmt.scheme.levels)
    inside = np.clip(groups, -reach * scale, reach * scale)
    above = np.clip(np.searchsorted(every, inside / np.where(scale == 0, 1, scale)), 1, len(every) - 1)
    half = (every[above] - every[above - 1]) / 2 * scale
    assert (np.abs(found - inside) <= half * (1 + 1e-5) + 1e-37).all()
    if name.startswith("mxfp"):
        assert (inside == groups).all()  # nothing is cut off


@pytest.mark.parametrize("name", FORMATS)
@given(seed=st.integers(0, 10**6), spread=SPREAD)
def test_a_group_is_as_good_as_its_bits(name: str, seed: int, spread: float) -> None:
    fmt, values = parse_format(name, DIM), normal(seed, spread, rows=100)  # so many that chance has no say
    if name == "nvfp4" and spread < 1e-2:
        return  # below the reach of its scales
    error = np.linalg.norm(dequantize(quantize(values, fmt), fmt) - values) / np.linalg.norm(values)
    most = {"mxfp8": 0.0285, "mxfp4": 0.126, "nvfp4": 0.102, "turbo4": 0.106, "turbo3": 0.199}
    assert error < most[name]


@pytest.mark.parametrize("name", FORMATS)
def test_zeros_and_constants(name: str) -> None:
    fmt = parse_format(name, DIM)
    assert not dequantize(quantize(np.zeros((1, DIM)), fmt), fmt).any()
    for value in (1.0, -0.375, 100.0):
        found = dequantize(quantize(np.full((1, DIM), value, np.float32), fmt), fmt)
        assert (found == found[0, 0]).all()
        assert abs(found[0, 0] / value - 1) < {"turbo4": 0.1, "turbo3": 0.3, "mxfp4": 0.15}.get(name, 0.07)


@pytest.mark.parametrize("name", [*SCHEMES])
@given(row=arrays.arrays(np.float32, DIM, elements=ANY))
def test_what_is_not_finite_shows_in_its_group_and_nowhere_else(name: str, row: NDArray[np.float32]) -> None:
    fmt = parse_format(name, DIM)
    found = dequantize(quantize(row[None], fmt), fmt).reshape(-1, fmt.group)
    groups = row.reshape(-1, fmt.group)
    broken = ~np.isfinite(groups).all(-1)
    assert not np.isfinite(found[broken]).all(-1).any()
    assert np.isfinite(found[~broken & (np.abs(groups).max(-1) < 1000)]).all()


@given(arrays.arrays(np.float32, 32, elements=st.floats(-500, 500, width=32)))
def test_small_floats_go_to_the_nearest(values: NDArray[np.float32]) -> None:
    every = levels.decode_e4m3(np.arange(256, dtype=np.uint8))[[*range(127), *range(128, 255)]]
    found = levels.decode_e4m3(levels.encode_e4m3(values))
    best = np.abs(every[:, None] - values.astype(np.float64)).min(0)
    assert (np.abs(found - values.astype(np.float64)) == best).all()


def test_small_floats_come_back() -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    assert (levels.encode_e4m3(levels.decode_e4m3(codes)) == codes).all()
    assert levels.decode_e4m3(np.array([0x7E, 0x01, 0x88], np.uint8)).tolist() == [448, 2**-9, -(2**-6)]


@pytest.mark.parametrize("name", ["e2m1", "normal16", "normal8"])
def test_levels_come_back(name: levels.Levels) -> None:
    count = 2 * len(levels.MAGNITUDES[name])
    codes = np.array([code for code in range(count) if name != "e2m1" or code != count // 2], np.uint8)
    assert (levels.encode(levels.decode(codes, name), name) == codes).all()


@pytest.mark.parametrize("name", ["normal16", "normal8"])
def test_codebooks_are_the_best_for_a_normal(name: levels.Levels) -> None:
    """Each magnitude is the mean of a standard normal between its edges (Lloyd's condition)."""
    edges = [0.0, *levels.edges_of(name).tolist(), math.inf]
    for magnitude, low, high in zip(levels.MAGNITUDES[name], edges, edges[1:], strict=False):
        mass = (math.erf(high / 2**0.5) - math.erf(low / 2**0.5)) / 2
        mean = (math.exp(-low * low / 2) - math.exp(-high * high / 2)) / (2 * math.pi) ** 0.5 / mass
        assert abs(mean - magnitude) < 1e-3


def test_scales_of_powers_of_two() -> None:
    sizes = np.array([0, 2.0**-140, 2.0**-127, 1, 1.0000001, 1.5, np.inf, np.nan], np.float32)
    stored = scales.encode(sizes, "e8m0")
    assert stored.tolist() == [127, 1, 1, 127, 128, 128, 255, 255]
    assert scales.decode(stored[[0, 1, 3, 4]], "e8m0").tolist() == [1, 2.0**-126, 1, 2]
    assert np.isnan(scales.decode(stored[-2:], "e8m0")).all()
