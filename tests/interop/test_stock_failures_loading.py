"""What stock ``torch.distributed.checkpoint`` gets wrong when it loads goes right with this engine.

test_stock_failures.py shows stock's outcomes and lists the failures that other suites guard against. Numbers
are issues of pytorch/pytorch unless another project is named.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import os
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType
from torch.utils.serialization import config

from dcp_async import (
    AppState,
    CheckpointEngine,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    IncompatibleStateError,
    LoadError,
    Trust,
    UntrustedCheckpointError,
)
from tests.support.doubles import (
    KIB,
    FaultyStorage,
    TrainingRun,
    assert_same,
    data_files,
    flip,
    frozen,
    random_tensor,
)
from tests.support.saves import SMALL, saved

pytestmark = pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning")

W = random_tensor(torch.int32, (30, 40), 1)


def stock_save(path: Path, state: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    dcp.save(state, storage_writer=FileSystemWriter(path, sync_files=False), no_dist=True)


# --- integrity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tensor", "leaf"])
async def test_a_flipped_byte_of_a_stock_checkpoint_is_noticed(root: Path, where: str) -> None:
    """126952: stock records a CRC-32 of each payload, and never looks at it."""
    stock_save(root / "s", {"other": torch.ones(50), "w": W, "leaf": ["a text that is easy to find"]})
    (file,) = data_files(root / "s")
    wanted = W.numpy().tobytes() if where == "tensor" else b"easy to find"
    flip(file, file.read_bytes().index(wanted) + len(wanted) // 2, mask=1)
    name = "w" if where == "tensor" else "leaf"
    async with CheckpointEngine(root) as engine:
        with pytest.raises(CorruptCheckpointError, match=rf"\b{name}\b"):
            await engine.read("s")
        with pytest.raises(CorruptCheckpointError):
            await engine.load({name: torch.zeros_like(W) if where == "tensor" else None}, "s")
        assert_same(await engine.read("s", keys=["other"]), {"other": torch.ones(50)})


async def test_every_byte_of_a_stock_payload_counts(root: Path) -> None:
    """Also where the tensor is read in pieces, or only in part."""
    whole = random_tensor(torch.uint8, (300 * KIB,), 1)
    stock_save(root / "s", {"w": whole})
    (file,) = data_files(root / "s")
    begin = file.read_bytes().index(whole.numpy().tobytes()[:64])
    async with CheckpointEngine(root, staging=SMALL) as engine:
        assert_same(await engine.read("s"), {"w": whole})
        for position in (0, 1, 64 * KIB - 1, 64 * KIB, 200 * KIB, 300 * KIB - 1):
            flip(file, begin + position, mask=1)
            with pytest.raises(CorruptCheckpointError):
                await engine.read("s")
            flip(file, begin + position, mask=1)
        assert_same(await engine.read("s"), {"w": whole})


DAMAGES: dict[str, Callable[[Path], None]] = {
    "removed": Path.unlink,
    "emptied": lambda path: os.truncate(path, 0),
    "halved": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one_byte_short": lambda path: os.truncate(path, path.stat().st_size - 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("pattern", ["*.distcp", "manifest-*", ".metadata"])
async def test_the_stored_files_tell_whether_a_checkpoint_is_whole(
    root: Path, pattern: str, damage: str
) -> None:
    """76395: "It should be possible to know if a checkpoint ran to completion by only looking at the stored
    objects"."""
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"m": {"w": W, "n": 1}}, step=1)
        await saved(engine, {"m": {"w": W + 1, "n": 2}}, step=2)
        (path,) = (root / "step-00000002").glob(pattern)
        DAMAGES[damage](path)
        latest = await engine.latest()
        assert latest is not None
        assert latest.step == 1
        assert [info.step async for info in engine.checkpoints()] == [1]
        target = {"m": {"w": torch.zeros_like(W), "n": 0}}
        with pytest.raises(LoadError, match=r"step-00000002|no checkpoint 2"):
            await engine.load(target, 2)
        assert_same(target, {"m": {"w": torch.zeros_like(W), "n": 0}})
        report = await engine.load(target)
        assert report.step == 1
        assert report.skipped == (
            () if path.name == ".metadata" and damage == "removed" else ("step-00000002",)
        )
        assert_same(target, {"m": {"w": W, "n": 1}})


