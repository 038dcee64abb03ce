"""The OpenAI-compatible endpoints, over real connections."""

import asyncio
import http.client
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway_service.config import GatewayConfig
from gateway_service.directory import WorkerDirectory
from gateway_service.gateway import Gateway
from kvrelay.errors import BadSetup, Internal, LeaseLost
from tests.gateway_service.byte_model import byte_model
from tests.gateway_service.house import House, open_house, until
from tests.gateway_service.scripted import HANG, Fault, expected_answer

CONFIG = GatewayConfig(poll_seconds=0.05, http_port=0, max_queued=1, worker_wait_seconds=0.2)
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "seed": 1}
TEXT = {"prompt": "hi", "max_tokens": 5, "seed": 1}


def letters(prompt: list[int], seed: int = 1, tokens: int = 5) -> str:
    return bytes(expected_answer(prompt, seed, tokens)).decode()


HI = byte_model().encode_text("hi")
CHAT_ANSWER = letters(byte_model().encode_chat([("user", "hi")]))
TEXT_ANSWER = letters(HI)


class Client:
    """HTTP through the standard library, in threads."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def ask(self, path: str, body: Any = None) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, body (parsed where it is JSON) and headers."""
        return await asyncio.to_thread(self._ask, path, body)

    async def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The chunks of a stream; checks that it ends as it should."""
        status, raw, headers = await self.ask(path, body | {"stream": True})
        assert status == 200, raw
        assert headers["content-type"].startswith("text/event-stream")
        events = raw.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    async def post(
        self, path: str, body: dict[str, Any]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request, and leave its connection to the test."""
        payload = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(payload)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(head.encode() + payload)
        return reader, writer

    def _ask(self, path: str, body: Any) -> tuple[int, Any, http.client.HTTPMessage]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            payload = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request("GET" if body is None else "POST", path, payload)
            response = connection.getresponse()
            raw = response.read()
            is_json = response.headers["content-type"] == "application/json"
            return response.status, json.loads(raw) if is_json else raw, response.headers
        finally:
            connection.close()


@asynccontextmanager
async def open_door(**house: Any) -> AsyncIterator[tuple[House, Client]]:
    async with open_house(config=CONFIG, **house) as opened:
        assert opened.gateway.http_port is not None
        yield opened, Client(opened.gateway.http_port)


async def test_a_chat_is_answered() -> None:
    async with open_door() as (_, client):
        status, body, _ = await client.ask("/v1/chat/completions", CHAT | {"model": "bytes"})
        assert status == 200
        assert body["id"].startswith("chatcmpl-")
        assert (body["object"], body["model"]) == ("chat.completion", "bytes")
        assert body["choices"] == [
            {
                "index": 0,
                "message": {"role": "assistant", "content": CHAT_ANSWER},
                "logprobs": None,
                "finish_reason": "length",
            }
        ]
        assert body["usage"]["completion_tokens"] == 5
        assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 5


async def test_a_chat_streams() -> None:
    async with open_door() as (_, client):
        options = {"stream_options": {"include_usage": True}}
        *chunks, last = await client.stream("/v1/chat/completions", CHAT | options)
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == CHAT_ANSWER
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 6 + ["length"]
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert len({chunk["id"] for chunk in [*chunks, last]}) == 1
        assert all(chunk["usage"] is None for chunk in chunks)
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 5)
        plain = await client.stream("/v1/chat/completions", CHAT)
        assert not any("usage" in chunk for chunk in plain)


async def test_a_prompt_is_completed_whole_and_streamed() -> None:
    async with open_door() as (_, client):
        _, body, _ = await client.ask("/v1/completions", TEXT)
        assert (body["object"], body["choices"][0]["text"]) == ("text_completion", TEXT_ANSWER)
        chunks = await client.stream("/v1/completions", TEXT)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT_ANSWER
        _, body, _ = await client.ask("/v1/completions", {"prompt": HI, "seed": 1})
        assert body["choices"][0]["text"] == letters(HI, tokens=16), "16 is OpenAI's default of max_tokens"


async def test_choices_and_prompts_are_counted_through() -> None:
    async with open_door() as (_, client):
        _, body, _ = await client.ask("/v1/completions", TEXT | {"prompt": ["hi", "ho"], "n": 2})
        texts = {choice["index"]: choice["text"] for choice in body["choices"]}
        ho = byte_model().encode_text("ho")
        assert texts == {0: letters(HI), 1: letters(HI, 2), 2: letters(ho), 3: letters(ho, 2)}
        assert body["usage"]["prompt_tokens"] == len(HI) + len(ho)
        assert body["usage"]["completion_tokens"] == 20
        chunks = await client.stream("/v1/chat/completions", CHAT | {"n": 2})
        finished = [chunk["choices"][0]["index"] for chunk in chunks if chunk["choices"][0]["finish_reason"]]
        assert sorted(finished) == [0, 1]


