"""A recorded step of decode has the bits of the same operations done one by one, on the cpu backend."""

from pathlib import Path

import numpy as np
import pytest

from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.registry import load_backend
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from model_runtime.steps import sequence_steps
from tests.model_runtime.conftest import reference_decoder
from tests.model_runtime.families import CONFIGS, prompt, random_tensors, write_folder

PASTS = [[0], [5, 300, 64], [1, 2, 3, 63, 64, 65, 127, 128, 129, 250, 7]]


def grown(decoder: Decoder, past: list[int], kv_format: str, one_by_one: bool) -> list[np.ndarray]:
    """Logits of a few decode steps behind prompts of these lengths."""
    rng = np.random.default_rng(len(past))
    found: list[np.ndarray] = []
    capacity = sequence_steps([n + 8 for n in past], [0] * len(past))
    arena = decoder.new_arena(capacity[1], kv_format)
    tables = capacity[0].block_tables
    if any(past):
        lengths = [max(1, n) for n in past]
        ids = [token for n in lengths for token in prompt(n)]
        batch = sequence_steps(lengths, [0] * len(past), ids)[0]
        batch.block_tables[:] = tables[:, : batch.block_tables.shape[1]]
        decoder.forward(batch, arena)
    for step in range(4):
        ids = rng.integers(0, decoder.config.vocabulary, len(past)).tolist()
        batch = sequence_steps([1] * len(past), [n + step for n in past], ids)[0]
        batch.block_tables[:] = tables[:, : batch.block_tables.shape[1]]
        assert batch.plain
        on_layer = (lambda layer: None) if one_by_one else None
        found.append(decoder.forward(batch, arena, on_layer).copy())
    return found


CASES = [(family, "none") for family in CONFIGS]
CASES += [(family, "int8") for family, config in CONFIGS.items() if config["head_dim"] % 32 == 0]


@pytest.mark.parametrize(("family", "kv_format"), CASES)
def test_recorded_steps_have_the_same_bits(family: str, kv_format: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CONFIGS[family], random_tensors(CONFIGS[family]))
    reference = reference_decoder(folder)
    for threads in (1, 2):
        decoder = Decoder(load_model(folder), load_backend("cpu", threads=threads), "float")
        for past in PASTS:
            recorded = grown(decoder, past, kv_format, one_by_one=False)
            for a, b in zip(recorded, grown(decoder, past, kv_format, one_by_one=True), strict=True):
                np.testing.assert_array_equal(a, b)
            if kv_format == "none":
                for a, b in zip(recorded, grown(reference, past, kv_format, one_by_one=False), strict=True):
                    np.testing.assert_allclose(a, b, atol=2e-3)


@pytest.mark.parametrize("weights", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_recorded_steps_on_codes_have_the_same_bits(family: str, weights: WeightMode, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CONFIGS[family], random_tensors(CONFIGS[family]))
    decoder = Decoder(load_model(folder), load_backend("cpu", threads=2), weights)
    for past in PASTS:
        recorded = grown(decoder, past, "none", one_by_one=False)
        for a, b in zip(recorded, grown(decoder, past, "none", one_by_one=True), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_token_outside_the_vocabulary_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CONFIGS["llama"], random_tensors(CONFIGS["llama"]))
    decoder = Decoder(load_model(folder), load_backend("cpu", threads=1), "float")
    arena = decoder.new_arena(1, "none")
    decoder.forward(sequence_steps([1], [0], [3])[0], arena)
    for token in (-1, decoder.config.vocabulary):
        with pytest.raises(IndexError, match="token ids"):
            decoder.forward(sequence_steps([1], [1], [token])[0], arena)
