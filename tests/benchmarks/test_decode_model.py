"""How the decode benchmark takes steps, on a small model and the reference backend."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.decode_model import (
    GREEDY,
    PARTS,
    STEPS,
    WARM_STEPS,
    Batches,
    Case,
    OnePart,
    host_seconds,
    open_streams,
    part_milliseconds,
    step_seconds,
)
from model_runtime.decoder import Decoder
from model_runtime.opening import open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent
from tests.tiny_model import write_tiny_model

CASE = Case("none", 2, 70)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """The tiny model, where every step is over when it is launched."""
    path = write_tiny_model(tmp_path_factory.mktemp("model"))
    return open_decoder(DecoderOptions(str(path), backend="reference", weights="float"), silent)


def settle() -> None:
    """Nothing is under way."""


def test_steps_follow_each_other_in_blocks_of_their_own() -> None:
    batches = Batches(CASE)
    first, last = batches.step(0, [5, 6]), batches.step(WARM_STEPS + STEPS)
    assert first.plain
    assert first.token_ids.tolist() == [5, 6]
    assert (first.positions.tolist(), first.lengths.tolist()) == ([70, 70], [71, 71])
    assert last.lengths.tolist() == [70 + WARM_STEPS + STEPS + 1] * 2
    assert last.block_tables.shape[1] * 64 >= last.lengths.max()
    assert len(set(last.block_tables.ravel().tolist())) == last.block_tables.size
    assert np.array_equal(last.block_tables[:, : first.block_tables.shape[1]], first.block_tables)


def test_every_step_is_timed(decoder: Decoder) -> None:
    arena = decoder.new_arena(CASE.batch * CASE.blocks, CASE.cache)
    steps, batches = decoder.new_token_steps(arena, CASE.batch), Batches(CASE)
    streams = open_streams(steps, CASE, GREEDY)
    seconds = step_seconds(steps, streams, batches)
    assert len(seconds) == STEPS
    assert min(seconds) > 0
    host = host_seconds(steps, streams, batches.step(1, [1, 1]))
    assert len(host) == STEPS
    assert min(host) > 0


def test_parts_cover_the_step(decoder: Decoder) -> None:
    arena = decoder.new_arena(CASE.batch * CASE.blocks, CASE.cache)
    parts = part_milliseconds(decoder, arena, Batches(CASE).step(3), settle)
    assert parts.keys() == set(PARTS.values())


class Counting:
    """A backend that counts what it is asked for."""

    def __init__(self, backend: Any) -> None:
        self.asked: Counter[str] = Counter()
        self._backend = backend

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self.asked[name] += name in PARTS
        return getattr(self._backend, name)


def test_a_part_is_computed_alone_once_all_was(decoder: Decoder) -> None:
    arena = decoder.new_arena(CASE.batch * CASE.blocks, CASE.cache)
    step, one, batch = decoder.step(arena), OnePart("attention"), Batches(CASE).step(0, [1, 2])
    step(one.over(decoder.backend), batch)
    counting = Counting(decoder.backend)
    step(one.over(counting), batch)
    assert +counting.asked == {"attention": decoder.config.layers}
