"""The CUDA kernels that draw tokens, run on this processor: the tokens are those of the sampler."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.cuda.draw import DrawShape, TokenDraws, is_counted, seen_of, settings_of
from kvrelay_kernels.interface import NOT_FINITE, NOWHERE
from model_runtime.sampler import SamplingConfig, sample
from model_runtime.token_steps import draw_of
from tests.kernels.draw_streams import Stream, random_logits, random_stream
from tests.kernels.host_kernels import COMPILER, HostKernels

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
ROWS = 24
NARROW, USUAL = DrawShape(bins=32, threads=64), DrawShape(bins=1024, threads=128)
"""With few bins, most hold more tokens than are sorted together."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


class Pool:
    """Sequences at places, on the emulated device and on the host."""

    def __init__(self, kernels: Any, shape: DrawShape, vocabulary: int, sequences: Sequence[Stream]) -> None:
        self.vocabulary, self.sequences = vocabulary, sequences
        self.draws = TokenDraws(vocabulary, len(sequences), ROWS, "sm_90a", kernels, np, shape)
        self.draws.newest.fill(-1)
        for place, one in enumerate(sequences):
            draw = draw_of(one.config, len(one.prompt))
            counted = is_counted(draw, len(one.prompt))
            self.draws.settings[place] = settings_of(draw, counted).view(np.int32)
            if counted:
                self.draws.seen[place, :vocabulary] = seen_of(draw, one.prompt, one.answer, vocabulary)

    def step(self, logits: NDArray[np.float32], places: Sequence[int]) -> tuple[list[int], list[int]]:
        """Draw for some sequences: the device's tokens, and the sampler's."""
        there = np.array(places, np.int32)
        lengths = np.array(
            [len(self.sequences[p].prompt) + len(self.sequences[p].answer) if p >= 0 else 1 for p in places],
            np.int32,
        )
        tokens, answer = np.full(len(places) + 5, -99, np.int32), np.array([5], np.int32)
        self.draws.draw(logits.copy(), there, lengths, tokens, answer)
        assert (tokens[:5] == -99).all()
        tokens = tokens[5:]
        wanted = [
            sample(row, one.config, len(one.prompt) + len(one.answer), one.prompt, one.answer).token_id
            if one is not None
            else -99
            for row, one in zip(logits, [self.sequences[p] if p >= 0 else None for p in places], strict=True)
        ]
        for place, token in zip(places, wanted, strict=True):
            if place >= 0:
                self.sequences[place].answer.append(token)
        return tokens.tolist(), wanted


def draw_and_compare(kernels: Any, shape: DrawShape, vocabulary: int, seed: int, steps: int) -> None:
    """Some steps of sequences with random settings, in other rows each time, some of which are nobody's."""
    rng = np.random.default_rng(seed)
    pool = Pool(kernels, shape, vocabulary, [random_stream(rng, vocabulary) for _ in range(ROWS)])
    for _ in range(steps):
        places = rng.permutation(ROWS).astype(np.int32)
        places[rng.integers(0, ROWS, 2)] = NOWHERE
        found, wanted = pool.step(random_logits(rng, ROWS, vocabulary), places.tolist())
        different = [
            (pool.sequences[place].config, a, b)
            for place, a, b in zip(places, found, wanted, strict=True)
            if a != b
        ]
        assert different == []
        newest = [one.answer[-1] if one.answer else 0 for one in pool.sequences]
        drawn = places[places >= 0]
        assert pool.draws.newest[drawn].tolist() == [newest[place] for place in drawn]
    for place, one in enumerate(pool.sequences):
        draw = draw_of(one.config, len(one.prompt))
        if is_counted(draw, len(one.prompt)):
            counted = seen_of(draw, one.prompt, one.answer, vocabulary)
            assert np.array_equal(pool.draws.seen[place, :vocabulary], counted)


@pytest.mark.parametrize(
    ("shape", "vocabulary"),
    [(NARROW, 1000), (USUAL, 1003), (USUAL, 2047), (USUAL, 2048), (USUAL, 20000), (USUAL, 50000)],
)
def test_tokens_are_those_of_the_sampler(kernels: Any, shape: DrawShape, vocabulary: int) -> None:
    for seed in range(4):
        draw_and_compare(kernels, shape, vocabulary, seed + vocabulary, steps=4)


def test_greedy_takes_the_lowest_of_equals(kernels: Any) -> None:
    pool = Pool(kernels, USUAL, 20000, [Stream(SamplingConfig(temperature=0.0), [1], [2])])
    logits = np.full((1, 20000), -1, np.float32)
    logits[0, [19999, 12345, 8191, 8192]] = 3
    assert pool.step(logits, [0])[0] == [8191]


def test_a_long_tail_weighs_what_its_tokens_do(kernels: Any) -> None:
    """Each of them little more than half of a sum's lower half: most additions carry."""
    sequences = [Stream(SamplingConfig(temperature=1.0, seed=seed), [1], []) for seed in range(16)]
    pool = Pool(kernels, USUAL, 20000, sequences)
    logits = np.random.default_rng(6).uniform(-9.5, -8.5, (16, 20000)).astype(np.float32)
    logits[:, 7] = 0
    found, wanted = pool.step(logits, range(16))
    assert found == wanted
    assert len({*found}) > 8


def test_frequencies_follow_the_distribution(kernels: Any) -> None:
    config = SamplingConfig(temperature=1.3, top_p=0.95, seed=11)
    pool = Pool(kernels, NARROW, 8, [Stream(config, [1], [])])
    logits = np.random.default_rng(1).standard_normal((1, 8)).astype(np.float32)
    weights = np.exp(logits[0].astype(np.float64) / 1.3)
    order = np.argsort(-weights)
    kept = order[: np.searchsorted(np.cumsum(weights[order]), 0.95 * weights.sum()) + 1]
    drawn = [pool.step(logits, [0])[0][0] for _ in range(2000)]
    counts = np.bincount(drawn, minlength=8) / len(drawn)
    expected = np.zeros(8)
    expected[kept] = weights[kept] / weights[kept].sum()
    np.testing.assert_allclose(counts, expected, atol=0.04)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told_of_its_row_alone(kernels: Any, value: float) -> None:
    sequences = [Stream(SamplingConfig(temperature=t, seed=4), [1], [2]) for t in (0.0, 1.0, 0.0, 1.0)]
    pool = Pool(kernels, USUAL, 20000, sequences)
    logits = random_logits(np.random.default_rng(3), 4, 20000)
    sound = logits.copy()
    logits[2, 17], logits[3, 19990] = value, value
    tokens = np.full(4, -99, np.int32)
    lengths, zero = np.full(4, 2, np.int32), np.zeros(1, np.int32)
    pool.draws.draw(logits, np.arange(4, dtype=np.int32), lengths, tokens, zero)
    assert tokens[:2].tolist() == pool.step(sound, [0, 1, 2, 3])[1][:2]
    assert tokens[2:].tolist() == [NOT_FINITE, NOT_FINITE]


def test_nothing_but_masked_tokens_is_no_reason_to_fail(kernels: Any) -> None:
    config = SamplingConfig(temperature=1.0, stop_ids=tuple(range(8)), min_tokens=5)
    pool = Pool(kernels, NARROW, 8, [Stream(config, [1], [])])
    tokens = np.full(1, -99, np.int32)
    one, zero = np.ones(1, np.int32), np.zeros(1, np.int32)
    pool.draws.draw(np.ones((1, 8), np.float32), zero, one, tokens, zero)
    assert tokens.tolist() == [0]
