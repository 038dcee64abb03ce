"""The console script `kvrelay`."""

import sys

from control_plane.interrupts import held


def main() -> None:
    """Carry out the command line, and exit with its code; `control_plane.app` lists the codes."""
    try:
        with held():
            from control_plane.app import run
        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
