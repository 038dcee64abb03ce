"""The decode engine loses no slot, no block and no reply under any order of events."""

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_service.config import DecodeConfig
from decode_service.engine import DecodeEngine
from decode_service.slot import Event, Slot
from kvrelay.errors import Cancelled, KvrelayError, LeaseLost, PromptTooLong, QueueFull
from kvrelay.v1.decode_pb2 import DecodeResponse
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.decoder import Decoder
from model_runtime.opening import open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent
from model_runtime.sampler import SamplingConfig
from tests.decode_service.hand_over import land
from tests.decode_service.late_steps import LateTokenSteps, new_late_steps
from tests.tiny_model import write_tiny_model

SLOTS, WAITING, CACHE_TOKENS = 3, 4, 2048
STOP_IDS = tuple(range(0, 300, 5))
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")


@pytest.fixture(scope="module", autouse=True)
def tiny(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The one decoder of all examples: it keeps nothing between steps."""
    path = write_tiny_model(tmp_path_factory.mktemp("tiny"))
    EngineMachine.decoder = open_decoder(DecoderOptions(str(path), threads=1), silent)


class EngineMachine(RuleBasedStateMachine):
    """Sequences come, their blocks land, in whole, in part or wrongly; clients drop them; time runs out."""

    decoder: Decoder

    def __init__(self) -> None:
        super().__init__()
        config = DecodeConfig(
            "decode-0", DecoderOptions("tiny"), slots=SLOTS, max_waiting=WAITING, cache_tokens=CACHE_TOKENS
        )
        self.engine = self.new_engine(config)
        self.told: dict[Slot, list[Event]] = {}
        self.numbers = count()

    def new_engine(self, config: DecodeConfig) -> DecodeEngine:
        """An engine whose tokens are there when a step is launched."""
        return DecodeEngine(config, self.decoder)

    @property
    def reserved(self) -> list[Slot]:
        """Slots whose blocks may land now."""
        return [slot for slot in self.told if slot.arrived is not None and not slot.arrived.done()]

    @property
    def living(self) -> list[Slot]:
        """Slots whose end has not been told."""
        return [slot for slot, events in self.told.items() if not ended(events)]

    def step(self) -> None:
        """What the engine's thread does."""
        while self.engine.has_work():
            self.engine.step()
            if self.engine._active:
                break

    @rule(
        prompt=st.integers(1, 300),
        tokens=st.one_of(st.integers(2, 6), st.integers(2, 400)),
        seed=st.integers(0, 3),
        stops=st.booleans(),
        logprobs=st.sampled_from([None, None, None, 1]),
    )
    def submit(self, prompt: int, tokens: int, seed: int, stops: bool, logprobs: int | None) -> None:
        events: list[Event] = []
        slot = Slot(
            request_id="r",
            lease_id=f"lease-{next(self.numbers)}",
            prompt_ids=[(seed + i) % 50 for i in range(prompt)],
            answer_ids=[],
            sampling=SamplingConfig(
                temperature=0.8, seed=seed, logprobs=logprobs, stop_ids=STOP_IDS if stops else ()
            ),
            max_tokens=tokens,
            emit=events.append,
        )
        full = self.engine.waiting >= WAITING
        try:
            self.engine.submit(slot)
        except QueueFull:
            assert full
        except PromptTooLong:
            assert slot.block_count * BLOCK_TOKENS > CACHE_TOKENS
        else:
            assert not full
            self.told[slot] = events

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), share=st.sampled_from([0.5, 1.0, 1.0, 1.0]), first=st.integers(0, 49))
    def land(self, data: st.DataObject, share: float, first: int) -> None:
        slot = data.draw(st.sampled_from(self.reserved))
        whole, commit = land(self.engine, slot, first, share)
        landing = self.engine.landings.find(slot.lease_id)
        if whole:
            landing.commit(commit)
        elif data.draw(st.booleans()):
            with pytest.raises(KvrelayError):
                landing.commit(commit)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def land_rubbish(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.reserved))
        with pytest.raises(KvrelayError):
            self.engine.landings.find(slot.lease_id).land(b"rubbish" * 40)

    @precondition(lambda self: self.reserved)
    @rule(data=st.data())
    def let_time_run_out(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(self.reserved))
        slot.deadline, slot.landed = 0.0, 10**6
        self.step()
        assert isinstance(self.told[slot][-1], Cancelled if slot.cancelled else LeaseLost)

    @precondition(lambda self: self.told)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        self.engine.cancel(data.draw(st.sampled_from(list(self.told))))

    @rule(times=st.integers(1, 5))
    def run_steps(self, times: int) -> None:
        for _ in range(times):
            self.step()

    @invariant()
    def nothing_is_lost(self) -> None:
        engine = self.engine
        held = [block for slot in self.told for block in slot.blocks]
        assert len(held) == len(set(held))
        assert engine.pool.free == engine.pool.capacity - len(held)
        engine.pool.check_integrity()
        assert engine.running <= SLOTS
        assert engine.waiting <= WAITING
        for slot, events in self.told.items():
            assert sum(1 for event in events if event is None or isinstance(event, KvrelayError)) <= 1
            if ended(events):
                assert bool(slot.blocks) == bool(slot.ahead)
            messages = [event for event in events if isinstance(event, DecodeResponse)]
            told = [token.token_id for message in messages for token in message.tokens.tokens]
            assert told == slot.answer_ids[1 : 1 + len(told)]
            assert len(slot.answer_ids) <= slot.max_tokens
            if ended(events):
                assert len(told) == max(0, len(slot.answer_ids) - 1)

    def teardown(self) -> None:
        for slot in self.told:
            self.engine.cancel(slot)
        while self.engine.has_work():
            self.engine.step()
        assert self.living == []
        assert self.engine.pool.free == self.engine.pool.capacity
        assert len(self.engine.landings) == 0
        assert not self.engine.busy


def ended(events: list[Event]) -> bool:
    """Whether a sequence has been told its end."""
    return bool(events) and (events[-1] is None or isinstance(events[-1], KvrelayError))


class LateEngineMachine(EngineMachine):
    """The same with a device that draws: each step is launched before the one before is over."""

    def new_engine(self, config: DecodeConfig) -> DecodeEngine:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Decoder, "new_token_steps", new_late_steps)
            return DecodeEngine(config, self.decoder)

    @invariant()
    def all_that_is_held_has_an_owner(self) -> None:
        """The slots that the device knows are those that have joined, and whose blocks are not freed."""
        steps = self.engine.steps
        assert isinstance(steps, LateTokenSteps)
        joined = {slot for slot in self.told if slot.answer_ids and slot.blocks}
        assert set(steps.known) == joined
        assert all(slot.ahead <= 1 for slot in self.told)


TestEngine = EngineMachine.TestCase
TestLateEngine = LateEngineMachine.TestCase
TestEngine.settings = TestLateEngine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
