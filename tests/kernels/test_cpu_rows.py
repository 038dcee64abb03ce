from typing import get_args

import numpy as np
import pytest

from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.interface import Activation
from kvrelay_kernels.quant.weights import quantize_weight
from kvrelay_kernels.reference.backend import ReferenceBackend
from tests.kernels.cpu_cases import relative

SHAPES = [(1, 576), (7, 100), (300, 576)]


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_norm(cpu: CpuBackend, reference: ReferenceBackend, shape: tuple[int, int]) -> None:
    x, y, weight = floats(*shape), floats(*shape, seed=1), floats(shape[1], seed=2)
    assert relative(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x.astype(float), weight, 1e-5)) < 1e-6
    summed, normed = cpu.add_rms_norm(x, y, weight, 1e-5)
    assert (summed == x + y).all()
    assert (normed == cpu.rms_norm(summed, weight, 1e-5)).all()


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("shape", [(1, 3072), (3, 70), (90, 3072)])
def test_gate(
    cpu: CpuBackend, reference: ReferenceBackend, activation: Activation, shape: tuple[int, int]
) -> None:
    x = floats(*shape) * 8
    x[0, :4] = [0, -200, 200, 9000]
    assert relative(cpu.gate(x, activation), reference.gate(x.astype(float), activation)) < 1e-6


@pytest.mark.parametrize("activation", get_args(Activation))
def test_gated_linear(cpu: CpuBackend, reference: ReferenceBackend, activation: Activation) -> None:
    x, gate, up = floats(5, 96), floats(70, 96, seed=1), floats(70, 96, seed=2)
    found = cpu.gated_linear(x, cpu.load_gated(gate, up, "auto"), activation)
    wanted = reference.gated_linear(x.astype(float), reference.load_gated(gate, up, "auto"), activation)
    assert relative(found, wanted) < 1e-5


@pytest.mark.parametrize("activation", get_args(Activation))
def test_gate_keeps_nan(cpu: CpuBackend, activation: Activation) -> None:
    x = floats(1, 128)
    x[0, 5] = np.nan
    assert np.flatnonzero(np.isnan(cpu.gate(x, activation))).tolist() == [5]


@pytest.mark.parametrize("rows", [1, 7])
def test_rows_do_not_know_each_other(cpu: CpuBackend, rows: int) -> None:
    x, weight = floats(200, 3072), floats(3072, seed=1)
    few = np.ascontiguousarray(x[50 : 50 + rows])
    assert (cpu.rms_norm(x, weight, 1e-5)[50 : 50 + rows] == cpu.rms_norm(few, weight, 1e-5)).all()
    assert (cpu.gate(x, "silu")[50 : 50 + rows] == cpu.gate(few, "silu")).all()


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_embed(cpu: CpuBackend, reference: ReferenceBackend, bits: int) -> None:
    values = floats(70, 96)
    table = values if bits == 32 else quantize_weight(values, bits, 32)
    ids = np.array([69, 0, 33, 33], np.int32)
    wanted = reference.embed(reference.load_linear([table], "auto"), ids, 2.5)
    assert relative(cpu.embed(cpu.load_linear([table], "auto"), ids, 2.5), wanted) < 1e-6


@pytest.mark.parametrize("token", [-1, 70])
def test_tokens_outside_the_table_are_refused(cpu: CpuBackend, token: int) -> None:
    with pytest.raises(IndexError):
        cpu.embed(cpu.load_linear([floats(70, 96)], "auto"), np.array([0, token], np.int32), 1.0)
