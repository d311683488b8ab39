"""Targets without memory, targets of another dtype, and whatever a user has set torch to do by default."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.utils.serialization import config as serialization_config

from dcp_async import (
    AppState,
    CheckpointEngine,
    CorruptCheckpointError,
    IncompatibleStateError,
    RNGState,
    SaveError,
    StagingOptions,
)
from dcp_async.sync import CheckpointEngine as BlockingEngine
from tests.support.doubles import (
    PATIENCE,
    Net,
    TrainingRun,
    assert_holds_only,
    assert_same,
    data_files,
    flip,
    frozen,
    random_tensor,
)
from tests.support.saves import SMALL, saved

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real discards:UserWarning"),
]


def on_meta(build: Callable[[], Any] = Net) -> Any:
    with torch.device("meta"):
        return build()


def all_on_meta(module: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


# --- modules on the meta device -------------------------------------------------------------------


@pytest.mark.usefixtures("both_loops")
@pytest.mark.parametrize("atomic", [False, True])
async def test_a_meta_module_becomes_real(root: Path, atomic: bool) -> None:
    model, other = Net(), on_meta()
    model.norm(torch.randn(4, 32))
    other.hidden.weight.requires_grad_(False)
    objects = dict(other.named_parameters())
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await saved(engine, {"model": model})
        report = await engine.load({"model": other}, atomic=atomic)
    assert (report.missing, report.unexpected, report.mismatched) == ((), (), ())
    assert_same(frozen(other), frozen(model))
    assert {tensor.device.type for tensor in [*other.parameters(), *other.buffers()]} == {"cpu"}
    for name, weight in other.named_parameters():
        assert weight is objects[name]
        assert type(weight) is nn.Parameter
        assert weight.is_leaf
        assert weight.requires_grad == (name != "hidden.weight")
    assert other.head.weight is other.embed.weight
    assert type(other.table) is torch.Tensor
    tokens = torch.arange(16)
    assert_same(other.eval()(tokens), model.eval()(tokens))


@pytest.mark.parametrize("through", ["plainly", "app_state"])
@pytest.mark.parametrize("atomic", [False, True])
async def test_an_optimizer_made_before_the_memory_trains_it(root: Path, through: str, atomic: bool) -> None:
    def state(run: TrainingRun) -> dict[str, Any]:
        parts: dict[str, Any] = {"model": run.model, "optim": run.optim}
        if through == "app_state":
            parts = {"app": AppState(run.model, run.optim)}
        return {**parts, "scheduler": run.scheduler, "rng": RNGState()}

    whole = TrainingRun(1)
    whole.step(3)
    resumed = TrainingRun(2)
    resumed.model = on_meta()
    resumed.optim = torch.optim.AdamW(resumed.model.parameters(), lr=1e-2)
    resumed.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(resumed.optim, T_max=50)
    async with CheckpointEngine(root) as engine:
        await saved(engine, state(whole))
        whole.step(2)
        await engine.load(state(resumed), atomic=atomic)
    held = {id(weight) for group in resumed.optim.param_groups for weight in group["params"]}
    assert held == {id(weight) for weight in resumed.model.parameters()}
    resumed.step(2)
    assert_same(resumed.picture(), whole.picture())


async def test_an_optimizer_that_is_not_loaded_trains_the_module_too(root: Path) -> None:
    model, other = Net(), on_meta()
    optim = torch.optim.SGD(other.parameters(), lr=0.1)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": model})
        await engine.load({"model": other})
    other(torch.arange(16)).sum().backward()
    before = frozen(other)
    optim.step()
    assert not torch.equal(other.hidden.weight, before["hidden.weight"])


class Cached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.register_buffer("angles", torch.arange(3.0), persistent=False)
        self.register_buffer("nothing", None)


async def test_buffers_that_no_checkpoint_holds_are_named_in_the_log(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = nn.Sequential(Cached()), on_meta(lambda: nn.Sequential(Cached()))
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": model})
        with caplog.at_level(logging.WARNING):
            await engine.load({"model": other})
            warnings = [text for text in caplog.messages if "0.angles" in text]
            other[0].angles = torch.arange(3.0)
            await engine.load({"model": other})
    assert len(warnings) == 1
    assert len([text for text in caplog.messages if "0.angles" in text]) == 1
    assert_same(frozen(other), frozen(model))


async def test_no_warning_where_those_buffers_have_memory(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = Cached(), on_meta(Cached)
    other.angles = torch.full((3,), 7.0)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": model})
        with caplog.at_level(logging.WARNING):
            await engine.load({"model": other})
    assert caplog.messages == []
    assert_same(other.angles, torch.full((3,), 7.0))


async def test_a_module_partly_on_meta_keeps_the_memory_it_has(root: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    other = nn.Sequential(
        nn.Linear(3, 4), on_meta(lambda: nn.BatchNorm1d(4)), on_meta(lambda: nn.Linear(4, 2))
    )
    places = [weight.data_ptr() for weight in other[0].parameters()]
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": model})
        await engine.load({"model": other})
    assert [weight.data_ptr() for weight in other[0].parameters()] == places
    assert_same(frozen(other), frozen(model))


class Misnamed(nn.Module):
    """Names that look like those of wrappers, without and beside the same ones."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2))
        self.module = nn.Linear(2, 2)
        self.sub = nn.Linear(3, 3)
        self.submodule = nn.Linear(3, 3)
        self.inner = nn.ModuleDict(
            {"module": nn.ModuleDict({"module": nn.Linear(2, 2)}), "x": nn.Linear(2, 2)}
        )


