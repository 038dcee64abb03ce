"""`kvrelay serve`, `scale` and `status`: a system that stays, and what an operator does with it."""

import json
import sys
import threading
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from rich.table import Table

from control_plane.client import Client
from control_plane.commands.flags import Target, with_server
from control_plane.commands.session import running
from kvrelay.errors import InvalidArgument
from kvrelay.v1.control_pb2 import GetStatusResponse
from kvrelay.v1.worker_pb2 import GetWorkerStatusResponse, Pool, WorkerState

Address = Annotated[str, typer.Option(help="HOST:PORT of the running system.", envvar="KVRELAY_ADDRESS")]
HERE = "127.0.0.1:50051"
COLUMNS = (
    *("worker", "state", "running", "waiting", "slots free", "blocks free"),
    *("cached", "tok/s", "tokens", "moved"),
)


@with_server
def serve(*, target: Target) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    config = target.config
    with running(config, target.verbose) as address:
        print(
            f"{config.model.name} is served at {address} by {config.prefill.workers} prefill and "
            f"{config.decode.workers} decode workers; Ctrl-C ends it",
            file=sys.stderr,
            flush=True,
        )
        threading.Event().wait()


def scale(
    sizes: Annotated[list[str], typer.Argument(metavar="POOL=N...", help="prefill=N, decode=N or both.")],
    address: Address = HERE,
) -> None:
    """Start or drain workers of a running system; returns when that is done."""
    wanted = dict(_size(size) for size in sizes)
    client = Client(address)
    client.connect()
    reached = client.scale(wanted.get("prefill"), wanted.get("decode"))
    print(f"prefill={reached.prefill} decode={reached.decode}")


def status(
    address: Address = HERE,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object instead of tables.")] = False,
) -> None:
    """Show workers, slots, queue, blocks and speed of a running system."""
    client = Client(address)
    client.connect()
    found = client.status()
    if as_json:
        print(json.dumps(_as_json(found)))
        return
    where = f"{found.model}, kv {found.kv_format} over {found.transport}"
    print(f"{where}, {found.queued} queued, {found.running} running")
    table = Table(*COLUMNS, box=None)
    for worker in found.workers:
        table.add_row(*_row(worker))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _size(text: str) -> tuple[str, int]:
    pool, _, number = text.partition("=")
    if pool not in ("prefill", "decode") or not number.isdecimal():
        raise InvalidArgument(f"{text!r} is not prefill=N or decode=N")
    return pool, int(number)


def _row(worker: GetWorkerStatusResponse) -> list[str]:
    state = WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower()
    if worker.state != WorkerState.WORKER_STATE_READY and worker.activity:
        state = f"{state}: {worker.activity}"
    tokens = worker.generated_tokens if worker.pool == Pool.POOL_DECODE else worker.prompt_tokens
    return [
        worker.worker_id,
        state,
        str(worker.running),
        str(worker.waiting),
        f"{worker.slots_free}/{worker.slots}",
        f"{worker.blocks_free}/{worker.blocks}",
        str(worker.blocks_cached),
        f"{worker.tokens_per_second:.1f}",
        str(tokens),
        f"{worker.blocks_moved} blocks, {worker.bytes_moved / 1e6:.1f} MB",
    ]


def _fields(message: Message) -> dict[str, Any]:
    found = {name: getattr(message, name) for name in message.DESCRIPTOR.fields_by_name}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in found.items()}


def _as_json(found: GetStatusResponse) -> dict[str, Any]:
    """All fields by their names in the .proto, numbers as numbers."""
    workers = [
        _fields(worker)
        | {
            "plans": _fields(worker.plans),
            "pool": Pool.Name(worker.pool).removeprefix("POOL_").lower(),
            "state": WorkerState.Name(worker.state).removeprefix("WORKER_STATE_").lower(),
        }
        for worker in found.workers
    ]
    return MessageToDict(
        found, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    ) | {"workers": workers}
