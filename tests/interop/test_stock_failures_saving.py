"""What stock ``torch.distributed.checkpoint`` gets wrong when it saves goes right with this engine.

test_stock_failures.py shows stock's outcomes and lists the failures that other suites guard against. Numbers
are issues of pytorch/pytorch unless another project is named.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import inspect
import os
import pickletools
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, _version
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import dcp_async
from dcp_async import (
    AsyncSaveResponse,
    CheckpointEngine,
    CheckpointError,
    CheckpointInfo,
    Event,
    Limits,
    PlanningOptions,
    SaveError,
    SaveStaged,
    StagingOptions,
)
from dcp_async.sync import CheckpointEngine as CheckpointTwin
from tests.support.doubles import (
    KIB,
    MIB,
    PATIENCE,
    FaultyStorage,
    TrainingRun,
    assert_holds_only,
    assert_same,
    chain,
    committed,
    faulty_storage,
    mapped_arena_bytes,
    random_tensor,
)
from tests.support.processes import run_in_process
from tests.support.saves import PART, SMALL, saved
from tests.support.stock import CachingPlanner, no_cached_plans

SMALL_OVERLAP = StagingOptions(part_bytes=PART, budget_bytes=10 * MIB, overlap=True)
STATE: dict[str, Any] = {"m": {"w": random_tensor(torch.float32, (30, 40), 1), "n": 1}}


# --- writers --------------------------------------------------------------------------------------


async def test_a_write_error_is_raised_although_all_other_writes_succeed(
    root: Path, faulty: FaultyStorage
) -> None:
    """191391: whichever of many writes on several threads fails, the save does, and nothing is committed."""
    state = {f"t{i}": random_tensor(torch.uint8, (PART,), i) for i in range(12)}
    async with CheckpointEngine(faulty, staging=SMALL, limits=Limits(io_concurrency=4)) as engine:
        for nth in (1, 6, 11):
            cause = OSError(errno.EIO, "Input/output error")
            faulty.fail("put", cause, nth=nth, times=1)
            with pytest.raises(SaveError) as caught:
                await saved(engine, state, step=1, replace=True)
            assert any(link is cause for link in chain(caught.value))
            assert await engine.latest() is None
            faulty.heal()
        await saved(engine, state, step=2)
    assert_holds_only(root, ["step-00000002"])


# --- plans that outlive their state ---------------------------------------------------------------


@pytest.fixture
def _no_cached_plans() -> Iterator[None]:
    with no_cached_plans():
        yield


@pytest.mark.usefixtures("_no_cached_plans")
@pytest.mark.parametrize("planner", [DefaultSavePlanner, CachingPlanner])
async def test_two_models_share_a_planner_class(
    tmp_path: Path, planner: Callable[[], DefaultSavePlanner]
) -> None:
    """147343: the cache that made saves fast has one slot for all states that are planned by one class."""
    planning = PlanningOptions(save=planner)
    small, large = {"w": STATE["m"]["w"]}, {"w": random_tensor(torch.float32, (50, 60), 2), "n": 3}
    halves = {"w": small["w"].bfloat16()}
    async with (
        CheckpointEngine(tmp_path / "a", planning=planning) as one,
        CheckpointEngine(tmp_path / "b", planning=planning) as two,
    ):
        for step, (engine, state) in enumerate(
            [
                (one, small),
                (two, small),
                (one, halves),
                (two, large),
                (one, small),
                (one, large),
                (two, halves),
            ]
        ):
            info = await saved(engine, state, step=step)
            assert_same(await engine.read(step), state)
            described = (await info.metadata()).state_dict_metadata["w"]
            assert isinstance(described, TensorStorageMetadata)
            assert (described.properties.dtype, described.size) == (state["w"].dtype, state["w"].shape)


@pytest.mark.parametrize("planner", [DefaultSavePlanner, lambda: DefaultSavePlanner()], ids=["ours", "dcps"])
async def test_names_do_not_depend_on_what_stock_loads_meanwhile(
    root: Path, planner: Callable[[], DefaultSavePlanner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While stock loads a checkpoint of torch 2.3, a global of its makes every save flatten as 2.3 did."""
    state = {"l": [{"w": STATE["m"]["w"]}, [1, 2]], "t": (1, {"a": torch.ones(2)}), "d": {1: [torch.ones(2)]}}
    async with CheckpointEngine(root, planning=PlanningOptions(save=planner)) as engine:
        names = set((await (await saved(engine, state, step=1)).metadata()).state_dict_metadata)
    monkeypatch.setattr(_version, "_derived_version", "2_3")
    async with CheckpointEngine(root, planning=PlanningOptions(save=planner)) as engine:
        info = await saved(engine, state, step=2)
        assert set((await info.metadata()).state_dict_metadata) == names
        assert_same(await engine.read(2), state)


