"""The steps of a save that are about planning, ours and stock's, timed one by one.

Enters: simulated Ranks. Leaves: seconds of CPU by step, and bytes. Each step runs once per rank, or once on
the coordinator over what all ranks sent. Nothing travels and nothing is written: serialisation is in.
"""

from __future__ import annotations

import dataclasses
import gc
import pickle
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from dcp_async.formats.manifest import FileEntry, encode_manifest
from dcp_async.planning.global_plan import GlobalPlan
from dcp_async.planning.local_plan import Offer, group_hashes, leaf_hashes, make_offer
from dcp_async.planning.planner import CompiledPlan, DefaultDraft, compile_plan
from dcp_async.save.plan_agreement import judge
from dcp_async.trust.plain_data import dumps, loads

from .simulated_ranks import Ranks, pretending, stock_plan

UID = "0123456789abcdef"
MAX_SAMPLES = 64
"""Ranks on which the steps of a single rank are timed; the others do the same."""

Times = dict[str, float]


class Clock:
    """Adds up seconds of CPU by step, since what else runs on the machine counts little there; of a step of
    each rank, the median is kept."""

    def __init__(self) -> None:
        self._spans: dict[str, list[float]] = {}

    @contextmanager
    def span(self, step: str) -> Iterator[None]:
        start = time.thread_time()
        yield
        self._spans.setdefault(step, []).append(time.thread_time() - start)

    def times(self) -> Times:
        """Steps of ranks are named "rank: ...", and happen beside each other; all others add up."""
        return {
            step: statistics.median(spans) if step.startswith("rank:") else sum(spans)
            for step, spans in self._spans.items()
        }


def metered(ranks: range) -> set[int]:
    """The ranks whose own steps are timed."""
    step = max(1, len(ranks) // MAX_SAMPLES)
    return set(ranks[::step])


def run_ours(ranks: Ranks) -> tuple[Times, Times, dict[str, int]]:
    """(first save, a later one, bytes) of dcp_async."""
    world = range(ranks.world_size)
    timed = metered(world)
    clock, ignored = Clock(), Clock()

    def on(rank: int, step: str) -> Any:
        return (clock if rank in timed else ignored).span(f"rank: {step}")

    sent: list[bytes] = []
    for rank in world:
        captured = ranks.capture_of(rank)
        with on(rank, "plan"):
            offer = make_offer(captured, None)
        with on(rank, "dumps"):
            sent.append(dumps(offer))
    gc.collect()
    with clock.span("loads"):
        offers: list[Offer] = [loads(raw) for raw in sent]
    with clock.span("global plan"):
        answers, shared = DefaultDraft(offers[0]).merge(offers)
    with clock.span("dumps"):
        told = [dumps(answer) for answer in answers]
    own = (offers[0], answers[0])
    del offers, answers
    placements: list[bytes] = []
    plan: CompiledPlan | None = None
    for rank in world:
        structure = ranks.capture_of(rank).structure
        with on(rank, "loads"):
            mine = loads(told[rank])
        with on(rank, "layout"):
            compiled, placement = compile_plan(structure, own[0], mine, UID, shared if rank == 0 else None)
        with on(rank, "dumps place"):
            placements.append(dumps(placement))
        plan = plan or compiled
    assert plan is not None
    gc.collect()
    with clock.span("loads places"):
        placed = [loads(raw) for raw in placements]
    with clock.span("place"):
        for rank, each in enumerate(placed):
            shared.place(rank, each)
    with clock.span("commit: publication"):
        shared.publication()
    entries = [dumps((f"__{rank}_0-{UID}.distcp", 1 << 30, UID)) for rank in world]
    commit(clock, shared, entries)
    first = clock.times()
    nbytes = {
        "offers": sum(map(len, sent)),
        "answers": sum(map(len, told)),
        "placements": sum(map(len, placements)),
        ".metadata": len(shared.publication().metadata.render(UID)),
        "manifest": len(shared.publication().manifest_json),
    }
    del sent, told, placements, placed
    gc.collect()

    clock = Clock()
    captured = ranks.captured[0]
    verdicts: list[bytes] = []
    for rank in world:
        with on(rank, "digest"):
            hashes = leaf_hashes(captured)
            groups = [leaves for _, leaves in plan.groups]
            message = {
                "generation": plan.generation,
                "groups": [group for group, _ in plan.groups],
                "shared": group_hashes(hashes, groups),
            }
        with on(rank, "dumps"):
            verdicts.append(dumps(message))
    gc.collect()
    with clock.span("loads"):
        messages = [loads(raw) for raw in verdicts]
    with clock.span("verdict"):
        judged = [judge(plan, messages)] * len(messages)
    assert judged == ["reuse"] * ranks.world_size
    with clock.span("dumps"):
        reply = [dumps(answer) for answer in judged]
    with on(0, "loads"):
        loads(reply[0])
    commit(clock, shared, entries)
    nbytes |= {"verdict up": sum(map(len, verdicts)), "verdict down": sum(map(len, reply))}
    return first, clock.times(), nbytes


def commit(clock: Clock, shared: GlobalPlan, entries: Sequence[bytes]) -> None:
    """What the coordinator publishes on every save, all but writing it."""
    with clock.span("commit: loads"):
        told = [loads(raw) for raw in entries]
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
            files=tuple(FileEntry(name=name, nbytes=size, digest=digest) for name, size, digest in told),
            notes={},
            constant=publication.manifest_json,
        )


