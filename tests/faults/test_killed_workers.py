"""Workers that die at the worst moments: the client sees the tokens that it would have seen anyway."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from kvrelay.v1.worker_pb2 import POOL_DECODE, POOL_PREFILL
from tests.served import Reply, Served, serve, until

LONG = "The history of the sea is long. " * 120
SHORT = "Once upon a time there was a"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """Two workers in each pool."""
    with serve(
        "--model", "smollm2", "--prefill", "2", "--decode", "2", "--threads", "1", "--chunk", "64"
    ) as system:
        yield system


def answer(served: Served, prompt: str, tokens: int) -> Reply:
    return served.ask(prompt, temperature=0.8, seed=7, max_tokens=tokens, ignore_eos=True)


@pytest.mark.parametrize("pool", [POOL_PREFILL, POOL_DECODE], ids=["prefill", "decode"])
def test_an_idle_worker_dies(served: Served, pool: int) -> None:
    expected = answer(served, SHORT, 12).token_ids
    served.kill(next(worker.worker_id for worker in served.workers() if worker.pool == pool))
    for _ in range(4):
        assert answer(served, SHORT, 12).token_ids == expected
    served.assert_nothing_leaked(2, 2)


def test_a_decode_worker_dies_while_it_writes(served: Served) -> None:
    expected = answer(served, SHORT, 60)
    killed: list[str] = []

    def kill_once(reply: Reply) -> None:
        if len(reply.token_ids) >= 10 and not killed:
            assert reply.prompt is not None
            killed.append(reply.prompt.decode_worker)
            served.kill(killed[0])

    reply = served.ask(SHORT, kill_once, temperature=0.8, seed=7, max_tokens=60, ignore_eos=True)
    assert killed
    assert reply.token_ids == expected.token_ids
    assert reply.text == expected.text
    assert reply.finish is not None
    assert reply.finish.timing.migrations >= 1
    served.assert_nothing_leaked(2, 2)


def test_a_prefill_worker_dies_while_it_reads_and_hands_over(served: Served) -> None:
    # Blocks leave while later chunks are computed: a worker killed in the midst has handed over some.
    expected = answer(served, LONG + "unread", 8).token_ids
    prompt = "Now " + LONG
    with ThreadPoolExecutor(1) as beside:
        before = {worker.worker_id: worker.prompt_tokens for worker in served.workers(POOL_PREFILL)}
        asked = beside.submit(answer, served, prompt, 8)
        reading: list[str] = []

        def found() -> bool:
            reading.extend(
                worker.worker_id
                for worker in served.workers(POOL_PREFILL)
                if worker.running and worker.prompt_tokens > before[worker.worker_id]
            )
            return bool(reading) or asked.done()

        until(found)
        assert reading, "the prompt was read before a worker could be killed"
        served.kill(reading[0])
        reply = asked.result()
    served.assert_nothing_leaked(2, 2)
    assert answer(served, prompt, 8).token_ids == reply.token_ids
    assert answer(served, LONG + "unread", 8).token_ids == expected


def test_a_dropped_stream_frees_everything(served: Served) -> None:
    class Gone(Exception):
        pass

    def leave(reply: Reply) -> None:
        if len(reply.token_ids) >= 3:
            raise Gone

    with pytest.raises(Gone):
        served.ask(SHORT, leave, max_tokens=400, ignore_eos=True)
    served.assert_nothing_leaked(2, 2)
