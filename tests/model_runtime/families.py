"""Tiny models of every family with random weights, in Hugging Face's form."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

Tensors = dict[str, NDArray[Any]]
VOCABULARY, HIDDEN, INTERMEDIATE = 160, 64, 96
SEED = 20

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "head_dim": 32,
    "hidden_act": "silu",
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_COMMON, "model_type": "llama", "rope_theta": 5e5, "rope_scaling": LLAMA3_SCALING},
    "llama_tied": {**_COMMON, "model_type": "llama", "rope_theta": 1e4, "tie_word_embeddings": True},
    "mistral": {**_COMMON, "model_type": "mistral", "rope_theta": 1e4, "sliding_window": 48},
    "qwen2": {
        **_COMMON,
        "model_type": "qwen2",
        "rope_theta": 1e6,
        "head_dim": 16,
        "use_sliding_window": False,
        "sliding_window": 32,
    },
    "qwen3": {**_COMMON, "model_type": "qwen3", "rope_theta": 1e6, "tie_word_embeddings": True},
    "gemma3": {
        **_COMMON,
        "model_type": "gemma3_text",
        "num_hidden_layers": 6,
        "num_key_value_heads": 1,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 48,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "query_pre_attn_scalar": 24,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}
"""config.json of each, as transformers 4 writes it."""


def random_tensors(config: dict[str, Any], seed: int = SEED) -> Tensors:
    """Weights under Hugging Face's names, float32, wide enough to make attention sharp."""
    rng = np.random.default_rng(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    gemma = config["model_type"].startswith("gemma3")

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (rng.standard_normal((rows, columns)) * (1.5 / np.sqrt(columns))).astype(np.float32)

    def norm(width: int) -> NDArray[np.float32]:
        return (rng.uniform(0.5, 1.5, width) - (1 if gemma else 0)).astype(np.float32)

    tensors: Tensors = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        tensors |= {
            f"{p}input_layernorm.weight": norm(hidden),
            f"{p}self_attn.q_proj.weight": matrix(query, hidden),
            f"{p}self_attn.k_proj.weight": matrix(key, hidden),
            f"{p}self_attn.v_proj.weight": matrix(key, hidden),
            f"{p}self_attn.o_proj.weight": matrix(hidden, query),
            f"{p}post_attention_layernorm.weight": norm(hidden),
            f"{p}mlp.gate_proj.weight": matrix(inner, hidden),
            f"{p}mlp.up_proj.weight": matrix(inner, hidden),
            f"{p}mlp.down_proj.weight": matrix(hidden, inner),
        }
        if config["model_type"] == "qwen2":
            for part, rows in (("q", query), ("k", key), ("v", key)):
                tensors[f"{p}self_attn.{part}_proj.bias"] = rng.standard_normal(rows).astype(np.float32)
        if config["model_type"] == "qwen3" or gemma:
            tensors |= {f"{p}self_attn.q_norm.weight": norm(dim), f"{p}self_attn.k_norm.weight": norm(dim)}
        if gemma:
            tensors |= {
                f"{p}pre_feedforward_layernorm.weight": norm(hidden),
                f"{p}post_feedforward_layernorm.weight": norm(hidden),
            }
    tensors["model.norm.weight"] = norm(hidden)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    return tensors


def prompt(length: int) -> list[int]:
    """The token ids that the tests and the fixtures run."""
    return np.random.default_rng(5).integers(3, VOCABULARY, length).tolist()


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors, dtype: Any = np.float32) -> Path:
    """A folder with config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: values.astype(dtype) for name, values in tensors.items()}, folder / "model.safetensors")
    return folder
