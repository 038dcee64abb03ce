"""What a GGUF file says about a model: configuration, tensors under our names, tokenizer and template."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import numpy as np

from kvrelay.errors import ModelFileInvalid
from kvrelay_kernels.interface import HostWeight
from kvrelay_kernels.quant import CodedWeight
from model_runtime.config import Family, ModelConfig, RopeScaling, element_of
from model_runtime.gguf import GgufFile
from model_runtime.gguf_vocabulary import build_tokenizer, control_tokens
from model_runtime.weights import (
    EMBED,
    FINAL_NORM,
    HEAD,
    MAX_LAYERS,
    ROPE_FACTORS,
    Checkpoint,
    StoredTensor,
    TokenizerSource,
    layer_tensor,
)

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
NAMES: Mapping[str, str] = {
    "token_embd.weight": EMBED,
    "output.weight": HEAD,
    "output_norm.weight": FINAL_NORM,
    "rope_freqs.weight": ROPE_FACTORS,
}
LAYER_NAMES: Mapping[str, str] = {
    "attn_norm.weight": "attn_norm",
    "attn_q.weight": "q",
    "attn_k.weight": "k",
    "attn_v.weight": "v",
    "attn_output.weight": "o",
    "attn_q.bias": "q_bias",
    "attn_k.bias": "k_bias",
    "attn_v.bias": "v_bias",
    "attn_q_norm.weight": "q_norm",
    "attn_k_norm.weight": "k_norm",
    "post_attention_norm.weight": "post_attn_norm",
    "ffn_norm.weight": "ffn_norm",
    "ffn_gate.weight": "gate",
    "ffn_up.weight": "up",
    "ffn_down.weight": "down",
    "post_ffw_norm.weight": "post_ffn_norm",
}
END_TOKENS = frozenset(
    {
        "<|im_end|>",
        "<|eot_id|>",
        "<|eom_id|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|end_of_text|>",
        "<|end|>",
        "<EOT>",
    }
)
"""Control tokens that end a turn even where the metadata names only one; llama.cpp has such a list."""
GEMMA3_PATTERN = 6
GEMMA3_LOCAL_BASE = 1e4
GEMMA3_27B_LAYERS = 62


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file; its name and fingerprint are left for the caller to fill in.

    Raises:
        ModelFileInvalid: it is broken, or its architecture is not known here.
    """
    file = GgufFile(path)
    config = _config(file)
    return Checkpoint(config, _tensors(file, config), _tokenizer(file, config))


