"""A checkpoint that stays open: it is read and loaded from in parts, and stays the one that was chosen."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dcp_async import (
    CheckpointEngine,
    CheckpointNotFoundError,
    CorruptCheckpointError,
    EngineStateError,
    LoadError,
    Trust,
    UntrustedCheckpointError,
    open_checkpoint,
    sync,
)
from dcp_async.storage import LocalStorage
from tests.support.doubles import FaultyStorage, assert_same, open_descriptors

W = torch.arange(300.0 * 200).reshape(300, 200)


def make_state() -> dict[str, Any]:
    return {
        "model": {"w": W, "t": W.t(), "many": {str(n): torch.full((3,), float(n)) for n in range(50)}},
        "sparse": torch.eye(5).to_sparse(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
        "epoch": 3,
    }


@pytest_asyncio.fixture
async def path(tmp_path: Path) -> Path:
    async with CheckpointEngine(tmp_path) as engine:
        await engine.save(make_state(), step=1, notes={"loss": 0.5})
    return tmp_path / "step-00000001"


async def test_what_a_checkpoint_holds_is_told_without_a_model(path: Path) -> None:
    async with open_checkpoint(path) as checkpoint:
        assert (checkpoint.info.step, checkpoint.info.notes) == (1, {"loss": 0.5})
        assert set(checkpoint.names) == set(checkpoint.metadata.state_dict_metadata)
        assert checkpoint.names[:3] == ("model.w", "model.t", "model.many.0")
        assert_same(await checkpoint.read(), make_state())
        assert_same(
            await checkpoint.read("model.many.1*"),
            {"model": {"many": {str(n): torch.full((3,), float(n)) for n in (1, *range(10, 20))}}},
        )
        with pytest.raises(LoadError, match="holds nothing named 'modle'"):
            await checkpoint.read(["epoch", "modle"])


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.w", (slice(0, 8),)),
        ("model.w", (slice(250, 299, 7), slice(10, 30))),
        ("model.w", (..., 5)),
        ("model.w", (slice(9, 9),)),
        ("model.w", -1),
        ("model.t", (slice(3, 5), slice(100, 200))),
        ("scalar", ()),
        ("empty", (slice(0, 3),)),
    ],
)
async def test_a_part_of_a_tensor_is_that_part(path: Path, name: str, index: Any) -> None:
    saved: Any = make_state()
    for key in name.split("."):
        saved = saved[key]
    async with open_checkpoint(path) as checkpoint:
        assert_same(await checkpoint.tensor(name, index), saved[index].contiguous())
        assert_same(await checkpoint.tensor(name), saved)


@pytest.mark.parametrize(
    ("name", "index", "error", "message"),
    [
        ("w", ..., LoadError, "holds nothing named 'w'"),
        ("epoch", ..., LoadError, "has no tensor as 'epoch'"),
        ("sparse", (slice(0, 2),), LoadError, "sparse_coo, which can't be cut so; read it whole"),
        ("model.w", 300, IndexError, "out of bounds"),
        ("model.w", "a", TypeError, "not by str"),
        ("model.w", slice(None, None, -1), ValueError, "at least 1"),
    ],
)
async def test_what_is_no_part_of_a_tensor_is_one_error(
    path: Path, name: str, index: Any, error: type[Exception], message: str
) -> None:
    async with open_checkpoint(path) as checkpoint:
        with pytest.raises(error, match=message):
            await checkpoint.tensor(name, index)


@pytest.mark.parametrize("budget_bytes", [1, 4096, 1 << 20, 128 << 20])
async def test_a_stream_gives_every_tensor_once_in_the_order_of_the_files(
    path: Path, budget_bytes: int
) -> None:
    async with open_checkpoint(path) as checkpoint:
        streamed = [item async for item in checkpoint.stream(budget_bytes=budget_bytes)]
        names = [name for name, _ in streamed]
        stored = checkpoint.metadata.storage_data
        offsets = {index.fqn: place.offset for index, place in stored.items()}
        assert names == sorted(set(checkpoint.names) - {"epoch"}, key=offsets.__getitem__)
        for name, tensor in streamed:
            assert_same(tensor, await checkpoint.tensor(name))
        some = [name async for name, _ in checkpoint.stream(["scalar", "model.many.?"], budget_bytes=64)]
        assert sorted(some) == [*(f"model.many.{n}" for n in range(10)), "scalar"]


async def test_a_stream_that_nobody_follows_any_more_leaves_nothing_behind(path: Path) -> None:
    async with open_checkpoint(path) as checkpoint:
        stream = checkpoint.stream("model.*", budget_bytes=2048)
        assert (await anext(stream))[0].startswith("model.")
        await stream.aclose()
        task = asyncio.ensure_future(anext(checkpoint.stream("model.*", budget_bytes=2048)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_stream_that_can_not_be_is_refused(path: Path) -> None:
    async with open_checkpoint(path) as checkpoint:
        with pytest.raises(ValueError, match="at least 1"):
            await anext(checkpoint.stream(budget_bytes=0))
        with pytest.raises(LoadError, match="holds no tensor named 'epoch'"):
            await anext(checkpoint.stream(["model.*", "epoch"]))


async def test_parts_of_a_state_are_loaded_at_different_moments(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    optim = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optim.step()
    async with CheckpointEngine(tmp_path) as engine:
        await engine.save({"model": model, "optim": optim, "epoch": 3}, step=1)
        async with engine.checkpoint() as checkpoint:
            target, rest = nn.Linear(4, 2), {"epoch": 0}
            assert (await checkpoint.load({"model": target})).step == 1
            other = torch.optim.AdamW(target.parameters())
            # the run goes on, and replaces what is being loaded from
            await engine.save({"model": nn.Linear(4, 2), "optim": optim, "epoch": 9}, step=1, replace=True)
            await engine.save({"epoch": 10}, step=2)
            await engine.wait()
            await checkpoint.load({"optim": other})
            await checkpoint.load(rest, keys=["epoch"])
            renamed = {"net": nn.Linear(4, 2)}
            await checkpoint.load(renamed, rename={"model.*": "net.*"})
        assert_same(other.state_dict(), optim.state_dict())
        for loaded in (target, renamed["net"]):
            assert_same(loaded.state_dict(), model.state_dict())
        assert rest == {"epoch": 3}


async def test_a_checkpoint_that_is_removed_stays_readable(path: Path) -> None:
    async with open_checkpoint(path) as checkpoint:
        shutil.rmtree(path)
        assert_same(await checkpoint.tensor("model.w"), W)
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint 'step-00000001' in"):
        await open_checkpoint(path).open()


async def test_damage_is_found_by_whoever_reads_it(path: Path) -> None:
    (file,) = path.glob("*.distcp")
    raw = bytearray(file.read_bytes())
    raw[raw.find(W.numpy().tobytes()) + 100] ^= 1
    file.write_bytes(raw)
    async with open_checkpoint(path) as checkpoint:
        assert (await checkpoint.read("epoch")) == {"epoch": 3}
        for attempt in (
            checkpoint.tensor("model.w"),
            checkpoint.tensor("model.w", 0),
            anext(checkpoint.stream("model.w")),
        ):
            with pytest.raises(CorruptCheckpointError):
                await attempt
        # rows in blocks that are whole
        assert_same(await checkpoint.tensor("model.w", slice(250, 251)), W[250:251])


class Local:
    """Nobody's trust admits it."""


