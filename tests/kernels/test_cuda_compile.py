"""Every CUDA kernel compiles for every architecture we ship, with NVRTC's wheel alone: no GPU, no toolkit."""

from pathlib import Path

import pytest

from kvrelay_kernels.cuda.block_sparse import SparseProblem
from kvrelay_kernels.cuda.block_sparse_mma import SHAPES
from kvrelay_kernels.cuda.coded_matrix import ELEMENTS, TILE_ROWS, Form
from kvrelay_kernels.cuda.decode_attention import MANY_HEADS, DecodeProblem, Element16, launch_shape
from kvrelay_kernels.cuda.decode_single_pass import single_pass_key, single_pass_shape
from kvrelay_kernels.cuda.draw import DrawShape
from kvrelay_kernels.cuda.expand import Expansion
from kvrelay_kernels.cuda.expand_matrix import expand_matrix_key
from kvrelay_kernels.cuda.few_rows import few_rows_shape
from kvrelay_kernels.cuda.halve_rows import halve_key
from kvrelay_kernels.cuda.module import SOURCES, KernelCache, KernelKey
from kvrelay_kernels.cuda.nvrtc import CompileFailed, compile_cubin, library
from kvrelay_kernels.cuda.rope import MANY_PASSES, AppendShape
from kvrelay_kernels.cuda.rows import NormShape, embed_key, gate_key, move_key, rotate_key
from kvrelay_kernels.cuda.step_rows import step_rows_key
from kvrelay_kernels.cuda.stream_codes import COLUMNS as CODE_COLUMNS
from kvrelay_kernels.cuda.stream_codes import Cut, stream_shape
from kvrelay_kernels.cuda.stream_integers import ROWS as INTEGER_ROWS
from kvrelay_kernels.cuda.stream_integers import best_cut
from kvrelay_kernels.cuda.stream_integers import stream_shape as integers_shape
from kvrelay_kernels.cuda.stream_rows import COLUMNS as STREAM_COLUMNS
from kvrelay_kernels.cuda.stream_rows import stream_shape as rows_shape
from kvrelay_kernels.cuda.weights import convert_key
from kvrelay_kernels.errors import BackendUnavailable
from kvrelay_kernels.interface import Activation, AttentionSpec
from kvrelay_kernels.quant import BlockLayout, parse_format
from kvrelay_kernels.quant.formats import SCHEMES

FLOATS, ROW_FLOATS = Form(8, floats=True), Form(8, 0, floats=True)
ACTIVATIONS: list[Activation] = ["silu", "gelu_tanh"]
ARCHITECTURES = ["sm_80", "sm_90a", "sm_100"]
PROBLEMS = {
    "none": ("none", 128, 32, 8, 1),
    "int8": ("int8-g64", 128, 32, 8, 1),
    "int4": ("int4-g64", 128, 32, 8, 1),
    "int4-96": ("int4-g32", 96, 12, 4, 1),
    "int8-256": ("int8-g32", 256, 16, 2, 1),
    "int8-64": ("int8-g64", 64, 9, 3, 1),
    "int8-rows": ("int8-g64", 128, 32, 8, 4),
    "int6": ("int6-g64", 128, 32, 8, 1),
    "int6-96-rows": ("int6-g32", 96, 12, 4, 4),
    "mxfp8": ("mxfp8", 128, 32, 8, 1),
    "mxfp8-256": ("mxfp8", 256, 16, 2, 1),
    "mxfp4": ("mxfp4", 128, 32, 8, 1),
    "nvfp4": ("nvfp4", 128, 32, 8, 1),
    "nvfp4-64": ("nvfp4", 64, 9, 3, 1),
    "turbo4": ("turbo4", 128, 32, 8, 1),
    "turbo3": ("turbo3", 128, 32, 8, 1),
    "turbo3-256": ("turbo3", 256, 16, 2, 1),
}


@pytest.fixture(scope="module", autouse=True)
def nvrtc() -> None:
    try:
        library()
    except BackendUnavailable as error:
        pytest.skip(str(error))


def decode_problem(name: str) -> DecodeProblem:
    fmt, head_dim, heads, kv_heads, rows = PROBLEMS[name]
    layout = BlockLayout(parse_format(fmt, head_dim, "bfloat16"), kv_heads, head_dim)
    return DecodeProblem(layout, AttentionSpec(heads, kv_heads, head_dim, 0.1), "bfloat16", rows)


