"""The verb ``remove``: one checkpoint goes, if asked for so once a newer one is durable.

Enters: a name, and the save to wait for. Leaves: nothing, or an error that says that the checkpoint stays.
Invariant: the coordinator removes, all ranks hear how it ended; where the newer save failed, on any rank,
nothing is removed.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import TypedDict

from .._concurrency import Verb
from ..catalog import is_path, reference
from ..coordination import RemoteFailure
from ..errors import CheckpointError, CheckpointNotFoundError, SaveError, StorageError
from ..info import CheckpointInfo, CheckpointRef
from ..response import AsyncSaveResponse, CheckpointHandle, ResponseWriter
from .lifetime import Lifetime

After = AsyncSaveResponse | CheckpointHandle[CheckpointInfo] | None


class Outcome(TypedDict):
    """How the coordinator's removal ended. Plain data: it travels."""

    kind: str
    """The class of what all ranks raise; "" if it is gone."""
    text: str


class Removals:
    """The removals of one engine. Owns nothing."""

    def __init__(self, life: Lifetime) -> None:
        self._life = life

    def removing(self, source: CheckpointRef, after: After) -> Verb[None]:
        """``CheckpointEngine.remove``. Ranks: all must call it, in the same order."""
        life = self._life
        life.check_open()
        ref = reference(source)
        if ref == "latest":
            raise ValueError("remove() takes the name or the step of a checkpoint, not 'latest'")
        if is_path(ref):  # it may lie anywhere, and what is in use there only its own engine knows
            root, name = os.path.split(str(ref))
            raise ValueError(
                f"remove() takes the name or the step of a checkpoint in {self._root}, not the path {ref!r}; "
                f"remove {name!r} with an engine on {root!r}"
            )
        if isinstance(after, AsyncSaveResponse):
            after = after.upload_completion
        if not isinstance(after, CheckpointHandle | None):
            raise TypeError(f"after={after!r} must be what save() gave, or its upload_completion")
        # a save of this very name that is under way was asked for before, so it goes as well
        earlier = [
            writer
            for writer in life.book.pending()
            if ref in (writer.response.checkpoint_id, writer.response.step)
            and writer.response.upload_completion is not after
        ]
        ordinal = life.book.next_ordinal()
        # at once, so that an engine that closes meanwhile waits for it
        yield life.submit(self._remove(ordinal, ref, after, earlier)).join()

    async def _remove(
        self,
        ordinal: int,
        ref: str | int,
        after: CheckpointHandle[CheckpointInfo] | None,
        earlier: Sequence[ResponseWriter],
    ) -> None:
        coordinator = self._life.resources.coordinator
        uid = coordinator.uid(ordinal, "remove")
        try:
            failure = await _failure_of(ref, after)
            for writer in earlier:
                await asyncio.wrap_future(writer.upload.future)
            outcome = await coordinator.exchange(
                uid, "remove", "" if failure is None else str(failure), lambda told: self._decide(ref, told)
            )
        except RemoteFailure as error:
            # whichever rank failed, the coordinator may have removed it by then
            raise StorageError(
                f"checkpoint {ref!r} may be there still: {error}", verb="remove", path=self._root
            ) from error
        except BaseException as error:
            coordinator.fail(uid, "remove", error)
            raise
        finally:
            coordinator.forget(uid)
        if outcome["kind"]:
            # this rank's own where it has one: that has a cause and a traceback, what travelled is text
            raise failure or self._error(ref, outcome)

    async def _decide(self, ref: str | int, told: Sequence[str]) -> list[Outcome]:
        """The coordinator's side. ``told``: why the newer save failed, by rank."""
        why = next(filter(None, told), "")
        outcome = Outcome(kind="SaveError", text=why) if why else await self._remove_one(ref)
        return [outcome] * len(told)

    async def _remove_one(self, ref: str | int) -> Outcome:
        have = self._life.resources
        try:
            with self._life.storage_errors("remove"):
                await have.storage.remove(await have.catalog.removable(ref))
        except CheckpointNotFoundError as error:
            return Outcome(kind="CheckpointNotFoundError", text=str(error))
        except CheckpointError as error:
            return Outcome(kind="StorageError", text=str(error))
        return Outcome(kind="", text="")

    def _error(self, ref: str | int, outcome: Outcome) -> CheckpointError:
        text = outcome["text"]
        if outcome["kind"] == "SaveError":
            return SaveError(text, checkpoint_id=str(ref))
        if outcome["kind"] == "CheckpointNotFoundError":
            return CheckpointNotFoundError(text, checkpoint_id=str(ref))
        return StorageError(text, verb="remove", path=self._root)

    @property
    def _root(self) -> str:
        return repr(self._life.setup.storage)


async def _failure_of(ref: str | int, after: CheckpointHandle[CheckpointInfo] | None) -> SaveError | None:
    """Why the newer save failed, of the class that its own handles raise; None once it is durable. Raises
    ValueError, TypeError for what is no newer one."""
    if after is None:
        return None
    try:
        info = await after
    except SaveError as error:
        message = f"checkpoint {ref!r} was not removed, for the save that it waited for failed: {error}"
        failure = type(error)(
            message,
            checkpoint_id=error.checkpoint_id,
            step=error.step,
            phase=error.phase,
            failures=error.failures,
        )
        failure.__cause__ = error
        return failure
    if not isinstance(info, CheckpointInfo):
        raise TypeError(f"after={after!r} tells of staging; pass the response, or its upload_completion")
    if ref in (info.checkpoint_id, info.step):
        raise ValueError(f"checkpoint {ref!r} is what it would be removed after")
    return None