@pytest.mark.parametrize("wrap", [False, True])
async def test_names_that_look_like_a_wrappers_are_told_apart(root: Path, wrap: bool) -> None:
    model, other = Misnamed(), on_meta(Misnamed)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": AppState(model) if wrap else model})
        await engine.load({"model": AppState(other) if wrap else other})
    assert_same(frozen(other), frozen(model))


@pytest.mark.parametrize("wrapped", ["compiled", "plain"])
async def test_a_compiled_meta_module_becomes_real(root: Path, wrapped: str) -> None:
    model, other = Net(), on_meta()
    target: Any = torch.compile(other, backend="eager") if wrapped == "compiled" else other
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": AppState(model)})
        await engine.load({"app": AppState(target)})
    assert_same(frozen(other), frozen(model))
    assert other.head.weight is other.embed.weight


async def test_meta_tensors_in_plain_containers_are_replaced(root: Path) -> None:
    state = {
        "w": torch.randn(4),
        "d": {"x": torch.arange(6).reshape(2, 3).t()},
        "l": [torch.ones(2), {"y": 1.0}],
    }
    target: dict[str, Any] = {
        "w": torch.empty(4, device="meta"),
        "d": {"x": torch.empty(3, 2, dtype=torch.int64, device="meta")},
        "l": [torch.empty(2, device="meta"), {"y": 0.0}],
    }
    async with CheckpointEngine(root) as engine:
        await saved(engine, state)
        await engine.load(target)
    assert_same(target, state)


async def test_odd_tensors_are_made_for_meta_targets(root: Path) -> None:
    state = {"sparse": torch.eye(3).to_sparse(), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.0)}
    target = {
        "sparse": torch.empty(3, 3, device="meta"),
        "empty": torch.empty(0, 3, device="meta"),
        "scalar": torch.empty((), device="meta"),
    }
    async with CheckpointEngine(root) as engine:
        await saved(engine, state)
        await engine.load(target)
    assert_same(target, state)


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("fault", ["shape", "kind", "damage"])
async def test_what_does_not_fit_leaves_the_module_on_meta(root: Path, fault: str, wrap: bool) -> None:
    model, other = Net(), on_meta((lambda: Net(16)) if fault == "shape" else Net)
    state: Any = model if fault != "kind" else {**frozen(model), "table": "a text"}
    if wrap:
        state = AppState(model) if fault != "kind" else {"model": state}
    objects = {name: id(tensor) for name, tensor in other.named_parameters()}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": state}, step=1)
        if fault == "damage":
            (file,) = data_files(root / "step-00000001")
            flip(file, 700)
        error = CorruptCheckpointError if fault == "damage" else IncompatibleStateError
        with pytest.raises(error):
            await engine.load({"model": AppState(other) if wrap else other}, 1)
        assert all_on_meta(other)
        assert {name: id(tensor) for name, tensor in other.named_parameters()} == objects
        if fault == "damage":
            await saved(engine, {"model": state}, step=2)
            await engine.load({"model": AppState(other) if wrap else other})
            assert_same(frozen(other), frozen(model))


