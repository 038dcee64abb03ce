"""Opening a model on disk, whichever kind of file it is, and refusing one that does not add up."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from kvrelay.errors import ModelFileInvalid
from model_runtime.config import ModelConfig
from model_runtime.fingerprint import fingerprint_of
from model_runtime.gguf_model import open_gguf
from model_runtime.hf_folder import open_folder, weight_files
from model_runtime.weights import MAX_LAYERS, Checkpoint, check_tensors

__all__ = ["Checkpoint", "ResolvedModel", "load_model"]

MAX_CONTEXT = 1 << 22


@dataclass(frozen=True)
class ResolvedModel:
    """A model's name and where its files lie: a GGUF file, or a folder of safetensors."""

    name: str
    path: Path


def load_model(model: ResolvedModel | Path | str, cache_dir: Path | None = None) -> Checkpoint:
    """Open a GGUF file or a folder with config.json and safetensors.

    `cache_dir` keeps the fingerprint of large files from one start to the next; None: keep nothing.

    Raises:
        ModelFileInvalid: a file is missing, broken, truncated, or of an unknown architecture.
    """
    if not isinstance(model, ResolvedModel):
        path = Path(model)
        model = ResolvedModel(path.stem if path.is_file() else path.name, path)
    path = model.path
    if not path.exists():
        raise ModelFileInvalid(f"{path} does not exist")
    checkpoint = open_folder(path) if path.is_dir() else open_gguf(path)
    _check_config(checkpoint.config, path.name)
    check_tensors(checkpoint.config, checkpoint.tensors, path.name)
    files = weight_files(path) if path.is_dir() else [path]
    config = dataclasses.replace(
        checkpoint.config, name=model.name, fingerprint=fingerprint_of(files, cache_dir)
    )
    return dataclasses.replace(checkpoint, config=config)


def _check_config(config: ModelConfig, source: str) -> None:
    """Refuse numbers that no model has, before anything is sized by them."""
    checks: tuple[tuple[str, float, bool], ...] = (
        ("layers", config.layers, 0 < config.layers <= MAX_LAYERS),
        ("heads", config.heads, config.heads > 0),
        ("kv_heads", config.kv_heads, config.kv_heads > 0 and config.heads % config.kv_heads == 0),
        ("head_dim", config.head_dim, config.head_dim > 0 and config.head_dim % 2 == 0),
        ("context", config.context, 0 < config.context <= MAX_CONTEXT),
        ("norm_eps", config.norm_eps, 0 <= config.norm_eps < 1),
        ("rope_base", config.rope_base, 1 <= config.rope_base < math.inf),
        ("local_rope_base", config.local_rope_base or 1, 1 <= (config.local_rope_base or 1) < math.inf),
        ("attention_scale", config.attention_scale, 0 < config.attention_scale < math.inf),
        (
            "window",
            min((w for w in config.windows if w is not None), default=1),
            all(w is None or w > 0 for w in config.windows),
        ),
    )
    for field, value, valid in checks:
        if not valid:
            raise ModelFileInvalid(f"{source}: {field} is {value}")
    scaling = config.rope_scaling
    if scaling is not None and not (0 < scaling.factor < math.inf and scaling.original_context > 0):
        raise ModelFileInvalid(f"{source}: rope scaling is {scaling}")
    if not all(0 <= token < config.vocabulary for token in (*config.stop_ids, config.bos_id or 0)):
        raise ModelFileInvalid(
            f"{source}: a special token lies outside the vocabulary of {config.vocabulary}"
        )
