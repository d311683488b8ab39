"""What was saved comes back bit for bit, by load into existing targets and by read into fresh ones."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from dcp_async import CheckpointEngine, LoadError, SaveError, StagingOptions, sync
from tests.support.doubles import (
    DTYPES,
    PATIENCE,
    SHAPES,
    Net,
    TrainingRun,
    assert_same,
    blank,
    data_files,
    frozen,
    mapped_arena_bytes,
    random_tensor,
)
from tests.support.saves import PART, SMALL

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")


def zeros_like_all(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
async def test_load_fills_every_bit(root: Path, dtype: torch.dtype) -> None:
    saved = {f"t{index}": random_tensor(dtype, shape, index) for index, shape in enumerate(SHAPES)}
    target = zeros_like_all(saved)
    addresses = {name: tensor.data_ptr() for name, tensor in target.items()}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        response = await engine.save({"x": saved})
        await response.upload_completion
        await engine.load({"x": target})
    assert_same(target, saved)
    assert {name: tensor.data_ptr() for name, tensor in target.items()} == addresses


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
async def test_read_returns_every_bit(root: Path, dtype: torch.dtype) -> None:
    saved = {f"t{index}": random_tensor(dtype, shape, index) for index, shape in enumerate(SHAPES)}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save({"x": saved})).upload_completion
        assert_same(await engine.read(), {"x": saved})


@pytest.mark.parametrize("num_parts", [2, 3, 5])
async def test_tensors_span_parts_of_a_small_budget(root: Path, num_parts: int) -> None:
    sizes = [1, PART - 1, PART, PART + 1, 3 * PART + 17, 64, 4095, 4096, 4097, 11 * PART, 0, 2 * PART]
    saved = {f"t{i}": random_tensor(torch.uint8, (size,), i) for i, size in enumerate(sizes)}
    staging = StagingOptions(part_bytes=PART, budget_bytes=num_parts * PART)
    async with CheckpointEngine(root, staging=staging) as engine:
        for _ in range(2):
            await (await engine.save(saved)).upload_completion
        target = zeros_like_all(saved)
        await engine.load(target)
        assert_same(await engine.read(), saved)
    assert_same(target, saved)


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    sizes=st.lists(st.integers(0, 3 * PART) | st.integers(0, 200), max_size=40),
    num_parts=st.integers(2, 4),
)
def test_any_layout_comes_back(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], num_parts: int
) -> None:
    saved = {f"t{i}": random_tensor(torch.uint8, (size,), i) for i, size in enumerate(sizes)}
    staging = StagingOptions(part_bytes=PART, budget_bytes=num_parts * PART)
    with sync.CheckpointEngine(tmp_path_factory.mktemp("any"), staging=staging) as engine:
        engine.save({"x": saved, "n": len(sizes)}).upload_completion.result(PATIENCE)
        assert_same(engine.read()["n"], len(sizes))
        target = zeros_like_all(saved)
        engine.load({"x": target})
    assert_same(target, saved)


async def test_default_options_carry_many_megabytes(root: Path) -> None:
    saved = {f"w{i}": random_tensor(torch.bfloat16, (1024, 1031), i) for i in range(20)}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(saved)).upload_completion
        target = zeros_like_all(saved)
        await engine.load(target)
    assert_same(target, saved)


async def assert_comes_back(root: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Into targets, and as a fresh state."""
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save({"m": tensors})).upload_completion
        target = zeros_like_all(tensors)
        await engine.load({"m": target})
        assert_same(target, tensors)
        assert_same(await engine.read(), {"m": tensors})


async def test_two_thousand_small_tensors(root: Path) -> None:
    saved = {f"t{i}": random_tensor(torch.float32, (i % 37,), i) for i in range(2000)}
    await assert_comes_back(root, saved)


async def test_pool_stays_within_the_budget(root: Path) -> None:
    before = mapped_arena_bytes()
    saved = {f"w{i}": random_tensor(torch.uint8, (4 * PART + i,), i) for i in range(16)}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save(saved)).upload_completion
        assert 0 < mapped_arena_bytes() - before <= 4 * PART


