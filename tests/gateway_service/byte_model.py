"""A model for tests whose tokens are bytes: nothing to load, and every text is easy to foresee."""

import codecs
from collections.abc import Mapping, Sequence

from gateway_service.model import ServedModel
from model_runtime.config import ModelConfig

BOS, EOS, TURN = 256, 257, 258
VOCABULARY = 260
CONTEXT = 2048
FIRST_LETTER, LETTERS = ord("a"), 26


class ByteTokenizer:
    """Ids below 256 are bytes; BOS, EOS and TURN are special."""

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        ids: list[int] = []
        for part in text.split("<turn>"):
            ids += [*part.encode(), TURN]
        return [BOS, *ids[:-1]] if add_special else ids[:-1]

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        turns = [f"<turn>{message['role']}\n{message['content']}" for message in messages]
        return "".join(turns) + "<turn>assistant\n"

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        if token_id >= 256:
            return b"" if skip_special else f"<{token_id}>".encode()
        return bytes([token_id])

    def detokenizer(self) -> "ByteDetokenizer":
        return ByteDetokenizer()


class ByteDetokenizer:
    """Bytes to whole characters."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id])) if token_id < 256 else ""


def byte_model() -> ServedModel:
    """The model, as a gateway serves it."""
    config = ModelConfig(
        name="bytes",
        family="llama",
        vocabulary=VOCABULARY,
        hidden=8,
        layers=1,
        heads=1,
        kv_heads=1,
        head_dim=8,
        intermediate=8,
        context=CONTEXT,
        norm_eps=1e-5,
        rope_base=1e4,
        rope_scaling=None,
        local_rope_base=None,
        windows=(None,),
        attention_scale=1.0,
        activation="silu",
        qk_norm=False,
        post_norms=False,
        qkv_bias=False,
        embedding_scale=1.0,
        tied_embeddings=True,
        bos_id=BOS,
        stop_ids=(EOS,),
        fingerprint="bytes-1",
    )
    return ServedModel("bytes", config, "int8", ByteTokenizer())
