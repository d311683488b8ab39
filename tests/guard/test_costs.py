"""What a warm save and a warm load cost, in quantities that no busy machine changes: a slow-down fails here
without a clock.

Costs per tensor and per part are slopes between two sizes, so what a verb costs once does not hide in them.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import dcp_async
from dcp_async import CheckpointEngine, PerRank, Stager, StagingOptions
from dcp_async._concurrency.threads import BlockingThreads
from dcp_async.storage.local.page_cache import give_back
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import ASIDE_BYTES, KIB, MIB, data_files, random_tensor

pytestmark = pytest.mark.usefixtures("no_leaks")

# A ceiling is what was measured and a tenth; where that is next to nothing, and a few calls come and go with
# the loop's schedule, it is what one call or object per tensor would exceed. A change that makes a figure
# smaller lowers its ceiling; one that has to make it larger raises it, and its message says what that buys.
# `-rA` shows the measured figures.
CEILINGS = {
    "save: calls per tensor": 0.1,
    "save, flattened anew: calls per tensor": 8.75,
    "save with overlap: calls per tensor": 0.1,
    "save with overlap: calls per tensor that is not copied aside": 0.8,
    "save of DTensors: calls per tensor": 0.1,
    "save of DTensors with overlap: calls per tensor": 0.1,
    "load: calls per tensor": 127,
    "save from a device: calls per tensor": 0.1,
    "save from a device with overlap: calls per tensor": 0.1,
    "save: thread hops per part": 2.35,
    "load, cold: thread hops per part": 2.2,
    "load, warm: thread hops per part": 1.1,
    "save: write calls per GB": 49,
    "load, cold: read calls per GB": 49,
    "load, warm: read calls per GB": 280,
    "save: collections by the garbage collector": 0,
    "save: objects left behind": 500,
    "plan: objects that a garbage collection goes over, per tensor": 0.1,
}
SUBMIT = BlockingThreads.submit.__code__
FEW, MANY = 1000, 3000


class Tally:
    """Counts calls of Python and C functions in this thread and all that start later."""

    def __init__(self, within: str = "") -> None:
        """``within``: the folder whose code alone is counted."""
        self.on = False
        self._within = within
        self.calls = 0
        self.hops = 0
        self.system: Counter[str] = Counter()

    def __call__(self, frame: FrameType, event: str, what: Any) -> None:
        if not self.on or not frame.f_code.co_filename.startswith(self._within):
            return
        if event == "call":
            self.calls += 1
            self.hops += frame.f_code is SUBMIT
        elif event == "c_call":
            self.calls += 1
            if what.__module__ == "posix":
                self.system[what.__name__] += 1


@contextmanager
def tallied(within: str = "") -> Iterator[Tally]:
    tally = Tally(within)
    before, before_threads = sys.getprofile(), threading.getprofile()
    threading.setprofile(tally)
    sys.setprofile(tally)
    try:
        yield tally
    finally:
        sys.setprofile(before)
        threading.setprofile(before_threads)


async def measured(root: Path, state: dict[str, Any], verb: str, staging: StagingOptions) -> Tally:
    """What the third of three equal verbs costs: a save, a load as it comes, or one of which the page cache
    holds nothing or everything."""
    verb, _, cache = verb.partition(", ")
    with tallied() as tally:
        async with CheckpointEngine(root, staging=staging) as engine:
            for step in range(3 if verb == "save" else 1):
                tally.on = step == 2
                await (await engine.save(state, step=step)).upload_completion
            for step in range(3 if verb == "load" else 0):
                for file in data_files(root / "step-00000000") if cache else ():
                    _set_cache(cache, file)
                tally.on = step == 2
                await engine.load(state, 0)
                tally.on = False
            tally.on = False
    return tally


def _set_cache(cache: str, file: Path) -> None:
    with file.open("rb") as opened:
        nbytes = len(opened.read())
        os.fsync(opened.fileno())
        if cache == "cold":
            give_back(opened.fileno(), [(0, nbytes)])


def small_tensors(count: int, nbytes: int = 64) -> dict[str, Any]:
    return {
        "m": {f"layer{index:05d}.weight": torch.zeros(nbytes, dtype=torch.uint8) for index in range(count)}
    }


def check(name: str, figure: float) -> None:
    sys.stdout.write(f"{name}: {figure:.4g}, ceiling {CEILINGS[name]:g}\n")
    assert figure <= CEILINGS[name], f"{name}: {figure:.4g} are more than {CEILINGS[name]:g}"


PER_TENSOR = {
    "save: calls per tensor": ("save", StagingOptions(), 64),
    "save with overlap: calls per tensor": ("save", StagingOptions(overlap=True), 64),
    "load: calls per tensor": ("load", StagingOptions(), 64),
}


@pytest.mark.parametrize("name", PER_TENSOR)
async def test_calls_per_tensor(tmp_path: Path, name: str) -> None:
    verb, staging, nbytes = PER_TENSOR[name]
    few = await measured(tmp_path / "few", small_tensors(FEW, nbytes), verb, staging)
    many = await measured(tmp_path / "many", small_tensors(MANY, nbytes), verb, staging)
    check(name, (many.calls - few.calls) / (MANY - FEW))


async def measured_on_device(root: Path, count: int, staging: StagingOptions) -> Tally:
    """What the third save of ``count`` tensors on a fake device costs, without what the fake costs."""
    fake = FakeAccelerator()
    state = {"m": {f"layer{index:05d}.weight": fake.tensor(torch.zeros(16)) for index in range(count)}}
    with tallied(str(Path(dcp_async.__file__).parent)) as tally:
        async with Stager(staging, backend=fake) as stager, CheckpointEngine(root, staging=stager) as engine:
            for step in range(3):
                tally.on = step == 2
                await (await engine.save(state, step=step)).upload_completion
                tally.on = False
    return tally


@pytest.mark.parametrize("overlap", [False, True])
async def test_calls_per_tensor_on_a_device(tmp_path: Path, overlap: bool) -> None:
    staging = StagingOptions(overlap=overlap)
    few = await measured_on_device(tmp_path / "few", FEW, staging)
    many = await measured_on_device(tmp_path / "many", MANY, staging)
    name = f"save from a device{' with overlap' if overlap else ''}: calls per tensor"
    check(name, (many.calls - few.calls) / (MANY - FEW))


@pytest.mark.parametrize("overlap", [False, True])
async def test_calls_per_dtensor(tmp_path: Path, mesh: DeviceMesh, overlap: bool) -> None:
    def dtensors(count: int) -> dict[str, Any]:
        plain = small_tensors(count)["m"]
        return {
            "m": {
                name: DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
                for name, local in plain.items()
            }
        }

    staging = StagingOptions(overlap=overlap)
    few = await measured(tmp_path / "few", dtensors(FEW), "save", staging)
    many = await measured(tmp_path / "many", dtensors(MANY), "save", staging)
    name = f"save of DTensors{' with overlap' if overlap else ''}: calls per tensor"
    check(name, (many.calls - few.calls) / (MANY - FEW))


async def test_calls_per_tensor_of_a_state_that_is_flattened_anew(tmp_path: Path) -> None:
    own = {"own": PerRank(0)}  # what the capture cache does not look at
    few = await measured(tmp_path / "few", small_tensors(FEW) | own, "save", StagingOptions())
    many = await measured(tmp_path / "many", small_tensors(MANY) | own, "save", StagingOptions())
    check("save, flattened anew: calls per tensor", (many.calls - few.calls) / (MANY - FEW))


async def test_calls_per_tensor_that_is_not_copied_aside(tmp_path: Path) -> None:
    staging = StagingOptions(overlap=True)
    aside = ASIDE_BYTES // (16 * KIB)
    few = await measured(tmp_path / "few", small_tensors(aside, 16 * KIB), "save", staging)
    many = await measured(tmp_path / "many", small_tensors(4 * aside, 16 * KIB), "save", staging)
    name = "save with overlap: calls per tensor that is not copied aside"
    check(name, (many.calls - few.calls) / (3 * aside))


@pytest.mark.parametrize("verb", ["save", "load, cold", "load, warm"])
async def test_thread_hops_per_part(tmp_path: Path, verb: str) -> None:
    part = 256 * KIB
    staging = StagingOptions(part_bytes=part)
    few = await measured(tmp_path / "few", {"w": random_tensor(torch.uint8, (64 * part,))}, verb, staging)
    many = await measured(tmp_path / "many", {"w": random_tensor(torch.uint8, (128 * part,))}, verb, staging)
    check(f"{verb}: thread hops per part", (many.hops - few.hops) / 64)


@pytest.mark.parametrize(
    ("verb", "calls"), [("save", "write"), ("load, cold", "read"), ("load, warm", "read")]
)
async def test_system_calls_per_gigabyte(tmp_path: Path, verb: str, calls: str) -> None:
    nbytes = 128 * MIB
    state = {"w": torch.zeros(nbytes, dtype=torch.uint8)}
    tally = await measured(tmp_path, state, verb, StagingOptions())
    made = sum(count for name, count in tally.system.items() if calls in name)
    check(f"{verb}: {calls} calls per GB", made / (nbytes / 1e9))


async def test_a_warm_save_makes_nothing_that_stays(tmp_path: Path) -> None:
    state = small_tensors(10_000)
    async with CheckpointEngine(tmp_path) as engine:
        for step in range(4):
            gc.collect()
            blocks = sys.getallocatedblocks()
            collections = sum(generation["collections"] for generation in gc.get_stats())
            await (await engine.save(state, step=step)).upload_completion
            await engine.wait()
            collections = sum(generation["collections"] for generation in gc.get_stats()) - collections
            gc.collect()
            blocks = sys.getallocatedblocks() - blocks
    check("save: collections by the garbage collector", collections)
    check("save: objects left behind", blocks)


async def test_a_plan_is_no_burden_on_the_garbage_collector(tmp_path: Path) -> None:
    state = small_tensors(MANY)
    async with CheckpointEngine(tmp_path) as engine:
        await (await engine.save({"warm": torch.ones(1)}, step=0)).upload_completion
        gc.collect()
        before = len(gc.get_objects())
        await (await engine.save(state, step=1)).upload_completion
        await engine.wait()
        gc.collect()
        kept = len(gc.get_objects()) - before
    check("plan: objects that a garbage collection goes over, per tensor", kept / MANY)
