"""Formats that no CUDA kernel reads are refused by name, not read as others of as many bits."""

import pytest

from kvrelay_kernels.cuda.decode_attention import DecodeProblem
from kvrelay_kernels.cuda.rope import AppendShape
from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.interface import AttentionSpec
from kvrelay_kernels.quant import BlockLayout, parse_format
from kvrelay_kernels.quant.formats import SCHEMES


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_not_read_is_refused(name: str) -> None:
    layout = BlockLayout(parse_format(name, 128), 2, 128)
    spec = AttentionSpec(8, 2, 128, 0.1)
    if name in ("int8", "int4"):
        AppendShape(layout, 8, 128, False, "bfloat16")
        DecodeProblem(layout, spec, "bfloat16")
        return
    with pytest.raises(FormatUnsupported, match=name):
        AppendShape(layout, 8, 128, False, "bfloat16")
    with pytest.raises(FormatUnsupported, match=name):
        DecodeProblem(layout, spec, "bfloat16")
