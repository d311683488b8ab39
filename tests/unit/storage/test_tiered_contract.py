"""Two tiers as one storage, put to what an engine relies on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dcp_async._names import data_file, manifest_file
from dcp_async.storage import LocalStorage, MemoryStorage, ObjectStorage, Storage, TieredStorage
from dcp_async.testing import StorageContract

pytest.importorskip("obstore")

_buckets: dict[Path, Any] = {}


def _name(root: Path) -> str:
    return root.as_posix().strip("/")


@pytest.fixture(autouse=True)
def _cleared(tmp_path: Path) -> Iterator[None]:
    yield
    MemoryStorage.clear(_name(tmp_path))
    _buckets.pop(tmp_path, None)


class OnDirectories(StorageContract):
    """What lies near is left there as a killed process leaves it."""

    async def leave_behind(self, storage: Storage, name: str, uid: str) -> None:
        assert isinstance(storage, TieredStorage)
        assert isinstance(storage.near, LocalStorage)
        directory = storage.near.root / name
        directory.mkdir(parents=True, exist_ok=True)
        for file in (data_file(0, 0, uid), manifest_file(uid)):
            (directory / file).write_bytes(b"left behind")


class TestNearAndFarDirectories(OnDirectories):
    def storage_at(self, root: Path) -> TieredStorage:
        return TieredStorage(root / "near", root / "far")


class TestFarInMemory(OnDirectories):
    def storage_at(self, root: Path) -> TieredStorage:
        return TieredStorage(root / "near", f"memory://{_name(root)}")


class TestFarInABucket(OnDirectories):
    def storage_at(self, root: Path) -> TieredStorage:
        from obstore.store import MemoryStore

        return TieredStorage(root / "near", ObjectStorage(_buckets.setdefault(root, MemoryStore())))
