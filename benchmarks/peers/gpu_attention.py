"""Other people's prefill attention on the GPU, on the same inputs: torch and FlashAttention-3."""

import ctypes
import importlib.util
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

Timed = Callable[[], list[float]]
"""Milliseconds of one call, several times."""


@dataclass(frozen=True)
class Peer:
    """One implementation, ready to run one case."""

    name: str
    sample: Timed
    replay: Timed | None
    output: Callable[[], Any]
    """`[queries, heads, head_dim]` bfloat16, as uint16 on CuPy."""


@dataclass(frozen=True)
class Inputs:
    """bfloat16 as CuPy's uint16, several sets to take turns."""

    q: list[Any]
    """`[queries, heads, head_dim]` each."""
    k: list[Any]
    """`[keys, kv_heads, head_dim]` each."""
    v: list[Any]
    scale: float


def torch_peer(backend: str, inputs: Inputs, seen: Any, calls: int) -> Peer:
    """torch's scaled_dot_product_attention through `cudnn` or `flash`.

    `seen` is `[queries, keys]` bool on CuPy for a dense mask; None: causal, as many queries as keys.
    Raises RuntimeError where torch cannot.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]

    kinds = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}

    def to_torch(array: Any) -> Any:
        return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16).transpose(0, 1)[None]

    sets = [tuple(map(to_torch, one)) for one in zip(inputs.q, inputs.k, inputs.v, strict=True)]
    mask = None if seen is None else torch.from_dlpack(seen.view(np.uint8)).view(torch.bool)[None, None]

    def run(n: int) -> Any:
        q, k, v = sets[n % len(sets)]
        with sdpa_kernel(kinds[backend]):
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=inputs.scale, enable_gqa=True
            )

    def event() -> Any:
        return torch.cuda.Event(enable_timing=True)

    def timed(call: Callable[[], Any], each: int) -> float:
        start, stop = event(), event()
        start.record()
        call()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / each

    def output() -> Any:
        import cupy  # pyright: ignore[reportMissingImports]

        return cupy.from_dlpack(run(0)[0].transpose(0, 1).contiguous().view(torch.int16)).view(np.uint16)

    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for n in range(calls):
            run(n)
    name = f"torch {backend}" + ("" if seen is None else ", dense mask")
    return Peer(
        name,
        lambda: [timed(lambda n=n: run(n), 1) for n in range(calls)],
        lambda: [timed(graph.replay, calls)],
        output,
    )


@cache
def _flash3() -> Any:
    """FlashAttention-3 as JAX calls it, from the package dew-flash-attn-cu13; None where it is missing.

    The package itself is not imported: it would load FlashAttention-2 beside it.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the GPU's memory
    spec = importlib.util.find_spec("dew_flash_attn")
    if spec is None or spec.origin is None:
        return None
    import jax  # pyright: ignore[reportMissingImports]

    library = ctypes.CDLL(str(Path(spec.origin).with_name("libdew_flash_attn3.so")))
    jax.ffi.register_ffi_target("flash3", jax.ffi.pycapsule(library.dew_flash3_mha_fwd), platform="CUDA")
    return jax


def flash3_peer(inputs: Inputs, window: int | None, calls: int) -> Peer | None:
    """FlashAttention-3, causal with the last query on the last key; None where it is missing.

    `calls` of them follow each other in one executable, timed by the host's clock: let them be so many that
    what the host does once counts little. That grows with the executable's parameters, so it gets each
    array once.
    """
    jax = _flash3()
    if jax is None:
        return None
    import jax.numpy as jnp  # pyright: ignore[reportMissingImports]

    def to_jax(array: Any) -> Any:
        return jax.lax.bitcast_convert_type(jax.dlpack.from_dlpack(array), jnp.bfloat16)[None]

    sets = [tuple(map(to_jax, one)) for one in zip(inputs.q, inputs.k, inputs.v, strict=True)]
    attributes = {
        "softmax_scale": np.float64(inputs.scale),
        "is_causal": window is None,
        "window_size_left": np.int64(-1 if window is None else window - 1),
        "window_size_right": np.int64(0 if window else -1),
    }

    def attend(q: Any, k: Any, v: Any) -> Any:
        float32 = jnp.float32
        results = (
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((1, q.shape[2], q.shape[1]), float32),
            jax.ShapeDtypeStruct((1, 1, 1, 1), float32),
            jax.ShapeDtypeStruct((1, 1, 1), float32),
        )
        return jax.ffi.ffi_call("flash3", results, has_side_effect=True)(q, k, v, **attributes)[0]

    chain = jax.jit(lambda given: [attend(*given[n % len(given)]) for n in range(calls)][-1])
    chain(sets).block_until_ready()

    def output() -> Any:
        import cupy  # pyright: ignore[reportMissingImports]

        bits = jax.lax.bitcast_convert_type(jax.jit(attend)(*sets[0])[0], jnp.uint16)
        return cupy.from_dlpack(bits.block_until_ready())

    def sample() -> list[float]:
        begin = time.perf_counter()
        chain(sets).block_until_ready()
        return [(time.perf_counter() - begin) * 1e3 / calls]

    return Peer("FlashAttention-3", sample, None, output)
