"""Decode steps that end in tokens: drawn by the sampler, or by the device, which may be a step ahead."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from kvrelay_kernels.errors import KernelError, NonFiniteActivations
from kvrelay_kernels.interface import NOT_FINITE, NOWHERE, Arena, Draw, Drawing, Logits, Pending, StepBatch
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.progress import Progress, silent
from model_runtime.sampler import Sampled, SamplingConfig, sample

if TYPE_CHECKING:
    from model_runtime.decoder import Decoder

HOTTEST = 1e6
"""Temperatures above are left to the host: there, different logits come to weigh the same, and the sampler
orders them by index, a device by logit."""


class Drawable(Protocol):
    """What is asked of a sequence whose tokens are drawn; it is its own key, by identity."""

    sampling: SamplingConfig
    prompt_ids: list[int]
    answer_ids: list[int]
    """Tokens drawn so far, as far as they are on the host."""

    def __hash__(self) -> int: ...


Outcome = Sampled | KernelError
"""A row's token, or what is wrong with its sequence alone."""


class Flight(Protocol):
    """A step that was launched; until it is over it may write to the blocks of its sequences."""

    @property
    def done(self) -> bool:
        """Whether `wait` returns at once."""
        ...

    def wait(self) -> list[Outcome]:
        """What came of each row, once the step is over. Raises KernelError where the whole step failed."""
        ...


class TokenSteps(Protocol):
    """Takes decode steps on one arena, for a limited number of sequences at a time.

    At most two flights are under way, and they are waited for in the order of their launch.
    """

    def join(self, sequence: Drawable) -> None:
        """Make ready for a sequence whose next token will be drawn here: its answer so far is on the host."""
        ...

    def leave(self, sequence: Drawable) -> None:
        """Forget a sequence that no flight carries; one that never joined is passed over."""
        ...

    def launch(self, batch: StepBatch, sequences: Sequence[Drawable]) -> Flight:
        """Take a `plain` step of these sequences, a row each, and draw the token behind each row.

        FROM_DEVICE may stand in `batch.token_ids` for a row whose sequence is in a flight that is not done.

        Raises:
            KernelError: the step could not be taken.
        """
        ...

    def warm(self, progress: Progress = silent) -> None:
        """Take down every kind of step, so that none waits for that later; the arena's contents are lost."""
        ...


@dataclass(frozen=True)
class Landed:
    """A flight that is over."""

    outcomes: list[Outcome]
    done: bool = True

    def wait(self) -> list[Outcome]:
        """See `Flight`."""
        return self.outcomes


class HostTokenSteps:
    """The sampler draws from logits on the host, as part of the step: flights are over when launched."""

    def __init__(self, decoder: "Decoder", arena: Arena) -> None:
        self._decoder = decoder
        self._arena = arena

    def join(self, sequence: Drawable) -> None:
        """Nothing: the sampler is told all of a sequence in each step."""

    def leave(self, sequence: Drawable) -> None:
        """Nothing is kept."""

    def launch(self, batch: StepBatch, sequences: Sequence[Drawable]) -> Flight:
        """See `TokenSteps`."""
        logits = self._decoder.logits(batch, self._arena)
        return Landed(_sample_rows(logits, range(batch.rows), sequences))

    def warm(self, progress: Progress = silent) -> None:
        """Nothing beyond `Decoder.warm`."""


