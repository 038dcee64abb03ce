"""The cache of live plans: built once, loaded elsewhere, let go of in order, and never under a user."""

import gc
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvrelay_kernels.plans import (
    LIVE,
    DeviceClass,
    GraphKey,
    Plan,
    PlanCache,
    PlanCounts,
    PlanStore,
    Tier,
    open_plans,
)

THREADS = 8


class DictBlobs:
    """A tier in a dict, with what was asked of it."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}
        self.puts = 0

    def get(self, name: str) -> bytes | None:
        return self.blobs.get(name)

    def put(self, name: str, blob: bytes) -> None:
        self.puts += 1
        self.blobs[name] = blob


class Graph:
    """A live plan that knows whether it was closed."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.closed = False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def dump(graph: Graph) -> bytes:
    return str(graph.number).encode()


def load(stored: bytes) -> Graph:
    return Graph(int(stored))


class Workshop:
    """A cache of graphs, and a count of the builds."""

    def __init__(self, *tiers: DictBlobs, capacity: int = 4) -> None:
        named = [Tier(f"tier{number}", blobs) for number, blobs in enumerate(tiers)]
        self.cache = PlanCache(PlanStore(named), capacity, Graph.close)
        self.built: list[int] = []

    def get(self, number: int, dump: Callable[[Graph], bytes] = dump) -> Plan[Graph]:
        return self.cache.get(key(number), lambda: self.build(number), dump, load)

    def build(self, number: int) -> Graph:
        self.built.append(number)
        return Graph(number)


def key(number: int) -> GraphKey:
    return GraphKey.of("graph", DeviceClass((9, 0)), attributes={"number": number})


def at_once(call: Callable[[int], object], threads: int = THREADS) -> list[object]:
    """What each thread got, or the exception it met."""
    start = threading.Barrier(threads)

    def run(number: int) -> object:
        start.wait()
        try:
            return call(number)
        except Exception as error:
            return error

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(threads)))


def test_a_plan_is_built_once() -> None:
    shop = Workshop()
    first = shop.get(1)
    assert shop.get(1) is first
    assert first.value.number == 1
    assert shop.built == [1]
    counts = shop.cache.counts
    assert (counts.builds, counts.misses, counts.hits) == (1, 1, {LIVE: 1})
    assert counts.build_seconds > 0


def test_another_cache_loads_what_the_first_built() -> None:
    blobs = DictBlobs()
    Workshop(blobs).get(1)
    shop = Workshop(blobs)
    assert shop.get(1).value.number == 1
    assert shop.built == []
    counts = shop.cache.counts
    assert (counts.builds, counts.misses, counts.hits) == (0, 0, {"tier0": 1})
    assert counts.build_seconds == 0
    assert counts.load_seconds > 0


def test_a_slow_tier_fills_the_faster_ones_and_they_answer_next_time() -> None:
    tiers = [DictBlobs() for _ in range(3)]
    Workshop(tiers[2]).get(1)
    shop = Workshop(*tiers)
    shop.get(1)
    assert shop.cache.counts.hits == {"tier2": 1}
    assert [tier.blobs for tier in tiers] == [tiers[2].blobs] * 3
    assert tiers[2].puts == 1
    again = Workshop(*tiers)
    again.get(1)
    assert again.cache.counts.hits == {"tier0": 1}


def test_a_new_plan_goes_to_every_tier() -> None:
    tiers = [DictBlobs(), DictBlobs()]
    Workshop(*tiers).get(1)
    assert tiers[0].blobs == tiers[1].blobs
    assert list(tiers[0].blobs) == [key(1).name]


def test_the_plans_used_last_stay() -> None:
    shop = Workshop(capacity=2)
    for number in (1, 2, 1, 3):
        shop.get(number)
    assert shop.cache.counts.evictions == 1
    shop.get(1)
    shop.get(3)
    assert shop.built == [1, 2, 3]
    shop.get(2)
    assert shop.built == [1, 2, 3, 2]
    assert shop.cache.kept == 2


def test_thrashing_never_aborts() -> None:
    shop = Workshop(DictBlobs(), capacity=1)
    for turn in range(50):
        assert shop.get(turn % 7).value.number == turn % 7
    assert sorted(shop.built) == list(range(7))
    assert shop.cache.counts.hits == {"tier0": 43}


def test_a_plan_is_closed_when_it_is_let_go_of() -> None:
    shop = Workshop(capacity=1)
    first = shop.get(1).value
    assert not first.closed
    second = shop.get(2).value
    assert first.closed
    assert not second.closed
    shop.cache.clear()
    assert second.closed
    assert shop.cache.kept == 0


def test_a_plan_in_use_is_not_closed_and_found_again() -> None:
    shop = Workshop(capacity=1)
    held = shop.get(1)
    shop.get(2)
    shop.get(3)
    assert not held.value.closed
    assert shop.get(1) is held
    assert shop.built == [1, 2, 3]
    shop.get(4)
    graph = held.value
    assert not graph.closed
    del held
    gc.collect()
    assert graph.closed


