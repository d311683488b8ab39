"""What a local storage sweeps: the caller tells what a `.metadata` names, no storage decodes it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Set
from pathlib import Path

import pytest
import pytest_asyncio

from dcp_async._names import METADATA, data_file, lease_file, manifest_file, temporary_metadata
from dcp_async.storage import LocalStorage
from dcp_async.storage.local.files import sync_directory
from dcp_async.storage.local.lease import take_lease
from dcp_async.storage.local.transaction import LocalTransaction
from tests.support.doubles import PATIENCE

OLD, NEW = "0" * 16, "1" * 16
BYTES = b"no pickle at all"


@pytest_asyncio.fixture
async def storage(tmp_path: Path) -> AsyncIterator[LocalStorage]:
    made = LocalStorage(tmp_path)
    yield made
    await made.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Two saves' files beside a `.metadata` in words that nobody but the caller knows."""
    path = tmp_path / "step-00000001"
    path.mkdir()
    for uid in (OLD, NEW):
        (path / data_file(0, 0, uid)).write_bytes(b"data")
        (path / manifest_file(uid)).write_bytes(b"{}")
    (path / METADATA).write_bytes(BYTES)
    return path


async def test_what_the_caller_names_stays_and_the_rest_goes(storage: LocalStorage, directory: Path) -> None:
    asked: list[tuple[bytes, Set[str]]] = []

    def named(metadata: bytes, uids: Set[str]) -> Set[str] | None:
        asked.append((metadata, set(uids)))
        return {NEW}

    await storage.sweep(named=named)
    assert asked == [(BYTES, {OLD, NEW})]
    assert {path.name for path in directory.iterdir()} == {
        METADATA,
        data_file(0, 0, NEW),
        manifest_file(NEW),
    }


async def test_a_metadata_that_the_caller_cannot_read_protects_its_directory(
    storage: LocalStorage, directory: Path
) -> None:
    before = sorted(path.name for path in directory.iterdir())
    await storage.sweep(named=lambda metadata, uids: None)
    assert sorted(path.name for path in directory.iterdir()) == before


async def test_of_a_published_save_only_what_it_needs_no_more_goes(
    storage: LocalStorage, directory: Path
) -> None:
    (directory / temporary_metadata(NEW)).write_bytes(BYTES)
    (directory / lease_file(NEW)).touch()
    await storage.sweep(named=lambda metadata, uids: uids)
    left = {path.name for path in directory.iterdir()}
    assert not left & {temporary_metadata(NEW), lease_file(NEW)}
    assert data_file(0, 0, OLD) in left


async def test_a_live_save_is_not_asked_about(storage: LocalStorage, directory: Path) -> None:
    lease = take_lease(directory, OLD)
    try:
        await storage.sweep(named=lambda metadata, uids: uids - {OLD})
        assert (directory / data_file(0, 0, OLD)).exists()
    finally:
        lease.release()


async def test_a_replace_removes_what_it_replaced_and_nothing_that_came_after(
    storage: LocalStorage, directory: Path
) -> None:
    for path in list(directory.iterdir()):
        if NEW in path.name:
            path.unlink()
    transaction = await storage.begin(directory.name, {}, uid=NEW, replace=True)
    await transaction.commit(b"of the new one", b"{}", replace=True)
    assert {path.name for path in directory.iterdir()} == {METADATA, manifest_file(NEW)}


async def test_removing_a_checkpoint_takes_the_files_of_every_save_along(
    storage: LocalStorage, directory: Path
) -> None:
    await storage.remove(directory.name)
    assert not directory.exists()


async def _written(storage: LocalStorage, name: str, uid: str) -> LocalTransaction:
    file = data_file(0, 0, uid)
    transaction = await storage.begin(name, {file: 4}, uid=uid, replace=True)
    await transaction.put(file, 0, memoryview(b"data"))
    await transaction.seal(file)
    await transaction.verify({file: 4})
    return transaction


def _metadata_of(uid: str) -> bytes:
    return f"names {data_file(0, 0, uid)}".encode()


async def test_a_replace_that_is_replaced_before_it_has_ended_takes_its_files_away(
    storage: LocalStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = await _written(storage, "once", OLD), await _written(storage, "once", NEW)
    loop, calls = asyncio.get_running_loop(), itertools.count(1)

    def sync_and_publish(path: Path) -> None:
        sync_directory(path)
        if next(calls) == 2:  # the first comes before the older save publishes
            publishing = newer.commit(_metadata_of(NEW), b"{}", replace=True)
            asyncio.run_coroutine_threadsafe(publishing, loop).result(PATIENCE)

    monkeypatch.setattr("dcp_async.storage.local.transaction.sync_directory", sync_and_publish)
    await older.commit(_metadata_of(OLD), b"{}", replace=True)
    assert {path.name for path in (storage.root / "once").iterdir()} == {
        METADATA,
        data_file(0, 0, NEW),
        manifest_file(NEW),
    }
    assert not caplog.records
