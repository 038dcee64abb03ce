"""Routing policy: affinity where it pays, no worker left idle, no request left waiting."""

import random

from hypothesis import given
from hypothesis import strategies as st

from gateway_service.router import Load, Route, Router, prefix_blocks

WORKERS = ["a", "b", "c"]


def prompt(family: int, blocks: int, own: int = 0) -> list[int]:
    """A prompt whose leading blocks it shares with others of its family."""
    return [family] * (blocks * 64) + [1000 + own] * 10


def test_prefix_blocks_name_a_block_and_all_before_it() -> None:
    first = prefix_blocks(prompt(1, 3, own=1))
    assert len(first) == 3
    assert len(set(first)) == 3
    assert prefix_blocks(prompt(1, 3, own=2)) == first
    assert prefix_blocks([9, *prompt(1, 3)])[1:] != first[1:]
    assert prefix_blocks([1] * 63) == []


def test_a_prefix_goes_where_it_went_before() -> None:
    router = Router()
    ids = prompt(1, 4)
    first = router.pick_prefill(WORKERS, len(ids), prefix_blocks(ids))
    router.done(first)
    for own in range(5):
        ids = prompt(1, 4, own)
        again = router.pick_prefill(WORKERS, len(ids), prefix_blocks(ids))
        router.done(again)
        assert again == Route(first.worker_id, 10)


def test_a_loaded_worker_loses_what_its_prefix_does_not_outweigh() -> None:
    router = Router()
    ids = prompt(1, 4)
    router.done(router.pick_prefill(["a"], len(ids), prefix_blocks(ids)))
    router.pick_prefill(["a"], 300, [])
    assert router.pick_prefill(["a", "b"], len(ids), prefix_blocks(ids)).worker_id == "b"


def test_a_forgotten_worker_has_no_prefixes() -> None:
    router = Router()
    blocks = prefix_blocks(prompt(1, 4))
    router.done(router.pick_prefill(["a"], 266, blocks))
    router.forget("a")
    assert router.shared_blocks("a", blocks) == 0


def test_remembered_prefixes_are_bounded_and_lose_their_ends_first() -> None:
    router = Router(blocks_remembered=4)
    blocks = prefix_blocks(prompt(1, 6))
    router.done(router.pick_prefill(["a"], 400, blocks))
    assert router.shared_blocks("a", blocks) == 4


loads = st.builds(
    lambda n, held, slots: Load(f"w{n}", held, slots), st.integers(), st.integers(0, 20), st.integers(0, 20)
)


@given(st.lists(loads, min_size=1, max_size=8, unique_by=lambda load: load.worker_id))
def test_decode_takes_the_smallest_share(candidates: list[Load]) -> None:
    def share(load: Load) -> float:
        return load.in_flight / load.slots if load.slots else load.in_flight

    chosen = Router().pick_decode(candidates)
    assert share(next(load for load in candidates if load.worker_id == chosen)) == min(map(share, candidates))


def test_idle_decode_workers_take_turns() -> None:
    router = Router()
    candidates = [Load(name, 0, 4) for name in WORKERS]
    assert sorted(router.pick_decode(candidates) for _ in range(6)) == sorted(WORKERS * 2)


steps = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 8), st.integers(0, 2)), max_size=80)


@given(steps, st.integers(0, 2**32))
def test_work_is_spread_whatever_is_asked(asked: list[tuple[int, int, int]], seed: int) -> None:
    """Pending work adds up, and no worker gets a prompt that another would be through with sooner."""
    dice = random.Random(seed)
    router = Router()
    running: list[Route] = []
    for family, blocks, done in asked:
        ids = prompt(family, blocks, dice.randrange(5))
        keys = prefix_blocks(ids)
        before = {
            name: router.pending(name) + len(ids) - 64 * router.shared_blocks(name, keys) for name in WORKERS
        }
        route = router.pick_prefill(WORKERS, len(ids), keys)
        assert before[route.worker_id] == min(before.values())
        running.append(route)
        for _ in range(min(done, len(running))):
            router.done(running.pop(dice.randrange(len(running))))
        for name in WORKERS:
            assert router.pending(name) == sum(route.tokens for route in running if route.worker_id == name)
    for route in running:
        router.done(route)
    assert all(router.pending(name) == 0 for name in WORKERS)


def test_one_prefix_for_all_still_uses_every_worker() -> None:
    router = Router()
    ids = prompt(1, 8)
    routes = [router.pick_prefill(WORKERS, len(ids), prefix_blocks(ids)) for _ in range(300)]
    counts = [sum(route.worker_id == name for route in routes) for name in WORKERS]
    assert min(counts) > 60
