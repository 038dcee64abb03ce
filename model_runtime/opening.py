"""From a model's name to a decoder that is ready to take steps, telling what happens meanwhile."""

import logging
from collections.abc import Sequence
from typing import cast

from kvrelay.errors import BadSetup
from kvrelay_kernels.errors import BackendUnavailable, FormatUnsupported
from kvrelay_kernels.plans import Tier, default_plan_folder, open_plans
from kvrelay_kernels.quant.formats import Element
from kvrelay_kernels.registry import BackendName, load_backend
from model_runtime.catalog import default_cache_dir, resolve
from model_runtime.checkpoint import load_model
from model_runtime.config import ModelConfig
from model_runtime.decoder import Decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import Progress

ASKING: tuple[BackendName, ...] = ("cuda",)
"""Backends that compute in either 16-bit type, and are told which one a model needs."""

log = logging.getLogger(__name__)


class Activity:
    """The newest line of what a starting worker does; a Progress that another thread may read."""

    def __init__(self) -> None:
        self.text = "starting"

    def __call__(self, what: str, done: int, total: int) -> None:
        """Take note of how far a job is."""
        self.text = f"{what} {100 * done // total}%" if total else what


def open_decoder(options: DecoderOptions, progress: Progress, shared_plans: Sequence[Tier] = ()) -> Decoder:
    """Find (or fetch) a model, and pack its weights on a backend, which keeps what it compiles in a folder.

    `shared_plans` are stores beyond the folder, of which the caller knows how to reach them.

    Raises:
        BadSetup: the backend is unknown, not usable here, or cannot run this model.
        ModelNotFound, ModelUnreachable, ModelFileInvalid: as `resolve` and `load_model`.
    """
    cache = default_cache_dir()
    checkpoint = load_model(resolve(options.model, cache, progress), cache)
    plans = open_plans(options.plan_cache or default_plan_folder(), shared_plans)
    try:
        backend = load_backend(
            cast(BackendName, options.backend),
            threads=options.threads,
            plans=plans,
            element=choose_element(options, checkpoint.config),
        )
        return Decoder(checkpoint, backend, options.weights, progress=progress)
    except (BackendUnavailable, FormatUnsupported, ValueError) as error:
        raise BadSetup(str(error)) from error


def choose_element(options: DecoderOptions, config: ModelConfig) -> Element | None:
    """What the backend is told to compute in; None: it decides."""
    if options.element is None:
        return config.element if options.backend in ASKING else None
    if options.element == "float16" and config.element == "bfloat16":
        log.warning(
            "%s is a bfloat16 model: in float16 activations beyond 65504 are infinite, and requests fail",
            config.name,
        )
    return options.element
