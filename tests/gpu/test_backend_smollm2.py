"""SmolLM2 on the GPU: the greedy answers of transformers in float32, and chunks that change no bit."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvrelay_kernels.cuda.backend import CudaBackend
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.plans import PlanStore
from model_runtime.catalog import default_cache_dir
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from tests.model_runtime.conftest import greedy

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "fixtures" / "smollm2_greedy.json").read_text()
)["cases"]
MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
TIE = {"float16": 1e-3, "bfloat16": 0.2}
"""Two best logits closer than this (in float32) may change places; bfloat16 has but eight bits."""


@pytest.fixture(scope="module", params=["float16", "bfloat16"])
def decoder(cupy: Any, request: pytest.FixtureRequest) -> tuple[Decoder, Element16]:
    """The model in each element type."""
    path = default_cache_dir() / "smollm2" / MODEL
    if not path.exists():
        pytest.skip("SmolLM2 is not in the cache")
    backend: Any = CudaBackend(element=request.param, plans=PlanStore())
    return Decoder(load_model(path), backend, "float", context=2048), request.param


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_greedy_answers(decoder: tuple[Decoder, Element16], case: dict[str, Any]) -> None:
    found = greedy(decoder[0], case["prompt_token_ids"], len(case["token_ids"]))
    for position, (ours, theirs, gap) in enumerate(zip(found, case["token_ids"], case["gaps"], strict=True)):
        if ours != theirs:
            print(f"{decoder[1]} {case['name']}: parted at token {position}, gap {gap:.4f}")
            assert gap < TIE[decoder[1]], f"token {position} is {ours}, not {theirs}"
            break
