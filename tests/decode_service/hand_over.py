"""Blocks of a sequence, landed as the prefill pool sends them; their contents are zeros."""

from decode_service.engine import DecodeEngine
from decode_service.slot import Slot
from kv_transfer.prefix import prefix_keys
from kvrelay.v1.transfer_pb2 import Commit
from kvrelay_kernels.quant import BLOCK_TOKENS


def land(engine: DecodeEngine, slot: Slot, first_token: int, share: float = 1.0) -> tuple[bool, Commit]:
    """Land some of a granted slot's blocks; gives whether all are in, and the commit that would end it."""
    codec = engine.landings.codec
    tokens, ids = slot.length, slot.prompt_ids + slot.answer_ids
    keys = prefix_keys(ids, codec.model, codec.layout.fingerprint, len(slot.prompt_ids))
    landing = engine.landings.find(slot.lease_id)
    places = [(layer, index) for layer in range(codec.layers) for index in range(len(keys))]
    payload = memoryview(bytes(codec.layout.block_bytes))
    for layer, index in places[: max(1, int(share * len(places)))]:
        start = index * BLOCK_TOKENS
        header = codec.header(layer, start, min(BLOCK_TOKENS, tokens - start), keys[index])
        landing.land(b"".join(codec.encode(header, payload)))
    commit = Commit(lease_id=slot.lease_id, blocks=len(places), tokens=tokens, first_token=first_token)
    return landing.landed == len(places), commit


def hand_over(engine: DecodeEngine, slot: Slot, first_token: int) -> None:
    """Land a granted slot whole: it joins at the engine's next step."""
    whole, commit = land(engine, slot, first_token)
    assert whole
    engine.landings.find(slot.lease_id).commit(commit)
