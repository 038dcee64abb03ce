"""How fast does a whole system on the CPU read prompts and decode, for its client, and beside llama.cpp?

An embedded system (Ray, a prefill and a decode worker, the gateway) is measured by a client over gRPC: the
time to the first token of prompts that no cache has seen, the rate of the tokens behind it, alone and with
8 streams side by side, and what the hand-over adds to a prompt. llama.cpp does the same work in the same
pair, each time the other one first, while the system stands idle:

    python benchmarks/cpu_serving.py --peer-python PEERS/bin/python

A pair begins once the machine is quiet, and is repeated when others used it meanwhile; all are in the result,
with the cores that others had. Medians are of the undisturbed ones. The peer is taken at the better of its
two attention kernels in each pair, and measured in its own process, without a server.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT, Clock, Weather, cores, provenance, result_path, wait_until_quiet, write
from benchmarks.real_text import SOURCE, real_tokens, stretch
from benchmarks.serving_client import SETTLE_SECONDS, ServingClient, open_channel
from control_plane.commands.session import running
from control_plane.config import KvrelayConfig, load
from model_runtime.catalog import default_cache_dir, resolve
from model_runtime.checkpoint import load_model
from model_runtime.tokenizer import load_tokenizer

PEER = ROOT / "benchmarks" / "peers" / "llama_cpp.py"
PROMPTS = (512, 2048)
DECODE_AFTER = 512
STREAMS = 8
HANDOVER_PROMPT = 1000
SHORT = 8
"""Tokens answered where only the prompt is measured; the hand-over runs all the same."""

Figures = dict[str, float]


@dataclass(frozen=True)
class Goal:
    """A figure that the project has promised; `at_least` or, else, at most."""

    name: str
    case: str
    figure: str
    bound: float
    at_least: bool = True


GOALS = (
    Goal("prompt of 512, times llama.cpp", "prompt 512", "prompt_ratio", 1.5),
    Goal("prompt of 2048, times llama.cpp", "prompt 2048", "prompt_ratio", 1.5),
    Goal("decode after 512, times llama.cpp", "prompt 512", "decode_ratio", 1.3),
    Goal("8 streams, times one", f"{STREAMS} streams", "batch_ratio", 3.0),
    Goal("hand-over of 1000 tokens, share of prefill", "hand-over", "handover_share", 0.05, at_least=False),
)


@dataclass
class Trial:
    """One pair, measured close in time."""

    case: str
    order: str
    waited_seconds: float
    before: Weather
    during: Weather
    disturbed: bool
    ours: Figures = field(default_factory=dict[str, float])
    peer: Figures = field(default_factory=dict[str, float])
    ratios: Figures = field(default_factory=dict[str, float])


class Bench:
    """Measures case after case, and keeps every trial."""

    def __init__(self, client: ServingClient, tokens: list[int], args: argparse.Namespace) -> None:
        self.trials: list[Trial] = []
        self._client = client
        self._tokens = tokens
        self._args = args
        self._rng = random.Random(args.seed)
        cache = default_cache_dir()
        self._model = resolve(args.model, cache).path

    def prompt(self, length: int) -> list[int]:
        """Real text that was not asked before."""
        return stretch(self._tokens, length, self._rng)

    def prompts(self) -> list[list[int]]:
        """One for each stream."""
        return [self.prompt(DECODE_AFTER + 1) for _ in range(STREAMS)]

    async def warm(self) -> None:
        """Once through all that is measured."""
        await self._client.one(self.prompt(DECODE_AFTER), self._args.decode_tokens)
        await self._client.side_by_side(self.prompts(), self._args.decode_tokens)

    async def run(self, keep: Callable[[], None]) -> None:
        """All cases, round after round, so that all meet the same weather; `keep` is called after each."""
        for number in range(self._args.trials):
            for length in PROMPTS:
                await self._repeat(f"prompt {length}", number, partial(self._prompt, length))
            await self._repeat(f"{STREAMS} streams", number, self._streams)
            await self._repeat("hand-over", number, self._handover)
            keep()

    async def _repeat(self, case: str, number: int, measure: Callable[[int], Awaitable[Trial]]) -> None:
        """Measure, and once more as long as others disturb."""
        for _ in range(1 + self._args.repeats):
            before, waited = await asyncio.to_thread(wait_until_quiet, self._args.quiet, self._args.patience)
            begin = Clock.now()
            trial = await measure(number)
            trial.case, trial.before, trial.waited_seconds = case, before, waited
            trial.during = Weather.between(begin, Clock.now())
            trial.disturbed = trial.during.disturbance > self._args.quiet
            self.trials.append(trial)
            told = {**trial.ours, **trial.ratios}
            line = ", ".join(f"{name} {value:.4g}" for name, value in told.items())
            mark = f" DISTURBED by {trial.during.disturbance:.2f} cores" if trial.disturbed else ""
            print(f"{case} #{number}: {line}{mark}", file=sys.stderr)
            if not trial.disturbed:
                return

    async def _prompt(self, length: int, number: int) -> Trial:
        """A prompt, and where asked for the decoding behind it, beside the peer's."""
        decodes = length == DECODE_AFTER
        flags = ["--prompt", str(length), "--decode-after", *([str(length)] if decodes else [])]
        trial = _trial("ours first" if number % 2 == 0 else "peer first")
        for who in ("ours", "peer") if number % 2 == 0 else ("peer", "ours"):
            if who == "ours":
                tokens = self._args.decode_tokens if decodes else SHORT
                trial.ours = await self._client.one(self.prompt(length), tokens)
                await asyncio.sleep(SETTLE_SECONDS)
            elif self._args.peer_python is not None:
                trial.peer = await asyncio.to_thread(self._peer, flags)
        if not decodes:
            del trial.ours["decode_tokens_per_second"]  # of 8 tokens: no measure
        for kind in ("prompt", "decode"):
            rate = f"{kind}_tokens_per_second"
            if rate in trial.ours and rate in trial.peer:
                trial.ratios[f"{kind}_ratio"] = trial.ours[rate] / trial.peer[rate]
        return trial

    async def _streams(self, number: int) -> Trial:
        """Several streams beside one alone."""
        trial = _trial("one first" if number % 2 == 0 else "all first")
        for who in ("one", "all") if number % 2 == 0 else ("all", "one"):
            if who == "one":
                alone = await self._client.one(self.prompt(DECODE_AFTER), self._args.decode_tokens)
                trial.ours["alone_tokens_per_second"] = alone["decode_tokens_per_second"]
            else:
                trial.ours |= await self._client.side_by_side(self.prompts(), self._args.decode_tokens)
            await asyncio.sleep(SETTLE_SECONDS)
        ours = trial.ours
        trial.ratios["batch_ratio"] = ours["decode_tokens_per_second"] / ours["alone_tokens_per_second"]
        if self._args.peer_python is not None and self._args.peer_streams:
            flags = ["--prompt", "--decode-after", str(DECODE_AFTER), "--batch", str(STREAMS)]
            trial.peer = await asyncio.to_thread(self._peer, flags)
        return trial

    async def _handover(self, number: int) -> Trial:
        """A prompt that is handed over, beside one of the same length that is not (it asks for one token)."""
        trial = _trial("handed over first" if number % 2 == 0 else "kept first")
        for decoded in (SHORT, 0) if number % 2 == 0 else (0, SHORT):
            seen = await self._client.one(self.prompt(HANDOVER_PROMPT), decoded)
            if decoded:
                trial.ours["handover_seconds"] = seen["handover_seconds"]
            trial.ours["prefill_seconds" if decoded else "kept_prefill_seconds"] = seen["prefill_seconds"]
            await asyncio.sleep(SETTLE_SECONDS)
        ours = trial.ours
        trial.ratios = {
            "handover_share": ours["handover_seconds"] / ours["prefill_seconds"],
            # What sending beside the computation costs it, too; within the noise of two prompts.
            "handover_share_with_slowdown": (ours["prefill_seconds"] + ours["handover_seconds"])
            / ours["kept_prefill_seconds"]
            - 1,
        }
        return trial

    def _peer(self, flags: list[str]) -> Figures:
        """The peer's rates, each at the better of its attention kernels."""
        args = self._args
        command = [args.peer_python, PEER, "--model", self._model, "--threads", str(args.threads)]
        command += [
            "--trials",
            "1",
            "--decode-tokens",
            str(args.decode_tokens),
            "--flash",
            *args.peer_flash,
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures: Figures = {}
        for result in json.loads(done.stdout)["results"]:
            kind, (rate,), (share,) = result["kind"], result["tokens_per_second"], result["cpu_share"]
            figures[f"{kind}_flash_{result['flash_attention']}"] = rate
            figures[f"{kind}_flash_{result['flash_attention']}_cpu_share"] = share
            name = f"{kind}_tokens_per_second"
            figures[name] = max(rate, figures.get(name, 0.0))
        return figures

    def report(self) -> dict[str, Any]:
        """All that was measured so far."""
        summary, trials = self.summary(), [asdict(trial) for trial in self.trials]
        return {"goals": judged(summary), "summary": summary, "trials": trials}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Median and extremes of each figure of each case."""
        found: dict[str, dict[str, Any]] = {}
        for case in dict.fromkeys(trial.case for trial in self.trials):
            every = [trial for trial in self.trials if trial.case == case]
            quiet = [trial for trial in every if not trial.disturbed]
            used = quiet or every
            groups = {"ours": [t.ours for t in used], "peer": [t.peer for t in used]}
            groups["ratios"] = [t.ratios for t in used]
            found[case] = {"trials": len(used), "undisturbed": len(quiet)} | {
                group: {name: _spread([one[name] for one in figures]) for name in figures[0]}
                for group, figures in groups.items()
            }
        return found


def _trial(order: str) -> Trial:
    nothing = Weather(0.0, 0.0, 0.0)
    return Trial("", order, 0.0, nothing, nothing, False)


def _spread(values: list[float]) -> Figures:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def judged(summary: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal with what was reached; None where the peer was not measured."""
    found = []
    for goal in GOALS:
        figure = summary[goal.case]["ratios"].get(goal.figure)
        value = None if figure is None else figure["median"]
        passed = None if value is None else (value >= goal.bound if goal.at_least else value < goal.bound)
        found.append({**asdict(goal), "median": value, "spread": figure, "passed": passed})
    return found


def show(goals: list[dict[str, Any]]) -> None:
    """A line a goal."""
    for goal in goals:
        sign = ">=" if goal["at_least"] else "<"
        if goal["median"] is None:
            print(f"SKIP {goal['name']}: no peer (--peer-python)")
            continue
        spread = f"{goal['spread']['min']:.3g} to {goal['spread']['max']:.3g}"
        verdict = "PASS" if goal["passed"] else "FAIL"
        print(f"{verdict} {goal['name']}: {goal['median']:.3g} ({spread}), wanted {sign} {goal['bound']:g}")


def arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--model", default="smollm2", help="known name or GGUF file")
    parser.add_argument("--weights", default="auto", choices=["auto", "float", "int8", "fp8", "int4"])
    parser.add_argument("--kv-format", default="int8")
    parser.add_argument("--transport", default="grpc", choices=["grpc", "redis"])
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="of a disturbed trial")
    parser.add_argument("--quiet", type=float, default=0.1, help="cores that others may use")
    parser.add_argument("--patience", type=float, default=900.0, help="seconds to wait for that")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")
    parser.add_argument("--peer-python", type=Path, help="an interpreter that has llama-cpp-python")
    parser.add_argument("--peer-flash", nargs="+", choices=["off", "on"], default=["off", "on"])
    parser.add_argument("--peer-streams", action="store_true", help="the peer decodes them, too")
    parser.add_argument("--out", type=Path, default=result_path("cpu_serving"))
    return parser.parse_args()


