"""What the sweep of decode routes makes of its times."""

import pytest

from benchmarks.decode_routes import Row, lengths_of, thresholds_of
from kvrelay_kernels.cuda.decode_route import Threshold


def rows(batch: int, longest: int, split: float, passes: dict[int, float], ragged: bool = False) -> list[Row]:
    """A case's rows: split-K's time, and the single pass's by cluster."""
    case = {"format": "int8-g64", "kv_heads": 8, "head_dim": 128, "batch": batch, "longest": longest}
    case |= {"ragged": ragged}
    timed = [("split-k", 1, split), *(("single-pass", cluster, spent) for cluster, spent in passes.items())]
    return [{**case, "route": r, "cluster": c, "microseconds": spent} for r, c, spent in timed]


def test_a_single_pass_runs_up_to_where_it_loses() -> None:
    measured = [
        *rows(1, 128, 6, {16: 4, 8: 3, 1: 9}),
        *rows(1, 1024, 7, {16: 5}),
        *rows(1, 8192, 10, {16: 9}),
        *rows(2, 128, 6, {8: 4}),
        *rows(2, 128, 6, {8: 5}, ragged=True),
        *rows(2, 1024, 7, {8: 6}),
        *rows(2, 1024, 7, {8: 7.5}, ragged=True),
        *rows(2, 8192, 10, {8: 9}),
        *rows(4, 128, 6, {4: 7}),
    ]
    assert thresholds_of(measured) == {
        ("int8", 128): [Threshold(8, 8192, "single-pass"), Threshold(16, 128, "single-pass")]
    }


def test_what_narrower_clusters_reach_does_not_count() -> None:
    assert thresholds_of(rows(1, 128, 6, {8: 5, 16: 7})) == {("int8", 128): []}


def test_more_heads_reach_no_further_than_fewer() -> None:
    measured = [*rows(1, 128, 6, {16: 5}), *rows(1, 256, 6, {16: 7}), *rows(2, 256, 6, {8: 5})]
    assert thresholds_of(measured) == {
        ("int8", 128): [Threshold(8, 128, "single-pass"), Threshold(16, 128, "single-pass")]
    }


@pytest.mark.parametrize("ragged", [False, True])
def test_a_batch_has_its_longest(ragged: bool) -> None:
    lengths = lengths_of(32, 8192, ragged)
    assert lengths.max() == 8192
    assert lengths.min() >= 1
    assert (len(set(lengths.tolist())) > 1) == ragged