async def test_a_load_right_after_save_gets_what_is_committed(root: Path, faulty: FaultyStorage) -> None:
    """torchtitan 930: it failed on a directory without `.metadata`. Ours waits for its own saves; another
    engine sees what is committed."""
    async with CheckpointEngine(faulty) as engine, CheckpointEngine(root) as other:
        target = {"w": torch.zeros_like(W)}
        with faulty.hold("commit", times=1) as gate:
            await engine.save({"w": W}, step=1)
            for source in ("latest", "step-00000001", 1):
                with pytest.raises(CheckpointNotFoundError):
                    await other.load(target, source)
            assert_same(target, {"w": torch.zeros_like(W)})
            loads = [
                asyncio.create_task(engine.load({"w": torch.zeros_like(W)}, source))
                for source in ("latest", "step-00000001", 1)
            ]
            await asyncio.wait(loads, timeout=0)
            gate.release()
            assert [(await load).step for load in loads] == [1, 1, 1]
        with faulty.hold("commit", nth=1, times=1) as gate:
            await engine.save({"w": W + 1}, step=2)
            assert (await other.load(target)).step == 1
            assert_same(target, {"w": W})
            gate.release()
            assert (await engine.load(target)).step == 2
            assert_same(target, {"w": W + 1})


# --- ranks that saved alone -----------------------------------------------------------------------


class Rows(DefaultSavePlanner):
    """Saves rows of a matrix, as a rank does that has these rows only."""

    def __init__(self, first: int, total: int) -> None:
        super().__init__()
        self.first, self.total = first, total

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = list(plan.items)
        for number, item in enumerate(items):
            if item.tensor_data is None:
                continue
            sizes = item.tensor_data.size
            offsets = torch.Size([self.first, 0])
            data = dataclasses.replace(
                item.tensor_data,
                chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
                size=torch.Size([self.total, *sizes[1:]]),
            )
            index = MetadataIndex(item.index.fqn, offsets)
            items[number] = dataclasses.replace(item, index=index, type=WriteItemType.SHARD, tensor_data=data)
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn]


def save_rank(path: Path, rank: int, rows: torch.Tensor, first: int, total: int) -> None:
    """What ``dcp.save(use_collectives=False)`` does on this rank; without a group it takes any for rank 0."""
    path.mkdir(parents=True, exist_ok=True)
    writer, planner = FileSystemWriter(path, sync_files=False), Rows(first, total)
    planner.set_up_planner({"w": rows, "n": 5}, writer.storage_meta(), rank == 0)
    writer.set_up_storage_writer(rank == 0, rank=rank, use_collectives=False)
    plan = writer.prepare_local_plan(planner.create_local_plan())
    _, metadata = planner._create_global_plan([plan])
    (plan,) = writer.prepare_global_plan([plan])
    results = writer.write_data(planner.finish_plan(plan), planner).wait()
    writer.finish(metadata, [results])


RANKS = [(0, 0), (1, 2), (2, 4)]  # rank, first row of two


def save_ranks(path: Path, whole: torch.Tensor) -> None:
    for rank, first in RANKS:
        save_rank(path, rank, whole[first : first + 2], first, len(whole))


WHOLE = random_tensor(torch.int32, (6, 5), 2)


async def test_ranks_that_saved_alone_are_read_together(root: Path) -> None:
    save_ranks(root / "step-00000003", WHOLE)
    assert not (root / "step-00000003" / ".metadata").exists()
    target = {"w": torch.zeros_like(WHOLE), "n": 0}
    async with CheckpointEngine(root) as engine:
        report = await engine.load(target)
        assert report.step == 3
        assert_same(target, {"w": WHOLE, "n": 5})
        assert_same(await engine.read("step-00000003"), {"w": WHOLE, "n": 5})
        latest = await engine.latest()
        assert latest is not None
        assert (latest.checkpoint_id, latest.producer, latest.num_files) == ("step-00000003", "stock", 3)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("lost", ["metadata", "data", "both"])
async def test_a_missing_rank_is_an_error_and_no_zeros(root: Path, rank: int, lost: str) -> None:
    save_ranks(root / "s", WHOLE)
    if lost != "data":
        (root / "s" / f"__{rank}.metadata").unlink()
    if lost != "metadata":
        (root / "s" / f"__{rank}_0.distcp").unlink()
    target = {"w": torch.full_like(WHOLE, 7), "n": 0}
    async with CheckpointEngine(root) as engine:
        for source in ("s", "latest"):
            with pytest.raises(LoadError):
                await engine.load(target, source)
        with pytest.raises(LoadError):
            await engine.read("s")
    assert_same(target, {"w": torch.full_like(WHOLE, 7), "n": 0})


