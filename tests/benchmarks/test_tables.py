"""The README's tables: made from results, and nothing else in the text is touched."""

import json
from pathlib import Path

import pytest

from benchmarks.tables import TABLES, TableError, filled

TEXT = "before\n<!-- table:kv-quality -->\nold\n<!-- end -->\nafter\n"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    figures = {
        "bits_per_element": 8.5,
        "perplexity": 15.0512,
        "perplexity_change": 0.00049,
        "top1_changed": 0.0078,
        "mean_kl": 4.8e-4,
    }
    result = {
        "model": "smollm2",
        "text": "a text: of parts",
        "window_tokens": 2049,
        "positions": 8192,
        "results": {"auto": {"none": figures, "int8-g64": figures}},
    }
    path = tmp_path / TABLES["kv-quality"][0]
    path.parent.mkdir()
    path.write_text(json.dumps(result))
    return tmp_path


def test_a_table_takes_the_place_of_what_stood_there(results: Path) -> None:
    made = filled(TEXT, results)
    assert made.startswith("before\n<!-- table:kv-quality -->\n| KV cache |")
    assert made.endswith("<!-- end -->\nafter\n")
    assert "| `int8-g64` | 8.5 | 15.051 | +0.05% | 0.78% | 4.8e-04 |" in made
    assert "old" not in made
    assert filled(made, results) == made


def test_a_text_without_markers_stays_as_it_is(results: Path) -> None:
    assert filled("no table here\n", results) == "no table here\n"


def test_what_cannot_be_made_is_an_error(results: Path, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no table 'poems'"):
        filled("<!-- table:poems -->\n<!-- end -->\n", results)
    with pytest.raises(TableError, match="FileNotFoundError"):
        filled("<!-- table:cpu-serving -->\n<!-- end -->\n", results)


def test_rates_of_generation_by_weights_and_streams(tmp_path: Path) -> None:
    def row(cache: str, batch: int, length: int, rate: float, fraction: float) -> dict[str, object]:
        case = {"cache": cache, "batch": batch, "length": length}
        return {**case, "tokens_per_second": rate, "fraction_of_floor": fraction}

    rows = [row("int8", 1, 2048, 251.4, 0.9), row("int8", 32, 8192, 3600, 0.81), row("none", 1, 2048, 1, 0.1)]
    path = tmp_path / TABLES["decode-model"][0]
    path.parent.mkdir()
    path.write_text(
        json.dumps({"gpu": "a card", "runs": [{"model": "llama-8b", "weights": "int4", "rows": rows}]})
    )
    made = filled("<!-- table:decode-model -->\n<!-- end -->\n", tmp_path)
    assert "| llama-8b | `int4` | 251 |  | 3600 |  |" in made
    assert "81% to 90%" in made