async def test_what_is_missing_stays_on_meta_and_is_listed(root: Path) -> None:
    model, other = (
        nn.ModuleDict({"a": nn.Linear(2, 2)}),
        on_meta(lambda: nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})),
    )
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": model})
        report = await engine.load({"model": other}, strict=False)
    assert report.missing == ("model.b.weight", "model.b.bias")
    assert all_on_meta(other["b"])
    assert_same(frozen(other["a"]), frozen(model["a"]))


async def test_a_checkpoint_of_stocks_makes_a_meta_module_real(root: Path) -> None:
    model, other = Net(), on_meta()
    dcp.save({"model": model}, checkpoint_id=root / "step-00000001", no_dist=True)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await engine.load({"model": other})
    assert_same(frozen(other), frozen(model))
    assert other.head.weight is other.embed.weight


async def test_a_meta_module_is_not_saved(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        with pytest.raises(SaveError, match=r"model\..*meta"):
            await engine.save({"model": on_meta()}, step=1)
        await saved(engine, {"x": 1}, step=2)
    assert_holds_only(root, ["step-00000002"])


async def test_a_meta_module_of_another_dtype_is_converted(root: Path) -> None:
    model, other = Net(), on_meta().to(torch.bfloat16)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": model})
        with pytest.raises(IncompatibleStateError, match="dtypes='convert'"):
            await engine.load({"model": other})
        assert all_on_meta(other)
        await engine.load({"model": other}, dtypes="convert")
    assert_same(frozen(other), frozen(model.to(torch.bfloat16)))


def test_the_blocking_twin_makes_a_meta_module_real(root: Path) -> None:
    model, other = Net(), on_meta().to(torch.float64)
    with BlockingEngine(root) as engine:
        engine.save({"model": model}).upload_completion.result(PATIENCE)
        engine.load({"model": other}, dtypes="convert")
    assert_same(frozen(other), frozen(model.double()))


# --- dtypes ---------------------------------------------------------------------------------------

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
INTS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8]
COMPLEX = [torch.complex32, torch.complex64, torch.complex128]


def values_of(dtype: torch.dtype, count: int = 50_001) -> torch.Tensor:
    """An odd number of values, over more than one part, with everything special that the dtype has."""
    if dtype.is_floating_point or dtype.is_complex:
        wide = torch.randn(count, dtype=torch.complex64 if dtype.is_complex else torch.float32)
        wide[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e30]).to(wide.dtype)
        return wide.to(dtype)
    return random_tensor(dtype, (count,), 3)


def pairs() -> Iterator[Any]:
    for kind in (FLOATS, INTS, COMPLEX):
        yield from ((one, other) for one in kind for other in kind if one is not other)
    for one, other in [(torch.int32, torch.float32), (torch.bool, torch.float16), (torch.bool, torch.int64)]:
        yield one, other
    for one, other in [(torch.float32, torch.complex64), (torch.int16, torch.complex128)]:
        yield one, other


@pytest.mark.usefixtures("both_loops")
@pytest.mark.parametrize("atomic", [False, True])
async def test_converted_values_are_those_of_copy(root: Path, atomic: bool) -> None:
    """Bit for bit what stock's load does, which copies what it read into the target."""
    state = {str(dtype): values_of(dtype) for dtype in [*FLOATS, *INTS, *COMPLEX, torch.bool]}
    targets = {
        f"{one} to {other}": (str(one), torch.zeros(50_001, dtype=other), torch.zeros(50_001, dtype=other))
        for one, other in pairs()
    }
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await saved(engine, state)
        while targets:
            batch: dict[str, Any] = {}  # one target of each saved name at a time
            for label, (name, target, expected) in targets.items():
                if name not in batch:
                    batch[name] = (label, target, expected.copy_(state[name]))
            report = await engine.load(
                {name: target for name, (_, target, _) in batch.items()}, atomic=atomic, dtypes="convert"
            )
            assert report.mismatched == ()
            for label, target, expected in batch.values():
                assert_same({label: target}, {label: expected})
                del targets[label]


