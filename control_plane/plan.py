"""What the rooms are told: the system's settings, turned into the configs of gateway and workers."""

from collections.abc import Callable, Mapping
from pathlib import Path

from control_plane.config import KvrelayConfig, WorkerSettings, cores
from control_plane.pool import PoolPlan
from control_plane.workers import decode_worker, prefill_worker
from decode_service.config import DecodeConfig
from gateway_service.config import GatewayConfig
from kvrelay.v1.worker_pb2 import Pool
from model_runtime.options import DecoderOptions
from prefill_service.config import PrefillConfig

LOOPBACK = "127.0.0.1"

Resources = Callable[[], Mapping[str, float]]


def gateway_config(config: KvrelayConfig) -> GatewayConfig:
    """The gateway's part."""
    return GatewayConfig(**config.gateway.model_dump())


def prefill_plan(
    config: KvrelayConfig,
    store: str | None,
    resources: Resources,
    plan_server: str | None = None,
    gpu_share: float = 0.0,
) -> PoolPlan:
    """The prefill pool's part; prefixes are shared through the server at `store`, plans at `plan_server`.

    `gpu_share` is what a worker reserves of a GPU where the settings leave it open.
    """
    settings = config.prefill

    def configure(worker_id: str) -> PrefillConfig:
        return PrefillConfig(
            worker_id=worker_id,
            decoder=decoder_options(config, settings, plan_server),
            chunk_tokens=settings.chunk_tokens,
            max_running=settings.max_running,
            max_waiting=settings.max_waiting,
            cache_tokens=settings.cache_tokens,
            store=store,
        )

    return PoolPlan(
        pool=Pool.POOL_PREFILL,
        name="prefill",
        make=prefill_worker,
        configure=configure,
        host=_host(config),
        threads=threads_of(settings),
        cpus=settings.cpus,
        gpus=gpu_share if settings.gpus is None else settings.gpus,
        resources=resources,
    )


def decode_plan(
    config: KvrelayConfig,
    transport: str,
    resources: Resources,
    plan_server: str | None = None,
    gpu_share: float = 0.0,
) -> PoolPlan:
    """As `prefill_plan`; `transport` is `grpc` or the URI that blocks come through."""
    settings = config.decode

    def configure(worker_id: str) -> DecodeConfig:
        return DecodeConfig(
            worker_id=worker_id,
            decoder=decoder_options(config, settings, plan_server),
            slots=settings.slots,
            max_waiting=settings.max_waiting,
            cache_tokens=settings.cache_tokens,
            default_max_tokens=settings.default_max_tokens,
            stream_seconds=settings.stream_seconds,
            lease_seconds=settings.lease_seconds,
            transport=transport,
        )

    return PoolPlan(
        pool=Pool.POOL_DECODE,
        name="decode",
        make=decode_worker,
        configure=configure,
        host=_host(config),
        threads=threads_of(settings),
        cpus=settings.cpus,
        gpus=gpu_share if settings.gpus is None else settings.gpus,
        resources=resources,
    )


def decoder_options(
    config: KvrelayConfig, settings: WorkerSettings, plan_server: str | None
) -> DecoderOptions:
    """What workers are told of the model; paths in full, since their folder may be another one."""
    model = config.model
    return DecoderOptions(
        model=str(Path(model.name).resolve()) if Path(model.name).exists() else model.name,
        backend=model.backend,
        element=model.element,
        threads=threads_of(settings),
        weights=model.weights,
        kv_format=model.kv_format,
        plan_cache=settings.plan_cache and settings.plan_cache.expanduser().absolute(),
        plan_server=plan_server,
    )


def threads_of(settings: WorkerSettings) -> int:
    """Compute threads of a worker."""
    return settings.threads or cores()


def _host(config: KvrelayConfig) -> str | None:
    return LOOPBACK if config.ray.address is None else None