async def test_trust_decides_what_is_unpickled(tmp_path: Path) -> None:
    dcp.save({"w": W, "leaf": Local()}, checkpoint_id=str(tmp_path / "s"), no_dist=True)
    async with open_checkpoint(tmp_path / "s") as checkpoint:
        assert checkpoint.info.producer == "stock"
        assert_same(await checkpoint.tensor("w", (slice(1, 3), slice(0, 2))), W[1:3, 0:2])
        assert_same([item async for item in checkpoint.stream()], [("w", W)])
        with pytest.raises(UntrustedCheckpointError):
            await checkpoint.read("leaf")
    async with open_checkpoint(tmp_path / "s", trust=Trust(safe_globals=(Local,))) as checkpoint:
        assert isinstance((await checkpoint.read("leaf"))["leaf"], Local)


async def test_a_closed_checkpoint_says_so(path: Path) -> None:
    checkpoint = open_checkpoint(path)
    with pytest.raises(EngineStateError, match="not open"):
        await checkpoint.read()
    async with checkpoint:
        with pytest.raises(EngineStateError, match="opened before"):
            await checkpoint.open()
    await checkpoint.close()
    for use in (checkpoint.read, lambda: anext(checkpoint.stream())):
        with pytest.raises(EngineStateError, match="this checkpoint is closed"):
            await use()