def run_stock(ranks: Ranks) -> tuple[Times, dict[str, int]]:
    """Any save of stock's, which plans each as if it were the first."""
    world = range(ranks.world_size)
    timed = metered(world)
    clock, ignored = Clock(), Clock()

    def on(rank: int, step: str) -> Any:
        return (clock if rank in timed else ignored).span(f"rank: {step}")

    for rank in (0, ranks.world_size - 1):
        with pretending(ranks.world_size, rank), on(rank, "plan"):
            stock_plan(ranks.states[rank], is_coordinator=rank == 0)
    sent: list[bytes] = []
    for rank in world:
        local = ranks.plan_of(rank)
        with on(rank, "dumps"):
            sent.append(pickle.dumps(local))
    planner = DefaultSavePlanner()
    planner.set_up_planner(ranks.states[0], None, is_coordinator=True)
    gc.collect()
    with clock.span("loads"):
        plans: list[SavePlan] = [pickle.loads(raw) for raw in sent]
    with clock.span("global plan"):
        final, metadata = planner.create_global_plan(plans)
    with clock.span("dumps"):
        told = [pickle.dumps(plan) for plan in final]
    del plans, final, planner
    results: list[bytes] = []
    for rank in world:
        with on(rank, "loads"):
            mine: SavePlan = pickle.loads(told[rank])
        name = f"__{rank}_0.distcp"
        results.append(
            pickle.dumps(
                [
                    WriteResult(item.index, 1 << 20, _StorageInfo(name, 1 << 20, 1 << 20))
                    for item in mine.items
                ]
            )
        )
    gc.collect()
    with clock.span("commit: loads"):
        written: list[list[WriteResult]] = [pickle.loads(raw) for raw in results]
    with clock.span("commit: publication"):
        raw = publish_stock(metadata, written)
    nbytes = {
        "plans": sum(map(len, sent)),
        "answers": sum(map(len, told)),
        "results": sum(map(len, results)),
        ".metadata": len(raw),
    }
    return clock.times(), nbytes


def publish_stock(metadata: Metadata, results: Sequence[Sequence[WriteResult]]) -> bytes:
    """As FileSystemWriter.finish() does, but for writing it."""
    metadata = dataclasses.replace(metadata, version="1.0.0")
    storage_data: dict[MetadataIndex, Any] = {}
    for written in results:
        storage_data.update({each.index: each.storage_data for each in written})
    metadata.storage_data = storage_data
    return pickle.dumps(metadata)


def store_seconds() -> Times:
    """One call to a TCPStore on this machine, by wall clock: what a message is made of."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
    mebibyte = bytes(1 << 20)
    spans: dict[str, list[float]] = {"set": [], "get": [], "delete": [], "add": [], "set 1 MiB": []}

    def take(call: str, fn: Callable[..., object], *args: object) -> None:
        start = time.perf_counter()
        fn(*args)
        spans[call].append(time.perf_counter() - start)

    for number in range(1000):
        take("set", client.set, f"key/{number}", b"m")
        take("get", client.get, f"key/{number}")
        take("delete", client.delete_key, f"key/{number}")
        take("add", client.add, "count", 1)
    for _ in range(50):
        take("set 1 MiB", client.set, "large", mebibyte)
    return {call: statistics.median(each) for call, each in spans.items()}