async def test_the_message_says_how_to_convert(root: Path) -> None:
    target = {"x": torch.zeros(3, dtype=torch.bfloat16), "y": torch.zeros(2)}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": torch.ones(3), "y": torch.ones(2)})
        for load in (engine.load(target), engine.load(target, dtypes="exact")):
            with pytest.raises(IncompatibleStateError, match=r"x is .*bfloat16.*float32.*dtypes='convert'"):
                await load
        assert_same(target, {"x": torch.zeros(3, dtype=torch.bfloat16), "y": torch.zeros(2)})
        with pytest.raises(IncompatibleStateError) as caught:
            await engine.load({"x": torch.zeros(4), "y": torch.zeros(2)})
    assert "dtypes=" not in str(caught.value)  # it would not help a shape


async def test_without_strict_another_dtype_is_listed_and_left_alone(root: Path) -> None:
    target = {"x": torch.zeros(3, dtype=torch.float64), "y": torch.zeros(2)}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": torch.ones(3), "y": torch.ones(2)})
        report = await engine.load(target, strict=False)
    assert report.mismatched == ("x",)
    assert_same(target, {"x": torch.zeros(3, dtype=torch.float64), "y": torch.ones(2)})


@pytest.mark.parametrize(
    ("before", "after"),
    [(torch.complex64, torch.float32), (torch.float32, torch.int64), (torch.float32, torch.bool)],
)
async def test_what_would_lose_its_meaning_is_not_converted(
    root: Path, before: torch.dtype, after: torch.dtype
) -> None:
    target = {"x": torch.zeros(4, dtype=after), "y": torch.zeros(2)}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": torch.ones(4, dtype=before), "y": torch.ones(2)})
        with pytest.raises(IncompatibleStateError) as caught:
            await engine.load(target, dtypes="convert")
        assert "x" in str(caught.value)
        assert_same(target, {"x": torch.zeros(4, dtype=after), "y": torch.zeros(2)})
        report = await engine.load(target, strict=False, dtypes="convert")
    assert report.mismatched == ("x",)
    assert_same(target, {"x": torch.zeros(4, dtype=after), "y": torch.ones(2)})


async def test_converting_does_not_forgive_a_shape(root: Path) -> None:
    target = {"x": torch.zeros(5, dtype=torch.float64)}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": torch.ones(4)})
        with pytest.raises(IncompatibleStateError, match=r"\(5,\).*\(4,\)"):
            await engine.load(target, dtypes="convert")
    assert_same(target, {"x": torch.zeros(5, dtype=torch.float64)})


