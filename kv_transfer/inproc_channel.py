"""The channel within one process: the same bytes, handed from thread to thread."""

from urllib.parse import urlsplit

from kv_transfer.block import BlockCodec, BlockHeader
from kv_transfer.channel import Channel
from kv_transfer.landing import Landings
from kv_transfer.queued import ThreadChannel, ThreadSender
from kvrelay.errors import TransportLost
from kvrelay.v1.transfer_pb2 import Commit


class InprocHub:
    """The receivers of one process, by name. Its `channel` is the transport of the scheme `inproc`."""

    def __init__(self) -> None:
        self._receivers: dict[str, Landings] = {}

    def listen(self, name: str, landings: Landings) -> str:
        """Receive for `landings`; returns the endpoint's URI."""
        self._receivers[name] = landings
        return f"inproc://{name}"

    def forget(self, name: str) -> None:
        """Stop receiving."""
        self._receivers.pop(name, None)

    def find(self, name: str) -> Landings:
        """The receiver called `name`. Raises TransportLost."""
        landings = self._receivers.get(name)
        if landings is None:
            raise TransportLost(f"nobody receives at inproc://{name}")
        return landings

    def channel(self, endpoint: str, codec: BlockCodec) -> Channel:
        """The channel to an endpoint of this hub."""
        return _InprocChannel(self, urlsplit(endpoint).netloc, codec)


class _InprocChannel(ThreadChannel):
    def __init__(self, hub: InprocHub, name: str, codec: BlockCodec) -> None:
        super().__init__()
        self._hub, self._name, self._codec = hub, name, codec

    def _sender(self, lease_id: str) -> ThreadSender:
        return _InprocSender(self._codec, lease_id, self._hub, self._name)


class _InprocSender(ThreadSender):
    def __init__(self, codec: BlockCodec, lease_id: str, hub: InprocHub, name: str) -> None:
        super().__init__(codec, lease_id)
        self._hub, self._name = hub, name

    def _deliver(self, blocks: list[tuple[BlockHeader, bytes]]) -> int:
        landing = self._hub.find(self._name).find(self.lease_id)
        for _, block in blocks:
            landing.land(block)
        return sum(len(block) for _, block in blocks)

    def _conclude(self, commit: Commit) -> None:
        self._hub.find(self._name).find(self.lease_id).commit(commit)

    def _retract(self) -> None:
        landing = self._hub.find(self._name).find(self.lease_id)
        landing.fail(landing.abandoned())
