"""AppState: a model and its optimizers by canonical names, however the model is wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

import dcp_async
from dcp_async import (
    AppState,
    CheckpointEngine,
    IncompatibleStateError,
    RNGState,
    SaveError,
)
from tests.support.doubles import (
    FaultyStorage,
    Net,
    TrainingRun,
    assert_holds_only,
    assert_same,
    frozen,
)
from tests.support.saves import HELD, saved, step_while_staging
from tests.support.training_apps import DISTRIBUTED, WRAPPERS, WrappedRun
from tests.support.training_jobs import run_job

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"
)

WIDTH = 600  # weights of 1.4 MB: more than the budget, so that staging waits for the gate


def whole_state(run: TrainingRun) -> dict[str, Any]:
    return {"app": AppState(run.model, run.optim), "scheduler": run.scheduler}


def expected_names(prefix: str = "app") -> set[str]:
    """What a checkpoint of a plain Net under AdamW holds, by names that no wrapper shows in."""
    with torch.random.fork_rng():
        net = Net()
    names = {f"{prefix}.model.{name}" for name in net.state_dict()}
    for name, _ in net.named_parameters():
        names |= {f"{prefix}.optim.state.{name}.{part}" for part in ("step", "exp_avg", "exp_avg_sq")}
    group = torch.optim.AdamW(net.parameters()).state_dict()["param_groups"][0]
    return names | {f"{prefix}.optim.param_groups.0.{key}" for key in [*group, "initial_lr"]}


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("saved_as", "loaded"),
    [
        *(("plain", kind) for kind in WRAPPERS),
        *((kind, "plain") for kind in WRAPPERS if kind != "plain"),
        ("compiled", "recomputing"),
        ("recomputing", "compiled_inside"),
    ],
)
async def test_a_run_resumes_under_another_wrapper(root: Path, saved_as: str, loaded: str) -> None:
    whole, resumed = WrappedRun(1, saved_as), WrappedRun(2, loaded)
    whole.step(2)
    async with CheckpointEngine(root) as engine:
        info = await saved(engine, {**whole.app, "rng": RNGState()})
        names = set((await info.metadata()).state_dict_metadata)
        assert {name for name in names if name.startswith("app.")} == expected_names()
        whole.step(2)
        await engine.load({**resumed.app, "rng": RNGState()})
    resumed.step(2)
    assert_same(resumed.picture(), whole.picture())


@pytest.fixture(scope="module")
def swapped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_job("swap_wrappers", tmp_path_factory.mktemp("swapped") / "run")


@pytest.mark.parametrize(
    "pair",
    [
        f"{one} into {other}"
        for one in {**WRAPPERS, **DISTRIBUTED}
        for other in {**WRAPPERS, **DISTRIBUTED}
        if one in DISTRIBUTED or other in DISTRIBUTED
    ],
)
def test_a_run_resumes_with_and_without_ddp(swapped: dict[str, Any], pair: str) -> None:
    assert not isinstance(swapped[pair], str), swapped[pair]
    names, whole, resumed = swapped[pair]
    assert {name for name in names if name.startswith("app.")} == expected_names()
    assert_same(resumed, whole)


@pytest.mark.usefixtures("both_loops")
async def test_a_run_resumes_bit_for_bit_also_over_newer_state(root: Path) -> None:
    whole = WrappedRun(1, "plain")
    whole.step(3)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {**whole.app, "rng": RNGState()}, step=3)
        whole.step(4)
        for taken in (0, 1, 6):
            resumed = WrappedRun(9, "plain")
            resumed.step(taken)
            report = await engine.load({**resumed.app, "rng": RNGState()})
            assert (report.step, report.missing, report.unexpected) == (3, (), ())
            resumed.step(4)
            assert_same(resumed.picture(), whole.picture())


async def test_read_gives_models_and_optimizers_by_name(root: Path) -> None:
    run = WrappedRun(1, "compiled_inside")
    run.step(2)
    async with CheckpointEngine(root) as engine:
        await saved(engine, run.app)
        found = (await engine.read())["app"]
    assert set(found) == {"model", "optim"}
    assert_same(found["model"], run.picture()["model"])
    moments = run.optim.state_dict()["state"]
    names = [name for name, _ in Net().named_parameters()]
    assert_same(found["optim"]["state"], {name: frozen(moments[index]) for index, name in enumerate(names)})
    assert found["optim"]["param_groups"][0]["params"] == names


async def test_the_same_objects_are_trained_after_a_load(root: Path) -> None:
    run, other = WrappedRun(1, "compiled"), WrappedRun(2, "recomputing")
    run.step(2)
    other.step(1)
    objects = [id(weight) for weight in other.model.parameters()]
    async with CheckpointEngine(root) as engine:
        await saved(engine, run.app)
        await engine.load(other.app)
    assert [id(weight) for weight in other.model.parameters()] == objects
    assert {id(weight) for group in other.optim.param_groups for weight in group["params"]} == set(objects)
    assert other.inner.head.weight is other.inner.embed.weight


# --- options --------------------------------------------------------------------------------------

OPTIONS: dict[str, StateDictOptions] = {
    "full": StateDictOptions(full_state_dict=True),
    "cpu_offload": StateDictOptions(cpu_offload=True),
    "full_on_cpu": StateDictOptions(full_state_dict=True, cpu_offload=True),
    "not_strict": StateDictOptions(strict=False),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
}


@pytest.mark.parametrize(("kind", "taken"), [*((kind, 0) for kind in OPTIONS), ("full", 2), ("flat", 2)])
async def test_a_run_resumes_with_any_option(root: Path, kind: str, taken: int) -> None:
    def app(run: TrainingRun) -> dict[str, Any]:
        return {"app": AppState(run.model, run.optim, options=OPTIONS[kind]), "scheduler": run.scheduler}

    whole, resumed = TrainingRun(1), TrainingRun(2)
    whole.step(3)
    resumed.step(taken)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {**app(whole), "rng": RNGState()})
        whole.step(2)
        await engine.load({**app(resumed), "rng": RNGState()})
    resumed.step(2)
    if kind.startswith("full"):  # torch's own way to take a full state apart leaves lists where tuples were
        for group in resumed.optim.param_groups:
            group["betas"] = tuple(group["betas"])
    assert_same(resumed.picture(), whole.picture())


async def test_a_flat_optimizer_state_has_no_numbers_of_groups_in_its_names(root: Path) -> None:
    run = TrainingRun(1)
    run.step(1)
    app = AppState(run.model, run.optim, options=StateDictOptions(flatten_optimizer_state_dict=True))
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": app})
        optim = (await engine.read())["app"]["optim"]
    assert {"state.hidden.weight.exp_avg", "param_groups.hidden.weight.lr"} <= set(optim)


def _half_frozen(seed: int) -> tuple[Net, Optimizer]:
    torch.manual_seed(seed)
    model = Net()
    model.embed.weight.requires_grad_(False)
    model.norm.bias.requires_grad_(False)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return model, torch.optim.AdamW(trained, lr=0.01)


def _train(model: Any, optim: Optimizer, count: int) -> None:
    for step in range(count):
        tokens = torch.arange(step, step + 16) % 24
        optim.zero_grad()
        nn.functional.cross_entropy(model.eval()(tokens), (tokens + 1) % 24).backward()  # type: ignore[no-untyped-call]
        optim.step()


@pytest.mark.parametrize("taken", [0, 2])
async def test_frozen_parameters_come_back_frozen(root: Path, taken: int) -> None:
    model, optim = _half_frozen(1)
    other, other_optim = _half_frozen(2)
    _train(model, optim, 2)
    _train(other, other_optim, taken)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": AppState(model, optim)})
        await engine.load({"app": AppState(other, other_optim)})
    assert_same(frozen(other), frozen(model))
    assert_same(frozen(other_optim), frozen(optim))
    assert [weight.requires_grad for weight in other.parameters()] == [
        weight.requires_grad for weight in model.parameters()
    ]
    _train(model, optim, 2)
    _train(other, other_optim, 2)
    assert_same(frozen(other), frozen(model))


async def test_frozen_parameters_can_be_left_out(root: Path) -> None:
    """torch then wants strict=False as well, since its load_state_dict misses them."""
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    model, optim = _half_frozen(1)
    other, other_optim = _half_frozen(2)
    _train(model, optim, 2)
    kept = frozen(other)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": AppState(model, optim, options=options)})
        found = (await engine.read())["app"]["model"]
        await engine.load({"app": AppState(other, other_optim, options=options)})
    assert "norm.bias" not in found
    assert "embed.weight" not in found
    assert_same(other.norm.bias.detach(), kept["norm.bias"])
    assert_same(other.norm.weight.detach(), model.norm.weight.detach())
    assert_same(frozen(other_optim), frozen(optim))


# --- optimizers -----------------------------------------------------------------------------------


def _two_optimizers(seed: int) -> tuple[Net, list[Optimizer]]:
    torch.manual_seed(seed)
    model = Net()
    first = [model.embed.weight, model.norm.weight]
    others = [weight for weight in model.parameters() if not any(weight is own for own in first)]
    return model, [torch.optim.SGD(first, lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=0.01)]


@pytest.mark.parametrize("hand_over", [list, tuple, iter])
async def test_several_optimizers_come_back(root: Path, hand_over: Callable[[Any], Any]) -> None:
    model, optims = _two_optimizers(1)
    other, other_optims = _two_optimizers(2)
    for optim in optims:
        _train(model, optim, 3)
    _train(other, other_optims[1], 1)
    app = AppState(model, hand_over(optims))
    assert app.optimizers == tuple(optims)
    assert app.model is model
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": app})
        await engine.load({"app": AppState(other, hand_over(other_optims))})
    assert_same(frozen(other), frozen(model))
    assert_same([frozen(optim) for optim in other_optims], [frozen(optim) for optim in optims])


async def test_a_model_alone_comes_back(root: Path) -> None:
    model, other = Net(), Net()
    app = AppState(model)
    assert app.optimizers == ()
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": app})
        await engine.load({"app": AppState(other)})
    assert_same(frozen(other), frozen(model))


async def test_a_model_alone_is_loaded_from_a_checkpoint_with_an_optimizer(root: Path) -> None:
    run, other = TrainingRun(1), Net()
    run.step(1)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": AppState(run.model, run.optim)})
        before = frozen(other)
        with pytest.raises(IncompatibleStateError, match=r"app\.optim"):
            await engine.load({"app": AppState(other)})
        assert_same(frozen(other), before)
        report = await engine.load({"app": AppState(other)}, strict=False)
    assert all(name.startswith("app.optim.") for name in report.unexpected)
    assert_same(frozen(other), frozen(run.model))


@pytest.mark.parametrize("grads", ["none", "zero", "there"])
async def test_saving_before_the_first_step_changes_nothing(root: Path, grads: str) -> None:
    plain, saving = TrainingRun(1), TrainingRun(1)
    for run in (plain, saving):
        if grads != "none":
            run.model(torch.arange(16)).sum().backward()
        if grads == "zero":
            run.optim.zero_grad(set_to_none=False)
    before = saving.picture()
    gradients = [frozen(weight.grad) for weight in saving.model.parameters()]
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": AppState(saving.model, saving.optim)})
        assert_same(saving.picture(), before)
        assert_same([frozen(weight.grad) for weight in saving.model.parameters()], gradients)
        resumed = TrainingRun(2)
        await engine.load({"app": AppState(resumed.model, resumed.optim)})
    for run in (plain, saving, resumed):
        torch.manual_seed(4)
        run.step(2)
    assert_same(saving.picture(), plain.picture())
    assert_same(resumed.picture(), plain.picture())


@pytest.mark.parametrize("grads", ["none", "zero", "there"])
async def test_an_optimizer_that_never_stepped_takes_what_was_saved(root: Path, grads: str) -> None:
    whole, resumed = TrainingRun(1), TrainingRun(2)
    whole.step(3)
    if grads != "none":
        resumed.model(torch.arange(16)).sum().backward()
    if grads == "zero":
        resumed.optim.zero_grad(set_to_none=False)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {**whole_state(whole), "rng": RNGState()})
        whole.step(2)
        await engine.load({**whole_state(resumed), "rng": RNGState()})
    resumed.step(2)
    assert_same(resumed.picture(), whole.picture())


@pytest.mark.parametrize("taken", ["nothing", "the same", "everything"])
async def test_a_parameter_that_never_had_a_gradient_has_no_state(root: Path, taken: str) -> None:
    """A branch or an expert that no batch has used yet: it may be trained, but has not been."""

    def build() -> tuple[Any, Optimizer]:
        model = nn.ModuleDict({"used": nn.Linear(3, 3), "unused": nn.Linear(3, 3)})
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: Any, optim: Optimizer, names: list[str]) -> None:
        optim.zero_grad()
        for name in names:
            model[name](torch.ones(3)).square().sum().backward()
        optim.step()

    model, optim = build()
    other, other_optim = build()
    step(model, optim, ["used"])
    if taken != "nothing":
        step(other, other_optim, ["used"] if taken == "the same" else ["used", "unused"])
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": AppState(model, optim)})
        await engine.load({"app": AppState(other, other_optim)})
    for _ in range(2):
        step(model, optim, ["used", "unused"])
        step(other, other_optim, ["used", "unused"])
    assert_same(frozen(other), frozen(model))
    assert_same(frozen(other_optim), frozen(optim))


async def test_a_checkpoint_that_does_not_fit_touches_neither_model_nor_optimizer(root: Path) -> None:
    run, other = TrainingRun(1, width=16), TrainingRun(2, width=32)
    run.step(1)
    other.step(1)
    before = other.picture()
    async with CheckpointEngine(root) as engine:
        await saved(engine, whole_state(run))
        with pytest.raises(IncompatibleStateError, match=r"app\.model\.embed\.weight"):
            await engine.load(whole_state(other))
    assert_same(other.picture(), before)


# --- overlap=True ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("both_loops")
@pytest.mark.parametrize("kind", ["plain", "compiled"])
async def test_a_step_waits_until_its_model_is_staged(root: Path, faulty: FaultyStorage, kind: str) -> None:
    run = WrappedRun(1, kind, width=WIDTH)
    run.step(1)
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        before = run.picture()
        await step_while_staging(engine, faulty, run.app, run.optim)
        assert_same((await engine.read())["app"]["model"], before["model"])
    with pytest.raises(AssertionError):
        assert_same(run.picture()["model"], before["model"])


async def test_each_of_several_optimizers_waits(root: Path, faulty: FaultyStorage) -> None:
    torch.manual_seed(1)
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    optims = [torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9) for layer in model]
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    for optim in optims:
        optim.step()
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        for number, optim in enumerate(optims):
            before = frozen(model)
            with faulty.hold("put") as gate:
                first = optim.register_step_pre_hook(lambda *_, gate=gate: gate.release())
                hooks: Any = optim._optimizer_step_pre_hooks
                hooks.move_to_end(first.id, last=False)
                response = await engine.save({"nested": [{"app": AppState(model, optims)}]}, step=number)
                optim.step()
            first.remove()
            await response.upload_completion
            assert_same((await engine.read())["nested"][0]["app"]["model"], before)
        assert all(len(optim._optimizer_step_pre_hooks) == 1 for optim in optims)
    assert all(len(optim._optimizer_step_pre_hooks) == 0 for optim in optims)


# --- stock ----------------------------------------------------------------------------------------


class TutorialState:
    """What torch's own recipe has users write: the same two functions, no more."""

    def __init__(self, model: nn.Module, optim: Optimizer) -> None:
        self.model, self.optim = model, optim

    def state_dict(self) -> dict[str, Any]:
        model, optim = get_state_dict(self.model, self.optim)
        return {"model": model, "optim": optim}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optim,
            model_state_dict=state["model"],
            optim_state_dict=state["optim"],
        )