TARGETS: dict[str, Callable[[], torch.Tensor]] = {
    "transposed": lambda: torch.zeros(300, 200, dtype=torch.float64).t(),
    "strided": lambda: torch.zeros(400, 600, dtype=torch.float64)[::2, ::2],
    "a_view": lambda: torch.zeros(3, 200, 300, dtype=torch.float64)[1],
    "channels_last": lambda: torch.zeros(1, 200, 300, 1, dtype=torch.float64)[0, :, :, 0],
    "parameter": lambda: nn.Parameter(torch.zeros(200, 300, dtype=torch.float64)),
    "conjugate": lambda: torch.zeros(200, 300, dtype=torch.complex128).conj(),
    "negative": lambda: torch.zeros(200, 300, dtype=torch.complex128).conj().imag,
    "eighths": lambda: torch.zeros(200, 300).to(torch.float8_e5m2).t().contiguous().t(),
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("atomic", [False, True])
async def test_targets_of_any_layout_are_converted_into(root: Path, kind: str, atomic: bool) -> None:
    source = torch.randn(200, 300)
    target, expected = TARGETS[kind](), TARGETS[kind]()
    with torch.no_grad():
        expected.copy_(source)
    place = target.data_ptr()
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await saved(engine, {"x": source})
        await engine.load({"x": target}, atomic=atomic, dtypes="convert")
    assert target.data_ptr() == place
    assert_same(target.detach(), expected.detach())


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
async def test_small_shapes_are_converted(root: Path, shape: tuple[int, ...]) -> None:
    target = {"x": torch.zeros(shape, dtype=torch.bfloat16)}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": torch.full(shape, 1.001)})
        await engine.load(target, dtypes="convert")
    assert_same(target, {"x": torch.full(shape, 1.001).bfloat16()})


async def test_a_sparse_tensor_is_converted(root: Path) -> None:
    target = torch.zeros(40, 30, dtype=torch.float64).to_sparse()
    source = torch.randn(40, 30).relu().to_sparse()
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": source})
        await engine.load({"x": target}, dtypes="convert")
    assert_same(target.to_dense(), source.to_dense().double())


@pytest.mark.parametrize("taken", [0, 2])
@pytest.mark.parametrize("through", ["plainly", "app_state"])
@pytest.mark.parametrize("after", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
async def test_a_run_goes_on_in_another_dtype(
    root: Path, after: torch.dtype, through: str, taken: int
) -> None:
    """It holds what torch's own load_state_dict makes of the saved run: moments cast, step counts not."""

    def build(seed: int, dtype: torch.dtype) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
        return model, torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(model: nn.Module, optim: torch.optim.Optimizer, count: int) -> None:
        for _ in range(count):
            optim.zero_grad()
            batch = torch.ones(2, 6, dtype=next(model.parameters()).dtype)
            model(batch).square().mean().backward()
            optim.step()

    def state(model: nn.Module, optim: torch.optim.Optimizer) -> dict[str, Any]:
        return {"app": AppState(model, optim)} if through == "app_state" else {"model": model, "optim": optim}

    source, target, expected = build(1, torch.float32), build(2, after), build(3, after)
    step(*source, 3)
    step(*target, taken)
    expected[0].load_state_dict(source[0].state_dict())
    expected[1].load_state_dict(source[1].state_dict())
    async with CheckpointEngine(root) as engine:
        await saved(engine, state(*source))
        if taken:
            with pytest.raises(IncompatibleStateError, match="dtypes='convert'"):
                await engine.load(state(*target))
        await engine.load(state(*target), dtypes="convert")
    assert_same([frozen(part) for part in target], [frozen(part) for part in expected])
    step(*target, 2)
    step(*expected, 2)
    assert_same([frozen(part) for part in target], [frozen(part) for part in expected])


async def test_a_checkpoint_of_stocks_is_converted(root: Path) -> None:
    source = {"x": torch.randn(300, 200), "n": torch.arange(10, dtype=torch.int32)}
    dcp.save(dict(source), checkpoint_id=root / "step-00000001", no_dist=True)
    target = {"x": torch.zeros(300, 200, dtype=torch.bfloat16), "n": torch.zeros(10, dtype=torch.int64)}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        with pytest.raises(IncompatibleStateError, match="dtypes='convert'"):
            await engine.load(target)
        await engine.load(target, dtypes="convert")
    assert_same(target, {"x": source["x"].bfloat16(), "n": source["n"].long()})


async def test_a_tie_is_converted_once_and_kept(root: Path) -> None:
    model, other = Net(), Net().to(torch.float64)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": model})
        await engine.load({"model": other}, dtypes="convert")
    assert other.head.weight is other.embed.weight
    assert_same(frozen(other), frozen(model.double()))


@pytest.mark.parametrize("value", ["", "Exact", "cast", None, True, torch.float32, ["convert"]])
async def test_any_other_word_for_dtypes_is_a_value_error(root: Path, value: Any) -> None:
    target = {"x": torch.zeros(2)}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": torch.ones(2)})
        with pytest.raises(ValueError, match="dtypes"):
            await engine.load(target, dtypes=value)
    assert_same(target, {"x": torch.zeros(2)})


async def test_damage_is_found_before_a_conversion_is_believed(root: Path) -> None:
    target = {"x": torch.zeros(500, dtype=torch.float64)}
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"x": torch.randn(500)}, step=1)
        (file,) = data_files(root / "step-00000001")
        flip(file, 1000)
        with pytest.raises(CorruptCheckpointError):
            await engine.load(target, atomic=True, dtypes="convert")
    assert_same(target, {"x": torch.zeros(500, dtype=torch.float64)})


