"""Recorded steps that end in drawn tokens, a step ahead of the host, on a device that works late.

The device is this processor: the kernels that draw run under the emulator, the others are the reference's.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda.batch import DeviceBatch, slots_of
from kvrelay_kernels.cuda.drawn_steps import filled_rows
from kvrelay_kernels.cuda.rope import RopeAppend
from kvrelay_kernels.errors import NonFiniteActivations
from kvrelay_kernels.interface import FROM_DEVICE, NOWHERE, Arena, RopeTable
from kvrelay_kernels.registry import load_backend
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from model_runtime.sampler import Sampled
from model_runtime.steps import sequence_steps
from model_runtime.token_steps import DeviceTokenSteps, Flight, HostTokenSteps, TokenSteps
from tests.gpu.append_case import make_case
from tests.kernels.draw_streams import SETTINGS, Answer, answers, read, step
from tests.kernels.elements import elements
from tests.kernels.host_kernels import COMPILER, HostKernels
from tests.kernels.queued_device import CUPY, CUPYX, STREAM, QueuedBackend
from tests.kernels.told_steps import ROWS, WIDTH, check_told, tell_steps
from tests.model_runtime.families import CONFIGS, VOCABULARY, random_tensors, write_folder
from tests.tiny_model import POISON, write_tiny_model

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is not installed")
PLACES, BLOCKS = 11, 4


LOGPROBS: dict[str, Any] = {"temperature": 0.8, "seed": 8, "logprobs": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the Llama family."""
    config = CONFIGS["llama"]
    return write_folder(tmp_path_factory.mktemp("llama") / "model", config, random_tensors(config))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Kernels of this module, each compiled once."""
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def device(folder: Path, kernels: Any, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    """The model on the late device."""
    monkeypatch.setitem(sys.modules, "cupy", CUPY)
    monkeypatch.setitem(sys.modules, "cupyx", CUPYX)
    monkeypatch.setattr("kvrelay_kernels.cuda.drawn_steps.device_arch", lambda: "sm_90a")
    return late(folder, kernels)


def late(folder: Path, kernels: Any) -> Decoder:
    """A model on the late device."""
    backend: Any = QueuedBackend(kernels)
    return Decoder(load_model(folder), backend, "float")


def host(folder: Path) -> Decoder:
    """The model on the reference."""
    return Decoder(load_model(folder), load_backend("reference", threads=1), "float")


def ahead(steps: TokenSteps, streams: list[Answer], count: int) -> list[list[int]]:
    """Each step launched before the last one is read; some sequences sit out a step, the order changes."""
    for stream in streams:
        steps.join(stream)
    flights: list[tuple[Flight, list[Answer]]] = []
    for n in range(count):
        here = [stream for stream in streams if (n + stream.place) % 4]
        here = here[n % len(here) :] + here[: n % len(here)]
        flights.append((step(steps, here, BLOCKS), here))
        if len(flights) == 2:
            read(*flights.pop(0))
    for flight in flights:
        read(*flight)
    for stream in streams:
        steps.leave(stream)
    return [stream.answer_ids for stream in streams]


def at_once(decoder: Decoder, arena: Arena, settings: list[dict[str, Any]], count: int) -> list[list[int]]:
    """The same steps, one by one."""
    streams = answers(settings)
    for n in range(count):
        here = [stream for stream in streams if (n + stream.place) % 4]
        read(step(HostTokenSteps(decoder, arena), here, BLOCKS), here)
    return [stream.answer_ids for stream in streams]


def test_a_step_ahead_draws_what_steps_one_by_one_draw(device: Decoder, folder: Path) -> None:
    settings = [*SETTINGS, *SETTINGS]
    arena, reference = device.new_arena(BLOCKS * PLACES, "none"), host(folder)
    steps = device.new_token_steps(arena, PLACES)
    assert isinstance(steps, DeviceTokenSteps)
    wanted = at_once(reference, reference.new_arena(BLOCKS * PLACES, "none"), settings, 12)
    assert ahead(steps, answers(settings), 12) == wanted
    # Places are taken again, by others, in graphs that are there already.
    for layer in range(arena.layers):
        for block in range(arena.blocks):
            arena.write_block(layer, block, memoryview(bytes(arena.layout.block_bytes)))
    again = settings[::-1]
    wanted = at_once(reference, reference.new_arena(BLOCKS * PLACES, "none"), again, 6)
    assert ahead(steps, answers(again), 6) == wanted


def test_flights_are_late_and_the_host_reads_them_later(device: Decoder) -> None:
    arena = device.new_arena(BLOCKS * PLACES, "none")
    steps = device.new_token_steps(arena, PLACES)
    steps.warm()
    streams = answers(SETTINGS[:2])
    for stream in streams:
        steps.join(stream)
    first = step(steps, streams, BLOCKS)
    second = step(steps, streams, BLOCKS)
    assert not first.done
    read(first, streams)
    assert first.done
    assert not second.done
    read(second, streams)


def test_log_probabilities_are_the_hosts(device: Decoder, folder: Path) -> None:
    settings = [SETTINGS[1], LOGPROBS, SETTINGS[2]]
    reference = host(folder)
    wanted = at_once(reference, reference.new_arena(BLOCKS * PLACES, "none"), settings, 6)
    steps = device.new_token_steps(device.new_arena(BLOCKS * PLACES, "none"), PLACES)
    streams = answers(settings)
    for stream in streams:
        steps.join(stream)
    for n in range(6):
        here = [stream for stream in streams if (n + stream.place) % 4]
        flight = step(steps, here, BLOCKS)
        if streams[1] in here:
            assert flight.done
            drawn = flight.wait()[here.index(streams[1])]
            assert isinstance(drawn, Sampled)
            assert len(drawn.top) == 2
        read(flight, here)
    assert [stream.answer_ids for stream in streams] == wanted


@pytest.mark.usefixtures("device")
def test_not_a_number_ends_one_row(tmp_path: Path, kernels: Any) -> None:
    tiny = late(write_tiny_model(tmp_path / "tiny"), kernels)
    steps = tiny.new_token_steps(tiny.new_arena(BLOCKS * PLACES, "none"), PLACES)
    sound, spoiled, hosted = answers([SETTINGS[0], SETTINGS[1], LOGPROBS])
    spoiled.answer_ids, hosted.answer_ids = [POISON], [POISON]
    for stream in (sound, spoiled, hosted):
        steps.join(stream)
    both = step(steps, [sound, spoiled], BLOCKS), step(steps, [sound, spoiled], BLOCKS)
    for flight in both:
        outcomes = flight.wait()
        assert isinstance(outcomes[0], Sampled)
        assert isinstance(outcomes[1], NonFiniteActivations)
    sound.ahead = 0
    outcomes = step(steps, [hosted, sound], BLOCKS).wait()
    assert isinstance(outcomes[0], NonFiniteActivations)
    assert isinstance(outcomes[1], Sampled)


def test_a_token_outside_the_vocabulary_is_refused(device: Decoder) -> None:
    steps = device.new_token_steps(device.new_arena(BLOCKS * PLACES, "none"), PLACES)
    (stream,) = answers(SETTINGS[:1])
    steps.join(stream)
    for _ in range(2):
        for wrong in (VOCABULARY, -5):
            stream.answer_ids = [wrong]
            with pytest.raises(IndexError):
                step(steps, [stream], BLOCKS)
        stream.answer_ids, stream.ahead = [5], 0
        read(step(steps, [stream], BLOCKS), [stream])


def test_few_numbers_of_rows_are_taken_down() -> None:
    taken = [filled_rows(rows) for rows in range(1, 200)]
    assert all(rows <= filled <= max(2 * rows - 1, 8) for rows, filled in enumerate(taken, 1))
    assert taken == sorted(taken)
    assert len(set(taken[:32])) == 7


def test_rows_are_filled_up_with_ones_that_are_nobodys(device: Any) -> None:
    batch, _ = sequence_steps([1, 1, 1], [5, 64, 130], [7, FROM_DEVICE, 9])
    there = device.backend.new_step_rows(8, 16)
    there.tell(batch, np.array([NOWHERE, 4, 2], np.int32), 33)
    STREAM.synchronize()
    assert there.ids.tolist() == [7, ~4, 9, 0, 0, 0, 0, 0]
    assert there.positions.tolist() == [5, 64, 130, 0, 0, 0, 0, 0]
    assert there.slots.tolist() == [5, 2 * 64, 5 * 64 + 2, -1, -1, -1, -1, -1]
    assert there.row_starts.tolist() == list(range(9))
    assert there.lengths.tolist() == [6, 65, 131, 0, 0, 0, 0, 0]
    assert there.places.tolist() == [NOWHERE, 4, 2, *[NOWHERE] * 5]
    assert there.tables.shape == (8, 16)
    assert np.array_equal(there.tables[:3, :3], batch.block_tables)
    assert there.answer.tolist() == [33]


def test_steps_are_told_anew_whatever_was_told_before(device: Any) -> None:
    there = device.backend.new_step_rows(ROWS, WIDTH)
    for wanted in tell_steps(there):
        STREAM.synchronize()
        check_told(there, wanted, np.asarray)


def test_rows_that_are_nobodys_leave_the_cache_as_it_is(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvrelay_kernels.cuda.rope.device_arch", lambda: "sm_90a")
    case = make_case(np.random.default_rng(2), "int8-g64", (2, 1, 64), "float16", [1, 1, 1], [70, 3, 130])
    batch, slots = case.batch, slots_of(case.batch)
    caches: list[np.ndarray] = []
    for nobodys in ([], [1]):
        cache = np.full((case.blocks, case.layout.block_bytes), 0xA5, np.uint8)
        arena: Any = SimpleNamespace(
            layout=case.layout, layer_address=lambda _, cache=cache: cache.ctypes.data
        )
        there = slots.copy()
        there[nobodys] = -1
        device = DeviceBatch(
            batch, batch.positions, there, batch.row_starts, batch.lengths, batch.block_tables, None
        )
        q = np.full((batch.rows, case.spec.heads * case.spec.head_dim), 0xFFFF, np.uint16)
        RopeAppend("float16", kernels)(
            elements(case.qkv, "float16"), device, arena, 0, case.spec, RopeTable(case.cos, case.sin),
            case.norms, q,
        )  # fmt: skip
        caches.append(cache)
    touched = batch.block_tables[1, 0]
    assert (caches[1][touched] == 0xA5).all()
    assert not np.array_equal(caches[0][touched], caches[1][touched])
    others = [block for block in range(case.blocks) if block != touched]
    assert np.array_equal(caches[0][others], caches[1][others])
