"""Rules of the house that no linter knows."""

import ast
import re
import subprocess
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = (
    "gateway_service",
    "prefill_service",
    "kv_transfer",
    "decode_service",
    "model_runtime",
    "control_plane",
)
SOURCES = (*ROOMS, "kernels", "proto")
LONGEST = 500

# Written apart, so that this file does not hold what it looks for.
HOSTS = re.compile(
    "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "npmjs" + r"\.(org|com)", "index-" + "url"))
)
MACHINE_PATH = re.compile(
    r"(?<![\w.:/-])/(" + "|".join(("work" + "/", "root" + "/", "home" + "/(?!kvrelay)", "Users" + "/")) + ")"
)


def ours() -> list[Path]:
    """Every file that is, or will be, committed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.splitlines() if (ROOT / name).is_file()]


def texts(*suffixes: str) -> list[tuple[Path, str]]:
    """The text files among ours, or those with these suffixes."""
    found: list[tuple[Path, str]] = []
    for path in ours():
        if not suffixes or path.suffix in suffixes:
            try:
                found.append((path.relative_to(ROOT), path.read_text()))
            except UnicodeDecodeError:
                continue
    return found


def python_files() -> list[tuple[Path, str]]:
    """Hand-written Python of the rooms."""
    return [
        (path, text)
        for path, text in texts(".py")
        if path.parts[0] in SOURCES and "_pb2" not in path.name and path.name != "__init__.py"
    ]


@pytest.mark.parametrize("folder", ["kernels", "proto"])
def test_import_roots_are_no_packages(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


def test_the_architecture_fits_on_its_page() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text().splitlines()) <= 100


def test_files_are_small() -> None:
    assert {
        str(path): len(text.splitlines()) for path, text in python_files() if text.count("\n") > LONGEST
    } == {}


def test_nothing_names_a_registry_host() -> None:
    assert [str(path) for path, text in texts() if HOSTS.search(text)] == []


def test_nothing_names_a_path_of_one_machine() -> None:
    assert [str(path) for path, text in texts() if MACHINE_PATH.search(text)] == []


def test_the_environment_is_read_in_configs_alone() -> None:
    """`cluster.py` writes what Ray takes from the environment only."""
    allowed = {"control_plane/cluster.py"}
    touching = {
        str(path)
        for path, text in python_files()
        if re.search(r"\bos\.(environ|getenv|putenv)\b", text) and path.name != "config.py"
    }
    assert touching <= allowed


def test_there_are_no_catch_all_modules() -> None:
    names = {path.stem for path, _ in python_files()} | {
        part for path, _ in python_files() for part in path.parts
    }
    assert not names & {"utils", "util", "common", "helpers", "misc"}


def test_every_public_module_class_and_function_says_what_it_is() -> None:
    missing: list[str] = []
    for path, text in python_files():
        tree = ast.parse(text)
        nodes: list[ast.AST] = [tree]
        nodes += [
            node
            for node in tree.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        for node in nodes:
            name = getattr(node, "name", "")
            if not name.startswith("_") and ast.get_docstring(node) is None:  # type: ignore[arg-type]
                missing.append(f"{path}:{name}")
    assert missing == []


def test_every_library_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {_plain(re.split(r"[\[<>=; ]", line)[0]) for line in (*project["dependencies"], *extras)}
    distributions = packages_distributions()
    imported = {
        name
        for _, text in python_files()
        for node in ast.walk(ast.parse(text))
        for name in _imported(node)
        if name in distributions and name not in (*ROOMS, "kvrelay", "kvrelay_kernels")
    }
    undeclared = {name for name in imported if not declared & {_plain(one) for one in distributions[name]}}
    # The first is pydantic's vocabulary, the second Numba's back.
    assert undeclared <= {"annotated_types", "llvmlite"}


def test_constraints_pin_versions_and_name_nothing_else() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert pins
    assert [line for line in pins if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line)] == []


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module.split(".")[0]]
    return []
