"""A real model, end to end in one process: greedy answers token for token as transformers gives them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.registry import load_backend
from model_runtime.decoder import Decoder
from model_runtime.steps import sequence_steps
from model_runtime.weights import Checkpoint
from tests.model_runtime.conftest import greedy

FIXTURES = Path(__file__).parent.parent / "fixtures"
CASES: list[dict[str, Any]] = json.loads((FIXTURES / "smollm2_greedy.json").read_text())["cases"]
LOGITS: dict[str, Any] = json.loads((FIXTURES / "smollm2_logits.json").read_text())["cases"][0]
TIE = 1e-3
"""Two best logits closer than this may change places between two float32 programs."""


@pytest.fixture(scope="module")
def decoder(smollm2: Checkpoint) -> Decoder:
    """SmolLM2 on the embedded default, as float32."""
    return Decoder(smollm2, load_backend("cpu", threads=2), "float", context=2048)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_greedy_answers_are_those_of_transformers(decoder: Decoder, case: dict[str, Any]) -> None:
    found = greedy(decoder, case["prompt_token_ids"], len(case["token_ids"]))
    for position, (ours, theirs, gap) in enumerate(zip(found, case["token_ids"], case["gaps"], strict=True)):
        if ours != theirs:
            assert gap < TIE, f"token {position} is {ours}, not {theirs}"
            break


def test_logits_are_those_of_transformers(decoder: Decoder) -> None:
    ids = LOGITS["prompt_token_ids"]
    batch, blocks = sequence_steps([len(ids)], [0], ids)
    logits = decoder.forward(batch, decoder.new_arena(blocks, "none"))[0]
    best = np.argsort(-logits, kind="stable")[: len(LOGITS["top_token_ids"])]
    np.testing.assert_allclose(logits[LOGITS["top_token_ids"]], LOGITS["top_logits"], atol=2e-3)
    assert best[:5].tolist() == LOGITS["top_token_ids"][:5]
    logsumexp = float(np.log(np.exp(logits.astype(np.float64)).sum()))
    assert logsumexp == pytest.approx(LOGITS["logsumexp"], abs=2e-3)
