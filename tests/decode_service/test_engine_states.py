"""The decode engine loses no slot, no block and no reply under any order of events."""

from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from decode_service.config import DecodeConfig
from decode_service.engine import DecodeEngine
from decode_service.slot import Event, Slot
from kv_transfer.prefix import prefix_keys
from kvrelay.errors import Cancelled, KvrelayError, LeaseLost, PromptTooLong, QueueFull
from kvrelay.v1.decode_pb2 import DecodeResponse
from kvrelay.v1.transfer_pb2 import Commit
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.decoder import Decoder
from model_runtime.opening import open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent
from model_runtime.sampler import SamplingConfig
from tests.tiny_model import write_tiny_model

SLOTS, WAITING, CACHE_TOKENS = 3, 4, 2048
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
        self.engine = DecodeEngine(config, self.decoder)
        self.told: dict[Slot, list[Event]] = {}
        self.numbers = count()

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

    @rule(prompt=st.integers(1, 300), tokens=st.integers(2, 400), seed=st.integers(0, 3))
    def submit(self, prompt: int, tokens: int, seed: int) -> None:
        events: list[Event] = []
        slot = Slot(
            request_id="r",
            lease_id=f"lease-{next(self.numbers)}",
            prompt_ids=[(seed + i) % 50 for i in range(prompt)],
            answer_ids=[],
            sampling=SamplingConfig(temperature=0.0),
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
        codec = self.engine.landings.codec
        tokens = slot.length
        keys = prefix_keys(
            slot.prompt_ids + slot.answer_ids, codec.model, codec.layout.fingerprint, len(slot.prompt_ids)
        )
        landing = self.engine.landings.find(slot.lease_id)
        places = [(layer, index) for layer in range(codec.layers) for index in range(len(keys))]
        payload = memoryview(bytes(codec.layout.block_bytes))
        for layer, index in places[: max(1, int(share * len(places)))]:
            start = index * BLOCK_TOKENS
            header = codec.header(layer, start, min(BLOCK_TOKENS, tokens - start), keys[index])
            landing.land(b"".join(codec.encode(header, payload)))
        commit = Commit(lease_id=slot.lease_id, blocks=len(places), tokens=tokens, first_token=first)
        if landing.landed == len(places):
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
                assert not slot.blocks
            messages = [event for event in events if isinstance(event, DecodeResponse)]
            assert sum(len(message.tokens.tokens) for message in messages) < slot.max_tokens

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


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
