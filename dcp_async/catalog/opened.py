"""One checkpoint that stays open for several verbs: a catalog that knows this one alone.

Enters: Contents, opened once. Leaves: the same Contents to each verb, which closes them as if they were its
own. Invariant: the files stay open while a verb reads them, and no longer than until the last one ends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..errors import EngineStateError
from ..info import CheckpointRef
from ..storage import Reader, turn_to_copy
from .contents import Contents


class Opened:
    """An opened checkpoint, in place of a Catalog. Owns its reader. On the engine's loop."""

    def __init__(self, contents: Contents) -> None:
        self._reader = _SharedReader(contents.reader)
        self.contents = replace(contents, reader=self._reader)
        """For whoever looks at what it holds; ``open`` gives them to whoever reads."""
        self._is_closed = False

    async def resolve(self, ref: CheckpointRef) -> list[str]:
        """Its name, whatever ``ref`` says: which one it is was chosen when it was opened."""
        return [self.contents.info.checkpoint_id]

    async def open(self, name: str) -> Contents:
        """What was opened, for one verb to read and to close. Raises EngineStateError after ``close``."""
        if self._is_closed:
            raise EngineStateError(f"checkpoint {name!r} is closed; open it again to read more of it")
        self._reader.num_users += 1
        return self.contents

    async def is_current(self, contents: Contents) -> bool:
        """Always: this opening is what the verbs mean, whatever has replaced it since."""
        return True

    async def close(self) -> None:
        """No verb begins any more; the files close with the last one that reads them. A second call does
        nothing."""
        if not self._is_closed:
            # before the first wait: a second close() would take away what a verb still reads
            self._is_closed = True
            await self._reader.close()


class _SharedReader:
    """A reader of several users, the last of whom closes it."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        # the opening itself counts, until it is closed: between two verbs the files stay open
        self.num_users = 1

    async def metadata(self) -> bytes:
        return await self._reader.metadata()

    async def rank_metadata(self) -> Mapping[int, bytes]:
        return await self._reader.rank_metadata()

    async def manifest(self) -> Sequence[bytes]:
        return await self._reader.manifest()

    async def size(self, file: str) -> int:
        return await self._reader.size(file)

    async def read_into(
        self,
        file: str,
        pieces: Sequence[tuple[int, memoryview]],
        arrived: Callable[[int], None] | None = None,
    ) -> None:
        await self._reader.read_into(file, pieces, arrived)

    async def turn_to_copy(self, file: str, why: str) -> bool:
        return await turn_to_copy(self._reader, file, why)

    async def give_back(self) -> None:
        await self._reader.give_back()

    async def close(self) -> None:
        self.num_users -= 1
        if self.num_users == 0:
            await self._reader.close()