class DeviceTokenSteps:
    """The device draws. A sequence has a place there from its joining to its leaving.

    The sampler draws the rows of `drawn_by_host`, for which a step waits: it is over when it is launched.
    """

    def __init__(self, decoder: "Decoder", arena: Arena, drawing: Drawing, places: int) -> None:
        self._drawing = drawing
        self._step = drawing.record(decoder.step(arena), arena)
        self._widest = min(arena.blocks, -(-decoder.context // BLOCK_TOKENS))
        self._free = list(range(places))
        self._places: dict[Drawable, int] = {}

    def join(self, sequence: Drawable) -> None:
        """See `TokenSteps`. Raises IndexError where more sequences join than there are places."""
        if not drawn_by_host(sequence.sampling):
            self._places[sequence] = place = self._free.pop()
            draw = draw_of(sequence.sampling, len(sequence.prompt_ids))
            self._drawing.join(place, draw, sequence.prompt_ids, sequence.answer_ids)

    def leave(self, sequence: Drawable) -> None:
        """See `TokenSteps`."""
        place = self._places.pop(sequence, None)
        if place is not None:
            self._free.append(place)

    def launch(self, batch: StepBatch, sequences: Sequence[Drawable]) -> Flight:
        """See `TokenSteps`."""
        places = np.array([self._places.get(sequence, NOWHERE) for sequence in sequences], np.int32)
        pending = self._step(batch, places)
        on_host = np.flatnonzero(places == NOWHERE).tolist()
        if not on_host:
            return _DeviceFlight(pending)
        outcomes = _outcomes(pending)
        drawn = _sample_rows(pending.logits(on_host), on_host, [sequences[row] for row in on_host])
        for row, outcome in zip(on_host, drawn, strict=True):
            outcomes[row] = outcome
        return Landed(outcomes)

    def warm(self, progress: Progress = silent) -> None:
        """See `TokenSteps`."""
        shapes = self._step.shapes(self._widest)
        for done, (rows, blocks) in enumerate(shapes):
            progress("recording steps", done, len(shapes))
            zeros, every = np.zeros(rows, np.int32), np.arange(rows + 1, dtype=np.int32)
            tables = np.zeros((rows, blocks), np.int32)
            batch = StepBatch(zeros, zeros, every, np.ones(rows, np.int32), tables, every[:-1])
            self._step(batch, np.full(rows, NOWHERE, np.int32)).tokens()
        progress("recording steps", len(shapes), len(shapes))


def drawn_by_host(config: SamplingConfig) -> bool:
    """Whether only the sampler draws such tokens: with log-probabilities, or at absurd temperatures."""
    return config.logprobs is not None or config.temperature > HOTTEST


def draw_of(config: SamplingConfig, prompt_tokens: int) -> Draw:
    """What a device has to know of the settings of a sequence with so many prompt tokens."""
    return Draw(
        temperature=0.0 if config.greedy else config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
        frequency_penalty=config.frequency_penalty,
        seed=config.seed,
        ending_ids=sorted(config.ending_ids),
        ending_from=prompt_tokens + config.min_tokens,
    )


@dataclass(frozen=True)
class _DeviceFlight:
    pending: Pending

    @property
    def done(self) -> bool:
        return self.pending.done

    def wait(self) -> list[Outcome]:
        return _outcomes(self.pending)


def _outcomes(pending: Pending) -> list[Outcome]:
    tokens = pending.tokens().tolist()
    return [_not_finite(row) if token == NOT_FINITE else Sampled(token) for row, token in enumerate(tokens)]


def _sample_rows(logits: Logits, rows: Sequence[int], sequences: Sequence[Drawable]) -> list[Outcome]:
    """The sampler's draws for these rows of a step, whose logits these are."""
    finite = finite_rows(logits)
    return [
        sample(
            row_logits, sequence.sampling, len(sequence.prompt_ids) + len(sequence.answer_ids),
            sequence.prompt_ids, sequence.answer_ids,
        )
        if finite[index]
        else _not_finite(rows[index])
        for index, (row_logits, sequence) in enumerate(zip(logits, sequences, strict=True))
    ]  # fmt: skip


def finite_rows(logits: Logits) -> list[bool]:
    """Which rows hold neither NaN nor infinity."""
    # A sum is finite where all its terms are, and reads each logit once; logits are far from overflow.
    return np.isfinite(logits.sum(axis=1)).tolist()


def _not_finite(row: int) -> NonFiniteActivations:
    return NonFiniteActivations(f"NaN or infinity in the logits of row {row}", [row])
