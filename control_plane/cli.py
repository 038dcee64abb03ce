"""The console script `kvrelay`."""

import os
import sys
from contextlib import suppress

from control_plane.interrupts import held


def main() -> None:
    """Carry out the command line, and exit with its code; `control_plane.app` lists the codes."""
    try:
        with held():
            from control_plane.app import run
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(BrokenPipeError):
            stream.flush()
    # Everything is stopped by now; the interpreter's own end can wait for ever for threads of Ray and gRPC.
    os._exit(code)