async def measure(address: str, head: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """All trials on the system at an address; the result, behind `head`, is written after each round."""
    cache = default_cache_dir()
    tokens = real_tokens(load_tokenizer(load_model(resolve(args.model, cache), cache), cache))
    async with open_channel(address) as channel:
        bench = Bench(ServingClient(channel), tokens, args)
        await bench.warm()
        await bench.run(lambda: write(head | bench.report(), args.out))
    return judged(bench.summary())


def header(config: KvrelayConfig, args: argparse.Namespace) -> dict[str, Any]:
    """What is measured, on what; made before, as the checkout may change meanwhile."""
    settings = ("model", "weights", "kv_format", "transport", "threads", "decode_tokens", "quiet", "seed")
    return {
        **provenance(),
        "peer": None if args.peer_python is None else _peer_version(args.peer_python),
        "settings": {name: getattr(args, name) for name in settings},
        "text": SOURCE,
        "chunk_tokens": config.prefill.chunk_tokens,
    }


def main() -> None:
    """Start a system, measure, write the result, say which goals are met."""
    args = arguments()
    flags = {
        "model.name": args.model,
        "model.weights": args.weights,
        "model.kv_format": args.kv_format,
        "model.backend": "cpu",
        "transport.uri": args.transport,
        "prefill.threads": args.threads,
        "decode.threads": args.threads,
        "gateway.port": 0,
    }
    config: KvrelayConfig = load(flags)
    head = header(config, args)
    with running(config, verbose=False) as address:
        goals = asyncio.run(measure(address, head, args))
    show(goals)


def _peer_version(python: Path) -> str:
    command = [python, "-c", "import llama_cpp; print(llama_cpp.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return f"llama.cpp (llama-cpp-python {done.stdout.strip()})"


if __name__ == "__main__":
    main()
