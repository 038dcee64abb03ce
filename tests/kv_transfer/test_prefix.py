"""Prefix keys are equal exactly where the prefixes are."""

from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.prefix import prefix_keys

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=200)


@given(TOKENS)
def test_one_key_a_block(tokens: list[int]) -> None:
    keys = prefix_keys(tokens, 1, 2)
    assert len(keys) == -(-len(tokens) // 64)
    assert all(len(key) == 16 for key in keys)
    assert len(set(keys)) == len(keys)


@given(TOKENS, TOKENS)
def test_a_longer_prompt_keeps_the_keys_of_its_full_blocks(tokens: list[int], more: list[int]) -> None:
    full = len(tokens) // 64
    assert prefix_keys(tokens + more, 1, 2)[:full] == prefix_keys(tokens, 1, 2)[:full]


@given(st.lists(st.integers(0, 50_000), min_size=1, max_size=200), st.data())
def test_a_changed_token_changes_its_block_and_all_behind_it(tokens: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:place], tokens[place] + 1, *tokens[place + 1 :]]
    before, after = prefix_keys(tokens, 1, 2), prefix_keys(changed, 1, 2)
    for index, (old, new) in enumerate(zip(before, after, strict=True)):
        assert (old == new) == (index < place // 64)


@given(st.integers(1, 63))
def test_a_partly_filled_block_is_not_the_full_one(count: int) -> None:
    # Zeros, so that nothing but the count tells them apart.
    assert len({prefix_keys([0] * tokens, 1, 2)[0] for tokens in (count, count + 1, 64)}) in (2, 3)
    assert prefix_keys([0] * count, 1, 2) != prefix_keys([0] * 64, 1, 2)


def test_model_and_layout_are_part_of_the_key() -> None:
    keys = {prefix_keys([1, 2, 3], *seeds)[0] for seeds in [(1, 2), (2, 1), (1, 1), (2, 2)]}
    assert len(keys) == 4


@given(st.lists(st.integers(0, 50_000), min_size=1, max_size=200), st.data())
def test_blocks_with_tokens_that_were_answered_have_keys_of_their_own(
    tokens: list[int], data: st.DataObject
) -> None:
    prompt = data.draw(st.integers(0, len(tokens)))
    read, partly_written = prefix_keys(tokens, 1, 2), prefix_keys(tokens, 1, 2, prompt)
    for index, (one, other) in enumerate(zip(read, partly_written, strict=True)):
        assert (one == other) == (min(64 * (index + 1), len(tokens)) <= prompt)


def test_the_keys_stay_what_they_are() -> None:
    # They are shared between workers, maybe of two versions.
    keys = [key.hex() for key in prefix_keys(range(65), 1, 2)]
    assert keys == ["dc715f0f4ed50cb05b22d89b5b2a2fee", "48145a79f3e53ab310d8efac199b8a93"]
