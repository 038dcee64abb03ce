"""`kvrelay doctor`: each part that CUDA needs is told, on a machine that has none of them too."""

import json
import sys

import pytest

from control_plane.app import run
from control_plane.commands import doctor
from control_plane.commands.doctor import examine
from kvrelay_kernels.cuda.survey import Part
from kvrelay_kernels.registry import Probe

PARTS = ("NVIDIA driver", "GPU", "CuPy", "cuDNN", "cudnn-frontend", "cuBLASLt", "NVRTC")


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA runs on Linux")
def test_every_part_of_cuda_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cuda"]
    assert tuple(part["name"] for part in found) == PARTS
    for part in found:
        assert part["ok"] or part["found"] or part["advice"] or part["name"] == "GPU"


def test_what_is_missing_comes_with_what_helps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [
        Part("NVIDIA driver", "550.54 (CUDA 12.4)"),
        Part("GPU", "NVIDIA L4", "a class that kernels were not tried on yet"),
        Part("CuPy", "14.2.0", "made for CUDA 13", ok=False),
        Part("NVRTC", None, "pip install 'kvrelay[cuda12]'", ok=False),
    ]
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    monkeypatch.setattr(doctor, "survey", lambda: parts)
    assert run(["doctor"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if "CUDA:" in line] == [
        "  CUDA: NVIDIA driver 550.54 (CUDA 12.4)",
        "  CUDA: GPU NVIDIA L4: a class that kernels were not tried on yet",
        "  CUDA: CuPy 14.2.0 is not usable: made for CUDA 13",
        "  CUDA: NVRTC is missing: pip install 'kvrelay[cuda12]'",
    ]


def test_elsewhere_cuda_is_not_looked_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.sys, "platform", "darwin")
    monkeypatch.setattr(doctor, "survey", lambda: pytest.fail("looked for"))
    assert run(["doctor"]) == 0
    assert "CUDA:" not in capsys.readouterr().out
    assert examine([Probe("cpu", True, "")])["cuda"] == []
