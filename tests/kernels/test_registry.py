import sys

import pytest

from kvrelay_kernels.errors import BackendUnavailable
from kvrelay_kernels.registry import load_backend, probe


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_these_run_anywhere(name: str) -> None:
    assert load_backend(name, threads=1).name == name  # type: ignore[arg-type]
    assert next(found for found in probe() if found.name == name).available


def test_a_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvrelay_kernels.mlx.backend", None)
    with pytest.raises(BackendUnavailable, match=r"kvrelay\[apple\]"):
        load_backend("mlx", threads=1)
    found = next(found for found in probe() if found.name == "mlx")
    assert not found.available
    assert "apple" in found.detail


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="known: cpu"):
        load_backend("tpu", threads=1)  # type: ignore[arg-type]
