import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvrelay_kernels.cpu.backend import CpuBackend
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant import BLOCK_TOKENS, BlockLayout, parse_format
from kvrelay_kernels.quant.codec import dequantize, quantize
from kvrelay_kernels.quant.formats import SCHEMES
from kvrelay_kernels.quant.rotation import rotate
from kvrelay_kernels.reference.backend import ReferenceBackend
from tests.kernels.cpu_cases import Case, Run, make_batch, make_tables, relative

CASES = [
    Case("none", 64, 9, 3),
    Case("none", 96, 4, 2, window=70),
    Case("int8-g64", 64, 9, 3),
    Case("int8-g32", 128, 8, 2, window=100, rotated=64),
    Case("int4-g32", 96, 2, 2),
    Case("int4-g64", 256, 4, 1, window=65),
    Case("int4-g64", 64, 9, 3, window=1),
    Case("int6", 64, 9, 3),
    Case("mxfp8", 128, 4, 1),
    Case("mxfp4", 96, 4, 2, window=70),
    Case("nvfp4", 80, 4, 2),
    Case("turbo4", 256, 4, 2, window=100),
    Case("turbo3", 96, 4, 2),
]
NAMES = [f"{case.kv_format}x{case.head_dim}" for case in CASES]
FIXTURES = [HealthCheck.function_scoped_fixture]
SEQUENCE = st.integers(1, 400).flatmap(
    lambda length: st.tuples(st.just(length), st.integers(1, min(length, 150)))
)


@settings(max_examples=30, deadline=None, suppress_health_check=FIXTURES)
@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 2**32),
    sequences=st.lists(SEQUENCE, min_size=1, max_size=4),
)
@example(case=CASES[3], seed=0, sequences=[(400, 1), (64, 64), (129, 66), (65, 1)])
def test_ragged_steps(
    cpu: CpuBackend, reference: ReferenceBackend, case: Case, seed: int, sequences: list[tuple[int, int]]
) -> None:
    """Decode rows and prefill chunks in one step, on a history that an earlier step wrote."""
    rng = np.random.default_rng(seed)
    lengths, new = [list(column) for column in zip(*sequences, strict=True)]
    tables, blocks = make_tables(lengths, rng)
    runs = [Run(backend, case, blocks, seed) for backend in (cpu, reference)]
    past = [(length - count, row) for row, (length, count) in enumerate(sequences) if length > count]
    if past:
        before = make_batch([n for n, _ in past], [n for n, _ in past], tables[[row for _, row in past]])
        values = rng.standard_normal((before.rows, case.width), np.float32)
        for run in runs:
            run.step(values, before)
    # The judge attends to the very bytes under test, so that a code on the edge of rounding is no error.
    batch = make_batch(lengths, new, tables)
    qkv = rng.standard_normal((batch.rows, case.width), np.float32)
    q, found = runs[0].step(qkv, batch)
    wanted_q, _ = runs[1].step(qkv, batch)
    for block in range(blocks):
        runs[1].arena.write_block(Run.layer, block, runs[0].arena.read_block(Run.layer, block))
    wanted = reference.attention(wanted_q, batch, runs[1].arena, Run.layer, case.spec)
    assert relative(q, wanted_q) < 1e-6
    assert relative(found, wanted) < 5e-6


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_a_decode_row_has_the_same_bits_in_every_batch(cpu: CpuBackend, case: Case) -> None:
    rng = np.random.default_rng(1)
    lengths = [1, 64, 129, 300, 257]
    tables, blocks = make_tables(lengths, rng)
    run = Run(cpu, case, blocks, 1)
    whole = make_batch(lengths, lengths, tables)
    run.step(rng.standard_normal((whole.rows, case.width), np.float32), whole)
    qkv = rng.standard_normal((5, case.width), np.float32)
    together = run.step(qkv, make_batch(lengths, [1] * 5, tables))[1]
    single = Run(CpuBackend(threads=1), case, blocks, 1)
    single.arena = run.arena
    for s, length in enumerate(lengths):
        alone = make_batch([length], [1], tables[s : s + 1])
        for each in (run, single):
            assert (each.step(qkv[s : s + 1], alone)[1][0] == together[s]).all()
    mixed = make_batch([300, 257], [40, 1], tables[3:])
    found = run.step(np.concatenate([rng.standard_normal((39, case.width), np.float32), qkv[3:]]), mixed)[1]
    assert (found[-1] == together[4]).all()


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_chunks_do_not_show(cpu: CpuBackend, case: Case) -> None:
    """However a prompt is cut into chunks of two rows and more, results and blocks have the same bits."""
    rng = np.random.default_rng(2)
    tables, blocks = make_tables([300], rng)
    qkv = rng.standard_normal((300, case.width), np.float32)
    whole = Run(cpu, case, blocks, 2)
    _, wanted = whole.step(qkv, make_batch([300], [300], tables))
    for size in (37, 64, 128):
        run = Run(cpu, case, blocks, 2)
        starts = range(0, 300, size)
        parts = [
            run.step(qkv[at : at + size], make_batch([min(300, at + size)], [min(size, 300 - at)], tables))[1]
            for at in starts
        ]
        assert (np.concatenate(parts) == wanted).all()
        for block in range(blocks):
            assert run.arena.read_block(1, block) == whole.arena.read_block(1, block)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_decode_and_prefill_agree(cpu: CpuBackend, case: Case) -> None:
    rng = np.random.default_rng(3)
    tables, blocks = make_tables([200], rng)
    qkv = rng.standard_normal((200, case.width), np.float32)
    run = Run(cpu, case, blocks, 3)
    _, wanted = run.step(qkv, make_batch([200], [200], tables))
    _, found = run.step(qkv[199:], make_batch([200], [1], tables))
    assert relative(found, wanted[199:]) < 5e-6


