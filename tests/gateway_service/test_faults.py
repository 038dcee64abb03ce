"""Workers that die, hang, refuse and come back: the client sees the same answer, or one clear error."""

import asyncio
from collections import deque

import pytest

from gateway_service.config import GatewayConfig
from gateway_service.stream import WorkerLostError
from gateway_service.worker import Worker
from kvrelay.errors import (
    BlockCorrupt,
    Draining,
    Internal,
    InvalidArgument,
    KvrelayError,
    LeaseLost,
    NoWorker,
    QueueFull,
    TransportLost,
)
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1 import worker_pb2 as worker_pb
from kvrelay.v1.decode_pb2 import DecodeRequest
from kvrelay.v1.sampling_pb2 import SamplingParams
from tests.gateway_service.byte_model import byte_model
from tests.gateway_service.house import House, Reply, open_house, until
from tests.gateway_service.scripted import DIE, HANG, Fault, expected_answer

PROMPT = "a prompt"
QUICK = GatewayConfig(
    poll_seconds=0.05, worker_wait_seconds=1.0, lost_seconds=0.2, stall_seconds=0.3, wait_seconds=0.3
)

PREFILL_POINTS = ("start", "admitted", "first_token")
DECODE_POINTS = ("start", "reserved", "joined", 0, 5, 17)


def ask(max_tokens: int = 20, **sampling: object) -> pb.GenerateRequest:
    params = SamplingParams(seed=7, max_tokens=max_tokens, **sampling)  # type: ignore[arg-type]
    return pb.GenerateRequest(text=PROMPT, sampling=params)


def check(reply: Reply, tokens: int = 20) -> None:
    """The answer is that of a request without faults, told once."""
    assert reply.token_ids == expected_answer(byte_model().encode_text(PROMPT), 7, tokens)
    assert reply.finish.usage.completion_tokens == tokens
    assert sum(event.HasField("prompt") for event in reply.events) == 1


async def faulty(house: House, pool: str, fault: Fault) -> Reply:
    """Ask with one fault, which whichever worker of the pool is chosen first meets."""
    script = deque([fault])
    for worker in house.prefill if pool == "prefill" else house.decode:
        worker.script = script
    return await house.ask(ask())


@pytest.mark.parametrize("point", PREFILL_POINTS)
@pytest.mark.parametrize("what", [DIE, TransportLost("redis is gone"), HANG])
async def test_another_prefill_worker_goes_on(point: str, what: str | KvrelayError) -> None:
    async with open_house(2, 1, QUICK) as house:
        reply = await faulty(house, "prefill", Fault(point, what))
        check(reply)
        assert reply.finish.timing.migrations == 1


@pytest.mark.parametrize("point", DECODE_POINTS)
@pytest.mark.parametrize("what", [DIE, LeaseLost("ran out"), BlockCorrupt("checksum"), HANG])
async def test_another_decode_worker_goes_on(point: str | int, what: str | KvrelayError) -> None:
    async with open_house(1, 2, QUICK) as house:
        reply = await faulty(house, "decode", Fault(point, what))
        check(reply)
        assert reply.finish.timing.migrations == 1
        assert [len(worker.requests) for worker in house.decode] == [1, 1]


async def test_a_hanging_hand_over_is_given_up() -> None:
    async with open_house(2, 1, QUICK) as house:
        check(await faulty(house, "prefill", Fault("first_token", HANG)))


async def test_the_only_worker_serves_again_once_it_is_back() -> None:
    async with open_house(1, 1) as house:
        worker = house.decode[0]
        worker.script.append(Fault(5, DIE))
        asked = asyncio.create_task(house.ask(ask()))
        await until(lambda: worker._server is None)
        await worker.start()
        check(await asked)


async def test_a_replaced_worker_serves_under_its_old_name() -> None:
    async with open_house(1, 1) as house:
        worker = house.decode[0]
        worker.script.append(Fault("joined", DIE))
        asked = asyncio.create_task(house.ask(ask()))
        await until(lambda: worker._server is None)
        worker.port = 0
        await worker.start()
        house.add(worker)
        check(await asked)


async def test_a_worker_that_answers_no_status_call_loses_its_requests() -> None:
    async with open_house(1, 2, GatewayConfig(poll_seconds=0.05, lost_seconds=0.2)) as house:
        house.decode[0].script = house.decode[1].script = deque([Fault(5, HANG)])
        asked = asyncio.create_task(house.ask(ask()))
        await until(lambda: sum(len(worker.requests) for worker in house.decode) == 1)
        hanging = next(worker for worker in house.decode if worker.requests)
        hanging.silent = True
        check(await asked)


