"""A step's kernels one behind the other, as the CUDA backend calls them, run on this processor.

What the pass over q, k and v writes is read by the attention of prompts, by way of expanded blocks, and by
that of decoding rows, as it is; what comes out rotated is turned back. The reference reads the same bytes.
"""

from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda.batch import DeviceBatch, slots_of
from kvrelay_kernels.cuda.block_sparse import BlockMaps, SparseProblem
from kvrelay_kernels.cuda.block_sparse_mma import BlockSparseMma
from kvrelay_kernels.cuda.decode_attention import DecodeLaunch, DecodeProblem, Element16, LaunchShape
from kvrelay_kernels.cuda.expand import Expansion, Scratch
from kvrelay_kernels.cuda.prefill_attention_step import lay_out_step, prompt_masks
from kvrelay_kernels.cuda.rope import RopeAppend
from kvrelay_kernels.cuda.rows import RowKernels
from kvrelay_kernels.interface import RopeTable
from kvrelay_kernels.reference.backend import ReferenceArena, ReferenceBackend
from tests.gpu.append_case import AppendCase, make_case
from tests.gpu.poisoned import UNIT, error
from tests.kernels.elements import elements, floats
from tests.kernels.host_kernels import COMPILER, HostKernels, box_map

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
REFERENCE: Any = ReferenceBackend()
ARCH, SHARED = "sm_80", 163 << 10


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(autouse=True)
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launchers ask the device for its architecture; this one has no copy engine."""
    for module in ("rope", "expand", "rows"):
        monkeypatch.setattr(f"kvrelay_kernels.cuda.{module}.device_arch", lambda: ARCH)


class Step:
    """Rows of one case in one layer, whose blocks begin as NaN."""

    def __init__(self, case: AppendCase, kernels: Any) -> None:
        self.case, self.layout, self._kernels = case, case.layout, kernels
        self.bytes = np.full((case.blocks, self.layout.block_bytes), 0xFF, np.uint8)
        self.q = np.full((case.batch.rows, case.spec.heads * case.spec.head_dim), 0xFFFF, np.uint16)
        self.out = self.q.copy()

    def layer_address(self, layer: int) -> int:
        """Where the layer lies."""
        return self.bytes.ctypes.data

    def append(self) -> None:
        """Write q, and k and v into blocks."""
        case, batch = self.case, self.case.batch
        there = DeviceBatch(
            batch, batch.positions, slots_of(batch), batch.row_starts, batch.lengths, batch.block_tables, None
        )
        qkv, table, arena = elements(case.qkv, case.element), RopeTable(case.cos, case.sin), self
        write: Any = RopeAppend(case.element, self._kernels)
        write(qkv, there, arena, 0, case.spec, table, case.norms, self.q)

    def attend_as_prompts(self) -> None:
        """Expand, and attend tile by tile."""
        case, spec = self.case, self.case.spec
        layout = lay_out_step(case.batch, prompt_masks(case.batch, spec.window))
        scratch = Scratch(Expansion(self.layout, case.element), case.blocks, self._kernels)
        scratch.blocks = np.full((len(layout.sources), scratch.layout.block_bytes), 0xFF, np.uint8)
        scratch.fill(self.layer_address(0), layout.sources)
        maps = BlockMaps(scratch.layout, scratch.blocks.ctypes.data, len(scratch.blocks))
        problem = SparseProblem(spec.heads, spec.kv_heads, spec.head_dim, case.element)
        work = layout.work.items, layout.work.entries, layout.work.low
        attention = BlockSparseMma(problem, self._kernels, ARCH, SHARED)
        attention(self.q, self.out, maps, 0, layout.tables, work, spec.scale)

    def attend_as_decoding(self) -> None:
        """Attend straight on the codes, for the last row of each sequence."""
        last = self.case.batch.row_starts[1:] - 1
        q, out = self.q[last], self.out[last]
        problem = DecodeProblem(self.layout, self.case.spec, self.case.element)
        shape = LaunchShape(warps=2, tile=64 if self.layout.format.code_bits <= 4 else 32)
        launch = DecodeLaunch(problem, shape, self.case.batch.sequences, 2, ARCH, self._kernels, np)
        launch.plan(self.case.batch.lengths)
        boxes = box_map(self.bytes.reshape(-1), problem.box_rows(shape))
        launch(q, self.layer_address(0), boxes, 0, self.case.batch.block_tables, out)
        self.out[last] = out

    def turn_back(self) -> None:
        """Where the format rotates values."""
        if self.layout.format.rotates_values:
            RowKernels(self.case.element, self._kernels).rotate(self.out, self.case.spec.head_dim)

    def error(self, rows: Any = slice(None)) -> float:
        """Of some rows of `out`, against float64 attention over the same bytes."""
        case, arena = self.case, ReferenceArena(self.layout, 1, self.case.blocks)
        for block, octets in enumerate(self.bytes):
            arena.write_block(0, block, memoryview(octets.tobytes()))
        queries = floats(self.q, case.element).astype(np.float64)
        wanted = REFERENCE.attention(queries, case.batch, arena, 0, case.spec)
        return error(floats(self.out, case.element)[rows], wanted[rows])


@pytest.mark.parametrize(
    ("fmt", "dim", "element"),
    [("int6-g32", 96, "bfloat16"), ("nvfp4", 64, "float16"), ("turbo3", 64, "bfloat16")],
)
def test_prompts(kernels: Any, fmt: str, dim: int, element: Element16) -> None:
    step = Step(make_case(np.random.default_rng(), fmt, (2, 1, dim), element, [70, 3, 130], [0] * 3), kernels)
    step.append()
    step.attend_as_prompts()
    step.turn_back()
    assert step.error() < 2 * UNIT[element]


@pytest.mark.parametrize(
    ("fmt", "dim", "element"),
    [("mxfp8", 96, "float16"), ("turbo4", 64, "bfloat16"), ("turbo3", 128, "float16")],
)
def test_decoding_rows(kernels: Any, fmt: str, dim: int, element: Element16) -> None:
    step = Step(make_case(np.random.default_rng(), fmt, (2, 1, dim), element, [70, 3, 130], [0] * 3), kernels)
    step.append()
    step.attend_as_decoding()
    step.turn_back()
    assert step.error(step.case.batch.row_starts[1:] - 1) < 2 * UNIT[element]
