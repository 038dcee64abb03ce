"""A decode worker over real gRPC: exact in any company, and without leaks."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from kvrelay.errors import Draining, Internal, InvalidArgument, LeaseLost, PromptTooLong, QueueFull
from kvrelay.rpc import error_of_call
from kvrelay.v1.sampling_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, SamplingParams
from kvrelay.v1.worker_pb2 import DrainRequest
from model_runtime.decoder import Decoder
from tests.decode_service.late_steps import new_late_steps
from tests.pools import decode_worker, prefill_worker, relay, until
from tests.tiny_model import EOS, POISON

FORMATS = ["none", "int8", "int4-g32"]


@pytest.fixture(params=["at once", "a step late"], autouse=True)
def flights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are there when a step is launched, or while the next one is under way."""
    if request.param == "a step late":
        monkeypatch.setattr(Decoder, "new_token_steps", new_late_steps)


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, POISON, length).tolist()


def sampling(max_tokens: int = 12, **fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True} | fields)


def failure(stream: Any) -> Exception:
    with pytest.raises(grpc.RpcError) as caught:
        list(stream)
    return error_of_call(caught.value)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_company_changes_no_token(model: Path, kv_format: str) -> None:
    prompts = [prompt(length, length) for length in (1, 30, 64, 65, 200, 333)]
    lengths = [25, 3, 40, 12, 31, 18]
    settings = {"kv_format": kv_format}
    with prefill_worker(model, **settings) as prefill, decode_worker(model, **settings) as decode:
        alone = [
            relay(prefill, decode, ids, sampling(n)).ids for ids, n in zip(prompts, lengths, strict=True)
        ]
        with ThreadPoolExecutor(6) as crowd:
            answers = crowd.map(
                lambda pair: relay(prefill, decode, pair[0], sampling(pair[1])).ids,
                zip(prompts, lengths, strict=True),
            )
            assert list(answers) == alone
        assert [len(ids) for ids in alone] == lengths
        prefill.assert_idle()
        decode.assert_idle()


@pytest.mark.parametrize("kv_format", FORMATS)
def test_an_answer_goes_on_elsewhere_as_if_nothing_had_happened(model: Path, kv_format: str) -> None:
    ids, settings = prompt(150), {"kv_format": kv_format}
    for params in (sampling(20), sampling(20, temperature=0.9, seed=11, top_p=0.9, repetition_penalty=1.2)):
        with prefill_worker(model, **settings) as prefill, decode_worker(model, **settings) as decode:
            whole = relay(prefill, decode, ids, params).ids
            for answered in (1, 7, 19):
                rest = relay(prefill, decode, ids + whole[:answered], params, prompt=len(ids)).ids
                assert rest == whole[answered:]


def test_draws_depend_on_seed_and_position_only(model: Path) -> None:
    with prefill_worker(model) as prefill, decode_worker(model) as decode:

        def answer(seed: int) -> list[int]:
            return relay(prefill, decode, prompt(40), sampling(16, temperature=1.0, seed=seed)).ids

        first = answer(5)
        with ThreadPoolExecutor(4) as crowd:
            answers = list(crowd.map(answer, [5, 6, 7, 5]))
        assert answers[0] == answers[3] == first
        assert answers[1] != answers[2]


def test_answers_end_as_asked(model: Path) -> None:
    ids = prompt(30)
    with prefill_worker(model) as prefill, decode_worker(model) as decode:
        plain = relay(prefill, decode, ids, sampling(10))
        assert plain.reason == FINISH_REASON_LENGTH
        third = plain.ids[2]
        first_at = plain.ids.index(third)
        stopped = relay(prefill, decode, ids, sampling(10, stop_ids=[third]))
        assert (stopped.ids, stopped.reason) == (plain.ids[: first_at + 1], FINISH_REASON_STOP)
        later = relay(prefill, decode, ids, sampling(10, stop_ids=[third], min_tokens=6))
        assert len(later.ids) >= 6
        assert third not in later.ids[:5]
        one = relay(prefill, decode, ids, sampling(1))
        assert one.ids == plain.ids[:1]
        eos = relay(prefill, decode, ids, sampling(10, ignore_eos=False, stop_ids=[plain.ids[0]]))
        assert len(eos.ids) == 1
        assert EOS not in plain.ids or plain.ids


