"""Every family's forward pass in plain float64 NumPy, a whole sequence at once: the independent judge."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def forward(config: dict[str, Any], tensors: dict[str, NDArray[Any]], ids: list[int]) -> Array:
    """Logits `[len(ids), vocabulary]` of tensors under Hugging Face's names."""
    weights = {name: np.asarray(values, np.float64) for name, values in tensors.items()}
    gemma = config["model_type"].startswith("gemma3")
    eps = config["rms_norm_eps"]

    def norm(x: Array, name: str) -> Array:
        weight = weights[name] + (1 if gemma else 0)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    x = weights["model.embed_tokens.weight"][ids] * (np.sqrt(config["hidden_size"]) if gemma else 1)
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}."
        local = config.get("layer_types", ["?"] * 99)[layer] == "sliding_attention"
        a = attention(config, weights, p, norm(x, f"{p}input_layernorm.weight"), norm, local)
        if gemma:
            x = x + norm(a, f"{p}post_attention_layernorm.weight")
            h = norm(x, f"{p}pre_feedforward_layernorm.weight")
        else:
            x = x + a
            h = norm(x, f"{p}post_attention_layernorm.weight")
        gate, up = h @ weights[f"{p}mlp.gate_proj.weight"].T, h @ weights[f"{p}mlp.up_proj.weight"].T
        if gemma:
            gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        h = (gate * up) @ weights[f"{p}mlp.down_proj.weight"].T
        x = x + (norm(h, f"{p}post_feedforward_layernorm.weight") if gemma else h)
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    return norm(x, "model.norm.weight") @ weights[head].T


def attention(config: dict[str, Any], weights: Any, p: str, h: Array, norm: Any, local: bool) -> Array:
    """One layer's attention over the whole sequence."""
    heads, kv_heads, dim = (config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    q, k, v = (
        (h @ weights[f"{p}self_attn.{part}_proj.weight"].T + weights.get(f"{p}self_attn.{part}_proj.bias", 0))
        .reshape(len(h), -1, dim)
        .swapaxes(0, 1)
        for part in "qkv"
    )
    if f"{p}self_attn.q_norm.weight" in weights:
        q, k = norm(q, f"{p}self_attn.q_norm.weight"), norm(k, f"{p}self_attn.k_norm.weight")
    angles = np.arange(len(h))[:, None] * frequencies(config, local)
    q, k = rotate(q, angles), rotate(k, angles)
    k, v = k.repeat(heads // kv_heads, 0), v.repeat(heads // kv_heads, 0)
    distance = np.arange(len(h))[:, None] - np.arange(len(h))
    seen = distance >= 0
    if local or config["model_type"] == "mistral":
        seen &= distance < config["sliding_window"]
    scores = np.where(seen, q @ k.swapaxes(1, 2) / np.sqrt(config.get("query_pre_attn_scalar", dim)), -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    out = weight / weight.sum(-1, keepdims=True) @ v
    return out.swapaxes(0, 1).reshape(len(h), -1) @ weights[f"{p}self_attn.o_proj.weight"].T


def frequencies(config: dict[str, Any], local: bool) -> Array:
    """Rope frequencies, `[head_dim / 2]`."""
    dim = config["head_dim"]
    base = config["rope_local_base_freq"] if local else config["rope_theta"]
    plain = base ** (-np.arange(0, dim, 2) / dim)
    scaling = config.get("rope_scaling")
    if scaling is None or local:
        return plain
    if scaling["rope_type"] == "linear":
        return plain / scaling["factor"]
    turns = scaling["original_max_position_embeddings"] * plain / (2 * np.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = (turns - low) / (high - low)
    mixed = (1 - smooth) * plain / scaling["factor"] + smooth * plain
    return np.where(turns < low, plain / scaling["factor"], np.where(turns > high, plain, mixed))


def rotate(x: Array, angles: Array) -> Array:
    """Rotate-half rope."""
    left, right = np.split(x, 2, -1)
    return np.concatenate(
        [left * np.cos(angles) - right * np.sin(angles), right * np.cos(angles) + left * np.sin(angles)], -1
    )