STATES: dict[str, Callable[..., Any]] = {"ours": AppState, "tutorial": TutorialState}


def assert_go_on_alike(whole: WrappedRun, resumed: WrappedRun) -> None:
    """Now and two steps on, but for the scheduler, which was not saved."""
    resumed.scheduler.load_state_dict(whole.scheduler.state_dict())
    assert_same(resumed.picture(), whole.picture())
    for run in (whole, resumed):
        torch.manual_seed(6)
        run.step(2)
    assert_same(resumed.picture(), whole.picture())


@pytest.mark.parametrize(
    ("saved_with", "loaded_with"), [("ours", "tutorial"), ("tutorial", "ours"), ("ours", "ours")]
)
async def test_stock_reads_what_we_write(root: Path, saved_with: str, loaded_with: str) -> None:
    whole, resumed = WrappedRun(1, "compiled_inside"), WrappedRun(2, "recomputing")
    whole.step(3)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": STATES[saved_with](whole.model, whole.optim)}, step=3)
    state = {"app": STATES[loaded_with](resumed.model, resumed.optim)}
    dcp.load(state, checkpoint_id=root / "step-00000003", no_dist=True)
    assert_go_on_alike(whole, resumed)


@pytest.mark.parametrize(
    ("saved_with", "loaded_with", "taken"),
    [("ours", "tutorial", 0), ("tutorial", "ours", 0), ("tutorial", "ours", 2), ("tutorial", "tutorial", 0)],
)
async def test_we_read_what_stock_writes(root: Path, saved_with: str, loaded_with: str, taken: int) -> None:
    whole, resumed = WrappedRun(1, "recomputing"), WrappedRun(2, "compiled_inside")
    whole.step(3)
    resumed.step(taken)
    state = {"app": STATES[saved_with](whole.model, whole.optim)}
    dcp.save(state, checkpoint_id=root / "step-00000003", no_dist=True)
    async with CheckpointEngine(root) as engine:
        await engine.load({"app": STATES[loaded_with](resumed.model, resumed.optim)})
    assert_go_on_alike(whole, resumed)


