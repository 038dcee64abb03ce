"""Each kind of bad request gets the leaf of the error tree that says what to change."""

from collections.abc import Callable

import grpc.aio
import pytest

from kvrelay.errors import InvalidArgument, KvrelayError, ModelNotFound, PromptTooLong
from kvrelay.rpc import error_of_call
from kvrelay.v1 import inference_pb2 as pb
from kvrelay.v1.sampling_pb2 import SamplingParams
from tests.gateway_service.byte_model import CONTEXT, VOCABULARY
from tests.gateway_service.house import open_house


def sampled(**fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hi", sampling=SamplingParams(**fields))  # type: ignore[arg-type]


def ids(*token_ids: int) -> pb.GenerateRequest:
    return pb.GenerateRequest(token_ids=pb.TokenIds(ids=token_ids))


def chat(*messages: tuple[str, str]) -> pb.GenerateRequest:
    return pb.GenerateRequest(chat=pb.Chat(messages=[pb.ChatMessage(role=r, content=c) for r, c in messages]))


CASES: list[tuple[str, pb.GenerateRequest, type[KvrelayError], str]] = [
    ("no prompt", pb.GenerateRequest(), InvalidArgument, "a prompt is missing"),
    ("empty text", pb.GenerateRequest(text=""), InvalidArgument, "the prompt is empty"),
    ("no ids", ids(), InvalidArgument, "the prompt is empty"),
    ("no messages", chat(), InvalidArgument, "no messages"),
    ("unknown role", chat(("wizard", "hi")), InvalidArgument, "unknown role 'wizard'"),
    ("unknown model", pb.GenerateRequest(text="hi", model="gpt"), ModelNotFound, "'gpt' is not served"),
    ("wrong id", ids(1, VOCABULARY), InvalidArgument, f"token id {VOCABULARY} is outside"),
    ("long text", pb.GenerateRequest(text="x" * CONTEXT), PromptTooLong, f"{CONTEXT + 1} tokens"),
    ("long ids", ids(*[1] * CONTEXT), PromptTooLong, f"{CONTEXT} tokens"),
    ("10 MB", pb.GenerateRequest(text="x" * 10_000_000), PromptTooLong, "10000000 bytes; at most 4194304"),
    ("10 MB chat", chat(("user", "é" * 5_000_000)), PromptTooLong, "10000000 bytes"),
    ("max_tokens 0", sampled(max_tokens=0), InvalidArgument, "max_tokens must be at least 1"),
    (
        "max_tokens beyond",
        sampled(max_tokens=CONTEXT),
        InvalidArgument,
        f"leaves {CONTEXT - 3} behind a prompt of 3",
    ),
    ("min beyond", sampled(min_tokens=CONTEXT), InvalidArgument, "min_tokens"),
    (
        "min above max",
        sampled(min_tokens=3, max_tokens=2),
        InvalidArgument,
        "min_tokens 3 is above max_tokens 2",
    ),
    (
        "negative temperature",
        sampled(temperature=-0.5),
        InvalidArgument,
        "temperature must be at least 0, not -0.5",
    ),
    ("NaN", sampled(temperature=float("nan")), InvalidArgument, "temperature must be at least 0, not nan"),
    ("infinite", sampled(temperature=float("inf")), InvalidArgument, "temperature"),
    ("top_p 0", sampled(top_p=0), InvalidArgument, "top_p must be above 0 and at most 1"),
    ("top_p 2", sampled(top_p=2), InvalidArgument, "top_p"),
    ("min_p", sampled(min_p=-0.1), InvalidArgument, "min_p"),
    ("repetition", sampled(repetition_penalty=0), InvalidArgument, "repetition_penalty must be above 0"),
    ("presence", sampled(presence_penalty=3), InvalidArgument, "presence_penalty must be between -2 and 2"),
    ("frequency", sampled(frequency_penalty=-3), InvalidArgument, "frequency_penalty"),
    ("logprobs", sampled(logprobs=21), InvalidArgument, "logprobs must be at most 20, not 21"),
    ("stop id", sampled(stop_ids=[VOCABULARY]), InvalidArgument, "stop id"),
    ("stop ids", sampled(stop_ids=[1] * 300), InvalidArgument, "at most 256 stop_ids"),
    ("empty stop", sampled(stop=["a", ""]), InvalidArgument, "a stop string has 1 to 256 characters, not 0"),
    ("stops", sampled(stop=["a"] * 65), InvalidArgument, "at most 64 stop strings"),
    ("request id", pb.GenerateRequest(request_id="a\nb", text="hi"), InvalidArgument, "request_id"),
    ("long request id", pb.GenerateRequest(request_id="a" * 200, text="hi"), InvalidArgument, "request_id"),
]


async def test_bad_requests_are_refused_with_their_reason() -> None:
    async with open_house() as house:
        for name, request, leaf, words in CASES:
            error = await house.error_of(request)
            assert type(error) is leaf, name
            assert words in str(error), name
        assert not any(worker.requests for worker in house.workers)


def field(number: int, payload: bytes) -> bytes:
    """A length-delimited field as it lies on the wire."""
    return bytes([number << 3 | 2, len(payload)]) + payload


HI = field(3, b"hi")

WIRE_CASES: list[tuple[str, str, bytes, str]] = [
    ("unknown field", "Generate", HI + field(15, b"x"), "GenerateRequest has no field 15"),
    ("unknown sampling field", "Generate", HI + field(6, field(15, b"x")), "SamplingParams has no field 15"),
    ("unknown message field", "Generate", field(5, field(1, field(9, b"x"))), "ChatMessage has no field 9"),
    ("wrong wire type", "Generate", HI + b"\x32\x02\x0a\x00", "SamplingParams has no field 1"),
    ("not UTF-8", "Generate", field(3, b"\xff\xfe"), "not a GenerateRequest"),
    ("no message at all", "Generate", b"\xff\xff\xff", "not a GenerateRequest"),
    ("tokenize not UTF-8", "Tokenize", field(1, b"\xff"), "not a TokenizeRequest"),
    ("tokenize nothing", "Tokenize", b"", "a prompt is missing"),
    ("tokenize unknown", "Tokenize", field(1, b"hi") + field(9, b"x"), "TokenizeRequest has no field 9"),
    ("model unknown", "GetModel", field(9, b"x"), "GetModelRequest has no field 9"),
]


async def test_bytes_that_are_no_request_are_refused() -> None:
    def same(data: bytes) -> bytes:
        return data

    async with open_house() as house:
        for name, method, payload, words in WIRE_CASES:
            path = f"/kvrelay.v1.InferenceService/{method}"
            if method == "Generate":
                answer = anext(aiter(house.channel.unary_stream(path, same, same)(payload)))
            else:
                answer = house.channel.unary_unary(path, same, same)(payload)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await answer
            error = error_of_call(caught.value)
            assert type(error) is InvalidArgument, (name, error)
            assert words in str(error), (name, error)


GOOD: list[Callable[[], pb.GenerateRequest]] = [
    lambda: sampled(temperature=0, top_k=1, top_p=1, min_p=0, max_tokens=1),
    lambda: sampled(
        temperature=100, repetition_penalty=0.5, presence_penalty=-2, frequency_penalty=2, max_tokens=1
    ),
    lambda: sampled(max_tokens=CONTEXT - 3, stop=["a" * 256], stop_ids=[VOCABULARY - 1]),
    lambda: ids(*[1] * (CONTEXT - 1)),
    lambda: chat(("system", ""), ("user", "hi"), ("assistant", "x"), ("tool", "y")),
    lambda: pb.GenerateRequest(text="hi", model="bytes", request_id="mine"),
]


async def test_requests_at_the_bounds_are_taken() -> None:
    async with open_house() as house:
        house.prefill[0].answer = []
        for request in GOOD:
            (await house.ask(request())).finish  # noqa: B018


async def test_a_request_id_runs_once_at_a_time() -> None:
    async with open_house() as house:
        house.decode[0].pause = 0.05
        first = house.call(pb.GenerateRequest(text="hi", request_id="mine"))
        await anext(aiter(first))
        error = await house.error_of(pb.GenerateRequest(text="hi", request_id="mine"))
        assert "running already" in str(error)
        first.cancel()
