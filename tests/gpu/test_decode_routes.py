"""Decode attention on every route, against float64 attention, and alike inside the backend."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda.backend import CudaBackend
from kvrelay_kernels.cuda.cudnn_attention import CudnnAttention
from kvrelay_kernels.cuda.cudnn_decode import CudnnDecode
from kvrelay_kernels.cuda.decode_attention import DecodeProblem
from kvrelay_kernels.cuda.decode_route import DecodeRoute
from kvrelay_kernels.cuda.decode_rows import Kernel
from kvrelay_kernels.cuda.decode_single_pass import SinglePass, device_rooms
from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.plans import PlanStore
from kvrelay_kernels.quant import BlockLayout
from kvrelay_kernels.quant.formats import SCHEMES
from model_runtime.catalog import default_cache_dir
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from tests.gpu.paged_cache import DTYPES, PagedCache, exact_attention, random_cache
from tests.gpu.test_decode_attention import BOUND, HEADS, RAGGED, bound, make, relative_error
from tests.model_runtime.conftest import greedy

MODEL = "SmolLM2-135M-Instruct.Q4_1.gguf"
CLUSTERS = [1, 2, 8, 16]


def run(cupy: Any, kernel: Kernel, cache: PagedCache, q: Any, calls: int = 1) -> list[Any]:
    """The kernel's outputs as float32, from poisoned buffers; the layer lies behind one of NaN."""
    out = cupy.full((calls, *q.shape), 0xFFFF, np.uint16)
    arena = cupy.asarray(np.stack([np.full_like(cache.arena, 0xFF), cache.arena]))
    kernel.attach(arena)
    lengths, tables, queries = (cupy.asarray(a) for a in (cache.lengths, cache.tables, q.view(np.uint16)))
    kernel.plan(lengths)
    for call in range(calls):
        kernel(queries, 1, tables, out[call])
    return list(out.get().view(q.dtype).astype(np.float32))


def check(
    cupy: Any, new: Callable[[DecodeProblem], Kernel], problem: DecodeProblem, lengths: list[int]
) -> None:
    rng = np.random.default_rng(len(lengths))
    cache = random_cache(rng, problem.layout, lengths)
    shape = (len(lengths) * problem.rows, problem.spec.heads, problem.spec.head_dim)
    q = rng.standard_normal(shape).astype(DTYPES[problem.element])
    first, *others = run(cupy, new(problem), cache, q, calls=3)
    want = exact_attention(q, cache, problem.spec, problem.rows)
    assert relative_error(first, want) < bound(want, problem.element)
    assert all(np.array_equal(first, other) for other in others)


@pytest.fixture
def clusters(cupy: Any) -> None:
    if find_gpu().capability < (9, 0):
        pytest.skip("this GPU has no thread-block clusters")


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("fmt", ["none", *SCHEMES])
def test_single_pass_of_every_format(cupy: Any, kernels: KernelCache, fmt: str, cluster: int) -> None:
    check(cupy, lambda problem: SinglePass(problem, kernels, cluster), make(fmt, 128, "bfloat16"), RAGGED)


@pytest.mark.usefixtures("clusters")
@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("head_dim", HEADS)
def test_single_pass_of_every_head_dimension(
    cupy: Any, kernels: KernelCache, head_dim: int, cluster: int
) -> None:
    problem = make("int8-g32", head_dim, "float16", rows=3, window=100)
    check(cupy, lambda p: SinglePass(p, kernels, cluster), problem, [3, 64, 77, 1000, 5000])


@pytest.mark.usefixtures("clusters")
def test_single_pass_of_a_long_sequence(cupy: Any, kernels: KernelCache) -> None:
    problem = make("int8-g64", 128, "bfloat16", heads=(4, 1))
    check(cupy, lambda p: SinglePass(p, kernels, 16), problem, [131072])


@pytest.mark.usefixtures("clusters")
def test_clusters_have_room(kernels: KernelCache) -> None:
    rooms, processors = device_rooms(kernels), find_gpu().processors
    assert max(rooms) >= 8
    assert all(0 < size * room <= processors for size, room in rooms.items())


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize("window", [None, 100])
def test_cudnn(cupy: Any, head_dim: int, window: int | None) -> None:
    """Behind a sequence's end it reads numbers: blocks begin as zeros here."""
    pytest.importorskip("cudnn", reason="cudnn-frontend is not installed", exc_type=ImportError)
    attention = CudnnAttention(PlanStore(), find_gpu().device_class)
    problem = make("none", head_dim, "bfloat16", window=window)
    lengths = [1, 63, 64, 65, 200, 1337, 5000]
    rng = np.random.default_rng(head_dim)
    cache = clean(random_cache(rng, problem.layout, lengths), problem.layout)
    shape = (len(lengths), problem.spec.heads, head_dim)
    q = rng.standard_normal(shape).astype(DTYPES["bfloat16"])
    (found,) = run(cupy, CudnnDecode(problem, 8, attention), cache, q)
    assert relative_error(found, exact_attention(q, cache, problem.spec, 1)) < 2 * BOUND


def clean(cache: PagedCache, layout: BlockLayout) -> PagedCache:
    """The cache with zeros where nothing was written, and tables that name blocks that are there."""
    arena, tables = cache.arena.copy(), np.minimum(cache.tables, len(cache.arena) - 1)
    values = arena.view(np.uint16)
    values[values == 0xFFFF] = 0
    assert values.shape[1] * 2 == layout.block_bytes
    return PagedCache(arena, tables, cache.lengths, cache.keys, cache.values)


@pytest.mark.parametrize("route", ["split-k", "single-pass"])
def test_a_model_answers_alike_on_every_route(cupy: Any, route: DecodeRoute) -> None:
    path = default_cache_dir() / "smollm2" / MODEL
    if not path.exists():
        pytest.skip("SmolLM2 is not in the cache")
    prompt = list(range(1000, 1040))
    answers = []
    for forced in (None, route):
        backend: Any = CudaBackend(plans=PlanStore(), decode_route=forced)
        answers.append(greedy(Decoder(load_model(path), backend, "float", context=2048), prompt, 24))
    assert answers[0] == answers[1]


def test_codes_are_not_for_cudnn() -> None:
    attention: Any = None
    with pytest.raises(FormatUnsupported, match="16-bit caches"):
        CudnnDecode(make("int8-g64", 128, "bfloat16"), 8, attention)
