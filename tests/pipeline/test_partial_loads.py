"""``load(keys=, rename=)``: what is asked for is loaded, strictly, and nothing else is touched."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dcp_async import AppState, CheckpointEngine, IncompatibleStateError, LoadError, PerRank, RNGState
from tests.support.doubles import assert_same


def make_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def weight_of(model: nn.Sequential) -> torch.Tensor:
    """The first layer's."""
    return model.get_parameter("0.weight")


def trained() -> tuple[nn.Sequential, torch.optim.AdamW]:
    model = make_model()
    optim = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optim.step()
    return model, optim


class Loader:
    """A Stateful that shows no memory, with an empty container in its state."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.given: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "cache": {}, "seen": {1: torch.ones(2)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given.append(state)
        self.position = state["position"]


@pytest_asyncio.fixture
async def engine(tmp_path: Path) -> AsyncIterator[CheckpointEngine]:
    async with CheckpointEngine(tmp_path) as engine:
        yield engine


async def save(engine: CheckpointEngine, state: dict[str, Any]) -> None:
    await engine.save(state, step=1)
    await engine.wait()


async def test_keys_of_a_module_leave_its_other_parameters_alone(engine: CheckpointEngine) -> None:
    model, optim = trained()
    await save(engine, {"model": model, "optim": optim, "epoch": 3})
    target = make_model()
    before = weight_of(target).clone()
    state: dict[str, Any] = {"model": target, "optim": torch.optim.AdamW(target.parameters()), "epoch": 0}
    report = await engine.load(state, keys=["model.2.*"])
    assert_same(target[2].state_dict(), model[2].state_dict())
    assert_same(weight_of(target), before)
    assert (state["optim"].state, state["epoch"]) == ({}, 0)
    assert (report.missing, report.unexpected, report.nbytes) == ((), (), 40)


async def test_strictness_is_about_what_is_asked_for(engine: CheckpointEngine) -> None:
    await save(engine, {"a": {"x": torch.ones(2), "old": 1}, "b": torch.ones(3)})
    state = {"a": {"x": torch.zeros(2), "new": 1}, "b": torch.zeros(4)}
    assert (await engine.load(state, keys="a.x")).missing == ()
    assert_same(state["a"]["x"], torch.ones(2))  # type: ignore[index]
    with pytest.raises(
        IncompatibleStateError, match=r"missing in the checkpoint: a\.new; not in the state: a\.old"
    ):
        await engine.load(state, keys=["a"])
    with pytest.raises(IncompatibleStateError, match="b is"):
        await engine.load(state, keys=["a.x", "b"])
    report = await engine.load(state, keys=["a"], strict=False)
    assert (report.missing, report.unexpected) == (("a.new",), ("a.old",))


async def test_a_leaf_of_a_list_is_loaded_by_its_index(engine: CheckpointEngine) -> None:
    await save(engine, {"l": [torch.ones(2), torch.ones(3), {"n": 1}]})
    state = {"l": [torch.zeros(2), torch.zeros(9), {"n": 0}]}
    await engine.load(state, keys=["l.[02]"])
    assert_same(state, {"l": [torch.ones(2), torch.zeros(9), {"n": 1}]})


async def test_a_wrapped_model_is_renamed_by_a_pattern_or_a_function(engine: CheckpointEngine) -> None:
    model, _ = trained()
    await save(engine, {"module": {"model": model, "loader": Loader(5)}})
    renames: list[dict[str, str] | Callable[[str], str]] = [
        {"module.*": "*"},
        lambda name: name.removeprefix("module."),
    ]
    for rename in renames:
        target, loader = make_model(), Loader(0)
        await engine.load({"model": target, "loader": loader}, rename=rename)
        assert_same(target.state_dict(), model.state_dict())
        assert_same(loader.given, [{"position": 5, "cache": {}, "seen": {1: torch.ones(2)}}])


async def test_keys_are_names_of_the_state_after_the_rename(engine: CheckpointEngine) -> None:
    model, _ = trained()
    await save(engine, {"net": {"module.encoder": model[0], "module.head": model[2]}})
    head = nn.Linear(4, 2)
    await engine.load({"head": head}, keys=["head"], rename={"net.module.*": "*"})
    assert_same(head.state_dict(), model[2].state_dict())


async def test_an_app_state_is_loaded_without_its_optimizers_and_the_other_way_round(
    engine: CheckpointEngine,
) -> None:
    model, optim = trained()
    await save(engine, {"app": AppState(model, optim)})
    target = make_model()
    other = torch.optim.AdamW(target.parameters(), lr=0.5)
    app = AppState(target, other)
    await engine.load({"app": app}, keys=["app.model"])
    assert_same(target.state_dict(), model.state_dict())
    assert (other.state, other.param_groups[0]["lr"]) == ({}, 0.5)
    with torch.no_grad():
        weight_of(target).zero_()
    await engine.load({"app": app}, keys=["app.optim.*"])
    assert_same(app.state_dict()["optim"], AppState(model, optim).state_dict()["optim"])
    assert not weight_of(target).any()


@pytest.mark.parametrize(
    ("key", "whole"),
    [
        ("app.optim.state", "app.optim"),
        ("optim.param_groups.*", "optim"),
        ("loader.position", "loader"),
        ("own.rank_0.position", "own"),
    ],
)
async def test_what_takes_its_state_whole_is_not_cut(engine: CheckpointEngine, key: str, whole: str) -> None:
    model, optim = trained()
    state = {
        "app": AppState(model, optim),
        "optim": optim,
        "loader": Loader(5),
        "own": PerRank({"loader": Loader(6), "position": 1}),
    }
    await save(engine, state)
    with pytest.raises(IncompatibleStateError, match=f"a part of '{whole}', which takes its state whole"):
        await engine.load(state, keys=[key])


async def test_objects_that_are_not_asked_for_are_not_called(engine: CheckpointEngine) -> None:
    await save(engine, {"a": Loader(5), "b": Loader(6), "rng": RNGState()})
    first, second = Loader(0), Loader(0)
    state = {"a": first, "b": second, "rng": RNGState()}
    generator = torch.get_rng_state()
    torch.rand(1)
    moved_on = torch.get_rng_state()
    await engine.load(state, keys=["a.*"])
    assert (first.position, second.given) == (5, [])
    assert_same(torch.get_rng_state(), moved_on)
    await engine.load(state, keys=["rng"])
    assert_same(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys": ["nope.*"]}, r"holds nothing that 'nope\.\*' of keys asks for; its names begin with a, b"),
        ({"keys": ["a.x", "b.z"]}, r"holds nothing that 'b\.z' of keys asks for"),
        ({"keys": ["b"]}, "not in the state: b"),
        ({"rename": {"module.*": "*"}}, r"nothing that 'module\.\*' of rename would rename"),
        ({"rename": {"b": "a.x"}}, r"rename makes 'a\.x' of both 'a\.x' and 'b'"),
        ({"rename": {"b": "a.x.y"}}, r"a\.x\.y would lie inside of another name"),
        ({"rename": {"a.x": "a.y"}}, r"missing in the checkpoint: a\.x"),
        ({"rename": lambda name: 1 / 0}, r"rename failed on 'a\.x' \(ZeroDivisionError: division by zero\)"),
        ({"rename": lambda name: None}, r"rename made None of 'a\.x'"),
        ({"rename": {"a.*": "*", "b": ""}}, "rename made '' of 'b'"),
    ],
)
async def test_a_request_that_can_not_be_met_is_one_error_and_nothing_is_loaded(
    engine: CheckpointEngine, arguments: dict[str, Any], message: str
) -> None:
    await save(engine, {"a": {"x": torch.ones(2), "n": 1}, "b": torch.ones(3)})
    state = {"a": {"x": torch.zeros(2), "n": 0}}
    with pytest.raises(IncompatibleStateError, match=f"{message}.*nothing was loaded"):
        await engine.load(state, **arguments)
    assert_same(state, {"a": {"x": torch.zeros(2), "n": 0}})


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"keys": []}, ValueError),
        ({"keys": [1]}, TypeError),
        ({"rename": 3}, TypeError),
        ({"rename": {"a": 1}}, TypeError),
        ({"rename": {"a.*": "b"}}, ValueError),
    ],
)
async def test_arguments_that_can_not_be_are_refused_before_anything_is_opened(
    engine: CheckpointEngine, arguments: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await engine.load({"a": 1}, **arguments)


async def test_stock_checkpoints_are_renamed_and_loaded_in_part(tmp_path: Path) -> None:
    model, _ = trained()
    stock = {"module": {"net": model.state_dict(), "loader": Loader(5).state_dict(), "l": [torch.ones(2), 3]}}
    dcp.save(stock, checkpoint_id=str(tmp_path / "s"), no_dist=True)
    target, loader = make_model(), Loader(0)
    state = {"net": target, "loader": loader, "l": [torch.zeros(2), 0]}
    async with CheckpointEngine(tmp_path) as engine:
        await engine.load(state, "s", rename={"module.*": "*"})
        assert_same(target.state_dict(), model.state_dict())
        assert_same(loader.given, [{"position": 5, "cache": {}, "seen": {1: torch.ones(2)}}])
        assert_same(state["l"], [torch.ones(2), 3])
        with torch.no_grad():
            weight_of(target).zero_()
        await engine.load(state, "s", keys=["net.2"], rename={"module.*": "*"})
        assert not weight_of(target).any()


async def test_read_takes_patterns(engine: CheckpointEngine) -> None:
    model, _ = trained()
    await save(engine, {"model": model, "a[0]": 1, "n": 2})
    assert_same(
        await engine.read(keys=["model.?.weight", "n"]),
        {"model": {name: value for name, value in model.state_dict().items() if "weight" in name}, "n": 2},
    )
    assert await engine.read(keys="a[0]") == {"a[0]": 1}
    with pytest.raises(LoadError, match=r"holds nothing named 'modle\.\*'"):
        await engine.read(keys=["n", "modle.*"])