def test_log_probabilities_come_with_the_tokens(model: Path) -> None:
    with prefill_worker(model) as prefill, decode_worker(model) as decode:
        for token in relay(prefill, decode, prompt(30), sampling(4, logprobs=3)).tokens:
            assert token.logprob <= 0
            assert len(token.top) == 3
            assert token.top[0].token_id == token.token_id
            assert token.top[0].logprob == pytest.approx(token.logprob)


def test_tokens_that_follow_closely_come_together(model: Path) -> None:
    ids, params = prompt(30), sampling(12)
    with prefill_worker(model) as prefill:
        with decode_worker(model, stream_seconds=0.0) as decode:
            each = relay(prefill, decode, ids, params)
        with decode_worker(model, stream_seconds=3600.0) as decode:
            together = relay(prefill, decode, ids, params)
    assert together.ids == each.ids
    assert each.messages == 11  # the first of the twelve comes from prefill
    assert together.messages == 2  # the next one at once, the rest with the end


def test_a_dropped_stream_frees_slot_and_blocks(model: Path) -> None:
    with decode_worker(model, slots=1) as decode:
        holding = decode.write(prompt(100), sampling())
        assert next(holding).HasField("reserved")
        waiting = decode.write(prompt(50), sampling())
        until(lambda: decode.status().waiting == 1)
        assert decode.status().slots_free == 0
        holding.cancel()
        assert next(waiting).HasField("reserved")
        waiting.cancel()
        decode.assert_idle()


def test_a_slot_without_blocks_is_taken_back(model: Path) -> None:
    with decode_worker(model, lease_seconds=0.05) as decode:
        assert isinstance(failure(decode.write(prompt(100), sampling())), LeaseLost)
        decode.assert_idle()


def test_more_requests_than_slots_and_blocks_all_end(model: Path) -> None:
    with (
        prefill_worker(model) as prefill,
        decode_worker(model, slots=2, cache_tokens=512) as decode,
        ThreadPoolExecutor(8) as crowd,
    ):
        answers = list(
            crowd.map(lambda seed: relay(prefill, decode, prompt(150, seed), sampling(9)), range(8))
        )
        assert [len(answer.ids) for answer in answers] == [9] * 8
        decode.assert_idle()
        prefill.assert_idle()


def test_bad_input_is_refused(model: Path) -> None:
    with decode_worker(model, cache_tokens=512, max_waiting=1, slots=1) as decode:
        assert isinstance(failure(decode.write([], sampling())), InvalidArgument)
        assert isinstance(failure(decode.write([300], sampling())), InvalidArgument)
        assert isinstance(failure(decode.write([5], sampling(top_p=2.0))), InvalidArgument)
        assert isinstance(failure(decode.write(prompt(300), sampling(300))), PromptTooLong)
        holding = decode.write(prompt(100), sampling())
        assert next(holding).HasField("reserved")
        waiting = decode.write(prompt(100), sampling())
        until(lambda: decode.status().waiting == 1)
        assert isinstance(failure(decode.write(prompt(100), sampling())), QueueFull)
        waiting.cancel()
        holding.cancel()
        decode.assert_idle()


def test_not_a_number_ends_one_sequence_and_spares_the_others(model: Path) -> None:
    with prefill_worker(model) as prefill, decode_worker(model) as decode, ThreadPoolExecutor(2) as crowd:
        ids = prompt(60)
        expected = relay(prefill, decode, ids, sampling(40)).ids
        sound = crowd.submit(relay, prefill, decode, ids, sampling(40))
        # The tiny model's logits are bounded, so the penalty's bonus makes it draw the poisoned token.
        spoiled = crowd.submit(relay, prefill, decode, [*prompt(20), POISON], sampling(5), 20)
        assert isinstance(spoiled.exception(), Internal)
        assert sound.result().ids == expected
        decode.assert_idle()


def test_a_worker_that_stops_tells_its_requests(model: Path) -> None:
    with decode_worker(model) as decode:
        stream = decode.write(prompt(100), sampling())
        assert next(stream).HasField("reserved")
        decode.worker.stop(5)
        assert failure(stream) is not None


def test_draining_ends_what_runs_and_refuses_what_comes(model: Path) -> None:
    with prefill_worker(model) as prefill, decode_worker(model) as decode, ThreadPoolExecutor(1) as crowd:
        running = crowd.submit(relay, prefill, decode, prompt(50), sampling(200))
        until(lambda: decode.status().running == 1)
        decode.admin.Drain(DrainRequest())
        assert len(running.result().ids) == 200
        assert isinstance(failure(decode.write([5], sampling())), Draining)
