"""A prefill worker: one process's model, engine and server. The control plane runs it as a Ray actor."""

import asyncio
import os

import grpc.aio

from kv_transfer.blob_store import RedisBlobs
from kv_transfer.channel import Channels
from kv_transfer.redis_store import RedisBlockStore, connect
from kv_transfer.transports import default_transports
from kvrelay.errors import BadSetup
from kvrelay.rpc import ServerThread
from kvrelay.v1 import prefill_pb2_grpc
from kvrelay.v1.worker_pb2 import (
    POOL_PREFILL,
    WORKER_STATE_DRAINING,
    WORKER_STATE_READY,
    GetWorkerStatusResponse,
    PlanCounts,
)
from kvrelay.worker import WorkerServicer, add_worker_services
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.plans import Tier
from model_runtime.opening import Activity, open_decoder
from prefill_service.config import PrefillConfig
from prefill_service.engine import PrefillEngine
from prefill_service.servicer import PrefillServicer


class PrefillWorker:
    """Starts, serves and stops; everything else goes over its gRPC services."""

    def __init__(self, config: PrefillConfig) -> None:
        self.config = config
        self._activity = Activity()
        self._server = ServerThread(f"{config.worker_id}-server")
        self._engine: PrefillEngine | None = None
        self._channels: Channels | None = None

    def start(self) -> str:
        """Load, warm up and serve; returns `host:port` once requests may come.

        Raises:
            BadSetup, BadModel: the worker cannot run; the message says why.
        """
        config = self.config
        server = config.decoder.plan_server
        shared = [Tier("redis", RedisBlobs(connect(server)))] if server is not None else []
        decoder = open_decoder(config.decoder, self._activity, shared)
        try:
            self._engine = engine = PrefillEngine(config, decoder)
            if config.store is not None:
                engine.store = RedisBlockStore(connect(config.store), engine.codec)
        except (FormatUnsupported, MemoryError) as error:
            raise BadSetup(str(error)) from error
        decoder.warm(engine.arena, engine.chunk_tokens, 1, self._activity)
        self._channels = channels = Channels(engine.codec, default_transports())
        engine.start()

        def register(server: grpc.aio.Server) -> None:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(engine, channels), server)
            add_worker_services(server, WorkerServicer(self.status, self._drain))

        port = self._server.start(register, f"{config.host}:0")
        self._activity("ready", 0, 0)
        return f"{config.host}:{port}"

    def activity(self) -> str:
        """What it does while it starts, in words."""
        return self._activity.text

    def status(self) -> GetWorkerStatusResponse:
        """Counters and state, as they are now."""
        engine = self._engine
        if engine is None:
            raise BadSetup("the worker has not started")
        metrics, tiles = engine.metrics, engine.decoder.backend.counts
        return GetWorkerStatusResponse(
            worker_id=self.config.worker_id,
            pool=POOL_PREFILL,
            state=WORKER_STATE_DRAINING if engine.draining else WORKER_STATE_READY,
            activity=self.activity(),
            running=engine.running,
            waiting=engine.waiting,
            slots=self.config.max_running,
            slots_free=max(0, self.config.max_running - engine.running),
            blocks=engine.pool.capacity,
            blocks_free=engine.pool.free,
            blocks_cached=engine.pool.cached,
            prompt_tokens=metrics.computed.total + metrics.cached_tokens,
            cached_tokens=metrics.cached_tokens,
            tokens_per_second=metrics.computed.rate,
            blocks_moved=metrics.blocks_moved,
            bytes_moved=metrics.bytes_moved,
            tiles_computed=tiles.computed,
            tiles_skipped=tiles.skipped,
            attention_calls=dict(tiles.routes),
            memory_bytes=engine.pool.capacity * engine.arena.layers * engine.arena.layout.block_bytes,
            backend=engine.decoder.backend.name,
            requests=metrics.requests,
            pid=os.getpid(),
            plans=PlanCounts(**vars(engine.decoder.backend.plan_counts)),
        )

    async def _drain(self) -> None:
        engine = self._engine
        if engine is not None:
            await asyncio.to_thread(engine.drain)

    def stop(self, grace: float = 1.0) -> None:
        """End the engine and the server; calling it again does nothing."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.stop()
        self._server.stop(grace)
        if self._channels is not None:
            self._channels.close()
