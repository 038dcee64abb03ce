"""Which kernel attends for the rows of decoding sequences: one table, read when a step is taken down.

A recorded step serves every batch of its number of rows and width of block tables, so that the choice may
depend on these alone: a sequence has any length up to what its table holds, or none. Split-K divides the
lengths that there are, whatever they are; a single pass lasts as long as its longest sequence, but needs no
plan and no second meeting through memory.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kvrelay_kernels.cuda.clusters import Rooms
from kvrelay_kernels.cuda.decode_attention import DecodeProblem

DecodeRoute = Literal["split-k", "single-pass", "cudnn"]
SPLIT_K: list[DecodeRoute] = ["split-k"]
"""Where no other route is known to be faster."""


@dataclass(frozen=True)
class Choice:
    """A kernel and, of a single pass, how many thread blocks share a KV head."""

    route: DecodeRoute
    cluster: int = 1


@dataclass(frozen=True)
class Threshold:
    """Where a route is the fastest."""

    heads: int
    """Most KV heads of the batch together: sequences * KV heads * passes over each."""
    tokens: int
    """Most tokens that the tables hold for a sequence."""
    route: DecodeRoute


Thresholds = Mapping[tuple[str, int], Sequence[Threshold]]
"""By the format's base and the head dimension; the first that fits is taken, or else split-K."""

THRESHOLDS: Thresholds = {
    ("int8", 128): (
        Threshold(heads=8, tokens=8192, route="single-pass"),
        Threshold(heads=16, tokens=8192, route="single-pass"),
        Threshold(heads=32, tokens=4096, route="single-pass"),
        Threshold(heads=64, tokens=4096, route="single-pass"),
        Threshold(heads=128, tokens=1024, route="single-pass"),
    ),
    ("int8", 64): (
        Threshold(heads=3, tokens=32768, route="single-pass"),
        Threshold(heads=6, tokens=32768, route="single-pass"),
        Threshold(heads=12, tokens=32768, route="single-pass"),
        Threshold(heads=24, tokens=8192, route="single-pass"),
        Threshold(heads=48, tokens=4096, route="single-pass"),
        Threshold(heads=96, tokens=2048, route="single-pass"),
    ),
    ("int8", 256): (
        Threshold(heads=2, tokens=16384, route="single-pass"),
        Threshold(heads=4, tokens=8192, route="single-pass"),
        Threshold(heads=8, tokens=4096, route="single-pass"),
        Threshold(heads=16, tokens=4096, route="single-pass"),
        Threshold(heads=32, tokens=2048, route="single-pass"),
        Threshold(heads=64, tokens=2048, route="single-pass"),
    ),
    ("int4", 128): (
        Threshold(heads=8, tokens=8192, route="single-pass"),
        Threshold(heads=16, tokens=4096, route="single-pass"),
        Threshold(heads=32, tokens=4096, route="single-pass"),
        Threshold(heads=64, tokens=4096, route="single-pass"),
        Threshold(heads=128, tokens=2048, route="single-pass"),
    ),
    ("int4", 64): (
        Threshold(heads=3, tokens=32768, route="single-pass"),
        Threshold(heads=6, tokens=32768, route="single-pass"),
        Threshold(heads=12, tokens=32768, route="single-pass"),
        Threshold(heads=24, tokens=8192, route="single-pass"),
        Threshold(heads=48, tokens=4096, route="single-pass"),
        Threshold(heads=96, tokens=4096, route="single-pass"),
    ),
    ("int4", 256): (
        Threshold(heads=2, tokens=16384, route="single-pass"),
        Threshold(heads=4, tokens=16384, route="single-pass"),
        Threshold(heads=8, tokens=8192, route="single-pass"),
        Threshold(heads=16, tokens=4096, route="single-pass"),
        Threshold(heads=32, tokens=2048, route="single-pass"),
        Threshold(heads=64, tokens=2048, route="single-pass"),
    ),
    ("none", 128): (
        Threshold(heads=8, tokens=4096, route="single-pass"),
        Threshold(heads=16, tokens=4096, route="single-pass"),
        Threshold(heads=32, tokens=2048, route="single-pass"),
        Threshold(heads=64, tokens=2048, route="single-pass"),
        Threshold(heads=128, tokens=1024, route="single-pass"),
    ),
    ("none", 64): (
        Threshold(heads=3, tokens=16384, route="single-pass"),
        Threshold(heads=6, tokens=16384, route="single-pass"),
        Threshold(heads=12, tokens=8192, route="single-pass"),
        Threshold(heads=24, tokens=4096, route="single-pass"),
        Threshold(heads=48, tokens=2048, route="single-pass"),
        Threshold(heads=96, tokens=1024, route="single-pass"),
    ),
    ("none", 256): (
        Threshold(heads=2, tokens=4096, route="single-pass"),
        Threshold(heads=4, tokens=4096, route="single-pass"),
        Threshold(heads=8, tokens=2048, route="single-pass"),
        Threshold(heads=16, tokens=1024, route="single-pass"),
        Threshold(heads=32, tokens=1024, route="single-pass"),
        Threshold(heads=64, tokens=1024, route="single-pass"),
    ),
}
"""Of `benchmarks/decode_routes.py` on an H200."""


def choose_route(
    problem: DecodeProblem,
    sequences: int,
    tokens: int,
    rooms: Rooms,
    thresholds: Thresholds = THRESHOLDS,
    forced: DecodeRoute | None = None,
) -> Choice:
    """The kernel for steps of `sequences` rows whose tables hold `tokens` for each.

    `rooms` says how many clusters the device runs at once; `forced` takes the table's place.
    """
    heads = sequences * problem.spec.kv_heads * problem.query_tiles
    table = thresholds.get((problem.layout.format.base, problem.spec.head_dim), ())
    fitting: list[DecodeRoute] = [row.route for row in table if heads <= row.heads and tokens <= row.tokens]
    route = forced or (fitting or SPLIT_K)[0]
    return Choice(route, fitting_cluster(heads, rooms) if route == "single-pass" else 1)


def fitting_cluster(heads: int, rooms: Rooms) -> int:
    """The most thread blocks a head with which all heads still run at once; at least 1."""
    return max((size for size, room in rooms.items() if heads <= room), default=1)
