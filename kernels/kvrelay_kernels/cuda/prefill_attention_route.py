"""Which kernel a step's prompts take: by the GPU's class, their masks, and whether cuDNN can be used."""

from typing import Literal

from kvrelay_kernels.errors import BackendUnavailable, FormatUnsupported

Route = Literal["sparse", "sparse_mma", "cudnn"]
"""Own kernels over lists of tiles: `sparse` with Hopper's instructions, `sparse_mma` with those of each class
from 8.0 on. `cudnn`: dense causal attention and windows."""

HOPPER = "sm_90a"
CUDNN_MAJOR = 10
"""Compute capability 10.x has matrix instructions that only cuDNN uses here; other classes have none beyond
those of `sparse_mma`."""


def uses_cudnn(capability: tuple[int, int]) -> bool:
    """Whether prompts go through cuDNN on this class, where it can be used."""
    return capability[0] == CUDNN_MAJOR


def choose_route(
    arch: str, listed: bool, forced: Route | None = None, cudnn_fault: str | None = None
) -> Route:
    """The route on an architecture such as `sm_90a`, one never seen included.

    On Hopper the own kernel was faster at every density, length and head dimension measured
    (`benchmarks/prefill_attention.py`; docs/kernels.md has the table), so nothing is cut by length: a token
    takes the same route in whatever chunk it comes. The own kernels also give it the same bits there.

    Args:
        arch: of the GPU.
        listed: whether prompts bring masks by tiles of their own.
        forced: the one to take, if any can be wished for.
        cudnn_fault: why cuDNN cannot be used; None: it can, or nobody asked yet.

    Raises:
        FormatUnsupported: the forced route cannot do it.
        BackendUnavailable: cuDNN is forced and cannot be used; the message is its fault.
    """
    if forced == "sparse" and arch != HOPPER:
        raise FormatUnsupported(f"the route sparse needs compute capability 9.0, not {arch}: take sparse_mma")
    if forced == "cudnn" and listed:
        raise FormatUnsupported("cuDNN runs causal attention and windows, no masks by tiles")
    if forced == "cudnn" and cudnn_fault is not None:
        raise BackendUnavailable(cudnn_fault)
    if forced is not None:
        return forced
    if arch == HOPPER:
        return "sparse"
    capability = divmod(int(arch.removeprefix("sm_").rstrip("af")), 10)
    return "cudnn" if uses_cudnn(capability) and not listed and cudnn_fault is None else "sparse_mma"
