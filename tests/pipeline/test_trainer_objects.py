"""What a trainer holds beside its optimizer: schedulers, scalers, averages, generators, odd modules."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from dcp_async import (
    AppState,
    CheckpointEngine,
    IncompatibleStateError,
    RNGState,
    SaveError,
)
from tests.support.doubles import assert_holds_only, assert_same, data_files, frozen
from tests.support.saves import saved

KIB = 1024


async def there_and_back(root: Path, source: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    """Save `source`, load it into `target`; gives what `read` makes of it."""
    async with CheckpointEngine(root) as engine:
        await saved(engine, source)
        await engine.load(target)
        return await engine.read()


# --- schedulers -----------------------------------------------------------------------------------


class Warmup:
    """A callable object with something to remember, as LambdaLR saves and restores it."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.calls = 0

    def __call__(self, epoch: int) -> float:
        self.calls += 1
        return min(1.0, (epoch + 1) / self.length) * 0.99**self.calls


def _sequential(optim: Optimizer) -> Any:
    parts: list[Any] = [lr_scheduler.LinearLR(optim, total_iters=2), lr_scheduler.ExponentialLR(optim, 0.9)]
    return lr_scheduler.SequentialLR(optim, parts, milestones=[3])


def _chained(optim: Optimizer) -> Any:
    parts: list[Any] = [
        lr_scheduler.ConstantLR(optim, total_iters=4),
        lr_scheduler.MultiStepLR(optim, [2, 5, 5]),
        lr_scheduler.ExponentialLR(optim, 0.9),
    ]
    return lr_scheduler.ChainedScheduler(parts, optim)


def _cyclic(optim: Optimizer) -> Any:
    scale: Any = Warmup(3)
    return lr_scheduler.CyclicLR(optim, 0.01, 0.3, scale_fn=scale)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda_object": lambda optim: lr_scheduler.LambdaLR(optim, [Warmup(4), lambda epoch: 0.9**epoch]),
    "lambda_function": lambda optim: lr_scheduler.LambdaLR(optim, lambda epoch: 0.9**epoch),
    "multiplicative": lambda optim: lr_scheduler.MultiplicativeLR(optim, [Warmup(3), Warmup(5)]),
    "step": lambda optim: lr_scheduler.StepLR(optim, 2),
    "multi_step": lambda optim: lr_scheduler.MultiStepLR(optim, [2, 4, 4, 7]),
    "constant": lambda optim: lr_scheduler.ConstantLR(optim, total_iters=5),
    "linear": lambda optim: lr_scheduler.LinearLR(optim, total_iters=6),
    "exponential": lambda optim: lr_scheduler.ExponentialLR(optim, 0.9),
    "sequential": _sequential,
    "polynomial": lambda optim: lr_scheduler.PolynomialLR(optim, total_iters=9, power=2.0),
    "cosine": lambda optim: lr_scheduler.CosineAnnealingLR(optim, T_max=6),
    "chained": _chained,
    "plateau": lambda optim: lr_scheduler.ReduceLROnPlateau(optim, patience=1, cooldown=1),
    "cyclic": lambda optim: lr_scheduler.CyclicLR(optim, 0.01, 0.3, step_size_up=3, mode="exp_range"),
    "cyclic_object": _cyclic,
    "warm_restarts": lambda optim: lr_scheduler.CosineAnnealingWarmRestarts(optim, 3, 2),
    "one_cycle": lambda optim: lr_scheduler.OneCycleLR(optim, max_lr=1.0, total_steps=20),
    "one_cycle_three_phase": lambda optim: lr_scheduler.OneCycleLR(
        optim, max_lr=[1.0, 0.5], total_steps=20, three_phase=True, anneal_strategy="linear"
    ),
    "swa": lambda optim: swa_utils.SWALR(optim, swa_lr=0.05, anneal_epochs=5),
}


class Schedule:
    """An optimizer of two groups and a scheduler; each step keeps the learning rates that it leaves."""

    def __init__(self, kind: str, *, tensor_lr: bool = False) -> None:
        self.weights = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        lrs: list[Any] = [torch.tensor(0.5), torch.tensor(0.2)] if tensor_lr else [0.5, 0.2]
        groups = [{"params": [w], "lr": lr} for w, lr in zip(self.weights, lrs, strict=True)]
        self.optim = torch.optim.SGD(groups, momentum=0.9)
        self.scheduler = SCHEDULERS[kind](self.optim)
        self.seen: list[list[float]] = []

    @property
    def state(self) -> dict[str, Any]:
        return {"optim": self.optim, "scheduler": self.scheduler, "seen": {"lrs": self.seen}}

    def step(self, count: int) -> None:
        is_plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
        for _ in range(count):
            for weight in self.weights:
                weight.grad = torch.full_like(weight, 0.1)
            self.optim.step()
            self.scheduler.step(*([1.0] if is_plateau else []))
            self.seen.append([float(group["lr"]) for group in self.optim.param_groups])


