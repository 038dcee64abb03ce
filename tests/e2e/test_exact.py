"""Greedy answers of the whole system equal those of an independent float32 implementation, token for token.

The fixture was made by `tests/fixtures/make_greedy.py` with transformers. A position whose two best logits
lie within `TIE` may fall either way; the answers are compared up to the first such fall.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.served import Served, serve

FIXTURE = Path(__file__).parents[1] / "fixtures" / "smollm2_greedy.json"
TIE = 1e-3
EXACT = ("--model", "smollm2", "--kv-format", "none", "--weights", "float")


def cases() -> list[dict[str, Any]]:
    return json.loads(FIXTURE.read_text())["cases"]


def differences(served: Served, case: dict[str, Any], prompt: Any) -> int:
    """Ties that fell the other way, 0 or 1; fails on any other difference."""
    expected = case["token_ids"]
    reply = served.ask(prompt, temperature=0, max_tokens=64)
    assert reply.prompt is not None
    assert reply.prompt.prompt_tokens == len(case["prompt_token_ids"])
    for position, (token, wanted) in enumerate(zip(reply.token_ids, expected, strict=False)):
        if token != wanted:
            assert case["gaps"][position] < TIE, f"{case['name']}: token {position} is {token}, not {wanted}"
            return 1
    assert reply.token_ids == expected, case["name"]
    # Where the last token ends inside a character, the stream leaves that character out.
    assert reply.text == case["text"].rstrip("\ufffd"), case["name"]
    return 0


@pytest.mark.parametrize(
    "flags",
    [
        ("--chunk", "512"),
        ("--chunk", "96", "--prefill", "2", "--decode", "2", "--transport", "redis"),
    ],
    ids=["one-by-one-over-grpc", "all-at-once-over-redis"],
)
def test_answers_equal_the_float32_reference(flags: tuple[str, ...]) -> None:
    with serve(*EXACT, *flags) as served:
        at_once = 1 if len(flags) == 2 else len(cases())
        with ThreadPoolExecutor(at_once) as crowd:
            chats = list(crowd.map(lambda case: differences(served, case, case["messages"]), cases()))
            # Now the prefixes are found, not computed.
            ids = list(crowd.map(lambda case: differences(served, case, case["prompt_token_ids"]), cases()))
        excused = sum(chats) + sum(ids)
        print(f"{excused} of {2 * len(cases())} answers differ from a tie on")
        assert excused <= 2
        served.assert_nothing_leaked(len(served.workers()) // 2, len(served.workers()) // 2)
