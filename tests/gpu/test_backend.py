"""Steps on the CUDA backend: attention, whole decoders, recording, and memory, against the reference."""

import dataclasses
from pathlib import Path
from threading import Thread
from typing import Any

import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by name from here on)
import numpy as np
import pytest

from kvrelay_kernels.cuda.backend import CudaBackend
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.errors import FormatUnsupported, NonFiniteActivations
from kvrelay_kernels.interface import AttentionSpec, RopeTable, StepBatch, WeightMode
from kvrelay_kernels.plans import PlanStore
from kvrelay_kernels.quant import BlockLayout, parse_format
from kvrelay_kernels.quant.formats import SCHEMES
from kvrelay_kernels.reference.backend import ReferenceArena, ReferenceBackend
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from model_runtime.steps import sequence_steps
from tests.gpu.poisoned import UNIT, error, poisoned, rounded, to_device, to_host
from tests.tiny_model import CONTEXT, POISON, VOCABULARY, write_tiny_model

FORMATS = ["none", "int8-g32", "int4-g32", *SCHEMES]
REFERENCE: Any = ReferenceBackend()
STEPS = [
    ([200, 64, 1], [0, 0, 0], None),
    ([130, 1, 70], [200, 64, 1], None),
    ([1, 1, 1], [330, 65, 71], None),
    ([3, 1, 1], [331, 66, 72], [True, False, True]),
]
"""New tokens, past tokens, and which sequences are told to be prompts."""


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_attention(cupy: Any, fmt: str, element: Element16, window: int | None) -> None:
    heads, kv_heads, dim = 8, 2, 64
    rng = np.random.default_rng(3)
    backend = poisoned(element)
    layout = BlockLayout(parse_format(fmt, dim, element), kv_heads, dim)
    spec = AttentionSpec(heads, kv_heads, dim, dim**-0.5, window)
    tables = rng.permutation(24).astype(np.int32).reshape(3, 8)
    arena = backend.new_arena(layout, 2, 24)
    arena.bytes.fill(0xFF)
    angles = rng.uniform(-3, 3, (CONTEXT, dim // 2))
    rope = RopeTable(*(backend.load_array(side(angles).astype(np.float32)) for side in (np.cos, np.sin)))
    for new, past, read in STEPS:
        plain, _ = sequence_steps(new, past)
        batch = StepBatch(
            plain.token_ids, plain.positions, plain.row_starts, plain.lengths, tables, plain.logit_rows,
            None if read is None else np.array(read),
        )  # fmt: skip
        qkv = rounded(rng.standard_normal((batch.rows, (heads + 2 * kv_heads) * dim)), element)
        q = backend.rope_append(to_device(qkv, element), batch, arena, 1, spec, rope, None)
        found = to_host(backend.attention(q, batch, arena, 1, spec), element)
        same = ReferenceArena(layout, 2, 24)
        for block in range(24):
            same.write_block(1, block, arena.read_block(1, block))
        wanted = REFERENCE.attention(to_host(q, element).astype(np.float64), batch, same, 1, spec)
        assert error(found, wanted) < 2 * UNIT[element]


def test_blocks_come_and_go(cupy: Any) -> None:
    backend = poisoned("float16")
    layout = BlockLayout(parse_format("int8", 64), 3, 64)
    arena = backend.new_arena(layout, 2, 200)
    rng = np.random.default_rng(0)
    payloads = rng.integers(0, 256, (200, layout.block_bytes), np.uint8)

    def write(first: int) -> None:
        for block in range(first, 200, 2):
            arena.write_block(1, block, memoryview(payloads[block].tobytes()))

    writers = [Thread(target=write, args=(first,)) for first in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    kept = [arena.read_block(1, block) for block in range(200)]
    assert all(bytes(view) == payload.tobytes() for view, payload in zip(kept, payloads, strict=True))
    assert not any(bytes(arena.read_block(0, 7)))
    with pytest.raises(ValueError, match="bytes"):
        arena.write_block(0, 0, memoryview(b"short"))


def test_what_does_not_fit_is_refused(cupy: Any) -> None:
    backend = poisoned("float16")
    with pytest.raises(MemoryError, match="GiB free"):
        backend.new_arena(BlockLayout(parse_format("int8", 128), 8, 128), 80, 1_000_000)
    with pytest.raises(FormatUnsupported, match="bfloat16"):
        backend.new_arena(BlockLayout(parse_format("none", 128, "bfloat16"), 8, 128), 1, 1)
    with pytest.raises(FormatUnsupported, match="head dimensions"):
        backend.new_arena(BlockLayout(parse_format("int8-g32", 160), 8, 160), 1, 1)
    with pytest.raises(FormatUnsupported, match="columns"):
        backend.load_linear([np.ones((8, 12), np.float32)], "float")


@pytest.fixture(scope="module", params=[None, 100])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, without and with a window."""
    return write_tiny_model(tmp_path_factory.mktemp("model"), window=request.param)


def decoders(folder: Path, element: Element16, mode: WeightMode = "float") -> tuple[Decoder, Decoder]:
    """The model on the GPU and on the reference."""
    checkpoint = load_model(folder)
    backend: Any = CudaBackend(element=element, plans=PlanStore())
    return Decoder(checkpoint, backend, mode), Decoder(checkpoint, REFERENCE, mode)


CODE_FLIPS = {
    "none": 0.0, "int8": 6e-3, "int6": 2e-2, "int4": 5e-2, "mxfp8": 2e-2, "mxfp4": 6e-2, "nvfp4": 6e-2,
    "turbo4": 6e-2, "turbo3": 7e-2,
}  # fmt: skip
"""What codes that fall to the other side of a rounding add: each moves an element by a step of its scale."""


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_format", CODE_FLIPS)
def test_whole_steps_are_the_references(cupy: Any, folder: Path, element: Element16, kv_format: str) -> None:
    ours, theirs = decoders(folder, element)
    arenas = ours.new_arena(24, kv_format), theirs.new_arena(24, kv_format)
    rng = np.random.default_rng(1)
    tables = rng.permutation(24).astype(np.int32).reshape(3, 8)
    for new, past, read in STEPS:
        plain, _ = sequence_steps(new, past)
        batch = StepBatch(
            rng.integers(0, VOCABULARY - 1, plain.rows).astype(np.int32), plain.positions, plain.row_starts,
            plain.lengths, tables, plain.logit_rows, None if read is None else np.array(read),
        )  # fmt: skip
        found, wanted = ours.forward(batch, arenas[0]), theirs.forward(batch, arenas[1])
        assert error(found, wanted) < 8 * UNIT[element] + CODE_FLIPS[kv_format]


@pytest.mark.parametrize("element", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("kv_format", "mode"),
    [
        *((fmt, "float") for fmt in ("none", "int8", "int4", "nvfp4", "turbo3")),
        *(("int8", mode) for mode in ("int4", "fp8")),
    ],
)
def test_no_cut_and_no_neighbour_changes_a_bit(
    cupy: Any, folder: Path, element: Element16, kv_format: str, mode: WeightMode
) -> None:
    """One prompt, whole, in chunks of several sizes, and in steps that it shares with other prompts."""
    decoder, _ = decoders(folder, element, mode)
    rng = np.random.default_rng(6)
    ids, other = (rng.integers(3, VOCABULARY - 1, 700).tolist() for _ in range(2))
    found: list[tuple[list[bytes], Any]] = []
    for cuts in ([], [64, 128, 192], [1, 2, 300], [513], [699]):
        for shared in (False, True):
            arena = decoder.new_arena(32, kv_format)
            logits: Any = None
            for start, end in zip([0, *cuts], [*cuts, 700], strict=True):
                counts, past, rows = [end - start], [start], ids[start:end]
                if shared:
                    counts, past, rows = [*counts, end - start], [*past, start], [*rows, *other[start:end]]
                batch, _ = sequence_steps(counts, past, rows)
                tables = np.arange(11 * len(counts), dtype=np.int32).reshape(-1, 11)
                read = np.ones(len(counts), np.bool_)
                logits = decoder.forward(dataclasses.replace(batch, block_tables=tables, read=read), arena)[0]
            blocks = [bytes(arena.read_block(layer, block)) for layer in range(3) for block in range(10)]
            found.append((blocks, logits.tobytes()))
    assert all(one == found[0] for one in found[1:])


@pytest.mark.parametrize(("kv_format", "mode"), [("int8", "float"), ("turbo4", "float"), ("int8", "int4")])
def test_recorded_steps_are_the_same_bits(cupy: Any, folder: Path, kv_format: str, mode: WeightMode) -> None:
    decoder, _ = decoders(folder, "float16", mode)
    arena, other = decoder.new_arena(64, kv_format), decoder.new_arena(64, kv_format)
    with pytest.raises(IndexError):
        decoder.forward(sequence_steps([1, 1], [0, 0], [1, VOCABULARY])[0], arena)
    rng = np.random.default_rng(2)
    prompt, _ = sequence_steps([70, 5, 900], [0, 0, 0], rng.integers(3, VOCABULARY - 1, 975).tolist())
    for cache in (arena, other):
        decoder.forward(prompt, cache)
    for step in range(40):
        past = [70 + step, 5 + step, 900 + step]
        batch, _ = sequence_steps([1, 1, 1], past, rng.integers(3, VOCABULARY - 1, 3).tolist())
        wide = StepBatch(
            batch.token_ids, batch.positions, batch.row_starts, batch.lengths,
            np.pad(prompt.block_tables, ((0, 0), (0, 4 * (step % 3)))), batch.logit_rows,
        )  # fmt: skip
        recorded = decoder.forward(wide, arena).copy()
        eager = decoder.forward(wide, other, on_layer=lambda layer: None)
        assert np.array_equal(recorded, eager), f"step {step}"
    with pytest.raises(IndexError):
        decoder.forward(sequence_steps([1, 1, 1], [200, 200, 200], [1, VOCABULARY, 1])[0], arena)


@pytest.mark.parametrize(
    ("kv_format", "mode"), [("none", "float"), ("int8", "int4"), ("int8", "fp8"), ("turbo3", "float")]
)
def test_kernels_that_overlap_give_the_same_bits(
    cupy: Any, folder: Path, kv_format: str, mode: WeightMode
) -> None:
    found: list[list[bytes]] = []
    for overlap in (False, True):
        backend: Any = CudaBackend(plans=PlanStore(), overlap=overlap)
        decoder = Decoder(load_model(folder), backend, mode)
        arena, rng = decoder.new_arena(64, kv_format), np.random.default_rng(8)
        prompt, _ = sequence_steps([290, 5, 900], [0, 0, 0], rng.integers(3, VOCABULARY - 1, 1195).tolist())
        logits = [decoder.forward(prompt, arena).tobytes()]
        for step in range(30):
            past, ids = [290 + step, 5 + step, 900 + step], rng.integers(3, VOCABULARY - 1, 3).tolist()
            batch, _ = sequence_steps([1, 1, 1], past, ids)
            batch = dataclasses.replace(batch, block_tables=prompt.block_tables)
            # Recorded, and at times as the step of a prompt is run.
            eager = (lambda layer: None) if step % 5 == 4 else None
            logits.append(decoder.forward(batch, arena, on_layer=eager).tobytes())
        found.append(logits)
    assert found[0] == found[1]


def test_nan_is_reported_and_harms_nobody_else(cupy: Any, folder: Path) -> None:
    decoder, _ = decoders(folder, "float16")
    arena = decoder.new_arena(8, "int8")
    for count in (70, 1):
        ids = np.full(2 * count, 5, np.int32)
        ids[-1] = POISON
        with pytest.raises(NonFiniteActivations) as caught:
            decoder.forward(sequence_steps([count, count], [0, 0], ids.tolist())[0], arena)
        assert caught.value.sequences == {1}


def test_memory_comes_to_rest(cupy: Any, folder: Path) -> None:
    """1000 prompts of all lengths, in chunks, together and alone, take no more memory than the first 100."""
    decoder, _ = decoders(folder, "float16")
    arena = decoder.new_arena(64, "int8")
    decoder.warm(arena, 512, 4)
    pool, rng = cupy.get_default_memory_pool(), np.random.default_rng(4)
    held = 0
    for prompt in range(1000):
        counts = rng.integers(1, 512 // (1 + prompt % 3), 1 + prompt % 3).tolist()
        decoder.forward(sequence_steps(counts, [0] * len(counts))[0], arena)
        if prompt == 100:
            held = pool.total_bytes()
    assert pool.total_bytes() <= held
