"""The steps of a save of dcp_async that are about planning: the first save of a structure, and a later one.

In: simulated ranks. Out: seconds of CPU by step, and bytes.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch

from dcp_async.formats import FileEntry, encode_manifest
from dcp_async.planning import (
    CompiledPlan,
    DefaultDraft,
    GlobalPlan,
    compile_plan,
    group_hashes,
    make_local_plan,
)

# Steps that no other folder calls by itself, timed one by one here: from the modules that hold them.
from dcp_async.planning.local_plan import LocalPlan, leaf_hashes
from dcp_async.save.plan_agreement import judge
from dcp_async.trust import dumps, loads

from .clock import Clock, Times
from .simulated_ranks import Ranks

UID = "0123456789abcdef"


def run_ours(ranks: Ranks) -> tuple[Times, Times, dict[str, int]]:
    """Seconds of the steps of the first save, those of a later one, and bytes."""
    entries = [dumps((f"__{rank}_0-{UID}.distcp", 1 << 30, UID)) for rank in range(ranks.world_size)]
    first, later = Clock(ranks.world_size), Clock(ranks.world_size)
    plan, shared, nbytes = _first_save(ranks, first, entries)
    gc.collect()
    nbytes |= _later_save(ranks, later, plan)
    _commit(later, shared, entries)
    return first.times(), later.times(), nbytes


def _first_save(
    ranks: Ranks, clock: Clock, entries: Sequence[bytes]
) -> tuple[CompiledPlan, GlobalPlan, dict[str, int]]:
    sent = []
    for rank in range(ranks.world_size):
        captured = ranks.capture_of(rank)
        with clock.rank(rank, "plan"):
            local_plan = make_local_plan(captured, None)
        with clock.rank(rank, "dumps"):
            sent.append(dumps(local_plan))
    gc.collect()
    answers, shared = _merge(clock, sent)
    plan, told = _lay_out(ranks, clock, local_plan=loads(sent[0]), answers=answers, shared=shared)
    gc.collect()
    with clock.span("loads places"):
        placed = [loads(raw) for raw in told]
    with clock.span("place"):
        for rank, locations in enumerate(placed):
            shared.locate(rank, locations)
    with clock.span("commit: publication"):
        shared.publication()
    _commit(clock, shared, entries)
    publication = shared.publication()
    return (
        plan,
        shared,
        {
            "offers": sum(map(len, sent)),
            "answers": sum(map(len, answers)),
            "placements": sum(map(len, told)),
            ".metadata": len(publication.metadata.render(UID)),
            "manifest": len(publication.manifest_json),
        },
    )


def _merge(clock: Clock, sent: Sequence[bytes]) -> tuple[list[bytes], GlobalPlan]:
    with clock.span("loads"):
        local_plans: list[LocalPlan] = [loads(raw) for raw in sent]
    with clock.span("global plan"):
        answers, shared = DefaultDraft(local_plans[0]).merge(local_plans)
    with clock.span("dumps"):
        return [dumps(answer) for answer in answers], shared


def _lay_out(
    ranks: Ranks, clock: Clock, *, local_plan: LocalPlan, answers: Sequence[bytes], shared: GlobalPlan
) -> tuple[CompiledPlan, list[bytes]]:
    # All ranks compile with rank 0's local plan: it has what they need, and making each anew is not timed.
    plan: CompiledPlan | None = None
    told = []
    for rank, raw in enumerate(answers):
        captured = ranks.capture_of(rank)
        with clock.rank(rank, "loads"):
            answer = loads(raw)
        with clock.rank(rank, "layout"):
            compiled, locations = compile_plan(
                captured, local_plan, answer, UID, shared if rank == 0 else None
            )
        with clock.rank(rank, "dumps place"):
            told.append(dumps(locations))
        plan = plan or compiled
    assert plan is not None
    return plan, told


def _later_save(ranks: Ranks, clock: Clock, plan: CompiledPlan) -> dict[str, int]:
    captured = ranks.captured[0]
    verdicts = []
    for rank in range(ranks.world_size):
        with clock.rank(rank, "digest"):
            hashes = leaf_hashes(captured)
            groups = [leaves for _, leaves in plan.groups]
            message = {
                "generation": plan.generation,
                "groups": [group for group, _ in plan.groups],
                "shared": group_hashes(hashes, groups),
            }
        with clock.rank(rank, "dumps"):
            verdicts.append(dumps(message))
    gc.collect()
    with clock.span("loads"):
        messages = [loads(raw) for raw in verdicts]
    with clock.span("verdict"):
        judged = [judge(plan, messages)] * len(messages)
    assert judged == ["reuse"] * ranks.world_size
    with clock.span("dumps"):
        replies = [dumps(verdict) for verdict in judged]
    with clock.rank(0, "loads"):
        loads(replies[0])
    return {"verdict up": sum(map(len, verdicts)), "verdict down": sum(map(len, replies))}


def _commit(clock: Clock, shared: GlobalPlan, entries: Sequence[bytes]) -> None:
    # What the coordinator publishes on every save, all but writing it.
    with clock.span("commit: loads"):
        files = [loads(raw) for raw in entries]
    with clock.span("commit: render"):
        publication = shared.publication()
        metadata = publication.metadata.render(UID)
        encode_manifest(
            checkpoint_id="step-00000100",
            uid=UID,
            step=100,
            time=0.0,
            world_size=len(entries),
            torch_version=torch.__version__,
            metadata=metadata,
            files=tuple(FileEntry(name=name, nbytes=nbytes, digest=digest) for name, nbytes, digest in files),
            notes={},
            constant=publication.manifest_json,
        )
