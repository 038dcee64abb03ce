"""The activation of a gate, as kernels are told of it (`sources/activation.cuh`)."""

from kvrelay_kernels.interface import Activation

_NUMBERS: dict[Activation | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}


def gated(activation: Activation | None) -> int:
    """The macro GATED of a product's kernel. None: the matrix is no gated one."""
    return _NUMBERS[activation]