# --- what a user has set torch to do --------------------------------------------------------------


patch_serialization: Any = serialization_config.patch  # type: ignore[attr-defined]  # put there at run time


@contextlib.contextmanager
def _default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def _mapped_files() -> Iterator[None]:
    with patch_serialization(**{"load.mmap": True}):
        yield


@contextlib.contextmanager
def _aligned_storages() -> Iterator[None]:
    with patch_serialization(**{"save.storage_alignment": 4096, "load.calculate_storage_offsets": True}):
        yield


@contextlib.contextmanager
def _no_checksums() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


@contextlib.contextmanager
def _swapped_parameters() -> Iterator[None]:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@contextlib.contextmanager
def _other_number_of_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default_device": _default_device,
    "device_context": lambda: torch.device("meta"),
    "default_dtype": _default_dtype,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "anomaly_detection": lambda: torch.autograd.set_detect_anomaly(True),
    "autocast": lambda: torch.autocast("cpu"),
    "deterministic": _deterministic,
    "mapped_files": _mapped_files,
    "aligned_storages": _aligned_storages,
    "no_checksums": _no_checksums,
    "swapped_parameters": _swapped_parameters,
    "other_number_of_threads": _other_number_of_threads,
}


def everything(seed: int) -> dict[str, Any]:
    """A state with a leaf of every kind that is stored in a way of its own."""
    run = TrainingRun(seed)
    run.step(seed)
    generator = torch.Generator().manual_seed(seed)
    return {
        **run.state,
        "sparse": torch.rand(5, 4, generator=generator).relu().to_sparse(),
        "large": torch.randn(300, 200, generator=generator),
        "turned": torch.randn(30, 20, generator=generator).t(),
        "half": torch.randn(6, generator=generator).bfloat16(),
        "array": np.arange(seed, seed + 4),
        "pair": (seed, torch.full((2,), float(seed))),
        "n": seed,
    }


@pytest.mark.parametrize(
    ("setting", "overlap"),
    [
        *((setting, False) for setting in SETTINGS),
        *((setting, True) for setting in ("default_device", "device_context", "inference_mode", "no_grad")),
    ],
)
async def test_a_setting_of_the_users_breaks_neither_save_nor_load(
    root: Path, setting: str, overlap: bool
) -> None:
    source, target = everything(1), everything(2)
    expected = frozen(source)
    async with CheckpointEngine(root, staging=StagingOptions(overlap=overlap)) as engine:
        with SETTINGS[setting]():
            await saved(engine, source, step=1)
            found = await engine.read()
            await engine.load(target)
        assert_same(found, expected)
        assert_same(frozen(target), expected)
        other = everything(3)
        with SETTINGS[setting]():
            await engine.load(other, atomic=True)
        assert_same(frozen(other), expected)
    target["model"].train()(torch.arange(16)).sum().backward()
    target["optim"].step()


@pytest.mark.parametrize("setting", SETTINGS)
async def test_a_setting_of_the_users_does_not_keep_a_module_on_meta(root: Path, setting: str) -> None:
    model, other, converted = Net(), on_meta(), on_meta().double()
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": model})
        with SETTINGS[setting]():
            await engine.load({"model": other})
            await engine.load({"model": converted}, dtypes="convert")
    assert_same(frozen(other), frozen(model))
    assert_same(frozen(converted), frozen(model.double()))
    other(torch.arange(16)).sum().backward()
    assert other.hidden.weight.grad is not None


async def test_tensors_made_in_inference_mode_come_and_go(root: Path) -> None:
    with torch.inference_mode():
        source, target = {"x": torch.randn(300, 200)}, {"x": torch.zeros(300, 200)}
    wide = {"x": torch.zeros(300, 200, dtype=torch.float64)}
    for overlap in (False, True):
        async with CheckpointEngine(root / str(overlap), staging=StagingOptions(overlap=overlap)) as engine:
            await saved(engine, source)
            await engine.load(target)
            assert_same(target, source)
            await engine.load(target, atomic=True)
            await engine.load(wide, dtypes="convert")
            assert_same(wide["x"], source["x"].double())
            assert not (await engine.read())["x"].is_inference()
