"""Requests that go well."""

from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gateway_service.config import GatewayConfig
from gateway_service.directory import WorkerDirectory
from gateway_service.gateway import Gateway
from kvrelay.errors import BadSetup
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.sampling_pb2 import FinishReason, SamplingParams
from kvrelay.v1.worker_pb2 import WorkerState
from tests.gateway_service.byte_model import BOS, CONTEXT, EOS, VOCABULARY, byte_model
from tests.gateway_service.house import open_house, until
from tests.gateway_service.scripted import HANG, Fault, expected_answer

STOP, LENGTH = FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_LENGTH


def ask(text: str = "hello", **sampling: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=SamplingParams(**sampling))  # type: ignore[arg-type]


async def test_an_answer_has_prompt_info_deltas_and_finish() -> None:
    async with open_house() as house:
        reply = await house.ask(ask(max_tokens=10, seed=3))
        prompt = byte_model().encode_text("hello")
        assert reply.events[0].HasField("prompt")
        assert reply.prompt.prompt_tokens == len(prompt)
        assert (reply.prompt.seed, reply.prompt.prefill_worker, reply.prompt.decode_worker) == (
            3,
            "prefill-0",
            "decode-0",
        )
        assert reply.token_ids == expected_answer(prompt, 3, 10)
        assert reply.text == bytes(reply.token_ids).decode()
        assert reply.finish.reason == LENGTH
        assert reply.finish.usage == pb.Usage(prompt_tokens=len(prompt), completion_tokens=10)
        timing = reply.finish.timing
        assert (timing.blocks_moved, timing.bytes_moved, timing.migrations) == (30, 3000, 0)
        assert timing.handover_seconds == 0.125
        assert timing.prefill_seconds == 0.25
        assert 0 < timing.time_to_first_token_seconds <= timing.total_seconds
        assert {event.request_id for event in reply.events} == {reply.events[0].request_id}


async def test_the_first_token_does_not_wait_for_the_hand_over() -> None:
    async with open_house() as house:
        house.prefill[0].script.append(Fault("first_token", HANG))
        call = house.call(ask(max_tokens=3))
        async for event in call:
            if event.HasField("delta"):
                break
        call.cancel()


async def test_the_gateway_chooses_a_seed_and_gives_all_workers_the_same() -> None:
    async with open_house() as house:
        reply = await house.ask(ask(max_tokens=4))
        seeds = {house.prefill[0].requests[0].sampling.seed, house.decode[0].requests[0].sampling.seed}
        assert seeds == {reply.prompt.seed}
        assert (await house.ask(ask(max_tokens=4))).prompt.seed != reply.prompt.seed


async def test_one_token_needs_no_decode_slot() -> None:
    async with open_house() as house:
        reply = await house.ask(ask(max_tokens=1, seed=1))
        assert len(reply.token_ids) == 1
        assert reply.finish.reason == LENGTH
        assert reply.prompt.decode_worker == ""
        assert not house.decode[0].requests
        assert not house.prefill[0].requests[0].HasField("lease")


async def test_a_first_token_that_stops_ends_the_rest() -> None:
    async with open_house() as house:
        house.prefill[0].answer = []
        reply = await house.ask(ask(max_tokens=10))
        assert (reply.token_ids, reply.text, reply.finish.reason) == ([EOS], "", STOP)
        assert reply.finish.usage.completion_tokens == 1


async def test_end_of_sequence_ends_the_answer_and_has_no_text() -> None:
    async with open_house() as house:
        house.prefill[0].answer = house.decode[0].answer = list(b"xy")
        reply = await house.ask(ask())
        assert (reply.token_ids, reply.text, reply.finish.reason) == ([*b"xy", EOS], "xy", STOP)
        reply = await house.ask(ask(ignore_eos=True, max_tokens=5))
        assert (reply.token_ids, reply.text, reply.finish.reason) == ([*b"xy", EOS, EOS, EOS], "xy", LENGTH)


async def test_without_max_tokens_the_decode_worker_bounds_the_answer() -> None:
    async with open_house() as house:
        reply = await house.ask(ask())
        assert reply.finish.usage.completion_tokens == house.decode[0].default_max_tokens
        assert reply.finish.reason == LENGTH


async def test_a_prompt_that_leaves_one_token_gets_one() -> None:
    async with open_house() as house:
        reply = await house.ask(ask("x" * (CONTEXT - 2)))
        assert (len(reply.token_ids), reply.finish.reason) == (1, LENGTH)


@pytest.mark.parametrize("min_tokens", [0, 4])
async def test_a_stop_string_across_tokens_ends_the_answer(min_tokens: int) -> None:
    async with open_house() as house:
        house.prefill[0].answer = house.decode[0].answer = list(b"abcdabcdef")
        reply = await house.ask(ask(stop=["bcd"], min_tokens=min_tokens, max_tokens=100))
        assert reply.text == "a"
        assert (reply.finish.reason, reply.finish.stop) == (STOP, "bcd")
        assert reply.token_ids == list(b"abcd")


async def test_a_stop_string_before_min_tokens_is_text() -> None:
    async with open_house() as house:
        house.prefill[0].answer = house.decode[0].answer = list(b"abcdabcdef")
        reply = await house.ask(ask(stop=["bcd"], min_tokens=5, max_tokens=100))
        assert (reply.text, reply.finish.stop) == ("abcda", "bcd")


