"""Errors that kernels raise; the pools translate them into the tree of `kvrelay.errors`.

KernelError
├── BackendUnavailable     a library, driver or device that a backend needs is missing
├── FormatUnsupported      a cache format, weight type or shape that this backend cannot run
└── NonFiniteActivations   NaN or infinity came out of the model
"""

from collections.abc import Sequence


class KernelError(Exception):
    """Root of what kernels raise."""


class BackendUnavailable(KernelError):
    """A backend cannot run here; the message names what is missing and what to install."""


class FormatUnsupported(KernelError):
    """A cache format, weight type or shape that a backend cannot run."""


class NonFiniteActivations(KernelError):
    """The logits of some sequences of a step hold NaN or infinity; the others' are sound."""

    def __init__(self, message: str, sequences: Sequence[int]) -> None:
        super().__init__(message)
        self.sequences = frozenset(sequences)
        """Indices into the step's sequences."""
