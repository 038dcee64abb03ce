"""Many requests at once: order, bounds, and nothing left behind."""

import asyncio
import random

import grpc.aio

from gateway_service.config import GatewayConfig
from kvrelay.errors import LeaseLost, QueueFull
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.sampling_pb2 import SamplingParams
from tests.gateway_service.byte_model import byte_model
from tests.gateway_service.house import House, open_house, until
from tests.gateway_service.scripted import Fault, expected_answer


def ask(text: str, max_tokens: int = 20) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, sampling=SamplingParams(max_tokens=max_tokens, seed=1))


async def test_slots_are_never_overdrawn_and_all_are_answered() -> None:
    async with open_house(2, 3, slots=3) as house:
        replies = await asyncio.gather(*(house.ask(ask(f"prompt {n}")) for n in range(60)))
        for number, reply in enumerate(replies):
            assert reply.token_ids == expected_answer(byte_model().encode_text(f"prompt {number}"), 1, 20)
            assert reply.finish.timing.migrations == 0
        assert all(worker.most_open <= 3 for worker in house.decode)
        assert all(len(worker.requests) >= 10 for worker in house.decode)


async def test_the_queue_is_first_come_first_served() -> None:
    async with open_house(1, 1, slots=1) as house:
        tasks = []
        for number in range(8):
            tasks.append(asyncio.create_task(house.ask(ask(f"prompt {number}"))))
            await until(lambda: len(house.decode[0].requests) + house.gateway.queued == len(tasks))
        await asyncio.gather(*tasks)
        order = [bytes(request.token_ids[1:]).decode() for request in house.decode[0].requests]
        assert order == [f"prompt {number}" for number in range(8)]


async def test_past_its_bound_the_queue_refuses_with_a_hint() -> None:
    config = GatewayConfig(poll_seconds=0.05, max_queued=2)
    async with open_house(1, 1, config, slots=1) as house:
        house.decode[0].pause = 0.01
        waiting = [asyncio.create_task(house.ask(ask("one"))) for _ in range(3)]
        await until(lambda: house.gateway.queued == 2 and house.gateway.running == 1)
        error = await house.error_of(ask("two"))
        assert type(error) is QueueFull
        assert error.retry_after is not None
        assert error.retry_after >= 1.0
        for reply in await asyncio.gather(*waiting):
            assert reply.finish.usage.completion_tokens == 20


async def test_a_request_for_one_token_passes_those_that_wait_for_a_slot() -> None:
    async with open_house(1, 1, slots=1) as house:
        house.decode[0].pause = 0.02
        waiting = [asyncio.create_task(house.ask(ask("long"))) for _ in range(3)]
        await until(lambda: house.gateway.queued == 2)
        await house.ask(ask("short", max_tokens=1))
        assert not any(task.done() for task in waiting)
        await asyncio.gather(*waiting)


async def test_a_dropped_stream_frees_both_workers() -> None:
    async with open_house() as house:
        house.decode[0].pause = 0.05
        call = house.call(ask("hello", 1000))
        async for event in call:
            if event.HasField("delta"):
                break
        call.cancel()
        await house.idle()


async def test_a_request_dropped_in_the_queue_leaves_it() -> None:
    async with open_house(1, 1, slots=1) as house:
        house.decode[0].pause = 0.02
        first = asyncio.create_task(house.ask(ask("first")))
        await until(lambda: house.decode[0].open_streams == 1)
        second = house.call(ask("second"))
        await until(lambda: house.gateway.queued == 1)
        second.cancel()
        await until(lambda: house.gateway.queued == 0)
        await first
        assert len(house.decode[0].requests) == 1


async def test_random_drops_and_faults_leak_nothing() -> None:
    dice = random.Random(5)
    async with open_house(2, 3, slots=4) as house:
        for worker in house.decode:
            worker.pause = 0.001
        outcomes = await asyncio.gather(*(_client(house, dice, number) for number in range(200)))
        assert outcomes.count("whole") > 40
        assert outcomes.count("dropped") > 40
        await house.idle()


async def _client(house: House, dice: random.Random, number: int) -> str:
    await asyncio.sleep(dice.random() * 0.5)
    if number % 10 == 0:
        worker = dice.choice(house.decode)
        worker.script.append(Fault(dice.randrange(10), LeaseLost("scripted")))
    max_tokens = dice.randrange(1, 30)
    drop_after = dice.randrange(40)
    call = house.call(ask(f"prompt {number}", max_tokens))
    tokens: list[int] = []
    seen = 0
    try:
        async for event in call:
            tokens += [token.token_id for token in event.delta.tokens]
            seen += 1
            if seen > drop_after:
                call.cancel()
    except (grpc.aio.AioRpcError, asyncio.CancelledError):
        assert seen > drop_after
        return "dropped"
    assert tokens == expected_answer(byte_model().encode_text(f"prompt {number}"), 1, max_tokens)
    return "whole"
