"""An AppState's optimizers, and bare ones, take back just what was saved, or the load says what does not fit
before it touches anything."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.optim import AdamW, Optimizer

from dcp_async import AppState, CheckpointEngine, IncompatibleStateError, LoadError, SaveError
from tests.support.doubles import assert_same, frozen

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
LAYERS = ("a", "b", "c", "d")

Groups = Callable[[nn.ModuleDict], list[dict[str, Any]]]


def one_group(model: nn.ModuleDict) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def build(seed: int, groups: Groups = one_group, make: Callable[..., Optimizer] = AdamW) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    model = nn.ModuleDict({name: nn.Linear(3, 3) for name in LAYERS})
    return model, make(groups(model), lr=0.1)


def step(model: Any, optim: Any, layers: Iterable[str] = LAYERS) -> None:
    optim.zero_grad()
    for name in layers:
        model[name](torch.arange(3.0)).square().sum().backward()
    optim.step()


async def handed_over(root: Path, saved: dict[str, Any], loaded: dict[str, Any], **options: Any) -> Any:
    async with CheckpointEngine(root) as engine:
        await (await engine.save(saved)).upload_completion
        return await engine.load(loaded, **options)


def assert_equal(one: tuple[Any, Any], other: tuple[Any, Any]) -> None:
    assert_same(frozen(other[0]), frozen(one[0]))
    assert_same(frozen(other[1]), frozen(one[1]))


# --- entries --------------------------------------------------------------------------------------


def freeze(model: Any, names: Iterable[str]) -> None:
    for name in names:
        model[name].requires_grad_(False)


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("where", ["both", "only here", "only there"])
async def test_moments_of_parameters_that_are_frozen_now_come_back(
    root: Path, taken: int, options: Any, where: str
) -> None:
    one, other = build(1), build(2)
    step(*one)
    if where != "only there":
        freeze(one[0], "ab")
    for _ in range(taken):
        step(*other)
    if where != "only here":
        freeze(other[0], "ab")
    report = await handed_over(
        root, {"app": AppState(*one, options=options)}, {"app": AppState(*other, options=options)}
    )
    assert (report.missing, report.unexpected) == ((), ())
    assert len(other[1].state) == 8
    assert_equal(one, other)


@pytest.mark.parametrize("taken", [(), ("a",), LAYERS])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
async def test_a_parameter_without_a_gradient_gets_no_state(
    root: Path, taken: tuple[str, ...], strict: bool, options: Any
) -> None:
    one, other = build(1), build(2)
    step(*one, "bc")
    if taken:
        step(*other, taken)
    await handed_over(
        root,
        {"app": AppState(*one, options=options)},
        {"app": AppState(*other, options=options)},
        strict=strict,
    )
    assert len(other[1].state) == 4
    assert_equal(one, other)
    for run in (one, other):
        step(*run)
    assert_equal(one, other)


class OddMoments(Optimizer):
    """Keeps float32 beside bfloat16 parameters, text, nested values, and something of its own."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # no loss is asked for
        for group in self.param_groups:
            for weight in group["params"]:
                entry = self.state[weight]
                entry["step"] = entry.get("step", 0) + 1
                entry["master"] = torch.full(weight.shape, 1 + 2**-12)
                entry["half"] = torch.full(weight.shape, 0.5, dtype=torch.float16)
                entry["mode"] = "warm"
                entry["blocks"] = {0: torch.full((2,), 1 + 2**-12), "left": [1.5, 2]}


def build_odd(seed: int) -> tuple[Any, Any]:
    model, optim = build(seed, make=OddMoments)
    model.to(torch.bfloat16)
    return model, optim


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("taken", [0, 1])
async def test_entries_keep_their_dtypes_and_kinds(root: Path, bare: bool, taken: int) -> None:
    one, other = build_odd(1), build_odd(2)
    one[1].step()
    if taken:
        other[1].step()
        for entry in other[1].state.values():
            entry["master"].zero_()

    def state(run: tuple[Any, Any]) -> dict[str, Any]:
        return {"model": run[0], "optim": run[1]} if bare else {"app": AppState(*run)}

    await handed_over(root, state(one), state(other))
    entry = other[1].state[other[0]["a"].weight]
    assert {key: getattr(value, "dtype", value) for key, value in entry.items() if key != "blocks"} == {
        "step": 1,
        "master": torch.float32,
        "half": torch.float16,
        "mode": "warm",
    }
    assert_equal(one, other)