def _config(file: GgufFile) -> ModelConfig:
    arch = file.get("general.architecture", str)
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ModelFileInvalid(
            f"{file.path.name}: architecture {arch!r} is not supported; supported: {known}"
        )
    if file.get("split.count", int, 1) > 1:
        raise ModelFileInvalid(
            f"{file.path.name} is one of several parts: join them with llama-gguf-split --merge"
        )
    hidden = file.get(f"{arch}.embedding_length", int)
    heads = file.get(f"{arch}.attention.head_count", int)
    layers = file.get(f"{arch}.block_count", int)
    if heads < 1 or not 0 < layers <= MAX_LAYERS:
        raise ModelFileInvalid(f"{file.path.name}: {heads} heads, {layers} layers")
    head_dim = file.get(f"{arch}.attention.key_length", int, hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if file.get(f"{arch}.{key}", int, head_dim) != head_dim:
            raise ModelFileInvalid(
                f"{file.path.name}: {arch}.{key} differs from the head dimension {head_dim}"
            )
    embed = file.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise ModelFileInvalid(f"{file.path.name}: tensor 'token_embd.weight' is missing")
    gemma = arch == "gemma3"
    windows = _windows(file, arch, layers)
    scale_dim = hidden // heads if gemma and layers == GEMMA3_27B_LAYERS else head_dim
    if scale_dim < 1:
        raise ModelFileInvalid(f"{file.path.name}: head dimension {head_dim}")
    family = cast(Family, "mistral" if arch == "llama" and any(windows) else arch)
    return ModelConfig(
        name=file.path.stem,
        family=family,
        vocabulary=embed.shape[0],
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=file.get(f"{arch}.attention.head_count_kv", int, heads),
        head_dim=head_dim,
        intermediate=file.get(f"{arch}.feed_forward_length", int),
        context=file.get(f"{arch}.context_length", int),
        norm_eps=file.get(f"{arch}.attention.layer_norm_rms_epsilon", float),
        rope_base=file.get(f"{arch}.rope.freq_base", float, 1e4),
        rope_scaling=_rope_scaling(file, arch),
        local_rope_base=file.get(f"{arch}.rope.freq_base_swa", float, GEMMA3_LOCAL_BASE) if gemma else None,
        windows=windows,
        attention_scale=scale_dim**-0.5,
        activation="gelu_tanh" if gemma else "silu",
        qk_norm=arch in ("qwen3", "gemma3"),
        post_norms=gemma,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        tied_embeddings="output.weight" not in file.tensors,
        bos_id=_token(file, "bos"),
        stop_ids=_stop_ids(file),
        element=element_of(family, hidden, "bfloat16" if _holds_bfloat16(file) else None),
    )


def _holds_bfloat16(file: GgufFile) -> bool:
    """Whether tensors were left in bfloat16; files that are quantized throughout do not tell."""
    return any(tensor.type.name == "BF16" for tensor in file.tensors.values())


def _windows(file: GgufFile, arch: str, layers: int) -> tuple[int | None, ...]:
    window = file.get(f"{arch}.attention.sliding_window", int, 0)
    if window == 0:
        return (None,) * layers
    if arch != "gemma3":
        return (window,) * layers
    pattern = file.metadata.get(f"{arch}.attention.sliding_window_pattern", GEMMA3_PATTERN)
    if isinstance(pattern, np.ndarray):
        if len(pattern) != layers:
            raise ModelFileInvalid(
                f"{file.path.name}: the window pattern has {len(pattern)} entries, not {layers}"
            )
        return tuple(window if local else None for local in pattern)
    if not isinstance(pattern, int) or pattern < 1:
        raise ModelFileInvalid(f"{file.path.name}: the window pattern is {pattern!r:.80}")
    return tuple(None if (layer + 1) % pattern == 0 else window for layer in range(layers))


def _rope_scaling(file: GgufFile, arch: str) -> RopeScaling | None:
    kind = file.get(f"{arch}.rope.scaling.type", str, "none")
    if kind == "none":
        return None
    if kind != "linear":
        raise ModelFileInvalid(f"{file.path.name}: rope scaling {kind!r} is not supported")
    return RopeScaling("linear", file.get(f"{arch}.rope.scaling.factor", float))


def _token(file: GgufFile, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    return file.get(key, int) if key in file.metadata else None


def _stop_ids(file: GgufFile) -> tuple[int, ...]:
    named = {_token(file, name) for name in ("eos", "eot", "eom")} - {None}
    by_text = {token for token, text in control_tokens(file).items() if text in END_TOKENS}
    return tuple(sorted(token for token in named | by_text if token is not None))


def _tensors(file: GgufFile, config: ModelConfig) -> dict[str, StoredTensor]:
    names = dict(NAMES)
    for layer in range(config.layers):
        names |= {f"blk.{layer}.{theirs}": layer_tensor(layer, ours) for theirs, ours in LAYER_NAMES.items()}
    unknown = sorted(file.tensors.keys() - names.keys())
    if unknown:
        raise ModelFileInvalid(
            f"{file.path.name}: tensor {unknown[0]!r:.80} is not part of a {config.family} model"
        )
    permuted = {"q": config.heads, "k": config.kv_heads} if config.family in ("llama", "mistral") else {}
    permuted |= {f"{part}_bias": heads for part, heads in permuted.items()}
    tensors: dict[str, StoredTensor] = {}
    for theirs, info in file.tensors.items():
        heads = permuted.get(names[theirs].rpartition(".")[2])
        tensors[names[theirs]] = _stored(file, theirs, info.shape, heads)
    return tensors


def _stored(file: GgufFile, name: str, shape: tuple[int, ...], heads: int | None) -> StoredTensor:
    if heads is None:
        return StoredTensor(shape, lambda: file.read(name))
    return StoredTensor(shape, lambda: _unpermute(file.read(name), heads))


def _unpermute(weight: HostWeight, heads: int) -> HostWeight:
    """Undo llama.cpp's order of q and k rows, which suits its rope of neighbouring pairs, not of halves."""
    rows = weight.shape[0]
    order = np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)
    return weight.rows(order) if isinstance(weight, CodedWeight) else weight[order]


def _tokenizer(file: GgufFile, config: ModelConfig) -> TokenizerSource:
    controls = control_tokens(file)
    special = {
        "bos_token": config.bos_id,
        "eos_token": _token(file, "eos"),
        "unk_token": _token(file, "unknown"),
    }
    return TokenizerSource(
        load=lambda cache_dir: build_tokenizer(file, cache_dir),
        chat_template=file.get("tokenizer.chat_template", str)
        if "tokenizer.chat_template" in file.metadata
        else None,
        special={key: controls[token] for key, token in special.items() if token in controls},
    )
