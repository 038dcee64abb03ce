import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import HostWeight, WeightMode
from kvrelay_kernels.quant.weights import AffineWeight, quantize_scaled, quantize_weight
from kvrelay_kernels.reference.backend import ReferenceBackend
from tests.kernels.cpu_cases import relative
from tests.kernels.test_fp8_weights import random_weight

STEPS = 32767
"""Of a row's activations, 32 columns at a time, in products with codes: from 0 to the largest magnitude."""
MODES: list[WeightMode] = ["auto", "float", "int8", "int4", "fp8"]
KINDS = ["float16", "float32", "int4", "int8", "int5", "fp8"]
FIXTURES = [HealthCheck.function_scoped_fixture]


def random_part(rng: np.random.Generator, rows: int, columns: int, kind: str) -> HostWeight:
    values = rng.standard_normal((rows, columns), np.float32)
    if kind == "float16":
        return values.astype(np.float16)
    if kind == "float32":
        return values
    if kind == "fp8":
        return quantize_scaled(values)
    weight = quantize_weight(values, int(kind[3:]), 32)
    if rng.random() < 0.5:
        return weight
    scales, biases = (a.astype(np.float16).astype(np.float32) for a in (weight.scales, weight.biases))
    return AffineWeight(weight.codes, scales, biases, weight.bits)


def rounding(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """How far products with codes may be off: half a step times the sum of the weights' magnitudes."""
    padding = [(0, 0), (0, -x.shape[1] % 32)]
    largest = np.abs(np.pad(x.astype(float), padding)).reshape(len(x), -1, 32).max(-1)
    weights = np.abs(np.pad(matrix, padding)).reshape(len(matrix), -1, 32).sum(-1)
    return 0.5 / STEPS * largest @ weights.T


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES)
@given(
    seed=st.integers(0, 2**32),
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=3),
    columns=st.sampled_from([64, 96, 160, 320]),
    rows=st.one_of(st.integers(1, 40), st.just(130)),
    mode=st.sampled_from(MODES),
    biased=st.booleans(),
)
def test_linear(
    cpu: CpuBackend, reference: ReferenceBackend, seed: int, kinds: list[str], columns: int, rows: int,
    mode: WeightMode, biased: bool,
) -> None:  # fmt: skip
    rng = np.random.default_rng(seed)
    parts = [random_part(rng, int(rng.integers(1, 90)), columns, kind) for kind in kinds]
    bias = rng.standard_normal(sum(part.shape[0] for part in parts)) if biased else None
    x = rng.standard_normal((rows, columns), np.float32)
    matrix, weight = reference.load_linear(parts, mode, bias), cpu.load_linear(parts, mode, bias)
    wanted = reference.linear(x.astype(float), matrix)
    exact = weight.bits == 32 or weight.floats
    allowed = 3e-6 * np.abs(wanted).max() + (0 if exact else 1.02 * rounding(x, matrix[0]))
    assert (np.abs(cpu.linear(x, weight) - wanted) <= allowed).all()


GROUPS = [(48, 16), (64, 64), (96, 24), (96, 32), (160, 80), (320, 160)]


@pytest.mark.parametrize(("columns", "group"), GROUPS)
@pytest.mark.parametrize("bits", [3, 6])
def test_groups_of_any_size(
    cpu: CpuBackend, reference: ReferenceBackend, bits: int, columns: int, group: int
) -> None:
    rng = np.random.default_rng(columns)
    parts: list[HostWeight] = [quantize_weight(rng.standard_normal((40, columns), np.float32), bits, group)]
    matrix, weight = reference.load_linear(parts, "auto"), cpu.load_linear(parts, "auto")
    assert weight.bits == (32 if group % 16 else 4 if bits == 3 else 8)
    for rows in (1, 2, 11, 100):
        x = rng.standard_normal((rows, columns), np.float32)
        wanted = reference.linear(x.astype(float), matrix)
        allowed = 3e-6 * np.abs(wanted).max() + 1.02 * rounding(x, matrix[0])
        assert (np.abs(cpu.linear(x, weight) - wanted) <= allowed).all()


@pytest.mark.parametrize(
    ("columns", "group"), [(96, 96), (200, 128), (320, 320), (384, 384), (48, 16), (90, 45)]
)
def test_small_floats_in_groups_of_any_size(
    cpu: CpuBackend, reference: ReferenceBackend, columns: int, group: int
) -> None:
    """Every number there is, under scales far apart; rows of the table itself, too."""
    part = random_weight(75, columns, group)
    matrix, weight = reference.load_linear([part], "auto"), cpu.load_linear([part], "auto")
    assert weight.floats
    for rows in (1, 2, 11, 100):
        x = np.random.default_rng(rows).standard_normal((rows, columns), np.float32)
        wanted = reference.linear(x.astype(float), matrix)
        sizes = np.abs(x.astype(float)) @ np.abs(matrix[0].T)
        assert (np.abs(cpu.linear(x, weight) - wanted) <= 1e-6 * sizes).all()
    ids = np.array([74, 0, 33, 32], np.int32)
    assert (cpu.embed(weight, ids, 1.0) == part.dequantize()[ids]).all()


