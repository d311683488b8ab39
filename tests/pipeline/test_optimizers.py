"""Every optimizer of torch.optim: what it holds survives, and training goes on as if nothing had happened."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from dcp_async import (
    AppState,
    CheckpointEngine,
    CheckpointError,
    IncompatibleStateError,
    SaveError,
)
from dcp_async.sync import CheckpointEngine as BlockingEngine
from tests.support.doubles import MIB, PATIENCE, FaultyStorage, assert_same, frozen
from tests.support.saves import HELD, saved
from tests.support.training_jobs import run_job
from tests.support.training_optimizers import CASES, LISTED, MAIN, Trainer

WIDE = 6000


def test_every_optimizer_of_torch_is_listed() -> None:
    found = {
        cls
        for cls in vars(torch.optim).values()
        if inspect.isclass(cls) and issubclass(cls, Optimizer) and cls is not Optimizer
    }
    assert found == LISTED
    assert found == {type(Trainer(case, 1).optim) for case in CASES}
    assert found == {type(Trainer(case, 1).optim) for case in MAIN}


# --- a fresh process ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(name -> where the uninterrupted run ended, name -> where the one in a fresh process ended)."""
    root = tmp_path_factory.mktemp("optimizers") / "run"
    trainers = {case: Trainer(case, seed=1) for case in CASES}
    for trainer in trainers.values():
        trainer.step(3)
    with BlockingEngine(root) as engine:
        response = engine.save({case: trainer.state for case, trainer in trainers.items()})
        response.upload_completion.result(PATIENCE)
    for trainer in trainers.values():
        trainer.step(3)
    return {case: trainer.picture() for case, trainer in trainers.items()}, run_job("resume_optimizers", root)


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_process_resumes_bit_for_bit(
    interrupted: tuple[dict[str, Any], dict[str, Any]], case: str
) -> None:
    whole, resumed = interrupted
    assert not isinstance(resumed[case], str), resumed[case]
    assert_same(resumed[case], whole[case])


# --- the checkpoint wins --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_times(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All cases saved before the first step, after one and after four; and where they were after six."""
    root = tmp_path_factory.mktemp("three") / "run"
    trainers = {case: Trainer(case, seed=1) for case in MAIN}
    with BlockingEngine(root) as engine:
        for step, count in ((0, 0), (1, 1), (4, 3)):
            for trainer in trainers.values():
                trainer.step(count)
            response = engine.save({case: trainer.state for case, trainer in trainers.items()}, step=step)
            response.upload_completion.result(PATIENCE)
    for trainer in trainers.values():
        trainer.step(2)
    return root, {case: trainer.picture() for case, trainer in trainers.items()}


@pytest.mark.parametrize("case", MAIN)
async def test_the_checkpoint_wins_over_what_the_optimizer_did_since(
    three_times: tuple[Path, dict[str, Any]], case: str
) -> None:
    """Over fewer steps than were saved, over more, and over some where there was none yet."""
    root, expected = three_times
    async with CheckpointEngine(root) as engine:
        for taken, step in ((1, 4), (6, 4), (3, 0)):
            trainer = Trainer(case, seed=2)
            trainer.step(taken)
            await engine.load({case: trainer.state}, step)
            trainer.step(6 - step)
            assert_same(trainer.picture(), expected[case])


@pytest.mark.usefixtures("both_loops")
async def test_all_checkpoints_can_be_gone_back_to_one_after_the_other(
    three_times: tuple[Path, dict[str, Any]],
) -> None:
    root, expected = three_times
    cases = ["adamw_groups", "rmsprop_centered", "sgd_momentum", "lbfgs"]
    trainers = {case: Trainer(case, seed=2) for case in cases}
    async with CheckpointEngine(root) as engine:
        for step in (4, 1, 0, 1, 4):
            await engine.load({case: trainer.state for case, trainer in trainers.items()}, step)
            for trainer in trainers.values():
                trainer.step(6 - step)
            assert_same(
                {case: trainer.picture() for case, trainer in trainers.items()},
                {case: expected[case] for case in cases},
            )


@pytest.mark.parametrize("cls", [torch.optim.SGD, torch.optim.AdamW])
async def test_an_optimizer_with_fewer_groups_is_refused_and_stays_as_it_was(
    root: Path, cls: Callable[..., Optimizer]
) -> None:
    def build(groups: int) -> tuple[list[nn.Parameter], Optimizer]:
        weights = [nn.Parameter(torch.full((3,), float(index))) for index in range(2)]
        kwargs = [{"params": [weight]} for weight in weights[:groups]]
        return weights, cls(kwargs, lr=0.1)

    _, optim = build(2)
    weights, smaller = build(1)
    weights[0].grad = torch.ones(3)
    smaller.step()
    before = frozen({"optim": smaller, "weights": weights})
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"optim": optim})
        with pytest.raises(CheckpointError, match=r"param_groups"):
            await engine.load({"optim": smaller})
    assert_same(frozen({"optim": smaller, "weights": weights}), before)


async def test_the_capturable_flag_of_another_machine_comes_back(root: Path) -> None:
    """No optimizer steps capturable on a CPU, but an accelerator's checkpoint may be looked at on one."""
    trainer, fresh = Trainer("adamw", 1), Trainer("adamw", 2)
    trainer.step(2)
    trainer.optim.param_groups[0]["capturable"] = True
    async with CheckpointEngine(root) as engine:
        await saved(engine, trainer.state)
        await engine.load(fresh.state)
    assert fresh.optim.param_groups[0]["capturable"] is True
    assert_same(fresh.picture(), trainer.picture())


