"""The checkpoint is the schema: a Stateful gets what it saved, whatever it holds now, and is asked only for
memory."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dcp_async import AppState, CheckpointEngine, IncompatibleStateError
from tests.support.doubles import assert_same, frozen


class Keeper:
    """Keeps whatever it is given; counts how often it is asked."""

    def __init__(self, kept: Any) -> None:
        self.kept = kept
        self.asked = 0
        self.given: Any = None

    def state_dict(self) -> Any:
        self.asked += 1
        return self.kept

    def load_state_dict(self, state: Any) -> None:
        self.given = state


def _large(seed: float) -> torch.Tensor:
    return torch.full((1 << 15,), seed)


CHANGES: dict[str, tuple[Any, Any]] = {
    "a list that was empty": ({"losses": []}, {"losses": [1.0, 2.0]}),
    "a list of tensors that was empty": ({"preds": []}, {"preds": [torch.ones(2), torch.zeros(3)]}),
    "None became a tensor": ({"best": None}, {"best": torch.ones(3)}),
    "None became a dict": ({"best": None}, {"best": {"score": torch.ones(1), "path": "a"}}),
    "None became a list of dicts": ({"buffer": None}, {"buffer": [{"x": torch.ones(1)}, {"x": 2}]}),
    "a dict with new keys": ({"a": 1}, {"a": 2, "b": 3, "c": {"d": torch.ones(2)}}),
    "a dict without some of its keys": ({"a": 1, "b": torch.ones(2), "c": {"d": 1}}, {"a": 2}),
    "a list that shrank": ({"l": [torch.ones(2), torch.ones(2)]}, {"l": [torch.zeros(2)]}),
    "a tensor became None": ({"best": torch.ones(3)}, {"best": None}),
    "a dict became None": ({"best": {"a": torch.ones(1), "b": 1}}, {"best": None}),
    "a tensor of another length": ({"rng": torch.zeros(4)}, {"rng": torch.arange(7.0)}),
    "a tensor of another rank": ({"rng": torch.zeros(())}, {"rng": torch.ones(2, 2)}),
    "a tensor of another dtype": ({"rng": torch.zeros(4)}, {"rng": torch.arange(4)}),
    "a number became a tensor": ({"lr": 0.1}, {"lr": torch.tensor(0.2)}),
    "a tensor became a number": ({"lr": torch.tensor(0.2)}, {"lr": 0.1}),
    "keys that are no text": ({"seen": {}}, {"seen": {3: torch.ones(1), (1, 2): "a"}}),
    "another kind of mapping": ({"c": {}}, {"c": collections.OrderedDict(a=1, b=torch.ones(1))}),
    "large tensors that are new": ({"cache": {}}, {"cache": {"k": _large(1.0), "v": _large(2.0)}}),
    "a large tensor that is shorter": ({"cache": _large(0.0)[:9]}, {"cache": _large(1.0)}),
    "an empty state": ({"a": 1}, {}),
    "a state that is no dict": ([], [torch.ones(2), {"a": 1}]),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("change", CHANGES, ids=lambda name: name.replace(" ", "_"))
async def test_a_stateful_gets_what_it_saved_whole(root: Path, change: str, strict: bool) -> None:
    before, after = copy.deepcopy(CHANGES[change])
    fresh = Keeper(before)
    async with CheckpointEngine(root) as engine:
        await engine.save({"thing": Keeper(after), "x": 1})
        await engine.wait()
        report = await engine.load({"thing": fresh, "x": 0}, strict=strict)
    assert_same(fresh.given, CHANGES[change][1])
    assert type(fresh.given) is type(after)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())


async def test_a_stateful_of_which_nothing_was_saved_is_not_called_and_reported(root: Path) -> None:
    fresh = Keeper({"n": 0, "t": torch.zeros(2)})
    async with CheckpointEngine(root) as engine:
        await engine.save({"x": 1})
        await engine.wait()
        with pytest.raises(IncompatibleStateError, match=r"missing in the checkpoint: thing\)"):
            await engine.load({"x": 0, "thing": fresh})
        report = await engine.load({"x": 0, "thing": fresh}, strict=False)
    assert report.missing == ("thing",)
    assert fresh.given is None
    assert fresh.asked == 2  # in each load, whether it has a state that is missing


async def test_large_tensors_that_fit_are_read_in_place(root: Path) -> None:
    fresh = Keeper({"big": _large(0.0), "other": _large(0.0)[:5], "n": 0})
    memory = fresh.kept["big"]
    async with CheckpointEngine(root) as engine:
        await engine.save({"thing": Keeper({"big": _large(3.0), "other": _large(4.0), "n": 1})})
        await engine.wait()
        await engine.load({"thing": fresh})
    assert fresh.asked == 1
    assert fresh.given["big"] is memory
    assert_same(memory, _large(3.0))
    assert_same(fresh.given["other"], _large(4.0))
    assert fresh.kept["other"].numel() == 5


async def test_a_tensor_that_the_object_holds_is_read_in_place_however_small(root: Path) -> None:
    class Holder:
        def __init__(self, value: float) -> None:
            self.weight = torch.full((3,), value)

        def state_dict(self) -> dict[str, Any]:
            return {"weight": self.weight}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            """The engine has filled it."""

    fresh = Holder(0.0)
    async with CheckpointEngine(root) as engine:
        await engine.save({"h": Holder(5.0)})
        await engine.wait()
        await engine.load({"h": fresh})
    assert_same(fresh.weight, torch.full((3,), 5.0))


# --- objects that are changed by being asked ----------------------------------------------------


class Started:
    """A loader as torchdata has it: to tell its position it starts, and then it ignores what it is given."""

    def __init__(self, extra: Callable[[], Any] | None = None) -> None:
        self.extra = extra
        self._epoch: Iterator[int] | None = None
        self._position = 0

    def __iter__(self) -> Iterator[int]:
        if self._epoch is None:
            self._epoch = iter(range(self._position, 10))
        for value in self._epoch:
            self._position = value + 1
            yield value

    def state_dict(self) -> dict[str, Any]:
        if self._epoch is None:
            self._epoch = iter(range(self._position, 10))
        state: dict[str, Any] = {"position": self._position, "deep": {"list": [1, {"a": 2}]}}
        return state | ({"extra": self.extra()} if self.extra else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._epoch is None:
            self._position = state["position"]


EXTRAS: dict[str, Callable[[], Any] | None] = {
    "numbers": None,
    "a generator's state": lambda: torch.Generator().get_state(),
    "a buffer of samples": lambda: [torch.ones(3), torch.ones(4)],
    "sets and bytes": lambda: {"seen": {1, 2}, "raw": b"abc"},
}


@pytest.mark.parametrize("extra", EXTRAS)
async def test_a_loader_that_is_changed_by_being_asked_is_not_asked(root: Path, extra: str) -> None:
    loader, fresh = Started(EXTRAS[extra]), Started(EXTRAS[extra])
    iterator = iter(loader)
    assert [next(iterator) for _ in range(4)] == [0, 1, 2, 3]
    async with CheckpointEngine(root) as engine:
        await engine.save({"data": loader, "nested": {"deep": [Keeper({"n": 1})]}})
        await engine.wait()
        keeper = Keeper({"n": 0})
        await engine.load({"data": fresh, "nested": {"deep": [keeper]}})
    assert list(fresh) == [4, 5, 6, 7, 8, 9]
    assert keeper.given == {"n": 1}
    assert keeper.asked == 0


class Two:
    """Gives objects as they are."""

    def __init__(self, n: int) -> None:
        self.loader, self.n = Keeper({"n": n, "grown": [n] * n}), n

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self.loader, "n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["loader"] is self.loader
        assert self.loader.given is not None, "the inner one comes first"
        self.n = state["n"]


async def test_objects_in_an_objects_state_get_theirs_before_it(root: Path) -> None:
    fresh = Two(0)
    async with CheckpointEngine(root) as engine:
        await engine.save({"two": Two(3)})
        await engine.wait()
        await engine.load({"two": fresh})
    assert fresh.loader.given == {"n": 3, "grown": [3, 3, 3]}
    assert fresh.n == 3


async def test_a_stateful_is_asked_once_however_many_checkpoints_are_tried(root: Path) -> None:
    fresh = Keeper({"big": _large(0.0)})
    async with CheckpointEngine(root) as engine:
        for step in (1, 2):
            await engine.save({"thing": Keeper({"big": _large(float(step))})}, step=step)
            await engine.wait()
        (file,) = (root / "step-00000002").glob("*.distcp")
        raw = bytearray(file.read_bytes())
        raw[2000] ^= 255
        file.write_bytes(bytes(raw))
        report = await engine.load({"thing": fresh})
    assert report.skipped == ("step-00000002",)
    assert fresh.asked == 1
    assert_same(fresh.given, {"big": _large(1.0)})


async def test_a_state_dict_that_fails_fails_the_load_before_the_first_byte(root: Path) -> None:
    class Broken(Keeper):
        def state_dict(self) -> Any:
            raise StopIteration("no more")

    weight = torch.zeros(2)
    async with CheckpointEngine(root) as engine:
        await engine.save({"w": torch.ones(2), "thing": Keeper({"big": _large(1.0)})})
        await engine.wait()
        with pytest.raises(IncompatibleStateError, match=r"thing: Broken.state_dict\(\) failed.*no more"):
            await engine.load({"w": weight, "thing": Broken(_large(0.0))})
        assert not weight.any()
        await engine.load({"w": weight}, strict=False)


# --- modules ------------------------------------------------------------------------------------


class Extra(nn.Module):
    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2))
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


EXTRA_STATES: dict[str, tuple[Any, Any]] = {
    "None became a tensor": (None, torch.ones(3)),
    "None became a dict": (None, {"amax": torch.ones(2), "n": 1}),
    "a dict with new keys": ({"n": 0}, {"n": 1, "amax": torch.ones(2)}),
    "a tensor of another length": (torch.empty(0), torch.ones(5)),
    "a list that was empty": ([], [torch.ones(1), 2]),
    "a dict became None": ({"n": torch.ones(2)}, None),
}


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "app"])
@pytest.mark.parametrize("change", EXTRA_STATES, ids=lambda name: name.replace(" ", "_"))
async def test_extra_state_is_replaced_whole(root: Path, change: str, wrapped: bool) -> None:
    before, after = copy.deepcopy(EXTRA_STATES[change])
    one, fresh = nn.Sequential(Extra(after)), nn.Sequential(Extra(before))
    pick = AppState if wrapped else lambda module: module
    async with CheckpointEngine(root) as engine:
        await engine.save({"m": pick(one)})
        await engine.wait()
        await engine.load({"m": pick(fresh)})
    assert_same(fresh.get_submodule("0").get_extra_state(), EXTRA_STATES[change][1])
    assert_same(fresh.get_parameter("0.weight").detach(), one.get_parameter("0.weight").detach())


class Observer(nn.Module):
    """Takes a buffer of any length, as a quantization observer does."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.register_buffer("min_val", torch.arange(float(length)))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **options: Any) -> None:
        self.min_val = torch.empty_like(state_dict[f"{prefix}min_val"])
        super()._load_from_state_dict(state_dict, prefix, *args, **options)


