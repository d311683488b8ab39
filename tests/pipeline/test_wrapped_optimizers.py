"""Whatever step() ends up changing the tensors waits for an overlapped copy, through any wrappers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from dcp_async import AppState, CheckpointEngine, StagingOptions
from dcp_async._concurrency import SignalSafeFuture
from dcp_async.engine.optimizer_hooks import OptimizerHooks
from dcp_async.state.optimizers.stepping import stepped_by
from tests.support.doubles import PATIENCE, FaultyStorage, assert_same, frozen
from tests.support.saves import HELD

WIDTH = 1024  # more than the budget, so that staging waits for the gate


class Delegating(Optimizer):
    """As Accelerate's: an Optimizer that was never initialised as one, and hands everything on."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:  # type: ignore[override]  # the wrapped one's
        return self.optimizer.state

    @property
    def param_groups(self) -> Any:  # type: ignore[override]  # the wrapped one's
        return self.optimizer.param_groups

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


class Imitating:
    """As Fabric's and Lightning's: it takes a class that derives from the wrapped one's."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        kind = type(optimizer)
        self.__class__ = type("Imitating" + kind.__name__, (type(self), kind), {})

    def state_dict(self) -> Any:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self._optimizer.load_state_dict(state)

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step()

    def __getattr__(self, item: str) -> Any:
        return getattr(self._optimizer, item)


class Plain:
    """No Optimizer at all: it only looks like one."""

    def __init__(self, optim: Any) -> None:
        self.inside = optim

    @property
    def param_groups(self) -> Any:
        return self.inside.param_groups

    def state_dict(self) -> Any:
        return self.inside.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inside.load_state_dict(state)

    def step(self) -> None:
        self.inside.step()


class Slotted:
    """Keeps what it wraps in a slot."""

    __slots__ = ("optimizer",)

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.optimizer.load_state_dict(state)

    def step(self) -> None:
        self.optimizer.step()


class Lookahead(Optimizer):
    """An optimizer of its own that also steps another."""

    def __init__(self, base: Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {})

    def state_dict(self) -> Any:
        return self.base.state_dict()

    def step(self, closure: Any = None) -> Any:
        return self.base.step()


class Container:
    """As torchtitan's: several optimizers behind one name."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = list(optimizers)

    def state_dict(self) -> Any:
        return {str(at): optim.state_dict() for at, optim in enumerate(self.optimizers)}

    def load_state_dict(self, state: Any) -> None:
        for at, optim in enumerate(self.optimizers):
            optim.load_state_dict(state[str(at)])

    def step(self) -> None:
        for optim in self.optimizers:
            optim.step()


class ByParameter:
    """As torchtune's for optimizers in the backward: one for each parameter, by name."""

    def __init__(self, optimizer: Optimizer) -> None:
        weights = optimizer.param_groups[0]["params"]
        self.own = {f"p{at}": AdamW([weight], lr=0.1, fused=True) for at, weight in enumerate(weights)}
        for optim, weight in zip(self.own.values(), weights, strict=True):
            weight.grad = torch.ones_like(weight)
            optim.step()

    def state_dict(self) -> Any:
        return {name: optim.state_dict() for name, optim in self.own.items()}

    def load_state_dict(self, state: Any) -> None:
        for name, optim in self.own.items():
            optim.load_state_dict(state[name])

    def step(self) -> None:
        for optim in self.own.values():
            optim.step()


class Trainer:
    """Holds a wrapper among other things, and steps it."""

    def __init__(self, optimizer: Any) -> None:
        self.count = 3
        self.names = ["a", "b"]
        self.driver = Delegating(optimizer)
        self.itself = self  # goes in a circle

    def state_dict(self) -> Any:
        return {"optim": self.driver.state_dict(), "count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.driver.load_state_dict(state["optim"])

    def step(self) -> None:
        self.driver.step()


KINDS: dict[str, Callable[[Any], Any]] = {
    "delegating": Delegating,
    "imitating": Imitating,
    "plain": Plain,
    "slotted": Slotted,
    "lookahead": Lookahead,
    "container": Container,
    "by parameter": ByParameter,
    "trainer": Trainer,
    "twice": lambda optim: Delegating(Delegating(optim)),
    "three kinds": lambda optim: Imitating(Delegating(Imitating(optim))),
    "container of wrappers": lambda optim: Container(Imitating(optim), Delegating(AdamW([torch.ones(1)]))),
    "wrapper of a container": lambda optim: Plain(Container(Delegating(optim))),
}


def build() -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4))
    optim = AdamW(model.parameters(), lr=0.1, fused=True)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optim.step()
    return model, optim


@pytest.mark.parametrize("kind", KINDS)
async def test_a_step_through_a_wrapper_waits(root: Path, faulty: FaultyStorage, kind: str) -> None:
    """The step is fused, which moves no counter: without the wait it would tear the checkpoint."""
    model, optim = build()
    driver = KINDS[kind](optim)
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        before = frozen(model)
        with faulty.hold("put") as gate:
            for inner in stepped_by(driver):  # before the engine's own, so that nothing is staged until here
                inner.register_step_pre_hook(lambda *_: gate.release())
            response = await engine.save({"model": model, "driver": driver})
            assert not response.staging_completion.done()
            driver.step()
            assert response.staging_completion.done()
        await response.upload_completion
        assert_same((await engine.read())["model"], before)
    with pytest.raises(AssertionError):
        assert_same(frozen(model), before)


