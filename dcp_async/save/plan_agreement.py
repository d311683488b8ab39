"""How the ranks of one save come to plans that belong together.

Enters: what this rank captured, the plan that it has. Leaves: whether all ranks can go on with theirs, or a
new plan on each; and which turn of the plan's replicas it compares, alike on all. Invariant: no rank is told
to go on before the coordinator's transaction holds the directory, and a leaf that all ranks share is equal on
each.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, TypedDict

from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlanner

from .._concurrency import BlockingThreads
from .._foreign import PlannerError
from ..coordination import Coordinator
from ..formats import Format
from ..planning import (
    CompiledPlan,
    Description,
    Digest,
    Draft,
    GlobalPlan,
    ItemLocations,
    Merge,
    PlanningOptions,
    SaveProtocol,
    Turn,
    compile_plan,
    conflicts,
    descriptions,
    differing_leaves,
    draft_plan,
    explained,
    group_hashes,
    shared_hashes,
    value_digests,
)
from ..staging import Prepared
from .attachments import Attachments, deal
from .replica_comparison import ReplicaComparison

Verdict = Literal["reuse", "replan", "compare"]


class Ruling(TypedDict):
    """What the coordinator answers each rank. Plain data: it travels."""

    verdict: Verdict
    turn: Turn | None
    """None if they have to plan anew."""
    files: list[str]
    """What the rank writes of the files that are attached."""


def judge(plan: CompiledPlan | None, messages: Sequence[dict[str, Any]]) -> Verdict:
    """The coordinator's verdict, given its own plan and all ranks' messages: whether they can go on, or have
    to plan anew, or to look for the shared leaf that differs."""
    # together or not at all: where one rank's items lie stands in the .metadata that all ranks share
    if plan is None or any(message["generation"] != plan.generation for message in messages):
        return "replan"
    seen: dict[int, str] = {}
    for message in messages:
        for group, digest in zip(message["groups"], message["shared"], strict=True):
            if seen.setdefault(group, digest) != digest:
                return "compare"
    return "reuse"


class PlanAgreement:
    """One save's way to a plan. ``prepared`` must hold the whole state until the last call.

    Attributes:
        captured: what the plan is of: what was captured, or what a planner of the user's made of that.
    """

    def __init__(
        self,
        prepared: Prepared,
        plan: CompiledPlan | None,
        *,
        checkpoint_id: str,
        uid: str,
        coordinator: Coordinator,
        threads: BlockingThreads,
        options: PlanningOptions,
        format: Format,
        lead: Callable[[CompiledPlan], Awaitable[None]],
        comparison: ReplicaComparison,
        attachments: Attachments | None = None,
    ) -> None:
        """``plan`` is what this rank has for the structure of ``prepared``, None if a planner of the user's
        decides, which is told that ``checkpoint_id`` is saved; ``lead``, called on the coordinator of several
        ranks, makes the directory ready for them to write; ``comparison`` is told its turn as soon as they
        have a plan, ``attachments`` which of them this rank writes."""
        captured = self.captured = prepared.captured
        self._prepared = prepared
        self._checkpoint_id = checkpoint_id
        # kept even if a leaf outgrew its room: the next plan gives no other leaf less than this one does
        self._previous = plan
        self._plan = plan if plan is not None and plan.has_room_for(captured) else None
        self._uid = uid
        self._coordinator = coordinator
        self._threads = threads
        self._options = options
        self._format = format
        self._lead = lead
        self._comparison = comparison
        self._attachments = attachments

    @property
    def plan(self) -> CompiledPlan | None:
        """What this rank could go on with; None if it has no plan, or a leaf outgrew its room."""
        return self._plan

    async def is_agreed(self) -> bool:
        """Whether every rank can go on with the plan that it has. Ranks: all must call it, whether they have
        one or not. Raises: as ``Coordinator.exchange``; ValueError for a shared leaf that differs."""
        plan = self._plan
        hashes: list[int] = []
        # sent without a plan as well: the coordinator waits for a word of every rank
        message: dict[str, Any] = {"generation": None, "groups": [], "shared": []}
        if plan is not None:
            if plan.groups:  # in a thread, since leaves may be large
                hashes = await self._threads.run(shared_hashes, self.captured, plan.canonical)
            message = {
                "generation": plan.generation,
                "groups": [group for group, _ in plan.groups],
                "shared": group_hashes(hashes, [leaves for _, leaves in plan.groups]),
            }
        if self._prepared.planner is not None:
            message["planner"] = type(self._prepared.planner).__qualname__
        if self._attachments is not None and (files := self._attachments.told):
            message["files"] = files
        ruling = await self._coordinator.exchange(self._uid, "verdict", message, self._judge)
        self._take_files(ruling["files"])
        if ruling["verdict"] == "compare" and plan is not None:
            # bytes differ where values need not: sets and dicts pickle in an order of each process's own
            named = dict(zip(plan.structure.leaf_names, hashes, strict=True))
            shared = {plan.structure.leaf_names[index] for _, leaves in plan.groups for index in leaves}
            mine = {name: value for name, value in named.items() if name in shared}
            suspects = await self._coordinator.exchange(self._uid, "leaves", mine, _find_suspects)
            await self._compare_values(suspects, plan)
            self._learn(plan, suspects)
        if ruling["turn"] is None:
            return False
        self._comparison.begin(ruling["turn"])
        return True

    def _take_files(self, share: Sequence[str]) -> None:
        if self._attachments is not None:
            self._attachments.take(share)

    def _learn(self, plan: CompiledPlan, names: Sequence[str]) -> None:
        """These leaves are equal, and pickled otherwise on each rank."""
        # from now on their values are hashed, so that the next save takes one exchange again
        index_of = {name: index for index, name in enumerate(plan.structure.leaf_names)}
        plan.canonical.update({index_of[name]: (0, 0) for name in names if name in index_of})

    async def _compare_values(self, names: Sequence[str], agreed: CompiledPlan | None = None) -> None:
        """Whether leaves whose bytes differ are equal all the same. ``agreed`` is the plan to go on with if
        they are. Raises ConflictError, or RemoteFailure."""
        run = self._threads.run
        mine = await run(value_digests, self.captured, names)

        async def compare(digests: Sequence[dict[str, Digest]]) -> list[list[str]]:
            unequal = conflicts(digests)
            # no rank may write before the directory is leased, and this answer lets them
            if not unequal and agreed is not None and self._plan is not None:
                await self._go_ahead(self._plan)
            return [unequal] * len(digests)

        unequal = await self._coordinator.exchange(self._uid, "values", mine, compare)
        if unequal:

            async def explain(told: Sequence[dict[str, Description]]) -> list[None]:
                raise explained(told, unequal)

            described = await run(descriptions, self.captured, unequal)
            await self._coordinator.exchange(self._uid, "differences", described, explain)

    async def _judge(self, messages: Sequence[dict[str, Any]]) -> list[Ruling]:
        # before anything of theirs is looked at: what they send from here on differs
        planners = [message.get("planner", "") for message in messages]
        for rank, planner in enumerate(planners):
            if planner != planners[0]:
                raise PlannerError(
                    f"rank 0 plans with {planners[0] or 'the default planner'} and rank {rank} with "
                    f"{planner or 'the default planner'}; PlanningOptions(save=...) gives the same everywhere"
                )
        shares = deal([message.get("files", {}) for message in messages])
        # before it hears its own ruling: the directory is made ready for its files as well
        self._take_files(shares[self._coordinator.rank])
        plan, turn = self._plan, None
        verdict = judge(plan, messages)
        if plan is not None and verdict != "replan":
            if verdict == "reuse":
                await self._go_ahead(plan)
            turn = self._comparison.deal(plan)
        return [Ruling(verdict=verdict, turn=turn, files=share) for share in shares]

    async def _go_ahead(self, plan: CompiledPlan) -> None:
        if self._coordinator.world_size > 1:  # alone, it opens the directory beside staging
            await self._lead(plan)

    async def compile(self) -> CompiledPlan:
        """A new plan. Ranks: all must call it. Planning takes a while for tens of thousands of tensors, so it
        runs in a thread."""
        coordinator, run = self._coordinator, self._threads.run
        shared: GlobalPlan | None = None
        draft = await self._draft()

        async def merge(messages: Sequence[Any]) -> list[Any]:
            nonlocal shared
            suspects: list[str] = []
            answers, shared = await run(draft.merge, messages, suspects)
            assert shared is not None
            public = await run(shared.public_shares, self._format)
            # all ranks are told, also those that hold none of them: comparing takes an exchange of all
            return [(answer, suspects, share) for answer, share in zip(answers, public, strict=True)]

        async def locate(by_rank: Sequence[ItemLocations]) -> list[tuple[Turn, Merge | None]]:
            assert shared is not None
            for rank, theirs in enumerate(by_rank):  # a hop for each: a cancellation may come between two
                await run(shared.locate, rank, theirs)
            merges = await run(shared.merges)
            await self._go_ahead(plan)
            turn = self._comparison.deal(plan)
            return [(turn, mine) for mine in merges]

        answer, suspects, public = await coordinator.exchange(self._uid, "plan", draft.message, merge)
        if suspects:
            await self._compare_values(suspects)
        plan, locations = await run(
            compile_plan,
            self.captured,
            draft.local_plan,
            draft.assigned(answer),
            self._uid,
            shared,
            previous=self._previous,
            is_exact=self._prepared.planner is not None,
            format=self._format,
            public=public,
        )
        self._learn(plan, suspects)
        turn, mine = await coordinator.exchange(self._uid, "place", locations, locate)
        self._comparison.begin(turn)
        return plan if mine is None else replace(plan, merge=mine)

    async def _draft(self) -> Draft:
        if self._prepared.planner is not None:
            return await self._resolved(self._prepared.planner)
        draft: Draft = await self._threads.run(
            draft_plan,
            self.captured,
            self._previous,
            self._options,
            is_coordinator=self._coordinator.is_coordinator,
        )
        return draft

    async def _resolved(self, planner: SavePlanner) -> Draft:
        """What ``planner`` makes of the state, by DCP's protocol. Raises PlannerError on every rank."""
        coordinator, run = self._coordinator, self._threads.run
        await run(self._prepared.await_capture)
        protocol = SaveProtocol(
            planner,
            self.captured,
            is_coordinator=coordinator.is_coordinator,
            storage_meta=StorageMeta(checkpoint_id=self._checkpoint_id, save_id=self._uid),
        )

        async def merge(messages: Sequence[bytes]) -> list[bytes]:
            return await run(protocol.global_plans, messages)

        plan = await run(protocol.local_plan)
        answer = await coordinator.exchange(self._uid, "planner", plan, merge)
        draft = await run(protocol.resolve, answer)
        self.captured = draft.captured
        return draft


async def _find_suspects(hashes: Sequence[dict[str, int]]) -> list[list[str]]:
    return [differing_leaves(hashes)] * len(hashes)
