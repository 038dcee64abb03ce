"""The decode loop: grant slots, let sequences join whose blocks are in, launch a step, read the last one."""

import logging
import time
from collections import deque
from dataclasses import dataclass

from decode_service.batch import StepBatches
from decode_service.config import DecodeConfig
from decode_service.metrics import DecodeMetrics
from decode_service.slot import Event, Slot
from kv_transfer.block import BlockCodec
from kv_transfer.block_pool import BlockPool
from kv_transfer.landing import Landings
from kv_transfer.prefix import prefix_keys
from kvrelay.errors import Cancelled, Draining, Internal, KvrelayError, LeaseLost, PromptTooLong, QueueFull
from kvrelay.v1 import decode_pb2 as pb
from kvrelay.v1.prefill_pb2 import Lease
from kvrelay.v1.sampling_pb2 import SampledToken, TokenLogprob
from kvrelay_kernels.errors import KernelError
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.decoder import Decoder
from model_runtime.sampler import Sampled
from model_runtime.step_loop import StepLoop
from model_runtime.token_steps import Flight, Outcome

log = logging.getLogger(__name__)

RETRY_SECONDS = 0.5
"""Hint to whom the full queue turned away."""
POLL_SECONDS = 1.0
"""How often deadlines are looked at while nothing else happens."""


@dataclass(frozen=True)
class _Launched:
    """A step under way, and the slots whose tokens it draws."""

    slots: tuple[Slot, ...]
    flight: Flight


