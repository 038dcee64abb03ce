"""Rounded activations: what a record holds, whoever makes it, and that all processors add pairs alike."""

from copy import copy
from typing import Any

import numpy as np
import pytest
from numba import njit, types

from kvrelay_kernels.cpu import vector
from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.cpu.coded import new_records, rounding
from kvrelay_kernels.cpu.integers import COLUMNS, RECORD, ROWS
from kvrelay_kernels.cpu.program import Program
from kvrelay_kernels.cpu.recording import Recorder
from kvrelay_kernels.quant.weights import quantize_weight

LANES = 16


def rounded(x: np.ndarray) -> np.ndarray:
    """The records of x, `[rows, columns / 32, RECORD]` bytes."""
    out = new_records(*x.shape)
    out[:] = 0xFF
    Program([rounding(x, out)], 1).run()
    rows, groups = len(x), -(-x.shape[1] // COLUMNS)
    found = np.empty((rows, groups, RECORD), np.uint8)
    for row in range(0, rows, ROWS):
        height = min(ROWS, rows - row)
        piece = out[row * groups * RECORD : (row + height) * groups * RECORD]
        found[row : row + height] = piece.reshape(groups, height, RECORD).swapaxes(0, 1)
    return found


@pytest.mark.parametrize(("rows", "columns"), [(1, 64), (8, 32), (11, 80), (30, 2064)])
def test_records(rows: int, columns: int) -> None:
    x = np.random.default_rng(rows).standard_normal((rows, columns), np.float32)
    found = rounded(x)
    integers = found[..., : 2 * COLUMNS].copy().view(np.int16).astype(float)
    step, whole, *halves = np.moveaxis(found[..., 2 * COLUMNS :].copy().view(np.float32), -1, 0)
    padded = np.pad(x, [(0, 0), (0, -columns % COLUMNS)]).reshape(rows, -1, COLUMNS)
    np.testing.assert_allclose(step, np.abs(padded).max(-1) / 32767, rtol=1e-6)
    assert (np.abs(integers * step[..., None] - padded) <= 0.51 * step[..., None]).all()
    assert (np.abs(integers).max(-1) == 32767).all()
    np.testing.assert_allclose(whole, integers.sum(-1) * step, rtol=1e-6)
    for half, total in enumerate(halves):
        wanted = integers[..., half * 16 : half * 16 + 16].sum(-1) * step
        np.testing.assert_allclose(total, wanted, rtol=1e-6)


def test_operations_round_their_results_in_passing() -> None:
    rng = np.random.default_rng(0)
    backend, recorder = CpuBackend(threads=2), Recorder()
    recording = copy(backend)
    recording._sink = recorder  # pyright: ignore[reportPrivateUsage]
    x, weight = rng.standard_normal((11, 192), np.float32), rng.standard_normal(192, np.float32)
    wide, square = (rng.standard_normal((rows, 192), np.float32) for rows in (384, 192))
    matrix = backend.load_linear([quantize_weight(wide, 4, 32)], "auto")
    small = backend.load_linear([quantize_weight(square, 8, 32)], "auto")

    def step(backend: CpuBackend) -> np.ndarray:
        h = backend.gated_linear(backend.rms_norm(x, weight, 1e-5), matrix, "silu")
        return backend.linear(backend.add_rms_norm(x, backend.linear(h, small), weight, 1e-5)[1], small)

    logits = step(recording)
    products, makers = 3, 3
    assert len(recorder.operations) == products + makers  # none of them only rounds
    Program(recorder.operations, 2).run()
    assert (logits == step(backend)).all()


WAYS = [("llvm.x86.avx512.pmaddw.d.512", 32), ("llvm.x86.avx2.pmadd.wd", 16), ("", 0)]


@pytest.mark.parametrize("way", WAYS)
def test_pairs_are_added_alike(way: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    if way[1] > vector.host_pairs()[1]:
        pytest.skip("not on this processor")
    monkeypatch.setattr(vector, "host_pairs", lambda: way)

    @vector.emitted
    def add_pairs(typing: Any, a: Any, b: Any, c: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            places = [
                vector.element(context, builder, kind, value, vector.INT(0), item)
                for kind, value, item in zip(
                    signature.args, args, (vector.WORD, vector.WORD, vector.INT), strict=True
                )
            ]
            a_, b_ = (vector.load(builder, place, 2 * LANES, vector.WORD) for place in places[:2])
            total = vector.add_pairs(builder, a_, b_, vector.load(builder, places[2], LANES, vector.INT))
            vector.store(builder, total, places[2])
            return context.get_dummy_value()

        return types.void(a, b, c), generate

    @njit
    def run(a: Any, b: Any, c: Any) -> None:
        add_pairs(a, b, c)

    rng = np.random.default_rng(0)
    a = rng.integers(-32767, 32768, 2 * LANES).astype(np.int16)
    b = rng.integers(0, 256, 2 * LANES).astype(np.int16)
    c = rng.integers(-(2**27), 2**27, LANES).astype(np.int32)
    wanted = c + (a.astype(np.int64) * b).reshape(LANES, 2).sum(-1)
    run(a, b, c)
    assert (c == wanted).all()
