"""Gemma 3 270M: the real case for sliding windows, two ropes and post-norms, as transformers answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvrelay_kernels.registry import load_backend
from model_runtime.catalog import default_cache_dir, resolve
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from model_runtime.tokenizer import load_tokenizer
from tests.model_runtime.conftest import greedy

FIXTURE = Path(__file__).parent.parent / "fixtures" / "gemma3_greedy.json"
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in json.loads(FIXTURE.read_text())["cases"]}
TOKENS = 12


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    """Gemma on the embedded default, as float32."""
    checkpoint = load_model(resolve("gemma3-270m"), default_cache_dir())
    return Decoder(checkpoint, load_backend("cpu", threads=2), "float", context=1024)


@pytest.mark.parametrize("name", CASES)
def test_greedy_answers_are_those_of_transformers(decoder: Decoder, name: str) -> None:
    case = CASES[name]
    assert min(case["gaps"]) > 1e-3
    assert greedy(decoder, case["prompt_token_ids"], TOKENS) == case["token_ids"][:TOKENS]


def test_prompts_are_cut_as_llama_cpp_cuts_them() -> None:
    tokenizer = load_tokenizer(load_model(resolve("gemma3-270m"), default_cache_dir()), default_cache_dir())
    for case in CASES.values():
        assert tokenizer.encode(case["prompt"]) == case["prompt_token_ids"]