@pytest.mark.parametrize("name", [*SCHEMES, "int8-g32", "int6-g32", "int4-g32"])
@pytest.mark.parametrize("rows", [3, 130])
def test_blocks_hold_what_the_codec_defines(cpu: CpuBackend, name: str, rows: int) -> None:
    """Bytes are identical: without norm, and turned by nothing, k is rotated alone and v stays as it came."""
    case = Case(name, 64, 2, 2)
    rng = np.random.default_rng(4)
    tables, blocks = make_tables([rows], rng)
    qkv = rng.standard_normal((rows, case.width), np.float32) * rng.choice(
        np.array([1e-6, 1e-2, 1, 3e3], np.float32), (rows, 1)
    )
    qkv[1] = 0.3
    qkv[2, ::7] = 0
    batch = make_batch([rows], [rows], tables)
    run = Run(cpu, case, blocks, 4)
    still = dataclasses.replace(run.rope, cos=np.ones_like(run.rope.cos), sin=np.zeros_like(run.rope.sin))
    cpu.rope_append(qkv, batch, run.arena, 1, case.spec, still, None)
    heads = qkv.reshape(rows, 6, 64)
    fmt = case.layout.format
    v = rotate(heads[:, 4:]) if fmt.rotates_values else heads[:, 4:]
    for side, vectors in (("k", rotate(heads[:, 2:4])), ("v", v)):
        for part, wanted in quantize(vectors, fmt).items():
            frame = case.layout.frame(f"{side}_{part}")
            for token in range(rows):
                block = run.arena.read_block(1, int(tables[0, token // BLOCK_TOKENS]))
                found = np.frombuffer(block, frame.dtype, int(np.prod(frame.shape)), frame.offset).reshape(
                    frame.shape
                )
                assert (found[:, token % BLOCK_TOKENS] == wanted[token]).all(), (part, token)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_poison_comes_out_of_its_own_sequence_only(cpu: CpuBackend, case: Case, poison: float) -> None:
    rng = np.random.default_rng(5)
    tables, blocks = make_tables([70, 70], rng)
    qkv = rng.standard_normal((140, case.width), np.float32)
    qkv[69, -1] = poison
    _, found = Run(cpu, case, blocks, 5).step(qkv, make_batch([70, 70], [70, 70], tables))
    assert not np.isfinite(found[69]).all()
    # Earlier rows of the same block weigh the poisoned value with zero, which does not silence it.
    assert np.isfinite(found[:BLOCK_TOKENS]).all()
    assert np.isfinite(found[70:]).all()


def test_masked_tiles_are_not_computed(cpu: CpuBackend) -> None:
    case = Case("int8-g64", 64, 9, 3, window=64)
    rng = np.random.default_rng(6)
    tables, blocks = make_tables([256], rng)
    qkv = rng.standard_normal((256, case.width), np.float32)
    for window, computed in (
        (None, 1 + 2 + 3 + 4),
        (64, 1 + 2 + 2 + 2),
        (65, 1 + 2 + 2 + 2),
        (66, 1 + 2 + 3 + 3),
    ):
        run = Run(CpuBackend(threads=2), dataclasses.replace(case, window=window), blocks, 6)
        run.step(qkv, make_batch([256], [256], tables))
        counts = run.backend.counts
        assert (counts.computed, counts.skipped) == (computed, 16 - computed)
        run.step(qkv[:1], make_batch([256], [1], tables))
        seen = 4 if window is None else -(-window // 64)
        counts = run.backend.counts
        assert (counts.computed, counts.skipped) == (computed + seen, 16 - computed + 4 - seen)


def test_a_cache_of_halves_is_refused(cpu: CpuBackend) -> None:
    with pytest.raises(FormatUnsupported):
        cpu.new_arena(BlockLayout(parse_format("none", 64, "float16"), 1, 64), 1, 1)


def test_blocks_of_another_size_are_refused(cpu: CpuBackend) -> None:
    arena = cpu.new_arena(BlockLayout(parse_format("int8", 64), 1, 64), 1, 1)
    with pytest.raises(ValueError, match="bytes"):
        arena.write_block(0, 0, memoryview(bytes(64)))
    with pytest.raises(TypeError):
        arena.read_block(0, 0)[0] = 1


def test_dequantized_zero_scale_is_the_bias() -> None:
    fmt = parse_format("int8", 64)
    assert (dequantize(quantize(np.full((1, 64), 0.5), fmt), fmt) == 0.5).all()
