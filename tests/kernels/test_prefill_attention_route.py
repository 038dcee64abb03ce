"""Which kernel prompts take on which class, and what happens where cuDNN is missing, too old, or refuses."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kvrelay_kernels.block_mask import BlockMask
from kvrelay_kernels.cuda import prefill_attention
from kvrelay_kernels.cuda.batch import DeviceBatch, slots_of
from kvrelay_kernels.cuda.cudnn_attention import CudnnAttention
from kvrelay_kernels.cuda.prefill_attention import PrefillAttention
from kvrelay_kernels.cuda.prefill_attention_blocks import BlocksInPlace
from kvrelay_kernels.cuda.prefill_attention_route import Route, choose_route
from kvrelay_kernels.errors import BackendUnavailable, FormatUnsupported
from kvrelay_kernels.interface import BlockCounts
from kvrelay_kernels.plans import DeviceClass, PlanStore
from tests.gpu.prompt_case import POISON, Case, make_case
from tests.kernels.host_kernels import COMPILER, HostKernels

FAULT = "cuDNN is missing"
EVERY_CLASS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_103", "sm_120", "sm_121", "sm_130")


@pytest.mark.parametrize("arch", EVERY_CLASS)
@pytest.mark.parametrize("fault", [None, FAULT])
def test_every_class_has_a_route_for_every_prompt(arch: str, fault: str | None) -> None:
    own: Route = "sparse" if arch == "sm_90a" else "sparse_mma"
    assert choose_route(arch, True, cudnn_fault=fault) == own
    by_cudnn = arch.startswith("sm_10") and fault is None
    assert choose_route(arch, False, cudnn_fault=fault) == ("cudnn" if by_cudnn else own)


@pytest.mark.parametrize("arch", EVERY_CLASS)
def test_the_portable_route_can_be_forced_anywhere(arch: str) -> None:
    assert choose_route(arch, True, "sparse_mma") == choose_route(arch, False, "sparse_mma") == "sparse_mma"
    assert choose_route(arch, False, "cudnn") == "cudnn"


def test_routes_that_cannot_be_forced() -> None:
    with pytest.raises(FormatUnsupported, match=r"compute capability 9\.0, not sm_80: take sparse_mma"):
        choose_route("sm_80", False, "sparse")
    with pytest.raises(FormatUnsupported, match="no masks by tiles"):
        choose_route("sm_90a", True, "cudnn")
    with pytest.raises(BackendUnavailable, match=FAULT):
        choose_route("sm_100", False, "cudnn", FAULT)


class HostUploads:
    """Arrays stay where they are."""

    def send(self, arrays: Sequence[NDArray[np.int32]], into: Any = None) -> list[Any]:
        """The arrays, each in one piece."""
        return [np.ascontiguousarray(array) for array in arrays]


class HostArena:
    """A case's cache as layer 1 of an arena; layer 0 is NaN."""

    def __init__(self, case: Case) -> None:
        self.layout, self.layers, self.blocks = case.layout, 2, len(case.cache.arena)
        self.bytes = np.stack([np.full_like(case.cache.arena, 0xFF), case.cache.arena])

    def layer_address(self, layer: int) -> int:
        """Where a layer begins."""
        return self.bytes[layer].ctypes.data


class Refusing:
    """In place of `CudnnAttention`: there, but without a kernel for anything."""

    def __init__(self, plans: PlanStore, device: DeviceClass) -> None:
        self.asked = 0

    def __call__(self, *arguments: Any) -> None:
        """Refuses, as cuDNN does."""
        self.asked += 1
        raise FormatUnsupported("cuDNN has no attention kernel for this")


