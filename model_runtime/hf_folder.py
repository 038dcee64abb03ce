"""Folders as Hugging Face keeps models: config.json, (sharded) safetensors, tokenizer.json."""

import json
import os
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from kvrelay.errors import ModelFileInvalid
from model_runtime import hf_fp8
from model_runtime.config import ModelConfig
from model_runtime.hf_config import parse_config
from model_runtime.weights import (
    EMBED,
    FINAL_NORM,
    HEAD,
    Checkpoint,
    StoredTensor,
    TokenizerSource,
    layer_tensor,
)

FLOATS: Mapping[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
NAMES: Mapping[str, str] = {"embed_tokens.weight": EMBED, "norm.weight": FINAL_NORM}
LAYER_NAMES: Mapping[str, str] = {
    "input_layernorm.weight": "attn_norm",
    "self_attn.q_proj.weight": "q",
    "self_attn.k_proj.weight": "k",
    "self_attn.v_proj.weight": "v",
    "self_attn.o_proj.weight": "o",
    "self_attn.q_proj.bias": "q_bias",
    "self_attn.k_proj.bias": "k_bias",
    "self_attn.v_proj.bias": "v_bias",
    "self_attn.q_norm.weight": "q_norm",
    "self_attn.k_norm.weight": "k_norm",
    "post_attention_layernorm.weight": "ffn_norm",
    "mlp.gate_proj.weight": "gate",
    "mlp.up_proj.weight": "up",
    "mlp.down_proj.weight": "down",
}
GEMMA3_LAYER_NAMES: Mapping[str, str] = {
    **LAYER_NAMES,
    "post_attention_layernorm.weight": "post_attn_norm",
    "pre_feedforward_layernorm.weight": "ffn_norm",
    "post_feedforward_layernorm.weight": "post_ffn_norm",
}
PREFIXES = ("model.language_model.", "language_model.model.", "model.", "")
"""What stands before the names: text-only files, and text parts of files that know images too."""
HEAD_NAMES = ("lm_head.weight", "language_model.lm_head.weight")


def open_folder(folder: Path) -> Checkpoint:
    """Open a folder; its name and fingerprint are left for the caller to fill in.

    Raises:
        ModelFileInvalid: a file is missing or broken, or the architecture is not known here.
    """
    raw = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json", optional=True)
    stored = _stored(weight_files(folder), hf_fp8.scale_block(raw, folder.name))
    prefix = next((p for p in PREFIXES if f"{p}embed_tokens.weight" in stored), None)
    if prefix is None:
        raise ModelFileInvalid(f"{folder.name}: tensor 'embed_tokens.weight' is missing")
    config = parse_config(raw, generation, f"{prefix}layers.0.self_attn.q_proj.bias" in stored, folder.name)
    return Checkpoint(config, _tensors(stored, prefix, config, folder.name), _tokenizer(folder))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, as its index lists them where there is one.

    Raises:
        ModelFileInvalid: there are none, or one is missing.
    """
    index = read_json(folder / "model.safetensors.index.json", optional=True)
    if not index:
        whole = folder / "model.safetensors"
        files = [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise ModelFileInvalid(f"{folder.name}: there is no .safetensors file")
        return files
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ModelFileInvalid(f"{folder.name}: model.safetensors.index.json has no weight_map")
    files = [folder / name for name in sorted(set(shards.values()))]
    for file in files:
        if file.parent != folder or not file.is_file():
            raise ModelFileInvalid(f"{folder.name}: shard {file.name!r} is missing")
    return files


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file; empty where the file is optional and missing.

    Raises:
        ModelFileInvalid: it is missing, not JSON, or not an object.
    """
    if optional and not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelFileInvalid(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelFileInvalid(f"{path.parent.name}/{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelFileInvalid(f"{path.parent.name}/{path.name} is not a JSON object")
    return value


def _stored(files: list[Path], block: hf_fp8.Block | None) -> dict[str, StoredTensor]:
    """Every tensor of the files under its own name; headers are checked by the library."""
    stored: dict[str, StoredTensor] = {}
    coded: dict[str, Path] = {}
    for path in files:
        try:
            file = safe_open(path, framework="numpy")
            for name in file.keys():  # noqa: SIM118 (the library's object is no mapping)
                part = file.get_slice(name)
                dtype = part.get_dtype()
                read = _reader(file, name, dtype, path)
                if dtype == hf_fp8.DTYPE:
                    read, coded[name] = partial(_bytes_of, path, name), path
                stored[name] = StoredTensor(tuple(part.get_shape()), read)
        except (SafetensorError, OSError) as error:
            raise ModelFileInvalid(f"{path.parent.name}/{path.name} is broken: {error}") from error
    for name, path in coded.items():
        stored[name] = hf_fp8.with_scales(name, stored[name], stored, block, path.name)
    return stored


def _bytes_of(path: Path, name: str) -> NDArray[np.uint8]:
    """A tensor of bytes: NumPy has no 8-bit floats for the library to give."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        tensor = json.loads(file.read(length))[name]
        begin, end = tensor["data_offsets"]
        file.seek(begin, os.SEEK_CUR)
        return np.fromfile(file, np.uint8, end - begin).reshape(tensor["shape"])


def _reader(file: Any, name: str, dtype: str, path: Path) -> Callable[[], NDArray[Any]]:
    def read() -> NDArray[Any]:
        if dtype not in FLOATS:
            supported = ", ".join((*FLOATS, hf_fp8.DTYPE))
            raise ModelFileInvalid(f"{path.name}: tensor {name!r} is {dtype}; supported: {supported}")
        return file.get_tensor(name)

    return read


def _tensors(
    stored: Mapping[str, StoredTensor], prefix: str, config: ModelConfig, source: str
) -> dict[str, StoredTensor]:
    gemma = config.family == "gemma3"
    names = {f"{prefix}{theirs}": ours for theirs, ours in NAMES.items()}
    if not config.tied_embeddings:
        names |= dict.fromkeys(HEAD_NAMES, HEAD)
    for layer in range(config.layers):
        for theirs, ours in (GEMMA3_LAYER_NAMES if gemma else LAYER_NAMES).items():
            names[f"{prefix}layers.{layer}.{theirs}"] = layer_tensor(layer, ours)
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        ours = names.get(name)
        if ours is None and name.startswith(f"{prefix}layers.") and name.endswith((".weight", ".bias")):
            raise ModelFileInvalid(
                f"{source}: tensor {name!r} is not part of a {config.family} model as known here"
            )
        if ours is not None:
            # Gemma's files hold a norm's weight less one.
            tensors[ours] = _plus_one(tensor) if gemma and ours.endswith("norm") else tensor
    return tensors


def _plus_one(tensor: StoredTensor) -> StoredTensor:
    return StoredTensor(tensor.shape, lambda: np.asarray(tensor.read(), np.float32) + np.float32(1))


def _tokenizer(folder: Path) -> TokenizerSource:
    settings = read_json(folder / "tokenizer_config.json", optional=True)
    special: dict[str, str] = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            special[key] = text

    def load(cache_dir: Path | None) -> Tokenizer:
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ModelFileInvalid(f"{folder.name}: tokenizer.json is missing")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises a bare Exception for whatever is wrong.
            raise ModelFileInvalid(f"{folder.name}/tokenizer.json is broken: {error}") from error

    return TokenizerSource(load, _chat_template(folder, settings), special)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """From chat_template.jinja or tokenizer_config.json; of several templates, the one called `default`."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
