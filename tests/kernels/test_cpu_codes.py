"""Codes in registers, apart from any kernel: on this processor, and as others would do it."""

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from llvmlite import binding, ir
from numpy.typing import NDArray

from kvrelay_kernels.cpu import codes, vector
from kvrelay_kernels.cpu.vector import BYTE, FLOAT
from kvrelay_kernels.quant.levels import decode_e4m3, encode_e4m3
from kvrelay_kernels.quant.packing import pack_codes

LANES = 16
NUMBERS = [float(value) for value in range(8)] + [-0.5 * value for value in range(8)]


def assembled(emit: Callable[[Any, Any], Any]) -> str:
    """LLVM IR of `run(in, out)`: 16 lanes of what `emit(builder, pointer to the input)` makes."""
    module = ir.Module()
    kind = ir.FunctionType(ir.VoidType(), [BYTE.as_pointer(), BYTE.as_pointer()])
    function = ir.Function(module, kind, "run")
    builder = ir.IRBuilder(function.append_basic_block())
    value = emit(builder, function.args[0])
    builder.store(value, builder.bitcast(function.args[1], value.type.as_pointer()), align=1)
    builder.ret_void()
    return str(module)


def machine(triple: str) -> binding.TargetMachine:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    native = triple == binding.get_default_triple()
    features = binding.get_host_cpu_features().flatten() if native else ""
    return binding.Target.from_triple(triple).create_target_machine(features=features)


def run(emit: Callable[[Any, Any], Any], octets: NDArray[np.uint8], kind: str) -> NDArray[Any]:
    """What comes out on this processor."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    module = binding.parse_assembly(assembled(emit))
    engine = binding.create_mcjit_compiler(module, machine(binding.get_default_triple()))
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(engine.get_function_address("run"))
    out = np.zeros(LANES, kind)
    call(octets.ctypes.data, out.ctypes.data)
    return out


def look_up(builder: Any, at: Any) -> Any:
    return codes.lookup(builder, vector.load(builder, at, LANES, BYTE), NUMBERS)


@pytest.mark.parametrize("instruction", [True, False])
def test_numbers_are_looked_up(instruction: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not instruction:
        monkeypatch.setattr(codes, "table_instruction", lambda: None)
    index = np.random.default_rng(0).integers(0, 16, LANES).astype(np.uint8)
    assert run(look_up, index, "float32").tolist() == [NUMBERS[i] for i in index]


def test_arm_looks_them_up_in_one_instruction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codes, "table_instruction", lambda: "llvm.aarch64.neon.tbl1.v16i8")
    text = machine("aarch64-unknown-linux-gnu").emit_assembly(binding.parse_assembly(assembled(look_up)))
    assert text.count("tbl\t") >= 2


@pytest.mark.parametrize("bits", [3, 6])
def test_codes_are_unpacked(bits: int) -> None:
    wanted = np.random.default_rng(bits).integers(0, 2**bits, 32).astype(np.uint8)
    octets = np.concatenate([pack_codes(wanted, bits).view(np.uint8), np.full(16, 0xFF, np.uint8)])
    found = run(lambda builder, at: codes.unpack(builder, at, bits), octets, "uint16")
    assert found.tolist() == wanted[:LANES].tolist()


def test_small_floats_are_those_of_the_definition() -> None:
    for start in range(0, 256, LANES):
        octets = np.arange(start, start + LANES, dtype=np.uint8)
        found = run(lambda b, at: codes.small_floats(b, vector.load(b, at, LANES, BYTE)), octets, "float32")
        np.testing.assert_array_equal(found * np.float32(256), decode_e4m3(octets))


def test_numbers_go_to_the_nearest_small_floats() -> None:
    rng = np.random.default_rng(1)
    edges = [0.0, -0.0, 448, 464, 1e9, -(2.0**-10), 3 * 2.0**-10, 2.0**-6, np.inf, np.nan, -np.nan, 1e-45]
    values = np.concatenate(
        [edges, rng.standard_normal(LANES * 20 - len(edges)) * 3.0 ** rng.integers(-8, 6)]
    )
    for row in values.astype(np.float32).reshape(-1, LANES):
        found = run(
            lambda b, at: codes.to_small_floats(b, vector.load(b, b.bitcast(at, FLOAT.as_pointer()), LANES)),
            row.view(np.uint8), "uint8",
        )  # fmt: skip
        assert found.tolist() == encode_e4m3(row).tolist()


def test_exponents_become_powers_of_two() -> None:
    octets = np.array([0, 1, 2, 64, 127, 128, 254, 255] * 2, np.uint8)
    found = run(lambda b, at: codes.powers_of_two(b, vector.load(b, at, LANES, BYTE)), octets, "float32")
    wanted = [2.0**-127, 2.0**-126, 2.0**-125, 2.0**-63, 1, 2, 2.0**127, np.inf]
    assert found.tolist() == wanted * 2
