"""Tokens drawn on the card are those of the sampler, alone and at the end of steps that run ahead."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.cuda.draw import TokenDraws, is_counted, seen_of, settings_of
from kvrelay_kernels.cuda.module import KernelCache, device_arch
from kvrelay_kernels.interface import NOWHERE
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from model_runtime.sampler import Sampled, SamplingConfig, sample
from model_runtime.token_steps import DeviceTokenSteps, HostTokenSteps, draw_of
from tests.gpu.poisoned import poisoned
from tests.kernels.draw_streams import SETTINGS, Answer, answers, random_logits, random_stream, read, step
from tests.kernels.told_steps import ROWS as ROWS_TOLD
from tests.kernels.told_steps import WIDTH, check_told, tell_steps
from tests.model_runtime.families import CONFIGS, random_tensors, write_folder

ROWS, PLACES, BLOCKS = 32, 40, 4


@pytest.mark.parametrize("vocabulary", [1003, 50257, 128256, 262144])
def test_tokens_are_those_of_the_sampler(cupy: Any, kernels: KernelCache, vocabulary: int) -> None:
    rng = np.random.default_rng(vocabulary)
    streams = [random_stream(rng, vocabulary) for _ in range(PLACES)]
    draws = TokenDraws(vocabulary, PLACES, ROWS, device_arch(), kernels, cupy)
    for place, one in enumerate(streams):
        draw = draw_of(one.config, len(one.prompt))
        counted = is_counted(draw, len(one.prompt))
        draws.settings[place] = cupy.asarray(settings_of(draw, counted).view(np.int32))
        if counted:
            seen = seen_of(draw, one.prompt, one.answer, vocabulary)
            draws.seen[place, :vocabulary] = cupy.asarray(seen)
    for _ in range(3):
        places = rng.permutation(PLACES)[:ROWS].astype(np.int32)
        places[5] = NOWHERE
        logits = random_logits(rng, ROWS, vocabulary)
        lengths = np.array([len(streams[p].prompt) + len(streams[p].answer) for p in places], np.int32)
        found: list[list[int]] = []
        seen, newest = draws.seen.copy(), draws.newest.copy()
        for _ in range(2):
            # Whatever the order of its atomics, the same numbers give the same token.
            draws.seen[:], draws.newest[:] = seen, newest
            tokens = cupy.full(3 + ROWS, -99, np.int32)
            there = cupy.asarray(logits), cupy.asarray(places), cupy.asarray(lengths)
            draws.draw(*there, tokens, cupy.asarray(np.array([3], np.int32)))
            found.append(tokens.get().tolist()[3:])
        assert found[0] == found[1]
        for row, place in enumerate(places.tolist()):
            if place == NOWHERE:
                assert found[0][row] == -99
                continue
            one = streams[place]
            position = len(one.prompt) + len(one.answer)
            wanted = sample(logits[row], one.config, position, one.prompt, one.answer).token_id
            assert found[0][row] == wanted, one.config
            assert int(draws.newest[place]) == wanted
            one.answer.append(wanted)


@pytest.fixture(scope="module")
def decoder(cupy: Any, tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    """A model of the Llama family, whose head dimension the kernels have."""
    config = {**CONFIGS["llama"], "head_dim": 64}
    folder: Path = write_folder(tmp_path_factory.mktemp("llama") / "model", config, random_tensors(config))
    backend: Any = poisoned("float16")
    return Decoder(load_model(folder), backend, "float")


def test_a_step_ahead_draws_what_steps_one_by_one_draw(decoder: Decoder) -> None:
    settings = [*SETTINGS, *SETTINGS]
    count = len(settings)
    arenas = [decoder.new_arena(BLOCKS * count, "int8") for _ in range(2)]
    wanted: list[Answer] = answers(settings)
    for _ in range(40):
        read(step(HostTokenSteps(decoder, arenas[0]), wanted, BLOCKS), wanted)
    steps = decoder.new_token_steps(arenas[1], count)
    assert isinstance(steps, DeviceTokenSteps)
    found = answers(settings)
    for stream in found:
        steps.join(stream)
    flight = step(steps, found, BLOCKS)
    for _ in range(39):
        following = step(steps, found, BLOCKS)
        read(flight, found)
        flight = following
    read(flight, found)
    assert [stream.answer_ids for stream in found] == [stream.answer_ids for stream in wanted]


def test_nothing_is_taken_down_after_warming_up(decoder: Decoder, cupy: Any) -> None:
    arena = decoder.new_arena(BLOCKS * 20, "int8")
    steps = decoder.new_token_steps(arena, 20)
    steps.warm()
    pool, built = cupy.get_default_memory_pool(), decoder.backend.plan_counts
    held = pool.total_bytes()
    for count in range(1, 21):
        streams = answers([{"temperature": 1.0, "seed": count}] * count)
        for stream in streams:
            steps.join(stream)
        flights = [step(steps, streams, BLOCKS), step(steps, streams, BLOCKS)]
        for flight in flights:
            assert all(isinstance(drawn, Sampled) for drawn in flight.wait())
        for stream in streams:
            steps.leave(stream)
    assert decoder.backend.plan_counts == built
    assert pool.total_bytes() == held


def test_log_probabilities_come_from_the_host(decoder: Decoder) -> None:
    arenas = [decoder.new_arena(BLOCKS * 2, "int8") for _ in range(2)]
    settings: list[dict[str, Any]] = [SETTINGS[2], {"temperature": 0.8, "seed": 8, "logprobs": 2}]
    drawn: list[list[list[int]]] = []
    for steps in (HostTokenSteps(decoder, arenas[0]), decoder.new_token_steps(arenas[1], 2)):
        streams = answers(settings)
        for stream in streams:
            steps.join(stream)
        for _ in range(10):
            flight = step(steps, streams, BLOCKS)
            assert flight.done
            read(flight, streams)
        drawn.append([stream.answer_ids for stream in streams])
    assert drawn[0] == drawn[1]


def test_steps_are_told_anew_whatever_was_told_before(decoder: Decoder, cupy: Any) -> None:
    backend: Any = decoder.backend
    backend.stream.use()
    there = backend.new_step_rows(ROWS_TOLD, WIDTH)
    for wanted in tell_steps(there):
        check_told(there, wanted, cupy.asnumpy)


def test_settings_are_as_long_as_an_upload() -> None:
    draw = draw_of(SamplingConfig(top_k=10**12, min_tokens=10**12, max_tokens=None), 7)
    assert settings_of(draw, True).view(np.int32).shape == (32,)
