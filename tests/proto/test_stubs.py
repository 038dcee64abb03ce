"""The committed stubs are what the pinned generator makes of the .proto files; buf finds no fault."""

import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"


def test_the_generator_is_the_pinned_one() -> None:
    assert version("grpcio-tools") == "1.80.0"


def test_the_stubs_are_up_to_date(tmp_path: Path) -> None:
    sources = sorted(PROTO.glob("kvrelay/v1/*.proto"))
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "pyi")]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", *outputs, *map(str, sources)]
    subprocess.run(command, check=True)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*.py*")}
    committed = {path.relative_to(PROTO): path.read_bytes() for path in PROTO.glob("kvrelay/v1/*_pb2*.py*")}
    names = made.keys() | committed.keys()
    stale = sorted(str(name) for name in names if made.get(name) != committed.get(name))
    assert stale == [], "run `make proto`"


def test_buf_finds_no_fault() -> None:
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or "buf"
    found = subprocess.run([buf, "lint"], check=False, cwd=ROOT, capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
