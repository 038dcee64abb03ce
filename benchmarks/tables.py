"""Makes the README's tables from the results beside this script, so that no figure is written by hand.

A table stands between two markers, and whatever is there is replaced:

    <!-- table:cpu-serving -->
    <!-- end -->

    python benchmarks/tables.py            # writes them
    python benchmarks/tables.py --check    # exit status 1 if the README and the results differ, as CI asks
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SECTION = re.compile(r"(<!-- table:(?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Result = dict[str, Any]


class TableError(Exception):
    """A table cannot be made; the message says why."""


def cpu_serving(result: Result) -> str:
    """Prompt and decode rates over gRPC, beside the peer's."""
    cases, peer = result["summary"], (result["peer"] or "").partition(" (")[0] or "peer"
    rows = [
        ("Prompt of 512, tok/s", "prompt 512", "prompt_tokens_per_second", "prompt_ratio"),
        ("Prompt of 2048, tok/s", "prompt 2048", "prompt_tokens_per_second", "prompt_ratio"),
        ("Decode after 512, tok/s", "prompt 512", "decode_tokens_per_second", "decode_ratio"),
        ("Decode after 512, 8 streams, tok/s", "8 streams", "decode_tokens_per_second", ""),
    ]
    lines = []
    for title, case, figure, ratio in rows:
        figures = (cases[case]["ours"].get(figure), cases[case]["peer"].get(figure))
        lines.append([title, *(_number(one, ".0f") for one in figures)])
        lines[-1].append(_number(cases[case]["ratios"].get(ratio), ".2f", extremes=True))
    streams = cases["8 streams"]["ratios"]["batch_ratio"]
    share = cases["hand-over"]["ratios"]["handover_share"]
    settings = result["settings"]
    quiet = min(case["undisturbed"] for case in cases.values())
    under = (
        f"Medians of {quiet} or more pairs in which nothing else used the machine for long"
        if quiet
        else "Medians; other jobs disturbed some of the pairs"
    )
    table = _table(["", "kvrelay, over gRPC", peer, "ratio (lowest to highest)"], lines)
    note = (
        f"8 streams decode {_number(streams, '.2f')} times as fast as one. The hand-over of a 1000-token "
        f"prompt takes {_number(share, '.1%')} of its prefill time. {under}: {result['machine']}, "
        f"{settings['threads']} threads, {settings['model']}, weights `{settings['weights']}`, "
        f"KV `{settings['kv_format']}`."
    )
    return f"{table}\n\n{note}"


def kv_quality(result: Result) -> str:
    """Perplexity and top-1 of each cache format."""
    lines = [
        [
            f"`{name}`",
            f"{r['bits_per_element']:g}",
            f"{r['perplexity']:.3f}",
            "" if name == "none" else f"{r['perplexity_change']:+.2%}",
            "" if name == "none" else f"{r['top1_changed']:.2%}",
            "" if name == "none" else f"{r['mean_kl']:.1e}",
        ]
        for name, r in result["results"]["auto"].items()
    ]
    head = ["KV cache", "bits an element", "perplexity", "change", "top-1 changed", "mean KL"]
    text = result["text"].partition(":")[0]
    note = (
        f"{result['model']}, teacher-forced at {result['positions']} positions of {text}, "
        f"{result['window_tokens'] - 1} in a sequence."
    )
    return f"{_table(head, lines)}\n\n{note}"


def prefill_model(result: Result) -> str:
    """Prompt rates of whole models on a GPU, by cache format."""
    cases = {"2048": "prompt of 2048", "16384": "prompt of 16384", "eight": "eight of 256 to 4096 together"}
    lines: list[list[str]] = []
    for run in (run for run in result["runs"] if not run["cold"]):
        rates = {(row["case"], row["format"]): row["tokens_per_second"] for row in run["rows"]}
        lines += [
            [run["model"], what, f"{rates[case, 'int8']:.0f}", f"{rates[case, 'none']:.0f}"]
            for case, what in cases.items()
        ]
    ready = {run["cold"]: run["ready_seconds"] for run in result["runs"] if run["model"] == "llama-8b"}
    note = (
        f"{result['gpu']}, bfloat16, random weights in the models' shapes. The first model is ready "
        f"{ready[True]:.0f} s after its start where no plan was ever compiled, {ready[False]:.1f} s where "
        f"all were."
    )
    head = ["model", "", "tok/s, KV `int8`", "tok/s, KV `none`"]
    return f"{_table(head, lines)}\n\n{note}"


def decode_model(result: Result) -> str:
    """Generation rates of whole models on a GPU, by weights, streams and cache format."""
    cases = {
        ("int8", 1, 2048): "1 stream",
        ("int8", 32, 2048): "32 streams",
        ("int8", 32, 8192): "32 streams after 8192",
        ("int4", 32, 8192): "the same, KV `int4`",
    }
    lines: list[list[str]] = []
    fractions: list[float] = []
    for run in result["runs"]:
        rows = {(row["cache"], row["batch"], row["length"]): row for row in run["rows"]}
        shown = [rows[case] for case in cases if case in rows]
        fractions += [row["fraction_of_floor"] for row in shown]
        rates = [f"{rows[case]['tokens_per_second']:.0f}" if case in rows else "" for case in cases]
        lines.append([run["model"], f"`{run['weights']}`", *rates])
    note = (
        f"{result['gpu']}, bfloat16 activations, random weights in the models' shapes, KV `int8` after 2048 "
        f"tokens unless said otherwise, drawn on the device. Reading weights and cache alone would take "
        f"the card {min(fractions):.0%} to {max(fractions):.0%} of these times."
    )
    return f"{_table(['model', 'weights', *(f'{what}, tok/s' for what in cases.values())], lines)}\n\n{note}"


TABLES: dict[str, tuple[str, Callable[[Result], str]]] = {
    "cpu-serving": ("cpu-2core/cpu_serving.json", cpu_serving),
    "prefill-model": ("h200/prefill_model.json", prefill_model),
    "prefill-model-earlier": ("h200/prefill_model_earlier.json", prefill_model),
    "decode-model": ("h200/decode_model.json", decode_model),
    "kv-quality": ("cpu-2core/kv_quality.json", kv_quality),
}
"""Each table's result, below the folder of results, and what makes it."""


def filled(text: str, results: Path) -> str:
    """The text with all of its tables made anew.

    Raises:
        TableError: there is no such table, or its result is missing or incomplete.
    """

    def fill(section: re.Match[str]) -> str:
        name = section["name"]
        if name not in TABLES:
            raise TableError(f"there is no table {name!r}; known: {', '.join(TABLES)}")
        file, make = TABLES[name]
        try:
            table = make(json.loads((results / file).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError) as error:
            raise TableError(f"table {name!r} from {file}: {type(error).__name__}: {error}") from error
        return f"{section[1]}{table}\n{section[3]}"

    return SECTION.sub(fill, text)


def _number(spread: dict[str, float] | None, form: str, *, extremes: bool = False) -> str:
    if spread is None:
        return ""
    shown = f"{spread['median']:{form}}"
    return f"{shown} ({spread['min']:{form}} to {spread['max']:{form}})" if extremes else shown


def _table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def main() -> int:
    """Fill in the tables, or say whether that would change anything."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--file", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args()
    before = args.file.read_text(encoding="utf-8")
    try:
        after = filled(before, args.results)
    except TableError as error:
        print(f"{args.file.name}: {error}", file=sys.stderr)
        return 1
    if after == before:
        return 0
    if args.check:
        print(
            f"{args.file.name}: its tables are not those of the results; run {Path(__file__).name}",
            file=sys.stderr,
        )
        return 1
    args.file.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
