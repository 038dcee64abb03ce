"""Tiny models as GGUF files, written with the gguf package as llama.cpp's converter lays them out."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from tests.model_runtime.families import VOCABULARY, Tensors

GGUF_LAYER_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
GEMMA3_GGUF_LAYER_NAMES = {
    **GGUF_LAYER_NAMES,
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    "pre_feedforward_layernorm.weight": "ffn_norm.weight",
    "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
}
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(
    path: Path,
    config: dict[str, Any],
    tensors: Tensors,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """A GGUF file, as llama.cpp's converter lays these models out; matrices of type `kind`."""
    kind_of_model: str = config["model_type"]
    arch = {"mistral": "llama", "gemma3_text": "gemma3"}.get(kind_of_model, kind_of_model)
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if config["model_type"] in ("mistral", "gemma3_text"):
        writer.add_sliding_window(config["sliding_window"])
    scaling = config.get("rope_scaling")
    if scaling and scaling["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if scaling and scaling["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    add_vocabulary(writer)
    for name, tensor in tensors.items():
        values = tensor
        theirs = GGUF_NAMES.get(name)
        if theirs is None:
            _, _, layer, part = name.split(".", 3)
            names = GEMMA3_GGUF_LAYER_NAMES if arch == "gemma3" else GGUF_LAYER_NAMES
            theirs = f"blk.{layer}.{names[part]}"
        if arch == "llama" and theirs.endswith(("attn_q.weight", "attn_k.weight")):
            values = permute(values, heads if "attn_q" in theirs else kv_heads)
        if arch == "gemma3" and theirs.endswith("norm.weight"):
            values = values + 1
        if values.ndim == 2:
            writer.add_tensor(theirs, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def permute(values: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp's order of q and k rows (LlamaModel.permute in convert_hf_to_gguf.py)."""
    return values.reshape(heads, 2, values.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def llama3_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    """What llama.cpp's converter writes as rope_freqs for Llama 3.1."""
    scaling, dim = config["rope_scaling"], config["head_dim"]
    factors: list[float] = []
    for frequency in 1.0 / config["rope_theta"] ** (np.arange(0, dim, 2) / dim):
        length = 2 * np.pi / frequency
        original = scaling["original_max_position_embeddings"]
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if length < original / high:
            factors.append(1)
        elif length > original / low:
            factors.append(scaling["factor"])
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    """A byte-level vocabulary of single characters and two merges, big enough for VOCABULARY."""
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ġ", "Ċ"]
    tokens = ["<unk>", "<s>", "<|im_end|>", *letters, "he", "ll"]
    tokens += [f"<unused{i}>" for i in range(VOCABULARY - len(tokens))]
    kinds = [3 if token.startswith("<") and len(token) > 1 else 1 for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e", "l l"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
