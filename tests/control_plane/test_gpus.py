"""What a worker reserves of a GPU, and what it computes in there."""

import pytest

from control_plane.cluster import even_share
from control_plane.config import load
from control_plane.plan import decode_plan, prefill_plan


@pytest.mark.parametrize(
    ("gpus", "workers", "share"),
    [(0, 2, 0), (1, 2, 0), (1, 7, 0), (2, 2, 1), (2, 3, 1 / 2), (8, 2, 1), (8, 9, 1 / 2), (4, 12, 1 / 3)],
)
def test_workers_spread_over_several_gpus(gpus: float, workers: int, share: float) -> None:
    assert even_share(gpus, workers) == share
    assert gpus < 2 or workers * share <= gpus


def test_settings_come_before_the_even_share() -> None:
    open_settings, told = load(), load({"prefill.gpus": 0.25, "decode.gpus": 0})
    assert prefill_plan(open_settings, None, dict, gpu_share=0.5).gpus == 0.5
    assert decode_plan(open_settings, "grpc", dict, gpu_share=0.5).gpus == 0.5
    assert prefill_plan(told, None, dict, gpu_share=0.5).gpus == 0.25
    assert decode_plan(told, "grpc", dict, gpu_share=0.5).gpus == 0


def test_the_element_type_reaches_both_pools() -> None:
    config = load({"model.element": "bfloat16"})
    assert prefill_plan(config, None, dict).configure("p").decoder.element == "bfloat16"
    assert decode_plan(config, "grpc", dict).configure("d").decoder.element == "bfloat16"
    assert prefill_plan(load(), None, dict).configure("p").decoder.element is None
