"""Backends by name, imported when they are asked for."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, cast, get_args

from kvrelay_kernels.errors import BackendUnavailable, FormatUnsupported
from kvrelay_kernels.interface import Backend
from kvrelay_kernels.plans import PlanStore
from kvrelay_kernels.quant.formats import Element

BackendName = Literal["cpu", "reference", "mlx", "cuda"]

_CLASSES: dict[BackendName, tuple[str, str]] = {
    "cpu": ("CpuBackend", "pip install kvrelay"),
    "reference": ("ReferenceBackend", "pip install kvrelay"),
    "mlx": ("MlxBackend", "pip install 'kvrelay[apple]'"),
    "cuda": ("CudaBackend", "pip install 'kvrelay[cuda12]' or 'kvrelay[cuda13]', after the NVIDIA driver"),
}


CHOOSING: tuple[BackendName, ...] = ("mlx", "cuda")
"""Backends that compute in whichever element type they are told."""


@dataclass(frozen=True)
class Probe:
    """Whether a backend can run here, and why not."""

    name: BackendName
    available: bool
    detail: str


def load_backend(
    name: BackendName, *, threads: int, plans: PlanStore | None = None, element: Element | None = None
) -> Backend:
    """A new backend; `threads` is how many cores the host side may use.

    `plans` is where one that compiles for its device keeps the outcome; None: in this user's folder.
    `element` is what activations and unquantized caches hold, for backends that can choose; None: their own.

    Raises:
        BackendUnavailable: a library, driver or device is missing; the message says what to install.
        FormatUnsupported: the backend does not compute in `element`.
        ValueError: no backend has this name.
    """
    if name not in _CLASSES:
        raise ValueError(f"unknown backend {name!r}; known: {', '.join(get_args(BackendName))}")
    kind, remedy = _CLASSES[name]
    try:
        module = import_module(f"kvrelay_kernels.{name}.backend")
    except ImportError as error:
        raise BackendUnavailable(
            f"backend {name} needs a library that is missing ({error}): {remedy}"
        ) from error
    options: dict[str, Any] = {"plans": plans} if name == "cuda" else {}
    if element is not None and name in CHOOSING:
        options["element"] = element
    backend = cast(Backend, getattr(module, kind)(threads=threads, **options))
    if element not in (None, backend.element):
        raise FormatUnsupported(f"backend {name} computes in {backend.element}, not in {element}")
    return backend


def probe() -> list[Probe]:
    """Every backend with what stands in its way here."""
    found: list[Probe] = []
    for name in _CLASSES:
        try:
            backend = load_backend(name, threads=1)
        except BackendUnavailable as error:
            found.append(Probe(name, False, str(error)))
        else:
            found.append(Probe(name, True, f"unquantized caches in {backend.element}"))
    return found