def test_every_scheduler_of_torch_is_listed() -> None:
    def found_in(module: Any) -> set[type]:
        return {
            cls
            for name, cls in vars(module).items()
            if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler) and not name.startswith("_")
        } - {lr_scheduler.LRScheduler}

    assert found_in(lr_scheduler) | found_in(swa_utils) == {
        type(Schedule(kind).scheduler) for kind in SCHEDULERS
    }


@pytest.mark.parametrize("kind", SCHEDULERS)
async def test_a_scheduler_goes_on_where_it_was(root: Path, kind: str) -> None:
    """Also in one that has gone on elsewhere: the checkpoint wins."""
    whole = Schedule(kind)
    whole.step(4)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"o": whole.optim, "s": whole.scheduler})
        picture = frozen(whole.scheduler.state_dict())
        whole.step(5)
        for taken in (0, 7):
            resumed = Schedule(kind)
            resumed.step(taken)
            await engine.load({"o": resumed.optim, "s": resumed.scheduler})
            assert_same(frozen(resumed.scheduler.state_dict()), picture)
            resumed.step(5)
            assert resumed.seen[-5:] == whole.seen[-5:]
            assert_same(frozen(resumed.optim), frozen(whole.optim))
            assert_same(frozen(resumed.scheduler.state_dict()), frozen(whole.scheduler.state_dict()))


@pytest.mark.parametrize("kind", ["cosine", "step", "sequential", "one_cycle", "linear"])
async def test_a_scheduler_of_learning_rates_that_are_tensors_goes_on(root: Path, kind: str) -> None:
    whole, resumed = Schedule(kind, tensor_lr=True), Schedule(kind, tensor_lr=True)
    whole.step(4)
    resumed.step(1)
    lrs = [group["lr"] for group in resumed.optim.param_groups]
    await there_and_back(
        root, {"o": whole.optim, "s": whole.scheduler}, {"o": resumed.optim, "s": resumed.scheduler}
    )
    whole.step(5)
    resumed.step(5)
    assert resumed.seen[-5:] == whole.seen[-5:]
    assert all(isinstance(lr, torch.Tensor) for lr in lrs)


@pytest.mark.usefixtures("both_loops")
async def test_a_whole_schedule_is_rewound_to_each_of_its_checkpoints(root: Path) -> None:
    whole = Schedule("sequential")
    async with CheckpointEngine(root) as engine:
        for step in range(0, 8, 2):
            await saved(engine, whole.state, step=step)
            whole.step(2)
        expected = whole.seen[:]
        for step in (6, 0, 4, 2):
            await engine.load({"optim": whole.optim, "scheduler": whole.scheduler}, step)
            del whole.seen[step:]
            whole.step(8 - step)
            assert whole.seen == expected


# --- mixed precision, averages --------------------------------------------------------------------


def _scaled_step(scaler: torch.amp.GradScaler, optim: Optimizer, weight: nn.Parameter, factor: float) -> None:
    optim.zero_grad()
    scaler.scale((weight * factor).sum()).backward()  # type: ignore[no-untyped-call]
    scaler.step(optim)
    scaler.update()


@pytest.mark.usefixtures("both_loops")
async def test_a_grad_scaler_keeps_scale_and_growth(root: Path) -> None:
    def build() -> tuple[Any, Any, Any]:
        weight = nn.Parameter(torch.ones(4))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        return weight, torch.optim.SGD([weight], lr=0.01), scaler

    weight, optim, scaler = build()
    for factor in (1.0, 1.0, float("inf"), 1.0, 1.0):
        _scaled_step(scaler, optim, weight, factor)
    assert scaler.get_scale() == 2.0**9
    for taken in (0, 4):
        fresh_weight, fresh_optim, fresh = build()
        for _ in range(taken):
            _scaled_step(fresh, fresh_optim, fresh_weight, 1.0)
        with torch.no_grad():
            fresh_weight.copy_(weight)
        await there_and_back(root / str(taken), {"scaler": scaler}, {"scaler": fresh})
        assert fresh.state_dict() == scaler.state_dict()
        assert fresh.state_dict()["_growth_tracker"] == 2
        _scaled_step(fresh, fresh_optim, fresh_weight, 1.0)
        assert fresh.get_scale() == 2.0**10


