"""What an engine relies on in a storage, as tests that anybody's storage can be put to.

Enters: how a storage is made. Leaves: a test per promise of the protocols in dcp_async.storage. Invariant: a
test uses verbs of the protocol alone, on a loop of its own, and needs no plugin of pytest.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from .._names import data_file
from ..errors import StorageError
from ..storage import InUseError, Storage
from .promise import promise
from .saves import (
    ALIGN,
    CONTENT,
    FIRST,
    NAME,
    OTHER,
    SECOND,
    check_absent,
    check_opened,
    check_whole,
    commit,
    committed,
    file_of,
    manifest_of,
    metadata_of,
    opened,
    put,
    read,
    save,
    uids_named_in,
    write,
)


class BadBlockError(Exception):
    """What a verifier may raise while it is read."""


class StorageContract:
    """What an engine relies on in a storage, a test for each promise. Subclass it in a test module:

    .. code-block:: python

        class TestMyStorage(StorageContract):
            def storage_at(self, root: Path) -> Storage:
                return MyStorage(bucket_of(root))

    Everything is written as one rank writes it. Storages for several ranks have more to prove: that a rank
    which begins after the leading one finds what that has begun, or says that it does not see it.
    """

    def storage_at(self, root: Path) -> Storage:
        """A new storage on what ``root`` stands for. Each test has a fresh ``root``, and two storages at one
        ``root`` show the same checkpoints. The tests connect and close what this gives."""
        raise NotImplementedError("say how your storage is made: override storage_at()")

    keeps_opened_files: ClassVar[bool] = True
    """Whether a file that a reader has opened stays readable when it is removed, as a directory's does. False
    for a medium that holds nothing open: there it may be gone (ENOENT), and never be another one."""

    async def leave_behind(self, storage: Storage, name: str, uid: str) -> None:
        """Leave under ``name`` what a save of ``uid`` leaves whose process was killed before it committed.

        Here: a transaction that nobody ends. Override it where that would keep its save alive.
        """
        await write(storage, name, uid, replace=True)

    @asynccontextmanager
    async def connected(self, root: Path) -> AsyncIterator[Storage]:
        """The one that a test is given."""
        storage = self.storage_at(root)
        try:
            await storage.connect()
            yield storage
        finally:
            await storage.close()

    # -- saving

    @promise
    async def test_a_commit_makes_a_checkpoint_of_what_was_written(self, storage: Storage) -> None:
        assert list(await storage.list()) == []
        await save(storage, NAME, FIRST)
        assert await committed(storage) == {NAME}
        await check_whole(storage, NAME, FIRST)

    @promise
    async def test_nothing_is_a_checkpoint_before_the_commit(self, storage: Storage) -> None:
        transaction = await write(storage, NAME, FIRST)
        await check_absent(storage, NAME)
        await transaction.abort()

    @promise
    async def test_parts_may_come_in_any_order_and_several_at_once(self, storage: Storage) -> None:
        file = file_of(FIRST)
        transaction = await storage.begin(NAME, {file: len(CONTENT)}, uid=FIRST, replace=False)
        parts = [
            transaction.put(file, offset, memoryview(bytearray(CONTENT[offset : offset + ALIGN])))
            for offset in range(0, len(CONTENT), ALIGN)
        ]
        await asyncio.gather(*reversed(parts))
        await transaction.seal(file)
        await commit(transaction, FIRST)
        await check_whole(storage, NAME, FIRST)

    @promise
    async def test_a_buffer_is_free_again_once_put_returns(self, storage: Storage) -> None:
        file = file_of(FIRST)
        transaction = await storage.begin(NAME, {file: 2 * ALIGN}, uid=FIRST, replace=False)
        slot = bytearray(ALIGN)
        for offset, value in ((0, b"a"), (ALIGN, b"b")):
            slot[:] = value * ALIGN
            await transaction.put(file, offset, memoryview(slot))
        slot[:] = b"c" * ALIGN
        await transaction.seal(file)
        await commit(transaction, FIRST)
        await check_whole(storage, NAME, FIRST, b"a" * ALIGN + b"b" * ALIGN)

    @promise
    async def test_a_read_only_buffer_is_written_too(self, storage: Storage) -> None:
        file = file_of(FIRST)
        transaction = await storage.begin(NAME, {file: len(CONTENT)}, uid=FIRST, replace=False)
        await transaction.put(file, 0, memoryview(CONTENT))
        await transaction.seal(file)
        await commit(transaction, FIRST)
        await check_whole(storage, NAME, FIRST)

    @promise
    async def test_a_file_of_no_announced_length_is_as_long_as_what_was_put(self, storage: Storage) -> None:
        transaction = await storage.begin(NAME, {file_of(FIRST): None}, uid=FIRST, replace=False)
        await put(transaction, FIRST)
        await commit(transaction, FIRST)
        await check_whole(storage, NAME, FIRST)

    @promise
    async def test_a_save_without_a_file_is_a_checkpoint(self, storage: Storage) -> None:
        transaction = await storage.begin(NAME, {}, uid=FIRST, replace=False)
        await transaction.verify({})
        await commit(transaction, FIRST)
        async with opened(storage, NAME) as reader:
            assert await reader.metadata() == metadata_of(FIRST)

    @pytest.mark.parametrize("nbytes", [len(CONTENT) - 1, len(CONTENT) + 1], ids=["longer", "shorter"])
    @promise
    async def test_a_file_of_another_length_than_announced_is_not_sealed(
        self, storage: Storage, nbytes: int
    ) -> None:
        transaction = await storage.begin(NAME, {file_of(FIRST): nbytes}, uid=FIRST, replace=False)
        with pytest.raises(StorageError):
            await put(transaction, FIRST)
        await transaction.abort()
        await check_absent(storage, NAME)

    @promise
    async def test_verify_refuses_what_is_missing_or_of_another_length(self, storage: Storage) -> None:
        transaction = await write(storage, NAME, FIRST)
        for files in ({file_of(FIRST): 1}, {file_of(FIRST): len(CONTENT), data_file(1, 0, FIRST): 1}):
            with pytest.raises(StorageError):
                await transaction.verify(files)
        await transaction.abort()

    @promise
    async def test_an_abort_leaves_nothing_of_a_fresh_name(self, storage: Storage) -> None:
        transaction = await write(storage, NAME, FIRST)
        await transaction.abort()
        assert list(await storage.list()) == []
        await save(storage, NAME, SECOND)
        await check_whole(storage, NAME, SECOND)

    @promise
    async def test_an_abort_in_the_middle_of_a_replace_leaves_what_was_there(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        transaction = await write(storage, NAME, SECOND, content=b"x" * ALIGN, replace=True)
        await transaction.abort()
        await check_whole(storage, NAME, FIRST)

    # -- names that are taken

    @promise
    async def test_a_name_that_is_taken_is_refused_and_stays_as_it_was(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        with pytest.raises(FileExistsError):
            await storage.begin(NAME, {file_of(SECOND): 1}, uid=SECOND, replace=False)
        await check_whole(storage, NAME, FIRST)

    @promise
    async def test_of_two_writers_of_a_fresh_name_one_wins(self, storage: Storage) -> None:
        contents = {FIRST: CONTENT, SECOND: b"x" * ALIGN}
        writers = {uid: await write(storage, NAME, uid, content=contents[uid]) for uid in contents}
        outcomes = await asyncio.gather(
            *(
                writer.commit(metadata_of(uid), manifest_of(uid), replace=False)
                for uid, writer in writers.items()
            ),
            return_exceptions=True,
        )
        for writer in writers.values():
            await writer.abort()
        winners = [uid for uid, outcome in zip(writers, outcomes, strict=True) if outcome is None]
        refused = [outcome for outcome in outcomes if isinstance(outcome, FileExistsError)]
        assert len(winners) == len(refused) == 1, outcomes
        (winner,) = winners
        await check_whole(storage, NAME, winner, contents[winner])

    @promise
    async def test_a_replace_gives_the_new_one_in_place_of_the_old(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        transaction = await write(storage, NAME, SECOND, content=b"x" * ALIGN, replace=True)
        await check_whole(storage, NAME, FIRST)
        await commit(transaction, SECOND, replace=True)
        assert await committed(storage) == {NAME}
        await check_whole(storage, NAME, SECOND, b"x" * ALIGN)

    # -- reading

    @promise
    async def test_pieces_are_read_from_their_offsets(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        wanted = [(ALIGN - 3, 7), (0, 1), (5, 0), (len(CONTENT) - 2, 2)]
        targets = [bytearray(nbytes) for _, nbytes in wanted]
        counts: list[int] = []
        async with opened(storage, NAME) as reader:
            pieces = [
                (offset, memoryview(target)) for (offset, _), target in zip(wanted, targets, strict=True)
            ]
            await reader.read_into(file_of(FIRST), pieces, counts.append)
        assert targets == [CONTENT[offset : offset + nbytes] for offset, nbytes in wanted]
        # a storage need not call it; one that does counts what is there
        assert counts == sorted(counts)
        assert all(0 < count <= sum(map(len, targets)) for count in counts)

    @promise
    async def test_what_is_raised_at_an_arrival_ends_the_reading(self, storage: Storage) -> None:
        content = bytes(16 << 20)  # enough that a storage which tells of arrivals does
        await save(storage, NAME, FIRST, content=content)
        told: list[int] = []

        def refuse(count: int) -> None:
            told.append(count)
            raise BadBlockError

        async with opened(storage, NAME) as reader:
            try:
                await reader.read_into(file_of(FIRST), [(0, memoryview(bytearray(content)))], refuse)
            except BadBlockError:
                assert len(told) == 1
            else:
                assert told == []

    @pytest.mark.parametrize("name", [data_file(0, 1, FIRST), "../outside", "/outside", f"../{NAME}/x"])
    @promise
    async def test_a_file_that_is_not_the_checkpoints_is_refused(self, storage: Storage, name: str) -> None:
        await save(storage, NAME, FIRST)
        async with opened(storage, NAME) as reader:
            with pytest.raises(StorageError):
                await reader.size(name)
            with pytest.raises(StorageError):
                await reader.read_into(name, [(0, memoryview(bytearray(1)))])

    @promise
    async def test_reading_past_the_end_is_refused(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        async with opened(storage, NAME) as reader:
            with pytest.raises(StorageError):
                await read(reader, file_of(FIRST), len(CONTENT) - 1, 2)

    @promise
    async def test_a_name_that_was_never_saved_is_no_checkpoint(self, storage: Storage) -> None:
        await check_absent(storage, NAME)
        await save(storage, OTHER, FIRST)
        await check_absent(storage, NAME)

    @promise
    async def test_a_file_that_was_opened_stays_readable_when_it_is_replaced(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        async with opened(storage, NAME) as reader:
            assert await reader.size(file_of(FIRST)) == len(CONTENT)
            await save(storage, NAME, SECOND, content=b"x" * ALIGN, replace=True)
            await check_opened(reader, self.keeps_opened_files)

    @promise
    async def test_a_reader_of_what_is_replaced_shows_one_of_both_or_an_error(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        async with opened(storage, NAME) as reader:
            await save(storage, NAME, SECOND, content=b"x" * ALIGN, replace=True)
            assert await reader.metadata() in (metadata_of(FIRST), metadata_of(SECOND))
            assert {*await reader.manifest()} <= {manifest_of(FIRST), manifest_of(SECOND)}
            try:
                assert await read(reader, file_of(FIRST)) == CONTENT
            except StorageError:
                assert await reader.metadata() == metadata_of(SECOND)

    # -- removing

    @promise
    async def test_a_checkpoint_that_is_removed_is_gone_and_its_name_is_free(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        await save(storage, OTHER, SECOND)
        await storage.remove(NAME)
        await check_absent(storage, NAME)
        await check_whole(storage, OTHER, SECOND)
        await save(storage, NAME, SECOND)
        await check_whole(storage, NAME, SECOND)

    @promise
    async def test_what_is_no_checkpoint_is_not_said_to_be_removed(self, storage: Storage) -> None:
        begun = await write(storage, NAME, FIRST)
        for name in (NAME, OTHER):
            with pytest.raises(StorageError) as raised:
                await storage.remove(name)
            assert raised.value.errno == errno.ENOENT
        await commit(begun, FIRST)
        await check_whole(storage, NAME, FIRST)

    @promise
    async def test_a_file_that_was_opened_stays_readable_when_it_is_removed(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        async with opened(storage, NAME) as reader:
            assert await reader.size(file_of(FIRST)) == len(CONTENT)
            await storage.remove(NAME)
            await check_opened(reader, self.keeps_opened_files)

    @promise
    async def test_a_removal_that_spares_readers_takes_nothing_from_them(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        async with opened(storage, NAME) as reader:
            await reader.metadata()
            await reader.size(file_of(FIRST))
            with contextlib.suppress(InUseError):  # never raised by a storage that can't tell
                await storage.remove(NAME, unless_read=True)
            assert await read(reader, file_of(FIRST)) == CONTENT

    # -- sweeping

    @promise
    async def test_a_sweep_takes_what_a_dead_save_left(self, storage: Storage) -> None:
        await self.leave_behind(storage, NAME, FIRST)
        await storage.sweep(named=uids_named_in)
        assert list(await storage.list()) == []

    @promise
    async def test_a_sweep_leaves_checkpoints_and_live_saves_alone(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        await self.leave_behind(storage, NAME, SECOND)
        live = await write(storage, OTHER, SECOND)
        await storage.sweep(named=uids_named_in)
        await check_whole(storage, NAME, FIRST)
        await commit(live, SECOND)
        await storage.sweep(named=uids_named_in)
        await check_whole(storage, OTHER, SECOND)

    @promise
    async def test_a_metadata_that_nobody_can_read_protects_its_checkpoint(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        await self.leave_behind(storage, NAME, SECOND)
        await storage.sweep(named=lambda metadata, uids: None)
        await check_whole(storage, NAME, FIRST)

    # -- several users

    @promise
    async def test_two_storages_at_one_root_show_the_same(self, storage: Storage, tmp_path: Path) -> None:
        async with self.connected(tmp_path) as other:
            await save(storage, NAME, FIRST)
            await check_whole(other, NAME, FIRST)
            with pytest.raises(FileExistsError):
                await other.begin(NAME, {}, uid=SECOND, replace=False)
            live = await write(storage, OTHER, SECOND)
            await other.sweep(named=uids_named_in)
            await commit(live, SECOND)
            await check_whole(other, OTHER, SECOND)

    @promise
    async def test_a_checkpoint_outlasts_the_storage_that_wrote_it(
        self, storage: Storage, tmp_path: Path
    ) -> None:
        await save(storage, NAME, FIRST)
        await storage.close()
        del storage
        async with self.connected(tmp_path) as again:
            await check_whole(again, NAME, FIRST)

    @promise
    async def test_connecting_again_does_no_harm(self, storage: Storage) -> None:
        await save(storage, NAME, FIRST)
        await storage.connect()
        await check_whole(storage, NAME, FIRST)

    @promise
    async def test_a_storage_serves_loops_in_several_threads(self, storage: Storage) -> None:
        async def save_and_check(name: str, uid: str) -> None:
            await save(storage, name, uid)
            await check_whole(storage, name, uid)

        saves = [
            asyncio.to_thread(asyncio.run, save_and_check(name, uid))
            for name, uid in ((NAME, FIRST), (OTHER, SECOND))
        ]
        await asyncio.gather(*saves)
        assert await committed(storage) == {NAME, OTHER}
