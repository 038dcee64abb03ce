"""Kernels as plans: with a warm folder a fresh process compiles nothing."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kvrelay_kernels.cuda import module
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
from kvrelay_kernels.cuda.nvrtc import library
from kvrelay_kernels.errors import BackendUnavailable
from kvrelay_kernels.plans import DeviceClass, open_plans

ROOT = Path(__file__).parents[2]
KEY = KernelKey.of("decode_plan", {}, "sm_90a")

COMPILE = f"""
import sys
from pathlib import Path
sys.path[:0] = [{str(ROOT / "kernels")!r}]
from kvrelay_kernels.cuda.module import KernelCache, KernelKey
cache = KernelCache(Path(sys.argv[1]))
assert cache.cubin(KernelKey.of("decode_plan", {{}}, "sm_90a"))[:4] == b"\\x7fELF"
print(cache.counts.builds, dict(cache.counts.hits))
"""


@pytest.fixture(scope="module", autouse=True)
def nvrtc() -> None:
    try:
        library()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def in_a_fresh_process(folder: Path) -> str:
    command = [sys.executable, "-c", COMPILE, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_second_process_compiles_nothing(tmp_path: Path) -> None:
    assert in_a_fresh_process(tmp_path) == "1 {}"
    assert in_a_fresh_process(tmp_path) == "0 {'disk': 1}"


def test_what_is_no_machine_code_is_compiled_anew(tmp_path: Path) -> None:
    open_plans(tmp_path).write(KEY.graph_key, b"sound, but no cubin")
    cache = KernelCache(tmp_path)
    assert cache.cubin(KEY)[:4] == b"\x7fELF"
    assert (cache.counts.rejected, cache.counts.rebuilt) == (1, 1)


def test_everything_that_decides_a_cubin_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = KernelKey.of("decode_plan", {"WARPS": 4, "ROWS": 1}, "sm_90a")
    assert key.graph_key == KernelKey.of("decode_plan", {"ROWS": 1, "WARPS": 4}, "sm_90a").graph_key
    others = [
        replace(key, source="decode_attention").graph_key,
        replace(key, arch="sm_90").graph_key,
        replace(key, arch="sm_100").graph_key,
        KernelKey.of("decode_plan", {"WARPS": 8, "ROWS": 1}, "sm_90a").graph_key,
        KernelKey.of("decode_plan", {"WARPS": 4}, "sm_90a").graph_key,
    ]
    with monkeypatch.context() as patch:
        patch.setattr(module.nvrtc, "version", lambda: "99.0")
        others.append(key.graph_key)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_texts_digest", lambda source: b"of an edited header")
        others.append(key.graph_key)
    assert len({one.name for one in (key.graph_key, *others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("arch", "capability"), [("sm_80", (8, 0)), ("sm_90a", (9, 0)), ("sm_100", (10, 0)), ("sm_103f", (10, 3))]
)
def test_the_class_follows_from_the_architecture(arch: str, capability: tuple[int, int]) -> None:
    assert replace(KEY, arch=arch).graph_key.device == DeviceClass(capability)


def forget_texts() -> None:
    for cached in (module._headers, module._text, module._texts_digest):
        cached.cache_clear()


def test_the_digest_is_of_all_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOURCES", tmp_path)
    (tmp_path / "kernel.cu").write_text("first")
    (tmp_path / "header.cuh").write_text("second")
    changes = (
        lambda: None,
        lambda: (tmp_path / "header.cuh").write_text("third"),
        lambda: (tmp_path / "kernel.cu").write_text("fourth"),
        lambda: (tmp_path / "header.cuh").rename(tmp_path / "renamed.cuh"),
    )
    seen: set[bytes] = set()
    for change in changes:
        change()
        forget_texts()
        seen.add(module._texts_digest("kernel"))
    forget_texts()
    assert len(seen) == len(changes)