async def test_what_an_optimizer_keeps_of_its_own_comes_back(root: Path) -> None:
    one, other = build(1), build(2)
    step(*one)
    one[1].state["rounds"] = {"count": 3, "mean": torch.ones(2)}
    await handed_over(root, {"app": AppState(*one)}, {"app": AppState(*other)})
    assert_same(dict(other[1].state["rounds"]), {"count": 3, "mean": torch.ones(2)})


class WithExtra(AdamW):
    """Its ``state_dict()`` has a part that the base class knows nothing of."""

    seen = 0

    def state_dict(self) -> Any:
        return {**super().state_dict(), "seen": self.seen}

    def load_state_dict(self, state_dict: Any) -> None:
        self.seen = state_dict["seen"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "seen"})


async def test_a_further_part_of_an_optimizers_state_comes_back(root: Path) -> None:
    one, other = build(1, make=WithExtra), build(2, make=WithExtra)
    step(*one)
    one[1].seen = 7
    await handed_over(root, {"app": AppState(*one)}, {"app": AppState(*other)})
    assert other[1].seen == 7
    assert_equal(one, other)


async def test_shared_parameters_have_one_entry(root: Path) -> None:
    def shared(seed: int) -> tuple[Any, Any]:
        model, _ = build(seed)
        model["d"].weight = model["a"].weight
        return model, AdamW(model.parameters(), lr=0.1)

    one, other = shared(1), shared(2)
    step(*one)
    await handed_over(root, {"app": AppState(*one)}, {"app": AppState(*other)})
    assert_equal(one, other)
    assert other[0]["d"].weight is other[0]["a"].weight


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
async def test_a_parameter_that_is_twice_in_a_group_comes_back(root: Path) -> None:
    def twice(model: nn.ModuleDict) -> list[dict[str, Any]]:
        weights = list(model.parameters())
        return [{"params": [weights[0], *weights]}]

    one, other = build(1, twice), build(2, twice)
    step(*one)
    await handed_over(root, {"app": AppState(*one)}, {"app": AppState(*other)})
    assert_equal(one, other)


# --- groups ---------------------------------------------------------------------------------------


def with_empty(*at: int) -> Groups:
    """One group per layer, and empty ones at these places, each with an option of its own."""

    def groups(model: nn.ModuleDict) -> list[dict[str, Any]]:
        made = [{"params": list(model[name].parameters()), "lr": 0.01} for name in LAYERS]
        for place in at:
            made.insert(place, {"params": [], "lr": 0.5 + place, "betas": (0.5, 0.6)})
        return made

    return groups


@pytest.mark.parametrize("at", [(0,), (2,), (4,), (0, 3), (1, 2, 6)])
@pytest.mark.parametrize("taken", [0, 1])
async def test_groups_without_parameters_come_back(root: Path, at: tuple[int, ...], taken: int) -> None:
    one, other = build(1, with_empty(*at)), build(2, with_empty(*at))
    step(*one)
    for group in one[1].param_groups:
        group["lr"] *= 0.5
    for _ in range(taken):
        step(*other)
    await handed_over(root, {"app": AppState(*one)}, {"app": AppState(*other)})
    assert_equal(one, other)
    for run in (one, other):
        step(*run)
    assert_equal(one, other)


async def test_a_flat_state_refuses_a_group_without_parameters(root: Path) -> None:
    run = build(1, with_empty(1))
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"group 1 has no parameters"):
            await engine.save({"app": AppState(*run, options=FLAT)})


def per_layer(names: Iterable[str]) -> Groups:
    def groups(model: nn.ModuleDict) -> list[dict[str, Any]]:
        return [
            {"params": list(model[name].parameters()), "lr": 0.1 * (1 + LAYERS.index(name))} for name in names
        ]

    return groups


@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
@pytest.mark.parametrize("order", ["abcd", "dcba", "bcad"])
async def test_groups_and_parameters_in_another_order_get_their_own(
    root: Path, order: str, options: Any
) -> None:
    def reordered(model: nn.ModuleDict) -> list[dict[str, Any]]:
        return [{"params": list(model[name].parameters())[::-1], "lr": 9.0} for name in order]

    one, other = build(1, per_layer(LAYERS)), build(2, reordered)
    step(*one)
    step(*other)
    await handed_over(
        root, {"app": AppState(*one, options=options)}, {"app": AppState(*other, options=options)}
    )
    assert [group["lr"] for group in other[1].param_groups] == [
        0.1 * (1 + LAYERS.index(name)) for name in order
    ]
    for weight, mine in zip(other[0].parameters(), one[0].parameters(), strict=True):
        assert_same(frozen(other[1].state[weight]), frozen(one[1].state[mine]))


