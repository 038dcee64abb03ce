"""Which kernel a step's prompts take."""

from typing import Literal

from kvrelay_kernels.errors import FormatUnsupported

Route = Literal["sparse", "cudnn"]
"""`sparse`: the own kernel over lists of tiles. `cudnn`: dense causal attention and windows."""

SPARSE_ARCH = "sm_90a"


def choose_route(arch: str, listed: bool, forced: Route | None = None) -> Route:
    """The route on an architecture such as `sm_90a`; `listed` says whether prompts bring masks of their own.

    On Hopper the own kernel was faster at every density, length and head dimension measured
    (`benchmarks/prefill_attention.py`; docs/kernels.md has the table), so nothing is cut by length: a token
    takes the same route, and has the same bits, in whatever chunk it comes.

    Raises:
        FormatUnsupported: no route, or not the forced one, can do it.
    """
    route: Route = forced or ("sparse" if arch == SPARSE_ARCH else "cudnn")
    if route == "sparse" and arch != SPARSE_ARCH:
        raise FormatUnsupported(f"block-sparse prefill attention runs on compute capability 9.0, not {arch}")
    if route == "cudnn" and listed:
        raise FormatUnsupported("cuDNN runs causal attention and windows, no masks by tiles")
    return route
