"""What a step's batch becomes on its way to the device, and shapes that no CUDA kernel is made for."""

import dataclasses

import numpy as np
import pytest

from kvrelay_kernels.cuda.batch import capacity, slots_of
from kvrelay_kernels.cuda.gemm import LARGEST_BUCKET, SMALLEST_BUCKET, row_bucket
from kvrelay_kernels.cuda.rope import AppendShape
from kvrelay_kernels.cuda.rows import NormShape
from kvrelay_kernels.errors import BackendUnavailable, FormatUnsupported
from kvrelay_kernels.quant import BlockLayout, parse_format
from kvrelay_kernels.registry import load_backend
from model_runtime.steps import sequence_steps


def test_slots_are_where_the_tables_say() -> None:
    rng = np.random.default_rng(0)
    batch, blocks = sequence_steps([70, 1, 130], [0, 64, 63])
    order = rng.permutation(blocks).astype(np.int32)
    batch.block_tables[:] = order[batch.block_tables]
    slots = slots_of(batch)
    assert slots.dtype == np.int32
    row = 0
    for s in range(batch.sequences):
        for position in range(int(batch.lengths[s]) - [70, 1, 130][s], int(batch.lengths[s])):
            assert slots[row] == batch.block_tables[s, position // 64] * 64 + position % 64
            row += 1
    assert row == batch.rows


def test_runs_of_prompts_and_others() -> None:
    batch, _ = sequence_steps([3, 1, 1, 1, 2], [0] * 5)
    assert batch.runs == [(0, 3, True), (3, 6, False), (6, 8, True)]
    read = np.array([True, True, False, False, True])
    assert dataclasses.replace(batch, read=read).runs == [(0, 4, True), (4, 6, False), (6, 8, True)]
    assert sequence_steps([1, 1], [4, 5])[0].runs == [(0, 2, False)]


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100, 128, 2047, 2048, 2049, 16384, 40000])
def test_buckets_hold_their_rows_and_are_few(rows: int) -> None:
    bucket = row_bucket(rows)
    assert bucket & (bucket - 1) == 0
    assert SMALLEST_BUCKET <= bucket <= LARGEST_BUCKET
    assert bucket >= min(rows, LARGEST_BUCKET)
    assert bucket < 2 * rows or bucket == SMALLEST_BUCKET
    assert capacity(rows) >= rows


def test_shapes_without_a_kernel_are_refused() -> None:
    with pytest.raises(FormatUnsupported, match="columns"):
        NormShape(575, True, True, "float16")
    layout = BlockLayout(parse_format("none", 128, "bfloat16"), 8, 128)
    with pytest.raises(FormatUnsupported, match="does not go with"):
        AppendShape(layout, 32, 128, False, "float16")
    with pytest.raises(FormatUnsupported, match="turned"):
        AppendShape(layout, 32, 24, False, "bfloat16")


def test_elements_that_a_backend_does_not_compute_in_are_refused() -> None:
    with pytest.raises(FormatUnsupported, match="not in float32"):
        load_backend("cuda", threads=1, element="float32")
    with pytest.raises(FormatUnsupported, match="not in float16"):
        load_backend("reference", threads=1, element="float16")
    assert load_backend("reference", threads=1, element="float32").element == "float32"


def test_without_a_gpu_the_start_says_what_is_missing() -> None:
    try:
        import cupy  # pyright: ignore[reportMissingImports]

        found = cupy.is_available()
    except ImportError:
        found = False
    if found:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendUnavailable, match=r"kvrelay\[cuda13\]|driver|GPU"):
        load_backend("cuda", threads=1)
