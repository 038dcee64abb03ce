"""A decode worker: one process's model, engine and server. The control plane runs it as a Ray actor."""

import asyncio
import os

import grpc.aio

from decode_service.config import DecodeConfig
from decode_service.engine import DecodeEngine
from decode_service.servicer import DecodeServicer
from kv_transfer.blob_store import RedisBlobs
from kv_transfer.grpc_channel import transfer_handler
from kv_transfer.redis_channel import RedisReceiver
from kv_transfer.redis_store import connect
from kvrelay.errors import BadSetup
from kvrelay.rpc import ServerThread
from kvrelay.v1 import decode_pb2_grpc
from kvrelay.v1.worker_pb2 import (
    POOL_DECODE,
    WORKER_STATE_DRAINING,
    WORKER_STATE_READY,
    GetWorkerStatusResponse,
    PlanCounts,
)
from kvrelay.worker import WorkerServicer, add_worker_services
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.plans import Tier
from model_runtime.opening import Activity, open_decoder


class DecodeWorker:
    """Starts, serves and stops; everything else goes over its gRPC services."""

    def __init__(self, config: DecodeConfig) -> None:
        self.config = config
        self._activity = Activity()
        self._server = ServerThread(f"{config.worker_id}-server")
        self._engine: DecodeEngine | None = None
        self._receiver: RedisReceiver | None = None

    def start(self) -> str:
        """Load, warm up and serve; returns `host:port` once requests may come.

        Raises:
            BadSetup, BadModel: the worker cannot run; the message says why.
        TransportLost: the Redis server of its transport cannot be reached.
        """
        config = self.config
        server = config.decoder.plan_server
        shared = [Tier("redis", RedisBlobs(connect(server)))] if server is not None else []
        decoder = open_decoder(config.decoder, self._activity, shared)
        try:
            self._engine = engine = DecodeEngine(config, decoder)
        except (FormatUnsupported, MemoryError) as error:
            raise BadSetup(str(error)) from error
        decoder.warm(engine.arena, 1, config.slots, self._activity)
        engine.steps.warm(self._activity)
        engine.start()

        def register(server: grpc.aio.Server) -> None:
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(engine), server)
            add_worker_services(server, WorkerServicer(self.status, self._drain))
            server.add_generic_rpc_handlers((transfer_handler(engine.landings),))

        port = self._server.start(register, f"{config.host}:0")
        if config.transport == "grpc":
            engine.endpoint = f"grpc://{config.host}:{port}"
        else:
            self._receiver = receiver = RedisReceiver(config.transport, config.worker_id, engine.landings)
            receiver.start()
            engine.endpoint = receiver.endpoint
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
        metrics = engine.metrics
        return GetWorkerStatusResponse(
            worker_id=self.config.worker_id,
            pool=POOL_DECODE,
            state=WORKER_STATE_DRAINING if engine.draining else WORKER_STATE_READY,
            activity=self.activity(),
            running=engine.running,
            waiting=engine.waiting,
            slots=self.config.slots,
            slots_free=self.config.slots - engine.running,
            blocks=engine.pool.capacity,
            blocks_free=engine.pool.free,
            generated_tokens=metrics.tokens.total,
            tokens_per_second=metrics.tokens.rate,
            blocks_moved=metrics.blocks_moved,
            bytes_moved=metrics.bytes_moved,
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
        if self._receiver is not None:
            self._receiver.stop()