async def test_the_end_of_an_engine_closes_its_checkpoints(path: Path) -> None:
    before = open_descriptors()
    async with CheckpointEngine(path.parent) as engine:
        checkpoint = await engine.checkpoint(1).open()
    assert {
        n for n, what in open_descriptors().items() if before.get(n) != what and ".distcp" in what
    } == set()
    with pytest.raises(EngineStateError, match="engine is closed"):
        await checkpoint.read()
    await checkpoint.close()


async def test_a_checkpoint_that_is_dropped_is_closed_with_a_warning(path: Path) -> None:
    async with CheckpointEngine(path.parent) as engine:
        for dropped in ([engine.checkpoint(1)], [open_checkpoint(path)]):
            await dropped[0].open()
            with pytest.warns(ResourceWarning, match="was dropped while it was open"):
                dropped.clear()


async def test_latest_passes_over_a_checkpoint_that_is_damaged_at_first_sight(path: Path) -> None:
    async with CheckpointEngine(path.parent) as engine:
        await engine.save({"epoch": 4}, step=2)
        await engine.wait()
        (file,) = (path.parent / "step-00000002").glob("*.distcp")
        file.write_bytes(file.read_bytes()[:-1])
        async with engine.checkpoint() as checkpoint:
            assert checkpoint.info.step == 1
        with pytest.raises(CorruptCheckpointError):
            await engine.checkpoint(2).open()


async def test_a_checkpoint_in_a_storage_of_the_users_is_read_in_parts(path: Path) -> None:
    storage = FaultyStorage(LocalStorage(path.parent))
    async with CheckpointEngine(storage) as engine, engine.checkpoint() as checkpoint:
        assert_same(await checkpoint.tensor("model.w", 7), W[7])
        assert_same([item async for item in checkpoint.stream("model.w")], [("model.w", W)])
    await storage.close()


async def test_a_checkpoint_is_opened_by_its_url(tmp_path: Path) -> None:
    for root in (f"memory://{tmp_path.name}", (tmp_path / "a b").as_uri()):
        async with CheckpointEngine(root) as engine:
            await engine.save({"w": W}, checkpoint_id="one two")
            await engine.wait()
            name = "one%20two" if root.startswith("file") else "one two"
            async with open_checkpoint(f"{root}/{name}") as checkpoint:
                assert_same(await checkpoint.tensor("w", slice(3)), W[:3])
            await engine.save({"w": W}, checkpoint_id="one two", replace=True)
    with pytest.raises(ValueError, match="no storage serves ftp"):
        open_checkpoint("ftp://host/step-1")


@pytest.mark.parametrize("path", [3, None])
async def test_only_a_path_is_opened_without_an_engine(path: Any) -> None:
    with pytest.raises(TypeError, match="by the path of its directory"):
        open_checkpoint(path)


def test_the_blocking_twin_reads_the_same(tmp_path: Path) -> None:
    with sync.CheckpointEngine(tmp_path) as engine:
        engine.save(make_state(), step=1)
        with engine.checkpoint() as checkpoint:
            target = {"model": {"w": torch.zeros(300, 200)}}
            checkpoint.load(target, keys="model.w")
            assert_same(target["model"]["w"], W)
    with sync.open_checkpoint(tmp_path / "step-00000001") as checkpoint:
        assert_same(checkpoint.read("epoch"), {"epoch": 3})
        assert_same(checkpoint.tensor("model.w", (slice(0, 8),)), W[:8])
        names = [name for name, _ in checkpoint.stream(budget_bytes=1 << 20)]
        assert sorted(names) == sorted(name for name in checkpoint.names if name != "epoch")
        for name, _ in checkpoint.stream(budget_bytes=2048):
            assert name == names[0]
            break
    assert "closed" in repr(checkpoint)
