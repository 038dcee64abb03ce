"""The command line: what it takes, what it prints, how it ends."""

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from control_plane.app import EXIT_CODES, app, run
from control_plane.commands.bench import Seen, percentiles, report
from control_plane.commands.doctor import examine
from control_plane.commands.flags import SAMPLING
from kvrelay import errors
from kvrelay.v1.inference_pb2 import GenerateRequest
from kvrelay.v1.sampling_pb2 import SamplingParams
from kvrelay_kernels.registry import Probe

COMMANDS = {"serve", "generate", "chat", "scale", "status", "bench", "models", "doctor"}


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def test_the_commands_are_those_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    listed = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert listed >= COMMANDS
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    assert {name for name in COMMANDS if f"`kvrelay {name}" in readme} == COMMANDS


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert "Usage: kvrelay" in capsys.readouterr().out


def test_every_sampling_field_has_its_flag() -> None:
    assert [flag.name for flag in SAMPLING] == [field.name for field in SamplingParams.DESCRIPTOR.fields]


def test_flags_become_sampling_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[SamplingParams] = []
    command = typer.main.get_command(app)

    def text_request(text: str, sampling: SamplingParams) -> GenerateRequest:
        taken.append(sampling)
        return GenerateRequest()

    monkeypatch.setattr("control_plane.commands.generate.text_request", text_request)
    monkeypatch.setattr("control_plane.commands.generate.client_of", lambda *_: pytest.skip("parsed"))
    arguments = ["generate", "--prompt", "x", "--temperature", "0", "--stop-ids", "5", "--stop-ids", "7"]
    with pytest.raises(pytest.skip.Exception):
        command.main([*arguments, "--stop", "a", "--max-tokens", "9", "--ignore-eos"], standalone_mode=False)
    expected = SamplingParams(temperature=0, stop_ids=[5, 7], stop=["a"], max_tokens=9, ignore_eos=True)
    assert taken == [expected]
    # Zero is a value, not the absence of one.
    assert taken[0].HasField("temperature")
    assert not taken[0].HasField("top_k")


@pytest.mark.parametrize(
    ("arguments", "code", "leaf"),
    [
        (["nonsense"], 2, "InvalidArgument"),
        (["generate", "--prompt", "x", "--temperature", "warm"], 2, "InvalidArgument"),
        (["generate", "--prompt", "x", "--top-k", "-1"], 2, "InvalidArgument"),
        (["generate", "--prompt", "x", "--system", "y"], 2, "InvalidArgument"),
        (["generate", "--prompt", "x\udcff"], 2, "InvalidArgument"),
        (["generate", "--prompt", "x", "--model", "no such model"], 3, "ModelNotFound"),
        (["generate", "--prompt", "x", "--kv-format", "int3"], 4, "BadSetup"),
        (["generate", "--prompt", "x", "--prefill", "0"], 4, "BadSetup"),
        (["generate", "--prompt", "x", "--config", "nowhere.toml"], 4, "BadSetup"),
        (["generate", "--prompt", "x", "--address", "127.0.0.1:1"], 5, "NoWorker"),
        (["generate", "--prompt", "x", "--address", "127.0.0.1:1", "--slots", "4"], 2, "InvalidArgument"),
        (["status", "--address", "127.0.0.1:1"], 5, "NoWorker"),
        (["scale", "prefill=many"], 2, "InvalidArgument"),
        (["scale", "encode=2"], 2, "InvalidArgument"),
        (["models", "pull", "nonsense"], 3, "ModelNotFound"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    arguments: list[str], code: int, leaf: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {leaf}: ")
    assert printed.err.count("\n") == 1


def test_a_broken_model_file_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and no more")
    assert run(["generate", "--prompt", "x", "--model", str(tmp_path / "broken.gguf")]) == 3
    assert capsys.readouterr().err.startswith("error: ModelFileInvalid: ")


def test_a_second_server_on_a_port_says_so_at_once(
    taken_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    assert run(["serve", "--port", str(taken_port)]) == 4
    assert time.monotonic() - began < 10  # before any worker is started
    said = capsys.readouterr().err
    assert said == (
        f"error: BadSetup: cannot listen on 127.0.0.1:{taken_port}: is another server running there?\n"
    )


def test_every_error_has_an_exit_code() -> None:
    for leaf in errors.leaves():
        assert any(issubclass(leaf, kind) for kind, _ in EXIT_CODES), leaf


def test_the_doctor_says_what_auto_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"] in found["backends"]
    assert found["backends"][found["chosen"]]["available"]
    assert found["libraries"]["ray"]


def test_the_doctor_gives_its_reason() -> None:
    found = examine([Probe("cpu", True, ""), Probe("cuda", False, "no driver")])
    assert found["chosen"] == "cpu"
    assert "cuda is not usable" in found["reason"]


def test_known_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "list"]) == 0
    assert "smollm2" in capsys.readouterr().out


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(1, 101)]
    assert percentiles(values) == {"mean": 50.5, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert percentiles([3.0])["p50"] == 3.0
    assert percentiles([]) == {}


def test_a_report_counts_failures_apart() -> None:
    good = Seen(first=0.5, total=2.0, gaps=[0.1, 0.3], tokens=3, bytes_moved=10)
    found = report([good, Seen(error="QueueFull: full")], seconds=2.0)
    assert (found["failed"], found["errors"], found["output_tokens_per_second"]) == (
        1,
        ["QueueFull: full"],
        1.5,
    )
    assert found["inter_token_seconds"]["max"] == 0.3