# --- strides and other views ---------------------------------------------------------------------


def views() -> dict[str, torch.Tensor]:
    base = random_tensor(torch.float32, (60, 70), 1)
    return {
        "transposed": base.t(),
        "stepped": base[::3, 1::2],
        "narrow": base.narrow(0, 7, 11),
        "column": base[:, 5],
        "expanded": base[:, :1].expand(60, 9),
        "expanded_scalar": torch.tensor(3.5).expand(4, 4),
        "permuted": random_tensor(torch.int16, (3, 4, 5), 2).permute(2, 0, 1),
        "channels_last": random_tensor(torch.float32, (2, 3, 8, 8), 3).to(memory_format=torch.channels_last),
        "size_one": base[:1].t(),
        "big_transposed": random_tensor(torch.uint8, (300, 700), 4).t(),
    }


async def test_views_are_saved_by_value(root: Path) -> None:
    saved = views()
    await assert_comes_back(root, saved)


@pytest.mark.parametrize("name", ["transposed", "permuted", "channels_last", "big_transposed"])
async def test_read_keeps_dense_strides(root: Path, name: str) -> None:
    saved = views()[name]
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save({"v": saved})).upload_completion
        assert (await engine.read())["v"].stride() == saved.stride()


async def test_load_fills_targets_of_any_stride(root: Path) -> None:
    value = random_tensor(torch.float32, (130, 140), 5)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save({"a": value, "b": value})).upload_completion
        frame = torch.full((132, 300), 7.0)
        target = {"a": torch.zeros(140, 130).t(), "b": frame[1:131, 4:284:2]}
        await engine.load(target)
    assert_same(target, {"a": value, "b": value})
    frame[1:131, 4:284:2] = 7.0
    assert bool((frame == 7.0).all())


async def test_lazy_conjugates_and_negatives_are_resolved(root: Path) -> None:
    base = torch.randn(50, 3, dtype=torch.complex64)
    saved = {"conj": base.conj(), "neg": base.conj().imag, "plain": base}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(saved)).upload_completion
        assert_same(await engine.read(), saved)


async def test_views_of_one_storage_that_differ_in_a_flag_are_no_ties(root: Path) -> None:
    base = torch.randn(50, 3, dtype=torch.complex64)
    real = torch.randn(8, 8)
    saved = {
        "plain": base,
        "conj": base.conj(),
        "negative": base.conj().imag,
        "positive": base.imag,
        "bits": real.view(torch.int32),
        "real": real,
        "flat": real.view(64),
        "turned": real.t(),
    }
    target = zeros_like_all(saved)
    async with CheckpointEngine(root) as engine:
        await (await engine.save(saved)).upload_completion
        await engine.load(target)
        assert_same(target, saved)
        assert_same(await engine.read(), saved)


async def test_sparse_targets_are_filled_or_refused(root: Path) -> None:
    target = {"s": torch.zeros(9, 9).to_sparse(), "w": torch.zeros(3)}
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"s": torch.eye(9).to_sparse(), "w": torch.ones(3)})).upload_completion
        try:
            await engine.load(target)
        except LoadError:
            assert_same(target["w"], torch.zeros(3))
        else:
            assert_same(target["s"].to_dense(), torch.eye(9))


async def test_sparse_tensors_come_back(root: Path) -> None:
    saved = torch.eye(9).to_sparse()
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"s": saved})).upload_completion
        assert_same((await engine.read())["s"].to_dense(), saved.to_dense())


async def test_parameters_that_require_grad_are_saved_and_filled(root: Path) -> None:
    saved = torch.nn.Parameter(torch.randn(40, 50))
    target = torch.nn.Parameter(torch.zeros(40, 50))
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"p": saved, "g": saved * 2})).upload_completion
        await engine.load({"p": target})
    assert_same(target.data, saved.data)
    assert target.requires_grad
    assert target.grad_fn is None


