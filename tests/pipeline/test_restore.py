"""What was read goes back to the objects of the trainer, whatever they are made of, or not at all."""

from __future__ import annotations

import enum
import types
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_async import (
    AppState,
    CheckpointEngine,
    CorruptCheckpointError,
    IncompatibleStateError,
    LoadError,
    SaveError,
    Trust,
    UntrustedCheckpointError,
)
from tests.support.doubles import assert_same, flip, frozen, written_unchecked


class Trainer:
    """Gives its parts as they are, as many trainers do."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = nn.Linear(3, 3)
        self.optim = torch.optim.Adam(self.model.parameters(), lr=0.1 * (seed + 1))
        self.epoch = seed

    def step(self) -> None:
        self.model(torch.ones(2, 3)).sum().backward()
        self.optim.step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model, "optim": self.optim, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]


async def test_statefuls_inside_of_a_statefuls_state_take_theirs(root: Path) -> None:
    one, other = Trainer(1), Trainer(2)
    one.step()
    async with CheckpointEngine(root) as engine:
        await engine.save({"trainer": one})
        await engine.wait()
        await engine.load({"trainer": other})
    assert other.epoch == 1
    assert_same(frozen(other.model), frozen(one.model))
    assert_same(frozen(other.optim), frozen(one.optim))


class WithEpoch(AppState):
    """The usual way to keep more beside the model."""

    epoch = 0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch = state["epoch"]
        super().load_state_dict(state)


async def test_what_a_subclass_of_app_state_adds_is_saved(root: Path) -> None:
    model = nn.Linear(2, 2)
    app = WithEpoch(model, torch.optim.Adam(model.parameters()))
    app.epoch = 9
    async with CheckpointEngine(root) as engine:
        await engine.save({"app": app})
        assert app.optimizers[0].state_dict()["state"] == {}, "saving made up a state"
        await engine.wait()
        app.epoch = -1
        await engine.load({"app": app})
    assert app.epoch == 9


async def test_saving_changes_no_optimizer_whose_first_group_is_empty(root: Path) -> None:
    model = nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [{"params": []}, {"params": list(model.parameters())}]
    optim = torch.optim.Adam(groups)
    async with CheckpointEngine(root) as engine:
        await engine.save({"app": AppState(model, optim)})
    assert not optim.state


class Colour(enum.Enum):
    RED = 1


class Cache:
    def __init__(self, **entries: Any) -> None:
        self.weight = torch.ones(3)
        self.entries: dict[Any, Any] = dict(entries)

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "entries": self.entries}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.entries = state["entries"]


@pytest.mark.parametrize("atomic", [False, True])
async def test_trust_in_keys_is_decided_before_a_target_is_touched(root: Path, atomic: bool) -> None:
    saved, other = Cache(), Cache()
    saved.entries[Colour.RED] = torch.ones(2)
    other.weight.zero_()
    await written_unchecked(root, {"cache": saved})
    async with CheckpointEngine(root) as engine:
        with pytest.raises(UntrustedCheckpointError, match=r"Colour.*nothing was loaded"):
            await engine.load({"cache": other}, atomic=atomic)
        assert not other.weight.any()
    async with CheckpointEngine(root, trust=Trust(safe_globals=(Colour,))) as engine:
        await engine.load({"cache": other}, atomic=atomic)
    assert list(other.entries) == [Colour.RED]


def break_data(directory: Path) -> None:
    (file,) = directory.glob("*.distcp")
    flip(file, file.stat().st_size // 3)


async def test_a_state_that_was_overwritten_by_an_older_corrupt_one_is_said_to_be(root: Path) -> None:
    state = {"x": torch.ones(1 << 16)}
    async with CheckpointEngine(root) as engine:
        for step in (1, 2):
            await engine.save(state, step=step)
            await engine.wait()
        flip(root / "step-00000002" / ".metadata", 40)
        break_data(root / "step-00000001")
        with pytest.raises(CorruptCheckpointError) as caught:
            await engine.load(state)
    assert caught.value.partially_loaded


async def test_an_untrusted_older_one_does_not_deny_what_a_corrupt_one_has_done(root: Path) -> None:
    await written_unchecked(root, {"x": torch.ones(1 << 16), "y": Colour.RED})
    async with CheckpointEngine(root) as engine:
        await engine.save({"x": torch.ones(1 << 16), "y": 1}, step=2)
        await engine.wait()
        break_data(root / "step-00000002")
        with pytest.raises(CorruptCheckpointError, match="Colour") as caught:
            await engine.load({"x": torch.zeros(1 << 16), "y": 0})
    assert caught.value.partially_loaded


@pytest.mark.parametrize("atomic", [False, True])
async def test_an_optimizer_with_other_groups_is_refused_before_the_model_is_touched(
    root: Path, atomic: bool
) -> None:
    model = nn.Linear(2, 2)
    async with CheckpointEngine(root) as engine:
        await engine.save({"model": model, "optim": torch.optim.SGD(model.parameters(), lr=0.1)})
        await engine.wait()
        other = nn.Linear(2, 2)
        before = frozen(other)
        optim = torch.optim.SGD([other.weight], lr=0.1)
        with pytest.raises(IncompatibleStateError, match="group 0 has 1 parameters, 2 in the checkpoint"):
            await engine.load({"model": other, "optim": optim}, atomic=atomic)
    assert_same(frozen(other), before)


async def test_a_container_that_can_not_be_assigned_to_is_refused_before_anything_is_touched(
    root: Path,
) -> None:
    weight = torch.ones(2)
    async with CheckpointEngine(root) as engine:
        await engine.save({"x": {"weight": weight, "n": 1}})
        await engine.wait()
        weight.zero_()
        with pytest.raises(IncompatibleStateError, match=r"x is a mappingproxy, .* holds 'n'"):
            await engine.load({"x": types.MappingProxyType({"weight": weight, "n": 0})})
        assert not weight.any()
        await engine.load({"x": types.MappingProxyType({"weight": weight})}, strict=False)
    assert weight.all()


class Live(MutableMapping[str, Any]):
    """A mapping whose copy.copy() shares what is inside of it."""

    def __init__(self) -> None:
        self.inner: dict[str, Any] = {"n": 0}

    def __getitem__(self, key: str) -> Any:
        return self.inner[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.inner[key] = value

    def __delitem__(self, key: str) -> None:
        del self.inner[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


class Refuses:
    def __init__(self) -> None:
        self.live = Live()

    def state_dict(self) -> Live:
        return self.live

    def load_state_dict(self, state: Any) -> None:
        raise RuntimeError("not today")


async def test_a_stateful_that_refuses_keeps_its_own_mapping_as_it_was(root: Path) -> None:
    target = Refuses()
    async with CheckpointEngine(root) as engine:
        await engine.save({"x": {"n": 5}})
        await engine.wait()
        with pytest.raises(LoadError, match=r"refused it, its tensors overwritten already: .*not today"):
            await engine.load({"x": target})
    assert target.live.inner == {"n": 0}


@pytest.mark.parametrize(
    "key",
    [frozenset({"a", "b"}), torch.ones(1), (1, frozenset({2})), object()],
    ids=["frozenset", "tensor", "tuple", "object"],
)
async def test_keys_whose_text_differs_in_each_process_are_refused(root: Path, key: Any) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match="another str\\(\\) in each process"):
            await engine.save({"m": {key: 1}})


async def test_a_wrappers_name_in_a_module_of_ones_own_is_a_name_like_any_other(root: Path) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.module = nn.Linear(2, 2)

    saved = Own()
    async with CheckpointEngine(root) as engine:
        await engine.save(
            {"m": {name: value for name, value in saved.state_dict().items() if name != "weight"}}
        )
        await engine.wait()
        with torch.device("meta"):
            model = Own()
        report = await engine.load({"m": model}, strict=False)
    assert report.missing == ("m.weight",)
    assert model.weight.is_meta
    assert torch.equal(model.module.weight, saved.module.weight)


async def test_reading_many_keys_costs_no_more_than_reading_all(root: Path) -> None:
    """Counted in steps of the tree, not in seconds: each name is looked at once."""
    from dcp_async.formats import tree as structure

    tree = structure.mapping_node("dict", ((f"k{index}", None) for index in range(2000)))
    asked = [f"k{index}" for index in range(0, 2000, 2)]
    joins = 0
    original = structure.child_name

    def counting(name: str | None, key: object) -> str:
        nonlocal joins
        joins += 1
        return original(name, key)

    structure.child_name = counting
    try:
        kept, found = structure.pruned(tree, asked)
    finally:
        structure.child_name = original
    assert found == set(asked)
    assert len(structure.children_of(kept)) == 1000
    assert joins <= 2000