async def test_a_disabled_grad_scaler_is_no_trouble(root: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    await there_and_back(
        root, {"scaler": scaler, "x": torch.ones(1)}, {"scaler": scaler, "x": torch.zeros(1)}
    )
    assert scaler.state_dict() == {}


@pytest.mark.parametrize("kind", ["swa", "ema"])
async def test_an_averaged_model_goes_on_averaging(root: Path, kind: str) -> None:
    def build(seed: int) -> tuple[nn.Module, Any]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        if kind == "swa":
            return model, swa_utils.AveragedModel(model)
        ema = swa_utils.get_ema_multi_avg_fn(0.9)  # type: ignore[no-untyped-call]
        return model, swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True)

    def step(model: nn.Module, averaged: Any, count: int) -> None:
        for _ in range(count):
            with torch.no_grad():
                for weight in model.parameters():
                    weight.mul_(1.1).add_(0.01)
            averaged.update_parameters(model)

    model, averaged = build(1)
    step(model, averaged, 3)
    other, other_averaged = build(2)
    step(other, other_averaged, 1)
    await there_and_back(
        root, {"model": model, "averaged": averaged}, {"model": other, "averaged": other_averaged}
    )
    assert int(other_averaged.n_averaged) == 3
    step(model, averaged, 2)
    step(other, other_averaged, 2)
    assert_same(frozen(other_averaged), frozen(averaged))


async def test_an_ema_in_a_plain_dict_is_filled_in_place(root: Path) -> None:
    model = nn.Linear(3, 2)
    ema = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    target = {name: torch.zeros_like(weight) for name, weight in ema.items()}
    objects = list(target.values())
    await there_and_back(root, {"ema": ema}, {"ema": target})
    assert_same(target, ema)
    assert all(new is old for new, old in zip(target.values(), objects, strict=True))


# --- random numbers -------------------------------------------------------------------------------


async def test_generators_of_torch_numpy_and_python_go_on(root: Path) -> None:
    def draw() -> list[Any]:
        return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(), random.gauss(0, 1)]

    torch.manual_seed(3)
    np.random.seed(4)
    random.seed(5)
    random.gauss(0, 1)  # leaves a second number behind, which is state too
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"rng": RNGState()})
        expected = draw()
        assert draw() != expected
        await engine.load({"rng": RNGState()})
    assert draw() == expected


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
async def test_a_generator_of_numpys_goes_on(root: Path, kind: str) -> None:
    """Its state is a nested dict of arrays and of integers far beyond 64 bits."""
    rng = np.random.Generator(getattr(np.random, kind)(3))
    rng.normal(size=3)
    rng.integers(9, dtype=np.uint32)  # half a word is left behind
    state: dict[str, Any] = {"numpy": {"rng": rng.bit_generator.state}}
    async with CheckpointEngine(root) as engine:
        await saved(engine, state)
        expected = [rng.normal(size=4).tolist(), int(rng.integers(99, dtype=np.uint32))]
        other = np.random.Generator(getattr(np.random, kind)(77))
        target: dict[str, Any] = {"numpy": {"rng": other.bit_generator.state}}
        await engine.load(target)
        other.bit_generator.state = target["numpy"]["rng"]
        assert [other.normal(size=4).tolist(), int(other.integers(99, dtype=np.uint32))] == expected
        other.bit_generator.state = (await engine.read())["numpy"]["rng"]
        assert [other.normal(size=4).tolist(), int(other.integers(99, dtype=np.uint32))] == expected


async def test_a_torch_generator_goes_on(root: Path) -> None:
    generator, other = torch.Generator().manual_seed(3), torch.Generator()
    torch.randn(3, generator=generator)
    target = {"generator": other.get_state()}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"generator": generator.get_state()})
        expected = torch.randn(5, generator=generator)
        await engine.load(target)
    other.set_state(target["generator"])
    assert_same(torch.randn(5, generator=other), expected)


async def test_a_random_random_goes_on(root: Path) -> None:
    rng, other = random.Random(3), random.Random(4)
    rng.gauss(0, 1)
    target: dict[str, Any] = {"rng": other.getstate()}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"rng": rng.getstate()})
        await engine.load(target)
    other.setstate(target["rng"])
    assert [other.gauss(0, 1), other.random()] == [rng.gauss(0, 1), rng.random()]


