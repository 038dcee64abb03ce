"""What a decoder-only model looks like, whatever file it came from."""

from dataclasses import dataclass
from typing import Literal

import xxhash

from kvrelay_kernels.interface import Activation
from kvrelay_kernels.quant.formats import Element

Family = Literal["llama", "mistral", "qwen2", "qwen3", "gemma3"]
BFLOAT16_FAMILIES: tuple[Family, ...] = ("qwen2", "qwen3", "gemma3")
"""Published in bfloat16 throughout; activations of some members exceed float16's 65504."""
GEMMA3_270M_HIDDEN = 640


def element_of(family: Family, hidden: int, stored: str | None = None) -> Element:
    """The 16-bit type to compute in: the one a checkpoint was `stored` in, where its files say so.

    Otherwise it is the family's: bfloat16 where float16 may overflow, and else float16, which has three bits
    more. Gemma 3 270M stays below 25000 beside the residual stream, and float16 holds it.
    """
    if stored in ("float16", "bfloat16"):
        return stored
    small = family == "gemma3" and hidden <= GEMMA3_270M_HIDDEN
    return "bfloat16" if family in BFLOAT16_FAMILIES and not small else "float16"


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretched rope (`llama3`) or plain position scaling (`linear`)."""

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """One decoder for the Llama, Mistral, Qwen2, Qwen3 and Gemma 3 families."""

    name: str
    family: Family
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    context: int
    """Largest number of tokens of a sequence, prompt and answer together."""
    norm_eps: float
    rope_base: float
    rope_scaling: RopeScaling | None
    local_rope_base: float | None
    """Rope base of the layers with a window, where it differs (Gemma 3)."""
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None: global."""
    attention_scale: float
    activation: Activation
    qk_norm: bool
    post_norms: bool
    """Norms behind attention and feed-forward, before the residual is added (Gemma 3)."""
    qkv_bias: bool
    embedding_scale: float
    tied_embeddings: bool
    bos_id: int | None
    stop_ids: tuple[int, ...]
    """Tokens that end an answer."""
    element: Element = "float16"
    """16-bit type to compute in, where a backend computes in 16 bit."""
    fingerprint: str = ""
    """Hash of the weight files: two workers serve the same model only if theirs agree."""

    @property
    def fingerprint64(self) -> int:
        """64 bits of the fingerprint, as block headers carry it."""
        return xxhash.xxh3_64_intdigest(self.fingerprint.encode())
