"""Every cache format on its way through both pools: the answer is that of a decoder by itself."""

from pathlib import Path

import numpy as np
import pytest

from kvrelay.v1.sampling_pb2 import SamplingParams
from kvrelay_kernels.quant.formats import KNOWN
from model_runtime.decoder import Decoder
from model_runtime.opening import open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent
from model_runtime.steps import sequence_steps
from tests.pools import decode_worker, prefill_worker, relay
from tests.tiny_model import POISON, write_tiny_model

TOKENS = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model."""
    return write_tiny_model(tmp_path_factory.mktemp("formats"))


@pytest.fixture(scope="module")
def decoder(model: Path) -> Decoder:
    """The same, without any pool."""
    return open_decoder(DecoderOptions(str(model), threads=1), silent)


def alone(decoder: Decoder, kv_format: str, ids: list[int]) -> list[int]:
    """The likeliest tokens, from one arena."""
    arena, past, answer = decoder.new_arena(4, kv_format), 0, list[int]()
    pending = ids
    for _ in range(TOKENS):
        batch, _ = sequence_steps([len(pending)], [past], pending)
        past += len(pending)
        answer.append(int(decoder.forward(batch, arena)[0].argmax()))
        pending = answer[-1:]
    return answer


@pytest.mark.parametrize("kv_format", KNOWN)
def test_blocks_of_every_format_are_handed_over(model: Path, decoder: Decoder, kv_format: str) -> None:
    ids = np.random.default_rng(3).integers(3, POISON, 150).tolist()
    params = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    settings = {"kv_format": kv_format}
    with (
        prefill_worker(model, chunk_tokens=96, **settings) as prefill,
        decode_worker(model, **settings) as decode,
    ):
        answer = relay(prefill, decode, ids, params)
        assert answer.ids == alone(decoder, kv_format, ids)
        blocks = 3 * decoder.config.layers  # 150 tokens in each layer
        assert answer.blocks == blocks
        assert answer.bytes >= blocks * decoder.layout(kv_format).block_bytes
        prefill.assert_idle()
        decode.assert_idle()
