"""Settings of a whole system, in small groups: flags, then `KVRELAY_*`, then a TOML file."""

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from kvrelay.errors import BadSetup
from kvrelay_kernels.interface import WeightMode
from kvrelay_kernels.quant.formats import Element

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Port = Annotated[int, Ge(0), Le(65535)]
Seconds = Annotated[float, Gt(0)]


class Group(BaseModel):
    """A few settings that belong together; an unknown one is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelSettings(Group):
    """What is served."""

    name: str = "smollm2"
    """A known name, a GGUF file, a folder with config.json and safetensors, or a Hugging Face repo id."""
    weights: WeightMode = "auto"
    kv_format: str = "int8"
    backend: str = "auto"
    """`auto` takes the first one that this machine can run."""
    element: Element | None = None
    """What activations and an unquantized cache hold; None: on `cuda` the model's, else the backend's own."""


class WorkerSettings(Group):
    """What the workers of either pool have in common."""

    workers: Positive = 1
    threads: Positive | None = None
    """Compute threads of a worker; None: as many as there are cores."""
    cpus: Annotated[float, Ge(0)] = 0
    """Cores that Ray reserves for a worker. 0: workers share what there is, as on a small machine."""
    gpus: Annotated[float, Ge(0)] | None = None
    """Share of a GPU that Ray reserves for a worker. 0: none; workers share what their machine shows them.
    None: none of a single GPU; of several an even share, so that workers spread over them."""
    max_waiting: Positive = 256
    plan_cache: Path | None = None
    """Folder of compiled plans on a worker's machine; None: `~/.cache/kvrelay/plans`."""


class PrefillSettings(WorkerSettings):
    """The prefill pool."""

    chunk_tokens: Positive | None = None
    """Rows of a step; None: as many as fill the workers' device."""
    max_running: Positive = 8
    cache_tokens: Positive = 32768


class DecodeSettings(WorkerSettings):
    """The decode pool."""

    slots: Positive = 16
    cache_tokens: Positive = 65536
    default_max_tokens: Positive = 2048
    stream_seconds: Annotated[float, Ge(0)] = 0.02
    """Tokens that a stream gets within this time come in one message; 0: each comes alone."""
    lease_seconds: Seconds = 120.0


class GatewaySettings(Group):
    """Where the front door listens, and how many requests may wait there."""

    host: str = "127.0.0.1"
    port: Port = 50051
    """gRPC: inference, control, health and reflection. 0 takes a free one."""
    http_port: Port | None = None
    """OpenAI-compatible HTTP, health and metrics; None: no HTTP."""
    max_queued: Count = 256
    """Requests that wait for a worker; past it they are refused with a hint when to try again."""
    max_prompt_bytes: Positive = 4 * 1024 * 1024
    retries: Count = 3
    """Times that a request goes on at another worker after a fault."""
    worker_wait_seconds: Seconds = 30.0
    """Time that a request waits while a pool has no ready worker."""


class TransportSettings(Group):
    """How blocks travel between the pools."""

    uri: str = "grpc"
    """`grpc`; `redis`, which starts a server of its own; or the URI of a Redis-protocol server."""
    share_prefixes: bool = False
    """Keep prefix blocks in the Redis server too, so that every prefill worker finds them."""
    share_plans: bool = True
    """Keep compiled plans in the Redis server too, so that a new worker starts warm. Plans hold machine code:
    whoever writes to that server decides what the workers' GPUs run."""


class RaySettings(Group):
    """The cluster that the workers run on."""

    address: str | None = None
    """A running cluster (`HOST:PORT`, `ray://HOST:PORT`, `auto`); None: an embedded one."""
    num_cpus: Count | None = None
    """Cores that an embedded cluster offers; None: all where a pool reserves any, else none."""
    start_seconds: Seconds = 600.0
    """Time that a worker may take from its creation until it is ready."""
    silent_seconds: Seconds = 60.0
    """A worker that answers no ping for so long is replaced."""


class KvrelayConfig(BaseSettings):
    """Everything a system is told. `load` makes it."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="KVRELAY_",
        env_nested_delimiter="__",
        nested_model_default_partial_update=True,
    )

    model: ModelSettings = ModelSettings()
    prefill: PrefillSettings = PrefillSettings()
    decode: DecodeSettings = DecodeSettings()
    gateway: GatewaySettings = GatewaySettings()
    transport: TransportSettings = TransportSettings()
    ray: RaySettings = RaySettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file; no `.env` and no secrets folder."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


def load(flags: Mapping[str, Any] | None = None, file: Path | None = None) -> KvrelayConfig:
    """The configuration of this process.

    Args:
        flags: settings by dotted name, such as `gateway.port`; those that are None say nothing.
        file: a TOML file with a table for each group.

    Raises:
        BadSetup: a setting is unknown or has a wrong value, or the file cannot be read.
    """
    if file is not None and not file.is_file():
        raise BadSetup(f"there is no configuration file {file}")

    class WithFile(KvrelayConfig):
        model_config = SettingsConfigDict(toml_file=file)

    try:
        return WithFile(**_nested(flags or {}))
    except ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors())
        raise BadSetup("; ".join(faults)) from error
    except (SettingsError, tomllib.TOMLDecodeError, OSError, UnicodeDecodeError) as error:
        raise BadSetup(f"the configuration cannot be read: {error}") from error


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _nested(flags: Mapping[str, Any]) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for name, value in flags.items():
        group, _, field = name.partition(".")
        if value is not None:
            groups.setdefault(group, {})[field] = value
    return groups
