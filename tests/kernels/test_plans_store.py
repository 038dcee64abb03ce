"""Stored plans: sound or rebuilt; on disks that are full, read-only or shared by racing processes."""

import errno
import hashlib
import logging
import multiprocessing
import os
import signal
import struct
import threading
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path

import pytest

from kvrelay_kernels.plans import (
    DeviceClass,
    FolderBlobs,
    FolderLocks,
    GraphKey,
    PlanCache,
    PlanStore,
    Tier,
    open_plans,
)
from kvrelay_kernels.plans.entry import pack, unpack

KEY = GraphKey.of("cubin", DeviceClass((9, 0)), attributes={"source": "decode"})
OTHER = GraphKey.of("cubin", DeviceClass((9, 0)), attributes={"source": "prefill"})
SPAWN = multiprocessing.get_context("spawn")


def fresh(folder: Path) -> PlanCache[bytes]:
    """The cache of a new process."""
    return PlanCache(open_plans(folder), capacity=2)


def get(cache: PlanCache[bytes], plan: bytes = b"plan") -> bytes:
    return cache.get(KEY, lambda: plan, bytes, bytes).value


def not_again() -> bytes:
    pytest.fail("built again")


def test_an_entry_gives_its_plan_to_its_key_alone() -> None:
    for plan in (b"", b"plan", bytes(range(256)) * 400):
        entry = pack(KEY, plan)
        assert unpack(KEY, entry) == plan
        assert unpack(OTHER, entry) is None


def test_no_changed_or_shortened_entry_is_trusted() -> None:
    entry = pack(KEY, b"0123456789")
    for place in range(len(entry)):
        changed = bytearray(entry)
        changed[place] ^= 1
        assert unpack(KEY, bytes(changed)) is None
        assert unpack(KEY, entry[:place]) is None
    assert unpack(KEY, entry + b"\0") is None


def test_an_entry_of_another_version_is_not_trusted() -> None:
    body = struct.pack(">4sIIQ", b"KVPL", 2, len(KEY.encoded), 4) + KEY.encoded + b"plan"
    assert unpack(KEY, body + hashlib.blake2b(body, digest_size=16).digest()) is None
    now = body.replace(struct.pack(">4sI", b"KVPL", 2), struct.pack(">4sI", b"KVPL", 1), 1)
    assert unpack(KEY, now + hashlib.blake2b(now, digest_size=16).digest()) == b"plan"