@pytest.mark.parametrize("difference", ["shape", "dtype"])
async def test_ranks_that_contradict_each_other_are_an_error(root: Path, difference: str) -> None:
    """Files of an earlier, larger run lie there still: overwriting looks at rank 0 only."""
    save_ranks(root / "s", WHOLE)
    for file in (root / "s").glob("__2*"):
        file.unlink()
    rows = WHOLE[4:6].to(torch.float64 if difference == "dtype" else torch.int32)
    save_rank(root / "s", 2, rows, 4, 6 if difference == "dtype" else 8)
    target = {"w": torch.full_like(WHOLE, 7), "n": 0}
    async with CheckpointEngine(root) as engine:
        with pytest.raises(LoadError, match=r"\bw\b"):
            await engine.load(target, "s")
        with pytest.raises(LoadError):
            await engine.read("s")
    assert_same(target, {"w": torch.full_like(WHOLE, 7), "n": 0})


# --- what the trainer's objects make of it --------------------------------------------------------

CASTS = [
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float32),
    (torch.int64, torch.int32),
    (torch.complex64, torch.float32),
    (torch.float32, torch.int64),
    (torch.int32, torch.float32),
]


@pytest.mark.parametrize("writer", ["ours", "stock"])
@pytest.mark.parametrize(("was", "wanted"), CASTS, ids=str)
async def test_no_value_is_cast_without_a_word(
    root: Path, was: torch.dtype, wanted: torch.dtype, writer: str
) -> None:
    """Stock makes fp32 1e30 an fp16 inf: of the same name and shape, and another number."""
    state = {"m": {"big": torch.full((4,), 10**9 if was == torch.int64 else 1e9).to(was), "b": torch.ones(2)}}
    target = {"m": {"big": torch.full((4,), 3).to(wanted), "b": torch.zeros(2)}}
    before = frozen(target)
    async with CheckpointEngine(root) as engine:
        if writer == "ours":
            await saved(engine, state, checkpoint_id="s")
        else:
            stock_save(root / "s", state)
        with pytest.raises(IncompatibleStateError, match=r"m\.big") as caught:
            await engine.load(target, "s")
        for dtype in (was, wanted):
            assert str(dtype) in str(caught.value)
        assert_same(target, before)
        report = await engine.load(target, "s", strict=False)
        assert report.mismatched == ("m.big",)
        assert_same(target, {"m": {"big": before["m"]["big"], "b": torch.ones(2)}})


async def test_a_scheduler_with_duplicate_milestones_comes_back(root: Path) -> None:
    """153842: int keys of a Counter became text, beside the old ones: "duplicated milestones keys"."""

    def build() -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.MultiStepLR]:
        optim = torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.5)
        return optim, torch.optim.lr_scheduler.MultiStepLR(optim, milestones=[2, 4, 4, 7], gamma=0.5)

    optim, scheduler = build()
    rates: list[float] = []
    async with CheckpointEngine(root) as engine:
        for step in range(10):
            optim.step()
            scheduler.step()
            rates.append(optim.param_groups[0]["lr"])
            if step == 2:
                await saved(engine, {"optim": optim, "scheduler": scheduler})
        optim, scheduler = build()
        await engine.load({"optim": optim, "scheduler": scheduler})
        assert type(scheduler.milestones) is Counter
        assert scheduler.milestones == Counter({2: 1, 4: 2, 7: 1})
        again = rates[:3]
        for _ in range(7):
            optim.step()
            scheduler.step()
            again.append(optim.param_groups[0]["lr"])
        assert again == rates
        kept = (await engine.read())["scheduler"]["milestones"]
        assert (type(kept), kept) == (Counter, scheduler.milestones)