async def test_inference_tensors_are_saved(root: Path) -> None:
    with torch.inference_mode():
        saved = torch.arange(30000, dtype=torch.float32) * 1.5
    async with CheckpointEngine(root, staging=StagingOptions(overlap=True)) as engine:
        await (await engine.save({"i": saved})).upload_completion
        assert_same((await engine.read())["i"], saved.clone())


async def test_a_gradient_context_is_not_needed_to_load(root: Path) -> None:
    model = torch.nn.Linear(20, 30)
    other = torch.nn.Linear(20, 30)
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"model": model})).upload_completion
        with torch.enable_grad():
            await engine.load({"model": other})
    assert_same(frozen(other), frozen(model))
    assert all(parameter.grad_fn is None for parameter in other.parameters())


# --- structure -----------------------------------------------------------------------------------


T0 = random_tensor(torch.float32, (3, 4), 10)
T1 = random_tensor(torch.int64, (5,), 11)

STRUCTURES: dict[str, dict[str, Any]] = {
    "leaf": {"a": 1},
    "leaves": {
        "i": 7,
        "f": 0.1,
        "s": "text",
        "n": None,
        "b": True,
        "y": b"bytes",
        "nan": float("nan"),
        "big": 1 << 80,
    },
    "nested": {"a": {"b": {"c": {"d": T0, "e": [T1, {"f": T0}]}}}},
    "lists": {"l": [1, 2, 3], "m": [T0, T1], "o": [[T0], [1], []], "p": [{"x": 1}, 2, T1]},
    "tuples": {"t": (1, 2), "u": (T0, T1), "v": ((T0,), [(1,)], ()), "w": [(T0, 2), (3,)]},
    "int_keys": {"d": {0: T0, 1: T1, 10: "x"}, "m": {"a": {-1: 1, 2: T0}}},
    "empties": {"a": {}, "b": [], "c": (), "d": {"e": {}, "f": [[], {}, ()]}, "g": [{}]},
    "dotted": {"a.b": {"c": T0}, "a": {"x.y": T1}, ".": 1},
    "strings": {"d": {"0": 1, "1": T0}, "e": {"": 5}},
    "odd_names": {"a/b": T0, "../x": T1, "sp ace": 1, "uml\u00e4ut": T0, "new\nline": T1},
    "sets": {"s": {1, 2, 3}, "f": frozenset({"a"}), "r": range(3), "c": 1 + 2j},
    "none": {"a": None, "b": {"c": None}},
    "empty_state": {},
}


@pytest.mark.parametrize("name", STRUCTURES)
async def test_read_returns_the_structure_that_was_saved(root: Path, name: str) -> None:
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save(STRUCTURES[name])).upload_completion
        assert_same(await engine.read(), STRUCTURES[name])


@pytest.mark.parametrize("name", ["leaves", "nested", "lists", "tuples", "int_keys", "empties", "dotted"])
async def test_load_restores_the_structure_in_place(root: Path, name: str) -> None:
    saved = STRUCTURES[name]
    target = blank(saved)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save(saved)).upload_completion
        await engine.load(target)
    assert_same(target, saved)


@pytest.mark.parametrize("key", [(1, 2), b"bytes", None, 1.5, True], ids=repr)
async def test_keys_of_other_types_come_back_or_are_refused(root: Path, key: Any) -> None:
    saved = {"d": {key: T0, "x": 1}}
    async with CheckpointEngine(root) as engine:
        try:
            await (await engine.save(saved)).upload_completion
        except SaveError:
            return
        assert_same(await engine.read(), saved)


KEYS = st.sampled_from(["a", "b", "cc", "weight"]) | st.integers(0, 3)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
    | st.builds(random_tensor, st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3))
)  # fmt: skip
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
    ),
    max_leaves=12,
)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(tree=st.dictionaries(st.sampled_from(["x", "y", "z"]), TREES, max_size=3))
def test_read_returns_any_structure(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]) -> None:
    with sync.CheckpointEngine(tmp_path_factory.mktemp("tree"), staging=SMALL) as engine:
        engine.save(tree).upload_completion.result(PATIENCE)
        assert_same(engine.read(), tree)