async def test_removing_a_worker_moves_its_requests() -> None:
    async with open_house(1, 2) as house:
        house.decode[0].script = house.decode[1].script = deque([Fault(5, HANG)])
        asked = asyncio.create_task(house.ask(ask()))
        await until(lambda: sum(len(worker.requests) for worker in house.decode) == 1)
        house.directory.remove(next(worker.worker_id for worker in house.decode if worker.requests))
        check(await asked)


async def test_draining_lets_running_requests_end() -> None:
    async with open_house(1, 2) as house:
        house.decode[0].pause = house.decode[1].pause = 0.01
        asked = asyncio.create_task(house.ask(ask()))
        await until(lambda: sum(worker.open_streams for worker in house.decode) == 1)
        busy, other = sorted(house.decode, key=lambda worker: -worker.open_streams)
        house.directory.drain(busy.worker_id)
        replies = await asyncio.gather(asked, *(house.ask(ask()) for _ in range(4)))
        assert [reply.finish.timing.migrations for reply in replies] == [0] * 5
        assert (len(busy.requests), len(other.requests)) == (1, 4)


async def test_a_worker_that_drains_by_itself_is_left_alone() -> None:
    async with open_house(1, 2) as house:
        house.decode[0].state = worker_pb.WORKER_STATE_DRAINING
        replies = await asyncio.gather(*(house.ask(ask()) for _ in range(4)))
        for reply in replies:
            check(reply)
        assert len(house.decode[0].requests) <= 2, "asked again though it said that it drains"


async def test_an_answer_survives_as_many_faults_as_allowed() -> None:
    async with open_house(1, 1) as house:
        house.decode[0].script.extend(
            [Fault(2, LeaseLost("a")), Fault(3, LeaseLost("b")), Fault("start", Draining("c"))]
        )
        reply = await house.ask(ask())
        check(reply)
        assert reply.finish.timing.migrations == 3


async def test_past_the_bound_of_retries_the_last_error_is_told() -> None:
    async with open_house(1, 1, GatewayConfig(poll_seconds=0.05, retries=1)) as house:
        house.decode[0].script.extend(
            [Fault("start", LeaseLost("first")), Fault("reserved", LeaseLost("second"))]
        )
        error = await house.error_of(ask())
        assert type(error) is NoWorker
        assert str(error) == "2 attempts failed, the last one at decode-0: LeaseLost: second"


async def test_the_last_token_is_drawn_without_a_slot() -> None:
    async with open_house(1, 1) as house:
        house.decode[0].script.append(Fault(18, LeaseLost("one token before the end")))
        check(await house.ask(ask()))
        assert len(house.decode[0].requests) == 1
        assert not house.prefill[0].requests[-1].HasField("lease")


async def test_stop_strings_reach_across_a_fault() -> None:
    async with open_house(1, 1) as house:
        house.prefill[0].answer = house.decode[0].answer = list(b"abcdef")
        house.decode[0].script.append(Fault(2, LeaseLost("between c and d")))
        reply = await house.ask(ask(stop=["cd"]))
        assert (reply.text, reply.finish.stop) == ("ab", "cd")


@pytest.mark.parametrize("error", [Internal("NaN"), InvalidArgument("not so")])
async def test_errors_that_hold_everywhere_are_passed_on(error: KvrelayError) -> None:
    async with open_house(2, 2) as house:
        for worker in house.decode:
            worker.script.append(Fault(3, error))
        reply = await house.ask(ask())
        assert type(reply.error) is type(error)
        assert str(reply.error) == str(error)
        assert len(reply.token_ids) == 4


async def test_a_full_worker_is_passed_over() -> None:
    async with open_house(1, 2) as house:
        check(await faulty(house, "decode", Fault("start", QueueFull("full", 0.5))))


async def test_without_workers_a_request_waits_and_is_then_refused() -> None:
    async with open_house(1, 0, GatewayConfig(poll_seconds=0.05, worker_wait_seconds=0.2)) as house:
        error = await house.error_of(ask())
        assert type(error) is NoWorker
        assert str(error) == "no decode worker is ready"
        assert error.retry_after is not None


async def test_a_request_waits_for_the_first_worker() -> None:
    async with open_house(1, 1) as house:
        house.directory.remove("decode-0")
        asked = asyncio.create_task(house.ask(ask()))
        await until(lambda: house.gateway.queued == 1)
        house.add(house.decode[0])
        check(await asked)


async def test_a_worker_that_is_taken_out_meanwhile_is_a_fault_like_others() -> None:
    worker = Worker(worker_pb.POOL_DECODE, "decode-0", "127.0.0.1:1")
    await worker.close()
    with pytest.raises(WorkerLostError, match="decode-0"):
        worker.open(worker.decode.Decode, DecodeRequest())
