"""Hugging Face's config.json, as transformers 4 and 5 write it, to a ModelConfig."""

import math
from collections.abc import Mapping
from typing import Any

from kvrelay.errors import ModelFileInvalid
from kvrelay_kernels.interface import Activation
from model_runtime.config import Family, ModelConfig, RopeScaling, element_of
from model_runtime.fields import Fields
from model_runtime.weights import MAX_LAYERS

FAMILIES: Mapping[str, Family] = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
}
ACTIVATIONS: Mapping[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
GEMMA3_PATTERN = 6
GEMMA3_LOCAL_BASE = 1e4
GEMMA3_VOCABULARY = 262208
UNSUPPORTED = ("attn_logit_softcapping", "final_logit_softcapping", "mlp_bias")
"""Settings that change the arithmetic in ways that the decoder does not know."""


def parse_config(
    raw: Mapping[str, Any], generation: Mapping[str, Any], qkv_bias: bool, source: str
) -> ModelConfig:
    """Read config.json (and generation_config.json, for the tokens that end an answer).

    Raises:
        ModelFileInvalid: a field is missing or of a wrong type, or the architecture is not known here.
    """
    outer = Fields(raw, f"{source}/config.json")
    kind = outer.get("model_type", str)
    if kind not in FAMILIES:
        raise ModelFileInvalid(
            f"{source}: architecture {kind!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[kind]
    fields = outer.inner("text_config") if "text_config" in raw else outer
    for key in UNSUPPORTED:
        if fields.values.get(key):
            raise ModelFileInvalid(f"{source}: {key!r} in config.json is not supported")
    gemma = family == "gemma3"
    layers = fields.get("num_hidden_layers", int)
    hidden, heads = (
        fields.get("hidden_size", int),
        fields.get("num_attention_heads", int, 8 if gemma else None),
    )
    if not 0 < layers <= MAX_LAYERS or heads < 1:
        raise ModelFileInvalid(f"{source}: {layers} layers, {heads} heads")
    head_dim = fields.get("head_dim", int, 256 if gemma else hidden // heads)
    scale_dim = fields.get("query_pre_attn_scalar", float, 256.0) if gemma else float(head_dim)
    activation = fields.get(
        "hidden_activation" if gemma else "hidden_act", str, "gelu_pytorch_tanh" if gemma else "silu"
    )
    if activation not in ACTIVATIONS:
        raise ModelFileInvalid(f"{source}: activation {activation!r} is not supported")
    if scale_dim <= 0:
        raise ModelFileInvalid(f"{source}: attention is scaled by {scale_dim}")
    windows = _windows(fields, family, layers)
    rope, local = _rope(fields, gemma)
    return ModelConfig(
        name=source,
        family=family,
        vocabulary=fields.get("vocab_size", int, GEMMA3_VOCABULARY if gemma else None),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", int, 4 if gemma else heads),
        head_dim=head_dim,
        intermediate=fields.get("intermediate_size", int),
        context=fields.get("max_position_embeddings", int, 131072 if gemma else 2048),
        norm_eps=fields.get("rms_norm_eps", float, 1e-6),
        rope_base=rope.get("rope_theta", float, 1e6 if gemma else 1e4),
        rope_scaling=_scaling(rope),
        local_rope_base=local,
        windows=windows,
        attention_scale=scale_dim**-0.5,
        activation=ACTIVATIONS[activation],
        qk_norm=family in ("qwen3", "gemma3"),
        post_norms=gemma,
        qkv_bias=qkv_bias,
        embedding_scale=math.sqrt(hidden) if gemma else 1.0,
        tied_embeddings=outer.get(
            "tie_word_embeddings", bool, fields.get("tie_word_embeddings", bool, gemma)
        ),
        bos_id=next(iter(_ids(fields.values.get("bos_token_id"), source)), None),
        stop_ids=tuple(
            sorted(
                {
                    *_ids(generation.get("eos_token_id"), source),
                    *_ids(fields.values.get("eos_token_id"), source),
                }
            )
        ),
        element=element_of(family, hidden, _stored_type(outer) or _stored_type(fields)),
    )


def _stored_type(fields: Fields) -> str | None:
    """The type of the weights, under the name that transformers 5 or 4 gives it."""
    return fields.get("dtype", str, "") or fields.get("torch_dtype", str, "") or None


def _ids(value: Any, source: str) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ModelFileInvalid(f"{source}: {value!r:.80} in config.json is not a token id")
    return tuple(ids)


def _windows(fields: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, by `layer_types` or by the family's own older settings."""
    window = fields.get("sliding_window", int, 0)
    if window == 0 or (family.startswith("qwen") and not fields.get("use_sliding_window", bool, False)):
        return (None,) * layers
    types = fields.get("layer_types", list, [])
    if types:
        if len(types) != layers or not set(types) <= {"full_attention", "sliding_attention"}:
            raise ModelFileInvalid(f"{fields.source}: layer_types in config.json do not fit {layers} layers")
        return tuple(window if kind == "sliding_attention" else None for kind in types)
    if family == "mistral":
        return (window,) * layers
    if family == "gemma3":
        pattern = fields.get("sliding_window_pattern", int, GEMMA3_PATTERN)
        if pattern < 1:
            raise ModelFileInvalid(f"{fields.source}: sliding_window_pattern is {pattern}")
        return tuple(None if (layer + 1) % pattern == 0 else window for layer in range(layers))
    if family.startswith("qwen"):
        first = fields.get("max_window_layers", int, 28)
        return tuple(window if layer >= first else None for layer in range(layers))
    return (None,) * layers


def _rope(fields: Fields, gemma: bool) -> tuple[Fields, float | None]:
    """The settings of the rope, and the base of layers with a window where it differs."""
    given = fields.inner("rope_parameters")
    if "full_attention" in given.values:
        local = given.inner("sliding_attention").get("rope_theta", float, GEMMA3_LOCAL_BASE)
        return given.inner("full_attention"), local if gemma else None
    if not given.values:
        given = Fields(
            {**fields.inner("rope_scaling").values, "rope_theta": fields.values.get("rope_theta")},
            fields.source,
        )
    return given, fields.get("rope_local_base_freq", float, GEMMA3_LOCAL_BASE) if gemma else None


def _scaling(rope: Fields) -> RopeScaling | None:
    if rope.get("partial_rotary_factor", float, 1.0) != 1:
        raise ModelFileInvalid(f"{rope.source}: rope over a part of the head dimension is not supported")
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", rope.get("factor", float))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            rope.get("factor", float),
            rope.get("low_freq_factor", float),
            rope.get("high_freq_factor", float),
            rope.get("original_max_position_embeddings", int),
        )
    raise ModelFileInvalid(f"{rope.source}: rope scaling {kind!r} is not supported")
