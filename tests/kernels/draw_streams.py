"""Sequences whose tokens are drawn, and logits to draw them from."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvrelay_kernels.interface import FROM_DEVICE, StepBatch
from model_runtime.sampler import Sampled, SamplingConfig
from model_runtime.token_steps import Flight, TokenSteps


@dataclass
class Stream:
    """One sequence as both sides see it."""

    config: SamplingConfig
    prompt: list[int]
    answer: list[int]


def random_stream(rng: np.random.Generator, vocabulary: int) -> Stream:
    """Any settings, most of them at once."""

    def one_of(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    config = SamplingConfig(
        temperature=one_of(0.0, 0.05, 0.3, 0.7, 1.0, 1.0, 1.3, 2.5, 50.0),
        top_k=one_of(0, 0, 0, 1, 2, 5, 40, 300, 10**9),
        top_p=one_of(1.0, 1.0, 0.05, 0.5, 0.9, 0.95, 0.999),
        min_p=one_of(0.0, 0.0, 0.0, 0.02, 0.3, 1.0),
        repetition_penalty=one_of(1.0, 1.0, 0.7, 1.3),
        presence_penalty=one_of(0.0, 0.0, -1.0, 1.5),
        frequency_penalty=one_of(0.0, 0.0, -0.5, 0.7),
        seed=int(rng.integers(0, 2**64, dtype=np.uint64)),
        stop_ids=one_of((), (3, 4)),
        eos_ids=(0,),
        min_tokens=one_of(0, 0, 2, 9),
    )
    prompt = rng.integers(0, vocabulary, rng.integers(1, 40)).tolist()
    return Stream(config, prompt, rng.integers(0, vocabulary, rng.integers(1, 6)).tolist())


def random_logits(rng: np.random.Generator, rows: int, vocabulary: int) -> NDArray[np.float32]:
    """Rows of several kinds: as models make them, in whole steps, of two values alone, without peaks."""
    logits = (rng.standard_normal((rows, vocabulary)) * rng.choice([0.5, 2, 4], (rows, 1))).astype(np.float32)
    for row in logits:
        kind = rng.integers(6)
        if kind < 3:
            row[rng.integers(0, vocabulary, 20)] += rng.uniform(4, 14, 20).astype(np.float32)
        elif kind == 3:
            row[:] = np.round(row)
        elif kind == 4:
            row[:] = rng.choice([0.0, -0.0, 1.0], vocabulary)
    return logits


@dataclass(eq=False)
class Answer:
    """A sequence, and how many of its tokens are on their way."""

    sampling: SamplingConfig
    prompt_ids: list[int]
    answer_ids: list[int]
    place: int
    ahead: int = 0


SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 5, "top_p": 0.9},
    {"temperature": 1.2, "seed": 6, "top_k": 20, "repetition_penalty": 1.3, "frequency_penalty": 0.6},
    {
        "temperature": 0.0,
        "presence_penalty": 1.5,
        "stop_ids": tuple(range(0, 160, 2)),
        "min_tokens": 6,
    },
    {"temperature": 1.0, "seed": 7, "min_p": 0.05, "min_tokens": 4, "eos_ids": (2,)},
]


def answers(settings: list[dict[str, Any]]) -> list[Answer]:
    """Sequences whose first token is drawn, but whose prompt's keys are zeros."""
    return [
        Answer(SamplingConfig(**given), list(range(3, 10 + 9 * place)), [40 + place], place)
        for place, given in enumerate(settings)
    ]


def step(steps: TokenSteps, streams: list[Answer], blocks: int) -> Flight:
    """Launch the next step of some sequences, each with so many blocks."""
    rows = len(streams)
    lengths = np.array([len(s.prompt_ids) + len(s.answer_ids) + s.ahead for s in streams], np.int32)
    ids = np.array([FROM_DEVICE if s.ahead else s.answer_ids[-1] for s in streams], np.int32)
    tables = np.array([np.arange(blocks) + blocks * s.place for s in streams], np.int32)
    every = np.arange(rows + 1, dtype=np.int32)
    flight = steps.launch(StepBatch(ids, lengths - 1, every, lengths, tables, every[:-1]), streams)
    for stream in streams:
        stream.ahead += 1
    return flight


def read(flight: Flight, streams: list[Answer]) -> None:
    """Wait, and note the tokens."""
    for stream, drawn in zip(streams, flight.wait(), strict=True):
        stream.ahead -= 1
        assert isinstance(drawn, Sampled)
        stream.answer_ids.append(drawn.token_id)