@pytest.mark.parametrize(("bits", "group"), [(4, 64), (8, 64), (4, 16), (8, 16), (32, 320), (8, None)])
def test_a_row_has_the_same_bits_in_every_batch(cpu: CpuBackend, bits: int, group: int | None) -> None:
    """Also by 8-bit floats, which have no group."""
    rng = np.random.default_rng(bits)
    values = rng.standard_normal((160, 320), np.float32)
    if group is None:
        weight = cpu.load_linear([values], "fp8")
    else:
        weight = cpu.load_linear([values if bits == 32 else quantize_weight(values, bits, group)], "auto")
    x = rng.standard_normal((70, 320), np.float32)
    alone = np.concatenate([cpu.linear(x[row : row + 1], weight) for row in range(len(x))])
    for rows in (*range(2, 34), 47, 64, 65, 70):
        assert (cpu.linear(x[:rows], weight) == alone[:rows]).all(), rows
    assert (CpuBackend(threads=1).linear(x, weight) == alone).all()


def test_codes_of_a_file_are_kept(cpu: CpuBackend) -> None:
    rng = np.random.default_rng(0)
    scales = rng.standard_normal((64, 4)).astype(np.float16).astype(np.float32)
    weight = AffineWeight(rng.integers(0, 16, (64, 128), np.uint8), scales, -8 * scales, 4)
    packed = cpu.load_linear([weight], "auto")
    assert packed.nbytes == 64 * (128 // 2 + 4 * 2 * 2)
    x = np.eye(128, dtype=np.float32)
    assert relative(cpu.linear(x, packed).T, weight.dequantize()) < 3e-7


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_extremes_are_multiplied_by_codes(cpu: CpuBackend, reference: ReferenceBackend, rows: int) -> None:
    rng = np.random.default_rng(rows)
    parts: list[HostWeight] = [quantize_weight(rng.standard_normal((40, 96), np.float32), 8, 32)]
    matrix, weight = reference.load_linear(parts, "auto"), cpu.load_linear(parts, "auto")
    for x in (
        np.zeros((rows, 96), np.float32),
        rng.standard_normal((rows, 96), np.float32) * np.float32(1e-38),
        rng.standard_normal((rows, 96), np.float32) * np.float32(1e34),
        np.where(np.arange(96) == 5, np.float32(1e9), rng.standard_normal((rows, 96), np.float32)),
        rng.choice(np.array([-1, 1], np.float32), (rows, 96)),
    ):
        found, wanted = cpu.linear(x, weight), reference.linear(x.astype(float), matrix)
        allowed = 3e-6 * np.abs(wanted).max() + 1.02 * rounding(x, matrix[0]) + 1e-30
        assert (np.abs(found - wanted) <= allowed).all()
        assert found.any() == (np.abs(x).max() > 1e-30)


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [1, 9, 100])
def test_what_is_not_finite_stays_so(cpu: CpuBackend, rows: int, bad: float) -> None:
    rng = np.random.default_rng(rows)
    modes: list[WeightMode] = ["int4", "int8", "fp8"]
    for mode in modes:
        weight = cpu.load_linear([rng.standard_normal((64, 96), np.float32)], mode)
        x = rng.standard_normal((rows, 96), np.float32)
        good = cpu.linear(x, weight)
        row = int(rng.integers(rows))
        x[row, rng.integers(96)] = bad
        found = cpu.linear(x, weight)
        assert not np.isfinite(found[row]).any()
        others = np.arange(rows) != row
        assert (found[others] == good[others]).all()


def test_logits_of_some_rows(cpu: CpuBackend) -> None:
    rng = np.random.default_rng(0)
    head = cpu.load_linear([rng.standard_normal((100, 64), np.float32)], "auto")
    x = rng.standard_normal((9, 64), np.float32)
    rows = np.array([8, 0, 3], np.int32)
    found = cpu.logits(x, head, rows)
    assert found.dtype == np.float32
    assert (found == cpu.linear(x, head)[rows]).all()


def test_columns_without_a_group_are_refused(cpu: CpuBackend) -> None:
    with pytest.raises(FormatUnsupported):
        cpu.load_linear([np.zeros((4, 40), np.float32)], "int8")