async def test_each_checkpoint_has_metadata_of_its_own(root: Path) -> None:
    """Who changes what one save returned must not change what another one did, nor the next save."""
    async with CheckpointEngine(root) as engine:
        infos = [await saved(engine, STATE, step=step) for step in (1, 2)]
        first, second = [await info.metadata() for info in infos]
        assert first is not second
        assert first.storage_data is not second.storage_data
        first.state_dict_metadata.clear()
        first.storage_data.clear()
        assert set((await infos[0].metadata()).state_dict_metadata) == {"m.w", "m.n"}
        assert set(second.state_dict_metadata) == {"m.w", "m.n"}
        await saved(engine, STATE, step=3)
        assert_same(await engine.read(3), STATE)


# --- handles --------------------------------------------------------------------------------------


async def test_a_staging_error_that_came_early_fails_both_handles(root: Path, faulty: FaultyStorage) -> None:
    """The save has failed before anybody looks at a handle."""
    faulty.fail("begin", OSError(errno.EIO, "Input/output error"))
    async with CheckpointEngine(faulty, staging=SMALL_OVERLAP) as engine:
        response = await engine.save({"w": random_tensor(torch.uint8, (30 * PART,), 1)})
        failed = threading.Event()
        response.upload_completion.add_done_callback(lambda _: failed.set())
        assert failed.wait(PATIENCE)
        for handle in (response.staging_completion, response.upload_completion):
            assert handle.done()
            assert isinstance(handle.exception(), SaveError)
            with pytest.raises(SaveError, match="Input/output"):
                await handle
    assert_holds_only(root, [])


RETURNING = {
    "default": {},
    "overlap": {"staging": StagingOptions(overlap=True)},
    "small": {"staging": SMALL},
    "no_cache": {"planning": PlanningOptions(cache=False)},
    "pinned": {"staging": StagingOptions(pinned=True)},
    "own_planner": {"planning": PlanningOptions(save=lambda: DefaultSavePlanner())},
    "many": {"limits": Limits(pending_saves=3)},
}


@pytest.mark.parametrize("options", RETURNING.values(), ids=RETURNING)
async def test_save_returns_one_type_whatever_the_options(root: Path, options: dict[str, Any]) -> None:
    async with CheckpointEngine(root, **options) as engine:
        response = await engine.save(STATE, step=1)
        assert type(response) is AsyncSaveResponse
        await response.staging_completion
        assert type(await response.upload_completion) is CheckpointInfo
    with CheckpointTwin(root, **options) as twin:
        assert type(twin.save(STATE, step=2)) is AsyncSaveResponse


def test_every_error_is_an_exception() -> None:
    """DCP's CheckpointException is a BaseException: ``except Exception`` and retry libraries miss it."""
    assert not issubclass(CheckpointException, Exception)
    errors = [value for name, value in vars(dcp_async).items() if inspect.isclass(value) and "Error" in name]
    assert len(errors) >= 10
    assert all(issubclass(error, Exception) and issubclass(error, CheckpointError) for error in errors)


def odd_errors() -> list[BaseException]:
    class Local(Exception):
        """Its class can't be pickled: stock's gather of failures dies of it."""

    return [CheckpointException("save", {}), Local("of no module")]


