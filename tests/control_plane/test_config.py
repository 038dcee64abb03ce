"""Flags come before the environment, that before the file, and the file before the defaults."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from control_plane.config import load
from control_plane.plan import decode_plan, gateway_config, prefill_plan
from kvrelay.errors import BadSetup


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with one setting of each kind."""
    path = tmp_path / "kvrelay.toml"
    path.write_text('[gateway]\nport = 3\nhost = "0.0.0.0"\n[decode]\nslots = 3\nworkers = 3\n')
    return path


def test_the_defaults_serve_a_small_machine() -> None:
    config = load()
    assert (config.model.name, config.prefill.workers, config.decode.workers) == ("smollm2", 1, 1)
    assert (config.transport.uri, config.ray.address, config.prefill.cpus) == ("grpc", None, 0)


def test_flags_before_environment_before_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVRELAY_GATEWAY__PORT", "2")
    monkeypatch.setenv("KVRELAY_DECODE__SLOTS", "2")
    config = load({"gateway.port": 1, "decode.slots": None}, file)
    assert (config.gateway.port, config.decode.slots, config.decode.workers) == (1, 2, 3)
    assert config.gateway.host == "0.0.0.0"


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().gateway.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        ({"gateway.port": 70000}, "gateway.port: Input should be less than or equal to 65535, not 70000"),
        ({"gateway.prot": 1}, "gateway.prot: Extra inputs are not permitted"),
        ({"decode.workers": 0}, "decode.workers"),
        ({"model.weights": "int3"}, "model.weights"),
        ({"decode.lease_seconds": -1}, "decode.lease_seconds"),
    ],
)
def test_a_wrong_setting_is_named(flags: dict[str, object], fault: str) -> None:
    with pytest.raises(BadSetup, match=fault):
        load(flags)


def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVRELAY_DECODE__SLOTS", "many")
    with pytest.raises(BadSetup, match=r"decode\.slots.*'many'"):
        load()


@pytest.mark.parametrize("text", ["[gateway\n", "[gateway]\nports = 1\n", "gateway = 1\n"])
def test_a_wrong_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "wrong.toml").write_text(text)
    with pytest.raises(BadSetup):
        load({}, tmp_path / "wrong.toml")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetup, match="there is no configuration file"):
        load({}, tmp_path / "nowhere.toml")


def test_the_rooms_are_told_what_was_set() -> None:
    config = load(
        {
            "model.kv_format": "int4",
            "prefill.threads": 3,
            "prefill.chunk_tokens": 96,
            "decode.slots": 5,
            "gateway.max_queued": 7,
        }
    )
    prefill = prefill_plan(config, "redis://here", dict).configure("prefill-0")
    decode = decode_plan(config, "redis://there", dict).configure("decode-0")
    assert (prefill.worker_id, prefill.chunk_tokens, prefill.decoder.threads) == ("prefill-0", 96, 3)
    assert (prefill.decoder.kv_format, decode.decoder.kv_format) == ("int4", "int4")
    assert (prefill.store, decode.transport, decode.slots) == ("redis://here", "redis://there", 5)
    assert gateway_config(config).max_queued == 7


def test_workers_on_a_cluster_listen_where_other_nodes_reach_them() -> None:
    assert prefill_plan(load(), None, dict).host == "127.0.0.1"
    assert prefill_plan(load({"ray.address": "auto"}), None, dict).host is None
