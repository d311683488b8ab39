"""Files that are no checkpoint, opened as if they were one: what is the same whatever kind they are of.

Enters: the place of a directory. Leaves: Contents, whose reader is the caller's to close. Invariant: nobody
replaces such files by a commit that could be told, so whatever was opened is taken for what is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads
from ..errors import CheckpointNotFoundError
from ..formats import ManifestGist
from ..info import CheckpointInfo, Producer, VerifyReport
from ..storage import LocalPlace, LocalReader
from .contents import Contents
from .verification import Progress, Verification


class SourceOpener(ABC):
    """In place of an Opener, for files of one kind. Owns nothing."""

    def __init__(
        self,
        place: LocalPlace,
        threads: BlockingThreads,
        metadata_of: Callable[[str], Awaitable[Metadata]],
        *,
        timeout: float,
    ) -> None:
        """``timeout``: seconds that a call in a thread may take."""
        self._place = place
        self._threads = threads
        self._metadata_of = metadata_of
        self._timeout = timeout

    @abstractmethod
    async def contents(self, name: str, reader: LocalReader) -> Contents:
        """What ``reader`` finds under ``name``. Raises: what ``open`` raises."""

    @abstractmethod
    async def verified(self, verification: Verification, contents: Contents) -> VerifyReport:
        """What ``verification`` finds of ``contents``, all of which it reads."""

    def info(self, name: str, *, nbytes: int, num_files: int, producer: Producer) -> CheckpointInfo:
        """What can be told of files that say nothing of themselves."""
        return CheckpointInfo(
            checkpoint_id=name,
            step=None,
            time=0.0,
            nbytes=nbytes,
            num_files=num_files,
            world_size=None,
            torch_version=None,
            producer=producer,
            _metadata=self._metadata_of,
        )

    async def open(self, name: str) -> Contents:
        """Read what tells where the tensors lie; the files stay open.

        Raises: CheckpointNotFoundError if there are none; CorruptCheckpointError for what can't be believed;
            LoadError for what is of another kind; UntrustedCheckpointError.
        """
        try:
            reader = await self._place.open(name)
        except FileNotFoundError as error:
            raise CheckpointNotFoundError(f"there is no directory {name!r}", checkpoint_id=name) from error
        try:
            return await self.contents(name, reader)
        except BaseException:
            await reader.close()
            raise

    async def metadata(self, name: str) -> Metadata:
        """What ``name`` holds. Raises: as ``open``."""
        return (await self._looked_at(name)).metadata

    async def describe(self, name: str) -> CheckpointInfo:
        """What ``name`` is. Raises: as ``open``."""
        return (await self._looked_at(name)).info

    async def _looked_at(self, name: str) -> Contents:
        """What ``name`` holds, its files closed again."""
        contents = await self.open(name)
        await contents.close()
        return contents

    async def is_current(self, contents: Contents) -> bool:
        """Always; see above."""
        return True

    async def gist(self, name: str) -> ManifestGist | None:
        """One without a step: such files tell none."""
        return ManifestGist(None, 0.0, {})

    async def verify(
        self, name: str, *, io_concurrency: int, progress: Progress | None = None
    ) -> VerifyReport:
        """Read all of ``name``, and compare it with its checksums, if it has any. Raises: as ``open``."""
        contents = await self.open(name)
        try:
            verification = Verification(
                name,
                contents.reader,
                self._threads,
                io_concurrency=io_concurrency,
                timeout=self._timeout,
                progress=progress,
            )
            return await self.verified(verification, contents)
        finally:
            await contents.close()