def decode_key(name: str, arch: str, sequences: int) -> KernelKey:
    problem = decode_problem(name)
    shape = launch_shape(problem, sequences=sequences)
    return KernelKey.of("decode_attention", problem.constants(shape), arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_decode_attention_compiles(name: str, arch: str) -> None:
    for key in {decode_key(name, arch, sequences) for sequences in (1, MANY_HEADS)}:
        assert KernelCache().cubin(key)[:4] == b"\x7fELF"


@pytest.mark.parametrize(("arch", "cluster"), [("sm_80", 1), ("sm_90a", 1), ("sm_90a", 14), ("sm_100", 8)])
@pytest.mark.parametrize("name", ["none", "int8", "int4"])
def test_decode_single_pass_compiles(name: str, arch: str, cluster: int) -> None:
    problem = decode_problem(name)
    key = single_pass_key(problem, single_pass_shape(problem), cluster, arch)
    assert KernelCache().cubin(key)[:4] == b"\x7fELF"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decode_plan_compiles(arch: str) -> None:
    assert KernelCache().cubin(KernelKey.of("decode_plan", {}, arch))[:4] == b"\x7fELF"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (12, 4, 96), (16, 2, 256)])
def test_block_sparse_compiles(heads: tuple[int, int, int], element: Element16, arch: str) -> None:
    key = KernelKey.of("block_sparse", SparseProblem(*heads, element).constants, arch)
    assert KernelCache().cubin(key)[:4] == b"\x7fELF"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    "problem",
    [
        SparseProblem(32, 8, 128, "bfloat16"),
        SparseProblem(9, 3, 64, "float16"),
        SparseProblem(12, 4, 96, "bfloat16"),
        SparseProblem(16, 2, 256, "float16"),
    ],
)
def test_block_sparse_mma_compiles(problem: SparseProblem, arch: str) -> None:
    for shape in SHAPES[problem.head_dim]:
        key = KernelKey.of("block_sparse_mma", shape.constants(problem), arch)
        assert KernelCache().cubin(key)[:4] == b"\x7fELF"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("fmt", ["none", "int8-g32", *SCHEMES])
def test_expand_blocks_compiles(fmt: str, arch: str) -> None:
    expansion = Expansion(BlockLayout(parse_format(fmt, 128, "bfloat16"), 8, 128), "bfloat16")
    assert KernelCache().cubin(expansion.key(arch))[:4] == b"\x7fELF"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_stream_rows_compiles(element: Element16, arch: str) -> None:
    for columns in STREAM_COLUMNS:
        for float_out in (False, True):
            for n in (4096, 28672):
                key = rows_shape(n, columns, 132).key(element, float_out, arch)
                assert KernelCache().cubin(key)[:4] == b"\x7fELF", key
        activation: Activation = "silu" if element == "float16" else "gelu_tanh"
        key = rows_shape(28672, columns, 132, TILE_ROWS).key(element, False, arch, activation)
        assert KernelCache().cubin(key)[:4] == b"\x7fELF", key


@pytest.mark.parametrize("columns", CODE_COLUMNS)
@pytest.mark.parametrize(
    "form",
    [Form(4, 32), Form(4, 64), Form(4, 16), Form(8, 32), Form(8, 16, wide=True), FLOATS, ROW_FLOATS],
    ids=str,
)
def test_stream_codes_compiles(form: Form, columns: int) -> None:
    element: Element16 = "float16" if form.group == 64 else "bfloat16"
    for cut in (Cut(14, 1), Cut(4, 2)):
        shape = stream_shape(form, cut, columns, 64)
        plain = shape.key(form, cut, element, form.bits == 8)
        gated = shape.key(form, cut, element, False, activation="silu")
        for key in (plain, gated, halve_key(form, element)):
            assert KernelCache().cubin(key)[:4] == b"\x7fELF", key


@pytest.mark.parametrize(
    "form", [Form(4, 32), Form(4, 64), Form(4, 16), Form(8, 32), Form(8, 16, wide=True)], ids=str
)
def test_stream_integers_compiles(form: Form) -> None:
    element: Element16 = "float16" if form.group == 64 else "bfloat16"
    activation: Activation | None = "silu" if form.bits == 4 else None
    for n in (4096, 6144, 28672):
        cut = best_cut(n, 132)
        for rows in INTEGER_ROWS:
            shape = integers_shape(form, cut, rows, 4096, 1)
            assert shape is not None
            key = shape.key(form, cut, element, form.bits == 8, activation=activation)
            assert KernelCache().cubin(key)[:4] == b"\x7fELF", key


