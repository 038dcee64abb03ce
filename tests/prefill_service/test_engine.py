"""A prefill worker over real gRPC: exact, fair, and without leaks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import grpc
import numpy as np
import pytest

from kvrelay.errors import (
    Draining,
    Internal,
    InvalidArgument,
    LeaseLost,
    PromptTooLong,
    QueueFull,
    TransportLost,
)
from kvrelay.rpc import error_of_call
from kvrelay.v1.prefill_pb2 import Lease
from kvrelay.v1.sampling_pb2 import SamplingParams
from kvrelay.v1.worker_pb2 import DrainRequest
from tests.pools import Prefill, decode_worker, prefill_worker, relay, until
from tests.tiny_model import CONTEXT, POISON, write_tiny_model

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, POISON, length).tolist()


def first_token(prefill: Prefill, ids: list[int], sampling: SamplingParams = GREEDY) -> int:
    events = list(prefill.read(ids, sampling))
    return events[-1].first_token.token.token_id


def failure(stream: object) -> Exception:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)  # type: ignore[call-overload]
    return error_of_call(caught.value)


@pytest.mark.parametrize("kv_format", ["none", "int8", "int4"])
def test_chunks_change_no_token(model: Path, kv_format: str) -> None:
    answers: list[list[int]] = []
    for chunk in (16, 100, 1024):
        with (
            prefill_worker(model, chunk_tokens=chunk, kv_format=kv_format) as prefill,
            decode_worker(model, kv_format=kv_format) as decode,
        ):
            answers.append(relay(prefill, decode, prompt(333), GREEDY).ids)
            prefill.assert_idle()
    assert len(answers[0]) == 8
    assert answers[0] == answers[1] == answers[2]


def test_a_found_prefix_changes_no_token(model: Path) -> None:
    ids = prompt(300)
    with prefill_worker(model) as prefill, decode_worker(model) as decode:
        cold = relay(prefill, decode, ids, GREEDY)
        warm = relay(prefill, decode, ids, GREEDY)
        longer = relay(prefill, decode, ids[:200] + prompt(50, 1), GREEDY)
        assert (cold.cached, warm.cached, longer.cached) == (0, 256, 192)
        assert warm.ids == cold.ids
        assert (warm.blocks, warm.bytes) == (cold.blocks, cold.bytes)
        assert prefill.status().cached_tokens == 448
        prefill.assert_idle()
        decode.assert_idle()


def test_a_prompt_of_whole_blocks_still_computes_its_last_token(model: Path) -> None:
    with prefill_worker(model) as prefill:
        assert first_token(prefill, prompt(128)) == first_token(prefill, prompt(128))
        assert prefill.status().cached_tokens == 64


def test_a_short_prompt_overtakes_a_long_one(model: Path) -> None:
    with prefill_worker(model, chunk_tokens=32) as prefill:
        long = prefill.read(prompt(2000), GREEDY)
        assert next(long).HasField("admitted")
        assert len(list(prefill.read(prompt(10, 1), GREEDY))) == 2
        assert prefill.status().running == 1
        assert next(long).HasField("first_token")


def test_prompts_beyond_the_arena_wait_for_their_turn(model: Path) -> None:
    with prefill_worker(model, cache_tokens=512, chunk_tokens=64, max_running=4) as prefill:
        streams = [prefill.read(prompt(300, seed), GREEDY) for seed in range(5)]
        assert all(list(stream)[-1].HasField("first_token") for stream in streams)
        prefill.assert_idle()


def test_masked_tiles_are_counted_and_not_computed(model: Path, tmp_path: Path) -> None:
    windowed = write_tiny_model(tmp_path, window=64)
    counts: list[int] = []
    for folder in (model, windowed):
        with prefill_worker(folder) as prefill:
            before = prefill.status()
            first_token(prefill, prompt(512))
            after = prefill.status()
            counts.append(after.tiles_computed - before.tiles_computed)
            assert after.tiles_skipped > before.tiles_skipped
    # In each layer 8 query tiles see 1 + 2 + ... + 8 key blocks, or their own and the one before; in the last
    # layer only the last row is attended for, which sees 8 blocks, or the newest 64 keys in one.
    assert counts == [36 + 36 + 8, 15 + 15 + 1]


def test_a_dropped_prompt_frees_its_blocks(model: Path) -> None:
    with prefill_worker(model, chunk_tokens=16) as prefill:
        running = prefill.read(prompt(1500), GREEDY)
        assert next(running).HasField("admitted")
        waiting = prefill.read(prompt(1500, 1), GREEDY)
        running.cancel()
        waiting.cancel()
        prefill.assert_idle()
        assert first_token(prefill, prompt(20)) >= 0


def test_bad_input_is_refused(model: Path) -> None:
    with prefill_worker(model, cache_tokens=1024) as prefill:
        assert isinstance(failure(prefill.read([], GREEDY)), InvalidArgument)
        assert isinstance(failure(prefill.read([300], GREEDY)), InvalidArgument)
        assert isinstance(failure(prefill.read([5], SamplingParams(temperature=-1))), InvalidArgument)
        assert isinstance(failure(prefill.read(prompt(1025), GREEDY)), PromptTooLong)
        prefill.assert_idle()
    with prefill_worker(model) as prefill:
        assert isinstance(failure(prefill.read(prompt(CONTEXT + 1), GREEDY)), PromptTooLong)


def test_the_queue_is_bounded(model: Path) -> None:
    with prefill_worker(model, max_waiting=1, max_running=1, chunk_tokens=16) as prefill:
        running = prefill.read(prompt(1500), GREEDY)
        assert next(running).HasField("admitted")
        waiting = prefill.read(prompt(100, 1), GREEDY)
        until(lambda: prefill.status().waiting == 1)
        error = failure(prefill.read(prompt(100, 2), GREEDY))
        assert isinstance(error, QueueFull)
        assert error.retry_after
        running.cancel()
        assert list(waiting)[-1].HasField("first_token")


def test_not_a_number_ends_one_prompt_and_spares_the_others(model: Path) -> None:
    with prefill_worker(model, chunk_tokens=64) as prefill:
        expected = first_token(prefill, prompt(400, 5))
        sound = prefill.read(prompt(400, 5)[:60] + prompt(340, 6), GREEDY)
        spoiled = prefill.read([*prompt(40), POISON], GREEDY)
        error = failure(spoiled)
        assert isinstance(error, Internal)
        assert "NonFinite" in str(error)
        assert list(sound)[-1].HasField("first_token")
        assert first_token(prefill, prompt(400, 5)) == expected
        prefill.assert_idle()


def test_a_prompt_that_shares_its_step_with_a_spoilt_one_is_handed_over_once(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, few = prompt(60), SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    with prefill_worker(model) as prefill, decode_worker(model) as decode, ThreadPoolExecutor(3) as crowd:
        expected = relay(prefill, decode, ids, few).ids
        engine = prefill.worker._engine
        assert engine is not None
        take, go_on = engine.decoder.logits, Event()

        def take_when_told(*step: Any) -> Any:
            go_on.wait(60)
            return take(*step)

        monkeypatch.setattr(engine.decoder, "logits", take_when_told)
        first = crowd.submit(first_token, prefill, prompt(100, 1))
        until(lambda: prefill.status().running == 1)
        sound = crowd.submit(relay, prefill, decode, ids, few)
        spoiled = crowd.submit(relay, prefill, decode, [*prompt(40), POISON], few)
        until(lambda: prefill.status().waiting == 2)
        go_on.set()
        assert isinstance(spoiled.exception(), Internal)
        assert sound.result().ids == expected
        first.result()
        prefill.assert_idle()
        decode.assert_idle()


def test_a_lost_receiver_fails_the_prompt_and_frees_its_blocks(model: Path) -> None:
    with prefill_worker(model) as prefill:
        gone = Lease(lease_id="x", endpoint="grpc://127.0.0.1:1")
        assert isinstance(failure(prefill.read(prompt(300), GREEDY, gone)), TransportLost)
        prefill.assert_idle()
        with decode_worker(model) as decode:
            unknown = Lease(lease_id="x", endpoint=f"grpc://{decode.address}")
            assert isinstance(failure(prefill.read(prompt(300), GREEDY, unknown)), LeaseLost)
        prefill.assert_idle()


def test_draining_ends_what_runs_and_refuses_what_comes(model: Path) -> None:
    with prefill_worker(model, chunk_tokens=16) as prefill:
        running = prefill.read(prompt(1500), GREEDY)
        assert next(running).HasField("admitted")
        drained = prefill.admin.Drain.future(DrainRequest())
        until(lambda: isinstance(_try(prefill), Draining))
        assert not drained.done()
        assert list(running)[-1].HasField("first_token")
        drained.result(timeout=20)
        assert prefill.status().running == 0


def _try(prefill: Prefill) -> Exception | None:
    try:
        list(prefill.read(prompt(5, 9), GREEDY))
    except grpc.RpcError as error:
        return error_of_call(error)
    return None
