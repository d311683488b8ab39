"""All of a save but what leaves a trace: plan, memory, views. Nothing is asked of the storage.

Enters: a captured state. Leaves: the plan for the saves to come, and a stager that has staged it once.
Invariant: the trainer gets its tensors back when this ends, however it ends, and so do saves their slots.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Mapping

from .._concurrency import run_unless
from ..coordination import RemoteError
from ..planning import CompiledPlan
from ..staging import Prepared, StageJob, num_parts
from .failures import Preparing, in_phase, tell_others
from .plan_agreement import PlanAgreement
from .replica_comparison import ReplicaComparison
from .services import Carryover, SaveServices


class Preparation:
    """One call of ``prepare``.

    Attributes:
        verdict: if it failed, what each rank failed at; empty where nobody else was asked.
    """

    def __init__(
        self,
        prepared: Prepared,
        plan: CompiledPlan | None,
        services: SaveServices,
        carryover: Carryover,
        *,
        uid: str,
    ) -> None:
        """``plan``: the one that the structure belongs to, None if that is new. ``uid``: its id, the same on
        all ranks."""
        self.verdict: Mapping[int, RemoteError] = {}
        self._prepared = prepared
        self._made: Prepared | None = None
        """What a planner of the user's made of the state."""
        self._plan = plan
        self._services = services
        self._carryover = carryover
        self._uid = uid

    async def run(self) -> None:
        """Agree on a plan, stage under it. Ranks: all must call it. Raises: PhaseFailure."""
        coordinator = self._services.coordinator
        failed = functools.partial(coordinator.failed, self._uid)
        try:
            await run_unless(failed, self._run)
        except BaseException as error:
            tell_others(coordinator, self._uid, error)
            # who is cancelled leaves at once; to settle is to wait for the other ranks
            if not isinstance(error, asyncio.CancelledError):
                self.verdict, _ = await coordinator.settle(self._uid)
            raise
        finally:
            self._prepared.release()
            if self._made is not None:
                self._made.release()

    async def _run(self) -> None:
        with in_phase("plan"):
            plan = await self._agreed_plan()
        with in_phase("stage"):
            await self._stage(plan)

    async def _agreed_plan(self) -> CompiledPlan:
        services = self._services
        comparison = ReplicaComparison(
            self._carryover.replicas,
            uid=self._uid,
            stager=services.stager,
            coordinator=services.coordinator,
            threads=services.threads,
            timeout=services.timeout,
        )
        try:
            ranks = PlanAgreement(
                self._prepared,
                self._plan,
                checkpoint_id=Preparing.checkpoint_id,
                uid=self._uid,
                coordinator=services.coordinator,
                threads=services.threads,
                options=services.planning,
                format=services.format,
                lead=_nowhere,
                comparison=comparison,
            )
            known = ranks.plan
            if await ranks.is_agreed() and known is not None:
                return known
            plan = await ranks.compile()
            if ranks.captured is self._prepared.captured:
                self._carryover.latest = plan, ranks.captured.known
            else:
                self._made = Prepared.of_made(ranks.captured)
            return plan
        finally:
            comparison.close()  # the turn that it was dealt goes back: nothing is compared

    async def _stage(self, plan: CompiledPlan) -> None:
        services, prepared = self._services, self._made or self._prepared
        share = prepared.share(plan.tensors, plan.leaves)
        pool = services.stager.pool
        pool.reserve(services, num_parts(plan.layout.image_bytes, pool.slot_bytes) * services.pending_saves)
        try:
            await services.stager.rehearse(StageJob(plan=plan, prepared=share), patience=services.timeout)
        finally:
            share.release()


async def _nowhere(plan: CompiledPlan) -> None:
    """No directory is made ready: nobody will write."""