def moved(model: nn.ModuleDict) -> list[dict[str, Any]]:
    weights = list(model.parameters())
    return [{"params": weights[:3]}, {"params": weights[3:]}]


def all_but(*gone: str) -> Groups:
    return lambda model: [
        {"params": [weight for name, weight in model.named_parameters() if name not in gone]}
    ]


def halves(model: nn.ModuleDict) -> list[dict[str, Any]]:
    weights = list(model.parameters())
    return [{"params": weights[:4], "lr": 0.2}, {"params": weights[4:], "lr": 0.3}]


MISFITS: dict[str, tuple[Groups, Groups, str]] = {
    "a parameter moved to another group": (halves, moved, r"group"),
    "a parameter is gone here": (one_group, all_but("b.weight"), r"b\.weight"),
    "a parameter is new here": (all_but("b.weight"), one_group, r"b\.weight"),
    "the groups were joined": (halves, one_group, r"app"),
    "a group was split": (one_group, halves, r"app"),
    "an empty group is new here": (per_layer("abcd"), with_empty(0), r"app"),
    "an empty group is gone here": (with_empty(0), per_layer("abcd"), r"app"),
    "other parameters, as many": (all_but("b.weight"), all_but("c.weight"), r"[bc]\.weight"),
}


@pytest.mark.parametrize("kind", MISFITS)
async def test_a_state_of_other_groups_is_refused_by_name_and_touches_nothing(root: Path, kind: str) -> None:
    there, here, match = MISFITS[kind]
    one, other = build(1, there), build(2, here)
    step(*one)
    step(*other)
    before = frozen(other[0]), frozen(other[1])
    with pytest.raises(IncompatibleStateError, match=match):
        await handed_over(root, {"app": AppState(*one)}, {"app": AppState(*other)})
    assert_same((frozen(other[0]), frozen(other[1])), before)


@pytest.mark.parametrize("kind", ["a parameter is gone here", "a parameter is new here"])
async def test_not_strict_loads_what_fits(root: Path, kind: str) -> None:
    there, here, _ = MISFITS[kind]
    one, other = build(1, there), build(2, here)
    step(*one)
    report = await handed_over(root, {"app": AppState(*one)}, {"app": AppState(*other)}, strict=False)
    both = [name for name, weight in other[0].named_parameters() if weight in other[1].state]
    assert len(both) == 7
    for name in both:
        weight, mine = other[0].get_parameter(name), one[0].get_parameter(name)
        assert_same(frozen(other[1].state[weight]), frozen(one[1].state[mine]))
    if kind == "a parameter is gone here":
        assert set(report.unexpected) == {
            f"app.optim.state.b.weight.{part}" for part in ("step", "exp_avg", "exp_avg_sq")
        }
        assert other[0].get_parameter("b.weight") not in other[1].state


@pytest.mark.parametrize("where", ["one more", "all", "in the second group"])
async def test_a_parameter_outside_of_the_model_fails_the_save_by_name(root: Path, where: str) -> None:
    model, _ = build(1)
    stranger = nn.Parameter(torch.ones(5, 2))
    groups = {
        "one more": [{"params": [*model.parameters(), stranger]}],
        "all": [{"params": [stranger]}],
        "in the second group": [{"params": list(model.parameters())}, {"params": [stranger]}],
    }[where]
    async with CheckpointEngine(root) as engine:
        with pytest.raises(
            SaveError, match=r"group \d of AdamW, of shape \(5, 2\).*no parameter of the model"
        ):
            await engine.save({"app": AppState(model, AdamW(groups))})


@pytest.mark.parametrize("stepped", [True, False])
async def test_a_parameter_of_two_optimizers_fails_the_save_by_name(root: Path, stepped: bool) -> None:
    model, optim = build(1)
    if stepped:
        step(model, optim)
    second = torch.optim.SGD(model["b"].parameters(), lr=0.1)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"b\.weight is a parameter of two optimizers"):
            await engine.save({"app": AppState(model, [optim, second])})


class WeightsOnly(AppState):
    """Saves less than its base class, which is a subclass's own business."""

    def state_dict(self) -> dict[str, Any]:
        return {"model": super().state_dict()["model"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])


