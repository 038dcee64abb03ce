"""`kvrelay bench`: a simple load on a system, and what its clients saw of it."""

import asyncio
import json
import random
from dataclasses import dataclass, field
from time import perf_counter
from typing import Annotated, Any

import grpc.aio
import typer

from control_plane.commands.flags import Target, with_target
from control_plane.commands.session import client_of
from kvrelay.errors import InvalidArgument, KvrelayError
from kvrelay.rpc import CHANNEL_OPTIONS, error_of_call
from kvrelay.v1.inference_pb2 import GenerateRequest, TokenIds
from kvrelay.v1.inference_pb2_grpc import InferenceServiceStub
from kvrelay.v1.sampling_pb2 import SamplingParams

PERCENTILES = (50, 90, 99)


@dataclass
class Seen:
    """What one client saw of one request; times in seconds of its own clock."""

    first: float = 0.0
    total: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between two deltas, an interval per token of the later one."""
    tokens: int = 0
    cached: int = 0
    bytes_moved: int = 0
    error: str | None = None


@with_target
def bench(
    *,
    target: Target,
    requests: Annotated[int, typer.Option(min=1, help="Requests in all.")] = 16,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt, of random tokens.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=1, help="Length of each answer.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 0,
) -> None:
    """Measure time to first token, time between tokens and throughput; prints one JSON object."""
    with client_of(target) as client:
        model = client.model()
        if prompt_tokens + output_tokens > model.context:
            raise InvalidArgument(
                f"{prompt_tokens} + {output_tokens} tokens are beyond the context of {model.context}"
            )
        draw = random.Random(seed)
        prompts = [[draw.randrange(model.vocabulary) for _ in range(prompt_tokens)] for _ in range(requests)]
        began = perf_counter()
        seen = asyncio.run(_load(client.address, target.model, prompts, output_tokens, concurrency))
        seconds = perf_counter() - began
    setting = {
        "model": model.name,
        "kv_format": model.kv_format,
        "requests": requests,
        "concurrency": concurrency,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
    }
    print(json.dumps(setting | report(seen, seconds), indent=2))


def report(seen: list[Seen], seconds: float) -> dict[str, Any]:
    """The figures of a run that took `seconds`."""
    good = [one for one in seen if one.error is None]
    return {
        "seconds": seconds,
        "failed": len(seen) - len(good),
        "errors": sorted({one.error for one in seen if one.error}),
        "output_tokens_per_second": sum(one.tokens for one in good) / seconds,
        "requests_per_second": len(good) / seconds,
        "cached_tokens": sum(one.cached for one in good),
        "bytes_moved": sum(one.bytes_moved for one in good),
        "time_to_first_token_seconds": percentiles([one.first for one in good]),
        "inter_token_seconds": percentiles([gap for one in good for gap in one.gaps]),
        "request_seconds": percentiles([one.total for one in good]),
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """The mean, and the values that so many in a hundred do not exceed."""
    if not values:
        return {}
    ordered = sorted(values)
    ranks = {f"p{p}": ordered[max(0, -(-p * len(ordered) // 100) - 1)] for p in PERCENTILES}
    return {"mean": sum(ordered) / len(ordered), **ranks, "max": ordered[-1]}


async def _load(
    address: str, model: str, prompts: list[list[int]], output_tokens: int, concurrency: int
) -> list[Seen]:
    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    waiting = iter(prompts)
    seen: list[Seen] = []
    async with grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub: Any = InferenceServiceStub(channel)

        async def client() -> None:
            for prompt in waiting:
                request = GenerateRequest(model=model, token_ids=TokenIds(ids=prompt), sampling=sampling)
                seen.append(await _watch(stub.Generate(request)))

        await asyncio.gather(*(client() for _ in range(concurrency)))
    return seen


async def _watch(events: Any) -> Seen:
    seen = Seen()
    began = last = perf_counter()
    try:
        async for event in events:
            now = perf_counter()
            if event.HasField("prompt"):
                seen.cached = event.prompt.cached_tokens
            elif event.HasField("delta") and event.delta.tokens:
                news = len(event.delta.tokens)
                if seen.tokens == 0:
                    seen.first = now - began
                else:
                    seen.gaps.extend([(now - last) / news] * news)
                last = now
                seen.tokens += news
            elif event.HasField("finish"):
                seen.bytes_moved = event.finish.timing.bytes_moved
        seen.total = perf_counter() - began
    except grpc.aio.AioRpcError as error:
        leaf: KvrelayError = error_of_call(error)
        seen.error = f"{type(leaf).__name__}: {leaf}"
    return seen
