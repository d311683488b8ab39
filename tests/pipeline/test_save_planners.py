"""Planners of the user's that decide on a save: DCP's protocol, what they write, how they fail."""

from __future__ import annotations

import dataclasses
import gc
import io
import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem

from dcp_async import (
    CheckpointEngine,
    PlanningOptions,
    SaveError,
    Stager,
    StagingOptions,
    StateMutatedError,
)
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import assert_same, committed, faulty_storage
from tests.support.planners import Calls, ExtraData, Half, HalfUntold, RecordingSave, Renaming


class Counter:
    """A Stateful."""

    def __init__(self) -> None:
        self.ticks = 7

    def state_dict(self) -> dict[str, Any]:
        return {"ticks": self.ticks, "trace": torch.arange(3.0)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ticks = state["ticks"]


def a_state() -> dict[str, Any]:
    model = {
        "w": torch.arange(12.0).reshape(3, 4),
        "b": torch.ones(4, dtype=torch.int64),
        "t": torch.eye(3).t(),
    }
    return {
        "step": 3,
        "model": model,
        "counter": Counter(),
        "list": [torch.zeros(2), {"lr": 0.5}],
        "x": (1, "y"),
    }


async def save(root: Path, state: dict[str, Any], planner: Callable[[], SavePlanner], **options: Any) -> None:
    async with CheckpointEngine(root, planning=PlanningOptions(save=planner), **options) as engine:
        await (await engine.save(state, checkpoint_id="ours", step=1)).upload_completion


def read_by_stock(path: Path, target: dict[str, Any]) -> dict[str, Any]:
    dcp.load(target, checkpoint_id=path, no_dist=True)
    return target


async def test_calls_come_in_stocks_order(tmp_path: Path) -> None:
    calls: list[Calls] = []
    for planner in (ours := RecordingSave(), stock := RecordingSave()):
        calls.append(planner.calls)
    await save(tmp_path, a_state(), lambda: ours)
    writer = FileSystemWriter(tmp_path / "stock", sync_files=False)
    dcp.save(a_state(), storage_writer=writer, planner=stock, no_dist=True)
    assert calls[0] == calls[1]
    assert read_by_stock(tmp_path / "ours", {"step": 0})["step"] == 3


async def test_planner_is_asked_in_every_save(tmp_path: Path) -> None:
    made: list[RecordingSave] = []

    def make() -> RecordingSave:
        made.append(RecordingSave())
        return made[-1]

    state = {"w": torch.ones(2)}
    async with CheckpointEngine(tmp_path, planning=PlanningOptions(save=make)) as engine:
        for step in (1, 2):
            state["w"].fill_(step)
            await (await engine.save(state, step=step)).upload_completion
    assert [planner.calls for planner in made] == [made[0].calls] * 2
    assert read_by_stock(tmp_path / "step-00000002", {"w": torch.zeros(2)})["w"].tolist() == [2.0, 2.0]


async def test_planner_that_changes_nothing_writes_what_the_default_does(tmp_path: Path) -> None:
    async with CheckpointEngine(tmp_path / "default") as engine:
        await (await engine.save(a_state(), checkpoint_id="ours", step=1)).upload_completion
        expected = await engine.read("ours")
    await save(tmp_path, a_state(), RecordingSave)
    async with CheckpointEngine(tmp_path) as engine:
        assert_same(await engine.read("ours"), expected)
    metadata = [FileSystemReader(path / "ours").read_metadata() for path in (tmp_path, tmp_path / "default")]
    for one in metadata:
        one.storage_data = None
        one.storage_meta = None
    assert metadata[0].planner_data == metadata[1].planner_data
    assert metadata[0].state_dict_metadata == metadata[1].state_dict_metadata


async def test_renamed_state_reads_back(tmp_path: Path) -> None:
    await save(tmp_path, a_state(), Renaming)
    target = {"foo_model": {"w": torch.zeros(3, 4)}, "foo_step": 0}
    read_by_stock(tmp_path / "ours", target)
    assert_same(target, {"foo_model": {"w": a_state()["model"]["w"]}, "foo_step": 3})
    async with CheckpointEngine(tmp_path) as engine:
        read = await engine.read("ours")
    assert set(read) == {f"foo_{key}" for key in a_state()}
    assert_same(read["foo_model"], a_state()["model"])
    assert read["foo_list"][1] == {"lr": 0.5}


@pytest.mark.parametrize("planner", [Half, HalfUntold])
async def test_cast_tensors_read_back_by_what_was_stored(tmp_path: Path, planner: type[SavePlanner]) -> None:
    state: dict[str, Any] = {"w": torch.full((3,), 1.5), "n": 2}
    await save(tmp_path, state, planner)
    assert_same(read_by_stock(tmp_path / "ours", {"w": torch.zeros(3), "n": 0}), state)
    async with CheckpointEngine(tmp_path) as engine:
        read = await engine.read("ours")
        assert read["w"].dtype is torch.float16
        assert read["w"].tolist() == [1.5] * 3
        target: dict[str, Any] = {"w": torch.zeros(3), "n": 0}
        await engine.load(target, "ours", dtypes="convert")
    assert target["w"].tolist() == [1.5] * 3


async def test_planner_data_of_its_own_is_published(tmp_path: Path) -> None:
    await save(tmp_path, a_state(), ExtraData)
    assert FileSystemReader(tmp_path / "ours").read_metadata().planner_data == ["of one rank"]
    target = {"model": {"w": torch.zeros(3, 4)}}
    read_by_stock(tmp_path / "ours", target)
    assert_same(target, {"model": {"w": a_state()["model"]["w"]}})
    async with CheckpointEngine(tmp_path) as engine:
        assert (await engine.read("ours"))["model"].keys() == {"w", "b", "t"}


class Note:
    """No trust admits it, and nothing can be compared with it."""

    def __eq__(self, other: object) -> bool:
        raise TypeError("not to be compared")

    __hash__ = None  # type: ignore[assignment]  # never a key


async def test_planner_data_of_any_class_does_no_harm(tmp_path: Path) -> None:
    class Noting(ExtraData):
        data = Note()

    await save(tmp_path, {"w": torch.ones(2)}, Noting)
    (note,) = FileSystemReader(tmp_path / "ours").read_metadata().planner_data
    assert isinstance(note, Note)
    async with CheckpointEngine(tmp_path) as engine:
        assert_same(await engine.read("ours"), {"w": torch.ones(2)})


class OnlyModel(DefaultSavePlanner):
    """Saves a part of the state."""

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        kept = [item for item in plan.items if item.index.fqn.startswith("model.")]
        return dataclasses.replace(plan, items=kept)


async def test_part_of_the_state_is_saved(tmp_path: Path) -> None:
    await save(tmp_path, a_state(), OnlyModel)
    async with CheckpointEngine(tmp_path) as engine:
        assert_same(await engine.read("ours"), {"model": a_state()["model"]})


class Old(DefaultSavePlanner):
    """From before planners were told of the storage."""

    def set_up_planner(self, state_dict: Any, is_coordinator: bool) -> None:  # type: ignore[override]  # on purpose
        super().set_up_planner(state_dict, None, is_coordinator)


async def test_planner_of_an_older_torch_is_called_as_it_wants(tmp_path: Path) -> None:
    await save(tmp_path, {"w": torch.ones(2)}, Old)
    async with CheckpointEngine(tmp_path) as engine:
        assert_same(await engine.read("ours"), {"w": torch.ones(2)})


class Own(SavePlanner):
    """Derives from the protocol alone; what it writes is neither in the state nor a pickle."""

    def set_up_planner(self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False) -> None:
        self.inner = DefaultSavePlanner()
        self.made = {"sparse": torch.eye(3).to_sparse(), "raw": 0, "sum": state_dict["w"].sum()}
        self.inner.set_up_planner(self.made, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        return self.inner.create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        return self.inner.create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.index.fqn == "raw":
            return io.BytesIO(b"no pickle")
        return self.inner.resolve_data(write_item)


class RawLoad(dcp.DefaultLoadPlanner):
    """Takes bytes that are no pickle."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.original_state_dict["raw"] = value.getvalue()


async def test_what_a_planner_makes_up_is_stored_as_it_is(tmp_path: Path) -> None:
    await save(tmp_path, {"w": torch.arange(4.0)}, Own)
    target: dict[str, Any] = {"raw": None, "sum": torch.zeros(())}
    dcp.load(target, checkpoint_id=tmp_path / "ours", planner=RawLoad(), no_dist=True)
    assert_same(target, {"raw": b"no pickle", "sum": torch.tensor(6.0)})
    async with CheckpointEngine(tmp_path) as engine:
        read = await engine.read("ours", keys=["sparse", "sum"])
    assert read["sum"].item() == 6.0
    assert read["sparse"].to_dense().tolist() == torch.eye(3).tolist()


class Slow(DefaultSavePlanner):
    """Lets the trainer go on before it gives anything."""

    def __init__(self, meanwhile: Callable[[], object]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    def create_local_plan(self) -> SavePlan:
        self._meanwhile()
        return super().create_local_plan()

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return super().transform_object(write_item, object)


async def test_leaves_are_as_save_found_them_under_overlap(tmp_path: Path) -> None:
    history = [(1,), {"n"}]
    state = {"w": torch.ones(3), "x": (history, 1)}
    await save(tmp_path, state, lambda: Slow(lambda: history.clear()), staging=StagingOptions(overlap=True))
    async with CheckpointEngine(tmp_path) as engine:
        assert (await engine.read("ours"))["x"] == ([(1,), {"n"}], 1)


async def test_tensor_that_changes_under_overlap_is_never_saved(tmp_path: Path) -> None:
    weight = torch.ones(300_000)
    options = StagingOptions(overlap=True)
    with pytest.raises(StateMutatedError, match="w"):
        await save(tmp_path, {"w": weight}, lambda: Slow(lambda: weight.add_(1)), staging=options)
    assert committed(tmp_path) == []


@pytest.mark.parametrize("overlap", [False, True])
async def test_what_a_device_is_still_at_is_waited_for(tmp_path: Path, overlap: bool) -> None:
    fake = FakeAccelerator()
    state = {"w": fake.tensor(torch.zeros(200_000)), "small": fake.tensor(torch.zeros(9))}
    planning = PlanningOptions(save=RecordingSave)
    async with (
        Stager(StagingOptions(overlap=overlap), backend=fake) as stager,
        CheckpointEngine(tmp_path, staging=stager, planning=planning) as engine,
    ):
        for tensor in state.values():
            fake.fill(tensor, 2.0)
        await (await engine.save(state, step=1)).upload_completion
        saved = await engine.read(1)
    assert_same(saved, {"w": torch.full((200_000,), 2.0), "small": torch.full((9,), 2.0)})


async def test_prepare_asks_the_planner_and_leaves_nothing(tmp_path: Path) -> None:
    made: list[RecordingSave] = []

    def make() -> RecordingSave:
        made.append(RecordingSave())
        return made[-1]

    async with CheckpointEngine(tmp_path, planning=PlanningOptions(save=make)) as engine:
        await engine.prepare({"w": torch.ones(2)})
        assert committed(tmp_path) == []
        await (await engine.save({"w": torch.ones(2)}, step=1)).upload_completion
    assert made[0].calls == made[1].calls


async def test_nobody_keeps_the_state_of_a_planner_once_it_is_staged(tmp_path: Path) -> None:
    planners: list[weakref.ref[RecordingSave]] = []

    def make() -> RecordingSave:
        planner = RecordingSave()
        planners.append(weakref.ref(planner))
        return planner

    async with (
        faulty_storage(tmp_path) as storage,
        CheckpointEngine(storage, planning=PlanningOptions(save=make)) as engine,
    ):
        with storage.hold("commit") as gate:
            response = await engine.save({"w": torch.ones(2)}, step=1)
            await gate.until_arrived()
            gc.collect()
            assert planners[0]() is None
        await response.upload_completion


def _raising(*args: Any, **kwargs: Any) -> Any:
    raise dcp.api.CheckpointException("of DCP's own, and no Exception", {})


def _without_one(plan: SavePlan) -> SavePlan:
    return dataclasses.replace(plan, items=plan.items[1:])


def _with_one_twice(plan: SavePlan) -> SavePlan:
    return dataclasses.replace(plan, items=[*plan.items, plan.items[0]])


GIVING = ("create_local_plan", "create_global_plan", "finish_plan", "resolve_data")

FAULTS: dict[str, tuple[str, Any, str]] = {
    **{
        f"{method} raises": (method, lambda given: _raising(), rf"{method}\(\) failed: CheckpointException")
        for method in (
            "set_up_planner",
            "create_local_plan",
            "create_global_plan",
            "finish_plan",
            "resolve_data",
        )
    },
    **{
        f"{method} gives None": (method, lambda given: None, rf"Faulty.{method}\(\) gave NoneType")
        for method in GIVING
    },
    "a global plan too few": (
        "create_global_plan",
        lambda given: ([], given[1]),
        r"gave 0 plans for 1 ranks",
    ),
    "item dropped in the global plan": (
        "create_global_plan",
        lambda given: ([_without_one(given[0][0])], given[1]),
        r"its metadata names n, which is in no rank's plan",
    ),
    "item dropped at the end": ("finish_plan", _without_one, r"its metadata names n, which is in no"),
    "item named twice": ("finish_plan", _with_one_twice, r"its plan names n twice"),
    "another shape": (
        "resolve_data",
        lambda given: given[:1] if isinstance(given, torch.Tensor) else given,
        r"gave Tensor for w of \(1,\), and its plan says \(3,\)",
    ),
    "bytes for a tensor": ("resolve_data", lambda given: io.BytesIO(), r"gave BytesIO for w, not the tensor"),
    "a tensor for bytes": (
        "resolve_data",
        lambda given: torch.ones(1),
        r"gave Tensor for n, not the Byt",
    ),
    "no bytes": (
        "resolve_data",
        lambda given: given.to("meta") if isinstance(given, torch.Tensor) else given,
        r"gave Tensor for w, which has no bytes",
    ),
    "a plan that can't travel": (
        "create_local_plan",
        lambda given: dataclasses.replace(given, planner_data=lambda: 0),
        r"create_local_plan\(\) gave can't be pickled",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_planner_that_fails_commits_nothing(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    method, change, message = FAULTS[fault]
    is_faulty = True

    class Faulty(RecordingSave):
        pass

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = getattr(RecordingSave, method)(self, *args, **kwargs)
        return change(given) if is_faulty else given

    setattr(Faulty, method, changed)
    state = {"n": 1, "w": torch.ones(3)}
    async with CheckpointEngine(tmp_path, planning=PlanningOptions(save=Faulty)) as engine:
        with caplog.at_level(logging.CRITICAL), pytest.raises(SaveError, match=message):
            await engine.save(state, step=1)
        assert committed(tmp_path) == []
        is_faulty = False
        await (await engine.save(state, step=1)).upload_completion
    assert committed(tmp_path) == ["step-00000001"]


async def test_factory_that_makes_no_planner_is_refused(tmp_path: Path) -> None:
    make: Any = dict
    with pytest.raises(SaveError, match="gave a dict, which is no SavePlanner"):
        await save(tmp_path, {"n": 1}, make)
    assert committed(tmp_path) == []
