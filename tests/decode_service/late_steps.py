"""Decode steps as a device takes them: launched now, over later. The work is real, and done late."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from decode_service.slot import Slot
from kvrelay_kernels.interface import FROM_DEVICE, Arena, StepBatch
from model_runtime.decoder import Decoder
from model_runtime.sampler import Sampled, SamplingConfig
from model_runtime.token_steps import Drawable, Flight, HostTokenSteps, Landed, Outcome, drawn_by_host


@dataclass(eq=False)
class Known:
    """What a device knows of a sequence."""

    sampling: SamplingConfig
    prompt_ids: list[int]
    answer_ids: list[int]


class LateFlight:
    """Takes its step when it is waited for."""

    def __init__(self, take: Callable[[], list[Outcome]]) -> None:
        self._take = take
        self._outcomes: list[Outcome] | None = None

    @property
    def done(self) -> bool:
        return self._outcomes is not None

    def wait(self) -> list[Outcome]:
        if self._outcomes is None:
            self._outcomes = self._take()
        return self._outcomes


class LateTokenSteps(HostTokenSteps):
    """Keeps what a device keeps, and asserts what it relies on: slots hold still while a flight has them."""

    def __init__(self, decoder: Decoder, arena: Arena) -> None:
        super().__init__(decoder, arena)
        self.known: dict[Drawable, Known] = {}
        self._flights: list[LateFlight] = []

    def join(self, sequence: Drawable) -> None:
        assert sequence not in self.known
        self.known[sequence] = Known(sequence.sampling, sequence.prompt_ids, [*sequence.answer_ids])

    def leave(self, sequence: Drawable) -> None:
        self.known.pop(sequence, None)

    def launch(self, batch: StepBatch, sequences: Sequence[Drawable]) -> Flight:
        assert batch.plain
        flight = self._depart(batch, sequences)
        if any(drawn_by_host(sequence.sampling) for sequence in sequences):
            return Landed([other.wait() for other in self._flights][-1])
        return flight

    def _depart(self, batch: StepBatch, sequences: Sequence[Drawable]) -> LateFlight:
        self._flights = [flight for flight in self._flights if not flight.done]
        before = tuple(self._flights)
        assert len(before) < 2
        slots = [sequence for sequence in sequences if isinstance(sequence, Slot)]
        blocks = [list(slot.blocks) for slot in slots]
        rows = [self.known[sequence] for sequence in sequences]

        def take() -> list[Outcome]:
            assert all(flight.done for flight in before), "flights are waited for in order"
            assert [slot.blocks for slot in slots] == blocks, "a slot was freed while a flight writes to it"
            ids = np.array([known.answer_ids[-1] for known in rows], np.int32)
            told = batch.token_ids != FROM_DEVICE
            np.testing.assert_array_equal(batch.token_ids[told], ids[told])
            assert [len(known.prompt_ids) + len(known.answer_ids) for known in rows] == batch.lengths.tolist()
            landed = HostTokenSteps.launch(self, replace(batch, token_ids=ids), rows)
            outcomes = landed.wait()
            for known, outcome in zip(rows, outcomes, strict=True):
                known.answer_ids.append(outcome.token_id if isinstance(outcome, Sampled) else 0)
            return outcomes

        self._flights.append(flight := LateFlight(take))
        return flight


def new_late_steps(decoder: Decoder, arena: Arena, places: int) -> LateTokenSteps:
    """In place of `Decoder.new_token_steps`."""
    return LateTokenSteps(decoder, arena)
