"""A whole system in processes of its own, started by the command that users run."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from control_plane.client import Client
from kvrelay.v1.inference_pb2 import Chat, ChatMessage, Finish, GenerateRequest, PromptInfo, TokenIds
from kvrelay.v1.sampling_pb2 import SamplingParams
from kvrelay.v1.worker_pb2 import POOL_DECODE, POOL_PREFILL, WORKER_STATE_READY, GetWorkerStatusResponse, Pool

START_SECONDS = 240.0
WAIT_SECONDS = 120.0


@dataclass
class Reply:
    """All that a request's stream said."""

    prompt: PromptInfo | None = None
    text: str = ""
    token_ids: list[int] = field(default_factory=list[int])
    finish: Finish | None = None


class Served:
    """A running `kvrelay serve`."""

    def __init__(self, process: "subprocess.Popen[str]", address: str) -> None:
        self.process = process
        self.client = Client(address)
        self.client.connect()

    def ask(
        self,
        prompt: str | list[int] | list[dict[str, str]],
        on_tokens: Callable[[Reply], None] = lambda reply: None,
        **sampling: object,
    ) -> Reply:
        """One answer to a text, token ids, or chat messages; `on_tokens` sees the reply after every delta."""
        request = GenerateRequest(sampling=SamplingParams(**sampling))  # type: ignore[arg-type]
        if isinstance(prompt, str):
            request.text = prompt
        elif isinstance(prompt[0], int):
            request.token_ids.CopyFrom(TokenIds(ids=prompt))  # type: ignore[arg-type]
        else:
            messages = [ChatMessage(**message) for message in prompt]  # type: ignore[arg-type]
            request.chat.CopyFrom(Chat(messages=messages))
        reply = Reply()
        for event in self.client.generate(request):
            if event.HasField("prompt"):
                reply.prompt = event.prompt
            elif event.HasField("delta"):
                reply.text += event.delta.text
                reply.token_ids.extend(token.token_id for token in event.delta.tokens)
                on_tokens(reply)
            else:
                reply.finish = event.finish
        return reply

    def workers(self, pool: Pool | None = None) -> list[GetWorkerStatusResponse]:
        """What is known of the workers of a pool, or of all."""
        return [worker for worker in self.client.status().workers if pool in {None, worker.pool}]

    def ready(self, pool: Pool) -> int:
        """Workers of a pool that take requests."""
        return sum(worker.state == WORKER_STATE_READY for worker in self.workers(pool))

    def kill(self, worker_id: str) -> None:
        """End a worker's process as a crash would."""
        (pid,) = (worker.pid for worker in self.workers() if worker.worker_id == worker_id)
        os.kill(pid, signal.SIGKILL)

    def assert_nothing_leaked(self, prefill: int, decode: int) -> None:
        """All workers are back, nothing runs or waits, and every slot and block is free."""
        until(lambda: (self.ready(POOL_PREFILL), self.ready(POOL_DECODE)) == (prefill, decode))
        until(lambda: self.client.status().running == self.client.status().queued == 0)
        until(lambda: all(worker.running == worker.waiting == 0 for worker in self.workers()))
        until(lambda: all(worker.blocks_free == worker.blocks for worker in self.workers()))
        assert all(worker.slots_free == worker.slots for worker in self.workers())


def until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Wait for a condition; fail when it does not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come"
        time.sleep(0.02)


@contextmanager
def serve(*flags: str) -> Iterator[Served]:
    """Run `kvrelay serve` on a free port until the context ends; its messages are shown where it fails."""
    command = [str(Path(sys.executable).with_name("kvrelay")), "serve", "--port", "0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []
    address: list[str] = []
    announced = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            found = re.search(r"is served at (\S+)", line)
            if found:
                address.append(found[1])
                announced.set()
        announced.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert announced.wait(START_SECONDS), "it did not start: " + "".join(lines)
        assert address, "it ended: " + "".join(lines)
        served = Served(process, address[0])
        yield served
        served.client.close()
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
