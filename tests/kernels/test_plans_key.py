"""Graph keys: the same bytes wherever the same graph is described, and never those of another graph."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay_kernels.plans import DeviceClass, GraphKey, MaskKey, TensorKey
from kvrelay_kernels.plans.encoding import MAX_DEPTH, Value, decode, encode
from kvrelay_kernels.plans.key import MAX_KEY_BYTES

ROOT = Path(__file__).parents[2]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary(max_size=40)
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=12)
sizes = st.integers(-(2**40), 2**40)
words = st.text(max_size=12)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[TensorKey, ...]:
    roles = draw(st.lists(words, unique=True, max_size=4))
    ranks = [draw(st.integers(0, 4)) for _ in roles]
    return tuple(
        TensorKey(
            role,
            draw(st.sampled_from(["float16", "bfloat16", "float32", "uint8"])),
            tuple(draw(st.lists(sizes, min_size=rank, max_size=rank))),
            tuple(draw(st.lists(sizes, min_size=rank, max_size=rank))),
        )
        for role, rank in zip(roles, ranks, strict=True)
    )


keys = st.builds(
    GraphKey.of,
    st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True),
    st.builds(DeviceClass, st.tuples(sizes, sizes), st.none() | sizes),
    tensors=tensors(),
    mask=st.builds(
        MaskKey,
        st.sampled_from(["none", "top_left", "bottom_right"]),
        st.none() | sizes,
        sizes,
        st.booleans(),
    ),
    attributes=st.dictionaries(words, values, max_size=3),
    libraries=st.dictionaries(words, words, max_size=3),
)


def sample(**changes: Any) -> GraphKey:
    """Attention as cuDNN is asked for it."""
    key = GraphKey.of(
        "cudnn.sdpa",
        DeviceClass((9, 0), 132),
        tensors=(
            TensorKey("q", "bfloat16", (1, 32, 2048, 128), (8388608, 128, 4096, 1)),
            TensorKey("k", "bfloat16", (1, 8, 8192, 128), (8388608, 128, 1024, 1)),
        ),
        mask=MaskKey("bottom_right", 1024, 0, padding=True),
        attributes={"scale": 0.125, "stats": False, "name": "é"},
        libraries={"cudnn": "9.19.0", "cudnn-frontend": "1.32.0"},
    )
    return replace(key, **changes)


@given(values)
def test_values_come_back(value: Value) -> None:
    assert identity(decode(encode(value))) == identity(value)


@given(values, values)
def test_different_values_have_different_bytes(left: Value, right: Value) -> None:
    assert (encode(left) == encode(right)) == (identity(left) == identity(right))


def identity(value: Value) -> Any:
    """Equal for the same values only, where Python says that 1, 1.0 and True are equal, and 0.0 and -0.0."""
    inner = [identity(item) for item in value] if isinstance(value, tuple) else repr(value)
    return type(value).__name__, inner


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (1, True),
        (1, 1.0),
        (0.0, -0.0),
        ("a", b"a"),
        (None, ""),
        ((), None),
        (("ab",), ("a", "b")),
        ((("a",), "b"), ("a", ("b",))),
        (((), (1,)), ((1,), ())),
        ("a\0", "a"),
        (127, 128),
        (-128, 128),
    ],
)
def test_what_python_or_a_join_would_confuse_is_kept_apart(left: Value, right: Value) -> None:
    assert encode(left) != encode(right)


@pytest.mark.parametrize(
    "value", [np.float64(1), np.int32(1), [1], {"a": 1}, object(), Path("a"), (1, np.bool_(True))]
)
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="no canonical bytes"):
        encode(value)


def test_what_equals_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        encode((float("nan"),))
    with pytest.raises(UnicodeEncodeError):
        encode("\ud800")


def test_depth_is_bounded_both_ways() -> None:
    deep: Value = 1
    for _ in range(MAX_DEPTH):
        deep = (deep,)
    assert decode(encode(deep)) == deep
    with pytest.raises(ValueError, match="too deeply"):
        encode((deep,))
    with pytest.raises(ValueError, match="tag"):
        decode(b"(" + len(encode(deep)).to_bytes(4, "big") + encode(deep))


@given(values.map(encode), st.data())
def test_every_byte_means_something(data: bytes, draw: st.DataObject) -> None:
    """Changed bytes are no value's, or another's: there is no room for what was never written."""
    place = draw.draw(st.integers(0, len(data) - 1))
    changed = bytearray(data)
    changed[place] ^= draw.draw(st.integers(1, 255))
    for other in (bytes(changed), data[:place], data + b"\0", data[place:] + data):
        try:
            value = decode(other)
        except ValueError:
            continue
        assert encode(value) == other != data


@given(keys)
def test_keys_come_back(key: GraphKey) -> None:
    again = GraphKey.decode(key.encoded)
    assert again == key
    assert again.name == key.name
    assert identity(fields_of(again)) == identity(fields_of(key))


@given(keys, keys)
def test_different_keys_have_different_bytes(left: GraphKey, right: GraphKey) -> None:
    same = identity(fields_of(left)) == identity(fields_of(right))
    assert (left.encoded == right.encoded) == same == (left == right)
    assert (left.name == right.name) == same


def fields_of(key: GraphKey) -> Any:
    tensors = tuple((one.role, one.element, one.dims, one.strides) for one in key.tensors)
    mask = (key.mask.causal, key.mask.window, key.mask.sinks, key.mask.padding)
    device = (key.device.capability, key.device.processors)
    return key.kind, device, tensors, mask, key.attributes, key.libraries


def test_each_field_counts() -> None:
    key = sample()
    q, k = key.tensors
    others = [
        sample(kind="cudnn.sdpa2"),
        sample(device=DeviceClass((9, 0), 114)),
        sample(device=DeviceClass((9, 0))),
        sample(device=DeviceClass((10, 0), 132)),
        sample(tensors=(k, q)),
        sample(tensors=(q,)),
        sample(tensors=(replace(q, role="query"), k)),
        sample(tensors=(replace(q, element="float16"), k)),
        sample(tensors=(replace(q, dims=(1, 32, 2049, 128)), k)),
        sample(tensors=(replace(q, strides=(8388608, 262144, 128, 1)), k)),
        *(
            sample(mask=replace(key.mask, **change))
            for change in (
                {"causal": "top_left"},
                {"window": None},
                {"window": 1025},
                {"sinks": 4},
                {"padding": False},
            )
        ),
        sample(attributes=(("name", "é"), ("scale", 0.125))),
        sample(attributes=(("name", "é"), ("scale", 0.125), ("stats", 0))),
        sample(attributes=(("name", "e\u0301"), ("scale", 0.125), ("stats", False))),
        sample(libraries=(("cudnn", "9.19.0"), ("cudnn-frontend", "1.32.1"))),
        sample(libraries=(("cudnn", "9.19.0"),)),
    ]
    assert len({other.encoded for other in (key, *others)}) == len(others) + 1
    assert len({other.name for other in (key, *others)}) == len(others) + 1


def test_the_order_of_dicts_does_not_count() -> None:
    device = DeviceClass((9, 0))
    one = GraphKey.of("gemm", device, attributes={"b": 1, "a": 2}, libraries={"y": "1", "x": "2"})
    two = GraphKey.of("gemm", device, attributes={"a": 2, "b": 1}, libraries={"x": "2", "y": "1"})
    assert one == two
    assert hash(one) == hash(two)


def test_a_stride_is_in_elements_and_as_the_array_has_it() -> None:
    array = np.zeros((4, 6), ml_dtypes.bfloat16)
    assert TensorKey.of("x", array) == TensorKey("x", "bfloat16", (4, 6), (6, 1))
    assert TensorKey.of("x", array.T) == TensorKey("x", "bfloat16", (6, 4), (1, 6))
    assert TensorKey.of("x", array[::-2, ::3]) == TensorKey("x", "bfloat16", (2, 2), (-12, 3))
    assert TensorKey.of("x", np.broadcast_to(array[0], (4, 6))).strides == (0, 1)
    odd = np.zeros(4, np.dtype([("tag", "u1"), ("number", "<f4")]))["number"]
    with pytest.raises(ValueError, match="no multiples"):
        TensorKey.of("x", odd)


def test_padding_of_a_struct_does_not_enter() -> None:
    """The fault that this key excludes: two structs, alike but for what lies between their fields."""
    kind = np.dtype([("flag", "u1"), ("size", "<i8")], align=True)
    structs = [np.frombuffer(bytearray([fill]) * kind.itemsize, kind) for fill in (0x00, 0xFF)]
    for struct in structs:
        struct["flag"], struct["size"] = 1, 2048
    assert structs[0].tobytes() != structs[1].tobytes()
    flags = [{"flag": bool(one["flag"][0]), "size": int(one["size"][0])} for one in structs]
    first, second = (GraphKey.of("gemm", DeviceClass((9, 0)), attributes=one) for one in flags)
    assert first.encoded == second.encoded


@pytest.mark.parametrize("kind", ["", "Gemm", "a b", "../up", ".hidden", "a/b", "é", "a" * 65, "a\n"])
def test_a_kind_is_a_plain_name(kind: str) -> None:
    with pytest.raises(ValueError, match="no kind"):
        sample(kind=kind)


def test_what_is_given_twice_is_refused() -> None:
    q = sample().tensors[0]
    with pytest.raises(ValueError, match="role"):
        sample(tensors=(q, q))
    with pytest.raises(ValueError, match="twice or out of order"):
        sample(attributes=(("a", 1), ("a", 2)))
    with pytest.raises(ValueError, match="twice or out of order"):
        sample(libraries=(("b", "1"), ("a", "2")))
    with pytest.raises(ValueError, match="dims"):
        TensorKey("q", "float16", (1, 2), (1,))
    with pytest.raises(ValueError, match="causal"):
        MaskKey("bottom-right")  # type: ignore[arg-type]


def test_a_key_that_is_too_large_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="digest"):
        sample(attributes=(("tiles", bytes(MAX_KEY_BYTES)),))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        sample().encoded[:-1],
        sample().encoded + b"\0",
        encode(1),
        encode(("kvrelay graph key", 2)),
        encode(("kvrelay graph key", 1, "gemm")),
        encode(("kvrelay graph key", 1, "gemm", 5, (), ("none", None, 0, False), (), ())),
        encode(("kvrelay graph key", 1, "gemm", ((9, 0), None), (), ("sideways", None, 0, False), (), ())),
        encode(("kvrelay graph key", 1, 7, ((9, 0), None), (), ("none", None, 0, False), (), ())),
        encode(("kvrelay graph key", 1, "gemm", ((9, 0), None), (), ("none", None, 0, False), ((1,),), ())),
    ],
)
def test_bytes_that_are_no_key_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        GraphKey.decode(data)


PRINT_NAME = f"""
import sys
sys.path[:0] = [{str(ROOT / "kernels")!r}, {str(ROOT)!r}]
from tests.kernels.test_plans_key import sample
print(sample().encoded.hex())
"""


@pytest.mark.parametrize("seed", ["0", "4242"])
def test_a_fresh_process_writes_the_same_bytes(seed: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", PRINT_NAME],
        env={**os.environ, "PYTHONHASHSEED": seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == sample().encoded.hex()


def test_keys_stay_as_they_were() -> None:
    """Plans on disks and in Redis are found by these names. With the bytes, `key.VERSION` changes."""
    assert sample().name == "cudnn.sdpa-7eed8676af43bc3cca8de08bfc792ea4"