async def test_options_of_a_group_that_a_newer_torch_added_stay_and_are_reported(root: Path) -> None:
    """An optimizer pickled or saved before an option existed: its group lacks the key."""
    trainer, fresh = Trainer("adamw", 1), Trainer("adamw", 2)
    trainer.step(2)
    del trainer.optim.param_groups[0]["decoupled_weight_decay"]
    async with CheckpointEngine(root) as engine:
        await saved(engine, trainer.state)
        report = await engine.load(fresh.state)
    assert report.missing == ("optim.param_groups.0.decoupled_weight_decay",)
    assert fresh.optim.param_groups[0]["decoupled_weight_decay"] is True
    assert_same(frozen(fresh.optim)["state"], frozen(trainer.optim)["state"])


async def test_an_optimizers_parameters_stay_the_models(root: Path) -> None:
    trainer, fresh = Trainer("adamw_groups", 1), Trainer("adamw_groups", 2)
    trainer.step(2)
    fresh.step(1)
    objects = [id(weight) for group in fresh.optim.param_groups for weight in group["params"]]
    async with CheckpointEngine(root) as engine:
        await saved(engine, trainer.state)
        await engine.load(fresh.state)
    assert [id(weight) for group in fresh.optim.param_groups for weight in group["params"]] == objects
    assert set(objects) == {id(weight) for weight in fresh.model.parameters()}


# --- through AppState -----------------------------------------------------------------------------


def app(trainer: Trainer) -> dict[str, Any]:
    return {"app": AppState(trainer.model, trainer.optim), "progress": trainer.progress}


APP_CASES = [case for case in MAIN if case not in ("lbfgs", "lbfgs_strong_wolfe", "sparseadam")]


@pytest.mark.parametrize("case", APP_CASES)
async def test_app_state_resumes_bit_for_bit(root: Path, case: str) -> None:
    whole = Trainer(case, 1)
    async with CheckpointEngine(root) as engine:
        whole.step(3)
        await saved(engine, app(whole), step=3)
        whole.step(3)
        for taken in (0, 1, 5):
            other = Trainer(case, 2)
            other.step(taken)
            await engine.load(app(other))
            other.step(3)
            assert_same(other.picture(), whole.picture())


@pytest.mark.parametrize("case", APP_CASES)
async def test_app_state_may_be_saved_before_the_first_step(root: Path, case: str) -> None:
    """Saving changes nothing, so this run and each that starts from the checkpoint end where one that never
    saved does."""
    plain = Trainer(case, 1)
    plain.step(3)
    whole = Trainer(case, 1)
    async with CheckpointEngine(root) as engine:
        await saved(engine, app(whole), step=0)
        whole.step(3)
        assert_same(whole.picture(), plain.picture())
        for taken in (0, 2):
            other = Trainer(case, 2)
            other.step(taken)
            await engine.load(app(other))
            other.step(3)
            assert_same(other.picture(), plain.picture())


@pytest.mark.parametrize("case", ["lbfgs", "lbfgs_strong_wolfe", "sparseadam"])
@pytest.mark.parametrize("taken", [0, 1, 5])
async def test_app_state_resumes_what_torchs_helpers_can_not_or_refuses_it_at_once(
    root: Path, case: str, taken: int
) -> None:
    """torch's get_state_dict makes a lazy state by a step without a closure and with dense gradients, and
    wants one entry for each parameter: LBFGS takes no such step and has one entry in all."""
    whole, other = Trainer(case, 1), Trainer(case, 2)
    whole.step(3)
    other.step(taken)
    before = other.picture()
    async with CheckpointEngine(root) as engine:
        try:
            await saved(engine, app(whole))
            await engine.load(app(other))
        except (SaveError, IncompatibleStateError) as error:
            assert type(other.optim).__name__ in str(error)  # noqa: PT017  # the test is about either outcome
            assert_same(other.picture(), before)
            return
    whole.step(3)
    other.step(3)
    assert_same(other.picture(), whole.picture())


# --- overlap=True ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", MAIN)
async def test_a_step_right_after_save_is_not_in_the_checkpoint(
    root: Path, faulty: FaultyStorage, case: str
) -> None:
    """The step waits for staging. The state is too large for the pool, so staging waits for the gate, and the
    weights are too large to be copied aside at once."""
    trainer = Trainer(case, 1, width=WIDE)
    trainer.step(2)
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        before = trainer.picture()
        with faulty.hold("put") as gate:
            # Registered before the engine's own hook, so it runs first: no staging until step() was entered.
            trainer.optim.register_step_pre_hook(lambda *_: gate.release())
            response = await engine.save({"ballast": torch.zeros(MIB), **trainer.state})
            assert not response.staging_completion.done()
            trainer.step()
        await response.upload_completion
        found = await engine.read(keys=["model", "optim", "progress"])
    assert_same(found, {**before, "model": dict(before["model"])})
    with pytest.raises(AssertionError):
        assert_same(trainer.picture()["model"], before["model"])


class _NotAsked(torch.Tensor):
    """By its hooks a part of a larger tensor, which says so to nobody."""

    def __create_chunk_list__(self) -> list[Any]:
        raise AssertionError("nothing of it is read")


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.UninitializedParameter(),
        lambda: torch.ones(3).as_subclass(_NotAsked).requires_grad_(),
    ],
    ids=["without memory yet", "with hooks of its own"],
)
async def test_parameters_that_are_no_part_of_the_state_refuse_no_load(
    root: Path, make: Callable[[], torch.Tensor]
) -> None:
    into = torch.optim.SGD([make()], lr=0.2)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"o": torch.optim.SGD([make()], lr=0.1)})
        await engine.load({"o": into})
    assert into.param_groups[0]["lr"] == 0.1
