"""What every loader makes of a model's files: a configuration, and tensors under these names and shapes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from kvrelay.errors import ModelFileInvalid
from kvrelay_kernels.interface import HostWeight
from model_runtime.config import ModelConfig

EMBED, HEAD, FINAL_NORM, ROPE_FACTORS = "embed", "head", "final_norm", "rope_factors"
"""`rope_factors` (optional, `[head_dim / 2]`): divisors of the rope frequencies, if a file has them."""
MAX_LAYERS = 1024
"""More than any model has; a broken file may claim anything."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that is read (and unpacked) when it is wanted."""

    shape: tuple[int, ...]
    read: Callable[[], HostWeight]


@dataclass(frozen=True)
class TokenizerSource:
    """What a tokenizer is made from."""

    load: Callable[[Path | None], Tokenizer]
    """Reads or builds it; what takes long is kept in the folder given, if one is."""
    chat_template: str | None
    special: Mapping[str, str]
    """Tokens that chat templates refer to, such as `bos_token`."""


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration and files; opening one reads no weights."""

    config: ModelConfig
    tensors: Mapping[str, StoredTensor]
    tokenizer: TokenizerSource

    def read(self, name: str) -> HostWeight:
        """Read one tensor by its name in `model_runtime.weights`; KeyError where there is none."""
        return self.tensors[name].read()


def layer_tensor(layer: int, part: str) -> str:
    """The name of one layer's tensor, such as `3.gate`."""
    return f"{layer}.{part}"


def expected_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a model of this configuration has, with its shape."""
    yield EMBED, (config.vocabulary, config.hidden)
    if not config.tied_embeddings:
        yield HEAD, (config.vocabulary, config.hidden)
    yield FINAL_NORM, (config.hidden,)
    for layer in range(config.layers):
        for part, shape in layer_shapes(config).items():
            yield layer_tensor(layer, part), shape


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The parts of one layer with their shapes."""
    hidden, inner = config.hidden, config.intermediate
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "q": (query, hidden),
        "k": (key, hidden),
        "v": (key, hidden),
        "o": (hidden, query),
        "ffn_norm": (hidden,),
        "gate": (inner, hidden),
        "up": (inner, hidden),
        "down": (hidden, inner),
    }
    if config.qkv_bias:
        shapes |= {"q_bias": (query,), "k_bias": (key,), "v_bias": (key,)}
    if config.qk_norm:
        shapes |= {"q_norm": (config.head_dim,), "k_norm": (config.head_dim,)}
    if config.post_norms:
        shapes |= {"post_attn_norm": (hidden,), "post_ffn_norm": (hidden,)}
    return shapes


def check_tensors(config: ModelConfig, tensors: Mapping[str, StoredTensor], source: str) -> None:
    """Compare what a file has with what its configuration calls for.

    Raises:
        ModelFileInvalid: a tensor is missing or has another shape.
    """
    for name, shape in expected_shapes(config):
        found = tensors.get(name)
        if found is None:
            raise ModelFileInvalid(f"{source}: tensor {name!r} is missing")
        if found.shape != shape:
            raise ModelFileInvalid(
                f"{source}: tensor {name!r} has shape {found.shape}, the configuration says {shape}"
            )
