"""Opens whatever a path leads to: a checkpoint, safetensors files of a model, or a file of ``torch.save``.

Enters: names, which are paths below a root that may be the file system's own. Leaves: what an Opener gives.
Invariant: nothing but the named directory is read, and only in the storage's threads.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint.metadata import Metadata

from .._concurrency import BlockingThreads
from .._names import FIRST_RANK_METADATA, METADATA
from ..errors import CheckpointNotFoundError
from ..formats import ManifestGist
from ..info import CheckpointInfo, VerifyReport
from ..storage import BlockingCalls, LocalPlace
from ..trust import Trust
from .contents import Contents
from .opening import Opener
from .safetensors_source import SafetensorsOpener, is_model_file
from .source_opener import SourceOpener
from .torch_save_source import TorchSaveOpener
from .verification import Progress

_MARKS = (METADATA, FIRST_RANK_METADATA)
_SHOWN = 3
"""So many checkpoints are told of a directory that holds some and is none itself."""


@dataclass(frozen=True, slots=True)
class _Location:
    """What a path leads to."""

    directory: str
    """Without links."""
    is_model: bool
    """Whether safetensors files are meant, and no checkpoint."""
    only: str | None = None
    """The one file of the directory that is meant, or the index that says which; of no model, it is one of
    ``torch.save``."""


def _located(path: str) -> _Location:
    """What ``path`` leads to, if it is anything: whoever opens it says what is wrong. Blocks."""
    # not what the file is a link to: in Hugging Face's cache that has neither the name nor the neighbours
    if is_model_file(path) and not os.path.isdir(path):
        return _Location(os.path.realpath(os.path.dirname(path)), True, os.path.basename(path))
    real = os.path.realpath(path)
    if os.path.isfile(real):
        return _Location(os.path.dirname(real), False, os.path.basename(real))
    return _Location(real, not _is_committed(real) and _holds_models(real))


def _is_committed(directory: str) -> bool:
    # a link that leads nowhere counts: whoever opens the checkpoint says so, instead of "there is none"
    return any(os.path.lexists(os.path.join(directory, mark)) for mark in _MARKS)


def _holds_models(directory: str) -> bool:
    try:
        return any(map(is_model_file, os.listdir(directory)))
    except OSError:  # whoever opens it says what is wrong
        return False


def _why_nothing(path: str) -> str | None:
    """Why ``path`` leads to nothing that could be opened; None if it may. Blocks."""
    location = _located(path)
    if location.only is not None:
        is_there = os.path.lexists(path)
        return None if is_there else "there is no such file"
    if location.is_model or _is_committed(location.directory):
        return None
    if not os.path.isdir(location.directory):
        is_there = os.path.lexists(location.directory)
        return "it is no directory" if is_there else "there is no such file or directory"
    try:
        inside = sorted(os.listdir(location.directory))
    except OSError as error:
        return os.strerror(error.errno or errno.EIO)
    # the usual mistake: the run's directory instead of one of its checkpoints
    run = [name for name in inside if _is_committed(os.path.join(location.directory, name))]
    if run:
        shown = ", ".join(run[-_SHOWN:])
        return f"it is a directory of checkpoints, of which {shown} could be named"
    return "it has neither a .metadata nor safetensors files"


class PathOpener:
    """In place of an Opener, for names that are paths. Owns nothing."""

    def __init__(
        self,
        root: str,
        calls: BlockingCalls,
        threads: BlockingThreads,
        metadata_of: Callable[[str], Awaitable[Metadata]],
        *,
        timeout: float,
        trust: Trust,
    ) -> None:
        """
        Args:
            root: what names are relative to; an absolute one is itself.
            calls: run what looks at the file system.
            timeout: as for Opener.
            trust: what the pickle of a file may name, and whether files of a checkpoint may be links out of
                what it lies in. Those of a model may, since nothing of them is unpickled.
        """
        self._root = root
        self._calls = calls
        self._threads = threads
        self._metadata_of = metadata_of
        self._timeout = timeout
        self._trust = trust

    async def _opener(self, name: str) -> Opener | SourceOpener:
        path = os.path.join(self._root, name)
        # at each look anew: what lies there may have been replaced by something of another kind
        location = await self._calls.run("open", path, _located, path)
        place = LocalPlace(
            self._calls,
            Path(location.directory),
            name,
            # Hugging Face's cache is made of links
            follow_links=location.is_model or self._trust.follow_links,
            only_committed=not location.is_model and location.only is None,
        )
        if location.is_model:
            return SafetensorsOpener(
                place, self._threads, self._metadata_of, timeout=self._timeout, only=location.only
            )
        if location.only is not None:
            return TorchSaveOpener(
                place,
                self._threads,
                self._metadata_of,
                timeout=self._timeout,
                file=location.only,
                trust=self._trust,
            )
        return Opener(place, self._threads, self._metadata_of, timeout=self._timeout)

    async def check(self, path: str) -> None:
        """Raises CheckpointNotFoundError for what is nothing of the kind, in words that help."""
        why = await self._calls.run("open", path, _why_nothing, path)
        if why is not None:
            raise CheckpointNotFoundError(
                f"there is no checkpoint at {path!r}: {why}; a path leads to one checkpoint's directory, to "
                "a directory of safetensors files, to one such file or its index, or to a file of torch.save",
                checkpoint_id=path,
            )

    async def open(self, name: str) -> Contents:
        """As the ``open`` of the opener that fits."""
        return await (await self._opener(name)).open(name)

    async def metadata(self, name: str) -> Metadata:
        """What ``name`` holds. Raises: as ``open``."""
        return await (await self._opener(name)).metadata(name)

    async def describe(self, name: str) -> CheckpointInfo:
        """What ``name`` is. Raises: as ``open``."""
        return await (await self._opener(name)).describe(name)

    async def verify(
        self, name: str, *, io_concurrency: int, progress: Progress | None = None
    ) -> VerifyReport:
        """Read all of ``name``. Raises: as ``Opener.verify``."""
        opener = await self._opener(name)
        return await opener.verify(name, io_concurrency=io_concurrency, progress=progress)

    async def is_current(self, contents: Contents) -> bool:
        """Whether ``contents`` are of what is there now."""
        return await (await self._opener(contents.info.checkpoint_id)).is_current(contents)

    async def gist(self, name: str) -> ManifestGist | None:
        """What ``name`` tells of itself. Raises: as ``Opener.gist``."""
        return await (await self._opener(name)).gist(name)
