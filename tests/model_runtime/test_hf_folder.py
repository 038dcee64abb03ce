"""Folders in Hugging Face's form: what config.json may say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kvrelay.errors import ModelFileInvalid
from model_runtime.checkpoint import load_model
from model_runtime.config import RopeScaling
from tests.model_runtime.families import CONFIGS, random_tensors, write_folder


def folder_of(tmp_path: Path, family: str, **changes: Any) -> Path:
    """A folder whose config.json has some fields changed, or left out where they are None."""
    tensors = random_tensors(CONFIGS[family])
    config = {key: value for key, value in {**CONFIGS[family], **changes}.items() if value is not None}
    return write_folder(tmp_path / "model", config, tensors)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_float_types_are_read_as_they_are(dtype: Any, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["llama"])
    checkpoint = load_model(write_folder(tmp_path / "model", CONFIGS["llama"], tensors, dtype))
    found = checkpoint.read("1.up")
    assert isinstance(found, np.ndarray)
    assert found.dtype == dtype
    expected = tensors["model.layers.1.mlp.up_proj.weight"].astype(dtype)
    assert np.array_equal(np.asarray(found, np.float32), expected.astype(np.float32))


def test_gemmas_norms_get_their_one(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["gemma3"])
    checkpoint = load_model(write_folder(tmp_path / "model", CONFIGS["gemma3"], tensors, ml_dtypes.bfloat16))
    expected = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16).astype(np.float32) + 1
    assert np.array_equal(checkpoint.read("final_norm"), expected)  # pyright: ignore[reportArgumentType]


def test_shards_are_put_together(tmp_path: Path) -> None:
    whole = folder_of(tmp_path, "qwen2")
    tensors = load_file(whole / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, sharded / shard)
        weight_map |= dict.fromkeys(names, shard)
    (sharded / "config.json").write_bytes((whole / "config.json").read_bytes())
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = load_model(sharded)
    assert checkpoint.tensors.keys() == load_model(whole).tensors.keys()
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelFileInvalid, match=r"'model-00002-of-00002\.safetensors' is missing"):
        load_model(sharded)
    index.write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(ModelFileInvalid, match="is missing"):
        load_model(sharded)


def test_the_text_part_of_a_model_with_images(tmp_path: Path) -> None:
    config, tensors = CONFIGS["gemma3"], random_tensors(CONFIGS["gemma3"])
    outer = {"model_type": "gemma3", "text_config": {**config, "model_type": "gemma3_text"}}
    inside = {name.replace("model.", "language_model.model.", 1): values for name, values in tensors.items()}
    inside["vision_tower.blocks.0.weight"] = np.zeros(3, np.float32)
    folder = write_folder(tmp_path / "model", outer, inside)
    assert load_model(folder).config.family == "gemma3"


def test_the_form_of_transformers_5(tmp_path: Path) -> None:
    scaling = CONFIGS["llama"]["rope_scaling"]
    new = folder_of(
        tmp_path, "llama", rope_theta=None, rope_scaling=None, rope_parameters={**scaling, "rope_theta": 5e5}
    )
    config = load_model(new).config
    assert config.rope_base == 5e5
    assert config.rope_scaling == RopeScaling("llama3", 4.0, 1.0, 4.0, 64)


def test_the_two_ropes_of_transformers_5(tmp_path: Path) -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
    }
    config = load_model(folder_of(tmp_path, "gemma3", rope_parameters=parameters)).config
    assert (config.rope_base, config.local_rope_base) == (1e6, 2e4)
    assert config.rope_scaling == RopeScaling("linear", 8.0)


def test_gemmas_pattern_without_layer_types(tmp_path: Path) -> None:
    config = load_model(folder_of(tmp_path, "gemma3", layer_types=None, sliding_window_pattern=3)).config
    assert config.windows == (48, 48, None, 48, 48, None)


def test_qwens_window_is_off_unless_it_is_on(tmp_path: Path) -> None:
    assert load_model(folder_of(tmp_path, "qwen2")).config.windows == (None, None)
    on = folder_of(tmp_path, "qwen2", use_sliding_window=True, max_window_layers=1)
    assert load_model(on).config.windows == (None, 32)


def test_end_tokens_of_both_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 5]}))
    assert load_model(folder).config.stop_ids == (2, 5, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported: llama"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "'hidden_size' is '64', not int"),
        ({"hidden_size": True}, "'hidden_size' is True, not int"),
        ({"hidden_size": 10**30}, "not int"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"num_hidden_layers": 3}, "tensor '2.attn_norm' is missing"),
        ({"num_hidden_layers": 1}, "'model.layers.1"),
        ({"num_attention_heads": 0}, "0 heads"),
        ({"num_attention_heads": 3}, "kv_heads is 2"),
        ({"intermediate_size": 97}, r"shape \(96, 64\)"),
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"max_position_embeddings": 2**40}, "context"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.0}}, "rope scaling"),
        ({"rope_theta": -1.0}, "rope_base is -1"),
        ({"hidden_act": "relu"}, "'relu' is not supported"),
        ({"quantization_config": {"bits": 4}}, "'quantization_config' in config.json is not supported"),
        ({"eos_token_id": 10**6}, "outside the vocabulary"),
        ({"eos_token_id": "two"}, "not a token id"),
        ({"layer_types": ["full_attention"], "sliding_window": 9}, "layer_types"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFileInvalid, match=message):
        load_model(folder_of(tmp_path, "llama", **changes))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "noise"])
def test_broken_files_are_named(file: str, damage: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama")
    path = folder / file
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2]}.get(damage, b"\x93" * 100))
    if damage == "gone":
        path.unlink()
    with pytest.raises(ModelFileInvalid, match=r"config\.json|safetensors"):
        load_model(folder)


def test_config_json_may_not_be_a_list(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama")
    (folder / "config.json").write_text("[" * 100000)
    with pytest.raises(ModelFileInvalid, match=r"config\.json is not JSON"):
        load_model(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelFileInvalid, match="not a JSON object"):
        load_model(folder)
