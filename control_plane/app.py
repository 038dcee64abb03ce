"""The `kvrelay` command line: what it is made of, and how it ends.

Exit codes: 0 done; 1 a fault of kvrelay's own; 2 the call or the request is wrong; 3 the model cannot be
had or used; 4 the set-up is not usable (port, library, device, setting); 5 nothing serves it now, try again
later; 6 blocks were lost on their way; 130 Ctrl-C; 141 the reader of standard output went away; 143 SIGTERM.
"""

import logging
import os
import sys
from collections.abc import Sequence

import typer

from control_plane.commands import operate
from control_plane.commands.bench import bench
from control_plane.commands.doctor import doctor
from control_plane.commands.generate import chat, generate
from control_plane.commands.models import models
from kvrelay import errors
from kvrelay.errors import KvrelayError

log = logging.getLogger(__name__)

EXIT_CODES: tuple[tuple[type[KvrelayError], int], ...] = (
    (errors.ModelNotFound, 3),
    (errors.BadModel, 3),
    (errors.BadRequest, 2),
    (errors.BadSetup, 4),
    (errors.Overloaded, 5),
    (errors.Unavailable, 5),
    (errors.LeaseLost, 5),
    (errors.Cancelled, 5),
    (errors.BadBlock, 6),
    (errors.Internal, 1),
)

app = typer.Typer(
    name="kvrelay",
    help="A language-model server with separate prefill and decode pools.",
    epilog="Exit codes: 0 done, 1 internal fault, 2 wrong call or request, 3 model, 4 set-up, "
    "5 try again later, 6 blocks lost.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
for command in (operate.serve, generate, chat, operate.scale, operate.status, bench, doctor):
    app.command()(command)
app.add_typer(models, name="models")


def run(arguments: Sequence[str]) -> int:
    """Carry out a command line; returns the exit code. An error is one line on standard error."""
    command = typer.main.get_command(app)
    try:
        return command.main(list(arguments) or ["--help"], prog_name="kvrelay", standalone_mode=False) or 0
    except KvrelayError as error:
        return _fail(error)
    except typer.TyperException as error:
        return _fail(errors.InvalidArgument(error.format_message()))
    except BrokenPipeError:
        # What is still buffered must not fail again when Python closes the stream.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        log.debug("an unexpected fault", exc_info=error)
        return _fail(errors.Internal(f"{type(error).__name__}: {error}"))


def _fail(error: KvrelayError) -> int:
    leaf = next(leaf for leaf in type(error).__mro__ if leaf in set(errors.leaves()))
    hint = "" if error.retry_after is None else f" (try again in {error.retry_after:.1f} s)"
    print(f"error: {leaf.__name__}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
    return next(code for kind, code in EXIT_CODES if isinstance(error, kind))