async def test_text_that_only_began_like_a_stop_string_comes_in_the_end() -> None:
    async with open_house() as house:
        house.prefill[0].answer = house.decode[0].answer = list(b"abc")
        reply = await house.ask(ask(stop=["bcd"]))
        assert (reply.text, reply.finish.reason, reply.finish.stop) == ("abc", STOP, "")


async def test_deltas_carry_whole_characters_and_all_tokens() -> None:
    text = "né 😀 漢字"
    async with open_house() as house:
        house.prefill[0].answer = house.decode[0].answer = list(text.encode())
        reply = await house.ask(ask())
        assert reply.text == text
        assert not any("\ufffd" in event.delta.text for event in reply.events)
        assert reply.token_ids == [*text.encode(), EOS]


async def test_logprobs_pass_through() -> None:
    async with open_house() as house:
        reply = await house.ask(ask(max_tokens=3, logprobs=2))
        tokens = [token for event in reply.events for token in event.delta.tokens]
        assert len(tokens) == 3
        assert all(token.logprob == -0.5 and len(token.top) == 2 for token in tokens)


async def test_chats_and_token_ids_are_prompts_too() -> None:
    async with open_house() as house:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        await house.ask(pb.GenerateRequest(chat=chat, sampling=SamplingParams(max_tokens=2)))
        ids = list(house.prefill[0].requests[-1].token_ids)
        assert ids == byte_model().encode_chat([("user", "hi")])
        await house.ask(pb.GenerateRequest(token_ids=pb.TokenIds(ids=[BOS, 9, 8])))
        assert list(house.prefill[0].requests[-1].token_ids) == [BOS, 9, 8]
        tokenized = await house.stub.Tokenize(pb.TokenizeRequest(chat=chat))  # type: ignore[misc]
        assert list(tokenized.ids) == ids


async def test_get_model_tells_the_limits() -> None:
    async with open_house() as house:
        model = await house.stub.GetModel(pb.GetModelRequest())  # type: ignore[misc]
        assert (model.name, model.family, model.context) == ("bytes", "llama", CONTEXT)
        assert (model.vocabulary, model.kv_format, model.fingerprint) == (VOCABULARY, "int8", "bytes-1")


async def test_health_follows_the_pools() -> None:
    async with open_house() as house:
        watch: Any = house.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        answers = aiter(watch(health_pb2.HealthCheckRequest(service="kvrelay.v1.InferenceService")))
        assert (await anext(answers)).status == health_pb2.HealthCheckResponse.SERVING
        house.directory.drain("decode-0")
        assert (await anext(answers)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        house.add(house.decode[0])
        assert (await anext(answers)).status == health_pb2.HealthCheckResponse.SERVING


async def test_reflection_lists_the_services() -> None:
    async with open_house() as house:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(house.channel)  # type: ignore[arg-type]
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        answer = await call.read()
        names = {service.name for service in answer.list_services_response.service}
        assert {"kvrelay.v1.InferenceService", "grpc.health.v1.Health"} <= names


async def test_metrics_count_what_was_answered() -> None:
    async with open_house() as house:
        await house.ask(ask(max_tokens=5))
        await house.error_of(pb.GenerateRequest())
        await until(lambda: house.gateway.running == 0)
        text = house.gateway.metrics.text().decode()
        assert 'kvrelay_gateway_requests_total{outcome="FINISH_REASON_LENGTH"} 1.0' in text
        assert 'kvrelay_gateway_requests_total{outcome="InvalidArgument"} 1.0' in text
        assert "kvrelay_gateway_completion_tokens_total 5.0" in text


async def test_statuses_are_those_of_the_workers() -> None:
    async with open_house(config=GatewayConfig(poll_seconds=60)) as house:
        call = house.call(ask(max_tokens=1000))
        house.decode[0].pause = 0.01
        await anext(aiter(call))
        await house.directory.refresh()
        running = {status.worker_id: status.running for status in house.directory.statuses()}
        assert running["decode-0"] == 1
        call.cancel()
        await house.idle()
        await house.decode[0].stop()
        await house.directory.refresh()
        states = {status.worker_id: status.state for status in house.directory.statuses()}
        assert states == {
            "prefill-0": WorkerState.WORKER_STATE_READY,
            "decode-0": WorkerState.WORKER_STATE_STOPPED,
        }


async def test_a_taken_port_says_so() -> None:

    async with open_house() as house:
        second = Gateway(GatewayConfig(port=house.gateway.port), byte_model(), WorkerDirectory())
        with pytest.raises(BadSetup, match="is another server running"):
            await second.start()
        await second.stop()


@pytest.mark.parametrize("pause", [0.05, 0.001, 0.0])
async def test_stopping_ends_running_requests_with_an_error(pause: float) -> None:
    """Also while a message is on its way, as at every moment of a quick answer."""
    async with open_house() as house:
        house.decode[0].pause = pause
        call = house.call(ask(max_tokens=1000))
        await anext(aiter(call))
        await house.gateway.stop(0)
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in call:
                pass
        assert ("kvrelay-error", "Draining") in tuple(await call.trailing_metadata())