# --- modules --------------------------------------------------------------------------------------


async def test_batch_norm_comes_back_with_its_statistics(root: Path) -> None:
    model, other = nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    for _ in range(3):
        model(torch.randn(8, 4))
    await there_and_back(root, {"model": model}, {"model": other})
    assert int(other.num_batches_tracked) == 3  # type: ignore[arg-type]  # a tensor where it tracks
    batch = torch.randn(8, 4)
    assert_same(other.eval()(batch), model.eval()(batch))


class Tied(nn.Module):
    """A language model's tie: head and embedding are one parameter."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 64)
        self.lm_head = nn.Linear(64, rows, bias=False)
        self.lm_head.weight = self.embed.weight


async def test_tied_embeddings_are_stored_once_and_stay_tied(root: Path) -> None:
    model, other = Tied(1024), Tied(1024)
    optim = torch.optim.SGD(other.parameters(), lr=0.1)
    found = await there_and_back(root, {"model": model}, {"model": other})
    nbytes = sum(path.stat().st_size for path in data_files(root / "step-00000000"))
    assert 256 * KIB <= nbytes < 2 * 256 * KIB
    assert other.lm_head.weight is other.embed.weight
    assert optim.param_groups[0]["params"][0] is other.embed.weight
    assert_same(frozen(other), frozen(model))
    embed, head = found["model"]["embed.weight"], found["model"]["lm_head.weight"]
    assert embed.data_ptr() == head.data_ptr()
    assert_same(embed, model.embed.weight.detach())


async def test_a_tie_that_the_target_has_not_is_loaded_into_both(root: Path) -> None:
    model, other = Tied(8), Tied(8)
    other.lm_head.weight = nn.Parameter(torch.zeros(8, 64))
    await there_and_back(root, {"model": model}, {"model": other})
    assert other.lm_head.weight is not other.embed.weight
    assert_same(frozen(other), frozen(model))


class Doubling(nn.Module):
    """A parametrization of the user's own, with a buffer."""

    factor: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(2.0))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * self.factor


def _doubled() -> nn.Module:
    from torch.nn.utils import parametrize

    return parametrize.register_parametrization(nn.Linear(4, 3), "weight", Doubling())


def _pruned() -> nn.Module:
    from torch.nn.utils import prune

    module: nn.Module = prune.random_unstructured(nn.Linear(4, 3), "weight", 0.5)  # type: ignore[no-untyped-call]
    return module


ODD_MODULES: dict[str, Callable[[], nn.Module]] = {
    "parametrize": _doubled,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "spectral_norm_by_hooks": lambda: nn.utils.spectral_norm(nn.Linear(4, 3)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)),
    "pruned": _pruned,
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    "recurrent": lambda: nn.Sequential(nn.Linear(4, 4), nn.GRUCell(4, 4)),
}


@pytest.mark.parametrize("kind", ODD_MODULES)
async def test_an_odd_module_computes_what_it_did(root: Path, kind: str) -> None:
    torch.manual_seed(1)
    module = ODD_MODULES[kind]()
    torch.manual_seed(2)
    other = ODD_MODULES[kind]()
    batch = torch.randn(5, 4)
    module(batch)  # spectral norm iterates in training
    await there_and_back(root, {"module": module}, {"module": other})
    assert_same(frozen(other), frozen(module))
    assert_same(other(batch), module(batch))
    assert_same(other.eval()(batch), module.eval()(batch))


async def test_containers_of_parameters_come_back(root: Path) -> None:
    def build() -> nn.Module:
        parameters = nn.ParameterDict({"a": nn.Parameter(torch.randn(4)), "b": torch.randn(2)})
        layers = nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.ModuleList([nn.Linear(2, 1), nn.Identity()])})
        return nn.ModuleList([parameters, nn.ParameterList([torch.randn(2), torch.randn(3)]), layers])

    module, other = build(), build()
    await there_and_back(root, {"module": module}, {"module": other})
    assert_same(frozen(other), frozen(module))


async def test_a_lazy_module_is_like_any_other_once_it_has_shapes(root: Path) -> None:
    module, other = (
        nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()),
        nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()),
    )
    for lazy in (module, other):
        lazy(torch.randn(5, 4))
    await there_and_back(root, {"module": module}, {"module": other})
    assert_same(frozen(other), frozen(module))