class Loader:
    """A data loader that makes its state with the first batch."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}

    def advance(self) -> None:
        self.data["shards"] = {
            0: {"position": self.data.get("shards", {0: {"position": 0}})[0]["position"] + 1}
        }
        self.data["buffer"] = torch.arange(3)

    def state_dict(self) -> dict[str, Any]:
        return self.data

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.data = state


async def test_a_stateful_that_is_empty_until_it_is_used_is_loaded_whole(root: Path) -> None:
    """126881: "a silent failure to load" of whatever the object has not made yet."""
    used, fresh = Loader(), Loader()
    used.advance()
    used.advance()
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"loader": used})
        await engine.load({"loader": fresh})
    assert_same(fresh.data, {"shards": {0: {"position": 2}}, "buffer": torch.arange(3)})


@pytest.mark.parametrize("lazy", [{}, {"data": None}], ids=["absent", "none"])
async def test_what_a_plain_mapping_has_not_made_yet_is_reported(root: Path, lazy: dict[str, Any]) -> None:
    """126881, its own example: here nobody can take the value, so it is an error and not a silence."""
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"dl_state": {"data": {"a": "b"}, "n": 1}})
        target = {"dl_state": {**lazy, "n": 0}}
        with pytest.raises(IncompatibleStateError, match=r"dl_state\.data\.a"):
            await engine.load(target)
        assert target == {"dl_state": {**lazy, "n": 0}}
        report = await engine.load(target, strict=False)
        assert report.unexpected == ("dl_state.data.a",)
        assert target == {"dl_state": {**lazy, "n": 1}}


async def test_a_stateful_that_was_made_after_the_save_is_named(root: Path) -> None:
    """126881 the other way round: stock says "Missing key", and the first one only."""
    added = nn.Linear(2, 2)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"loader": Loader()})
        with pytest.raises(IncompatibleStateError, match=r"ema\.weight.*ema\.bias"):
            await engine.load({"loader": Loader(), "ema": added})
        report = await engine.load({"loader": Loader(), "ema": added}, strict=False)
        assert report.missing == ("ema.weight", "ema.bias")


def two_layers() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def step_layer(model: nn.Sequential, optim: torch.optim.Optimizer, *layers: int) -> None:
    optim.zero_grad()
    for layer in layers:
        model[layer](torch.ones(3)).sum().backward()
    optim.step()


async def test_an_optimizer_with_the_state_of_some_parameters_comes_back(root: Path) -> None:
    """132628, 192202: parameters that never had a gradient have no state, and that is no mistake."""
    model, optim = two_layers()
    step_layer(model, optim, 1)
    assert set(optim.state_dict()["state"]) == {2, 3}
    other, other_optim = two_layers()
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"model": model, "optim": optim})
        await engine.load({"model": other, "optim": other_optim})
        assert_same(frozen(other_optim), frozen(optim))
        for pair in ((model, optim), (other, other_optim)):
            step_layer(*pair, 0, 1)
        assert_same(frozen(other), frozen(model))
        assert_same(frozen(other_optim), frozen(optim))


async def test_a_partial_optimizer_dict_leaves_no_entry_of_another_step(root: Path) -> None:
    """132628: an optimizer that has stepped everything is not left half old, half new."""
    model, optim = two_layers()
    step_layer(model, optim, 1)
    other, other_optim = two_layers()
    step_layer(other, other_optim, 0, 1)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"optim": optim})
        await engine.load({"optim": other_optim})
    assert_same(frozen(other_optim), frozen(optim))


async def test_app_state_resumes_where_parameters_have_no_state(root: Path) -> None:
    """132628, 192202, 192224: torch's own helper fails on such a dict, or on what it made of it."""
    model, optim = two_layers()
    step_layer(model, optim, 1)
    async with CheckpointEngine(root) as engine:
        await saved(engine, {"app": AppState(model, optim)})
        for stepped in ((), (0, 1)):
            other, other_optim = two_layers()
            if stepped:
                step_layer(other, other_optim, *stepped)
            await engine.load({"app": AppState(other, other_optim)})
            assert_same(frozen(other), frozen(model))
            assert_same(frozen(other_optim), frozen(optim))


