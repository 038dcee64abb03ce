"""The sampler against a slow, literal reading of its rules, and the properties that the pools rely on."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvrelay.errors import InvalidArgument
from model_runtime.sampler import SamplingConfig, sample, sample_rows, uniform

VOCABULARY = 200


def random_logits(seed: int, size: int = VOCABULARY, spread: float = 3.0) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).standard_normal(size) * spread).astype(np.float32)


def distribution(
    logits: NDArray[np.float32], config: SamplingConfig, prompt: list[int], answer: list[int]
) -> dict[int, float]:
    """What each token's probability should be, token by token, in the order of vLLM's sampler."""
    values = [float(value) for value in logits]
    for token in range(len(values)):
        if len(answer) < config.min_tokens and token in config.ending_ids:
            values[token] = -math.inf
        if token in prompt or token in answer:
            factor = config.repetition_penalty
            values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
        values[token] -= config.frequency_penalty * answer.count(token)
        values[token] -= config.presence_penalty * (token in answer)
    best = max(values)
    weights = [math.exp((value - best) / config.temperature) for value in values]
    kept = [token for token, weight in enumerate(weights) if weight >= config.min_p]
    kept.sort(key=lambda token: -weights[token])
    if config.top_k:
        last = weights[kept[min(config.top_k, len(kept)) - 1]]
        kept = [token for token in kept if weights[token] >= last]
    total = sum(weights[token] for token in kept)
    chosen: list[int] = []
    before = 0.0
    for token in kept:
        if before >= config.top_p * total:
            break
        chosen.append(token)
        before += weights[token]
    return {token: weights[token] / before for token in chosen}


CONFIGS = st.builds(
    SamplingConfig,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 5, 50, 150, 10**6]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    repetition_penalty=st.sampled_from([0.7, 1.0, 1.3]),
    presence_penalty=st.sampled_from([-1.0, 0.0, 1.5]),
    frequency_penalty=st.sampled_from([-0.5, 0.0, 0.7]),
    seed=st.integers(0, 2**64 - 1),
    stop_ids=st.sampled_from([(), (3, 4)]),
    eos_ids=st.just((0,)),
    min_tokens=st.sampled_from([0, 2, 9]),
    ignore_eos=st.booleans(),
)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)


@settings(max_examples=300, deadline=None)
@given(config=CONFIGS, seed=st.integers(0, 99), position=st.integers(0, 10**6), prompt=TOKENS, answer=TOKENS)
def test_draws_are_those_of_the_literal_rules(
    config: SamplingConfig, seed: int, position: int, prompt: list[int], answer: list[int]
) -> None:
    logits = random_logits(seed)
    expected = distribution(logits, config, prompt, answer)
    token = sample(logits, config, position, prompt, answer).token_id
    below = 0.0
    point = uniform(config.seed, position)
    for candidate, probability in expected.items():
        # Rounding may decide which of two neighbours a point on their border falls to.
        if candidate == token:
            assert below - 1e-5 <= point <= below + probability + 1e-5
            break
        below += probability
    else:
        pytest.fail(f"token {token} has no probability")


def test_frequencies_follow_the_distribution() -> None:
    logits = random_logits(1, 8)
    config = SamplingConfig(temperature=1.3, top_p=0.95, seed=11)
    expected = distribution(logits, config, [], [])
    draws = [sample(logits, config, position, [], []).token_id for position in range(20000)]
    counts = np.bincount(draws, minlength=8) / len(draws)
    for token in range(8):
        assert counts[token] == pytest.approx(expected.get(token, 0), abs=0.015)


@given(seed=st.integers(0, 2**64 - 1), position=st.integers(0, 2**40))
def test_the_draw_depends_on_seed_and_position_only(seed: int, position: int) -> None:
    config = SamplingConfig(seed=seed)
    logits = random_logits(2)
    first = sample(logits, config, position, [1, 2], [3])
    np.random.default_rng().random(10)
    assert sample(logits.copy(), config, position, [9], []) == first
    assert 0 <= uniform(seed, position) < 1


def test_seeds_and_positions_differ() -> None:
    numbers = {uniform(seed, position) for seed in range(50) for position in range(50)}
    assert len(numbers) == 2500
    assert uniform(1, 2) != uniform(2, 1)


def test_the_draw_of_a_seed_never_changes() -> None:
    """Across versions and machines: a worker that takes over must draw alike."""
    assert uniform(0, 0) == pytest.approx(0.011546754286331562, abs=1e-15)
    assert uniform(42, 7) == pytest.approx(0.649420079613736, abs=1e-15)


@given(seed=st.integers(0, 999))
def test_rows_do_not_know_each_other(seed: int) -> None:
    logits = np.stack([random_logits(seed + i) for i in range(3)])
    configs = [SamplingConfig(temperature=t, seed=seed) for t in (0.0, 0.7, 1.5)]
    together = sample_rows(logits, configs, [5, 6, 7], [[], [1], [2]], [[], [], [3]])
    alone = [
        sample(logits[i], configs[i], 5 + i, p, a)
        for i, (p, a) in enumerate([([], []), ([1], []), ([2], [3])])
    ]
    assert together == alone


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_greedy_takes_the_lowest_of_equals(temperature: float) -> None:
    logits = np.array([1, 5, 2, 5, 5], np.float32)
    assert sample(logits, SamplingConfig(temperature=temperature, seed=9), 3, [], []).token_id == 1


def test_greedy_listens_to_penalties_and_min_tokens() -> None:
    logits = np.array([1.0, 5.0, 4.0, 3.0], np.float32)
    config = SamplingConfig(temperature=0, presence_penalty=1.5, eos_ids=(2,), min_tokens=2)
    assert sample(logits, config, 0, [], [1]).token_id == 1
    assert sample(logits, config, 0, [], [1, 1]).token_id == 2
    assert logits.tolist() == [1.0, 5.0, 4.0, 3.0]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(3)
    config = SamplingConfig(temperature=0.5, top_k=2, logprobs=3, repetition_penalty=1.5)
    found = sample(logits, config, 4, [int(logits.argmax())], [])
    exact = logits.astype(np.float64) - math.log(np.exp(logits.astype(np.float64)).sum())
    assert found.logprob == pytest.approx(exact[found.token_id])
    order = np.argsort(-logits, kind="stable")[:3]
    assert [token for token, _ in found.top] == order.tolist()
    assert [value for _, value in found.top] == pytest.approx(exact[order])
    assert sample(logits, dataclasses.replace(config, logprobs=0), 4, [], []).top == ()
    assert sample(logits, dataclasses.replace(config, logprobs=None), 4, [], []).logprob is None


def test_ending_ids() -> None:
    config = SamplingConfig(stop_ids=(5,), eos_ids=(1, 2))
    assert config.ending_ids == {1, 2, 5}
    assert dataclasses.replace(config, ignore_eos=True).ending_ids == {5}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -math.inf),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("logprobs", 21),
        ("stop_ids", (VOCABULARY,)),
        ("stop_ids", (-1,)),
        ("stop_ids", tuple(range(65))),
    ],
)
def test_bad_fields_are_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field} is"):
        dataclasses.replace(SamplingConfig(), **{field: value}).validate(VOCABULARY)


def test_min_tokens_fit_max_tokens() -> None:
    SamplingConfig(max_tokens=4, min_tokens=4).validate()
    with pytest.raises(InvalidArgument, match="min_tokens is 5, but must be at most max_tokens"):
        SamplingConfig(max_tokens=4, min_tokens=5).validate()


@pytest.mark.parametrize("size", [1, 2, 1003, 49152, 128256])
def test_greedy_is_the_likeliest_of_any_vocabulary(size: int) -> None:
    for seed in range(10):
        values = random_logits(seed, size)
        values[seed % size] = values.max()
        wanted = max(range(size), key=lambda token: (values[token], -token))
        assert sample(values, SamplingConfig(temperature=0), seed, [], []).token_id == wanted
