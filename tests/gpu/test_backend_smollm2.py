"""SmolLM2 on the GPU: the greedy answers of transformers in float32, and what each cache format costs."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.kv_quality import chunk_batch, log_softmax
from kvrelay_kernels.cuda.backend import CudaBackend
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.plans import PlanStore
from kvrelay_kernels.quant import BLOCK_TOKENS
from kvrelay_kernels.quant.formats import KNOWN
from kvrelay_kernels.registry import load_backend
from model_runtime.catalog import default_cache_dir
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from tests.model_runtime.conftest import CHUNK, greedy

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "smollm2_greedy.json").read_text()
)["cases"]
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 2048
JUDGED = "story_300"
"""The case whose rows are judged: the prompt's, read in chunks, and the answer's, one a step."""
TIE = {"float16": 1e-3, "bfloat16": 0.2}
"""Two best logits closer than this (in float32) may change places; bfloat16 has but eight bits."""

NOISE = {"float16": 1e-3, "bfloat16": 3e-3}
"""Nats by which two ways of computing differ that lead to other codes."""


@pytest.fixture(scope="module")
def path() -> Path:
    """The model's file."""
    file = default_cache_dir() / "smollm2" / MODEL
    if not file.exists():
        pytest.skip("SmolLM2 is not in the cache")
    return file


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def decoder(cupy: Any, path: Path, request: pytest.FixtureRequest) -> tuple[Decoder, Element16]:
    """The model in each element type."""
    backend: Any = CudaBackend(element=request.param, plans=PlanStore())
    return Decoder(load_model(path), backend, "float", context=CONTEXT), request.param


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_greedy_answers(decoder: tuple[Decoder, Element16], case: dict[str, Any]) -> None:
    found = greedy(decoder[0], case["prompt_token_ids"], len(case["token_ids"]))
    for position, (ours, theirs, gap) in enumerate(zip(found, case["token_ids"], case["gaps"], strict=True)):
        if ours != theirs:
            print(f"{decoder[1]} {case['name']}: parted at token {position}, gap {gap:.4f}")
            assert gap < TIE[decoder[1]], f"token {position} is {ours}, not {theirs}"
            break


def log_probabilities(decoder: Decoder, kv_format: str) -> NDArray[np.float32]:
    """Of every row of the judged case, through a cache of that format."""
    case = next(case for case in CASES if case["name"] == JUDGED)
    tokens = np.array(case["prompt_token_ids"] + case["token_ids"], np.int32)
    prompt = len(case["prompt_token_ids"])
    arena = decoder.new_arena(-(-len(tokens) // BLOCK_TOKENS), kv_format)
    starts = [*range(0, prompt, CHUNK), *range(prompt, len(tokens) + 1)]
    return np.concatenate([
        log_softmax(np.array(decoder.forward(chunk_batch(tokens[start:end], start), arena), np.float32))
        for start, end in itertools.pairwise(starts)
    ])  # fmt: skip


def divergence(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Kullback-Leibler, the mean of all rows, in nats."""
    return float((np.exp(wanted) * (wanted - found)).sum(1, dtype=np.float64).mean())


@pytest.fixture(scope="module")
def costs(cupy: Any, path: Path) -> dict[str, float]:
    """What each format costs on the CPU: its divergence from the unquantized cache."""
    cpu = Decoder(
        load_model(path), load_backend("cpu", threads=os.cpu_count() or 1), "float", context=CONTEXT
    )
    found = {name: log_probabilities(cpu, name) for name in KNOWN}
    return {name: divergence(found["none"], one) for name, one in found.items()}


@pytest.fixture(scope="module")
def plain(decoder: tuple[Decoder, Element16]) -> NDArray[np.float32]:
    """What the GPU finds with an unquantized cache."""
    return log_probabilities(decoder[0], "none")


@pytest.mark.parametrize("kv_format", [name for name in KNOWN if name != "none"])
def test_a_format_costs_what_it_does_on_the_cpu(
    decoder: tuple[Decoder, Element16], plain: NDArray[np.float32], costs: dict[str, float], kv_format: str
) -> None:
    """Codes fall to other sides of roundings in 16 bit, but not more of them, and no further."""
    found = divergence(plain, log_probabilities(decoder[0], kv_format))
    print(f"{decoder[1]} {kv_format}: {found:.5f} nats, on the CPU {costs[kv_format]:.5f}")
    assert found < 1.5 * costs[kv_format] + NOISE[decoder[1]]