async def test_a_subclass_may_save_something_else(root: Path) -> None:
    one, other = build(1), build(2)
    step(*one)
    await handed_over(root, {"app": WeightsOnly(*one)}, {"app": WeightsOnly(*other)})
    assert_same(frozen(other[0]), frozen(one[0]))


@pytest.mark.parametrize("options", [None, FLAT], ids=["nested", "flat"])
async def test_named_parameters_keep_their_names_in_any_order(root: Path, options: Any) -> None:
    def named(seed: int, turn: int) -> tuple[Any, Any]:
        model, _ = build(seed)
        return model, AdamW([*model.named_parameters()][::turn], lr=0.1)

    one, other = named(1, 1), named(2, -1)
    step(*one)
    await handed_over(
        root, {"app": AppState(*one, options=options)}, {"app": AppState(*other, options=options)}
    )
    assert other[1].param_groups[0]["param_names"] == one[1].param_groups[0]["param_names"][::-1]
    for weight, mine in zip(other[0].parameters(), one[0].parameters(), strict=True):
        assert_same(frozen(other[1].state[weight]), frozen(one[1].state[mine]))


# --- bare optimizers, and what their own code does ------------------------------------------------


class Forgetful(AdamW):
    """Loses an entry of each parameter that it loads."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for entry in self.state.values():
            entry.pop("exp_avg", None)


class Filtering(AdamW):
    """Loads no entry of a frozen parameter, as torch's own functions do."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for weight in [weight for weight in self.state if not weight.requires_grad]:
            del self.state[weight]


class Emptied(AdamW):
    """Starts anew at each load."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.state.clear()


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("kind", [Forgetful, Filtering, Emptied])
async def test_an_optimizer_that_loses_entries_fails_the_load_by_name(
    root: Path, bare: bool, kind: type[AdamW]
) -> None:
    one, other = build(1, make=kind), build(2, make=kind)
    step(*one)
    freeze(other[0], "a")

    def state(run: tuple[Any, Any]) -> dict[str, Any]:
        return {"model": run[0], "optim": run[1]} if bare else {"app": AppState(*run)}

    with pytest.raises(LoadError, match=rf"{kind.__name__}.*state\[0\]"):
        await handed_over(root, state(one), state(other))


class OwnRate(AdamW):
    """Keeps the learning rate that it was made with, which is its own business."""

    def load_state_dict(self, state_dict: Any) -> None:
        rates = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = rate


@pytest.mark.parametrize("bare", [True, False])
async def test_an_optimizers_own_code_may_change_options(root: Path, bare: bool) -> None:
    one, other = build(1, make=OwnRate), build(2, make=OwnRate)
    step(*one)
    other[1].param_groups[0]["lr"] = 7.0

    def state(run: tuple[Any, Any]) -> dict[str, Any]:
        return {"model": run[0], "optim": run[1]} if bare else {"app": AppState(*run)}

    await handed_over(root, state(one), state(other))
    assert other[1].param_groups[0]["lr"] == 7.0


async def test_a_load_hook_may_change_what_is_loaded(root: Path) -> None:
    one, other = build(1), build(2)
    step(*one)

    def hook(optim: Optimizer) -> None:
        optim.param_groups[0]["lr"] = 3.0

    other[1].register_load_state_dict_post_hook(hook)
    await handed_over(root, {"app": AppState(*one)}, {"app": AppState(*other)})
    assert other[1].param_groups[0]["lr"] == 3.0


def test_options_that_were_not_saved_stay() -> None:
    one, other = build(1), build(2)
    step(*one)
    saved = AppState(*one).state_dict()
    for group in saved["optim"]["param_groups"]:
        del group["betas"], group["decoupled_weight_decay"]
        group["initial_lr"] = 4.0
    AppState(*other).load_state_dict(saved)
    step(*other)
    assert other[1].param_groups[0]["initial_lr"] == 4.0
    assert other[1].param_groups[0]["betas"] == (0.9, 0.999)


# --- models ---------------------------------------------------------------------------------------


class Packed(nn.Module):
    """Saves something that it has no attribute for."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.value = value

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}scale.packed"] = torch.tensor(self.value)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.value = float(state_dict.pop(f"{prefix}scale.packed"))
        super()._load_from_state_dict(state_dict, prefix, *args)


async def test_a_module_may_save_what_it_has_no_attribute_for(root: Path) -> None:
    one, other = nn.Sequential(Packed(3.0)), nn.Sequential(Packed(4.0))
    await handed_over(root, {"app": AppState(one)}, {"app": AppState(other)})
    assert other[0].value == 3.0
    assert_same(frozen(other), frozen(one))