class DecodeEngine(StepLoop):
    """Owns the arena of a decode worker and the one thread that computes on it.

    Where the device draws, a step is launched before the tokens of the last one are read, so that the device
    does not wait for the host. That a sequence has ended is then seen one step late: the token too many is
    dropped, and slot and blocks are kept until the step that writes to them is over.
    """

    def __init__(self, config: DecodeConfig, decoder: Decoder) -> None:
        super().__init__("decode-engine", POLL_SECONDS)
        self.config = config
        self.decoder = decoder
        self.pool = BlockPool(config.cache_tokens // BLOCK_TOKENS)
        self.arena = decoder.new_arena(self.pool.capacity, config.decoder.kv_format)
        self.steps = decoder.new_token_steps(self.arena, config.slots)
        self.landings = Landings(
            BlockCodec(decoder.config.fingerprint64, self.arena.layout, self.arena.layers),
        )
        self.metrics = DecodeMetrics()
        self.endpoint = ""
        """URI at which blocks land; set before the first sequence is submitted."""
        self._waiting: deque[Slot] = deque()
        self._reserved: list[Slot] = []
        """Granted slots whose blocks are on their way."""
        self._active: list[Slot] = []
        self._held: set[Slot] = set()
        """Granted slots whose blocks are not freed: also ended ones, while a step writes to them."""
        self._batches = StepBatches()
        self._launched: deque[_Launched] = deque()
        """Steps under way, the oldest first; between two calls of `step` at most one."""
        self._untold: list[tuple[Slot, Event]] = []
        self._told = float("-inf")
        """`time.monotonic()` when tokens were last passed on: of all streams at once, which wakes the server
        a few times less often than each stream's own time would."""

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Slots in use, those included whose blocks are on their way, or still written to."""
        return len(self._held)

    def submit(self, slot: Slot) -> None:
        """Take a sequence; its events come through `slot.emit`, from the engine's thread.

        Raises:
            Draining, QueueFull, PromptTooLong: the sequence is not taken, and nothing is emitted.
        """
        if slot.block_count > self.pool.capacity:
            wanted, limit = slot.block_count * BLOCK_TOKENS, self.pool.capacity * BLOCK_TOKENS
            raise PromptTooLong(
                f"prompt and answer need a capacity of {wanted} tokens; the cache here holds {limit}"
            )
        with self.changed:
            if self.draining:
                raise Draining("this decode worker takes no new sequence")
            if len(self._waiting) >= self.config.max_waiting:
                raise QueueFull(f"{len(self._waiting)} sequences wait already", RETRY_SECONDS)
            self._waiting.append(slot)
            self.changed.notify_all()

    def cancel(self, slot: Slot) -> None:
        """Free a sequence's slot at the next step's border; one that has ended stays as it is."""
        with self.changed:
            slot.cancelled = True
            self.changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a sequence is here."""
        return bool(self.running or self.waiting)

    def has_work(self) -> bool:
        """Whether a sequence can be granted, join, go on, or be ended."""
        now = time.monotonic()
        return (
            bool(self._active)
            or bool(self._launched)
            or self._can_grant()
            or any(slot.ready(now) for slot in self._reserved)
            or any(slot.cancelled for slot in (*self._waiting, *self._reserved))
        )

    def step(self) -> None:
        """Free what was dropped, let join what has landed, grant free slots, launch a step, read one."""
        self._drop_cancelled()
        self._join()
        self._grant()
        self._tell()
        ahead = self._launch()
        while len(self._launched) > ahead:
            self._land()
        if not self._active:
            self._tell()

    def fail(self, error: KvrelayError) -> None:
        """End every sequence with `error`."""
        for slot in self._slots():
            self._end(slot, error)
        while self._launched:
            try:
                self._land()
            except Exception:
                log.exception("a step was lost")
        self._tell()

    def _tell(self) -> None:
        """Emit what has happened; whoever listens has the interpreter while a step computes."""
        events, self._untold = self._untold, []
        for slot, event in events:
            slot.emit(event)

    def _slots(self) -> tuple[Slot, ...]:
        with self.changed:
            return (*self._active, *self._reserved, *self._waiting)

    def _can_grant(self) -> bool:
        return (
            bool(self._waiting)
            and self.running < self.config.slots
            and self.pool.can_allocate(self._waiting[0].block_count)
        )

    def _drop_cancelled(self) -> None:
        for slot in self._slots():
            if slot.cancelled:
                self._end(slot, Cancelled("the sequence was dropped"))

    def _grant(self) -> None:
        while self._can_grant():
            with self.changed:
                slot = self._waiting.popleft()
            self._held.add(slot)
            slot.blocks = self.pool.allocate(slot.block_count)
            slot.deadline = time.monotonic() + self.config.lease_seconds
            keys = prefix_keys(
                slot.prompt_ids + slot.answer_ids,
                self.landings.codec.model,
                self.arena.layout.fingerprint,
                len(slot.prompt_ids),
            )

            def write(layer: int, index: int, payload: memoryview, blocks: list[int] = slot.blocks) -> None:
                self.arena.write_block(layer, blocks[index], payload)

            slot.arrived = self.landings.expect(slot.lease_id, slot.length, keys, write)
            slot.arrived.add_done_callback(lambda _: self.wake())
            self._reserved.append(slot)
            lease = Lease(lease_id=slot.lease_id, endpoint=self.endpoint)
            reserved = pb.Reserved(lease=lease, max_tokens=slot.max_tokens)
            self._untold.append((slot, pb.DecodeResponse(reserved=reserved)))

    def _join(self) -> None:
        now = time.monotonic()
        for slot in tuple(self._reserved):
            if slot.arrived is None or not slot.arrived.done():
                self._watch(slot, now)
                continue
            error = slot.arrived.exception()
            if error is not None:
                self._end(slot, error if isinstance(error, KvrelayError) else Internal(str(error)))
                continue
            arrival = slot.arrived.result()
            self._reserved.remove(slot)
            self._active.append(slot)
            self.metrics.requests += 1
            self.metrics.blocks_moved += arrival.blocks
            self.metrics.bytes_moved += arrival.bytes
            slot.answer_ids.append(arrival.first_token)
            self.steps.join(slot)
            joined = pb.Joined(blocks=arrival.blocks, bytes=arrival.bytes)
            self._untold.append((slot, pb.DecodeResponse(joined=joined)))
            self._end_if_finished(slot)

    def _watch(self, slot: Slot, now: float) -> None:
        """Move the deadline of a slot whose blocks keep coming; take the slot back once it has passed."""
        if now < slot.deadline:
            return
        landed = self.landings.find(slot.lease_id).landed
        if landed > slot.landed:
            slot.landed, slot.deadline = landed, now + self.config.lease_seconds
        else:
            self._end(slot, LeaseLost(f"no block came for {self.config.lease_seconds:g} s"))

    def _launch(self) -> int:
        """Launch a step of all sequences that have a next token; gives how many steps may stay under way."""
        slots = tuple(slot for slot in self._active if slot.has_next)
        if not slots:
            return 0
        try:
            flight = self.steps.launch(self._batches(slots), slots)
        except KernelError as error:
            log.warning("a decode step failed: %s", error)
            for slot in slots:
                self._end(slot, _internal(error))
            return 0
        for slot in slots:
            slot.ahead += 1
        self._launched.append(_Launched(slots, flight))
        return 0 if flight.done else 1

    def _land(self) -> None:
        """Wait for the oldest step under way, and pass its tokens on."""
        launched = self._launched.popleft()
        outcomes: list[Outcome] = []
        try:
            outcomes = launched.flight.wait()
        except KernelError as error:
            log.warning("a decode step failed: %s", error)
            outcomes = [error] * len(launched.slots)
        finally:
            active = set(self._active)
            for slot in launched.slots:
                slot.ahead -= 1
                if slot not in active and not slot.ahead:
                    self._free(slot)
        landed = [pair for pair in zip(launched.slots, outcomes, strict=True) if pair[0] in active]
        self.metrics.tokens.add(sum(isinstance(outcome, Sampled) for _, outcome in landed))
        now = time.monotonic()
        due = now - self._told >= self.config.stream_seconds
        if due:
            self._told = now
        for slot, outcome in landed:
            if isinstance(outcome, KernelError):
                log.warning("a sequence failed: %s", outcome, extra={"request_id": slot.request_id})
                self._end(slot, _internal(outcome))
            else:
                self._take(slot, outcome, due)

    def _take(self, slot: Slot, drawn: Sampled, due: bool) -> None:
        slot.answer_ids.append(drawn.token_id)
        slot.drawn.append(_message(drawn))
        if due or not slot.begun:
            slot.begun = True
            self._pass_tokens(slot)
        self._end_if_finished(slot)

    def _pass_tokens(self, slot: Slot) -> None:
        if slot.drawn:
            tokens = pb.DecodedTokens(tokens=slot.drawn)
            self._untold.append((slot, pb.DecodeResponse(tokens=tokens)))
            slot.drawn = []

    def _end_if_finished(self, slot: Slot) -> None:
        reason = slot.finish_reason
        if reason is not None:
            self._pass_tokens(slot)
            self._untold.append((slot, pb.DecodeResponse(finished=pb.Finished(reason=reason))))
            self._end(slot, None)

    def _end(self, slot: Slot, error: KvrelayError | None) -> None:
        """Forget a sequence, refuse late blocks of its lease, and free its slot once no step has it."""
        with self.changed:
            if slot in self._waiting:
                self._waiting.remove(slot)
        for group in (self._reserved, self._active):
            if slot in group:
                group.remove(slot)
        self.landings.close(slot.lease_id, error)
        self._pass_tokens(slot)
        self._untold.append((slot, error))
        if not slot.ahead:
            self._free(slot)

    def _free(self, slot: Slot) -> None:
        self.steps.leave(slot)
        self.pool.release(slot.blocks)
        slot.blocks = []
        self._held.discard(slot)
        self.wake()


def _internal(error: KernelError) -> Internal:
    return Internal(f"{type(error).__name__}: {error}")


def _message(drawn: Sampled) -> SampledToken:
    top = [TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in drawn.top]
    return SampledToken(token_id=drawn.token_id, logprob=drawn.logprob, top=top)
