"""The prefill loop: admit prompts, compute a step while finished blocks leave, draw first tokens."""

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from kv_transfer.block import BlockCodec
from kv_transfer.block_pool import BlockPool
from kv_transfer.channel import Handover
from kv_transfer.prefix import prefix_keys
from kv_transfer.redis_store import BlockStore
from kvrelay.errors import Cancelled, Draining, Internal, KvrelayError, PromptTooLong, QueueFull
from kvrelay.v1 import prefill_pb2 as pb
from kvrelay.v1.sampling_pb2 import SampledToken, TokenLogprob
from kvrelay_kernels.errors import KernelError
from kvrelay_kernels.quant import BLOCK_TOKENS
from model_runtime.decoder import Decoder
from model_runtime.sampler import sample
from model_runtime.step_loop import StepLoop
from model_runtime.token_steps import finite_rows
from prefill_service.batch import step_batch
from prefill_service.config import PrefillConfig
from prefill_service.handover import BlockFeed
from prefill_service.job import PrefillJob
from prefill_service.metrics import PrefillMetrics
from prefill_service.scheduler import Chunk, schedule

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
RETRY_SECONDS = 0.5
"""Hint to whom the full queue turned away."""


class PrefillEngine(StepLoop):
    """Owns the arena of a prefill worker and the one thread that computes on it.

    Attention reads every key back from the quantized arena, so the first token and all blocks are the same
    whether a prefix was found or computed, and however the prompt was cut into chunks.
    """

    def __init__(self, config: PrefillConfig, decoder: Decoder) -> None:
        super().__init__("prefill-engine", POLL_SECONDS)
        self.config = config
        self.decoder = decoder
        self.chunk_tokens = config.chunk_tokens or decoder.backend.chunk_tokens
        self.pool = BlockPool(config.cache_tokens // BLOCK_TOKENS)
        self.arena = decoder.new_arena(self.pool.capacity, config.decoder.kv_format)
        self.codec = BlockCodec(decoder.config.fingerprint64, self.arena.layout, self.arena.layers)
        self.store: BlockStore | None = None
        """Where prefixes that other workers computed are found; None: only those of this arena are."""
        self.metrics = PrefillMetrics()
        self._feed = BlockFeed(self.arena, self.codec)
        self._waiting: deque[PrefillJob] = deque()
        self._running: list[PrefillJob] = []
        self._leaving: dict[PrefillJob, Future[Handover]] = {}
        """Prompts whose first token is drawn, and whose last blocks are on their way."""

    @property
    def waiting(self) -> int:
        """Prompts not yet admitted."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Prompts being computed or handed over."""
        return len(self._running) + len(self._leaving)

    def submit(self, job: PrefillJob) -> None:
        """Take a job; its events come through `job.emit`, from the engine's thread.

        Raises:
            Draining, QueueFull, PromptTooLong: the job is not taken, and nothing is emitted.
        """
        tokens = len(job.token_ids)
        limit = min(self.pool.capacity * BLOCK_TOKENS, self.decoder.context)
        if tokens > limit:
            raise PromptTooLong(f"a prompt of {tokens} tokens exceeds the {limit} that this worker can hold")
        job.keys = prefix_keys(
            job.token_ids, self.codec.model, self.codec.layout.fingerprint, job.prompt_tokens
        )
        with self.changed:
            if self.draining:
                raise Draining("this prefill worker takes no new prompt")
            if len(self._waiting) >= self.config.max_waiting:
                raise QueueFull(f"{len(self._waiting)} prompts wait already", RETRY_SECONDS)
            self._waiting.append(job)
            self.changed.notify_all()

    def cancel(self, job: PrefillJob) -> None:
        """Stop working for a job at the next step's border; one that has ended stays as it is."""
        with self.changed:
            job.cancelled = True
            self.changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether a prompt is here."""
        return bool(self.running or self.waiting)

    def has_work(self) -> bool:
        """Whether a prompt can be admitted, computed, or ended."""
        return (
            bool(self._running)
            or self._can_admit()
            or any(done.done() for done in self._leaving.values())
            or any(job.cancelled for job in (*self._waiting, *self._leaving))
        )

    def step(self) -> None:
        """End what has ended, admit what can be, and compute the next chunks."""
        self._finish_handovers()
        self._drop_ended()
        self._admit()
        chunks = schedule(self._running, self.chunk_tokens)
        if chunks:
            self._compute(chunks)

    def fail(self, error: KvrelayError) -> None:
        """End every prompt with `error`."""
        for job in self._jobs():
            self._end(job, error)

    def _jobs(self) -> tuple[PrefillJob, ...]:
        with self.changed:
            return (*self._running, *self._leaving, *self._waiting)

    def _can_admit(self) -> bool:
        if not self._waiting or len(self._running) >= self.config.max_running:
            return False
        job = self._waiting[0]
        return self.pool.can_allocate(job.block_count, job.shareable_keys)

    def _finish_handovers(self) -> None:
        for job, done in list(self._leaving.items()):
            if not done.done():
                continue
            error = done.exception()
            if error is None:
                moved = done.result()
                self.metrics.blocks_moved += moved.blocks
                self.metrics.bytes_moved += moved.bytes
                event = pb.HandedOver(blocks=moved.blocks, bytes=moved.bytes, seconds=moved.seconds)
                job.emit(pb.PrefillResponse(handed_over=event))
            elif isinstance(error, KvrelayError):
                job.error = error
            else:
                job.error = Internal(f"{type(error).__name__}: {error}")
            self._end(job, job.error)

    def _drop_ended(self) -> None:
        for job in self._jobs():
            if job.cancelled:
                self._end(job, Cancelled("the prompt was dropped"))
            elif job.error is not None:
                self._end(job, job.error)

    def _admit(self) -> None:
        while self._can_admit():
            with self.changed:
                job = self._waiting.popleft()
            self._running.append(job)
            keys = job.shareable_keys
            shared = self.pool.share(keys[: self.pool.find(keys)])
            job.blocks = [*shared, *self.pool.allocate(job.block_count - len(shared))]
            job.computed = len(shared) * BLOCK_TOKENS
            if self.store is not None:
                self._fetch(job, self.store)
            job.admitted_at = time.monotonic()
            self.metrics.requests += 1
            self.metrics.cached_tokens += job.computed
            admitted = pb.Admitted(cached_tokens=job.computed, queue_seconds=job.admitted_at - job.queued_at)
            job.emit(pb.PrefillResponse(admitted=admitted))
            self._feed.send_found(job)

    def _fetch(self, job: PrefillJob, store: BlockStore) -> None:
        """Copy the next blocks that the store has into the job's own; what fails is computed instead."""
        first = job.computed // BLOCK_TOKENS
        keys = job.shareable_keys[first:]
        found = range(first, first + store.find(keys))
        try:
            wanted = [(job.keys[index], layer) for index in found for layer in range(self.arena.layers)]
            for header, payload in store.fetch(wanted):
                self.arena.write_block(header.layer, job.blocks[header.index], payload)
        except KvrelayError as error:
            log.warning("the block store is passed over: %s", error, extra={"request_id": job.request_id})
            return
        for index in found:
            self.pool.name(job.blocks[index], job.keys[index])
        job.computed += len(found) * BLOCK_TOKENS

    def _compute(self, chunks: Sequence[Chunk[PrefillJob]]) -> None:
        def on_layer(layer: int) -> None:
            for chunk in chunks:
                self._feed.send_layer(chunk.prompt, layer, chunk.tokens)

        try:
            logits = self.decoder.logits(step_batch(chunks), self.arena, on_layer)
        except KernelError as error:
            log.warning("a prefill step failed: %s", error)
            for chunk in chunks:
                chunk.prompt.error = Internal(f"{type(error).__name__}: {error}")
            return
        self.metrics.computed.add(sum(chunk.tokens for chunk in chunks))
        ends = zip(finite_rows(logits), logits, strict=True)
        for job, tokens in ((chunk.prompt, chunk.tokens) for chunk in chunks):
            first, job.computed = job.computed // BLOCK_TOKENS, job.computed + tokens
            sound, last = (True, None) if job.remaining else next(ends)
            if not sound:
                # Their blocks have left already, so the others of this step go on from here, too.
                job.error = Internal("NonFiniteActivations: NaN or infinity in the logits of the prompt")
                log.warning("a prompt failed: %s", job.error, extra={"request_id": job.request_id})
                continue
            for index in range(first, job.computed // BLOCK_TOKENS):
                self.pool.name(job.blocks[index], job.keys[index])
            if last is not None:
                self._first_token(job, last)

    def _first_token(self, job: PrefillJob, logits: NDArray[np.float32]) -> None:
        ids = job.token_ids.tolist()
        drawn = sample(logits, job.sampling, len(ids), ids[: job.prompt_tokens], ids[job.prompt_tokens :])
        token = SampledToken(
            token_id=drawn.token_id,
            logprob=drawn.logprob,
            top=[TokenLogprob(token_id=id_, logprob=logprob) for id_, logprob in drawn.top],
        )
        seconds = time.monotonic() - job.admitted_at
        job.emit(pb.PrefillResponse(first_token=pb.FirstToken(token=token, prefill_seconds=seconds)))
        if job.sender is None or job.error is not None:
            self._end(job, job.error)
            return
        try:
            done = job.sender.commit(len(ids), drawn.token_id)
        except KvrelayError as error:
            self._end(job, error)
            return
        self._running.remove(job)
        self._leaving[job] = done
        done.add_done_callback(lambda _: self.wake())

    def _end(self, job: PrefillJob, error: KvrelayError | None) -> None:
        """Forget a job and free its blocks; nothing reads them any more once its sender has been aborted."""
        with self.changed:
            if job in self._waiting:
                self._waiting.remove(job)
        if job in self._running:
            self._running.remove(job)
        self._leaving.pop(job, None)
        if error is not None and job.sender is not None:
            job.sender.abort()
        self.pool.release(job.blocks)
        job.blocks = []
        job.emit(error)
        self.wake()
