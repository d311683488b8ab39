"""What ``save(files=...)`` takes, read before the save begins.

Enters: names with bytes or paths. Leaves: their bytes, in memory. Invariant: no file is read in the caller's
thread, since where it lies may be slow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from .._concurrency import StuckThreadError, Verb, run_blocking
from ..errors import StorageError
from ..save import Attachment, read_attachments
from .lifetime import Lifetime

Attachable: TypeAlias = Mapping[str, bytes | bytearray | memoryview | str | os.PathLike[str]]
"""Name -> bytes, or the path of a file to read them from."""


def reading_attachments(
    life: Lifetime, sources: Mapping[str, bytes | Path]
) -> Verb[Mapping[str, Attachment]]:
    """The bytes of ``sources``. Raises: ValueError for one that can't be read, or if they are too large;
    StorageError for one that can't be read in time."""
    # bytes need no thread; and where nothing is waited for, no other verb of this rank gets in between
    if not any(isinstance(source, Path) for source in sources.values()):
        return read_attachments(sources)
    have = life.resources

    async def read() -> Mapping[str, Attachment]:
        try:
            return await run_blocking(have.threads, have.timeout, read_attachments, sources)
        except StuckThreadError as error:
            raise StorageError.of("read", f"one of files={list(sources)}", error) from error

    attached: Mapping[str, Attachment] = yield life.submit(read()).join()
    return attached
