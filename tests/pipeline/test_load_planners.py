"""Planners of the user's that decide on a load: DCP's protocol, what they get, how they fail."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from dcp_async import (
    AppState,
    CheckpointEngine,
    CorruptCheckpointError,
    IncompatibleStateError,
    LoadError,
    PerRank,
    PlanningOptions,
    Stager,
    Trust,
    UntrustedCheckpointError,
)
from tests.support.accelerator import FakeAccelerator
from tests.support.doubles import assert_same
from tests.support.planners import RecordingLoad


class Counter:
    """A Stateful."""

    def __init__(self, ticks: int) -> None:
        self.ticks = ticks
        self.trace = torch.full((3,), float(ticks))

    def state_dict(self) -> dict[str, Any]:
        return {"ticks": self.ticks, "trace": self.trace}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ticks = state["ticks"]


def a_state(fill: int) -> dict[str, Any]:
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(fill)
    return {
        "model": model,
        "counter": Counter(fill),
        "nested": {"deep": [torch.full((2,), float(fill)), {"lr": float(fill)}], "n": Counter(fill)},
        "x": (fill, "y"),
        "sparse": (torch.eye(2) * fill).to_sparse(),
    }


async def save(root: Path, state: dict[str, Any]) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save(state, checkpoint_id="ours", step=1)).upload_completion


async def load(
    root: Path,
    state: dict[str, Any],
    planner: Callable[[], LoadPlanner],
    *,
    unsafe: bool = False,
    **how: Any,
) -> Any:
    options = PlanningOptions(load=planner)
    async with CheckpointEngine(root, planning=options, trust=Trust(unsafe=unsafe)) as engine:
        return await engine.load(state, "ours", **how)


def assert_filled(state: dict[str, Any], fill: int) -> None:
    assert all((parameter == fill).all() for parameter in state["model"].parameters())
    for counter in (state["counter"], state["nested"]["n"]):
        assert (counter.ticks, counter.trace.tolist()) == (fill, [fill] * 3)
    assert_same(state["nested"]["deep"], [torch.full((2,), float(fill)), {"lr": float(fill)}])
    assert state["x"] == (fill, "y")
    assert state["sparse"].to_dense()[0, 0] == fill


async def test_planner_fills_the_state(tmp_path: Path) -> None:
    await save(tmp_path, a_state(7))
    target = a_state(0)
    weight = target["model"].weight
    report = await load(tmp_path, target, RecordingLoad)
    assert_filled(target, 7)
    assert target["model"].weight is weight
    assert (report.checkpoint_id, report.missing, report.nbytes > 0) == ("ours", (), True)


async def test_calls_come_in_stocks_order(tmp_path: Path) -> None:
    saved = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2), "n": {"step": 3, "x": (1,)}}
    await save(tmp_path, saved)
    ours, stock = RecordingLoad(), RecordingLoad()
    target: dict[str, Any] = {"w": torch.zeros(2, 3), "b": torch.zeros(2), "n": {"step": 0, "x": None}}
    await load(tmp_path, target, lambda: ours)
    dcp.load(
        {"w": torch.zeros(2, 3), "b": torch.zeros(2), "n": {"step": 0, "x": None}},
        checkpoint_id=tmp_path / "ours",
        planner=stock,
        no_dist=True,
    )
    assert ours.calls == stock.calls
    assert_same(target, saved)


@pytest.mark.parametrize("writer", ["stock", "ours"])
async def test_whoever_wrote_it(tmp_path: Path, writer: str) -> None:
    saved = {"w": torch.arange(6.0), "d": {"k": [1, 2]}}
    if writer == "ours":
        await save(tmp_path, saved)
    else:
        dcp.save(saved, checkpoint_id=tmp_path / "ours", no_dist=True)
    target: dict[str, Any] = {"w": torch.zeros(6), "d": {"k": None}}
    await load(tmp_path, target, RecordingLoad)
    assert_same(target, saved)


class Prefixed(DefaultLoadPlanner):
    """DCP's example: the state lacks a prefix that was saved."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.shown = state_dict
        super().set_up_planner(
            {f"foo_{key}": value for key, value in state_dict.items()}, metadata, is_coordinator
        )

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.shown[read_item.dest_index.fqn[4:]] = torch.load(value, weights_only=False)


