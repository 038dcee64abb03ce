"""Folders of 8-bit floats, in every form in which they are published."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from kvrelay.errors import ModelFileInvalid
from kvrelay_kernels.quant import ScaledWeight
from kvrelay_kernels.registry import BackendName, load_backend
from model_runtime.checkpoint import load_model
from model_runtime.decoder import Decoder
from tests.model_runtime import plain
from tests.model_runtime.families import CONFIGS, Tensors, prompt, random_tensors, write_folder
from tests.model_runtime.test_decoder import all_logits

UP = "model.layers.1.mlp.up_proj.weight"
EIGHT: Any = ml_dtypes.float8_e4m3fn
Damage = Callable[[Tensors], None]
HUGGING_FACE = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}


def compressed(strategy: str, **more: Any) -> dict[str, Any]:
    """What compressed-tensors writes into config.json."""
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"strategy": "token"}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


@dataclass(frozen=True)
class Form:
    """How a file has its scales."""

    config: dict[str, Any]
    ending: str
    block: tuple[int, int] | None
    """None: the whole tensor."""
    shape: Callable[[tuple[int, int]], tuple[int, ...]] = lambda blocks: blocks
    dtype: Any = np.float32


FORMS = {
    "blocks of 128": Form({**HUGGING_FACE, "weight_block_size": [128, 128]}, "_scale_inv", (128, 128)),
    "blocks": Form(
        {**HUGGING_FACE, "weight_block_size": [48, 32]}, "_scale_inv", (48, 32), dtype=ml_dtypes.bfloat16
    ),
    "static": Form({**HUGGING_FACE, "activation_scheme": "static"}, "_scale", None, lambda _: ()),
    "tensor": Form(compressed("tensor"), "_scale", None, lambda _: (1,), ml_dtypes.bfloat16),
    "channel": Form(compressed("channel"), "_scale", (1, 1 << 20), dtype=ml_dtypes.bfloat16),
    "rows": Form(compressed("channel"), "_scale", (1, 1 << 20), lambda blocks: blocks[:1]),
    "compressed blocks": Form(compressed("block", block_structure=[16, 32]), "_scale", (16, 32)),
    "compressed groups": Form(compressed("group", group_size=16), "_scale", (1, 16)),
}


def quantized(weight: NDArray[Any], form: Form) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
    """Codes, scales and values of a matrix."""
    rows, columns = weight.shape
    height, width = form.block or weight.shape
    blocks = -(-rows // height), -(-columns // width)
    scales = np.empty(blocks, form.dtype)
    codes = np.empty(weight.shape, EIGHT)
    values = np.empty(weight.shape)
    for i in range(blocks[0]):
        for j in range(blocks[1]):
            part = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
            scales[i, j] = np.abs(weight[part]).max() / 440
            codes[part] = (weight[part] / np.float32(scales[i, j])).astype(EIGHT)
            values[part] = codes[part].astype(np.float64) * np.float64(scales[i, j])
    return codes, scales.reshape(form.shape(blocks)), values


def write_quantized(
    folder: Path, form: Form, tensors: Tensors, config: dict[str, Any], damage: Damage = lambda _: None
) -> dict[str, NDArray[np.float64]]:
    """A folder whose projections are 8-bit floats; the values of all tensors."""
    write_folder(folder, {**config, "quantization_config": form.config}, tensors)
    stored: Tensors = {}
    values: dict[str, NDArray[np.float64]] = {}
    for name, weight in tensors.items():
        stored[name], values[name] = weight, weight.astype(np.float64)
        if "_proj.weight" in name:
            stored[name], stored[name + form.ending], values[name] = quantized(weight, form)
            stored[name.replace("weight", "input_scale")] = np.ones(1, np.float32)
    damage(stored)
    save_file(stored, folder / "model.safetensors")
    return values


@pytest.mark.parametrize("name", FORMS)
def test_values_are_those_of_the_definition(name: str, tmp_path: Path) -> None:
    tensors = random_tensors(CONFIGS["llama"])
    values = write_quantized(tmp_path, FORMS[name], tensors, CONFIGS["llama"])
    checkpoint = load_model(tmp_path)
    for layer in range(2):
        for ours, theirs in (("q", "self_attn.q_proj"), ("up", "mlp.up_proj"), ("down", "mlp.down_proj")):
            found = checkpoint.read(f"{layer}.{ours}")
            assert isinstance(found, ScaledWeight)
            wanted = values[f"model.layers.{layer}.{theirs}.weight"]
            assert np.array_equal(found.dequantize(), wanted.astype(np.float32))
    head = checkpoint.read("head")
    assert isinstance(head, np.ndarray)
    assert np.array_equal(head, tensors["lm_head.weight"])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("name", "family"), [("blocks", "qwen3"), ("channel", "gemma3"), ("tensor", "llama")]
)
def test_a_model_is_the_one_of_its_values(
    name: str, family: str, backend: BackendName, tmp_path: Path
) -> None:
    """In its codes, as floats, and rounded anew where it has none."""
    config = CONFIGS[family]
    values: Any = write_quantized(tmp_path, FORMS[name], random_tensors(config), config)
    expected = plain.forward(config, values, prompt(40))
    for mode in ("auto", "float", "fp8"):
        found = all_logits(Decoder(load_model(tmp_path), load_backend(backend, threads=1), mode), prompt(40))
        if mode == "fp8":  # embeddings are rounded too
            assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
        else:
            np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_text_part_may_be_quantized(tmp_path: Path) -> None:
    config = CONFIGS["gemma3"]
    tensors = {
        name.replace("model.", "language_model.model.", 1): t for name, t in random_tensors(config).items()
    }
    outer = {"model_type": "gemma3", "text_config": {**config, "model_type": "gemma3_text"}}
    write_quantized(tmp_path, FORMS["blocks"], tensors, outer)
    assert isinstance(load_model(tmp_path).read("0.gate"), ScaledWeight)


def without_scales(stored: Tensors) -> None:
    del stored[UP + "_scale_inv"]


def of_another_shape(stored: Tensors) -> None:
    stored[UP + "_scale_inv"] = stored[UP + "_scale_inv"][:1]


def with_a_nan(stored: Tensors) -> None:
    stored[UP].view(np.uint8)[3, 5] = 0xFF


def with_an_endless_scale(stored: Tensors) -> None:
    stored[UP + "_scale_inv"][1, 1] = np.inf


def in_e5m2(stored: Tensors) -> None:
    stored[UP] = stored[UP].astype(ml_dtypes.float8_e5m2)


def of_a_vector(stored: Tensors) -> None:
    stored["model.norm.weight"] = stored["model.norm.weight"].astype(EIGHT)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_scales, f"'{UP}' is F8_E4M3.*no '{UP}_scale_inv'"),
        (
            of_another_shape,
            rf"'{UP}_scale_inv' has shape \(1, 2\).*\(48, 32\) for '{UP}' of shape \(96, 64\)",
        ),
        (with_a_nan, f"'{UP}' holds NaN"),
        (with_an_endless_scale, f"'{UP}_scale_inv' holds NaN or infinity"),
        (in_e5m2, f"'{UP}' is F8_E5M2; supported: F32, F16, BF16, F8_E4M3"),
        (of_a_vector, "'model.norm.weight' is F8_E4M3: not a matrix"),
    ],
)
def test_broken_tensors_are_named(damage: Damage, message: str, tmp_path: Path) -> None:
    write_quantized(tmp_path, FORMS["blocks"], random_tensors(CONFIGS["llama"]), CONFIGS["llama"], damage)
    with pytest.raises(ModelFileInvalid, match=message):
        load_model(tmp_path).read("1.up")


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "awq", "bits": 4},
        {**HUGGING_FACE, "fmt": "e5m2"},
        {**compressed("channel"), "format": "pack-quantized"},
        compressed("channel", num_bits=4),
        compressed("channel", type="int"),
        compressed("attn_head"),
        {**compressed("channel"), "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
    ],
)
def test_other_quantizations_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    folder = CONFIGS["llama"] | {"quantization_config": config}
    with pytest.raises(ModelFileInvalid, match=r"'quantization_config' in config\.json is not supported"):
        load_model(write_folder(tmp_path, folder, random_tensors(CONFIGS["llama"])))


@pytest.mark.parametrize("block", ["128", [128], [0, 128], [128, 128.0]])
def test_blocks_are_two_sizes(block: Any, tmp_path: Path) -> None:
    folder = CONFIGS["llama"] | {"quantization_config": {**HUGGING_FACE, "weight_block_size": block}}
    with pytest.raises(ModelFileInvalid, match="'weight_block_size' is"):
        load_model(write_folder(tmp_path, folder, random_tensors(CONFIGS["llama"])))
