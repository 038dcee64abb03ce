"""The whole system on one GPU: both pools' workers share the card, and answer as the CPU reference does."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from kvrelay.v1.worker_pb2 import POOL_DECODE, POOL_PREFILL
from model_runtime.catalog import default_cache_dir
from tests.e2e.test_exact import cases, differences
from tests.served import Reply, Served, serve, until

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
EXACT = ("--kv-format", "none", "--weights", "float")
GPU = ("--model", "smollm2", "--backend", "cuda")


@pytest.fixture(autouse=True, scope="module")
def machine(cupy: Any) -> None:
    """A GPU, and the model, which is not fetched here."""
    if not (default_cache_dir() / "smollm2" / MODEL).exists():
        pytest.skip("SmolLM2 is not in the cache")


def assert_on_the_gpu(served: Served) -> None:
    assert {worker.backend for worker in served.workers()} == {"cuda"}


@pytest.mark.parametrize(
    ("workers", "flags"),
    [(1, ()), (2, ("--chunk", "96", "--transport", "redis"))],
    ids=["one-by-one-over-grpc", "all-at-once-over-redis"],
)
def test_greedy_answers(workers: int, flags: tuple[str, ...]) -> None:
    """float16 keeps three decimal digits: a tie of `differences` may fall the other way, nothing else."""
    with serve(*GPU, *EXACT, "--prefill", str(workers), "--decode", str(workers), *flags) as served:
        assert_on_the_gpu(served)
        with ThreadPoolExecutor(1 if workers == 1 else len(cases())) as crowd:
            chats = list(crowd.map(lambda case: differences(served, case, case["messages"]), cases()))
            ids = list(crowd.map(lambda case: differences(served, case, case["prompt_token_ids"]), cases()))
        assert sum(chats) + sum(ids) <= 2
        for pool in (POOL_PREFILL, POOL_DECODE):
            assert sum(worker.blocks_moved for worker in served.workers(pool)) > 0
        served.assert_nothing_leaked(workers, workers)


@pytest.fixture(scope="module")
def coded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One worker in each pool, a cache in int8, and a plan folder that begins empty."""
    plans = tmp_path_factory.mktemp("plans")
    with pytest.MonkeyPatch.context() as patch:
        # Longer than a worker takes from its start until it is ready.
        patch.setenv("KVRELAY_GATEWAY__WORKER_WAIT_SECONDS", "120")
        with serve(*GPU, "--kv-format", "int8", "--plan-cache", str(plans)) as served:
            yield served


def case_named(name: str) -> dict[str, Any]:
    return next(case for case in cases() if case["name"] == name)


def test_a_decode_worker_dies_while_it_writes(coded: Served) -> None:
    """The answer goes on at the worker in its place, which finds every plan that the first one made."""
    messages = case_named("unicode")["messages"]  # no two of its best logits lie closer than 0.03
    expected = coded.ask(messages, temperature=0, max_tokens=64)
    killed: list[str] = []

    def kill_once(reply: Reply) -> None:
        if len(reply.token_ids) >= 10 and not killed:
            assert reply.prompt is not None
            killed.append(reply.prompt.decode_worker)
            coded.kill(killed[0])

    reply = coded.ask(messages, kill_once, temperature=0, max_tokens=64)
    assert killed
    assert (reply.token_ids, reply.text) == (expected.token_ids, expected.text)
    assert reply.finish is not None
    assert reply.finish.timing.migrations >= 1
    coded.assert_nothing_leaked(1, 1)
    (successor,) = coded.workers(POOL_DECODE)
    assert successor.worker_id not in killed
    assert successor.backend == "cuda"
    assert successor.plans.builds == 0
    assert successor.plans.hits["disk"] > 0


def test_many_streams_share_the_card(coded: Served) -> None:
    """More streams than slots, prompts of several lengths: each ends as asked, and nothing stays."""

    def ask(number: int) -> Reply:
        prompt = "The history of the sea is long. " * (1 + 7 * (number % 5)) + str(number)
        return coded.ask(prompt, temperature=0.8, seed=number, max_tokens=40, ignore_eos=True)

    with ThreadPoolExecutor(24) as crowd:
        replies = list(crowd.map(ask, range(24)))
    assert all(len(reply.token_ids) == 40 for reply in replies)
    coded.assert_nothing_leaked(1, 1)


def test_a_pool_grows_and_shrinks_on_one_card(coded: Served) -> None:
    coded.client.scale(None, 2)
    until(lambda: coded.ready(POOL_DECODE) == 2)
    assert_on_the_gpu(coded)
    assert len(coded.ask("One two three", temperature=0, max_tokens=8).token_ids) == 8
    coded.client.scale(None, 1)
    coded.assert_nothing_leaked(1, 1)


def test_doctor_takes_the_gpu() -> None:
    command = [str(Path(sys.executable).with_name("kvrelay")), "doctor", "--json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert found["chosen"] == "cuda"
    assert all(part["ok"] for part in found["cuda"])
