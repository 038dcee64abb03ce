"""Which kernels overlap, and how parameters are laid out; what comes of it is seen on a GPU alone."""

import ctypes
import struct

import numpy as np
import pytest

from kvrelay_kernels.cuda.launch import launch_attribute, launch_config, overlaps_kernels, parameter_bytes
from kvrelay_kernels.cuda.module import SOURCES, awaits_producers

OF_A_STEP = [
    "rms_norm", "gate", "rope_append", "rotate_rows", "embed", "move_rows", "decode_plan",
    "draw_peak", "draw_tally", "draw",
]  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "cuda", "wanted"),
    [((9, 0), (12, 3), True), ((10, 0), (13, 0), True), ((8, 9), (13, 0), False), ((9, 0), (12, 2), False)],
)
def test_where_kernels_overlap(capability: tuple[int, int], cuda: tuple[int, int], wanted: bool) -> None:
    assert overlaps_kernels(capability, cuda) == wanted


@pytest.mark.parametrize("source", OF_A_STEP)
def test_kernels_of_a_step_overlap(source: str) -> None:
    assert awaits_producers(source)


def test_who_waits_lets_others_in() -> None:
    waiting = [path for path in SOURCES.glob("*.cu") if awaits_producers(path.stem)]
    assert all("release_dependents();" in path.read_text() for path in waiting)


def test_parameters_lie_as_kernels_read_them() -> None:
    assert parameter_bytes(7) == b"\7" + bytes(7)
    assert parameter_bytes(np.int32(-2)) == b"\xfe\xff\xff\xff"
    assert parameter_bytes(np.float32(1)) == b"\0\0\x80\x3f"
    whole = np.arange(128, dtype=np.uint8).view("V128")[0]
    assert parameter_bytes(whole) == bytes(range(128))


def test_attributes_and_configs_lie_as_the_driver_reads_them() -> None:
    """As cuda.h declares `CUlaunchAttribute` and `CUlaunchConfig`."""
    attribute = launch_attribute(4, 8, 1, 1)
    assert attribute.raw[:72] == struct.pack("ii3I", 4, 0, 8, 1, 1).ljust(72, b"\0")
    config = launch_config((3, 2), (64,), 7, 99, attribute)
    assert struct.unpack("7I4xQQI4x", config) == (3, 2, 1, 64, 1, 1, 7, 99, ctypes.addressof(attribute), 1)
