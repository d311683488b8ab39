"""What a load would refuse for want of trust is refused by the save already, with the line that admits it;
what is admitted by default is saved without one."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import enum
import logging
import types
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import AdamW

from dcp_async import CheckpointEngine, SaveError, Trust, UntrustedCheckpointError, sync
from tests.property.states import Marked
from tests.support.doubles import assert_same, committed


class Stage(enum.Enum):
    WARM = 1


class Switch(enum.Flag):
    ON = 1


@dataclasses.dataclass
class Arguments:
    lr: float
    stage: Stage = Stage.WARM


class Bounds(NamedTuple):
    low: int
    high: int


class Config(dict[str, Any]):
    pass


class Failing(Exception):
    """As many are written: what it is pickled with is not what it is made with."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")


def schedule(step: int) -> float:
    return 1 / step


def _objects(*values: Any) -> Any:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def _with_attribute() -> torch.Tensor:
    parameter = nn.Parameter(torch.eye(2).to_sparse())
    parameter.owner = Stage.WARM  # type: ignore[attr-defined]  # an attribute of the user's
    return parameter


HERE = __name__
REFUSED: dict[str, tuple[Callable[[], Any], tuple[str, ...], tuple[Any, ...]]] = {
    "argparse.Namespace": (
        lambda: argparse.Namespace(lr=0.1), ("argparse.Namespace",), (argparse.Namespace,)
    ),
    "dataclass that holds an enum": (
        lambda: Arguments(0.1), (f"{HERE}.Arguments", f"{HERE}.Stage"), (Arguments, Stage)
    ),
    "enum": (lambda: Stage.WARM, (f"{HERE}.Stage",), (Stage,)),
    "flag": (lambda: Switch.ON, (f"{HERE}.Switch",), (Switch,)),
    "named tuple": (lambda: Bounds(1, 2), (f"{HERE}.Bounds",), (Bounds,)),
    "class in hyperparameters": (
        lambda: {"optimizer": AdamW, "lr": 0.1}, ("torch.optim.adamw.AdamW",), (AdamW,)
    ),
    "function": (lambda: schedule, (f"{HERE}.schedule",), (schedule,)),
    "array of objects": (lambda: _objects(Stage.WARM, 1), (f"{HERE}.Stage",), (Stage,)),
    "dict of one's own in a tuple": (lambda: (Config(a=1),), (f"{HERE}.Config",), (Config,)),
    "tensor of one's own": (
        lambda: torch.ones(2).as_subclass(Marked), ("tests.property.states.Marked",), (Marked,)
    ),
    "tensor with an attribute": (_with_attribute, (f"{HERE}.Stage",), (Stage,)),
    "logger": (lambda: logging.getLogger("run"), ("logging.getLogger",), (logging.getLogger,)),
}  # fmt: skip
UNLISTABLE: dict[str, Callable[[], Any]] = {
    "time zone": lambda: zoneinfo.ZoneInfo("UTC"),
    "bound method": lambda: [1].append,
    "default_factory of one's own": lambda: (collections.defaultdict(Config, a=Config()),),
}
HOLDERS: dict[str, Callable[[Any], Any]] = {
    "leaf": lambda value: value,
    "deep": lambda value: {"a": [{"b": value}, torch.ones(1)]},
    "in a Stateful": lambda value: Holder({"inner": value}),
}
ADMITTED: dict[str, Callable[[], Any]] = {
    "namespace": lambda: types.SimpleNamespace(a=1),
    "scalars": lambda: (1j, None, np.bool_(True), np.str_("a"), np.int8(1), np.complex128(1j), [torch.int8]),
    "random state": lambda: np.random.RandomState(0).get_state(),
    "array of numbers": lambda: (np.arange(3.0), np.float32(1), np.array([(1, 2.0)], "i4,f8")),
    "array of texts as objects": lambda: _objects("a", 1),
    "dates": lambda: (datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), datetime.timedelta(1)),
    "sets and deques": lambda: ({1, "a"}, frozenset({2}), collections.deque([1], maxlen=3)),
    "ordered": lambda: (collections.OrderedDict(a=1), collections.Counter(a=1)),
    "dtype, device, size": lambda: (torch.float32, torch.device("cpu"), torch.Size([1])),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "tuple with tensors": lambda: (torch.ones(2), nn.Parameter(torch.zeros(1))),
}


class Holder:
    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state


