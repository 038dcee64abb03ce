import pytest

from kvrelay_kernels.errors import FormatUnsupported
from kvrelay_kernels.quant import BlockLayout, parse_format
from kvrelay_kernels.quant.formats import KNOWN, SCHEMES
from kvrelay_kernels.quant.layout import FRAME_ALIGNMENT


def layout(name: str, kv_heads: int = 3, head_dim: int = 64) -> BlockLayout:
    return BlockLayout(parse_format(name, head_dim), kv_heads, head_dim)


def test_frames_of_int8() -> None:
    offsets = {frame.name: frame.offset for frame in layout("int8").frames}
    assert offsets == {
        "k_codes": 0, "k_scales": 12288, "k_biases": 12672,
        "v_codes": 13056, "v_scales": 25344, "v_biases": 25728,
    }  # fmt: skip
    assert layout("int8").block_bytes == 26112


def test_frames_of_nvfp4() -> None:
    frames = {frame.name: (frame.dtype, frame.shape) for frame in layout("nvfp4").frames}
    assert frames == {
        f"{side}_{name}": kind
        for side in "kv"
        for name, kind in (("codes", ("uint32", (3, 64, 8))), ("scales", ("uint8", (3, 64, 4))))
    }


@pytest.mark.parametrize("name", [*KNOWN, "int8-g32", "int4-g32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_frames_follow_each_other_on_their_alignment(name: str, head_dim: int) -> None:
    end = 0
    for frame in layout(name, 1, head_dim).frames:
        assert frame.offset % FRAME_ALIGNMENT == 0
        assert 0 <= frame.offset - end < FRAME_ALIGNMENT
        end = frame.offset + frame.nbytes
    assert 0 <= layout(name, 1, head_dim).block_bytes - end < FRAME_ALIGNMENT


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_bits_are_those_of_codes_and_scales(name: str, head_dim: int) -> None:
    found = layout(name, 4, head_dim)
    fmt = found.format
    scales = (2 if fmt.affine else 1) * (16 if fmt.scheme.scales == "float16" else 8) / fmt.group
    assert found.bits_per_element == fmt.code_bits + scales


@pytest.mark.parametrize("name", [*KNOWN, "int8-g32", "int6-g32", "int4-g32"])
def test_names_come_back(name: str) -> None:
    fmt = parse_format(name, 64)
    assert parse_format(fmt.name, 64) == fmt


def test_a_group_is_the_largest_that_fits() -> None:
    assert [parse_format("int4", dim).group for dim in (64, 96, 128)] == [64, 32, 64]
    assert [parse_format("turbo3", dim).group for dim in (64, 96, 128, 256)] == [64, 32, 128, 256]
    assert [parse_format(name, 64).group for name in ("mxfp8", "mxfp4", "nvfp4")] == [32, 32, 16]


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        ("int8-g64", 96),
        ("int4", 80),
        ("int5", 64),
        ("none-g32", 64),
        ("", 64),
        ("mxfp8-g64", 64),
        ("mxfp4", 80),
        ("nvfp4-g32", 64),
        ("nvfp4", 72),
        ("turbo4", 80),
        ("turbo4-g32", 64),
        ("turbo5", 64),
    ],
)
def test_what_does_not_fit_is_refused(name: str, head_dim: int) -> None:
    with pytest.raises(FormatUnsupported):
        parse_format(name, head_dim)


def test_fingerprints_tell_layouts_apart() -> None:
    found = [
        layout(name, heads, dim) for name in (*KNOWN, "int8-g32") for heads in (1, 3) for dim in (64, 128)
    ]
    assert len({each.fingerprint for each in found}) == len(found)
    assert layout("int8").fingerprint == layout("int8-g64").fingerprint


def test_unknown_frames_are_key_errors() -> None:
    with pytest.raises(KeyError):
        layout("none").frame("k_codes")
