"""The forward pass of every family against plain float64 NumPy and against transformers."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from kvrelay.errors import ModelFileInvalid
from kvrelay_kernels.errors import FormatUnsupported, NonFiniteActivations
from model_runtime.checkpoint import load_model
from model_runtime.config import ModelConfig
from model_runtime.decoder import Decoder
from model_runtime.steps import sequence_steps
from tests.model_runtime import plain
from tests.model_runtime.conftest import reference_decoder, run_chunks
from tests.model_runtime.families import CONFIGS, prompt, random_tensors, write_folder
from tests.model_runtime.gguf_files import write_gguf

LENGTH = 150
FIXTURES = Path(__file__).parent.parent / "fixtures"
TRANSFORMERS = {case["name"]: case for case in json.loads((FIXTURES / "families.json").read_text())["cases"]}


def all_logits(decoder: Decoder, ids: list[int]) -> NDArray[np.float32]:
    """Logits of every position, `[len(ids), vocabulary]`, in one step."""
    batch, blocks = sequence_steps([len(ids)], [0], ids)
    batch = dataclasses.replace(batch, logit_rows=np.arange(len(ids), dtype=np.int32))
    return decoder.forward(batch, decoder.new_arena(blocks, "none"))


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    """The tiny Mistral: a window, so that blocks behind it are skipped."""
    config = CONFIGS["mistral"]
    return reference_decoder(write_folder(tmp_path / "mistral", config, random_tensors(config)))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_a_family_is_exact(family: str, kind: str, tmp_path: Path) -> None:
    config = dict(CONFIGS[family])
    if kind == "gguf":
        # The format has no place for another scale than the head dimension's.
        config["query_pre_attn_scalar"] = config["head_dim"]
    tensors = random_tensors(config)
    write: Any = write_folder if kind == "folder" else write_gguf
    found = all_logits(reference_decoder(write(tmp_path / "model", config, tensors)), prompt(LENGTH))
    expected = plain.forward(config, tensors, prompt(LENGTH))
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_agrees(family: str, tmp_path: Path) -> None:
    config, case = CONFIGS[family], TRANSFORMERS[family]
    folder = write_folder(tmp_path / "model", config, random_tensors(config))
    found = all_logits(reference_decoder(folder), prompt(LENGTH))
    assert found.argmax(1).tolist() == case["argmax"]
    for position, logits in case["logits"].items():
        np.testing.assert_allclose(found[int(position), : len(logits)], logits, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3"])
def test_a_quantized_file_means_what_it_dequantizes_to(family: str, tmp_path: Path) -> None:
    config = {**CONFIGS[family], "query_pre_attn_scalar": CONFIGS[family]["head_dim"]}
    tensors = random_tensors(config)
    path = write_gguf(tmp_path / "model.gguf", config, tensors, GGMLQuantizationType.Q8_0)
    decoder = reference_decoder(path)
    rounded = {
        name: _through_q8_0(values) if values.ndim == 2 else values for name, values in tensors.items()
    }
    found = all_logits(decoder, prompt(40))
    np.testing.assert_allclose(found, plain.forward(config, rounded, prompt(40)), atol=2e-4)


def _through_q8_0(values: NDArray[Any]) -> NDArray[np.float32]:
    blocks = values.reshape(-1, 32)
    scales = (np.abs(blocks).max(1, keepdims=True) / 127).astype(np.float32)
    codes = np.rint(np.divide(blocks, scales, where=scales > 0, out=np.zeros_like(blocks)))
    return (codes * scales.astype(np.float16).astype(np.float32)).reshape(values.shape)


@pytest.mark.parametrize("kv_format", ["none", "int8", "int4-g32"])
@pytest.mark.parametrize("chunks", [[150], [64, 64, 22], [1] * 150, [63, 2, 85], [149, 1]])
def test_chunks_change_nothing(decoder: Decoder, kv_format: str, chunks: list[int]) -> None:
    ids = prompt(LENGTH)
    whole = run_chunks(decoder, decoder.new_arena(3, kv_format), ids, [LENGTH])
    cut = run_chunks(decoder, decoder.new_arena(3, kv_format), ids, chunks)
    np.testing.assert_allclose(cut[-1], whole[-1], atol=1e-3)


def test_company_changes_nothing(decoder: Decoder) -> None:
    counts, past = [1, 70, 5], [0, 0, 0]
    ids = prompt(sum(counts))
    batch, blocks = sequence_steps(counts, past, ids)
    together = decoder.forward(batch, decoder.new_arena(blocks, "none"))
    starts = np.cumsum([0, *counts])
    for row, (start, count) in enumerate(zip(starts, counts, strict=False)):
        alone, needed = sequence_steps([count], [0], ids[start : start + count])
        arena = decoder.new_arena(needed, "none")
        np.testing.assert_allclose(together[row], decoder.forward(alone, arena)[0], atol=1e-4)


@pytest.mark.parametrize("rows", [[], [0], [149], [10, 149], [148, 149], [149, 3, 3], list(range(150))])
def test_any_rows_give_logits(decoder: Decoder, rows: list[int]) -> None:
    ids = prompt(LENGTH)
    batch, blocks = sequence_steps([LENGTH], [0], ids)
    batch = dataclasses.replace(batch, logit_rows=np.array(rows, np.int32))
    found = decoder.forward(batch, decoder.new_arena(blocks, "none"))
    assert found.shape == (len(rows), decoder.config.vocabulary)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, all_logits(decoder, ids)[rows], atol=1e-4)


def test_sequences_without_wanted_rows_are_still_appended(decoder: Decoder) -> None:
    ids = prompt(90)
    batch, blocks = sequence_steps([40, 50], [0, 0], ids)
    arena = decoder.new_arena(blocks + 1, "none")
    second_only = dataclasses.replace(batch, logit_rows=batch.logit_rows[1:])
    first = decoder.forward(batch, decoder.new_arena(blocks, "none"))
    np.testing.assert_allclose(decoder.forward(second_only, arena), first[1:], atol=1e-4)
    follow, _ = sequence_steps([1], [40], [7])
    expected = all_logits(decoder, [*ids[:40], 7])[-1]
    np.testing.assert_allclose(decoder.forward(follow, arena)[0], expected, atol=1e-4)


@pytest.mark.parametrize("wanted", [[], [9]])
def test_each_layer_is_told_when_its_blocks_are_in(decoder: Decoder, wanted: list[int]) -> None:
    batch, blocks = sequence_steps([10], [0], prompt(10))
    batch = dataclasses.replace(batch, logit_rows=np.array(wanted, np.int32))
    arena = decoder.new_arena(blocks, "none")
    seen: list[tuple[int, bytes]] = []
    decoder.forward(batch, arena, lambda layer: seen.append((layer, bytes(arena.read_block(layer, 0)))))
    assert [layer for layer, _ in seen] == list(range(decoder.config.layers))
    assert all(block == bytes(arena.read_block(layer, 0)) and any(block) for layer, block in seen)


def test_nan_is_reported_with_its_sequence(tmp_path: Path) -> None:
    config, tensors = CONFIGS["llama"], random_tensors(CONFIGS["llama"])
    tensors["model.embed_tokens.weight"][9] = np.nan
    decoder = reference_decoder(write_folder(tmp_path / "model", config, tensors))
    batch, blocks = sequence_steps([3, 2, 2], [0, 0, 0], [4, 5, 6, 8, 9, 8, 7])
    with pytest.raises(NonFiniteActivations, match=r"row 4 \(sequence 1\)") as caught:
        decoder.forward(batch, decoder.new_arena(blocks, "none"))
    assert caught.value.sequences == {1}


def test_an_unknown_cache_format_is_refused(decoder: Decoder) -> None:
    with pytest.raises(FormatUnsupported, match="int9"):
        decoder.layout("int9")


def test_a_step_of_nothing(decoder: Decoder) -> None:
    batch, _ = sequence_steps([1], [0])
    empty = np.zeros(0, np.int32)
    batch = dataclasses.replace(
        batch,
        token_ids=empty,
        positions=empty,
        row_starts=np.zeros(1, np.int32),
        lengths=empty,
        logit_rows=empty,
    )
    assert decoder.forward(batch, decoder.new_arena(1, "none")).shape == (0, decoder.config.vocabulary)


def test_warming_up_tells_how_far_it_is(decoder: Decoder) -> None:
    told: list[tuple[str, int, int]] = []
    decoder.warm(
        decoder.new_arena(2, "int8"), chunk=512, sequences=4, progress=lambda *news: told.append(news)
    )
    assert told[-1][1] == told[-1][2]


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    config, tensors = CONFIGS["llama_tied"], random_tensors(CONFIGS["llama_tied"])
    here, there = (load_model(write_folder(tmp_path / name, config, tensors)) for name in ("here", "there"))
    tensors["model.norm.weight"][0] += 1
    changed = load_model(write_folder(tmp_path / "changed", config, tensors))
    assert here.config.fingerprint == there.config.fingerprint != changed.config.fingerprint
    assert here.config.fingerprint64 == there.config.fingerprint64


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["llama"])
    del tensors[name]
    with pytest.raises(ModelFileInvalid, match="missing"):
        load_model(write_folder(tmp_path / "model", CONFIGS["llama"], tensors))


def test_a_config_holds_every_window(tmp_path: Path) -> None:
    config: ModelConfig = load_model(
        write_folder(tmp_path / "model", CONFIGS["gemma3"], random_tensors(CONFIGS["gemma3"]))
    ).config
    assert config.windows == (48,) * 5 + (None,)