@pytest.mark.parametrize("case", REFUSED)
async def test_what_a_load_would_refuse_is_refused_by_name_with_what_admits_it(root: Path, case: str) -> None:
    make, names, admitted = REFUSED[case]
    async with CheckpointEngine(root) as engine:
        for place, hold in HOLDERS.items():
            with pytest.raises(SaveError) as caught:
                await engine.save({"w": torch.ones(1), place: hold(make())})
            text = str(caught.value)
            assert f"Trust(safe_globals=({', '.join(names)},))" in text
            assert place in text
        assert committed(root) == []
    async with CheckpointEngine(root, trust=Trust(safe_globals=admitted)) as engine:
        await (await engine.save({place: hold(make()) for place, hold in HOLDERS.items()})).upload_completion
        await engine.read()


@pytest.mark.parametrize("case", ADMITTED)
async def test_what_a_load_admits_is_saved(root: Path, case: str) -> None:
    async with CheckpointEngine(root) as engine:
        for step in range(3):
            await (await engine.save({"x": ADMITTED[case]()}, step=step)).upload_completion
        await engine.read()


async def test_a_leaf_that_changes_its_class_between_saves_is_refused(root: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(1), "x": (np.float64(1), "a")}
    async with CheckpointEngine(root) as engine:
        for step in range(2):
            await (await engine.save(state, step=step)).upload_completion
        for step, value in enumerate(
            [(Stage.WARM, "a"), (np.float64, Stage), (_objects(Stage.WARM), "a")], 2
        ):
            state["x"] = value
            with pytest.raises(SaveError, match=r"x: a tuple .*Stage"):
                await engine.save(state, step=step)
        state["x"] = (np.float64(2), "b")
        await (await engine.save(state, step=9)).upload_completion
        assert_same(await engine.read(9), state)


@pytest.mark.parametrize("key", [Stage.WARM, (1, Stage.WARM), frozenset({Stage}), Bounds(1, 2)])
async def test_a_key_that_a_load_would_refuse_is_refused(root: Path, key: Any) -> None:
    name = type(key).__name__ if isinstance(key, Bounds) else "Stage"
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=rf"m\..*{name}|has another str"):
            await engine.save({"m": {key: torch.ones(1)}})
    if not isinstance(key, frozenset):
        async with CheckpointEngine(root, trust=Trust(safe_globals=(Stage, Bounds))) as engine:
            await (await engine.save({"m": {key: torch.ones(1)}})).upload_completion
            assert list((await engine.read())["m"]) == [key]


@pytest.mark.parametrize("case", UNLISTABLE)
async def test_what_no_list_should_admit_is_said_to_be_so(root: Path, case: str) -> None:
    trust = Trust(safe_globals=(Config, zoneinfo.ZoneInfo))
    async with CheckpointEngine(root, trust=trust) as engine:
        with pytest.raises(SaveError, match=r"x: a .*no list should admit.*Trust\(unsafe=True\)"):
            await engine.save({"x": UNLISTABLE[case]()})


async def test_what_can_be_pickled_but_not_made_again_is_refused(root: Path) -> None:
    async with CheckpointEngine(root, trust=Trust(safe_globals=(Failing,))) as engine:
        with pytest.raises(SaveError, match="last: a Failing can be pickled, but not unpickled again"):
            await engine.save({"last": Failing(1, "x")})


async def test_unsafe_trust_saves_everything(root: Path) -> None:
    async with CheckpointEngine(root, trust=Trust(unsafe=True)) as engine:
        state = {"failing": Failing(1, "x"), "zone": zoneinfo.ZoneInfo("UTC"), Stage.WARM.name: Stage.WARM}
        await (await engine.save({"a": state, "m": {Stage.WARM: torch.ones(1)}})).upload_completion
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError):
            await engine.read()


@pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning")
@pytest.mark.parametrize("freed", ["tuple", "tensor"])
async def test_a_freed_tensor_inside_of_a_leaf_is_refused(root: Path, freed: str) -> None:
    tensor = torch.zeros(4, dtype=torch.complex32) if freed == "tensor" else torch.ones(4)
    state: dict[str, Any] = {"x": tensor if freed == "tensor" else (1, tensor)}
    async with CheckpointEngine(root) as engine:
        for step in range(2):
            await (await engine.save(state, step=step)).upload_completion
        tensor.untyped_storage().resize_(0)
        with pytest.raises(SaveError, match=r"x: .*its storage was freed"):
            await engine.save(state, step=2)


def test_the_check_runs_nothing_of_the_leaf_without_trust(tmp_path: Path) -> None:
    mark = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return Path.touch, (mark,)

    with sync.CheckpointEngine(tmp_path / "run") as engine, pytest.raises(SaveError):
        engine.save({"x": Bomb()})
    assert not mark.exists()