async def test_read_keeps_the_order_of_keys(root: Path) -> None:
    saved = {"z": T0, "a": {"k": 1, "b": T1, "a": {}}, "m": [1], "b": 2}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(saved)).upload_completion
        result = await engine.read()
    assert list(result) == list(saved)
    assert list(result["a"]) == ["k", "b", "a"]


async def test_read_gives_tensors_of_its_own_each_time(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"x": torch.ones(10)})).upload_completion
        first, second = await engine.read(), await engine.read()
    first["x"].zero_()
    assert_same(second["x"], torch.ones(10))


async def test_read_of_keys_takes_whole_subtrees_and_nothing_else(root: Path) -> None:
    saved = {"model": {"a": T0, "ab": T1, "n": 3}, "optim": {"a": T1}}
    async with CheckpointEngine(root) as engine:
        await (await engine.save(saved)).upload_completion
        assert_same(await engine.read(keys=["model"]), {"model": saved["model"]})
        assert_same(await engine.read(keys=["model.a"]), {"model": {"a": T0}})
        assert_same(await engine.read(keys=["model.n", "optim"]), {"model": {"n": 3}, "optim": {"a": T1}})


async def test_read_of_an_unknown_key_is_an_error_that_names_it(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"model": {"a": T0}})).upload_completion
        with pytest.raises(LoadError, match=r"model\.b"):
            await engine.read(keys=["model.b"])


async def test_ties_come_back_tied(root: Path) -> None:
    tied = random_tensor(torch.float32, (100, 90), 1)
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"a": tied, "b": {"c": tied}, "d": tied.clone()})).upload_completion
        result = await engine.read()
    assert result["a"].data_ptr() == result["b"]["c"].data_ptr()
    assert result["a"].data_ptr() != result["d"].data_ptr()
    assert_same(result["b"]["c"], tied)


async def test_a_tied_model_loads_into_a_tied_model(root: Path) -> None:
    saved, target = Net(), Net()
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"model": saved})).upload_completion
        await engine.load({"model": target})
    assert_same(frozen(target), frozen(saved))
    assert target.head.weight is target.embed.weight


async def test_a_tied_checkpoint_loads_into_an_untied_model(root: Path) -> None:
    saved, target = Net(), Net()
    target.head.weight = torch.nn.Parameter(torch.zeros_like(saved.embed.weight))
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"model": saved})).upload_completion
        await engine.load({"model": target})
    assert_same(frozen(target), frozen(saved))


async def test_leaves_are_replaced_in_the_mappings_of_the_caller(root: Path) -> None:
    inner: dict[str, Any] = {"epoch": 0, "name": "old", "best": None}
    state: dict[str, Any] = {"meta": inner, "count": 0, "history": []}
    async with CheckpointEngine(root) as engine:
        saved = {"meta": {"epoch": 9, "name": "new", "best": 0.5}, "count": 3, "history": [1.0, 2.0]}
        await (await engine.save(saved)).upload_completion
        await engine.load(state)
    assert state["meta"] is inner
    assert_same(state, saved)


async def test_numpy_leaves_come_back(root: Path) -> None:
    saved = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "f": np.asfortranarray(np.ones((3, 2))),
        "s": np.float64(0.1),
        "d": np.dtype("int16"),
        "u": np.array(["x", "yy"]),
    }
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"n": saved})).upload_completion
        assert_same(await engine.read(), {"n": saved})


async def test_large_python_leaves_come_back(root: Path) -> None:
    saved = {"blob": bytes(range(256)) * 4096, "text": "x" * 300_000, "t": T0, "list": list(range(20_000))}
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save(saved)).upload_completion
        assert_same(await engine.read(), saved)


