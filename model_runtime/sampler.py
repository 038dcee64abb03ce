"""Drawing tokens from logits: a pure function of logits, settings, seed and position, alike in both pools.

Order and meaning of the settings are vLLM's: stop ids masked below `min_tokens`, penalties, temperature,
min-p, top-k, top-p. Log-probabilities are those of the raw logits, before any of that. A device that draws
(`kvrelay_kernels.interface.Drawing`) draws the same tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvrelay.errors import InvalidArgument

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in vLLM."""
FIRST_GUESS = 64
"""Candidates that are sorted first; most draws need no more."""


class SamplingMessage(Protocol):
    """The protobuf message `SamplingParams`, seen from a room that knows no protobuf."""

    def ListFields(self) -> Sequence[tuple[Any, Any]]:  # noqa: N802
        """Field descriptors and values of what is set."""
        ...


@dataclass(frozen=True)
class SamplingConfig:
    """How the tokens of one answer are drawn; the defaults switch everything off."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()
    """The model's own end tokens; the worker puts them in."""
    max_tokens: int | None = None
    min_tokens: int = 0
    logprobs: int | None = None
    """Likeliest tokens to report beside the drawn one; None: report nothing."""
    ignore_eos: bool = False

    @classmethod
    def of_message(cls, message: SamplingMessage, eos_ids: tuple[int, ...]) -> "SamplingConfig":
        """The settings that a `SamplingParams` message holds; what is absent keeps its default."""
        given = {field.name: value for field, value in message.ListFields()}
        # Stop strings are the gateway's: a worker sees no text.
        given.pop("stop", None)
        given["stop_ids"] = tuple(given.get("stop_ids", ()))
        return cls(**given, eos_ids=eos_ids)

    @property
    def ending_ids(self) -> frozenset[int]:
        """Tokens that end the answer."""
        return frozenset(self.stop_ids if self.ignore_eos else self.stop_ids + self.eos_ids)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < GREEDY_BELOW

    def validate(self, vocabulary: int | None = None) -> None:
        """Check every field; ids are checked against `vocabulary` where it is given.

        Raises:
            InvalidArgument: a field is out of range; the message names it.
        """
        ids = self.stop_ids
        checks: tuple[tuple[str, object, bool, str], ...] = (
            ("temperature", self.temperature, _within(self.temperature, 0, math.inf), "0 or positive"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or positive"),
            ("top_p", self.top_p, _within(self.top_p, 0, 1) and self.top_p > 0, "above 0 and at most 1"),
            ("min_p", self.min_p, _within(self.min_p, 0, 1), "between 0 and 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                _within(self.repetition_penalty, 0, math.inf) and self.repetition_penalty > 0,
                "positive",
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                _within(self.presence_penalty, -2, 2),
                "between -2 and 2",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                _within(self.frequency_penalty, -2, 2),
                "between -2 and 2",
            ),
            ("seed", self.seed, 0 <= self.seed < 2**64, "an unsigned 64-bit number"),
            ("max_tokens", self.max_tokens, self.max_tokens is None or self.max_tokens > 0, "at least 1"),
            ("min_tokens", self.min_tokens, self.min_tokens >= 0, "0 or positive"),
            (
                "min_tokens",
                self.min_tokens,
                self.max_tokens is None or self.min_tokens <= self.max_tokens,
                "at most max_tokens",
            ),
            (
                "logprobs",
                self.logprobs,
                self.logprobs is None or 0 <= self.logprobs <= 20,
                "between 0 and 20",
            ),
            ("stop_ids", ids, len(ids) <= 64, "at most 64 ids"),
            (
                "stop_ids",
                ids,
                all(i >= 0 and (vocabulary is None or i < vocabulary) for i in ids),
                "token ids",
            ),
        )
        for field, value, valid, wanted in checks:
            if not valid:
                raise InvalidArgument(f"{field} is {value}, but must be {wanted}")


@dataclass(frozen=True)
class Sampled:
    """One drawn token."""

    token_id: int
    logprob: float | None = None
    """Present where log-probabilities were asked for."""
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens with their log-probabilities, most likely first."""


def sample(
    logits: NDArray[np.float32],
    config: SamplingConfig,
    position: int,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
) -> Sampled:
    """Draw the token at `position` (its index in prompt and answer together) from its `[vocabulary]` logits.

    `answer_ids` are the tokens already drawn; `prompt_ids` matter to the repetition penalty only.
    The logits are not modified.
    """
    adjusted = _adjust(logits, config, prompt_ids, answer_ids)
    token_id = int(adjusted.argmax()) if config.greedy else _draw(adjusted, config, position)
    if config.logprobs is None:
        return Sampled(token_id)
    return _with_logprobs(logits, token_id, config.logprobs)


def sample_rows(
    logits: NDArray[np.float32],
    configs: Sequence[SamplingConfig],
    positions: Sequence[int],
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
) -> list[Sampled]:
    """`sample` for each row of `[n, vocabulary]` logits."""
    rows = zip(logits, configs, positions, prompts, answers, strict=True)
    return [sample(row, config, position, prompt, answer) for row, config, position, prompt, answer in rows]


def uniform(seed: int, position: int) -> float:
    """The one random number in [0, 1) of a position: Philox 4x64 keyed with both (Salmon et al., 2011)."""
    bits = np.random.Philox(key=np.array([seed, position], np.uint64)).random_raw()
    return (int(bits) >> 11) * 2.0**-53


def _within(value: float, low: float, high: float) -> bool:
    return math.isfinite(value) and low <= value <= high


def _adjust(
    logits: NDArray[np.float32], config: SamplingConfig, prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> NDArray[np.float32]:
    """Mask what may not be drawn yet, then repetition, frequency and presence penalties."""
    masked = sorted(config.ending_ids) if len(answer_ids) < config.min_tokens else []
    repeats = config.repetition_penalty != 1.0
    counts = config.frequency_penalty != 0.0 or config.presence_penalty != 0.0
    if not (masked or repeats or counts):
        return logits
    logits = logits.copy()
    logits[masked] = -np.inf
    if repeats:
        seen = np.zeros(len(logits), bool)
        seen[np.asarray(prompt_ids, np.intp)] = True
        seen[np.asarray(answer_ids, np.intp)] = True
        values = logits[seen]
        penalty = np.float32(config.repetition_penalty)
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if counts and len(answer_ids):
        ids, times = np.unique(np.asarray(answer_ids, np.intp), return_counts=True)
        logits[ids] -= (config.frequency_penalty * times + config.presence_penalty).astype(np.float32)
    return logits


def _draw(logits: NDArray[np.float32], config: SamplingConfig, position: int) -> int:
    """Invert the cumulative distribution over the kept tokens, likeliest first, at the position's number."""
    scaled = logits.astype(np.float64)
    scaled -= scaled.max()
    scaled /= config.temperature
    weights = np.exp(scaled)
    kept = None
    if config.min_p > 0:
        # The likeliest token weighs 1, so that the threshold is min_p itself.
        kept = np.flatnonzero(weights >= config.min_p)
        weights = weights[kept]
    if 0 < config.top_k < len(weights):
        # As in vLLM, tokens that tie with the last one are kept as well.
        within = np.flatnonzero(weights >= weights[_likeliest(weights, config.top_k)[-1]])
        kept, weights = within if kept is None else kept[within], weights[within]
    point, total = uniform(config.seed, position), float(weights.sum())
    if config.top_p < 1:
        order, sums = _until(weights, config.top_p * total)
        order = order[: int(np.searchsorted(sums, config.top_p * total)) + 1]
        total = float(sums[len(order) - 1])
    else:
        order, sums = _until(weights, point * total)
    index = int(order[min(int(np.searchsorted(sums, point * total, side="right")), len(order) - 1)])
    return index if kept is None else int(kept[index])


def _until(weights: NDArray[np.float64], mass: float) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """The likeliest tokens in order, enough of them that their running sums, returned too, pass `mass`."""
    count = FIRST_GUESS
    while True:
        order = _likeliest(weights, count)
        sums = np.cumsum(weights[order])
        if sums[-1] > mass or len(order) == len(weights):
            return order, sums
        count *= 8


def _likeliest(weights: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Indices of the `count` largest weights, largest first, the lower index first among equals."""
    if count >= len(weights):
        return np.argsort(-weights, kind="stable")
    threshold = np.partition(weights, len(weights) - count)[len(weights) - count]
    candidates = np.flatnonzero(weights >= threshold)
    return candidates[np.argsort(-weights[candidates], kind="stable")][:count]


def _with_logprobs(logits: NDArray[np.float32], token_id: int, count: int) -> Sampled:
    values = logits.astype(np.float64)
    values -= values.max()
    values -= math.log(float(np.exp(values).sum()))
    top = _likeliest(values, count) if count else ()
    return Sampled(token_id, float(values[token_id]), tuple((int(i), float(values[i])) for i in top))