# --- arguments ------------------------------------------------------------------------------------


def _parameters() -> Iterator[nn.Parameter]:
    return nn.Linear(2, 2).parameters()


@pytest.mark.parametrize("model", [None, "model", {}, [nn.Linear(2, 2)], nn.Linear, torch.ones(2)])
def test_a_model_that_is_none_is_a_type_error(model: Any) -> None:
    with pytest.raises(TypeError, match="model"):
        AppState(model)


@pytest.mark.parametrize(
    "optimizers",
    [None, 3, "adam", nn.Linear(2, 2), torch.optim.AdamW, [None], [nn.Linear(2, 2)], [[]], _parameters()],
)
def test_optimizers_that_are_none_are_a_type_error(optimizers: Any) -> None:
    with pytest.raises(TypeError, match="optimizers"):
        AppState(nn.Linear(2, 2), optimizers)


def test_options_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        AppState(nn.Linear(2, 2), (), StateDictOptions())  # type: ignore[call-arg]  # that is what is tested


async def test_an_optimizer_of_another_model_fails_the_save(root: Path) -> None:
    stranger = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1, momentum=0.9)
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match="app"):
            await engine.save({"app": AppState(nn.Linear(2, 2), stranger)}, step=1)
        await saved(engine, {"x": 1}, step=2)
    assert_holds_only(root, ["step-00000002"])


def test_it_shows_what_it_holds() -> None:
    model = nn.Linear(2, 2)
    text = repr(AppState(model, torch.optim.SGD(model.parameters())))
    assert "Linear" in text
    assert "SGD" in text
    assert "AppState" in dcp_async.__all__
