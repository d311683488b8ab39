"""What an engine relies on in a storage, put to those of this package, and to some that break it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from dcp_async._names import data_file, manifest_file
from dcp_async.storage import LocalStorage, MemoryStorage, Storage
from dcp_async.storage.base import NO_NAMES, NamesUids
from dcp_async.storage.memory.storage import MemoryReader, MemoryTransaction
from dcp_async.testing import StorageContract


class TestLocalStorage(StorageContract):
    def storage_at(self, root: Path) -> LocalStorage:
        return LocalStorage(root / "run")

    async def leave_behind(self, storage: Storage, name: str, uid: str) -> None:
        # a transaction of this process would hold its lease; a killed one's is free, or was never made
        assert isinstance(storage, LocalStorage)
        directory = storage.root / name
        directory.mkdir(parents=True, exist_ok=True)
        for file in (data_file(0, 0, uid), manifest_file(uid)):
            (directory / file).write_bytes(b"left behind")


def _name(root: Path) -> str:
    return root.as_posix().strip("/")


@pytest.fixture(autouse=True)
def _cleared(tmp_path: Path) -> Iterator[None]:
    yield
    MemoryStorage.clear(_name(tmp_path))


class TestMemoryStorage(StorageContract):
    def storage_at(self, root: Path) -> MemoryStorage:
        return MemoryStorage(_name(root))


class TransactionWithout(MemoryTransaction):
    """A transaction to be told what it does wrong."""

    without: str

    async def put(self, file: str, offset: int, buffer: memoryview) -> None:
        if self.without == "a copy":
            self.later = [*getattr(self, "later", []), (file, offset, buffer)]
        else:
            await super().put(file, offset, buffer)

    async def seal(self, file: str) -> None:
        for put in getattr(self, "later", []):
            await super().put(*put)
        if self.without == "a look at the length" and file in self._files:
            self._sealed[file] = self._files.pop(file)._content
        else:
            await super().seal(file)

    async def verify(self, files: Mapping[str, int]) -> None:
        if self.without != "a second look":
            await super().verify(files)

    async def commit(
        self,
        metadata: bytes,
        manifest: bytes,
        *,
        replace: bool,
        public_names: Mapping[str, str] = NO_NAMES,
    ) -> None:
        await super().commit(metadata, manifest, replace=replace or self.without == "exclusion")

    async def abort(self) -> None:
        if self.without != "an abort":
            await super().abort()


class ReaderWithout(MemoryReader):
    without: str

    async def size(self, file: str) -> int:
        return 0 if self.without == "a look at the file" else await super().size(file)

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        if self.without == "an end":
            length = await super().size(file)
            pieces = [(offset, buffer[: length - offset]) for offset, buffer in pieces]
        if self.without == "offsets":
            pieces = [(0, buffer) for _, buffer in pieces]
        await super().read_into(file, pieces, arrived)


class StorageWithout(MemoryStorage):
    """A storage in which one promise is broken."""

    def __init__(self, name: str, without: str) -> None:
        super().__init__(None if without == "a root" else name)
        self.without = without

    async def begin(self, name: str, files: Any, **options: Any) -> MemoryTransaction:
        if self.without == "exclusion":
            options["replace"] = True
        made = await super().begin(name, files, **options)
        made.__class__ = TransactionWithout
        made.without = self.without  # type: ignore[attr-defined]  # its class is another one since a line
        return made

    async def open(self, name: str) -> MemoryReader:
        made = await super().open(name)
        made.__class__ = ReaderWithout
        made.without = self.without  # type: ignore[attr-defined]  # its class is another one since a line
        return made

    async def sweep(self, *, named: NamesUids) -> None:
        if self.without == "a care for others":
            self._root.clear()


BROKEN = {
    "a copy": "test_a_buffer_is_free_again_once_put_returns",
    "a look at the length": "test_a_file_of_another_length_than_announced_is_not_sealed",
    "a second look": "test_verify_refuses_what_is_missing_or_of_another_length",
    "exclusion": "test_of_two_writers_of_a_fresh_name_one_wins",
    "an abort": "test_an_abort_leaves_nothing_of_a_fresh_name",
    "a look at the file": "test_a_file_that_is_not_the_checkpoints_is_refused",
    "an end": "test_reading_past_the_end_is_refused",
    "offsets": "test_pieces_are_read_from_their_offsets",
    "a root": "test_a_checkpoint_outlasts_the_storage_that_wrote_it",
    "a care for others": "test_a_sweep_leaves_checkpoints_and_live_saves_alone",
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "a look at the length": {"nbytes": 1 << 20},
    "a look at the file": {"name": "../outside"},
}


@pytest.mark.parametrize("without", BROKEN)
def test_the_contract_notices_a_storage_without(without: str, tmp_path: Path) -> None:
    class Contract(StorageContract):
        def storage_at(self, root: Path) -> Storage:
            return StorageWithout(_name(root), without)

    test = getattr(Contract(), BROKEN[without])
    with pytest.raises((AssertionError, FileNotFoundError, pytest.fail.Exception)):
        test(tmp_path, **ARGUMENTS.get(without, {}))
