"""The folder of compiled plans, from the flag to the workers' configs."""

from pathlib import Path

import pytest

from control_plane.commands.flags import SYSTEM
from control_plane.config import load
from control_plane.plan import decode_plan, prefill_plan


def folders(given: str | None) -> set[Path | None]:
    (flag,) = (flag for flag in SYSTEM if flag.option == "--plan-cache")
    config = load(dict.fromkeys(flag.settings, given))
    workers = (
        prefill_plan(config, None, dict).configure("p"),
        decode_plan(config, "grpc", dict).configure("d"),
    )
    return {worker.decoder.plan_cache for worker in workers}


def test_unless_told_each_machine_keeps_its_own() -> None:
    assert folders(None) == {None}


def test_a_folder_reaches_the_workers_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    assert folders("plans") == {tmp_path / "plans"}
    assert folders("~/plans") == {tmp_path / "me" / "plans"}


def test_the_environment_may_tell_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVRELAY_PREFILL__PLAN_CACHE", str(tmp_path))
    assert load().prefill.plan_cache == tmp_path
    assert load().decode.plan_cache is None


def test_the_server_of_blocks_holds_plans_too_unless_told_otherwise() -> None:
    config = load()
    for plan in (
        prefill_plan(config, None, dict, "redis://there"),
        decode_plan(config, "x", dict, "redis://there"),
    ):
        assert plan.configure("w").decoder.plan_server == "redis://there"
    assert decode_plan(config, "redis://there", dict).configure("d").decoder.plan_server is None