async def test_a_lazy_module_without_shapes_can_be_loaded_into_but_not_saved(root: Path) -> None:
    ready, lazy = nn.LazyLinear(3), nn.LazyLinear(3)
    ready(torch.randn(5, 4))
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"module\.weight.*(?i:uninitialized)"):
            await engine.save({"module": lazy}, step=1)
        await saved(engine, {"module": ready}, step=2)
        await engine.load({"module": lazy})
    assert_same(frozen(lazy), frozen(ready))
    assert_holds_only(root, ["step-00000002"])


class Extra(nn.Module):
    """Has something to save beside its tensors, in a form of its own."""

    _version = 3

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.extra = extra
        self.versions: list[int | None] = []

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        self.versions.append(local_metadata.get("version"))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


EXTRAS: dict[str, tuple[Any, Any]] = {
    "dict": ({"scale": 2.0, "name": "x", "deep": {"n": 1}}, {"scale": 0.0, "name": "", "deep": {"n": 0}}),
    "dict_of_tensors": ({"amax": torch.arange(4.0)}, {"amax": torch.zeros(4)}),
    "dict_from_empty": ({"amax": torch.arange(4.0), "n": 1}, {}),
    "tensor": (torch.arange(5), torch.zeros(5, dtype=torch.int64)),
    "list": ([1, "two", 3.0], [0]),
    "list_of_tensors": ([torch.ones(2), torch.zeros(3)], [torch.zeros(2), torch.ones(3)]),
    "tuple": ((1, torch.ones(2)), (0, torch.zeros(2))),
    "none": (None, 7),
    "text": ("recipe", None),
    "bytes": (b"\x80\x02opaque", b""),
}


@pytest.mark.parametrize("through", ["plainly", "app_state"])
@pytest.mark.parametrize("kind", EXTRAS)
async def test_extra_state_comes_back(root: Path, kind: str, through: str) -> None:
    source, before = EXTRAS[kind]
    module, other = Extra(source), Extra(before)
    wrap: Callable[[nn.Module], Any] = AppState if through == "app_state" else lambda plain: plain
    await there_and_back(
        root, {"module": wrap(nn.Sequential(module))}, {"module": wrap(nn.Sequential(other))}
    )
    assert_same(other.extra, source)
    assert_same(other.weight.detach(), module.weight.detach())


async def test_extra_state_in_a_stream_comes_back(root: Path) -> None:
    """As modules of eight-bit floats keep theirs. A stream is bytes and a position: nothing to distrust."""
    module, other = Extra(io.BytesIO(b"recipe and amax")), Extra(io.BytesIO())
    found = await there_and_back(root, {"module": module}, {"module": other})
    assert other.extra.getvalue() == b"recipe and amax"
    assert found["module"]["_extra_state"].getvalue() == b"recipe and amax"


async def test_a_module_still_learns_the_version_of_its_state(root: Path) -> None:
    """torch keeps it in an attribute of the dict, and modules migrate older ones by it."""
    module, other = nn.Sequential(Extra({"a": 1})), nn.Sequential(Extra({"a": 2}))
    await there_and_back(root, {"module": module}, {"module": other})
    assert other[0].versions == [3]


async def test_buffers_that_are_not_persistent_are_left_alone(root: Path) -> None:
    def build(value: float) -> nn.Module:
        module = nn.Linear(2, 2)
        module.register_buffer("cache", torch.full((2,), value), persistent=False)
        return module

    module, other = build(1.0), build(2.0)
    found = await there_and_back(root, {"module": module}, {"module": other})
    assert_same(other.cache, torch.full((2,), 2.0))
    assert set(found["module"]) == {"weight", "bias"}


# --- compiled -------------------------------------------------------------------------------------


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


# a warning of torch about one release of CPython, not about what is saved
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
async def test_a_compiled_module_comes_back(root: Path) -> None:
    plain, other = nn.Linear(4, 3), nn.Linear(4, 3)
    source, target = compiled(plain), compiled(other)
    batch = torch.randn(5, 4)
    expected = source(batch)
    await there_and_back(root, {"module": source}, {"module": target})
    assert_same(frozen(other), frozen(plain))
    assert_same(target(batch), expected)


@pytest.mark.parametrize("which", ["saved", "loaded"])
async def test_app_state_makes_a_compiled_module_a_plain_one(root: Path, which: str) -> None:
    plain, other = nn.Linear(4, 3), nn.Linear(4, 3)
    source = compiled(plain) if which == "saved" else plain
    target = compiled(other) if which == "loaded" else other
    found = await there_and_back(root, {"app": AppState(source)}, {"app": AppState(target)})
    assert set(found["app"]["model"]) == {"weight", "bias"}
    assert_same(frozen(other), frozen(plain))


