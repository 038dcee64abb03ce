"""What the senders of all channels share: a bounded queue that a thread drains while prefill computes."""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from threading import Condition, Thread
from time import perf_counter
from typing import TypeVar
from weakref import WeakSet

from kv_transfer.block import BlockCodec, BlockHeader
from kv_transfer.channel import Channel, Handover, Sender
from kvrelay.errors import Cancelled, Internal, KvrelayError, TransportLost
from kvrelay.v1.transfer_pb2 import Commit

MESSAGE_BYTES = 1 << 20
QUEUE_BYTES = 32 << 20
STALL_SECONDS = 10.0
"""A peer that takes nothing for so long while the queue is full is lost: it must not hold an engine up."""

EncodedBlock = tuple[BlockHeader, bytes, memoryview]
"""A block's header, the same as bytes, and its payload."""

M = TypeVar("M")


class QueuedSender(Sender):
    """A sender whose blocks leave in messages of about `MESSAGE_BYTES`, made by the thread that drains it.

    A message is made once that much is waiting, or at the commit: few wake-ups while prefill computes,
    and at the end at most one message is left to send.
    """

    def __init__(self, codec: BlockCodec, lease_id: str) -> None:
        self.lease_id = lease_id
        self._codec = codec
        self._per_message = max(1, MESSAGE_BYTES // codec.block_bytes)
        self._capacity = max(self._per_message, QUEUE_BYTES // codec.block_bytes)
        self._queue: deque[tuple[BlockHeader, memoryview]] = deque()
        self._changed = Condition()
        self._packing = False
        self._commit: Commit | None = None
        self._committed_at = 0.0
        self._error: KvrelayError | None = None
        self._ended = False
        self._done: Future[Handover] = Future()
        self._done.set_running_or_notify_cancel()
        self._blocks = 0
        self._blocked = 0.0

    def send(self, header: BlockHeader, payload: memoryview) -> None:
        """As the contract says."""
        if payload.nbytes != self._codec.layout.block_bytes:
            raise ValueError(f"a payload of {payload.nbytes} bytes, not {self._codec.layout.block_bytes}")
        if not self._wait_for_room():
            self._fail(TransportLost(f"nothing of lease {self.lease_id} was taken for {STALL_SECONDS:.0f} s"))
        with self._changed:
            self._raise_if_ended()
            self._queue.append((header, payload))
            self._blocks += 1
            if len(self._queue) >= self._per_message:
                self._changed.notify_all()

    def commit(self, tokens: int, first_token: int) -> Future[Handover]:
        """As the contract says."""
        with self._changed:
            self._raise_if_ended()
            self._committed_at = perf_counter()
            self._commit = Commit(
                lease_id=self.lease_id, blocks=self._blocks, tokens=tokens, first_token=first_token
            )
            self._changed.notify_all()
        return self._done

    def abort(self) -> None:
        """As the contract says."""
        self._fail(Cancelled(f"the hand-over of lease {self.lease_id} was given up"))

    @abstractmethod
    def _cancel(self) -> None:
        """Stop whatever drains the queue; called once, and only if the hand-over fails. Must not wait."""

    def _messages(self, pack: Callable[[list[EncodedBlock]], M]) -> Iterator[M]:
        """What `pack` makes of the next blocks, until all have gone or the hand-over fails.

        Payloads are read inside `pack` only, so that afterwards nobody needs them.
        """
        while True:
            with self._changed:
                self._changed.wait_for(self._has_message)
                count = min(len(self._queue), self._per_message)
                if self._error is not None or not count:
                    return
                taken = [self._queue.popleft() for _ in range(count)]
                self._packing = True
                self._changed.notify_all()
            try:
                message = pack([(header, *self._codec.encode(header, payload)) for header, payload in taken])
            finally:
                with self._changed:
                    self._packing = False
                    self._changed.notify_all()
            yield message

    def _wait_for_room(self) -> bool:
        with self._changed:
            if self._has_room():
                return True
            began = perf_counter()
            in_time = self._changed.wait_for(self._has_room, STALL_SECONDS)
            self._blocked += perf_counter() - began
        return in_time

    def _has_room(self) -> bool:
        return len(self._queue) < self._capacity or self._error is not None

    def _has_message(self) -> bool:
        return len(self._queue) >= self._per_message or self._commit is not None or self._error is not None

    def _succeed(self, sent_bytes: int) -> None:
        """Everything has been taken."""
        seconds = self._blocked + perf_counter() - self._committed_at
        with self._changed:
            if self._ended:
                return
            self._ended = True
        self._done.set_result(Handover(self._blocks, sent_bytes, seconds))

    def _fail(self, error: KvrelayError) -> None:
        """End the hand-over, unless it has ended; payloads are not read after this returns."""
        with self._changed:
            if self._ended:
                return
            self._ended = True
            self._error = error
            self._queue.clear()
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._packing)
        self._cancel()
        self._done.set_exception(error)

    def _raise_if_ended(self) -> None:
        if self._error is not None:
            self._changed.wait_for(lambda: not self._packing)
            raise self._error
        if self._commit is not None:
            raise ValueError(f"the hand-over of lease {self.lease_id} is committed")


class ThreadSender(QueuedSender):
    """A queued sender with a thread of its own, which delivers one message after the other."""

    def __init__(self, codec: BlockCodec, lease_id: str) -> None:
        super().__init__(codec, lease_id)
        self.thread = Thread(target=self._run, name=f"kv-send-{lease_id}", daemon=True)
        """Ends with the hand-over; `ThreadChannel` starts it."""

    def _run(self) -> None:
        self._hand_over()
        # Whoever gives up or fails must not wait for the peer, so that this thread tells it.
        if self._error is not None:
            with suppress(KvrelayError):
                self._retract()

    def _hand_over(self) -> None:
        sent = 0
        try:
            for blocks in self._messages(_copied):
                sent += self._deliver(blocks)
            if self._error is None and self._commit is not None:
                self._conclude(self._commit)
                self._succeed(sent)
        except KvrelayError as error:
            self._fail(error)
        except Exception as error:
            self._fail(Internal(f"the hand-over of lease {self.lease_id} failed: {error!r}"))

    @abstractmethod
    def _deliver(self, blocks: list[tuple[BlockHeader, bytes]]) -> int:
        """Hand over some blocks; returns the bytes that went over the wire."""

    @abstractmethod
    def _conclude(self, commit: Commit) -> None:
        """Hand over the commit."""

    @abstractmethod
    def _retract(self) -> None:
        """Tell the receiver that the hand-over has failed."""

    def _cancel(self) -> None:
        pass


class ThreadChannel(Channel):
    """A channel whose senders have threads of their own."""

    def __init__(self) -> None:
        self._running: WeakSet[ThreadSender] = WeakSet()

    def open(self, lease_id: str) -> Sender:
        """As the contract says."""
        sender = self._sender(lease_id)
        self._running.add(sender)
        sender.thread.start()
        return sender

    def close(self) -> None:
        """As the contract says; waits for the senders' threads."""
        for sender in list(self._running):
            sender.abort()
            sender.thread.join()

    @abstractmethod
    def _sender(self, lease_id: str) -> ThreadSender:
        """A new sender, its thread not started."""


def _copied(blocks: list[EncodedBlock]) -> list[tuple[BlockHeader, bytes]]:
    return [(header, b"".join((head, payload))) for header, head, payload in blocks]
