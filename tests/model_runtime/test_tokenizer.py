"""Tokenizers out of GGUF metadata and tokenizer.json: as llama.cpp and transformers cut text, and back."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from kvrelay.errors import InvalidArgument, ModelFileInvalid
from model_runtime.catalog import default_cache_dir, pull
from model_runtime.checkpoint import load_model
from model_runtime.spm_merges import spm_merges
from model_runtime.tokenizer import Tokenizer, load_tokenizer
from model_runtime.weights import Checkpoint
from tests.model_runtime.families import CONFIGS, random_tensors, write_folder
from tests.model_runtime.gguf_files import write_gguf

FIXTURES = Path(__file__).parent.parent / "fixtures"
GREEDY: list[dict[str, Any]] = json.loads((FIXTURES / "smollm2_greedy.json").read_text())["cases"]
LLAMA_CPP: list[dict[str, Any]] = json.loads((FIXTURES / "tokens.json").read_text())["cases"]

BYTES_OF_SMOLLM2 = {*b"\t\n", *range(32, 127), *range(0x80, 0xC0), *range(0xC3, 0xEE), *range(0xEF, 0xF1)}
"""Some of the bytes that stand in its vocabulary by themselves."""


@pytest.fixture(scope="module")
def tokenizers(smollm2: Checkpoint) -> dict[str, Tokenizer]:
    """The byte-level tokenizer of SmolLM2 and the SentencePiece one of Gemma 3."""
    gemma = load_model(pull("gemma3-270m"), default_cache_dir())
    return {
        "smollm2": load_tokenizer(smollm2),
        "gemma3-270m": load_tokenizer(gemma, default_cache_dir()),
    }


@pytest.fixture(scope="module", params=["smollm2", "gemma3-270m"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """Each of them in turn."""
    return tokenizers[request.param]


@pytest.mark.parametrize("case", LLAMA_CPP, ids=lambda case: f"{case['model']}-{case['text'][:12]!r}")
def test_text_is_cut_as_llama_cpp_cuts_it(tokenizers: dict[str, Tokenizer], case: dict[str, Any]) -> None:
    tokenizer = tokenizers[case["model"]]
    assert tokenizer.encode(case["text"], add_special=False) == case["ids"]
    assert tokenizer.decode(case["ids"], skip_special=False) == case["text"]


@pytest.mark.parametrize("case", GREEDY, ids=lambda case: case["name"])
def test_chats_become_what_transformers_makes_of_them(
    tokenizers: dict[str, Tokenizer], case: dict[str, Any]
) -> None:
    tokenizer = tokenizers["smollm2"]
    rendered = tokenizer.render_chat(case["messages"])
    assert rendered == case["prompt"]
    assert tokenizer.encode(rendered, add_special=False) == case["prompt_token_ids"]
    assert tokenizer.decode(case["token_ids"]) == case["text"]


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_text_comes_back(tokenizers: dict[str, Tokenizer], text: str) -> None:
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(text, add_special=False)
        # SmolLM2 has no tokens for some rare bytes, and Gemma writes a space as this character.
        if all(octet in BYTES_OF_SMOLLM2 for octet in text.encode()) and "▁" not in text:
            assert tokenizer.decode(ids, skip_special=False) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=30))
def test_pieces_make_up_the_whole(tokenizers: dict[str, Tokenizer], ids: list[int]) -> None:
    """Any tokens, also those that break characters apart, and never half a character in a piece."""
    for tokenizer in tokenizers.values():
        stream = tokenizer.detokenizer()
        pieces = [*map(stream.add, ids), stream.flush()]
        assert "".join(pieces) == tokenizer.decode(ids)


def test_a_character_comes_when_it_is_whole(tokenizer: Tokenizer) -> None:
    text = "a🐐🏿b"
    stream = tokenizer.detokenizer()
    pieces = [stream.add(token) for token in tokenizer.encode(text, add_special=False)]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_left_open_is_marked_at_the_end(tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers["smollm2"]
    stream = tokenizer.detokenizer()
    first = tokenizer.encode("🐐", add_special=False)[0]
    assert stream.add(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_special_tokens(tokenizers: dict[str, Tokenizer]) -> None:
    smollm2, gemma = tokenizers["smollm2"], tokenizers["gemma3-270m"]
    ids = smollm2.encode("<|im_start|>user<|im_end|>")
    assert ids == [1, 4093, 2]
    assert smollm2.decode(ids) == "user"
    assert smollm2.decode(ids, skip_special=False) == "<|im_start|>user<|im_end|>"
    assert [smollm2.token_text(token) for token in ids] == ["<|im_start|>", "user", "<|im_end|>"]
    assert set(smollm2.stop_ids) == {0, 2} <= smollm2.special_ids
    assert gemma.encode("hi") == [gemma.bos_id, *gemma.encode("hi", add_special=False)]
    assert 107 not in gemma.special_ids
    assert set(gemma.stop_ids) == {1, 106}


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    for token in (-1, tokenizer.vocabulary, 2**31):
        with pytest.raises(InvalidArgument, match="outside the vocabulary"):
            tokenizer.decode([token])


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match="not valid Unicode"):
        tokenizer.encode("a\ud800b")


def test_a_base_model_has_no_chats(tokenizers: dict[str, Tokenizer]) -> None:
    with pytest.raises(InvalidArgument, match="base model without a chat template"):
        tokenizers["gemma3-270m"].render_chat([{"role": "user", "content": "hi"}])


def test_starting_takes_about_a_second(smollm2: Checkpoint) -> None:
    gemma = load_model(pull("gemma3-270m"), default_cache_dir())
    load_tokenizer(gemma, default_cache_dir())
    for checkpoint, bound in ((smollm2, 2.0), (gemma, 6.0)):
        start = time.process_time()
        load_tokenizer(checkpoint, default_cache_dir())
        assert time.process_time() - start < bound


def test_merges_of_a_sentencepiece_vocabulary(tmp_path: Path) -> None:
    tokens = ["<s>", "a", "b", "ab", "aba", "ba", "abab"]
    scores, mergeable = np.array([0, 0, 0, -1, -2, -3, -4.0]), np.arange(7) > 0
    expected = [("a", "b"), ("a", "ba"), ("ab", "a"), ("b", "a"), ("ab", "ab"), ("aba", "b")]
    assert spm_merges(tokens, scores, mergeable, None) == expected
    assert spm_merges(tokens, scores, mergeable, tmp_path) == expected
    (kept,) = (tmp_path / "spm_merges").iterdir()
    assert spm_merges(tokens, scores, mergeable, tmp_path) == expected
    kept.write_bytes(kept.read_bytes()[:50])
    assert spm_merges(tokens, scores, mergeable, tmp_path) == expected


def byte_level_json(folder: Path) -> None:
    library = Library(models.BPE(vocab={chr(code): code - 33 for code in range(33, 127)}, merges=[]))
    library.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    library.save(str(folder / "tokenizer.json"))


def test_a_folder_brings_its_own_tokenizer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CONFIGS["llama"], random_tensors(CONFIGS["llama"]))
    with pytest.raises(ModelFileInvalid, match=r"tokenizer\.json is missing"):
        load_tokenizer(load_model(folder))
    byte_level_json(folder)
    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    settings_of = {"chat_template": template, "bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings_of))
    tokenizer = load_tokenizer(load_model(folder))
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "<s>hi"
    assert tokenizer.decode([150]) == ""
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_special_tokens([f"<image{number}>" for number in range(200)])
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(InvalidArgument, match="'<image199>', which this model cannot read"):
        load_tokenizer(load_model(folder)).encode("ab<image199>")
    (folder / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelFileInvalid, match=r"tokenizer\.json is broken"):
        load_tokenizer(load_model(folder))


def test_templates_in_their_other_places(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CONFIGS["llama"], random_tensors(CONFIGS["llama"]))
    byte_level_json(folder)
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "default"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    hi = [{"role": "user", "content": "hi"}]
    assert load_tokenizer(load_model(folder)).render_chat(hi) == "default"
    (folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(load_model(folder)).render_chat(hi) == "file"


def test_a_small_gguf_vocabulary(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", CONFIGS["llama"], random_tensors(CONFIGS["llama"]))
    tokenizer = load_tokenizer(load_model(path))
    assert [tokenizer.token_text(token) for token in tokenizer.encode("hello 12")] == [
        *["he", "ll", "o", " ", "1", "2"]
    ]
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}]) == "user: hi\n"