class Metric(nn.Module):
    """Has a list among its state, as a torchmetrics metric does."""

    def __init__(self, preds: list[torch.Tensor]) -> None:
        super().__init__()
        self.preds = preds

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        destination = super().state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        destination[f"{prefix}preds"] = list(self.preds)
        return destination

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.preds = state_dict.pop(f"{prefix}preds")


class Cache(nn.Module):
    """Makes its buffer when it is first needed; a hook makes it at a load."""

    def __init__(self, cache: torch.Tensor | None) -> None:
        super().__init__()
        self.register_buffer("cache", cache)

        def make(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
            module.cache = torch.empty_like(state_dict[f"{prefix}cache"])

        hooked: Any = self  # torch has no annotation
        hooked.register_load_state_dict_pre_hook(make)


RESIZING: dict[str, Callable[[], tuple[nn.Module, nn.Module]]] = {
    "an override": lambda: (Observer(4), Observer(0)),
    "an override that shrinks": lambda: (Observer(1), Observer(3)),
    "a list": lambda: (Metric([torch.ones(2), torch.ones(3)]), Metric([])),
    "a list that shrinks": lambda: (Metric([]), Metric([torch.ones(2)])),
    "a hook": lambda: (Cache(torch.ones(3)), Cache(None)),
    "torch's observer": lambda: (
        _observed(torch.ao.quantization.PerChannelMinMaxObserver()),
        torch.ao.quantization.PerChannelMinMaxObserver(),
    ),
}


def _observed(observer: nn.Module) -> nn.Module:
    observer(torch.randn(3, 4))
    return observer


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "app"])
@pytest.mark.parametrize("way", RESIZING, ids=lambda name: name.replace(" ", "_"))
async def test_a_module_that_resizes_by_itself_may(root: Path, way: str, wrapped: bool) -> None:
    inner, inner_fresh = RESIZING[way]()
    one, fresh = nn.Sequential(nn.Linear(2, 2), inner), nn.Sequential(nn.Linear(2, 2), inner_fresh)
    pick = AppState if wrapped else lambda module: module
    async with CheckpointEngine(root) as engine:
        await engine.save({"m": pick(one)})
        await engine.wait()
        await engine.load({"m": pick(fresh)})
    assert_same(frozen(fresh), frozen(one))