async def test_renamed_state_is_found(tmp_path: Path) -> None:
    await save(tmp_path, {"foo_w": torch.ones(3), "foo_n": 5})
    target: dict[str, Any] = {"w": torch.zeros(3), "n": 0}
    await load(tmp_path, target, Prefixed)
    assert_same(target, {"w": torch.ones(3), "n": 5})


async def test_what_no_plan_reads_is_told(tmp_path: Path) -> None:
    await save(tmp_path, {"optim": {"w": torch.ones(1), "state": torch.ones(2)}, "other": 1})
    target = {"optim": {"w": torch.zeros(1)}}
    with pytest.raises(IncompatibleStateError, match=r"not in the state: optim.state\); nothing was loaded"):
        await load(tmp_path, target, RecordingLoad)
    assert target["optim"]["w"].item() == 0
    report = await load(tmp_path, target, RecordingLoad, strict=False)
    assert (report.unexpected, target["optim"]["w"].item()) == (("optim.state",), 1)


def a_run(seed: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 2)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))


async def test_model_and_optimizer_of_a_fresh_run(tmp_path: Path) -> None:
    model, optimizer = a_run(0)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    await save(tmp_path, {"app": AppState(model, optimizer)})
    fresh_model, fresh_optimizer = a_run(1)
    await load(tmp_path, {"app": AppState(fresh_model, fresh_optimizer)}, RecordingLoad)
    assert_same(fresh_model.state_dict(), model.state_dict())
    assert_same(fresh_optimizer.state_dict(), optimizer.state_dict())


class Through(DefaultLoadPlanner):
    """Reads into memory of its own, and commits what it makes of that."""

    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return torch.empty_like(super().resolve_tensor(read_item))

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        super().resolve_tensor(read_item).copy_(tensor * 2)


async def test_committed_tensors_are_the_planners(tmp_path: Path) -> None:
    await save(tmp_path, {"w": torch.arange(3.0)})
    target = {"w": torch.zeros(3)}
    await load(tmp_path, target, Through)
    assert target["w"].tolist() == [0.0, 2.0, 4.0]


async def test_options_of_dcps_own_planner_hold(tmp_path: Path) -> None:
    await save(tmp_path, {"w": torch.ones(3)})
    target = {"w": torch.zeros(3), "new": torch.zeros(1)}
    await load(tmp_path, target, lambda: DefaultLoadPlanner(allow_partial_load=True))
    assert_same(target, {"w": torch.ones(3), "new": torch.zeros(1)})
    with pytest.raises(LoadError, match=r"Missing key in checkpoint state_dict: new.*; nothing was loaded"):
        await load(tmp_path, target, lambda: DefaultLoadPlanner(flatten_sharded_tensors=False))


async def test_planner_that_makes_the_state_up_fills_an_empty_one(tmp_path: Path) -> None:
    saved = {"w": torch.arange(3.0), "d": {"n": 3}}
    await save(tmp_path, saved)
    target: dict[str, Any] = {}
    await load(tmp_path, target, _EmptyStateDictLoadPlanner)
    assert_same(target, saved)


async def test_keys_that_are_numbers_stay_numbers(tmp_path: Path) -> None:
    await save(tmp_path, {"d": {1: 5, 2: torch.ones(1)}, "own": PerRank({"n": 2})})
    own = PerRank({"n": 0})
    target = {"d": {1: 0, 2: torch.zeros(1)}, "own": own}
    await load(tmp_path, target, RecordingLoad)
    assert_same(target["d"], {1: 5, 2: torch.ones(1)})
    assert own.value == {"n": 2}


async def test_large_tensors_come_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dcp_async.load.planned_load._GROUP_BYTES", 100)
    saved = {f"w{number}": torch.full((30,), float(number)) for number in range(5)}
    await save(tmp_path, saved)
    target = {name: torch.zeros(30) for name in saved}
    await load(tmp_path, target, RecordingLoad)
    assert_same(target, saved)


async def test_what_a_device_is_still_at_is_waited_for(tmp_path: Path) -> None:
    await save(tmp_path, {"w": torch.ones(2)})
    fake = FakeAccelerator()
    target = {"w": fake.tensor(torch.zeros(2))}
    planning = PlanningOptions(load=RecordingLoad)
    async with (
        Stager(backend=fake) as stager,
        CheckpointEngine(tmp_path, staging=stager, planning=planning) as engine,
    ):
        fake.fill(target["w"], 9.0)
        await engine.load(target)
        fake.finish()
    assert target["w"].tolist() == [1.0, 1.0]