class Refuses:
    """A Stateful whose error is of an odd kind."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def state_dict(self) -> dict[str, Any]:
        raise self.error

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise AssertionError("never called")


@pytest.mark.parametrize("error", odd_errors(), ids=lambda error: type(error).__name__)
async def test_odd_errors_of_the_state_become_errors_of_the_tree(root: Path, error: BaseException) -> None:
    """122529: the error that is reported must be the root cause, whatever its class."""
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=type(error).__name__) as caught:
            await engine.save({"s": Refuses(error)})
        assert any(link is error for link in chain(caught.value))
        await saved(engine, STATE)


# --- leaves ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def handles_of_the_system(tmp_path: Path) -> Iterator[dict[str, Any]]:
    left, right = socket.socketpair()
    with open(tmp_path / "log", "wb") as file, left, right:
        yield {
            "file": file,
            "socket": left,
            "generator": (i for i in range(3)),
            "code": compile("1", "x", "eval"),
        }


@pytest.mark.parametrize("kind", ["file", "socket", "generator", "code"])
async def test_a_leaf_that_cannot_be_saved_is_named(root: Path, tmp_path: Path, kind: str) -> None:
    """174669: "cannot pickle code objects" hid which object it was, and the error that came first."""
    with handles_of_the_system(tmp_path) as objects:
        async with CheckpointEngine(root) as engine:
            with pytest.raises(SaveError, match=r"loader\.workers\.0\.pipe") as caught:
                await engine.save(STATE | {"loader": {"workers": [{"pipe": objects[kind]}]}})
            assert caught.value.phase == "capture"
            assert type(objects[kind]).__name__ in str(caught.value)
            await saved(engine, STATE)
            assert_same(await engine.read(), STATE)


# --- bytes ----------------------------------------------------------------------------------------

TIED = torch.zeros(512 * KIB)


async def test_tied_weights_are_written_once(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        info = await saved(engine, {"embed": TIED, "head": TIED, "again": [TIED]})
        assert info.nbytes < TIED.nbytes + MIB
        assert mapped_arena_bytes() < 2 * TIED.nbytes + 33 * MIB
        result = await engine.read()
        assert result["embed"].data_ptr() == result["head"].data_ptr()
    target = {"embed": torch.ones(512 * KIB), "head": torch.ones(512 * KIB)}
    dcp.load(target, checkpoint_id=root / info.checkpoint_id, no_dist=True)
    assert_same(target, {"embed": TIED, "head": TIED})


async def test_a_small_view_does_not_drag_its_storage_along(root: Path) -> None:
    """Stock's stager copies whole storages, to keep views together."""
    whole = random_tensor(torch.uint8, (24 * MIB,), 3)
    before = mapped_arena_bytes()
    async with CheckpointEngine(root, staging=StagingOptions(part_bytes=PART)) as engine:
        info = await saved(engine, {"view": whole[5:1005], "rows": whole.view(-1, KIB)[::4000]})
        assert mapped_arena_bytes() - before <= MIB
        assert info.nbytes <= MIB
        assert_same((await engine.read())["view"], whole[5:1005])


async def test_metadata_is_portable(root: Path) -> None:
    """A pathlib class of Python 3.13 is no class of 3.12, and a machine's paths are nobody's business."""
    run = TrainingRun(1)
    async with CheckpointEngine(root) as engine:
        info = await saved(engine, run.state | {"leaf": Path("/data/set")}, notes={"k": "v"})
    directory = root / info.checkpoint_id
    content = (directory / ".metadata").read_bytes()
    words = [str(argument) for _, argument, _ in pickletools.genops(content) if argument is not None]
    assert not [word for word in words if "pathlib" in word or "dcp_async" in word]
    for file in [directory / ".metadata", *directory.glob("manifest-*.json")]:
        for secret in (str(root), str(Path.home()), socket.gethostname()):
            assert secret.encode() not in file.read_bytes()


# --- memory ---------------------------------------------------------------------------------------


def resident_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * KIB


