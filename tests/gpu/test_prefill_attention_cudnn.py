"""The route through cuDNN: the same functions, and plans that are built once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvrelay_kernels.block_mask import BlockMask
from kvrelay_kernels.cuda.decode_attention import Element16
from kvrelay_kernels.cuda.module import KernelCache
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.plans import open_plans
from tests.gpu.prompt_case import check, make_case, new_attention, run
from tests.gpu.test_prefill_attention import HEADS, RAGGED

pytest.importorskip("cudnn", reason="cudnn-frontend is not installed", exc_type=ImportError)


@pytest.mark.parametrize("head_dim", HEADS)
@pytest.mark.parametrize(
    ("fmt", "element"), [("none", "bfloat16"), ("int8-g32", "float16"), ("turbo4", "bfloat16")]
)
def test_ragged_prompts(cupy: Any, kernels: KernelCache, fmt: str, element: Element16, head_dim: int) -> None:
    case = make_case(np.random.default_rng(), RAGGED, HEADS[head_dim], fmt, element)
    check(cupy, new_attention(kernels, element, "cudnn"), case)


@pytest.mark.parametrize("window", [63, 1024])
def test_windows(cupy: Any, kernels: KernelCache, window: int) -> None:
    case = make_case(np.random.default_rng(), [*RAGGED, (900, 2500)], HEADS[128], "int8-g64", window=window)
    check(cupy, new_attention(kernels, "bfloat16", "cudnn"), case)


def test_rows_of_decoding_sequences_stay_as_they_are(cupy: Any, kernels: KernelCache) -> None:
    sequences = [(1, 90), (200, 333), (1, 1), (1, 70), (65, 65), (1, 500)]
    read = [False, True, True, False, True, False]
    case = make_case(np.random.default_rng(), sequences, read=read)
    check(cupy, new_attention(kernels, "bfloat16", "cudnn"), case)


def test_plans_are_built_once(cupy: Any, kernels: KernelCache, tmp_path: Path) -> None:
    rng, plans = np.random.default_rng(), open_plans(tmp_path)
    attention = new_attention(kernels, "bfloat16", "cudnn", plans)
    cases = [make_case(rng, [(n, n)]) for n in (300, 400, 512)]
    for case in cases:
        check(cupy, attention, case)
    # The arena's size is part of a plan, so each of these caches has its own.
    stored = sorted(path.name for path in tmp_path.rglob("cudnn.sdpa*"))
    assert stored
    again = new_attention(kernels, "bfloat16", "cudnn", open_plans(tmp_path))
    for case in cases:
        assert np.array_equal(run(cupy, again, case), run(cupy, attention, case))
    assert sorted(path.name for path in tmp_path.rglob("cudnn.sdpa*")) == stored


def test_refuses_masks_by_tiles(cupy: Any, kernels: KernelCache) -> None:
    case = make_case(np.random.default_rng(), [(10, 20)])
    with pytest.raises(FormatUnsupported, match="no masks by tiles"):
        run(cupy, new_attention(kernels, "bfloat16", "cudnn"), case, {0: BlockMask.causal(10, 20)})
