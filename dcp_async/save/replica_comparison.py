"""One save's comparison of what its ranks hold alike, from the turn that it is dealt to what is said of a
difference.

Enters: the coordinator's turn, the prepared state. Leaves: digests for the message of the commit, or the
names of the tensors that differ. Invariant: nothing is read before the turn is known, which makes all ranks
read the same; and a turn that no committed save has compared goes back to its rotation.
"""

from __future__ import annotations

from collections.abc import Sequence

import anyio

from .._concurrency import BlockingThreads
from ..coordination import Coordinator
from ..planning import CompiledPlan, Rotation, Turn
from ..staging import Prepared, Stager
from .replica_check import Details, Digest, Kind, ReplicaCheck, Sample, explain


class ReplicaComparison:
    """One save's comparison. Holds a sample of the state from ``read`` to ``close``."""

    def __init__(
        self,
        replicas: ReplicaCheck,
        *,
        uid: str,
        stager: Stager,
        coordinator: Coordinator,
        threads: BlockingThreads,
        timeout: float,
    ) -> None:
        """``timeout``: seconds that reading may take."""
        self._replicas = replicas
        self._uid = uid
        self._stager = stager
        self._coordinator = coordinator
        self._threads = threads
        self._timeout = timeout
        self._turn: Turn
        self._is_known = anyio.Event()
        """What the turn is."""
        self._dealt: tuple[Rotation, Turn] | None = None
        """The turn as long as it was not compared; the coordinator's alone."""
        self._sample: Sample | None = None

    def deal(self, plan: CompiledPlan) -> Turn:
        """A turn for all ranks, on the coordinator."""
        turn = plan.rotation.deal()
        self._dealt = plan.rotation, turn
        return turn

    def begin(self, turn: Turn) -> None:
        """The coordinator has told this save's turn."""
        self._turn = turn
        self._is_known.set()

    async def read(self, plan: CompiledPlan, prepared: Prepared) -> None:
        """Read the replicas once the turn is known, while the state is held still. Raises: MutatedTensors."""
        self._drop()  # of a plan that did not hold
        if plan.replicas:
            await self._is_known.wait()
            # the stager's thread: no second one competes with the trainer for cores
            self._sample = await self._stager.run(
                self._timeout, self._replicas.take, plan, prepared, self._turn
            )

    async def digests(self) -> list[Digest]:
        """What this rank holds as others do; takes CPU."""
        # not in the stager's thread, which the next save may be waiting for
        return await self._threads.run(self._sample.digests) if self._sample is not None else []

    async def explain(self, groups: list[tuple[int, Kind]]) -> None:
        """Find out which tensors of ``groups`` differ. Ranks: all must call it. Raises ConflictError, or
        RemoteFailure."""

        async def decide(details: Sequence[Details]) -> list[None]:
            raise explain(details)

        details: Details = []
        if self._sample is not None:
            details = await self._threads.run(self._sample.details, groups)
        await self._coordinator.exchange(self._uid, "replicas", details, decide)

    def matched(self) -> None:
        """The save was committed."""
        if self._dealt is not None:
            rotation, _ = self._dealt
            # only now: what was compared in a save that is not committed proves nothing to later ones
            rotation.matched()
            self._dealt = None

    def _drop(self) -> None:
        if self._sample is not None:
            self._sample.release()
            self._sample = None

    def close(self) -> None:
        """Drop the sample; a turn that no commit has compared goes back, however the save ended."""
        self._drop()
        if self._dealt is not None:
            # what it read was compared by nobody, so a later save has to
            rotation, turn = self._dealt
            rotation.missed(turn)
            self._dealt = None