async def test_stop_strings_and_logprobs() -> None:
    async with open_door() as (house, client):
        house.prefill[0].answer = house.decode[0].answer = list(b"abcd")
        _, body, _ = await client.ask("/v1/completions", TEXT | {"stop": "c", "logprobs": 2})
        choice = body["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == ("ab", "stop")
        assert choice["logprobs"]["tokens"] == ["a", "b", "c"]
        assert choice["logprobs"]["text_offset"] == [0, 1, 2]
        assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
        asked = CHAT | {"stop": ["c", "x"], "logprobs": True, "top_logprobs": 1}
        chunks = await client.stream("/v1/chat/completions", asked)
        told = [
            t for chunk in chunks for t in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ]
        top = {"token": "a", "logprob": -0.5, "bytes": [97]}
        assert told[0] == top | {"top_logprobs": [top]}
        assert [entry["token"] for entry in told] == ["a", "b", "c"]


async def test_fields_reach_the_workers() -> None:
    async with open_door() as (house, client):
        body = CHAT | {
            "messages": [
                {
                    "role": "developer",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                {"role": "user", "content": "hi", "name": "me"},
            ],
            "max_tokens": 9,
            "max_completion_tokens": 4,
            "temperature": 0.5,
            "top_p": 0.25,
            "presence_penalty": 1,
            "frequency_penalty": -1,
            "top_k": -1,
            "min_p": 0.125,
            "repetition_penalty": 1.5,
            "min_tokens": 2,
            "stop_token_ids": [7],
            "ignore_eos": True,
            "seed": -1,
            "user": "me",
            "tools": [],
            "response_format": {"type": "text"},
            "logit_bias": None,
        }
        assert (await client.ask("/v1/chat/completions", body))[0] == 200
        request = house.decode[0].requests[0]
        sampling = request.sampling
        assert list(request.token_ids) == byte_model().encode_chat([("system", "ab"), ("user", "hi")])
        assert (sampling.temperature, sampling.top_p, sampling.min_p) == (0.5, 0.25, 0.125)
        assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (
            1,
            -1,
            1.5,
        )
        assert (sampling.top_k, sampling.max_tokens, sampling.min_tokens) == (0, 4, 2)
        assert (list(sampling.stop_ids), sampling.ignore_eos, sampling.seed) == ([7], True, 2**64 - 1)


REFUSED: list[tuple[str, Any, int, str, str]] = [
    ("/v1/completions", b"{", 400, "invalid_argument", "JSON"),
    ("/v1/completions", b'{"prompt": "\xff"}', 400, "invalid_argument", ""),
    ("/v1/completions", {}, 400, "invalid_argument", "prompt"),
    ("/v1/completions", [], 400, "invalid_argument", ""),
    ("/v1/completions", TEXT | {"prompt": ""}, 400, "invalid_argument", "the prompt is empty"),
    ("/v1/completions", TEXT | {"prompt": [-1]}, 400, "invalid_argument", "prompt"),
    ("/v1/completions", TEXT | {"magic": 1}, 400, "invalid_argument", "magic"),
    ("/v1/completions", TEXT | {"max_tokens": "5"}, 400, "invalid_argument", "max_tokens"),
    ("/v1/completions", TEXT | {"max_tokens": 0}, 400, "invalid_argument", "max_tokens"),
    ("/v1/completions", TEXT | {"temperature": -1}, 400, "invalid_argument", "temperature"),
    ("/v1/completions", b'{"prompt": "hi", "temperature": NaN}', 400, "invalid_argument", "temperature"),
    ("/v1/completions", TEXT | {"echo": True}, 400, "invalid_argument", "echo"),
    ("/v1/completions", TEXT | {"model": "gpt"}, 404, "model_not_found", "'gpt'"),
    ("/v1/completions", TEXT | {"prompt": "x" * 5000}, 413, "prompt_too_long", "5001 tokens"),
    ("/v1/completions", TEXT | {"prompt": "x" * 10_000_000}, 413, "prompt_too_long", "10000000 bytes"),
    ("/v1/completions", TEXT | {"prompt": "x" * 40_000_000}, 413, "prompt_too_long", "bytes"),
    ("/v1/chat/completions", CHAT | {"messages": []}, 400, "invalid_argument", "messages"),
    ("/v1/chat/completions", CHAT | {"tools": [{}]}, 400, "invalid_argument", "tools"),
    ("/v1/chat/completions", {"messages": [{"role": "x", "content": ""}]}, 400, "invalid_argument", "role"),
    ("/v1/chat/completions", CHAT | {"stream": True, "n": 99}, 400, "invalid_argument", "n: "),
    ("/v1/chat/completions", CHAT | {"stream": True, "max_tokens": 0}, 400, "invalid_argument", "max_tokens"),
    ("/v1/nothing", CHAT, 404, "invalid_argument", "/v1/nothing"),
    ("/v1/completions", None, 405, "invalid_argument", "GET /v1/completions"),
    ("/v1/models/gpt", None, 404, "model_not_found", "'gpt'"),
]


async def test_bad_requests_are_refused_in_openai_s_shape() -> None:
    async with open_door() as (house, client):
        for path, body, status, code, words in REFUSED:
            answered, answer, _ = await client.ask(path, body)
            case = (path, str(body)[:80], str(answer)[:200])
            assert answered == status, case
            assert answer["error"]["code"] == code, case
            assert answer["error"]["type"] == "invalid_request_error", case
            assert words in answer["error"]["message"], case
        assert not any(worker.requests for worker in house.workers)


async def test_a_full_queue_is_429_with_a_hint() -> None:
    async with open_door(slots=1) as (house, client):
        house.decode[0].pause = 0.05
        waiting = [asyncio.create_task(client.ask("/v1/completions", TEXT)) for _ in range(2)]
        await until(lambda: house.gateway.queued == 1)
        status, body, headers = await client.ask("/v1/completions", TEXT)
        assert (status, body["error"]["code"], body["error"]["type"]) == (
            429,
            "queue_full",
            "rate_limit_error",
        )
        assert int(headers["retry-after"]) >= 1
        for status, _, _ in await asyncio.gather(*waiting):
            assert status == 200


async def test_an_error_before_the_first_event_has_its_status_in_a_stream_too() -> None:
    async with open_door(decode=0) as (_, client):
        status, body, _ = await client.ask("/v1/chat/completions", CHAT | {"stream": True})
        assert (status, body["error"]["code"]) == (503, "no_worker")


async def test_an_error_behind_the_first_event_ends_the_stream() -> None:
    async with open_door() as (house, client):
        house.decode[0].script.append(Fault(1, Internal("NaN")))
        *_, last = await client.stream("/v1/chat/completions", CHAT)
        assert last["error"] == {"message": "NaN", "type": "server_error", "param": None, "code": "internal"}


async def test_an_error_of_one_choice_ends_the_call() -> None:
    async with open_door() as (house, client):
        house.decode[0].script.append(Fault(1, Internal("NaN")))
        status, body, _ = await client.ask("/v1/completions", TEXT | {"n": 3})
        assert (status, body["error"]["message"]) == (500, "NaN")
        await house.idle()


async def test_faults_do_not_show() -> None:
    async with open_door() as (house, client):
        house.decode[0].script.append(Fault(2, LeaseLost("scripted")))
        chunks = await client.stream("/v1/completions", TEXT)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT_ANSWER


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_workers(stream: bool) -> None:
    async with open_door() as (house, client):
        house.decode[0].script.append(Fault(1, HANG))
        _, writer = await client.post("/v1/chat/completions", CHAT | {"stream": stream})
        await until(lambda: not house.decode[0].script)
        writer.close()
        await house.idle()


async def test_models_health_and_metrics() -> None:
    async with open_door() as (house, client):
        _, models, _ = await client.ask("/v1/models")
        assert [model["id"] for model in models["data"]] == ["bytes"]
        assert (await client.ask("/v1/models/bytes"))[1] == models["data"][0]
        assert (await client.ask("/health"))[0] == 200
        await client.ask("/v1/completions", TEXT)
        _, metrics, _ = await client.ask("/metrics")
        assert b"kvrelay_gateway_completion_tokens_total 5.0" in metrics
        house.directory.drain("decode-0")
        assert (await client.ask("/health"))[0] == 503


async def test_a_taken_http_port_says_so() -> None:
    async with open_door() as (_, client):
        second = Gateway(GatewayConfig(http_port=client.port), byte_model(), WorkerDirectory())
        with pytest.raises(BadSetup, match=f"cannot listen on 127.0.0.1:{client.port}"):
            await second.start()


async def test_stopping_ends_running_streams_with_an_error() -> None:
    async with open_door() as (house, client):
        house.decode[0].script.append(Fault(1, HANG))
        reader, writer = await client.post("/v1/chat/completions", CHAT | {"stream": True})
        await reader.readuntil(b"assistant")
        await house.gateway.stop(0)
        rest = await reader.read()
        assert b'"code":"draining"' in rest
        assert b"data: [DONE]" in rest
        writer.close()
