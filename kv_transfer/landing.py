"""The decode worker's side of every channel: blocks are checked, written into the arena, and counted."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Lock

from kv_transfer.block import BlockCodec, BlockHeader
from kvrelay.errors import BlockCorrupt, BlockMismatch, Internal, KvrelayError, LeaseLost, TransportLost
from kvrelay.v1.transfer_pb2 import Commit
from kvrelay_kernels.quant import BLOCK_TOKENS

WriteBlock = Callable[[int, int, memoryview], None]
"""`write(layer, index, payload)`: copy the block of that index in the sequence into the arena."""


@dataclass(frozen=True)
class Arrival:
    """A whole prompt that has landed."""

    blocks: int
    bytes: int
    """Bytes that came, headers included."""
    tokens: int
    first_token: int


class Landing:
    """One lease that waits for its blocks. Thread-safe; `Landings` makes it."""

    def __init__(
        self, lease_id: str, codec: BlockCodec, tokens: int, keys: Sequence[bytes], write: WriteBlock
    ) -> None:
        self.lease_id = lease_id
        self.arrived: Future[Arrival] = Future()
        """Done when the commit has been checked, or the lease has failed; it cannot be cancelled."""
        self.arrived.set_running_or_notify_cancel()
        self._codec = codec
        self._tokens = tokens
        self._keys = keys
        self._write = write
        self._lock = Lock()
        self._ended: KvrelayError | None = None
        self._landed: dict[tuple[int, int], int] = {}
        self._bytes = 0

    @property
    def expected(self) -> int:
        """Blocks of all layers together."""
        return self._codec.layers * len(self._keys)

    @property
    def landed(self) -> int:
        """Blocks that are in."""
        return len(self._landed)

    def land(self, message: bytes | memoryview) -> None:
        """Check and write the whole blocks in `message`.

        Raises:
            BlockCorrupt, BlockMismatch: a block is not what was agreed; the lease has failed.
            LeaseLost: the lease has ended before, or whatever it failed with.
        """
        try:
            for header, payload in self._codec.decode_all(message):
                self.put(header, payload)
        except KvrelayError as error:
            self.fail(error)
            raise

    def put(self, header: BlockHeader, payload: memoryview) -> None:
        """Write a block that the codec has decoded; raises as `land` does."""
        try:
            with self._lock:
                self._raise_if_ended()
                self._place(header, payload)
        except KvrelayError as error:
            self.fail(error)
            raise

    def commit(self, commit: Commit) -> Arrival:
        """Check that every block of every layer is in, and complete `arrived`.

        Raises:
            BlockCorrupt: blocks are missing, or the commit's counts are others; the lease has failed.
            LeaseLost: the lease has ended before, or whatever it failed with.
        """
        with self._lock:
            self._raise_if_ended()
            error = self._incomplete(commit)
            arrival = Arrival(self.landed, self._bytes, commit.tokens, commit.first_token)
            self._ended = error or LeaseLost(f"the lease {self.lease_id} is committed")
        if error is not None:
            self.arrived.set_exception(error)
            raise error
        self.arrived.set_result(arrival)
        return arrival

    def fail(self, error: KvrelayError) -> None:
        """End the lease with `error`, unless it has ended. Nothing is written after this returns."""
        with self._lock:
            if self._ended is not None:
                return
            self._ended = error
        self.arrived.set_exception(error)

    def abandoned(self) -> TransportLost:
        """The error of a hand-over that ended without a commit."""
        landed = f"{self.landed} of {self.expected} blocks"
        return TransportLost(
            f"the hand-over of lease {self.lease_id} ended before its commit, after {landed}"
        )

    def _raise_if_ended(self) -> None:
        if self._ended is not None:
            raise self._ended

    def _place(self, header: BlockHeader, payload: memoryview) -> None:
        layer, index = header.layer, header.index
        name = f"layer {layer} block {index} of lease {self.lease_id}"
        if index >= len(self._keys):
            raise BlockCorrupt(f"{name}: the sequence has {len(self._keys)} blocks")
        count = min(BLOCK_TOKENS, self._tokens - header.token_start)
        if header.token_count != count:
            raise BlockCorrupt(f"{name} holds {header.token_count} tokens, not {count}")
        if header.key != self._keys[index]:
            raise BlockMismatch(f"{name} is of the prefix {header.key.hex()}, not {self._keys[index].hex()}")
        before = self._landed.get((layer, index))
        if before is None:
            try:
                self._write(layer, index, payload)
            except Exception as error:
                raise Internal(f"{name} could not be written: {error}") from error
            self._landed[layer, index] = header.checksum
            self._bytes += self._codec.block_bytes
        elif before != header.checksum:
            raise BlockCorrupt(f"{name} came twice, with checksum {before:#018x} and {header.checksum:#018x}")

    def _incomplete(self, commit: Commit) -> KvrelayError | None:
        if commit.lease_id != self.lease_id:
            return BlockCorrupt(f"a commit of lease {commit.lease_id} in the hand-over of {self.lease_id}")
        if (commit.blocks, commit.tokens) != (self.expected, self._tokens):
            told = f"{commit.blocks} blocks of {commit.tokens} tokens"
            agreed = f"{self.expected} of {self._tokens}"
            return BlockCorrupt(f"lease {self.lease_id}: {told} committed, {agreed} expected")
        if self.landed == self.expected:
            return None
        every = ((layer, index) for layer in range(self._codec.layers) for index in range(len(self._keys)))
        missing = [f"layer {place[0]} block {place[1]}" for place in every if place not in self._landed]
        named = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
        count = f"{len(missing)} of {self.expected} blocks"
        return BlockCorrupt(f"lease {self.lease_id}: {count} are missing: {named}")


class Landings:
    """The leases of one decode worker that wait for blocks; each leaves when it is done. Thread-safe."""

    def __init__(self, codec: BlockCodec) -> None:
        self.codec = codec
        self._waiting: dict[str, Landing] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._waiting)

    def expect(self, lease_id: str, tokens: int, keys: Sequence[bytes], write: WriteBlock) -> Future[Arrival]:
        """Wait for the blocks of a lease.

        Args:
            lease_id: unique among the leases of this worker.
            tokens: tokens that the blocks hold.
            keys: `prefix_keys` of these tokens: blocks of another prompt are refused.
            write: called under the lease's lock by whichever thread receives; a short copy.

        Returns:
            The arrival, or the error of the tree that ended the lease. It cannot be cancelled: `close` it.
        """
        if len(keys) != -(-tokens // BLOCK_TOKENS):
            raise ValueError(f"{len(keys)} keys for {tokens} tokens")
        landing = Landing(lease_id, self.codec, tokens, keys, write)
        with self._lock:
            if lease_id in self._waiting:
                raise ValueError(f"the lease {lease_id} is expected already")
            self._waiting[lease_id] = landing
        landing.arrived.add_done_callback(lambda _: self._forget(lease_id))
        return landing.arrived

    def find(self, lease_id: str) -> Landing:
        """The landing of a lease. Raises LeaseLost where it is unknown, has ended or was closed."""
        landing = self._waiting.get(lease_id)
        if landing is None:
            raise LeaseLost(f"the lease {lease_id} is unknown, was released, or ran out")
        return landing

    def close(self, lease_id: str, error: KvrelayError | None = None) -> None:
        """Take no more blocks of a lease; when this returns, `write` is not called again.

        `error` (default: LeaseLost) is what the lease's future and its sender are told. Does nothing
        after the end.
        """
        landing = self._waiting.get(lease_id)
        if landing is not None:
            landing.fail(error or LeaseLost(f"the lease {lease_id} was released"))

    def fail_all(self, error: KvrelayError) -> None:
        """End every waiting lease with `error`."""
        for landing in list(self._waiting.values()):
            landing.fail(error)

    def _forget(self, lease_id: str) -> None:
        with self._lock:
            self._waiting.pop(lease_id, None)
