"""What does planning cost with many ranks: dcp_async beside stock DCP's planner, in one process.

Run as `python bench/planning.py`. Writes planning.json (every sample) and planning.md (medians and ratios).
One rank's state is built and captured by the real code, with DTensors over a process group that only pretends
(rank 0 of so many); the other ranks' are that one with their own names and offsets, and the last one is
compared with what the real code makes of its own state. Then each step of a save that is about planning runs
once per rank, or once on the coordinator over what all ranks sent. Nothing travels: serialisation is in, the
network is not.
Belongs here: layouts, steps, the table. Not here: saves with real processes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import pickle
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import report
from dcp_async.formats.manifest import FileEntry, encode_manifest
from dcp_async.offer import Offer, group_hashes, leaf_hashes, make_offer
from dcp_async.pipeline import SavePipeline
from dcp_async.plain import dumps, loads
from dcp_async.planner import CompiledPlan, DefaultDraft, compile_plan
from dcp_async.publication import GlobalPlan
from dcp_async.sharding import Shard as Piece
from dcp_async.state import Captured, capture
from driver import progress

LAYOUTS = {
    "fsdp": "every rank a piece of every tensor",
    "ddp": "every rank the same whole tensors",
    "expert": "every rank tensors of its own",
}
NUM_LEAVES = 8
"""Of the items, how many are no tensors: an optimizer's hyperparameters, the same on all ranks."""
ROWS, COLUMNS = 2, 4
"""Of a rank's tensors: planning does not look at bytes, so they may be small."""
UID = "0123456789abcdef"
MAX_SAMPLES = 64
"""Ranks on which the steps of a single rank are timed; the others do the same."""

Times = dict[str, float]
Part = Literal["rank", "plan", "commit"]
PARTS: tuple[Part, ...] = ("rank", "plan", "commit")


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


