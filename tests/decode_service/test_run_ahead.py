"""A step is launched before the tokens of the last one are read: nothing is freed early, lost or doubled."""

from pathlib import Path

import pytest

from decode_service.config import DecodeConfig
from decode_service.engine import DecodeEngine
from decode_service.slot import Event, Slot
from kvrelay.errors import Cancelled, Draining, Internal
from kvrelay.v1.decode_pb2 import DecodeResponse
from kvrelay.v1.sampling_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from kvrelay_kernels.errors import KernelError
from model_runtime.decoder import Decoder
from model_runtime.opening import open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent
from model_runtime.sampler import SamplingConfig
from model_runtime.token_steps import Outcome
from tests.decode_service.hand_over import hand_over
from tests.decode_service.late_steps import LateFlight, LateTokenSteps, new_late_steps
from tests.tiny_model import POISON

PROMPT = list(range(3, 40))


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    """The one decoder of all tests: it keeps nothing between steps."""
    return open_decoder(DecoderOptions(str(model), threads=1), silent)


def new_engine(decoder: Decoder, late: bool) -> DecodeEngine:
    """As a worker's; its thread is the test's."""
    config = DecodeConfig("decode-0", DecoderOptions("tiny"), slots=4, cache_tokens=2048)
    with pytest.MonkeyPatch.context() as patch:
        if late:
            patch.setattr(Decoder, "new_token_steps", new_late_steps)
        return DecodeEngine(config, decoder)


@pytest.fixture
def engine(decoder: Decoder) -> DecodeEngine:
    """An engine whose steps are over late."""
    return new_engine(decoder, late=True)


def join(
    engine: DecodeEngine, max_tokens: int, first: int = 7, **settings: object
) -> tuple[Slot, list[Event]]:
    """A sequence whose blocks have landed."""
    events: list[Event] = []
    sampling = SamplingConfig(**{"temperature": 0.0, **settings})  # type: ignore[arg-type]
    slot = Slot("r", f"lease-{first}-{len(engine.landings)}", PROMPT, [], sampling, max_tokens, events.append)
    engine.submit(slot)
    engine._grant()
    hand_over(engine, slot, first)
    engine._join()
    return slot, events


def run(engine: DecodeEngine) -> None:
    """All steps that there are to take."""
    while engine.has_work():
        engine.step()
    assert not engine.busy
    assert engine.pool.free == engine.pool.capacity
    engine.pool.check_integrity()
    if isinstance(engine.steps, LateTokenSteps):
        assert not engine.steps.known


def tokens(events: list[Event]) -> list[int]:
    """Those that were told."""
    messages = [event for event in events if isinstance(event, DecodeResponse)]
    return [token.token_id for message in messages for token in message.tokens.tokens]


def reason(events: list[Event]) -> int:
    """Why a sequence has ended, that did so without an error."""
    assert events[-1] is None
    assert isinstance(events[-2], DecodeResponse)
    return events[-2].finished.reason


SETTINGS = [
    {},
    {"temperature": 0.9, "seed": 3, "top_p": 0.9},
    {"temperature": 1.3, "seed": 4, "repetition_penalty": 1.3, "frequency_penalty": 0.5, "min_tokens": 9},
    {"temperature": 0.7, "seed": 5, "stop_ids": tuple(range(0, 299, 7))},
    {"temperature": 0.7, "seed": 6, "logprobs": 2},
]


def test_answers_are_those_of_steps_that_end_at_once(decoder: Decoder) -> None:
    answers: list[list[list[int]]] = []
    for late in (False, True):
        engine = new_engine(decoder, late)
        alone: list[list[int]] = []
        for settings in SETTINGS:
            _, events = join(engine, 30, **settings)
            run(engine)
            alone.append(tokens(events))
        streams = [join(engine, 30, **settings)[1] for settings in SETTINGS[:4]]
        engine.step()
        run(engine)
        assert [tokens(events) for events in streams] == alone[:4]
        answers.append(alone)
    assert answers[0] == answers[1]
    assert all(len(answer) == 29 for answer in answers[0][:3])


def test_a_step_is_launched_before_the_last_one_is_read(engine: DecodeEngine) -> None:
    slot, events = join(engine, 5)
    ahead: list[tuple[int, int]] = []
    while engine.has_work():
        engine.step()
        ahead.append((len(slot.answer_ids), slot.ahead))
    # The fourth draw is the last one there may be: no fifth step is launched.
    assert ahead == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 0)]
    assert reason(events) == FINISH_REASON_LENGTH
    run(engine)


def test_what_has_ended_is_freed_when_the_last_step_that_writes_to_it_is_over(engine: DecodeEngine) -> None:
    drawn = join(engine, 8)[0]
    run(engine)
    slot, events = join(engine, 8, stop_ids=(drawn.answer_ids[2],))
    end = drawn.answer_ids.index(drawn.answer_ids[2])
    while slot in engine._active:
        engine.step()
    engine._tell()
    assert reason(events) == FINISH_REASON_STOP
    assert (slot.ahead, engine.running, len(slot.blocks)) == (1, 1, slot.block_count)
    engine.step()
    assert (slot.ahead, engine.running, slot.blocks) == (0, 0, [])
    assert slot.answer_ids == drawn.answer_ids[: end + 1]
    assert tokens(events) == slot.answer_ids[1:]
    run(engine)


def test_a_dropped_sequence_keeps_its_blocks_while_a_step_writes_to_them(engine: DecodeEngine) -> None:
    (slot, events), (other, others) = join(engine, 20), join(engine, 20, first=9)
    engine.step()
    engine.cancel(slot)
    engine._drop_cancelled()
    assert slot.blocks
    engine.step()
    assert not slot.blocks
    assert isinstance(events[-1], Cancelled)
    run(engine)
    assert len(tokens(others)) == 19
    assert len(other.answer_ids) == 20


def test_a_failing_engine_waits_for_the_step_under_way(engine: DecodeEngine) -> None:
    slot, events = join(engine, 20)
    engine.step()
    assert slot.ahead == 1
    engine.stop()
    assert isinstance(events[-1], Draining)
    run(engine)


def fail_in_flight(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """The next flight that is waited for ends in an error, once it is over."""

    def wait(flight: LateFlight) -> list[Outcome]:
        monkeypatch.undo()
        flight.wait()
        raise error

    monkeypatch.setattr(LateFlight, "wait", wait)


def test_a_step_that_fails_under_way_ends_its_sequences_alone(
    engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, events = join(engine, 20)
    engine.step()
    fail_in_flight(monkeypatch, KernelError("the device is not well"))
    engine.step()
    _, later = join(engine, 6, first=9)
    run(engine)
    assert isinstance(events[-1], Internal)
    assert len(tokens(later)) == 5


def test_a_fault_of_ours_under_way_leaks_nothing(
    engine: DecodeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [join(engine, 20, first=first)[1] for first in (4, 5, 6)]
    engine.step()
    fail_in_flight(monkeypatch, RuntimeError("unexpected"))
    with pytest.raises(RuntimeError):
        engine.step()
    engine.fail(Internal("a step failed"))
    assert all(isinstance(events[-1], Internal) for events in streams)
    run(engine)


def test_not_a_number_ends_one_sequence_and_no_other(engine: DecodeEngine) -> None:
    _, alone = join(engine, 12)
    run(engine)
    _, sound = join(engine, 12)
    _, spoiled = join(engine, 12, first=POISON)
    run(engine)
    assert tokens(sound) == tokens(alone)
    assert isinstance(spoiled[-1], Internal)
    assert "NonFiniteActivations" in str(spoiled[-1])
    assert tokens(spoiled) == []
