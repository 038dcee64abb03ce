import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import HostWeight, WeightMode
from kvrelay_kernels.quant.weights import AffineWeight, quantize_weight
from kvrelay_kernels.reference.backend import ReferenceBackend
from tests.kernels.cpu_cases import relative

MODES: list[WeightMode] = ["auto", "float", "int8", "int4"]
FIXTURES = [HealthCheck.function_scoped_fixture]


def random_part(rng: np.random.Generator, rows: int, columns: int, kind: str) -> HostWeight:
    values = rng.standard_normal((rows, columns), np.float32)
    if kind == "float16":
        return values.astype(np.float16)
    if kind == "float32":
        return values
    weight = quantize_weight(values, int(kind[3:]), 32)
    if rng.random() < 0.5:
        return weight
    scales, biases = (a.astype(np.float16).astype(np.float32) for a in (weight.scales, weight.biases))
    return AffineWeight(weight.codes, scales, biases, weight.bits)


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES)
@given(
    seed=st.integers(0, 2**32),
    kinds=st.lists(st.sampled_from(["float16", "float32", "int4", "int8", "int5"]), min_size=1, max_size=3),
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
    wanted = reference.linear(x.astype(float), reference.load_linear(parts, mode, bias))
    assert relative(cpu.linear(x, cpu.load_linear(parts, mode, bias)), wanted) < 3e-6


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_a_row_has_the_same_bits_in_every_batch(cpu: CpuBackend, bits: int) -> None:
    rng = np.random.default_rng(bits)
    values = rng.standard_normal((160, 320), np.float32)
    weight = cpu.load_linear([values if bits == 32 else quantize_weight(values, bits, 64)], "auto")
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
    assert relative(cpu.linear(x, packed).T, weight.dequantize()) < 1e-7


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
