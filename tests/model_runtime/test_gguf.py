"""GGUF files: every type without loss, and nothing but ModelFileInvalid from broken ones."""

import contextlib
import resource
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kvrelay.errors import ModelFileInvalid
from kvrelay_kernels.quant import AffineWeight
from model_runtime.checkpoint import load_model
from model_runtime.gguf import GgufFile
from model_runtime.tokenizer import load_tokenizer
from model_runtime.weights import Checkpoint
from tests.model_runtime.families import CONFIGS, random_tensors
from tests.model_runtime.gguf_files import write_gguf

BLOCK_BYTES = {Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q5_0: 22, Kind.Q8_0: 34, Kind.Q4_K: 144, Kind.Q6_K: 210}
HALVES = {
    Kind.Q4_0: [0],
    Kind.Q4_1: [0, 2],
    Kind.Q5_0: [0],
    Kind.Q8_0: [0],
    Kind.Q4_K: [0, 2],
    Kind.Q6_K: [208],
}
"""Where the float16 numbers of a block stand."""


def random_blocks(kind: Kind, rows: int, blocks: int) -> NDArray[np.uint8]:
    """Every bit drawn at random, except that scales are kept finite."""
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (rows, blocks, BLOCK_BYTES[kind]), np.uint8)
    for at in HALVES[kind]:
        halves = (rng.standard_normal((rows, blocks, 1)) * 0.1).astype(np.float16)
        raw[..., at : at + 2] = halves.view(np.uint8)
    return raw.reshape(rows, -1)


def one_tensor(path: Path, values: NDArray[Any], kind: Kind) -> GgufFile:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.mark.parametrize("kind", BLOCK_BYTES, ids=lambda kind: kind.name)
def test_block_types_lose_nothing(kind: Kind, tmp_path: Path) -> None:
    raw = random_blocks(kind, 7, 3)
    weight = one_tensor(tmp_path / "t.gguf", raw, kind).read("t")
    assert isinstance(weight, AffineWeight)
    expected = gguf.dequantize(raw, kind)
    assert weight.shape == expected.shape
    assert np.array_equal(weight.dequantize(), expected)
    assert weight.codes.max() < 2**weight.bits


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F32, np.float32), (Kind.F16, np.float16)])
def test_float_types_stay_what_they_are(kind: Kind, dtype: Any, tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 8)).astype(dtype)
    found = one_tensor(tmp_path / "t.gguf", values, kind).read("t")
    assert isinstance(found, np.ndarray)
    assert found.dtype == dtype
    assert np.array_equal(found, values)


def test_bfloat16_stays_what_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    raw = gguf.quantize(values, Kind.BF16)
    found = one_tensor(tmp_path / "t.gguf", raw, Kind.BF16).read("t")
    assert np.array_equal(np.asarray(found, np.float32), gguf.dequantize(raw, Kind.BF16))


def test_a_real_file_is_read_as_the_gguf_package_reads_it(smollm2: Checkpoint) -> None:
    """One layer of SmolLM2, q and k in Hugging Face's order of rows."""
    for name in ("3.q", "3.down", "3.attn_norm"):
        values: Any = smollm2.read(name)
        assert np.isfinite(values.dequantize() if isinstance(values, AffineWeight) else values).all()
    assert smollm2.config.kv_heads == 3
    assert smollm2.config.stop_ids == (0, 2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole small model of Q8_0 blocks."""
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, CONFIGS["qwen3"], random_tensors(CONFIGS["qwen3"]), Kind.Q8_0).read_bytes()


def read_everything(path: Path) -> None:
    """All that is ever done with a file: open it, build its tokenizer, read its weights."""
    checkpoint = load_model(path)
    load_tokenizer(checkpoint)
    for name in checkpoint.tensors:
        checkpoint.read(name)


HEADER = 4800
"""Bytes of the small file before its tensors: changes there are the interesting ones."""
WILD = (0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, HEADER), st.integers(0, 255)), max_size=4),
    numbers=st.lists(st.tuples(st.integers(0, HEADER), st.sampled_from(WILD)), max_size=2),
    cut=st.one_of(st.none(), st.floats(0, 1)),
)
def test_broken_files_are_refused_or_read(
    whole: bytes,
    tmp_path: Path,
    flips: list[tuple[int, int]],
    numbers: list[tuple[int, int]],
    cut: float | None,
) -> None:
    data = bytearray(whole)
    for at, value in flips:
        data[at] = value
    for at, value in numbers:
        data[at : at + 8] = struct.pack("<Q", value)
    if cut is not None:
        del data[int(cut * len(data)) :]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ModelFileInvalid):
        read_everything(path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 64 * 1024, f"grew by {grown} KiB"


@pytest.mark.parametrize("size", [0, 3, 4, 8, 23, 24, 100, 5000, -1])
def test_truncated_files_say_so(whole: bytes, tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:size])
    with pytest.raises(ModelFileInvalid, match=r"truncated|empty|not a GGUF"):
        load_model(path)


def test_the_whole_file_is_read(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "whole.gguf"
    path.write_bytes(whole)
    read_everything(path)


def test_scales_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    raw = random_blocks(Kind.Q8_0, 2, 1)
    raw[1, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    with pytest.raises(ModelFileInvalid, match="NaN or infinite"):
        one_tensor(tmp_path / "t.gguf", raw, Kind.Q8_0).read("t")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 a zip file", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**61), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**61), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "unsupported type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sIB", 3, 0, 1, 1, b"\xff", 0, 1), "not UTF-8"),
    ],
)
def test_foreign_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "foreign.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileInvalid, match=message):
        load_model(path)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_tensor("t", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelFileInvalid, match=r"'mamba' is not supported; supported: llama"):
        load_model(path)


def test_an_unknown_tensor_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileInvalid, match=r"type \d+; supported: F32"):
        one_tensor(tmp_path / "t.gguf", np.zeros((2, 64), np.int32), Kind.I32)


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(ModelFileInvalid, match="does not exist"):
        load_model(tmp_path / "nothing.gguf")