@pytest.fixture
def on_class(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the class that launchers believe to run on."""

    def on(arch: str) -> None:
        for module in ("prefill_attention", "block_sparse_mma"):
            monkeypatch.setattr(f"kvrelay_kernels.cuda.{module}.device_arch", lambda: arch)
        monkeypatch.setattr("kvrelay_kernels.cuda.block_sparse_mma.shared_memory_limit", lambda: 163 << 10)

    return on


def new_attention(
    folder: Path, counts: BlockCounts | None = None, route: Route | None = None
) -> PrefillAttention:
    kernels: Any = HostKernels(folder)
    uploads: Any = HostUploads()
    return PrefillAttention("float16", kernels, uploads, PlanStore(), DeviceClass((8, 0), 4), counts, route)


def attend(
    attention: PrefillAttention, case: Case, masks: dict[int, BlockMask] | None = None
) -> NDArray[Any]:
    """The case's output, from a poisoned buffer."""
    host, out = case.batch, np.full(case.q.shape, POISON, np.uint16)
    batch = DeviceBatch(
        host, host.positions, slots_of(host), host.row_starts, host.lengths, host.block_tables, None
    )
    arena: Any = HostArena(case)
    attention.prefill(case.q.view(np.uint16), batch, arena, 1, case.spec, out, masks)
    return out.view(np.float16).astype(np.float32)


def small_case() -> Case:
    return make_case(np.random.default_rng(), [(70, 90), (3, 3)], (2, 1, 64), element="float16", window=40)


def plain(case: Case) -> NDArray[np.float64]:
    """Float64 attention of all rows."""
    out = np.empty(case.q.shape)
    starts = case.batch.row_starts
    for s, (k, v) in enumerate(zip(case.cache.keys, case.cache.values, strict=True)):
        rows = slice(starts[s], starts[s + 1])
        seen = BlockMask.causal(int(starts[s + 1] - starts[s]), len(k), case.spec.window).dense()
        scores = np.einsum("rhd,nd->hrn", case.q[rows].astype(np.float64), k[:, 0]) * case.spec.scale
        p = np.exp(np.where(seen, scores, -np.inf))
        out[rows] = np.einsum("hrn,nd->rhd", p / p.sum(-1, keepdims=True), v[:, 0])
    return out


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
def test_prompts_on_a_class_without_an_own_kernel(on_class: Any, tmp_path: Path) -> None:
    on_class("sm_80")
    counts = BlockCounts()
    attention, case = new_attention(tmp_path, counts), small_case()
    assert np.linalg.norm(attend(attention, case) - plain(case)) < 1e-3 * np.linalg.norm(plain(case))
    none = {0: BlockMask.causal(70, 90).restricted(np.zeros((1, 1), np.bool_))}
    assert not attend(attention, case, none)[:70].any()
    assert counts.routes == {"sparse_mma": 2}
    assert (counts.computed, counts.skipped) == (2 + 1, 0 + 1)


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
def test_without_cudnn_its_class_takes_the_portable_kernel(
    on_class: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(plans: PlanStore, device: DeviceClass) -> CudnnAttention:
        raise BackendUnavailable(FAULT)

    on_class("sm_100")
    monkeypatch.setattr(prefill_attention, "CudnnAttention", missing)
    with caplog.at_level(logging.INFO):
        attention = new_attention(tmp_path)
    assert caplog.messages == [
        f"prompts do without cuDNN: {FAULT}",
        "prompts on sm_100 take the route sparse_mma",
    ]
    case = small_case()
    assert np.linalg.norm(attend(attention, case) - plain(case)) < 1e-3 * np.linalg.norm(plain(case))
    with pytest.raises(BackendUnavailable, match=FAULT):
        new_attention(tmp_path, route="cudnn")


@pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
def test_what_cudnn_refuses_takes_the_portable_kernel(
    on_class: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_class("sm_100")
    monkeypatch.setattr(prefill_attention, "CudnnAttention", Refusing)
    monkeypatch.setattr(prefill_attention, "open_blocks", lambda arena, *_: BlocksInPlace(arena))
    counts = BlockCounts()
    attention, case = new_attention(tmp_path, counts), small_case()
    for _ in range(3):
        assert np.linalg.norm(attend(attention, case) - plain(case)) < 1e-3 * np.linalg.norm(plain(case))
    assert counts.routes == {"sparse_mma": 3}
    refusing: Any = attention._cudnn  # pyright: ignore[reportPrivateUsage]
    assert refusing.asked == 1
    assert len([text for text in caplog.messages if "no attention kernel" in text]) == 1
    with pytest.raises(FormatUnsupported, match="no attention kernel"):
        attend(new_attention(tmp_path, route="cudnn"), case)
