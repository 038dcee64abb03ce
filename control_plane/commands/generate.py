"""`kvrelay generate` and `kvrelay chat`: one answer, or a conversation."""

import json
import sys
from typing import Annotated

import typer

from control_plane.client import Client
from control_plane.commands.answer import Answer, chat_request, text_request
from control_plane.commands.flags import Target, with_sampling, with_target
from control_plane.commands.session import client_of
from kvrelay.errors import InvalidArgument
from kvrelay.v1.inference_pb2 import GenerateRequest
from kvrelay.v1.sampling_pb2 import SamplingParams

System = Annotated[str | None, typer.Option("--system", help="System message of the chat.")]


@with_target
@with_sampling
def generate(
    *,
    target: Target,
    sampling: SamplingParams,
    prompt: Annotated[str | None, typer.Option(help="The prompt; default: standard input.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put it into the model's chat template.")] = False,
    system: System = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one object instead of the text.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing besides the answer.")] = False,
) -> None:
    """Answer one prompt; the text alone goes to standard output, as it comes."""
    text = _standard_input() if prompt is None else prompt
    if system is not None and not chat:
        raise InvalidArgument("--system needs --chat")
    messages = [("system", system)] if system is not None else []
    request = chat_request([*messages, ("user", text)], sampling) if chat else text_request(text, sampling)
    request.model = target.model
    answer = Answer()
    with client_of(target, quiet) as client:
        answer.read(client.generate(request), _silence if as_json else _say)
        print(json.dumps(answer.as_json) if as_json else "", flush=True)
        if not quiet:
            print(answer.line, file=sys.stderr)


@with_target
@with_sampling
def chat(
    *,
    target: Target,
    sampling: SamplingParams,
    system: System = None,
) -> None:
    """Talk; /reset begins anew, /quit or Ctrl-D ends, Ctrl-C ends an answer."""
    first = [("system", system)] if system is not None else []
    messages = list(first)
    with client_of(target) as client:
        print(f"{client.model().name}: /reset begins anew, /quit ends", file=sys.stderr)
        while (line := _ask()) not in (None, "/quit"):
            if line == "/reset":
                messages = list(first)
            elif line:
                messages.append(("user", line))
                request = chat_request(messages, sampling)
                request.model = target.model
                messages.append(("assistant", _reply(client, request)))


def _reply(client: Client, request: GenerateRequest) -> str:
    """Stream the next message of the conversation; an interrupted one counts as far as it came."""
    answer = Answer()
    events = client.generate(request)
    try:
        answer.read(events, _say)
        print(f"\n[{answer.line}]", file=sys.stderr)
    except KeyboardInterrupt:
        events.close()
        print(" ...", flush=True)
    return answer.text


def _ask() -> str | None:
    """A line of the person; None: there is no more."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InvalidArgument(f"standard input is not UTF-8: {error}") from error


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _silence(text: str) -> None:
    pass