WRAPPED: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda layer: torch.compile(layer, backend="eager"),
    "recomputed": checkpoint_wrapper,
    "both": lambda layer: torch.compile(checkpoint_wrapper(layer), backend="eager"),
}


@pytest.mark.parametrize("kind", WRAPPED)
async def test_a_wrapped_module_that_has_two_names_comes_back(root: Path, kind: str) -> None:
    def tied(seed: int) -> nn.ModuleDict:
        torch.manual_seed(seed)
        layer = WRAPPED[kind](nn.Linear(3, 3))
        return nn.ModuleDict({"first": layer, "again": layer})

    one, other = tied(1), tied(2)
    saved = AppState(one, AdamW(one.parameters()))
    loaded = AppState(other, AdamW(other.parameters()))
    await handed_over(root, {"app": saved}, {"app": loaded})
    assert_same(frozen(other), frozen(one))
    assert set(saved.state_dict()["model"]) == {
        f"{name}.{part}" for name in ("first", "again") for part in ("weight", "bias")
    }


async def test_frozen_parameters_that_are_left_out_are_not_missed(root: Path) -> None:
    options = StateDictOptions(ignore_frozen_params=True)
    one, other = build(1), build(2)
    step(*one)
    freeze(one[0], "ab")
    freeze(other[0], "ab")
    kept = frozen(other[0]["a"])
    await handed_over(
        root, {"app": AppState(*one, options=options)}, {"app": AppState(*other, options=options)}
    )
    assert_same(frozen(other[0]["a"]), kept)
    assert_same(frozen(other[0]["c"]), frozen(one[0]["c"]))
    assert_same(frozen(other[1]), frozen(one[1]))


# --- stock ----------------------------------------------------------------------------------------


def _wrapped() -> tuple[nn.ModuleDict, AdamW]:
    model, _ = build(1)
    model["b"] = WRAPPED["both"](model["b"])
    return model, AdamW(model.parameters(), lr=0.1)


def _frozen() -> tuple[nn.ModuleDict, AdamW]:
    model, optim = build(1)
    freeze(model, "b")
    return model, optim


def _shared() -> tuple[nn.ModuleDict, AdamW]:
    model, _ = build(1)
    model["d"].weight = model["a"].weight
    return model, AdamW(model.parameters(), lr=0.1)


MODELS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "one": lambda: build(1, one_group),
    "halves": lambda: build(1, halves),
    "empty": lambda: build(1, with_empty(4)),
    "wrapped": _wrapped,
    "frozen": _frozen,
    "shared": _shared,
}


OPTIONS: dict[str, StateDictOptions] = {
    "default": StateDictOptions(),
    "cpu_offload": StateDictOptions(cpu_offload=True),
    "full": StateDictOptions(full_state_dict=True),
    "frozen left out": StateDictOptions(ignore_frozen_params=True),
    "flat": FLAT,
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("options", OPTIONS)
def test_the_state_is_what_torchs_own_function_gives(kind: str, options: str) -> None:
    model, optim = MODELS[kind]()
    if (kind, options) == ("empty", "flat"):
        return  # torch drops the group
    with torch.compiler.set_stance("force_eager"):
        step(model, optim, "acd")
    mine = AppState(model, optim, options=OPTIONS[options]).state_dict()
    theirs_model, theirs = get_state_dict(model, optim, options=OPTIONS[options])
    assert type(mine["model"]) is type(theirs_model)
    assert_same(dict(sorted(mine["model"].items())), dict(sorted(theirs_model.items())))
    assert_same(mine["optim"], theirs)


@pytest.mark.parametrize("options", ["default", "flat", "cpu_offload"])
def test_torchs_own_functions_take_our_state_and_we_take_theirs(options: str) -> None:
    given = OPTIONS[options]
    for make in (one_group, halves):
        one, other, third = build(1, make), build(2, make), build(3, make)
        step(*one)
        mine = AppState(*one, options=given).state_dict()
        set_state_dict(*other, model_state_dict=mine["model"], optim_state_dict=mine["optim"], options=given)
        assert_equal(one, other)
        AppState(*third, options=given).load_state_dict(
            {
                "model": get_model_state_dict(one[0], options=given),
                "optim": get_optimizer_state_dict(*one, options=given),
            }
        )
        assert_equal(one, third)
