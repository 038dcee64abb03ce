"""A Llama-shaped model of a few thousand random weights, written as a folder."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

VOCABULARY = 300
EOS = 2
POISON = 299
"""A token whose embedding is NaN."""
CONTEXT = 2048


def write_tiny_model(folder: Path, *, window: int | None = None, seed: int = 7) -> Path:
    """Write config.json and model.safetensors: 3 layers, hidden 64, 4 query and 2 kv heads of 64."""
    rng = np.random.default_rng(seed)
    hidden, heads, kv_heads, head_dim, intermediate, layers = 64, 4, 2, 64, 96, 3

    def matrix(rows: int, columns: int) -> np.ndarray:
        return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    tensors = {"model.embed_tokens.weight": rng.standard_normal((VOCABULARY, hidden)).astype(np.float32)}
    tensors["model.embed_tokens.weight"][POISON] = np.nan
    tensors["lm_head.weight"] = matrix(VOCABULARY, hidden) * 4
    tensors["model.norm.weight"] = np.ones(hidden, np.float32)
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.input_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{prefix}.self_attn.q_proj.weight": matrix(heads * head_dim, hidden),
            f"{prefix}.self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden),
            f"{prefix}.self_attn.o_proj.weight": matrix(hidden, heads * head_dim),
            f"{prefix}.mlp.gate_proj.weight": matrix(intermediate, hidden),
            f"{prefix}.mlp.up_proj.weight": matrix(intermediate, hidden),
            f"{prefix}.mlp.down_proj.weight": matrix(hidden, intermediate),
        }
    config = {
        "architectures": ["LlamaForCausalLM" if window is None else "MistralForCausalLM"],
        "model_type": "llama" if window is None else "mistral",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "eos_token_id": EOS,
        "bos_token_id": 1,
    }
    if window is not None:
        config["sliding_window"] = window
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder
