"""What a cuDNN plan is built for: prompts with rows of their own number, and decoding sequences with one."""

import pytest

from kvrelay_kernels.cuda.cudnn_attention import CudnnProblem
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.plans import DeviceClass
from kvrelay_kernels.quant import BlockLayout, parse_format

DEVICE = DeviceClass((9, 0), 132)


def make(most_rows: int, window: int | None = None) -> CudnnProblem:
    layout = BlockLayout(parse_format("none", 128, "bfloat16"), 8, 128)
    return CudnnProblem(AttentionSpec(32, 8, 128, 0.1, window), layout, 100, 4, most_rows, 1024)


def roles(problem: CudnnProblem) -> set[str]:
    return {tensor.role for tensor in problem.tensors.values()}


def test_single_rows_need_no_offsets() -> None:
    assert roles(make(128)) - roles(make(1)) == {"offsets"}
    assert "rows" in roles(make(1))


@pytest.mark.parametrize(
    ("most_rows", "window", "masked"), [(128, None, True), (1, None, False), (1, 64, True)]
)
def test_a_single_row_sees_all_keys_but_for_a_window(
    most_rows: int, window: int | None, masked: bool
) -> None:
    assert make(most_rows, window).masked == masked


def test_plans_of_prompts_and_of_single_rows_never_meet() -> None:
    keys = {make(rows, window).graph_key(DEVICE, {}) for rows in (1, 128) for window in (None, 64)}
    assert len(keys) == 4