class RefusesToLoad:
    """A Stateful whose error derives from BaseException, as all of stock's do."""

    def state_dict(self) -> dict[str, Any]:
        return {"n": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise CheckpointException("load", {})


async def test_an_error_of_stock_inside_a_load_becomes_one_of_the_tree(root: Path) -> None:
    """122529: ``except Exception`` and retry libraries miss DCP's CheckpointException."""
    state = {"s": RefusesToLoad()}
    async with CheckpointEngine(root) as engine:
        await saved(engine, state)
        with pytest.raises(LoadError, match="CheckpointException"):
            await engine.load(state)
        assert await engine.read() == {"s": {"n": 1}}


# --- pickles --------------------------------------------------------------------------------------


class Bomb:
    """Runs a shell command where it is unpickled carelessly."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.mark}'",)


def replace_item(path: Path, name: str, content: bytes) -> None:
    """Let another file hold the item ``name`` of a stock checkpoint."""
    (path / "__1_0.distcp").write_bytes(content)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    (index,) = [index for index in metadata.storage_data if index.fqn == name]
    metadata.storage_data[index] = _StorageInfo("__1_0.distcp", 0, len(content))
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


@pytest.mark.parametrize("trusted", [(), (Bomb,)], ids=["no_trust", "trusted_class"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["w", "leaf"])
async def test_items_of_a_stock_checkpoint_run_nothing(
    root: Path, tmp_path: Path, name: str, zipped: bool, trusted: tuple[type, ...]
) -> None:
    """189308, in the data files: whether the item is said to be a tensor or a leaf."""
    mark = tmp_path / "exploded"
    stock_save(root / "s", {"a": torch.ones(3), "leaf": 1, "w": torch.ones(3)})
    stream = io.BytesIO()
    torch.save(Bomb(mark), stream, _use_new_zipfile_serialization=zipped)
    replace_item(root / "s", name, stream.getvalue())
    target: dict[str, Any] = {"a": torch.zeros(3), "leaf": 0, "w": torch.zeros(3)}
    async with CheckpointEngine(root, trust=Trust(safe_globals=trusted)) as engine:
        for attempt in (engine.read("s"), engine.load(target, "s")):
            with pytest.raises(UntrustedCheckpointError, match="system" if zipped else "'s'"):
                await attempt
    assert not mark.exists()
    assert_same(target, {"a": torch.zeros(3), "leaf": 0, "w": torch.zeros(3)})


async def test_metadata_of_python_3_13_is_read_by_every_python(root: Path) -> None:
    """A path that 3.13 pickled names `pathlib._local`, which 3.12 and older can't import."""
    stock_save(root / "s", {"w": W})
    path = root / "s" / ".metadata"
    content = path.read_bytes()
    header, size, body = content[:3], int.from_bytes(content[3:11], "little"), content[11:]
    assert header == b"\x80\x04\x95"  # protocol 4, and one frame to the end
    assert size == len(body)
    for name in (b"pathlib._local", b"pathlib"):
        body = body.replace(bytes([0x8C, len(name)]) + name, b"\x8c\x0epathlib._local")
    assert b"pathlib._local" in body
    path.write_bytes(header + len(body).to_bytes(8, "little") + body)
    target = {"w": torch.zeros_like(W)}
    async with CheckpointEngine(root) as engine:
        await engine.load(target, "s")
        assert_same(await engine.read("s"), {"w": W})
    assert_same(target, {"w": W})


async def test_keys_can_be_read_without_planner_data(root: Path) -> None:
    """Stock's reader of single keys crashes where a writer left the paths of the names out."""
    stock_save(root / "s", {"m": {"w": W, "n": 3}, "other": 1})
    path = root / "s" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(dataclasses.replace(metadata, planner_data=None)))
    target = {"m": {"w": torch.zeros_like(W), "n": 0}, "other": 0}
    async with CheckpointEngine(root) as engine:
        await engine.load(target, "s")
        assert_same(target, {"m": {"w": W, "n": 3}, "other": 1})
        assert_same(await engine.read("s", keys=["m"]), {"m.w": W, "m.n": 3})


# --- what the user set up for torch.save ----------------------------------------------------------

OPTIONS = [
    ("load.mmap", True),
    ("load.endianness", torch.serialization.LoadEndianness.BIG),
    ("load.calculate_storage_offsets", True),
    ("save.compute_crc32", False),
    ("save.storage_alignment", 4096),
    ("save.use_pinned_memory_for_d2h", True),
]


@pytest.mark.parametrize(("option", "value"), OPTIONS, ids=[name for name, _ in OPTIONS])
async def test_options_of_torch_save_do_not_disturb(root: Path, option: str, value: Any) -> None:
    """Stock can't load under `load.mmap`, a process-wide option that users set for models of theirs."""
    run, other = TrainingRun(1), TrainingRun(2)
    run.step(2)
    leaves = {"text": "x" * 9000, "tuple": (1, torch.ones(2))}
    state = run.state | {"leaves": leaves}
    with config.patch(option, value):  # type: ignore[attr-defined]  # added by install_config_module
        stock_save(root / "stock", state)
        async with CheckpointEngine(root) as engine:
            await saved(engine, state | {"sparse": torch.eye(9).to_sparse()}, checkpoint_id="ours")
            assert_same((await engine.read("ours"))["sparse"], torch.eye(9).to_sparse())
            for name in ("ours", "stock"):
                await engine.load(other.state, name)
                assert_same(other.picture(), run.picture())
                other.step()
                assert_same((await engine.read(name))["leaves"], leaves)
        section, _, field = option.partition(".")
        assert getattr(getattr(config, section), field) == value