async def test_corrupt_checkpoint_is_not_filled_up_with_an_older_one(tmp_path: Path) -> None:
    state = {"w": torch.full((5000,), 3.0)}
    async with CheckpointEngine(tmp_path) as engine:
        for step in (1, 2):
            await (await engine.save(state, step=step)).upload_completion
    (file,) = (tmp_path / "step-00000002").glob("*.distcp")
    raw = bytearray(file.read_bytes())
    raw[raw.index(state["w"].numpy().tobytes()) + 4000] ^= 1
    file.write_bytes(raw)
    target = {"w": torch.zeros(5000)}
    async with CheckpointEngine(tmp_path, planning=PlanningOptions(load=RecordingLoad)) as engine:
        with pytest.raises(CorruptCheckpointError, match="a planner need not fill") as caught:
            await engine.load(target)
        assert caught.value.partially_loaded
        assert (await engine.load(target, 1)).step == 1
    assert_same(target, state)


class Foreign:
    """No trust admits it."""


async def test_nothing_untrusted_reaches_a_planner(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(2), "n": Foreign()}, checkpoint_id=tmp_path / "ours", no_dist=True)
    planner = RecordingLoad()
    target = {"w": torch.zeros(2), "n": None}
    with pytest.raises(UntrustedCheckpointError, match="Foreign; nothing was loaded"):
        await load(tmp_path, target, lambda: planner)
    assert [call[0] for call in planner.calls][-1] == "finish_plan"
    await load(tmp_path, target, RecordingLoad, unsafe=True)
    assert isinstance(target["n"], Foreign)


async def test_casts_are_asked_for(tmp_path: Path) -> None:
    await save(tmp_path, {"w": torch.ones(2)})
    target = {"w": torch.zeros(2, dtype=torch.float16)}
    with pytest.raises(LoadError, match=r"gave torch.float16 for w.*targets are partly overwritten"):
        await load(tmp_path, target, RecordingLoad)
    await load(tmp_path, target, RecordingLoad, dtypes="convert")
    assert target["w"].tolist() == [1.0, 1.0]


async def test_atomic_is_refused(tmp_path: Path) -> None:
    await save(tmp_path, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match="atomic=True"):
        await load(tmp_path, {"w": torch.zeros(2)}, RecordingLoad, atomic=True)


def _raising(*args: Any) -> Any:
    raise dcp.api.CheckpointException("of DCP's own, and no Exception", {})


def _of_nothing(plan: LoadPlan) -> LoadPlan:

    index = dataclasses.replace(plan.items[0].storage_index, fqn="nothing")
    return LoadPlan([dataclasses.replace(plan.items[0], storage_index=index)])


METHODS = ("set_up_planner", "create_local_plan", "create_global_plan", "finish_plan")
FAULTS: dict[str, tuple[str, Any, str]] = {
    **{
        f"{method} raises": (
            method,
            _raising,
            rf"{method}\(\) failed: CheckpointException(?s:.*)nothing was loaded",
        )
        for method in METHODS
    },
    **{
        f"{method} raises": (method, _raising, rf"{method}\(\) failed: Checkpoint(?s:.*)partly overwritten")
        for method in ("load_bytes", "resolve_tensor", "commit_tensor")
    },
    **{
        f"{method} gives None": (method, lambda given: None, rf"Faulty.{method}\(\) gave NoneType")
        for method in (*METHODS[1:], "resolve_tensor")
    },
    "another shape": ("resolve_tensor", lambda given: given[:1], r"of \(1,\) for w.*reads \(3,\)"),
    "what nobody saved": (
        "finish_plan",
        _of_nothing,
        r"its plan reads nothing, which the checkpoint does not",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_planner_that_fails_fails_the_load(tmp_path: Path, fault: str) -> None:
    method, change, message = FAULTS[fault]

    class Faulty(RecordingLoad):
        pass

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(getattr(RecordingLoad, method)(self, *args, **kwargs))

    setattr(Faulty, method, changed)
    await save(tmp_path, {"n": 1, "w": torch.ones(3)})
    with pytest.raises(LoadError, match=message):
        await load(tmp_path, {"n": 0, "w": torch.zeros(3)}, Faulty)


async def test_factory_that_makes_no_planner_is_refused(tmp_path: Path) -> None:
    await save(tmp_path, {"n": 1})
    make: Any = dict
    with pytest.raises(LoadError, match="gave a dict, which is no LoadPlanner"):
        await load(tmp_path, {"n": 0}, make)
