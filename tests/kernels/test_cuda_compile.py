"""Every CUDA kernel compiles for every architecture we ship, with NVRTC's wheel alone: no GPU, no toolkit."""

from pathlib import Path

import pytest

from kvrelay_kernels.cuda.decode_attention import DecodeProblem, launch_shape
from kvrelay_kernels.cuda.module import SOURCES, KernelCache, KernelKey
from kvrelay_kernels.cuda.nvrtc import CompileFailed, compile_cubin, library
from kvrelay_kernels.errors import BackendUnavailable
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.quant import BlockLayout, parse_format

ARCHITECTURES = ["sm_80", "sm_90a", "sm_100"]
PROBLEMS = {
    "none": ("none", 128, 32, 8, 1),
    "int8": ("int8-g64", 128, 32, 8, 1),
    "int4": ("int4-g64", 128, 32, 8, 1),
    "int4-96": ("int4-g32", 96, 12, 4, 1),
    "int8-256": ("int8-g32", 256, 16, 2, 1),
    "int8-64": ("int8-g64", 64, 9, 3, 1),
    "int8-rows": ("int8-g64", 128, 32, 8, 4),
}


@pytest.fixture(scope="module", autouse=True)
def nvrtc() -> None:
    try:
        library()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def decode_key(name: str, arch: str) -> KernelKey:
    fmt, head_dim, heads, kv_heads, rows = PROBLEMS[name]
    layout = BlockLayout(parse_format(fmt, head_dim, "bfloat16"), kv_heads, head_dim)
    problem = DecodeProblem(layout, AttentionSpec(heads, kv_heads, head_dim, 0.1), "bfloat16", rows)
    return KernelKey.of("decode_attention", problem.constants(launch_shape(problem)), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_decode_attention_compiles(name: str, arch: str) -> None:
    cubin = KernelCache().cubin(decode_key(name, arch))
    assert cubin[:4] == b"\x7fELF"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decode_plan_compiles(arch: str) -> None:
    assert KernelCache().cubin(KernelKey.of("decode_plan", {}, arch))[:4] == b"\x7fELF"


def test_every_source_is_tested() -> None:
    assert {path.stem for path in SOURCES.glob("*.cu")} == {"decode_attention", "decode_plan"}


def test_cubins_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = decode_key("int8", "sm_90a")
    cubin = KernelCache(tmp_path).cubin(key)
    monkeypatch.setattr(
        "kvrelay_kernels.cuda.module.compile_kernel", lambda key: pytest.fail("compiled again")
    )
    assert KernelCache(tmp_path).cubin(key) == cubin


def test_the_log_comes_with_the_error() -> None:
    with pytest.raises(CompileFailed, match="no_such_name"):
        compile_cubin("int x = no_such_name;", {}, ["--gpu-architecture=sm_80"])
