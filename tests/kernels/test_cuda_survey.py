"""What the CUDA backend needs: every thing that may be missing is named, with what to install."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest

from kvrelay_kernels.cuda import survey as surveying
from kvrelay_kernels.cuda.device import architecture
from kvrelay_kernels.cuda.driver import Device, Driver, find_driver
from kvrelay_kernels.cuda.survey import Found, Part, cudnn_fault, judge, look, survey
from kvrelay_kernels.errors import BackendUnavailable

H200 = Device("NVIDIA H200", (9, 0), 132, 150_000_000_000)
DRIVER = Driver((13, 0), "580.95.05", 0, (H200,))
WHOLE = Found(DRIVER, "14.2.0", 13, (9, 19, 0), "1.32.0", (13, 1, 0), (13, 0), (80, 90, 100, 120))
B200 = replace(DRIVER, devices=(replace(H200, name="NVIDIA B200", capability=(10, 0)),))


def part(found: Found, name: str) -> Part:
    (one,) = (part for part in judge(found) if part.name == name)
    return one


def test_a_whole_machine_lacks_nothing() -> None:
    parts = judge(WHOLE)
    assert [one.name for one in parts] == [
        *("NVIDIA driver", "GPU", "CuPy", "cuDNN"),
        *("cudnn-frontend", "cuBLASLt", "NVRTC"),
    ]
    assert all(one.ok and one.advice is None for one in parts)
    assert parts[0].found == "580.95.05 (CUDA 13.0)"
    assert parts[1].found == "NVIDIA H200, compute capability 9.0, 132 multiprocessors, 140 GiB"
    assert [one.found for one in parts[2:]] == ["14.2.0", "9.19.0", "1.32.0", "13.1.0", "13.0"]


@pytest.mark.parametrize(
    ("change", "name", "advice"),
    [
        ({"driver": None}, "NVIDIA driver", "525 or later for CUDA 12 or 580 or later for CUDA 13"),
        ({"driver": replace(DRIVER, devices=())}, "GPU", "CUDA_VISIBLE_DEVICES"),
        ({"cupy": None}, "CuPy", "pip install 'kvrelay[cuda13]'"),
        ({"cudnn": None, "driver": B200}, "cuDNN", "slower kernels: pip install -U nvidia-cudnn-cu13"),
        ({"frontend": None, "driver": B200}, "cudnn-frontend", "--no-deps nvidia-cudnn-frontend"),
        ({"cublas": None}, "cuBLASLt", "pip install 'kvrelay[cuda13]'"),
        ({"nvrtc": None}, "NVRTC", "pip install 'kvrelay[cuda13]'"),
    ],
)
def test_what_is_missing_is_named_with_what_to_install(
    change: dict[str, Any], name: str, advice: str
) -> None:
    found = part(replace(WHOLE, **change), name)
    assert not found.ok
    assert found.found is None
    assert advice in (found.advice or "")


@pytest.mark.parametrize(
    ("change", "name", "advice"),
    [
        ({"driver": replace(DRIVER, fault=803)}, "NVIDIA driver", "error 803"),
        ({"driver": replace(DRIVER, cuda=(11, 8))}, "NVIDIA driver", "too old"),
        ({"driver": replace(DRIVER, cuda=(12, 4))}, "CuPy", "update the driver to 580, or pip install"),
        ({"driver": replace(DRIVER, cuda=(12, 4))}, "NVRTC", "kvrelay[cuda12]"),
        ({"driver": replace(DRIVER, cuda=(12, 4))}, "cuBLASLt", "the driver serves 12"),
        ({"driver": replace(DRIVER, devices=(replace(H200, capability=(7, 5)),))}, "GPU", "need compute"),
        ({"cudnn": (9, 10, 1), "driver": B200}, "cuDNN", "older than 9.10.2"),
        ({"frontend": "1.9.0", "driver": B200}, "cudnn-frontend", "older than 1.15"),
        ({"architectures": (80, 86)}, "NVRTC", r"9.0, which this NVRTC does not compile for (up to 8.6)"),
    ],
)
def test_what_cannot_be_used_is_named_with_what_helps(change: dict[str, Any], name: str, advice: str) -> None:
    found = part(replace(WHOLE, **change), name)
    assert not found.ok
    assert found.found is not None
    assert advice in (found.advice or "")


@pytest.mark.parametrize("change", [{"cudnn": None}, {"cudnn": (9, 1, 0)}, {"frontend": None}])
def test_cudnn_is_not_needed_where_prompts_never_take_it(change: dict[str, Any]) -> None:
    found = part(replace(WHOLE, **change), "cudnn-frontend" if "frontend" in change else "cuDNN")
    assert found.ok
    assert found.advice == "used on compute capability 10.x alone"


def test_versions_of_cudnn_that_prompts_cannot_use() -> None:
    assert cudnn_fault((9, 19, 0), (1, 32, 0)) is None
    assert "cuDNN 9.1.0 is older than 9.10.2: pip install" in (cudnn_fault((9, 1, 0), (1, 32)) or "")
    assert "cudnn-frontend 1.9 is older" in (cudnn_fault((9, 19, 0), (1, 9)) or "")


@pytest.mark.parametrize(
    ("capability", "known", "wanted"),
    [
        ((9, 0), (80, 90, 100), "sm_90a"),
        ((8, 0), (80, 86, 90), "sm_80"),
        ((8, 9), (80, 86, 90), "sm_86"),
        ((12, 1), (90, 100, 120), "sm_120"),
        ((10, 3), (100, 103, 110), "sm_103"),
    ],
)
def test_what_to_compile_for(capability: tuple[int, int], known: tuple[int, ...], wanted: str) -> None:
    assert architecture(capability, known) == wanted


@pytest.mark.parametrize("known", [(80, 90, 121), (90,), ()])
def test_a_class_that_the_compiler_does_not_know(known: tuple[int, ...]) -> None:
    with pytest.raises(BackendUnavailable, match=r"12\.0, which this NVRTC .*pip install -U nvidia-cuda"):
        architecture((12, 0), known)


def test_an_older_cuda_gets_its_own_wheels() -> None:
    served = replace(B200, cuda=(12, 8))
    twelve = replace(WHOLE, driver=served, cupy=None, cudnn=None)
    assert part(twelve, "CuPy").advice == "pip install 'kvrelay[cuda12]'"
    assert (part(twelve, "cuDNN").advice or "").endswith("pip install -U nvidia-cudnn-cu12")
    fitting = replace(WHOLE, driver=replace(DRIVER, cuda=(13, 1)), cupy_cuda=12, cublas=(12, 9, 1))
    assert part(fitting, "CuPy").ok
    assert part(fitting, "cuBLASLt").ok


def test_a_class_never_seen_is_told_and_not_refused() -> None:
    found = part(replace(WHOLE, driver=replace(DRIVER, devices=(replace(H200, capability=(12, 0)),))), "GPU")
    assert found.ok
    assert "pytest tests/gpu" in (found.advice or "")


def test_several_gpus_are_counted() -> None:
    found = part(replace(WHOLE, driver=replace(DRIVER, devices=(H200, H200))), "GPU")
    assert (found.found or "").startswith("2 x NVIDIA H200")


def fake_driver(cuda: int = 13000, init: int = 0, devices: tuple[Device, ...] = (H200,)) -> Any:
    """libcuda and libnvidia-ml in one, as ctypes calls them."""

    def give(value: Callable[..., int]) -> Callable[..., int]:
        def call(out: Any, *arguments: Any) -> int:
            out._obj.value = value(*arguments)
            return 0

        return call

    def write(value: Callable[..., str]) -> Callable[..., int]:
        def call(out: Any, size: int, *arguments: Any) -> int:
            out.value = value(*arguments).encode()[: size - 1]
            return 0

        return call

    def attribute(number: int, handle: ctypes.c_int) -> int:
        device = devices[handle.value]
        return {75: device.capability[0], 76: device.capability[1], 16: device.processors}[number]

    return SimpleNamespace(
        cuDriverGetVersion=give(lambda: cuda),
        cuInit=lambda flags: init,
        cuDeviceGetCount=give(lambda: len(devices)),
        cuDeviceGet=give(lambda ordinal: ordinal),
        cuDeviceGetName=write(lambda handle: devices[handle.value].name),
        cuDeviceTotalMem_v2=give(lambda handle: devices[handle.value].memory_bytes),
        cuDeviceGetAttribute=give(attribute),
        nvmlInit_v2=lambda: 0,
        nvmlSystemGetDriverVersion=write(lambda: "580.95.05"),
        nvmlShutdown=lambda: 0,
    )


def test_the_driver_is_asked_for_its_gpus() -> None:
    other = Device("NVIDIA A100", (8, 0), 108, 80_000_000_000)
    assert find_driver(lambda name: fake_driver(devices=(H200, other))) == replace(
        DRIVER, devices=(H200, other)
    )


def test_a_driver_without_a_gpu_is_no_broken_one() -> None:
    found = find_driver(lambda name: fake_driver(init=100))
    assert found == replace(DRIVER, devices=())


def test_a_driver_that_does_not_start_tells_its_code() -> None:
    found = find_driver(lambda name: fake_driver(cuda=12040, init=803))
    assert found == replace(DRIVER, cuda=(12, 4), fault=803, devices=())


def test_the_management_library_may_be_missing() -> None:
    def load(name: str) -> Any:
        if "ml" in name:
            raise OSError(name)
        return fake_driver()

    found = find_driver(load)
    assert found == replace(DRIVER, release=None)
    assert str(found) == "of unknown release (CUDA 13.0)"


def test_no_driver_is_none() -> None:
    def load(name: str) -> Any:
        raise OSError(name)

    assert find_driver(load) is None


def test_a_machine_is_looked_at_whatever_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = look()
    assert [part.name for part in survey()] == [part.name for part in judge(found)]
    monkeypatch.setattr(surveying, "find_driver", lambda: DRIVER)
    assert look().driver == DRIVER


def test_cupy_is_found_by_the_name_of_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "cupy-cuda12x":
            raise PackageNotFoundError(name)
        return "14.0.1"

    monkeypatch.setattr(surveying, "version", version)
    assert (look().cupy, look().cupy_cuda) == ("14.0.1", 12)


def test_versions_are_read_from_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    library = SimpleNamespace(cudnnGetVersion=lambda: 91900, cublasLtGetVersion=lambda: 130100)
    monkeypatch.setattr(surveying, "nvidia_library", lambda *_: library)
    found = look()
    assert (found.cudnn, found.cublas) == ((9, 19, 0), (13, 1, 0))
