"""A client of a running system: what it asks over gRPC, and what it sees of the answers by its own clock."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import grpc.aio

from kvrelay.rpc import CHANNEL_OPTIONS
from kvrelay.v1.inference_pb2 import Finish, GenerateRequest, TokenIds
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub
from kvrelay.v1.sampling_pb2 import SamplingParams

SETTLE_SECONDS = 0.2
"""Between two requests, so that the first one's end is not measured with the second."""


@dataclass
class Seen:
    """One answer: when it was asked for, when each token came, and what the system says of it."""

    asked: float
    cached: int = 0
    arrivals: list[float] = field(default_factory=list)
    finish: Finish = field(default_factory=Finish)

    @property
    def first_token_seconds(self) -> float:
        """From the request to the first token."""
        return self.arrivals[0] - self.asked


class ServingClient:
    """Greedy answers of fixed length to prompts of tokens, over one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: Any = InferenceServiceStub(channel)

    async def ask(self, prompt: Sequence[int], tokens: int) -> Seen:
        """Have `tokens` tokens answered, and watch them come."""
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        seen = Seen(perf_counter())
        request = GenerateRequest(token_ids=TokenIds(ids=prompt), sampling=sampling)
        async for event in self._stub.Generate(request):
            now = perf_counter()
            match event.WhichOneof("event"):
                case "prompt":
                    seen.cached = event.prompt.cached_tokens
                case "delta":
                    seen.arrivals.extend([now] * len(event.delta.tokens))
                case "finish":
                    seen.finish = event.finish
        if len(seen.arrivals) != tokens:
            raise RuntimeError(f"{len(seen.arrivals)} tokens came, {tokens} were asked for")
        return seen

    async def one(self, prompt: Sequence[int], decoded: int) -> dict[str, float]:
        """Read a prompt and decode `decoded` tokens behind the first one; nothing else runs meanwhile."""
        seen = await self.ask(prompt, decoded + 1)
        if seen.cached:
            raise RuntimeError(f"{seen.cached} tokens of a prompt were cached: not all of it was read")
        timing, first = seen.finish.timing, seen.first_token_seconds
        return {
            "prompt_tokens_per_second": len(prompt) / first,
            "first_token_seconds": first,
            "gateway_first_token_seconds": timing.time_to_first_token_seconds,
            "prefill_seconds": timing.prefill_seconds,
            "handover_seconds": timing.handover_seconds,
            "second_token_gap_seconds": seen.arrivals[1] - seen.arrivals[0] if decoded else 0.0,
            # From the first token, which prefill draws: the rest of the hand-over counts as decoding.
            "decode_tokens_per_second": decoded / (seen.arrivals[-1] - seen.arrivals[0]) if decoded else 0.0,
        }

    async def side_by_side(self, prompts: Sequence[Sequence[int]], decoded: int) -> dict[str, float]:
        """Decode `decoded` tokens behind each prompt, all of them in one batch.

        The prompts are read before, so that they lie in the prefill worker's cache, and the streams join
        close to each other: of a prompt one token longer than whole blocks only that token is read again.
        What counts is the time from when all have joined until the first one ends.
        """
        for prompt in prompts:
            await self.ask(prompt, 1)
        await asyncio.sleep(SETTLE_SECONDS)
        seen = await asyncio.gather(*(self.ask(prompt, 2 * decoded + 2) for prompt in prompts))
        begin = max(one.arrivals[1] for one in seen)
        end = min(one.arrivals[-1] for one in seen)
        came = sum(begin < arrival <= end for one in seen for arrival in one.arrivals)
        if came < decoded * len(prompts) // 2:
            raise RuntimeError(f"the streams decoded only {came} tokens side by side")
        return {
            "decode_tokens_per_second": came / (end - begin),
            "tokens": came,
            "seconds": end - begin,
            "joined_within_seconds": begin - min(one.arrivals[1] for one in seen),
        }


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel as kvrelay's own clients open it."""
    return grpc.aio.insecure_channel(address, (*CHANNEL_OPTIONS, ("grpc.enable_http_proxy", 0)))