@pytest.mark.parametrize("overlap", [False, True], ids=["staged", "overlap"])
async def test_memory_does_not_grow_with_the_number_of_saves(root: Path, overlap: bool) -> None:
    """170163, 187996, 188434, 191558: each save leaked what it had staged. 30 saves of 8 MiB."""
    state = {
        "big": torch.zeros(6 * MIB, dtype=torch.uint8),
        "small": [torch.zeros(8 * KIB) for _ in range(64)],
    }
    before = mapped_arena_bytes()
    async with CheckpointEngine(root, staging=StagingOptions(overlap=overlap)) as engine:
        pool, resident = [], []
        for _ in range(30):
            await (await engine.save(state, checkpoint_id="latest-state", replace=True)).upload_completion
            pool.append(mapped_arena_bytes())
            resident.append(resident_bytes())
        assert len(set(pool[3:])) == 1
        assert resident[-1] - resident[5] < 3 * 8 * MIB, [value // MIB for value in resident]
    assert mapped_arena_bytes() == before


async def test_staged_memory_is_given_back_at_close_and_after_failures(
    root: Path, faulty: FaultyStorage
) -> None:
    """183413: the second use of a stager must find it as the first one did, a failed save between them."""
    before = mapped_arena_bytes()
    state = {"w": torch.zeros(4 * MIB, dtype=torch.uint8)}
    for _ in range(3):
        async with CheckpointEngine(faulty) as engine:
            await saved(engine, state)
            used = mapped_arena_bytes()
            for _ in range(5):
                faulty.fail("seal", OSError(errno.EIO, "Input/output error"))
                with pytest.raises(SaveError):
                    await saved(engine, state)
                faulty.heal()
            await saved(engine, state)
            assert mapped_arena_bytes() == used
        assert mapped_arena_bytes() == before


# --- disks and threads ----------------------------------------------------------------------------

READ_ONLY, REMOUNT, DETACH = 1, 32, 2


@contextlib.asynccontextmanager
async def read_only_disk(path: Path) -> AsyncIterator[tuple[FaultyStorage, Callable[[], None]]]:
    """A storage, and what makes its disk read-only: a real remount where permitted, else the error of one."""
    path.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    mounted = libc.mount(b"tmpfs", os.fsencode(path), b"tmpfs", 0, b"size=8m") == 0

    async with faulty_storage(path / "run") as storage:

        def freeze() -> None:
            if not mounted:
                storage.fail("begin", OSError(errno.EROFS, os.strerror(errno.EROFS)))
            elif libc.mount(None, os.fsencode(path), None, REMOUNT | READ_ONLY, None) != 0:
                raise OSError(ctypes.get_errno(), "remount")

        yield storage, freeze
    if mounted:
        assert libc.umount2(os.fsencode(path), DETACH) == 0


async def test_a_read_only_disk_is_a_save_error_and_can_still_be_read(tmp_path: Path) -> None:
    async with read_only_disk(tmp_path / "disk") as (storage, freeze), CheckpointEngine(storage) as engine:
        await saved(engine, STATE, step=1)
        freeze()
        with pytest.raises(SaveError, match=r"(?i)read-only") as caught:
            await saved(engine, STATE, step=2)
        assert "step-00000002" in str(caught.value)
        assert any(getattr(link, "errno", None) == errno.EROFS for link in chain(caught.value))
        assert_same(await engine.read(), STATE)
        assert [info.step async for info in engine.checkpoints()] == [1]


class Leaves:
    def on_event(self, event: Event) -> None:
        if isinstance(event, SaveStaged):
            raise SystemExit("the loss is good enough")


def _leave_by_sys_exit(root: Path) -> list[str]:
    """The threads that are left."""

    async def main() -> list[str]:
        engine = await CheckpointEngine(root, observer=Leaves()).open()
        for step in (1, 2):
            with contextlib.suppress(CheckpointError):
                await (await engine.save({"w": torch.ones(9)}, step=step)).upload_completion
        with contextlib.suppress(CheckpointError):
            await engine.close()
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(PATIENCE)
        names = [thread.name for thread in threading.enumerate()]
        async with CheckpointEngine(root) as another:
            await (await another.save({"w": torch.ones(9)}, step=3)).upload_completion
        return names

    return asyncio.run(main())


@pytest.mark.usefixtures("process_server")
def test_sys_exit_on_the_engines_thread_is_no_hang_and_leaves_no_thread(root: Path) -> None:
    """166560, xtuner 1878: after the death of its executor stock fails each save without a reason."""
    assert run_in_process(_leave_by_sys_exit, root) == ["MainThread"]
    assert "step-00000003" in committed(root)
