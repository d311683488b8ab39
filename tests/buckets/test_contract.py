"""What an engine relies on in a storage, put to a bucket in memory and to one of a real server."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import obstore
import pytest
from obstore.store import MemoryStore

from dcp_async._names import data_file, manifest_file
from dcp_async.storage import ObjectStorage, Storage
from dcp_async.testing import StorageContract
from tests.support.buckets import QUICK, Server

LEFT_BEHIND = b"left behind"


class TestMemoryStore(StorageContract):
    keeps_opened_files = False
    stores: ClassVar[dict[Path, MemoryStore]] = {}

    def storage_at(self, root: Path) -> ObjectStorage:
        return ObjectStorage(self.stores.setdefault(root, MemoryStore()), retries=QUICK)

    async def leave_behind(self, storage: Storage, name: str, uid: str) -> None:
        (store,) = (store for root, store in self.stores.items() if root.exists() and store is not None)
        for file in (data_file(0, 0, uid), manifest_file(uid)):
            obstore.put(store, f"{name}/{file}", LEFT_BEHIND)

    @pytest.fixture(autouse=True)
    def _forgotten(self) -> None:
        self.stores.clear()


class ServerContract(StorageContract):
    keeps_opened_files = False
    server: Server

    def storage_at(self, root: Path) -> ObjectStorage:
        self.root = root
        return self.server.storage(root.as_posix())

    async def leave_behind(self, storage: Storage, name: str, uid: str) -> None:
        # a transaction of this process would renew its lease; that of a killed one was never made, or grew
        # old
        for file in (data_file(0, 0, uid), manifest_file(uid)):
            key = f"{self.root.as_posix().strip('/')}/{name}/{file}"
            obstore.put(self.server.store(), key, LEFT_BEHIND)


class TestSeaweed(ServerContract):
    @pytest.fixture(autouse=True)
    def _served(self, seaweed: Server) -> None:
        self.server = seaweed
