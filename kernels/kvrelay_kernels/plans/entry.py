"""A plan as a store keeps it: behind its whole key, so that it cannot be taken for another's."""

import hashlib
import struct

from kvrelay_kernels.plans.key import GraphKey

_HEADER = struct.Struct(">4sIIQ")
"""Magic, version, bytes of the key, bytes of the plan; then key, plan and a digest over everything before."""

_MAGIC = b"KVPL"
_VERSION = 1
_DIGEST_BYTES = 16


def pack(key: GraphKey, plan: bytes) -> bytes:
    """The entry of a plan."""
    head = _HEADER.pack(_MAGIC, _VERSION, len(key.encoded), len(plan))
    body = b"".join((head, key.encoded, plan))
    return body + _digest(body)


def unpack(key: GraphKey, entry: bytes) -> bytes | None:
    """The plan of an entry; None where it is cut short, changed, of another version or of another key."""
    if len(entry) < _HEADER.size + _DIGEST_BYTES:
        return None
    body, digest = entry[:-_DIGEST_BYTES], entry[-_DIGEST_BYTES:]
    plan = body[_HEADER.size + len(key.encoded) :]
    expected = _HEADER.pack(_MAGIC, _VERSION, len(key.encoded), len(plan)) + key.encoded
    return plan if body.startswith(expected) and digest == _digest(body) else None


def _digest(body: bytes) -> bytes:
    return hashlib.blake2b(body, digest_size=_DIGEST_BYTES).digest()