def test_a_plan_is_one_file_that_says_its_kind(tmp_path: Path) -> None:
    get(fresh(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [KEY.name]
    assert KEY.name.startswith("cubin-")
    again = fresh(tmp_path)
    assert again.get(KEY, not_again, bytes, bytes).value == b"plan"
    assert again.counts.hits == {"disk": 1}


@pytest.mark.parametrize(
    "spoiled", [b"", b"KVPL", b"\0" * 500, pack(OTHER, b"plan"), pack(KEY, b"plan")[:-3]]
)
def test_a_spoiled_file_is_rebuilt_and_replaced(tmp_path: Path, spoiled: bytes) -> None:
    (tmp_path / KEY.name).write_bytes(spoiled)
    cache = fresh(tmp_path)
    assert get(cache, b"rebuilt") == b"rebuilt"
    assert (cache.counts.rejected, cache.counts.rebuilt, cache.counts.hits) == (1, 1, {})
    assert fresh(tmp_path).get(KEY, not_again, bytes, bytes).value == b"rebuilt"


def test_a_folder_in_the_place_of_a_plan_is_no_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / KEY.name).mkdir()
    assert get(fresh(tmp_path)) == b"plan"
    assert "plans are not kept" in caplog.text


def test_a_disk_that_takes_nothing_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    cache = fresh(tmp_path / "file" / "folder")
    assert get(cache) == b"plan"
    assert cache.get(OTHER, lambda: b"other", bytes, bytes).value == b"other"
    assert cache.counts.builds == 2
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert str(tmp_path / "file" / "folder") in caplog.text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into a read-only folder")
def test_a_read_only_folder_serves_what_it_has(tmp_path: Path) -> None:
    get(fresh(tmp_path))
    tmp_path.chmod(0o500)
    try:
        cache = fresh(tmp_path)
        assert cache.get(KEY, not_again, bytes, bytes).value == b"plan"
        assert cache.get(OTHER, lambda: b"other", bytes, bytes).value == b"other"
        assert [path.name for path in tmp_path.iterdir()] == [KEY.name]
    finally:
        tmp_path.chmod(0o700)


def test_a_disk_that_refuses_drafts_and_locks_serves_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, where no mode keeps us out."""
    get(fresh(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("kvrelay_kernels.plans.folder.NamedTemporaryFile", refuse)
    monkeypatch.setattr(os, "utime", refuse)
    (tmp_path / f"{OTHER.name}.lock").mkdir()
    cache = fresh(tmp_path)
    assert cache.get(KEY, not_again, bytes, bytes).value == b"plan"
    assert cache.get(OTHER, lambda: b"other", bytes, bytes).value == b"other"
    assert (cache.counts.hits, cache.counts.builds) == ({"disk": 1}, 1)


def test_a_full_disk_keeps_no_half_plan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    open_file = os.open

    def without_room(path: str, flags: int, mode: int = 0o777) -> int:
        """A new file, behind which is a device that takes no byte."""
        descriptor = open_file(path, flags, mode)
        if flags & os.O_CREAT:
            device = open_file(full, os.O_WRONLY)
            os.dup2(device, descriptor)
            os.close(device)
        return descriptor

    blobs = FolderBlobs(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", without_room)
        blobs.put(KEY.name, b"plan" * 100000)
    assert "No space left" in caplog.text
    assert blobs.get(KEY.name) is None
    assert list(tmp_path.iterdir()) == []


def test_the_folder_stays_within_its_limit(tmp_path: Path) -> None:
    blobs = FolderBlobs(tmp_path, limit_bytes=350)
    for number in range(3):
        blobs.put(f"plan{number}", bytes(100))
        os.utime(tmp_path / f"plan{number}", (number, number))
    assert blobs.get("plan0") is not None  # asked for last
    blobs.put("plan3", bytes(100))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan0", "plan2", "plan3"]


def test_drafts_of_dead_processes_are_pruned_and_folders_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.utime(tmp_path / "folder", (0, 0))
    (tmp_path / ".draft").write_bytes(bytes(300))
    os.utime(tmp_path / ".draft", (1, 1))
    FolderBlobs(tmp_path, limit_bytes=350).put("plan", bytes(100))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "plan"]


@pytest.mark.parametrize("name", ["", "../plan", "a/b", ".hidden", "Plan", "a" * 200])
def test_only_plain_names_name_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot name a file"):
        FolderBlobs(tmp_path).get(name)
    with pytest.raises(ValueError, match="cannot name a file"):
        FolderBlobs(tmp_path).put(name, b"")


def test_one_holds_a_lock_and_it_leaves_no_file(tmp_path: Path) -> None:
    held: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        locks = FolderLocks(tmp_path)
        for _ in range(20):
            with locks.hold("plan"):
                held.append(number)
                most.append(len(held))
                time.sleep(0.001)
                held.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 120
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_never_free_is_passed_by(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FolderLocks(tmp_path).hold("plan"):
        began = time.monotonic()
        with FolderLocks(tmp_path, patience_seconds=0.1).hold("plan"):
            waited = time.monotonic() - began
        with FolderLocks(tmp_path).hold("other"):
            pass
        assert "going on without it" in caplog.text
        assert (tmp_path / "plan.lock").exists()
    assert 0.1 <= waited < 60
    assert list(tmp_path.iterdir()) == []


def race(folder: Path, number: int, out: Path) -> None:
    """One of several processes that want one plan at the same time."""

    def build() -> bytes:
        time.sleep(1)
        return f"built by {number}".encode()

    cache = fresh(folder)
    (out / f"ready{number}").touch()
    while not (out / "go").exists():
        time.sleep(0.001)
    plan = cache.get(KEY, build, bytes, bytes).value
    (out / f"{number}").write_text(f"{cache.counts.builds} {plan.decode()}")


def build_for_ever(folder: Path, out: Path) -> None:
    """A builder that will be killed."""

    def build() -> bytes:
        (out / "building").touch()
        time.sleep(1000)
        return b""

    fresh(folder).get(KEY, build, bytes, bytes)


def start(target: object, *args: object) -> SpawnProcess:
    process = SPAWN.Process(target=target, args=args, daemon=True)  # type: ignore[arg-type]
    process.start()
    return process


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_racing_processes_build_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    racers = [start(race, tmp_path / "plans", number, out) for number in range(3)]
    wait_for(*(out / f"ready{number}" for number in range(3)))
    (out / "go").touch()
    for racer in racers:
        racer.join(60)
    found = [(out / f"{number}").read_text().split(" ", 1) for number in range(3)]
    assert sorted(builds for builds, _ in found) == ["0", "0", "1"]
    assert len({plan for _, plan in found}) == 1
    assert [path.name for path in (tmp_path / "plans").iterdir()] == [KEY.name]


def test_a_builder_that_dies_is_succeeded(tmp_path: Path) -> None:
    builder = start(build_for_ever, tmp_path / "plans", tmp_path)
    wait_for(tmp_path / "building")
    began = time.monotonic()
    heir = threading.Timer(0.3, lambda: os.kill(builder.pid or 0, signal.SIGKILL))
    heir.start()
    assert get(fresh(tmp_path / "plans"), b"of the heir") == b"of the heir"
    assert 0.2 < time.monotonic() - began < 30
    builder.join()
    assert [path.name for path in (tmp_path / "plans").iterdir()] == [KEY.name]


def test_without_a_folder_processes_share_through_the_fleet_alone() -> None:
    class Forgetful:
        """A tier that is gone."""

        def get(self, name: str) -> bytes | None:
            return None

        def put(self, name: str, blob: bytes) -> None:
            return

    cache: PlanCache[bytes] = PlanCache(PlanStore([Tier("gone", Forgetful())]), 1)
    assert get(cache) == b"plan"
    assert cache.counts.misses == 1