@contextmanager
def pretending(world_size: int, rank: int) -> Iterator[DeviceMesh]:
    """A mesh over all ranks of a job of which this process is the only one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield init_device_mesh("cpu", (world_size,))
    finally:
        dist.destroy_process_group()


def tensor_names(layout: str, items: int, rank: int) -> list[str]:
    """Below "model" and "optim.state", as a transformer's are."""
    parts = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1")
    where = f"experts.{rank}." if layout == "expert" else ""
    return [f"layers.{at // 5}.{where}{parts[at % 5]}.weight" for at in range(-(-(items - NUM_LEAVES) // 3))]


def state_of(layout: str, items: int, mesh: DeviceMesh, rank: int) -> dict[str, Any]:
    """A model and its AdamW on ``rank``, of ``items`` leaves."""

    def tensor() -> torch.Tensor:
        local = torch.zeros(ROWS, COLUMNS)
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False) if layout == "fsdp" else local

    names = tensor_names(layout, items, rank)
    wanted = items - NUM_LEAVES - len(names)
    moments = [("exp_avg", "exp_avg_sq")[at % 2] for at in range(wanted)]
    optim: dict[str, dict[str, torch.Tensor]] = {}
    for at, moment in enumerate(moments):
        optim.setdefault(names[at // 2], {})[moment] = tensor()
    group = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    group |= {"amsgrad": False, "foreach": None, "maximize": False, "capturable": False}
    assert len(group) == NUM_LEAVES
    return {
        "model": {name: tensor() for name in names},
        "optim": {"state": optim, "param_groups": [group]},
    }


@dataclasses.dataclass(slots=True)
class Ranks:
    """A job of ``world_size`` ranks: rank 0 as it is, the others derived from it."""

    layout: str
    items: int
    world_size: int
    states: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
    captured: dict[int, Captured] = dataclasses.field(default_factory=dict)
    plans: dict[int, SavePlan] = dataclasses.field(default_factory=dict)

    @classmethod
    def build(cls, layout: str, items: int, world_size: int) -> Ranks:
        """Raises AssertionError if the last rank, derived, differs from what the real code makes of it."""
        made = cls(layout, items, world_size)
        for rank in (0, world_size - 1):
            with pretending(world_size, rank) as mesh:
                state = state_of(layout, items, mesh, rank)
                made.states[rank] = state
                made.captured[rank] = capture(state, None, rank=rank)
                made.plans[rank] = stock_plan(state, is_coordinator=rank == 0)
        last = world_size - 1
        assert made.capture_of(last).structure == made.captured[last].structure
        assert made.capture_of(last).tree == made.captured[last].tree
        assert made.plan_of(last) == made.plans[last]
        return made

    def capture_of(self, rank: int) -> Captured:
        """What ``rank`` captures."""
        first = self.captured[0]
        structure, tree = first.structure, first.tree
        if self.layout == "fsdp":
            shards = {index: Piece(shard.size, (rank * ROWS, 0)) for index, shard in structure.shards.items()}
            structure = dataclasses.replace(structure, shards=shards)
        elif self.layout == "expert":
            names = [self._renamed(name, rank) for name in structure.tensor_names]
            containers = [
                (self._renamed(name, rank), kind, size, before)
                for name, kind, size, before in structure.containers
            ]
            structure = dataclasses.replace(structure, tensor_names=names, containers=containers)
            tree = json.loads(self._renamed(json.dumps(tree), rank))
        return Captured(
            structure=structure,
            tree=tree,
            tensors=first.tensors,
            leaf_items=first.leaf_items,
            optimizers=[],
            live=first.live,
        )

    def plan_of(self, rank: int) -> SavePlan:
        """What stock plans on ``rank``."""
        base = self.plans[0]
        if rank == 0:
            return base
        return dataclasses.replace(
            base, items=[self._moved(item, rank) for item in base.items], planner_data=self._paths(rank)
        )

    def _paths(self, rank: int) -> Any:
        paths = self.plans[0].planner_data
        if self.layout != "expert":
            return paths
        return {
            self._renamed(name, rank): tuple(
                self._renamed(key, rank) if isinstance(key, str) else key for key in path
            )
            for name, path in paths.items()
        }

    def _moved(self, item: WriteItem, rank: int) -> WriteItem:
        if self.layout == "ddp" or item.tensor_data is None:
            return item
        if self.layout == "expert":
            return dataclasses.replace(
                item, index=MetadataIndex(self._renamed(item.index.fqn, rank), item.index.offset)
            )
        offsets = torch.Size([rank * ROWS, 0])
        chunk = ChunkStorageMetadata(offsets, item.tensor_data.chunk.sizes)
        return dataclasses.replace(
            item,
            index=MetadataIndex(item.index.fqn, offsets),
            tensor_data=dataclasses.replace(item.tensor_data, chunk=chunk),
        )

    def _renamed(self, text: str, rank: int) -> str:
        return text.replace("experts.0.", f"experts.{rank}.")


def stock_plan(state: dict[str, Any], *, is_coordinator: bool) -> SavePlan:
    """A rank's local plan, as stock makes it on every save."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state, None, is_coordinator)
    return planner.create_local_plan()


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
        judged = asyncio.run(judge(plan, messages))
    assert judged == ["reuse"] * ranks.world_size
    with clock.span("dumps"):
        reply = [dumps(answer) for answer in judged]
    with on(0, "loads"):
        loads(reply[0])
    commit(clock, shared, entries)
    nbytes |= {"verdict up": sum(map(len, verdicts)), "verdict down": sum(map(len, reply))}
    return first, clock.times(), nbytes


async def judge(plan: CompiledPlan, messages: Sequence[dict[str, Any]]) -> list[str]:
    """The coordinator's verdict, without the directory that it leases before it says so."""

    async def lead(_: CompiledPlan) -> None:
        return None

    saving = SimpleNamespace(_request=SimpleNamespace(plan=plan), _lead=lead)
    return await SavePipeline._judge(cast(SavePipeline, saving), messages)


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


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What all samples of one layout and number of ranks gave."""

    layout: str
    world_size: int
    samples: Mapping[str, Sequence[Times]]
    """Of "first", "later" and "stock"."""
    nbytes: Mapping[str, int]
    stock_nbytes: Mapping[str, int]

    def median(self, which: str) -> Times:
        """Per step."""
        taken = self.samples[which]
        return {step: statistics.median(each[step] for each in taken) for step in (taken[0] if taken else {})}

    def seconds(self, which: str, part: Part) -> float | None:
        """The median of what all steps of a part took: of one rank, or of the coordinator."""
        sums = [
            sum(seconds for step, seconds in each.items() if part_of(step) == part)
            for each in self.samples[which]
        ]
        return float(statistics.median(sums)) if sums else None


def part_of(step: str) -> str:
    """Steps are named "rank: ..." and "commit: ..."; the others are the coordinator's planning."""
    return step.partition(":")[0] if ":" in step else "plan"


NOTES = (
    (
        "Times are CPU seconds of one thread, medians. rank: what one rank does, beside the others. plan, "
        "commit: what the coordinator does alone. Nothing is written and nothing travels."
    ),
    (
        "first: plan is loads of all offers, merging them, dumps of the answers, loads of all placements; "
        "commit is making and rendering .metadata and manifest. later: verdict messages; rendering."
    ),
    (
        "stock, on every save: plan is loads of all local plans, create_global_plan, dumps of the answers; "
        "commit is loads of all write results, filling in and pickling .metadata."
    ),
    (
        "The ratios set stock's dumps (of one rank), loads and global plan, without its answers, against all "
        "of our rank and plan; with commit, also against our commit."
    ),
)


def goal_seconds(case: Case) -> float | None:
    """Stock's dumps + loads + global plan, without its answers."""
    if not case.samples["stock"]:
        return None
    steps = ("rank: dumps", "loads", "global plan")
    return float(statistics.median(sum(each[step] for step in steps) for each in case.samples["stock"]))


def measure(layout: str, world_size: int, given: argparse.Namespace) -> Case:
    """``given.runs`` samples of each engine, taken in turn."""
    ranks = Ranks.build(layout, given.items, world_size)
    samples: dict[str, list[Times]] = {"first": [], "later": [], "stock": []}
    nbytes: dict[str, int] = {}
    stock_nbytes: dict[str, int] = {}
    for _ in range(given.runs if world_size <= 512 else 1):
        first, later, nbytes = run_ours(ranks)
        samples["first"].append(first)
        samples["later"].append(later)
        if world_size <= given.stock_ranks:
            stock, stock_nbytes = run_stock(ranks)
            samples["stock"].append(stock)
    return Case(
        layout=layout, world_size=world_size, samples=samples, nbytes=nbytes, stock_nbytes=stock_nbytes
    )


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


def table(cases: Sequence[Case]) -> list[str]:
    """Milliseconds and ratios."""
    head = ["layout", "ranks", "n", "first: rank", "plan", "commit", "later: rank", "plan", "commit"]
    head += [
        "stock: rank",
        "plan",
        "commit",
        "stock / first",
        "with commit",
        "stock / later",
        "up, first",
        "up, later",
        "up, stock",
    ]
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for case in cases:
        cells = [case.layout, str(case.world_size), str(len(case.samples["first"]))]
        for which in ("first", "later", "stock"):
            for part in PARTS:
                seconds = case.seconds(which, part)
                cells.append("-" if seconds is None else f"{seconds * 1000:.1f} ms")
        goal = goal_seconds(case)
        for which, with_commit in (("first", False), ("first", True), ("later", False)):
            parts = PARTS if with_commit else PARTS[:2]
            ours = sum(case.seconds(which, part) or 0.0 for part in parts)
            cells.append("-" if goal is None else f"{goal / ours:.0f}")
        up = [
            case.nbytes["offers"] + case.nbytes["placements"],
            case.nbytes["verdict up"],
            case.stock_nbytes.get("plans"),
        ]
        cells += ["-" if size is None else f"{size / 2**20:.2f} MiB" for size in up]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="comma-separated (%(default)s)")
    parser.add_argument("--ranks", default="8,64,256,1024,4096", help="comma-separated (%(default)s)")
    parser.add_argument("--items", type=int, default=625, help="per rank (%(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="samples up to 512 ranks; 1 beyond (%(default)s)")
    parser.add_argument(
        "--stock-ranks",
        type=int,
        default=256,
        help="stock up to so many: it takes minutes beyond (%(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="(%(default)s)")
    given = parser.parse_args()
    facts = report.machine(Path.cwd()) | {"torch": torch.__version__}
    configuration = {"items": given.items, "leaves": NUM_LEAVES, "runs": given.runs}
    cases: list[Case] = []
    for layout in given.layouts.split(","):
        for world_size in map(int, given.ranks.split(",")):
            progress(f"{layout}, {world_size} ranks")
            cases.append(measure(layout, world_size, given))
    facts["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    facts["load_average_at_end"] = round(os.getloadavg()[0], 2)
    store = store_seconds()
    calls = ", ".join(f"{call} {seconds * 1e6:.0f} us" for call, seconds in store.items())
    described = [f"{key} {value}" for key, value in {**facts, **configuration}.items()]
    layouts = [f"- {name}: {what}" for name, what in LAYOUTS.items()]
    lines = [
        "# Planning: dcp_async, stock DCP",
        "",
        "; ".join(described) + ".",
        "",
        *table(cases),
        "",
        *layouts,
    ]
    text = "\n".join([*lines, *(f"- {note}" for note in NOTES), f"- One call to the store: {calls}."]) + "\n"
    results = [
        dataclasses.asdict(case) | {"medians": {which: case.median(which) for which in case.samples}}
        for case in cases
    ]
    data = (
        json.dumps(
            {"configuration": configuration, "machine": facts, "store": store, "cases": results}, indent=1
        )
        + "\n"
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "planning.md").write_text(text, encoding="ascii")
    (given.out / "planning.json").write_text(data, encoding="ascii")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