def test_each_plan_is_closed_once_while_threads_thrash() -> None:
    graphs: list[Graph] = []
    cache = PlanCache(PlanStore(), 2, Graph.close)

    def build(number: int) -> Graph:
        graph = Graph(number)
        graphs.append(graph)
        return graph

    def use(thread: int) -> None:
        for turn in range(200):
            number = (thread + turn * 3) % 5
            plan = cache.get(key(number), lambda number=number: build(number), dump, load)
            assert plan.value.number == number
            assert not plan.value.closed
            del plan

    assert at_once(use) == [None] * THREADS
    cache.clear()
    gc.collect()
    assert all(graph.closed for graph in graphs)
    counts = cache.counts
    assert counts.builds == len(graphs)
    assert counts.hits[LIVE] + counts.shared + counts.builds == THREADS * 200


def test_many_threads_build_a_plan_once() -> None:
    shop = Workshop()

    def build() -> Graph:
        time.sleep(0.05)
        return shop.build(1)

    got = at_once(lambda _: shop.cache.get(key(1), build, dump, load))
    assert len({id(plan) for plan in got}) == 1
    assert shop.built == [1]
    counts = shop.cache.counts
    assert (counts.builds, counts.misses) == (1, 1)
    assert counts.shared + counts.hits[LIVE] == THREADS - 1


def test_different_keys_are_built_side_by_side() -> None:
    shop, both = Workshop(), threading.Barrier(2, timeout=10)

    def build(number: int) -> Graph:
        both.wait()
        return Graph(number)

    got = at_once(lambda number: shop.cache.get(key(number), lambda: build(number), dump, load), 2)
    assert [plan.value.number for plan in got if isinstance(plan, Plan)] == [0, 1]


def test_a_failed_build_reaches_all_who_wait_and_is_forgotten() -> None:
    shop, tries = Workshop(DictBlobs()), []

    def fail() -> Graph:
        tries.append(1)
        time.sleep(0.2)
        raise MemoryError("no room for the workspace")

    got = at_once(lambda _: shop.cache.get(key(1), fail, dump, load))
    assert [str(error) for error in got] == ["no room for the workspace"] * THREADS
    assert len({id(error) for error in got}) == len(tries) == 1
    counts = shop.cache.counts
    assert (counts.builds, counts.failures, counts.shared) == (0, 1, THREADS - 1)
    assert shop.get(1).value.number == 1
    assert shop.cache.counts.builds == 1


def test_an_interrupted_build_leaves_nothing_behind() -> None:
    shop = Workshop()

    def interrupt() -> Graph:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        shop.cache.get(key(1), interrupt, dump, load)
    assert shop.get(1).value.number == 1


def test_a_build_may_ask_for_other_plans_but_not_for_its_own() -> None:
    shop = Workshop()

    def build_on(parts: Sequence[int]) -> Graph:
        return Graph(sum(shop.get(part).value.number for part in parts))

    assert shop.cache.get(key(9), lambda: build_on([4, 5]), dump, load).value.number == 9
    with pytest.raises(RuntimeError, match="itself"):
        shop.cache.get(key(8), lambda: shop.get(8).value, dump, load)
    assert shop.get(8).value.number == 8


def test_a_plan_that_cannot_be_dumped_is_used_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    blobs = DictBlobs()
    shop = Workshop(blobs)

    def refuse(graph: Graph) -> bytes:
        raise NotImplementedError("this plan does not serialize")

    assert shop.get(1, refuse).value.number == 1
    assert blobs.blobs == {}
    assert "does not serialize" in caplog.text


def test_a_stored_plan_that_does_not_load_is_built_anew(caplog: pytest.LogCaptureFixture) -> None:
    blobs = DictBlobs()
    spoiler = Workshop(blobs)
    spoiler.get(1, lambda graph: b"not a number")
    shop = Workshop(blobs)
    assert shop.get(1).value.number == 1
    counts = shop.cache.counts
    assert (counts.builds, counts.rejected, counts.rebuilt, counts.hits) == (1, 1, 1, {})
    assert "does not load" in caplog.text
    after = Workshop(blobs)
    after.get(1)
    assert after.cache.counts == PlanCounts(
        hits=after.cache.counts.hits, load_seconds=after.cache.counts.load_seconds
    )
    assert after.cache.counts.hits == {"tier0": 1}


def test_a_sound_plan_behind_a_broken_one_is_taken_and_mends_it() -> None:
    fast, slow = DictBlobs(), DictBlobs()
    Workshop(fast, slow).get(1)
    name = key(1).name
    sound = fast.blobs[name]
    fast.blobs[name] = sound[:-1]
    shop = Workshop(fast, slow)
    shop.get(1)
    counts = shop.cache.counts
    assert (counts.builds, counts.rejected, counts.rebuilt, counts.hits) == (0, 1, 0, {"tier1": 1})
    assert fast.blobs[name] == sound


def test_counts_add_up() -> None:
    one, two = Workshop(capacity=1), Workshop(DictBlobs())
    for number in (1, 1, 2):
        one.get(number)
        two.get(number)
    total = one.cache.counts + two.cache.counts
    assert (total.builds, total.misses, total.evictions, total.hits) == (4, 4, 1, {LIVE: 2})
    before = one.cache.counts
    one.get(1)
    assert before.builds == 2


def test_a_cache_holds_at_least_one_plan() -> None:
    with pytest.raises(ValueError, match="0 plans"):
        PlanCache(PlanStore(), 0)


def test_nowhere_is_a_store_too(tmp_path: Path) -> None:
    assert open_plans(None).tiers == ()
    assert open_plans(tmp_path, [Tier("fleet", DictBlobs())]).tiers == ("disk", "fleet")