# --- Statefuls of the user's ----------------------------------------------------------------------


class Counter:
    """The least that a Stateful can be."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.tensor = torch.full((3,), float(value))
        self.loads = 0

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "tensor": self.tensor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]
        self.tensor = state["tensor"]
        self.loads += 1


@pytest.mark.usefixtures("both_loops")
async def test_statefuls_come_back_from_wherever_they_are(root: Path) -> None:
    def build(start: int) -> tuple[list[Counter], dict[str, Any]]:
        made = [Counter(start + index) for index in range(6)]
        nested = {"b": [made[3], [made[4], {"deep": made[5]}]], "n": start}
        return made, {"top": made[0], "dict": {"a": made[1]}, "list": [made[2], nested]}

    source, state = build(10)
    targets, target = build(50)
    await there_and_back(root, state, target)
    assert [counter.value for counter in targets] == [counter.value for counter in source]
    assert_same([counter.tensor for counter in targets], [counter.tensor for counter in source])
    assert [counter.loads for counter in targets] == [1] * 6
    assert target["list"][1]["n"] == 10


async def test_a_stateful_may_hold_others_in_its_state_dict(root: Path) -> None:
    class Outer(Counter):
        def __init__(self, value: int) -> None:
            super().__init__(value)
            self.inner = Counter(value + 1)

        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "inner": self.inner.state_dict()}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            self.inner.load_state_dict(state["inner"])

    source, target = Outer(3), Outer(8)
    await there_and_back(root, {"outer": source}, {"outer": target})
    assert (target.value, target.inner.value, target.inner.loads) == (3, 4, 1)


class Refusing:
    """Base of the Statefuls below: loading must not get as far as this."""

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError("load_state_dict was called")


class ByCoroutine(Refusing):
    async def state_dict(self) -> dict[str, Any]:
        return {"x": 1}


class ByAsyncGenerator(Refusing):
    async def state_dict(self) -> Any:
        yield "x", 1


class ByFuture(Refusing):
    def state_dict(self) -> Any:
        return asyncio.get_running_loop().create_future()


class ByTask(Refusing):
    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[Any]] = []

    async def _later(self) -> dict[str, Any]:
        return {"x": 1}

    def state_dict(self) -> Any:
        self.tasks.append(asyncio.ensure_future(self._later()))
        return self.tasks[-1]


class ByThread(Refusing):
    def state_dict(self) -> Any:
        return concurrent.futures.Future[Any]()


class ByAwaitable(Refusing):
    def state_dict(self) -> Any:
        return self

    def __await__(self) -> Iterator[Any]:
        return iter(())


ASYNCHRONOUS = [ByCoroutine, ByAsyncGenerator, ByFuture, ByTask, ByThread, ByAwaitable]


@pytest.mark.parametrize(
    ("make", "nested"),
    [*((make, False) for make in ASYNCHRONOUS), (ByCoroutine, True), (ByAsyncGenerator, True)],
)
async def test_an_asynchronous_state_dict_is_refused_with_advice(
    root: Path, make: Callable[[], Any], nested: bool
) -> None:
    stateful = make()
    state = {"n": {"list": [stateful]}, "x": torch.ones(2)} if nested else {"n": stateful, "x": torch.ones(2)}
    complaint = rf"{'n.list.0' if nested else 'n'}: {type(stateful).__name__}.*asynchronous.*plain dict"
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=complaint) as caught:
            await engine.save(state, step=5)
        assert (caught.value.phase, engine.pending) == ("capture", ())
        assert not root.exists() or list(root.iterdir()) == []
        await saved(engine, {"n": {"x": 1}, "x": torch.zeros(2)}, step=1)
        if make in (ByCoroutine, ByAsyncGenerator):  # others are not asked, so nobody finds out
            with pytest.raises(IncompatibleStateError, match=complaint):
                await engine.load(state)
            assert_same(state["x"], torch.ones(2))
        for task in getattr(stateful, "tasks", ()):
            assert not task.cancelled()  # it is the trainer's own
            await task
        await saved(engine, {"n": 2}, step=2)
    assert_holds_only(root, ["step-00000001", "step-00000002"])
    del stateful, state, caught
    gc.collect()  # a coroutine that nobody awaited complains when it goes