STRICT: dict[str, Callable[[int], nn.Module]] = {
    "Linear": lambda n: nn.Linear(n, 2),
    "BatchNorm": lambda n: nn.BatchNorm1d(n),  # overrides _load_from_state_dict, and resizes nothing
    "weight_norm": lambda n: torch.nn.utils.parametrizations.weight_norm(nn.Linear(n, 2)),
    "Embedding": lambda n: nn.Embedding(n, 2),
}


@pytest.mark.parametrize("kind", STRICT)
async def test_other_modules_keep_names_and_shapes(root: Path, kind: str) -> None:
    one, fresh = (
        nn.Sequential(nn.Linear(2, 2), STRICT[kind](3)),
        nn.Sequential(nn.Linear(2, 2), STRICT[kind](4)),
    )
    before = frozen(fresh)
    async with CheckpointEngine(root) as engine:
        await engine.save({"m": one})
        await engine.wait()
        with pytest.raises(IncompatibleStateError, match=r"m\.1\..* in the state.*nothing was loaded"):
            await engine.load({"m": fresh})
        with pytest.raises(IncompatibleStateError, match=r"missing in the checkpoint: m\.2\.weight"):
            await engine.load({"m": nn.Sequential(*one, nn.Linear(2, 2))})
    assert_same(frozen(fresh), before)