class Counting:
    """A Stateful that remembers who asked."""

    def __init__(self, value: int = 0) -> None:
        self.value = torch.tensor(value)
        self.asked: list[int] = []
        self.told = 0

    def state_dict(self) -> dict[str, Any]:
        self.asked.append(threading.get_ident())
        return {"value": self.value, "extra": {"plain": int(self.value)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.told += 1
        self.value = state["value"].clone()
        assert state["extra"]["plain"] == int(self.value)


async def test_state_dict_is_called_once_per_save_on_the_callers_thread(root: Path) -> None:
    stateful = Counting(4)
    async with CheckpointEngine(root) as engine:
        await engine.save({"s": stateful, "deep": {"er": [1]}})
        assert stateful.asked == [threading.get_ident()]
        await engine.wait()
    assert stateful.asked == [threading.get_ident()]


async def test_load_hands_the_state_to_each_stateful_once(root: Path) -> None:
    target = Counting(0)
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"s": Counting(4)})).upload_completion
        await engine.load({"s": target})
    assert target.told == 1
    assert int(target.value) == 4


async def test_statefuls_inside_nested_containers_are_saved_and_restored(root: Path) -> None:
    target = Counting(0)
    async with CheckpointEngine(root) as engine:
        await (await engine.save({"parts": {"first": Counting(4)}})).upload_completion
        await engine.load({"parts": {"first": target}})
    assert int(target.value) == 4


async def test_a_training_state_comes_back(root: Path) -> None:
    run, other = TrainingRun(1), TrainingRun(2)
    run.step(3)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        await (await engine.save(run.state)).upload_completion
        await engine.load(other.state)
        assert_same(other.picture(), run.picture())
        assert_same(await engine.read(), run.picture())


async def test_a_save_is_a_snapshot_of_the_moment_it_returned(root: Path) -> None:
    run = TrainingRun(1)
    run.step(2)
    async with CheckpointEngine(root, staging=SMALL) as engine:
        pictures = []
        for _ in range(4):
            pictures.append(run.picture())
            await engine.save(run.state)
            run.step()
        await engine.wait()
        names = [info.checkpoint_id async for info in engine.checkpoints()]
        assert len(names) == 4
        for name, picture in zip(names, pictures, strict=True):
            assert_same(await engine.read(name), picture)


async def test_a_memory_file_system_serves_as_root(root: Path, tmp_path: Path) -> None:
    memory = Path("/dev/shm")
    place = memory / f"{tmp_path.parent.name}-{tmp_path.name}" if memory.is_dir() else root
    saved = {"x": random_tensor(torch.float32, (200, 201), 3), "n": 1}
    try:
        async with CheckpointEngine(place, staging=SMALL) as engine:
            await (await engine.save(saved)).upload_completion
            assert_same(await engine.read(), saved)
    finally:
        for path in sorted(place.glob("**/*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        place.rmdir()


async def test_info_counts_the_bytes_of_the_data_files(root: Path) -> None:
    async with CheckpointEngine(root) as engine:
        info = await (await engine.save({"x": torch.ones(1000), "n": 3})).upload_completion
        listed = await engine.latest()
    files = data_files(root / info.checkpoint_id)
    assert (info.nbytes, info.num_files) == (sum(file.stat().st_size for file in files), len(files))
    assert listed is not None
    assert (listed.checkpoint_id, listed.nbytes, listed.num_files) == (
        info.checkpoint_id,
        info.nbytes,
        info.num_files,
    )
    assert (info.producer, info.torch_version, info.world_size) == ("dcp_async", torch.__version__, 1)


async def test_info_decodes_the_metadata_of_stock(root: Path) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    async with CheckpointEngine(root) as engine:
        info = await (await engine.save({"m": {"w": T0, "n": 3}, "l": [T1, T1]})).upload_completion
        metadata = await info.metadata()
    assert isinstance(metadata, Metadata)
    assert set(metadata.state_dict_metadata) == {"m.w", "m.n", "l.0", "l.1"}
