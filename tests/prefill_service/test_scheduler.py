"""How a step's rows are shared."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from prefill_service.scheduler import schedule


@dataclass(eq=False)
class Prompt:
    """Tokens that are left."""

    remaining: int


@given(st.lists(st.integers(1, 3000), max_size=9), st.integers(1, 600))
def test_every_row_is_used_and_the_oldest_gets_its_half(remaining: list[int], budget: int) -> None:
    prompts = [Prompt(tokens) for tokens in remaining]
    chunks = schedule(prompts, budget)
    assert sum(chunk.tokens for chunk in chunks) == min(budget, sum(remaining))
    assert all(0 < chunk.tokens <= chunk.prompt.remaining for chunk in chunks)
    assert len({id(chunk.prompt) for chunk in chunks}) == len(chunks)
    if prompts:
        assert chunks[0].prompt is prompts[0]
        assert chunks[0].tokens >= min(remaining[0], max(1, budget // 2))


@given(st.integers(1000, 9000), st.integers(1, 100), st.integers(200, 600))
def test_a_short_prompt_behind_a_long_one_is_read_in_one_step(long: int, short: int, budget: int) -> None:
    prompts = [Prompt(long), Prompt(short)]
    assert [chunk.tokens for chunk in schedule(prompts, budget)] == [budget - short, short]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=8), st.integers(1, 300))
def test_every_prompt_ends(remaining: list[int], budget: int) -> None:
    prompts = [Prompt(tokens) for tokens in remaining]
    steps = 0
    while prompts:
        for chunk in schedule(prompts, budget):
            chunk.prompt.remaining -= chunk.tokens
        prompts = [prompt for prompt in prompts if prompt.remaining]
        steps += 1
    assert steps == -(-sum(remaining) // budget)
