"""A real system under the command line: generate, status, scale under load, bench."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvrelay.v1.worker_pb2 import POOL_DECODE, POOL_PREFILL
from tests.served import Served, serve, until

PROMPT = "Write a story about a lighthouse keeper."


def call(*arguments: str, text: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    """Run a command with a text on its standard input."""
    command = [str(Path(sys.executable).with_name("kvrelay")), *arguments]
    return subprocess.run(command, check=False, input=text, capture_output=True)


def kvrelay(*arguments: str) -> str:
    """Standard output of a command that must succeed."""
    done = call(*arguments)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    """One system for all tests here; each leaves it with one worker a pool."""
    with serve("--threads", "1") as served:
        yield served


def answer(served: Served, *more: str) -> dict[str, Any]:
    arguments = ("--chat", "--prompt", PROMPT, "--max-tokens", "12", "--temperature", "0", *more)
    return json.loads(kvrelay("generate", "--address", served.client.address, *arguments, "--json"))


def test_generate_prints_one_object(served: Served) -> None:
    found = answer(served, "--logprobs", "2")
    assert {"text", "token_ids", "finish_reason", "usage", "timing"} <= found.keys()
    assert (len(found["token_ids"]), found["finish_reason"]) == (12, "length")
    assert found["usage"]["completion_tokens"] == 12
    assert found["timing"]["blocks_moved"] == 30
    assert [len(one["top"]) for one in found["logprobs"]] == [2] * 12


def test_generate_prints_the_text_and_nothing_else(served: Served) -> None:
    arguments = ("--chat", "--prompt", PROMPT, "--max-tokens", "12", "--temperature", "0")
    printed = kvrelay("generate", "--address", served.client.address, *arguments)
    assert printed == answer(served)["text"] + "\n"


def test_a_prompt_may_come_through_a_pipe(served: Served) -> None:
    arguments = ("generate", "--address", served.client.address, "--max-tokens", "1")
    assert call(*arguments, text=b"One").returncode == 0
    refused = call(*arguments, text=b"\xff")
    assert refused.returncode == 2
    assert refused.stderr.startswith(b"error: InvalidArgument: standard input is not UTF-8")


def test_a_model_that_is_not_served_is_refused(served: Served) -> None:
    refused = call("generate", "--address", served.client.address, "--model", "other", "--prompt", "x")
    assert refused.returncode == 3
    assert refused.stderr.startswith(b"error: ModelNotFound: ")


def test_a_conversation_goes_on_and_begins_anew(served: Served) -> None:
    flags = ("--max-tokens", "8", "--temperature", "0", "--address", served.client.address)
    one = call("chat", *flags, text=b"What is 2+2?\n").stdout
    two = call("chat", *flags, text=b"What is 2+2?\nAnd 3+3?\n").stdout
    anew = call("chat", *flags, text=b"What is 2+2?\n/reset\nWhat is 2+2?\n/quit\n").stdout
    assert two.startswith(one)
    assert len(two) > len(one)
    assert anew == one + one


def test_status_shows_both_pools(served: Served) -> None:
    found = json.loads(kvrelay("status", "--address", served.client.address, "--json"))
    assert (found["model"], found["kv_format"], found["transport"]) == ("smollm2", "int8", "grpc")
    assert [(one["worker_id"], one["state"]) for one in found["workers"]] == [
        ("prefill-0", "ready"),
        ("decode-0", "ready"),
    ]
    assert [one["plans"]["hits"] for one in found["workers"]] == [{}, {}]  # the cpu backend compiles none
    assert [one["attention_calls"] for one in found["workers"]] == [{}, {}]  # and has one way to attend
    assert "prefill-0" in kvrelay("status", "--address", served.client.address)


def test_scaling_under_load_loses_no_request(served: Served) -> None:
    expected = served.ask(PROMPT, temperature=0, max_tokens=48).token_ids
    with ThreadPoolExecutor(6) as crowd:

        def ask_until_done(_: int) -> list[list[int]]:
            answers: list[list[int]] = []
            while not done:
                answers.append(served.ask(PROMPT, temperature=0, max_tokens=48).token_ids)
            return answers

        done: list[bool] = []
        asking = [crowd.submit(ask_until_done, number) for number in range(6)]
        up = kvrelay("scale", "prefill=2", "decode=2", "--address", served.client.address)
        assert up == "prefill=2 decode=2\n"
        assert (served.ready(POOL_PREFILL), served.ready(POOL_DECODE)) == (2, 2)
        down = kvrelay("scale", "prefill=1", "decode=1", "--address", served.client.address)
        assert down == "prefill=1 decode=1\n"
        done.append(True)
        answers = [one for future in asking for one in future.result()]
    assert len(answers) >= 6
    assert all(one == expected for one in answers)
    until(lambda: len(served.workers()) == 2)
    served.assert_nothing_leaked(1, 1)


def test_a_pool_is_never_scaled_to_nothing(served: Served) -> None:
    refused = call("scale", "decode=0", "--address", served.client.address)
    assert refused.returncode == 2
    assert refused.stderr == b"error: InvalidArgument: decode: a pool has 1 to 1024 workers, not 0\n"


def test_bench_measures(served: Served) -> None:
    sizes = ("--requests", "4", "--concurrency", "2", "--prompt-tokens", "80", "--output-tokens", "8")
    found = json.loads(kvrelay("bench", *sizes, "--address", served.client.address))
    assert (found["failed"], found["requests"]) == (0, 4)
    assert found["time_to_first_token_seconds"]["p50"] > 0
    assert found["inter_token_seconds"]["p99"] >= found["inter_token_seconds"]["p50"] > 0
    assert found["output_tokens_per_second"] > 0
