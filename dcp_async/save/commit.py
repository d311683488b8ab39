"""The end of a save: each rank completes its file, then the coordinator publishes all of them at once.

Enters: what was written under a plan, on every rank. Leaves: a CommitOutcome on each, or a failure on all.
Invariant: the coordinator publishes only when it has heard of every rank's file, has found each of them as
long as it must be, and no replica that differs; and no rank commits before its ``save()`` has returned.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import anyio

from .._concurrency import collection_paused
from ..planning import CompiledPlan, Publication
from .attachments import Attachments, Told
from .directory import SaveDirectory
from .failures import in_phase
from .file_writer import FileWriter
from .public_files import Blocks, Checksums, File, as_shared, put_together
from .publishing import make_release
from .replica_check import Digest, Kind, differing
from .replica_comparison import ReplicaComparison
from .request import SaveRequest
from .services import Carryover, SaveServices


class ShareOutcome(TypedDict):
    """What a rank has written and compared. Plain data: it travels."""

    files: list[tuple[str, int, str]]
    """(name, length, digest) of what it alone writes."""
    pieces: list[str]
    """Its file of loose bytes, if it has one; no part of the checkpoint."""
    blocks: Blocks
    attached: Told
    replicas: list[Digest]


class Conclusion(TypedDict):
    """What the coordinator made of it. Plain data: it travels."""

    published: tuple[float, int, int, dict[str, int]]
    """(time, data files, their bytes, length of each attached file), unless something differs."""
    differing: list[tuple[int, Kind]]
    """Groups of replicas that are not alike."""


@dataclass(frozen=True, slots=True)
class CommitOutcome:
    """What was published."""

    time: float
    num_files: int
    nbytes: int
    attached: Mapping[str, int]
    """Name -> length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What one rank wrote."""

    plan: CompiledPlan
    file: FileWriter
    replicas: list[Digest]
    """Digests of what this rank holds as others do."""


class Commit:
    """The end of one save."""

    def __init__(
        self,
        request: SaveRequest,
        services: SaveServices,
        carryover: Carryover,
        *,
        uid: str,
        directory: SaveDirectory,
        comparison: ReplicaComparison,
        attachments: Attachments,
    ) -> None:
        self._request = request
        self._services = services
        self._carryover = carryover
        self._uid = uid
        self._directory = directory
        self._comparison = comparison
        self._attachments = attachments

    async def run(self, written: Written) -> CommitOutcome:
        """Ranks: all must call it. Cancellation: until the commit has begun, then not any more. Raises
        ConflictError, or RemoteFailure."""
        coordinator, transaction = self._services.coordinator, self._directory.transaction
        files = await written.file.complete(transaction)
        if written.plan.layout.public:
            with in_phase("write"):
                await self._complete_public(written)
        # not before the caller has its state back: a save() that raises must leave no checkpoint
        await asyncio.shield(asyncio.wrap_future(self._request.has_returned))
        lengths = written.file.lengths | self._attachments.lengths
        if lengths and not coordinator.is_coordinator:  # it looks at all of them
            await transaction.verify(lengths)
        # the files are the coordinator's now: if this process dies they may be published all the same
        transaction.hand_over()
        if not coordinator.is_coordinator:
            # the coordinator may publish as soon as it hears from this rank
            self._request.cancellation.close()
        # a rank without a file sends one, too: the commit is of all ranks or of none
        message = ShareOutcome(
            files=[file[:3] for file in files],
            pieces=written.file.pieces,
            blocks=written.file.checksums.blocks(),
            attached=self._attachments.written,
            replicas=written.replicas,
        )

        async def conclude(outcomes: Sequence[ShareOutcome]) -> list[Conclusion]:
            return [await self._conclude(written.plan, outcomes)] * len(outcomes)

        conclusion = await coordinator.exchange(self._uid, "commit", message, conclude)
        if conclusion["differing"]:  # a second exchange, since names of tensors travel only where they differ
            await self._comparison.explain(conclusion["differing"])
        self._comparison.matched()
        return CommitOutcome(*conclusion["published"])

    async def _complete_public(self, written: Written) -> None:
        """Put together what several ranks hold of public files, and sync what this rank wrote of them."""
        services, transaction, merge = self._services, self._directory.transaction, written.plan.merge
        if merge is not None:
            # none is read before all ranks have synced theirs
            await services.coordinator.exchange(self._uid, "pieces", None, _go_on)
            await put_together(
                merge,
                written.file.checksums,
                as_shared(transaction),
                uid=self._uid,
                threads=services.threads,
                io_concurrency=services.io_concurrency,
                patience=services.timeout,
            )
        for name in self._directory.names.public_lengths(written.plan.layout):
            await transaction.seal(name)

    # The coordinator's side.

    async def _conclude(self, plan: CompiledPlan, outcomes: Sequence[ShareOutcome]) -> Conclusion:
        """Publish, unless ranks hold other bytes under one name."""
        unlike = differing([outcome["replicas"] for outcome in outcomes])
        if unlike:
            return Conclusion(published=(0.0, 0, 0, {}), differing=unlike)
        published = await self._publish(plan, outcomes, await self._files(plan, outcomes))
        return Conclusion(published=published, differing=[])

    async def _files(self, plan: CompiledPlan, outcomes: Sequence[ShareOutcome]) -> list[File]:
        """All data files; those that all ranks have written get their checksums."""
        files = [File(*file) for outcome in outcomes for file in outcome["files"]]
        if plan.layout.public:
            transaction = self._directory.transaction
            if pieces := [name for outcome in outcomes for name in outcome["pieces"]]:
                await as_shared(transaction).drop(pieces)
            checksums = Checksums.together(plan.layout, [outcome["blocks"] for outcome in outcomes])
            files += await checksums.write(plan.layout, self._uid, transaction)
        return files

    async def _publish(
        self, plan: CompiledPlan, outcomes: Sequence[ShareOutcome], files: Sequence[File]
    ) -> tuple[float, int, int, dict[str, int]]:
        request, response = self._request, self._request.response
        coordinator, transaction = self._services.coordinator, self._directory.transaction
        publication = await self._publication(plan)
        release = make_release(
            publication,
            files,
            {name: told for outcome in outcomes for name, told in outcome["attached"].items()},
            checkpoint_id=response.checkpoint_id,
            uid=self._uid,
            world_size=len(outcomes),
            step=response.step,
            notes=request.notes,
        )
        # the last moment at which a cancellation undoes everything
        await anyio.lowlevel.checkpoint_if_cancelled()
        await transaction.verify(release.sizes)
        # a coordinator that stood still may have been given up: then the others have failed already
        coordinator.check_steady("commit")
        request.cancellation.close()
        with anyio.CancelScope(shield=True):
            await release.publish(transaction, replace=request.replace)
        return release.time, release.num_files, release.nbytes, release.attached

    async def _publication(self, plan: CompiledPlan) -> Publication:
        """What is published, made by the first save of a plan; others that are in flight wait for it."""
        # in a thread: tens of thousands of tensors take a second, and the loop serves other saves
        async with self._carryover.publishing:
            return await self._services.threads.run(_published, plan)


async def _go_on(messages: Sequence[None]) -> list[None]:
    return list(messages)


def _published(plan: CompiledPlan) -> Publication:
    with collection_paused():  # to prove it makes as many objects as it has tensors
        assert plan.shared is not None
        return plan.shared.publication(plan.format)