@pytest.mark.parametrize("kind", ["scheduler", "AppState of a wrapper", "container in a list"])
async def test_what_holds_an_optimizer_makes_it_wait(root: Path, faulty: FaultyStorage, kind: str) -> None:
    model, optim = build()
    holders: dict[str, Callable[[], dict[str, Any]]] = {
        "scheduler": lambda: {"s": torch.optim.lr_scheduler.LambdaLR(optim, lambda _: 1.0)},
        "AppState of a wrapper": lambda: {"app": AppState(model, Delegating(optim))},
        "container in a list": lambda: {"all": [{"c": Container(Imitating(optim))}]},
    }
    state = holders[kind]()
    async with CheckpointEngine(faulty, staging=HELD) as engine:
        before = frozen(model)
        with faulty.hold("put") as gate:
            optim.register_step_pre_hook(lambda *_: gate.release())
            response = await engine.save({"model": model, **state})
            optim.step()
            assert response.staging_completion.done()
        await response.upload_completion
        assert_same((await engine.read())["model"], before)


@pytest.mark.parametrize("kind", ["delegating", "imitating", "three kinds"])
async def test_a_wrapped_optimizer_comes_back(root: Path, kind: str) -> None:
    model, optim = build()
    other, other_optim = build()
    other_optim.step()
    driver, other_driver = KINDS[kind](optim), KINDS[kind](other_optim)
    async with CheckpointEngine(root, staging=StagingOptions(overlap=True)) as engine:
        for _ in range(3):
            await (await engine.save({"app": AppState(model, driver), "bare": driver})).upload_completion
        await engine.load({"app": AppState(other, other_driver), "bare": other_driver})
        assert len(optim._optimizer_step_pre_hooks) == 1
    assert len(optim._optimizer_step_pre_hooks) == 0
    assert_same(frozen(other_optim), frozen(optim))


def test_an_optimizer_is_found_once_and_nothing_runs() -> None:
    class Nosy(Plain):
        @property
        def trap(self) -> Any:
            raise AssertionError("a property was asked")

    _, optim = build()
    around = Nosy(Delegating(optim))
    around.again = [around, optim]  # type: ignore[attr-defined]  # a circle
    assert stepped_by(around) == [optim]
    assert stepped_by({"not": "a stateful"}) == []
    assert stepped_by(nn.Linear(2, 2)) == []


# --- a thread that comes in again -----------------------------------------------------------------


def settled() -> SignalSafeFuture[None]:
    staging: SignalSafeFuture[None] = SignalSafeFuture()
    staging.set_result(None)
    return staging


def _save_and_step(hooks: OptimizerHooks, other: Optimizer, own: Optimizer) -> None:
    hooks.watch([other], settled())
    other.step()


REENTRIES: dict[str, Callable[[OptimizerHooks, Optimizer, Optimizer], None]] = {
    "it saves": lambda hooks, other, own: hooks.watch([other], settled()),
    "it saves the same": lambda hooks, other, own: hooks.watch([own, other], settled()),
    "it steps": _save_and_step,
}


@pytest.mark.parametrize("kind", REENTRIES)
def test_a_signal_handler_inside_of_the_hooks_does_not_wait_for_itself(kind: str) -> None:
    hooks = OptimizerHooks()
    _, other = build()

    class Interrupted(AdamW):
        """A signal comes in at a moment at which the hooks are locked."""

        depth = 0

        def register_step_pre_hook(self, hook: Any) -> Any:
            self.depth += 1
            if self.depth == 1:
                REENTRIES[kind](hooks, other, self)
            return super().register_step_pre_hook(hook)

    own = Interrupted([nn.Parameter(torch.ones(1))])
    thread = threading.Thread(target=hooks.watch, args=([own], settled()), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert len(other._optimizer_step_pre_hooks) == 1
    hooks.remove()
    assert len(own._optimizer_step_pre_hooks) == len(other._optimizer_step_pre_hooks) == 0


def test_what_a_signal_handler_adds_is_waited_for() -> None:
    hooks = OptimizerHooks()
    _, optim = build()
    late: SignalSafeFuture[None] = SignalSafeFuture()

    class Early(SignalSafeFuture[None]):
        """A signal comes in while the stagings that have ended are sorted out."""

        def done(self) -> bool:
            if not hooks._staging[optim].count(late):
                hooks.watch([optim], late)
            return True

    first = Early()
    hooks.watch([optim], first)
    hooks.watch([optim], settled())
    thread = threading.Thread(target=optim.step, daemon=True)
    thread.start()
    assert late in hooks._staging[optim]
    late.set_result(None)
    thread.join(PATIENCE)
    assert not thread.is_alive()