def row_keys(element: Element16, arch: str) -> list[KernelKey]:
    """The kernels that work on rows, in every variant."""
    appends = [("none", 128, 128, False), ("int8-g64", 128, 128, True), ("int4-g32", 96, 32, False),
               ("int8-g32", 256, 256, True), ("int4-g64", 64, 64, False), ("int6-g32", 96, 96, False),
               ("mxfp8", 64, 64, False), ("mxfp4", 128, 128, False), ("nvfp4", 256, 256, False),
               ("turbo4", 128, 128, True), ("turbo3", 96, 96, False)]  # fmt: skip
    passes = 1 if element == "float16" else MANY_PASSES
    return [
        *[embed_key(form, element, arch) for form in (ELEMENTS, Form(4, 32), Form(8, 16, wide=True), FLOATS)],
        *[gate_key(activation, element, arch) for activation in ACTIVATIONS],
        *[move_key(scatter, arch) for scatter in (False, True)],
        *[rotate_key(run, element, arch) for run in (32, 64, 128, 256)],
        *[convert_key(kind, element, arch) for kind in range(4)],
        *[
            NormShape(width, residual, add, element).key(arch)
            for width, residual, add in ((4096, True, True), (576, True, False), (2560, False, False))
        ],
        *[
            AppendShape(
                BlockLayout(parse_format(fmt, dim, element), 8, dim), 32, rotated, norms, element, passes
            ).key(arch)
            for fmt, dim, rotated, norms in appends
        ],
    ]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("element", ["bfloat16", "float16"])
def test_row_kernels_compile(element: Element16, arch: str) -> None:
    for key in row_keys(element, arch):
        assert KernelCache().cubin(key)[:4] == b"\x7fELF", key


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("form", "element"),
    [
        (Form(4, 32), "bfloat16"),
        (Form(4, 64, wide=True), "float16"),
        (Form(8, 64), "float16"),
        (Form(8, 16, wide=True), "bfloat16"),
        (FLOATS, "bfloat16"),
        (ROW_FLOATS, "float16"),
        (ELEMENTS, "bfloat16"),
    ],
)
def test_kernels_of_weights_compile(form: Form, element: Element16, arch: str) -> None:
    keys = [few_rows_shape(form, 1).key(form, False, element, False, arch)]
    keys += [few_rows_shape(form, 4).key(form, True, element, True, arch)]
    keys += [few_rows_shape(form, 1).key(form, False, element, False, arch, "gelu_tanh")]
    if form != ELEMENTS:
        keys += [expand_matrix_key(form, element, arch)]
    for key in keys:
        assert KernelCache().cubin(key)[:4] == b"\x7fELF", key


def draw_keys(arch: str) -> list[KernelKey]:
    """The kernels at both ends of a step that draws tokens."""
    sources = ("draw_peak", "draw_tally", "draw")
    return [step_rows_key(arch), *[DrawShape().key(source, arch) for source in sources]]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_draws_compile(arch: str) -> None:
    for key in draw_keys(arch):
        assert KernelCache().cubin(key)[:4] == b"\x7fELF", key


def test_every_source_is_tested() -> None:
    assert {path.stem for path in SOURCES.glob("*.cu")} == {
        "block_sparse",
        "block_sparse_mma",
        "decode_attention",
        "decode_plan",
        "decode_single_pass",
        "expand_blocks",
        "expand_matrix",
        "few_rows",
        "halve_rows",
        "stream_codes",
        "stream_integers",
        "stream_rows",
        *(key.source for key in draw_keys("sm_80")),
        *(key.source for key in row_keys("float16", "sm_80")),
    }


def test_cubins_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = decode_key("int8", "sm_90a", 1)
    cubin = KernelCache(tmp_path).cubin(key)
    monkeypatch.setattr(
        "kvrelay_kernels.cuda.module.compile_kernel", lambda key: pytest.fail("compiled again")
    )
    assert KernelCache(tmp_path).cubin(key) == cubin


def test_the_log_comes_with_the_error() -> None:
    with pytest.raises(CompileFailed, match="no_such_name"):
        compile_cubin("int x = no_such_name;", {}, ["--gpu-architecture=sm_80"])
