"""The table that routes decode attention, and how many thread blocks a single pass gives to a KV head."""

import json

import pytest

from benchmarks.decode_routes import thresholds_of
from benchmarks.machine import RESULTS
from kvrelay_kernels.cuda.decode_attention import DecodeProblem
from kvrelay_kernels.cuda.decode_route import (
    THRESHOLDS,
    Choice,
    Threshold,
    Thresholds,
    choose_route,
    fitting_cluster,
)
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.quant import BlockLayout, parse_format

ROOMS = {2: 66, 4: 30, 8: 14, 16: 6}
"""Clusters of so many thread blocks that run at once, as on a GPU with groups of 14 to 18 multiprocessors."""
MEASURED = RESULTS / "h200" / "decode_routes.json"


def make(fmt: str = "int8", heads: tuple[int, int] = (32, 8), rows: int = 1) -> DecodeProblem:
    layout = BlockLayout(parse_format(fmt, 128, "bfloat16"), heads[1], 128)
    return DecodeProblem(layout, AttentionSpec(*heads, 128, 0.1), "bfloat16", rows)


@pytest.mark.parametrize(
    ("heads", "cluster"), [(6, 16), (8, 8), (14, 8), (16, 4), (32, 2), (64, 2), (67, 1), (500, 1)]
)
def test_all_heads_of_a_batch_run_at_once(heads: int, cluster: int) -> None:
    assert fitting_cluster(heads, ROOMS) == cluster


def test_a_gpu_without_clusters() -> None:
    assert fitting_cluster(8, {}) == 1


def test_the_first_threshold_that_fits_is_taken() -> None:
    table: Thresholds = {
        ("int8", 128): [Threshold(64, 1024, "split-k"), Threshold(64, 8192, "single-pass")],
        ("none", 128): [Threshold(1000, 1 << 20, "cudnn")],
    }

    def route(problem: DecodeProblem, sequences: int, tokens: int) -> Choice:
        return choose_route(problem, sequences, tokens, ROOMS, table)

    assert route(make(), 1, 1024) == Choice("split-k")
    assert route(make(), 1, 2048) == Choice("single-pass", 8)
    assert route(make(), 8, 8192) == Choice("single-pass", 2)
    assert route(make(), 9, 8192) == Choice("split-k")
    assert route(make(), 1, 16384) == Choice("split-k")
    assert route(make("none"), 8, 32768) == Choice("cudnn")
    assert route(make("int4"), 1, 2048) == Choice("split-k")


def test_passes_over_a_head_count_as_heads() -> None:
    table: Thresholds = {("int8", 128): [Threshold(8, 8192, "single-pass")]}
    assert choose_route(make(), 1, 1024, ROOMS, table).route == "single-pass"
    assert choose_route(make(rows=5), 1, 1024, ROOMS, table).route == "split-k"


def test_a_route_can_be_forced() -> None:
    assert choose_route(make(), 2, 64, ROOMS, forced="single-pass") == Choice("single-pass", 4)
    assert choose_route(make(), 2, 64, {}, forced="single-pass") == Choice("single-pass", 1)
    assert choose_route(make("none"), 2, 64, ROOMS, forced="cudnn") == Choice("cudnn")


def test_the_table_is_what_was_measured() -> None:
    """Before the sweep has run, nothing leaves split-K."""
    measured = thresholds_of(json.loads(MEASURED.read_text())["rows"]) if MEASURED.exists() else {}
    assert {shape: list(rows) for shape, rows in THRESHOLDS.items()} == measured


@pytest.mark.parametrize("fmt", ["none", "int8", "int4"])
def test_what_no_row_covers_goes_through_split_k(fmt: str) -> None:
    assert choose_route(make(fmt), 1 << 20, 1 << 20, ROOMS) == Choice("split-k")
