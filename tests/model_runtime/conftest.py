"""Models and decoders that the room's tests share."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.interface import Arena
from kvrelay_kernels.registry import load_backend
from model_runtime.catalog import default_cache_dir, pull
from model_runtime.checkpoint import Checkpoint, ResolvedModel, load_model
from model_runtime.decoder import Decoder
from model_runtime.steps import sequence_steps

CHUNK = 256


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """SmolLM2-135M-Instruct, fetched where it is not there yet."""
    return load_model(ResolvedModel("smollm2", pull("smollm2")), default_cache_dir())


def reference_decoder(path: Path) -> Decoder:
    """The model on the reference backend with float weights."""
    return Decoder(load_model(path), load_backend("reference", threads=1), "float")


def run_chunks(
    decoder: Decoder, arena: Arena, ids: Sequence[int], chunks: Sequence[int]
) -> NDArray[np.float32]:
    """Logits of the last token of each chunk of one sequence, `[chunks, vocabulary]`."""
    rows: list[NDArray[np.float32]] = []
    past = 0
    for count in chunks:
        batch, _ = sequence_steps([count], [past], ids[past : past + count])
        rows.append(decoder.forward(batch, arena))
        past += count
    return np.concatenate(rows)


def greedy(decoder: Decoder, prompt: list[int], count: int) -> list[int]:
    """The likeliest `count` tokens behind a prompt."""
    arena = decoder.new_arena((len(prompt) + count) // 64 + 1, "none")
    chunks = [min(CHUNK, len(prompt) - start) for start in range(0, len(prompt), CHUNK)]
    answer = [int(run_chunks(decoder, arena, prompt, chunks)[-1].argmax())]
    while len(answer) < count:
        batch, _ = sequence_steps([1], [len(prompt) + len(answer) - 1], answer[-1:])
        answer.append(int(decoder.forward(batch, arena)[0].argmax()))
    return answer