class View:
    """A model and an optimizer as DCP's tutorial has them."""

    def __init__(self, width: int, *, steps: int = 1) -> None:
        self.model = nn.Sequential(nn.Linear(2, width))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        for _ in range(steps):
            self.model(torch.randn(3, 2)).sum().backward()
            self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optim": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optim"])


async def test_a_view_of_a_model_keeps_its_names_and_shapes(root: Path) -> None:
    one, same, wider, deeper = View(2), View(2, steps=0), View(3), View(2)
    deeper.model.append(nn.Linear(2, 2))
    before = frozen(wider.model)
    weight = same.model[0].weight
    async with CheckpointEngine(root) as engine:
        await engine.save({"view": one})
        await engine.wait()
        await engine.load({"view": same})
        with pytest.raises(IncompatibleStateError, match=r"view\.model\.0\.weight is \(3, 2\).*nothing was"):
            await engine.load({"view": wider})
        report = await engine.load({"view": deeper}, strict=False)
    assert report.missing == ("view.model.1.bias", "view.model.1.weight")
    assert_same(deeper.model[0].weight, one.model[0].weight)
    assert same.model[0].weight is weight
    assert_same(same.state_dict(), one.state_dict())
    assert_same(frozen(wider.model), before)


# --- optimizers ---------------------------------------------------------------------------------


def _trained(make: Callable[[Any], torch.optim.Optimizer], steps: int) -> torch.optim.Optimizer:
    torch.manual_seed(1)
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())

    def loss() -> Any:
        optimizer.zero_grad()
        value = model(torch.ones(2, 3)).square().sum()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)
    return optimizer


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, amsgrad=True),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, lr=0.1),
    "ASGD": lambda parameters: torch.optim.ASGD(parameters, lr=0.1),
}


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("kind", OPTIMIZERS)
async def test_an_optimizer_takes_what_it_had_grown(root: Path, kind: str, steps: int) -> None:
    one, fresh = _trained(OPTIMIZERS[kind], 3), _trained(OPTIMIZERS[kind], steps)
    async with CheckpointEngine(root) as engine:
        await engine.save({"optim": one})
        await engine.wait()
        await engine.load({"optim": fresh})
    assert_same(fresh.state_dict(), one.state_dict())


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.5, total_steps=9),
    "CyclicLR": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.5, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("kind", SCHEDULERS)
async def test_options_that_a_scheduler_put_into_the_groups_come_back(root: Path, kind: str) -> None:
    one, fresh = _trained(OPTIMIZERS["AdamW"], 2), _trained(OPTIMIZERS["AdamW"], 0)
    SCHEDULERS[kind](one)
    async with CheckpointEngine(root) as engine:
        await engine.save({"optim": one})
        await engine.wait()
        report = await engine.load({"optim": fresh})
    assert report.unexpected == report.missing == ()
    assert_same(fresh.state_dict(), one.state_dict())


async def test_options_that_were_not_saved_stay_and_are_reported(root: Path) -> None:
    one, fresh = _trained(OPTIMIZERS["AdamW"], 2), _trained(OPTIMIZERS["AdamW"], 0)
    del one.param_groups[0]["decoupled_weight_decay"]
    one.param_groups[0]["future"] = {"a": torch.ones(2)}
    SCHEDULERS["StepLR"](fresh)
    async with CheckpointEngine(root) as engine:
        await engine.save({"optim": one})
        await engine.wait()
        report = await engine.load({"optim": fresh})
    assert report.missing == (
        "optim.param_groups.0.decoupled_weight_decay",
        "optim.param_groups.0.initial_lr",
    )
    assert fresh.param_groups[0]["decoupled_weight_decay"] is True
    assert_same(fresh.param_groups[0]["future"], {"a": torch.ones(2)})


async def test_a_group_of_other_parameters_is_refused_before_the_first_byte(root: Path) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    groups: list[dict[str, Any]] = [{"params": [other.weight]}, {"params": [other.bias]}]
    fresh = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    async with CheckpointEngine(root) as engine:
        await engine.save({"optim": torch.optim.SGD(model.parameters(), lr=0.5)})
        await engine.wait()
        with pytest.raises(IncompatibleStateError, match=r"optim\.param_groups\.1"):
            await engine.load({"optim": fresh})
    assert fresh.param_groups[0]["lr"] == 0.1
