"""The steps of a save by stock DCP that are about planning: each save plans as if it were the first."""

from __future__ import annotations

import dataclasses
import gc
import pickle
from collections.abc import Sequence
from typing import Any

from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from .clock import Clock, Times
from .simulated_ranks import Ranks, pretending, stock_plan


def run_stock(ranks: Ranks) -> tuple[Times, dict[str, int]]:
    """Seconds of the steps of any save, and bytes."""
    clock = Clock(ranks.world_size)
    plans = _local_plans(ranks, clock)
    answers, metadata = _global_plan(ranks, clock, plans)
    results = _write_results(clock, answers)
    gc.collect()
    with clock.span("commit: loads"):
        written: list[list[WriteResult]] = [pickle.loads(raw) for raw in results]
    with clock.span("commit: publication"):
        published = _publish(metadata, written)
    nbytes = {
        "plans": sum(map(len, plans)),
        "answers": sum(map(len, answers)),
        "results": sum(map(len, results)),
        ".metadata": len(published),
    }
    return clock.times(), nbytes


def _local_plans(ranks: Ranks, clock: Clock) -> list[bytes]:
    for rank in (0, ranks.world_size - 1):
        with pretending(ranks.world_size, rank), clock.rank(rank, "plan"):
            stock_plan(ranks.states[rank], is_coordinator=rank == 0)
    sent = []
    for rank in range(ranks.world_size):
        local = ranks.plan_of(rank)
        with clock.rank(rank, "dumps"):
            sent.append(pickle.dumps(local))
    return sent


def _global_plan(ranks: Ranks, clock: Clock, sent: Sequence[bytes]) -> tuple[list[bytes], Metadata]:
    planner = DefaultSavePlanner()
    planner.set_up_planner(ranks.states[0], None, is_coordinator=True)
    gc.collect()
    with clock.span("loads"):
        plans: list[SavePlan] = [pickle.loads(raw) for raw in sent]
    with clock.span("global plan"):
        final, metadata = planner.create_global_plan(plans)
    with clock.span("dumps"):
        answers = [pickle.dumps(plan) for plan in final]
    return answers, metadata


def _write_results(clock: Clock, answers: Sequence[bytes]) -> list[bytes]:
    results = []
    for rank, raw in enumerate(answers):
        with clock.rank(rank, "loads"):
            plan: SavePlan = pickle.loads(raw)
        stored = _StorageInfo(f"__{rank}_0.distcp", 1 << 20, 1 << 20)
        results.append(pickle.dumps([WriteResult(item.index, 1 << 20, stored) for item in plan.items]))
    return results


def _publish(metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> bytes:
    # What FileSystemWriter.finish() does, but for writing it.
    metadata = dataclasses.replace(metadata, version="1.0.0")
    storage_data: dict[MetadataIndex, Any] = {}
    for written in results:
        storage_data.update({result.index: result.storage_data for result in written})
    metadata.storage_data = storage_data
    return pickle.dumps(metadata)
