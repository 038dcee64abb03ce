"""Which 16-bit type a model is computed in: its checkpoint's, or its family's, unless somebody chooses."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Kind

from kvrelay.errors import BadSetup, ModelFileInvalid
from kvrelay_kernels.quant.formats import Element
from model_runtime.checkpoint import load_model
from model_runtime.config import Family, ModelConfig, element_of
from model_runtime.opening import choose_element, open_decoder
from model_runtime.options import DecoderOptions
from model_runtime.progress import silent
from tests.model_runtime.families import CONFIGS, random_tensors, write_folder
from tests.model_runtime.gguf_files import write_gguf


def config_of(tmp_path: Path, family: str, **changes: Any) -> ModelConfig:
    """A folder's configuration, some fields of whose config.json are added."""
    config = {**CONFIGS[family], **changes}
    return load_model(write_folder(tmp_path / "model", config, random_tensors(CONFIGS[family]))).config


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("llama", {}, "float16"),
        ("llama", {"torch_dtype": "bfloat16"}, "bfloat16"),
        ("llama", {"dtype": "bfloat16"}, "bfloat16"),
        ("qwen3", {}, "bfloat16"),
        ("qwen3", {"torch_dtype": "float16"}, "float16"),
        ("qwen2", {"torch_dtype": "float32"}, "bfloat16"),
        ("gemma3", {"torch_dtype": "bfloat16"}, "bfloat16"),
        ("mistral", {"torch_dtype": None}, "float16"),
    ],
)
def test_folders(tmp_path: Path, family: str, changes: dict[str, Any], wanted: Element) -> None:
    assert config_of(tmp_path, family, **changes).element == wanted


def test_the_type_of_the_text_part_of_a_larger_model(tmp_path: Path) -> None:
    text = {**CONFIGS["gemma3"], "torch_dtype": "float16"}
    folder = write_folder(
        tmp_path / "model", {"model_type": "gemma3", "text_config": text}, random_tensors(CONFIGS["gemma3"])
    )
    assert load_model(folder).config.element == "float16"


def test_a_type_that_is_no_name(tmp_path: Path) -> None:
    with pytest.raises(ModelFileInvalid, match="'torch_dtype' is 16, not str"):
        config_of(tmp_path, "llama", torch_dtype=16)


@pytest.mark.parametrize(
    ("family", "kind", "wanted"),
    [
        ("llama", Kind.F16, "float16"),
        ("llama", Kind.BF16, "bfloat16"),
        ("qwen3", Kind.Q8_0, "bfloat16"),
        ("gemma3", Kind.F32, "float16"),
    ],
)
def test_gguf_files(tmp_path: Path, family: str, kind: Kind, wanted: Element) -> None:
    path = write_gguf(tmp_path / "model.gguf", CONFIGS[family], random_tensors(CONFIGS[family]), kind)
    assert load_model(path).config.element == wanted


@pytest.mark.parametrize(
    ("family", "hidden", "wanted"),
    [
        ("gemma3", 640, "float16"),
        ("gemma3", 1152, "bfloat16"),
        ("gemma3", 5376, "bfloat16"),
        ("llama", 4096, "float16"),
        ("mistral", 4096, "float16"),
        ("qwen2", 896, "bfloat16"),
    ],
)
def test_families_whose_files_do_not_tell(family: Family, hidden: int, wanted: Element) -> None:
    assert element_of(family, hidden) == wanted


def test_backends_are_told_what_they_cannot_know(tmp_path: Path) -> None:
    config = config_of(tmp_path, "qwen3")
    assert choose_element(DecoderOptions("m", backend="cuda"), config) == "bfloat16"
    assert (
        choose_element(DecoderOptions("m", backend="cuda"), replace(config, element="float16")) == "float16"
    )
    for backend in ("cpu", "reference", "mlx"):
        assert choose_element(DecoderOptions("m", backend=backend), config) is None


def test_a_choice_is_taken_and_a_risky_one_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = config_of(tmp_path, "qwen3")
    with caplog.at_level(logging.WARNING):
        assert choose_element(DecoderOptions("m", backend="cuda", element="bfloat16"), config) == "bfloat16"
        assert not caplog.messages
        assert choose_element(DecoderOptions("m", backend="cuda", element="float16"), config) == "float16"
    assert caplog.messages == [
        "model is a bfloat16 model: in float16 activations beyond 65504 are infinite, and requests fail"
    ]


def test_a_choice_that_cannot_work(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", CONFIGS["llama"], random_tensors(CONFIGS["llama"]))
    with pytest.raises(BadSetup, match="backend reference computes in float32, not in bfloat16"):
        open_decoder(DecoderOptions(str(folder), backend="reference", element="bfloat16"), silent)
