"""The flags that several commands share, and what they make: a configuration, sampling parameters."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from control_plane.config import KvrelayConfig, load
from kvrelay.errors import InvalidArgument
from kvrelay.v1.sampling_pb2 import SamplingParams
from kvrelay_kernels.quant.formats import KNOWN


@dataclass(frozen=True)
class Flag:
    """One flag of the command line."""

    name: str
    kind: Any
    help: str
    settings: tuple[str, ...] = ()
    """Dotted names of the settings that it fills."""
    short: str | None = None
    default: Any = None
    variable: str | None = None
    """Of the environment, where it is no setting."""

    @property
    def option(self) -> str:
        """As it is typed."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def parameter(self) -> inspect.Parameter:
        """As typer reads it from a command's signature."""
        names = [self.option, *([self.short] if self.short else [])]
        kind = bool if self.kind is bool else self.kind | None
        annotation = Annotated[kind, typer.Option(*names, help=self.help, show_default=bool(self.default))]
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=self.default, annotation=annotation
        )


SYSTEM = (
    Flag("model", str, "Known name, GGUF file, folder or Hugging Face repo id.", ("model.name",)),
    Flag("weights", str, "auto, float, int8, fp8 or int4.", ("model.weights",)),
    Flag("kv_format", str, f"Format of the KV cache: {', '.join(KNOWN)}.", ("model.kv_format",)),
    Flag("backend", str, "auto, cpu, mlx, cuda or reference.", ("model.backend",)),
    Flag("element", str, "float32, float16 or bfloat16; default on cuda: the model's.", ("model.element",)),
    Flag("prefill", int, "Prefill workers.", ("prefill.workers",)),
    Flag("decode", int, "Decode workers.", ("decode.workers",)),
    Flag(
        "threads",
        int,
        "Compute threads of a worker; default: all cores.",
        ("prefill.threads", "decode.threads"),
    ),
    Flag(
        "gpus",
        float,
        "Share of a GPU that a worker reserves; default: none of a single one, an even share of several.",
        ("prefill.gpus", "decode.gpus"),
    ),
    Flag(
        "chunk",
        int,
        "Prompt tokens of a prefill step; default: a device full.",
        ("prefill.chunk_tokens",),
    ),
    Flag("slots", int, "Sequences that share a decode step.", ("decode.slots",)),
    Flag(
        "transport",
        str,
        "grpc; redis (starts its own server); or a redis:// or redis+unix:// URI.",
        ("transport.uri",),
    ),
    Flag(
        "plan_cache",
        Path,
        "Folder of compiled plans; default: ~/.cache/kvrelay/plans.",
        ("prefill.plan_cache", "decode.plan_cache"),
    ),
    Flag("ray_address", str, "Ray cluster for the workers; default: an embedded one.", ("ray.address",)),
)
SERVER = (
    Flag("host", str, "Address to listen at.", ("gateway.host",)),
    Flag("port", int, "Port of gRPC.", ("gateway.port",)),
    Flag("http_port", int, "Port of the OpenAI-compatible HTTP; default: no HTTP.", ("gateway.http_port",)),
    Flag("max_queued", int, "Requests that may wait for a worker.", ("gateway.max_queued",)),
)
ADDRESS = Flag(
    "address", str, "HOST:PORT of a running system; default: an embedded one.", variable="KVRELAY_ADDRESS"
)
COMMON = (
    Flag("config", Path, "TOML file with settings; flags and KVRELAY_* come before it."),
    Flag("verbose", bool, "Say what happens, the workers' logs included.", short="-v", default=False),
)
SAMPLING = (
    Flag("temperature", float, "0: greedy. Default 1."),
    Flag("top_k", int, "Draw among the k likeliest tokens."),
    Flag("top_p", float, "Draw among the likeliest tokens that have this much probability together."),
    Flag("min_p", float, "Draw among tokens at least this many times as likely as the likeliest."),
    Flag("repetition_penalty", float, "Over prompt and answer; 1: off."),
    Flag("presence_penalty", float, "Over the answer; 0: off."),
    Flag("frequency_penalty", float, "Over the answer; 0: off."),
    Flag("seed", int, "The draw depends on seed and position only."),
    Flag("stop_ids", list[int], "Token that ends the answer; may be given again."),
    Flag("stop", list[str], "String that ends the answer; may be given again."),
    Flag("max_tokens", int, "Longest answer."),
    Flag("min_tokens", int, "Shortest answer."),
    Flag("logprobs", int, "Tell log-probabilities of each token and of this many likeliest ones."),
    Flag("ignore_eos", bool, "Go on past the model's end of sequence.", default=False),
)

Command = Callable[..., None]


@dataclass(frozen=True)
class Target:
    """The system that a command is about."""

    config: KvrelayConfig
    """Of one that the command starts itself."""
    verbose: bool
    address: str | None = None
    """HOST:PORT of a running one; None: the command starts one."""
    model: str = ""
    """What a running one must serve; empty: whatever it does."""


def with_server(command: Command) -> Command:
    """Give a command the flags of a system and its front door; it gets what they make as `target`."""
    flags = (*SYSTEM, *SERVER)
    return _with((*flags, *COMMON), lambda values: {"target": _target(flags, values)}, ("target",))(command)


def with_target(command: Command) -> Command:
    """Give a command the flags of a system and `--address`; it gets what they make as `target`."""
    return _with(
        (ADDRESS, *SYSTEM, *COMMON), lambda values: {"target": _target(SYSTEM, values)}, ("target",)
    )(command)


def _target(flags: Sequence[Flag], values: dict[str, Any]) -> Target:
    address = values.get("address")
    vain = [flag.option for flag in flags if values[flag.name] is not None and flag.name != "model"]
    if address is not None and vain:
        raise InvalidArgument(f"{', '.join(vain)}: no setting of the system that runs at {address}")
    settings = {setting: values[flag.name] for flag in flags for setting in flag.settings}
    model = values["model"] or "" if address is not None else ""
    return Target(load(settings, values["config"]), values["verbose"], address, model)


def with_sampling(command: Command) -> Command:
    """Give a command a flag for each field of SamplingParams; it gets them as `sampling`."""
    return _with(SAMPLING, lambda values: {"sampling": _sampling(values)}, ("sampling",))(command)


def _sampling(values: dict[str, Any]) -> SamplingParams:
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    try:
        return SamplingParams(**given)
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"sampling: {error}") from error


def _with(
    flags: Sequence[Flag], make: Callable[[dict[str, Any]], dict[str, Any]], makes: Sequence[str]
) -> Callable[[Command], Command]:
    """A decorator that puts flags in the place of the parameters which `make` makes of them."""

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = [parameter for name, parameter in signature.parameters.items() if name not in makes]

        @functools.wraps(command)
        def run(**values: Any) -> None:
            made = make({flag.name: values.pop(flag.name) for flag in flags})
            command(**values, **made)

        run.__signature__ = signature.replace(parameters=[*own, *(flag.parameter for flag in flags)])  # type: ignore[attr-defined]
        return run

    return decorate
