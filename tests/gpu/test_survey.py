"""What `kvrelay doctor` says of a machine with a GPU is what CuPy sees there."""

from typing import Any

from kvrelay_kernels.cuda.device import find_gpu
from kvrelay_kernels.cuda.driver import find_driver
from kvrelay_kernels.cuda.survey import survey


def test_the_driver_and_cupy_see_the_same_gpu(cupy: Any) -> None:
    driver, gpu = find_driver(), find_gpu()
    assert driver is not None
    assert driver.fault == 0
    assert len(driver.devices) == cupy.cuda.runtime.getDeviceCount()
    device = driver.devices[cupy.cuda.Device().id]
    assert (device.name, device.capability) == (gpu.name, gpu.capability)
    assert (device.processors, device.memory_bytes) == (gpu.processors, gpu.memory_bytes)
    assert 1000 * driver.cuda[0] + 10 * driver.cuda[1] == cupy.cuda.runtime.driverGetVersion()


def test_what_runs_these_tests_is_not_called_missing(cupy: Any) -> None:
    parts = {part.name: part for part in survey()}
    assert all(parts[name].ok for name in ("NVIDIA driver", "GPU", "CuPy", "NVRTC")), parts
